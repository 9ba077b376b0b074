"Least action in Lightning and in the Trainer of Hugging Face: what the chapter does not show."
import logging
import os
import re
import sys
import warnings
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lap_nb.adapters import LeastActionMixin, lightning_callback
from lap_nb.data import digits
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.nets import dense_net

pl = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")
hugging_face = pytest.mark.skipif(not transformers.is_torch_available(),
                                  reason="transformers refuses this version of PyTorch: install a newer PyTorch")
warnings.filterwarnings("ignore", module="lightning")
logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.ERROR)

SPLIT = digits().split(80)
X, Y = SPLIT.x[SPLIT.train], SPLIT.y[SPLIT.train]


def net():
    torch.manual_seed(0)
    return dense_net(64, 10, 2, 8)


def loader(): return DataLoader(TensorDataset(X, Y), batch_size=20)


def plain(epochs, accumulate=1):
    "The loop of one's own, with gradients of `accumulate` batches averaged."
    model = net()
    la, opt = LeastAction(model), torch.optim.SGD(model.parameters(), lr=.1)
    for _ in range(epochs):
        for i, (x, y) in enumerate(loader(), 1):
            (la(F.cross_entropy(model(x), y)) / accumulate).backward()
            if i % accumulate == 0: opt.step(); opt.zero_grad()
    return model, la


def check_same(model, la, expected):
    for p, q in zip(model.parameters(), expected[0].parameters()):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(la.lam, expected[1].lam, rtol=1e-5, atol=0)


# Lightning

class Module(pl.LightningModule):
    def __init__(self, as_dict=False):
        super().__init__()
        self.net, self.as_dict, self.validations = net(), as_dict, 0
    def training_step(self, batch, _):
        loss = F.cross_entropy(self.net(batch[0]), batch[1])
        return {"loss": loss, "more": 1} if self.as_dict else loss
    def validation_step(self, batch, _):
        self.validations += 1
        self.log("val_loss", F.cross_entropy(self.net(batch[0]), batch[1]))
    def configure_optimizers(self): return torch.optim.SGD(self.net.parameters(), lr=.1)


def pl_fit(module, la, epochs=2, path=None, **settings):
    settings = dict(enable_checkpointing=False) | settings
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[lightning_callback(la)], logger=False,
                         enable_progress_bar=False, enable_model_summary=False, **settings)
    trainer.fit(module, loader(), loader(), ckpt_path=path)
    return trainer


@pytest.mark.parametrize("as_dict, accumulate", [(False, 1), (True, 1), (False, 2)])
def test_lightning_trains_as_the_plain_loop(as_dict, accumulate):
    module = Module(as_dict)
    la = LeastAction(module.net)
    trainer = pl_fit(module, la, accumulate_grad_batches=accumulate)
    check_same(module.net, la, plain(2, accumulate))
    assert module.validations > 0 and "training_step" not in vars(module)
    assert trainer.callback_metrics["lambda"] == la.lam and trainer.callback_metrics["action"] == la.action


def test_lightning_keeps_lambda_in_its_checkpoint(tmp_path):
    first = Module()
    trainer = pl_fit(first, LeastAction(first.net), 1)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    second = Module()
    la = LeastAction(second.net)
    pl_fit(second, la, 2, tmp_path / "one.ckpt")
    check_same(second.net, la, plain(2))


def test_lightning_module_is_as_before_after_an_error():
    class Failing(Module):
        def on_train_batch_end(self, *args): raise KeyError("mine")
    module = Failing()
    with pytest.raises(KeyError, match="mine"): pl_fit(module, LeastAction(module.net))
    assert "training_step" not in vars(module)


class Skipping(Module):
    "Leaves every other batch out, after its forward pass."
    def training_step(self, batch, i):
        loss = super().training_step(batch, i)
        return None if i % 2 else loss


def test_lightning_skips_a_batch():
    module = Skipping()
    la = LeastAction(module.net)
    pl_fit(module, la)
    model = net()
    expected, opt = LeastAction(model), torch.optim.SGD(model.parameters(), lr=.1)
    for _ in range(2):
        for i, (x, y) in enumerate(loader()):
            if i % 2: continue
            opt.zero_grad(); expected(F.cross_entropy(model(x), y)).backward(); opt.step()
    check_same(module.net, la, (model, expected))


class Pair(pl.LightningModule):
    "Two networks of one shape."
    def __init__(self):
        super().__init__()
        self.a, self.b = net(), net()
    def training_step(self, batch, _): return F.cross_entropy(self.a(batch[0]) + self.b(batch[0]), batch[1])
    def configure_optimizers(self): return torch.optim.SGD(self.parameters(), lr=.1)


def pair_fit(module, least_actions, epochs, path=None, **settings):
    callbacks = [lightning_callback(la) for la in least_actions]
    assert len({c.state_key for c in callbacks}) == len(callbacks)
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, logger=False,
                         enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, **settings)
    trainer.fit(module, loader(), ckpt_path=path)
    return trainer


@pytest.mark.parametrize("order", [1, -1])
def test_two_networks_in_one_module_have_a_callback_each(tmp_path, order):
    "Both see the task's loss; a checkpoint keeps them apart, in whichever order they are named."
    def made(module):
        return [LeastAction(module.a, DualAscent(tau=1.)), LeastAction(module.b, DualAscent(tau=3.))][::order]
    model = Pair()
    expected, opt = [LeastAction(model.a, DualAscent(tau=1.)),
                     LeastAction(model.b, DualAscent(tau=3.))], torch.optim.SGD(model.parameters(), lr=.1)
    for _ in range(2):
        for x, y in loader():
            loss = F.cross_entropy(model.a(x) + model.b(x), y)
            opt.zero_grad(); (expected[0](loss) + expected[1](loss) - loss).backward(); opt.step()
    first = Pair()
    trainer = pair_fit(first, made(first), 1)
    assert {"lambda of a.flow.blocks.0", "lambda of b.flow.blocks.0"} <= set(trainer.callback_metrics)
    trainer.save_checkpoint(tmp_path / "one.ckpt")
    second = Pair()
    found = made(second)
    pair_fit(second, found[::-1], 2, tmp_path / "one.ckpt")
    for p, q in zip(second.parameters(), model.parameters()): torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    for la, other in zip(found[::order], expected): torch.testing.assert_close(la.lam, other.lam, rtol=1e-4, atol=0)
    assert "training_step" not in vars(second)


@pytest.mark.parametrize("at", ["training_step", "on_train_batch_end", "forward"])
def test_an_interrupted_lightning_cell_leaves_everything_reusable(at):
    class Interrupted(Module):
        armed = True
        def trip(self):
            if self.armed: self.armed = False; raise KeyboardInterrupt
        def training_step(self, batch, i):
            loss = super().training_step(batch, i)
            if at == "training_step" and i == 1: self.trip()
            return loss
        def on_train_batch_end(self, *args):
            if at == "on_train_batch_end": self.trip()
    module = Interrupted()
    la = LeastAction(module.net)
    hook = module.net.head.register_forward_pre_hook(lambda *_: module.trip() if at == "forward" else None)
    with pytest.raises((KeyboardInterrupt, SystemExit)): pl_fit(module, la)
    hook.remove()
    assert "training_step" not in vars(module)
    calls = la.calls
    pl_fit(module, la, 1)
    assert la.calls == calls + 4 and "training_step" not in vars(module)


def test_a_training_step_of_the_users_own_is_put_back():
    module, mine = Module(), []
    step = module.training_step
    def own(batch, batch_idx): mine.append(batch_idx); return step(batch, batch_idx)
    module.training_step = own
    pl_fit(module, LeastAction(module.net), 1)
    assert module.training_step is own and mine == [0, 1, 2, 3]


@pytest.mark.parametrize("kind, message", [(TypeError, "manual optimisation"), (ValueError, "not in Module"), (TypeError, "least_action is a dict of 0, expected")])
def test_what_lightning_cannot_do_is_refused_before_work(kind, message):
    module = Module()
    module.automatic_optimization = "manual" not in message
    with pytest.raises(kind, match=message):
        pl_fit(module, {} if "dict" in message else LeastAction(net() if "not in" in message else module.net))
    assert "training_step" not in vars(module)


# Optimisers that ask for the loss more than once

class Sam:
    "Sharpness-aware minimisation in two passes."
    def __init__(self, params): self.params = list(params); self.opt = torch.optim.SGD(self.params, lr=.1)
    def step(self, closure):
        closure()
        moved = [.05 * p.grad / (1e-12 + torch.stack([q.grad.norm() for q in self.params]).norm()) for p in self.params]
        with torch.no_grad():
            for p, e in zip(self.params, moved): p += e
        closure()
        with torch.no_grad():
            for p, e in zip(self.params, moved): p -= e
        self.opt.step()


@pytest.mark.parametrize("make", [lambda params: torch.optim.LBFGS(params, max_iter=4), Sam])
def test_an_optimizer_of_several_passes_and_its_remedies(make):
    def step(**clock):
        model = net()
        la, opt = LeastAction(model, DualAscent(**clock)), make(model.parameters())
        lams = []
        def closure():
            for p in model.parameters(): p.grad = None
            objective = la(F.cross_entropy(model(X), Y)); objective.backward(); lams.append(la.lam.item())
            return objective
        opt.step(closure)
        return la, lams
    la, lams = step()
    assert la.calls > 1 and len(set(lams)) == la.calls, "lambda moves within the step"
    la, lams = step(every=None)
    assert la.calls > 1 and set(lams) == {1.}
    la.ascend(torch.tensor(2.))
    assert la.lam == 3.
    if make is Sam:
        la, lams = step(accumulate=2)
        assert lams[0] == 1. and la.calls == 2 and la.lam > 1


# Hugging Face

class Classifier(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = net()
    def forward(self, x, labels, **kwargs):
        logits = self.net(x)
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


class OurTrainer(LeastActionMixin, transformers.Trainer):
    def _get_train_sampler(self, *args): return torch.utils.data.SequentialSampler(self.train_dataset)


def hf_trainer(model, folder, la=None, data=None, **settings):
    settings = dict(per_device_train_batch_size=20, num_train_epochs=2, save_strategy="epoch",
                    logging_steps=2) | settings
    args = transformers.TrainingArguments(str(folder), learning_rate=.1, optim="sgd", lr_scheduler_type="constant",
                                          max_grad_norm=0, use_cpu=True, report_to=[], disable_tqdm=True, **settings)
    data = [dict(x=x, labels=y) for x, y in zip(X, Y)] if data is None else data
    return OurTrainer(model, args, train_dataset=data, eval_dataset=data, least_action=la or LeastAction(model))


@hugging_face
@pytest.mark.parametrize("accumulate", [1, 2])
def test_hugging_face_trains_as_the_plain_loop(tmp_path, accumulate):
    "The model takes keyword arguments for its loss, for which the trainer would scale it by all accumulated items."
    trainer = hf_trainer(Classifier(), tmp_path, gradient_accumulation_steps=accumulate)
    trainer.train()
    check_same(trainer.model.net, trainer.least_action, plain(2, accumulate))
    assert trainer.state.log_history[0]["lambda"] > 1


@hugging_face
def test_hugging_face_resumes_with_lambda(tmp_path):
    hf_trainer(Classifier(), tmp_path, num_train_epochs=1).train()
    assert (tmp_path / "checkpoint-4" / "least_action.pt").exists()
    again = hf_trainer(Classifier(), tmp_path)
    again.train(resume_from_checkpoint=True)
    check_same(again.model.net, again.least_action, plain(2))


@hugging_face
def test_hugging_face_evaluates_the_task_alone(tmp_path):
    trainer = hf_trainer(Classifier(), tmp_path)
    found = trainer.evaluate()["eval_loss"]
    assert found == pytest.approx(F.cross_entropy(trainer.model.net.eval()(X), Y).item(), rel=1e-4)


@hugging_face
def test_a_transformer_of_theirs(tmp_path):
    "GPT-2, untouched: its blocks keep the shape of their input."
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0,
                                     eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    la = LeastAction(model, blocks={f"transformer.h.{i}": block for i, block in enumerate(model.transformer.h)})
    tokens = torch.randint(50, (16, 12))
    trainer = hf_trainer(model, tmp_path, la, [dict(input_ids=t, labels=t) for t in tokens],
                         per_device_train_batch_size=8, save_strategy="no")
    trainer.train()
    assert la.action > 0 and la.lam > 1 and len(la.blocks) == 3


# A checkpoint of both is whole, or passed over

class Killed(BaseException): "The process is gone: nothing that it would still do to files happens."


class Kills:
    "Ends a training at its n-th operation on a file in a folder, and lets it do none after that."
    EVENTS = ("os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree")
    def __init__(self): self.folder, self.left, self.seen = None, None, 0; sys.addaudithook(self)
    def __call__(self, event, args):
        if self.folder is None or not (event in self.EVENTS
                                       or event == "open" and isinstance(args[1], str) and set(args[1]) & set("wax+")):
            return
        # rmtree works in the folder
        if self.folder in str(args[0]) or event in ("os.remove", "os.rmdir") and not os.path.isabs(args[0]): self.tick()
    def tick(self, last=lambda: None):
        self.seen += 1
        if self.left is None or self.seen <= self.left: return
        if self.seen == self.left + 1: last()
        raise Killed
    def within(self, folder, left, work):
        "Was the work ended?"
        self.folder, self.left, self.seen = str(folder), left, 0
        try: work()
        except Killed: return True
        finally: self.folder = None
        return False


@pytest.fixture(scope="module")
def kills(): return Kills()


@hugging_face
def test_a_kill_at_any_file_operation_leaves_a_state_to_resume_from(tmp_path, kills, monkeypatch):
    """Also within `torch.save`, whose writer is written in C++: half a file, then the end. A fresh trainer ends where
    an undisturbed one does."""
    settings, save = dict(save_total_limit=1), torch.save
    def torn(content, file, *args, **kwargs):
        if kills.folder is not None and isinstance(file, (str, os.PathLike)):
            kills.tick(lambda: Path(file).write_bytes(b"half"))
        save(content, file, *args, **kwargs)
    monkeypatch.setattr(torch, "save", torn)
    expected = hf_trainer(Classifier(), tmp_path / "whole", **settings)
    kills.within(tmp_path, None, expected.train)
    total, resumable, warned = kills.seen, 0, 0
    for n in range(total):
        folder = tmp_path / f"{n}"
        assert kills.within(folder, n,
                            hf_trainer(Classifier(), folder,
                                       **settings).train), f"operation {n} of {total} was not reached"
        again = hf_trainer(Classifier(), folder, **settings)
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            try:
                again.train(resume_from_checkpoint=True)
            except ValueError as e:
                assert re.search("no checkpoint in .* is whole", str(e)) and resumable == 0, (
                    f"operation {n}: after the first whole checkpoint there is always one"
                )
                continue
        resumable += 1; warned += any("the newest whole checkpoint" in str(w.message) for w in told)
        check_same(again.model.net, again.least_action, (expected.model.net, expected.least_action))
    assert resumable > total / 3 and warned > 0


@hugging_face
@pytest.mark.parametrize("spoil, said", [(lambda f: (f / "trainer_state.json").unlink(), "lacks trainer_state.json"), (lambda f: (f / "trainer_state.json").write_text('{"epoch"'), "has half of trainer_state.json"),
                                         (lambda f: (f / "least_action.pt").unlink(), "lacks least_action.pt"), (lambda f: (f / "least_action.pt").write_bytes(b"PK"), "has no whole least_action.pt")])
def test_a_checkpoint_that_is_not_whole_is_named(tmp_path, spoil, said):
    hf_trainer(Classifier(), tmp_path).train()
    spoil(tmp_path / "checkpoint-8")
    with pytest.raises(ValueError, match=f"checkpoint-8 {said}.*True for the newest"):
        hf_trainer(Classifier(), tmp_path).train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    again = hf_trainer(Classifier(), tmp_path)
    with pytest.warns(UserWarning, match=f"checkpoint-4, the newest whole checkpoint: checkpoint-8 {said}"):
        again.train(resume_from_checkpoint=True)
    check_same(again.model.net, again.least_action, plain(2))


@hugging_face
def test_an_interrupted_cell_of_hugging_face_leaves_the_trainer_reusable(tmp_path):
    trainer = hf_trainer(Classifier(), tmp_path, save_strategy="no")
    def stop(*args): raise KeyboardInterrupt
    hook = trainer.model.net.register_forward_hook(stop)
    with pytest.raises(KeyboardInterrupt): trainer.train()
    hook.remove()
    trainer.model.train(); trainer.model.net(X[:2])   # a stray pass
    trainer.train()
    assert trainer.least_action.calls == 8

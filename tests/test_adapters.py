"Least action in Lightning and in the Trainer of Hugging Face: what the chapter does not show."
import logging
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from lap_nb.adapters import LeastActionMixin, lightning_callback
from lap_nb.data import digits
from lap_nb.dynamics import dense_net
from lap_nb.least_action import LeastAction

pl = pytest.importorskip("lightning.pytorch")
transformers = pytest.importorskip("transformers")
hugging_face = pytest.mark.skipif(not transformers.is_torch_available(), reason="transformers refuses this version of PyTorch: install a newer PyTorch")
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
    for p, q in zip(model.parameters(), expected[0].parameters()): torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)
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
    trainer = pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=[lightning_callback(la)], logger=False, enable_progress_bar=False,
                         enable_model_summary=False, **settings)
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
    settings = dict(per_device_train_batch_size=20, num_train_epochs=2, save_strategy="epoch", logging_steps=2) | settings
    args = transformers.TrainingArguments(str(folder), learning_rate=.1, optim="sgd", lr_scheduler_type="constant", max_grad_norm=0, use_cpu=True,
                                          report_to=[], disable_tqdm=True, **settings)
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
    config = transformers.GPT2Config(vocab_size=50, n_positions=16, n_embd=16, n_layer=3, n_head=2, bos_token_id=0, eos_token_id=0)
    torch.manual_seed(0)
    model = transformers.GPT2LMHeadModel(config)
    la = LeastAction(model, blocks={f"transformer.h.{i}": block for i, block in enumerate(model.transformer.h)})
    tokens = torch.randint(50, (16, 12))
    trainer = hf_trainer(model, tmp_path, la, [dict(input_ids=t, labels=t) for t in tokens], per_device_train_batch_size=8, save_strategy="no")
    trainer.train()
    assert la.action > 0 and la.lam > 1 and len(la.blocks) == 3

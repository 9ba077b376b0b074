"Stop, resume, kill: a training ends on the same bits, whatever happened to it on the way."
import errno
import os
import pickle
import resource
import signal
import subprocess
import sys
import time
from contextlib import nullcontext, suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

from lap_nb import files
from lap_nb.data import digits
from lap_nb.dynamics import Flow, ResidualNet
from lap_nb.ensembles import Ensemble, _attached, _made
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.files import CheckpointError, claim, digest, load_checkpoint, save_checkpoint, write_atomically
from lap_nb.nets import dense_net
from lap_nb.training import Checkpoints, Diverged, TrainConfig, fit, train_loop

PLACES = ("model", "opt", "least_action", "generators", "rng", "points", "step", "epoch", "at")


def net(seed=0):
    "With dropout and batch norm: the global generator and buffers count."
    torch.manual_seed(seed)
    velocity = lambda: nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(.2), nn.Linear(
        16, 64))
    return ResidualNet(Flow([velocity() for _ in range(2)]), nn.Linear(64, 10))


def train(path, epochs=12, resume=False, seed=0, every=3, **settings):
    model = net(seed)
    settings = dict(batch_size=25, eval_every=2, optimizer="sgd", lr=.02, schedule="cosine", clip=1.) | settings
    return fit(model,
               digits().split(100), LeastAction(model, DualAscent(every=3)), epochs=epochs,
               checkpoints=Checkpoints(path, resume, every), **settings)


def same(a, b, places=PLACES): return [p for p in places if digest(a[p]) != digest(b[p])]


class Stop(Exception): "Ends a training between two steps."


def stopper(epoch):
    def stop(training):
        if training.epoch >= epoch: raise Stop
    return stop


# The state

@pytest.fixture(scope="module")
def states(tmp_path_factory):
    "The end of an undisturbed training, its middle and its beginning."
    folder = tmp_path_factory.mktemp("states")
    train(folder / "straight.pt")
    with pytest.raises(Stop): train(folder / "halved.pt", callbacks=[stopper(6)])
    with pytest.raises(Stop): train(folder / "start.pt", callbacks=[stopper(2)], every=None, eval_every=1)
    return [load_checkpoint(folder / f"{name}.pt") for name in ("straight", "halved", "start")]


@pytest.mark.parametrize("place", ["model", "opt", "least_action", "generators", "rng", "at", None])
def test_every_part_of_the_state_is_needed(tmp_path, states, place):
    "A checkpoint with one part of it from the start does not lead to the same end; the whole one does."
    straight, halved, start = states
    save_checkpoint(tmp_path / "run.pt",
                    halved if place is None else halved | {place: 1 if place == "at" else start[place]})
    train(tmp_path / "run.pt", resume=True)
    differ = same(straight, load_checkpoint(tmp_path / "run.pt"))
    assert not differ if place is None else "model" in differ


def row(resume=False, callbacks=(), path=None, seeds=(0, 1)):
    split = digits().splits(60, seeds)
    ensemble = Ensemble([_made(partial(dense_net, 64, 10, 2, 8), s + 10 * resume) for s in seeds])
    return train_loop(
        ensemble,
        split,
        _attached([LeastAction] * len(ensemble), ensemble),
        [torch.Generator().manual_seed(s) for s in seeds],
        TrainConfig(epochs=6, batch_size=25, eval_every=2, clip=0.5),
        None,
        callbacks,
        path and Checkpoints(path, resume),
    )


def test_a_row_resumes_alike(tmp_path):
    straight = row()
    with pytest.raises(Stop): row(path=tmp_path / "row.pt", callbacks=[stopper(4)])
    resumed = row(path=tmp_path / "row.pt", resume=True)
    for name, curve in straight.items(): assert torch.equal(curve, resumed[name])


def test_resuming_a_finished_training_returns_its_curves(tmp_path):
    first, again = train(tmp_path / "run.pt", 4), train(tmp_path / "run.pt", 4, resume=True)
    for name, curve in first.curves.items(): assert torch.equal(curve, again.curves[name])


def test_a_longer_training_goes_on_from_a_shorter_one(tmp_path):
    straight = train(tmp_path / "a.pt", 8, schedule="constant")
    train(tmp_path / "b.pt", 4, schedule="constant")
    longer = train(tmp_path / "b.pt", 8, resume=True, schedule="constant")
    for name, curve in straight.curves.items(): assert torch.equal(curve, longer.curves[name])


@pytest.mark.parametrize("change, message", [(dict(batch_size=20), "batch size 25, now 20"), (dict(data=digits().split(100, seed=3)), "data digits"),
                                             (dict(seed=4), r"seeds \[0\], now \[4\]")])
def test_another_training_is_refused_unless_forced(tmp_path, change, message):
    def again(resume):
        model = net()
        settings = dict(data=digits().split(100), batch_size=25, epochs=5) | change
        return fit(model, least_action=LeastAction(model, DualAscent(every=3)), optimizer="sgd",
                   checkpoints=Checkpoints(tmp_path / "run.pt", resume), **settings)
    train(tmp_path / "run.pt", 4)
    with pytest.raises(ValueError, match=message): again(True)
    assert again("force").curves["epoch"][-1] == 5


def test_another_network_or_no_least_action_is_refused(tmp_path):
    train(tmp_path / "run.pt", 2)
    with pytest.raises(ValueError, match="with least action, this one is not"):
        fit(net(), digits().split(100), batch_size=25, checkpoints=Checkpoints(tmp_path / "run.pt", resume=True))
    other = dense_net(64, 10, 2)
    with pytest.raises(ValueError, match="(?s)of another network.*Missing key"):
        fit(other,
            digits().split(100), LeastAction(other), batch_size=25, optimizer="sgd",
            checkpoints=Checkpoints(tmp_path / "run.pt", resume=True))


def test_another_optimizer_is_refused_and_another_precision_goes_on(tmp_path):
    for name, change in (("adamw", dict(optimizer="adamw")), ("half", dict(precision="float16"))):
        train(tmp_path / name, 2, **change)
        if name == "half": assert train(tmp_path / name, 4, resume=True).curves["epoch"].tolist() == [2, 4]
        else:
            with pytest.raises(ValueError, match="of a training with adamw, now it is sgd"):
                train(tmp_path / name, 4, resume=True)
    train(tmp_path / "full", 2)
    assert train(tmp_path / "full", 4, resume=True, precision="float16").curves["epoch"].tolist() == [2, 4]


def test_a_checkpoint_of_something_else_is_refused(tmp_path):
    "The state of least action alone, as the adapter for Hugging Face keeps it."
    save_checkpoint(tmp_path / "run.pt", LeastAction(net()).state_dict())
    with pytest.raises(CheckpointError, match="holds no training, only action, "):
        train(tmp_path / "run.pt", resume=True)


# Killed

NURSERY = """
import os, sys
sys.path.insert(0, sys.argv[1])
import sklearn.datasets, torch, torch._dynamo
torch.set_num_threads(1)
import test_resume
for line in sys.stdin:
    path, epochs, seed = line.split()
    if (pid := os.fork()) == 0:
        def tell(training): os.write(1, b"point\\n")
        try: test_resume.train(path, int(epochs), resume=True, seed=int(seed), callbacks=[tell])
        except BaseException as e: print(repr(e), file=sys.stderr); os._exit(1)
        os._exit(0)
    os.write(1, b"started %d\\n" % pid)
    os.write(1, b"ended %d\\n" % os.waitpid(pid, 0)[1])
"""


class Nursery:
    "A process that has everything imported and runs each training in a new process, one after the other."
    def __init__(self, process): self.process = process

    def __call__(self, path, epochs, seed=0, kill_after=None, delay=0):
        """Train; kill it `delay` seconds after that many of its points (None: never). The status: 0, or the signal that
        ended it."""
        self.process.stdin.write(f"{path} {epochs} {seed}\n"); self.process.stdin.flush()
        points = pid = 0
        while True:
            word, *number = self.process.stdout.readline().split()
            if word == "ended": return int(number[0])
            if word == "started": pid = int(number[0])
            points += word == "point"
            if pid and points == kill_after:
                time.sleep(delay); kill_after = None
                with suppress(ProcessLookupError): os.kill(pid, signal.SIGKILL)


@pytest.fixture(scope="module")
def nursery():
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen([sys.executable, "-c", NURSERY, Path(__file__).parent], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE, text=True, env=env) as process:
        yield Nursery(process)
        process.stdin.close()


def test_resumed_training_has_the_same_bits(tmp_path, nursery):
    "Two N steps, against N steps, an interruption, another process with other weights, N steps."
    straight = train(tmp_path / "straight.pt")
    with pytest.raises(Stop): train(tmp_path / "halved.pt", callbacks=[stopper(6)])
    assert nursery(tmp_path / "halved.pt", 12, seed=5) == 0
    first, second = load_checkpoint(tmp_path / "straight.pt"), load_checkpoint(tmp_path / "halved.pt")
    assert first["step"] == 48 and not same(first, second)
    for name, p in straight.model.state_dict().items(): assert torch.equal(second["model"][name], p)


def test_killed_at_twenty_random_moments(tmp_path, nursery):
    "Up to 20 ms, a few steps, after a point of the training that is drawn."
    whole, killed, epochs, draw, kills, steps = tmp_path / "whole.pt", tmp_path / "killed.pt", 30, torch.Generator(
    ).manual_seed(0), 0, [0]
    assert nursery(whole, epochs) == 0
    while kills < 20:
        if steps[-1] > .8 * 4 * epochs: killed.unlink() # nearly done: once more from the start
        after, delay = torch.randint(3, (), generator=draw).item(), .02 * torch.rand((), generator=draw).item()
        kills += nursery(killed, epochs, kill_after=after, delay=delay) == signal.SIGKILL
        steps.append(load_checkpoint(killed)["step"] if killed.exists() else 0)
    assert nursery(killed, epochs) == 0
    assert len(set(steps)) > 5, "the kills hit the training at different steps"
    assert not same(load_checkpoint(whole), load_checkpoint(killed))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["killed.pt", "whole.pt"], (
        "half-written neighbours are swept up"
    )


# The file

def test_what_is_not_a_whole_checkpoint_is_refused_by_name(tmp_path):
    path = tmp_path / "run.pt"
    train(path, 2)
    whole = path.read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="run.pt is damaged, or not a checkpoint .*delete it and start anew"):
            train(path, resume=True)
    for foreign in (b"epoch,loss\n1,2\n", pickle.dumps({"a": 1}), b"\x89PNG\r\n" * 99):
        path.write_bytes(foreign)
        with pytest.raises(CheckpointError, match="run.pt is damaged, or not"): load_checkpoint(path)


def test_any_flipped_byte_of_a_weight_is_noticed(tmp_path):
    path = tmp_path / "run.pt"
    train(path, 2)
    whole, weight = path.read_bytes(), load_checkpoint(path)["model"]["head.weight"].numpy().tobytes()
    at = whole.index(weight)
    for offset in (0, 17, len(weight) - 1):
        path.write_bytes(whole[:at + offset] + bytes([whole[at + offset] ^ 1]) + whole[at + offset + 1:])
        with pytest.raises(CheckpointError, match="damaged"): load_checkpoint(path)


def test_nothing_in_a_checkpoint_is_executed(tmp_path):
    class Attack:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "attacked"),)
    torch.save({"kind": files.CHECKPOINT, "format": 1, "state": Attack()}, tmp_path / "run.pt")
    with pytest.raises(CheckpointError): load_checkpoint(tmp_path / "run.pt")
    assert not (tmp_path / "attacked").exists()


def test_no_weights_only_reader_is_left_out(tmp_path):
    train(tmp_path / "run.pt", 2)
    found = torch.load(tmp_path / "run.pt", weights_only=True)
    assert found["kind"] == "lap_nb checkpoint" and "head.weight" in found["state"]["model"]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.bool, torch.int64, torch.float64])
def test_digest_sees_type_shape_and_bits(dtype):
    t = torch.ones(2, 3).to(dtype)
    assert digest(t) == digest(t.clone()) != digest(t.view(3, 2))
    assert digest(t) != digest(t.to(torch.int32)) and digest(torch.ones(())) != digest(torch.ones(1))


# The disk

def test_a_full_disk_loses_nothing(tmp_path):
    """For a while no file can grow beyond 5000 bytes: warnings, the old checkpoint, and the end that it would have been
    anyway."""
    train(tmp_path / "free.pt", every=None)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    def fill(training):
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000 if training.epoch < 8 else limits[0], limits[1]))
    try:
        with pytest.warns(UserWarning, match="full.pt could not be written at step .*still holds step 0") as told:
            train(tmp_path / "full.pt", every=None, callbacks=[fill])
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert len(told) == 3
    assert not same(load_checkpoint(tmp_path / "free.pt"), load_checkpoint(tmp_path / "full.pt"))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["free.pt", "full.pt"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomically(path, b"old")
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as m:
            m.setattr(files.os, name, full)
            with pytest.raises(OSError, match="No space left"): write_atomically(path, b"new")
        assert path.read_bytes() == b"old" and [p.name for p in tmp_path.iterdir()] == ["file"]


def test_a_checkpoint_that_cannot_be_written_stops_before_any_work(tmp_path, monkeypatch):
    with pytest.raises(FileNotFoundError, match="no folder"): train(tmp_path / "missing" / "run.pt")
    def full(*args): raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(files, "write_atomically", full)
    with pytest.raises(OSError, match="No space left"): train(tmp_path / "run.pt")


def test_an_earlier_checkpoint_is_not_replaced(tmp_path):
    train(tmp_path / "run.pt", 2)
    before = (tmp_path / "run.pt").read_bytes()
    with pytest.raises(FileExistsError, match="resume=True"): train(tmp_path / "run.pt", 4)
    assert (tmp_path / "run.pt").read_bytes() == before


@pytest.mark.parametrize("settings, message", [(dict(resume="yes"), "resume is 'yes', expected"), (dict(resume=2), "resume is 2, expected"),
                                               (dict(resume=None), "resume is None, expected"), (dict(every=0), "every is 0, expected"),
                                               (dict(every=1.5), "every is 1.5, expected"), (dict(rollback=-1), "rollback is -1, expected"),
                                               (dict(rollback="3"), "rollback is '3', expected"), (dict(path=None), "path is None, expected"),
                                               (dict(path=3), "path is 3, expected"), (dict(path=b"run.pt"), "path is b'run.pt', expected"),
                                               (dict(path="run\0.pt"), "path is .*, expected")])
def test_checkpoints_that_cannot_be_meant(settings, message):
    with pytest.raises(ValueError, match=message): Checkpoints(**dict(path="run.pt") | settings)


def test_settings_of_checkpoints_are_plain():
    kept = Checkpoints("run.pt", np.True_, np.int32(2), torch.tensor(3))
    assert [type(v) for v in (kept.resume, kept.every, kept.rollback)] == [bool, int, int] and kept == Checkpoints(
        "run.pt", True, 2, 3)


@pytest.mark.parametrize("path", [str, Path, partial(Checkpoints, every=1)])
def test_a_path_alone_is_a_file_for_checkpoints(tmp_path, path):
    fit(net(), digits().split(100), epochs=1, checkpoints=path(tmp_path / "run.pt"))
    assert load_checkpoint(tmp_path / "run.pt")["epoch"] == 1


def test_a_file_is_free_for_another_training_whatever_ended_the_last(tmp_path):
    "Refused, stopped by an error, diverged, or done."
    path = tmp_path / "run.pt"
    for error, settings in ((None, dict(epochs=2)), (FileExistsError, dict(epochs=2)),
                            (ValueError, dict(epochs=4, resume=True, batch_size=20)),
                            (Stop, dict(epochs=4, resume=True,
                                        callbacks=[stopper(4)])), (Diverged, dict(epochs=6, resume=True, lr=1e30))):
        with pytest.raises(error) if error else nullcontext(): train(path, **settings)
        claim(path)()   # raises if it is not free


def test_a_checkpoint_of_an_earlier_format_is_refused_by_name(tmp_path):
    train(tmp_path / "run.pt", 2)
    content = torch.load(tmp_path / "run.pt", weights_only=True)
    torch.save(content | dict(format=2), tmp_path / "run.pt")
    with pytest.raises(CheckpointError,
                       match="has format 2, expected 3: read it with the version of lap_nb that wrote it"):
        train(tmp_path / "run.pt", resume=True)


# Divergence

@pytest.mark.parametrize("clip", [None, 1.])
def test_the_last_good_checkpoint_is_good(tmp_path, clip):
    """A gradient that overflows at the very step of a save is found before it is saved; clipping by its norm does not
    carry it to other blocks."""
    def spoil(training): training.model.head.weight.register_hook(lambda g: g * float("nan"))
    with pytest.raises(Diverged, match=r"at step 9, first in head: .*run.pt \(step \d+\)") as e:
        train(tmp_path / "run.pt", callbacks=[spoil], every=1, clip=clip)
    saved = load_checkpoint(tmp_path / "run.pt")
    assert all(v.isfinite().all() for v in saved["model"].values()) and saved["step"] == 8
    assert e.value.step == 9 and e.value.block == "head"


@pytest.mark.parametrize("every", [1, 7, 50])
def test_step_and_block_do_not_depend_on_how_often_one_looks(every):
    def spoil(model):
        def hook(module, args, out):
            module.seen = getattr(module, "seen", 0) + 1
            return out * float("inf") if module.seen == 10 else out
        model.flow.blocks[1].velocity[0].register_forward_hook(hook)
        return model
    model = spoil(net())
    with pytest.raises(Diverged) as e:
        fit(model, digits().split(100), LeastAction(model), epochs=20, batch_size=25, check_every=every)
    assert (e.value.step, e.value.block) == (10, "flow.blocks.1")


def test_an_infinite_lambda_stops():
    model = net()
    la = LeastAction(model)
    la.lam.fill_(float("inf"))
    with pytest.raises(Diverged, match="lambda is inf"): fit(model, digits().split(100), la, epochs=2)


def test_roll_back_halves_the_rate_until_it_holds(tmp_path):
    def rescued(path, rollback):
        torch.manual_seed(0)
        return fit(dense_net(64, 10),
                   digits().split(300), optimizer="sgd", lr=3., epochs=20,
                   checkpoints=Checkpoints(path, rollback=rollback))
    with pytest.warns(UserWarning, match="0.5 of the learning rate") as told: run = rescued(tmp_path / "run.pt", 12)
    assert run.last["loss"].isfinite() and load_checkpoint(tmp_path / "run.pt")["lr_scale"] == .5 ** len(told)
    with pytest.warns(UserWarning), pytest.raises(Diverged): rescued(tmp_path / "other.pt", len(told) - 1)


# What a refusal and an error leave behind

def test_a_refused_checkpoint_changes_nothing(tmp_path):
    torch.manual_seed(0)
    narrow, wide = dense_net(64, 10, K=2, hidden=32), dense_net(64, 10, K=2, hidden=64)
    fit(narrow, digits().split(100), epochs=1, checkpoints=tmp_path / "run.pt")
    before = {name: t.clone() for name, t in wide.state_dict().items()}
    with pytest.raises(ValueError, match="the checkpoint is of another network"):
        fit(wide, digits().split(100), epochs=2, checkpoints=Checkpoints(tmp_path / "run.pt", resume=True))
    assert all(torch.equal(t, before[name]) for name, t in wide.state_dict().items())


@pytest.mark.parametrize("before, after", [(dict(weight_decay=.01), dict(weight_decay=.5)), (dict(optimizer="sgd", momentum=.9), dict(optimizer="sgd", momentum=.1))])
def test_resuming_takes_the_settings_that_are_given(tmp_path, before, after):
    model, seen = dense_net(64, 10, K=2), {}
    split, key = digits().split(100), list(after)[-1]
    fit(model, split, epochs=1, checkpoints=tmp_path / "run.pt", **before)
    def note(training):
        seen.update({k: v for k, v in training.descent.optimizer.param_groups[0].items() if k != "params"})
    run = fit(model, split, epochs=2, checkpoints=Checkpoints(tmp_path / "run.pt", resume=True), callbacks=[note],
              **after)
    assert seen[key] == run.provenance[key] == after[key]


def test_divergence_goes_from_process_to_process():
    e = pickle.loads(pickle.dumps(Diverged("the objective is nan", 3, "blocks.1", "run.pt")))
    assert (e.step, e.block, e.checkpoint) == (3, "blocks.1", "run.pt") and str(e) == str(
        Diverged("the objective is nan", 3, "blocks.1", "run.pt"))


def test_a_folder_is_not_a_damaged_checkpoint(tmp_path):
    with pytest.raises(IsADirectoryError): load_checkpoint(tmp_path)

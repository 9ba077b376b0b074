"Many networks at once: each as if alone, whatever the layers; grids, chunks, modes, faults."
import errno
import json
import math
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
import warnings
from fractions import Fraction
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import lap_nb.ensembles
from lap_nb.checks import free_memory
from lap_nb.data import Dataset, digits
from lap_nb.dynamics import Flow, ResidualNet
from lap_nb.ensembles import Ensemble, _made, choose_mode, fit_many, forward_flops, grid_members, member_memory, seeded
from lap_nb.lab.modes import _by_hand, _clock, _noise, measure_modes, read_modes, record_modes
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.nets import dense_net, init_velocities_
from lap_nb.stats import confidence_interval
from lap_nb.training import Checkpoints, fit, load_checkpoint

make = partial(dense_net, 64, 10, 3, 16)


def pictures():
    d = digits()
    return Dataset(d.x.view(-1, 1, 8, 8), d.y, d.test, "digits as pictures", 10)


def conv_net(c=6, K=2):
    "Pre-activation blocks with batch norm on 4 x 4 pictures."
    def field():
        layers = [(nn.BatchNorm2d(c), nn.ReLU(), nn.Conv2d(c, c, 3, padding=1, bias=False)) for _ in range(2)]
        return nn.Sequential(*(m for layer in layers for m in layer))
    head = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(c, 10))
    return ResidualNet(Flow([field() for _ in range(K)]), head, nn.Conv2d(1, c, 3, stride=2, padding=1))


def assert_as_alone(run, alone):
    for name, curve in alone.curves.items():
        tolerance = dict(rtol=0, atol=.02) if "accuracy" in name else dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(run.curves[name], curve, **tolerance)


@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_batch_norm_networks_are_what_they_are_alone(least_action):
    "Running statistics decide the accuracies: they are of the member, and energies come through `EnergyMeter`."
    row, settings = pictures().splits(100, [3, 5, 8]), dict(epochs=4, batch_size=40, eval_every=1)
    runs = fit_many(conv_net, row, least_action=least_action, **settings)
    for i, seed in enumerate(row.seeds):
        model = _made(conv_net, seed)
        alone = fit(model, row.member(i), least_action and least_action(model), seed=seed, **settings)
        assert_as_alone(runs[i], alone)
        for name, buffer in model.named_buffers():
            torch.testing.assert_close(dict(runs[i].model.named_buffers())[name], buffer, rtol=1e-2, atol=1e-3)


def test_row_of_batch_norm_networks_keeps_statistics_apart():
    models = [_made(conv_net, s) for s in range(3)]
    row, x = Ensemble(models), torch.rand(3, 30, 1, 8, 8) * torch.tensor([1., 2., 3.]).reshape(3, 1, 1, 1, 1)
    torch.testing.assert_close(row(x), torch.stack([m(b) for m, b in zip(models, x)]), rtol=1e-4, atol=1e-5)
    for i, model in enumerate(models):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(row.member(i).state_dict()[key], value, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(row.eval()(x), torch.stack([m.eval()(b) for m, b in zip(models, x)]), rtol=1e-4,
                               atol=1e-5)


def explosive():
    "The network of seed 0 starts with weights that overflow; the others are ordinary."
    return init_velocities_(make(), 1e30 if torch.initial_seed() == 0 else 1.)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_one_diverged_network_does_not_touch_the_others(mode, least_action):
    settings = dict(least_action=least_action, epochs=4, eval_every=1, mode=mode)
    with pytest.warns(UserWarning, match="1 of 2 networks diverged.*'seed': 0"):
        runs = fit_many(explosive, digits().splits(60, [0, 1]), **settings)
    healthy = fit_many(explosive, digits().splits(60, [1]), **settings)
    assert runs.diverged_at == {0: 1}
    assert not runs[0].curves["loss"].isfinite().any() and not runs[0].curves["test_accuracy"].isfinite().any()
    for name in healthy.curves:
        torch.testing.assert_close(runs[1].curves[name], healthy[0].curves[name], rtol=1e-4, atol=1e-6)
    assert all(p.isfinite().all() for p in runs[1].model.parameters())


def test_a_diverged_network_is_left_as_it_was_when_last_seen_well():
    models = [_made(make, s) for s in range(2)]
    row, x = Ensemble(models), torch.rand(2, 8, 64)
    row.train(); row(x).sum().backward(); row.eval()
    with torch.no_grad():
        for stack in row.stacks: stack[1] += .5
    row.train().eval()                                     # seen well with the new weights
    seen = {k: v.clone() for k, v in row.member(1).state_dict().items()}
    row.train(); row(x)
    with torch.no_grad(): row.stacks[3][1] = float("nan")
    row(x); row.eval()
    assert row.died.tolist() == [-1, 2 + 1]
    for _ in range(2):
        for k, v in row.member(1).state_dict().items(): assert torch.equal(v, seen[k])
        row.train()
        with torch.no_grad():
            for stack in row.stacks: stack += 1.               # an optimizer goes on moving all it has
        row(x); row.eval()


def test_all_diverged_is_an_error():
    with pytest.raises(FloatingPointError, match="all networks diverged"):
        fit_many(lambda: init_velocities_(make(), 1e30), digits().splits(60, [0, 1]), epochs=2)


class Mortal(nn.Module):
    "A network that dies at a step of its own: those of the seeds 0, 1, ... at the steps `deaths`, 0 for never."
    def __init__(self, deaths):
        super().__init__()
        self.net = make()
        self.register_buffer("steps", torch.zeros(()))
        self.register_buffer("last", torch.tensor(float(deaths[torch.initial_seed()] or 1e9)))
    def forward(self, x):
        if self.training: self.steps.add_(1)
        return self.net(x) * torch.where(self.steps < self.last, 1., math.nan)


def mortals(deaths, mode, **settings):
    "Three steps an epoch, points at epochs 2, 4, 6."
    with warnings.catch_warnings(record=True, action="always") as told:
        runs = fit_many(partial(Mortal, deaths),
                        digits().splits(60, range(len(deaths))), mode=mode,
                        **dict(epochs=6, batch_size=20, eval_every=2) | settings)
    assert len([w for w in told if "diverged and were frozen" in str(w.message)]) == any(deaths)
    return runs


def assert_same(one, other):
    assert one.members == other.members and one.curves.keys() == other.curves.keys() and one.curves["epoch"].tolist(
    ) == [2, 4, 6]
    for name in one.curves:
        torch.testing.assert_close(one.curves[name], other.curves[name], rtol=1e-4, atol=1e-5, equal_nan=True)
    for i in range(len(one)):
        for a, b in zip(one[i].model.state_dict().values(), other[i].model.state_dict().values()):
            torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("deaths, settings", [
    *((deaths, {}) for deaths in [(7, 0, 0), (0, 1, 0), (8, 9, 7), (13, 7, 1), (18, 18, 0), (7, 7, 7), (10, 12, 16), (1, 18, 2), (6, 6, 13)]),
    *((deaths, settings) for deaths in [(13, 7, 1), (8, 0, 8)] for settings in [dict(check_every=1), dict(check_every=4, least_action=LeastAction)]),
    ((7, 13), dict(grid=dict(lr=[1e-3, 2e-3])))])
def test_a_network_dies_at_the_same_step_in_every_mode(deaths, settings):
    "Whoever else dies, and whenever: epochs of death, curves up to it, and the network as it was last seen well."
    alone, row = (mortals(deaths, mode, **settings) for mode in ("sequential", "batched"))
    assert_same(alone, row)
    whole = mortals((0,) * len(deaths), "batched", **settings)
    for i, member in enumerate(alone.members):
        death = deaths[member["seed"]]
        assert member.get("diverged_at") == (-(-death // 3) if death else None)
        reached = [death == 0 or epoch < -(-death // 3) for epoch in (2, 4, 6)]
        assert alone.curves["loss"][:, i].isfinite().tolist() == reached
        torch.testing.assert_close(alone.curves["test_accuracy"][reached, i], whole.curves["test_accuracy"][reached, i])
        assert alone[i].model.steps == (6 * sum(reached))
        best = alone.curves["val_accuracy"][reached, i]
        assert alone[i].best_test_accuracy.isnan(
        ) if not any(reached) else alone[i].best_test_accuracy == alone.curves["test_accuracy"][best.argmax(), i]
        torch.testing.assert_close(alone.best_test_accuracy[i], alone[i].best_test_accuracy, equal_nan=True)


@pytest.mark.parametrize("deaths", [(1, 2, 6), (4, 4, 4)])
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_if_all_die_before_the_first_point_nothing_is_left(deaths, mode):
    with pytest.raises(FloatingPointError, match="all networks diverged"): mortals(deaths, mode)


def test_deaths_in_processes_are_those_in_one():
    deaths = (7, 0, 13, 1)
    assert_same(mortals(deaths, "sequential"), mortals(deaths, "processes", workers=2))


class Stop:
    "A bar that interrupts after so many epochs of all."
    def __init__(self, after): self.left = after
    def update(self, n):
        self.left -= n
        if self.left <= 0: raise KeyboardInterrupt


@pytest.mark.filterwarnings("ignore:.*diverged and were frozen")
@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_deaths_are_the_same_after_interruptions(mode, tmp_path):
    deaths, keep = (7, 0, 13), Checkpoints(tmp_path / "row", resume=True, every=1)
    for after in (1, 2, 3, 4):
        with pytest.raises(KeyboardInterrupt): mortals(deaths, mode, progress=Stop(after), checkpoints=keep)
    resumed, straight = mortals(deaths, mode, checkpoints=keep), mortals(deaths, mode)
    assert resumed.members == straight.members and resumed.diverged_at == {0: 3, 2: 5}
    for name in straight.curves:
        torch.testing.assert_close(straight.curves[name], resumed.curves[name], rtol=0, atol=0, equal_nan=True)


# --- what is kept of a training that ends early ---------------------------------------------------------------------

def failing(deaths):
    "`Mortal`, of which that of seed 3 cannot be trained."
    if torch.initial_seed() != 3: return Mortal(deaths)
    model = Mortal(deaths)
    model.register_forward_hook(lambda module, args, out: fail() if module.training and module.steps > 4 else None)
    return model


def fail(): raise OSError("a disk is full")


@pytest.mark.parametrize("grid, after, kept", [(None, 3, 1), (None, 5, 3), (dict(lr=[1e-3, 1e-2]), 4, 5)])
def test_an_interrupt_keeps_the_networks_that_are_trained(grid, after, kept):
    settings = dict(grid=grid, mode="sequential")
    whole = mortals((0,) * 4, **settings)
    with pytest.raises(KeyboardInterrupt) as interrupt: mortals((0,) * 4, progress=Stop(after), **settings)
    runs = interrupt.value.runs
    assert (
        runs.members == whole.members[:kept]
        and f"{kept} of {len(whole)} networks were trained to the end" in interrupt.value.__notes__[0]
    )
    for name in runs.curves:
        assert torch.equal(runs.curves[name], whole.curves[name] if name == "epoch" else whole.curves[name][:, :kept])
    assert len(runs) == kept and torch.equal(
        runs[kept - 1].model.net.head.weight, whole[kept - 1].model.net.head.weight
    )


def test_an_interrupt_keeps_whole_rows():
    settings = dict(grid=dict(lr=[1e-3, 1e-2]), mode="batched")
    whole = mortals((0, 7), **settings)
    with pytest.raises(KeyboardInterrupt) as interrupt: mortals((0, 7), progress=Stop(4), **settings)
    runs = interrupt.value.runs
    assert runs.members == whole.members[:2] and runs.diverged_at == {1: 3}
    torch.testing.assert_close(runs.curves["loss"], whole.curves["loss"][:, :2], rtol=0, atol=0, equal_nan=True)
    with pytest.raises(KeyboardInterrupt) as interrupt: mortals((0, 7), progress=Stop(2), **settings)
    assert not hasattr(interrupt.value, "runs") and not hasattr(interrupt.value, "__notes__")


def test_an_error_in_one_network_keeps_those_before():
    split = digits().splits(60, range(5))
    with pytest.raises(OSError, match="a disk is full") as error:
        fit_many(partial(failing, (0,) * 5), split, epochs=3, batch_size=20, mode="sequential")
    assert [m["seed"] for m in error.value.runs.members] == [0, 1, 2]
    with pytest.raises(OSError, match="a disk is full") as error:
        fit_many(partial(failing, (0,) * 5), split, epochs=3, batch_size=20, mode="processes", workers=1, chunk=1)
    assert {0, 1, 2} <= {m["seed"] for m in error.value.runs.members} <= {0, 1, 2, 4}


def test_an_interrupt_keeps_rows_abreast(two_threads, monkeypatch):
    "The first row has ended, the second waits for the interrupt."
    original, first = lap_nb.ensembles._trained, threading.Event()
    def trained(job, ensemble, la, bar):
        if job.seeds[0] == 0: found = original(job, ensemble, la, bar); first.set(); return found
        first.wait(60)
        while True: time.sleep(.01); bar.update(1)
    class Impatient:
        def update(self, n):
            if first.is_set(): raise KeyboardInterrupt
    monkeypatch.setattr("lap_nb.ensembles._trained", trained)
    with pytest.raises(KeyboardInterrupt) as interrupt: abreast(maker=make, progress=Impatient())
    assert [m["seed"] for m in interrupt.value.runs.members] == list(range(10))


# --- children -------------------------------------------------------------------------------------------------------

PARENT = """
import sys
sys.path.insert(0, {tests!r})
from test_ensembles import endless
if __name__ == "__main__": endless({folder!r})
"""


def announcing():
    "Says which process it is in, once it is a worker."
    if "MainProcess" != multiprocessing.current_process().name: print(os.getpid(), flush=True)
    return make()


def endless(folder):
    torch.set_num_threads(1)
    fit_many(announcing,
             digits().splits(20, range(2)), epochs=10 ** 7, eval_every=10 ** 7, batch_size=20, mode="processes",
             workers=2, chunk=1, checkpoints=Checkpoints(folder, every=20))


@pytest.mark.parametrize("sign, code", [(signal.SIGKILL, -signal.SIGKILL), (signal.SIGINT, 1), (signal.SIGTERM, -signal.SIGTERM)])
def test_workers_end_with_their_parent(sign, code, tmp_path):
    "All that hold its output have ended when it closes: they would train for days, and write as they go."
    script = tmp_path / "parent.py"
    script.write_text(PARENT.format(tests=os.path.dirname(__file__), folder=str(tmp_path / "row")))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True) as parent:
        try:
            workers = {int(parent.stdout.readline()) for _ in range(2)}
            assert len(workers) == 2 and parent.pid not in workers
            os.kill(parent.pid, sign)
            _, errors = parent.communicate(timeout=120)                       # until nobody holds a pipe any more
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)
            raise
    assert parent.returncode in (code, -sign), errors
    if sign == signal.SIGINT: assert "KeyboardInterrupt" in errors


def test_a_worker_ends_when_its_pipe_closes():
    "The way that works where the system does not help."
    reader, writer = multiprocessing.get_context("spawn").Pipe(duplex=False)
    worker = multiprocessing.get_context("spawn").Process(target=living, args=(reader,))
    worker.start(); reader.close(); writer.close(); worker.join(120)
    assert worker.exitcode == 1


def living(pipe):
    sys.platform = "another"
    lap_nb.ensembles._live_with(pipe, 1)
    threading.Event().wait()


# --- random numbers in training -------------------------------------------------------------------------------------

def stochastic_depth(x, p=.3):
    "As it is usually written: a block is dropped for a whole sample."
    noise = x.new_empty([len(x)] + [1] * (x.ndim - 1))
    noise.bernoulli_(1 - p)
    return x * noise.div_(1 - p)


class Noisy(nn.Module):
    "A velocity with everything that draws: dropout, stochastic depth, noise."
    def __init__(self, dim=64):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(dim, dim), nn.Dropout(.2), nn.ReLU(), nn.Linear(dim, dim))
    def forward(self, x):
        v = self.layers(x)
        if not self.training: return v
        v = stochastic_depth(v) + .01 * torch.randn_like(v) + .01 * torch.rand(v.shape[-1])
        return v * torch.empty(len(v), 1).bernoulli_(.9)


def noisy_net(): return ResidualNet(Flow([Noisy() for _ in range(2)]), nn.Linear(64, 10))


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_what_a_network_draws_is_its_own(mode):
    "Dropout, stochastic depth, noise: alone, with one neighbour and with two, the same numbers."
    settings = dict(least_action=LeastAction, epochs=3, batch_size=25, eval_every=1)
    runs = fit_many(noisy_net, digits().splits(60, [5, 7, 6]), mode=mode, **settings)
    model, split = _made(noisy_net, 6), digits().splits(60, [5, 7, 6]).member(2)
    la = settings.pop("least_action")(model)
    with seeded(6): alone = fit(model, split, la, seed=6, **settings)
    assert_as_alone(runs[2], alone)


@pytest.mark.parametrize("layer, shape", [(nn.Dropout(.4), (6, 5)), (nn.Dropout2d(.4), (6, 5, 3, 3)), (nn.Dropout1d(.4), (6, 5, 7)),
                                          (nn.Dropout(0.), (6, 5)), (nn.Dropout(1.), (6, 5))])
def test_dropout_layers_draw_what_they_draw_alone(layer, shape):
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.gain, self.layer = nn.Parameter(torch.ones(1)), layer
        def forward(self, x): return self.layer(self.gain * x)
    models, x = [Net() for _ in range(3)], torch.randn(3, *shape)
    row = Ensemble(models, seeds=[4, 2, 9])
    out = row(x)
    for i, seed in enumerate((4, 2, 9)):
        with seeded(seed): assert torch.equal(out[i], models[i](x[i]))


def test_draws_that_cannot_be_separated_are_refused():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layer = nn.Linear(3, 3)
        def forward(self, x): return F.alpha_dropout(self.layer(x), .5, self.training)
    with pytest.raises(RuntimeError, match="random"): Ensemble([Net(), Net()])(torch.rand(2, 4, 3))


# --- forms of convolution -------------------------------------------------------------------------------------------

@pytest.mark.parametrize("conv", ["unfolded", "matmul"])
@pytest.mark.parametrize("how", [dict(), dict(stride=2, padding=1), dict(padding=(1, 0), dilation=(1, 2)), dict(padding="same"), dict(groups=2),
                                 dict(bias=False)])
def test_forms_of_convolution_agree(conv, how):
    models, x = [nn.Sequential(nn.Conv2d(4, 6, 3, **how)) for _ in range(3)], torch.randn(3, 5, 4, 9, 8)
    plain, form = Ensemble(models), Ensemble(models, conv=conv)
    a, b = plain(x), form(x)
    torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    a.square().sum().backward(); b.square().sum().backward()
    for p, q in zip(plain.stacks, form.stacks): torch.testing.assert_close(p.grad, q.grad, rtol=1e-3, atol=1e-3)


# --- grids ----------------------------------------------------------------------------------------------------------

def gained(gain=1.): return init_velocities_(make(), gain)


def aimed(model, lambda0, target): return LeastAction(model, DualAscent(lambda0, tau=.5, target=target))


def test_a_grid_is_as_many_trainings():
    "Settings of least action, of the training and of the maker, each combination as if alone."
    row = digits().splits(60, [3, 4])
    grid = dict(lambda0=[.1, 2.], target=[0., .5], lr=[1e-3, 1e-2], gain=[.1, .5])
    runs = fit_many(gained, row, least_action=aimed, epochs=3, eval_every=1, grid=grid)
    assert len(runs) == 32 and len({tuple(m.items()) for m in runs.members}) == 32
    for i in (0, 13, 30):
        m = runs.members[i]
        model = _made(partial(gained, m["gain"]), m["seed"])
        la = LeastAction(model, DualAscent(lambda0=m["lambda0"], tau=.5, target=m["target"]))
        assert_as_alone(
            runs[i],
            fit(model, row.member(row.seeds.index(m["seed"])), la, seed=m["seed"], epochs=3, eval_every=1, lr=m["lr"]))
    part = runs.where(lr=1e-2, lambda0=2.)
    assert len(part) == 8 and all(m["lr"] == 1e-2 for m in part.members) and part.provenance["seeds"] == [3, 4] * 4
    torch.testing.assert_close(part[1].curves["loss"], runs[runs.members.index(part.members[1])].curves["loss"])
    with pytest.raises(ValueError, match="no network has"): runs.where(lr=7.)


@pytest.mark.parametrize("settings, message", [
    (dict(grid={}), "grid is empty"), (dict(grid=dict(lr=[])), "is empty"), (dict(grid=dict(lr=[.1, .1])), "has 0.1 twice"),
    (dict(grid=dict(lr=.1)), "grid is .*, expected"), (dict(grid=dict(lambda0=[1.])), "nobody takes"), (dict(grid=dict(speed=[1.])), "nobody takes"),
    (dict(grid=dict(epochs=[1, 2])), "epochs cannot be in a grid"), (dict(grid=dict(lr=[1e-3, -1.])), "lr is -1"),
    (dict(seeds=[1, 1]), "seeds has 1 twice"), (dict(mode="fast"), "mode is 'fast'"), (dict(conv="fft"), "conv is 'fft'"),
    (dict(patience=2), "patience would stop"), (dict(compile=True), "compile is for single"), (dict(workers=0), "workers is 0"), (dict(chunk=0), "chunk is 0"),
    (dict(checkpoints=Checkpoints("row", rollback=1)), "rollback is 1, expected 0"), (dict(checkpoints=Checkpoints("row", resume="force")), "resume is 'force', expected True or False")])
def test_what_cannot_be_trained_is_refused_before_the_start(settings, message, monkeypatch):
    monkeypatch.setattr("lap_nb.ensembles._run_all", lambda *a: pytest.fail("training has begun"))
    with pytest.raises(ValueError, match=message): fit_many(make, digits().splits(60, [0, 1]), epochs=1, **settings)


def test_networks_on_two_devices_are_refused():
    with pytest.raises(ValueError, match="lie on cpu and meta"):
        Ensemble([nn.Linear(2, 2), nn.Linear(2, 2, device="meta")])


# --- memory and rows ------------------------------------------------------------------------------------------------

def test_rows_are_cut_to_fit_and_change_nothing():
    row, settings = (
        digits().splits(60, range(5)),
        dict(least_action=LeastAction, epochs=2, eval_every=1, mode="batched"),
    )
    need = member_memory(make, row.x[:60])
    whole, cut, small = (
        fit_many(make, row, **settings),
        fit_many(make, row, chunk=2, **settings),
        fit_many(make, row, memory=int(2.5 * need), **settings),
    )
    for name in whole.curves:
        for other in (cut, small):
            torch.testing.assert_close(whole.curves[name], other.curves[name], rtol=1e-4, atol=1e-6)


def test_more_than_memory_allows_is_refused():
    row = digits().splits(60, range(5))
    need = member_memory(make, row.x[:60])
    with pytest.raises(MemoryError, match="5 networks at once need about .* choose chunk=3 or less"):
        fit_many(make, row, epochs=1, mode="batched", chunk=5, memory=int(3.5 * need))
    with pytest.raises(MemoryError, match="one network needs about"): fit_many(make, row, epochs=1, memory=need // 2)


# --- several processes, checkpoints ---------------------------------------------------------------------------------

def test_processes_give_the_same_numbers():
    row, settings = (
        pictures().splits(60, range(3)),
        dict(least_action=LeastAction, epochs=2, batch_size=30, eval_every=1),
    )
    alone, spread = (
        fit_many(conv_net, row, mode="sequential", **settings),
        fit_many(conv_net, row, mode="processes", workers=2, **settings),
    )
    for name in alone.curves: torch.testing.assert_close(alone.curves[name], spread.curves[name], rtol=1e-3, atol=1e-4)
    for p, q in zip(alone.model.stacks, spread.model.stacks): torch.testing.assert_close(p, q, rtol=1e-2, atol=1e-3)


def test_processes_need_a_maker_they_can_import():
    with pytest.raises(ValueError, match="functions of a module"):
        fit_many(lambda: make(), digits().splits(60, range(2)), epochs=1, mode="processes")


def test_a_worker_that_ends_is_reported():
    with pytest.raises(RuntimeError, match="worker process ended abruptly"):
        fit_many(partial(vanishing, os.getpid()), digits().splits(60, range(2)), epochs=1, mode="processes", workers=1)


def vanishing(parent):
    "Ends the process that calls it, unless it is the first."
    if os.getpid() != parent: os._exit(1)
    return make()


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_killed_and_resumed_to_the_same_bits(mode, tmp_path, forked):
    "SIGKILL in the middle of the second of two rows; the rest of the training ends where the undisturbed one does."
    process = forked.Process(target=train_until_killed, args=(mode, tmp_path / "kept"))
    process.start(); process.join(300)
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "kept" / "members.json").exists()
    whole, resumed = train(mode, tmp_path / "whole"), train(mode, tmp_path / "kept", resume=True)
    for name in whole.curves: assert torch.equal(whole.curves[name], resumed.curves[name]), name
    for p, q in zip(whole.model.stacks, resumed.model.stacks): assert torch.equal(p, q)
    # of a finished training: nothing is trained
    again = train(mode, tmp_path / "kept", resume=True)
    assert torch.equal(again.curves["loss"], whole.curves["loss"])


class Deadly:
    "A progress bar that ends its process in the fifth epoch."
    def __init__(self): self.epochs = 0
    def update(self, n):
        self.epochs += n
        if self.epochs >= 5: os.kill(os.getpid(), signal.SIGKILL)


def train_until_killed(mode, folder): train(mode, folder, progress=Deadly())


def train(mode, folder, resume=False, **settings):
    return fit_many(noisy_net,
                    digits().splits(60, range(4)), least_action=LeastAction, epochs=8, batch_size=20, eval_every=4,
                    mode=mode, chunk=2, checkpoints=Checkpoints(folder, resume, every=2), **settings)


def test_checkpoints_of_another_ensemble_are_refused(tmp_path):
    row, settings, again = (
        digits().splits(60, range(2)),
        dict(epochs=1, mode="batched"),
        Checkpoints(tmp_path / "c", resume=True),
    )
    fit_many(make, row, checkpoints=tmp_path / "c", **settings)
    with pytest.raises(FileExistsError, match="holds checkpoints: go on"):
        fit_many(make, row, checkpoints=tmp_path / "c", **settings)
    with pytest.raises(ValueError, match="differ in settings"):
        fit_many(make, row, lr=.1, checkpoints=again, **settings)
    with pytest.raises(ValueError, match="differ in members"):
        fit_many(make, row, seeds=[0, 5], checkpoints=again, **settings)
    with pytest.raises(ValueError, match="of batched trainings, now they are sequential"):
        fit_many(make, row, checkpoints=again, **settings | dict(mode="sequential"))


# --- rows abreast ---------------------------------------------------------------------------------------------------

@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    assert torch.get_num_threads() == 2                                       # whatever happened in between
    torch.set_num_threads(before)


def abreast(folder=None, maker=noisy_net, resume=False, **settings):
    "Two rows of ten, at the same time where there are two threads."
    kept = folder and Checkpoints(folder, resume, every=20)
    return fit_many(maker,
                    digits().splits(60, range(20)), batch_size=20, mode="batched", checkpoints=kept,
                    **dict(epochs=6, eval_every=2) | settings)


def test_rows_abreast_give_the_numbers_of_one_row(two_threads, monkeypatch):
    settings, trained = dict(least_action=LeastAction, grid=dict(lr=[1e-3, 1e-2])), []
    original = lap_nb.ensembles._trained
    monkeypatch.setattr(
        "lap_nb.ensembles._trained",
        lambda job, *a: (trained.append((threading.get_ident(), torch.get_num_threads())), original(job, *a))[1],
    )
    both = abreast(**settings)
    assert [n for _, n in trained] == [1] * 4 and len({thread for thread, _ in trained}) == 2
    torch.set_num_threads(1); trained.clear()
    one = abreast(**settings)
    torch.set_num_threads(2)
    assert trained == [(threading.get_ident(), 1)] * 2
    for name in one.curves: torch.testing.assert_close(both.curves[name], one.curves[name], rtol=1e-4, atol=1e-6)
    for p, q in zip(both.model.stacks, one.model.stacks): torch.testing.assert_close(p, q, rtol=1e-3, atol=1e-5)
    assert both.members == one.members


def test_rows_abreast_are_interrupted_and_resumed_together(two_threads, tmp_path, monkeypatch):
    class Impatient:
        epochs = 0
        def update(self, n):
            assert threading.current_thread() is threading.main_thread()
            self.epochs += n
            if self.epochs >= 3: interrupted.set(); raise KeyboardInterrupt
    interrupted, original = threading.Event(), lap_nb.ensembles.train_loop
    def waiting(ensemble, split, la, generators, config, bar, **settings):
        "Half of a training, and the rest slowly after the interruption."
        epochs = []
        def update(n):
            epochs.append(n)
            if sum(epochs) >= 50: interrupted.wait(60); time.sleep(.05)
            bar.update(n)
        return original(ensemble, split, la, generators, config, SimpleNamespace(update=update), **settings)
    before = set(threading.enumerate())
    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr("lap_nb.ensembles.train_loop", waiting)
        abreast(tmp_path / "kept", make, progress=Impatient(), epochs=100, eval_every=25)
    for row in (tmp_path / "kept").glob("row-*"): assert load_checkpoint(row)["epoch"] < 100
    # which watches all bars of the process
    assert {t.name for t in set(threading.enumerate()) - before} <= {"tqdm_monitor"}
    whole, resumed = (abreast(tmp_path / name, make, epochs=100, eval_every=25, resume=True)
                      for name in ("whole", "kept"))
    for name in whole.curves: assert torch.equal(whole.curves[name], resumed.curves[name]), name


def test_a_row_that_fails_stops_the_other(two_threads, monkeypatch):
    original, epochs = lap_nb.ensembles.train_loop, []
    def failing(ensemble, split, la, generators, config, bar, **settings):
        if generators[0].initial_seed() == 10: raise OSError("no space left")
        return original(ensemble, split, la, generators, config,
                        SimpleNamespace(update=lambda n: (epochs.append(n), bar.update(n))), **settings)
    monkeypatch.setattr("lap_nb.ensembles.train_loop", failing)
    with pytest.raises(OSError, match="no space left"): abreast(epochs=10_000)
    assert sum(epochs) < 10_000


def test_a_row_abreast_may_diverge_as_a_whole(two_threads):
    def maker(): return init_velocities_(make(), 1e30 if torch.initial_seed() >= 10 else 1.)
    with pytest.warns(UserWarning, match="10 of 20 networks diverged"):
        runs = fit_many(maker, digits().splits(60, range(20)), epochs=2, eval_every=1, mode="batched")
    assert runs.diverged_at == dict.fromkeys(range(10, 20), 1)
    assert runs.curves["loss"][:, :10].isfinite().all() and runs.curves["loss"][:, 10:].isnan().all()


@pytest.mark.parametrize("chunk, rows", [(None, [25, 25]), (50, [25, 25]), (49, [12, 13, 12, 13]), (19, [16, 17, 17])])
def test_rows_abreast_have_together_what_one_may_have(chunk, rows):
    found = lap_nb.ensembles._rows("a" * 50, 1, 1000, chunk, abreast=2)
    assert [len(row) for row in found] == rows and sum(found, []) == list(range(50))


# --- on a GPU -------------------------------------------------------------------------------------------------------

def test_graphs_need_a_gpu():
    if torch.cuda.is_available(): pytest.skip("there is one")
    with pytest.raises(RuntimeError, match="CUDA graphs need a CUDA device"):
        fit_many(make, digits().splits(60, [0, 1]), epochs=1, mode="graph")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("maker, data", [(make, digits), (conv_net, pictures)])
def test_replayed_graphs_give_the_same_numbers(maker, data):
    "The last batch of an epoch is smaller, so there are two graphs; running statistics are those of the batched row."
    row, settings = (
        data().splits(100, range(3)),
        dict(least_action=LeastAction, epochs=4, batch_size=40, eval_every=1, device="cuda"),
    )
    batched, graph = fit_many(maker, row, mode="batched", **settings), fit_many(maker, row, mode="graph", **settings)
    for name in batched.curves:
        tolerance = dict(rtol=0, atol=.02) if "accuracy" in name else dict(rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(batched.curves[name], graph.curves[name], **tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_graphs_refuse_random_numbers():
    with pytest.raises(RuntimeError, match="a CUDA graph would repeat them"):
        fit_many(noisy_net, digits().splits(60, [0, 1]), epochs=1, mode="graph", device="cuda")


def test_parameters_without_axes_train_and_freeze():
    "The factor of SkipInit is a single number."
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.gain, self.layer = nn.Parameter(torch.tensor(.5)), nn.Linear(64, 10)
        def forward(self, x): return self.gain * self.layer(x)
    runs = fit_many(Scaled, digits().splits(60, range(2)), epochs=2, mode="batched")
    assert runs.diverged_at == {} and runs[1].model.gain.shape == () and runs[1].model.gain != .5


# Faults that the tests above let pass, found by `make mutants`

def test_the_clock_reads_the_wall_and_the_processor_apart(monkeypatch):
    "A call of 7 s, in which this process computes for 2 s and a child that has ended for 3 s."
    now = dict(wall=1., own=10., child=100.)
    monkeypatch.setattr(time, "perf_counter", lambda: now["wall"])
    monkeypatch.setattr(time, "process_time", lambda: now["own"])
    monkeypatch.setattr(os, "times", lambda: (now["own"], 0., now["child"], 0., now["wall"]))
    assert _clock(lambda: now.update(wall=8., own=12., child=103.)) == (7., 5.)


def test_one_network_alone_makes_no_row():
    x = torch.rand(100, 64)
    assert choose_mode(make, x, 1) == ("sequential", "grouped") and choose_mode(make, x, 2) == ("batched", "grouped")


def test_a_file_is_no_folder_of_checkpoints(tmp_path):
    (tmp_path / "run.pt").write_text("something of the user's")
    with pytest.raises(ValueError, match="is a file, expected a folder"):
        fit_many(make, digits().splits(50, range(2)), epochs=1, checkpoints=tmp_path / "run.pt")
    assert (tmp_path / "run.pt").read_text() == "something of the user's"


def test_time_of_ended_children_counts():
    _, used = _clock(
        partial(subprocess.run, [sys.executable, "-S", "-c", "import time\nwhile time.process_time() < .2: pass"]))
    assert used > .15   # of the processor, however long it took on the wall


def test_memory_of_a_member_is_its_state_five_times_and_what_its_passes_hold():
    """By hand: 32 parameters; kept for the backward pass the 12 inputs and 20 activations; three times the largest;
    batch and its copy."""
    net = lambda: nn.Sequential(nn.Linear(3, 5), nn.ReLU(), nn.Linear(5, 2))
    assert member_memory(net, torch.rand(4, 3)) == 4 * (5 * 32 + (12 + 20) + 3 * 20 + 2 * 12)
    # not the samples it is part of
    assert member_memory(net, torch.rand(1000, 3)[:4]) == member_memory(net, torch.rand(4, 3))
    x, before, made = torch.rand(4, 3), torch.get_rng_state(), []
    member_memory(lambda: made.append(net()) or made[-1], x)
    assert torch.equal(torch.get_rng_state(), before) and len(made) == 1


@pytest.mark.parametrize("files, room", [
    ({"/proc/meminfo": "MemTotal: 9 kB\nMemAvailable:    5 kB\nBuffers: 7 kB"}, 5 << 10),
    ({"/proc/meminfo": "MemAvailable: 5 kB", "/sys/fs/cgroup/memory.max": "3000\n", "/sys/fs/cgroup/memory.current": "1000\n"}, 2000),
    ({"/proc/meminfo": "MemAvailable: 1 kB", "/sys/fs/cgroup/memory.max": "3000", "/sys/fs/cgroup/memory.current": "1000"}, 1024),
    ({"/proc/meminfo": "MemAvailable: 1 kB", "/sys/fs/cgroup/memory.max": "1000", "/sys/fs/cgroup/memory.current": "3000"}, 0),
    ({"/proc/meminfo": "MemAvailable: 5 kB", "/sys/fs/cgroup/memory.max": "max\n", "/sys/fs/cgroup/memory.current": "1000"}, 5 << 10),
    ({"/proc/meminfo": "of another system"}, 4000 * 10 // 2), ({}, 4000 * 10 // 2)])
def test_free_memory_is_the_least_that_is_announced(files, room, monkeypatch):
    class Announced:
        def __init__(self, name): self.name = name
        def read_text(self):
            if self.name not in files: raise FileNotFoundError(self.name)
            return files[self.name]
    monkeypatch.setattr("lap_nb.checks.Path", Announced)
    monkeypatch.setattr("os.sysconf", {"SC_PHYS_PAGES": 10, "SC_PAGE_SIZE": 4000}.__getitem__)
    assert free_memory() == free_memory(torch.device("cpu")) == room


def test_modes_are_measured_in_turn_per_step_and_network(monkeypatch):
    "A clock that only our own work moves: each training costs a start of 7 and so much per step and network."
    now, log, cost = [0.], [], dict(plain=2., batched=.5, sequential=3., processes=1.)
    def spend(mode, steps, split):
        log.append((mode, steps)); now[0] += 7 + cost[mode] * steps * len(split.train)
        assert split.train.shape == (3, 40) and split.val.shape == (3, 1) and split.test.shape == (1,)
    def fit_many(make_model, split, epochs, device, batch_size, mode, conv, eval_every):
        assert (batch_size, conv, device) == (
            40,
            "matmul" if mode == "batched" else None,
            "cpu",
        ) and eval_every > epochs
        spend(mode, epochs, split)
    def clock(f): before = now[0]; f(); return now[0] - before, 10 * (now[0] - before)
    monkeypatch.setattr("lap_nb.lab.modes.fit_many", fit_many)
    monkeypatch.setattr("lap_nb.lab.modes._by_hand", lambda make_model, split, steps: spend("plain", steps, split))
    monkeypatch.setattr("lap_nb.lab.modes._clock", clock)
    found = measure_modes(make,
                          digits().splits(60, range(3)), ["plain", "batched:matmul", "sequential", "processes"],
                          steps=4, batch_size=40, repeats=2)
    assert (
        found
        == {
            mode: [pytest.approx((cost[mode.partition(":")[0]], 10 * cost[mode.partition(":")[0]]))] * 2
            for mode in found
        }
        and len(found) == 4
    )
    # a first time untimed; processes start anew anyway
    assert log[:3] == [("plain", 2), ("batched", 2), ("sequential", 2)]
    turn = [(mode, steps) for mode in cost for steps in (2, 6)]
    assert sorted(log[3:]) == sorted(2 * turn) and log[3:11] == log[11:]


def test_the_loop_by_hand_trains_each_network():
    made, row = [], digits().splits(20, range(3))
    class Counted(nn.Linear):
        def forward(self, x): self.seen = [*getattr(self, "seen", []), x]; return super().forward(x)
    def maker():
        made.append(Counted(64, 10)); made[-1].start = made[-1].weight.detach().clone()
        return made[-1]
    _by_hand(maker, row, 4)
    assert [len(net.seen) for net in made] == [4] * 3
    for net, at in zip(made, row.train):
        step = (net.weight - net.start).abs().max()
        assert 5e-4 < step < 5e-3                                                             # Adam's steps of 1e-3
        # the samples of the network, in some order
        for x in net.seen: assert torch.equal(x.sum(1).sort()[0], row.x[at].sum(1).sort()[0])


def test_record_of_modes_keeps_what_others_wrote(tmp_path, monkeypatch):
    measured = []
    def fake(make_model, data, modes, device, steps, batch_size, repeats):
        measured.append((len(data.train), steps))
        assert make_model()(data.x[:2]).shape == (2, 10) and (batch_size, repeats) == (100, 2)
        return {mode: [(.123456, .2)] * repeats for mode in modes}
    monkeypatch.setattr("lap_nb.lab.modes.measure_modes", fake)
    monkeypatch.setattr("lap_nb.lab.modes.forward_flops", lambda net, x: int(net(x[:2]).shape[1] * len(x)))
    path = tmp_path / "modes.json"
    assert record_modes(path, repeats=2, only="dense", extra=["processes"]) == read_modes(path)
    rows, lengths = read_modes(path)["rows"], [1, 2, 5, 10, 20, 50]
    assert [(r["members"], r["mode"]) for r in rows] == [
        (S, mode) for S in lengths for mode in ("plain", "sequential", "batched", "processes")]
    assert [S for S, _ in measured] == lengths and [r["steps"] for r in rows[::4]] == [steps for _, steps in measured]
    assert all(
        r["wall"] == [.1235, .1235] and r["processor"] == [.2, .2] and r["flops"] == 1000 and r["device"] == "cpu"
        for r in rows)
    others = [dict(rows[0], device="cuda"), dict(rows[0], net="another")]
    path.write_text(json.dumps(dict(format=1, rows=others + rows)))
    # measured anew on this device: 6 lengths, three ways
    again = record_modes(path, repeats=2, only="dense")["rows"]
    assert again[:2] == others and len(again) == 2 + 18
    every = record_modes(path, repeats=2)["rows"]
    assert every[0] == others[0] and len(every) == 1 + 18 + 5 * (6 + 4 + 3) and "another" not in {
        r["net"] for r in every}


@pytest.mark.parametrize("change", [dict(members="5"), dict(wall=[]), dict(processor=["fast"]), dict(wall=.1)])
def test_a_record_of_modes_with_a_wrong_row_is_refused(change, tmp_path):
    row = dict(net="dense", members=5, mode="batched", device="cpu", device_name="c", threads=1, wall=[1, .5],
               processor=[1.])
    (path := tmp_path / "modes.json").write_text(json.dumps(dict(format=1, rows=[row, row])))
    assert read_modes(path)["rows"] == [row, row]
    for bad in (row | change, []):
        path.write_text(json.dumps(dict(format=1, rows=[row, bad])))
        with pytest.raises(ValueError,
                           match=f"row 1 of .* lacks {next(iter(change)) if bad else 'net'}.* of the expected type"):
            read_modes(path)
    for other in ([], dict(format=1), dict(format=2, rows=[]), dict(format=1, rows={})):
        path.write_text(json.dumps(other))
        with pytest.raises(ValueError, match="no record of modes in format 1"): read_modes(path)


def test_noise_has_parts_that_do_not_meet():
    split = _noise((3, 2), 4)
    assert (
        split.train.shape == (4, 100)
        and split.val.shape == (4, 1)
        and split.x.shape[1:] == (3, 2)
        and split.seeds == (0, 1, 2, 3)
    )
    used = torch.cat([split.train[0], split.val[0], split.test])
    assert (
        sorted(used.tolist()) == list(range(len(split.x)))
        and set(split.y.tolist()) == set(range(split.classes))
        and len(split.y) == len(split.x)
    )


def test_the_way_is_chosen_by_device_and_work(monkeypatch):
    x = torch.rand(100, 64)
    flops = forward_flops(make(), x)
    assert flops == 2 * 100 * 64 * (3 * 2 * 16 + 10)
    assert choose_mode(make, x, 5, "meta") == ("batched", "grouped") and choose_mode(make, x, 1, "meta") == (
        "sequential",
        "grouped",
    )
    for small, way in ((flops, "batched"), (flops - 1, "sequential")):
        monkeypatch.setattr("lap_nb.ensembles.SMALL", small)
        assert choose_mode(make, x, 5) == (way, "grouped")


def planned(monkeypatch, *args, **settings):
    "The rows that `fit_many` would train, and how."
    class Planned(Exception): pass
    def stop(plan, *_): raise Planned(plan)
    monkeypatch.setattr("lap_nb.ensembles._run_all", stop)
    with pytest.raises(Planned) as found: fit_many(*args, **settings)
    return found.value.args[0]


@pytest.mark.parametrize("settings, rows", [
    (dict(), [[0, 1, 2, 3, 4]]), (dict(chunk=2), [[0], [1, 2], [3, 4]]), (dict(chunk=9), [[0, 1, 2, 3, 4]]), (dict(chunk=1, mode="batched"), [[0], [1], [2], [3], [4]]),
    (dict(mode="processes", workers=2), [[0, 1], [2, 3, 4]]), (dict(mode="processes", workers=9), [[0], [1], [2], [3], [4]]),
    (dict(mode="processes", workers=2, chunk=2), [[0], [1, 2], [3, 4]]), (dict(mode="sequential"), [[0, 1, 2, 3, 4]]),
    (dict(grid=dict(lr=[.1, .2])), [[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])])
def test_members_are_shared_among_rows(settings, rows, monkeypatch):
    plan = planned(monkeypatch, make, digits().splits(60, range(5)), epochs=1, **settings)
    assert [at for at, _ in plan] == rows and all(job.abreast == 1 for _, job in plan)
    for at, job in plan:
        assert job.seeds == job.split.seeds == tuple(i % 5 for i in at) and job.mode == (
            "sequential" if settings.get("mode") == "sequential" else "batched"
        )
        assert job.config.lr == (1e-3 if "grid" not in settings else .1 if at[0] < 5 else .2)


def test_the_largest_batch_of_a_grid_decides_what_fits(monkeypatch):
    row, maker = digits().splits(60, range(4)), partial(dense_net, 64, 10)
    of = lambda B: member_memory(maker, row.x[:B])
    assert of(20) < of(60)
    for sizes, need in (([20, 60], of(60)), ([60, 20], of(60)), ([20], of(20))):
        grid = dict(batch_size=sizes)
        plan = planned(monkeypatch, maker, row, epochs=1, mode="batched", grid=grid, memory=int(2.5 * need))
        assert {len(at) for at, _ in plan} == {2}
        with pytest.raises(MemoryError, match="one network needs"):
            fit_many(maker, row, epochs=1, grid=grid, memory=need - 1)
    for sizes, way in (([20, 60], "sequential"), ([60, 20], "sequential"), ([20], "batched")):
        monkeypatch.setattr("lap_nb.ensembles.SMALL", forward_flops(maker(), row.x[:20]))
        assert {job.mode for _, job in planned(monkeypatch, maker, row, epochs=1, grid=dict(batch_size=sizes))} == {way}


@pytest.mark.parametrize("mode", ["sequential", "batched"])
@pytest.mark.parametrize("grid", [dict(K=[1, 9]), dict(h=[1., .5]), dict(drop=[0., .5]), dict(skip_init=[False, True])])
def test_a_grid_of_architectures_is_refused_before_anything_is_trained(mode, grid, monkeypatch):
    monkeypatch.setattr("lap_nb.ensembles._run_all", lambda *args: pytest.fail("it trained"))
    with pytest.raises(ValueError, match="network 1 is another architecture than network 0"):
        fit_many(partial(dense_net, 64, 10), digits().splits(60, range(4)), epochs=1, mode=mode, grid=grid)


@pytest.mark.parametrize("threads, settings, lengths, at_once", [
    (2, {}, [10, 10], 2), (3, {}, [10, 10], 2), (1, {}, [20], 1), (2, dict(mode="sequential"), [20], 1), (2, dict(chunk=19), [10, 10], 1),
    (2, dict(grid=dict(lr=[.1, .2])), [10] * 4, 2)])
def test_rows_are_abreast_where_threads_and_chunk_allow(threads, settings, lengths, at_once, monkeypatch):
    monkeypatch.setattr("torch.get_num_threads", lambda: threads)
    plan = planned(monkeypatch, make, digits().splits(60, range(20)), epochs=1, **settings)
    assert [len(at) for at, _ in plan] == lengths and {job.abreast for _, job in plan} == {at_once}


def test_a_bar_moves_when_all_have_done_an_epoch():
    moves = []
    bar = lap_nb.ensembles._Bar(SimpleNamespace(update=moves.append), 3, 4)
    one, rest, hidden = bar.row(1), bar.row(2), bar.row(1, show=False)
    one.update(); rest.update(); hidden.update()
    assert moves == []
    bar.show(); assert moves == [1]
    rest.update(2); one.update(2); hidden.update(2)
    assert moves == [1, 1]                        # of eight epochs six were shown
    bar.show(); bar.show(); assert moves == [1, 1, 1]
    silent = lap_nb.ensembles._Bar(None, 1, 1).row(1); silent.update()
    bar.stopped = True
    with pytest.raises(InterruptedError): one.update()


def test_a_frozen_network_is_told_by_the_epoch_in_which_it_died():
    """Of 60 samples in batches of 20, three steps an epoch: step 3 is in the first epoch, step 4 in the second; by 60
    each step is an epoch."""
    split = digits().splits(60, range(4))
    row = lambda: Ensemble([make(), make()])
    curves = lambda at: dict(epoch=torch.tensor([1, 2, 3]), loss=torch.tensor([[at, at + 1.]] * 3))
    plan = [([at, at + 4], SimpleNamespace(split=split)) for at in (2, 0, 1, 3)]
    deaths = [[3, 4], [0, -1], [-1, 4], [9, 2]]
    members = [dict(seed=i, **({} if i < 4 else dict(batch_size=60))) for i in range(8)]
    with pytest.warns(UserWarning, match=r"6 of 8 networks diverged.*the first of them {'seed': 0, 'diverged_at': 1}"):
        trained = [lap_nb.ensembles._Trained(row(), curves(10. * at[0]), died) for (at, _), died in zip(plan, deaths)]
        found = lap_nb.ensembles._joined(plan, trained, members, dict(batch_size=20, epochs=3, eval_every=1))
    joined, told = found.curves, found.members
    assert [m.get("diverged_at") for m in told] == [1, None, 1, 3, None, 4, 4, 2] and all(
        "diverged_at" not in m for m in members
    )
    expected = [0., 10., 20., 30., 1., 11., 21., 31.]
    for i, m in enumerate(told):
        last = m.get("diverged_at", 9)
        assert [None if v != v else v for v in joined["loss"][:, i].tolist()] == [
            expected[i] if epoch < last else None for epoch in (1, 2, 3)
        ]
    assert joined["epoch"].tolist() == [1, 2, 3]


@pytest.mark.parametrize("content", ["[]", "5", '{"ways"', '{"ways": []}', '{"ways": [[]]}', '{"ways": ["batched"]}', '{"ways": 5}'])
def test_a_damaged_note_in_a_folder_of_checkpoints_is_told(content, tmp_path):
    (tmp_path / "members.json").write_text(content)
    with pytest.raises(ValueError, match="members.json is damaged, or not the note of an ensemble"):
        fit_many(make,
                 digits().splits(60, range(2)), epochs=1, mode="batched",
                 checkpoints=Checkpoints(tmp_path, resume=True))
    assert (tmp_path / "members.json").read_text() == content


SOUND = dict(format=2, members=[dict(seed=s) for s in range(2)], rows=[[0, 1]], ways=[["batched", "grouped"]])


@pytest.mark.parametrize("change", [
    dict(rows=[[]]), dict(rows=[]), dict(rows=[[0]]), dict(rows=[[0, 1, 1]]), dict(rows=[[0, 5]]), dict(rows=[[-1, 0]]), dict(rows=[["0", "1"]]), dict(rows=[[0., 1.]]),
    dict(rows=[0, 1]), dict(rows={"0": 1}), dict(rows=None), dict(rows=[[0], [1]]), dict(rows=[[True, 0]]), dict(ways=[]), dict(ways=[["batched"]]), dict(ways=[["fast", "grouped"]]),
    dict(ways=[["batched", "fft"]]), dict(ways=[["batched", None]]), dict(ways=[[["batched"], {}]]), dict(ways=None), dict(ways=5), dict(members=5), dict(members={}),
    dict(settings=None), dict(settings=[1]), *(dict(settings=dict(epochs=e)) for e in ("1", None, 1., True, [1], {})), dict(settings={}), dict(format=True), dict(format="1")])
def test_a_note_that_was_edited_is_told(change, tmp_path):
    split, keep = digits().splits(60, range(2)), dict(epochs=1, mode="batched")
    fit_many(make, split, checkpoints=tmp_path, **keep)
    sound = json.loads((tmp_path / "members.json").read_text())
    assert sound.keys() >= SOUND.keys() and sound["rows"] == SOUND["rows"] and sound["ways"] == SOUND["ways"]
    content = json.dumps(sound | change)
    (tmp_path / "members.json").write_text(content)
    with pytest.raises(ValueError, match="members.json is damaged"):
        fit_many(make, split, checkpoints=Checkpoints(tmp_path, resume=True), **keep)
    assert (tmp_path / "members.json").read_text() == content


def test_a_note_that_says_something_twice_is_told(tmp_path):
    split, keep = digits().splits(60, range(2)), dict(epochs=1, mode="batched")
    fit_many(make, split, checkpoints=tmp_path, **keep)
    content = (tmp_path / "members.json").read_text().replace('"epochs": 1', '"epochs": 5, "epochs": 1', 1)
    (tmp_path / "members.json").write_text(content)
    with pytest.raises(ValueError, match="members.json is damaged"):
        fit_many(make, split, checkpoints=Checkpoints(tmp_path, resume=True), **keep)


def test_a_note_of_an_earlier_format_is_refused_by_name(tmp_path):
    split, keep = digits().splits(60, range(2)), dict(epochs=1, mode="batched")
    fit_many(make, split, checkpoints=tmp_path, **keep)
    note = json.loads((tmp_path / "members.json").read_text())
    (tmp_path / "members.json").write_text(json.dumps(note | dict(format=1)))
    with pytest.raises(ValueError,
                       match="members.json has format 1, expected 2: go on with the version of lap_nb that wrote it"):
        fit_many(make, split, checkpoints=Checkpoints(tmp_path, resume=True), **keep)


def test_a_note_with_networks_of_different_settings_in_a_row_is_told(tmp_path):
    split, keep = digits().splits(60, range(2)), dict(epochs=1, mode="batched", grid=dict(lr=[1e-3, 1e-2]))
    fit_many(make, split, checkpoints=tmp_path, **keep)
    note = json.loads((tmp_path / "members.json").read_text())
    assert note["rows"] == [[0, 1], [2, 3]]
    (tmp_path / "members.json").write_text(json.dumps(note | dict(rows=[[0, 2], [1, 3]])))
    with pytest.raises(ValueError, match="networks of different settings in one row"):
        fit_many(make, split, checkpoints=Checkpoints(tmp_path, resume=True), **keep)


@pytest.mark.parametrize("mode", ["batched", "sequential"])
def test_a_training_of_many_is_made_longer(mode, tmp_path):
    "To the same bits as one that was so long from the start, also where one row had ended and the other not."
    split, keep = (
        digits().splits(60, range(2)),
        dict(batch_size=20, eval_every=2, mode=mode, grid=dict(lr=[1e-3, 1e-2]), least_action=LeastAction),
    )
    with pytest.raises(KeyboardInterrupt):
        fit_many(make, split, epochs=4, progress=Stop(3), checkpoints=Checkpoints(tmp_path / "row", every=1), **keep)
    longer, straight = fit_many(make, split, epochs=8, checkpoints=Checkpoints(tmp_path / "row", resume=True),
                                **keep), fit_many(make, split, epochs=8, **keep)
    for name in straight.curves: assert torch.equal(longer.curves[name], straight.curves[name]), name
    for p, q in zip(longer.model.stacks, straight.model.stacks): assert torch.equal(p, q)
    again = fit_many(make, split, epochs=8, checkpoints=Checkpoints(tmp_path / "row", resume=True), **keep)
    assert torch.equal(again.curves["loss"], straight.curves["loss"]) and again.provenance["epochs"] == 8
    with pytest.raises(ValueError, match="of a training of 8 epochs, now they are 4: choose at least as many"):
        fit_many(make, split, epochs=4, checkpoints=Checkpoints(tmp_path / "row", resume=True), **keep)


@pytest.mark.parametrize("plain, settings", [
    (dict(lr=.25, epochs=2), dict(lr=np.float32(.25), epochs=np.int64(2))), (dict(lr=.25, epochs=2), dict(lr=Fraction(1, 4), epochs=torch.tensor(2))),
    (dict(weight_decay=.5, epochs=1, clip=1.), dict(weight_decay=np.float64(.5), epochs=1, clip=np.int32(1))),
    (dict(grid=dict(lr=[.25, .5]), epochs=1), dict(grid=dict(lr=np.logspace(-2, -1, 2, base=2)), epochs=1)),
    (dict(grid=dict(lr=[.25, .5], batch_size=[10, 20]), epochs=1), dict(grid=dict(lr=[np.float32(.25), Fraction(1, 2)], batch_size=[np.int64(10), torch.tensor(20)]), epochs=1)),
    (dict(chunk=1, memory=10 ** 9, epochs=1), dict(chunk=np.int64(1), memory=np.float64(1e9), epochs=1))])
def test_settings_are_plain_numbers(plain, settings, tmp_path):
    "However they are written, a training goes on under either name."
    split = digits().splits(40, range(2))
    first = fit_many(make, split, mode="batched", checkpoints=tmp_path / "c", **settings)
    again = fit_many(make, split, mode="batched", checkpoints=Checkpoints(tmp_path / "c", resume=True), **plain)
    assert first.members == again.members and all(type(v) in (int, float) for m in first.members for v in m.values())
    assert torch.equal(first.curves["loss"], again.curves["loss"]) and json.dumps(first.provenance)


@pytest.mark.parametrize("call, says", [
    (lambda: Ensemble([make(), 5]), "models is .*, expected"), (lambda: Ensemble(make()), "models is .*, expected"),
    (lambda: Ensemble([make()], seeds=[1, 2]), "a whole number for each of the 1 networks"), (lambda: Ensemble([make()]).member(1), "no such network: i is 1, expected"),
    (lambda: Ensemble([make()]).member(.5), "i is 0.5, expected"), (lambda: fit_many(make, digits().splits(40, [0]), 5), "seeds is 5, expected Sequence"), (lambda: confidence_interval("ab"), "values is 'ab', expected"),
    (lambda: confidence_interval([1., 2.], None), "level is None"), (lambda: fit_many(lambda: None, digits().splits(40, [0])), "make_model gave None, expected a module"),
    (lambda: fit_many(make, digits().splits(40, [0]), least_action=lambda m: 5), "least_action gave 5"), (lambda: fit_many(make, digits().splits(40, [0]), device="tpu"), "no device 'tpu' here"),
    (lambda: fit_many(make, digits().splits(40, [0]), memory="much"), "memory is 'much', expected"), (lambda: fit_many(make, digits().splits(40, [0]), checkpoints=5), "checkpoints is 5, expected"),
    (lambda: measure_modes(make, digits().splits(40, [0]), ["batched"], steps=0), "steps is 0"), (lambda: read_modes(None), "path is None, expected")])
def test_arguments_of_another_kind_are_told(call, says):
    with pytest.raises((TypeError, ValueError, IndexError), match=says): call()


def test_rows_are_resumed_as_they_were_cut(tmp_path, monkeypatch):
    row, settings = digits().splits(60, range(5)), dict(epochs=1, mode="batched")
    kept, again = Checkpoints(tmp_path / "c", every=1), Checkpoints(tmp_path / "c", resume=True, every=1)
    first = planned(monkeypatch, make, row, chunk=2, checkpoints=kept, **settings)
    note = json.loads((tmp_path / "c" / "members.json").read_text())
    assert (
        note["rows"] == [[0], [1, 2], [3, 4]] == [at for at, _ in first]
        and note["ways"] == [["batched", "grouped"]] * 3
    )
    assert [job.checkpoints for _, job in first] == [
        Checkpoints(tmp_path / "c" / f"row-{r:03d}", every=1) for r in range(3)
    ]
    # with room for all in one row
    cut = planned(monkeypatch, make, row, checkpoints=again, **settings)
    assert [at for at, _ in cut] == note["rows"] and json.loads((tmp_path / "c" / "members.json").read_text()) == note
    (tmp_path / "c" / "members.json").write_text(
        json.dumps({k: v for k, v in note.items() if k in ("format", "members", "settings")}))
    # a note from before anything was begun
    assert len(planned(monkeypatch, make, row, checkpoints=again, **settings)) == 1
    assert json.loads((tmp_path / "c" / "members.json").read_text())["rows"] == [[0, 1, 2, 3, 4]]


def test_dropout_that_is_off_draws_nothing():
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.gain = nn.Parameter(torch.ones(1))
        def forward(self, x): return F.dropout(F.dropout(F.dropout(self.gain * x, .5, False), 0.), .5, self.training)
    models, x = [Net() for _ in range(2)], torch.randn(2, 6, 5)
    row = Ensemble(models, seeds=[4, 2])
    out = row(x)
    for i, seed in enumerate((4, 2)):
        with seeded(seed): assert torch.equal(out[i], F.dropout(x[i], .5))
    assert torch.equal(Ensemble(models, conv="matmul").eval()(x), x)


def test_evaluation_in_parts_is_evaluation(monkeypatch):
    row, x = Ensemble([make(), make()]).eval(), torch.rand(2, 7, 64)
    whole = row(x)
    monkeypatch.setattr("lap_nb.ensembles.EVALUATED", 6)
    parts, mapped = [], Ensemble._mapped
    monkeypatch.setattr(Ensemble, "_mapped", lambda self, x: (parts.append(x.shape[1]), mapped(self, x))[1])
    torch.testing.assert_close(row(x), whole)
    assert parts == [3, 3, 1]


def test_an_ensemble_takes_time_and_keeps_its_settings():
    before = time.perf_counter()
    runs = fit_many(make, digits().splits(60, [4, 2]), epochs=2, eval_every=1, lr=.5e-3)
    assert 0 < runs.provenance["seconds"] <= time.perf_counter() - before
    assert {k: runs.provenance[k] for k in ("n", "seeds", "modes", "lr", "data")} == dict(
        n=60, seeds=[4, 2], modes=["batched"], lr=0.5e-3, data=digits().name
    )
    assert (
        runs[1].curves["epoch"].tolist() == [1, 2]
        and runs[1].provenance["seed"] == 2
        and str(confidence_interval([1.0, 2.0, 3.0], 0.5)) == "2.0 ± 0.5"
    )


def test_a_recorded_graph_is_replayed_and_leaves_no_trace(monkeypatch):
    """All but CUDA itself: recording runs the pass several times, as PyTorch does, and the tensors say they are on a
    GPU."""
    recorded = []
    def record(passes, samples):
        recorded.append(samples[0].shape)
        for _ in range(3): passes(*samples)
        return passes
    monkeypatch.setattr("torch.cuda.make_graphed_callables", record)
    class OnGPU(torch.Tensor):
        device = property(lambda self: SimpleNamespace(type="cuda"))
        __torch_function__ = torch._C._disabled_torch_function_impl
    models = [_made(conv_net, s) for s in range(2)]
    rows = Ensemble(models), lap_nb.ensembles.Graphed(models)
    for B in (8, 8, 5):
        x = torch.rand(2, B, 1, 8, 8)
        expected, (found, energies) = rows[0](x), rows[1]._mapped(x.as_subclass(OnGPU))
        assert torch.equal(expected, found) and energies == []
    assert [shape[1] for shape in recorded] == [8, 5]
    for a, b in zip(rows[0]._tensors(), rows[1]._tensors()): assert torch.equal(a, b)        # running statistics, too
    with pytest.raises(RuntimeError, match="a CUDA graph would repeat them"):
        lap_nb.ensembles.Graphed([noisy_net(), noisy_net()])._mapped(torch.rand(2, 4, 64).as_subclass(OnGPU))
    assert torch.equal(rows[0].eval()(x), rows[1].eval()(x)) and len(recorded) == 2


class RandomFeatures(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("w", torch.randn(64, 16), persistent=False)
        self.head = nn.Linear(16, 10)
    def forward(self, x): return self.head(torch.tanh(x @ self.w))


def test_members_have_their_own_buffers_even_if_those_are_not_saved():
    models = [_made(RandomFeatures, seed) for seed in range(3)]
    row, x = Ensemble(models).eval(), torch.randn(5, 64)
    for i, m in enumerate(models): torch.testing.assert_close(row.member(i)(x), m.eval()(x))


def test_values_of_a_grid_as_a_tensor():
    members = grid_members([0], dict(lambda0=torch.tensor([1., 2.])))
    assert [m["lambda0"] for m in members] == [1., 2.] and json.dumps(members)


class Averages(nn.Module):
    "A network that keeps a running mean, written or assigned."
    def __init__(self, assigns):
        super().__init__()
        self.head, self.assigns = nn.Linear(64, 10), assigns
        self.register_buffer("mean", torch.zeros(64))
    def forward(self, x):
        if self.training:
            mean = .9 * self.mean + .1 * x.detach().mean(0)
            if self.assigns: self.mean = mean
            else: self.mean.copy_(mean)
        return self.head(x - self.mean)


def test_a_buffer_that_is_assigned_is_not_lost_without_a_word():
    split, run = digits().splits(60, range(2)), partial(fit_many, epochs=2, batch_size=20)
    alone, row = (run(partial(Averages, False), split, mode=mode) for mode in ("sequential", "batched"))
    for i in range(2): torch.testing.assert_close(alone[i].model.mean, row[i].model.mean)
    run(partial(Averages, True), split, mode="sequential")
    with pytest.raises(RuntimeError, match="assigns its buffer mean anew.*choose mode='sequential'"):
        run(partial(Averages, True), split, mode="batched")


def test_resuming_with_another_least_action_is_refused(tmp_path):
    split, run = digits().splits(60, range(2)), partial(fit_many, partial(dense_net, 64, 10, K=2), epochs=1)
    first, again = (Checkpoints(tmp_path / "row", resume) for resume in (False, True))
    run(split, least_action=LeastAction, checkpoints=first)
    run(split, least_action=LeastAction, checkpoints=again)
    for other in (None, partial(LeastAction, controller=DualAscent(tau=.1))):
        with pytest.raises(ValueError, match="they differ in least_action"):
            run(split, least_action=other, checkpoints=again)


def test_lambdas_are_told_apart_by_what_they_hold(tmp_path):
    split, run = digits().splits(60, range(2)), partial(fit_many, partial(dense_net, 64, 10, K=2), epochs=1)
    first, again = (Checkpoints(tmp_path / "row", resume) for resume in (False, True))
    bound = lambda tau: lambda model: LeastAction(model, DualAscent(tau=tau, every=2))
    run(split, least_action=bound(.1), checkpoints=first)
    run(split, least_action=bound(.1), checkpoints=again)
    for other in (bound(.2), lambda model: LeastAction(model, DualAscent(tau=.1, every=3))):
        with pytest.raises(ValueError, match="they differ in least_action"):
            run(split, least_action=other, checkpoints=again)


def test_what_is_no_maker_and_no_grid():
    split, run = digits().splits(60, range(2)), partial(fit_many, epochs=1)
    with pytest.raises(TypeError, match="make_model is of type ResidualNet, expected what makes a network"):
        run(make(), split)
    with pytest.raises(TypeError, match="least_action is True, expected"): run(make, split, least_action=True)
    with pytest.raises(ValueError, match="seeds are not a setting"): run(make, split, grid=dict(seed=[7, 8]))
    with pytest.raises(ValueError, match="grid is .*, expected"): run(make, split, grid=[("lr", [1.])])
    same = make()
    for mode in ("sequential", "batched"):
        with pytest.raises(ValueError, match="gave the same network twice"): run(lambda: same, split, mode=mode)


@pytest.mark.parametrize("level", [0, 1, 95])
def test_a_level_is_a_share(level):
    with pytest.raises(ValueError, match="level is .*, expected"): confidence_interval(torch.rand(5), level)


def test_a_folder_that_cannot_be_made_is_told_in_words(tmp_path, monkeypatch):
    def refuse(*args, **kwargs): raise OSError(errno.EROFS, os.strerror(errno.EROFS))
    monkeypatch.setattr(lap_nb.ensembles.Path, 'mkdir', refuse)
    with pytest.raises(OSError, match='choose a place where you may write.*kept'):
        fit_many(partial(dense_net, 64, 10, K=1, hidden=2),
                 digits().splits(20, [0]), epochs=1, checkpoints=tmp_path / 'kept')

"Many networks at once: each as if alone, whatever the layers; grids, chunks, modes, faults."
from functools import partial

import pytest
import torch
from torch import nn

from lap_nb.data import Dataset, digits
from lap_nb.dynamics import Flow, ResidualNet, dense_net, init_velocities_
from lap_nb.ensembles import Ensemble, _made, fit_many, interval, seeded
from lap_nb.kinetic import EnergyMeter
from lap_nb.least_action import LeastAction
from lap_nb.training import fit

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
    torch.testing.assert_close(row.eval()(x), torch.stack([m.eval()(b) for m, b in zip(models, x)]), rtol=1e-4, atol=1e-5)


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
    assert runs.diverged == {0: 1}
    assert not runs[0].curves["loss"].isfinite().any() and not runs[0].curves["test_accuracy"].isfinite().any()
    for name in healthy.curves: torch.testing.assert_close(runs[1].curves[name], healthy[0].curves[name], rtol=1e-4, atol=1e-6)
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
            for stack in row.stacks: stack += 1.               # an optimiser goes on moving all it has
        row(x); row.eval()


def test_all_diverged_is_an_error():
    with pytest.raises(FloatingPointError, match="all networks diverged"):
        fit_many(partial(init_velocities_, make(), 1e30), digits().splits(60, [0, 1]), epochs=2)

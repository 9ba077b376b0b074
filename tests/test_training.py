"Least action and training: sequences computed by hand, one network against many, and faults."
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from lap_nb.data import Dataset, digits
from lap_nb.dynamics import Flow, ResidualNet, dense_net, init_velocities_
from lap_nb.ensembles import Ensemble, _made, fit_many, interval
from lap_nb.kinetic import EnergyMeter
from lap_nb.least_action import LeastAction, dual_ascent
from lap_nb.training import fit

make = partial(dense_net, 64, 10, 3, 16)


def gradients(loss, model):
    return torch.cat([g.flatten() for g in torch.autograd.grad(loss, tuple(model.parameters()))])


def test_both_forms_of_the_objective_have_parallel_gradients():
    torch.manual_seed(0)
    model, x, y, lam = make().double(), torch.rand(20, 64).double(), torch.randint(10, (20,)), 7.
    with EnergyMeter(model) as meter:
        task = F.cross_entropy(model(x), y); multiplied = gradients(lam * task + meter.take().sum(), model)
        task = F.cross_entropy(model(x), y); divided = gradients(task + meter.take().sum() / lam, model)
    torch.testing.assert_close(multiplied, lam * divided, rtol=1e-5, atol=1e-7)


def test_both_forms_stop_at_the_same_point():
    def minimum(objective):
        theta = torch.tensor(0., dtype=torch.float64, requires_grad=True)
        opt = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe")
        def closure():
            opt.zero_grad(); loss = objective(theta); loss.backward()
            return loss
        opt.step(closure)
        return theta.item()
    for lam in (.1, 1., 30.):
        ends = minimum(lambda t: t ** 2 + lam * (t - 1) ** 2), minimum(lambda t: (t - 1) ** 2 + t ** 2 / lam)
        assert ends == pytest.approx((lam / (1 + lam),) * 2, abs=1e-6)


def test_published_sequence_on_a_real_training():
    "Order of the published code: forward, multiplier from this batch's loss, then the step."
    torch.manual_seed(0)
    model, x, y = make(), torch.rand(20, 64), torch.randint(10, (20,))
    la, lam = LeastAction(model, lambda0=.5, tau=.25, every=3), .5
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for step in range(1, 10):
        with torch.no_grad(): task_before = F.cross_entropy(model(x), y).item()
        if step % 3 == 0: lam += .25 * task_before
        task = F.cross_entropy(model(x), y)
        loss = la(task)
        assert la.lam.item() == pytest.approx(lam, rel=1e-5)
        assert loss.item() == pytest.approx(task_before + la.action.item() / lam, rel=1e-5)
        opt.zero_grad(); loss.backward(); opt.step()


def test_lambda_falls_under_a_target_but_stays_positive():
    lam = torch.tensor(.02)
    for _ in range(100): lam = dual_ascent(lam, torch.tensor(0.), target=.5)
    assert lam.item() == pytest.approx(1e-3)


@pytest.mark.parametrize("settings, message", [
    (dict(lambda0=0.), "lambda0 is 0.0"), (dict(lambda0=-1.), "lambda0 is -1"), (dict(tau=-.1), "tau is -0.1"),
    (dict(every=0), "every is 0"), (dict(target=-1.), "target is -1"), (dict(cap=.5), "cap is 0.5"), (dict(reduction="max"), "reduction is 'max'")])
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message): LeastAction(make(), **settings)


def test_loss_must_be_one_number_and_follow_one_forward_pass():
    model = make()
    la = LeastAction(model)
    with pytest.raises(RuntimeError, match="energies of 0 blocks"): la(torch.tensor(1.))
    model(torch.rand(2, 64))
    with pytest.raises(ValueError, match="one number per network"): la(torch.ones(2))


def test_model_without_residual_block():
    with pytest.raises(ValueError, match="no residual block found in Sequential"): LeastAction(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_every_network_of_a_row_is_what_it_is_alone(least_action):
    row = digits().splits(60, [3, 4, 9])
    runs = fit_many(make, row, least_action=least_action, epochs=6, batch_size=25, eval_every=2)
    for i, seed in enumerate(row.seeds):
        model = _made(make, seed)
        alone = fit(model, row.member(i), least_action and least_action(model), seed=seed, epochs=6, batch_size=25, eval_every=2)
        for name, curve in alone.curves.items():
            tolerance = dict(rtol=0, atol=.01) if "accuracy" in name else dict(rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(runs[i].curves[name], curve, **tolerance)


def test_networks_do_not_depend_on_their_neighbours():
    pair, trio = (fit_many(make, digits().splits(60, seeds), least_action=LeastAction, epochs=4) for seeds in ([5, 6], [5, 7, 6]))
    for name in ("loss", "lambda", "action"):
        torch.testing.assert_close(pair[1].curves[name], trio[2].curves[name], rtol=1e-3, atol=1e-5)


def test_same_seeds_give_the_same_bits():
    first, second = (fit_many(make, digits().splits(60, [0, 1]), least_action=LeastAction, epochs=3) for _ in range(2))
    assert all(torch.equal(first.curves[k], second.curves[k]) for k in first.curves)


def test_training_leaves_the_global_generator_alone():
    state = torch.get_rng_state()
    fit_many(make, digits().splits(60, [0, 1]), epochs=1)
    assert torch.equal(torch.get_rng_state(), state)


def test_row_of_batch_norm_networks_keeps_statistics_apart():
    class Velocity(nn.Sequential):
        def __init__(self): super().__init__(nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
    def norm_net(): return ResidualNet(Flow([Velocity() for _ in range(2)]), nn.Linear(64, 10))
    models = [_made(norm_net, s) for s in range(3)]
    row, x = Ensemble(models), torch.rand(3, 30, 64) * torch.tensor([1., 2., 3.]).reshape(3, 1, 1)
    torch.testing.assert_close(row(x), torch.stack([m(b) for m, b in zip(models, x)]), rtol=1e-4, atol=1e-5)
    for i, model in enumerate(models):
        for key, value in model.state_dict().items():
            torch.testing.assert_close(row.member(i).state_dict()[key], value, rtol=1e-4, atol=1e-5)


def test_best_epoch_is_chosen_by_validation():
    run = fit(make(), digits().split(60), epochs=6, eval_every=1)
    best = run.curves["val_accuracy"].argmax()
    assert run.best_test_accuracy == run.curves["test_accuracy"][best]


@pytest.mark.parametrize("settings, message", [(dict(epochs=0), "epochs is 0"), (dict(batch_size=0), "batch_size is 0"),
                                               (dict(epochs=2.5), "epochs is 2.5"), (dict(eval_every=0), "eval_every is 0")])
def test_training_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message): fit(make(), digits().split(60), **settings)
    with pytest.raises(ValueError, match=message): fit_many(make, digits().splits(60, [0, 1]), **settings)


def test_divergence_stops_with_a_word_of_advice():
    with pytest.raises(FloatingPointError, match="diverged; lower lr"): fit(make(), digits().split(60), epochs=3, lr=1e30)


def test_a_row_needs_one_split_per_seed():
    with pytest.raises(ValueError, match="one row per seed"): fit_many(make, digits().split(60), seeds=[0])
    with pytest.raises(ValueError, match="no model"): Ensemble([])


def test_intervals_need_two_finite_values():
    for values in ([1.], [1., float("nan")], [[1., 2.]]):
        with pytest.raises(ValueError, match="at least two finite values"): interval(torch.tensor(values))


def test_interval_of_known_numbers():
    "Mean 2, standard deviation 1, n = 3: half width 4.3027 / sqrt(3), from a table of Student's t."
    found = interval(torch.tensor([1., 2., 3.]))
    assert (found.mean, found.high - found.mean) == pytest.approx((2, 4.302653 / 3 ** .5), rel=1e-6)


def test_dataset_of_the_user_trains():
    torch.manual_seed(0)
    x = torch.randn(300, 3)
    data = Dataset(x, (x[:, 0] > 0).long(), torch.arange(200, 300), "mine", 2)
    run = fit(dense_net(3, 2, 3), data.split(100), epochs=60)
    assert run.last["test_accuracy"] > .9

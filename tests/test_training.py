"Least action and training: sequences computed by hand, one network against many, and faults."
import json
import os
import re
import shutil
import threading
from copy import copy
from dataclasses import asdict, replace
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from conftest import ROOT
from lap_nb.data import Dataset, digits
from lap_nb.depth import Elastic, depth_curve, latency, recompute_statistics
from lap_nb.dynamics import Flow, ResidualBlock, ResidualNet
from lap_nb.ensembles import Ensemble, _made, fit_many
from lap_nb.kinetic import EnergyMeter
from lap_nb.least_action import AugmentedLagrangian, DualAscent, FixedWeight, LeastAction, ProportionalIntegral, dual_ascent
from lap_nb.nets import dense_net, init_velocities_
from lap_nb.training import Checkpoints, TrainConfig, evaluate, fit

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
        opt = torch.optim.LBFGS([theta], max_iter=200, tolerance_grad=1e-12, tolerance_change=0,
                                line_search_fn="strong_wolfe")
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
    la, lam = LeastAction(model, DualAscent(lambda0=.5, tau=.25, every=3)), .5
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
    (dict(every=0), "every is 0"), (dict(target=-1.), "target is -1"), (dict(bounds=(None, .5)), "bounds end at 0.5")])
def test_settings_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message): DualAscent(**settings)


def test_a_reduction_that_there_is_not():
    with pytest.raises(ValueError, match="reduction is 'max'"): LeastAction(make(), reduction="max")


def test_loss_must_be_one_number_and_follow_one_forward_pass():
    model = make()
    la = LeastAction(model)
    with pytest.raises(RuntimeError, match="energies of 0 blocks"): la(torch.tensor(1.))
    model(torch.rand(2, 64))
    with pytest.raises(ValueError, match="one number per network"): la(torch.ones(2))


def test_model_without_residual_block():
    with pytest.raises(ValueError, match="no residual block found in Sequential"):
        LeastAction(nn.Sequential(nn.Linear(2, 2)))


@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_every_network_of_a_row_is_what_it_is_alone(least_action):
    row = digits().splits(60, [3, 4, 9])
    runs = fit_many(make, row, least_action=least_action, epochs=6, batch_size=25, eval_every=2)
    for i, seed in enumerate(row.seeds):
        model = _made(make, seed)
        alone = fit(model, row.member(i), least_action and least_action(model), seed=seed, epochs=6, batch_size=25,
                    eval_every=2)
        for name, curve in alone.curves.items():
            tolerance = dict(rtol=0, atol=.01) if "accuracy" in name else dict(rtol=1e-3, atol=1e-5)
            torch.testing.assert_close(runs[i].curves[name], curve, **tolerance)


def test_networks_do_not_depend_on_their_neighbours():
    pair, trio = (fit_many(make,
                           digits().splits(60, seeds), least_action=LeastAction, epochs=4)
                  for seeds in ([5, 6], [5, 7, 6]))
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
    with pytest.raises(FloatingPointError, match="diverged; lower lr"):
        fit(make(), digits().split(60), epochs=3, lr=1e30)


def test_a_row_needs_one_split_per_seed():
    with pytest.raises(ValueError, match="one row per seed"): fit_many(make, digits().split(60), seeds=[0])
    with pytest.raises(ValueError, match="no model"): Ensemble([])


def test_dataset_of_the_user_trains():
    torch.manual_seed(0)
    x = torch.randn(300, 3)
    data = Dataset(x, (x[:, 0] > 0).long(), torch.arange(200, 300), "mine", 2)
    run = fit(dense_net(3, 2, 3), data.split(100), epochs=60)
    assert run.last["test_accuracy"] > .9


# The options of the loop

SMALL = digits().split(60)
IMAGES = Dataset(digits().x.view(-1, 1, 8, 8), digits().y, digits().test, "digit images", 10)


def conv(seed=0):
    torch.manual_seed(seed)
    field = lambda: nn.Sequential(nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 4, 3, padding=1))
    return ResidualNet(Flow([field(), field()]), nn.Sequential(nn.Flatten(), nn.Linear(256, 10)),
                       nn.Conv2d(1, 4, 3, padding=1))


def fitted(least_action=LeastAction, model=make, data=SMALL, seed=0, **settings):
    torch.manual_seed(seed)
    model = model()
    return fit(model, data, least_action and least_action(model),
               **dict(epochs=6, batch_size=25, eval_every=2) | settings)


def weights(run): return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def by_hand(make_opt, schedule=None, epochs=6, clip=None, smoothing=0.):
    "The same training with PyTorch's own optimizer, scheduler and clipping, in a loop of its own."
    torch.manual_seed(0)
    model, g = make(), torch.Generator().manual_seed(0)
    opt = make_opt(model.parameters())
    scheduler = schedule and schedule(opt)
    for _ in range(epochs):
        for at in SMALL.train[torch.randperm(60, generator=g)].split(25):
            opt.zero_grad()
            F.cross_entropy(model(SMALL.x[at]), SMALL.y[at], label_smoothing=smoothing).backward()
            if clip: nn.utils.clip_grad_norm_(model.parameters(), clip)
            opt.step()
            if scheduler: scheduler.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()])


SGD = partial(torch.optim.SGD, lr=.1, momentum=.9, weight_decay=.01, nesterov=True)
ADAMW = partial(torch.optim.AdamW, lr=.01, weight_decay=.01)
sched = torch.optim.lr_scheduler

@pytest.mark.parametrize("settings, expected", [
    (dict(optimizer="sgd", lr=.1), dict(make_opt=SGD)),
    (dict(lr=.01), dict(make_opt=ADAMW)),
    (dict(lr=.01, clip=.3, label_smoothing=.1), dict(make_opt=ADAMW, clip=.3, smoothing=.1)),
    (dict(optimizer="sgd", lr=.1, schedule="cosine"), dict(make_opt=SGD, schedule=lambda o: sched.CosineAnnealingLR(o, 18))),
    (dict(optimizer="sgd", lr=.1, schedule="multistep"), dict(make_opt=SGD, schedule=lambda o: sched.MultiStepLR(o, [9, 14]))),
    (dict(optimizer="sgd", lr=.1, warmup=.5), dict(make_opt=SGD, schedule=lambda o: sched.LinearLR(o, 1 / 9, 1, 8))),
])
def test_options_do_what_pytorch_does(settings, expected):
    torch.testing.assert_close(weights(fitted(None, **settings)), by_hand(**expected), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("settings", [dict(optimizer="sgd", lr=.05, schedule="onecycle", clip=.5, label_smoothing=.1), dict(precision="bfloat16", clip=.5)])
def test_a_row_with_options_is_what_its_networks_are_alone(settings):
    from lap_nb.ensembles import _attached
    from lap_nb.training import train_loop
    row = digits().splits(60, [3, 4])
    ensemble = Ensemble([_made(make, s) for s in row.seeds])
    curves = train_loop(ensemble, row, _attached([LeastAction] * len(ensemble), ensemble),
                        [torch.Generator().manual_seed(s) for s in row.seeds],
                        TrainConfig(epochs=4, batch_size=25, eval_every=2, **settings))
    loose = 5e-2 if "precision" in settings else 1e-3
    for i, seed in enumerate(row.seeds):
        model = _made(make, seed)
        alone = fit(model, row.member(i), LeastAction(model), seed=seed, epochs=4, batch_size=25, eval_every=2,
                    **settings)
        for name in ("loss", "lambda", "energy"):
            torch.testing.assert_close(curves[name][:, i], alone.curves[name], rtol=loose, atol=1e-4)


def test_pictures_of_a_row_are_moved_as_alone():
    from lap_nb.training import batches
    row = IMAGES.splits(40, [5, 6])
    gens = lambda seeds: [torch.Generator().manual_seed(s) for s in seeds]
    both = list(batches(row, gens([5, 6]), 16, crop=2, flip=True))
    alone = list(batches(row.member(1), gens([6]), 16, crop=2, flip=True))
    still = list(batches(row.member(1), gens([6]), 16))
    for (x, y), (x1, y1), (x2, y2) in zip(both, alone, still):
        assert torch.equal(x[1], x1) and torch.equal(y[1], y1) and torch.equal(y1, y2) and not torch.equal(x1, x2)


def test_augmented_training_learns():
    run = fitted(model=conv, data=IMAGES.split(300), epochs=20, batch_size=50, lr=1e-2, crop=1)
    assert run.last["test_accuracy"] > .85


@pytest.mark.parametrize("precision", ["bfloat16", "float16"])
def test_half_precision_follows_full(precision):
    half, full = (fitted(precision=p) for p in (precision, "float32"))
    torch.testing.assert_close(half.curves["loss"], full.curves["loss"], rtol=.05, atol=.01)
    assert not torch.equal(weights(half), weights(full)) and weights(half).dtype == torch.float32


def test_float16_skips_a_step_that_overflows():
    "The first scale, 65536, is too large for this loss: the steps until it fits are left out, and it is no divergence."
    scales = []
    run = fitted(None, model=lambda: init_velocities_(make(), 3.), precision="float16", check_every=1,
                 callbacks=[lambda t: scales.append(t.descent.scaler.get_scale())])
    assert run.last["loss"].isfinite() and scales[-1] < 65536


def test_channels_last_gives_the_same_training():
    plain, fast = (fitted(model=conv, data=IMAGES.split(60), channels_last=form) for form in (False, True))
    for name in ("loss", "lambda", "energy"):
        torch.testing.assert_close(fast.curves[name], plain.curves[name], rtol=1e-3, atol=1e-5)


COMPILER = shutil.which(os.environ.get("CXX", "")) or shutil.which("g++") or shutil.which("clang++")

@pytest.mark.skipif(COMPILER is None, reason="inductor needs a C++ compiler: apt-get install g++, or name yours in CXX")
def test_compiled_training_has_the_gradients_of_the_eager_one(monkeypatch):
    "Default backend, no graph break. Plain gradient descent, so that the weights differ by what the gradients do."
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()   # of other tests
    compiled = []
    def whole(model, compile=torch.compile, **options):
        compiled.append(options)
        return compile(model, fullgraph=True, **options)
    monkeypatch.setattr(torch, "compile", whole)
    settings = dict(model=partial(dense_net, 64, 10, 2, 8), optimizer="sgd", momentum=0., weight_decay=0., lr=.5,
                    epochs=3, batch_size=60, eval_every=1)
    eager, fast = (fitted(compile=c, **settings) for c in (False, True))
    assert compiled == [dict(backend="inductor")] and torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1
    torch.testing.assert_close(weights(fast), weights(eager), rtol=1e-4, atol=1e-6)
    for name in ("loss", "lambda", "action", "energy"):
        torch.testing.assert_close(fast.curves[name], eager.curves[name], rtol=1e-4, atol=1e-6)
    assert (weights(eager) - weights(fitted(**settings | dict(lr=1e-12)))).norm() > 0.1, (
        "the steps are large enough to tell gradients apart"
    )


def test_early_stop_waits_for_validation():
    run = fitted(None, epochs=200, eval_every=1, patience=3)
    val = run.curves["val_accuracy"]
    assert len(val) < 200 and len(val) - 1 - val.argmax() == 3


def test_callbacks_see_the_training_and_may_stop_it():
    seen = []
    def stop(training):
        seen.append((training.epoch, training.step, training.curves.points[-1]["loss"].item()))
        return training.epoch == 4
    run = fitted(callbacks=[stop, lambda training: "not True, so no stop"])
    assert [s[:2] for s in seen] == [(2, 6), (4, 12)] and run.curves["epoch"].tolist() == [2, 4]
    assert run.curves["loss"].tolist() == [s[2] for s in seen]


def test_progress_bar_counts_epochs():
    class Bar:
        n = 0
        def update(self, k): self.n += k
    bar = Bar()
    fitted(progress=bar)
    assert bar.n == 6


def test_energy_is_that_of_the_batch_before_its_step():
    model = make()
    run = fit(model, SMALL, LeastAction(model), epochs=3, batch_size=60, eval_every=1)
    torch.testing.assert_close(run.curves["energy"].sum(1), run.curves["action"])
    plain = fitted(None, epochs=1, batch_size=60)
    torch.manual_seed(0)
    fresh = make()
    with EnergyMeter(fresh) as meter:
        fresh(SMALL.x[SMALL.train])
        torch.testing.assert_close(plain.curves["energy"][0], meter.take().detach())


def test_a_plain_training_leaves_no_hooks_and_keeps_its_numbers():
    run = fitted(None)
    assert not any(m._forward_hooks for m in run.model.modules())
    net = nn.Sequential(nn.Linear(64, 8), nn.ReLU(), nn.Linear(8, 10))
    assert "energy" not in fit(net, SMALL, epochs=1).curves


def test_unknown_setting_is_named():
    with pytest.raises(TypeError, match="no setting epoch, expected some of epochs"): fit(make(), SMALL, epoch=3)
    with pytest.raises(TypeError, match="no setting optimiser"):
        fit_many(make, digits().splits(60, range(2)), optimiser="sgd")


def test_settings_by_name_stand_in_place_of_those_of_the_configuration():
    config = TrainConfig(epochs=2, batch_size=20, eval_every=1, lr=.1)
    for given in (
        dict(config=config),
        dict(config=config, lr=0.1),
        dict(config=replace(config, lr=0.5), lr=0.1),
        dict(epochs=2, batch_size=20, eval_every=1, lr=0.1),
    ):
        assert fit(make(), SMALL, **given).provenance.items() >= asdict(config).items()
        assert fit_many(make, digits().splits(40, range(2)), **given).provenance.items() >= asdict(config).items()
    for wrong in ("sgd", dict(lr=.1), TrainConfig, .1):
        with pytest.raises(TypeError, match="config is .*, expected TrainConfig"): fit(make(), SMALL, config=wrong)
    with pytest.raises(ValueError, match="lr is -1"): fit(make(), SMALL, config=config, lr=-1)


@pytest.mark.parametrize("settings, message", [
    (dict(optimizer="adam"), "optimizer is 'adam', expected one of 'adamw', 'sgd'"), (dict(precision="half"), "precision is 'half'"),
    (dict(schedule="step"), "schedule is 'step'"), (dict(clip=0.), "clip is 0"), (dict(crop=-1), "crop is -1"), (dict(crop=2), "are for pictures"),
    (dict(flip=True), "are for pictures"), (dict(lr=-1.), "lr is -1"), (dict(weight_decay=-.1), "weight_decay is -0.1"), (dict(patience=0), "patience is 0"),
    (dict(label_smoothing=1.), "label_smoothing is 1"), (dict(warmup=10), "warmup is 10"), (dict(milestones=(100,)), "milestones is 100"),
    (dict(check_every=0), "check_every is 0"), (dict(lr="fast"), "lr is 'fast'"), (dict(lr=float("inf")), "lr is inf"), (dict(clip="1"), "clip is '1'"),
    (dict(milestones=.5), "milestones is 0.5"), (dict(gamma=-1.), "gamma is -1"), (dict(epochs=True), "epochs is True"), (dict(precision=["float16"]), "precision is")])
def test_options_that_cannot_work(settings, message):
    with pytest.raises(ValueError, match=message): fit(make(), SMALL, **settings)


RUNS = json.loads((ROOT / "tests" / "runs.json").read_text())   # of release 0.1.0
KINDS = dict(plain=(None, {}), least_action=(LeastAction, {}), onecycle=(LeastAction, dict(schedule="onecycle")),
             sgd=(None, dict(optimizer="sgd", lr=.1, schedule="cosine", warmup=.1, clip=.5, label_smoothing=.1)))

@pytest.mark.parametrize("name", RUNS)
def test_the_same_seeds_give_the_numbers_they_always_gave(name):
    "In float64, where processors differ by 1e-8 after these few steps."
    kind, _, mode = name.partition(" ")
    maker, settings = KINDS[kind]
    data, net, train = (
        digits(),
        lambda: dense_net(64, 10, 3, 16).double(),
        dict(epochs=4, batch_size=25, eval_every=2) | settings,
    )
    data = replace(data, x=data.x.double())
    if mode: run = fit_many(net, data.splits(60, range(3)), least_action=maker, mode=mode, **train)
    else:
        torch.manual_seed(0)
        run = fit(model := net(), data.split(100), maker and maker(model), **train)
    for curve, numbers in RUNS[name].items():
        torch.testing.assert_close(run.curves[curve].double(), torch.tensor(numbers, dtype=torch.float64), rtol=1e-6,
                                   atol=1e-12)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("settings", [{}, dict(precision="float16", clip=1.), dict(precision="bfloat16", channels_last=True), dict(compile=True)])
def test_on_a_gpu(settings):
    cpu, gpu = (
        fitted(model=conv, data=IMAGES.split(60)),
        fitted(model=lambda: conv().cuda(), data=IMAGES.split(60), crop=0, **settings),
    )
    torch.testing.assert_close(gpu.curves["loss"], cpu.curves["loss"], rtol=.1, atol=.02)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_a_step_on_a_gpu_waits_for_nothing():
    from lap_nb.training import Training, batches
    model = conv().cuda()
    split = IMAGES.split(200).to("cuda")
    training = Training(model, split, LeastAction(model), [torch.Generator().manual_seed(0)],
                        TrainConfig(batch_size=50, clip=1.))
    for x, y in batches(split, training.draws.generators, 50): training.train_step(x, y)
    training.at = 0
    found = list(batches(split, training.draws.generators, 50))
    torch.cuda.set_sync_debug_mode("error")
    try:
        for x, y in found: training.train_step(x, y)
    finally: torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("row", [False, True])
@pytest.mark.parametrize("maker", [None, LeastAction, partial(LeastAction, controller=AugmentedLagrangian(target=.5, average=.9)), partial(LeastAction, controller=FixedWeight()),
                                   partial(LeastAction, controller=ProportionalIntegral(accumulate=2), weights={"*": 2.})])
def test_a_step_reads_no_value_from_the_device(monkeypatch, row, maker):
    """On the meta device tensors have no values, so any read would raise. Two epochs, each with a step whose energies
    are kept, and a last batch that is smaller."""
    from lap_nb import ensembles, training
    cpu = lambda self, seeds, device: self.__dict__.update(generators=[torch.Generator().manual_seed(s) for s in seeds])
    monkeypatch.setattr(ensembles.Ensemble, "_seed", cpu)   # meta has no generators
    # nor fused optimizers
    monkeypatch.setattr(training, "make_optimizer",
                        lambda params, config: torch.optim.SGD(list(params), lr=.1, momentum=.9, foreach=False))
    split = copy(digits().splits(60, [0, 1]) if row else SMALL)
    # unchecked: to check is to read
    for part in ("x", "y", "train", "val", "test"): object.__setattr__(split, part, getattr(split, part).to("meta"))
    model = (Ensemble([make(), make()]) if row else make()).to("meta")
    la = maker and (ensembles._attached([maker] * 2, model) if row else maker(model))
    gens = [torch.Generator().manual_seed(s) for s in range(1 + row)]
    loop = training.Training(model, split, la, gens,
                             training.TrainConfig(batch_size=25, epochs=2, eval_every=1, clip=1., schedule="cosine"))
    for _ in range(2):
        for x, y in training.batches(split, gens, 25): loop.train_step(x, y)
        loop.epoch, loop.at = loop.epoch + 1, 0
    assert loop.step == 6 and loop.last["loss"].device.type == "meta" == loop.last["energy"].device.type
    with pytest.raises(RuntimeError, match="meta"): loop.check()   # what reads, raises


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "float16"])
def test_on_the_cpu_a_step_reads_loss_and_multiplier_and_nothing_else(precision):
    from lap_nb.training import Training, batches
    class Reads(TorchDispatchMode):
        count = 0
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.nonzero.default): self.count += 1
            return func(*args, **(kwargs or {}))
    for maker, reads in ((None, 0), (LeastAction, 4 * 3)):   # of each of three steps
        model = make()
        gens = [torch.Generator().manual_seed(0)]
        loop, found = (
            Training(model, SMALL, maker and maker(model), gens, TrainConfig(precision=precision, clip=1.0)),
            Reads(),
        )
        loop.train_step(SMALL.x[:5], SMALL.y[:5])   # makes the state of the optimizer
        with found:
            for x, y in batches(SMALL, gens, 25): loop.train_step(x, y)
        assert found.count == reads


# What a user may get wrong
def small_norm():
    "Batch norm over samples alone."
    field = lambda: nn.Sequential(nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 64))
    return ResidualNet(Flow([field(), field()]), nn.Linear(64, 10))


class Answer(nn.Module):
    "A network in a wrapper that makes something else of its logits."
    def __init__(self, of): super().__init__(); self.net, self.of = make(), of
    def forward(self, x): return self.of(self.net(x))


@pytest.mark.parametrize("model, message", [
    (dense_net(64, 5, 2, 8), r"gave \[60, 5\], expected logits \[60, 10\]"), (Answer(lambda z: {"logits": z}), "gave an object of type dict"),
    (Answer(lambda z: z[:, 0]), r"gave \[60\], expected"), (Answer(lambda z: z[:30]), r"gave \[30, 10\]"),
    (nn.Flatten(), "Flatten has no parameters to train"), (make().requires_grad_(False), "ResidualNet has no parameters to train")])
def test_models_that_cannot_be_trained_here(model, message):
    with pytest.raises(ValueError, match=message): fit(model, SMALL, epochs=1)


@pytest.mark.parametrize("model, data, told", [
    (small_norm(), digits().split(61), r"shape \[1, 64\].*Batch norm cannot take one sample"), (dense_net(32, 10, 2, 8), SMALL, r"shape \[60, 64\], torch.float32"),
    (make().double(), SMALL, "torch.float32, on cpu; its parameters are torch.float64")])
def test_an_error_in_the_model_is_told_with_its_batch(model, data, told):
    with pytest.raises((ValueError, RuntimeError)) as e: fit(model, data, LeastAction(model), epochs=1, batch_size=60)
    assert re.search(told, e.value.__notes__[0])


@pytest.mark.parametrize("wrong, message", [
    (dict(least_action=LeastAction), "least_action is the class LeastAction, expected"), (dict(least_action=True), "least_action is True"), (dict(callbacks=print), "callbacks is .*, expected"),
    (dict(progress=1), "progress is 1"), (dict(model=print), "model is .*, expected")])
def test_arguments_of_another_kind(wrong, message):
    with pytest.raises(TypeError, match=message): fit(**dict(model=make(), data=SMALL, epochs=1) | wrong)


def test_what_is_attached_to_one_network_is_not_for_many():
    with pytest.raises(TypeError, match="expected what makes one for each"):
        fit_many(make, digits().splits(60, [0, 1]), least_action=LeastAction(make()), epochs=1)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_frozen_parameters_stay_as_they_are(mode):
    "Blocks of a network that was trained before, say; alone as in a row."
    def half():
        model = make()
        model.flow.blocks[0].requires_grad_(False)
        return model
    runs = fit_many(half, digits().splits(60, [0, 1]), least_action=LeastAction, epochs=2, clip=1., mode=mode)
    for i, seed in enumerate((0, 1)):
        first = _made(half, seed).flow.blocks
        assert torch.equal(runs[i].model.flow.blocks[0].velocity[0].weight, first[0].velocity[0].weight)
        assert not torch.equal(runs[i].model.flow.blocks[1].velocity[0].weight, first[1].velocity[0].weight)


def test_a_folder_is_no_checkpoint(tmp_path):
    for resume in (False, True):
        with pytest.raises(IsADirectoryError, match="is a folder, expected a file"):
            fit(make(), SMALL, epochs=1, checkpoints=Checkpoints(tmp_path, resume))


@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_a_training_goes_on_after_an_interruption_by_hand(least_action):
    "Stopped inside the network, and the cell run again; a stray pass before it does not count either."
    model = make()
    la = least_action and least_action(model)
    def stop(*args): raise KeyboardInterrupt
    hooks = sum(len(m._forward_hooks) for m in model.modules())
    hook = model.head.register_forward_pre_hook(stop)
    with pytest.raises(KeyboardInterrupt): fit(model, SMALL, la, epochs=1, batch_size=60)
    hook.remove()
    assert sum(len(m._forward_hooks) for m in model.modules()) == hooks, "no meter is left behind"
    model(SMALL.x[:2])
    again = fit(model, SMALL, la, epochs=2, eval_every=1)
    assert again.last["loss"].isfinite() and (la is None or la.calls == 2)


# What least action refuses, reported by the loop

def test_a_negative_loss_that_was_noted_on_the_device_ends_the_training():
    def maker(model):
        la = LeastAction(model)
        la.losses.lowest.fill_(-.25)   # as a step on a GPU would have noted it
        return la
    with pytest.raises(ValueError, match="the task loss was -0.25, expected zero or more"): fitted(maker)
    for mode in ("sequential", "batched"):
        with pytest.raises(ValueError, match="the task loss was -0.25"):
            fit_many(make, digits().splits(60, [0, 1]), least_action=maker, epochs=1, mode=mode)


def test_least_action_of_another_network_or_taken_off_is_refused():
    model, removed = make(), make()
    la = LeastAction(removed)
    la.remove()
    for wrong, of in ((LeastAction(make()), model), (la, removed)):
        with pytest.raises(ValueError, match="least_action is not on this model"): fit(of, SMALL, wrong, epochs=1)


@pytest.mark.parametrize("mode", ["sequential", "batched"])
def test_values_for_each_network_come_from_the_grid(mode):
    with pytest.raises(ValueError, match=r"expected .*one per network.*grid=dict\(lambda0="):
        fit_many(make,
                 digits().splits(60, [0, 1]), least_action=partial(LeastAction, controller=DualAscent(torch.ones(2))),
                 epochs=1, mode=mode)


@pytest.mark.parametrize("row", [False, True])
def test_a_parameter_that_is_not_finite_is_found_in_any_network(row):
    from lap_nb.training import Training
    split = digits().splits(60, [0, 1]) if row else SMALL
    model = Ensemble([_made(make, s) for s in (0, 1)]) if row else make()
    training = Training(model, split, None, [torch.Generator()] * (1 + row), TrainConfig())
    training.check()
    bias = list(model.parameters())[-1].data
    if not row:
        bias[3] = float("nan")
        with pytest.raises(FloatingPointError, match="first in head"): training.check()
        return
    bias[0, 3] = float("nan")
    training.check()   # the other network is fine
    bias[1, 0] = float("inf")
    with pytest.raises(FloatingPointError, match="diverged"): training.check()


def test_a_data_set_that_was_not_split_is_named():
    for train in (lambda: fit(make(), digits()), lambda: fit_many(make, digits(), range(2), epochs=1)):
        with pytest.raises(TypeError, match='data is an object of type Dataset, expected Split: .*Dataset.split'):
            train()


class Trips(nn.Module):
    "Raises in evaluation."
    def __init__(self): super().__init__(); self.norm, self.head = nn.BatchNorm1d(64), nn.Linear(64, 10)
    def forward(self, x):
        if not self.training: raise KeyboardInterrupt
        return self.head(self.norm(x))


def test_evaluation_puts_every_mode_back():
    from lap_nb.training import evaluate
    split, model = digits().split(100), nn.Sequential(nn.BatchNorm1d(64), nn.Linear(64, 10)).train()
    model[0].eval()   # frozen by hand
    evaluate(model, split)
    assert model.training and not model[0].training
    trips = Trips().train()
    with pytest.raises(KeyboardInterrupt): evaluate(trips, split)
    assert trips.training and trips.norm.training


@pytest.mark.parametrize("seeds", [1, 2])
def test_rows_for_several_networks_are_refused(seeds):
    with pytest.raises(ValueError, match=f"data has rows for {seeds} networks, expected those of one"):
        fit(make(), digits().splits(60, range(seeds)), epochs=1)


def test_without_git_there_is_no_commit(monkeypatch):
    from lap_nb import training
    def gone(*args, **kwargs): raise FileNotFoundError("git")
    monkeypatch.setattr("subprocess.run", gone)
    assert training._commit.__wrapped__() is None


@pytest.mark.parametrize("said, stops", [(True, True), (torch.tensor(True), True), (torch.tensor(False), False), (1, False), (torch.tensor(1.), False)])
def test_what_stops_a_training(said, stops):
    run = fit(make(), digits().split(60), epochs=3, eval_every=1, callbacks=[lambda training: said])
    assert len(run.curves["epoch"]) == (1 if stops else 3)


# Outputs that are no logits, and parts that are none

class Gives(nn.Module):
    "Something of the logits of a network."
    def __init__(self, of, classes=10): super().__init__(); self.net, self.of = dense_net(64, classes, 2, 8), of
    def forward(self, x): return self.of(self.net(x))


NO_LOGITS = [(lambda z: z[:, :1], r"gave \[\d+, 1\], expected logits"), (lambda z: (z, z), "an object of type tuple"),
             (lambda z: [z], "an object of type list"), (lambda z: None, "type NoneType"),
             (lambda z: z[:, 0], r"gave \[\d+\]"), (lambda z: z[:, :9], r"gave \[\d+, 9\]"),
             (lambda z: z.argmax(1), "int64"), (lambda z: z.sum(), r"gave \[\]"), (lambda z: z.long(), "int64"),
             (lambda z: z[:5], r"gave \[5, 10\]"), (lambda z: z + 0j, "complex64"),
             (lambda z: {"loss": z}, "type dict"), (lambda z: z[..., None], r"gave \[\d+, 10, 1\]"),
             (lambda z: z > 0, "bool")]

@pytest.mark.parametrize("of, message", NO_LOGITS)
def test_what_is_no_logits_has_no_accuracy(of, message):
    from lap_nb.depth import depth_curve
    from lap_nb.training import count_right, evaluate
    for measure in (evaluate, count_right, lambda model, split: fit(model, split, epochs=1), depth_curve):
        with pytest.raises(ValueError, match=f"{message}.*, a number per sample and class"): measure(Gives(of), SMALL)


@pytest.mark.parametrize("part", ["y", "x", "name", "classes", "", "Test", None, 3, "seeds", "__class__", ["val"]])
def test_parts_that_are_none(part):
    from lap_nb.depth import depth_curve
    from lap_nb.training import count_right, evaluate
    for measure in (evaluate, count_right, depth_curve):
        with pytest.raises(ValueError, match="part is .*, expected"): measure(make(), SMALL, part)


def test_logits_that_are_nan_are_not_right():
    from lap_nb.training import evaluate
    assert evaluate(Gives(lambda z: z * float("nan")), SMALL) == 0
    ruled_out = Gives(lambda z: z.index_fill(1, torch.tensor([9]), -float("inf")))
    assert evaluate(ruled_out, SMALL, "train") > 0


@pytest.mark.parametrize("of", [lambda z: z.detach(), lambda z: torch.zeros_like(z)])
@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_outputs_without_a_gradient_are_refused(of, least_action):
    model = Gives(of)
    with pytest.raises(ValueError, match="the model's output has no gradient"):
        fit(model, SMALL, least_action and least_action(model.net), epochs=1)


def test_gradients_that_are_off_and_parameters_that_cannot_have_any_are_refused():
    for off in (torch.no_grad(), torch.inference_mode()):
        with off, pytest.raises(ValueError, match="gradients are off"): fit(MADE, SMALL, epochs=1)
    with torch.inference_mode(): model = make()
    with pytest.raises(ValueError, match="was made under torch.inference_mode"): fit(model, SMALL, epochs=1)
    with pytest.raises(ValueError, match="has no size yet"): fit(nn.Sequential(nn.LazyLinear(10)), SMALL, epochs=1)

MADE = make()


# The mean training loss

@pytest.mark.parametrize("least_action", [None, LeastAction])
def test_train_loss_is_the_mean_over_all_samples_since_the_last_point(least_action):
    from lap_nb.training import Training
    seen = []
    def note(self, x, y, step=Training.train_step):
        step(self, x, y); seen.append((self.epoch, len(y), self.last["loss"].item()))
    with pytest.MonkeyPatch.context() as m:
        m.setattr(Training, "train_step", note)
        run = fitted(least_action, epochs=5)
    for i, epochs in enumerate([(0, 1), (2, 3), (4,)]):
        of = [(n, loss) for epoch, n, loss in seen if epoch in epochs]
        assert run.curves["train_loss"][i].item() == pytest.approx(
            sum(n * loss for n, loss in of) / sum(n for n, _ in of), rel=1e-5)
        assert run.curves["loss"][i].item() == of[-1][1], "of the last mini-batch"


def test_a_row_has_the_mean_losses_of_its_networks():
    row = digits().splits(60, [3, 4])
    together, alone = (fit_many(make, row, epochs=4, batch_size=25, eval_every=2, mode=mode)
                       for mode in ("batched", "sequential"))
    torch.testing.assert_close(together.curves["train_loss"], alone.curves["train_loss"], rtol=1e-4, atol=1e-6)


# Modes and what is frozen

def frozen_norm():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 16), nn.BatchNorm1d(16), nn.ReLU(),
                         nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Dropout(.5)), nn.Linear(16, 10))


@pytest.mark.parametrize("mode", ["alone", "sequential", "batched"])
def test_what_was_frozen_by_hand_stays_frozen(mode):
    "In evaluation mode by hand, in a network in training mode: statistics do not move, and others do."
    def model():
        net = frozen_norm().train()
        net[1].eval(); net[3].eval()
        return net
    found = [fit(model(), SMALL, epochs=3, eval_every=1).model] if mode == "alone" else \
            [run.model for run in (lambda runs: [runs[i] for i in range(2)])(fit_many(model, digits().splits(60, [0, 1]), epochs=3, eval_every=1, mode=mode))]
    for net in found:
        assert torch.equal(net[1].running_mean, torch.zeros(16)) and torch.equal(
            net[3][1].running_mean, torch.zeros(16)
        )
        assert net[1].num_batches_tracked == 0
        if mode == "alone":
            assert [net.training, net[0].training, net[1].training, net[3].training, net[3][2].training] == [
                True,
                True,
                False,
                False,
                False,
            ]


def test_a_network_in_evaluation_mode_is_trained_but_for_its_frozen_parts():
    net = frozen_norm()
    net[3].requires_grad_(False)
    net.eval()
    fit(net, SMALL, epochs=2)
    assert net[1].num_batches_tracked == 2 and net[3][1].num_batches_tracked == 0
    assert net.training and net[1].training and not net[3][1].training and not net[3][2].training


def with_a_frozen_block(how):
    torch.manual_seed(0)
    frozen = ResidualBlock(nn.Sequential(nn.Linear(64, 64), nn.BatchNorm1d(64))).requires_grad_(False)
    net = nn.Sequential(frozen, ResidualBlock(nn.Linear(64, 64)), nn.Linear(64, 10))
    (net if how == "network" else frozen).eval()
    return net


@pytest.mark.parametrize("how", ["network", "block"])
def test_a_frozen_block_counts_in_the_action_and_stays_asleep(how):
    """Whether it was put in evaluation mode by hand, or the whole network was when the training began; alone and in
    rows."""
    net, settings = with_a_frozen_block(how), dict(epochs=2, eval_every=1)
    run = fit(net, digits().split(60), least_action=(la := LeastAction(net)), **settings)
    assert la.meter.idle == {"0": "in evaluation mode"} and la.energies.min() > 0
    assert (
        net[0].velocity[1].num_batches_tracked == 0
        and net[1].training
        and not any(m.training for m in net[0].modules())
    )
    for mode in ("sequential", "batched"):
        member = fit_many(lambda: with_a_frozen_block(how),
                          digits().splits(60, [0, 1]), least_action=LeastAction, mode=mode, **settings)[0]
        torch.testing.assert_close(member.curves["action"], run.curves["action"])
        assert member.model[0].velocity[1].num_batches_tracked == 0


def test_a_train_method_of_ones_own_is_heard():
    class Keeps(nn.Sequential):
        def train(self, mode=True):
            super().train(mode)
            self[1].eval()
            return self
    net = Keeps(*frozen_norm())
    fit(net, SMALL, epochs=2, eval_every=1)
    assert net[1].num_batches_tracked == 0 and net[3][1].num_batches_tracked == 2


# Wrong arguments, drawn

ODD = [
    None, True, "a", b"a", -1, 0, 2.5, 1e308, -1e308,
    float("nan"),
    float("inf"), 1j, 2 ** 70, [], [1], {}, (),
    object(), print,
    torch.ones(2),
    torch.tensor(float("nan")),
    torch.zeros(0),
    torch.ones(2, device="meta"),
    torch.ones(3).to_sparse(),
    torch.ones(2, dtype=torch.complex64),
    nn.Linear(2, 2),
    digits()]

def calls():
    from lap_nb import training as t
    x, y, z, g = IMAGES.x[:4], IMAGES.y[:4], torch.randn(4, 10), torch.Generator()
    p = nn.Parameter(torch.ones(2, 2)); p.grad = torch.ones(2, 2)
    pictures, moves = IMAGES.split(60), torch.zeros(4, 3, dtype=torch.long)
    config = {name: getattr(TrainConfig(), name) for name in TrainConfig.__dataclass_fields__} | dict(epochs=1)
    return {
        "shift_flip": (t.shift_flip, dict(x=x, moves=moves, crop=1)),
        "batches": (
            lambda **k: list(t.batches(**k)),
            dict(split=pictures, generators=[g], batch_size=20, crop=1, flip=True, skip=0, share=(0, 1)),
        ),
        "task_loss": (t.task_loss, dict(logits=z, y=y, label_smoothing=0.1)),
        "count_right": (t.count_right, dict(model=make(), split=SMALL, part="val", chunk=20, share=(0, 1))),
        "evaluate": (t.evaluate, dict(model=make(), data=SMALL, part="val", chunk=20)),
        "learning_rate": (t.learning_rate, dict(config=TrainConfig(), step=1, steps=5)),
        "make_optimizer": (t.make_optimizer, dict(params=[p], config=TrainConfig())),
        "clip_gradients": (t.clip_gradients, dict(params=[p], limit=1.0, row=False)),
        "TrainConfig": (TrainConfig, config),
        "Checkpoints": (t.Checkpoints, dict(path="run.pt", resume=False, every=None, rollback=0)),
        "fit": (
            t.fit,
            dict(model=make(), data=SMALL, least_action=None, seed=0, progress=False, callbacks=[], checkpoints=None)
            | config,
        ),
    }


@pytest.mark.parametrize("name", ["shift_flip", "batches", "task_loss", "count_right", "evaluate", "learning_rate", "make_optimizer", "clip_gradients", "TrainConfig", "Checkpoints", "fit"])
def test_one_wrong_argument_is_told_in_words_of_ours(name, tmp_path, monkeypatch):
    "It works, or it raises what is documented with words that say what was expected."
    monkeypatch.chdir(tmp_path)
    f, right = calls()[name]
    f(**right)
    raw = []
    for argument in right:
        for value in [v for v in ODD if (argument, v is True) != ("compile", True)]:   # compiling takes a while
            try: f(**right | {argument: value})
            except (TypeError, ValueError, FloatingPointError, OSError) as e:
                if not re.search("expected|must|need|diverged|are for|there is no|too large", str(e)):
                    raw.append(f"{argument}={value!r}: {type(e).__name__}: {e}")
            except RuntimeError as e:
                if not any("The model was called with" in note for note in getattr(e, "__notes__", ())):
                    raw.append(f"{argument}={value!r}: {e}")
            except Exception as e: raw.append(f"{argument}={value!r}: {type(e).__name__}: {e}")
    assert not raw, "\n".join(raw)


def looks(data):
    "What puts a network into evaluation mode for a while, by name."
    return dict(evaluate=lambda net: evaluate(net, data), depth_curve=lambda net: depth_curve(net, data),
                latency=lambda net: latency({'net': net}, data.x[:2], repeats=1),
                recompute_statistics=lambda net: recompute_statistics(net, data.x[:9]),
                Elastic=lambda net: Elastic(net, data.x[:2]))


@pytest.mark.parametrize('name', looks(None))
def test_a_network_is_not_evaluated_while_another_thread_trains_it(name):
    net, data, said = dense_net(64, 10, K=2, hidden=2), digits().split(20), []
    look = looks(data)[name]
    def listen():
        modes = [m.training for m in net.modules()]
        try: look(net)
        except RuntimeError as e: said.append(str(e))
        assert modes == [m.training for m in net.modules()]
    def callback(training):
        look(net)   # in the thread that trains
        (other := threading.Thread(target=listen)).start(); other.join()
    fit(net, data, epochs=1, callbacks=[callback])
    assert not said or len(said) == 1 and 'is being trained in another thread' in said[0]
    assert said or name in ('depth_curve', 'Elastic')   # of a copy
    said.clear(); listen()
    assert not said

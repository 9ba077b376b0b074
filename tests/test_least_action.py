"""Least action beyond the lesson: known multipliers, other libraries, states, devices without values, and everything
that is refused."""
import copy
import io
import math
import pickle
import sys
import warnings
from decimal import Decimal
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from lap_nb import least_action
from lap_nb.hooks import find_blocks
from lap_nb.data import digits
from lap_nb.dynamics import Flow, ResidualNet, ResidualBlock
from lap_nb.ensembles import fit_many
from lap_nb.kinetic import block_energies
from lap_nb.least_action import (ADVICE, AugmentedLagrangian, DualAscent, FixedWeight, LeastAction,
                                 ProportionalIntegral, _History, dual_ascent, kkt)
from lap_nb.nets import dense_net
from lap_nb.training import fit

MOVING = [DualAscent, partial(AugmentedLagrangian, penalty=2.), partial(ProportionalIntegral, gain=2.),
          partial(ProportionalIntegral, gain=2., smooth=.5, relative=True)]
CLOCKS = dict(average=.9), dict(average="mean", every=3), dict(accumulate=2)
make = partial(dense_net, 8, 3, 3, 8)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return make()


@pytest.fixture
def batch():
    generator = torch.Generator().manual_seed(1)
    return torch.randn(24, 8, generator=generator), torch.randint(3, (24,), generator=generator)


def gradient(model): return torch.cat([p.grad.flatten() for p in model.parameters()])


# losses of a given value
pytestmark = pytest.mark.filterwarnings("ignore:the gradient of the task loss reaches no parameter")


def worth(value, *shape): return torch.full(shape, value, requires_grad=True)   # a loss of this value


# A convex problem whose multiplier is known

class Ridge:
    """The shortest vector whose misfit is at most `level`; the multiplier by bisection, of which each step is a linear
    system."""
    def __init__(self, seed, n=30, d=6, level=.2):
        g = torch.Generator().manual_seed(seed)
        self.A, self.level = torch.randn(n, d, generator=g, dtype=torch.float64), level
        self.b = self.A @ torch.randn(d, generator=g, dtype=torch.float64) + .1 * torch.randn(
            n, generator=g, dtype=torch.float64)
        low, high = 0., 1e6
        for _ in range(100):
            self.lam = (low + high) / 2
            low, high = (self.lam, high) if self.loss(self.minimum(self.lam)) > level else (low, self.lam)

    def loss(self, t): return (self.A @ t - self.b).square().mean()
    def minimum(self, lam):
        n, d = self.A.shape
        return torch.linalg.solve(
            torch.eye(d, dtype=torch.float64) + lam / n * self.A.T @ self.A, lam / n * self.A.T @ self.b)


@pytest.mark.parametrize("rule", MOVING)
@pytest.mark.parametrize("seed", [0, 1])
def test_every_rule_finds_the_known_multiplier(rule, seed):
    task = Ridge(seed)
    law, t = rule(lambda0=2., tau=4., target=task.level), torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for _ in range(700):
        law.update(task.loss(t))
        g, = torch.autograd.grad(task.loss(t) + t.square().sum() / law.lam, t)
        with torch.no_grad(): t -= .15 * g
    assert law.lam.item() == pytest.approx(task.lam, rel=1e-5)
    torch.testing.assert_close(t.detach(), task.minimum(task.lam), rtol=1e-5, atol=1e-7)


def test_fixed_weight_is_the_penalty_and_misses_the_multiplier():
    task = Ridge(0)
    law = FixedWeight(.5)
    for loss in (3., 0., 9.): law.update(torch.tensor(loss))
    assert law.lam.item() == 2. and abs(task.lam - 2) > 1


@pytest.mark.parametrize("name", ["dual ascent", "augmented", "proportional-integral"])
def test_same_iterates_as_cooper(name):
    """With the learning rate eta lambda on L + C/lambda and eta on C + lambda L the two codes do the same thing, step
    by step."""
    cooper = pytest.importorskip("cooper")
    from cooper.optim import AlternatingDualPrimalOptimizer, nuPI, nuPIInitType
    task = Ridge(0)

    class Problem(cooper.ConstrainedMinimizationProblem):
        def __init__(self):
            super().__init__()
            augmented = name == "augmented"
            formulation = cooper.formulations.AugmentedLagrangian if augmented else cooper.formulations.Lagrangian
            multiplier = cooper.multipliers.DenseMultiplier(init=torch.ones(1, dtype=torch.float64))
            penalty = (
                cooper.penalty_coefficients.DensePenaltyCoefficient(torch.tensor([3.0], dtype=torch.float64))
                if augmented
                else None
            )
            self.bound = cooper.Constraint(cooper.ConstraintType.INEQUALITY, formulation, multiplier, penalty)

        def compute_cmp_state(self, t):
            state = cooper.ConstraintState(violation=(task.loss(t) - task.level).reshape(1))
            return cooper.CMPState(loss=t.square().sum(), observed_constraints={self.bound: state})

    problem, theirs = Problem(), torch.zeros(6, dtype=torch.float64, requires_grad=True)
    pi = dict(Ki=torch.tensor(.5), Kp=torch.tensor(3.), ema_nu=.25, init_type=nuPIInitType.ZEROS)
    dual = (
        nuPI(problem.dual_parameters(), lr=1.0, maximize=True, **pi)
        if name == "proportional-integral"
        else torch.optim.SGD(problem.dual_parameters(), lr=0.5, maximize=True)
    )
    pair = AlternatingDualPrimalOptimizer(problem, torch.optim.SGD([theirs], lr=.004), dual)
    common = dict(lambda0=1., tau=.5, target=task.level)
    law = {"dual ascent": DualAscent(**common), "augmented": AugmentedLagrangian(**common, penalty=3.),
           "proportional-integral": ProportionalIntegral(**common, gain=3., smooth=.25)}[name]
    ours = torch.zeros(6, dtype=torch.float64, requires_grad=True)
    for _ in range(100):
        pair.roll(compute_cmp_state_kwargs=dict(t=theirs))
        law.update(task.loss(ours))
        g, = torch.autograd.grad(task.loss(ours) + ours.square().sum() / law.lam, ours)
        with torch.no_grad(): ours -= .004 * law.lam * g
        multiplier = law.mu if name == "augmented" else law.lam
        assert multiplier.item() == pytest.approx(problem.bound.multiplier.weight.item(), rel=1e-5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)
    assert task.loss(ours) < task.loss(torch.zeros(6, dtype=torch.float64)) / 5


# Rules as sequences

@given(st.lists(st.floats(0, 50, width=32, allow_subnormal=False), min_size=1, max_size=20), st.floats(.01, 5), st.floats(0, 3, allow_subnormal=False))
@settings(max_examples=40, deadline=None)
def test_dual_ascent_against_plain_floats(losses, tau, target):
    law, lam = DualAscent(1., tau, target, bounds=(None, 30.)), 1.
    for loss in losses:
        law.update(torch.tensor(loss, dtype=torch.float64))
        lam = min(max(lam + tau * (loss - target), 1e-3), 30.)
        assert law.lam.item() == pytest.approx(lam, rel=1e-9)


@given(st.lists(st.floats(0, 50, width=32, allow_subnormal=False), min_size=1, max_size=20))
@settings(max_examples=25, deadline=None)
def test_without_their_extra_part_the_rules_are_dual_ascent(losses):
    laws = [
        DualAscent(1., .5, 1.),
        ProportionalIntegral(1., .5, 1., gain=0.),
        AugmentedLagrangian(1., .5, 1., penalty=0.)]
    for loss in losses:
        for law in laws: law.update(torch.tensor(loss))
        assert laws[0].lam.item() == laws[1].lam.item()
        assert laws[2].lam.item() == pytest.approx(max(laws[2].mu.item(), 1e-3))


def test_published_lambda_never_falls():
    law, last = DualAscent(), 1.
    for loss in torch.rand(50):
        law.update(loss)
        assert law.lam.item() > last
        last = law.lam.item()


@pytest.mark.parametrize("rule", MOVING)
def test_a_row_of_networks_is_each_by_itself(rule):
    losses, first = torch.rand(6, 3) * 4, torch.tensor([.5, 1., 4.])
    row, alone = rule(first, .7, 1., (None, 6.)), [rule(lam, .7, 1., (None, 6.)) for lam in first]
    for loss in losses:
        row.update(loss)
        for law, one in zip(alone, loss): law.update(one)
    low = row.low   # bounds are shared by a row
    expected = torch.stack([law.lam for law in alone])
    torch.testing.assert_close(row.lam, expected.clamp(min=low))


@pytest.mark.parametrize("rule", [*[partial(rule, target=.1) for rule in MOVING], FixedWeight])
def test_a_loss_that_is_not_finite_moves_nothing(rule):
    law = rule(torch.tensor([1., 1.]))
    law.update(torch.tensor([.5, .6]))
    state = lambda: {name: b.clone() for name, b in law.named_buffers() if name != "held"}
    before = state()
    law.update(torch.tensor([float("nan"), float("inf")]))
    assert law.held.tolist() == [1, 1]
    torch.testing.assert_close(state(), before, equal_nan=True)
    law.update(torch.tensor([float("inf"), .6]))
    assert law.held.tolist() == [2, 1]


# The objective

def test_objective_and_gradient_are_those_of_the_trajectory(net, batch):
    x, y = batch
    with LeastAction(net, DualAscent(lambda0=3., tau=.5, every=1)) as la:
        loss = la(F.cross_entropy(net(x), y))
        loss.backward()
    measured = gradient(net)
    task = F.cross_entropy(net(x), y)
    lam = 3. + .5 * task.item()
    net.zero_grad()
    (task + block_energies(net.trajectory(x)).mean(1).sum() / lam).backward()
    torch.testing.assert_close(measured, gradient(net), rtol=1e-4, atol=1e-6)


def test_both_forms_give_the_same_training_when_the_learning_rates_match(batch):
    "Plain SGD with rate eta on L + C/lambda, and with rate eta/lambda on lambda L + C."
    x, y = batch
    ends = []
    for divided in (True, False):
        torch.manual_seed(0)
        net = make().double()
        la, opt = LeastAction(net, DualAscent(lambda0=2., tau=.3)), torch.optim.SGD(net.parameters(), lr=.05)
        for _ in range(30):
            loss = la(F.cross_entropy(net(x.double()), y))
            opt.zero_grad(); (loss if divided else la.lam * loss).backward()
            opt.param_groups[0]["lr"] = .05 if divided else .05 / la.lam.item()
            opt.step()
        ends.append(torch.cat([p.detach().flatten() for p in net.parameters()]))
    torch.testing.assert_close(*ends, rtol=1e-6, atol=1e-9)


@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_first_argument_may_be_the_blocks(net, batch, reduction):
    x, y = batch
    with LeastAction(find_blocks(net), reduction=reduction) as a, LeastAction(net, reduction=reduction) as b:
        task = F.cross_entropy(net(x), y)
        assert a(task).item() == b(task).item() and list(a.blocks) == list(b.blocks)


def test_weights_by_pattern(net, batch):
    x, y = batch
    with LeastAction(net, weights={"flow.blocks.*": 2., "flow.blocks.1": 0.}) as la:
        la(F.cross_entropy(net(x), y))
        energies = block_energies(net.trajectory(x)).mean(1)
        torch.testing.assert_close(la.action, 2 * energies[0].detach() + 2 * energies[2].detach())
        torch.testing.assert_close(la.energies, energies.detach())


def test_weights_of_one_change_nothing(net, batch):
    x, y = batch
    with LeastAction(net, weights={"*": 1.}) as a, LeastAction(net) as b:
        task = F.cross_entropy(net(x), y)
        torch.testing.assert_close(a(task), b(task))


def test_shared_parameters_count_in_each_block(batch):
    x, y = batch
    velocity = nn.Linear(8, 8)
    net = ResidualNet(Flow([velocity, velocity], .5), nn.Linear(8, 3))
    with LeastAction(net, DualAscent(tau=0.)) as la:
        la(F.cross_entropy(net(x), y)).backward()
        energies = block_energies(net.trajectory(x)).mean(1)
        torch.testing.assert_close(la.action, energies.sum().detach())
    measured = gradient(net)
    net.zero_grad()
    (F.cross_entropy(net(x), y) + block_energies(net.trajectory(x)).mean(1).sum()).backward()
    torch.testing.assert_close(measured, gradient(net), rtol=1e-4, atol=1e-6)


class Push(nn.Module):
    def __init__(self): super().__init__(); self.v = nn.Parameter(torch.zeros(2))
    def forward(self, x): return self.v.expand_as(x)


@pytest.mark.parametrize("K, h, lam", [(1, 1., 1.), (3, 1 / 3, 1.), (3, 1., 1 / 3)])
def test_solution_does_not_depend_on_the_splitting_of_blocks_in_time_one(K, h, lam):
    "min |d|^2/T with |d - 1|^2 <= 1/4 has d = 1/2 and the multiplier 1/T, T = Kh."
    flow = Flow([Push() for _ in range(K)], h)
    la, opt = LeastAction(flow, DualAscent(tau=.3, target=.25)), torch.optim.SGD(flow.parameters(), lr=.1)
    for _ in range(300):
        loss = la((flow(torch.zeros(1, 2)) - 1).square().mean())
        opt.zero_grad(); loss.backward(); opt.step()
    assert la.lam.item() == pytest.approx(lam, rel=.01)
    torch.testing.assert_close(flow(torch.zeros(1, 2)), torch.full((1, 2), .5), rtol=0, atol=.005)


# The clock

def test_accumulated_batches_give_the_gradient_of_the_whole(net, batch):
    x, y = batch
    net.zero_grad()
    with LeastAction(net, DualAscent(lambda0=2., tau=0.)) as la: la(F.cross_entropy(net(x), y)).backward()
    whole = gradient(net)
    net.zero_grad()
    with LeastAction(net, DualAscent(lambda0=2., tau=1., accumulate=4)) as la:
        for xb, yb in zip(x.chunk(4), y.chunk(4)): (la(F.cross_entropy(net(xb), yb)) / 4).backward()
        assert la.lam.item() == pytest.approx(2. + F.cross_entropy(net(x), y).item(), rel=1e-5)
    torch.testing.assert_close(gradient(net), whole, rtol=1e-4, atol=1e-6)


def test_a_training_in_accumulated_batches_is_one_in_whole_batches(batch):
    "With lambda raised after the step in both; the published order raises it before."
    x, y = batch
    traces = []
    for chunks in (1, 3):
        torch.manual_seed(0)
        net = make()
        la = LeastAction(net, DualAscent(accumulate=chunks)) if chunks > 1 else LeastAction(net, DualAscent(every=None))
        opt, trace = torch.optim.SGD(net.parameters(), lr=.05), []
        for _ in range(10):
            opt.zero_grad()
            for xb, yb in zip(x.chunk(chunks), y.chunk(chunks)):
                task = F.cross_entropy(net(xb), yb)
                (la(task) / chunks).backward()
            if chunks == 1: la.ascend(task)
            opt.step(); trace.append(la.lam.item())
        traces.append(trace)
    assert traces[0] == pytest.approx(traces[1], rel=1e-4)


def lams(net, losses, **settings):
    "The multiplier after each loss."
    with LeastAction(net, DualAscent(**settings)) as la:
        found = []
        for loss in losses:
            net(torch.ones(1, 8)); la(worth(loss)); found.append(la.lam.item())
    return found


@pytest.mark.parametrize("settings, expected", [
    (dict(), [4., 6., 7., 11.]), (dict(every=2), [1., 3., 3., 7.]), (dict(every=2, average="mean"), [1., 3.5, 3.5, 6.]),
    (dict(warmup_steps=2), [1., 1., 2., 6.]), (dict(every=None), [1.] * 4), (dict(accumulate=2), [1., 3.5, 3.5, 6.]),
    (dict(accumulate=2, every=2, average="mean"), [1., 1., 1., 3.5]), (dict(target=2.), [2., 2., 1., 3.]),
    (dict(average=.5), [4., 4. + 7 / 3, 4. + 7 / 3 + 11 / 7, 4. + 7 / 3 + 11 / 7 + 43 / 15]), (dict(bounds=(None, 5.)), [4., 5., 5., 5.]),
    (dict(warmup_steps=1, every=2, tau=.5), [1., 2., 2., 4.])])
def test_sequences_by_hand(net, settings, expected):
    assert lams(net, [3., 2., 1., 4.], **settings) == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("average", ["batch", "mean", .5])
def test_a_batch_that_overflows_is_counted_whatever_the_average(net, average):
    "It moves nothing, not even as a loss of zero in an average that has seen no other."
    with LeastAction(net, DualAscent(average=average, target=1.)) as la:
        net(torch.ones(1, 8)); la(worth(float("nan")))
        assert la.lam.item() == 1. and la.controller.held.item() == 1
        net(torch.ones(1, 8)); la(worth(3.))
        assert la.lam.item() > 1 and la.controller.held.item() == 1


def test_velocity_of_the_branch_is_the_same_action(net, batch):
    x, y = batch
    flow = ResidualNet(Flow([nn.Linear(8, 8), nn.Linear(8, 8)], .25), nn.Linear(8, 3))
    with LeastAction(flow, velocity="branch") as a, LeastAction(flow) as b:
        task = F.cross_entropy(flow(x), y)
        torch.testing.assert_close(a(task), b(task))
    with LeastAction(
            flow,
            velocity={"flow.blocks.0": flow.flow.blocks[0].velocity,
                      "flow.blocks.1": flow.flow.blocks[1].velocity}) as c:
        torch.testing.assert_close(c(F.cross_entropy(flow(x), y)), task + b.action / c.lam.float())


@pytest.mark.parametrize("chunks", [1, 3])
def test_several_optimizers_and_a_scaler(net, batch, chunks):
    "Also with gradients added up over batches: the three together."
    x, y = batch
    reference = lams_after = None
    for scaled in (False, True):
        torch.manual_seed(0)
        model = make()
        la, scaler = (
            LeastAction(model, DualAscent(accumulate=chunks)),
            torch.amp.GradScaler("cpu", enabled=scaled, init_scale=2.0**8),
        )
        opts = [torch.optim.SGD(model.flow.parameters(), lr=.1), torch.optim.SGD(model.head.parameters(), lr=.01)]
        for _ in range(5):
            for opt in opts: opt.zero_grad()
            for xb, yb in zip(x.chunk(chunks), y.chunk(chunks)):
                scaler.scale(la(F.cross_entropy(model(xb), yb)) / chunks).backward()
            for opt in opts: scaler.step(opt)
            scaler.update()
        if reference is None: reference, lams_after = [p.clone() for p in model.parameters()], la.lam
    torch.testing.assert_close(list(model.parameters()), reference, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(la.lam, lams_after)


def test_a_step_that_the_scaler_skips_leaves_lambda_alone(net, batch):
    x, y = batch
    la, scaler, opt = LeastAction(net), torch.amp.GradScaler("cpu"), torch.optim.SGD(net.parameters(), lr=.1)
    before = [p.clone() for p in net.parameters()]
    scaler.scale(la(F.cross_entropy(net(x) * float("inf"), y))).backward()
    scaler.step(opt); scaler.update()
    torch.testing.assert_close(list(net.parameters()), before)
    assert la.lam.item() == 1. and la.controller.held.item() == 1


def test_compiled_model(batch):
    x, y = batch
    torch.manual_seed(0)
    net = make()
    with LeastAction(net) as la: eager = la(F.cross_entropy(net(x), y)).item()
    with LeastAction(net) as la:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        assert la(F.cross_entropy(compiled(x), y)).item() == pytest.approx(eager, rel=1e-6)
        compiled(x)
    la = LeastAction(compiled)   # blocks are found inside the wrapper
    assert list(la.blocks) == list(find_blocks(net))


# Devices

class Reads(TorchDispatchMode):
    "Counts reads of single values, each of which would make a processor wait for a GPU."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.is_nonzero.default,
                    torch.ops.aten.nonzero.default):
            self.count += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("settings", [dict(), *[dict(controller=DualAscent(**clock)) for clock in CLOCKS], dict(weights={"*": 2.}),
                                      *[dict(controller=rule(target=.5)) for rule in MOVING], dict(controller=FixedWeight())])
def test_a_step_reads_no_value_from_the_device(settings):
    "On the meta device tensors have no values, so any read would raise."
    net = make().to("meta")
    la = LeastAction(net, **settings)
    la.history = _History(la.lam, size=4)   # folded twice within ten calls
    for _ in range(10):
        loss = la(
            F.cross_entropy(net(torch.empty(4, 8, device="meta")), torch.zeros(4, dtype=torch.long, device="meta")))
        loss.backward()
    assert la.lam.device.type == "meta" and la.history.count["stride"] == 4


def test_on_the_cpu_loss_and_multiplier_alone_are_read(net, batch):
    "Single numbers that lie in memory already, however many blocks, samples and steps there are."
    x, y = batch
    la = LeastAction(net)
    la(F.cross_entropy(net(x), y))   # the first step looks whether the action has a gradient
    for _ in range(3):
        task = F.cross_entropy(net(x), y)
        with Reads() as reads: la(task)
        assert reads.count <= 4


class Operations(TorchDispatchMode):
    "Counts the operations on tensors, those of backward passes too."
    count = 0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def own_calls(work):
    "How often `work` calls a function of this package."
    calls = 0
    def note(frame, event, arg):
        nonlocal calls
        calls += event == "call" and frame.f_globals.get("__name__", "").startswith("lap_nb.")
    before = sys.getprofile()
    sys.setprofile(note)
    try: work()
    finally: sys.setprofile(before)
    return calls


def test_what_a_block_adds_to_a_step():
    "Six operations: energy, its gradients at both ends, and their sums; and few calls of Python."
    x, y, costs = torch.randn(8, 8), torch.randint(2, (8,)), []
    for K in (5, 15):
        plain, net = (dense_net(8, 2, K=K, hidden=8) for _ in range(2))
        la = LeastAction(net)
        with_action = lambda: la(F.cross_entropy(net(x), y)).backward()
        without = lambda: F.cross_entropy(plain(x), y).backward()
        for step in (with_action, without): step(); step()
        found = []
        for step in (with_action, without):
            with Operations() as seen: step()
            found.append((seen.count, own_calls(step)))
        costs.append([a - b for a, b in zip(*found)])
    operations, calls = ((more - few) / 10 for few, more in zip(*costs))
    assert operations <= 6 and calls <= 46


@pytest.mark.parametrize("lambda0, tau, target, bounds", [
    (1., 1., 0., (None, None)), (.3, .7, .11, (.1, None)), (2., 5., 3., (.5, 2.5)), (1e-3, 1e-9, 0., (None, None))])
def test_the_rule_in_plain_numbers_is_the_rule(lambda0, tau, target, bounds):
    "The same bits as `dual_ascent`, loss by loss, and a row of networks gets the same."
    one, row = DualAscent(lambda0, tau, target, bounds), DualAscent([lambda0] * 2, tau, target, bounds)
    lam, kept = one.lam.clone(), 0
    for loss in (*torch.rand(50, generator=torch.Generator().manual_seed(0)) * 4, *map(torch.tensor, (math.nan, math.inf, 0.))):
        one.update(loss); row.update(loss.expand(2))
        if loss.isfinite(): lam = dual_ascent(lam, loss.double(), tau, target, (one.low, one.high))
        else: kept += 1
        assert one.lam.equal(lam) and row.lam.equal(lam.expand(2)) and one.held == kept


def test_multiplier_follows_a_model_that_was_moved_after_attaching(net):
    la = LeastAction(net, weights={"*": 2.})
    net.to("meta")
    loss = la(F.cross_entropy(net(torch.empty(4, 8, device="meta")), torch.zeros(4, dtype=torch.long, device="meta")))
    assert loss.device.type == "meta" and {b.device.type for b in la.buffers()} == {"meta"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_multiplier_stays_precise_in_a_model_of_half_precision(net, batch, dtype):
    "A part of the model goes where the model goes; lambda = 1000 in bfloat16 would not notice a loss of one."
    x, y = batch
    net.la = LeastAction(net, DualAscent(lambda0=1000.))
    net.to(dtype)
    loss = net.la(F.cross_entropy(net(x.to(dtype)).float(), y))
    loss.backward()
    assert net.la.lam.dtype == net.la.history.points.dtype == torch.float64 and 1000.5 < net.la.lam.item() < 1010
    assert net.double().la.lam.dtype == torch.float64


def test_a_negative_loss_elsewhere_is_found_later(net, batch, monkeypatch):
    "Off the CPU nothing is read in a step; the smallest loss is kept, and `check` and the report look."
    x, y = batch
    la = LeastAction(net)
    la(F.cross_entropy(net(x), y))
    la.check()
    la.losses.lowest = torch.tensor(0.)
    la.check()
    la.losses.lowest = torch.tensor(-.25)   # what a step on a GPU would have noted
    for look in (la.check, la.report):
        with pytest.raises(ValueError, match="the task loss was -0.25, expected zero or more"): look()


def test_all_processes_share_the_mean_loss(net, monkeypatch):
    import torch.distributed as dist
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.add_(5.))   # the other process saw a loss of 5
    task = worth(3.)
    net(torch.ones(1, 8))
    la = LeastAction(net)
    net(torch.ones(1, 8))
    la(task)
    assert la.lam.item() == 5. and task.item() == 3.


# State

@pytest.mark.parametrize("settings", [dict(), *[dict(controller=DualAscent(**clock)) for clock in CLOCKS], *[dict(controller=rule(target=.5)) for rule in MOVING]])
def test_state_goes_through_a_file_and_the_training_goes_on_the_same(batch, settings):
    x, y = batch
    def steps(net, la, n):
        opt = torch.optim.SGD(net.parameters(), lr=.05)
        for _ in range(n):
            loss = la(F.cross_entropy(net(x), y))
            opt.zero_grad(); loss.backward(); opt.step()
    torch.manual_seed(0)
    net = make()
    la = LeastAction(net, **settings)
    steps(net, la, 7)
    file = io.BytesIO(); torch.save(dict(net=net.state_dict(), la=la.state_dict()), file); file.seek(0)
    steps(net, la, 6)
    state, again = torch.load(file, weights_only=True), make()
    again.load_state_dict(state["net"])
    other = LeastAction(again, **settings)
    other.load_state_dict(state["la"])
    steps(again, other, 6)
    for (name, a), b in zip(la.state_dict().items(), other.state_dict().values()):
        assert torch.equal(a, b) or (a.isnan() & b.isnan()).all() if isinstance(a, torch.Tensor) else a == b, name
    assert all(torch.equal(a, b) for a, b in zip(net.parameters(), again.parameters()))


def test_history_stays_small_and_evenly_spaced(net):
    la = LeastAction(net)
    net(torch.ones(1, 8)); energies = la.meter.take()
    for i in range(1500):
        la.meter.put(energies)
        la(worth(float(i)))
    curves = la.curves()
    assert 128 <= len(curves["call"]) <= 256 and curves["call"].diff().unique().tolist() == [8]
    assert torch.equal(curves["loss"], curves["call"].double() - 1)


@pytest.mark.parametrize("other, message", [
    (lambda: LeastAction(dense_net(8, 3, 5, 8)), "3 blocks, this one 5; only in the state: none; only here: "
                                                 "flow.blocks.3, flow.blocks.4"),
    (lambda: LeastAction(make(), reduction="sum"), "reduction 'mean', here it is 'sum'"),
    (lambda: LeastAction(make(), controller=ProportionalIntegral()), "controller 'DualAscent', here it is "
                                                                     "'ProportionalIntegral'"),
    (lambda: LeastAction(make(), DualAscent(lambda0=torch.ones(4))), r"shape \(\), here \(4,\)")])
def test_state_of_another_model_is_refused_whole(net, batch, other, message):
    x, y = batch
    la = LeastAction(net)
    la(F.cross_entropy(net(x), y))
    into = other()
    before = {k: v.clone() for k, v in into.state_dict().items() if isinstance(v, torch.Tensor)}
    with pytest.raises(ValueError, match=message): into.load_state_dict(la.state_dict())
    torch.testing.assert_close({k: into.state_dict()[k] for k in before}, before, equal_nan=True)


def test_state_of_something_else_is_refused(net):
    with pytest.raises(ValueError, match="found no state of a LeastAction"):
        LeastAction(net).load_state_dict(net.state_dict())


# Rows of networks

def rows_of(rule, *seeds, **settings):
    "Networks with this rule, trained in a row and one after the other."
    train = partial(fit_many, partial(dense_net, 64, 10, 2, 8),
                    digits().splits(60, seeds), least_action=rule, epochs=3, **settings)
    return [train(mode=mode) for mode in ("batched", "sequential")]


@pytest.mark.parametrize("rule", MOVING)
def test_rows_take_any_rule_and_a_multiplier_each(rule):
    first = [.1, 1., 10.]
    made = lambda model, lambda0, tau: LeastAction(
        model, rule(lambda0, tau, average=.5, target=1., bounds=(min(lambda0, .5), None)))
    row, alone = rows_of(made, 0, grid=dict(lambda0=first, tau=[.1, 1.]))
    assert row.curves["lambda"].shape[1:] == (6,)
    torch.testing.assert_close(row.curves["lambda"], alone.curves["lambda"], rtol=1e-3, atol=1e-4)
    assert kkt(row[1].curves, target=1.).verdict in ADVICE


def test_rows_of_fixed_weights():
    row, alone = rows_of(lambda model, weight: LeastAction(model, FixedWeight(weight)), 0,
                         grid=dict(weight=[.1, 1., 10.]))
    for runs in (row, alone): assert runs.curves["lambda"][-1].tolist() == pytest.approx([10., 1., .1])


@pytest.mark.parametrize("rule", MOVING)
def test_row_from_one_first_multiplier(rule):
    row, _ = rows_of(partial(LeastAction, controller=rule(average="mean")), 0, 1)
    assert row.curves["lambda"].shape[1:] == (2,) and row.curves["lambda"].isfinite().all()


def test_room_for_a_row_is_made_everywhere(net):
    each = [
        LeastAction(net, ProportionalIntegral(lam, tau=tau, average=.5, bounds=(lam, None)))
        for lam, tau in ((1., .1), (2., .2), (3., .2))]
    la = each[0]
    la.stack(each[1:])
    assert {b.shape[-1] for b in la.buffers()} == {3} and la.lam.tolist() == la.controller.low.tolist() == [1., 2., 3.]
    assert la.controller.tau.tolist() == [.1, .2, .2] and "tau=[0.1, 0.2, 0.2]" in str(la)
    assert sum(len(m._forward_hooks) for m in net.modules()) == sum(
        len(m._forward_hooks) for m in watched(LeastAction).modules()
    ), "one of them watches"
    with pytest.raises(ValueError, match=r"lambda has shape \(4,\), expected \(3,\)"): la.lam = torch.ones(4)


def watched(make_one):
    net = make()
    net.la = make_one(net)
    return net


@pytest.mark.parametrize("other, message", [
    (lambda net: LeastAction(net, ProportionalIntegral()), "ProportionalIntegral.*expected the same for all networks "
                                                           "of a row"),
    (lambda net: LeastAction(net, reduction="sum"), "expected the same"), (lambda net: LeastAction(net, weights={"*": 2.}), "expected the same"),
    (lambda net: LeastAction(net, DualAscent(every=2)), "every is 1 and 2, expected one"), (lambda net: LeastAction(net, DualAscent(average=.5)), "average is 'batch' and 0.5"),
    (lambda net: LeastAction(net, blocks=["flow.blocks.1"]), "expected the same")])
def test_what_does_not_fit_in_a_row_is_refused(net, other, message):
    with pytest.raises(ValueError, match=message): LeastAction(net).stack([other(net)])


class Own(DualAscent):
    "A rule of somebody's, with something of its own."
    def __init__(self, own): super().__init__(); self.own = own


@pytest.mark.parametrize("own", [torch.arange(3.), np.arange(3), [1, 2], "a", None, object()])
def test_what_a_rule_has_of_its_own_is_one_for_a_row(net, own):
    la, same, other = (LeastAction(net, Own(value)) for value in (own, own, torch.ones(2, 2)))
    if isinstance(own, np.ndarray) or type(own) is object:   # who knows whether two of them are the same?
        with pytest.raises(ValueError, match="own is an .*expected one for all networks of a row.*mode='sequential'"):
            la.stack([same])
    else:
        la.stack([same])
        assert la.lam.shape == (2,)
    with pytest.raises(ValueError, match="own is .* and a tensor .*, expected one"):
        LeastAction(net, Own(own)).stack([other])


# Controllers are descriptions

@pytest.mark.parametrize("rule", MOVING)
def test_one_description_serves_several_networks(batch, rule):
    x, y = batch
    controller = rule(2., average=.5)
    before = {k: v.clone() for k, v in controller.state_dict().items() if isinstance(v, torch.Tensor)}
    nets = make(), make()
    las = [LeastAction(net, controller) for net in nets]
    las[0](F.cross_entropy(nets[0](x), y))
    assert las[0].lam != 2. and las[1].lam == controller.lam == 2. and las[0].calls == 1 and las[1].calls == 0
    torch.testing.assert_close({k: v for k, v in controller.state_dict().items() if k in before}, before,
                               equal_nan=True)


@pytest.mark.parametrize("weight", [.1, 1, np.float32(.5), torch.tensor([.5, 4.]), [.5, 4.]])
def test_a_fixed_weight_is_one_over_lambda(net, weight):
    law = FixedWeight(weight)
    torch.testing.assert_close(law.lam * torch.as_tensor(weight, dtype=torch.float64), torch.ones_like(law.lam))
    law.update(law.lam * 3)
    torch.testing.assert_close(law.lam * torch.as_tensor(weight, dtype=torch.float64), torch.ones_like(law.lam))


@pytest.mark.parametrize("weight, message", [(0., "weight is 0.0, expected positive: the action is multiplied by it"), (-1., "weight is -1"), (float("inf"), "weight is inf"), (1e38, "1 / weight is")])
def test_weights_that_are_none(weight, message):
    with pytest.raises(ValueError, match=message): FixedWeight(weight)


# Reports

def test_report_of_a_run(net):
    net = dense_net(64, 10, 2, 8)
    run = fit(net, digits().split(100), LeastAction(net), epochs=12, eval_every=1)
    report = kkt(run.curves)
    assert report.verdict == "diverges" and "target" in report.advice and report.gap > 0
    assert "lambda" in str(report) and "| lambda |" in report._repr_markdown_()


@pytest.mark.parametrize("lam", [1., 4.])
def test_stationarity_at_a_known_solution(lam):
    """At d = 1/2 the gradients balance at the price 1, at d = 1/4 at 1/3; at another price the difference of two
    opposite vectors remains."""
    flow = Flow([Push(), Push()], .5)
    la = LeastAction(flow, DualAscent(lambda0=lam, tau=0., target=.25))
    task = lambda: (flow(torch.zeros(1, 2)) - 1).square().mean()
    for v, balance in ((.5, 1.), (.25, 1 / 3)):
        with torch.no_grad(): [p.fill_(v) for p in flow.parameters()]
        residual, found = la.stationarity(task)
        assert found == pytest.approx(balance, rel=1e-5)
        assert residual == pytest.approx((lam - balance) / (lam + balance), abs=1e-6)
    assert la.calls == 0 and all(p.grad is None for p in flow.parameters())


def test_report_counts_losses_that_were_not_finite(net):
    with LeastAction(net) as la:
        for loss in (1., float("nan")):
            net(torch.ones(1, 8)); la(worth(loss))
        assert "1 losses were not finite" in str(la.report())


def curve(**kw): return {"loss": kw["loss"], "lambda": kw["lam"], "action": torch.ones_like(kw["lam"])}


@pytest.mark.parametrize("n", [24, 100, 256])
@pytest.mark.parametrize("noise", [0., .02])
@pytest.mark.parametrize("verdict, make_curve", [
    ("satisfied", lambda t: dict(loss=.2 + torch.exp(-20 * t), lam=3 + torch.exp(-10 * t))),
    ("oscillates", lambda t: dict(loss=.2 + .1 * torch.sin(40 * t), lam=5 + 2 * torch.cos(40 * t))),
    ("infeasible", lambda t: dict(loss=.5 + 0 * t, lam=50 + 100 * t)),
    ("unfinished", lambda t: dict(loss=1.2 - .8 * t, lam=1 + 100 * t)),
    ("diverges", lambda t: dict(loss=.3 + .3 * t, lam=50 + 100 * t)),
    ("never binds", lambda t: dict(loss=.1 + 0 * t, lam=(1 - 2 * t).clamp(1e-3)))])
def test_verdicts(n, noise, verdict, make_curve):
    t = torch.linspace(0, 1, n)
    c, g = make_curve(t), torch.Generator().manual_seed(0)
    c["loss"] = (c["loss"] + noise * torch.randn(n, generator=g)).clamp(min=0)
    assert kkt(curve(**c), target=.2).verdict == verdict


def test_verdicts_of_bare_cases():
    t = torch.linspace(0, 1, 20)
    assert kkt(curve(loss=1 - t, lam=3 + 0 * t)).verdict == "fixed"
    assert kkt(curve(loss=.5 + 0 * t, lam=3 + 0 * t), target=.1, bounds=(1e-3, 3.)).verdict == "infeasible"
    assert kkt(curve(loss=.05 + 0 * t, lam=48 + t)).verdict == "at rest"   # a target of zero, and a loss that is not
    assert kkt(curve(loss=t, lam=t * float("nan"))).verdict == "not finite"
    assert kkt(curve(loss=t[:7], lam=1 + t[:7])).verdict == "too short" != kkt(curve(loss=t[:8], lam=1 + t[:8])).verdict
    near = dict(loss=.1 + 0 * t, lam=1.5 + .01 * t)
    # lambda is still above its lower bound
    assert kkt(curve(**near), target=.2, bounds=(1., None)).verdict == "unfinished"
    assert kkt(curve(**near), target=.2, bounds=(1.49, None)).verdict == "never binds"
    with pytest.raises(ValueError, match="lack lambda, action"): kkt({"loss": t})
    with pytest.raises(ValueError, match="have 20, 19 and 20 points"): kkt({"loss": t, "lambda": t[1:], "action": t})
    with pytest.raises(ValueError, match="take one network of the row"):
        kkt({k: torch.ones(9, 2) for k in ("loss", "lambda", "action")})


@pytest.mark.parametrize("sides, verdict", [([1., -1., 1., -1.], "oscillates"), ([1., -1., 1.], "satisfied")])
def test_three_changes_of_side_are_an_oscillation(sides, verdict):
    lam = 5 + .8 * torch.tensor(sides).repeat_interleave(24 // len(sides))
    found = kkt(curve(loss=torch.full((48,), .2), lam=torch.cat([lam, lam])), target=.2)
    assert found.verdict == verdict and .1 < found.swing < .25


def test_eight_points_have_a_drift_and_a_swing():
    found = kkt(curve(loss=torch.ones(8), lam=torch.tensor([1., 1, 1, 1, 2, 3, 4, 5])))
    assert found.drift == pytest.approx(3 / 3.5, abs=1e-12) and found.swing == pytest.approx(0, abs=1e-12)
    short = kkt(curve(loss=torch.ones(7), lam=torch.ones(7)))
    assert torch.tensor([short.drift, short.swing]).isnan().all()


# Refused

@pytest.mark.parametrize("rule", MOVING)
@pytest.mark.parametrize("settings, message", [
    (dict(lambda0=float("nan")), "lambda0 is nan"), (dict(lambda0=float("inf")), "lambda0 is inf"), (dict(lambda0=torch.ones(2, 2)), r"lambda0 has shape \(2, 2\)"),
    (dict(tau=float("inf")), "tau is inf"), (dict(target=float("inf")), "target is inf"), (dict(lambda0=torch.tensor([1., 0.])), r"lambda0 is \[1.0, 0.0\]"), (dict(tau=float("nan")), "tau is nan"),
    (dict(every=True), "every is True"), (dict(every=1.5), "every is 1.5"), (dict(target=float("nan")), "target is nan"), (dict(warmup_steps=-1), "warmup_steps is -1"),
    (dict(accumulate=0), "accumulate is 0"), (dict(average=1.), "average is 1.0"), (dict(average="ema"), "average is 'ema'"),
    (dict(bounds=(None, .5)), "bounds end at 0.5, expected at least lambda0, 1"), (dict(bounds=(2., None)), "bounds begin at 2, expected .* at most lambda0, 1"),
    (dict(bounds=(0., None)), "bounds begin at 0"), (dict(bounds=(float("nan"), None)), "lower of bounds is nan"), (dict(bounds=(None, float("nan"))), "upper of bounds is nan"),
    (dict(bounds=(1., 2., 3.)), "bounds is a tuple of 3, expected the smallest and the largest"), (dict(bounds=(.5,)), "bounds is a tuple of 1")])
def test_settings_that_cannot_work(rule, settings, message):
    with pytest.raises(ValueError, match=message): rule(**settings)


@pytest.mark.parametrize("make_one, message", [
    (lambda net: LeastAction(net, weights={"flow.*": -1.}), "weight of 'flow.*' is -1"), (lambda net: LeastAction(net, weights={"nothing.*": 1.}), "'nothing.*' matches no module"),
    (lambda net: ProportionalIntegral(gain=-1.), "gain is -1"), (lambda net: AugmentedLagrangian(penalty=-1.), "penalty is -1")])
def test_attachments_that_cannot_work(net, make_one, message):
    with pytest.raises(ValueError, match=message): make_one(net)
    assert not any(m._forward_hooks for m in net.modules()), "a refused attachment leaves hooks"


@pytest.mark.parametrize("make_one, message", [
    (lambda net: LeastAction(net, DualAscent), "controller is the class DualAscent, expected Controller"), (lambda net: LeastAction(net, "pi"), "controller is 'pi'"), (lambda net: LeastAction(net, 3.), "controller is 3.0"),
    (lambda net: DualAscent("1"), "lambda0 is '1'"), (lambda net: DualAscent(tau="fast"), "tau is 'fast'"), (lambda net: DualAscent(bounds=None), "bounds is None"), (lambda net: DualAscent(bounds=3.), "bounds is 3.0"),
    (lambda net: DualAscent(bounds=("a", "b")), "bounds is a tuple of 2"), (lambda net: LeastAction(net, weights=[1., 2.]), "weights is a list of 2, expected")])
def test_settings_of_another_kind(net, make_one, message):
    with pytest.raises(TypeError, match=message): make_one(net)
    assert not any(m._forward_hooks for m in net.modules())


@pytest.mark.parametrize("model", [make().flow.blocks[:2].children(), lambda x: x])
def test_what_is_no_model_is_named(model):
    with pytest.raises(TypeError, match="model is .*, expected Module"): LeastAction(model)


def test_frozen_blocks(net, batch):
    x, y = batch
    la = LeastAction(net)
    net.requires_grad_(False)
    with pytest.raises(RuntimeError, match="the action has no gradient"): la(F.cross_entropy(net(x), y))
    with pytest.raises(ValueError, match="parameters of the 3 blocks are frozen"): LeastAction(net)
    net.flow.blocks[1].requires_grad_(True)
    with LeastAction(net) as some: assert some(F.cross_entropy(net(x), y)).requires_grad


def test_one_module_as_two_blocks(net):
    block = net.flow.blocks[0]
    with pytest.raises(ValueError, match="'a' and 'b' are one module"):
        LeastAction(net, blocks={"a": block, "b": block})


def test_calls_that_do_not_follow_one_forward_pass(net, batch):
    x, y = batch
    with LeastAction(net) as la:
        with pytest.raises(RuntimeError, match="energies of 0 blocks"): la(worth(1.))
        la(F.cross_entropy(net(x), y))
        with pytest.raises(RuntimeError, match="energies of 0 blocks"): la(worth(1.))
        both = F.cross_entropy(net(x), y) + F.cross_entropy(net(x), y)
        with pytest.raises(RuntimeError, match="more than one pass.*call forget"): la(both)
        net.eval()
        with pytest.raises(RuntimeError, match="evaluation mode .*model.train"): la(F.cross_entropy(net(x), y))
        net.train()
        with torch.no_grad(), pytest.raises(RuntimeError, match="gradients are off"): la(F.cross_entropy(net(x), y))
        assert la.calls == 1, "refused calls count for nothing"
        lam = la.lam.clone()
        net(x)
        with pytest.raises(ValueError, match="the task loss was -0.5"): la(worth(-.5))
        with pytest.raises(ValueError, match=r"shape \(24,\), expected \(\)"): la(torch.ones(24))
        with pytest.raises(TypeError, match="task loss is a float"): la(1.)
        assert la.lam == lam and la.calls == 1


def test_a_pass_that_broke_off_does_not_count(net, batch):
    "Interrupted by hand in the middle of the network, and run again."
    x, y = batch
    la = LeastAction(net)
    def stop(*args): raise KeyboardInterrupt
    for part in (net.flow.blocks[1], net.head):
        hook = part.register_forward_pre_hook(stop)
        with pytest.raises(KeyboardInterrupt): net(x)
        hook.remove()
    la(F.cross_entropy(net(x), y))
    torch.testing.assert_close(la.energies, block_energies(net.trajectory(x)).mean(1).detach())
    with pytest.raises(RuntimeError, match="the passes so far are forgotten"):
        la(F.cross_entropy(net(x), y) + F.cross_entropy(net(x), y))
    la(F.cross_entropy(net(x), y))


def test_a_cell_that_is_run_again_replaces_least_action(net, batch):
    x, y = batch
    la = LeastAction(net)
    la(F.cross_entropy(net(x), y))
    hooks = sum(len(m._forward_hooks) for m in net.modules())
    la = LeastAction(net)
    la(F.cross_entropy(net(x), y))
    assert sum(len(m._forward_hooks) for m in net.modules()) == hooks and la.calls == 1


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_a_copy_watches_nothing_and_says_so(net, batch, copied):
    x, y = batch
    la = LeastAction(net)
    la(F.cross_entropy(net(x), y))
    net2, la2 = copied((net, la))
    with pytest.raises(RuntimeError, match="is a copy, which watches nothing: make a new one"):
        la2(F.cross_entropy(net2(x), y))
    again = LeastAction(net2)
    again.load_state_dict(la2.state_dict())
    torch.testing.assert_close(again(F.cross_entropy(net2(x), y)), la(F.cross_entropy(net(x), y)))


def test_removed_hooks_leave_the_model_as_it_was(net):
    with LeastAction(net): assert any(m._forward_hooks for m in net.modules())
    assert not any(m._forward_hooks for m in net.modules())


# Faults that the tests above let pass, found by `make mutants`

@pytest.mark.parametrize("average", [0., 1., -.5, 1, True])
def test_a_decay_lies_strictly_between_0_and_1(net, average):
    with pytest.raises(ValueError, match=f"average is {average!r}"): LeastAction(net, DualAscent(average=average))


class Adds(nn.Module):
    def __init__(self): super().__init__(); self.field = nn.Linear(4, 4)
    def forward(self, x): return x + self.field(x)


def test_activations_in_place_after_the_blocks():
    torch.manual_seed(0)
    net, x, y = nn.Sequential(Adds(), nn.ReLU(inplace=True), Adds(), nn.ReLU(inplace=True),
                              nn.Linear(4, 3)), torch.randn(6, 4), torch.randint(3, (6,))
    first = x + net[0].field(x); middle = first.relu(); second = middle + net[2].field(middle)
    task = F.cross_entropy(net[4](second.relu()), y)
    by_hand = task + ((first - x).square().mean() + (second - middle).square().mean()) / (1 + task.item())
    expected = torch.autograd.grad(by_hand, list(net.parameters()))
    la = LeastAction(net, x=x)
    loss = la(F.cross_entropy(net(x), y)); loss.backward()
    torch.testing.assert_close(loss, by_hand)
    for p, g in zip(net.parameters(), expected): torch.testing.assert_close(p.grad, g)


def test_blocks_without_a_name_are_refused():
    net, x = nn.Sequential(Adds(), Adds(), nn.Linear(4, 3)), torch.randn(6, 4)
    with pytest.raises(ValueError, match="blocks is empty"): LeastAction(net, x=x, blocks=[])
    with pytest.raises(TypeError, match="blocks is a list of 1, expected"): LeastAction(net, x=x, blocks=[net[0]])


def test_a_report_too_short_for_a_trend_has_no_numbers_for_it(net):
    la = LeastAction(net)
    for _ in range(3): la(F.cross_entropy(net(torch.randn(6, 8)), torch.zeros(6, dtype=torch.long)))
    assert "nan" not in str(la.report())


def test_ascend_takes_one_number_per_network(net):
    la = LeastAction(net)
    la.ascend(.5)
    assert la.lam.item() == 1.5
    with pytest.raises(ValueError, match=r"loss has shape \(7,\), expected \(\)"): la.ascend(torch.rand(7))
    assert la.lam.shape == () and la.lam.item() == 1.5


def test_an_average_of_the_loss_starts_with_the_first_finite_one(net):
    la, x, y = LeastAction(net, DualAscent(average=.9, tau=1.)), torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
    for value in (float("nan"), 2., 2., 2.):
        task = F.cross_entropy(net(x), y)
        la(task * 0 + value)
    assert la.lam.item() == pytest.approx(1 + 3 * 2)


def test_after_a_refused_loss_the_cell_can_be_run_again(net):
    la, x, y = LeastAction(net), torch.randn(6, 8), torch.zeros(6, dtype=torch.long)
    with pytest.raises(ValueError): la(F.cross_entropy(net(x), y, reduction="none"))
    assert la(F.cross_entropy(net(x), y)).isfinite()


def test_a_report_of_a_loss_of_zero(net):
    la, x = LeastAction(net), torch.randn(6, 8)
    for _ in range(10): la(net(x).sum() * 0)
    assert 'nan' not in str(la.report())


# Exact sums

BIG = 2. ** 21   # in float32 a step of .1 is lost in it


@pytest.mark.parametrize("rule, extra", list(zip(MOVING, [0., .2, .2, 0.])))
@pytest.mark.parametrize("convert", [lambda m: m, nn.Module.half, nn.Module.bfloat16, nn.Module.float, lambda m: m.to(torch.float32)])
def test_a_large_multiplier_notices_small_steps(rule, extra, convert):
    law = convert(rule(lambda0=BIG))
    for _ in range(1000): law.update(torch.tensor(.1))
    assert law.lam.item() - BIG == pytest.approx(100 + extra, rel=1e-5)


@pytest.mark.parametrize("row", [(), (3,)])
def test_a_large_multiplier_in_a_training(net, batch, row):
    x, y = batch
    net.part = LeastAction(net, DualAscent(lambda0=torch.full(row, BIG) if row else BIG))
    net.to(torch.bfloat16).float()   # there and back
    la = net.part
    for _ in range(300): la.meter.put(torch.ones(*row, 3, requires_grad=True)); la(worth(.1, *row))
    for _ in range(200): la.ascend(torch.full(row, .1))
    assert (la.lam - BIG).tolist() == pytest.approx([50.] * 3 if row else 50., rel=1e-5)
    curve = la.curves()["lambda"]
    assert (curve[-1] - curve[0]).min() > 20 and (row or kkt(la.curves()).verdict != "fixed")


def test_a_mean_over_many_batches_goes_on():
    "As after 2^24 losses of one."
    sensor = least_action._Sensor(torch.zeros((), dtype=torch.float64), every=2 ** 26, average="mean")
    sensor.total.fill_(2. ** 24); sensor.count = {"calls": 2 ** 24, "added": 2 ** 24}
    for _ in range(1000): sensor.see(torch.tensor(.1))
    assert sensor.total.item() - 2. ** 24 == pytest.approx(100, rel=1e-5)


@pytest.mark.parametrize("controller", [DualAscent(), DualAscent(average="mean", every=3), DualAscent(average=.9), AugmentedLagrangian(), ProportionalIntegral()])
def test_a_state_of_single_precision_is_taken_over(net, batch, controller):
    x, y = batch
    la = LeastAction(net, controller)
    for _ in range(4): la(F.cross_entropy(net(x), y))
    old = {
        k: v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v
        for k, v in la.state_dict().items()}
    other = LeastAction(make(), controller)
    other.load_state_dict(old)
    assert other.lam.dtype == other.controller.sensor.total.dtype == other.history.points.dtype == torch.float64
    for k, v in la.state_dict().items():
        if isinstance(v, torch.Tensor):
            torch.testing.assert_close(other.state_dict()[k], v, equal_nan=True, rtol=1e-6, atol=1e-6)


def test_a_device_without_float64_gets_float32_and_a_warning(net):
    def move(t):   # as MPS does
        if t.dtype == torch.float64: raise TypeError("Cannot convert a MPS Tensor to float64 dtype")
        return t.clone()
    la = LeastAction(net, DualAscent(lambda0=3.))
    with pytest.warns(UserWarning, match="cpu has no float64: lambda is kept in float32"): la._apply(move)
    assert la.lam.dtype == torch.float32 and la.lam.item() == 3.
    net(torch.ones(1, 8)); la(worth(1.))
    assert la.lam.item() == 4.


@given(st.floats(least_action._SMALLEST, least_action._LARGEST), st.floats(0, 10, allow_subnormal=False))
@settings(max_examples=60, deadline=None)
def test_any_multiplier_that_is_taken_gives_a_finite_objective(lambda0, loss):
    la = LeastAction(make(), DualAscent(lambda0=lambda0))
    la.meter.put(torch.full((3,), .3, requires_grad=True))
    assert la(worth(loss)).isfinite()


@pytest.mark.parametrize("lambda0", [1e-45, 1e-39, 5e-324, 1e39, 1e300, 10 ** 400, torch.tensor([1., 1e-40])])
def test_multipliers_that_single_precision_cannot_divide_by(net, lambda0):
    with pytest.raises(ValueError, match="lambda0 is .*expected"): LeastAction(net, DualAscent(lambda0=lambda0))
    with pytest.raises(ValueError, match="bounds begin at 1e-45"): DualAscent(bounds=(1e-45, None))


@pytest.mark.parametrize("dtype, wide", [(torch.float16, torch.float32), (torch.bfloat16, torch.float32), (torch.float32, torch.float32), (torch.float64, torch.float64)])
@pytest.mark.parametrize("weights", [None, {"*": .5}])
def test_the_objective_has_the_precision_of_the_loss_and_the_energies(net, batch, dtype, wide, weights):
    x, y = batch
    net.to(dtype)
    la = LeastAction(net, weights=weights)
    loss = la(net(x.to(dtype)).square().mean())
    loss.backward()
    assert loss.dtype == wide and la.lam.dtype == torch.float64


# The clock against a plain reading of its description

def plain_clock(losses, every, warmup, accumulate, average):
    """What the controller sees: after each step, the loss of its batches, averaged over what came after the warm-up; at
    every `every`-th step."""
    found, window, level, mass = [], [], 0., 0.
    for i in range(len(losses)):
        found.append(None)
        step, last = i // accumulate + 1, (i + 1) % accumulate == 0
        if step <= warmup or not last: continue
        batches = losses[i + 1 - accumulate:i + 1]
        value = sum(batches) / accumulate
        window += batches
        level, mass = average_of(level, mass, value, average)
        if every is None or step % every: continue
        found[-1] = {"batch": value, "mean": sum(window) / len(window)}.get(average, level / mass if mass else None)
        window = []
    return found


def average_of(level, mass, value, average):
    return (
        (average * level + (1 - average) * value, average * mass + 1 - average)
        if isinstance(average, float)
        else (0.0, 0.0)
    )


@given(st.lists(st.floats(0, 9, width=32), min_size=1, max_size=24), st.sampled_from([None, 1, 2, 3, 5]), st.integers(0, 6), st.integers(1, 3),
       st.sampled_from(["batch", "mean", .5, .9]))
@settings(max_examples=300, deadline=None)
def test_the_clock_against_its_description(losses, every, warmup, accumulate, average):
    sensor = least_action._Sensor(torch.zeros((), dtype=torch.float64), every, average, warmup, accumulate)
    seen = [sensor.see(torch.tensor(loss)) for loss in losses]
    for ours, theirs in zip(seen, plain_clock(losses, every, warmup, accumulate, average)):
        assert (ours is None) == (theirs is None) and (
            ours is None or ours.item() == pytest.approx(theirs, rel=1e-6, abs=1e-9)
        )


def test_losses_of_the_warm_up_enter_no_mean(net):
    assert lams(net, [11.] * 5 + [2.] * 5, every=5, warmup_steps=5, average="mean")[-1] == 3.
    assert lams(net, [11.] * 5 + [2.] * 5, warmup_steps=5, average=.9)[-1] == pytest.approx(11.)


# Rounding below zero

HALF = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


@pytest.mark.parametrize("dtype", HALF)
def test_rounding_below_zero_counts_as_zero(net, dtype):
    eps = torch.finfo(dtype).eps
    la = LeastAction(net)
    for loss in (-eps, -3 * eps, -1e-9):
        net(torch.ones(1, 8))
        loss = torch.tensor(loss, dtype=dtype, requires_grad=True)
        objective = la(loss)
        objective.backward()
        la.ascend(loss)
        assert la.lam.item() == 1. and loss.grad == 1   # the objective itself is left alone
    for refused in (la, la.ascend):
        net(torch.ones(1, 8))
        with pytest.raises(ValueError, match=r"the task loss was -0.[01]\d*, expected zero or more, up to rounding"):
            refused(torch.tensor(-.1, dtype=dtype, requires_grad=True))
    la.ascend(-1e-7)
    for loss in (-1., -.01):
        with pytest.raises(ValueError, match="expected zero or more"): la.ascend(loss)
    assert la.lam.item() == 1.


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_losses_that_are_zero_on_paper(net, dtype):
    g, la, below = torch.Generator().manual_seed(0), LeastAction(net, DualAscent(every=None)), 0
    for classes in (3, 100, 10_000) * 4:
        logits = torch.randn(8, classes, generator=g).to(dtype)
        near = (logits.float() * (1 + torch.finfo(dtype).eps * torch.randn(8, classes, generator=g))).to(dtype)
        divergence = F.kl_div(logits.log_softmax(-1), near.log_softmax(-1), log_target=True, reduction="none").sum(-1)
        for loss in (*(1 - F.cosine_similarity(logits, near, dim=-1)), *divergence):
            la.meter.put(torch.ones(3, requires_grad=True)); la(loss.requires_grad_())
            below += int(loss < 0)
    assert below > 5, "hardly a loss came out below zero: nothing was tried"


def test_off_the_cpu_the_smallest_loss_is_kept_but_not_what_rounding_did(net):
    slack = least_action._slack(torch.float32)
    row = torch.tensor([-1e-9, -.1, 0., 2., float("nan"), float("inf"), -slack, float("-inf")])
    torch.testing.assert_close(
        least_action._lifted(row, slack),
        torch.tensor([0.0, -0.1, 0.0, 2.0, float("nan"), float("inf"), 0.0, float("-inf")]),
        equal_nan=True,
    )


def test_a_negative_loss_beside_one_that_is_not_a_number(net):
    la = LeastAction(net, DualAscent(lambda0=torch.ones(3)))
    for row in ([float("nan"), -1., 2.], [-1., float("nan"), 2.], [2., -1., float("nan")]):
        with pytest.raises(ValueError, match="the task loss was -1"): la.ascend(torch.tensor(row))


# Losses that are none

@pytest.mark.parametrize("spoil", [lambda loss: loss.detach(), lambda loss: torch.tensor(1.), lambda loss: torch.tensor(float("nan")), lambda loss: loss.detach().double()])
def test_a_loss_without_gradient_is_refused(net, batch, spoil):
    x, y = batch
    la = LeastAction(net)
    with pytest.raises(RuntimeError, match="the task loss has no gradient"): la(spoil(F.cross_entropy(net(x), y)))
    assert la.lam.item() == 1. and la.calls == 0
    assert la(F.cross_entropy(net(x), y)).requires_grad


def test_a_loss_of_another_network_that_is_frozen(net, batch):
    x, y = batch
    other, la = make().requires_grad_(False), LeastAction(net)
    net(x)
    with pytest.raises(RuntimeError, match="comes from another model or from parts that are frozen"):
        la(F.cross_entropy(other(x), y))


REACH = "the gradient of the task loss reaches no parameter of this model"


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("spoil", [
    lambda net, x, y: F.cross_entropy(make()(x), y), lambda net, x, y: torch.tensor(F.cross_entropy(net(x), y).item(), requires_grad=True),
    lambda net, x, y: F.cross_entropy(net(x).detach().requires_grad_(), y), lambda net, x, y: F.mse_loss(nn.Linear(8, 8)(x), x)])
def test_a_loss_that_does_not_reach_the_model_is_told_once(net, batch, spoil):
    x, y = batch
    la = LeastAction(net)
    net(x); la.forget(); net(x)
    loss = spoil(net, x, y)
    la.forget(); net(x)
    with pytest.warns(UserWarning, match=f"{REACH}, expected the loss of the pass just made") as said: la(loss)
    assert said[0].filename == __file__
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        net(x); la(spoil(make(), x, y))


class Halves(nn.Module):
    "A network whose second half sees the first one's outputs without their graph."
    def __init__(self): super().__init__(); self.blocks, self.head = nn.Sequential(Adds(), Adds()), nn.Linear(4, 3)
    def forward(self, x): return self.head(self.blocks(x).detach())


@pytest.mark.parametrize("way", ["plain", "compiled", "checkpoint", "row", "head only", "frozen stem", "functional", "data parallel"])
def test_a_loss_that_reaches_the_model_is_not_told(way, recwarn):
    from torch.func import functional_call
    torch.manual_seed(0)
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    net = nn.Sequential(nn.Linear(4, 4), Adds(), Adds(), nn.Linear(4, 3))
    if way == "head only": net = Halves()
    if way == "frozen stem": net[:2].requires_grad_(False)
    if way == "row":
        fit_many(partial(dense_net, 64, 10, 2, 8),
                 digits().splits(60, [0, 1]), least_action=LeastAction, epochs=1, mode="batched")
    else:
        la = LeastAction(net, x=x)
        run = {
            "compiled": lambda: torch.compile(net, backend="aot_eager")(x),
            "data parallel": lambda: nn.DataParallel(net)(x), "checkpoint": lambda: net[3]
            (torch.utils.checkpoint.checkpoint(net[:3], x, use_reentrant=False)), "functional": lambda: functional_call(
                net, {k: p.detach().clone().requires_grad_() for k, p in net.named_parameters()},
                (x,))}.get(way, lambda: net(x))
        la(F.cross_entropy(run(), y)).backward()
    assert not [w for w in recwarn if REACH in str(w.message)]


def test_the_graph_is_walked_once(net, batch, monkeypatch):
    x, y = batch
    walks = []
    monkeypatch.setattr(least_action, "graph_nodes",
                        lambda *ends, real=least_action.graph_nodes: walks.append(ends) or real(*ends))
    la = LeastAction(net)
    for _ in range(3): la(F.cross_entropy(net(x), y))
    assert len(walks) == 2   # of the loss and of the action


NO_LOSSES = [
    None, True, "1", 1j, [1.], (1., 2.), {},
    object(),
    torch.tensor(1),
    torch.tensor(True),
    torch.tensor(1j),
    torch.ones(2),
    torch.ones(0),
    torch.ones(1).to_sparse(),
    torch.empty((), device="meta"), 10 ** 400]


@pytest.mark.parametrize("loss", NO_LOSSES, ids=[f"{i}-{type(loss).__name__}" for i, loss in enumerate(NO_LOSSES)])
@pytest.mark.parametrize("lambda0", [1., torch.ones(3)], ids=["one", "row"])
def test_what_is_no_loss(net, loss, lambda0):
    la = LeastAction(net, DualAscent(lambda0=lambda0))
    net(torch.ones(1, 8))
    for take in (la, la.ascend, la.controller.update):
        with pytest.raises((TypeError, ValueError), match="loss|number"): take(loss)
    assert (la.lam == 1).all() and la.calls == 0 and la.lam.device.type == "cpu"


# Passes that come to nothing

@pytest.mark.parametrize("held", [False, True])
@pytest.mark.parametrize("compiled", [False, True])
def test_a_loop_that_skips_batches(net, batch, held, compiled):
    x, y = batch
    la, kept, taken = LeastAction(net), [], 0
    model = torch.compile(net, backend="aot_eager", fullgraph=True) if compiled else net
    for i in range(6):
        loss = F.cross_entropy(model(x * float("nan") if i % 2 == 0 else x), y)
        if held: kept.append(loss)
        if not loss.isfinite(): continue
        la(loss)
        torch.testing.assert_close(la.energies, block_energies(net.trajectory(x)).mean(1).detach())
        taken += 1
    assert la.calls == taken == 3
    both = F.cross_entropy(model(x), y) + F.cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match="in more than one pass.*call forget"): la(both)


def test_the_objective_is_of_the_last_pass(net, batch):
    x, y = batch
    la = LeastAction(net)
    first, last = F.cross_entropy(net(x), y), F.cross_entropy(net(2 * x), y)
    with pytest.raises(RuntimeError, match="in more than one pass"): la(first)
    first, last = F.cross_entropy(net(x), y), F.cross_entropy(net(2 * x), y)
    la(last)
    torch.testing.assert_close(la.energies, block_energies(net.trajectory(2 * x)).mean(1).detach())
    # one inside the other
    with pytest.raises(RuntimeError, match="in more than one pass"): la(F.cross_entropy(net(x + net(x).mean()), y))
    net(x); la.forget()
    with pytest.raises(RuntimeError, match="energies of 0 blocks"): la(worth(1.))


def test_an_interrupt_between_pass_and_objective(net, batch):
    "In a function, whose variables the traceback holds."
    x, y = batch
    la = LeastAction(net)
    def step(broken):
        loss = F.cross_entropy(net(x), y)
        if broken: raise KeyboardInterrupt
        return la(loss)
    with pytest.raises(KeyboardInterrupt) as held: step(True)
    assert step(False).requires_grad and held


def test_blocks_that_are_driven_without_their_model(net, batch):
    x, y = batch
    with LeastAction(find_blocks(net)) as la:
        for _ in range(3): loss = F.cross_entropy(net(x), y)
        la(loss)
        with pytest.raises(RuntimeError, match="in more than one pass"):
            la(F.cross_entropy(net(x), y) + F.cross_entropy(net(x), y))
        la(F.cross_entropy(net(x), y))


# Frozen parts

class Parts(nn.Module):
    def __init__(self, how="plain"):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.head, self.how = Adds(), Adds(), nn.Linear(4, 3), how
    def forward(self, x):
        with {"no_grad": torch.no_grad, "inference": torch.inference_mode}.get(self.how, torch.enable_grad)():
            z = self.a(x)
        return self.head(self.b(z.clone()))


@pytest.mark.parametrize("how", ["plain", "no_grad", "inference"])
@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("asleep", [False, True])
def test_frozen_parts_count_as_motion_without_gradient(how, frozen, asleep):
    x, y = torch.randn(6, 4), torch.randint(3, (6,))
    whole, net = Parts(), Parts(how)
    expected = find_energies(whole, x)
    if frozen: net.a.requires_grad_(False)
    if asleep: net.a.eval()
    la = LeastAction(net, blocks=["a", "b"])
    if asleep and not frozen:
        with pytest.raises(RuntimeError,
                           match=r"1 of 2 blocks are in evaluation mode \(a.*may stay in evaluation mode if"):
            la(F.cross_entropy(net(x), y))
        la.remove(); la = LeastAction(net, blocks=["a", "b"], weights={"a": 0.})
    la(F.cross_entropy(net(x), y)).backward()
    torch.testing.assert_close(la.energies, expected)
    assert net.b.field.weight.grad is not None and (net.a.field.weight.grad is None) == (frozen or how != "plain")


def find_energies(net, x):
    z = net.a(x)
    return torch.stack([(z - x).square().mean(), (net.b(z) - z).square().mean()]).detach()


def test_a_network_that_is_evaluated_leaves_nothing_even_with_frozen_parts():
    x, y, net = torch.randn(6, 4), torch.randint(3, (6,)), Parts("no_grad")
    la = LeastAction(net, blocks=["a", "b"])
    stop = net.head.register_forward_pre_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError): net(x)
    stop.remove()
    net.eval()
    for context in (torch.no_grad, torch.enable_grad):
        with context(): net(9 * x)
    net.train()
    la(F.cross_entropy(net(x), y))
    torch.testing.assert_close(la.energies, find_energies(net, x))


def test_weights_that_leave_nothing(net):
    with pytest.raises(ValueError, match="all blocks weigh zero"): LeastAction(net, weights={"*": 0.})


# Sharpness-aware steps: two passes, one step of the optimizer

def test_two_passes_per_step_move_lambda_once(net, batch):
    x, y = batch
    la, opt, losses = LeastAction(net, DualAscent(accumulate=2)), torch.optim.SGD(net.parameters(), lr=.05), []
    for _ in range(3):
        lam = la.lam.item()
        for _ in range(2):
            losses.append(F.cross_entropy(net(x), y))
            la(losses[-1]).backward()
        opt.step(); opt.zero_grad()
        assert la.lam.item() == pytest.approx(lam + sum(loss.item() for loss in losses[-2:]) / 2, rel=1e-6)


# Everything else that cannot be meant

SETTINGS = dict(lambda0=1., tau=1., target=0., bounds=(None, None), every=1, average="batch", warmup_steps=0,
                accumulate=1)
CALLS = {
    "dual_ascent": (dual_ascent, dict(lam=torch.tensor(1.), loss=torch.tensor(1.), tau=1., target=0.,
                                      bounds=(1e-3, 9.))),
    "kkt": (lambda loss, lam, action, **kw: kkt({"loss": loss, "lambda": lam, "action": action}, **kw),
            dict(loss=torch.rand(9), lam=torch.rand(9) + 1, action=torch.rand(9), target=0., bounds=(1e-3, 9.),
                 tolerance=.1)), "curves": (kkt, dict(curves={})), "DualAscent": (DualAscent, SETTINGS),
    "FixedWeight": (FixedWeight, dict(weight=1.)),
    "ProportionalIntegral": (ProportionalIntegral, SETTINGS | dict(gain=1., smooth=0., relative=False)),
    "AugmentedLagrangian": (AugmentedLagrangian, SETTINGS | dict(penalty=1.)),
    "LeastAction": (lambda **kw: LeastAction(**{"model": make()} | kw),
                    dict(model=make(), controller=None, blocks=None, reduction="mean", velocity="displacement",
                         weights=None,
                         batch_axis=None)), "lam": (lambda lam: setattr(LeastAction(make()), "lam", lam), dict(lam=2.)),
    "stationarity": (lambda loss: LeastAction(make()).stationarity(lambda: loss), dict(loss=1.))}


@pytest.mark.parametrize("name", CALLS)
def test_odd_arguments_are_refused_in_our_words_or_work(name, odd_calls):
    odd_calls(*CALLS[name])


def test_a_network_that_is_frozen_and_evaluated_says_so(net, batch):
    x, y = batch
    la = LeastAction(net)
    net.requires_grad_(False).eval()
    with pytest.raises(RuntimeError, match="3 of 3 blocks are in evaluation mode"): la(F.cross_entropy(net(x), y))
    net.train()
    with pytest.raises(RuntimeError, match="the action has no gradient"): la(F.cross_entropy(net(x), y))


def test_stationarity_needs_a_loss_of_the_network(net, batch):
    x, y = batch
    la = LeastAction(net)
    with pytest.raises(RuntimeError, match="the task loss has no gradient"):
        la.stationarity(lambda: F.cross_entropy(net(x), y).detach())
    with pytest.raises(TypeError, match="task is a tensor .*, expected"): la.stationarity(F.cross_entropy(net(x), y))


def test_all_processes_add_up_in_double_precision(net, monkeypatch):
    import torch.distributed as dist
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(dist, "all_reduce", lambda t: t.add_(3e-5))   # lost in bfloat16
    la = LeastAction(net)
    net(torch.ones(1, 8)); la(torch.tensor(1., dtype=torch.bfloat16, requires_grad=True))
    assert la.lam.item() == 1 + (1 + 3e-5) / 2


@pytest.mark.parametrize("lambda0", [.1, [.1, .7], Fraction(1, 10), np.array([.1]), np.float64(.1)])
def test_the_first_multiplier_is_what_was_given(lambda0):
    law = DualAscent(lambda0, tau=0.)
    assert np.array_equal(law.lam.numpy(), np.asarray(lambda0, dtype=float))


@pytest.mark.parametrize("of", [np.int64, np.float32, torch.tensor, Fraction, Decimal, np.array])
@pytest.mark.parametrize("name, value", [("every", 2), ("warmup_steps", 1), ("accumulate", 2), ("tau", 1), ("target", 1), ("bounds", 4), ("lambda0", 2)])
def test_numbers_of_any_library_are_settings(name, value, of):
    plain, given = (DualAscent(**{name: (None, v) if name == "bounds" else v}) for v in (value, of(value)))
    assert str(given) == str(plain) and given.sensor.get_extra_state() == plain.sensor.get_extra_state()
    assert (
        given.sensor.every == plain.sensor.every
        and type(given.sensor.every) is type(given.sensor.warmup_steps) is type(given.sensor.accumulate) is int
    )


@pytest.mark.parametrize("of", [np.float32, torch.tensor, Fraction, Decimal, np.array])
def test_decays_and_weights_of_any_library(net, of):
    la = LeastAction(net, ProportionalIntegral(average=of(.5), gain=of(.5), smooth=of(.5), relative=np.True_),
                     weights={"*": of(.5)})
    la.remove()
    assert (
        type(la.controller.sensor.average) is float
        and la.controller.sensor.average == 0.5
        and set(la.weights.tolist()) == {0.5}
        and la.controller.gain == 0.5
    )


class Shifts(nn.Module):
    "Adds what no weight that is trained changes."
    def __init__(self, width=8): super().__init__(); self.register_buffer("by", torch.ones(width))
    def forward(self, x): return x + self.by


@pytest.mark.parametrize("least_action", [LeastAction, lambda net, **k: LeastAction(net, FixedWeight(1.), **k)])
def test_an_action_without_gradient_is_refused_at_the_first_step(least_action):
    net = nn.Sequential(nn.Linear(8, 8), Shifts(), nn.Linear(8, 3))
    la = least_action(net, blocks=["1"])
    with pytest.raises(RuntimeError, match="above zero and has no gradient"):
        la(F.cross_entropy(net(torch.randn(4, 8)), torch.zeros(4, dtype=torch.long)))


def test_an_action_of_zero_is_looked_at_again():
    block = ResidualBlock(nn.Linear(8, 8))
    nn.init.zeros_(block.velocity.weight); nn.init.zeros_(block.velocity.bias)
    net = nn.Sequential(nn.Linear(8, 8), block, nn.Linear(8, 3))
    la = LeastAction(net)
    step = lambda: la(F.cross_entropy(net(torch.randn(4, 8)), torch.zeros(4, dtype=torch.long)))
    step()
    assert not la.pulled
    nn.init.ones_(block.velocity.weight)
    step()
    assert la.pulled

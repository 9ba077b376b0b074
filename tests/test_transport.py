"Optimal transport: values known in closed form or by brute force, what must hold for any clouds, and unusable input."
import json
import math
import os
import random
import subprocess
import sys
from fractions import Fraction
from itertools import permutations

import numpy as np
import ot
import pytest
import torch
from hypothesis import given, settings, strategies as st
from scipy.optimize import linear_sum_assignment
from torch import nn
from torch.testing import assert_close

from lap_nb import transport
from lap_nb.dynamics import Flow, Trajectory
from lap_nb.kinetic import kinetic_energy
from lap_nb.nets import dense_net, init_velocities_
from lap_nb.transport import (action_split, cost_matrix, cyclical_monotonicity, entropic_w2, exact_gap, gap_curve,
                              mccann, measure_transport, monotonicity, optimal_coupling, plot_splits, sliced_w2)

seeds = st.integers(0, 10_000)
quick = settings(max_examples=25, deadline=None)


def cloud(n, d, seed, dtype=torch.float64):
    return torch.randn(n, d, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def root(S):
    "The symmetric square root of a positive definite matrix."
    values, vectors = torch.linalg.eigh(S)
    return vectors * values.sqrt() @ vectors.T


def positive(d, seed):
    A = cloud(d, d, seed)
    return A @ A.T + .3 * torch.eye(d, dtype=A.dtype)


def brute_force(x, y):
    return min((x - y[list(p)]).square().sum(1).mean().item() for p in permutations(range(len(x))))


def orbit(n, m, S, seed):
    """`n * m` points of mean 0 and covariance `S` exactly, and the map that turns them into each other by 1/m of a full
    turn."""
    z = cloud(n, 2, seed)
    c, s = math.cos(2 * math.pi / m), math.sin(2 * math.pi / m)
    turn = torch.tensor([[c, -s], [s, c]], dtype=z.dtype)
    points = torch.cat([z @ torch.linalg.matrix_power(turn, k).T for k in range(m)])
    points = points / (points.square().sum() / (2 * len(points))).sqrt()   # covariance is the identity, by the symmetry
    A = root(S)
    return points @ A.T, A @ turn @ torch.linalg.inv(A)


class Linear(nn.Module):
    "The velocity that makes one block of step 1 the map `x -> A x + b`."
    def __init__(self, A, b): super().__init__(); self.A, self.b = A, b
    def forward(self, x): return x @ self.A.T + self.b - x


# Values known in closed form

@pytest.mark.parametrize("d", [1, 2, 5])
def test_gaussians_reach_the_bures_wasserstein_distance(d):
    S1, S2, b = positive(d, 1), positive(d, 2), cloud(1, d, 3)[0]
    z = cloud(300, d, 4)
    z = z - z.mean(0)
    x = z @ torch.linalg.inv(torch.linalg.cholesky(z.T @ z / len(z))).T @ root(S1)   # covariance S1 exactly
    R = root(S1)
    A = torch.linalg.inv(R) @ root(R @ S2 @ R) @ torch.linalg.inv(R)                 # the optimal map of the two laws
    traj = Flow([Linear(A, b)]).trajectory(x)
    gap = exact_gap(traj.x[0], traj.x[-1], reduction="sum")
    bures = b.square().sum() + S1.trace() + S2.trace() - 2 * root(R @ S2 @ R).trace()
    assert_close(gap.w2, bures.item(), rtol=1e-9, atol=1e-9)
    assert gap.gap == 0 and gap.self_share == 1 and gap.interval == (0, 0)
    assert_close(action_split(traj, reduction="sum").total(), bures.item(), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("m", [3, 4, 6])
def test_a_rotation_before_the_optimal_map_has_the_known_gap(m):
    "The cloud is its own image under the turn, so the ends are the same points and only the assignment changes."
    S1, S2 = positive(2, 5), positive(2, 6)
    x, turn = orbit(60, m, S1, 7)
    R = root(S1)
    A = torch.linalg.inv(R) @ root(R @ S2 @ R) @ torch.linalg.inv(R)
    gap = exact_gap(x, x @ turn.T @ A.T, reduction="sum")
    cross = lambda B: (B @ S1).trace().item()                                         # mean of <B x, x>
    assert_close(gap.w2, (S1.trace() + S2.trace() - 2 * cross(A)).item(), rtol=1e-9, atol=1e-9)
    assert_close(gap.gap, 2 * cross(A) - 2 * cross(A @ turn), rtol=1e-9, atol=1e-9)
    assert gap.gap > 0


def test_translation_costs_its_square_and_leaves_no_gap():
    x, b = cloud(200, 6, 0), cloud(1, 6, 1)
    gap = exact_gap(x, x + 10 * b, reduction="sum")
    assert_close(gap.w2, 100 * b.square().sum().item(), rtol=1e-9, atol=0)
    assert gap.gap == 0


def test_one_dimension_is_sorting():
    x, y = cloud(501, 1, 0), cloud(501, 1, 1).exp()
    by_order = (x.sort(0).values - y.sort(0).values).square().mean().item()
    for solver in ("assignment", "simplex"):
        assert_close(optimal_coupling(x, y, solver=solver).cost, by_order, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n", range(2, 8))
@pytest.mark.parametrize("solver", ["assignment", "simplex"])
def test_permuted_ends_have_the_gap_of_brute_force(n, solver):
    x = cloud(n, 3, n)
    y = (2 * x + .1 * cloud(n, 3, 99))[torch.randperm(n, generator=torch.Generator().manual_seed(n))]
    gap = exact_gap(x, y, reduction="sum", solver=solver)
    assert_close(gap.gap, (x - y).square().sum(1).mean().item() - brute_force(x, y), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("n, d", [(50, 2), (300, 10)])
def test_solvers_agree_with_pot(n, d):
    x, y = cloud(n, d, 0), cloud(n, d, 1)
    pot = ot.emd2([], [], ot.dist(x.numpy(), y.numpy()))
    for solver in ("assignment", "simplex"):
        assert_close(optimal_coupling(x, y, solver=solver).cost, pot, rtol=1e-9, atol=0)


def test_weights_agree_with_pot_and_with_copies():
    "A point of weight k/n is k equal points."
    x, y = cloud(5, 3, 0), cloud(5, 3, 1)
    copies = torch.tensor([1, 2, 3, 1, 2])
    weights = copies / copies.sum()
    weighted = exact_gap(x, y, weights, reduction="sum")
    repeated = exact_gap(x.repeat_interleave(copies, 0), y.repeat_interleave(copies, 0), reduction="sum")
    assert (weighted.solver, repeated.solver) == ("simplex", "assignment")
    assert_close(weighted.w2, repeated.w2, rtol=1e-6, atol=1e-9)
    assert_close(weighted.displacement, repeated.displacement, rtol=1e-6, atol=1e-9)
    assert_close(weighted.self_share, repeated.self_share, rtol=1e-6, atol=1e-6)


def test_unequal_numbers_of_points_agree_with_pot():
    x, y = cloud(40, 3, 0), cloud(70, 3, 1)
    best = optimal_coupling(x, y)
    assert_close(best.cost, ot.emd2([], [], ot.dist(x.numpy(), y.numpy())), rtol=1e-9, atol=0)
    assert_close(best.plan.to_dense().sum(0), torch.full((70,), 1 / 70, dtype=torch.float64))


def test_there_and_back_is_all_path_gap():
    x = cloud(60, 4, 0)
    traj = Trajectory(torch.stack([x, x + cloud(60, 4, 1), x]))
    split = action_split(traj)
    assert split.parts["all"][:2] == (0, 0)
    assert_close(split.total(), 2 * kinetic_energy(traj).mean().item(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("h", [1., .25])
def test_a_straight_walk_at_constant_speed_has_no_path_gap(h):
    x, y = cloud(60, 4, 0), cloud(60, 4, 1)
    t = torch.linspace(0, 1, 6, dtype=torch.float64).view(-1, 1, 1)
    optimal, assignment, path = action_split(Trajectory((1 - t) * x + t * y, h)).parts["all"]
    assert path < 1e-28 and optimal > 0 and assignment > 0


# What must hold for any clouds

@quick
@given(seeds, st.integers(2, 40), st.integers(1, 5), st.sampled_from(["mean", "sum"]), st.sampled_from([.1, 1., 2.]))
def test_the_parts_are_not_negative_and_add_up_to_the_action(seed, n, d, reduction, h):
    traj = Trajectory(torch.stack([cloud(n, d, seed + k) for k in range(4)]), h)
    split = action_split(traj, torch.arange(n) % 2, reduction)
    assert all(part >= 0 for parts in split.parts.values() for part in parts)
    assert_close(split.total(), traj.K * h * kinetic_energy(traj, reduction).mean().item(), rtol=1e-10, atol=1e-12)


@quick
@given(seeds, st.integers(4, 40), st.integers(1, 5))
def test_class_gaps_are_at_most_the_gap_of_the_whole(seed, n, d):
    traj = Trajectory(torch.stack([cloud(n, d, seed), cloud(n, d, seed + 1)]))
    y = torch.arange(n) % 2
    split = action_split(traj, y, "sum")
    mean = sum((y == c).sum().item() / n * split.parts[f"class {c}"][1] for c in (0, 1))
    assert mean <= split.parts["all"][1] + 1e-9


@quick
@given(seeds, st.integers(2, 40), st.integers(1, 5), st.floats(1e-4, 1e4))
def test_scaling_positions_scales_everything_by_the_square(seed, n, d, c):
    x, y = cloud(n, d, seed), cloud(n, d, seed + 1)
    one, scaled = exact_gap(x, y), exact_gap(c * x, c * y)
    for name in ("displacement", "w2", "gap"):
        assert_close(getattr(scaled, name), c * c * getattr(one, name), rtol=1e-8, atol=1e-9 * c * c)
    assert scaled.self_share == one.self_share and scaled.sensitivity == one.sensitivity


@quick
@given(seeds, st.integers(2, 40), st.integers(1, 5))
def test_permutations_and_isometries_change_nothing(seed, n, d):
    x, y = cloud(n, d, seed), cloud(n, d, seed + 1)
    order = torch.randperm(n, generator=torch.Generator().manual_seed(seed))
    Q, _ = torch.linalg.qr(cloud(d, d, seed + 2))
    b = cloud(1, d, seed + 3)
    one = exact_gap(x, y)
    for moved in (exact_gap(x[order], y[order]), exact_gap(x @ Q + b, y @ Q + b)):
        for name in ("displacement", "w2", "gap", "self_share"):
            assert_close(getattr(moved, name), getattr(one, name), rtol=1e-8, atol=1e-9)


@quick
@given(seeds, st.integers(2, 6), st.integers(1, 4))
def test_potentials_prove_the_cost(seed, n, d):
    x, y = cloud(n, d, seed), cloud(n, d, seed + 1)
    for solver in ("assignment", "simplex"):
        best = optimal_coupling(x, y, solver=solver)
        assert (best.f[:, None] + best.g <= cost_matrix(x, y) + 1e-9).all()
        assert_close((best.f.mean() + best.g.mean()).item(), best.cost, rtol=1e-9, atol=1e-9)


@quick
@given(seeds, st.integers(3, 6), st.integers(1, 3))
def test_the_gap_of_subsets_is_smaller_on_average(seed, n, d):
    x, y = cloud(n, d, seed), cloud(n, d, seed + 1)
    left_out = [exact_gap(torch.cat([x[:i], x[i + 1:]]), torch.cat([y[:i], y[i + 1:]])).gap for i in range(n)]
    assert sum(left_out) / n <= exact_gap(x, y).gap + 1e-9


@quick
@given(seeds, st.integers(2, 20))
def test_the_slack_is_the_gap_sample_by_sample(seed, n):
    gap = exact_gap(cloud(n, 3, seed), cloud(n, 3, seed + 1))
    assert (gap.slack >= 0).all()
    assert_close(gap.slack.mean().item(), gap.gap, rtol=1e-9, atol=1e-10)
    assert gap.interval[0] <= gap.gap + 1e-12 and gap.gap <= gap.interval[1] + 1e-12


# The interval and the placebo

def test_the_interval_covers_the_mean_gap_of_fresh_samples():
    "Of 100 intervals at 95 %, fewer than 85 cover by chance once in 20,000 times."
    turn = torch.tensor([[.6, -.8], [.8, .6]], dtype=torch.float64)
    gaps = [exact_gap(x := cloud(100, 2, seed), x @ turn.T, seed=seed) for seed in range(100)]
    mean = sum(g.gap for g in gaps) / len(gaps)
    assert sum(g.interval[0] <= mean <= g.interval[1] for g in gaps) >= 85


def test_a_gap_of_noise_in_high_dimension_comes_with_a_warning():
    x = cloud(300, 64, 0)
    blind = exact_gap(x, x + .5 * cloud(300, 64, 1))
    assert blind.gap == 0 and blind.self_share == 1 and "too few to tell in 64 dimensions" in blind.warning
    assert blind.warning in repr(blind) and blind.warning in blind._repr_markdown_()


def test_no_warning_where_exchanges_were_found_or_could_have_been():
    x = cloud(300, 64, 0)
    assert not exact_gap(x, cloud(300, 64, 1)).warning
    assert not exact_gap(x[:, :2], 2 * x[:, :2]).warning


def test_gap_curve_rises_and_ends_at_the_gap():
    x = cloud(256, 2, 0)
    y = x + cloud(256, 2, 1)
    curve = gap_curve(x, y, repeats=8)
    means = curve.gaps.mean(1)
    assert curve.n.tolist() == [8, 16, 32, 64, 128, 256] and (means.diff() > 0).all()
    assert_close(curve.gaps[-1], torch.full((8,), exact_gap(x, y).relative))


def test_gap_curve_of_few_points_and_of_points_at_rest():
    pair, swapped = torch.tensor([[0.], [1.]]), torch.tensor([[1.], [0.]])
    assert_close(gap_curve(pair, swapped, repeats=2).gaps, torch.ones(1, 2))   # all of the motion was needless
    assert_close(gap_curve(x := cloud(9, 2, 0), x, repeats=3).gaps, torch.zeros(1, 3))
    with pytest.raises(ValueError, match="expected at least 2 points"): gap_curve(pair[:1], swapped[:1])


def test_placebo_deals_the_displacements_out_anew():
    x = cloud(12, 2, 0)
    y = x + torch.tensor([[0., 0.]] * 6 + [[4., 1.]] * 6)
    g = torch.Generator().manual_seed(3)
    at, deal = torch.randperm(12, generator=g), torch.randperm(12, generator=g)
    by_hand = exact_gap(x[at], x[at] + (y - x)[at][deal]).relative
    assert by_hand > .1
    assert_close(gap_curve(x, y, sizes=[12], repeats=1, seed=3).placebo, torch.tensor([[by_hand]], dtype=torch.float32))


# Tensors in, tensors out

def test_half_precision_pictures_and_graphs():
    x = torch.randn(30, 3, 4, 4, requires_grad=True)
    gap = exact_gap(x, x * 2)
    assert gap.dim == 48 and not gap.slack.requires_grad and gap.slack.dtype == torch.float64
    assert_close(exact_gap(x.half(), x.half() * 2).w2, x.half().double().square().mean().item(), rtol=1e-9, atol=1e-9)


def test_no_graph_is_kept():
    flow = init_velocities_(dense_net(3, 2), .5).flow
    traj = flow.trajectory(torch.randn(20, 3))
    assert traj.x.requires_grad
    split = action_split(traj)
    assert not any(isinstance(v, torch.Tensor) and v.requires_grad for v in vars(split.gaps[0]).values())


def test_far_from_the_origin_no_digits_are_lost():
    x, y = cloud(50, 3, 0), cloud(50, 3, 1)
    assert_close(exact_gap(x + 1e7, y + 1e7).gap, exact_gap(x, y).gap, rtol=1e-6, atol=1e-8)


def test_stages_add_up():
    staged = Trajectory([
        torch.stack([cloud(20, 6, k) for k in range(2)]),
        torch.stack([cloud(20, 3, k) for k in range(3)])])
    split = action_split(staged, torch.arange(20) % 2)
    alone = [action_split(stage, torch.arange(20) % 2) for stage in staged.stages]
    for row in ("all", "class 0", "class 1"):
        assert_close(torch.tensor(split.parts[row]), sum(torch.tensor(a.parts[row]) for a in alone))
    assert split.parts["stage 2, class 1"] == alone[1].parts["class 1"] and [g.dim for g in split.gaps] == [6, 3]


def test_a_record_of_stages_is_plain_json():
    staged = Trajectory([
        torch.stack([cloud(20, 6, k) for k in range(2)]),
        torch.stack([cloud(20, 3, k) for k in range(3)])])
    record = measure_transport(staged, torch.arange(20) % 2)
    assert json.loads(json.dumps(record)) == record and record["dim"] == [6, 3]
    assert_close(record["stage 1: total"] + record["stage 2: total"], record["all: total"])


# Brenier, McCann, bounds

@quick
@given(seeds, st.integers(10, 40), st.integers(2, 5), st.integers(2, 5))
def test_gradients_of_convex_functions_violate_nothing(seed, n, d, length):
    x = cloud(n, d, seed)
    for y in (x @ positive(d, seed), x.abs().pow(3) * x.sign(), x - 4):
        assert monotonicity(x, y).rate == 0 and cyclical_monotonicity(x, y, length, 200).rate == 0


@quick
@given(seeds, st.integers(6, 20))
def test_pairs_are_counted_one_by_one(seed, n):
    x, y = cloud(n, 3, seed), cloud(n, 3, seed + 1)
    bad = [((y[i] - y[j]) @ (x[i] - x[j]) < 0).item() for i in range(n) for j in range(i)]
    assert_close(monotonicity(x, y).rate, sum(bad) / len(bad))
    drawn = cyclical_monotonicity(x, y, 2, 20_000)
    assert abs(drawn.rate - sum(bad) / len(bad)) < .02   # five standard errors and more


def test_no_gap_means_no_violation():
    x = cloud(30, 2, 0)
    y = cloud(30, 2, 1)
    y = y[optimal_coupling(x, y).target]
    assert exact_gap(x, y).gap == 0 and monotonicity(x, y).rate == 0 and cyclical_monotonicity(x, y, 4).rate == 0


def test_cycles_of_neighbours_are_distinct_neighbours():
    from lap_nb.transport import _draw_cycles
    x = cloud(50, 2, 0)
    for near in (None, 5):
        at = _draw_cycles(x, 4, 500, near, 0)
        assert all(len(set(row)) == 4 for row in at.tolist())
    nearest = torch.cdist(x, x).topk(6, largest=False).indices
    assert all(set(row) <= set(nearest[row[0]].tolist()) for row in at.tolist())


def test_displacement_interpolation_is_recognised_and_an_uneven_clock_is_seen():
    x = cloud(60, 3, 0)
    y = x @ positive(3, 1)
    at = lambda *times: Trajectory(torch.stack([(1 - t) * x + t * y for t in times]))
    even, = mccann(at(0, .25, .5, .75, 1))
    late, = mccann(at(0, .1, .2, .3, 1))
    assert even.distance.max() < 1e-6 and even.detour.max() < 1e-9
    assert late.detour.max() < 1e-9 and late.distance.max() > .4 * late.length
    assert even.n == 60 and len(even.distance) == len(even.detour) == 5


def test_mccann_takes_the_mean_or_the_sum_over_features():
    x, step = cloud(20, 4, 0), torch.tensor([3., 0., 4., 0.])
    traj = Trajectory(torch.stack([x, x + step / 2, x + step]))
    (mean,), (whole,) = mccann(traj, 'mean'), mccann(traj, 'sum')
    assert_close(whole.from_start, torch.tensor([0., 2.5, 5.], dtype=torch.float64))
    assert_close(mean.to_end, torch.tensor([2.5, 1.25, 0.], dtype=torch.float64))


@quick
@given(seeds, st.integers(5, 30), st.integers(1, 4))
def test_the_bounds_are_on_their_sides(seed, n, d):
    x, y = cloud(n, d, seed), cloud(n, d, seed + 1)
    exact = optimal_coupling(x, y).cost
    above, below = entropic_w2(x, y, .2, tolerance=1e-2, reduction="sum"), sliced_w2(x, y, 200, reduction="sum")
    assert above.value >= exact * (1 - 1e-9)
    # six standard errors below the mean
    assert below.interval[0] - (below.value - below.interval[0]) * 2 <= exact * (1 + 1e-9)


def test_entropic_value_converges_to_the_exact_one_and_sliced_is_exact_for_translations():
    x, y = cloud(40, 2, 0), cloud(40, 2, 1)
    exact = optimal_coupling(x, y).cost
    off = [entropic_w2(x, y, e, reduction="sum").value - exact for e in (.5, .1, .02)]
    assert off[0] > off[1] > off[2] >= 0 and off[2] < .02 * exact + .02 * math.log(40) * cost_matrix(x, y).mean()
    moved = sliced_w2(x, x + torch.tensor([3., 4.]), 2000, reduction="sum")
    assert moved.interval[0] <= 25 <= moved.interval[1]


def test_bars_add_up():
    import matplotlib
    matplotlib.use("Agg")
    split = action_split(Trajectory(torch.stack([cloud(20, 2, k) for k in range(3)])))
    for shares, total in ((True, 1.), (False, split.total())):
        ax = plot_splits({"one": split}, shares=shares)
        assert_close(sum(bar.get_width() for bar in ax.patches), total)


# Unusable input

x, y = cloud(6, 2, 0), cloud(6, 2, 1)


@pytest.mark.parametrize("call, message", [
    (lambda: exact_gap(x, y[:5]), "start has 6 points, end 5"),
    (lambda: exact_gap(x, cloud(6, 3, 1)), "start has 2 features, end 3"),
    (lambda: exact_gap(x[:0], y[:0]), "expected at least 2 points"),
    (lambda: exact_gap(x[:1], y[:1]), "one point has only one matching"),
    (lambda: exact_gap(x[:, :0], y[:, :0]), "one feature or more"),
    (lambda: exact_gap(x[:, 0], y[:, 0]), "expected a real tensor"),
    (lambda: exact_gap(x.numpy(), y), "start is an array"),
    (lambda: exact_gap(x, torch.where(y == y[2], math.inf, y)), "end has 1 of 6 points that are not finite, first at 2"),
    (lambda: exact_gap(x, y, torch.full((6,), .2)), "weights sums to 1.2, expected 1"),
    (lambda: exact_gap(x, y, torch.tensor([2., -1, 0, 0, 0, 0])), "1 weights that are negative"),
    (lambda: exact_gap(x, y, torch.full((6,), math.nan)), "6 weights that are negative or not a number"),
    (lambda: exact_gap(x, y, torch.full((5,), .2)), r"weights has shape \(5,\), expected \(6,\)"),
    (lambda: exact_gap(x, y, level=95), "level is 95"),
    (lambda: exact_gap(x, y, level=1), "level is 1"),
    (lambda: exact_gap(x, y, level=0), "level is 0"),
    (lambda: exact_gap(x, y, resamples=0), "resamples is 0"),
    (lambda: exact_gap(x, y, reduction="median"), "reduction is 'median', expected one of 'mean', 'sum'"),
    (lambda: exact_gap(x, y, solver="sinkhorn"), "expected one of 'auto', 'assignment', 'simplex'"),
    (lambda: optimal_coupling(x, y[:5], solver="assignment"), "use solver='simplex'"),
    (lambda: action_split(Trajectory(torch.stack([x, y])), torch.zeros(5)), r"labels have shape \(5,\), expected one "
                                                                            r"for each sample: \(6,\)"),
    (lambda: gap_curve(x, y, sizes=[1, 4]), "expected from 2 to the 6"),
    (lambda: gap_curve(x, y[:5]), "start has 6 points, end 5"),
    (lambda: monotonicity(x, y[:5]), "start has 6 points, end 5"),
    (lambda: cyclical_monotonicity(x, y, 7), "there are 6 samples, expected at least the 7"),
    (lambda: cyclical_monotonicity(x, y, 1), "length is 1, expected a whole number, from 2"),
    (lambda: cyclical_monotonicity(x, y, cycles=0), "cycles is 0"),
    (lambda: cyclical_monotonicity(x, y, near=6), "expected from 2 to 5"),
    (lambda: mccann(Trajectory(torch.stack([x, y])), "max"), "reduction is 'max', expected one of 'mean', 'sum'"),
    (lambda: sliced_w2(x, cloud(6, 3, 0)), "x has 2 features, y 3"),
    (lambda: sliced_w2(x, y, 1), "directions is 1, expected a whole number, from 2"),
    (lambda: entropic_w2(x, y, -1), "epsilon is -1"),
    (lambda: entropic_w2(x, y, 0), "epsilon is 0"),
])
def test_unusable_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_a_cycle_may_take_all_samples():
    assert cyclical_monotonicity(x, y, 6, cycles=5).length == 6


def test_two_directions_are_enough_for_a_bound():
    bound = sliced_w2(x, y, 2)
    assert bound.interval[0] < bound.value < bound.interval[1]


@pytest.mark.parametrize('scale', [1e-3, 1e4])
def test_the_simplex_proves_its_plan_at_any_scale(scale):
    start, end, weights = cloud(40, 3, 0), cloud(40, 3, 1), torch.arange(1, 41.) / 820
    want = optimal_coupling(start, end, weights, solver='simplex').cost
    assert optimal_coupling(scale * start, scale * end, weights, solver='simplex').cost == pytest.approx(
        scale**2 * want, rel=1e-9
    )


def test_too_large_a_cloud_is_refused_before_it_is_allocated():
    many = torch.zeros(1, 1).expand(2_000_000, 1)
    # one matrix; two for an assignment
    for call, size in ((cost_matrix, "2.98"), (exact_gap, "5.96"), (optimal_coupling, "5.96")):
        with pytest.raises(MemoryError, match=rf"2,000,000 by 2,000,000 points need {size}e\+04 GiB"): call(many, many)


def test_a_solver_that_does_not_converge_is_an_error(recwarn):
    with pytest.raises(RuntimeError, match="did not reach an optimum in 1 iterations"):
        optimal_coupling(x, y, solver="simplex", max_iter=1)
    assert not recwarn.list


def test_sinkhorn_that_does_not_converge_is_an_error(recwarn):
    with pytest.raises(RuntimeError, match="raise max_iter or epsilon"): entropic_w2(x, y, .001, max_iter=2)
    assert not recwarn.list


def test_a_matching_that_is_not_optimal_is_an_error():
    from lap_nb.transport import _potentials
    cost = cost_matrix(x, x)
    with pytest.raises(RuntimeError, match="not optimal"): _potentials(cost, torch.arange(6).roll(1))


def trained_like(n, d=16, seed=0):
    "Starts, and ends that a network with ten classes might make: far away, on a few rays, with noise."
    x, rays = cloud(n, d, seed), 10 * cloud(10, d, seed + 1)
    return x, x + rays[torch.arange(n) % 10] * (1 + x[:, :1].abs()) + .3 * cloud(n, d, seed + 2)


CLOUDS = {
    "trained": lambda: trained_like(600), "independent, plane": lambda: (cloud(600, 2, 0), cloud(600, 2, 1)),
    "independent, 64 dimensions": lambda: (cloud(300, 64, 0), cloud(300, 64, 1)), "quarter turn": lambda:
    (cloud(500, 2, 0), cloud(500, 2, 0).flip(1) * torch.tensor([1., -1.])), "heavy tails": lambda:
    (torch.tan(cloud(400, 3, 0)), torch.tan(cloud(400, 3, 1))), "line": lambda:
    (cloud(400, 1, 0), cloud(400, 1, 1) ** 3), "twins": lambda:
    (cloud(60, 2, 0).repeat(8, 1), cloud(40, 2, 1).repeat(12, 1)), "grid": lambda: (g := torch.cartesian_prod(
        torch.arange(20.), torch.arange(20.)), g[torch.randperm(400, generator=torch.Generator().manual_seed(0))]),
    "all equal": lambda: (torch.zeros(200, 2), torch.ones(200, 2)), "tiny": lambda:
    (1e-150 * cloud(100, 2, 0), 1e-150 * cloud(100, 2, 1)), "huge": lambda:
    (1e100 * cloud(100, 2, 0), 1e100 * cloud(100, 2, 1)), "all one point": lambda:
    (torch.zeros(50, 2), torch.zeros(50, 2)), "an outlier": lambda:
    (cloud(300, 4, 0).index_fill(0, torch.tensor(7), 1e6), cloud(300, 4, 1)), "far apart": lambda:
    (cloud(300, 4, 0), 1e5 + cloud(300, 4, 1)), "one": lambda: (cloud(1, 2, 0), cloud(1, 2, 1)), }


@pytest.mark.parametrize("name", CLOUDS)
def test_every_matching_is_scipys_and_carries_a_dense_proof(name):
    x, y = CLOUDS[name]()
    best, cost = optimal_coupling(x, y), cost_matrix(x, y)
    rows, columns = linear_sum_assignment(cost.numpy())
    unit = cost.max().item() or 1.
    assert_close(best.cost / unit, cost[rows, columns].mean().item() / unit, rtol=1e-10, atol=1e-12)
    assert sorted(best.target.tolist()) == list(range(len(x)))
    assert ((best.f[:, None] + best.g - cost) / unit).max() < 1e-12 and abs(
        (best.f.mean() + best.g.mean()).item() - best.cost
    ) < 1e-12 * unit


@pytest.mark.parametrize("guess", ["none", "random", "reversed", "not a number"])
def test_a_bad_guess_of_the_prices_costs_time_and_never_the_result(guess, monkeypatch):
    x, y = trained_like(200)
    n, right = len(x), optimal_coupling(x, y)
    f, g = dict(none=(torch.zeros(n), torch.zeros(n)), random=(3 * cloud(n, 1, 5)[:, 0], 3 * cloud(n, 1, 6)[:, 0]),
                reversed=(-right.f, -right.g)).get(guess, (torch.full((n,), math.nan),) * 2)
    asked = []
    monkeypatch.setattr(transport, "_sharp", lambda *args: asked.append(args) or (f.double(), g.double()))
    if guess == "not a number":
        with pytest.raises(ValueError): optimal_coupling(x, y)
    else: assert_close(optimal_coupling(x, y).cost, right.cost, rtol=1e-10, atol=0)
    assert asked


# In a process of its own: memory that other tests have given back may be used again, and would not count.
MEASURE = """
import sys, torch
from lap_nb.transport import exact_gap
x, y = torch.load(sys.argv[1])
exact_gap(x[:50], y[:50])   # imports
memory = lambda what: next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(what))
open("/proc/self/clear_refs", "w").write("5")
before = memory("VmRSS")
exact_gap(x, y)
print((memory("VmHWM") - before) / (8 * len(x) ** 2))
"""


@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="needs the peak of the process' memory, "
                                                                            "which Linux can reset")
def test_no_more_memory_than_two_matrices_of_costs(tmp_path):
    torch.save(trained_like(2500, 64), tmp_path / "clouds.pt")
    found = subprocess.run([sys.executable, "-c", MEASURE, tmp_path / "clouds.pt"], capture_output=True, text=True,
                           check=True).stdout
    assert .9 < float(found) < 2, f"{found} matrices"


def test_twins_are_counted_and_match_themselves():
    twins = torch.cat([x, x])
    gap = exact_gap(twins, 2 * twins)
    assert gap.gap == 0 and gap.twins == 6 and gap.self_share == 1 and "6 samples start where another starts" in gap.warning


def test_nothing_moves():
    gap = exact_gap(x, x)
    assert (gap.displacement, gap.gap, gap.relative, gap.self_share) == (0, 0, 0, 1)
    assert action_split(Trajectory(torch.stack([x, x]))).shares() == (0, 0, 0)


def test_a_class_of_one_sample_is_noted():
    split = action_split(Trajectory(torch.stack([x, y])), torch.tensor([0, 0, 0, 0, 0, 1]))
    assert split.parts["class 1"][1] == 0 and "Classes [1] have one sample" in split.warning


# Faults that the tests above let pass, found by `make mutants`

@pytest.mark.parametrize('seed', range(3))
def test_sensitivity_is_a_share_by_brute_force(seed):
    """Displacements dealt out by the seed; a sample counts if some exchange of its end with another's shortens the
    whole."""
    x = cloud(12, 2, seed)
    y = x + .4 * cloud(12, 2, seed + 50)
    z = x + (y - x)[torch.randperm(12, generator=torch.Generator().manual_seed(seed))]
    pays = [
        any(
            (x[i] - z[j]).square().sum() + (x[j] - z[i]).square().sum()
            < (x[i] - z[i]).square().sum() + (x[j] - z[j]).square().sum() - 1e-9
            for j in range(12)
        )
        for i in range(12)
    ]
    assert 0 < sum(pays) < 12
    assert exact_gap(x, y, seed=seed).sensitivity == pytest.approx(sum(pays) / 12)


def test_the_fewest_neighbours_that_make_a_cycle():
    x = cloud(20, 2, 0)
    assert cyclical_monotonicity(x, 2 * x + 1, length=3, near=2, cycles=50).rate == 0
    with pytest.raises(ValueError, match='from 2 to 19'):
        cyclical_monotonicity(x, 2 * x + 1, length=3, near=1, cycles=50)


def test_record_measures_mccann_against_the_way_walked():
    x, u, v = cloud(8, 3, 0), cloud(8, 3, 1), cloud(8, 3, 2)
    traj = Trajectory(torch.stack([x, x + .1 * u, x + .1 * v]))
    walk, = mccann(traj)
    record = measure_transport(traj)
    assert walk.length < .5 and walk.distance.max() > 0
    assert record['mccann_distance'] == [pytest.approx((walk.distance.max() / walk.length).item())]
    assert record['mccann_detour'] == [pytest.approx((walk.detour.max() / walk.length).item())]


def test_where_nothing_moves_there_is_nothing_to_judge():
    for points in (torch.ones(30, 7), torch.randn(30, 7, generator=torch.Generator().manual_seed(0))):
        gap = exact_gap(points, points)
        assert gap.displacement == gap.gap == gap.relative == 0 and gap.interval == (0, 0) and not gap.slack.any()
        assert gap.warning.startswith("Nothing moves") and "too few" not in gap.warning


# Rounding: far points, common ways, tiny and huge units, against exact arithmetic

def fractions(x): return [[Fraction(v) for v in row] for row in x.tolist()]


def exactly(x, y):
    "Displacement and W2^2 summed over features, and the share of pairs in the wrong order, in exact arithmetic."
    X, Y, n = fractions(x), fractions(y), len(x)
    cost = [[sum((a - b) ** 2 for a, b in zip(p, q)) for q in Y] for p in X]
    wrong = sum(
        sum((a - b) * (c - d) for a, b, c, d in zip(X[i], X[j], Y[i], Y[j])) < 0 for i in range(n) for j in range(i))
    return (
        sum(cost[i][i] for i in range(n)) / n,
        min(sum(cost[i][p[i]] for i in range(n)) for p in permutations(range(n))) / n,
        wrong / (n * (n - 1) / 2),
    )


def spoiled(kind, seed):
    "Six samples and their ends, with what rounding does not like."
    x, y = cloud(6, 2, seed), cloud(6, 2, seed + 1)
    size = 10. ** random.Random(seed).uniform(5, 12)
    if kind == "one point far":
        x[0] = y[0] = size
    elif kind == "two points far":
        x[0], x[1], y[0], y[1] = size, size + 1, size + 2, size
    elif kind == "far on both sides":
        x[0], y[3], x[1], y[1] = size, size, -size, 1 - size
    elif kind == "far starts":
        x[:2] = size * x[:2]
    elif kind == "a far end":
        y[4] = size
    elif kind == "all shifted":
        x, y = x + size, y + size
    elif kind == "ends shifted":
        y = y + size
    elif kind == "two clumps":
        x[3:], y[:3] = x[3:] + size, y[:3] + size
    elif kind == "tiny steps":
        y = x + y / size
    elif kind == "tiny":
        x, y = x / size**4, y / size**4
    elif kind == "huge":
        x, y = x * size**4, y * size**4
    elif kind == "all sizes":
        x, y = (
            x * torch.logspace(-8, 8, 6, dtype=x.dtype)[:, None],
            y * torch.logspace(-8, 8, 6, dtype=x.dtype)[:, None],
        )
    return x, y


KINDS = ("one point far", "two points far", "far on both sides", "far starts", "a far end", "all shifted",
         "ends shifted", "two clumps", "tiny steps", "tiny", "huge", "all sizes")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_rounding_against_exact_arithmetic(kind, seed):
    x, y = spoiled(kind, seed)
    moved, least, wrong = exactly(x, y)
    for solver in ("assignment", "simplex"):
        gap = exact_gap(x, y, reduction="sum", solver=solver)
        assert gap.displacement == pytest.approx(float(moved), rel=1e-13) and gap.w2 == pytest.approx(
            float(least), rel=1e-9)
        assert gap.gap == pytest.approx(float(moved - least), rel=1e-7, abs=1e-14 * float(moved))
        assert gap.interval[0] <= gap.gap * (1 + 1e-9) and gap.gap <= gap.interval[1] * (1 + 1e-9)
    assert monotonicity(x, y).rate == wrong
    assert cyclical_monotonicity(x, y, 2, cycles=3000).rate == pytest.approx(wrong, abs=.06)
    best = optimal_coupling(x, y)
    assert best.cost == pytest.approx(float(least), rel=1e-12)
    assert ((best.f[:, None] + best.g - cost_matrix(x, y))
            <= 1e-12 * (best.f.abs()[:, None] + best.g.abs() + cost_matrix(x, y))).all()
    assert sliced_w2(x, y, 50, reduction="sum").interval[0] <= float(least) * (1 + 1e-12)
    for row, exact in zip(cost_matrix(x, y).tolist(), fractions(x)):
        for found, end in zip(row, fractions(y)):
            assert found == pytest.approx(float(sum((a - b) ** 2 for a, b in zip(exact, end))), rel=1e-7)


@pytest.mark.parametrize("far", [1e3, 1e7, 1e9, 1e12, 1e100])
def test_a_far_point_at_rest_changes_only_the_mean(far):
    x, y = cloud(60, 2, 0), cloud(60, 2, 1)
    alone = exact_gap(x[1:], y[1:])
    x[0] = y[0] = far
    gap = exact_gap(x, y)
    for name in ("displacement", "w2", "gap"):
        assert getattr(gap, name) == pytest.approx(getattr(alone, name) * 59 / 60, rel=1e-12)
    assert gap.interval[0] > .5 * gap.gap and gap.sensitivity > .9
    assert monotonicity(x, y).rate == exactly_wrong(x, y) > .4


def exactly_wrong(x, y):
    X, Y, n = fractions(x), fractions(y), len(x)
    return sum(
        sum((a - b) * (c - d) for a, b, c, d in zip(X[i], X[j], Y[i], Y[j])) < 0 for i in range(n) for j in range(i)
    ) / (n * (n - 1) / 2)


MEASURES = dict(
    gap=lambda x, y: exact_gap(x, y).gap, w2=lambda x, y: exact_gap(x, y).w2,
    displacement=lambda x, y: exact_gap(x, y).displacement, coupling=lambda x, y: optimal_coupling(x, y).cost,
    unequal=lambda x, y: optimal_coupling(x[:-3], y).cost, sliced=lambda x, y: sliced_w2(x, y, 50).value,
    entropic=lambda x, y: entropic_w2(x, y, .2).value,
    path=lambda x, y: action_split(Trajectory(torch.stack([x, x + (y.flip(0) - x) / 3, y]))).parts["all"][2],
    mccann=lambda x, y: mccann(Trajectory(torch.stack([x, x + (y.flip(0) - x) / 3, y])))[0].detour.max().item() ** 2)


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("power", [-400, -100, -66, 66, 100, 400])
def test_units_that_are_powers_of_two_change_no_digit(name, power):
    x, y = cloud(20, 3, 0), cloud(20, 3, 1)
    assert MEASURES[name](x * 2.0**power, y * 2.0**power) == pytest.approx(MEASURES[name](x, y) * 4.0**power, rel=1e-13)


@pytest.mark.parametrize("name", MEASURES)
def test_a_shift_of_all_changes_nothing_but_the_rounding_of_the_points(name):
    x, y = cloud(20, 3, 0), cloud(20, 3, 1)
    assert MEASURES[name](x + 1e7, y + 1e7) == pytest.approx(MEASURES[name](x, y), rel=1e-6)


def test_the_distance_of_the_means_is_added_to_that_of_the_centred_clouds():
    x, y, b = cloud(30, 3, 0), cloud(30, 3, 1), torch.tensor([1e7, 0, -3e6], dtype=torch.float64)
    x, y = x - x.mean(0), y - y.mean(0)
    still = exact_gap(x, y, reduction="sum")
    moved = exact_gap(x, y + b, reduction="sum")
    assert moved.gap == pytest.approx(still.gap, rel=1e-6) and moved.w2 == pytest.approx(
        still.w2 + b.square().sum().item(), rel=1e-13)
    for bound in (sliced_w2, entropic_w2):
        assert bound(x, y + b, reduction="sum").value == pytest.approx(
            bound(x, y, reduction="sum").value + b.square().sum().item(), rel=1e-13)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_narrow_points_are_measured_as_the_numbers_they_are(dtype):
    x, y = cloud(30, 2, 0).to(dtype), (300 * cloud(30, 2, 1)).to(dtype)   # squares that half precision does not hold
    for name, measure in MEASURES.items():
        if name not in ("path", "mccann"): assert measure(x, y) == measure(x.double(), y.double()), name
    assert monotonicity(x, y) == monotonicity(x.double(), y.double())


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_that_float64_does_not_hold_are_refused_and_rates_are_not(scale):
    x, y = cloud(9, 2, 0), cloud(9, 2, 1)
    for measure in (exact_gap, optimal_coupling, cost_matrix, sliced_w2, entropic_w2):
        with pytest.raises(ValueError, match="squared distances are of the order of 1e.*(divide|multiply) the points"):
            measure(scale * x, scale * y)
    assert monotonicity(scale * x, scale * y) == monotonicity(x, y) and cyclical_monotonicity(
        scale * x, scale * y
    ) == cyclical_monotonicity(x, y)
    assert_close(gap_curve(scale * x, scale * y).gaps, gap_curve(x, y).gaps)


def test_straightness_of_a_record_does_not_vanish_in_single_precision():
    traj = torch.stack([cloud(9, 2, k) for k in range(4)]).float()
    assert_close(
        measure_transport(Trajectory(1e-30 * traj))["straightness"],
        measure_transport(Trajectory(traj))["straightness"], rtol=1e-5, atol=0)


def test_a_start_far_from_the_best_is_mended_by_the_prices_found(monkeypatch):
    "SciPy's sums may lose a small cost; here its first answer is a wrong one altogether."
    import scipy.optimize
    x, y, answers = cloud(50, 2, 0), cloud(50, 2, 1), []
    def wrong_first(cost):
        answers.append(linear_sum_assignment(cost))
        return (answers[0][0], answers[0][1][::-1].copy()) if len(answers) == 1 else answers[-1]
    want = optimal_coupling(x, y).cost
    monkeypatch.setattr(scipy.optimize, "linear_sum_assignment", wrong_first)
    assert optimal_coupling(x, y).cost == pytest.approx(want, rel=1e-13) and len(answers) > 1


# Any arguments: what is documented, and no silent nan

ODD = [None, "a", -1, 0, 1.5, math.nan, math.inf, 10 ** 30, True, [], {}, torch.tensor([1, 2]), b"x", object(), 1 + 2j]
NAMED = {
    exact_gap: ("weights", "reduction", "resamples", "level", "seed", "solver", "max_bytes"),
    optimal_coupling: ("a", "b", "solver", "max_iter", "max_bytes"),
    cost_matrix: ("max_bytes",),
    gap_curve: ("sizes", "repeats", "seed"),
    monotonicity: ("level",),
    cyclical_monotonicity: ("length", "cycles", "near", "level", "seed"),
    sliced_w2: ("directions", "seed", "reduction"),
    entropic_w2: ("epsilon", "max_iter", "tolerance", "reduction", "max_bytes"),
}
POINTS = {
    "zero features": torch.zeros(5, 0),
    "zero points": torch.zeros(0, 2),
    "no axis of features": torch.zeros(5),
    "nan": torch.full((5, 2), math.nan),
    "infinite": torch.full((5, 2), math.inf),
    "complex": torch.zeros(5, 2, dtype=torch.complex64),
    "sparse": torch.eye(5, 2).to_sparse(),
    "meta": torch.zeros(5, 2, device="meta"),
    "nested": torch.nested.nested_tensor([torch.zeros(2), torch.zeros(3)]),
    "list": [[1.0, 2.0]] * 5,
    "nothing": None,
}


@pytest.mark.parametrize("function", NAMED, ids=lambda f: f.__name__)
def test_odd_arguments_and_points_are_explained(function):
    x, y = cloud(5, 2, 0), cloud(5, 2, 1)
    tried = [((points, y), {}) for points in POINTS.values()] + [((x, points), {}) for points in POINTS.values()] + [
        ((x, y), {n: v}) for n in NAMED[function] for v in ODD]
    refused = 0
    for args, settings_ in tried:
        try:
            found = function(*args, **settings_)
        except (ValueError, MemoryError) as error:
            refused += 1
            assert any(word in str(error) for word in ("expected", "not finite", "free", "use solver")), (
                settings_,
                str(error),
            )
        except RuntimeError as error:
            assert "raise max_iter" in str(error)
        else:
            numbers = (
                [v for v in vars(found).values() if isinstance(v, (float, torch.Tensor))]
                if not isinstance(found, torch.Tensor)
                else [found]
            )
            assert not any(math.isnan(v) if isinstance(v, float) else v.to_dense().isnan().any() for v in numbers), (
                settings_
            )
    assert refused > len(tried) / 2


@pytest.mark.parametrize("function", [sliced_w2, entropic_w2, exact_gap, lambda x, y, reduction: mccann(Trajectory(torch.stack([x, y])), reduction),
                                      lambda x, y, reduction: action_split(Trajectory(torch.stack([x, y])), None, reduction)])
@pytest.mark.parametrize("reduction", ["average", "Mean", "", None, 1, ["mean"]])
def test_other_reductions_are_refused_everywhere(function, reduction):
    with pytest.raises(ValueError, match="""reduction is .*, expected .*['"]mean['"].*['"]sum['"]"""):
        function(x, y, reduction=reduction)


@pytest.mark.parametrize("points", [torch.arange(10).view(5, 2), torch.arange(10, dtype=torch.uint8).view(5, 2), torch.randn(5, 2, requires_grad=True), torch.randn(2, 5).T, torch.ones(1, 2).expand(5, 2)])
def test_whole_numbers_graphs_and_views_are_points(points):
    assert exact_gap(points, 2 * points + 1).gap == 0 and optimal_coupling(points[:1], points[1:2]).cost >= 0


@pytest.mark.parametrize("scale", [1., 1e30, 1e-30])
def test_all_samples_may_end_in_one_place(seed, scale):
    start = torch.randn(12, 3, dtype=torch.float64) * scale
    gap = exact_gap(start, torch.zeros(12, 3, dtype=torch.float64), reduction="sum")
    assert gap.gap == 0 and gap.w2 == pytest.approx(start.square().sum(1).mean().item())


@pytest.mark.parametrize("far, dtype", [(0., torch.float16), (6e4, torch.float16)] + [(far, dtype) for far in (0., 1e7, 1e12, 1e25) for dtype in (torch.float32, torch.float64)])
def test_bounds_hold_beside_a_far_point(far, dtype):
    g = torch.Generator().manual_seed(1)
    x, y = torch.randn(40, 3, generator=g).to(dtype), torch.randn(40, 3, generator=g).to(dtype)
    x[0] = y[7] = far
    true = exact_gap(x, y).w2
    lower, upper = sliced_w2(x, y), entropic_w2(x, y)
    assert lower.value <= true * (1 + 1e-9) and true <= upper.value * (1 + 1e-9)
    for bound in (lower, upper): assert 0 <= bound.interval[0] <= bound.value <= bound.interval[1] < math.inf
    assert far or lower.interval[1] - lower.interval[0] < .2 * lower.value


@pytest.mark.parametrize("of", [np.float32, np.float64, torch.tensor, Fraction, np.array])
def test_settings_are_numbers_of_any_library(of):
    x, y = torch.randn(2, 12, 2, generator=torch.Generator().manual_seed(0)).unbind()
    for f in (exact_gap, monotonicity, cyclical_monotonicity):
        assert repr(f(x, y, level=of(.5))) == repr(f(x, y, level=.5))
    assert type(exact_gap(x, y, level=of(.5)).level) is float
    assert entropic_w2(x, y, epsilon=of(0.5), tolerance=of(0.125), max_bytes=of(1e6)) == entropic_w2(
        x, y, epsilon=0.5, tolerance=0.125
    )


def _on_a_line(kind, n, generator):
    "Starts and ends with one feature."
    x, y = torch.randn(2, n, 1, dtype=torch.float64, generator=generator)
    return dict(
        permuted=lambda: (x, x[torch.randperm(n, generator=generator)]), drawn=lambda: (x, y),
        ties=lambda: (x.round(), y.round()), far=lambda: (x, y * 1e-7 + 1e7), huge=lambda: (x * 1e75, y * 1e75),
        one_start=lambda: (torch.zeros_like(x), y.exp() ** 3), outlier=lambda: (x, torch.cat([y[1:], y[:1] * 1e6])))[kind]()


@pytest.mark.parametrize("kind", ["permuted", "drawn", "ties", "far", "huge", "one_start", "outlier"])
@pytest.mark.parametrize("n", [1, 2, 3, 60])
def test_on_a_line_the_order_is_the_matching(kind, n, monkeypatch):
    "As cheap as SciPy's, with prices that prove it, and without SciPy."
    x, y = _on_a_line(kind, n, torch.Generator().manual_seed(n))
    cost = (x - y.T).square()
    best = cost[linear_sum_assignment(cost.numpy())].mean().item()
    monkeypatch.setattr("scipy.optimize.linear_sum_assignment", None)
    found = optimal_coupling(x, y)
    assert found.cost == pytest.approx(best, rel=1e-9, abs=0)
    assert sorted(found.target.tolist()) == list(range(n))
    assert (found.f[:, None] + found.g - cost <= 1e-9 * cost.max()).all()
    assert (found.f + found.g).sum().isfinite() if n == 1 else (found.f.mean() + found.g.mean()).item() == pytest.approx(
        best, rel=1e-6, abs=1e-9 * cost.max().item())

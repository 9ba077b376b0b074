"Flows and energies: what must hold for any network, beyond the examples of the chapters."
import os

import numpy as np
import pytest
import torch
from torch import nn

from lap_nb.dynamics import Flow, ResidualBlock, StagedFlow, Trajectory, residual_blocks
from lap_nb.kinetic import EnergyMeter, block_energies, kinetic_energy, relative_energy
from lap_nb.nets import conv_net, dense_net, init_velocities_, staged_net, StochasticDepth


def some_flow(h=1., K=5, dim=7):
    torch.manual_seed(0)
    return init_velocities_(dense_net(dim, 3, K=K, h=h), .6).flow


@pytest.mark.parametrize("h", [.1, 1., 2.])
def test_cauchy_schwarz_bounds_the_squared_displacement(h):
    traj = some_flow(h).trajectory(torch.randn(300, 7))
    bound = traj.K * traj.h * kinetic_energy(traj, "sum")
    assert (traj.displacement() ** 2 <= traj.path_length() ** 2 * (1 + 1e-5)).all()
    assert (traj.path_length() ** 2 <= bound * (1 + 1e-5)).all()


def test_straight_paths_at_constant_speed_reach_the_bound():
    start, end = torch.randn(50, 3), torch.randn(50, 3)
    t = torch.linspace(0, 1, 8, dtype=torch.float64).reshape(-1, 1, 1)
    traj = Trajectory((1 - t) * start + t * end, h=1 / 7)
    torch.testing.assert_close(traj.displacement() ** 2, kinetic_energy(traj, "sum"))
    torch.testing.assert_close(traj.straightness(), torch.ones(50, dtype=torch.float64))


def test_energy_is_invariant_under_rotation_and_translation():
    torch.manual_seed(1)
    traj = some_flow().trajectory(torch.randn(40, 7))
    rotation, _ = torch.linalg.qr(torch.randn(7, 7))
    moved = Trajectory(traj.x @ rotation + torch.randn(7))
    torch.testing.assert_close(kinetic_energy(moved), kinetic_energy(traj), rtol=1e-4, atol=1e-5)


def test_meter_agrees_with_trajectory_for_any_step_and_shape():
    torch.manual_seed(0)
    conv = Flow([nn.Conv2d(2, 2, 3, padding=1) for _ in range(3)], h=.25)
    x = torch.randn(6, 2, 5, 5)
    for reduction in ("mean", "sum"):
        with EnergyMeter(conv, reduction=reduction) as meter:
            conv(x)
            torch.testing.assert_close(meter.take(), block_energies(conv.trajectory(x), reduction).mean(1))


def test_energies_of_half_precision_do_not_overflow():
    traj = Trajectory(torch.tensor([0., 300.]).reshape(2, 1, 1).half())
    assert kinetic_energy(traj).item() == 90_000


def test_relative_energy_ignores_the_scale_of_the_features():
    traj = some_flow().trajectory(torch.randn(40, 7))
    torch.testing.assert_close(relative_energy(Trajectory(traj.x * 50)), relative_energy(traj))


def test_meter_leaves_no_hook_and_nothing_in_evaluation():
    flow = some_flow()
    with EnergyMeter(flow) as meter:
        flow.eval()(torch.randn(2, 7))
        with pytest.raises(RuntimeError, match="energies of 0 blocks"): meter.take()
    assert not any(m._forward_hooks for m in flow.modules())


def test_named_blocks_can_be_measured_in_any_module():
    class Foreign(nn.Module):
        def __init__(self):
            super().__init__()
            self.mix = nn.Linear(4, 4)
        def forward(self, x): return x + self.mix(x)
    foreign = Foreign()
    with pytest.raises(ValueError, match="no residual block found in Foreign"): EnergyMeter(foreign)
    with EnergyMeter(foreign, blocks={"all": foreign}) as meter:
        x = torch.randn(5, 4)
        out = foreign(x)
        torch.testing.assert_close(meter.take()[0], (out - x).square().mean())


def test_empty_set_of_blocks_is_refused():
    with pytest.raises(ValueError, match="blocks is empty"): EnergyMeter(some_flow(), blocks={})


@pytest.mark.parametrize("h", [0, -1, float("nan")])
def test_steps_must_be_positive(h):
    with pytest.raises(ValueError, match="step h is .*, expected a finite number above 0: use h=1"):
        ResidualBlock(nn.Identity(), h)


@pytest.mark.parametrize("shape", [(1, 3, 2), (4, 0, 2), (4, 3)])
def test_trajectories_need_two_positions_of_some_samples(shape):
    with pytest.raises(ValueError, match="positions have shape"): Trajectory(torch.zeros(shape))


def test_flow_without_velocity_and_negative_gain_are_refused():
    with pytest.raises(ValueError, match="at least one velocity"): Flow([])
    with pytest.raises(ValueError, match="gain is -1"): init_velocities_(dense_net(2, 2), -1)


def test_init_touches_the_velocities_only():
    net = dense_net(3, 2, encoder=nn.Linear(5, 3))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    init_velocities_(net, .5)
    same = {k for k, v in net.state_dict().items() if torch.equal(v, before[k])}
    assert same == {"encoder.weight", "encoder.bias", "head.weight", "head.bias"}
    assert len(residual_blocks(net)) == 9


# Euler's method

def linear_flow(A, K, T=1.):
    field = nn.Linear(len(A), len(A), bias=False, dtype=A.dtype)
    field.weight.data = A.clone()
    return Flow([field] * K, h=T / K)


@pytest.mark.parametrize("seed", range(5))
def test_linear_fields_converge_to_the_matrix_exponential_at_order_one(seed):
    g = torch.Generator().manual_seed(seed)
    A, x = torch.randn(4, 4, generator=g, dtype=torch.float64), torch.randn(50, 4, generator=g, dtype=torch.float64)
    exact = x @ torch.linalg.matrix_exp(.7 * A).T
    errors = torch.stack([(linear_flow(A, K, .7)(x) - exact).norm() for K in (100, 200, 400, 800)])
    order = (errors[:-1] / errors[1:]).log2()
    assert errors[-1] < .01 * exact.norm() and ((order - 1).abs() < .1).all()


@pytest.mark.parametrize("K", [1, 7, 40])
def test_euler_rotation_spirals_out_at_the_known_rate(K):
    A, x = torch.tensor([[0., -3.], [3., 0.]], dtype=torch.float64), torch.randn(20, 2, dtype=torch.float64)
    traj = linear_flow(A, K).trajectory(x)
    growth = (1 + (3 / K) ** 2) ** .5
    torch.testing.assert_close(traj.x.norm(dim=2),
                               x.norm(dim=1) * growth ** torch.arange(K + 1, dtype=torch.float64).unsqueeze(1))
    torch.testing.assert_close(traj.turning_angles(), torch.full((K - 1, 20), 3 / K, dtype=torch.float64).arctan())


def test_constant_fields_are_exact_for_any_step():
    class Constant(nn.Module):
        def forward(self, x): return torch.tensor([1., -2.]).expand_as(x)

    for K in (1, 3, 50):
        traj = Flow([Constant()] * K, h=2 / K).trajectory(torch.zeros(4, 2))
        torch.testing.assert_close(traj.x[-1], torch.tensor([2., -4.]).expand(4, 2))
        torch.testing.assert_close(traj.straightness(), torch.ones(4))


class Negated(nn.Module):
    def __init__(self, field): super().__init__(); self.field = field
    def forward(self, x): return -self.field(x)


def test_negated_velocities_lead_back_to_first_order():
    torch.manual_seed(0)
    field, x = nn.Sequential(nn.Linear(3, 16), nn.Tanh(),
                             nn.Linear(16, 3)).double(), torch.randn(30, 3, dtype=torch.float64)
    missed = []
    for K in (50, 100, 200, 400):
        there = Flow([field] * K, h=1 / K)
        missed.append((Flow([Negated(field)] * K, h=1 / K)(there(x)) - x).norm())
    missed = torch.stack(missed)
    assert (((missed[:-1] / missed[1:]).log2() - 1).abs() < .05).all()


def test_log_density_changes_by_the_divergence_to_first_order():
    torch.manual_seed(0)
    field, x = nn.Sequential(nn.Linear(2, 16), nn.Tanh(),
                             nn.Linear(16, 2)).double(), torch.randn(10, 2, dtype=torch.float64)
    jacobian = torch.func.vmap(torch.func.jacrev(field))
    gaps = []
    for K in (50, 100, 200):
        flow = Flow([field] * K, h=1 / K)
        logdet = torch.func.vmap(torch.func.jacrev(flow))(x).logdet()
        divergence = sum(torch.func.vmap(torch.trace)(jacobian(at)) / K for at in flow.trajectory(x).x[:-1])
        gaps.append((logdet - divergence).abs().max())
    assert gaps[0] < .1 and all(abs(a / b - 2) < .1 for a, b in zip(gaps, gaps[1:]))


# Refinement

def test_refine_interpolates_and_coarsen_undoes_it():
    flow = some_flow(h=.5)
    fine = flow.refine()
    assert len(fine.blocks) == 10 and fine.h == .25
    weights = [b.velocity[0].weight for b in flow.blocks]
    for k in range(5):
        torch.testing.assert_close(fine.blocks[2 * k].velocity[0].weight, weights[k], rtol=0, atol=0)
        torch.testing.assert_close(fine.blocks[2 * k + 1].velocity[0].weight, (weights[k] + weights[min(k + 1, 4)]) / 2)
    again = fine.coarsen()
    assert again.h == flow.h
    for (name, a), (_, b) in zip(flow.state_dict().items(), again.state_dict().items()): assert torch.equal(a, b), name


def test_refine_shares_nothing_and_interpolates_buffers():
    flow = conv_net((1, 8, 8), 3, K=2, width=4).flow
    flow.blocks[1].velocity[0].running_mean.fill_(2.)
    flow.blocks[1].velocity[0].num_batches_tracked.fill_(7)
    fine = flow.refine()
    assert not {p.data_ptr() for p in flow.parameters()} & {p.data_ptr() for p in fine.parameters()}
    norm = fine.blocks[1].velocity[0]
    assert (
        (norm.running_mean == 1).all()
        and norm.num_batches_tracked == 0
        and fine.blocks[3].velocity[0].num_batches_tracked == 7
    )
    fine(torch.randn(3, 4, 4, 4)).sum().backward()
    assert all(p.grad is None for p in flow.parameters())


@pytest.mark.parametrize("seed", range(4))
def test_refining_a_field_smooth_in_time_converges(seed):
    "Each refinement moves the end by half as much as the one before, in the limit: first order."
    torch.manual_seed(seed)
    a, b, x = (torch.randn(n, 2, dtype=torch.float64) for n in (2, 2, 20))

    def at(t):
        field = nn.Linear(2, 2, bias=False)
        field.weight.data = a + t * b
        return field

    flows = [Flow([at(k / 8) for k in range(8)], h=1 / 8)]
    for _ in range(6): flows.append(flows[-1].refine())
    moves = [(p(x) - q(x)).norm().item() for p, q in zip(flows, flows[1:])]
    assert moves[-2] / moves[-1] == pytest.approx(2, rel=.05)


def test_flows_that_are_not_uniform_are_refused():
    flow = some_flow()
    flow.blocks[3].h = .5
    for call in (flow.refine, flow.coarsen, lambda: flow.h, lambda: flow.trajectory(torch.randn(2, 7))):
        with pytest.raises(ValueError, match="steps 1, 1, 1, 0.5, 1, expected a uniform flow"): call()
    with pytest.raises(ValueError, match="block 1 has another architecture"):
        Flow([nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2)),
              nn.Sequential(nn.Linear(2, 4), nn.Linear(4, 2))]).refine()
    with pytest.raises(ValueError, match="5 blocks, expected an even number"): some_flow().coarsen()


# Trajectories in stages

def in_stages():
    torch.manual_seed(0)
    return Trajectory([torch.randn(4, 5, 3), torch.randn(2, 5, 2, 2),
                       torch.randn(3, 5, 7)], h=[1., .5, .1], names=list("abcdef"))


def test_stages_add_up():
    traj = in_stages()
    stages = traj.stages
    assert [(s.K, s.h, s.names) for s in stages] == [(3, 1., tuple("abc")), (1, .5, ("d",)), (2, .1, tuple("ef"))]
    assert (traj.K, traj.B) == (6, 5) and stages[0].stages == (stages[0],) and "6 steps in 3 stages" in repr(traj)
    for method in (Trajectory.displacement, Trajectory.path_length):
        torch.testing.assert_close(method(traj), sum(method(s) for s in stages))
    for method, rows in ((Trajectory.speeds, 6), (Trajectory.turning_angles, 3)):
        torch.testing.assert_close(method(traj), torch.cat([method(s) for s in stages]))
        assert method(traj).shape == (rows, 5)
    time, action = sum(s.K * s.h for s in stages), sum((s.steps.flatten(2) ** 2).sum(2).sum(0) / s.h for s in stages)
    assert (traj.displacement() <= traj.path_length() + 1e-6).all()
    assert (traj.path_length() ** 2 <= time * action * (1 + 1e-6)).all()


def test_several_stages_have_no_single_positions():
    for name in ("x", "h", "steps", "velocities"):
        with pytest.raises(AttributeError, match=r"a trajectory of 3 stages has no single (x|h).*trajectory\.stages"):
            getattr(in_stages(), name)


@pytest.mark.parametrize("x, h, message", [
    ([], 1., "0 stages"), ([torch.zeros(2, 3, 1)] * 2, [1.], "2 stages and 1 steps"),
    ([torch.zeros(2, 3, 1), torch.zeros(2, 4, 1)], 1., r"stages hold \[3, 4\] samples"),
    (torch.zeros(2, 3, 1, dtype=torch.long), 1., "convert with .float"), (torch.zeros(2, 3, 1), -1., "step h is -1"),
    (torch.zeros(2, 3, 1), 0, "step h is 0"), (torch.zeros(2, 3, 1), float("inf"), "step h is inf")])
def test_what_is_no_trajectory(x, h, message):
    with pytest.raises(ValueError, match=message): Trajectory(x, h)


def test_names_are_one_for_each_block():
    assert Trajectory(torch.zeros(3, 1, 1)).names == ("0", "1")
    with pytest.raises(ValueError, match="names has 1 entries, expected one for each of 2"):
        Trajectory(torch.zeros(3, 1, 1), names=["a"])


def test_blocks_are_cut_out_through_stages():
    traj = in_stages()
    for first in range(6):
        for last in range(first + 1, 7):
            part = traj[first:last]
            assert part.names == tuple("abcdef"[first:last])
            torch.testing.assert_close(part.speeds(), traj.speeds()[first:last])
    assert (
        [t.names[0] for t in traj] == list("abcdef") and traj[-1].names == ("f",) and traj[np.int64(2)].names == ("c",)
    )
    for wrong in (6, -7, slice(3, 3), slice(9, None)):
        with pytest.raises(IndexError, match="there are 6, from 0 to 5"): traj[wrong]
    with pytest.raises(ValueError, match="expected neighbours"): traj[::2]
    with pytest.raises(TypeError): traj["a"]


def test_samples_and_classes():
    traj, y = in_stages(), torch.tensor([2, 0, 2, 2, 0])
    parts = traj.classes(y)
    assert {c: p.B for c, p in parts.items()} == {0: 2, 2: 3} and parts[2].names == traj.names
    torch.testing.assert_close(parts[2].speeds(), traj.speeds()[:, y == 2])
    torch.testing.assert_close(traj.samples([4, 0]).stages[1].x, traj.stages[1].x[:, [4, 0]])
    assert traj.samples(-1).B == 1
    with pytest.raises(ValueError, match="labels have shape"): traj.classes(y[:3])
    with pytest.raises(ValueError, match="positions have shape"): traj.samples(y > 5)
    for at in (5, -10**30, [0, 10**30]):
        with pytest.raises(IndexError, match="expected numbers from 0 to 4"): traj.samples(at)


def test_measures_in_half_precision_do_not_overflow():
    traj = Trajectory(torch.tensor([0., 300., 600.]).reshape(3, 1, 1).expand(3, 1, 4).half())
    assert traj.displacement().item() == 1200 and traj.path_length().item() == 1200 and traj.displacement(
    ).dtype == torch.float32
    assert traj.to(torch.float64).x.dtype == torch.float64 and traj.to("cpu").x.dtype == torch.float16


def test_angles_of_tiny_and_of_no_steps():
    x = torch.tensor([[0., 0.], [1e-20, 0.], [1e-20, 1e-20], [1e-20, 1e-20], [5., 0.]],
                     dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(
        Trajectory(x).turning_angles()[:, 0], torch.tensor([torch.pi / 2, 0, 0], dtype=torch.float64))
    small = torch.tensor([[0., 0.], [1., 0.], [2., 1e-6]], dtype=torch.float64).unsqueeze(1)
    torch.testing.assert_close(Trajectory(small).turning_angles().item(), 1e-6, rtol=1e-6, atol=0)


def test_measures_have_gradients_where_nothing_moves():
    x = torch.zeros(4, 3, 2, requires_grad=True)
    traj = Trajectory(x)
    (traj.displacement() + traj.path_length() + traj.straightness() + traj.turning_angles().sum(0)).sum().backward()
    assert x.grad.isfinite().all()


# Files

@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_files_give_back_what_was_saved(tmp_path, dtype):
    traj = in_stages().to(dtype)
    traj.stages[0].x.requires_grad_()
    traj.save(tmp_path / "a.npz")
    again = Trajectory.load(str(tmp_path / "a.npz"))
    assert again.names == traj.names and [s.h for s in again.stages] == [s.h for s in traj.stages]
    assert all(torch.equal(a.x, b.x) and b.x.dtype == dtype for a, b in zip(traj.stages, again.stages))
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_a_failed_save_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    in_stages().save(path)
    before = path.read_bytes()

    def full(file, **arrays):
        file.write(b"half")
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"): in_stages().samples(0).save(path)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_damaged_files_are_refused_by_name(tmp_path):
    path = tmp_path / "a.npz"
    in_stages().save(path)
    whole = path.read_bytes()
    for length in range(0, len(whole), 97):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="a.npz is not a whole file of a trajectory"): Trajectory.load(path)
    changed, want = 0, in_stages()
    for at in range(0, len(whole), 13):
        path.write_bytes(whole[:at] + bytes([whole[at] ^ 0x55]) + whole[at + 1:])
        try: again = Trajectory.load(path)
        except ValueError: changed += 1
        else: assert all(torch.equal(a.x, b.x) for a, b in zip(want.stages, again.stages)) and again.names == want.names
    assert changed > 50


def test_foreign_files_are_refused_and_nothing_is_executed(tmp_path):
    class Bomb:
        def __reduce__(self): return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Bomb(), tmp_path / "torch.pt")
    np.savez(tmp_path / "array.npz", note=np.array(Bomb(), dtype=object))
    np.savez(tmp_path / "other.npz", x=np.zeros(3))
    np.save(tmp_path / "plain.npy", np.zeros(3))
    (tmp_path / "text.npz").write_text("hello")
    for path in list(tmp_path.iterdir()):
        with pytest.raises(ValueError, match=f"{path.name} is not a whole file"): Trajectory.load(path)
    assert not (tmp_path / "ran").exists()
    with pytest.raises(FileNotFoundError): Trajectory.load(tmp_path / "none.npz")


# Networks

@pytest.mark.parametrize("norm", [True, False])
@pytest.mark.parametrize("make", [conv_net, staged_net])
def test_no_convolution_is_dead(make, norm):
    """Every weight of every velocity changes the output; with the published code's slip, the first convolutions would
    not."""
    torch.manual_seed(0)
    net = make((1, 8, 8), 3, width=4, norm=norm).eval()
    x = torch.randn(6, 1, 8, 8)
    with torch.no_grad():
        before = net(x)
        for name, p in net.flow.named_parameters():
            old = p.clone()
            p.add_(torch.randn_like(p))
            assert not torch.equal(net(x), before), name
            p.copy_(old)
        assert torch.equal(net(x), before)


@pytest.mark.parametrize("shape", [(1, 28, 28), (3, 9, 12), (1, 8, 8)])
def test_images_of_any_size(shape):
    x = torch.randn(3, *shape)
    net = conv_net(shape, 4, K=2, width=4)
    assert net(x).shape == (3, 4) and net.trajectory(x).x.shape == (3, 3, 4, -(-shape[1] // 2), -(-shape[2] // 2))
    staged = staged_net(shape, 4, Ks=(1, 2), width=4, h=.5)
    traj = staged.trajectory(x)
    assert staged(x).shape == (3, 4) and [(s.K, s.h, s.x.shape[2]) for s in traj.stages] == [(1, .5, 4), (2, .5, 8)]
    staged.eval()
    torch.testing.assert_close(staged(x), staged.head(staged.trajectory(x).stages[-1].x[-1]))


def test_wrong_sizes_are_named():
    for make, message in [(lambda: conv_net((1, 0, 8), 3), "height is 0"),
                          (lambda: staged_net((1, 8, 8), 3, Ks=(2, 0)), r"Ks\[1\] is 0"),
                          (lambda: dense_net(2, 2, K=2.5), "K is 2.5"),
                          (lambda: staged_net((1, 8, 8), 3, Ks=()), "stages is 0"),
                          (lambda: conv_net((8, 8), 3), "shape is")]:
        with pytest.raises(ValueError, match=message): make()


NETS = {
    "dense": (lambda **kw: dense_net(3, 2, K=3, **kw), (3,)), "conv": (lambda **kw: conv_net(
        (1, 8, 8), 2, K=3, width=4, **kw), (1, 8, 8)), "staged": (lambda **kw: staged_net(
            (1, 8, 8), 2, Ks=(1, 2), width=4, **kw), (1, 8, 8))}


@pytest.mark.parametrize("kind", NETS)
def test_skip_init_starts_still_and_learns(kind):
    make, shape = NETS[kind]
    torch.manual_seed(0)
    net, x = make(skip_init=True), torch.randn(8, *shape)
    opt = torch.optim.SGD(net.parameters(), lr=.1)
    assert (net.trajectory(x).path_length() == 0).all()
    for _ in range(3):
        opt.zero_grad(); net(x).square().mean().backward(); opt.step()
    assert (net.trajectory(x).path_length() > 0).all()


@pytest.mark.parametrize("kind", NETS)
def test_stochastic_depth_drops_more_in_later_blocks(kind):
    make, shape = NETS[kind]
    torch.manual_seed(0)
    net, x = make(drop=.6), torch.randn(400, *shape)
    rates = [b.velocity.drop for b in residual_blocks(net).values()]
    assert rates == pytest.approx([.2, .4, .6])
    still = (net.trajectory(x).speeds() == 0).float().mean(1)
    torch.testing.assert_close(still, torch.tensor(rates), atol=4 * (.25 / 400) ** .5, rtol=0)
    net.eval()
    assert (net.trajectory(x).speeds() > 0).all() and torch.equal(net(x), net(x))


def test_dropped_velocities_have_the_same_mean():
    class Ones(nn.Module):
        def forward(self, x): return torch.ones_like(x)

    torch.manual_seed(0)
    v = StochasticDepth(Ones(), .3)(torch.zeros(20_000, 2, 2))
    assert abs(v[:, 0, 0].mean() - 1) < 4 * (.3 / .7 / 20_000) ** .5 and (v == v[:, :1, :1]).all()


@pytest.mark.parametrize("kind, deviation", [("normal", 64 ** -.5), ("default", (3 * 64) ** -.5), ("orthogonal", 64 ** -.5)])
def test_initial_weights_have_the_stated_deviation(kind, deviation):
    torch.manual_seed(0)
    net = init_velocities_(dense_net(64, 2, hidden=64), .5, kind)
    weights = torch.cat([p.flatten() for name, p in net.flow.named_parameters() if name.endswith("weight")])
    assert weights.std().item() == pytest.approx(.5 * deviation, rel=.02)
    assert all((p == 0).all() for name, p in net.flow.named_parameters() if name.endswith("bias"))
    with pytest.raises(ValueError, match="expected one of 'orthogonal', 'normal', 'default'"):
        init_velocities_(net, .5, "kaiming")


def test_transitions_stand_between_flows():
    with pytest.raises(ValueError, match="2 flows and 2 transitions"):
        StagedFlow([some_flow(), some_flow()], [nn.Identity()] * 2)


# Figures

def test_portraits_draw_the_field_of_the_block():
    import matplotlib.pyplot as plt
    torch.manual_seed(0)
    net = dense_net(2, 2, K=3)
    traj, y = net.trajectory(torch.randn(10, 2)), torch.arange(10) % 2
    for k in range(4):
        ax = net.flow.portrait(traj, y, k, arrows=5)
        quivers = [c for c in ax.collections if hasattr(c, "U")]
        assert len(quivers) == (k < 3) and ax.get_title() == f"layer {k} of 3"
        if quivers:
            grid = torch.as_tensor(np.asarray(quivers[0].get_offsets()), dtype=torch.float32)
            want = net.flow.blocks[k].velocity(grid).detach()
            torch.testing.assert_close(torch.as_tensor(np.asarray(quivers[0].U), dtype=torch.float32), want[:, 0])
        plt.close(ax.figure)


def test_the_slider_has_a_picture_for_each_layer():
    traj = dense_net(2, 2, K=3).trajectory(torch.randn(10, 2))
    slider, stack = traj.slider(torch.arange(10) % 2).children
    assert len(stack.children) == 4 and (slider.min, slider.max, stack.selected_index) == (0, 3, 3)
    assert all('alt="samples at layer' in frame.value for frame in stack.children)


def test_steps_of_half_precision_do_not_overflow():
    a = torch.full((2, 4), 5e4).half()
    path = Trajectory(torch.stack([a, -a]))
    torch.testing.assert_close(kinetic_energy(path), torch.full((2,), 1e10), rtol=1e-3, atol=0)
    torch.testing.assert_close(path.straightness(), torch.ones(2))
    torch.testing.assert_close(path.displacement(), path.path_length())


def test_drawing_changes_no_statistics():
    torch.manual_seed(0)
    flow = Flow([nn.Sequential(nn.Linear(2, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 2))]).train()
    x = torch.randn(20, 2)
    traj = flow.eval().trajectory(x); flow.train()
    before = {k: v.clone() for k, v in flow.state_dict().items()}
    flow.portrait(traj, k=0)
    assert flow.training and all(torch.equal(v, before[k]) for k, v in flow.state_dict().items())


def test_weights_under_a_parametrization_are_refused():
    net = dense_net(3, 2, K=1)
    nn.utils.parametrizations.weight_norm(net.flow.blocks[0].velocity[0])
    with pytest.raises(ValueError, match="computed by a parametrization"): init_velocities_(net, .1)


@pytest.mark.parametrize("dtype, scale", [(torch.float32, 1e25), (torch.float32, 1e-25), (torch.float64, 1e200), (torch.float64, 1e-200), (torch.bfloat16, 1e30)])
def test_lengths_hold_at_every_scale(dtype, scale):
    x = torch.randn(4, 30, 3, generator=torch.Generator().manual_seed(0)).to(dtype)
    base, far = Trajectory(x.double(), 1.), Trajectory((x.double() * scale).to(dtype), 1.)
    # positions are rounded after they are scaled
    tolerance = dict(rtol=4 * torch.finfo(dtype).eps ** .5, atol=4 * torch.finfo(dtype).eps ** .5)
    for name in ("displacement", "path_length", "speeds"):
        torch.testing.assert_close(getattr(far, name)().double() / scale, getattr(base, name)(), **tolerance)
    for name in ("straightness", "turning_angles"):
        torch.testing.assert_close(getattr(far, name)().double(), getattr(base, name)(), **tolerance)
    still = Trajectory(torch.zeros(3, 2, 4), 1.)
    assert (
        still.straightness().tolist() == [1, 1] and not still.turning_angles().any() and not still.path_length().any()
    )

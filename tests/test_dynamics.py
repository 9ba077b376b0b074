"Flows and energies: what must hold for any network, beyond the examples of the chapters."
import pytest
import torch
from torch import nn

from lap_nb.dynamics import Flow, ResidualBlock, Trajectory, dense_net, init_velocities_, residual_blocks
from lap_nb.kinetic import EnergyMeter, block_energies, kinetic_energy, relative_energy


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
    with pytest.raises(ValueError, match="expected a positive number"): ResidualBlock(nn.Identity(), h)


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

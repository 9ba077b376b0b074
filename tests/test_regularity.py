"Regularity: spectral norms and exponents known in closed form, any network, and unusable input."
import json
import math
from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.testing import assert_close

from lap_nb.nets import dense_net, init_velocities_
from lap_nb.regularity import holder_exponent, lipschitz_profile, local_lipschitz, measure_regularity

quick = settings(max_examples=10, deadline=None)


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@quick
@given(st.integers(0, 1000), st.integers(1, 8), st.integers(1, 8))
def test_a_linear_map_has_its_spectral_norm(seed, d, out):
    A = numbers(out, d, seed=seed)
    found = local_lipschitz(lambda x: x @ A.T, numbers(3, d, seed=seed + 1), iterations=500, tolerance=1e-9)
    assert_close(found.values, torch.linalg.matrix_norm(A, 2).expand(3), rtol=1e-3, atol=0)
    assert (found.values <= torch.linalg.matrix_norm(A, 2) * (1 + 1e-12)).all()


@quick
@given(st.integers(0, 1000), st.floats(.01, 100))
def test_scaling_a_map_scales_its_constant_and_rotations_change_nothing(seed, c):
    net = dense_net(4, 2, K=2).double().flow
    x, (Q, _) = numbers(5, 4, seed=seed), torch.linalg.qr(numbers(4, 4, seed=seed + 1))
    one = local_lipschitz(net, x, 10, 0.).values
    assert_close(local_lipschitz(lambda z: c * net(z) @ Q, x, 10, 0.).values, c * one, rtol=1e-8, atol=0)


def test_pictures_agree_with_the_dense_jacobian():
    torch.manual_seed(0)
    f = nn.Sequential(nn.Conv2d(2, 3, 3, padding=1), nn.BatchNorm2d(3), nn.Tanh(), nn.Conv2d(3, 2, 3)).double().eval()
    x = numbers(4, 2, 5, 5)
    dense = torch.stack([
        torch.linalg.matrix_norm(torch.func.jacrev(lambda z: f(z[None])[0].flatten())(xi).flatten(1), 2) for xi in x])
    assert_close(local_lipschitz(f, x, 1000, 1e-8).values, dense, rtol=1e-4, atol=0)


def test_a_constant_map_has_constant_zero():
    assert local_lipschitz(lambda x: x * 0, numbers(3, 2)).values.tolist() == [0, 0, 0]


def test_linear_blocks_of_a_flow():
    torch.manual_seed(0)
    net = dense_net(5, 2, K=3).double().eval()
    mats = [numbers(5, 5, seed=k) / 5 for k in range(3)]
    for block, A in zip(net.flow.blocks, mats):
        block.velocity = nn.Linear(5, 5, bias=False, dtype=torch.float64); block.velocity.weight.data = A
    profile = lipschitz_profile(net, numbers(6, 5), iterations=2000, tolerance=1e-9)
    steps = [torch.eye(5, dtype=torch.float64) + A for A in mats]
    for row, S in zip(profile.blocks, steps):
        assert_close(row, torch.linalg.matrix_norm(S, 2).expand(6), rtol=1e-4, atol=0)
    assert_close(profile.whole,
                 torch.linalg.matrix_norm(steps[2] @ steps[1] @ steps[0], 2).expand(6), rtol=1e-4, atol=0)
    assert (profile.whole <= profile.product * (1 + 1e-6)).all() and profile.names == (
        "flow.blocks.0",
        "flow.blocks.1",
        "flow.blocks.2",
    )
    assert "**whole**" in profile._repr_markdown_()


def test_a_network_nobody_prepared():
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.conv = nn.Conv2d(2, 2, 3, padding=1)
        def forward(self, x): return x + torch.tanh(self.conv(x))
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Block(), Block(), nn.Flatten(), nn.Linear(32, 3)).eval()
    profile = lipschitz_profile(model, torch.randn(4, 1, 4, 4))
    assert profile.names == ("1", "2") and profile.whole.shape == (4,)
    assert sum(len(m._forward_pre_hooks) for m in model.modules()) == 0


def test_what_has_not_settled_is_said():
    net = dense_net(5, 2, K=2).eval()
    profile = lipschitz_profile(net, torch.randn(6, 5), iterations=1)
    assert profile.converged == 0 and "raise iterations" in profile.warning and profile.warning in repr(profile)


@pytest.mark.parametrize("a", [.3, .5, .8, 1.])
@pytest.mark.parametrize("n, seed", [(300, 1), (600, 2), (1000, 3)])
def test_the_exponent_of_a_power_lies_in_its_interval(a, n, seed):
    x = 2 * torch.rand(n, 1, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) - 1
    found = holder_exponent(lambda z: z.sign() * z.abs() ** a, x)
    assert found.interval[0] - 1e-9 <= a <= found.interval[1] + 1e-9
    assert found.interval[1] - found.interval[0] < .3   # an interval that holds everything would be no test


def test_the_exponent_ignores_scale_and_off_the_support_sees_another_map():
    x = 2 * torch.rand(300, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    f = lambda z: z.sign() * z.abs() ** .5
    assert_close(holder_exponent(lambda z: 7 * f(z), x).exponent, holder_exponent(f, x).exponent)
    assert_close(holder_exponent(lambda z: f(z / 100), 100 * x).exponent, holder_exponent(f, x).exponent)
    assert holder_exponent(f, x, shift=20.).exponent > .95   # smooth there


def test_a_short_range_of_distances_is_said():
    assert "says little" in holder_exponent(lambda z: z, numbers(100, 64)).warning


def test_a_record_is_plain_json():
    torch.manual_seed(0)
    record = measure_regularity(init_velocities_(dense_net(2, 2, K=3), .5).eval(), torch.randn(100, 2))
    assert json.loads(json.dumps(record)) == record and len(record["lipschitz block 0.5"]) == 3


@pytest.mark.parametrize("call, message", [
    (lambda: local_lipschitz(torch.tanh, torch.zeros(3)), "expected real points"),
    (lambda: local_lipschitz(torch.tanh, torch.zeros(0, 3)), "at least one sample"),
    (lambda: local_lipschitz(torch.tanh, torch.zeros(3, 2).long()), "expected real points"),
    (lambda: local_lipschitz(torch.tanh, torch.full((3, 2), math.nan)), "not finite"),
    (lambda: local_lipschitz(torch.tanh, torch.zeros(3, 2), 0), "iterations is 0"),
    (lambda: local_lipschitz(nn.Dropout(.5), torch.zeros(3, 2)), "training mode"),
    (lambda: holder_exponent(torch.tanh, torch.zeros(10, 2)), "expected at least 50"),
    (lambda: holder_exponent(torch.tanh, torch.zeros(60, 2)), "remove the duplicates"),
])
def test_unusable_input_is_explained(call, message):
    with pytest.raises(ValueError, match=message): call()


def test_layers_that_mix_samples_are_refused_whatever_their_mode():
    with pytest.raises(ValueError, match="BatchNorm1d in training mode, or without statistics of its own"):
        local_lipschitz(nn.BatchNorm1d(5, track_running_stats=False).eval(), torch.randn(4, 5))


class Attends(nn.Module):
    "A transformer that returns a mapping, and calls its blocks by keyword."
    def __init__(self):
        super().__init__()
        self.first, self.layers = nn.Linear(3, 8), nn.ModuleList(
            nn.TransformerEncoderLayer(8, 2, 16, 0., batch_first=True, norm_first=True) for _ in range(2))
    def forward(self, x):
        x = self.first(x)
        for layer in self.layers: x = layer(src=x)
        return {"logits": x.mean(1)}


def test_attention_keywords_and_mappings():
    torch.manual_seed(0)
    net, x = Attends().double().eval(), numbers(6, 5, 3)
    profile = lipschitz_profile(net, x, tolerance=1e-6, iterations=500)
    assert profile.names == ("layers.0", "layers.1")
    start = net.first(x).detach()
    jacobian = torch.autograd.functional.jacobian(lambda z: net.layers[0](z), start[:1]).reshape(40, 40)
    assert_close(profile.blocks[0, 0], torch.linalg.matrix_norm(jacobian, 2), rtol=1e-3, atol=0)
    assert set(measure_regularity(net, numbers(60, 5, 3))) >= {"lipschitz whole 0.5", "holder on"}


def test_stochastic_depth_is_random_too():
    with pytest.raises(ValueError, match="in training mode"):
        lipschitz_profile(dense_net(3, 2, K=2, drop=.5).train(), torch.randn(5, 3))


# The error of a constant, half precision, units, and unusable input of every kind

def dense(f, x):
    return torch.stack([
        torch.linalg.matrix_norm(torch.func.jacrev(lambda z: f(z[None])[0].flatten())(xi).flatten(1).double(), 2)
        for xi in x])


@pytest.mark.parametrize("d", [130, 200, 300])
@pytest.mark.parametrize("iterations", [10, 40, 100, 200])
def test_the_error_bound_holds(d, iterations):
    "Against the whole Jacobian, for matrices whose largest singular values lie close together, and for a network."
    left, right = (torch.linalg.qr(numbers(d, d, seed=k))[0] for k in (1, 2))
    A = left * (1 - .2 * torch.linspace(0, 1, d, dtype=torch.float64) ** 1.5) @ right.T
    net = dense_net(d, 2, K=3, hidden=32).double().flow
    for f in (lambda z: z @ A.T, net):
        x = numbers(3, d)
        true, found = dense(f, x), local_lipschitz(f, x, iterations, 1e-6)
        assert (found.values <= true * (1 + 1e-12)).all() and (
            true <= found.values * (1 + found.error) * (1 + 1e-12)
        ).all()
        settled = found.error <= 1e-6
        assert_close(found.values[settled], true[settled], rtol=1e-6, atol=0)
        assert found.converged == pytest.approx(settled.double().mean().item())


def test_what_has_converged_is_the_largest():
    "Of random maps with 140 features, near the identity or not."
    d = 140
    for seed in range(40):
        A, u, start = numbers(d, d, seed=seed) / d ** .5, numbers(d, seed=seed + 1), numbers(1, d, seed=seed + 2)
        M = [
            torch.eye(d).double() + 0.3 * A,
            A,
            torch.eye(d).double() + 0.05 * A + 0.12 * torch.outer(u, u) / u.square().sum(),
            torch.eye(d).double() + 0.3 * A.triu(),
        ][seed % 4]
        found = local_lipschitz(lambda z: z @ M.T, start, 127, seed=seed)
        assert found.converged == 1
        assert_close(found.values[0], torch.linalg.matrix_norm(M, 2), rtol=1e-4, atol=0.)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_widened(dtype):
    torch.manual_seed(0)
    net = init_velocities_(dense_net(6, 2, K=3), .5).eval().to(dtype)
    x = torch.randn(60, 6).to(dtype)
    wide = dense_net(6, 2, K=3).eval(); wide.load_state_dict({k: v.float() for k, v in net.state_dict().items()})
    for small, large in ((net.flow, wide.flow), (torch.tanh, torch.tanh), (lambda z: 300 * z, lambda z: 300 * z)):
        assert_close(local_lipschitz(small, x).values, local_lipschitz(large, x.float()).values, rtol=1e-6, atol=0)
        assert_close(
            holder_exponent(small, x).exponent,
            holder_exponent(large, x.float()).exponent, rtol=1e-4, atol=1e-4)
    profile = lipschitz_profile(net, x)
    assert profile.whole.dtype == torch.float32 and profile.converged == 1
    with pytest.raises(ValueError, match="model.float"): local_lipschitz(lambda z: net.flow(z), x)


@pytest.mark.parametrize("scale", [1e-30, 1e-20, 1e20, 1e30])
@pytest.mark.parametrize("d", [5, 150])
def test_steep_and_flat_maps_in_single_precision(scale, d):
    A = numbers(d, d).float()
    x = torch.randn(4, d)
    assert_close(
        local_lipschitz(lambda z: z @ (scale * A).T, x).values,
        torch.linalg.matrix_norm(A.double(), 2).float().expand(4) * scale, rtol=1e-4, atol=0)


@pytest.mark.parametrize("power", [-200, -66, 66, 200])
def test_the_exponent_ignores_units_and_shifts(power):
    x = 2 * torch.rand(200, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64) - 1
    f = lambda z: z.sign() * z.abs() ** .5
    one, scaled = holder_exponent(f, x), holder_exponent(lambda z: f(z * 2. ** -power), x * 2. ** power)
    assert_close(scaled.exponent, one.exponent, rtol=1e-9, atol=0)
    assert_close(scaled.r, one.r * 2. ** power, rtol=1e-9, atol=0)
    assert_close(holder_exponent(lambda z: f(z - 1e7) + 1e7, x + 1e7).exponent, one.exponent, rtol=1e-3, atol=0)


def test_a_map_that_does_not_change_has_no_exponent_and_says_so():
    found = holder_exponent(lambda z: 0 * z, numbers(60, 2))
    assert math.isnan(found.exponent) and "no exponent" in found.warning


@pytest.mark.parametrize("call, message", [
    (lambda x: local_lipschitz(None, x), "f is None, expected"),
    (lambda x: local_lipschitz(torch.tanh, x.to_sparse()), "x is a sparse"),
    (lambda x: local_lipschitz(torch.tanh, x.to("meta")), "x is a tensor .* on meta"),
    (lambda x: local_lipschitz(torch.tanh, x[:, :0]), "expected real points"),
    (lambda x: local_lipschitz(torch.tanh, x.to(torch.complex64)), "x is a tensor .* of complex64"),
    (lambda x: local_lipschitz(lambda z: z / 0, x), "the map is not finite at 60 of 60 samples"),
    (lambda x: local_lipschitz(lambda z: z.abs().sqrt(), 0 * x), "the Jacobian is not finite"),
    (lambda x: local_lipschitz(lambda z: z[:1], x), "with a row for each sample"),
    (lambda x: local_lipschitz(lambda z: "x", x), "with a row for each sample"),
    (lambda x: local_lipschitz(nn.Linear(3, 3), x), "the map does not take a tensor .* of float64"),
    (lambda x: local_lipschitz(torch.tanh, x, tolerance=-1), "tolerance is -1"),
    (lambda x: local_lipschitz(torch.tanh, x, seed=-1), "seed is -1"),
    (lambda x: holder_exponent(torch.tanh, x, bins=2), "bins is 2"),
    (lambda x: holder_exponent(torch.tanh, x, halves=1), "halves is 1"),
    (lambda x: holder_exponent(torch.tanh, x, shift=math.nan), "shift is nan"),
    (lambda x: holder_exponent(torch.tanh, x, shift=1., directions=0), "directions is 0"),
    (lambda x: holder_exponent(lambda z: 1 / (z - z), x), "not finite"),
    (lambda x: holder_exponent(torch.tanh, torch.eye(60).double()), "equally far"),
    (lambda x: lipschitz_profile(None, x), "model is None, expected"),
    (lambda x: lipschitz_profile(dense_net(2, 2, K=2).double().eval(), x, blocks="nothing"), "matches no module"),
    (lambda x: lipschitz_profile(dense_net(2, 2, K=2).double().eval(), x, blocks={"a": nn.Linear(2, 2)}), "block .a. is not in this ResidualNet"),
    (lambda x: measure_regularity(dense_net(2, 2, K=2).eval(), x), "the model does not take a tensor .* of float64"),
])
def test_unusable_maps_and_settings_are_explained(call, message):
    with pytest.raises(ValueError, match=message): call(numbers(60, 2))


def test_more_distances_than_memory_are_refused_before_they_are_allocated():
    with pytest.raises(MemoryError, match="3,000,000 by 3,000,000 points need"):
        holder_exponent(torch.tanh, torch.zeros(1, 1).expand(3_000_000, 1))


@pytest.mark.parametrize("of", [np.float32, torch.tensor, Fraction])
def test_settings_are_numbers_of_any_library(of):
    x = torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    assert local_lipschitz(torch.sin, x, tolerance=of(.125)).tolerance == .125
    assert repr(holder_exponent(torch.sin, x, shift=of(.5))) == repr(holder_exponent(torch.sin, x, shift=.5))

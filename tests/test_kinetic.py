"""Energies: the meter in training passes of every kind, the ledger's arithmetic, and the properties the definitions
promise."""
import copy
import gc
import weakref
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings, strategies as st
from torch import nn
from torch.func import functional_call, stack_module_state, vmap
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conftest import hook_count
from lap_nb import kinetic
from lap_nb.attach import trace, trace_energies
from lap_nb.hooks import find_blocks
from lap_nb.dynamics import ResidualBlock, Trajectory
from lap_nb.kinetic import EnergyLedger, EnergyMeter, block_energies, kinetic_energy, relative_energy
from lap_nb.least_action import LeastAction
from lap_nb.nets import dense_net
from lap_nb.stats import rank_correlation

BATCH = 4
TORCH = tuple(map(int, torch.__version__.split('.')[:2]))


pytestmark = pytest.mark.usefixtures('seed')


def small(h=1., K=3): return dense_net(3, 2, K=K, hidden=5, h=h), torch.randn(BATCH, 3)


def by_hand(net, x, reduction="mean"): return block_energies(net.trajectory(x), reduction).mean(1)


class PostBlock(nn.Module):
    "As torchvision writes it: the sum in place on the branch, an activation in place after it."
    def __init__(self, width=4):
        super().__init__()
        self.conv, self.bn, self.relu = (
            nn.Conv2d(width, width, 3, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(inplace=True),
        )

    def forward(self, x):
        out = self.bn(self.conv(x))
        out += x
        return self.relu(out)


class Layer(nn.Module):
    "A transformer's layer with keyword input and a tuple as output."
    def __init__(self, dim=6):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(dim), nn.Sequential(nn.Linear(dim, 8), nn.GELU(), nn.Linear(8, dim))

    def forward(self, mask=None, hidden=None): return hidden + self.mlp(self.norm(hidden)), {"mask": mask}


class Stack(nn.Module):
    def __init__(self, block=PostBlock, K=2, way=None):
        super().__init__()
        self.stem, self.layers, self.way = nn.Conv2d(3, 4, 3, padding=1), nn.ModuleList(block() for _ in range(K)), way

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers: x = layer(x) if self.way is None else checkpoint(layer, x, use_reentrant=self.way)
        return x.mean((2, 3))


def images(): return torch.randn(BATCH, 3, 6, 6)


# Values and gradients

@pytest.mark.parametrize("velocity", ["displacement", "branch"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("h", [1., .25])
def test_energies_and_gradients_are_those_of_the_trajectory(h, reduction, velocity):
    net, x = small(h)
    weights, want = list(net.flow.parameters()), by_hand(net, x, reduction)
    with EnergyMeter(net, reduction=reduction, velocity=velocity) as meter:
        net(x)
        got = meter.take()
    assert_close(got, want)
    factors = torch.rand(3)
    for a, b in zip(torch.autograd.grad(got @ factors, weights), torch.autograd.grad(want @ factors, weights)):
        assert_close(a, b)


@pytest.mark.parametrize("copy", [False, True])
def test_activation_after_the_sum(copy):
    net, x = Stack(), images()
    blocks = find_blocks(net, x)
    with EnergyMeter(net, blocks, copy=copy) as meter:
        net(x)
        got = meter.take()
    want = trace_energies(net.train(), x, blocks).energies().mean(1)
    assert_close(got, want)
    for a, b in zip(
        *(torch.autograd.grad(e.sum(), list(net.parameters())[:-2], allow_unused=True) for e in (got, want))
    ):
        assert_close(a, b)


def test_branch_of_foreign_blocks_is_named():
    net, x, seen = Stack(), images(), []
    blocks = find_blocks(net, x)
    net.train()
    with pytest.raises(ValueError, match="'layers.0' is a PostBlock, whose branch is not known"):
        EnergyMeter(net, blocks, velocity="branch")
    with pytest.raises(ValueError, match="expected the blocks"): EnergyMeter(net, blocks, velocity={"layers.0": "bn"})
    with pytest.raises(ValueError, match="velocity is 'speed'"): EnergyMeter(net, blocks, velocity="speed")
    hooks = [
        layer.bn.register_forward_hook(lambda m, args, out: seen.append(out.detach().square().mean()))
        for layer in net.layers]
    with EnergyMeter(net, blocks, velocity={"layers.0": "bn", "layers.1": net.layers[1].bn}) as meter:
        net(x).sum().backward()   # the block adds to its branch in place
        assert_close(meter.take(), torch.stack(seen))
    for hook in hooks: hook.remove()
    assert hook_count(net) == 0


def test_tuples_and_keywords():
    class Decoder(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.ModuleList(Layer() for _ in range(2))
        def forward(self, x):
            for layer in self.layers: x = layer(None, hidden=x)[0]
            return x

    net, x = Decoder(), torch.randn(BATCH, 5, 6)
    blocks = find_blocks(net, x)
    with EnergyMeter(net, blocks, "sum") as meter:
        net(x)
        assert_close(meter.take(), trace_energies(net, x, blocks).energies("sum").mean(1))


def test_blocks_by_pattern():
    net, x = small()
    with EnergyMeter(net, "flow.blocks.[02]") as meter:
        assert list(meter.blocks) == ["flow.blocks.0", "flow.blocks.2"]
        net(x)
        assert_close(meter.take(), by_hand(net, x)[[0, 2]])
    with pytest.raises(ValueError, match="matches no module; the nearest names are flow.blocks"):
        EnergyMeter(net, ["flow.block.0"])
    with pytest.raises(ValueError, match="'flow.blocks.0' is not in this"): EnergyMeter(net, find_blocks(small()[0]))
    for nothing in ({}, []):
        with pytest.raises(ValueError, match="blocks is empty"): EnergyMeter(net, nothing)


def test_a_shared_block_counts_per_call():
    block = ResidualBlock(nn.Linear(3, 3))
    net, x = nn.Sequential(block, block), torch.randn(BATCH, 3)
    with EnergyMeter(net) as meter:
        net(x)
        assert_close(meter.take(), trace_energies(net, x).energies().mean(1).sum(0, keepdim=True))


def test_blocks_that_write_to_their_input():
    class Inplace(nn.Module):
        def __init__(self): super().__init__(); self.f = nn.Linear(3, 3)
        def forward(self, x): return x.add_(self.f(x.clone()))

    net, x = nn.Sequential(nn.Linear(3, 3), Inplace()), torch.randn(BATCH, 3)
    with EnergyMeter(net, {"1": net[1]}), pytest.raises(RuntimeError, match="'1' writes to its input"): net(x)
    with EnergyMeter(net, find_blocks(net, x), copy=True) as meter:
        net(x)
        assert_close(meter.take(), net[1].f(net[0](x)).square().mean().unsqueeze(0))


def test_networks_that_write_to_a_blocks_output():
    class Later(nn.Module):
        def __init__(self): super().__init__(); self.block, self.head = ResidualBlock(nn.Linear(3, 3)), nn.Linear(3, 1)
        def forward(self, x): return self.head(F.relu(self.block(x), inplace=True))

    net, x = Later(), torch.randn(BATCH, 3)
    with EnergyMeter(net) as meter:
        net(x)
        with pytest.raises(RuntimeError, match="inplace"): meter.take().sum().backward()
    with EnergyMeter(net, copy=True) as meter:
        net(x)
        meter.take().sum().backward()
    want = net.block.velocity(x).square().mean()
    assert_close(net.block.velocity.weight.grad, torch.autograd.grad(want, net.block.velocity.weight)[0])


# Passes

def test_only_training_passes_count():
    net, x = small()
    with EnergyMeter(net) as meter:
        with torch.no_grad(): net(x)
        net.eval()(x)
        with torch.inference_mode(): net(x)
        net.train()(x)
        assert meter.take().shape == (3,)
        with pytest.raises(RuntimeError, match=r"energies of 0 blocks, expected 3.*use_reentrant=False"): meter.take()
        net(x); net(x)
        with pytest.raises(RuntimeError, match="in more than one pass"): meter.take()
        net(x)
        meter.take()


@pytest.mark.parametrize("velocity", ["displacement", "branch"])
@pytest.mark.parametrize("look", [lambda net, x: net.trajectory(x), lambda net, x: net.flow(x), trace, trace_energies, find_blocks])
def test_who_looks_at_the_blocks_on_the_side_changes_nothing(look, velocity):
    net, x = small()
    want = by_hand(net, x)
    with EnergyMeter(net, velocity=velocity) as meter:
        for aside in (lambda: None, lambda: look(net, 9 * x)):   # between the pass and the taking, and after it
            net(x); aside()
            assert_close(meter.take(), want)
            look(net, 9 * x)
        net(x)
        assert_close(meter.take(), want)


def test_passes_that_nobody_takes_do_not_pile_up():
    net, x = small()
    with EnergyMeter(net) as meter:
        for _ in range(5): net(x)
        assert len(meter.seen) == 3


class LayerDrop(nn.Module):
    "Blocks that are left out with probability `p` in training; `never`: one that is in no pass."
    def __init__(self, p, K=4, never=False):
        super().__init__()
        self.stem, self.blocks, self.p = (
            nn.Linear(3, 3),
            nn.ModuleList(ResidualBlock(nn.Linear(3, 3)) for _ in range(K)),
            p,
        )
        self.spare = ResidualBlock(nn.Linear(3, 3)) if never else None

    def forward(self, x):
        x, self.kept = self.stem(x), []
        for k, block in enumerate(self.blocks):
            if self.training and torch.rand(()) < self.p: continue
            self.kept.append(k)
            x = block(x)
        return x


@pytest.mark.parametrize("p", [.2, .5, .8])
@pytest.mark.parametrize("probed", [False, True])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_blocks_that_did_not_run_moved_nothing(p, probed, reduction):
    torch.manual_seed(4)
    net, x, dropped = LayerDrop(p), torch.randn(5, 3), 0
    net.p = 0.
    with EnergyMeter(net) as meter: net(x); meter.take()   # a whole pass
    net.p = p
    opt = torch.optim.SGD(net.parameters(), .01)
    with EnergyMeter(net, find_blocks(net, x) if probed else None, reduction) as meter:
        while True:   # without an example a first pass in which nothing runs is an error
            loss = net(x).square().mean()
            if probed or net.kept: break
            with pytest.raises(RuntimeError, match="energies of 0 blocks"): meter.take(loss)
        for _ in range(15):
            got = meter.take(loss)
            assert [k for k in range(4) if got[k] > 0] == net.kept and got.isfinite().all()
            dropped += 4 - len(net.kept)
            opt.zero_grad(); (loss + got.sum()).backward(); opt.step()
            loss = net(x).square().mean()
    assert dropped > 3


def test_a_block_that_never_runs_is_the_error():
    torch.manual_seed(0)
    net, x = LayerDrop(0., never=True), torch.randn(5, 3)
    with EnergyMeter(net) as meter:
        for _ in range(20): net(x); assert meter.take()[-1] == 0
        net(x)
        with pytest.raises(RuntimeError,
                           match="energies of 4 blocks, expected 5.*'spare' was not called in 21 passes: leave it out"):
            meter.take()
    with EnergyMeter(net, {"spare": net.spare}) as meter:
        net(x)
        with pytest.raises(RuntimeError, match="energies of 0 blocks, expected 1.*'spare' was not called"): meter.take()


def test_a_pass_that_broke_off_or_was_not_one_has_no_zeros():
    net, x = LayerDrop(0.), torch.randn(5, 3)
    with EnergyMeter(net, find_blocks(net, x)) as meter:
        handle = net.blocks[2].register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError): net(x)
        handle.remove()
        with pytest.raises(RuntimeError, match="energies of 2 blocks"): meter.take()
        net.blocks[0](x)   # without the model
        with pytest.raises(RuntimeError, match="energies of 1 blocks"): meter.take()
        with torch.no_grad(): net(x)
        with pytest.raises(RuntimeError, match="energies of 0 blocks"): meter.take()


def test_a_training_with_layer_drop_goes_on():
    torch.manual_seed(2)
    net, x = LayerDrop(.5, K=2), torch.randn(8, 3)
    opt, runs = torch.optim.SGD(net.parameters(), .05), Counter()
    with LeastAction(net, x=x) as la:
        for _ in range(50):
            loss = la(net(x).square().mean())
            runs[len(net.kept)] += 1
            opt.zero_grad(); loss.backward(); opt.step()
    assert set(runs) == {0, 1, 2}


@pytest.mark.parametrize("whole", [False, True])
def test_checkpointed_blocks_count_once(whole):
    net, x = Stack(way=None if whole else False), images()
    blocks = find_blocks(net, x)
    net.way, way = None, net.way
    want = trace_energies(net.train(), x, blocks).energies().mean(1)
    grads = torch.autograd.grad(want.sum(), net.stem.weight)
    net.way = way
    with EnergyMeter(net, blocks) as meter:
        for _ in range(2):
            out = checkpoint(net, x, use_reentrant=False) if whole else net(x)
            got = meter.take()
            assert_close(got, want)
            (out.sum() * 0 + got.sum()).backward()
            assert_close(net.stem.weight.grad, grads[0])
            net.zero_grad()
        assert meter.seen == []


def test_reentrant_checkpoints_are_refused():
    net, x = Stack(way=True), images()
    with EnergyMeter(net, find_blocks(net, x)) as meter:
        net.train()(x).sum().backward()
        with pytest.raises(RuntimeError, match="use_reentrant=False"): meter.take()


def test_under_vmap_each_network_has_its_own():
    nets, x = [small()[0] for _ in range(3)], torch.randn(3, BATCH, 3)
    params, buffers = stack_module_state(nets)
    with EnergyMeter(nets[0]) as meter:
        one = lambda params, x: (functional_call(nets[0], params, (x,)), meter.take())[1]
        got = vmap(one)(params, x)
        assert_close(got, torch.stack([by_hand(net, x) for net, x in zip(nets, x)]))
        meter.put(got)
        assert_close(meter.take(), got)
        half = vmap(one)({k: p.bfloat16() for k, p in params.items()}, x.bfloat16())
    assert half.dtype == torch.float32
    assert_close(half, got, rtol=.05, atol=1e-3)


# Precision

@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_half_precision_does_not_overflow(reduction):
    net = nn.Sequential(ResidualBlock(nn.Linear(8, 8)))
    nn.init.zeros_(net[0].velocity.weight); nn.init.constant_(net[0].velocity.bias, 30000.)
    with EnergyMeter(net.half(), reduction=reduction) as meter:
        net(torch.zeros(BATCH, 8, dtype=torch.float16))
        energy = meter.take()
    bias = net[0].velocity.bias.detach().float()
    assert_close(energy, (bias.square().mean() if reduction == "mean" else bias.square().sum()).unsqueeze(0))


@pytest.mark.parametrize("copy", [False, True])
def test_autocast_accumulates_in_float32(copy):
    net, x = Stack(), images()
    blocks = find_blocks(net, x)
    net.train()
    with EnergyMeter(net, blocks, copy=copy) as meter, torch.autocast("cpu", torch.bfloat16):
        net(x)
        got = meter.take()
        want = trace_energies(net, x, blocks).energies().mean(1)
    assert got.dtype == torch.float32
    assert_close(got, want, rtol=1e-5, atol=0.)
    a, b = (torch.autograd.grad(e.sum(), net.stem.weight)[0] for e in (got, want))
    assert_close(a, b, rtol=.02, atol=.02 * b.abs().max().item())


def test_gradients_against_finite_differences():
    net, x = small(h=.5)
    net, x = net.double(), x.double().requires_grad_()
    with EnergyMeter(net) as meter:
        def energies(x): net(x); return meter.take()
        torch.autograd.gradcheck(energies, x)
        torch.autograd.gradgradcheck(energies, x)


# Memory

def test_no_activation_is_kept_that_was_not_kept_anyway():
    def saved(meter):
        storages = {}
        def pack(t):
            storages[t.untyped_storage()._cdata] = t.untyped_storage().nbytes()
            return t
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
            out = net(x)
            if meter: out = out.sum() + meter.take().sum()
            return sum(storages.values())

    net, x = Stack(K=4), images()
    blocks = find_blocks(net, x)
    net.train()
    plain = saved(None)
    with EnergyMeter(net, blocks) as meter: assert saved(meter) == plain
    with EnergyMeter(net, blocks, copy=True) as meter: assert saved(meter) == plain + 4 * BATCH * 4 * 6 * 6 * 4


def test_nothing_stays_referenced():
    net, x = small()
    kept = []
    hook = net.flow.blocks[1].register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    meter = EnergyMeter(net)
    energy = [net(x), meter.take()]
    assert kept[0]() is not None
    energy.clear(); gc.collect()
    assert kept[0]() is None
    hook.remove()


def test_a_forgotten_meter_takes_its_hooks_along():
    net, x = small()
    for _ in range(3): meter = EnergyMeter(net)
    gc.collect()
    assert hook_count(net) == 8
    del meter; gc.collect()
    assert hook_count(net) == 0
    meter = EnergyMeter(net)
    meter.remove(); meter.remove()
    assert hook_count(net) == 0
    net(x)
    with pytest.raises(RuntimeError, match="was removed from its model"): meter.take()


def test_models_with_a_meter_can_be_copied():
    net, x = small()
    with EnergyMeter(net) as meter:
        net(x)
        twin = copy.deepcopy(net)
        twin(x)
        assert_close(meter.take(), by_hand(net, x))


# Compiled

@pytest.mark.parametrize("velocity", ["displacement", pytest.param("branch", marks=pytest.mark.skipif(
    TORCH < (2, 7), reason="PyTorch before 2.7 stops at a guard of its own on the hook of a branch"))])
def test_compiled_without_a_graph_break(fresh_compiler, velocity):
    net, x = small()
    want = by_hand(net, x)
    with EnergyMeter(net, velocity=velocity) as meter:
        compiled = torch.compile(net, backend="aot_eager", fullgraph=True)
        for _ in range(3):
            compiled(x)
            got = meter.take()
            assert_close(got, want)
        net.eval(); compiled(x); net.train()
        compiled(x)
        weight = net.flow.blocks[0].velocity[0].weight
        assert_close(torch.autograd.grad(meter.take().sum(), weight)[0], torch.autograd.grad(want.sum(), weight)[0])
        for _ in range(12): compiled(x)   # passes nobody takes do not exhaust the compiler
        with pytest.raises(RuntimeError, match="in more than one pass"): meter.take()
    compiled(x)
    assert meter.seen == []


def test_attached_after_the_first_compiled_call(fresh_compiler):
    net, x = small()
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    with EnergyMeter(compiled) as meter:
        compiled(x)
        assert_close(meter.take(), by_hand(net, x))


# Bad input

def test_bad_input():
    net, x = small()
    with pytest.raises(ValueError, match="reduction is 'max'"): EnergyMeter(net, reduction="max")
    with pytest.raises(ValueError, match="no residual block found in Linear"): EnergyMeter(nn.Linear(2, 2))
    with EnergyMeter(net):
        with pytest.raises(ValueError, match="the batch is empty: block 'flow.blocks.0'"): net(x[:0])
    stack = Stack()
    with EnergyMeter(stack, {"stem": stack.stem}):
        with pytest.raises(ValueError, match=r"'stem' gives \(4, 4, 6, 6\) for an input of \(4, 3, 6, 6\)"):
            stack(images())
    embedding = nn.Embedding(5, 3)
    with EnergyMeter(embedding, {"all": embedding}):
        with pytest.raises(ValueError, match="no floating-point tensor goes into block 'all'"):
            embedding(torch.tensor([1, 2]))


# What the definitions promise, for any motion

@st.composite
def motions(draw, stages=2):
    "A trajectory of one or two stages, in float64."
    B, generator = draw(st.integers(1, 5)), torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shapes = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 6)), min_size=1, max_size=stages))
    scale = 10. ** draw(st.integers(-3, 3))
    xs = [scale * torch.randn(K + 1, B, D, generator=generator, dtype=torch.float64) for K, D in shapes]
    return Trajectory(xs, [draw(st.sampled_from([.1, .5, 1., 2.])) for _ in xs])


def changed(traj, f): return Trajectory([f(s.x) for s in traj.stages], [s.h for s in traj.stages])


def halved(traj):
    "Every block in two halves: the same motion."
    def split(x): return torch.cat([torch.stack([x[:-1], (x[1:] + x[:-1]) / 2], 1).flatten(0, 1), x[-1:]])
    return Trajectory([split(s.x) for s in traj.stages], [s.h / 2 for s in traj.stages])


many = settings(max_examples=40, deadline=None)
reductions = st.sampled_from(["mean", "sum"])


@many
@given(motions(), reductions, st.floats(.01, 100))
def test_energy_scales_with_the_square(traj, reduction, c):
    scaled = changed(traj, lambda x: c * x)
    assert_close(block_energies(scaled, reduction), c ** 2 * block_energies(traj, reduction))
    assert_close(relative_energy(scaled), relative_energy(traj))


@many
@given(motions(), reductions)
def test_split_blocks_keep_the_energy(traj, reduction):
    assert_close(kinetic_energy(halved(traj), reduction), kinetic_energy(traj, reduction))
    assert_close(
        block_energies(halved(traj), reduction).unflatten(0, (traj.K, 2)).sum(1), block_energies(traj, reduction))


@many
@given(motions(), st.integers(0, 10**6))
def test_rotations_and_shifts_keep_the_energy(traj, seed):
    generator = torch.Generator().manual_seed(seed)
    def moved(x):
        d = x.shape[-1]
        return x @ torch.linalg.qr(torch.randn(d, d, generator=generator, dtype=x.dtype)).Q + torch.randn(
            d, generator=generator, dtype=x.dtype)
    assert_close(block_energies(changed(traj, moved), "sum"), block_energies(traj, "sum"))


@many
@given(motions())
def test_mean_is_sum_over_features(traj):
    sizes = torch.cat([torch.full((s.K, 1), s.x[0, 0].numel()) for s in traj.stages])
    assert_close(block_energies(traj) * sizes, block_energies(traj, "sum"))


@many
@given(motions(stages=1))
def test_displacement_bounds_the_energy(traj):
    bound = traj.K * traj.h * kinetic_energy(traj, "sum")
    assert (traj.displacement() ** 2 <= traj.path_length() ** 2 * (1 + 1e-9)).all() and (
        traj.path_length() ** 2 <= bound * (1 + 1e-9)
    ).all()
    line = traj.x[:1] + torch.linspace(0, 1, traj.K + 1, dtype=torch.float64).reshape(-1, 1, 1) * (
        traj.x[-1:] - traj.x[:1]
    )
    assert_close(traj.K * traj.h * kinetic_energy(Trajectory(line, traj.h), "sum"), traj.displacement() ** 2)


@many
@given(motions(), reductions, st.data())
def test_every_view_of_the_ledger_adds_up(traj, reduction, data):
    y = torch.tensor(data.draw(st.lists(st.sampled_from([-1, 3, 7]), min_size=traj.B, max_size=traj.B)))
    ledger = EnergyLedger(traj, y, reduction)
    for view in (ledger.cells, ledger.blocks, ledger.classes, ledger.samples):
        assert view.sum().item() == pytest.approx(ledger.total, rel=1e-12)
    assert ledger.total == pytest.approx(kinetic_energy(traj, reduction).sum().item(), rel=1e-9)
    for c, label in enumerate(ledger.labels):
        assert_close(ledger.cells[:, c], block_energies(traj.samples(y == label), reduction).sum(1))
    assert sum(row["all"] for row in ledger.table()) * traj.B == pytest.approx(ledger.total, rel=1e-9)


def test_ledger_of_a_traced_network():
    net, x = Stack(), images()
    traj = trace(net, x)
    ledger = EnergyLedger(traj, torch.tensor([0, 1, 1, 1]))
    assert ledger.names == ("layers.0", "layers.1")
    assert "| `layers.1` |" in ledger._repr_markdown_()
    still = EnergyLedger(Trajectory(torch.zeros(3, 2, 2)))
    assert still.total == 0 and [row["share"] for row in still.table()] == [0, 0]


def test_blocks_called_by_themselves_before_and_after_the_models_own_pass():
    "A loop that calls the features by hand is measured, whether or not the model itself was called before."
    torch.manual_seed(0)
    net, x = dense_net(4, 3, K=2, hidden=8), torch.randn(6, 4)
    with EnergyMeter(net) as meter:
        net.flow(x); alone = meter.take()
        net(x); whole = meter.take()
        net.flow(x); again = meter.take()
    assert_close(alone, whole); assert_close(again, whole)


@pytest.mark.parametrize("big", [False, True])
def test_second_derivatives_of_the_mean_square(big):
    shape = (2 ** 15, 80) if big else (6, 4)
    after, before = (torch.randn(shape, requires_grad=True) for _ in range(2))
    push, pull = torch.autograd.grad(kinetic._mean_square(after, before, False), (after, before), create_graph=True)
    second, = torch.autograd.grad(push.square().sum(), after)
    assert_close(pull, -push); assert_close(second, 8 * (after - before).detach() / after.numel() ** 2)


# Passes that come to nothing

@pytest.mark.parametrize("held", [False, True])
def test_with_the_loss_the_pass_it_is_made_of_is_known(held):
    net, x = small()
    with EnergyMeter(net) as meter:
        skipped = [net(9 * x) for _ in range(3)]
        if not held: del skipped
        out = net(x)
        assert_close(meter.take(out.sum()), by_hand(net, x))
        one, two = net(9 * x), net(x)
        with pytest.raises(RuntimeError, match="in more than one pass.*the passes so far are forgotten.*call forget"):
            meter.take((one * two).sum())
        one, two = net(9 * x), net(x)
        with pytest.raises(RuntimeError, match="in more than one pass"): meter.take(one.sum())
        net(9 * x); meter.forget(); net(x)
        assert_close(meter.take(), by_hand(net, x))


def test_a_pass_that_is_given_up_is_not_held():
    net, x = small()
    kept = []
    hook = net.flow.blocks[1].register_forward_hook(lambda m, args, out: kept.append(weakref.ref(out)))
    with EnergyMeter(net) as meter:
        for _ in range(4): net(x)
        gc.collect()
        assert [out() is None for out in kept] == [True] * 3 + [False] and len(meter.note.earlier) <= 1
    hook.remove()


@pytest.mark.parametrize("backend", ["aot_eager", "eager"])
def test_a_compiled_pass_that_is_given_up(fresh_compiler, backend):
    net, x = small()
    with EnergyMeter(net) as meter:
        compiled = torch.compile(net, backend=backend, fullgraph=True)
        compiled(9 * x); out = compiled(x)
        if backend == "eager":   # its graph is an ordinary one, without the marks of ordinary passes
            with pytest.raises(RuntimeError, match="call forget"): meter.take(out.sum())
            compiled(9 * x); meter.forget(); out = compiled(x)
        assert_close(meter.take(out.sum()), by_hand(net, x))
        for other in (9 * x, x[:2]):   # the second is compiled anew
            both = compiled(other).sum() + compiled(x).sum()
            with pytest.raises(RuntimeError, match="in more than one pass"): meter.take(both)


# Frozen parts

class Two(nn.Module):
    def __init__(self, way=None, off=False):
        super().__init__()
        self.a, self.b, self.head, self.way, self.off = ResidualBlock(nn.Linear(3, 3)), ResidualBlock(nn.Linear(
            3, 3)), nn.Linear(3, 2), way, off

    def forward(self, x):
        with torch.set_grad_enabled(not self.off): x = self.a(x)
        return self.head(
            self.b(x) if self.way is
            None else checkpoint(self.b,
                                 x.requires_grad_() if self.off else x, use_reentrant=self.way))


@pytest.mark.parametrize("way", [None, False])
@pytest.mark.parametrize("off", [False, True])
@pytest.mark.parametrize("asleep", ["", "a", "b", "ab"])
def test_parts_without_gradient_or_in_evaluation_mode_are_measured_in_a_pass_that_trains(way, off, asleep):
    net, x = Two(way, off), torch.randn(BATCH, 3)
    want = trace_energies(net, x).energies().mean(1).detach()
    for name in asleep: net.get_submodule(name).requires_grad_(False).eval()
    with EnergyMeter(net) as meter:
        for _ in range(2):
            out = net(x)
            got = meter.take()
            assert_close(got.detach(), want)
            (out.sum() + got.sum()).backward()   # a checkpointed block runs again here
        net.eval()
        xs = x.clone().requires_grad_()
        net(xs).sum().backward()
        assert meter.seen == []


@pytest.mark.parametrize("off", [False, True])
def test_a_reentrant_checkpoint_beside_other_blocks_is_named(off):
    net, x = Two(True, off), torch.randn(BATCH, 3)
    with EnergyMeter(net) as meter:
        net(x)
        with pytest.raises(RuntimeError, match="'b' is in a gradient checkpoint, which needs use_reentrant=False"):
            meter.take()


# Which axis counts the samples

def layer(cls=nn.TransformerEncoderLayer, **kw): return cls(6, 2, 8, dropout=0., norm_first=True, **kw)


@pytest.mark.parametrize("T, B", [(5, 4), (4, 5), (3, 3), (7, 1)])
@pytest.mark.parametrize("first", [False, True])
def test_layers_that_say_so_are_summed_over_the_features_of_a_sample(T, B, first):
    net = nn.Sequential(layer(batch_first=first), layer(batch_first=first))
    x = torch.randn(*((B, T) if first else (T, B)), 6)
    with EnergyMeter(net, {"0": net[0], "1": net[1]}, "sum") as meter:
        out = net(x)
        middle = net[0](x)
        assert_close(meter.take(), torch.stack([(middle - x).square().sum(), (out - middle).square().sum()]) / B)
        alone = x.select(0 if first else 1, 0)   # one sequence without an axis for samples
        out = net(alone)
        assert_close(meter.take().sum(), (net[0](alone) - alone).square().sum() + (out - net[0](alone)).square().sum())


class Late(nn.Module):
    "Time first; nothing in it says so."
    def __init__(self, out="mean"):
        super().__init__()
        self.block, self.head, self.out = ResidualBlock(nn.Linear(6, 6)), nn.Linear(6, 2), out
    def forward(self, x): return self.head(self.block(x).mean(0) if self.out == "mean" else self.block(x)[-1])


@pytest.mark.parametrize("out", ["mean", "last"])
def test_time_first_is_noticed_by_what_comes_out_of_the_model(out):
    net, x = Late(out), torch.randn(5, 4, 6)
    square = (net.block(x) - x).square().sum().item()
    with EnergyMeter(net, reduction="sum"), pytest.raises(
            ValueError, match=r"'block' gives \(5, 4, 6\) and the model \(4, 2\).*batch_axis=1"):
        net(x)
    for axis, samples in ((0, 5), (1, 4)):
        with EnergyMeter(net, reduction="sum", batch_axis=axis) as meter:
            net(x)
            assert meter.take().item() == pytest.approx(square / samples)
    with EnergyMeter(net) as meter:
        net(x)
        assert meter.take().item() == pytest.approx(square / x.numel())
    with EnergyMeter(net, reduction="sum", batch_axis=3), pytest.raises(ValueError, match="expected an axis 3"): net(x)


def test_a_part_that_takes_time_first_is_reason_to_ask():
    class Attends(nn.Module):
        def __init__(self, **kw): super().__init__(); self.attention = nn.MultiheadAttention(6, 2, **kw)
        def forward(self, x): return x + self.attention(x, x, x)[0]

    net = nn.Sequential(Attends())
    with pytest.raises(ValueError, match="'attention' in block '0' takes time first.*give batch_axis"):
        EnergyMeter(net, {"0": net[0]}, "sum")
    assert hook_count(net) == 0
    for each, kw in ((net, dict(batch_axis=1)), (net, dict(reduction="mean")),
                     (nn.Sequential(Attends(batch_first=True)), {})):
        EnergyMeter(each, {"0": each[0]}, **{"reduction": "sum"} | kw).remove()
    for axis in (True, -1, 1.5, "1"):
        with pytest.raises(ValueError, match="batch_axis is"): EnergyMeter(net, {"0": net[0]}, "sum", batch_axis=axis)


@pytest.mark.parametrize("shape", [(0, 4), (4, 0), (3, 0, 4)])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("velocity", ["displacement", "branch"])
def test_nothing_has_no_energy(shape, reduction, velocity):
    net = nn.Sequential(ResidualBlock(nn.Identity()))
    with (
        EnergyMeter(net, reduction=reduction, velocity=velocity),
        pytest.raises(ValueError, match="the batch is empty|the samples have no features"),
    ):
        net(torch.zeros(shape))


def test_only_trajectories_have_energy():
    for measure in (block_energies, kinetic_energy, relative_energy, EnergyLedger):
        with pytest.raises(TypeError, match="traj is a tensor .*, expected Trajectory"): measure(torch.zeros(3, 2, 4))


@pytest.mark.parametrize("scale", [1e-30, 1., 1e30])
def test_relative_energy_at_any_scale(scale):
    traj = Trajectory(scale * torch.tensor([[[1., 2.], [0., 3.]], [[2., 2.], [0., 3.]]]))
    assert_close(relative_energy(traj), torch.tensor([[.2, 0.]]))
    assert relative_energy(
        Trajectory(scale * torch.tensor([[[0.0, 0.0], [0.0, 0.0]], [[2.0, 2.0], [0.0, 0.0]]]))
    ).isfinite().tolist() == [[False, False]]


def test_ranks_of_many_values_need_little_memory():
    a = torch.arange(30_000.)   # a table of values by values would take 7 GB
    assert rank_correlation(a, -a, resamples=2).value == pytest.approx(-1)
    with pytest.raises(ValueError, match="resamples is 2000, expected at most 558"): rank_correlation(a, a)


# Everything else that cannot be meant

CALLS = {
    "block_energies": (block_energies, dict(traj=Trajectory(torch.ones(3, 4, 5)), reduction="mean")),
    "kinetic_energy": (kinetic_energy, dict(traj=Trajectory(torch.ones(3, 4, 5)), reduction="sum")),
    "relative_energy": (relative_energy, dict(traj=Trajectory(torch.ones(3, 4, 5)))),
    "EnergyLedger": (EnergyLedger, dict(traj=Trajectory(torch.ones(3, 4, 5)), y=None, reduction="mean")),
    "EnergyMeter": (
        lambda **kw: EnergyMeter(**kw).remove(),
        dict(model=small()[0], blocks=None, reduction="mean", velocity="displacement", copy=False, batch_axis=None),
    ),
    "velocity": (
        lambda part: EnergyMeter(nn.Sequential(ResidualBlock(nn.Linear(2, 2))), velocity={"0": part}),
        dict(part="velocity"),
    ),
    "block": (lambda block: EnergyMeter(nn.Sequential(ResidualBlock(nn.Linear(2, 2))), {"0": block}), dict(block=None)),
    "put": (lambda energies: EnergyMeter(small()[0]).put(energies), dict(energies=torch.ones(3))),
    "rank_correlation": (
        rank_correlation,
        dict(a=[1, 2, 3, 4.0], b=[2, 1, 3, 4.0], groups=None, clusters=None, resamples=20, level=0.9, seed=0),
    ),
}


@pytest.mark.parametrize("name", CALLS)
def test_odd_arguments_are_refused_in_our_words_or_work(name, odd_calls):
    odd_calls(*CALLS[name])


def test_positions_without_values_make_no_trajectory():
    whole = Trajectory(torch.ones(3, 4, 5))
    for make, words in ((lambda: Trajectory(whole.x.to("meta")),
                         "on meta, which has no values"), (lambda: whole.to("meta"), "cannot go to 'meta'"),
                        (lambda: Trajectory([whole.x, whole.x.to("meta")]), "x is a list of 2, expected")):
        with pytest.raises(ValueError, match=words): make()


@pytest.mark.parametrize("scale", [1e25, 1e-25])
def test_a_ledger_holds_what_single_precision_does_not(scale):
    x = torch.randn(4, 6, 3, generator=torch.Generator().manual_seed(0))
    energies = EnergyLedger(Trajectory((x.double() * scale).float(), 1.)).energies
    assert_close(energies / scale ** 2, EnergyLedger(Trajectory(x, 1.)).energies, rtol=1e-5, atol=1e-5)


def test_ranks_of_bfloat16_and_of_large_whole_numbers():
    large, small = [2 ** 60 + i for i in range(8)], list(range(8))
    assert rank_correlation(large, small).value == rank_correlation(torch.tensor(small).bfloat16(), small).value == 1


@pytest.mark.parametrize("scale", [1e-25, 1e-21, 1e21, 1e25])
def test_the_range_of_energies_is_told(scale):
    "In float32 they are infinite or not exact, as said; in float64 they are right."
    x = torch.randn(3, 8, 4, generator=torch.Generator().manual_seed(0))
    expected = block_energies(Trajectory(x.double())) * scale ** 2
    single = block_energies(Trajectory(x * scale))
    assert single.isinf().all() if scale > 1 else (single - expected).abs().max() > 1e-6 * expected.min()
    double = Trajectory(x.double() * scale)
    assert_close(block_energies(double), expected)
    assert_close(EnergyLedger(Trajectory(x * scale)).total, expected.sum().item(), rtol=1e-5, atol=0.)
    net = dense_net(4, 2, K=2, hidden=4).double().train()
    with EnergyMeter(net) as meter:
        path = net.trajectory(x[0].double() * scale)
        net(x[0].double() * scale)
        assert_close(meter.take(), block_energies(path).mean(1))
    assert "traj.to(torch.float64)" in block_energies.__doc__ and "block_energies" in EnergyMeter.__doc__

"Watching networks that nobody edited: their blocks, and energies equal to residuals computed by hand inside them."
import collections
import copy
import dataclasses
import gc
import random
import threading
import warnings
import weakref

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from conftest import hook_count
from lap_nb import hooks
from lap_nb.attach import Tracer, trace, trace_energies
from lap_nb.hooks import find_blocks
from lap_nb.lab.bench import memory
from lap_nb.depth import Elastic
from lap_nb.dynamics import Flow, ResidualBlock, Trajectory
from lap_nb.kinetic import EnergyLedger, EnergyMeter
from lap_nb.least_action import LeastAction
from lap_nb.nets import conv_net, dense_net

BATCH = 4


pytestmark = pytest.mark.usefixtures('seed')


# Networks as libraries write them

class BasicBlock(nn.Module):
    expansion = 1

    def __init__(self, cin, width, stride=1, inplace=True):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(cin, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, 1, 1, bias=False), nn.BatchNorm2d(width)
        self.relu, self.downsample = nn.ReLU(inplace=inplace), shortcut(cin, width, stride)

    def branch(self, x): return self.bn2(self.conv2(self.relu(self.bn1(self.conv1(x)))))

    def forward(self, x):
        out = self.branch(x)
        out += x if self.downsample is None else self.downsample(x)
        return self.relu(out)


class Bottleneck(BasicBlock):
    expansion = 4

    def __init__(self, cin, width, stride=1):
        super().__init__(width, width)
        cout = 4 * width
        self.conv1 = nn.Conv2d(cin, width, 1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, stride, 1, bias=False)
        self.conv3, self.bn3 = nn.Conv2d(width, cout, 1, bias=False), nn.BatchNorm2d(cout)
        self.downsample = shortcut(cin, cout, stride)

    def branch(self, x): return self.bn3(self.conv3(self.relu(super().branch(x))))


def shortcut(cin, cout, stride):
    if stride == 1 and cin == cout: return None
    return nn.Sequential(nn.Conv2d(cin, cout, 1, stride, bias=False), nn.BatchNorm2d(cout))


class ResNet(nn.Module):
    def __init__(self, block=BasicBlock, widths=(4, 8), depth=2):
        super().__init__()
        self.conv1, self.bn1, self.relu = nn.Conv2d(3, 4, 3, 1, 1, bias=False), nn.BatchNorm2d(4), nn.ReLU(inplace=True)
        cin = 4
        for i, width in enumerate(widths, 1):
            blocks = []
            for j in range(depth):
                blocks.append(block(cin, width, 1 + (j == 0 and i > 1)))
                cin = width * block.expansion
            self.add_module(f"layer{i}", nn.Sequential(*blocks))
        self.fc = nn.Linear(cin, 5)

    def forward(self, x):
        x = self.relu(self.bn1(self.conv1(x)))
        for name, layer in self.named_children():
            if name.startswith("layer"): x = layer(x)
        return self.fc(x.mean((2, 3)))


class Layer(nn.Module):
    "Pre-norm transformer layer; returns a tuple, as decoders do."
    def __init__(self, dim=8):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mix, self.mlp = nn.Linear(dim, dim), nn.Sequential(nn.Linear(dim, 16), nn.GELU(), nn.Linear(16, dim))

    def forward(self, mask=None, hidden=None):
        hidden = hidden + self.mix(self.norm1(hidden)).cumsum(1)
        return hidden + self.mlp(self.norm2(hidden)), {"weights": mask}


class Decoder(nn.Module):
    def __init__(self, K=3, checkpointing=None):
        super().__init__()
        self.embed, self.layers, self.head = (
            nn.Embedding(11, 8),
            nn.ModuleList(Layer() for _ in range(K)),
            nn.Linear(8, 11),
        )
        self.checkpointing = checkpointing

    def forward(self, ids):
        x = self.embed(ids)
        for layer in self.layers:
            if self.checkpointing is None: x = layer(None, hidden=x)[0]
            else: x = checkpoint(lambda h, f=layer: f(None, hidden=h)[0], x, use_reentrant=self.checkpointing)
        return self.head(x)


class DropPath(nn.Module):
    "A block whose branch is dropped per sample in training."
    def __init__(self, dim=4):
        super().__init__()
        self.f = nn.Linear(dim, dim)

    def forward(self, x):
        keep = (torch.rand(len(x), 1) < .5) * 2. if self.training else 1.
        return x + keep * self.f(x)


class Inplace(nn.Module):
    "A block that adds to its input where it stands."
    def __init__(self, dim=4):
        super().__init__()
        self.f = nn.Linear(dim, dim)

    def forward(self, x):
        x += self.f(x)
        return x


def images(): return torch.randn(BATCH, 3, 8, 8)
def energies(traj, reduction="mean"):
    return torch.cat([getattr(s.steps.square().flatten(2), reduction)(2) / s.h for s in traj.stages])
def tokens(length=6): return torch.randint(11, (BATCH, length))


def by_hand(model, x, blocks, branch):
    "Mean square of what `branch(block, input)` says that each block adds, for a batch `x`; also the model's output."
    energies, hooks = [], []

    def measure(block, args, kwargs, out):
        before = next(t for t in (*args, *kwargs.values()) if torch.is_tensor(t)).detach().clone()
        step = branch(block, before)
        energies.append(step.float().square().flatten(1).mean(1))

    for block in blocks.values(): hooks.append(block.register_forward_hook(measure, with_kwargs=True))
    with torch.no_grad(): out = model(x)
    for hook in hooks: hook.remove()
    return torch.stack(energies), out


# Finding

@pytest.mark.parametrize("block, names", [(BasicBlock, ["layer1.0", "layer1.1", "layer2.1"]), (Bottleneck, ["layer1.1", "layer2.1"])])
def test_resnets_are_found(block, names):
    blocks = find_blocks(ResNet(block), images())
    assert list(blocks) == names
    assert blocks.skipped["layer2.0"] == ("shape changes (4, 8, 8) -> (8, 4, 4)" if block is BasicBlock
                                          else "shape changes (16, 8, 8) -> (32, 4, 4)")
    assert {r["verdict"] for r in blocks.table()} == {
        "class",
        "matched",
        "skipped",
    } and "| `layer1.1` |" in blocks._repr_markdown_()


def test_tuples_and_keyword_inputs():
    model, ids = Decoder().eval(), tokens()
    blocks = find_blocks(model, ids)
    assert list(blocks) == ["layers.0", "layers.1", "layers.2"] and blocks.why["layers.0"] == "2 additions"
    got = energies(trace(model, {"ids": ids}, blocks))
    hand, _ = by_hand(model, ids, blocks, lambda b, x: (a := b.mix(b.norm1(x)).cumsum(1)) + b.mlp(b.norm2(x + a)))
    assert_close(got, hand)


@pytest.mark.parametrize("form, yes", [
    (lambda x, v: x + v, True), (lambda x, v: v + x, True), (lambda x, v: x - v, True), (lambda x, v: torch.add(v, x, alpha=1), True),
    (lambda x, v: (x.flatten() + v.flatten()).view_as(x), True), (lambda x, v: F.gelu(x + v), True), (lambda x, v: x + 0 * v, True),
    (lambda x, v: torch.addcmul(x, v, v), True), (lambda x, v: (x.half() + v.half()).float(), True),
    (lambda x, v: v - x, False), (lambda x, v: torch.add(v, x, alpha=.5), False), (lambda x, v: .7 * x + v, False),
    (lambda x, v: F.layer_norm(x + v, [4]), False), (lambda x, v: x.relu() + v, False), (lambda x, v: v, False), (lambda x, v: x, False),
    (lambda x, v: x.flip(1) + v, False), (lambda x, v: x.detach() + v, False), (lambda x, v: torch.relu(x), False)])
def test_the_criterion(form, yes):
    class Block(nn.Module):
        def __init__(self): super().__init__(); self.f = nn.Linear(4, 4)
        def forward(self, x): return form(x, self.f(x))

    model = nn.Sequential(nn.Linear(4, 4), Block(), nn.Linear(4, 2))
    if yes: assert list(find_blocks(model, torch.randn(3, 4))) == ["1"]
    else:
        with pytest.raises(ValueError, match="no residual block"): find_blocks(model, torch.randn(3, 4))


# What a residual block is: forms as one finds them, by what should be seen or said

class Form(nn.Module):
    "`form(x, f)` of the input and a branch."
    def __init__(self, form, f=None): super().__init__(); self.form, self.f = form, f or nn.Linear(6, 6)
    def forward(self, x): return self.form(x, self.f)


def judged(form, x=None, f=None):
    "The reason with which a form is found in a network, or None; the reason for which it is not, or None."
    net = nn.Sequential(nn.Linear(6, 6), Form(form, f), ResidualBlock(nn.Linear(6, 6)), nn.Linear(6, 3)).eval()
    blocks = find_blocks(net, torch.randn(4, 6) if x is None else x)
    assert "2" in blocks
    return blocks.why.get("1"), blocks.skipped.get("1")


def sliced(v, x): v += x; return v
def copied(v, x): v = v.clone(); v[:,:] = x + v; return v
def part(x, v): x[:, 1:4] += v[:, 1:4]; return x
def headed(x, act): act(x); return x
@torch.no_grad()
def hidden(f, x): return f(x)
NP = lambda t: torch.from_numpy(t.detach().numpy())
COORDS = torch.randn(6)
SEEN = {
    "a slice that is added to": lambda x, f: sliced(torch.cat([f(x), f(x)], 1)[:, :6], x),
    "a strided slice": lambda x, f: sliced(f(x).repeat_interleave(2, 1)[:, ::2], x),
    "a slice of the input": lambda x, f: part(x, f(x)),
    "an assignment": lambda x, f: copied(f(x), x),
    "out of a chunk": lambda x, f: torch.cat([f(x), x], 1).chunk(2, 1)[1] + f(x),
    "divided by one": lambda x, f: (x + f(x)) / 1.0,
    "by a tensor of one": lambda x, f: (x + f(x)) / torch.tensor(1.0),
    "twice and halved": lambda x, f: (2 * x + f(x)) / 2,
    "a root and back": lambda x, f: (x / 2**0.5 + f(x)) * 2**0.5,
    "stacked and summed": lambda x, f: torch.stack([f(x), x]).sum(0),
    "last axis": lambda x, f: torch.stack([x, f(x), f(x)], -1).sum(-1),
    "concatenated and summed": lambda x, f: torch.cat([x[None], f(x)[None]]).sum(0),
    "a mean": lambda x, f: 2 * torch.stack([x, f(x)]).mean(0),
    "python's sum": lambda x, f: sum([x, f(x)]),
    "transposed": lambda x, f: (x.t() + f(x).t()).t(),
    "permuted": lambda x, f: (x[None].permute(2, 1, 0) + f(x)[None].permute(2, 1, 0)).permute(2, 1, 0)[0],
    "flipped and back": lambda x, f: (x.flip(1) + f(x)).flip(1),
    "rolled and back": lambda x, f: (x.roll(2, 1) + f(x)).roll(-2, 1),
    "padded and cut": lambda x, f: (F.pad(x, (1, 1)) + F.pad(f(x), (1, 1)))[:, 1:-1],
    "windows": lambda x, f: (
        (x.view(-1, 2, 3).transpose(1, 2).reshape(-1, 6) + f(x)).view(-1, 3, 2).transpose(1, 2).reshape(-1, 6)
    ),
    "halves": lambda x, f: torch.cat([x[:, :3] + f(x)[:, :3], x[:, 3:]], 1),
    "two halves": lambda x, f: torch.cat([a + b for a, b in zip(x.chunk(2, 1), f(x).chunk(2, 1))], 1),
    "minus minus": lambda x, f: -(-x - f(x)),
    "twice negative": lambda x, f: f(x) - (-x),
    "fused": lambda x, f: torch.addmm(x, f(x), f.weight),
    "fused point by point": lambda x, f: torch.addcmul(x, f(x), f(x)),
    "half precision": lambda x, f: (x.bfloat16() + f(x).bfloat16()).float(),
    "a position, too": lambda x, f: x + COORDS + f(x),
    "two sums": lambda x, f: (y := x + f(x)) + f(y),
    "relu in place": lambda x, f: f(headed(x, F.relu_)) + x,
    "silu in place": lambda x, f: x + f(headed(x, lambda t: F.silu(t, inplace=True))),
    "leaky, and the sum in place": lambda x, f: headed(x, lambda t: F.leaky_relu_(t)).add_(f(x)),
    "elu in place": lambda x, f: torch.stack([headed(x, F.elu_), f(x)]).sum(0),
    "without a graph": lambda x, f: x + hidden(f, x),
    "detached": lambda x, f: x + f(x.detach()),
    "in numpy": lambda x, f: x + NP(x).square(),
    "zero": lambda x, f: x + 0 * f(x),
    "noise on the branch": lambda x, f: x + f(x) * torch.rand(()),
    "activation after": lambda x, f: F.gelu(x + f(x)),
    "by a gate": lambda x, f: x + torch.sigmoid(f(x)) * x,
    "by itself": lambda x, f: x + x.square(),
    "mean": lambda x, f: x + x.mean(1, keepdim=True),
}
STILL = {
    "position": lambda x, f: x + COORDS,
    "learned position": lambda x, f: x + f.bias,
    "buffer in place": lambda x, f: x.add_(COORDS),
    "noise": lambda x, f: x + torch.randn(6),
    "noise like it": lambda x, f: x + torch.randn_like(x),
    "zero": lambda x, f: x + 0,
    "zeros": lambda x, f: x + torch.zeros_like(x),
    "one": lambda x, f: x + 1,
    "minus": lambda x, f: x - COORDS,
    "by its shape": lambda x, f: x + torch.arange(x.shape[1]),
    "branch of a constant": lambda x, f: x + f(COORDS),
    "stacked": lambda x, f: torch.stack([x, f(COORDS).expand_as(x)]).sum(0),
    "dropped position": lambda x, f: F.dropout(x + COORDS, 0.5, False),
    "on a slice": lambda x, f: part(x, f(COORDS).expand_as(x)),
    "a position on a half": lambda x, f: torch.cat([x[:, :3] + f(COORDS)[:3], x[:, 3:]], 1),
    "on a slice of slices": lambda x, f: part(part(x, f(COORDS).expand_as(x)), COORDS.expand_as(x)),
    "its own generator": lambda x, f: x + torch.rand(x.shape, generator=GENERATOR),
}
GENERATOR = torch.Generator()
SAID = {
    "scaled": (lambda x, f: 0.7 * x + f(x), "scaled by 0.7"),
    "halved": (lambda x, f: (x + f(x)) / 2, "scaled by 0.5"),
    "by a tensor": (lambda x, f: x * torch.tensor(3.0) + f(x), "scaled by 3"),
    "lerp": (lambda x, f: torch.lerp(x, f(x), 0.25), "scaled by 0.75"),
    "mean of two": (lambda x, f: torch.stack([x, f(x)]).mean(0), "scaled by 0.5"),
    "alpha": (lambda x, f: torch.add(f(x), x, alpha=0.1), "scaled by 0.1"),
    "beta": (lambda x, f: torch.addmm(x, f(x), f.weight, beta=0.2), "scaled by 0.2"),
    "minus": (lambda x, f: f(x) - x, "scaled by -1"),
    "nothing of it": (lambda x, f: 0 * x + f(x), "scaled by 0"),
    "flipped": (lambda x, f: x.flip(1) + f(x), "in another order"),
    "rolled": (lambda x, f: x.roll(1, 0) + f(x), "in another order"),
    "halves swapped": (lambda x, f: torch.cat([x[:, 3:], x[:, :3]], 1) + f(x), "in another order"),
    "half of it": (lambda x, f: F.pad(x[:, :3], (0, 3)) + f(x), "in part or mixed"),
    "mixed": (lambda x, f: x.sum(1, keepdim=True) + f(x), "in part or mixed"),
    "relu first": (lambda x, f: x.relu() + f(x), "through relu"),
    "both": (lambda x, f: F.silu(x) + f(x), "through silu"),
    "normalised": (lambda x, f: F.layer_norm(x + f(x), [6]), "NativeLayerNorm in the way"),
    "gated": (lambda x, f: x * COORDS + f(x), "Mul in the way"),
    "nothing": (lambda x, f: f(x), "no summand"),
    "the same": (lambda x, f: x, "no summand of its output"),
    "put in": (lambda x, f: torch.zeros(4, 6).copy_(x), "no summand of its output"),
}


@pytest.mark.parametrize("form", SEEN)
def test_blocks_in_all_their_forms_are_seen(form):
    why, reason = judged(SEEN[form])
    assert why and "addition" in why and reason is None


@pytest.mark.parametrize("form", STILL)
def test_what_does_not_depend_on_the_input_is_no_block(form):
    assert judged(STILL[form]) == (None, "it adds nothing that depends on its input: a position, noise or a constant")


@pytest.mark.parametrize("form", SAID)
def test_what_is_no_summand_is_told_by_its_true_reason(form):
    form, word = SAID[form]
    why, reason = judged(form)
    assert why is None and word in reason


@pytest.mark.parametrize("form", [name for name in SEEN if name not in ("noise on the branch",)])
def test_blocks_in_all_their_forms_are_measured_by_their_displacement(form):
    net, x = nn.Sequential(Form(SEEN[form]), nn.Linear(6, 3)), torch.randn(4, 6)
    with torch.no_grad():
        want = (SEEN[form](x.clone(), net[0].f) - x).square().mean(1)
        assert_close(trace_energies(net, x.clone()).energies()[0], want)
        assert_close(energies(trace(net, x.clone()))[0], want)


def test_the_values_of_the_network_decide_nothing():
    def zero(form):
        f = nn.Linear(6, 6)
        for p in f.parameters(): nn.init.zeros_(p)
        return judged(form, f=f)[0]
    assert all(zero(SEEN[name]) for name in SEEN if name not in ("without a graph", "detached"))
    assert all(judged(form, torch.zeros(4, 6))[0] for name, form in SEEN.items())


class Positions(nn.Module):
    def __init__(self, learned):
        super().__init__()
        self.drop, self.p = nn.Dropout(.1), nn.Parameter(torch.randn(1, 7, 8)) if learned else None
        self.register_buffer("pe", torch.randn(1, 7, 8))
    def forward(self, x): return self.drop(x + (self.pe if self.p is None else self.p)[:, :x.shape[1]])


class Encoder(nn.Module):
    "Layers with something added between them."
    def __init__(self, layers, between):
        super().__init__()
        self.layers, self.between, self.extra = nn.ModuleList(layers), between, nn.Linear(8, 8)
    def forward(self, x):
        for layer in self.layers: x = layer(self.between(self, x))
        return x


TORCH = lambda norm_first: nn.TransformerEncoderLayer(8, 2, 16, batch_first=True, norm_first=norm_first)
@pytest.mark.parametrize("between", [lambda self, x: x, lambda self, x: x + torch.ones(8), lambda self, x: x + torch.randn(x.shape), lambda self, x: x + self.extra(x), lambda self, x: x + self.extra.bias], ids=["nothing", "a constant", "noise", "a branch", "a parameter"])
@pytest.mark.parametrize("wrap", [lambda net: net, lambda net: nn.Sequential(net), lambda net: nn.Sequential(nn.Linear(8, 8), Positions(True), net, nn.Linear(8, 2))], ids=["alone", "wrapped", "in a network"])
def test_layers_are_found_in_an_encoder_that_adds_something_between_them(between, wrap):
    net = wrap(Encoder([TORCH(True) for _ in range(3)], between))
    blocks = find_blocks(net, torch.randn(2, 5, 8))
    assert [n.split(".")[-2:] for n in blocks] == [["layers", str(k)] for k in range(3)]


@pytest.mark.parametrize("learned", [True, False])
def test_a_position_in_front_of_normalised_layers_is_no_block(learned):
    net = nn.Sequential(Positions(learned), nn.TransformerEncoder(TORCH(False), 2, enable_nested_tensor=False))
    with pytest.raises(ValueError, match="NativeLayerNorm in the way"): find_blocks(net, torch.randn(2, 5, 8))
    before = nn.Sequential(Positions(learned), TORCH(True))
    assert (
        find_blocks(before, torch.randn(2, 5, 8)).skipped["0"]
        == "it adds nothing that depends on its input: a position, noise or a constant"
    )


def test_a_small_residual_part_does_not_take_its_layer_apart():
    class Layer2(nn.Module):
        "A convolution for the position at its head, as in CPVT or DaViT; `big`: most of the layer is in it."
        def __init__(self, big):
            super().__init__()
            self.cpe, self.mlp = ResidualBlock(
                nn.Sequential(nn.Linear(8, 99 if big else 2), nn.Linear(99 if big else 2, 8))), nn.Linear(8, 8)
        def forward(self, x): x = self.cpe(x); return x + self.mlp(x)
    x = torch.randn(3, 8)
    assert list(find_blocks(nn.Sequential(Layer2(False), Layer2(False)), x)) == ["0", "1"]
    blocks = find_blocks(nn.Sequential(Layer2(True), Layer2(True)), x)
    assert list(blocks) == ["0.cpe", "1.cpe"] and "with 1 addition of its own beside them" in blocks.skipped["0"]


def test_random_chains_of_moves_and_their_inverses_are_seen_through():
    "Generated: a sum between a random chain of rearrangements and its inverse, or one of them left out."
    moves = [(lambda t: t.flip(1), lambda t: t.flip(1)), (lambda t: t.roll(2, 1), lambda t: t.roll(-2, 1)),
             (lambda t: t.transpose(0, 1).contiguous(), lambda t: t.transpose(0, 1)),
             (lambda t: t * 4, lambda t: t / 4), (lambda t: -t, lambda t: -t),
             (lambda t: t.unsqueeze(0).squeeze(0), lambda t: t),
             (lambda t: torch.cat([t[:, 2:], t[:, :2]], 1), lambda t: torch.cat([t[:, -2:], t[:, :-2]], 1))]
    generator = torch.Generator().manual_seed(5)
    draw = lambda n: int(torch.randint(n, (), generator=generator))
    for _ in range(40):
        chain = [moves[draw(len(moves))] for _ in range(1 + draw(4))]
        def form(x, f, chain=chain, skip=None):
            a, v = x.repeat(2, 1)[:6], f(x.repeat(2, 1)[:6])
            for there, _ in chain: a, v = there(a), there(v)
            a = a + v
            for k, (_, back) in reversed(list(enumerate(chain))): a = a if k == skip else back(a)
            return a
        square = torch.randn(6, 6)
        whole = lambda x, f: form(torch.cat([x, x[:0]]), f)
        assert judged(whole, square)[0]
        skip = draw(len(chain))
        left_out = lambda x, f: form(torch.cat([x, x[:0]]), f, skip=skip)
        same = torch.equal(left_out(square, torch.zeros_like), square)
        assert bool(judged(left_out, square)[0]) == same


def test_an_action_that_nothing_can_change_is_refused():
    x = torch.randn(2, 5, 8)
    for still in (Positions(False), Form(lambda x, f: x + torch.ones(8)), Form(lambda x, f: x + 0 * x.detach() + 1)):
        net = nn.Sequential(nn.Linear(8, 8), still, TORCH(True)).eval()
        assert find_blocks(net, x,
                           "1").why["1"].startswith("named by a pattern; it adds nothing that depends on its input")
        action = trace_energies(net, x, "1").energies().sum()
        with pytest.raises(RuntimeError, match="the action is above zero and has no gradient"): hooks.pulls(action, net)
        (action + net(x).sum()).backward()   # the graph is still there
        assert hooks.pulls(action + trace_energies(net, x, "2").energies().sum(), net)
    net[2].requires_grad_(False)
    with pytest.raises(RuntimeError, match="has no gradient"):
        hooks.pulls(trace_energies(net, x, "1").energies().sum(), net)


def test_an_action_that_has_a_gradient_or_is_zero_is_not():
    x, learned = torch.randn(2, 5, 8), nn.Sequential(nn.Linear(8, 8), Positions(True), TORCH(True))
    assert hooks.pulls(trace_energies(learned, x, "1").energies().sum(), learned)
    zero = nn.Sequential(nn.Linear(8, 8), ResidualBlock(nn.Linear(8, 8)))
    for p in zero[1].parameters(): nn.init.zeros_(p)
    assert hooks.pulls(trace_energies(zero, x).energies().sum(), zero) is False
    fast = torch.compile(zero, backend="aot_eager")
    nn.init.ones_(zero[1].velocity.bias)
    with EnergyMeter(zero) as meter:
        loss = fast(x).sum()
        action = meter.take(loss).sum()
        assert hooks.pulls(action, zero)
        (loss + action).backward()


def test_few_passes_and_linear_work():
    "The probe runs the network once, and the steps of its walks grow as the number of blocks."
    class Counted(nn.Module):
        passes = calls = 0
        def __init__(self, K):
            super().__init__()
            self.stem, self.stages = (
                nn.Linear(6, 6),
                nn.Sequential(
                    *(nn.Sequential(*(Form(lambda x, f: x + f(x)) for _ in range(K // 4))) for _ in range(4))
                ),
            )
        def forward(self, x): Counted.passes += 1; return self.stages(self.stem(x))

    def work(K):
        Counted.passes, steps = 0, 0
        def count(node, *args, was=hooks._ways_back): nonlocal steps; steps += 1; return was(node, *args)
        with pytest.MonkeyPatch.context() as m:
            m.setattr(hooks, "_ways_back", count)
            assert len(find_blocks(Counted(K), torch.randn(2, 6))) == K
        return steps
    few, many = work(50 // 4 * 4), work(200)
    assert Counted.passes <= 10 and many <= 5 * few


def test_frozen_and_zero_initialised_networks_are_found():
    model = dense_net(4, 2, K=3).requires_grad_(False)
    for p in model.flow.parameters(): p.zero_()
    blocks = find_blocks(model, torch.randn(3, 4))
    assert len(blocks) == 3 and set(blocks.moved.values()) == {0.}


def test_what_only_passes_its_input_on_is_no_block():
    class Pass(nn.Module):
        def forward(self, x): return x

    blocks = find_blocks(nn.Sequential(Pass(), ResidualBlock(nn.Linear(4, 4))), torch.randn(3, 4))
    assert list(blocks) == ["1"] and blocks.skipped["0"] == "its input is no summand of its output"


def test_parts_without_gradient_keep_their_mode():
    class Averaging(nn.Module):
        def __init__(self):
            super().__init__()
            self.block, self.scale = ResidualBlock(nn.Linear(4, 4)), nn.Parameter(torch.ones(()))

        @torch.no_grad()
        def forward(self, x):
            x = self.block(x)
            self.scale.mul_(1.)   # an error where gradients are on
            return x * self.scale

    assert list(find_blocks(nn.Sequential(nn.Flatten(), Averaging()), torch.randn(3, 4))) == ["1.block"]


def test_levels_are_never_nested():
    class Outer(nn.Module):
        def __init__(self): super().__init__(); self.inner, self.out = ResidualBlock(nn.Linear(4, 4)), nn.Linear(4, 4)
        def forward(self, x): return x + self.out(self.inner(x))

    class Around(nn.Module):
        def __init__(self, net): super().__init__(); self.net, self.scale = net, nn.Linear(4, 4)
        def forward(self, x): return x + self.scale(self.net(x))

    model = Around(nn.Sequential(Outer(), nn.Sequential(Outer())))
    blocks = find_blocks(model, torch.randn(3, 4))
    assert list(blocks) == ["net.0", "net.1.0"]
    assert blocks.skipped["net.0.inner"] == "inside net.0" and blocks.skipped["net"] == "a chain of the blocks inside it"
    assert blocks.skipped["(model)"].startswith("the whole network")
    assert list(find_blocks(Outer(), torch.randn(3, 4))) == ["inner"]
    assert list(find_blocks(ResidualBlock(nn.Linear(4, 4)), torch.randn(3, 4))) == ["(model)"]


def test_patterns_overrule():
    model, x = ResNet(), images()
    assert list(find_blocks(model, x, blocks="layer?")) == ["layer1"]
    assert list(find_blocks(model, x, blocks=["layer1.1", "bn1"])) == ["bn1", "layer1.1"]
    assert list(find_blocks(model, x, exclude="layer1")) == ["layer2.1"]
    assert list(find_blocks(model, x, blocks="layer*.*", exclude="*.0")) == ["layer1.1", "layer2.1"]
    assert list(find_blocks(model, blocks="layer1.*", exclude="layer1.0")) == ["layer1.1"]
    with pytest.raises(ValueError, match=r"'layer3\.1' matches no module; the nearest names are .*layer2\.1"):
        find_blocks(model, x, blocks="layer3.1")
    with pytest.raises(ValueError, match="'typo' matches no module"): find_blocks(model, x, exclude="typo")
    with pytest.raises(ValueError, match=r"shape changes \(4, 8, 8\)"): find_blocks(model, x, blocks="layer2.0")


def test_finding_leaves_the_model_and_the_random_state_alone():
    class Counting(ResNet):
        def __init__(self): super().__init__(); self.register_buffer("calls", torch.zeros(()))
        def forward(self, x): self.calls += 1; torch.rand(1); return super().forward(x)

    model = Counting().train()
    model.layer1.eval()
    before, modes, state = (
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        torch.get_rng_state(),
    )
    find_blocks(model, torch.ones(BATCH, 3, 8, 8))
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert (
        [m.training for m in model.modules()] == modes
        and torch.equal(torch.get_rng_state(), state)
        and hook_count(model) == 0
    )
    assert all(p.grad is None for p in model.parameters())


class Moded(nn.BatchNorm1d):
    "Notes in which mode it runs, outside the main thread."
    def forward(self, x):
        if threading.current_thread() is not threading.main_thread():
            self.seen = [*getattr(self, "seen", []), self.training]
        return super().forward(x)


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.parts = nn.Sequential(*(m for _ in range(6) for m in (ResidualBlock(nn.Linear(4, 4)), Moded(4))))
    def forward(self, x): return self.parts(x)


@pytest.mark.parametrize("look", [lambda net, x: find_blocks(net, x), trace, trace_energies])
def test_a_thread_that_trains_the_network_meanwhile_is_not_disturbed(look):
    def run(looks):
        torch.manual_seed(0)
        net, batches, energies = Trained().train(), torch.randn(60, 8, 4), []
        opt = torch.optim.SGD(net.parameters(), .01)
        def train():
            with EnergyMeter(net) as meter:
                for x in batches:
                    loss = net(x).square().mean()
                    energies.append(meter.take(loss).detach())
                    opt.zero_grad(); loss.backward(); opt.step()
        thread = threading.Thread(target=train)
        thread.start()
        while looks and thread.is_alive(): look(net, batches[0])
        thread.join()
        assert hook_count(net) == 0 and all(m.training for m in net.modules())
        return net, torch.stack(energies)
    (net, got), (_, want) = run(True), run(False)
    assert all(m.seen == [True] * 60 for m in net.modules() if isinstance(m, Moded))
    if look not in (trace, trace_energies):   # these run the network in the mode it is in: statistics move
        assert all(m.num_batches_tracked == 60 for m in net.modules() if isinstance(m, nn.BatchNorm1d))
    assert_close(got, want)   # batch norm in training mode does not read its statistics


def test_two_threads_may_look_at_once():
    net, x, found = Trained().train(), torch.randn(8, 4), []
    threads = [threading.Thread(target=lambda: found.append(list(find_blocks(net, x)))) for _ in range(6)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    assert found == [[f"parts.{k}" for k in range(0, 12, 2)]] * 6 and hook_count(net) == 0 and net.training


@pytest.mark.parametrize("call", [find_blocks, trace, trace_energies])
@pytest.mark.parametrize("x", [torch.randn(3, 4), (torch.randn(3, 4),), {"x": torch.randn(3, 4)}])
def test_swapped_arguments_are_told(call, x):
    with pytest.raises(TypeError, match="are model and x swapped"): call(x, dense_net(4, 2))
    with pytest.raises(TypeError) as e: call(x)
    assert "swapped" not in str(e.value)


def test_finding_cleans_up_after_an_error():
    model = ResNet().train()
    with pytest.raises(RuntimeError): find_blocks(model, torch.randn(2, 5, 8, 8))
    with pytest.raises(RuntimeError): trace(model, torch.randn(2, 5, 8, 8), {"layer1.0": model.layer1[0]})
    assert hook_count(model) == 0 and model.training


# Sums in the model's own forward

class Tabular(nn.Module):
    "Adds what its layers return; `norm`: to what it normalises for them; `cell`: how."
    def __init__(self, cell=lambda x, v: x + v, norm=False, layer=lambda: nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 6)), K=3):
        super().__init__()
        self.stem, self.layers, self.head, self.cell, self.norm = (
            nn.Linear(4, 6),
            nn.ModuleList(layer() for _ in range(K)),
            nn.Linear(6, 2),
            cell,
            nn.LayerNorm(6) if norm else nn.Identity(),
        )
    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers: x = self.cell(x, layer(self.norm(x)))
        return self.head(x)


CELLS = {
    "x + v": lambda x, v: x + v, "v + x": lambda x, v: v + x, "in place": lambda x, v: v.add_(x),
    "minus": lambda x, v: x - v, "then relu": lambda x, v: (x + v).relu(),
    "then norm": lambda x, v: F.layer_norm(x + v, [6]), "reshaped": lambda x, v: x + v.view(-1, 6)}
@pytest.mark.parametrize("cell", CELLS)
@pytest.mark.parametrize("norm", [False, True])
@pytest.mark.parametrize("layer", [lambda: nn.Linear(6, 6), lambda: nn.Sequential(nn.Linear(6, 6), nn.Tanh())], ids=["a layer", "several"])
def test_branches_of_sums_in_the_models_own_forward_are_named_and_measured_as_such(cell, norm, layer):
    net, x = Tabular(CELLS[cell], norm, layer), torch.randn(5, 4)
    with pytest.raises(
            ValueError,
            match=r"layers.0: a branch: who calls it adds what it returns .*blocks=\.\.\.\) with the names of the "
                  r"branches, .*velocity='branch'"
    ):
        find_blocks(net, x)
    found, outs = find_blocks(net, x, "layers.?"), []
    assert (
        found.branches == {f"layers.{k}": not norm for k in range(3)}
        and [r["verdict"] for r in found.table() if r["name"] in found and r["verdict"] != "class"] == ["branch"] * 3
    )
    for m in net.layers: m.register_forward_hook(lambda m, args, out: outs.append(out.detach().square().mean(1)))
    with torch.no_grad(): got = trace_energies(net, x, found).energies()
    assert_close(got, torch.stack(outs))
    with EnergyMeter(net, found, velocity="branch") as meter:
        loss = net(x).sum()
        assert_close(meter.take(loss), got.mean(1))
    assert_close(trace_energies(net, x, "layers.?").energies(), got)


def test_a_branch_is_never_taken_for_a_block():
    net, x = Tabular(), torch.randn(5, 4)
    found = find_blocks(net, x, "layers.*[0-9]")
    for refused in (lambda: EnergyMeter(net, found), lambda: hooks.chosen_blocks(net, found),
                    lambda: hooks.chosen_blocks(net, "layers.?", x), lambda: hooks.BlockHooks(net, "layers.?", x)):
        with pytest.raises(ValueError, match="'layers.0' is a branch"): refused()
    with pytest.raises(ValueError, match="positions are not known"): trace(Tabular(norm=True), x, "layers.?")
    walk = trace(net, x, found)
    assert_close(net.head(walk.x[-1]), walk.output)
    assert hook_count(net) == 0


def test_what_is_added_inside_a_block_is_its_own_affair():
    net, x = nn.Sequential(TORCH(True), TORCH(True)), torch.randn(2, 5, 8)
    assert list(find_blocks(net, x)) == ["0", "1"] and not find_blocks(net, x).branches


def test_a_module_that_is_added_elsewhere_is_no_branch_of_its_input():
    class Sides(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.block = nn.Linear(6, 6), nn.Linear(6, 6), ResidualBlock(nn.Linear(6, 6))
        def forward(self, x): x = self.block(x); return self.a(x) + self.b(x)
    assert list(find_blocks(Sides(), torch.randn(3, 6))) == ["block"]


# The table

def of_class(blocks, kind): return next(r for r in blocks.table() if r["verdict"] == "class" and r["kind"] == kind)


def test_a_class_that_repeats_has_a_row_with_its_own_reason():
    blocks = find_blocks(ResNet(depth=3), images())
    row = of_class(blocks, "BasicBlock")
    whole, part = (sum(p.numel() for m in ms for p in m.parameters()) for ms in ([ResNet(depth=3)], blocks.values()))
    assert (
        row["why"]
        == f"5 of 6 modules of this class, {part / whole:.0%} of the parameters, covered; the others: shape changes (4, 8, 8) -> (8, 4, 4)"
    )
    net = nn.Sequential(nn.Linear(8, 8), nn.Sequential(*(TORCH(False) for _ in range(4))),
                        ResidualBlock(nn.Linear(8, 8)))
    with pytest.warns(
            UserWarning,
            match="only part of Sequential is covered: of TransformerEncoderLayer, 0 of 4 modules of this class, 0% "
                  "of the parameters, covered; .*NativeLayerNorm in the way"
    ):
        blocks = find_blocks(net, torch.randn(2, 5, 8))
    assert list(blocks) == ["2"] and "NativeLayerNorm in the way" in of_class(blocks, "TransformerEncoderLayer")["why"]
    assert [n for n in blocks.skipped if n.startswith("1")] == ["1.0", "1.1", "1.2", "1.3"]   # and not the container
    with pytest.raises(
            ValueError,
            match="1.0: its input is no summand of its output: NativeLayerNorm in the way, as in 3 more of this class"):
        find_blocks(net[:2], torch.randn(2, 5, 8))


def test_a_class_of_which_only_part_is_covered_warns():
    class Either(nn.Module):
        def __init__(self, post): super().__init__(); self.f, self.post = nn.Linear(6, 6), post
        def forward(self, x): return F.layer_norm(x + self.f(x), [6]) if self.post else x + self.f(x)
    net, x = nn.Sequential(*(Either(k in (1, 4)) for k in range(5)), nn.Linear(6, 30)), torch.randn(3, 6)
    with pytest.warns(
            UserWarning,
            match=r"of Either, 3 of 5 modules of this class, 30% of the parameters, covered; the others: "
                  r".*NativeLayerNorm in the way \(2 times\)"
    ):
        find_blocks(net, x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        find_blocks(net, x, "[023]")
        find_blocks(net, x, exclude="4")
        find_blocks(ResNet(), images())
        find_blocks(Decoder(), tokens())
        find_blocks(dense_net(3, 2, K=3), torch.randn(2, 3))


def test_names_cost_no_more_than_there_are():
    "Names are looked up in proportion to the number of blocks."
    def looks(K):
        count, net = 0, nn.Sequential(*(ResidualBlock(nn.Linear(2, 2)) for _ in range(K)))
        with pytest.MonkeyPatch.context() as m:
            above = hooks._above
            def counted(name): nonlocal count; count += 1; return above(name)
            m.setattr(hooks, "_above", counted)
            assert len(find_blocks(net, torch.randn(2, 2))) == K
        return count
    assert looks(200) <= 2.1 * looks(100)


# The model stays as it was

@dataclasses.dataclass
class Memory:
    keys: list
    last: object = None


class Keeps(nn.Module):
    "A block with everything that modules keep for themselves, written to at each call."
    def __init__(self):
        super().__init__()
        self.f, self.cache, self.calls, self.seen, self.memory = nn.Linear(4, 4), {}, 0, [], Memory([])
        self.queue, self.names, self.nested = collections.deque(maxlen=2), set(), {"a": [torch.zeros(2)], "b": ([],)}
        self.stat, self.gone = torch.zeros(4), "soon"
        self.generator, self.python, self.numpy = torch.Generator(), random.Random(0), np.random.default_rng(0)
        self.register_buffer("moved", torch.zeros(()))

    def forward(self, x):
        y = self.f(x)
        self.cache["mode", self.training] = y
        self.calls += 1
        self.seen.append(y)
        self.memory.keys.append(y)
        self.memory.last = y
        self.queue.append(y)
        self.names.add(len(self.names))
        self.nested["a"].append(y)
        self.nested["b"][0].append(y)
        self.nested["a"][0] += 1
        self.stat += 1; self.moved += 1
        self.new, self.other = y, {"y": y}
        if hasattr(self, "gone"): del self.gone
        self.register_buffer("later", y.detach())
        torch.rand(1, generator=self.generator)
        self.python.random()
        self.numpy.random()
        random.random()
        np.random.rand()
        torch.rand(1)
        return x + y


def kept(net):
    "All that it holds, as text."
    def text(v):
        if isinstance(v, torch.Tensor): return v.tolist(), v.requires_grad
        if isinstance(v, torch.Generator): return v.get_state().tolist()
        if isinstance(v, random.Random): return v.getstate()
        if isinstance(v, np.random.Generator): return str(v.bit_generator.state)
        if isinstance(v, dict): return {str(k): text(w) for k, w in v.items()}
        if isinstance(v, (list, tuple, set, collections.deque)): return type(v).__name__, [text(w) for w in v]
        if isinstance(v, Memory): return text(vars(v))
        return v if isinstance(v, (int, str, bool, type(None))) else type(v).__name__
    return [{k: text(v) for k, v in vars(m).items()} for m in net.modules()] + [
        torch.get_rng_state().tolist(),
        random.getstate(), text(np.random.get_state()[1].tolist())]


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize("warm", [True, False])
@pytest.mark.parametrize("fails", [True, False])
def test_all_that_modules_keep_for_themselves_is_as_before(mode, warm, fails):
    net, x = nn.Sequential(Keeps(), Keeps()).train(mode), torch.randn(3, 4)
    if warm:
        with torch.no_grad(): net(x)
    bad = nn.Sequential(*net, nn.Linear(5, 5)).train(mode)
    before, objects = kept(net), [(m.cache, m.seen, m.memory, m.queue, m.nested["a"], m.stat) for m in net]
    if fails:
        with pytest.raises(RuntimeError): find_blocks(bad, x)
    else: assert list(find_blocks(net, x)) == ["0", "1"]
    assert kept(net) == before
    assert all(a is b for m, old in zip(net, objects)
               for a, b in zip((m.cache, m.seen, m.memory, m.queue, m.nested["a"], m.stat), old))
    if not warm: copy.deepcopy(net)


class Merges(nn.Module):
    "Merges a branch into its weight when it is to evaluate, as LoRA layers do; with a counter of changes of mode."
    def __init__(self):
        super().__init__()
        self.w, self.d, self.merged = nn.Parameter(torch.randn(4, 4)), nn.Parameter(torch.randn(4, 4)), False
    def train(self, mode=True):
        if mode == self.merged:
            self.w.data += (-1. if mode else 1.) * self.d.data
            self.merged = not mode
        return super().train(mode)
    def forward(self, x): return x + x @ (self.w if self.merged else self.w + self.d)


class Frozen(nn.Sequential):
    "Keeps its norms in evaluation mode whatever it is told."
    def train(self, mode=True):
        super().train(mode)
        for m in self.modules():
            if isinstance(m, nn.BatchNorm1d): m.training = False
        return self


@pytest.mark.parametrize("mode", [True, False])
def test_modes_are_set_as_the_modules_set_them(mode):
    x = torch.randn(3, 4)
    net = nn.Sequential(Merges(), Frozen(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout()), Merges()).train(mode)
    net[2].eval()
    modes, weights, want = (
        [(m.training, getattr(m, "merged", None)) for m in net.modules()],
        [p.clone() for p in net.parameters()],
        net[0](x),
    )
    find_blocks(net, x)
    assert [(m.training, getattr(m, "merged", None)) for m in net.modules()] == modes
    for p, old in zip(net.parameters(), weights): assert_close(p, old, rtol=0, atol=0)
    assert_close(net[0](x), want, rtol=0, atol=0)


def test_caches_of_an_evaluation_are_not_left(transformers):
    small = dict(image_size=64, hidden_sizes=[16, 24, 32], num_attention_heads=[2, 2, 2], depths=[2, 2, 2],
                 key_dim=[8, 8, 8], attention_ratio=[2, 2, 2], mlp_ratio=[2, 2, 2], drop_path_rate=0)
    net, x = transformers.LevitModel(transformers.LevitConfig(**small)).train(), torch.randn(2, 3, 64, 64)
    twin = copy.deepcopy(net)
    find_blocks(net, x)
    copy.deepcopy(net)
    with torch.no_grad():
        for n in (net, twin):
            for p in n.parameters(): p += .1
        assert_close(net.eval()(x).last_hidden_state, twin.eval()(x).last_hidden_state)


# Tracing

def test_own_network_agrees_with_its_trajectory():
    net, x = dense_net(3, 2, K=5, h=.5), torch.randn(BATCH, 3)
    stage, = trace(net, x).stages
    want = net.trajectory(x)
    assert stage.h == want.h == .5
    assert_close(stage.x, want.x)
    assert_close(trace_energies(net, x).energies("sum"), want.steps.square().sum(2) / .5)


@pytest.mark.parametrize("block", [BasicBlock, Bottleneck])
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_resnet_energies_by_hand(block, mode):
    model, x = getattr(ResNet(block), mode)(), images()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d): m.momentum = 0.   # the second look at a block must not move the statistics
    blocks = find_blocks(model, x)
    hand, out = by_hand(model, x, blocks, lambda b, before: (before + b.branch(before)).relu() - before)
    with torch.no_grad(): got, light = trace(model, x, blocks), trace_energies(model, x, blocks)
    assert_close(energies(got), hand)
    assert_close(light.energies(), hand)
    assert_close(got.output, out)
    assert [s.K for s in got.stages] == ([2, 1] if block is BasicBlock else [1, 1]) and got.names == tuple(blocks)


def test_stages_end_where_something_happens_between_blocks():
    net = nn.Sequential(*(ResidualBlock(nn.Linear(3, 3)) for _ in range(2)), nn.Linear(3, 3),
                        ResidualBlock(nn.Linear(3, 3)), ResidualBlock(nn.Linear(3, 3), h=.5))
    found = trace(net, torch.randn(BATCH, 3))
    assert [(s.K, s.h) for s in found.stages] == [(2, 1.), (1, 1.), (1, .5)] and found.K == 4


def test_gradients_reach_the_blocks():
    net, x = dense_net(3, 2, K=3), torch.randn(BATCH, 3)
    weight = net.flow.blocks[0].velocity[0].weight
    for energy in (trace_energies(net, x).energies().sum(),
                   sum(s.steps.square().mean(2).sum() for s in trace(net, x).stages)):
        got, = torch.autograd.grad(energy, weight)
        assert_close(got, torch.autograd.grad(net.trajectory(x).steps.square().mean(2).sum(), weight)[0])


def test_stochastic_depth_is_traced_as_it_fell():
    model, x = nn.Sequential(DropPath(), DropPath(), DropPath()).train(), torch.randn(40, 4)
    torch.manual_seed(3); want = model(x)
    torch.manual_seed(3); found = trace(model, x)
    assert_close(found.output, want)
    dropped = energies(found) == 0
    assert 30 < dropped.sum() < 90
    stage, = found.stages
    assert_close(stage.steps[0][~dropped[0]], 2 * model[0].f(x)[~dropped[0]], rtol=1e-4, atol=1e-5)
    assert (energies(trace(model.eval(), x)) > 0).all()


def test_shared_blocks_count_per_call():
    block = ResidualBlock(nn.Linear(3, 3))
    model, x = nn.Sequential(block, block, block), torch.randn(BATCH, 3)
    found = trace(model, x)
    assert found.names == ("0", "0 (call 2)", "0 (call 3)") and "called 3 times" in find_blocks(model, x).why["0"]
    assert_close(found.stages[0].x, Flow([block.velocity] * 3).trajectory(x).x)


def test_blocks_that_write_to_their_input():
    model, x = nn.Sequential(nn.Linear(4, 4), Inplace(), Inplace()), torch.randn(BATCH, 4)
    blocks = find_blocks(model, x)
    assert list(blocks) == ["1", "2"] and blocks.inplace == {"1", "2"}
    start = model[0](x)
    first = model[1].f(start)
    want = torch.stack([first, model[2].f(start + first)])
    with torch.no_grad():
        assert_close(trace_energies(model, x, blocks).energies(), want.square().mean(2))
        assert_close(trace(model, x, dict(blocks)).stages[0].steps, want)
        with pytest.raises(RuntimeError, match="writes to its input"): trace_energies(model, x, dict(blocks))


def test_positions_survive_what_comes_after():
    model = nn.Sequential(ResidualBlock(nn.Linear(4, 4)), nn.ReLU(inplace=True), nn.Linear(4, 2))
    x = torch.randn(BATCH, 4)
    with torch.no_grad(): assert_close(trace(model, x).stages[0].x[1], model[0](x))


def test_autocast_sums_in_float32():
    net, x = dense_net(4, 2, K=3), torch.randn(BATCH, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16): found = trace_energies(net, x)
    assert found.energies().dtype == torch.float32 and len(find_blocks(net, x)) == len(found.names) == 3
    assert_close(found.energies(), energies(trace(net, x)), rtol=.05, atol=1e-3)


def test_half_precision_does_not_overflow():
    model, x = nn.Sequential(ResidualBlock(nn.Linear(4, 4))).half(), torch.zeros(BATCH, 4).half()
    with torch.no_grad(): model[0].velocity.bias.fill_(300.)
    assert model[0].velocity.bias.square().isinf().all()
    for squares in (trace_energies(model, x).energies("sum"), energies(trace(model, x), "sum")):
        assert squares.dtype == torch.float32 and (squares == 4 * 300 ** 2).all()
    assert trace(model, x).stages[0].x.dtype == torch.float32
    with torch.no_grad(): model[0].velocity.weight.fill_(60000.)
    with pytest.raises(ValueError, match=r"block 0 \(0\).*not finite"): trace(model, x + 1)


def test_inference_mode():
    net = dense_net(3, 2, K=3)
    with torch.inference_mode():
        x = torch.randn(BATCH, 3)
        found = trace(net, x)
        assert found.x.is_inference() and trace_energies(net, x).energies().is_inference()
    assert_close(energies(found).clone(), energies(trace(net, x.clone())).detach())


def test_channels_last():
    model, x = ResNet().eval(), images()
    want = energies(trace(model, x))
    model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    assert_close(energies(trace(model, x)), want, rtol=1e-4, atol=1e-6)
    assert_close(trace_energies(model, x).energies(), want, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("only", [False, True])
def test_checkpointed_blocks_count_once(reentrant, only):
    model, ids = Decoder(), tokens()
    blocks = find_blocks(model, ids)
    plain = trace_energies(model, ids, blocks).energies()
    want = torch.autograd.grad(plain.sum(), model.layers[0].mix.weight)[0]
    model.checkpointing = reentrant
    assert list(find_blocks(model, ids)) == list(blocks)
    with Tracer(model, blocks, energies_only=only) as tracer:
        loss = model(ids).square().mean()
        found = tracer.take()
        assert_close(found.energies(), plain)
        (loss if reentrant else loss * 0 + found.energies().sum()).backward()
        with pytest.raises(RuntimeError, match="no step of the 3 blocks"): tracer.take()
        if only: assert not tracer.note.open
    if not reentrant: assert_close(model.layers[0].mix.weight.grad, want)


# Attached and taken off

def test_tracer_in_a_training_loop():
    net, x = dense_net(3, 2, K=4), torch.randn(BATCH, 3)
    opt, totals = torch.optim.SGD(net.parameters(), lr=.05), []
    with Tracer(net, energies_only=True) as tracer:
        for _ in range(20):
            net(x)
            energies = tracer.take().energies()
            opt.zero_grad(); energies.sum().backward(); opt.step()
            totals.append(energies.sum().item())
    assert energies.shape == (4, BATCH) and totals[-1] < totals[0] / 2 and hook_count(net) == 0


def test_only_the_last_pass_is_kept():
    net = dense_net(3, 2, K=4)
    with Tracer(net) as tracer:
        net(torch.randn(7, 3)); net(torch.randn(BATCH, 3))
        assert tracer.take().energies().shape == (4, BATCH)
        with pytest.raises(RuntimeError, match="call the model first"): tracer.take()


def test_attaching_again_replaces():
    net, x = dense_net(3, 2, K=4), torch.randn(BATCH, 3)
    first = Tracer(net)
    count = hook_count(net)
    second = Tracer(net)
    assert hook_count(net) == count
    net(x)
    with pytest.raises(RuntimeError, match="replaced"): first.take()
    first.remove(); second.take(); second.remove(); second.remove()
    assert hook_count(net) == 0


def test_hooks_of_others_stay():
    net, calls = dense_net(3, 2, K=2), []
    net.flow.blocks[0].register_forward_hook(lambda *args: calls.append(1))
    trace(net, torch.randn(BATCH, 3), find_blocks(net))
    assert calls == [1] and hook_count(net) == 1


def test_tracing_inside_tracing():
    net, x = dense_net(3, 2, K=4), torch.randn(BATCH, 3)
    with Tracer(net) as outer:
        net(x)
        inner = trace(net, x[:2])
        find_blocks(net, x[:3])
        assert (inner.K, inner.B) == (4, 2) and outer.take().energies().shape == (4, BATCH)
        net(x)
        assert len(outer.take().names) == 4


@pytest.mark.parametrize("look", [lambda net, x: net.trajectory(x), lambda net, x: net.flow(x), trace, trace_energies, find_blocks])
@pytest.mark.parametrize("only", [True, False])
def test_who_looks_at_the_blocks_on_the_side_changes_nothing(look, only):
    net, x = dense_net(3, 2, K=4), torch.randn(BATCH, 3)
    want = trace_energies(net, x).energies()
    with Tracer(net, energies_only=only) as tracer:
        net(x); look(net, torch.randn(9, 3))
        assert_close(tracer.take().energies(), want)
        look(net, torch.randn(9, 3))
        with pytest.raises(RuntimeError, match="no step"): tracer.take()
        net(x)
        assert_close(tracer.take().energies(), want)


def test_hooks_go_after_an_error():
    net = dense_net(3, 2, K=4)
    with pytest.raises(RuntimeError), Tracer(net): net(torch.randn(BATCH, 5))
    assert hook_count(net) == 0


def test_nothing_stays_referenced():
    net, x = dense_net(3, 2, K=4), torch.randn(BATCH, 3)
    with Tracer(net) as tracer: net(x)
    noted, found, light = tracer.take(), trace(net, x), trace_energies(net, x)
    refs = [weakref.ref(t) for s in noted.steps + light.steps for t in (s.after, s.before, s.squares) if t is not None]
    refs += [weakref.ref(t) for t in (found.x, found.output, light.output)]
    refs += [weakref.ref(t.untyped_storage()) for t in (found.x, found.output, light.output)]
    model = weakref.ref(net)
    del noted, found, light
    assert all(r() is None for r in refs)
    del net; gc.collect()
    assert model() is None


def alive_outputs(net):
    "Weak references to the memory of what the blocks give, and how many of the earlier ones were alive at each call."
    outputs, alive = [], []

    def watch(block, args, out):
        alive.append(sum(r() is not None for r in outputs))
        outputs.append(weakref.ref(out.untyped_storage()))

    for block in net.flow.blocks: block.register_forward_hook(watch)
    return outputs, alive


@pytest.mark.parametrize("call", [find_blocks, trace_energies])
def test_the_probing_pass_keeps_at_most_one_block_too(call):
    net, x = dense_net(3, 2, K=6), torch.randn(BATCH, 3)
    outputs, alive = alive_outputs(net)
    with torch.no_grad(): found = call(net, x)
    assert len(alive) == (6 if call is find_blocks else 12) and max(alive) <= 1
    assert all(r() is None for r in outputs) and found is not None


@pytest.mark.parametrize("only", [True, False])
def test_energies_keep_at_most_one_block(only):
    net, x = dense_net(3, 2, K=6), torch.randn(BATCH, 3)
    _, alive = alive_outputs(net)
    with torch.no_grad(), Tracer(net, energies_only=only) as tracer: net(x)
    assert max(alive) <= 1
    kept = [s for s in tracer.take().steps if s.before is not None or s.after is not None]
    assert len(kept) == (0 if only else 6)


@pytest.mark.parametrize("net, x, position", [
    (dense_net(64, 10, K=9), torch.randn(500, 64), 500 * 64), (ResNet(depth=3).eval(), torch.randn(50, 3, 16, 16), 50 * 4 * 16 * 16),
    (conv_net((1, 14, 14), 10, K=9, width=8), torch.randn(50, 1, 14, 14), 50 * 8 * 7 * 7)], ids=["dense", "resnet", "conv"])
def test_energies_raise_the_peak_by_no_more_than_one_position(net, x, position):
    blocks, cpu = find_blocks(net, x), torch.device("cpu")
    with torch.no_grad(): plain, energies, positions = (memory(lambda: call(net, x), cpu) for call in (
        lambda net, x: net(x), lambda net, x: trace_energies(net, x, blocks), lambda net, x: trace(net, x, blocks)))
    noted = len(blocks) * len(x)   # the energies themselves
    assert energies <= plain + 4 * (position + 4 * noted)
    assert positions > plain + 4 * position * (len(blocks) - 2)   # what is not kept


# Wrapped and compiled

class Wrapped(nn.parallel.DistributedDataParallel):
    "The wrapper without its process group."
    def __init__(self, module): nn.Module.__init__(self); self.module = module
    def forward(self, *args): return self.module(*args)
    def __getattr__(self, name): return nn.Module.__getattr__(self, name)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="compiled networks need PyTorch 2.6 or later")
def test_names_see_through_wrappers():
    net, x = dense_net(3, 2, K=2), torch.randn(BATCH, 3)
    names, want = ["flow.blocks.0", "flow.blocks.1"], energies(trace(net, x))
    for wrapped in (Wrapped(net), nn.DataParallel(net), torch.compile(net, backend="eager"),
                    torch.compile(Wrapped(net), backend="eager")):
        assert list(find_blocks(wrapped, x)) == names
        assert_close(energies(trace(wrapped, x)), want)
    net.flow.blocks[1] = torch.compile(net.flow.blocks[1], backend="eager")
    net(x)
    assert list(find_blocks(net, x)) == names
    assert_close(energies(trace(net, x)), want)


@pytest.mark.parametrize("only", [True, False])
def test_compiled_without_a_graph_break(only):
    torch._dynamo.reset()
    net, x = dense_net(3, 2, K=3), torch.randn(BATCH, 3)
    want = energies(trace(net, x))
    with Tracer(net, energies_only=only) as tracer:
        compiled = torch.compile(net, backend="eager", fullgraph=True)
        for _ in range(2):
            compiled(x)
            assert_close(tracer.take().energies(), want)
        compiled(x)
        got = torch.autograd.grad(tracer.take().energies().sum(), net.flow.blocks[0].velocity[0].weight)[0]
    assert_close(got, torch.autograd.grad(want.sum(), net.flow.blocks[0].velocity[0].weight)[0])


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="compiled networks need PyTorch 2.6 or later")
def test_attached_after_the_first_compiled_call():
    torch._dynamo.reset()
    net, x = dense_net(3, 2, K=3), torch.randn(BATCH, 3)
    want = energies(trace(net, x))
    compiled = torch.compile(net, backend="eager")
    compiled(x)
    with Tracer(compiled) as tracer:
        compiled(x)
        assert_close(tracer.take().energies(), want)


@pytest.mark.skipif(not hasattr(torch.compiler, "set_stance"), reason="compiled networks need PyTorch 2.6 or later")
@pytest.mark.parametrize("way", ["method", "inside"])
def test_trace_runs_compiled_parts_as_written(way):
    torch._dynamo.reset()
    net, x = dense_net(3, 2, K=3), torch.randn(BATCH, 3)
    want = energies(trace(net, x))
    if way == "method":
        net.compile(backend="eager")
        model = net
    else: model = nn.Sequential(torch.compile(net, backend="eager"))
    model(x)
    blocks = {name if way == "method" else f"0.{name}": net.get_submodule(name) for name in find_blocks(net, x)}
    assert_close(trace_energies(model, x, blocks).energies(), want)
    assert list(find_blocks(model, x)) == list(blocks)


def test_a_compiler_that_cannot_be_told_to_rest_is_named(monkeypatch):
    "PyTorch 2.5 has no way to run compiled parts as they were written."
    net, x = nn.Sequential(torch.compile(dense_net(3, 2, K=3), backend="eager")), torch.randn(BATCH, 3)
    monkeypatch.delattr(torch.compiler, "set_stance", raising=False)
    for call in (find_blocks, trace):
        with pytest.raises(RuntimeError, match="compiled parts, which PyTorch .* use PyTorch 2.6 or later"):
            call(net, x)
    assert len(find_blocks(net[0]._orig_mod, x)) == 3


# Bad input

def test_no_residual_block():
    model = nn.Sequential(nn.Linear(3, 3), nn.ReLU())
    with pytest.raises(ValueError, match=r"no residual block found in Sequential \(.*0: a single layer"):
        find_blocks(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match="pass an example input"): find_blocks(model)
    with pytest.raises(ValueError, match="no residual block"): trace(model, torch.randn(2, 3))
    with pytest.raises(ValueError, match="blocks is empty"): Tracer(model, {})


def test_wrong_blocks():
    model, x = ResNet(), images()
    with pytest.raises(ValueError, match=r"'layer2.0' gives \(4, 8, 4, 4\) for an input of \(4, 4, 8, 8\)"):
        trace(model, x, {"layer2.0": model.layer2[0]})
    with pytest.raises(ValueError, match="'layer1.0' is not in this ResNet"): trace(model, x, find_blocks(ResNet(), x))
    assert hook_count(model) == 0


@pytest.mark.parametrize("call", [trace, trace_energies])
def test_nan_in_block_7_is_named(call):
    net = dense_net(3, 2, K=9)
    with torch.no_grad(): net.flow.blocks[7].velocity[2].bias[1] = float("nan")
    with pytest.raises(ValueError, match=r"block 7 \(flow\.blocks\.7\) is the first"): call(net, torch.randn(2, 3))


def test_empty_batch():
    for x in (torch.zeros(0, 3), (torch.zeros(0, 3),), {"x": torch.zeros(0, 3)}):
        for call in (find_blocks, trace, trace_energies):
            with pytest.raises(ValueError, match="batch is empty"): call(dense_net(3, 2), x)


def test_integer_inputs():
    assert trace_energies(Decoder(), tokens()).energies().shape == (3, BATCH)

    class One(nn.Module):
        def forward(self, x): return x * 0 + 1

    flow, x = Flow([One(), One()]), torch.arange(6).reshape(2, 3)
    # the second sees the floats of the first
    assert find_blocks(flow, x).skipped["blocks.0"] == "no floating-point tensor goes in"
    with pytest.raises(ValueError, match="block 'blocks.0': convert"): trace(flow, x, find_blocks(flow))
    with pytest.raises(ValueError, match="expected one of 'mean', 'sum'"):
        trace_energies(flow, x.float()).energies("max")


# Real architectures, built from configuration

def architecture(t, name):
    """The model, its input, names of its blocks, and what a block adds as a function of block and input of the parts
    inside."""
    pixels, ids = torch.randn(BATCH, 3, 16, 16), torch.randint(50, (BATCH, 5))
    small = dict(hidden_size=8, num_hidden_layers=3, num_attention_heads=2, intermediate_size=16)
    if name == "resnet":
        config = t.ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[2, 2], layer_type="basic")
        return t.ResNetModel(config), pixels, [
            "encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.1.layers.1"]
    if name == "convnext":
        config = t.ConvNextConfig(hidden_sizes=[4, 8], depths=[2, 1], num_stages=2, drop_path_rate=.4,
                                  layer_scale_init_value=.5)
        names = ["encoder.stages.0.layers.0", "encoder.stages.0.layers.1", "encoder.stages.1.layers.0"]
        return t.ConvNextModel(config), pixels, names
    if name == "vit": return t.ViTModel(t.ViTConfig(image_size=16, patch_size=8, **small)), pixels, 3
    if name == "gpt2":
        return t.GPT2LMHeadModel(
            t.GPT2Config(n_embd=8, n_layer=3, n_head=2, vocab_size=50, n_positions=8, bos_token_id=0,
                         eos_token_id=0)), ids, 3
    config = t.LlamaConfig(num_key_value_heads=1, vocab_size=50, **small)
    return t.LlamaForCausalLM(config), ids, 3


def added(name, block, parts, before):
    "What the block adds, from the outputs of the parts inside it."
    if name == "resnet": return (before + parts["layer"]).relu() - before
    if name == "convnext": return (block.layer_scale_parameter * parts["pwconv2"]).permute(0, 3, 1, 2)
    attention = next(parts[k] for k in ("attn", "self_attn", "attention") if k in parts)
    return attention + parts["mlp"]


@pytest.mark.parametrize("name", ["resnet", "convnext", "vit", "gpt2", "llama"])
def test_real_architectures(transformers, name):
    model, x, names = architecture(transformers, name)
    model.eval()
    blocks = find_blocks(model, x)
    assert list(blocks) == names if isinstance(names, list) else len(blocks) == names
    assert len({type(b) for b in blocks.values()}) == 1
    steps, hooks, parts = [], [], {}

    def note(key):
        return lambda part, args, out: parts.__setitem__(
            key, (out[0] if isinstance(out, tuple) else out).detach().clone()
        )
    def close(block, args, kwargs, out):
        before = args[0] if args else kwargs["hidden_states"]
        steps.append(added(name, block, parts, before)); parts.clear()

    for block in blocks.values():
        hooks += [part.register_forward_hook(note(key)) for key, part in block.named_children()]
        hooks.append(block.register_forward_hook(close, with_kwargs=True))
    with torch.no_grad(): out = model(x)
    for hook in hooks: hook.remove()
    with torch.no_grad(): found = trace(model, x, blocks)
    assert found.names == tuple(blocks)
    assert_close(energies(found), torch.stack([s.square().flatten(1).mean(1) for s in steps]), rtol=1e-4, atol=1e-7)
    assert_close(found.output[0], out[0])
    assert len(found.stages) == (2 if name in ("resnet", "convnext") else 1)
    if name == "convnext": assert (energies(trace(model.train(), x, blocks)) == 0).any()


@pytest.mark.filterwarnings("ignore:`gradient_checkpointing_enable`:FutureWarning")   # its successor is not in older versions
@pytest.mark.parametrize("name", ["vit", "gpt2", "llama"])
def test_real_gradient_checkpointing(transformers, name):
    model, x, _ = architecture(transformers, name)
    model.train()
    for m in model.modules():
        if isinstance(m, nn.Dropout): m.p = 0.
    blocks = find_blocks(model, x)
    want = trace_energies(model, x, blocks).energies()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Tracer(model, blocks, energies_only=True) as tracer:
        out = model(x)
        found = tracer.take()
        (out[0].square().mean() + found.energies().sum()).backward()
        with pytest.raises(RuntimeError, match="no step"): tracer.take()
    assert_close(found.energies(), want, rtol=1e-4, atol=1e-6)


ZOO = {   # class, configuration, its arguments, blocks to be found
    "opt": ("OPTModel", "OPTConfig", dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, ffn_dim=32,
                                          word_embed_proj_dim=16, max_position_embeddings=32), 3),
    "mistral": ("MistralModel", "MistralConfig", "llama", 3), "qwen2": ("Qwen2Model", "Qwen2Config", "llama", 3),
    "gemma2": ("Gemma2Model", "Gemma2Config", "llama", 3), "phi": ("PhiModel", "PhiConfig", "llama", 3),
    "gpt-neox": ("GPTNeoXModel", "GPTNeoXConfig", "text", 3),   # attention and MLP side by side: one addition of two branches
    "bloom": ("BloomModel", "BloomConfig", dict(vocab_size=50, hidden_size=16, n_layer=3, n_head=2), 3),
    "t5": ("T5EncoderModel", "T5Config", dict(vocab_size=50, d_model=16, d_kv=8, d_ff=32, num_layers=3, num_heads=2), 6),   # attention, MLP: a block each
    "mamba": ("MambaModel", "MambaConfig", dict(vocab_size=50, hidden_size=16, state_size=4, num_hidden_layers=3), 3),
    "swin": ("SwinModel", "SwinConfig", dict(image_size=16, patch_size=2, embed_dim=8, depths=[2, 2], num_heads=[1, 2], window_size=4), 4),
    "beit": ("BeitModel", "BeitConfig", "image", 3), "clip": ("CLIPVisionModel", "CLIPVisionConfig", "image", 3),
    "dinov2": ("Dinov2Model", "Dinov2Config", "image", 3),
    "convnext-v2": ("ConvNextV2Model", "ConvNextV2Config", dict(hidden_sizes=[8, 16], depths=[2, 2], num_stages=2), 4),
    "resnet-bottleneck": ("ResNetModel", "ResNetConfig", dict(embedding_size=8, hidden_sizes=[16, 32], depths=[2, 2]), 2),
    "regnet": ("RegNetModel", "RegNetConfig", dict(embedding_size=8, hidden_sizes=[8, 16], depths=[2, 2], groups_width=4), 2),
}


@pytest.mark.parametrize("name", ZOO)
def test_more_architectures(transformers, name):
    "Blocks by number; steps equal to output minus input, as plain hooks of this test see them."
    model, config, args, count = ZOO[name]
    small = dict(hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    kinds = {"text": dict(vocab_size=50), "llama": dict(vocab_size=50, num_key_value_heads=1, pad_token_id=0),
             "image": dict(image_size=16, patch_size=8)}
    config = getattr(transformers, config)(**(args if isinstance(args, dict) else small | kinds[args]))
    model = getattr(transformers, model)(config).eval()
    x = torch.randint(50, (BATCH, 5)) if getattr(config, "vocab_size", 0) == 50 else torch.randn(BATCH, 3, 16, 16)
    blocks, seen, hooks = find_blocks(model, x), [], []
    assert len(blocks) == count

    def note(block, args, kwargs, out):
        before = next(v for v in (*args, *kwargs.values()) if torch.is_tensor(v))
        seen.append(((out[0] if isinstance(out, tuple) else out) - before).square().flatten(1).mean(1))

    for block in blocks.values(): hooks.append(block.register_forward_hook(note, with_kwargs=True))
    with torch.no_grad(): model(x)
    for hook in hooks: hook.remove()
    with torch.no_grad(): assert_close(energies(trace(model, x, blocks)), torch.stack(seen))


def test_sums_that_are_normalised_need_a_pattern(transformers):
    small = dict(vocab_size=50, hidden_size=16, num_hidden_layers=3, num_attention_heads=2, intermediate_size=32)
    model, x = transformers.BertModel(transformers.BertConfig(**small)).eval(), torch.randint(50, (BATCH, 5))
    with pytest.raises(ValueError, match="NativeLayerNorm in the way"): find_blocks(model, x)
    assert trace(model, x, find_blocks(model, x, blocks="encoder.layer.?")).K == 3


@pytest.mark.parametrize("name", ["resnet", "gpt2"])
def test_real_networks_compile_without_a_graph_break(transformers, name):
    torch._dynamo.reset()
    model, x, _ = architecture(transformers, name)
    blocks = find_blocks(model.eval(), x)
    want = trace_energies(model, x, blocks).energies()
    with Tracer(model, blocks, energies_only=True) as tracer:
        torch.compile(model, backend="eager", fullgraph=True)(x)
        assert_close(tracer.take().energies(), want)


def residual(block, x):
    "What a block of torchvision's or timm's ResNets adds, from its layers."
    one, two = (block.relu, block.relu) if hasattr(block, "relu") else (block.act1, block.act2)
    out = block.bn2(block.conv2(one(block.bn1(block.conv1(x)))))
    if hasattr(block, "conv3"): out = block.bn3(block.conv3(two(out)))
    return (x + out).relu() - x


@pytest.mark.parametrize("name, count", [("resnet18", 5), ("resnet50", 12)])
@pytest.mark.parametrize("library", ["torchvision", "timm"])
def test_resnets_of_other_libraries(library, name, count):
    module = pytest.importorskip(f"{library}.models",
                                 reason=f"{library} is not installed: pip install {library}, then run this again")
    make = {
        "torchvision": lambda: getattr(module, name)(weights=None),
        "timm": lambda: module.create_model(name, pretrained=False)}
    model, x = make[library]().eval(), torch.randn(2, 3, 32, 32)
    blocks = find_blocks(model, x)
    assert len(blocks) == count
    hand, _ = by_hand(model, x, blocks, residual)
    with torch.no_grad(): assert_close(energies(trace(model, x, blocks)), hand, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name, size, count", [("vit_tiny_patch16_224", 224, 12), ("convnext_atto", 32, 12)])
def test_other_models_of_timm(name, size, count):
    timm = pytest.importorskip("timm", reason="timm is not installed: pip install timm, then run this again")
    model, x = timm.create_model(name, pretrained=False).eval(), torch.randn(2, 3, size, size)
    blocks = find_blocks(model, x)
    assert len(blocks) == count
    if name.startswith("vit"):
        def mlp_and_attention(b, x): return (a := b.ls1(b.attn(b.norm1(x)))) + b.ls2(b.mlp(b.norm2(x + a)))
        hand, _ = by_hand(model, x, blocks, mlp_and_attention)
        with torch.no_grad(): assert_close(energies(trace(model, x, blocks)), hand, rtol=1e-4, atol=1e-7)


def test_real_distributed_wrapper():
    net, x = dense_net(3, 2, K=2), torch.randn(BATCH, 3)
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    def use():   # the wrapper must be gone before its group: the other way round both wait for ever
        wrapped = nn.parallel.DistributedDataParallel(net)
        assert list(find_blocks(wrapped, x)) == ["flow.blocks.0", "flow.blocks.1"]
        with Tracer(wrapped, energies_only=True) as tracer:
            loss = wrapped(x).square().mean()
            noted = tracer.take()
            (loss + noted.energies().sum()).backward()
        assert_close(noted.energies(), trace_energies(net, x).energies())
        assert noted.names == ["flow.blocks.0", "flow.blocks.1"
                               ] and net.flow.blocks[0].velocity[0].weight.grad.abs().sum() > 0
    try:
        use()
        gc.collect()
    finally: torch.distributed.destroy_process_group()


def test_a_sharded_network_is_found_traced_and_trained_as_the_whole_one():
    "Also after a pass, when the memory of what was gathered has been given back."
    fsdp = pytest.importorskip("torch.distributed.fsdp")
    if not hasattr(fsdp, "fully_shard"): pytest.skip("fully_shard needs PyTorch 2.6 or later")
    torch.manual_seed(0)
    layer = lambda: nn.TransformerEncoderLayer(8, 2, 16, dropout=0., norm_first=True, batch_first=True)
    net, x = nn.Sequential(nn.Linear(4, 8), layer(), layer()), torch.randn(2, 5, 4)
    def step(model):
        model.zero_grad()
        la = LeastAction(model, x=x)
        la(model(x).square().mean()).backward()
        whole = lambda g: g.full_tensor() if hasattr(g, "full_tensor") else g
        return la.energies.clone(), [whole(p.grad).clone() for p in model.parameters()]
    want, noted = step(net), trace_energies(net, x).energies().detach()
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    def use():
        mesh = torch.distributed.device_mesh.init_device_mesh("cpu", (1,))
        for part in (net[1], net[2], net): fsdp.fully_shard(part, mesh=mesh)
        for _ in range(2):
            assert list(find_blocks(net, x)) == ["1", "2"]
            assert_close(trace_energies(net, x).energies().detach(), noted)
            net.reshard()   # after any pass without a backward one: otherwise zero_grad does not see the shards
            assert_close(step(net), want)
        with pytest.raises(RuntimeError, match="gather its parameters"): Elastic(net, x)
    try:
        use()
        gc.collect()
    finally: torch.distributed.destroy_process_group()


def test_a_tensor_whose_memory_was_given_back_is_left_alone():
    net = nn.Sequential(nn.Linear(4, 4), ResidualBlock(nn.Linear(4, 4)))
    net.gathered = [torch.randn(3)]
    net.gathered[0].untyped_storage().resize_(0)
    assert list(find_blocks(net, torch.randn(2, 4))) == ["1"] and not net.gathered[0].untyped_storage().nbytes()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: run this on a machine with one")
def test_no_wait_for_the_device():
    net, x = ResNet().cuda().eval(), images().cuda()
    want = trace_energies(net, x).energies()
    with Tracer(net, find_blocks(net, x), energies_only=True) as tracer:
        torch.cuda.set_sync_debug_mode("error")
        try:
            (net(x).square().mean() + tracer.take().energies().mean()).backward()
            net(x)
            got = tracer.take().energies()
        finally: torch.cuda.set_sync_debug_mode("default")
    assert_close(got, want)


def test_the_trajectory_can_be_kept(tmp_path):
    found = trace(ResNet().eval(), images())
    found.save(tmp_path / "walk.npz")
    again = Trajectory.load(tmp_path / "walk.npz")
    assert again.names == found.names == ("layer1.0", "layer1.1", "layer2.1") and again.output is None
    assert_close(energies(again), energies(found))
    assert {n for t in (found[1:], found.samples(0), found.to(torch.float64)) for n in t.names} <= set(found.names)


class Adds(nn.Module):
    "A residual block that is no `ResidualBlock`, with or without a write to its input."
    def __init__(self, writes=False):
        super().__init__()
        self.field, self.writes = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 4)), writes
    def forward(self, x):
        v = self.field(x.clone() if self.writes else x)
        return x.add_(v) if self.writes else x + v


def test_the_probe_sees_outputs_that_are_written_to_later():
    x = torch.randn(5, 4)
    net = nn.Sequential(Adds(), nn.ReLU(inplace=True), Adds(), Adds())
    assert find_blocks(net, x).written == {"0"}
    assert find_blocks(net, x, blocks=["?"], exclude="1").written == {"0"}
    assert not find_blocks(nn.Sequential(Adds(), nn.ReLU(), Adds()), x).written
    # who writes to its input is probed on a copy, so any block may have been before it
    assert find_blocks(nn.Sequential(Adds(), Adds(writes=True)), x).written == {"0", "1"}


def test_no_pattern_and_no_name():
    net, x = nn.Sequential(Adds(), Adds()), torch.randn(5, 4)
    with pytest.raises(ValueError, match="blocks is empty"): find_blocks(net, x, blocks=[])
    assert list(find_blocks(net, x, exclude=[])) == ["0", "1"]
    for patterns in ([net[0]], net): # a sequence is a list of its modules
        with pytest.raises(TypeError, match="blocks is .*, expected|found a Adds"): find_blocks(net, x, blocks=patterns)


def test_reasons_inside_what_is_not_called_are_told():
    class Post(nn.Module):
        def __init__(self): super().__init__(); self.f, self.norm = nn.Linear(4, 4), nn.LayerNorm(4)
        def forward(self, x): return self.norm(x + self.f(x))

    class Listed(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.ModuleList([Post(), Post()])
        def forward(self, x):
            for layer in self.layers: x = layer(x)
            return x

    with pytest.raises(ValueError,
                       match=r"layers.0: its input is no summand of its output: NativeLayerNorm in the way") as e:
        find_blocks(Listed(), torch.randn(5, 4))
    assert "layers: not called" not in str(e.value)


# Which axis counts the samples

class Late(nn.Module):
    "Time first; nothing in it says so."
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(nn.Linear(6, 6)) for _ in range(2))
        self.head = nn.Linear(6, 2)
    def forward(self, x):
        for block in self.blocks: x = block(x)
        return self.head(x.mean(0))


def steps_by_hand(net, x):
    "Positions of a time-first network, samples first."
    xs = [x]
    for block in net: xs.append(block(xs[-1]))
    return torch.stack(xs).movedim(2, 1)


@pytest.mark.parametrize("T, B", [(5, 4), (4, 5), (3, 3), (7, 1)])
@pytest.mark.parametrize("kind", ["layers", "late"])
def test_time_first_is_traced_with_the_samples_first(kind, T, B):
    x = torch.randn(T, B, 6)
    if kind == "layers":
        net = nn.Sequential(*(nn.TransformerEncoderLayer(6, 2, 8, dropout=0., norm_first=True) for _ in range(2)))
        blocks, kw, parts = dict(net.named_children()), {}, net
    else:
        net = Late()
        blocks, kw, parts = None, dict(batch_axis=1), net.blocks
    want = steps_by_hand(parts, x)
    walk, light = trace(net, x, blocks, **kw), trace_energies(net, x, blocks, **kw)
    assert_close(walk.x, want)
    assert_close(light.energies("sum"), (want[1:] - want[:-1]).square().sum((2, 3)))
    ledger = EnergyLedger(walk, torch.arange(B), "sum")
    assert_close(ledger.samples.float(), light.energies("sum").sum(0).detach())
    with EnergyMeter(net, blocks, "sum", **kw) as meter:
        net.train()(x)
        assert_close(meter.take(), light.energies("sum").mean(1))   # one rule for all of them


def test_layers_alone_and_batch_first():
    layer = nn.TransformerEncoderLayer(6, 2, 8, dropout=0., batch_first=True, norm_first=True)
    net, x = nn.Sequential(layer), torch.randn(5, 4, 6)
    assert trace_energies(net, x, {"0": layer}).energies().shape == (1, 5)
    alone = trace(net, x[0], {"0": layer})   # one sequence without an axis for samples
    assert_close(alone.x, torch.stack([x[0], layer(x[0])])[:, None])


def traced(net, x, **kw):
    with Tracer(net, **kw): net(x)


@pytest.mark.parametrize("call", [trace, trace_energies, traced])
def test_an_axis_that_looks_wrong_is_asked_for(call):
    net, x = Late(), torch.randn(5, 4, 6)
    with pytest.raises(ValueError, match=r"'blocks.0' gives \(5, 4, 6\) and the model \(4, 2\), .*give batch_axis=1"):
        call(net, x)
    call(net, x, batch_axis=0)   # it is meant
    with pytest.raises(ValueError, match="expected an axis 3 as in batch_axis"): call(net, x, batch_axis=3)
    for axis in (True, -1, 1.5, "1"):
        with pytest.raises(ValueError, match="batch_axis is"): call(net, x, batch_axis=axis)
    assert hook_count(net) == 0

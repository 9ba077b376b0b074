"Tokens: padding counts for nothing, sinks are told apart, and where there is no mask nothing has changed."
import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lap_nb.attach import Tracer, trace, trace_energies
from lap_nb.dynamics import Trajectory
from lap_nb.hooks import BlockHooks, chosen_blocks, find_blocks
from lap_nb.kinetic import EnergyLedger, EnergyMeter, block_energies, kinetic_energy, relative_energy
from lap_nb.least_action import LeastAction

CLOSE = dict(rtol=1e-6, atol=1e-6)


class Layer(nn.Module):
    "Attention that sees real tokens only, without positions: a sentence is the same wherever it lies in its row."
    def __init__(self, d=8, again=False):
        super().__init__()
        self.q, self.k, self.v = (nn.Linear(d, d) for _ in range(3))
        self.norm, self.again = nn.LayerNorm(d), again
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))

    def step(self, x, mask):
        h = self.norm(x)
        scores = self.q(h) @ self.k(h).mT / h.shape[-1] ** .5
        if mask is not None: scores = scores.masked_fill(~mask[:, None], -1e9)
        x = x + scores.softmax(-1) @ self.v(h)
        return x + self.mlp(x)

    def forward(self, x, mask=None):
        return checkpoint(self.step, x, mask, use_reentrant=False) if self.again else self.step(x, mask)


class Reader(nn.Module):
    "Token numbers to logits; the mask under any name."
    def __init__(self, K=3, d=8, late=False, again=False):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.layers = nn.Embedding(20, d), nn.ModuleList(Layer(d, again) for _ in range(K))
        self.head, self.late = nn.Linear(d, 20), late

    def forward(self, input_ids, attention_mask=None, pads=None):
        x, mask = self.embed(input_ids), attention_mask if pads is None else pads
        mask = None if mask is None else mask.bool()
        for layer in self.layers: x = layer(x, mask)
        return self.head(x)


class LateLayer(Layer):
    "`[T, B, d]`: time first, and nothing tells."
    def forward(self, x, mask=None): return self.step(x.transpose(0, 1), mask).transpose(0, 1)


class LateReader(Reader):
    def __init__(self):
        super().__init__()
        layers = nn.ModuleList(LateLayer() for _ in range(3))
        layers.load_state_dict(self.layers.state_dict())
        self.layers = layers

    def forward(self, input_ids, attention_mask=None):
        x, mask = self.embed(input_ids).transpose(0, 1), None if attention_mask is None else attention_mask.bool()
        for layer in self.layers: x = layer(x, mask)
        return self.head(x.transpose(0, 1))


def sentences(lengths=(3, 7, 5, 1), side="right", dtype=torch.long):
    "The sentences alone, and together in one batch, padded with a number that means something."
    g = torch.Generator().manual_seed(1)
    alone, T = [torch.randint(20, (1, n), generator=g) for n in lengths], max(lengths)
    ids, mask = torch.full((len(lengths), T), 13), torch.zeros(len(lengths), T, dtype=dtype)
    for row, s in enumerate(alone):
        at = slice(0, s.shape[1]) if side == "right" else slice(T - s.shape[1], T)
        ids[row, at], mask[row, at] = s[0], 1
    return alone, dict(input_ids=ids, attention_mask=mask)


def step(net, batch, **how):
    "Energies by block of a training pass, and the gradient of their sum."
    net.train(); net.zero_grad()
    with EnergyMeter(net, find_blocks(net, batch), **how) as meter:
        net(**batch)
        energies = meter.take()
    energies.sum().backward()
    return energies.detach(), torch.cat([p.grad.flatten() for p in net.layers.parameters()])


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.long, torch.bool, torch.float32, torch.uint8])
@torch.no_grad()
def test_a_padded_sentence_has_the_energy_it_has_alone(side, reduction, dtype):
    net, (alone, batch) = Reader(), sentences(side=side, dtype=dtype)
    together = trace_energies(net, batch).energies(reduction)
    for b, s in enumerate(alone):
        assert_close(together[:, [b]], trace_energies(net, {"input_ids": s}).energies(reduction), **CLOSE)
    walk = trace(net, batch)
    assert_close(block_energies(walk, reduction), together, **CLOSE)
    assert_close(kinetic_energy(walk, reduction), together.sum(0), **CLOSE)
    blind = trace_energies(net, batch, mask=False).energies(reduction)
    assert not torch.allclose(blind[:, 0], together[:, 0], rtol=.01)


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_what_a_trajectory_tells_is_that_of_the_sentence_alone(side, tmp_path):
    net, (alone, batch) = Reader(), sentences(side=side)
    walk = trace(net, batch)
    walk.save(tmp_path / "walk")
    kept, real = Trajectory.load(tmp_path / "walk"), batch["attention_mask"].bool()
    assert torch.equal(kept.mask, real) and kept.x[:, ~real].abs().sum() == 0
    for b, s in enumerate(alone):
        own = trace(net, s)
        for way in (Trajectory.path_length, Trajectory.displacement, Trajectory.straightness, Trajectory.speeds,
                    Trajectory.turning_angles, block_energies):
            for part in (walk.samples(b), kept.samples([b]), walk.to(torch.float64).samples(slice(b, b + 1))):
                assert_close(way(part).float(), way(own), rtol=1e-5, atol=2e-6)
        relative = relative_energy(own, tokens=True).mean(-1)
        assert_close(relative_energy(walk)[:, [b]], relative, rtol=1e-5, atol=1e-6)
        assert_close(block_energies(walk[1:].samples(b)), block_energies(own[1:]), **CLOSE)
        assert_close(EnergyLedger(walk).samples[b], EnergyLedger(own).samples[0], **CLOSE)
    classes = walk.classes(torch.tensor([0, 1, 0, 1]))
    assert torch.equal(classes[1].mask, real[[1, 3]])


@torch.no_grad()
def test_tokens_have_energies_and_relative_energies_of_their_own():
    net, (_, batch) = Reader(), sentences()
    real, noted, walk = batch["attention_mask"].bool(), trace_energies(net, batch), trace(net, batch)
    tokens = noted.energies(tokens=True)
    assert tokens.shape == (3, 4, 7) and torch.equal(tokens.isnan(), (~real).expand(3, -1, -1))
    assert_close(tokens.nanmean(-1), noted.energies(), **CLOSE)
    assert_close(noted.energies("sum", tokens=True).nansum(-1), noted.energies("sum"), **CLOSE)
    assert_close(block_energies(walk, tokens=True), tokens, equal_nan=True, **CLOSE)
    own = relative_energy(walk, tokens=True)
    by_hand = walk.steps.square().sum(-1) / walk.x[:-1].square().sum(-1)
    assert_close(own[:, real], by_hand[:, real]) and own[:, ~real].isnan().all()
    assert_close(relative_energy(walk), own.nanmean(-1))
    plain = Trajectory(trace(net, batch, mask=False).x)   # a mask may come with the question, too
    for view in (block_energies, kinetic_energy, relative_energy): assert_close(view(plain, mask=real), view(walk))
    assert_close(EnergyLedger(plain, mask=real).energies, EnergyLedger(walk).energies)


@torch.no_grad()
def test_a_large_token_does_not_hide_the_others():
    x = torch.randn(2, 1, 6, 4, generator=torch.Generator().manual_seed(0))
    x[:, 0, 0] = 1e4   # large, and at rest
    whole, real = Trajectory(x), torch.ones(1, 6)
    assert relative_energy(whole) < 1e-6 < 1e-2 < relative_energy(whole, real)
    assert_close(relative_energy(whole, real), relative_energy(whole, tokens=True).mean(-1))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
@pytest.mark.parametrize("again", [False, True])
def test_training_sees_the_mean_over_sentences(side, reduction, again):
    net, (alone, batch) = Reader(again=again), sentences(side=side)
    energies, grad = step(net, batch, reduction=reduction)
    each = [step(net, {"input_ids": s}, reduction=reduction) for s in alone]
    assert_close(energies, torch.stack([e for e, _ in each]).mean(0), **CLOSE)
    assert_close(grad, torch.stack([g for _, g in each]).mean(0), rtol=1e-4, atol=1e-5)
    la = LeastAction(net, x=batch, reduction=reduction)
    logits = net(**batch)
    la(F.cross_entropy(logits.flatten(0, 1), batch["input_ids"].flatten()))
    assert_close(la.action, energies.sum(), **CLOSE)


@pytest.mark.parametrize("give", ["position", "name", "tensor", "row"])
@torch.no_grad()
def test_a_mask_however_it_comes(give):
    net, (_, batch) = Reader(), sentences()
    ids, mask = batch.values()
    x, how = {"position": ((ids, mask), {}), "name": (dict(input_ids=ids, pads=mask), dict(mask="pads")),
              "tensor": (dict(input_ids=ids, pads=mask), dict(mask=mask.bool())),
              "row": (batch, dict(mask=mask[1]))}[give]
    want = trace_energies(net, batch, mask=False) if give == "row" else trace_energies(net, batch)
    assert_close(trace_energies(net, x, **how).energies(), want.energies(), **CLOSE)
    assert_close(block_energies(trace(net, x, **how)), want.energies(), **CLOSE)
    with torch.enable_grad():
        net.train()
        meter = EnergyMeter(net, find_blocks(net, batch), **how)
        net(**x) if isinstance(x, dict) else net(*x)
        assert_close(meter.take(), want.energies().mean(1), **CLOSE)


@torch.no_grad()
def test_time_first_is_recognised_by_the_mask():
    late, net, (_, batch) = LateReader(), Reader(), sentences()
    assert_close(trace_energies(late, batch).energies(), trace_energies(net, batch).energies(), **CLOSE)
    assert_close(trace(late, batch).x, trace(net, batch).x)
    with torch.enable_grad(): assert_close(step(late, batch)[0], step(net, batch)[0], **CLOSE)
    square = {k: v[:, :4] for k, v in sentences((3, 4, 2, 4))[1].items()}
    assert_close(trace_energies(late, square, batch_axis=1).energies(), trace_energies(net, square).energies(), **CLOSE)
    late.layers[0].part = nn.GRU(2, 2)   # it takes time first, so which way the block itself goes is not sure
    with pytest.raises(ValueError, match="fits both ways: give batch_axis"): trace_energies(late, square)


@pytest.mark.parametrize("norm_first", [True, False])
def test_the_padding_of_pytorchs_encoder_is_known(norm_first):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0., batch_first=True, norm_first=norm_first)
    net, x = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False).train(), torch.randn(3, 5, 8)
    pads = torch.arange(5) >= torch.tensor([5, 2, 4])[:, None]
    blocks = {f"layers.{k}": net.layers[k] for k in range(2)}
    for given in (pads, torch.zeros(3, 5).masked_fill(pads, -math.inf)):
        together = trace_energies(net, dict(src=x, src_key_padding_mask=given), blocks).energies()
        for b, n in enumerate((5, 2, 4)):
            assert_close(together[:, [b]], trace_energies(net, x[[b], :n], blocks).energies(), **CLOSE)


class Sinks(nn.Module):
    "A step that moves some tokens far more than the others."
    def __init__(self, at, size):
        super().__init__()
        self.at, self.size, self.w = at, size, nn.Parameter(torch.ones(()))

    def forward(self, x):
        push = torch.ones(x.shape[:2]).index_fill(1, torch.tensor(self.at), self.size)
        return x + self.w * push.view(*push.shape, *(1,) * (x.ndim - 2)) * torch.tanh(x)


@pytest.mark.parametrize("at", [[0], [3], [0, 4]])
@torch.no_grad()
def test_sinks_are_told_apart_and_left_out(at):
    torch.manual_seed(0)
    net, ids = nn.Sequential(nn.Embedding(9, 4), Sinks(at, 30.), Sinks(at, 3.)), torch.randint(9, (3, 8))
    noted = trace_energies(net, ids)
    want = torch.zeros(3, 8, dtype=torch.bool).index_fill(1, torch.tensor(at), True)
    tokens = noted.energies(tokens=True)
    assert torch.equal(noted.sinks, want)
    assert_close(noted.shares.sum(1), torch.ones(3))
    assert_close(noted.first, tokens.sum(0)[:, 0] / tokens.sum((0, 2)))
    assert_close(noted.energies(sinks=False), torch.stack([t[~want].view(3, -1).mean(1) for t in tokens]))
    assert torch.equal(noted.energies(tokens=True, sinks=False).isnan(), want.expand(2, -1, -1))
    said = f"the first token holds {noted.first.mean():.1%} of the action; {3 * len(at)} sinks hold"
    assert said in repr(noted) and said[4:] in noted._repr_markdown_()
    if at == [0]: assert_close(trace_energies(net, ids, skip=1).energies(), noted.energies(sinks=False))


@pytest.mark.parametrize("side", ["left", "right"])
@torch.no_grad()
def test_first_tokens_are_left_out_wherever_they_lie(side):
    net, (alone, batch) = Reader(), sentences((3, 7, 5), side=side)
    real = batch["attention_mask"].bool()
    rest = real & (real.cumsum(1) > 2)
    together, tokens = trace_energies(net, batch, skip=2).energies(), trace_energies(net, batch).energies(tokens=True)
    assert_close(together, tokens.where(rest, math.nan).nanmean(-1), **CLOSE)
    assert_close(block_energies(trace(net, batch, skip=2)), together, **CLOSE)
    with torch.enable_grad(): assert_close(step(net, batch, skip=2)[0], together.mean(1), **CLOSE)
    with torch.enable_grad(): assert_close(step(net, {"input_ids": alone[1]}, skip=2)[0], together[:, 1], **CLOSE)
    with pytest.raises(ValueError, match="leave no token of sample 0"): trace_energies(net, batch, skip=3)
    with pytest.raises(ValueError, match="no tokens to leave out"):
        trace_energies(nn.Sequential(Sinks([0], 1.)), torch.randn(2, 3, 4, 4), "0", skip=1)


@torch.no_grad()
def test_sentences_without_sinks_have_none_and_pictures_no_tokens():
    net, (_, batch) = Reader(), sentences()
    assert not trace_energies(net, batch).sinks.any() and "sink" not in repr(trace_energies(net, batch))
    still = nn.Sequential(Sinks([0], 0.))
    pictures = trace_energies(still, torch.randn(2, 3, 4, 4), "0")
    assert "token" not in repr(pictures)
    with pytest.raises(ValueError, match="their tokens are not known"): pictures.energies(tokens=True)
    with pytest.raises(ValueError, match="the energy of each token is not known"):
        block_energies(trace(still, torch.randn(2, 3, 4, 4), "0"), tokens=True)


def test_without_a_mask_every_bit_is_as_it_was():
    net, (_, batch) = Reader(), sentences()
    ids = batch["input_ids"]
    seen = []
    class Log(BlockHooks):
        def on_step(self, name, before, after): seen.append((before.detach().clone(), after.detach().clone()))
    with Log(net, find_blocks(net, ids)): net(ids)
    energies, _ = step(net, dict(input_ids=ids))
    assert torch.equal(energies, torch.stack([F.mse_loss(b, a) for a, b in seen]))
    squares = torch.stack([(b - a).square().sum((1, 2)) / 56 for a, b in seen])
    assert torch.equal(trace_energies(net, ids).energies(), squares)
    assert torch.equal(trace_energies(net, batch, mask=False).energies().isnan(), torch.zeros(3, 4, dtype=torch.bool))


@pytest.mark.parametrize("name", ["nan", "large"])
def test_what_lies_at_padding_has_no_say(name):
    "Not even a gradient."
    class Spoils(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.ones(4))
        def forward(self, x): return x + self.w * torch.tanh(x)
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.ModuleList([Spoils()])
        def forward(self, x, attention_mask=None): return self.layers[0](x)
    net, x, mask = Net(), torch.randn(2, 3, 4), torch.tensor([[1, 1, 0], [0, 1, 1]])
    energies, grad = step(net, dict(x=x, attention_mask=mask))
    with torch.no_grad(): x[mask == 0] = dict(nan=math.nan, large=1e30)[name]
    blocks = {"layers.0": net.layers[0]}
    with EnergyMeter(net, blocks) as meter: net(x, mask); again = meter.take()
    assert torch.equal(again, energies) and trace(net, (x, mask), blocks).x.isfinite().all()
    net.zero_grad()
    again.sum().backward()
    if name == "large": assert torch.equal(net.layers[0].w.grad, grad)


def test_a_sample_of_padding_only_counts_for_nothing_in_training():
    net, (_, batch) = Reader(), sentences()
    want, _ = step(net, batch)
    more = dict(input_ids=torch.cat([batch["input_ids"], batch["input_ids"][:1]]),
                attention_mask=F.pad(batch["attention_mask"], (0, 0, 0, 1)))
    assert_close(step(net, more)[0], want, **CLOSE)
    with pytest.raises(ValueError, match="leave no token of sample 4"): trace_energies(net, more)


@pytest.mark.parametrize("mask, words", [
    (torch.ones(3, 7), "mask has shape"), (torch.ones(4, 6), "mask has shape"),
    (torch.ones(4, 1, 1, 7), "expected \\[B, T\\]"), (torch.full((4, 7), .5), "holds 0.5"),
    (-torch.ones(4, 7), "holds -1"), (torch.full((4, 7), -math.inf), "holds -inf"),
    ("pads", "called without 'pads'"), (True, "mask is True"), (3, "mask is 3"), ([1, 0], "mask is"),
    (torch.ones(4, 7).to_sparse(), "sparse")])
def test_masks_that_cannot_be_meant_are_refused(mask, words):
    net, (_, batch) = Reader(), sentences()
    with pytest.raises((ValueError, TypeError), match=words): trace_energies(net, batch, mask=mask)
    def train():
        net.train()
        with EnergyMeter(net, find_blocks(net, batch), mask=mask): net(**batch)
    with pytest.raises((ValueError, TypeError), match=words): train()
    def drive():
        with LeastAction(net, x=batch, mask=mask): net(**batch)
    with pytest.raises((ValueError, TypeError), match=words): drive()


def test_a_mask_that_fits_no_block_is_named():
    class Shrinks(nn.Module):
        def __init__(self): super().__init__(); self.layers = nn.ModuleList([Layer()])
        def forward(self, x, attention_mask): return self.layers[0](x.unflatten(1, (-1, 2)).mean(2))
    net, batch = Shrinks(), dict(x=torch.randn(2, 6, 8), attention_mask=torch.ones(2, 6))
    for look in (trace, trace_energies):
        with pytest.raises(ValueError, match="give mask=, \\[B, T\\] of their tokens, or mask=False"): look(net, batch)
        look(net, batch, mask=False); look(net, batch, mask=torch.ones(2, 3))
    with pytest.raises(ValueError, match="or mask=False"): step(net, batch)
    assert_close(step(net, batch, mask=torch.ones(2, 3))[0], step(net, batch, mask=False)[0], **CLOSE)
    deep = dict(batch, attention_mask=torch.ones(2, 1, 6, 6))
    with pytest.raises(ValueError, match="does not tell which tokens are real"): trace(net, deep)


class Both(nn.Module):
    "Encoder and decoder, each with its mask."
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.encoder = nn.Embedding(20, 8), nn.ModuleList([Layer()])
        self.decoder = nn.ModuleList([Layer(), Layer()])

    def forward(self, input_ids, attention_mask=None, decoder_input_ids=None, decoder_attention_mask=None):
        x, y = self.embed(input_ids), self.embed(decoder_input_ids)
        real, own = (None if m is None else m.bool() for m in (attention_mask, decoder_attention_mask))
        x = self.encoder[0](x, real)
        for layer in self.decoder: y = layer(y, own)
        return x.mean(1), y


@torch.no_grad()
def test_encoder_and_decoder_have_masks_of_their_own():
    net, (alone, a), (others, b) = Both(), sentences(), sentences((7, 2, 4, 3))
    batch = a | {f"decoder_{k}": v for k, v in b.items()}
    together = trace_energies(net, batch).energies()
    for k, (s, t) in enumerate(zip(alone, others)):
        assert_close(together[:, [k]], trace_energies(net, dict(input_ids=s, decoder_input_ids=t)).energies(), **CLOSE)
    assert len(trace(net, batch).stages) >= 2
    batch.pop("decoder_attention_mask")   # no mask there, though the other one would fit
    want = trace_energies(net, dict(batch), mask=False).energies()
    assert_close(trace_energies(net, batch).energies()[1:], want[1:])


def test_meta_tensors_show_that_nothing_waits_for_a_device():
    net = Reader().train()
    la = LeastAction(net, x=sentences()[1], skip=1)
    net.to("meta")
    ids, mask = torch.empty(2, 5, dtype=torch.long, device="meta"), torch.empty(2, 5, dtype=torch.long, device="meta")
    for _ in range(3): objective = la(F.cross_entropy(net(ids, attention_mask=mask).flatten(0, 1), ids.flatten()))
    objective.backward()
    assert objective.device.type == "meta"


def test_compiled_with_a_mask(fresh_compiler):
    net, (_, batch) = Reader(), sentences()
    want, grad = step(net, batch)
    meter = EnergyMeter(net, find_blocks(net, batch))
    fast = torch.compile(net, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        net.zero_grad()
        fast(**batch)
        energies = meter.take()
        energies.sum().backward()
        assert_close(energies.detach(), want)
        assert_close(torch.cat([p.grad.flatten() for p in net.layers.parameters()]), grad)


def test_an_attached_tracer_reads_the_mask_of_each_pass():
    net = Reader()
    with Tracer(net, find_blocks(net, sentences()[1]), energies_only=True) as tracer:
        for lengths in ((3, 7), (5, 2, 6), (4,)):
            _, batch = sentences(lengths)
            net(**batch)
            assert_close(tracer.take().energies(), trace_energies(net, batch).energies())
        net(batch["input_ids"])
        assert tracer.take().steps[0].mask is None


def decoders(tf):
    small = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=3, num_attention_heads=2, vocab_size=40)
    return dict(
        llama=lambda: tf.LlamaForCausalLM(tf.LlamaConfig(num_key_value_heads=1, **small)),
        gpt2=lambda: tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=3, n_head=2, vocab_size=40, n_positions=32)),
        neox=lambda: tf.GPTNeoXForCausalLM(tf.GPTNeoXConfig(**small)))


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "neox"])
@torch.no_grad()
def test_decoders_of_a_library(name, side):
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    net, (alone, batch) = decoders(tf)[name]().eval(), sentences((3, 8), side)
    # where a position counts from the start of the row, as in gpt2, that of the sentence is given
    if name == "gpt2": batch["position_ids"] = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    noted = trace_energies(net, batch)
    for b, s in enumerate(alone): assert_close(noted.energies()[:, [b]], trace_energies(net, s).energies(), **CLOSE)
    assert f"the first token holds {noted.first.mean():.1%}" in repr(noted) and noted.shares.shape == (2, 8)


@torch.no_grad()
def test_encoder_and_decoder_of_a_library():
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    net = tf.T5ForConditionalGeneration(tf.T5Config(
        d_model=16, d_kv=8, d_ff=32, num_layers=2, num_heads=2, vocab_size=40, decoder_start_token_id=0)).eval()
    (alone, a), (others, b) = sentences((3, 8)), sentences((4, 2))
    together = trace_energies(net, a | {f"decoder_{k}": v for k, v in b.items()}).energies()
    for k, (s, t) in enumerate(zip(alone, others)):
        assert_close(together[:, [k]], trace_energies(net, dict(input_ids=s, decoder_input_ids=t)).energies(), **CLOSE)


# Sublayers

class Scale(nn.Module):
    def __init__(self): super().__init__(); self.by = nn.Parameter(torch.full((8,), .5))
    def forward(self, x): return x * self.by


class Sublayered(nn.Module):
    "A pre-norm layer; `form` says what is in front of its sums."
    def __init__(self, form):
        super().__init__()
        self.norm1, self.norm2, self.form = nn.LayerNorm(8), nn.LayerNorm(8), form
        self.attend, self.up, self.down = nn.Linear(8, 8), nn.Linear(8, 16), nn.Linear(16, 8)
        self.end1, self.end2 = {"scale": (Scale(), Scale()), "drop": (nn.Dropout(.3), nn.Dropout(.3)),
                                "identity": (nn.Identity(), nn.Identity())}.get(form, (None, None))

    def forward(self, x):
        a = self.attend(self.norm1(x))
        x = x + (.5 * a if self.form == "number" else a if self.end1 is None else self.end1(a))
        b = self.down(self.up(self.norm2(x)).relu())
        return x + (b if self.end2 is None else self.end2(b))


@pytest.mark.parametrize("form, names", [
    ("plain", ["attend", "down"]), ("scale", ["end1", "end2"]), ("drop", ["end1", "end2"]),
    ("identity", ["attend", "down"]), ("number", None)])
def test_attention_and_mlp_are_steps_of_their_own(form, names):
    torch.manual_seed(0)
    net, x = nn.Sequential(Sublayered(form), Sublayered(form)), torch.randn(3, 5, 8)
    blocks = find_blocks(net, x, "sublayers")
    if names is None:   # half of what the module returns is added
        assert list(blocks) == ["0", "1"] == list(find_blocks(net, x)) and "not taken apart" in blocks.why["0"]
        return
    assert list(blocks) == [f"{k}.{name}" for k in range(2) for name in names]
    sums = []
    def look(module, args): sums.append(args[0])
    hooks = [norm.register_forward_pre_hook(look) for layer in net for norm in (layer.norm1, layer.norm2)]
    for mode in (True, False):
        net.train(mode); torch.manual_seed(1); sums.clear()
        with torch.no_grad(): noted = trace_energies(net, x, "sublayers")
        by_hand = torch.stack([(b - a).square().mean((1, 2)) for a, b in zip(sums, [*sums[1:], noted.output])])
        assert_close(noted.energies(), by_hand[-4:], **CLOSE)
    for hook in hooks: hook.remove()
    net.train()
    la = LeastAction(net, x=x, blocks="sublayers", velocity="branch")
    torch.manual_seed(1)
    la(net(x).square().mean()).backward()
    torch.manual_seed(1)
    with torch.no_grad(): want = trace_energies(net, x, blocks).energies().mean(1)
    assert_close(la.energies, want)


@pytest.mark.parametrize("p, names", [(0., ["0.attend", "0.down"]), (.3, ["0.end1"])])
def test_one_dropout_in_front_of_both_sums(p, names):
    class Shares(Sublayered):
        def __init__(self): super().__init__("shared"); self.end1 = self.end2 = self.drop = nn.Dropout(p)
    torch.manual_seed(0)
    net, x = nn.Sequential(Shares()), torch.randn(3, 5, 8)
    assert list(find_blocks(net, x, "sublayers")) == names
    apart = trace_energies(net.train(), x, "sublayers")
    assert len(apart.steps) == 2
    meter = EnergyMeter(net, find_blocks(net, x, "sublayers"), velocity="branch")
    torch.manual_seed(1)
    net(x)
    torch.manual_seed(1)
    assert_close(meter.take().sum(), trace_energies(net, x, "sublayers").energies().sum(0).mean())


def test_separate_sublayers_stay_and_can_be_compared():
    "The same numbers, written as one layer or as two."
    class Part(nn.Module):
        def __init__(self, norm, *parts): super().__init__(); self.norm, self.parts = norm, nn.Sequential(*parts)
        def forward(self, x): return x + self.parts(self.norm(x))
    torch.manual_seed(0)
    layer, x = Sublayered("plain"), torch.randn(3, 5, 8)
    two = nn.Sequential(Part(layer.norm1, layer.attend), Part(layer.norm2, layer.up, nn.ReLU(), layer.down))
    one = nn.Sequential(layer)
    together, apart = (trace_energies(net, x, "sublayers").energies() for net in (one, two))
    assert_close(together, apart)
    for net in (one, two):
        with EnergyMeter(net.train(), find_blocks(net, x, "sublayers"), velocity="branch") as meter:
            net(x)
            assert_close(meter.take(), together.mean(1))


def test_what_sublayers_cannot_do_is_said():
    net, x = nn.Sequential(Sublayered("plain")), torch.randn(3, 5, 8)
    with pytest.raises(ValueError, match="give an example input x"): find_blocks(net, None, "sublayers")
    with pytest.raises(ValueError, match="take trace_energies"): trace(net, x, "sublayers")
    with pytest.raises(ValueError, match="velocity='branch'"): LeastAction(net, x=x, blocks="sublayers")


@pytest.mark.parametrize("name, parts", [("llama", ("self_attn", "mlp")), ("gpt2", ("attn", "mlp"))])
@torch.no_grad()
def test_sublayers_of_a_library(name, parts):
    tf = pytest.importorskip("transformers", reason="transformers is not installed")
    torch.manual_seed(0)
    net, (_, batch) = decoders(tf)[name]().eval(), sentences((3, 8))
    blocks = find_blocks(net, batch, "sublayers")
    assert [n.split(".")[-1] for n in blocks] == 3 * [*parts]
    walk, real = trace(net, batch), batch["attention_mask"].bool()
    seen = {n: [] for n in blocks}
    hooks = [m.register_forward_hook(lambda m, a, out, n=n: seen[n].append(out[0] if isinstance(out, tuple) else out))
             for n, m in blocks.items()]
    noted = trace_energies(net, batch, blocks)
    for hook in hooks: hook.remove()
    steps = torch.stack([seen[n][0] for n in blocks])
    assert_close(steps.view(3, 2, *steps.shape[1:]).sum(1)[:, real], walk.steps[:, real], rtol=1e-4, atol=1e-5)
    assert_close(noted.energies()[:, 1], steps[:, 1].square().mean((1, 2)), **CLOSE)


# Streams

class Graph(nn.Module):
    "The edges and their weights come first."
    def __init__(self): super().__init__(); self.w = nn.Linear(6, 6)
    def forward(self, edges, weights, h): return h + weights * self.w(h[:, edges]).tanh()


class Graphs(nn.Module):
    def __init__(self, named):
        super().__init__()
        self.named, self.blocks = named, nn.ModuleList(Graph() for _ in range(3))

    def forward(self, edges, weights, h):
        for block in self.blocks: h = block(edges, weights, h=h) if self.named else block(edges, weights, h)
        return h.sum((1, 2))


class Talks(nn.Module):
    "A pair of streams, as a tuple or a mapping."
    def __init__(self, form): super().__init__(); self.form, self.a, self.b = form, nn.Linear(6, 6), nn.Linear(6, 6)
    def forward(self, text, image):
        both = text + self.a(text).tanh() + image.mean(1, True), image + self.b(image).tanh() + text.mean(1, True)
        return dict(zip(("text", "image"), both)) if self.form == "dict" else both


class Pair(nn.Module):
    def __init__(self, form):
        super().__init__()
        self.form, self.blocks = form, nn.ModuleList(Talks(form) for _ in range(2))

    def forward(self, text, image):
        seen = [(text, image)]
        for block in self.blocks:
            out = block(*seen[-1])
            seen.append(tuple(out.values()) if self.form == "dict" else out)
        return seen


class Levels(nn.Module):
    "Two resolutions, each in the list with its own size."
    def __init__(self): super().__init__(); self.fine, self.coarse = nn.Linear(4, 4), nn.Linear(4, 4)
    def forward(self, xs):
        fine, coarse = xs
        up, down = coarse.mean(1, True), fine.mean(1, True)
        return [fine + self.fine(fine).tanh() + up, coarse + self.coarse(coarse).tanh() + down]


class Pyramid(nn.Module):
    def __init__(self): super().__init__(); self.blocks = nn.ModuleList(Levels() for _ in range(2))
    def forward(self, fine, coarse):
        seen = [[fine, coarse]]
        for block in self.blocks: seen.append(block(seen[-1]))
        return seen


def by_hand(seen, k): return torch.stack([(b[k] - a[k]).square().mean((1, 2)) for a, b in zip(seen, seen[1:])])


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("stream", [("h", 0), (2, 0), {"blocks.*": ("h", 0)}])
def test_the_stream_of_a_graph_block_is_named(named, stream):
    torch.manual_seed(0)
    net, x = Graphs(named), (torch.tensor([2, 0, 1, 4, 3]), torch.rand(1, 5, 1), torch.randn(3, 5, 6))
    with pytest.raises(ValueError, match="no residual block"): find_blocks(net, x)
    if named and stream == (2, 0): return   # by keyword it has no place
    blocks = find_blocks(net, x, stream=stream)
    assert list(blocks) == ["blocks.0", "blocks.1", "blocks.2"] and all(m > 0 for m in blocks.moved.values())
    at, steps = x[2], []
    for block in net.blocks: at, before = block(x[0], x[1], at), at; steps.append(at - before)
    want = torch.stack(steps).square().mean((2, 3))
    with torch.no_grad():
        assert_close(trace_energies(net, x, blocks).energies(), want)
        walk = trace(net, x, blocks)
    assert torch.equal(walk.x[0], x[2]) and walk.K == 3 and len(walk.stages) == 1
    la = LeastAction(net.train(), x=x, blocks=blocks)
    la(net(*x).square().mean()).backward()
    assert_close(la.energies, want.mean(1)) and all(b.w.weight.grad.any() for b in net.blocks)


@pytest.mark.parametrize("form", ["tuple", "dict"])
@pytest.mark.parametrize("k, stream", [(0, ("text", 0)), (1, ("image", 1)), (1, (1, 1))])
def test_each_stream_of_a_pair_is_measured(form, k, stream):
    torch.manual_seed(0)
    net, x = Pair(form), (torch.randn(3, 4, 6), torch.randn(3, 7, 6))
    blocks = find_blocks(net, x, stream=(stream[0], ("text", "image")[k]) if form == "dict" else stream)
    with torch.no_grad():
        assert_close(trace_energies(net, x, blocks).energies(), by_hand(net(*x), k))
        assert_close(trace(net, x, blocks).x, torch.stack([s[k] for s in net(*x)]))
    seen = []
    class Log(BlockHooks):
        def on_step(self, name, before, after): seen.append((name, before.shape, after.shape))
    with Log(net, blocks): net(*x)
    assert seen == [(n, x[k].shape, x[k].shape) for n in blocks]


@pytest.mark.parametrize("k", [0, 1])
def test_each_resolution_of_a_list_is_measured(k):
    torch.manual_seed(0)
    net, x = Pyramid(), (torch.randn(3, 8, 4), torch.randn(3, 2, 4))
    blocks = find_blocks(net, x, stream=(("xs", k), k))
    with torch.no_grad(): assert_close(trace_energies(net, x, blocks).energies(), by_hand(net(*x), k))


def test_streams_that_cannot_be_are_refused():
    net, x = Pair("tuple"), (torch.randn(3, 4, 6), torch.randn(3, 4, 6))
    for stream, words in ((("pictures", 1), "has the argument 'pictures'"), (("image",), "expected two"),
                          ((), "expected two"), ((1.5, 0), "expected two"),
                          ({"layers.*": ("image", 1)}, "matches no module")):
        with pytest.raises(ValueError, match=words): find_blocks(net, x, stream=stream)
    with pytest.raises(ValueError, match="no residual block"): find_blocks(net, x, stream=("image", 0))   # the text's
    with pytest.raises(ValueError, match="no residual block"): find_blocks(net, x, stream=("image", 5))
    with pytest.raises(ValueError, match="was named"): chosen_blocks(net, find_blocks(net, x, stream=("image", 1)))

"Elastic depth: the short network is what it claims to be, and the long one is never touched."
import copy
import io
import json
import re
import warnings
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.testing import assert_close

from lap_nb.hooks import find_blocks
from lap_nb.data import Split, digits
from lap_nb.depth import (DepthSchedule, Elastic, RandomDepth, Skip, Stretch, _removals, coarsening, deepen,
                          depth_curve, even, latency, lipschitz, measure_depth, measure_pruning, measure_speed,
                          recompute_statistics, shorten)
from lap_nb.dynamics import Flow, ResidualBlock, ResidualNet
from lap_nb.ensembles import fit_many
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.lab.catalogue import CHOSEN, load_study
from lap_nb.lab.design import Method, Net
from lap_nb.lab.nets import make_net
from lap_nb.lab.run import MEASURES
from lap_nb.nets import dense_net, staged_net
from lap_nb.penalties import Penalty, sliced_wasserstein
from lap_nb.training import evaluate, fit

CLOSE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(scope='module')
def split(): return digits().split(100, 0, n_val=100)


@pytest.fixture(scope='module')
def x(split): return split.x[split.test[:50]]


def dense(K=6, **kwargs):
    torch.manual_seed(0)
    return dense_net(64, 10, K=K, hidden=16, **kwargs).eval()


def staged(norm=True, Ks=(3, 2)):
    torch.manual_seed(0)
    net = staged_net((1, 8, 8), 10, Ks=Ks, width=4, norm=norm)
    net.encoder = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), net.encoder)
    with torch.no_grad():
        for m in net.modules():   # statistics that matter
            if isinstance(m, nn.BatchNorm2d): m.running_mean.normal_(); m.running_var.uniform_(.5, 2)
    return net.eval()


class Theirs(nn.Module):
    "A residual layer that takes its input by name, and returns a tuple if asked."
    def __init__(self, dim, pair=False):
        super().__init__()
        self.norm, self.linear, self.pair = nn.LayerNorm(dim), nn.Linear(dim, dim), pair

    def forward(self, hidden, scale=1.):
        out = hidden + scale * torch.tanh(self.linear(self.norm(hidden)))
        return (out, None) if self.pair else out


class Tower(nn.Module):
    "Layers in a `ModuleList`, called by name."
    def __init__(self, pair, K=4):
        super().__init__()
        self.start, self.layers, self.head, self.pair = nn.Linear(64, 8), nn.ModuleList(
            Theirs(8, pair) for _ in range(K)), nn.Linear(8, 10), pair

    def forward(self, x):
        x = self.start(x)
        for layer in self.layers: x = layer(hidden=x, scale=.5)[0] if self.pair else layer(hidden=x, scale=.5)
        return self.head(x)


def in_a_row(K=4):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 8), *[Theirs(8) for _ in range(K)], nn.ReLU(), nn.Linear(8, 10)).eval()


def tower(pair):
    torch.manual_seed(0)
    return Tower(pair).eval()


NETS = dict(dense=dense, small_steps=lambda: dense(h=.5), staged=staged, no_norm=lambda: staged(norm=False),
            row=in_a_row, tower=lambda: tower(False), pairs=lambda: tower(True))


def fingerprint(model):
    "Everything of a model that a user can see."
    return (
        repr(model),
        {k: v.clone() for k, v in model.state_dict().items()},
        [m.training for m in model.modules()],
        [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
        [id(m) for m in model.modules()],
    )


def same(a, b):
    assert a[0] == b[0] and a[2:] == b[2:] and a[1].keys() == b[1].keys()
    for name in a[1]: assert torch.equal(a[1][name], b[1][name]), name


# Schedules

@pytest.mark.parametrize('sizes', [(9,), (4, 4), (1, 5, 2), (1,)])
def test_even_schedules_cover_the_time_of_each_stage(sizes):
    for m in range(len(sizes), sum(sizes) + 1):
        schedule, start = even(m, sizes), 0
        assert len(schedule) == m
        for size in sizes:
            inside = [(k, s) for k, s in zip(schedule.kept, schedule.scale) if start <= k < start + size]
            assert inside[0][0] == start and sum(s for _, s in inside) == size
            start += size
    assert even(sum(sizes), sizes).scale == (1.,) * sum(sizes)


@pytest.mark.parametrize('m', [0, -1, 10, 2.5, True, None])
def test_impossible_numbers_of_blocks(m):
    with pytest.raises(ValueError, match='expected a whole number from 1 to 9'): even(m, [9])


@pytest.mark.parametrize('kept, scale', [((), ()), ((1, 0), (1, 1)), ((0, 0), (1, 1)), ((0,), (1, 1)), ((-1,), (1,)), ((0,), (0,)), ((0,), (float('inf'),))])
def test_impossible_schedules(kept, scale):
    with pytest.raises(ValueError, match='kept|scale'): DepthSchedule(kept, scale)


# The short network

def by_hand(net, x, schedule):
    "A dense network, block by block."
    z = net.encoder(x)
    for k, s in zip(schedule.kept, schedule.scale): z = z + s * net.flow.blocks[k].h * net.flow.blocks[k].velocity(z)
    return net.head(z)


@pytest.mark.parametrize('h', [1., .3])
def test_gates_and_cuts_are_what_the_schedule_says(x, h):
    net = dense(h=h)
    elastic = Elastic(net)
    for schedule in [even(m, [6]) for m in range(1, 7)] + [
            even(3, [6], lengthen=False), DepthSchedule((1, 2, 5), (2.5, .5, 1.))]:
        with torch.no_grad():
            assert_close(elastic(x, depth=schedule), by_hand(net, x, schedule), **CLOSE)
            assert_close(elastic.cut(schedule)(x), by_hand(net, x, schedule), **CLOSE)


@pytest.mark.parametrize('name', NETS)
def test_a_cut_network_does_what_the_gated_one_does(name, x):
    net = NETS[name]()
    elastic = Elastic(net, x[:4])
    with torch.no_grad():
        assert_close(elastic(x), net(x), **CLOSE)
        for m in range(len(elastic.sizes), elastic.K + 1):
            short = elastic.cut(m)
            assert_close(short(x), elastic(x, depth=m), **CLOSE)
            assert sum(isinstance(b, (ResidualBlock, Theirs)) for b in short.modules()) == m
    assert type(elastic.cut(elastic.K)) is type(net) and repr(elastic.cut(elastic.K)) == repr(net)


@pytest.mark.parametrize('name', NETS)
def test_saved_loaded_compiled_exported(name, x):
    elastic = Elastic(NETS[name](), x[:4])
    short, schedule = elastic.cut(len(elastic.sizes) + 1), elastic.schedules[len(elastic.sizes) + 1]
    want = short(x).detach()
    file = io.BytesIO(); torch.save(short, file); file.seek(0)
    assert_close(torch.load(file, weights_only=False)(x).detach(), want)
    other = Elastic(NETS[name]().apply(lambda m: m.reset_parameters() if hasattr(m, 'reset_parameters') else None),
                    x[:4]).cut(schedule)
    other.load_state_dict(short.state_dict())
    assert_close(other(x).detach(), want)
    assert_close(torch.compile(short, backend='eager', fullgraph=True)(x).detach(), want)
    assert_close(torch.export.export(short, (x,)).module()(x).detach(), want, **CLOSE)


def test_the_flow_of_a_cut_network_is_a_flow(x):
    net = dense(K=7, h=.5)
    for m in range(1, 8):
        flow = Elastic(net).cut(m).flow
        assert type(flow) is Flow and len(flow.blocks) == m and flow.h * m == pytest.approx(3.5)
        assert_close(flow.trajectory(x).x[-1], flow(x))
    assert 'Scaled' not in repr(Elastic(dense(K=6)).cut(3))   # equal steps need no factor


def test_blocks_in_a_sequential_go_and_elsewhere_leave_a_placeholder(x):
    row, list_ = Elastic(in_a_row(), x[:4]).cut(2), Elastic(tower(False), x[:4]).cut(2)
    assert [type(m).__name__ for m in row] == ['Linear', 'Stretch', 'Stretch', 'ReLU', 'Linear']
    assert [type(m) for m in list_.layers] == [Stretch, Skip, Stretch, Skip]
    assert sum(p.numel() for p in list_.parameters()) < sum(p.numel() for p in tower(False).parameters())


def test_shared_velocities_stay_shared(x):
    torch.manual_seed(0)
    velocity = nn.Linear(64, 64)
    net = ResidualNet(Flow([velocity] * 4, .1), nn.Linear(64, 10)).eval()
    short = Elastic(net).cut(2)
    assert len({id(b.velocity) for b in short.flow.blocks}) == 1
    assert_close(short(x), by_hand(net, x, even(2, [4])), **CLOSE)


def test_blocks_that_write_to_their_input(x):
    class InPlace(nn.Module):
        def __init__(self): super().__init__(); self.linear = nn.Linear(8, 8)
        def forward(self, x):
            x += torch.tanh(self.linear(x))
            return x
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 8), InPlace(), InPlace(), nn.Linear(8, 10)).eval()
    elastic = Elastic(net, x[:4])
    with torch.no_grad():
        z = net[0](x)
        want = net[3](z + 2 * torch.tanh(net[1].linear(z)))
        assert_close(elastic(x, depth=1), want, **CLOSE)
        assert_close(elastic.cut(1)(x), want, **CLOSE)


class Reads(nn.Module):
    "A language model that takes token numbers as a split holds them, and returns logits alone."
    def __init__(self, model): super().__init__(); self.model = model
    def forward(self, x): return self.model(input_ids=x.long()).logits


def of_transformers(name, transformers):
    "A small network of that library in evaluation mode, and samples for it."
    torch.manual_seed(0)
    if name == 'vit':
        config = transformers.ViTConfig(hidden_size=16, num_hidden_layers=4, num_attention_heads=2,
                                        intermediate_size=32, image_size=8, patch_size=4, num_channels=1, num_labels=10)
        return transformers.ViTForImageClassification(config).eval(), digits().x.view(-1, 1, 8, 8)
    config = transformers.GPT2Config(n_embd=16, n_layer=4, n_head=2, vocab_size=50, n_positions=16, num_labels=10,
                                     pad_token_id=0)
    return Reads(transformers.GPT2ForSequenceClassification(config)).eval(), torch.randint(
        1, 50, (len(digits().x), 8)).float()


@pytest.mark.parametrize('name', ['vit', 'gpt2'])
def test_networks_of_transformers_saved_loaded_compiled_exported(name, transformers):
    net, x = of_transformers(name, transformers)
    data, logits = digits(), lambda out: out if isinstance(out, torch.Tensor) else out['logits']
    data = Split(x, data.y, data.pool[:40], data.pool[40:80], data.test[:40], 'digits', 10, (0,))
    before, elastic, x = fingerprint(net), Elastic(net, x[:2]), x[:5]
    assert elastic.sizes == [4]
    with pytest.warns(UserWarning, match='path gap'):
        small = shorten(net, data, n_blocks=2, way='lengthened', verbose=False)
    want = logits(small(x)).detach()
    assert small.shortened['kept'] == [0, 2] and want.shape == (5, 10)
    assert_close(want, logits(elastic(x, depth=2)).detach(), **CLOSE)
    file = io.BytesIO(); torch.save(small, file); file.seek(0)
    assert_close(logits(torch.load(file, weights_only=False)(x)).detach(), want)
    with torch.no_grad():
        other = Elastic(
            of_transformers(name, transformers)[0].apply(lambda m: [p.zero_() for p in m.parameters(recurse=False)]),
            x).cut(2)
    other.load_state_dict(small.state_dict())
    assert_close(logits(other(x)).detach(), want)
    assert_close(logits(torch.compile(small, backend='eager', fullgraph=True)(x)).detach(), want)
    assert_close(logits(torch.export.export(small, (x,)).module()(x)).detach(), want, **CLOSE)
    same(before, fingerprint(net))


# The long network is never touched

@pytest.mark.parametrize('name', ['dense', 'staged', 'row'])
@pytest.mark.parametrize('training', [True, False])
@pytest.mark.filterwarnings('ignore:the path gap')
def test_the_input_is_never_modified(name, training, split, x):
    net = NETS[name]().train(training)
    before = fingerprint(net)
    elastic = Elastic(net, x[:4]).calibrate(split.x[split.train])
    elastic(x, depth=3)
    if name == 'dense': elastic.early_exit(x)
    measure_depth(net, split)
    shorten(net, split, n_blocks=3, epochs=1, verbose=False)
    shorten(net, split, budget_ms=1e6, verbose=False)
    elastic.cut(3).apply(lambda m: [nn.init.zeros_(p) for p in m.parameters(recurse=False)])
    same(before, fingerprint(net))


def test_meters_stay_behind_and_other_hooks_come_along(x):
    net, seen = dense(), []
    net.flow.blocks[0].velocity.register_forward_hook(lambda m, args, out: seen.append(1))
    la = LeastAction(net)
    la_before = fingerprint(net)
    F.cross_entropy(net.train()(x), torch.zeros(50, dtype=torch.long))   # the meter holds a graph
    elastic = Elastic(net.eval())
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in elastic.modules())
    seen.clear(); elastic(x)
    assert hooks == 1 and seen == [1]
    assert fingerprint(net)[3] == la_before[3]
    la.remove()


def test_modes_and_gates_are_put_back_after_an_error(x):
    elastic = Elastic(dense()).train()
    with pytest.raises(RuntimeError): elastic(x[:, :3], depth=2)
    assert {g.scale for g in elastic.gates} == {1.}
    with pytest.raises(RuntimeError): elastic.early_exit(x[:, :3])
    assert all(m.training for m in elastic.model.modules())


# Choices

def shuffled_labels(split, part):
    y = split.y.clone()
    index = getattr(split, part)
    y[index] = y[index].roll(1)
    return Split(split.x, y, split.train, split.val, split.test, split.name, split.classes, split.seeds)


@pytest.fixture(scope='module')
def trained(split):
    torch.manual_seed(0)
    net = dense_net(64, 10, K=5, hidden=16)
    fit(net, split, Penalty(net, 1.), epochs=30, lr=3e-3, eval_every=30)
    return net


def test_choices_are_made_on_the_validation_part_alone(trained, split):
    chosen = lambda s, **goal: (lambda r: (r['kept'], r['scale']))(shorten(trained, s, verbose=False, **goal).shortened)
    for goal in (dict(n_blocks=2), dict(accuracy_drop=.1)):
        want = chosen(split, **goal)
        for part in ('test', 'train'): assert chosen(shuffled_labels(split, part), **goal) == want
    y = split.y.clone()   # validation labels that one block gets right
    y[split.val] = Elastic(trained).eval()(split.x[split.val], depth=1).argmax(1)
    told = Split(split.x, y, split.train, split.val, split.test, split.name, split.classes, split.seeds)
    assert chosen(told, accuracy_drop=0., way='lengthened') == ([0], [5.])


def test_the_best_schedule_is_at_least_as_good_on_validation(trained, split):
    curve = depth_curve(trained, split, 'val')
    for m, best in enumerate(curve.of('best')[:-1]):
        assert m > len(curve.of('best')) - 3 or best['accuracy'] >= curve.of('lengthened')[m]['accuracy']
    assert curve.of('best')[-1]['accuracy'] == curve.of('skip')[-1]['accuracy']


def test_goals(trained, split, x):
    small = shorten(trained, split, accuracy_drop=.05, verbose=False)
    s = small.shortened
    assert s['val_score'][1] >= s['val_score'][0] - .05 - 1e-6 and s['blocks'][1] < 5
    fewer = depth_curve(trained, split, 'val', ['best']).of('best')[:s['blocks'][1] - 1]
    assert all(r['accuracy'] < s['val_score'][0] - .05 + 1e-6 for r in fewer)
    json.dumps(s)
    assert len(shorten(trained, split, budget_ms=1e6, verbose=False).flow.blocks) in range(1, 6)


def test_fine_tuning_changes_the_copy_alone(trained, split):
    before = fingerprint(trained)
    plain, tuned = (shorten(trained, split, n_blocks=1, epochs=e, verbose=False) for e in (0, 2))
    assert not torch.equal(plain.head.weight, tuned.head.weight) and torch.equal(plain.head.weight, trained.head.weight)
    same(before, fingerprint(trained))


def test_what_is_printed(trained, split, capsys):
    shorten(trained, split, n_blocks=2, way='lengthened')
    line = capsys.readouterr().out
    for part in ('5 -> 2 blocks: 0 (x2) 2 (x3)', 'validation accuracy', 'parameters', 'ms for 100 samples on cpu',
                 'times as fast'):
        assert part in line


@pytest.mark.parametrize('goal, message', [
    (dict(), 'found no goal, expected exactly one'), (dict(n_blocks=2, budget_ms=1.), 'found n_blocks, budget_ms'),
    (dict(n_blocks=0), 'found 0 blocks'), (dict(n_blocks=6), 'found 6 blocks, expected a whole number from 1 to 5'),
    (dict(accuracy_drop=-.1), 'expected a share in'), (dict(accuracy_drop=5), 'expected a share in'), (dict(budget_ms=0), 'expected a positive number'),
    (dict(budget_ms=1e-9), 'the fastest has . blocks and takes'), (dict(n_blocks=2, way='prune'), "expected one of 'skip', 'lengthened', 'best'")])
def test_bad_goals(trained, split, goal, message):
    with pytest.raises(ValueError, match=message): shorten(trained, split, verbose=False, **goal)


def test_an_accuracy_that_cannot_be_kept(split):
    torch.manual_seed(0)
    net = dense_net(64, 10, K=3, hidden=32)
    fit(net, split, epochs=40, lr=3e-3, eval_every=40)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        best = max(r['accuracy'] for r in depth_curve(net, split, 'val', ['skip']).of('skip')[:-1])
        full = depth_curve(net, split, 'val', ['skip'], [3]).of('skip')[0]['accuracy']
        assert best < full
        with pytest.raises(ValueError, match=rf'no shorter network keeps .* and {100 * best:.1f} %'):
            shorten(net, split, accuracy_drop=0., way='skip')


def test_a_network_of_one_block_cannot_be_shortened_by_accuracy(split):
    net = dense(K=1)
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')
        with pytest.raises(ValueError, match='only one depth'): shorten(net, split, accuracy_drop=.1)


def test_a_warning_quotes_the_path_gap(trained, split):
    class Away(nn.Module):
        def __init__(self, sign): super().__init__(); self.sign, self.weight = sign, nn.Parameter(torch.ones(()))
        def forward(self, x): return self.sign * self.weight * torch.ones_like(x)
    there_and_back = ResidualNet(Flow([Away(1), Away(-1), Away(1), Away(-.5)]), nn.Linear(64, 10))
    # steps 1, -1, 1, -1/2: displacement 1/2, gap share 1 - .25 / (4 * 3.25)
    with pytest.warns(UserWarning, match=r'the path gap is 98 %'):
        shorten(there_and_back, split, n_blocks=2, verbose=False)
    with warnings.catch_warnings():
        warnings.simplefilter('error')
        shorten(trained, split, n_blocks=2, verbose=False)


# Blocks that cannot be left out

def test_blocks_that_change_the_shape_are_never_removed(split, x):
    net = staged()
    curve = depth_curve(net, split, ways=['best'])
    assert curve.sizes == [3, 2] and [r['blocks'] for r in curve.of('best')] == [2, 3, 4, 5]
    with pytest.raises(ValueError, match='from 2 to 5.*in 2 stages of constant shape'): Elastic(net, x[:4])(x, depth=1)
    assert len(Elastic(net, x[:4]).cut(2).flow.transitions) == 1


def test_a_named_block_that_changes_the_shape_is_refused(x):
    net = nn.Sequential(nn.Linear(64, 8), Theirs(8), Theirs(8), nn.Linear(8, 10)).eval()
    with pytest.raises(ValueError,
                       match=re.escape("'3' is named among the blocks and cannot be one: shape changes (8,) -> (10,)")):
        Elastic(net, x[:4], blocks=['1', '2', '3'])


def test_one_block_called_twice(x):
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.block, self.head = Theirs(64), nn.Linear(64, 10)
        def forward(self, x): return self.head(self.block(self.block(x)))
    with pytest.raises(ValueError, match="block 'block' runs 2 times per pass"): Elastic(Twice(), x[:4])
    block = ResidualBlock(nn.Linear(64, 64))
    with pytest.raises(ValueError, match='runs 3 times per pass'): Elastic(nn.Sequential(block, block, block))


def test_no_blocks(x):
    with pytest.raises(ValueError, match='no residual block found'):
        Elastic(nn.Sequential(nn.Linear(64, 8), nn.ReLU()), x[:4])
    with pytest.raises(ValueError, match='the network as a whole is the residual block'):
        Elastic(ResidualBlock(nn.Linear(64, 64)))


def test_named_blocks(x):
    net = in_a_row()
    elastic = Elastic(net, x[:4], blocks=['2', '3'])
    assert elastic.K == 2 and elastic.names == ['2', '3']
    with pytest.raises(ValueError, match="pattern .9. matches no module"): Elastic(net, x[:4], blocks=["9"])


# Batch norm

def test_statistics_are_those_of_the_short_network(split, x):
    net, samples = staged(), split.x[split.train]
    short = recompute_statistics(Elastic(net, x[:4]).cut(2), samples, chunk=1000)
    norm = short.flow.flows[0].blocks[0].velocity
    norm = norm.velocity[0] if hasattr(norm, 'velocity') else norm[0]
    z = short.encoder(samples)
    assert_close(norm.running_mean, z.mean((0, 2, 3)), **CLOSE)
    assert_close(norm.running_var, z.var((0, 2, 3)), **CLOSE)
    assert norm.momentum == .1 and not short.training


def test_an_elastic_network_keeps_statistics_for_every_depth(split, x):
    net, samples = staged(), split.x[split.train]
    elastic = Elastic(net, x[:4]).calibrate(samples)
    for m in (2, 3, 4):
        assert_close(elastic(x, depth=m), recompute_statistics(elastic.cut(elastic.schedules[m]), samples)(x), **CLOSE)
    assert_close(elastic(x), net(x), **CLOSE)
    twin = Elastic(staged(), x[:4]).calibrate(samples[:10])
    twin.load_state_dict(elastic.state_dict())
    assert_close(twin(x, depth=3), elastic(x, depth=3))


def test_labels_of_the_training_part_are_not_used(split):
    net = staged()
    a, b = (depth_curve(net, s, ways=['lengthened']) for s in (split, shuffled_labels(split, 'train')))
    assert a.rows == b.rows and a.recomputed
    assert not depth_curve(dense(), split, ways=['skip']).recomputed


def test_all_blocks_are_measured_as_trained_and_with_statistics_taken_anew(split):
    net = staged().eval()
    curve, anew = (
        depth_curve(net, split, ways=['lengthened']),
        recompute_statistics(copy.deepcopy(net), split.x[split.train]),
    )
    right = lambda m: (m(split.x[split.test]).argmax(-1) == split.y[split.test]).float().mean().item()
    assert curve.settled == pytest.approx(right(anew)) != pytest.approx(right(net))
    assert curve.of('lengthened')[-1]['accuracy'] == pytest.approx(right(net))
    plain = depth_curve(dense(), split, ways=['skip'])
    assert plain.settled == plain.of('skip')[-1]['accuracy']


# The bound

@pytest.mark.parametrize('seed', range(5))
def test_the_bound_holds(seed):
    torch.manual_seed(seed)
    net, start = dense_net(5, 2, K=8, hidden=8, h=.1 + .3 * seed), torch.randn(30, 5) * 3
    for m in range(1, 9):
        c = coarsening(net.flow, start, m)
        assert (c.error <= c.bound * (1 + 1e-4) + 1e-4).all() and (c.curvature <= c.bound * (1 + 1e-5) + 1e-6).all()
    assert c.error.max() < 1e-5 and c.bound.max() == 0


def test_the_error_is_zero_for_straight_paths_of_constant_speed():
    class Straight(nn.Module):
        """Constant along each path, different between paths: the direction is kept, the speed is |x_2|, which does not
        change."""
        def forward(self, x): return torch.stack([x[:, 1].abs(), torch.zeros(len(x))], 1)
    c = coarsening(Flow([Straight() for _ in range(6)], .5), torch.randn(20, 2), 1, [1.] * 6)
    assert c.error.max() < 1e-5 and c.curvature.max() < 1e-5


def test_unknown_layers_need_constants():
    flow = Flow([nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3))])
    with pytest.raises(ValueError, match='found a LayerNorm'): coarsening(flow, torch.randn(2, 3), 1)


@pytest.mark.parametrize('activation, slope', [(nn.ReLU(), 1.), (nn.Sigmoid(), 1.), (nn.ELU(3.), 3.), (nn.LeakyReLU(-2.), 2.)])
def test_activations_may_be_steep(activation, slope):
    field = nn.Sequential(nn.Linear(1, 1, bias=False), activation)
    z = torch.linspace(-3, 3, 2001)[:, None]
    steepest = (field(z).diff(dim=0) / z.diff(dim=0)).abs().max().item()
    assert (
        lipschitz(field) == pytest.approx(slope * field[0].weight.abs().item()) and steepest <= lipschitz(field) * 1.001
    )


# Early exit

def test_an_exit_that_never_comes_is_the_full_network(x):
    net = dense()
    e = Elastic(net).early_exit(x, slack=1e9)
    assert (e.blocks == 6).all()
    assert_close(e.logits, net(x).detach(), **CLOSE)


def test_constant_speed_leaves_after_one_block(x):
    class Constant(nn.Module):
        def __init__(self, v): super().__init__(); self.v = nn.Parameter(v)
        def forward(self, x): return self.v.expand_as(x)
    torch.manual_seed(0)
    v = torch.randn(64)
    net = ResidualNet(Flow([Constant(v) for _ in range(5)], .2), nn.Linear(64, 10)).eval()
    e = Elastic(net).early_exit(x, slack=0.)
    assert (e.blocks == 1).all()
    assert_close(e.logits, net(x).detach(), **CLOSE)


@pytest.mark.parametrize('seed', range(3))
def test_a_decision_within_the_slack_is_the_full_one(seed, x):
    torch.manual_seed(seed)
    net, slack = dense_net(64, 10, K=6, hidden=16, h=.2).eval(), .5
    with torch.no_grad():
        e, path, full = Elastic(net).early_exit(x, slack), net.trajectory(x).x, net(x).argmax(1)
        at = e.blocks
        here, before = path[at, range(50)], path[at - 1, range(50)]
        rest = (6 - at)[:, None] * (here - before)
        within = (path[-1] - here - rest).norm(dim=1) <= slack * rest.norm(dim=1)
    assert (at < 6).any() and within.any()
    assert (e.logits.argmax(1) == full)[within].all()


def test_exits_with_convolutions_and_another_dtype():
    torch.manual_seed(0)
    flow = Flow([nn.Conv2d(3, 3, 3, padding=1) for _ in range(3)], .1)
    net = ResidualNet(flow, nn.Sequential(nn.BatchNorm2d(3), nn.AdaptiveAvgPool2d(1), nn.Flatten(),
                                          nn.Linear(3, 4))).double().eval()
    z = torch.randn(6, 3, 5, 5, dtype=torch.float64)
    e = Elastic(net).early_exit(z, 1e9)
    assert_close(e.logits, net(z).detach())


def test_margins_follow_the_head(x):
    elastic = Elastic(dense())
    before = elastic.early_exit(x, .5).blocks
    with torch.no_grad(): elastic.model.head.weight.zero_()
    assert (elastic.early_exit(x, .5).blocks == 1).all() and (before > 1).any()   # no weight, no doubt


# Training for it

def test_random_depth_runs_some_blocks_in_training_and_all_in_evaluation(x):
    net = dense().train()
    want = net.eval()(x)
    hooks = RandomDepth(net, seed=1)
    assert_close(net(x), want)
    net.train()
    outs = [net(x) for _ in range(40)]
    with torch.no_grad(): possible = [by_hand(net, x, even(m, [6])) for m in range(1, 7)]
    seen = [next(m for m, p in enumerate(possible, 1) if torch.allclose(o, p, **CLOSE)) for o in outs]
    assert set(seen) == set(range(1, 7))
    hooks.remove()
    assert_close(net(x), want)
    with pytest.raises(ValueError, match='add up to 5, expected the 6 blocks'): RandomDepth(net, sizes=[5])


@pytest.mark.parametrize('kind', ['path_gap', 'wasserstein'])
def test_penalties_train_one_network_as_many(kind):
    data = digits()
    split, make = data.splits(60, range(2)), lambda: dense_net(64, 10, K=3, hidden=8)
    rows = fit_many(make, split, least_action=lambda m: Penalty(m, 1., kind), epochs=2, eval_every=2)
    assert rows.curves['action'].shape == (1, 2) and rows.curves['action'].isfinite().all()
    if kind == 'path_gap':
        torch.manual_seed(0)
        net = make()
        one = fit(net, split.member(0), Penalty(net, 1., kind), epochs=2, eval_every=2)
        assert_close(one.curves['action'], rows.curves['action'][:, 0], rtol=1e-3, atol=1e-5)


def test_the_path_gap_is_taken_stage_by_stage(x):
    net = staged(norm=False).train()
    penalty = Penalty(net, 2.)
    total = penalty(net(x).sum() * 0)
    total.backward()
    steps = [s.steps.flatten(2) for s in net.eval().trajectory(x).stages]
    want = sum((len(s) * s.square().sum(0) - s.sum(0).square()).mean() for s in steps)
    assert_close(total.detach(), 2 * want.detach(), **CLOSE)
    with pytest.raises(RuntimeError, match='found the steps of 0 blocks, expected 5'): penalty(torch.zeros(()))
    penalty.remove()
    assert not any(m._forward_hooks for m in net.modules())


def test_sliced_wasserstein():
    torch.manual_seed(0)
    a = torch.randn(100, 4)
    assert sliced_wasserstein(a, a.flip(0)) < 1e-10
    shift = torch.tensor([2., 0, 0, 0])
    # 4 / 4 in the mean
    assert_close(sliced_wasserstein(a, a + shift, 20000), torch.tensor(1.), rtol=.05, atol=0)
    assert_close(sliced_wasserstein(a, a + shift, 20000, largest=True), torch.tensor(4.), rtol=.02, atol=0)
    b = a.clone().requires_grad_()
    sliced_wasserstein(b, b.detach(), largest=True).backward()
    assert b.grad.isfinite().all()


# Records and times

def test_a_record_is_plain_json(trained, split):
    record = measure_depth(trained, split)
    assert json.loads(json.dumps(record)) == record
    assert record['counts'] == [1, 2, 3, 4, 5] and record['area_skip'] == pytest.approx(sum(record['skip']) / 5)
    assert record['largest_share'] == pytest.approx(max(record['energies']) / sum(record['energies']))
    assert record['energy_lengthened'][-1] == pytest.approx(record['energy'])


def test_energy_of_a_shortened_network_is_that_of_its_trajectory(trained, split):
    curve = depth_curve(trained, split, ways=['lengthened'])
    for row in curve.of('lengthened'):
        flow = Elastic(trained).cut(row['schedule']).eval().flow
        steps = torch.stack([s for s in flow.trajectory(split.x[split.test]).steps])
        times = torch.tensor(row['schedule'].scale)   # each step over its own time, h = 1
        assert row['energy'] == pytest.approx((steps.square().mean(2).mean(1) / times).sum().item(), rel=1e-4)


def test_latency_orders_networks():
    slow, fast = (nn.Sequential(*[nn.Linear(300, 300) for _ in range(n)]) for n in (40, 1))
    times = latency(dict(slow=slow, fast=fast), torch.randn(64, 300))
    assert times['slow'] > times['fast'] > 0


# Finer, and other rivals

class Constant(nn.Module):
    "The same velocity everywhere."
    def __init__(self, dim): super().__init__(); self.v = nn.Parameter(torch.randn(dim))
    def forward(self, x): return self.v.expand_as(x)


@pytest.mark.parametrize('times', [1, 2, 3])
def test_a_deepened_network_of_constant_fields_is_the_same(x, times):
    torch.manual_seed(0)
    net = ResidualNet(Flow([Constant(64) for _ in range(4)], .5), nn.Linear(64, 10)).eval()
    before, fine = fingerprint(net), deepen(net, times)
    assert_close(fine(x), net(x), **CLOSE)
    assert len(fine.flow.blocks) == 4 * times and fine.flow.h == pytest.approx(.5 / times)
    # nothing is shared
    assert len({p.data_ptr() for p in [*fine.parameters(), *net.parameters()]}) == 4 * times + 4 + 4
    same(before, fingerprint(net))


def test_deepening_approaches_the_flow_of_the_blocks_and_keeps_stages(x):
    net = staged(norm=False, Ks=(2, 1))
    with torch.no_grad():
        ends = [deepen(net, n)(x) for n in (1, 2, 4, 8)]
    assert_close(ends[0], net(x))
    gaps = [(b - a).norm().item() for a, b in zip(ends, ends[1:])]
    assert gaps[0] > gaps[1] > gaps[2]
    assert [len(f.blocks) for f in deepen(net, 3).flow.flows] == [6, 3]


@pytest.mark.parametrize('times', [0, -1, 1.5, True])
def test_impossible_numbers_of_repetitions(times):
    with pytest.raises(ValueError, match='times is .*, expected'): deepen(dense(), times)


def test_a_block_that_leaves_loses_its_time_or_gives_it_to_its_neighbour():
    removals = _removals([2., 1., 1., 3.], [3, 1])
    assert {(s.kept, s.scale): t for s, t in removals.items()} == {
                ((1, 2, 3), (1, 1, 1)): [1, 1, 3], ((1, 2, 3), (3, 1, 1)): [3, 1, 3], ((0, 2, 3), (1, 1, 1)): [2, 1, 3],
                ((0, 2, 3), (1.5, 1, 1)): [3, 1, 3], ((0, 1, 3), (1, 1, 1)): [2, 1, 3],
                ((0, 1, 3), (1, 2, 1)): [2, 2, 3]}   # the fourth is alone in its stage and stays


@pytest.mark.parametrize('name', ['dense', 'staged', 'row'])
def test_pruning_goes_down_to_one_block_of_each_stage_and_leaves_the_input_alone(name, split):
    net = NETS[name]()
    before = fingerprint(net)
    found = measure_pruning(net, split, epochs=1, samples=50)
    K, stages = dict(dense=(6, 1), staged=(5, 2), row=(4, 1))[name]
    assert (
        len(found['pruned']) == K - stages + 1
        and found['tuned_epochs'] == K - stages
        and json.loads(json.dumps(found)) == found
    )
    assert found['pruned'][-1] == pytest.approx(
        (net(split.x[split.test]).argmax(1) == split.y[split.test]).float().mean().item())
    # the input was not trained at all; few steps do not renew its odd statistics
    assert name == 'staged' or found['pruned'][0] > found['pruned'][-1]
    same(before, fingerprint(net))


def test_pruning_chooses_on_validation_and_tunes_on_training_labels(trained, split):
    found, other = (measure_pruning(trained, s, epochs=1) for s in (split, shuffled_labels(split, 'test')))
    score = lambda s: measure_pruning(trained, s, part='val', epochs=1)['pruned']
    assert score(split) == score(shuffled_labels(split, 'test')) != score(shuffled_labels(split, 'train'))
    assert found['pruned'] != other['pruned']


def test_speed_of_every_depth(split):
    found = measure_speed(staged(), split, samples=20, repeats=3)
    assert (
        len(found['ms']) == len(found['ms_flow']) == 4
        and found['samples'] == 20
        and min(found['ms'] + found['ms_flow']) > 0
    )
    assert json.loads(json.dumps(found)) == found


def vit(drop=0.): return make_net(Net('vit', 4, 16), Method('m', init='orthogonal', gain=.5, drop=drop), (1, 7, 7), 10)


def test_attention_and_perceptrons_of_the_studies_transformer_are_blocks():
    torch.manual_seed(0)
    net, pictures = vit().eval(), torch.randn(6, 1, 7, 7)
    elastic = Elastic(net, pictures[:2])
    assert elastic.sizes == [4] and list(find_blocks(net)) == [f'flow.blocks.{k}' for k in range(4)]
    for m in (1, 2, 3): assert_close(elastic.cut(m)(pictures), elastic(pictures, depth=m), **CLOSE)
    assert net.trajectory(pictures).x.shape == (5, 6, 16, 16)
    for side, channels in ((8, 3), (14, 1), (28, 1), (32, 3)):   # sixteen tokens of any picture
        other = make_net(Net('vit', 2, 8), Method('m'), (channels, side, side), 10)
        assert other.encoder(torch.randn(2, channels, side, side)).shape == (2, 16, 8)


@pytest.mark.parametrize('drop', [0., .5])
def test_the_studies_transformer_trains_in_a_row_as_it_does_alone(drop):
    data = digits()
    rows = data.splits(20, seeds=(0, 1))
    pictures = replace(rows, x=F.pad(rows.x.view(-1, 1, 8, 8), (0, -1, 0, -1)))
    many = [
        fit_many(
            lambda: vit(drop),
            pictures,
            seeds=(0, 1),
            least_action=partial(LeastAction, controller=DualAscent(lambda0=1.0)),
            epochs=1,
            batch_size=20,
            eval_every=1,
            mode=mode,
        )
        for mode in ('batched', 'sequential')
    ]
    for i in range(2):
        a, b = (runs[i].model.state_dict() for runs in many)
        if not drop: assert all(torch.allclose(a[k], b[k], rtol=1e-3, atol=2e-4) for k in a)
        assert all(v.isfinite().all() for v in a.values())


def test_random_depth_of_a_study_trains_in_a_row_as_it_does_alone():
    rows = digits().splits(40, seeds=(0, 1))
    make = lambda: make_net(Net('dense', 3, 8), Method('m', random_depth=True), (64,), 10)
    many = [
        fit_many(make, rows, seeds=(0, 1), epochs=4, batch_size=20, eval_every=4, mode=mode)
        for mode in ('batched', 'sequential')]
    for i in range(2): assert_close(many[0][i].model.state_dict(), many[1][i].model.state_dict(), rtol=1e-3, atol=1e-4)
    net, x = make().train(), rows.x[:9]
    assert len({tuple(net(x).flatten().tolist()) for _ in range(20)}) == 3   # as many networks as numbers of blocks
    assert_close(net.eval()(x), net.head(net.flow(net.encoder(x))))


def test_settings_are_chosen_on_the_validation_part_alone(trained, split):
    measure = MEASURES['tuning']
    assert measure(trained, split) == measure(trained, shuffled_labels(split, 'test')) != measure(
        trained, shuffled_labels(split, 'val'))
    for kind, names in CHOSEN.items():
        assert set(names) <= {
            cell.method.name for cell, _ in load_study('depth-tuning').cells() if cell.net.kind == kind}


def test_a_table_says_energy_and_whose_statistics(split):
    text = depth_curve(staged(), split, ways=['skip'])._repr_markdown_()
    assert 'its energy' in text and 'Batch-norm statistics taken anew' in text
    assert 'Batch-norm' not in depth_curve(dense(), split, ways=['skip'])._repr_markdown_()


class Pair(nn.Module):
    "A residual block that returns something besides."
    def __init__(self): super().__init__(); self.f = nn.Linear(4, 4)
    def forward(self, x): return x + self.f(x), x.mean()


class Pairs(nn.Module):
    def __init__(self, uses): super().__init__(); self.blocks, self.uses = nn.ModuleList([Pair(), Pair(), Pair()]), uses
    def forward(self, x):
        total = 0
        for block in self.blocks:
            x, extra = block(x)
            if self.uses: total = total + extra
        return x + total


def test_blocks_whose_other_values_the_network_needs():
    x = torch.randn(5, 4)
    net = Elastic(Pairs(uses=False), x)
    assert net(x, depth=1).shape == x.shape
    with pytest.raises(ValueError,
                       match=r"block 'blocks.0' returns 2 values, and all but the first are None where it is left out"):
        Elastic(Pairs(uses=True), x)


class Writes(nn.Module):
    "A residual block that adds to its input in place."
    def __init__(self): super().__init__(); self.f = nn.Linear(4, 4)
    def forward(self, x): return x.add_(self.f(x.clone()))


def test_penalty_and_random_depth_see_blocks_that_write_to_their_input():
    torch.manual_seed(0)
    net, x = nn.Sequential(nn.Linear(4, 4), Writes(), Writes(), Writes()).train(), torch.randn(5, 4)
    with torch.no_grad(): full = net(x)
    named = {n: m for n, m in net.named_children() if n != "0"}
    found = find_blocks(net, x)
    gap = Penalty(net, 1., blocks=found)
    net(x); assert gap.meter.take().abs().sum() > 0
    gap.remove()
    gap = Penalty(net, 1., blocks=named)
    with pytest.raises(RuntimeError, match="writes to its input: pass blocks=find_blocks"): net(x)
    gap.remove()
    random = RandomDepth(net, blocks=found, sizes=[3])
    with torch.no_grad(): outs = [net(x) for _ in range(12)]
    random.remove()
    assert any(not torch.allclose(out, full) for out in outs)
    random = RandomDepth(net, blocks=named, sizes=[3])
    with pytest.raises(RuntimeError, match="block '1' writes to its input"): net(x)
    random.remove()


def test_random_depth_of_a_block_that_changes_the_shape():
    net = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 5)).train()
    random = RandomDepth(net, blocks={"0": net[0], "1": net[1]}, sizes=[2])
    with pytest.raises(ValueError, match=r"block '1' gives \(3, 5\) for an input of \(3, 4\)"): net(torch.randn(3, 4))
    random.remove()


def test_statistics_after_an_error_are_as_before():
    net = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4)); net(torch.randn(9, 4))
    before = {k: v.clone() for k, v in net.state_dict().items()}
    with pytest.raises(RuntimeError): recompute_statistics(net, torch.randn(9, 3))
    assert net[1].momentum == .1 and all(torch.equal(v, before[k]) for k, v in net.state_dict().items())


@pytest.mark.parametrize("of", [np.int64, np.uint8, torch.tensor, float])
def test_numbers_of_blocks_of_any_library(split, x, of):
    net = dense_net(64, 10, K=3, hidden=8)
    elastic = Elastic(net, x[:8])
    assert (
        elastic.check(of(2)) == elastic.check(2)
        and even(of(2), [3]) == even(2, [3])
        and len(deepen(net, of(2)).flow.blocks) == 6
    )
    if of is float: return   # there, a float is refused by its annotation
    assert [r["blocks"] for r in depth_curve(net, split, counts=[of(1), of(3)], ways=["skip"]).rows] == [1, 3]
    assert type(shorten(net, split, n_blocks=of(2), verbose=False).shortened["blocks"][1]) is int


def test_logits_that_are_no_numbers_are_never_right(split):
    class Broken(nn.Module):
        def __init__(self): super().__init__(); self.net = dense_net(64, 10, K=2, hidden=8)
        def forward(self, x): return self.net(x) * float("nan")
    curve = depth_curve(Broken(), split, ways=["skip"])
    assert [r["accuracy"] for r in curve.rows] == [0, 0]


@pytest.mark.parametrize("wrong", [lambda out: out.to_sparse(), lambda out: out.to("meta")])
def test_outputs_without_values_are_refused_in_words(split, wrong):
    class Odd(nn.Module):
        def __init__(self): super().__init__(); self.net = dense_net(64, 10, K=2, hidden=8)
        def forward(self, x): return wrong(self.net(x))
    for use in (depth_curve, evaluate, partial(fit, epochs=1)):
        with pytest.raises(ValueError, match="the model gave a .*tensor .*expected logits"): use(Odd(), split)


def test_clouds_in_half_precision_do_not_overflow():
    x = torch.randn(20, 3, generator=torch.Generator().manual_seed(0)) * 500
    torch.manual_seed(0); true = sliced_wasserstein(x, -x)
    torch.manual_seed(0); assert_close(sliced_wasserstein(x.half(), -x.half()), true, rtol=1e-2, atol=0)


def test_repeats_from_numpy(x):
    times = latency(dict(a=nn.Linear(64, 10)), x, repeats=np.int64(2))
    assert times["a"] > 0
    with pytest.raises(ValueError, match="repeats is .*0"): latency(dict(a=nn.Linear(64, 10)), x, repeats=np.int64(0))


def wild():
    "A network whose blocks move points far."
    net = dense_net(8, 4, K=6, hidden=8).train()
    with torch.no_grad():
        for i, p in enumerate(net.parameters()):
            p.copy_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)))
    return net


@pytest.mark.parametrize('first', [0, 1, 2], ids=['nothing before', 'a plain one before', 'itself before'])
@pytest.mark.parametrize('make', [lambda net: Penalty(net, .1), lambda net: LeastAction(net)], ids=['penalty', 'least action'])
def test_what_is_attached_to_a_compiled_network_is_seen(fresh_compiler, make, first):
    net, x = wild(), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    want = make(other := wild())(other(x).square().mean())
    if first == 1: torch.compile(wild(), backend='eager')(x)
    compiled = torch.compile(net, backend='eager')
    if first == 2: compiled(x)
    objective = make(net)
    assert_close(objective(compiled(x).square().mean()), want)
    if first: assert_close(torch.compile(plain := wild(), backend='eager')(x), plain(x))
    objective.remove()
    compiled(x)
    assert not any('forward' in vars(m) for m in net.modules())


@pytest.mark.parametrize('first', [0, 1, 2], ids=['nothing before', 'a plain one before', 'itself before'])
def test_depths_are_drawn_in_compiled_networks_too(fresh_compiler, first):
    x, depths = torch.randn(6, 8, generator=torch.Generator().manual_seed(0)), RandomDepth(other := wild(), seed=1)
    want = [other(x) for _ in range(8)]
    depths.remove()
    net = wild()
    if first == 1: torch.compile(wild(), backend='eager')(x)
    compiled = torch.compile(net, backend='eager')
    if first == 2: compiled(x)
    depths = RandomDepth(net, seed=1)
    for out in want[:4]: assert_close(compiled(x), out)
    Penalty(net, 1.).remove()   # of another who looks on
    for out in want[4:]: assert_close(compiled(x), out)
    depths.remove()
    assert_close(compiled(x), other(x))
    assert not any('forward' in vars(m) for m in net.modules())


def test_a_penalty_that_is_interrupted_or_forgotten_leaves_no_hook(monkeypatch):
    net = wild()
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    with monkeypatch.context() as patch:
        patch.setattr(list(net.flow.blocks)[3], 'register_forward_hook', interrupt)
        with pytest.raises(KeyboardInterrupt): Penalty(net, 1.)
    assert not hooks()
    penalty = Penalty(net, 1.)
    assert hooks()
    del penalty
    assert not hooks()


def test_random_depth_that_is_interrupted_leaves_no_hook(monkeypatch):
    net = wild()
    def interrupt(*args, **kwargs): raise KeyboardInterrupt
    for name in ('register_forward_pre_hook', 'register_forward_hook'):
        with monkeypatch.context() as patch:
            patch.setattr(list(net.flow.blocks)[3], name, interrupt)
            with pytest.raises(KeyboardInterrupt): RandomDepth(net)
        assert not any(m._forward_hooks or m._forward_pre_hooks or 'forward' in vars(m) for m in net.modules())


@pytest.mark.parametrize('again', [copy.deepcopy, lambda net: torch.load(io.BytesIO(saved(net)), weights_only=False)], ids=['deepcopy', 'pickle'])
def test_random_depth_goes_with_a_copy_of_the_network(again):
    net, x = wild(), torch.randn(6, 8, generator=torch.Generator().manual_seed(0))
    RandomDepth(net, seed=1)
    other = again(net)
    want = [net(x) for _ in range(6)]
    assert not torch.equal(want[0], net.eval()(x))
    for out in want: assert_close(other(x), out)
    [depths] = {h.func.__self__ for h in other._forward_pre_hooks.values()}
    depths.remove()
    assert_close(other(x), net(x))
    assert net._forward_pre_hooks and not any(m._forward_hooks or m._forward_pre_hooks for m in other.modules())


def saved(net):
    torch.save(net, file := io.BytesIO())
    return file.getvalue()


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16, torch.float64])
def test_an_early_exit_in_other_precisions(dtype):
    torch.manual_seed(0)
    net, x = dense_net(8, 3, K=6, hidden=8).eval(), torch.randn(40, 8)
    with pytest.raises(ValueError,
                       match=rf'x is a tensor \[40, 8\] of {str(dtype)[6:]}, expected torch.float32 .* call x.to'):
        Elastic(net).early_exit(x.to(dtype))
    other = copy.deepcopy(net).to(dtype)
    assert (Elastic(other).early_exit(x.to(dtype), slack=1e9).blocks == 6).all()
    found = Elastic(other).early_exit(x.to(dtype), slack=.5)
    assert found.logits.dtype == dtype and (found.blocks < 6).any()
    exact = Elastic(copy.deepcopy(other).double()).early_exit(x.to(dtype).double(), slack=.5)   # of the same weights
    assert (found.blocks == exact.blocks).float().mean() > .75


def test_rows_without_end_or_values_are_refused(split):
    net = dense_net(64, 10, K=2, hidden=4)
    for counts, message in (([], 'counts is empty'), (range(10 ** 9), 'counts has 1,000,000,000 values'),
                            (torch.zeros(1).expand(10 ** 9), 'counts has 1,000,000,000 values')):
        with pytest.raises(ValueError, match=message): depth_curve(net, split, counts=counts)
    with pytest.raises(ValueError, match=r'x is a tensor \[\] of float32'): Elastic(net).early_exit(torch.tensor(1.))

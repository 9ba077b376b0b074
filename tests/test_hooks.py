"What `blocks` means is one question with one answer, wherever it is asked; and a watcher of one's own on them."
import copy
import gc
import threading

import pytest
import torch
from conftest import hook_count
from torch import nn
from torch.utils.checkpoint import checkpoint

import lap_nb as lap
from lap_nb.attach import Tracer
from lap_nb.data import circles
from lap_nb.depth import measure_depth
from lap_nb.hooks import BlockHooks, chosen_blocks, find_blocks
from lap_nb.penalties import Penalty
from lap_nb.regularity import measure_regularity

X = torch.randn(64, 2, generator=torch.Generator().manual_seed(0))


class Theirs(nn.Module):
    "A block that nobody here wrote; `inplace`: it writes to its input."
    def __init__(self, inplace=False): super().__init__(); self.f, self.inplace = nn.Linear(2, 2), inplace
    def forward(self, x): return x.add_(.1 * self.f(x)) if self.inplace else x + .1 * self.f(x)


def foreign(inplace=False):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(2, 2), Theirs(inplace), Theirs(), Theirs(), nn.Linear(2, 2)).eval()


FORMS = {
    'a name': (lambda net: '2', ['2']),
    'names': (lambda net: ['3', '1'], ['1', '3']),
    'a pattern': (lambda net: '[12]', ['1', '2']),
    'patterns': (lambda net: ('1', '[23]'), ['1', '2', '3']),
    'a generator': (lambda net: (str(k) for k in (1, 2)), ['1', '2']),
    'a mapping': (lambda net: {'1': net[1], '3': net[3]}, ['1', '3']),
    'what was found': (lambda net: find_blocks(net, X), ['1', '2', '3']),
}


def watched(make):
    "Names of the blocks of an object that stays on the network."
    def names(net, blocks):
        watcher = make(net, blocks)
        found = getattr(watcher, 'blocks', None)
        watcher.remove()
        return list(watcher.names if found is None else found)
    return names


@pytest.fixture(scope='module')
def split(): return circles(200).split(40, 0, n_val=40)


DOORS = {
    'chosen_blocks': lambda net, blocks, split: list(chosen_blocks(net, blocks)),
    'chosen_blocks with an example': lambda net, blocks, split: list(chosen_blocks(net, blocks, X)),
    'find_blocks': lambda net, blocks, split: list(find_blocks(net, X, blocks)),
    'Tracer': lambda net, blocks, split: watched(Tracer)(net, blocks),
    'trace': lambda net, blocks, split: list(lap.trace(net, X, blocks).names),
    'trace_energies': lambda net, blocks, split: list(lap.trace_energies(net, X, blocks).names),
    'EnergyMeter': lambda net, blocks, split: watched(lap.EnergyMeter)(net, blocks),
    'LeastAction': lambda net, blocks, split: watched(lambda n, b: lap.LeastAction(n, blocks=b))(net, blocks),
    'LeastAction with an example': lambda net, blocks, split: watched(lambda n, b: lap.LeastAction(n, blocks=b, x=X))
    (net, blocks), 'Penalty': lambda net, blocks, split: watched(lambda n, b: Penalty(n, 1., blocks=b))(net, blocks),
    'RandomDepth': lambda net, blocks, split: watched(lambda n, b: lap.RandomDepth(n, blocks=b))(net, blocks),
    'Elastic': lambda net, blocks, split: lap.Elastic(net, X, blocks).names,
    'Elastic without an example': lambda net, blocks, split: lap.Elastic(net, blocks=blocks).names,
    'lipschitz_profile': lambda net, blocks, split: list(lap.lipschitz_profile(net, X, blocks).names)}
def _number(net, blocks):
    "How many blocks are meant, or one where that is nonsense."
    try: return len(chosen_blocks(net, blocks))
    except (TypeError, ValueError): return 1


COUNTING = {
    'depth_curve': lambda net, blocks, split: sum(lap.depth_curve(net, split, 'val', ['skip'], blocks=blocks).sizes),
    'measure_depth': lambda net, blocks, split: measure_depth(net, split, 'val', ['skip'], blocks=blocks)['blocks'],
    'shorten': lambda net, blocks, split: lap.shorten(
        net, split, n_blocks=_number(net, blocks), way='skip', blocks=blocks, verbose=False
    ).shortened['blocks'][0],
    'measure_regularity': lambda net, blocks, split: len(measure_regularity(net, X, blocks)['lipschitz block 1']),
}


@pytest.mark.parametrize('form', FORMS)
@pytest.mark.parametrize('door', DOORS)
def test_every_door_takes_every_form(door, form, split):
    net, (blocks, names) = foreign(), FORMS[form]
    assert DOORS[door](net, blocks(net), split) == names
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


@pytest.mark.filterwarnings('ignore:the path gap')
@pytest.mark.parametrize('form', ['a name', 'names', 'a pattern', 'a mapping', 'what was found'])
@pytest.mark.parametrize('door', COUNTING)
def test_doors_that_tell_a_number_take_every_form(door, form, split):
    net, (blocks, names) = foreign(), FORMS[form]
    assert COUNTING[door](net, blocks(net), split) == len(names)


@pytest.mark.filterwarnings('ignore:the path gap')
def test_names_that_can_be_read_once_are_enough_to_shorten(split):
    assert lap.shorten(foreign(), split, n_blocks=1, way='skip', blocks=iter(['1', '2']), verbose=False).shortened[
        'blocks'
    ] == [2, 1]


WRONG = {
    'a misspelt name': (lambda net: '11', ValueError, 'the nearest names are'),
    'a pattern of nothing': (lambda net: ['1', 'layer*'], ValueError, "'layer\\*' matches no module"),
    'none': (lambda net: [], ValueError, 'blocks is empty'),
    'an empty mapping': (lambda net: {}, ValueError, 'blocks is empty'),
    'a number': (lambda net: 3, TypeError, 'blocks is '),
    'modules': (lambda net: [net[1]], TypeError, 'expected'),
    'a module': (lambda net: net[1], TypeError, 'blocks is '),
    'numbers by name': (lambda net: {'1': 1}, TypeError, "block '1' is 1, expected|is a dict of 1, expected"),
    'of another network': (lambda net: {'1': Theirs()}, ValueError, "block '1' is not in this Sequential"),
}


@pytest.mark.parametrize('wrong', WRONG)
@pytest.mark.parametrize('door', [*DOORS, *COUNTING])
def test_every_door_says_alike_what_is_wrong(door, wrong, split):
    net, (blocks, kind, words) = foreign(), WRONG[wrong]
    with pytest.raises(kind, match=words): (DOORS | COUNTING)[door](net, blocks(net), split)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules()), 'a refused watcher leaves nothing'


def test_what_is_named_in_full_is_never_left_out_silently():
    net = foreign()
    with pytest.raises(ValueError, match="'1.f' is named among the blocks and cannot be one: inside 1"):
        chosen_blocks(net, ['1', '1.f'])
    wide = nn.Sequential(Theirs(), nn.Linear(2, 3)).eval()
    with pytest.raises(ValueError, match="'1' is named among the blocks and cannot be one: shape changes"):
        chosen_blocks(wide, ['0', '1'], X)
    assert list(chosen_blocks(wide, '?', X)) == ['0'], 'a pattern may match what is no block'


def test_named_blocks_that_write_to_their_input_are_noticed_with_an_example():
    net = foreign(inplace=True)
    assert find_blocks(net, X, '1').inplace == {'1'} == chosen_blocks(net, '1', X).inplace
    whole = lap.trace(net, X, ['1', '2'])
    assert whole.steps[0].abs().max() > 0
    elastic = lap.Elastic(net, X, ['1', '2'])
    assert [gate.copies for gate in elastic.gates] == [True, False]


def test_a_mapping_keeps_its_names_and_a_compiled_network_its_blocks():
    net = foreign()
    own = {'first': net[1], 'last': net[3]}
    assert chosen_blocks(net, own) is own and list(lap.trace(net, X, own).names) == ['first', 'last']
    assert list(chosen_blocks(torch.compile(net), '[12]')) == ['1', '2']
    assert list(chosen_blocks(lap.dense_net(2, 2, K=3))) == [f'flow.blocks.{k}' for k in range(3)]


# A watcher of one's own

class Log(BlockHooks):
    "What was called, in order, and the squared length of each step."
    def on_begin(self): self.calls, self.squares = getattr(self, 'calls', []) + ['begin'], []

    def on_step(self, name, before, after):
        self.calls.append(name)
        self.squares.append((after - before).square().sum())

    def on_end(self, output): self.calls.append(('end', tuple(output.shape)))


class Checkpointed(nn.Module):
    "Blocks that run in a gradient checkpoint."
    def __init__(self, again=True, reentrant=False):
        super().__init__()
        self.parts, self.again, self.reentrant = foreign(), again, reentrant

    def forward(self, x):
        for part in self.parts: x = checkpoint(part, x, use_reentrant=self.reentrant) if self.again else part(x)
        return x


def test_a_watcher_is_told_of_each_step_of_each_pass():
    net = foreign()
    with Log(net, '[123]') as log:
        net(X)
        steps = lap.trace_energies(net, X, '[123]').energies('sum').sum(1)
        torch.testing.assert_close(torch.stack(log.squares), steps)
        net[1](X)   # on the side
    net(X)
    assert log.calls == ['begin', '1', '2', '3', ('end', (64, 2))] and not hook_count(net)


def test_callbacks_that_are_not_written_do_nothing():
    net = foreign()
    want = net(X)
    with BlockHooks(net, x=X) as hooks: torch.testing.assert_close(net(X), want, rtol=0, atol=0)
    assert list(hooks.blocks) == ['1', '2', '3'] and not hook_count(net)


def test_paused_passes_and_those_of_a_copy_are_not_watched():
    net = foreign()
    log = Log(net, '1')
    with log.pause():
        net(X)
        with log.pause(): net(X)
        net(X)
    copy.deepcopy(net)(X)
    assert not hasattr(log, 'calls')
    with pytest.raises(ZeroDivisionError), log.pause(): 1 / 0
    net(X)
    assert log.calls == ['begin', '1', ('end', (64, 2))]
    with log.pause():
        other = threading.Thread(target=net, args=(X,))   # a pause is of one thread
        other.start(); other.join()
    assert len(log.calls) == 6


def test_a_watcher_that_nobody_holds_is_gone():
    net = foreign()
    log = Log(net, x=X)
    assert hook_count(net) == 8   # two on each of three blocks, two on the network
    del log
    gc.collect()
    assert not hook_count(net)
    log = Log(net, x=X)
    log.remove(); log.remove()
    net(X)
    assert not hasattr(log, 'calls') and not hook_count(net)


@pytest.mark.parametrize('reentrant', [False, True])
def test_a_checkpointed_block_is_told_of_once_and_its_step_may_enter_a_loss(reentrant):
    grads = []
    for again in (False, True):
        net = Checkpointed(again, reentrant)
        log, x = Log(net, 'parts.[123]'), X.clone().requires_grad_()
        out = net(x)
        # of the older kind of checkpoint a hook sees no graph
        loss = out.sum() if reentrant else out.sum() + sum(log.squares)
        loss.backward()
        assert log.calls == ['begin', 'parts.1', 'parts.2', 'parts.3', ('end', (64, 2))]
        grads.append([p.grad for p in net.parameters()] + [x.grad])
    for plain, checked in zip(*grads): torch.testing.assert_close(plain, checked)


def test_what_is_written_to_later_is_no_wrong_gradient():
    class Writes(nn.Module):
        def __init__(self): super().__init__(); self.block = Theirs()
        def forward(self, x): return self.block(x).relu_()
    class Product(BlockHooks):
        def on_step(self, name, before, after): self.product = (before * after * after).sum()
    net = Writes()
    log = Product(net, 'block')
    out = net(X)
    with pytest.raises(RuntimeError, match='written to later: clone'): (out.sum() + log.product).backward()


def test_blocks_that_write_to_their_input_need_an_example():
    net = foreign(inplace=True)
    with Log(net, ['1', '2']), pytest.raises(RuntimeError, match='writes to its input: pass blocks=find_blocks'): net(X)
    with Log(net, ['1', '2'], X) as log: net(X)
    torch.testing.assert_close(torch.stack(log.squares),
                               lap.trace_energies(foreign(), X, ['1', '2']).energies('sum').sum(1))


def test_compiled_networks_are_watched():
    net = foreign()
    log = Log(net, '[123]')
    fast = torch.compile(net, backend='eager')
    out = fast(X)
    assert log.calls == ['begin', '1', '2', '3', ('end', (64, 2))]
    (out.sum() + sum(log.squares)).backward()
    assert net[1].f.weight.grad.abs().sum() > 0
    log.remove()
    fast(X)
    assert len(log.calls) == 5


def test_a_pass_that_breaks_off_has_no_end():
    net = foreign()
    log = Log(net, '[123]')
    handle = net[2].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError): net(X)
    handle.remove()
    net(X)
    assert log.calls[:3] == ['begin', '1', '2'] and log.calls[3:] == ['begin', '1', '2', '3', ('end', (64, 2))]


def test_two_watchers_and_an_error_in_one():
    class Fails(BlockHooks):
        def on_step(self, name, before, after): raise KeyError(name)
    net = foreign()
    log, meter = Log(net, '1'), lap.EnergyMeter(net, '1')
    with Fails(net, '1'), pytest.raises(KeyError): net(X)
    net(X)
    assert log.calls == ['begin', '1', 'begin', '1', ('end', (64, 2))]
    meter.remove()

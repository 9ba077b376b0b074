"Hooks on a network: compiled or not, interrupted anywhere, called from several threads."
import copy
import os
import random
import sys
import threading
from functools import partial
from types import MethodType

import pytest
import torch
import torch.nn.functional as F
from conftest import hook_count
from torch import nn
from torch.testing import assert_close
from torch.utils.checkpoint import checkpoint

from lap_nb.attach import Tracer, trace, trace_energies
from lap_nb.hooks import find_blocks
from lap_nb.dynamics import ResidualBlock
from lap_nb.kinetic import EnergyMeter
from lap_nb.least_action import FixedWeight, LeastAction
from lap_nb.nets import conv_net, dense_net

pytestmark = pytest.mark.usefixtures('seed')
INTERRUPTS = int(os.environ.get('LAP_NB_INTERRUPTS', 150))
WHOLE = hasattr(torch.compiler, 'set_stance')   # PyTorch 2.6
X, Y = torch.linspace(-1, 1, 24).view(8, 3), torch.arange(8) % 2


def net(K=3): return dense_net(3, 2, K=K, hidden=8)
def energies(net, x=X): return net.trajectory(x).steps.square().mean((1, 2))
def own(model): return [m for m in model.modules() if 'forward' in m.__dict__]


# Compiled: plain and measured networks of one architecture, in one process

WAYS = {'function': lambda net, **how: torch.compile(net, **how),
        'method': lambda net, **how: (net.compile(**how), net)[1],
        'blocks': lambda net, **how: ([b.compile(**how) for b in net.flow.blocks], net)[1],
        'step': lambda net, **how: torch.compile(lambda x: net(x), **how)}


class Plain:
    def __init__(self, way, **how): self.net = net(); self.run = WAYS[way](self.net, **how)
    def step(self):
        out = self.run(X)
        assert_close(out, self.net.head(self.net.trajectory(X).x[-1]))
        F.cross_entropy(out, Y).backward()


class Least(Plain):
    "Trained with least action: the objective and its gradient are those of the network as it is written."
    def __init__(self, way, **how):
        super().__init__(way, **how)
        self.la = LeastAction(self.net, FixedWeight(.5))

    def step(self):
        self.net.zero_grad()
        twin = copy.deepcopy(self.net)
        loss = self.la(F.cross_entropy(self.run(X), Y))
        loss.backward()
        own = F.cross_entropy(twin.head(twin.trajectory(X).x[-1]), Y) + energies(twin).sum() / 2
        own.backward()
        assert_close(loss, own)
        assert_close([p.grad for p in self.net.parameters()], [p.grad for p in twin.parameters()])


@pytest.mark.parametrize('order, way, backend', [
    *((order, way, 'eager') for way in ('function', 'method') for order in ('PL', 'LP', 'PLPL', 'PPLL', 'LL')),
    *(('PLPL', way, 'eager') for way in ('blocks', 'step')), ('LP', 'function', 'aot_eager'), ('PLL', 'method', 'aot_eager')])
def test_plain_and_measured_networks_compile_in_any_order(fresh_compiler, order, way, backend):
    made = [{'P': Plain, 'L': Least}[kind](way, backend=backend, fullgraph=way != 'step', dynamic=order == 'LP')
            for kind in order]
    for _ in range(2):
        for each in made: each.step()


def test_plain_and_measured_networks_with_inductor(fresh_compiler):
    plain, least = Plain('function', backend='inductor'), Least('function', backend='inductor')
    for each in (plain, least, plain): each.step()


@pytest.mark.skipif(not WHOLE, reason='compiled networks need PyTorch 2.6 or later')
@pytest.mark.parametrize('way', ['function', 'method'])
def test_looks_and_changes_between_compiled_steps(fresh_compiler, way):
    plain, least = Plain(way, backend='eager'), Least(way, backend='eager')
    looks = {
        'eval': lambda n: n.eval()(X), 'no_grad': lambda n: n(X), 'find': lambda n: find_blocks(n, X),
        'trace': lambda n: trace(n, X), 'energies': lambda n: trace_energies(n, X), 'copy': copy.deepcopy,
        'other batch': lambda n: n(X[:3])}
    for each in (plain, least): each.step()
    for name, look in looks.items():
        with torch.no_grad():
            for each in (plain, least): look(each.net); each.net.train()
        for each in (least, plain): each.step()
    least.la.remove()
    assert hook_count(least.net) == 0 and not own(least.net)
    least.run(X)
    assert least.la.meter.seen == []
    again = LeastAction(least.net, FixedWeight(.5))
    least.la = again
    for each in (least, plain, least): each.step()


def test_nothing_is_compiled_anew_in_each_step(fresh_compiler):
    made = []
    def backend(graph, inputs): made.append(graph); return graph.forward
    plain, least = Plain('function', backend=backend), Least('function', backend=backend)
    for each in (plain, least, plain, least): each.step()
    count = len(made)
    for each in (least, plain) * 3: each.step()
    more = [Least('function', backend=backend, fullgraph=True) for _ in range(10)]
    for each in more: each.step()   # networks of one architecture share what is compiled
    assert len(made) == count <= 4


def test_a_forward_that_is_not_the_class_s(fresh_compiler):
    "As accelerate sets it: it stays, and measured networks are told apart all the same."
    def patched(net):
        for b in net.flow.blocks: b.forward = MethodType(lambda self, x: type(self).forward(self, x), b)
    plain, least = Plain('function', backend='eager'), Least('function', backend='eager')
    least.la.remove()
    for each in (plain, least): patched(each.net)
    before = [b.forward for b in least.net.flow.blocks]
    plain.step(); least.run(X)
    with LeastAction(least.net, FixedWeight(.5)) as least.la:
        for each in (least, plain, least): each.step()
        with Tracer(least.net) as tracer: least.run(X); assert len(tracer.take().steps) == 3
        least.la.meter.forget()
        least.step()
    assert [b.forward for b in least.net.flow.blocks] == before and own(least.net) == list(least.net.flow.blocks)


def test_marks_of_two_watchers_go_with_the_last():
    n = net()
    first, second = EnergyMeter(n), Tracer(n)
    marked = own(n)
    first.remove()
    assert own(n) == marked == [n, *n.flow.blocks]
    second.remove()
    assert not own(n) and hook_count(n) == 0


def test_copies_of_a_measured_network_are_free():
    n = net()
    with EnergyMeter(n) as meter:
        twin = copy.deepcopy(n)
        n(X)
        with torch.no_grad():
            for p in twin.parameters(): p.mul_(2)
        assert_close(twin(X), twin.head(twin.trajectory(X).x[-1]))   # its own forward, not that of the first
        assert_close(meter.take(), energies(n))
        shallow = copy.copy(n.flow.blocks[0])   # as nn.DataParallel makes
        with pytest.raises(RuntimeError, match="a copy of block 'flow.blocks.0' was called that shares its hooks"):
            shallow(torch.randn(4, 3))
    assert not own(n)


# Threads

def in_threads(*works):
    "Run each in a thread of its own; what they return or raise, in order."
    found = [None] * len(works)
    def call(i, work):
        try: found[i] = work()
        except Exception as error: found[i] = error
    threads = [threading.Thread(target=call, args=(i, work)) for i, work in enumerate(works)]
    for t in threads: t.start()
    for t in threads: t.join(60)
    return found


class Meeting(nn.Module):
    "A layer in which threads wait for each other, so that their passes go side by side."
    def __init__(self, barrier): super().__init__(); self.barrier = barrier
    def __deepcopy__(self, memo): return nn.Identity()
    def forward(self, x): self.barrier.wait(30); return x


def meeting(threads, K=3):
    barrier, layers = threading.Barrier(threads), []
    for _ in range(K): layers += [ResidualBlock(nn.Linear(3, 3)), Meeting(barrier)]
    return nn.Sequential(*layers)


@pytest.mark.parametrize('rounds', [25])
def test_each_thread_takes_the_energies_of_its_own_passes(rounds):
    n, data = meeting(3), [torch.randn(5, 3) * (i + 1) for i in range(3)]
    alone = copy.deepcopy(n)
    want = [trace_energies(alone, x).energies().mean(1) for x in data]
    la = LeastAction(n, FixedWeight(.5))
    tracer = Tracer(n, energies_only=True)
    def work(i):
        found = []
        for _ in range(rounds):
            loss = n(data[i]).sum() * 0
            noted = tracer.take().energies().mean(1)
            found.append((la(loss).item() * 2, noted))
        return found
    for i, found in enumerate(in_threads(*(partial(work, i) for i in range(3)))):
        assert not isinstance(found, Exception), found
        assert len(found) == rounds
        for objective, noted in found:
            assert objective == pytest.approx(want[i].sum().item(), rel=1e-5)
            assert_close(noted, want[i])


def residual(n): return {k: m for k, m in n.named_children() if isinstance(m, ResidualBlock)}


@pytest.mark.parametrize('call', [trace, trace_energies])
def test_looks_in_two_threads_at_once(call):
    n, data = meeting(2), [torch.randn(5, 3), torch.randn(4, 3)]
    alone = copy.deepcopy(n)
    want = [trace_energies(alone, x).energies() for x in data]
    for energies, found in zip(want, in_threads(*(partial(call, n, x, residual(n)) for x in data))):
        assert_close(
            found.energies() if call is trace_energies else torch.cat([s.steps.square().mean(2) for s in found.stages]),
            energies)
    assert hook_count(n) == 0


def test_a_look_in_one_thread_leaves_the_training_in_another_alone():
    n, x = meeting(2), torch.randn(5, 3)
    alone = copy.deepcopy(n)
    want = trace_energies(alone, x).energies().mean(1)
    want.sum().backward()
    meter = EnergyMeter(n)
    def train():
        n(x)
        got = meter.take()
        got.sum().backward()
        return got.detach()
    got, looked = in_threads(train, lambda: trace_energies(n, 9 * x[:2], residual(n)))
    assert not isinstance(looked, Exception), looked
    assert_close(got, want.detach())
    assert_close([p.grad for p in n.parameters()], [p.grad for p in alone.parameters()])
    assert meter.seen == [] and hook_count(n) > 0


def test_a_pass_made_in_one_thread_and_taken_in_another_says_so():
    n = net()
    with EnergyMeter(n) as meter, Tracer(n) as tracer:
        in_threads(lambda: n(X))
        with pytest.raises(RuntimeError, match='found energies of 0 blocks'): meter.take()
        with pytest.raises(RuntimeError, match='in the same thread'): tracer.take()
        n(X)
        assert_close(meter.take(), energies(n))


def test_threads_and_checkpoints():
    n = meeting(2)
    class Checkpointed(nn.Module):
        def __init__(self): super().__init__(); self.inner = n
        def forward(self, x):
            for layer in self.inner:
                x = checkpoint(layer, x, use_reentrant=False) if isinstance(layer, ResidualBlock) else layer(x)
            return x
    model, data = Checkpointed(), [torch.randn(5, 3), torch.randn(6, 3)]
    alone = copy.deepcopy(n)
    want = []
    for x in data:
        alone.zero_grad()
        trace_energies(alone, x).energies().mean(1).sum().backward()
        want.append([p.grad.clone() for p in alone.parameters()])
    with EnergyMeter(model, {f'inner.{k}': m for k, m in residual(n).items()}) as meter:
        def work(x):
            model(x)
            return torch.autograd.grad(meter.take().sum(), list(n.parameters()))
        for got, grads in zip(in_threads(*(partial(work, x) for x in data)), want): assert_close(list(got), grads)


def test_a_second_thread_of_a_compiled_network_is_refused(fresh_compiler):
    n = net()
    compiled = torch.compile(n, backend='eager')
    with EnergyMeter(n) as meter:
        compiled(X)
        meter.take()
        found, = in_threads(lambda: (compiled(X), meter.take()))
        assert isinstance(found, RuntimeError) and 'expected one thread' in str(found)


# Interrupts

class Interrupt:
    "Traces all bytecodes that run, and raises `KeyboardInterrupt` before the one of number `at`."
    def __init__(self, at=None): self.at, self.count = at, 0

    def __call__(self, frame, event, arg):
        frame.f_trace_opcodes, frame.f_trace_lines = True, False
        if event == 'opcode':
            self.count += 1
            if self.count == self.at: raise KeyboardInterrupt
        return self


def interrupted(call, at=None):
    "Call, interrupted before bytecode `at`: how many there were, and whether it was."
    tracer, old, hook = Interrupt(at), sys.gettrace(), sys.unraisablehook
    sys.unraisablehook = lambda _: None   # in a finalizer an interrupt is lost by Python itself
    try:
        sys.settrace(tracer)
        call()
        return tracer.count, False
    except KeyboardInterrupt: return tracer.count, True
    finally:
        sys.settrace(old)
        sys.unraisablehook = hook


class Gated(nn.Module):
    "Blocks with a learned gate, an own generator and a buffer that moves in every mode."
    def __init__(self):
        super().__init__()
        self.fields, self.gates = nn.ModuleList(nn.Linear(3, 3) for _ in range(2)), nn.Parameter(torch.ones(2))
        self.register_buffer('calls', torch.zeros(()))
        self.blocks = nn.ModuleList(ResidualBlock(f) for f in self.fields)
    def forward(self, x):
        self.calls += 1
        for gate, block in zip(self.gates, self.blocks): x = x + gate * (block(x) - x) + 0 * torch.rand(1)
        return x


NETS = {
    'plain': (lambda: dense_net(3, 2, K=2, hidden=4), lambda: torch.randn(4, 3)),
    'norms and dropout': (lambda: nn.Sequential(conv_net(
        (1, 6, 6), 2, K=1, width=4), nn.Dropout(.5)), lambda: torch.randn(4, 1, 6, 6)),
    'gates': (Gated, lambda: torch.randn(4, 3))}


def passing(kind):
    def call(model, x):
        with kind(model): model(x)
    return call


def named(call):
    return lambda model, x: call(model, x, {n: m for n, m in model.named_modules() if isinstance(m, ResidualBlock)})
CALLS = {
    'find_blocks': find_blocks, 'trace': named(trace), 'trace_energies': named(trace_energies),
    'Tracer': lambda model, x: Tracer(model), 'EnergyMeter': lambda model, x: EnergyMeter(model),
    'LeastAction': lambda model, x: LeastAction(model, x=x)}


def everything(model):
    "All that a look may not change, as text."
    weight = torch.ones((), requires_grad=True)
    weight.exp().backward()   # fails where hooks for saved tensors are left
    hooks = [[list(t) for n, t in vars(m).items() if 'hooks' in n and t is not None and not isinstance(t, bool)]
             for m in model.modules()]
    return {
        'hooks': hooks,
        'attributes': [sorted(vars(m)) for m in model.modules()],
        'modes': [m.training for m in model.modules()],
        'backward': weight.grad.item(),
        'grad mode': torch.is_grad_enabled(),
        'inference mode': torch.is_inference_mode_enabled(),
        'random state': torch.get_rng_state().tolist(),
        'state': {k: v.tolist() for k, v in model.state_dict().items()},
        'requires_grad': [(p.requires_grad, p.grad is None) for p in model.parameters()],
        'deterministic': torch.are_deterministic_algorithms_enabled(),
        'autocast': torch.is_autocast_enabled('cpu'),
    }


@pytest.mark.parametrize('call', CALLS)
@pytest.mark.parametrize('name', NETS)
def test_an_interrupt_at_any_bytecode_leaves_nothing_behind(name, call):
    make, data = NETS[name]
    x, look, draw = data(), CALLS[call], random.Random(f'{name} {call}')
    model = make()
    look(model, x)
    total, _ = interrupted(lambda: look(model, x))
    count = INTERRUPTS // len(NETS) if call == 'find_blocks' else INTERRUPTS // 10
    hits = 0
    for at in sorted(draw.sample(range(1, total + 1), min(count, total))):
        # a traced pass is one in the mode the network is in
        model = make().train(call not in ('trace', 'trace_energies'))
        calls = getattr(model, 'calls', None)
        before = everything(model)
        _, hit = interrupted(lambda: look(model, x), at)
        after = everything(model)
        hits += hit
        if calls is not None and call.startswith('trace'):
            after['state'].pop('calls'), before['state'].pop('calls'), after.pop('random state'), before.pop(
                'random state')
        assert after == before, (at, [k for k in before if after[k] != before[k]])
    assert hits > count / 3   # the others fell into a finalizer


@pytest.mark.parametrize('kind', [Tracer, EnergyMeter])
def test_an_interrupt_at_the_end_of_a_with_block(kind):
    "Once it has begun: before its first bytecode nothing of ours runs."
    model = net(1)
    def closing(at=None):
        watcher = kind(model)
        watcher.__enter__()
        return interrupted(lambda: watcher.__exit__(None, None, None), at), watcher
    (total, _), _ = closing()
    for at in range(8, total + 1, 7):
        (_, hit), watcher = closing(at)
        assert hit and hook_count(model) == 0 and not own(model), at


# Bad input

@pytest.mark.parametrize('call, error, words', [
    (lambda: find_blocks(X, net()), TypeError, 'model is a tensor .*, expected Module'),
    (lambda: trace(net(), net()), TypeError, 'the network comes first, then its input'),
    (lambda: trace(net(), X[:, :0]), ValueError, 'the samples have no features'),
    (lambda: trace_energies(net(), X.to('meta')), ValueError, 'meta device'),
    (lambda: find_blocks(net(), X[:, :2]), RuntimeError, r'ResidualNet cannot be called on a tensor \[8, 2\]'),
    (lambda: trace(net(), X, [1]), TypeError, 'blocks is a list of 1, expected'),
    (lambda: find_blocks(net(), X, blocks=3), TypeError, 'blocks is 3, expected')])
def test_bad_input_is_refused_in_words(call, error, words):
    with pytest.raises(error, match=words): call()


def test_a_network_of_nan_has_blocks_without_a_size():
    n = net()
    with torch.no_grad(): n.flow.blocks[1].velocity[2].bias.fill_(float('nan'))
    blocks = find_blocks(n, X)
    assert len(blocks) == 3 and blocks.moved['flow.blocks.1'] is None and 'its output is not finite' in blocks.why[
        'flow.blocks.1']


class Partly(nn.Module):
    "Three blocks: the second without gradients, the third in a checkpoint of the older kind."
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(ResidualBlock(nn.Linear(3, 3)) for _ in range(3))
    def forward(self, x):
        x = self.blocks[0](x.requires_grad_())
        with torch.no_grad(): y = self.blocks[1](x)
        return checkpoint(self.blocks[2], x + (y - x), use_reentrant=True)


def test_blocks_that_count_without_gradient_are_known_for_each_thread():
    n, partly = net(), Partly()
    with EnergyMeter(n) as meter, EnergyMeter(partly) as other:
        n.flow.blocks[1].eval()
        n(X)
        assert meter.idle == {'flow.blocks.1': 'in evaluation mode'}
        assert_close(meter.take(), energies(n))
        assert meter.idle and in_threads(lambda: meter.idle) == [{}]
        n.train()(X)
        assert meter.idle == {}
        partly(X.clone())
        assert other.idle == {'blocks.1': 'without gradients', 'blocks.2': 'in a gradient checkpoint'}
        with pytest.raises(RuntimeError, match="2 blocks, expected 3, .*'blocks.2' is in a gradient checkpoint"):
            other.take()


@pytest.mark.parametrize('given_up', ['used', 'dropped', 'forgotten'])
def test_each_thread_is_asked_for_its_own_earlier_passes(given_up):
    "A pass that one thread gave up, or uses as well, is no matter of the others."
    n, data = meeting(2), [torch.randn(5, 3), torch.randn(4, 3)]
    alone = copy.deepcopy(n)
    want = [trace_energies(alone, x).energies().mean(1) for x in data]
    with EnergyMeter(n, residual(n)) as meter:
        def work(i):
            first = n(9 * data[i])
            if i and given_up == 'forgotten': meter.forget()
            loss = n(data[i]).sum() + (first.sum() if i and given_up == 'used' else 0)
            return meter.take(loss).detach()
        found = in_threads(*(partial(work, i) for i in range(2)))
    assert_close(found[0], want[0].detach())
    if given_up == 'used': assert isinstance(found[1], RuntimeError) and 'in more than one pass' in str(found[1])
    else: assert_close(found[1], want[1].detach())


@pytest.mark.parametrize('how', ['in evaluation mode', 'without gradients'])
def test_a_frozen_part_in_a_checkpoint_is_run_again_in_any_thread(how):
    n = meeting(1, 3)
    n[2].requires_grad_(False)   # behind one that trains: its energy has a graph
    class Checkpointed(nn.Module):
        def __init__(self): super().__init__(); self.inner = n
        def part(self, x):
            x = n[0](x)
            with torch.set_grad_enabled(how != 'without gradients'): x = n[2](x)
            return n[4](x)
        def forward(self, x): return checkpoint(self.part, x, use_reentrant=False)
    model, alone = Checkpointed(), copy.deepcopy(n)
    if how == 'in evaluation mode': n[2].eval()
    trace_energies(alone, X).energies().mean(1).sum().backward()
    with EnergyMeter(model, {f'inner.{k}': m for k, m in residual(n).items()}) as meter:
        for backward in (lambda loss: loss.backward(), lambda loss: in_threads(loss.backward)):
            n.zero_grad()
            model(X)
            backward(meter.take().sum())
            assert_close(n[4].velocity.weight.grad, alone[4].velocity.weight.grad)

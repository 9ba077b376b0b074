"""Every public name, called with values that nobody should pass: it works, or refuses in words of ours.

A call starts from arguments that can be meant; one to three of them are replaced by something else. Then there is a
result without a NaN that was not put in, or an exception that a `raise` of lap_nb raised. Nothing takes ten seconds of
the processor, or a gigabyte. LAP_NB_FUZZ sets the number of calls over all names; `python tests/test_fuzz_api.py
100000` runs them and prints what it found."""
import ast
import contextlib
import dataclasses
import importlib
import inspect
import io
import math
import os
import random
import resource
import signal
import sys
import tempfile
import traceback
import warnings
from copy import deepcopy
from decimal import Decimal
from fractions import Fraction
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent))   # as a script
import lap_nb
from lap_nb.data import Dataset
from lap_nb.depth import Elastic
from lap_nb.dynamics import Trajectory
from lap_nb.kinetic import EnergyMeter
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.nets import dense_net
from test_package import modules, public

HOME = Path(lap_nb.__file__).parent
SECONDS, MEMORY = 10, 1 << 30
COUNT = int(os.environ.get('LAP_NB_FUZZ', 1500))
# Started from a shell or a browser, or drivers of whole studies: their own tests give them bad values.
ELSEWHERE = {'lap_compare', 'lap_bench', 'lap_study', 'playground', 'scrub', 'compare', 'run_benchmarks'}
# What functions give back; nobody makes one by hand.
RESULTS = {
    'EnergyTrace', 'Correlation', 'Gap', 'ActionSplit', 'Violations', 'McCannFit', 'Bound', 'LocalLipschitz',
    'LipschitzProfile', 'Holder', 'KKTReport', 'Run', 'Runs', 'Interval', 'DepthCurve', 'Records', 'Comparison',
    'Blocks'}
# Results in which NaN is documented: "nothing to tell".
NAN_MEANS = {'LeastAction', 'kkt', 'report', 'load_records'}


class Slow(BaseException): "A call that took too long."


def tensors(rng):
    "Tensors of every kind that is wrong somewhere."
    x = torch.randn(8, 4)
    kinds = [
        x.double(),
        x.half(),
        x.bfloat16(),
        x.int(),
        x.bool(),
        x.to(torch.complex64),
        x.to('meta'),
        x.to_sparse(), x * math.nan, x * math.inf, x * 1e30, x * 1e-30,
        x.abs(), -x.abs(), x[:0], x[:, :0], x[0, 0], x[0], x[None],
        x.expand(3, 8, 4),
        torch.zeros(8, 4), x[:1],
        torch.full((8,), -1),
        torch.arange(8),
        torch.arange(8).float(),
        torch.tensor(2 ** 40),
        torch.tensor([1e300], dtype=torch.float64),
        torch.zeros(1).expand(10 ** 9),
        nn.Parameter(x),
        torch.tensor(math.nan),
        torch.tensor(-1.)]
    return rng.choice(kinds)


def others(rng):
    "Values of every other kind."
    simple = [
        None, True, False, 0, 1, -1, 2, 3, 7, 10 ** 9, 10 ** 30, -10 ** 30, .5, -.5, 0., 1., 1e-300, 1e300, math.nan,
        math.inf, -math.inf, 1j, '', 'x', 'mean', 'sum', 'test', 'auto', 'cpu', 'cuda:7', '\0', 'é' * 300, b'x', (), [],
        {},
        set(), [1], [None], ['x'], [[]], {'a': 1}, {1: 2}, (1, 2, 3), [1., math.nan],
        range(3),
        range(10 ** 9),
        object(),
        Fraction(1, 3),
        Decimal('1.5'),
        np.float32(.5),
        np.int64(2),
        np.bool_(True),
        np.array(1.),
        np.zeros((2, 2)),
        np.array(['x']),
        Path('nowhere'),
        ValueError('x'), print,
        slice(1),
        nn.Linear(4, 4),
        nn.ReLU(),
        nn.Sequential(), torch.float32,
        torch.device('cpu'), lambda *a, **k: None,
        iter([1]), (i for i in ())]
    return rng.choice(simple)


@cache
def _net():
    torch.manual_seed(0)
    return dense_net(4, 2, K=2, hidden=4)


def net(): return deepcopy(_net())


def split():
    g = torch.Generator().manual_seed(0)
    y = torch.arange(60) % 2
    return Dataset(torch.randn(60, 4, generator=g) + y[:, None], y, torch.arange(40, 60), 'sample',
                   2).split(20, n_val=10)


def trajectory():
    return Trajectory(torch.randn(3, 8, 4))


def least_action():
    return LeastAction(net())


# What a parameter of this name can be given; of a function, where a name means something else there.
NAMED = {
    'x': lambda: torch.randn(8, 4), 'y': lambda: torch.arange(8) % 2, 'start': lambda: torch.randn(8, 4),
    'end': lambda: torch.randn(8, 4), 'model': net, 'flow': lambda: net().flow, 'velocity': lambda: nn.Linear(4, 4),
    'velocities': lambda: [nn.Linear(4, 4)] * 2, 'head': lambda: nn.Linear(4, 2), 'data': split, 'split': split,
    'traj': trajectory, 'least_action': lambda: None, 'f': lambda: torch.sin, 'make_model': lambda: net,
    'models': lambda: {'a': net()}, 'loss': lambda: torch.tensor(1.),
    'task': lambda: torch.tensor(1., requires_grad=True), 'lam': lambda: torch.tensor(1.), 'dim': lambda: 4,
    'classes': lambda: 2, 'K': lambda: 2, 'hidden': lambda: 4, 'width': lambda: 2, 'shape': lambda: (1, 4, 4),
    'n': lambda: 8, 'sizes': lambda: [1, 1], 'seed': lambda: 0, 'seeds': lambda: [0, 1], 'epochs': lambda: 1,
    'batch_size': lambda: 10, 'resamples': lambda: 20, 'directions': lambda: 5, 'repeats': lambda: 2,
    'steps': lambda: 2, 'cycles': lambda: 50, 'iterations': lambda: 5, 'gain': lambda: .5, 'drop': lambda: .1,
    'h': lambda: 1., 'weight': lambda: .1, 'name': lambda: 'sample', 'a': lambda: torch.rand(8),
    'b': lambda: torch.rand(8), 'values': lambda: torch.randn(8), 'limit': lambda: 1.,
    'generators': lambda: [torch.Generator().manual_seed(0)], 'device': lambda: 'cpu', 'kept': lambda: [0],
    'at': lambda: [0, 1], 'curves': lambda: {k: torch.rand(20) for k in ('loss', 'lambda', 'action')},
    'energies': lambda: torch.rand(8, 2), 'chunk': lambda: 100, 'factor': lambda: .5, 'noise': lambda: .1,
    'ax': lambda: None, 'progress': lambda: False, 'verbose': lambda: False, }
SPECIAL = {
    ('Trajectory', 'x'): lambda: torch.randn(3, 8, 4), ('Split', 'train'): lambda: torch.arange(4),
    ('Split', 'val'): lambda: torch.arange(4, 6), ('Split', 'test'): lambda: torch.arange(6, 8),
    ('Dataset', 'test'): lambda: torch.arange(6, 8), ('circles', 'n'): lambda: 40, ('moons', 'n'): lambda: 40,
    ('gap_curve', 'sizes'): lambda: [4, 8], ('Elastic', 'x'): lambda: None, ('fit_many', 'least_action'): lambda: None,
    ('shorten', 'n_blocks'): lambda: 1, ('stationarity', 'task'): lambda: lambda: torch.tensor(1.), }
METHODS = {
    'Trajectory': trajectory,
    'Dataset': lambda: Dataset(torch.randn(20, 4), torch.arange(20) % 2, torch.arange(10, 20), 'd', 2),
    'Split': split,
    'LeastAction': least_action,
    'EnergyMeter': lambda: EnergyMeter(net()),
    'Flow': lambda: net().flow,
    'Elastic': lambda: Elastic(net()),
    'DualAscent': DualAscent,
}


# Called by hooks, with what hooks give.
BY_HOOKS = {'also', 'every_step', 'on_end', 'read_tokens'}


def subjects():
    """Every public callable by full name, and the public methods of what is made here: name, what is called, how its
    subject is made."""
    for module in modules():
        for name, thing in public(importlib.import_module(f'lap_nb.{module}')).items():
            if not callable(thing) or name in ELSEWHERE | RESULTS: continue
            if not (inspect.isclass(thing) and issubclass(thing, BaseException)): yield f'{module}.{name}', thing, None
            for method, member in vars(thing).items() if name in METHODS and inspect.isclass(thing) else ():
                if not method.startswith('_') and method not in BY_HOOKS and inspect.isfunction(member):
                    yield f'{module}.{name}.{method}', member, METHODS[name]


def meant(name, p):
    "A value that the parameter `p` can be given; its default where nothing is known."
    short = name.rpartition('.')[2]
    make = SPECIAL.get((short, p.name)) or (
        None
        if p.default not in (None, p.empty)
        and p.name not in ('epochs', 'resamples', 'repeats', 'n', 'iterations', 'cycles', 'directions')
        else NAMED.get(p.name)
    )
    if make: return make()
    return None if p.default is p.empty else p.default


def arguments(name, thing, rng):
    "Arguments by name, one to three of them not as they should be, and which."
    parameters = [
        p for p in inspect.signature(thing).parameters.values()
        if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY) and p.name != 'self']
    given = {p.name: meant(name, p) for p in parameters}
    wrong = rng.sample([p.name for p in parameters], min(len(parameters), rng.choice((1, 1, 1, 2, 3))))
    for key in wrong: given[key] = tensors(rng) if rng.random() < .4 else others(rng)
    return given, wrong


def unreal(value, depth=0):
    "Is there a NaN in it?"
    if isinstance(value, torch.Tensor):
        return value.is_floating_point(
        ) and not value.is_meta and value.layout == torch.strided and value.untyped_storage().nbytes(
        ) >= value.nbytes and bool(value.isnan().any())
    if isinstance(value, float): return math.isnan(value)
    if isinstance(value, np.ndarray): return value.dtype.kind == 'f' and bool(np.isnan(value).any())
    if depth > 4: return False
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        value = [getattr(value, f.name, None) for f in dataclasses.fields(value)]
    if isinstance(value, dict): value = list(value.values())
    return isinstance(value, (list, tuple)) and any(unreal(v, depth + 1) for v in value[:100])


def extreme(value):
    "NaN, infinite, or so large or small that squares are."
    if isinstance(value, (list, tuple)): return any(extreme(v) for v in value)
    if isinstance(value, np.ndarray | torch.Tensor) and str(value.dtype).startswith(('torch.', 'float')):
        t = torch.as_tensor(value)
        if t.is_meta or t.layout != torch.strided or not t.is_floating_point() or not t.numel() or 0 in t.stride(
        ) and t.numel() > 10 ** 6:
            return False
        return not bool(t.isfinite().all()) or bool((t.abs() > 1e15).any())
    return isinstance(value, (int, float, Decimal)) and (value != value or abs(value) > 1e15)


@cache
def raises(path):
    "The lines of a file on which a `raise` stands."
    tree = ast.parse(Path(path).read_text(encoding='utf-8'))
    return {
        line for node in ast.walk(tree) if isinstance(node, ast.Raise)
        for line in range(node.lineno, node.end_lineno + 1)}


def ours(error):
    "Was it raised by a `raise` of lap_nb, or by what the caller handed in?"
    if isinstance(error, Slow | RecursionError): return False
    frames = traceback.extract_tb(error.__traceback__)
    last = frames[-1]
    if last.filename == __file__: return len(frames) > 1 or isinstance(error, StopIteration)
    here = [i for i, f in enumerate(frames) if Path(f.filename).parent == HOME]
    # a network that does not take its input
    if here and (frames[here[-1]].name == 'forward' or any(f.name == '_call_impl' for f in frames[here[-1] + 1:])):
        return True
    return Path(last.filename).parent in (HOME, *HOME.iterdir()) and last.lineno in raises(last.filename)


def peak(reset=False):
    "Largest memory of this process since it was reset, bytes."
    with contextlib.suppress(OSError):
        if reset: Path('/proc/self/clear_refs').write_text('5')
        return next(
            int(line.split()[1]) << 10 for line in Path('/proc/self/status').read_text().splitlines()
            if line.startswith('VmHWM'))
    return 0


@contextlib.contextmanager
def bounded():
    """No more memory than this process has now, and twice what a call may take: what asks for it is told, and does not
    take the machine down."""
    before = resource.getrlimit(resource.RLIMIT_DATA)
    now = next(
        int(line.split()[1]) << 10 for line in Path('/proc/self/status').read_text().splitlines()
        if line.startswith('VmData'))
    resource.setrlimit(resource.RLIMIT_DATA, (now + 2 * MEMORY, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_DATA, before)


def call(name, thing, make, rng):
    "One call: None, or what was wrong with it."
    torch.manual_seed(0)
    given, wrong = arguments(name, thing, rng)
    shown = ', '.join(f'{k}={describe(given[k])}' for k in wrong)
    first = () if make is None else (make(),)
    before = peak(reset=True)
    signal.setitimer(signal.ITIMER_VIRTUAL, SECONDS)
    try:
        with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(
                io.StringIO()):
            warnings.simplefilter('ignore')
            found = thing(*first, **given)
            if inspect.isgenerator(found): found = [item for item, _ in zip(found, range(3))]
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if (
            unreal(found)
            and not any(unreal(v) or extreme(v) for v in given.values())
            and name.rpartition('.')[2] not in NAN_MEANS
        ):
            return f'{name}({shown}): a NaN, silently'
    except Slow: return f'{name}({shown}): more than {SECONDS} s'
    except (Exception, SystemExit) as e:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        if not ours(e):
            at = traceback.extract_tb(e.__traceback__)
            line = next(
                (f'{Path(f.filename).stem}:{f.lineno}' for f in reversed(at) if Path(f.filename).parent == HOME), '')
            return f'{name}({shown}): {type(e).__name__}: {str(e)[:90]!r} at {line}'
        if not str(e).strip(): return f'{name}({shown}): {type(e).__name__} without words'
    finally: signal.setitimer(signal.ITIMER_VIRTUAL, 0)
    if peak() - before > MEMORY: return f'{name}({shown}): {(peak() - before) / 2**30:.1f} GB'


def describe(value):
    if isinstance(value, torch.Tensor):
        return f'<{str(value.dtype)[6:]} {list(value.shape)} {value.device}{"" if value.layout == torch.strided else " sparse"}>'
    return repr(value)[:60]


def fuzz(count, only='', seed=0):
    "All findings of `count` calls, spread evenly over the names, one of each kind."
    found, todo = {}, [s for s in subjects() if only in s[0]]
    def slow(*_): raise Slow
    before, here = signal.signal(signal.SIGVTALRM, slow), os.getcwd()
    streams = sys.stdout, sys.stderr
    with tempfile.TemporaryDirectory() as folder, bounded():
        os.chdir(folder)   # what a call writes
        try:
            for i in range(count):
                name, thing, make = todo[i % len(todo)]
                # which call ends the process
                if 'TRACE' in os.environ: print(i, name, file=open(os.environ['TRACE'], 'a'), flush=True)
                said = call(name, thing, make, random.Random(f'{seed} {name} {i}'))
                if said: found.setdefault((name, said.rpartition('): ')[2][:40]), said)
        finally:
            os.chdir(here); signal.signal(signal.SIGVTALRM, before)
            sys.stdout, sys.stderr = streams
    return list(found.values())


@pytest.mark.parametrize('module', modules())
def test_bad_calls_are_refused_in_words(module):
    subjects_here = [s for s in subjects() if s[0].startswith(module + '.')]
    if not subjects_here: pytest.skip('nothing public')
    findings = fuzz(max(1, COUNT * len(subjects_here) // len(list(subjects()))), module + '.')
    if findings:
        pytest.fail('\n  '.join([f'{len(findings)} kinds of calls that end otherwise:', *findings]), pytrace=False)


if __name__ == '__main__':
    import matplotlib; matplotlib.use('Agg')
    findings = fuzz(int(sys.argv[1]), *sys.argv[2:3])
    print(*sorted(findings), f'{len(findings)} kinds', sep='\n')

"""Does every assertion hold on other processors and for other seeds? `python tests/portable.py [--only 05 test_depth
...] [--report]`

Sums are taken in another order on another processor, so a seeded training ends elsewhere. Each chapter, and each file
of tests that train, is run under every configuration below in a process of its own. There an assertion that fails stops
nothing: it is written down, with the distance of each number compared from its threshold. Nothing is run twice: what
was interrupted goes on where it stopped (`make clean` forgets all).

The list shows the assertions that fail somewhere or have too little room. Room is the smallest distance over how far it
lies below the median of all configurations: 1 means that the worst of them could be as far again from the usual before
the assertion fails. A statement with the comment `# these seeds` counts seeds as part of what it says (draws that are
the same on every processor) and is left out where seeds are shifted; one with `# a bound` holds by construction,
however near: its room is not asked for."""
import argparse
import ast
import builtins
import hashlib
import json
import math
import operator
import os
import platform
import random
import re
import statistics
import subprocess
import sys
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FOUND, RECORD = ROOT / 'build' / 'portable', ROOT / '.github' / 'portable.json'
ROOM = 1.   # the least that will do
NOTEBOOKS = sorted(path.stem for path in (ROOT / 'nbs').glob('*.ipynb'))
TESTS = [
    f'test_{name}'
    for name in 'training ensembles depth least_action kinetic compare adapters resume dynamics regularity'.split()]


def processor(torch='', onednn='', mkl='', cbwr='', threads=1, shift=0):
    """The environment in which PyTorch's own kernels, oneDNN and MKL take a processor for one that knows these
    instructions only."""
    env = dict(ATEN_CPU_CAPABILITY=torch, ONEDNN_MAX_CPU_ISA=onednn, MKL_ENABLE_INSTRUCTIONS=mkl, MKL_CBWR=cbwr)
    return {k: v for k, v in env.items() if v} | dict(OMP_NUM_THREADS=str(threads), LAP_NB_SEED_SHIFT=str(shift))


CONFIGURATIONS = {
    'this': processor(),
    'sse': processor('default', 'SSE41', 'SSE4_2'),
    'avx2': processor('avx2', 'AVX2', 'AVX2'),
    'avx2, 2 threads': processor('avx2', 'AVX2', 'AVX2', threads=2),
    'avx512': processor('avx512', 'AVX512_CORE', 'AVX512'),
    'amx, 2 threads': processor('avx512', 'AVX512_CORE_AMX', 'AVX512', threads=2),
    'mixed': processor('default', 'AVX2', cbwr='COMPATIBLE'),
    'mixed, 2 threads': processor('avx2', 'SSE41', cbwr='AVX2', threads=2),
    'seeds + 1000': processor(shift=1000),
    'seeds + 2000': processor(shift=2000),
    'seeds + 3000': processor(shift=3000),
}
SHIFT = int(os.environ.get('LAP_NB_SEED_SHIFT', 0))


def shift_seeds(by):
    """From here on every seed given to torch, NumPy (scikit-learn, too) or `random` counts as `by` more, in processes
    started from here as well."""
    import numpy as np
    import torch
    torch_generator, numpy_state, numpy_rng = torch.Generator, np.random.RandomState, np.random.default_rng

    def more(seed): return seed if seed is None or not isinstance(seed, (int, np.integer)) else int(seed) + by

    class Generator(torch_generator):
        def manual_seed(self, seed): return super().manual_seed(more(seed))

    class Default:   # the global generator cannot be replaced, but what is called by these names can
        def __getattr__(self, name): return getattr(torch._C.default_generator, name)
        def manual_seed(self, seed): return torch._C.default_generator.manual_seed(more(seed))
        def initial_seed(self): return torch._C.default_generator.initial_seed() - by

    class RandomState(numpy_state):
        def __init__(self, seed=None): super().__init__(more(seed))

    class Random(random.Random):
        def seed(self, a=None, version=2): super().seed(more(a), version)

    torch.Generator, torch.default_generator = Generator, Default()
    torch.random.default_generator = torch.default_generator
    np.random.RandomState, np.random.default_rng = RandomState, lambda seed=None: numpy_rng(more(seed))
    np.random.seed = lambda seed=None, state=np.random.seed: state(more(seed))
    random.Random = Random
    random.seed = lambda a=None, version=2, seed=random.seed: seed(more(a), version)


if SHIFT: shift_seeds(SHIFT)   # at import: processes that tests start import this file first

ORDER = {ast.Lt: operator.lt, ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge}
NAMES = {kind.__name__: f for kind, f in ORDER.items()}
CLOSE = {'assert_close', 'test_eq', 'test_close'}


class Watch(ast.NodeTransformer):
    "Turns `assert` and calls of `assert_close` and `test_eq` into calls of the recorder, which go on after a failure."
    def __init__(self, source): self.lines, self.claims, self.compared = source.splitlines(), [], []

    def call(self, name, node, *args):
        f = ast.Attribute(ast.Name('__portable__', ast.Load()), name, ast.Load())
        return ast.fix_missing_locations(ast.copy_location(ast.Call(f, list(args), []), node))

    def says(self, node, comment):
        "In the lines of the statement, or in the one above, if that is a comment."
        first, above = node.lineno - 1, self.lines[node.lineno - 2:node.lineno - 1]
        return comment in '\n'.join(self.lines[first:node.end_lineno]) or any(
            line.strip().startswith(comment) for line in above)

    def visit_Assert(self, node):
        if SHIFT and self.says(node, '# these seeds'): return ast.copy_location(ast.Pass(), node)
        site = ast.Constant(ast.unparse(node.test))
        self.claims.append(site.value)
        test = node.test if self.says(node, '# a bound') else self.decisive(node.test, site)
        return ast.copy_location(ast.Expr(self.call('claim', node, site, test)), node)

    def visit_Expr(self, node):
        f = getattr(node.value, 'func', None)
        if getattr(f, 'attr', getattr(f, 'id', None)) not in CLOSE: return self.generic_visit(node)
        if SHIFT and self.says(node, '# these seeds'): return ast.copy_location(ast.Pass(), node)
        self.claims.append(ast.unparse(node.value))
        node.value.args.insert(0, ast.Constant(self.claims[-1]))
        node.value.args.insert(1, f)
        node.value.func = self.call('close', node).func
        return ast.fix_missing_locations(node)

    def decisive(self, node, site):
        "`node` with those comparisons watched that must all hold for it to hold."
        if isinstance(node, ast.BoolOp) and isinstance(node.op, ast.And):
            node.values = [self.decisive(v, site) for v in node.values]
        elif isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'all' and isinstance(
                node.args[0], (ast.GeneratorExp, ast.ListComp)):
            node.args[0].elt = self.decisive(node.args[0].elt, site)
        elif isinstance(node, ast.Call) and getattr(node.func, 'attr', '') == 'all' and not node.args:
            node.func.value = self.decisive(node.func.value, site)
        elif isinstance(node, ast.Compare) and all(type(op) in ORDER for op in node.ops):
            self.compared.append(site.value)
            ops = ast.Constant(' '.join(type(op).__name__ for op in node.ops))
            return self.call('compare', node, site, ops, node.left, *node.comparators)
        return node


def as_numbers(thing):
    "`thing` as a double tensor, or nothing if it is no number."
    import numpy as np
    import torch
    if isinstance(thing, (bool, str)): return None
    if isinstance(thing, torch.Tensor): return thing.detach().double().cpu()
    if isinstance(thing, (int, float, np.number, np.ndarray)): return torch.as_tensor(np.asarray(thing, dtype=float))
    return None


class Recorder:
    """For each assertion how often it held and failed, and for each of its comparisons the smallest distance to the
    threshold, and both sides there."""
    MOST = 60   # comparisons of one assertion that are kept
    def __init__(self): self.sites = defaultdict(lambda: dict(held=0, failed=0, at=[]))

    def site(self, text):
        test = os.environ.get('PYTEST_CURRENT_TEST', '').split('::')[-1].split(' (')[0].split('[')[0]
        return self.sites[f'{test}: {text}' if test else text]

    def keep(self, text, distance, left, right):
        at = self.site(text)['at']
        if len(at) < self.MOST: at.append([distance, left, right])

    def compare(self, text, ops, *values):
        held = None
        for name, a, b in zip(ops.split(), values, values[1:]):
            now = NAMES[name](a, b)
            held = now if held is None else held and now
            x, y = as_numbers(a), as_numbers(b)
            if x is None or y is None or not x.numel() or not y.numel(): continue
            d = y - x if name.startswith('Lt') else x - y
            i = d.nan_to_num(-math.inf).argmin()
            self.keep(text, *(float(t.expand_as(d).flatten()[i]) for t in (d, x, y)))
        return held

    def claim(self, text, held):
        self.site(text)['held' if held else 'failed'] += 1

    def close(self, text, f, *args, **kwargs):
        try: f(*args, **kwargs)
        except AssertionError as e:
            self.site(text)['failed'] += 1
            self.site(text).setdefault('said', str(e)[:300])
        else: self.site(text)['held'] += 1
        if f.__name__ == 'assert_close': self.share(text, *args, **kwargs)

    def share(self, text, a, b, rtol=None, atol=None, **ignored):
        "The largest error as a share of what is tolerated."
        import torch
        x, y = as_numbers(a), as_numbers(b)
        if x is None or y is None or x.shape != y.shape or not x.numel(): return
        if rtol is None and atol is None:
            rtol, atol = torch.testing._comparison.default_tolerances(*(torch.as_tensor(t) for t in (a, b)))
        if not (rtol or atol): return
        share = ((x - y).abs() / (atol + rtol * y.abs())).nan_to_num(0).max().item()
        self.keep(text, 1 - share, share, 1.)


def code(unit):
    "A digest of the code of a chapter or file of tests."
    if unit in TESTS: text = (ROOT / 'tests' / f'{unit}.py').read_text()
    else:
        text = '\0'.join(''.join(c['source']) for c in json.loads((ROOT / 'nbs' / f'{unit}.ipynb').read_text())['cells']
                         if c['cell_type'] == 'code')
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def claims_of(chapter):
    "The assertions of a chapter's own cells, and those among them that compare numbers by order."
    claims, compared = set(), set()
    for cell in json.loads((ROOT / 'nbs' / f'{chapter}.ipynb').read_text(encoding='utf-8'))['cells']:
        source = ''.join(cell['source'])
        if cell['cell_type'] != 'code' or re.match(r'\s*#\| (export|eval: false|gpu|notest|slow)', source): continue
        watch = Watch(source)
        watch.visit(ast.parse(re.sub(r'^[%!].*', '', source, flags=re.M)))
        claims |= set(watch.claims)
        compared |= set(watch.compared)
    return claims, compared


def done(path, unit): return path.exists() and json.loads(path.read_text())['code'] == code(unit)


def run_notebook(unit):
    from IPython.core.compilerop import CachingCompiler

    from test_notebooks import run_here
    parse = CachingCompiler.ast_parse

    def parsed(self, source, *args, **kwargs):
        tree = parse(self, source, *args, **kwargs)
        return tree if source.lstrip().startswith('#| export') else Watch(source).visit(tree)

    CachingCompiler.ast_parse = parsed
    os.chdir(ROOT)
    return [] if run_here(ROOT / 'nbs' / f'{unit}.ipynb') else ['stopped']


def run_tests(unit):
    import pytest
    from _pytest.assertion import rewrite
    rewritten, rewrite._read_pyc, sys.dont_write_bytecode = rewrite.rewrite_asserts, lambda *args, **kwargs: None, True

    def rewrite_asserts(tree, source, *args, **kwargs):
        Watch(source.decode()).visit(tree)
        rewritten(tree, source, *args, **kwargs)

    class Failures(list):
        def pytest_runtest_logreport(self, report):
            if report.failed: self.append(f'{report.nodeid}: {report.longreprtext[-400:]}')

    rewrite.rewrite_asserts, failures = rewrite_asserts, Failures()
    pytest.main(['-q', '-p', 'no:xdist', '-p', 'no:cacheprovider', '--tb=short', f'tests/{unit}.py'],
                plugins=[failures])
    return list(failures)


def run_unit(unit, path):
    "Run one chapter or file of tests in this process and write what was recorded."
    os.environ.update(MPLBACKEND='Agg', NO_COLOR='1')
    import torch
    torch.set_num_threads(int(os.environ['OMP_NUM_THREADS']))
    builtins.__portable__, started, before = Recorder(), time.time(), code(unit)
    stopped = (run_notebook if unit in NOTEBOOKS else run_tests)(unit)
    sites = {text: note for text, note in builtins.__portable__.sites.items() if note['held'] or note['failed']}
    part = path.with_suffix('.part')
    part.write_text(json.dumps(dict(code=before, stopped=stopped, seconds=round(time.time() - started, 1),
                                    sites=sites)))
    part.rename(path)


def run_apart(name, unit):
    "Run one chapter or file of tests under the configuration `name` in a process of its own, unless that is done."
    path, started = FOUND / name / f'{unit}.json', time.time()
    if done(path, unit): return
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path.with_suffix('.log'), 'w') as log:
        status = subprocess.run(
            [sys.executable, __file__, '--run', unit, str(path)],
            env=os.environ | CONFIGURATIONS[name] | dict(PYTHONPATH=str(ROOT)), cwd=ROOT, stdout=log,
            stderr=subprocess.STDOUT).returncode
    print(
        f'{name}: {unit} {time.time() - started:.0f} s' +
        f', ended with status {status}: see {path.with_suffix(".log")}' * bool(status), flush=True)


def fingerprint(name):
    "Weights after a short training under a configuration: those that differ are different processors to PyTorch."
    code = (
        'import torch as t; t.manual_seed(0); '
        'n=t.nn.Sequential(t.nn.Conv2d(1,8,3),t.nn.GELU(),t.nn.Flatten(),t.nn.Linear(8*36,64),t.nn.Tanh(),t.nn.Linear(64,9));'
        'x,y=t.randn(50,1,8,8),t.arange(50)%9; o=t.optim.Adam(n.parameters())\n'
        'for _ in range(30): o.zero_grad(); t.nn.functional.cross_entropy(n(x),y).backward(); o.step()\n'
        'print(float(sum(p.double().sum() for p in n.parameters())))')
    return subprocess.run([sys.executable, '-c', code], env=os.environ | CONFIGURATIONS[name], capture_output=True,
                          text=True, check=True).stdout.strip()


def report():
    "Print what failed or is thin; one row for each assertion."
    found = defaultdict(dict)
    for name in CONFIGURATIONS:
        for path in sorted((FOUND / name).glob('*.json')):
            note = json.loads(path.read_text())
            if note['code'] != code(path.stem): continue
            for text, site in note['sites'].items(): found[path.stem, text][name] = site
            for said in note['stopped']: found[path.stem, said][name] = dict(failed=1, at=[])
    rows = [row(*key, sites) for key, sites in found.items()]
    bad = sorted((r for r in rows if r['failed'] or r['room'] < ROOM), key=lambda r: (not r['failed'], r['room']))
    for r in bad:
        print(
            f"{r['unit']} | {r['claim'][:200]} | room {r['room']:.2f} | {r['worst']} | "
            f"{'fails: ' * bool(r['failed'])}{', '.join(r['failed'])}"
        )
    print(
        f"{len(rows)} assertions, {sum(bool(r['failed']) for r in rows)} fail somewhere, "
        f"{sum(not r['failed'] for r in bad)} more have too little room"
    )
    return rows


def record(rows, units):
    """Put the rooms of the chapters and files of tests that have run under every configuration into the committed
    record."""
    whole = [u for u in units if all(done(FOUND / name / f'{u}.json', u) for name in CONFIGURATIONS)]
    print(
        f'{len(whole)} of {len(units)} chapters and files have run under every configuration; '
        f'{RECORD.relative_to(ROOT)} holds their rooms'
    )
    if not whole: return
    note = json.loads(RECORD.read_text()) if RECORD.exists() else dict(rooms={})
    for unit in whole:
        wanted = claims_of(unit)[1] if unit in NOTEBOOKS else set()
        note['rooms'][unit] = {
            r['claim']: f"fails: {', '.join(r['failed'])}"
            if r['failed'] else round(r['room'], 2) if math.isfinite(r['room']) else None for r in rows
            if r['unit'] == unit and (r['failed'] or math.isfinite(r['room']) or r['claim'] in wanted)}
    import torch
    machine = (
        re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if Path('/proc/cpuinfo').exists() else None
    )
    note |= dict(date=time.strftime('%Y-%m-%d'), processor=machine[1] if machine else platform.processor(),
                 torch=torch.__version__,
                 trained={name: fingerprint(name) for name in CONFIGURATIONS if not name.startswith('seeds')})
    RECORD.write_text(json.dumps(note, indent=1, sort_keys=True, ensure_ascii=False) + '\n', encoding='utf-8')


def tell_untried(units):
    "Print what the record has no room for: comparisons of chapters, files of tests."
    rooms = json.loads(RECORD.read_text(encoding='utf-8'))['rooms'] if RECORD.exists() else {}
    new = {unit: len(claims_of(unit)[1] - set(rooms.get(unit, {}))) for unit in units if unit in NOTEBOOKS}
    told = [f'{unit} ({count})' for unit, count in new.items() if count]
    told += [unit for unit in units if unit in TESTS and unit not in rooms]
    if told: print(f'{RECORD.name} lacks (of chapters: so many comparisons):', ', '.join(told))


def room_of(distances):
    "The smallest distance over how far it is below the usual one."
    least, usual = min(distances), statistics.median(distances)
    return least / (usual - least) if usual > least else math.copysign(math.inf, least)


def row(unit, claim, sites):
    "One assertion over all configurations."
    worst, room = '', math.inf
    for each in zip(*(site['at'] for site in sites.values())):
        distances = [d for d, *_ in each]
        here, at = room_of(distances), distances.index(min(distances))
        if all(a > 0 and b > 0 for _, a, b in each):   # of what is positive the ratio counts as well as the difference
            here = max(here, room_of([math.copysign(abs(math.log(a / b)), d) for d, a, b in each]))
        if not worst or here < room: worst, room = f'{each[at][1]:.4g} to {each[at][2]:.4g} ({list(sites)[at]})', here
    return dict(unit=unit, claim=claim, configurations=len(sites), room=room, worst=worst,
                failed=[name for name, s in sites.items() if s['failed']])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('--only', nargs='+', default=[''], help='the start of a name of a chapter or file of tests')
    parser.add_argument('--under', nargs='+', default=list(CONFIGURATIONS), choices=CONFIGURATIONS,
                        help='configurations, default: all')
    parser.add_argument('--jobs', type=int, default=1, help='processes at a time')
    parser.add_argument('--report', action='store_true', help='run nothing, show what was found')
    parser.add_argument('--run', nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.run: return run_unit(args.run[0], Path(args.run[1]))
    units = [unit for unit in NOTEBOOKS + TESTS if unit.startswith(tuple(args.only))]
    if not args.report:
        # one chapter after the other, so that what was stopped has finished some
        with ThreadPoolExecutor(args.jobs) as pool:
            list(pool.map(lambda unit_name: run_apart(*reversed(unit_name)), product(units, args.under)))
    rows = report()
    if not args.report: record(rows, units)
    tell_untried(units)
    left = [
        f'{unit} ({name})' for unit in units for name in args.under if not done(FOUND / name / f'{unit}.json', unit)]
    if left: print('Not run to the end:', ', '.join(left))
    sys.exit(bool(left) or any(r['failed'] or r['room'] < ROOM for r in rows))


if __name__ == '__main__': main()

"""Do the tests notice faults? `python tests/mutants.py [--sample 40] [--seed 0] [module ...]`

One fault at a time is put into a copy of a module: a comparison or a sign turned round, a number off by one, a
statement left out, a condition reversed. Then the tests of that module run, the quickest first, until one fails; those
that took more than --quick seconds without a fault are left out. A fault that none of them notices is tried again with
all tests (unless --quick-only), and listed if it survives those too.

Each fault lives in a process of its own, forked from one that has imported PyTorch and its like already."""
import argparse
import ast
import copy
import importlib
import json
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path

import pytest

from conftest import copy_checkout

MODULES = ('least_action', 'transport', 'ensembles')
COMPARE = {
    ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot, ast.IsNot: ast.Is}
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}


def faults(node):
    "For each fault that can be put into `node`: what it is, and a function that puts it in."
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield 'comparison', lambda n: n.ops.__setitem__(0, COMPARE[type(n.ops[0])]())
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY:
        yield 'operator', lambda n: setattr(n, 'op', BINARY[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        yield 'sign', lambda n: setattr(n, 'op', ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float):
        yield 'off by one', lambda n: setattr(n, 'value', n.value + 1)
    if isinstance(node, (ast.If, ast.IfExp)):
        yield 'condition', lambda n: setattr(n, 'test', ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.BoolOp):
        yield 'and/or', lambda n: setattr(n, 'op', ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.FunctionDef):
        for i, statement in enumerate(node.body):
            if (
                isinstance(statement, (ast.Assign, ast.AugAssign, ast.Raise, ast.If, ast.For))
                or isinstance(statement, ast.Expr)
                and isinstance(statement.value, ast.Call)
            ):
                yield f'dropped line {statement.lineno}', lambda n, i=i: n.body.__setitem__(
                    i, ast.copy_location(ast.Pass(), n.body[i]))


def walk(node):
    """All nodes in the bodies of functions, with the number at which `ast.walk` meets them; messages of errors are left
    alone."""
    inside = set()
    for function in (n for n in ast.walk(node)
                     if isinstance(n, ast.FunctionDef) and not n.name.startswith(('plot', '_repr', '__repr', '__str'))):
        for statement in function.body: inside.update(map(id, ast.walk(statement)))
        inside.add(id(function))
    for n in ast.walk(node):
        if isinstance(n, (ast.Raise, ast.JoinedStr)): inside -= set(map(id, ast.walk(n)))
    return [(i, n) for i, n in enumerate(ast.walk(node)) if id(n) in inside]


def mutants(source):
    "Each fault of a module: what it is, where, and the text with it."
    tree = ast.parse(source)
    for number, node in walk(tree):
        for at, (kind, _) in enumerate(faults(node)):
            def text(number=number, at=at):
                new = copy.deepcopy(tree)
                target = list(ast.walk(new))[number]
                list(faults(target))[at][1](target)
                return ast.unparse(ast.fix_missing_locations(new))
            yield kind, node.lineno, text


class Chosen:
    """A plugin of pytest: runs the tests that took at most `quick` of the known `seconds`, quickest first, and notes
    what each takes."""
    def __init__(self, seconds, quick): self.seconds, self.quick, self.taken = seconds, quick, {}

    def pytest_collection_modifyitems(self, items):
        if self.seconds:
            items[:] = sorted((i for i in items if self.seconds.get(i.nodeid, 0.) <= self.quick),
                              key=lambda i: self.seconds.get(i.nodeid, 0.))

    def pytest_runtest_setup(self, item): self.start = time.process_time()

    def pytest_runtest_teardown(self, item): self.taken[item.nodeid] = time.process_time() - self.start


def noticed(folder, module, limit, seconds=None, quick=float('inf')):
    """Do the tests of `module` in the checkout `folder` fail, or take more than `limit` seconds? And the seconds each
    took."""
    report = folder.parent / 'seconds.json'
    report.unlink(missing_ok=True)
    if not (child := os.fork()):
        os.chdir(folder)
        os.dup2(os.open(folder.parent / 'said.txt', os.O_WRONLY | os.O_CREAT | os.O_TRUNC), 1); os.dup2(1, 2)
        resource.setrlimit(resource.RLIMIT_CPU, (int(limit), int(limit) + 5))
        signal.alarm(20 * int(limit))   # waiting costs no processor time
        sys.path[:] = [str(folder), *(p for p in sys.path if p != str(Path(__file__).parent))]
        os.environ['PYTHONPATH'] = str(folder)
        chosen = Chosen(seconds, quick)
        status = pytest.main(
            ['-x', '-q', '--no-header', '-p', 'no:cacheprovider', '-p', 'no:xdist', f'tests/test_{module}.py'],
            [chosen])
        report.write_text(json.dumps(chosen.taken))
        sys.stdout.flush()
        os._exit(int(status))
    _, status = os.waitpid(child, 0)
    if os.WIFSIGNALED(status): return 'stopped', {}
    if os.WEXITSTATUS(status) > 2: raise RuntimeError((folder.parent / 'said.txt').read_text()[-3000:])
    return 'failed' if status else '', json.loads(report.read_text())


def main(modules, sample, seed, minutes, quick, quick_only):
    os.environ.update(OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    for name in 'torch ot sklearn.datasets scipy.stats scipy.optimize matplotlib.pyplot hypothesis'.split():
        importlib.import_module(name)
    start, folder = time.monotonic(), copy_checkout(Path(tempfile.mkdtemp()) / 'checkout')
    for module in modules:
        path = folder / 'lap_nb' / f'{module}.py'
        source = path.read_text(encoding='utf-8')
        how, seconds = noticed(folder, module, 1000)
        if how:
            sys.exit(
                f'the tests of {module} do not pass without a fault: '
                f'{how}\n{(folder.parent / "said.txt").read_text()[-3000:]}'
            )
        fast = [s for s in seconds.values() if s <= quick]
        print(
            f'{module}: {len(fast)} of {len(seconds)} tests take at most {quick:g} s, together {sum(fast):.0f} of '
            f'{sum(seconds.values()):.0f} s',
            flush=True)
        every = list(mutants(source))
        chosen, tried, survivors = random.Random(seed).sample(every, min(sample, len(every))), 0, []
        for kind, line, text in chosen:
            if time.monotonic() - start > 60 * minutes: break
            path.write_text(text(), encoding='utf-8')
            tried += 1
            found, _ = noticed(folder, module, 20 + 4 * sum(fast), seconds, quick)
            if not found and not quick_only: found, _ = noticed(folder, module, 20 + 4 * sum(seconds.values()))
            if found: continue
            survivors.append(f'{module}.py:{line} {kind}: {source.splitlines()[line - 1].strip()[:110]}')
            print('  survives:', survivors[-1], flush=True)
        path.write_text(source, encoding='utf-8')
        print(f'{module}: {tried - len(survivors)} of {tried} faults noticed, drawn from {len(every)}', flush=True)
    shutil.rmtree(folder.parent)


if __name__ == '__main__':
    parser = argparse.ArgumentParser(description=__doc__.partition('\n')[0])
    parser.add_argument('modules', nargs='*', default=MODULES)
    parser.add_argument('--sample', type=int, default=40, help='faults for each module')
    parser.add_argument('--seed', type=int, default=0, help='of the drawing')
    parser.add_argument('--minutes', type=float, default=60, help='after which no further fault is tried')
    parser.add_argument('--quick', type=float, default=.5,
                        help='processor seconds that a test may take to be run at first')
    parser.add_argument('--quick-only', action='store_true',
                        help='list what survives the quick tests, without trying the others')
    options = parser.parse_args()
    main(options.modules, options.sample, options.seed, options.minutes, options.quick, options.quick_only)

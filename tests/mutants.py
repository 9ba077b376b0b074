"""Do the tests notice faults? `python tests/mutants.py [--sample 40] [--seed 0] [module ...]`

One fault at a time is put into a copy of a module: a comparison or a sign turned round, a number off by one, a statement left out, a
condition reversed. The tests of that module then run until the first failure. A fault that none of them notices is listed.
"""
import argparse
import ast
import copy
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from conftest import ROOT, copy_checkout

MODULES = ('least_action', 'transport', 'ensembles')
COMPARE = {ast.Lt: ast.LtE, ast.LtE: ast.Lt, ast.Gt: ast.GtE, ast.GtE: ast.Gt, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot, ast.IsNot: ast.Is}
BINARY = {ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult}


def faults(node):
    "For each fault that can be put into `node`: what it is, and a function that puts it in."
    if isinstance(node, ast.Compare) and type(node.ops[0]) in COMPARE:
        yield 'comparison', lambda n: n.ops.__setitem__(0, COMPARE[type(n.ops[0])]())
    if isinstance(node, ast.BinOp) and type(node.op) in BINARY: yield 'operator', lambda n: setattr(n, 'op', BINARY[type(n.op)]())
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub): yield 'sign', lambda n: setattr(n, 'op', ast.UAdd())
    if isinstance(node, ast.Constant) and type(node.value) in (int, float): yield 'off by one', lambda n: setattr(n, 'value', n.value + 1)
    if isinstance(node, (ast.If, ast.IfExp)): yield 'condition', lambda n: setattr(n, 'test', ast.UnaryOp(ast.Not(), n.test))
    if isinstance(node, ast.BoolOp): yield 'and/or', lambda n: setattr(n, 'op', ast.Or() if isinstance(n.op, ast.And) else ast.And())
    if isinstance(node, ast.FunctionDef):
        for i, statement in enumerate(node.body):
            if isinstance(statement, (ast.Assign, ast.AugAssign, ast.Raise, ast.If, ast.For)) or isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
                yield f'dropped line {statement.lineno}', lambda n, i=i: n.body.__setitem__(i, ast.copy_location(ast.Pass(), n.body[i]))


def walk(node):
    "All nodes in the bodies of functions, with the number at which `ast.walk` meets them; messages of errors are left alone."
    inside = set()
    for function in (n for n in ast.walk(node) if isinstance(n, ast.FunctionDef) and not n.name.startswith(('plot', '_repr', '__repr', '__str'))):
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


def noticed(folder, module, timeout):
    "Do the tests of `module` fail, or not come to an end, in the checkout `folder`?"
    command = [sys.executable, '-m', 'pytest', '-x', '-q', '--no-header', '-p', 'no:cacheprovider', f'tests/test_{module}.py', *EXTRA]
    env = dict(os.environ, PYTHONPATH=str(folder), OMP_NUM_THREADS='1', PYTHONDONTWRITEBYTECODE='1')
    try: done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=timeout)
    except subprocess.TimeoutExpired: return 'timeout'
    if done.returncode not in (0, 1, 2): raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
    return 'failed' if done.returncode else ''


def main(modules, sample, seed, minutes):
    start, folder = time.monotonic(), copy_checkout(Path(tempfile.mkdtemp()) / 'checkout')
    for module in modules:
        path = folder / 'lap_nb' / f'{module}.py'
        source, began = path.read_text(encoding='utf-8'), time.monotonic()
        if how := noticed(folder, module, 600): sys.exit(f'the tests of {module} do not pass without a fault: {how}')
        limit = 10 + 4 * (time.monotonic() - began)
        every = list(mutants(source))
        chosen, tried, survivors = random.Random(seed).sample(every, min(sample, len(every))), 0, []
        for kind, line, text in chosen:
            if time.monotonic() - start > 60 * minutes: break
            path.write_text(text(), encoding='utf-8')
            tried += 1
            if not noticed(folder, module, limit):
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
    parser.add_argument('--k', default='', help='only tests whose names match, as of pytest')
    options = parser.parse_args()
    EXTRA = ['-k', options.k] if options.k else []
    main(options.modules, options.sample, options.seed, options.minutes)

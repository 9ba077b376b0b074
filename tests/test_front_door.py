"`import lap_nb as lap`: few names, found when they are used, the same for Python, editors and type checkers."
import ast
import importlib
import json
import re
import subprocess
import sys

import pytest

import lap_nb as lap
from conftest import ROOT, run
from test_package import modules, no

STUB = ast.parse((ROOT / 'lap_nb' / '__init__.pyi').read_text(encoding='utf-8'))
OFFERED = {
    alias.asname or alias.name: node.module for node in STUB.body if isinstance(node, ast.ImportFrom)
    for alias in node.names}

MOST_PUBLIC = 110   # names in the `__all__` of all modules


def fresh(code):
    "What `code` prints in a Python that has imported nothing."
    done = subprocess.run([sys.executable, '-c', f'import json, sys; before = set(sys.modules)\n{code}'], cwd=ROOT,
                          capture_output=True, text=True)
    assert not done.returncode, done.stderr
    return json.loads(done.stdout)


def test_the_door_opens_onto_nothing_heavy():
    new = fresh('import lap_nb; print(json.dumps(sorted(set(sys.modules) - before)))')
    foreign = {name.partition('.')[0] for name in new} - set(sys.stdlib_module_names) - {'lap_nb', 'lazy_loader'}
    assert not {name for name in foreign if not name.startswith('__editable__')}
    assert [name for name in new if name.startswith('lap_nb')] == ['lap_nb']


def test_a_name_brings_its_module_and_those_below():
    new = fresh(
        'import lap_nb as lap; lap.kinetic_energy; print(json.dumps(sorted(m for m in sys.modules if '
        'm.startswith("lap_nb."))))'
    )
    assert 'lap_nb.kinetic' in new and not {'lap_nb.training', 'lap_nb.transport', 'lap_nb.lab'} & set(new)


@pytest.mark.parametrize('name', OFFERED)
def test_each_name_is_that_of_its_module(name):
    module = importlib.import_module(f'lap_nb.{OFFERED[name]}')
    assert getattr(lap, name) is getattr(module, name) and name in module.__all__


def test_listed_alike_for_all():
    assert set(lap.__all__) == set(OFFERED) and set(OFFERED) <= set(dir(lap)) and 40 <= len(OFFERED) <= 60
    star = fresh(
        'names = {}; exec("from lap_nb import *", names); print(json.dumps(sorted(n for n in names if not '
        'n.startswith("_"))))'
    )
    assert star == sorted(OFFERED)
    with pytest.raises(AttributeError, match='nonsense'): lap.nonsense


def test_a_type_checker_finds_no_fault_with_the_lines_of_the_readme(tmp_path, monkeypatch):
    pytest.importorskip('mypy', reason='mypy is missing: run `make test`, which installs it')
    lines = re.findall(r'``` python\n(.*?)```', (ROOT / 'README.md').read_text(encoding='utf-8'), re.S)
    (tmp_path / 'readme.py').write_text('\n'.join(lines), encoding='utf-8')
    monkeypatch.setenv('MYPYPATH', str(ROOT))   # the sources, as in an editable install
    found = run(sys.executable, '-m', 'mypy', '--config-file', ROOT / 'pyproject.toml', '--cache-dir',
                tmp_path / 'cache', 'readme.py', cwd=tmp_path)
    assert 'readme.py' not in found.stdout.replace('checked 1 source file', ''), found.stdout


def test_public_names_are_few_and_differ_in_more_than_case():
    names = [(name, module) for module in modules() for name in importlib.import_module(f'lap_nb.{module}').__all__]
    assert len(names) <= MOST_PUBLIC, f'{len(names)} public names, at most {MOST_PUBLIC}'
    seen = {}
    for name, module in names: seen.setdefault(name.lower(), []).append(f'{module}.{name}')
    no([' and '.join(twins) for twins in seen.values() if len(twins) > 1],
       'names that differ in case only, or stand twice')

"The package builds, installs into an environment that holds nothing else, and does its work there."
import json
import math
import os
import re
import shutil
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

from conftest import ROOT, check, copy_checkout, run

MODULES = sorted(p.relative_to(ROOT / 'lap_nb').as_posix() for p in (ROOT / 'lap_nb').rglob('*.py'))
NAMES = [
    'lap_nb.' + name.removesuffix('.py').replace('/', '.') for name in MODULES
    if not name.split('/')[-1].startswith('_')]
DEV_PACKAGES = 'nbdev pytest jupyterlab jupytext playwright'.split()
OPTIONS = '--data --n --seeds --epochs --device --out --resume --force --lambda0 --tau --every'.split()
METHODS = {'plain', 'plain-lr', 'plain-gain', 'label-smoothing', 'constant-weight', 'least-action'}
MEASURES = ['test_accuracy_last', 'test_accuracy_best', 'energy_per_sample', 'straightness']

pytestmark = pytest.mark.install


def build(source, kind, to):
    "Build the distribution `kind` (wheel or sdist) of the folder `source` into `to`."
    check(sys.executable, '-m', 'build', '--no-isolation', f'--{kind}', '--outdir', to, source, cwd=to.parent)
    return next(to.glob('*.whl' if kind == 'wheel' else '*.tar.gz'))


@pytest.fixture(scope='module')
def dists(tmp_path_factory):
    "The wheel, the sdist, and the wheel built from the unpacked sdist."
    folder = tmp_path_factory.mktemp('dist')
    source = copy_checkout(folder / 'checkout')
    sdist = build(source, 'sdist', folder / 'sdist')
    with tarfile.open(sdist) as archive: archive.extractall(folder / 'unpacked', filter='data')
    unpacked, = (folder / 'unpacked').iterdir()
    return build(source, 'wheel', folder / 'wheel'), sdist, build(unpacked, 'wheel', folder / 'again')


@pytest.fixture(scope='module')
def installed(dists, tmp_path_factory):
    "The program folder of a new environment that holds the wheel, what it requires, and the laboratory's extra."
    folder = tmp_path_factory.mktemp('installed')
    venv.create(folder / 'env', with_pip=True)
    programs = folder / 'env' / 'bin'
    check(programs / 'python', '-m', 'pip', 'install', '-qq', '--no-compile', '--disable-pip-version-check',
          *os.environ.get('LAP_NB_PIP', '').split(), '-c', ROOT / 'constraints.txt', f'{dists[0]}[lab]', cwd=folder)
    yield programs
    shutil.rmtree(folder)


@pytest.fixture(scope='module')
def compared(installed, tmp_path_factory):
    "The output folder of a small run, started far from the checkout, and what the run printed."
    folder = tmp_path_factory.mktemp('compared')
    printed = check(installed / 'lap_compare', '--seeds', '2', '--epochs', '2', '--out', folder / 'out', cwd=folder)
    return folder / 'out', printed


def contents(wheel):
    "File names and bytes of a wheel."
    with zipfile.ZipFile(wheel) as archive: return {name: archive.read(name) for name in archive.namelist()}


def test_wheel_contents(dists):
    names = set(contents(dists[0]))
    info = next(name.split('/')[0] for name in names if name.endswith('.dist-info/METADATA'))
    assert {f'lap_nb/{name}' for name in MODULES} <= names
    assert f'{info}/licenses/LICENSE' in names
    assert {name.split('/')[0] for name in names} == {'lap_nb', info}
    assert 'lap_nb/py.typed' in names
    assert {f'lap_nb/{name}i' for name in MODULES if name != '_modidx.py'} <= names, 'signatures for type checkers'
    assert {Path(name).suffix for name in names if name.startswith('lap_nb/')} == {'.py', '.pyi', '.typed'}


def test_sdist_contents(dists):
    with tarfile.open(dists[1]) as archive: names = {name.partition('/')[2] for name in archive.getnames()}
    assert {f'lap_nb/{name}'
            for name in MODULES} | {'LICENSE', 'README.md', 'settings.ini', 'setup.py', 'stubs.py'} <= names
    assert not [name for name in names if name.startswith('tests')], 'tests need the checkout: notebooks, records, git'


def test_the_description_holds_outside_the_repository(dists):
    "Where PyPI shows the README, links and pictures have whole addresses: of files that are there."
    text, = (part.decode() for name, part in contents(dists[0]).items() if name.endswith('.dist-info/METADATA'))
    home = re.search(r'^Home-page: (\S+)$', text, re.M)[1]
    targets = re.findall(r'\]\(([^)\s]*)', text)
    assert not [target for target in targets if not target.startswith(('https://', 'http://', '#'))]
    files = [
        re.fullmatch(rf'{re.escape(home)}/(blob|raw)/main/(.*)', target) for target in targets
        if target.startswith(home + '/')]
    assert len(files) > 20 and not [
        found[0] for found in files if not (ROOT / found[2].partition('#')[0]).exists() or
        (found[1] == 'raw') != found[2].endswith(('.png', '.svg'))]


def test_sdist_builds_the_same_wheel(dists):
    wheel, _, again = dists
    assert contents(wheel) == contents(again)


def test_only_runtime_packages_are_installed(installed, tmp_path):
    code = 'import sys; from importlib.util import find_spec; print(*filter(find_spec, sys.argv[1:]))'
    assert check(installed / 'python', '-c', code, *DEV_PACKAGES, cwd=tmp_path).split() == []
    check(installed / 'python', '-m', 'pip', 'check', cwd=tmp_path)


def test_every_module_imports_without_warnings(installed, tmp_path):
    code = ('import importlib, sys, warnings\nwarnings.filterwarnings("error", module=r"lap_nb(\\.|$)")\n'
            'for name in sys.argv[1:]: print(importlib.import_module(name).__file__)')
    for file in check(installed / 'python', '-c', code, 'lap_nb', 'lap_nb.lab', *NAMES, cwd=tmp_path).split('\n')[:-1]:
        assert Path(file).is_relative_to(installed.parent), f'{file} is not the installed module'


def test_commands_work_with_the_next_fastcore(installed, tmp_path):
    """The environment has fastcore 1, which development needs; beside it stands fastcore 2, which declares options in
    another way."""
    check(installed / 'python', '-m', 'pip', 'install', '-qq', '--no-compile', '--disable-pip-version-check',
          '--no-deps', '--target', tmp_path / 'next', 'fastcore>=2,<3', cwd=tmp_path)
    code = (
        'import importlib, sys; sys.path.insert(0, sys.argv[1]); import fastcore; from fastcore.script import '
        'anno_parser\n'
        'for name in sys.argv[2:]: importlib.import_module(name)\n'
        'from lap_nb.lab.cli import lap_bench, lap_compare, lap_study\n'
        'read = lambda command, *words: anno_parser(command.__wrapped__).parse_args(words)\n'
        'print(fastcore.__version__.split(".")[0], read(lap_bench).names, *read(lap_bench, "a", "b", '
        '"--force").names,\n'
        '      repr(read(lap_study).name), read(lap_study, "c", "--seeds", "3").name, read(lap_compare, "--n", "7").n)')
    assert (
        check(installed / 'python', '-c', code, tmp_path / 'next', *NAMES, cwd=tmp_path).split('\n')[0]
        == "2 () a b None c 7"
    )


def test_compare_writes_the_record(compared):
    lines = [json.loads(line) for line in (compared[0] / 'lap_compare.jsonl').read_text(encoding='utf-8').splitlines()]
    assert {line['study'] for line in lines} == {'lap_compare'}
    rows = [line for line in lines if 'seed' in line and line['data'] == 'digits']
    assert {'plain', 'least-action'} < {row['method'] for row in rows}
    assert {row['seed'] for row in rows} == {0, 1} and len(rows) == 28
    for row in rows:
        assert {'n', 'lambda'} <= row.keys()
        assert all(math.isfinite(row[measure]) for measure in MEASURES), row
    assert all(row['lambda'] > 0 for row in rows if row['method'] == 'least-action')


def test_compare_draws_the_picture(compared):
    assert (compared[0] / 'lap_compare.png').read_bytes().startswith(b'\x89PNG\r\n\x1a\n')


def test_compare_prints_a_row_for_each_method(compared):
    assert all(re.search(rf'(?<![\w-]){method}(?![\w-])', compared[1]) for method in METHODS), compared[1]


def test_compare_overwrites_nothing(installed, compared):
    out = compared[0]
    before = {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()}
    again = run(installed / 'lap_compare', '--seeds', '2', '--epochs', '2', '--out', out, cwd=out.parent)
    said = again.stdout + again.stderr
    assert again.returncode != 0
    assert 'lap_compare.jsonl' in said and '--force' in said and 'Traceback' not in said, said
    assert {p.name: p.read_bytes() for p in out.iterdir() if p.is_file()} == before


def test_compare_help_explains_every_option(installed, tmp_path):
    shown = check(installed / 'lap_compare', '--help', cwd=tmp_path)
    parts = re.split(r'^ +(--?[a-z][\w-]*)', shown.partition('\noptions:')[2], flags=re.M)
    explained = dict(zip(parts[1::2], parts[2::2]))
    assert set(OPTIONS) <= explained.keys(), shown
    for option, text in explained.items():
        words = re.sub(r'\(default:.*?\)|\{.*?\}|\b[A-Z_0-9]+\b|--[\w-]+', ' ', text, flags=re.S).split()
        assert len(words) >= 2, f'{option} is not explained:\n{shown}'

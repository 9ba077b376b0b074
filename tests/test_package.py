"""The notebooks are the only source: what is generated from them is in step with them, and the package keeps its
manners."""
import ast
import http.server
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from configparser import ConfigParser
from dataclasses import is_dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, distribution

import pytest
import yaml
from fastcore.docments import docments
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from conftest import ROOT, check, run
from cells import MACHINE_PATH   # of nbs/_site

NBS = ROOT / 'nbs'
NOTEBOOKS = sorted(NBS.glob('*.ipynb'))

# A module imports only from modules to its left.
ORDER = (
    'checks files state stats plots data dynamics nets hooks attach kinetic transport regularity least_action '
    'penalties tasks training adapters ensembles certificates depth ranking '
    'lab.design lab.nets lab.store lab.promises lab.run lab.catalogue lab.analysis lab.published lab.widgets lab.compare lab.modes '
    'lab.bench lab.cli'
).split()
# Slow to import and needed by few calls: imported inside the functions that use them.
LAZY = 'ot matplotlib scipy sklearn PIL ipywidgets dask pandas orjson lightning torchdiffeq transformers'.split()
EXPORTED = {'export', 'exports', 'exporti'}
DIRECTIVE = re.compile(r'#\|\s*([\w-]+):?\s*(.*)')
MAX_BYTES, MAX_STATEMENTS = 1_000_000, 40


python = partial(check, sys.executable)   # modules are taken from `cwd`


def no(offenders, rule):
    "Fail with the whole list of `offenders`."
    if offenders := list(offenders): pytest.fail('\n  '.join([f'{rule}:', *offenders]), pytrace=False)


def python_files(folder): return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob('*.py')}


@cache
def load(notebook): return json.loads(notebook.read_text(encoding='utf-8'))


def code_cells():
    "Each code cell of all notebooks: where it stands, the cell, its directives, its code without them."
    for notebook in NOTEBOOKS:
        for number, cell in enumerate(load(notebook)['cells'], 1):
            if cell['cell_type'] != 'code': continue
            lines = ''.join(cell['source']).splitlines()
            directives = dict(DIRECTIVE.match(line).groups() for line in lines if DIRECTIVE.match(line))
            yield f'{notebook.name} cell {number}', cell, directives, [ln for ln in lines if not DIRECTIVE.match(ln)]


def default_modules():
    "The module that each notebook exports to."
    return {d['default_exp']: where.split()[0] for where, _, d, _ in code_cells() if 'default_exp' in d}


def modules():
    "All modules of the package, those of its laboratory as `lab.NAME`."
    folder = ROOT / 'lap_nb'
    return sorted('.'.join(p.relative_to(folder).with_suffix('').parts) for p in folder.rglob('*.py')
                  if not p.stem.startswith('_'))


def module_text(name): return (ROOT / 'lap_nb' / f'{name.replace(".", "/")}.py').read_text(encoding='utf-8')


def module_tree(name): return ast.parse(module_text(name), f'{name}.py')


def imports(name):
    """What the module `name` imports from modules of the package, anywhere in its text: pairs of a module and a name,
    which is empty for the module itself."""
    for node in ast.walk(module_tree(name)):
        if isinstance(node, ast.Import):
            yield from ((a.name.removeprefix('lap_nb.'), '') for a in node.names if a.name.startswith('lap_nb.'))
        if not isinstance(node, ast.ImportFrom): continue
        above = f'lap_nb.{name}'.rsplit('.', node.level)[0] + '.' if node.level else ''
        path = f'{above}{node.module or ""}'.strip('.')
        if not f'{path}.'.startswith('lap_nb.'): continue
        inside = path.removeprefix('lap_nb').strip('.')
        for alias in node.names:
            whole = f'{inside}.{alias.name}'.strip('.')
            yield (whole, '') if whole in modules() else (inside, alias.name)


# In step with the notebooks

def test_export_is_in_step(copy):
    before = python_files(copy / 'lap_nb')
    for name in before:
        if name != '__init__.py': (copy / 'lap_nb' / name).unlink()
    python('-c', 'from nbdev.doclinks import nbdev_export; nbdev_export()', cwd=copy)
    after = python_files(copy / 'lap_nb')
    no((name for name in sorted(before | after) if before.get(name) != after.get(name)),
       'lap_nb/ differs from what the notebooks export (run nbdev_export; remove modules without a notebook)')


def test_modules_and_notebooks_match():
    files, wanted = set(modules()), default_modules()
    no([f'lap_nb.{name} has no notebook' for name in sorted(files - wanted.keys())] +
       [f'{wanted[name]} has no module lap_nb.{name}' for name in sorted(wanted.keys() - files)],
       'each module has its notebook and the other way round')


def test_notebooks_are_clean(copy):
    before = {p.name: p.read_bytes() for p in (copy / 'nbs').glob('*.ipynb')}
    python('-c', 'from nbdev.clean import nbdev_clean; nbdev_clean()', cwd=copy)
    no((name for name, text in sorted(before.items()) if (copy / 'nbs' / name).read_bytes() != text), 'run nbdev_clean')


def test_readme_is_generated(copy):
    python('nbs/_site/readme.py', '--check', cwd=copy)


def test_compiles_without_warnings(tmp_path):
    shutil.copytree(ROOT / 'lap_nb', tmp_path / 'lap_nb', ignore=shutil.ignore_patterns('__pycache__'))
    python('-W', 'error', '-m', 'compileall', '-q', '-f', 'lap_nb', cwd=tmp_path)


# Notebooks

def test_notebook_size():
    no((f'{p.name}: {p.stat().st_size:,} bytes' for p in NOTEBOOKS if p.stat().st_size > MAX_BYTES),
       f'a notebook has at most {MAX_BYTES:,} bytes')


def texts(value):
    "All strings in a nest of lists and dicts, pictures left out."
    if isinstance(value, str): yield value
    elif isinstance(value, list): yield ''.join(value) if all(isinstance(v, str) for v in value) else '\n'.join(
        text for v in value for text in texts(v))
    elif isinstance(value, dict):
        for key, v in value.items():
            if not key.startswith('image/') or key == 'image/svg+xml': yield from texts(v)


def test_saved_outputs_are_presentable():
    def faults():
        for where, cell, _, _ in code_cells():
            for output in cell['outputs']:
                if output['output_type'] == 'error': yield f'{where}: saved error {output["ename"]}'
                if output.get('name') == 'stderr': yield f'{where}: saved stderr {"".join(output["text"])[:80]!r}'
                for text in texts(output):
                    if 'Traceback (most recent call last)' in text: yield f'{where}: traceback'
                    if found := MACHINE_PATH.search(text): yield f'{where}: machine path {found[0][:60]!r}'
        for notebook in NOTEBOOKS:
            for text in texts(load(notebook)['metadata']):
                if found := MACHINE_PATH.search(text): yield f'{notebook.name} metadata: {found[0][:60]!r}'

    no(faults(), 'saved outputs hold no error, warning, traceback or machine path')


def test_figures_have_alt_text():
    def has_figure(cell): return any(mime.startswith('image/') for o in cell['outputs'] for mime in o.get('data', {}))

    no((where for where, cell, directives, _ in code_cells() if has_figure(cell) and not directives.get('fig-alt')),
       'a cell that shows a figure has "#| fig-alt: ..."')


def test_sources_are_lists_of_lines():
    no((f'{n.name} cell {i}' for n in NOTEBOOKS for i, c in enumerate(load(n)['cells'], 1)
        if not isinstance(c['source'], list) or any('\n' in line[:-1] for line in c['source'])),
       'a cell source is a list of lines, so that diffs are by line')


def parse(lines):
    "Syntax tree of a cell, without its magics."
    return ast.parse('\n'.join('pass' if line.lstrip().startswith(('%', '!')) else line for line in lines))


def test_imports_stand_alone():
    def mixes(directives, lines):
        if 'nbdev_export()' in '\n'.join(lines) or directives.get('eval') == 'false': return False
        tree, imports = parse(lines), (ast.Import, ast.ImportFrom)
        nodes = tree.body if EXPORTED & directives.keys() else ast.walk(tree)
        return any(isinstance(n, imports) for n in nodes) and not all(isinstance(n, imports) for n in tree.body)

    no((where for where, _, directives, lines in code_cells() if mixes(directives, lines)),
       'imports stand in cells of their own: the docs build runs every cell that imports, in an empty namespace')


def test_expected_failures_are_entered():
    "`expect_fail` is a context manager: called without `with` it checks nothing."
    def idle(lines):
        nodes = list(ast.walk(parse(lines)))
        entered = {id(item.context_expr) for n in nodes if isinstance(n, ast.With) for item in n.items}
        return any(
            isinstance(n, ast.Call) and getattr(n.func, 'id', '') == 'expect_fail' and id(n) not in entered
            for n in nodes)

    no((where for where, _, _, lines in code_cells() if idle(lines)), 'write "with expect_fail(...): ..."')


def statements(lines):
    "How many statements a cell has; imports, docstrings and the headings of methods are none."
    nodes = list(ast.walk(parse(lines)))
    methods = {id(m) for n in nodes if isinstance(n, ast.ClassDef) for m in n.body if isinstance(m, ast.FunctionDef)}
    found = (n for n in nodes
             if isinstance(n, ast.stmt) and not isinstance(n, ast.Import | ast.ImportFrom) and id(n) not in methods)
    return sum(not (isinstance(n, ast.Expr) and isinstance(n.value, ast.Constant)) for n in found)


def test_lines_are_at_most_120_columns():
    "Of the library; not the tables that are made by machine, nor the one-line docstrings that are a page's description."
    long = [
        f'{path.name}:{number}' for path in sorted((ROOT / 'lap_nb').rglob('*.py')) if path.name != '_modidx.py'
        for number, line in enumerate(path.read_text(encoding='utf-8').split('\n'), 1)
        if len(line) > 120 and number > 1 and not line.startswith('__all__')]
    assert not long, long


def test_ruff_finds_nothing():
    done = subprocess.run([sys.executable, '-m', 'ruff', 'check', '--output-format', 'concise', '.'], cwd=ROOT,
                          capture_output=True, text=True)
    assert not done.returncode, done.stdout + done.stderr


def test_exported_cells_are_short():
    no((f'{where}: {count} statements' for where, _, directives, lines in code_cells()
        if EXPORTED & directives.keys() and (count := statements(lines)) > MAX_STATEMENTS),
       f'an exported cell has at most {MAX_STATEMENTS} statements')


# The package

def test_heavy_packages_wait_until_needed():
    code = ('import importlib, json, sys, torch\nseen = dict.fromkeys(sys.modules)\n'
            'for name in sys.argv[2:]:\n    importlib.import_module("lap_nb." + name)\n'
            '    for heavy in sys.argv[1].split(","):\n        if heavy in sys.modules: seen.setdefault(heavy, name)\n'
            'print(json.dumps({heavy: name for heavy, name in seen.items() if name}))')
    first = json.loads(python('-c', code, ','.join(LAZY), *filter(modules().__contains__, ORDER)))
    no((f'lap_nb.{name} imports {heavy}' for heavy, name in first.items()), 'imported before it is needed')


def test_import_direction():
    no((f'{name}: give it a place in ORDER' for name in modules() if name not in ORDER), 'unknown module')
    no((f'{name} imports {other}' for name in modules() for other, _ in imports(name)
        if other in ORDER and ORDER.index(other) >= ORDER.index(name)), f'imports run one way: {" -> ".join(ORDER)}')


def test_nothing_in_the_library_imports_the_laboratory():
    no((f'{name} imports {other}' for name in modules() if not name.startswith('lab.') for other, _ in imports(name)
        if f'{other}.'.startswith('lab.')), 'the laboratory stands beside the library')


def test_no_private_name_crosses_modules():
    no((f'{name} imports {other}.{n}' for name in modules() for other, n in imports(name) if n.startswith('_')),
       'what modules share has no underscore and stands in an exporti cell')


def test_imports_are_seen_wherever_they_stand():
    assert {('data', 'load'), ('dynamics', 'Flow')} <= set(imports('lab.published'))
    assert ('lab.catalogue', 'comparison') in set(imports('lab.compare'))


def public(module):
    "The functions and classes that `module` exports, by name."
    found = {name: getattr(module, name) for name in module.__all__}
    return {name: x for name, x in found.items() if inspect.isfunction(x) or inspect.isclass(x)}


def undocumented(name, thing):
    "What lacks a comment or a docstring in the public `thing`."
    own = vars(thing) if inspect.isclass(thing) else {}
    doc = own.get('__doc__') if own else thing.__doc__
    if not doc or doc.startswith(f'{thing.__name__}('): yield f'{name}: no docstring'
    comments = docments(thing, returns=False, args_kwargs=True)
    if is_dataclass(thing): comments = {p: c for p, c in comments.items() if p in own.get('__annotations__', ())}
    elif own and '__init__' not in own: comments = {}
    yield from (f'{name}: parameter {p} has no comment' for p, comment in comments.items()
                if p != 'self' and not comment)


def test_public_names_are_documented():
    sources = {name: importlib.import_module(f'lap_nb.{name}') for name in modules()}
    no((fault for module, source in sources.items() for name, thing in public(source).items()
        for fault in undocumented(f'{module}.{name}', thing)), 'docstring and a comment beside each parameter')


def test_installed_packages_agree():
    python('-m', 'pip', 'check')


# Configuration

def test_quarto_configuration_is_the_top_level_one():
    link = NBS / '_quarto.yml'
    assert link.is_symlink() and os.readlink(link) == '../_quarto.yml', 'nbs/_quarto.yml is a symlink to ../_quarto.yml'


def test_sidebar_lists_every_notebook():
    def entries(value):
        if isinstance(value, str): yield value
        elif isinstance(value, list): yield from (e for v in value for e in entries(v))
        elif isinstance(value, dict): yield from (e for v in value.values() for e in entries(v))

    config = yaml.safe_load((ROOT / '_quarto.yml').read_text(encoding='utf-8'))
    listed = {e for e in entries(config['website']['sidebar']) if e.endswith('.ipynb')}
    present = {p.name for p in NOTEBOOKS}
    no([f'{name} is not in the sidebar' for name in sorted(present - listed)] +
       [f'the sidebar lists {name}, which does not exist' for name in sorted(listed - present)], '_quarto.yml')


# Versions

@cache
def pins(name):
    "Package to version, as `constraints.txt` or `requirements.lock` has it for this Python and machine."
    lines = re.findall(r'^[a-z0-9][^\\\n]*', (ROOT / name).read_text(encoding='utf-8'), re.M)
    wanted = [r for r in map(Requirement, lines) if r.marker is None or r.marker.evaluate()]
    assert len({r.name for r in wanted}) == len(wanted), f'{name} names a package twice'
    return {r.name: next(iter(r.specifier)).version for r in wanted}


@cache
def asked():
    "What settings.ini requires, for use, studies and development."
    ini = ConfigParser(delimiters=['='])
    ini.read(ROOT / 'settings.ini', encoding='utf-8')
    return [
        Requirement(word)
        for key in ('requirements', 'lab_requirements', 'widgets_requirements', 'site_requirements', 'dev_requirements')
        for word in ini['DEFAULT'][key].split()]


def needed():
    "Each installed package that the project brings, and its version, by way of what is installed and not of the lock."
    found, open_ = {}, [(r, '') for r in asked()]
    while open_:
        requirement, extra = open_.pop()
        name = canonicalize_name(requirement.name)
        if requirement.marker is not None and not requirement.marker.evaluate({'extra': extra}): continue
        if (name, extras := frozenset(requirement.extras)) in found: continue
        try: package = distribution(name)
        except PackageNotFoundError: pytest.fail(f'{name} is not installed: make install', pytrace=False)
        found[name, extras] = package.version
        open_ += [(Requirement(line), extra) for line in package.requires or () for extra in (extras or ('',))]
    return {name: version.partition('+')[0] for (name, _), version in found.items()}


# what another PyTorch may bring in other versions
def own_torch(name): return re.fullmatch('torch|sympy|triton|(nvidia|cuda)-.*', name)


def test_every_package_has_its_version_in_the_constraints():
    wanted, found = pins('constraints.txt'), needed()
    other = found['torch'] != wanted['torch']   # make TORCH=...
    no((f'{name} {version}, pinned: {wanted.get(name)}'
        for name, version in found.items() if version != wanted.get(name) and not (other and own_torch(name))),
       'installed in another version than constraints.txt says: make lock, then make install')


def test_the_settings_allow_the_versions_of_the_constraints():
    wanted = pins('constraints.txt')
    no((f'{r}: {wanted.get(canonicalize_name(r.name))}'
        for r in asked() if not r.specifier.contains(wanted.get(canonicalize_name(r.name), '0'))),
       'settings.ini asks for other versions than constraints.txt has: make lock')


def test_the_lock_has_hashes_of_all_but_torch():
    text = (ROOT / 'requirements.lock').read_text(encoding='utf-8')
    no((entry.split()[0] for entry in re.split(r'\n(?=[a-z0-9])', text)[1:]
        if not re.search(r' \\\n    --hash=sha256:[0-9a-f]{64}', entry)), 'no hash')
    every, locked = pins('constraints.txt'), pins('requirements.lock')
    assert locked == {
        name: version for name, version in every.items()
        if not re.fullmatch('torch|triton|(nvidia|cuda)-.*', name)}, 'make lock writes both'


def dry(*goals, **variables):
    "What make would run."
    return run('make', '-n', '-B', *goals, *(f'{key}={value}' for key, value in variables.items())).stdout


@pytest.mark.parametrize('goal', ['install', 'test', 'site', 'dist'])
def test_what_development_needs_is_installed_by_hash(goal):
    "All is in the lock or comes with torch; nothing else is fetched, not for building lap_nb either."
    if shutil.which('make') is None: pytest.skip('needs make: apt-get install make')
    installs = re.findall(r'pip install .*', dry(goal, VENV='.venv-none'))
    assert [re.sub('.*version-check ', '', line) for line in installs] == [
        '--require-hashes --no-deps --only-binary :all: -r requirements.lock',
        next(line.split('version-check ')[1] for line in installs if line.endswith(' torch')),
        '--no-deps --no-build-isolation -e .']
    assert '-c constraints.txt' in installs[1]


@pytest.mark.parametrize('torch, pin', [('2.5.0', ['torch==2.5.0']), ('newest', [])])
def test_another_torch_brings_its_own(tmp_path, torch, pin):
    if shutil.which('make') is None: pytest.skip('needs make: apt-get install make')
    (tmp_path / 'pyvenv.cfg').touch()
    venv = os.path.relpath(tmp_path, ROOT)
    check('make', '-s', f'VENV={venv}', f'TORCH={torch}', f'{venv}/constraints-{torch}.txt')
    lines, every = ((path.read_text(encoding='utf-8').splitlines())
                    for path in (tmp_path / f'constraints-{torch}.txt', ROOT / 'constraints.txt'))
    assert [line for line in lines if own_torch(line.partition('==')[0])] == pin
    assert [line for line in lines if line not in pin] == [
        line for line in every if not own_torch(line.partition('==')[0])
    ]


def test_torch_is_pinned_in_the_constraints_only():
    "The exact version, with its CPU build, serves the tests: users choose their own."
    assert 'torch' in pins('constraints.txt') and 'torch' not in pins('requirements.lock')
    assert 'torch==' not in (ROOT / 'settings.ini').read_text(encoding='utf-8')


# Folders of any name

NASTY = [
    "a b", "it's", 'say "hi"', '$HOME', '$x', '{x}', '$(touch hurt)', '`touch hurt`', 'größer 漢字', '#1', '100 %',
    '%d %(x)s', '(a) & b; c', '-dash', '--', 'a\\b', '~', '*?[x]', '!', 'a=b', '<x>|y', ' ends ', '@', '${x}', '$$']
STUB = r"""#!/bin/sh
# Stands for the Python of .venv: writes down what it is asked to do, and where.
case "$1 $2" in "-c import sysconfig;"*) printf '%s\n' "$PWD/.venv/packages"; exit;; "-c "*) exit;; esac
printf '%s\n' "$PWD" "$@" --- >> ../said
"""


@pytest.mark.parametrize('name', NASTY)
def test_make_works_in_a_folder_of_any_name(name, tmp_path):
    "What make runs is a stub here: each command arrives, in the folder, and no part of the name is run or split."
    if shutil.which('make') is None: pytest.skip('needs make: apt-get install make')
    folder = tmp_path / 'around' / name
    (folder / '.venv' / 'bin').mkdir(parents=True)
    (folder / '.venv' / 'packages').mkdir()
    (folder / 'nbs' / '_site' / 'node_modules').mkdir(parents=True)
    for file in ('Makefile', 'settings.ini', 'setup.py', 'pyproject.toml', 'constraints.txt', 'requirements.lock',
                 'nbs/_site/package.json', 'nbs/_site/package-lock.json'):
        shutil.copy(ROOT / file, folder / file)
    for part in ('.ci', 'lap_nb', 'tests'): (folder / part).mkdir()
    shutil.copy(ROOT / '.ci' / 'run', folder / '.ci' / 'run')
    (folder / '.venv' / 'bin' / 'python').write_text(STUB)
    (folder / '.venv' / 'bin' / 'python').chmod(0o755)
    for file in ('.venv/pyvenv.cfg', 'nbs/_site/node_modules/.installed'): (folder / file).touch()
    (tmp_path / 'tools').mkdir()
    (tmp_path / 'tools' / 'chromium').symlink_to(shutil.which('true'))
    env = os.environ | {'PATH': f'{tmp_path / "tools"}:{os.environ["PATH"]}'}
    make = lambda *words: subprocess.run(words, cwd=folder, env=env, capture_output=True, text=True)
    for words in [['make', goal] for goal in 'demo site book dist playground coverage lock mutants'.split()] + [[
            'bash', str(folder / '.ci' / 'run')]]:
        done = make(*words)
        assert done.returncode == 0, f'{words}\n{done.stdout}{done.stderr}'
        if words[1:] == ['site']: assert f'The site is at {folder}/_docs/index.html\n' in done.stdout
    said = (folder.parent / 'said').read_text(encoding='utf-8').split('---\n')[:-1]
    assert {call.splitlines()[0] for call in said} == {str(folder)}
    calls = [call.splitlines()[1:] for call in said]
    for expected in ('.venv/bin/lap_compare --force', 'nbs/_site/render.py', '.venv/bin/nbdev_export', '-m build --no-isolation', '-m coverage report', '.ci/lock.py',
                     'tests/mutants.py', '-m pytest -n 2 --dist loadfile --no-loadscope-reorder'): assert expected.split() in calls, expected
    assert sorted(path.name for path in folder.parent.iterdir()) == sorted([name, 'said']) and not [
        *folder.rglob('hurt')
    ]
    assert make('make', 'clean').returncode == 0 and not (folder / '.venv').exists()


def test_a_machine_without_a_card_gets_the_cpu_build(tmp_path):
    "make names PyTorch's index of CPU builds to pip: on Linux, if it answers, and if there is no NVIDIA driver."
    if shutil.which('make') is None or sys.platform != 'linux': pytest.skip('needs make on Linux: apt-get install make')
    (tmp_path / 'site' / 'torch').mkdir(parents=True)
    (tmp_path / 'site' / 'torch' / 'index.html').touch()
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'site')

    def named(path, port):
        "Whether pip is given the index on this port."
        done = subprocess.run([
            'make', '-n', '-B', 'demo', f'VENV={os.path.relpath(sys.prefix, ROOT)}',
            f'TORCH_INDEX=http://127.0.0.1:{port}'], cwd=ROOT, text=True,
                              env=os.environ | {'PATH': path, 'no_proxy': '127.0.0.1'}, capture_output=True, check=True)
        return f'--extra-index-url http://127.0.0.1:{port} --no-build-isolation -e' in done.stdout

    # The path without drivers: the tools that the Makefile calls.
    (tmp_path / 'tools').mkdir()
    for tool in ('make', 'sh', 'uname', 'env'): (tmp_path / 'tools' / tool).symlink_to(shutil.which(tool))
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        assert named(str(tmp_path / 'tools'), server.server_port)
        (tmp_path / 'tools' / 'nvidia-smi').symlink_to(shutil.which('true'))
        assert not named(str(tmp_path / 'tools'), server.server_port), 'with a driver the CUDA build is right'
        server.shutdown()
    (tmp_path / 'tools' / 'nvidia-smi').unlink()
    assert not named(str(tmp_path / 'tools'), server.server_port), 'an index that does not answer would only delay pip'


def test_spelling(tmp_path):
    "codespell over the text of the notebooks and the documents; words of the field stand in pyproject.toml."
    pytest.importorskip('codespell_lib', reason='codespell is missing: run `make test`, which installs it')
    for notebook in NOTEBOOKS:
        text = '\n\n'.join(''.join(cell['source']) for cell in load(notebook)['cells'])
        (tmp_path / f'{notebook.stem}.md').write_text(text, encoding='utf-8')
    documents = [
        *ROOT.glob('*.md'), *(NBS / '_site').glob('*.[pjh]*'), *(NBS / 'results').glob('*.md'),
        *(ROOT / 'tests').glob('*.py'), *(ROOT / '.github').rglob('*.[my]*'),
        *(ROOT / name for name in ('_quarto.yml', 'Makefile', 'setup.py', 'stubs.py'))]
    done = run(sys.executable, '-m', 'codespell_lib', '--toml', ROOT / 'pyproject.toml', tmp_path,
               *(d for d in documents if 'lock' not in d.name))
    assert not done.stdout + done.stderr, done.stdout + done.stderr


WORKFLOWS = {path.stem: path for path in sorted((ROOT / '.github' / 'workflows').glob('*.yml'))}
flow = lambda name: yaml.safe_load(WORKFLOWS[name].read_text(encoding='utf-8'))
# of jobs; all others read
RIGHTS = {('docs', 'deploy'): {'pages': 'write', 'id-token': 'write'}, ('release', 'publish'): {'id-token': 'write'}}


@pytest.mark.parametrize('name', WORKFLOWS)
def test_workflows_use_the_targets_of_the_makefile(name):
    targets = set(re.findall(r'^([a-z]+):', (ROOT / 'Makefile').read_text(encoding='utf-8'), re.M))
    assert flow(name)['name'] == name and flow(name)[True], 'what starts it (`on`)'
    jobs = flow(name)['jobs'].values()
    steps = [step for job in jobs for step in job['steps']]
    assert all(('uses' in step) != ('run' in step) for step in steps)
    made = {word for step in steps for word in re.findall(r'make (?:\w+=\S+ )?(\w+)', step.get('run', ''))}
    assert made and made <= targets
    assert all(job['timeout-minutes'] <= (15 if name == 'test' else 350)
               for job in jobs), 'the tests are to end within a quarter of an hour, everything some time'


@pytest.mark.parametrize('name', WORKFLOWS)
def test_workflows_take_actions_by_commit(name):
    "A tag can be moved; the comment tells a reader, and Dependabot, which version the commit is."
    used = re.findall(r'uses: *(.*)', WORKFLOWS[name].read_text(encoding='utf-8'))
    no((line for line in used if not re.fullmatch(r'[\w-]+/[\w-]+@[0-9a-f]{40} +# v\d+\.\d+\.\d+', line)),
       'write owner/action@commit   # v1.2.3')


def test_an_action_has_one_version_in_all_workflows():
    pairs = {
        tuple(line.split('@')) for path in WORKFLOWS.values()
        for line in re.findall(r'uses: *(.*)', path.read_text(encoding='utf-8'))}
    assert len(pairs) == len({action for action, _ in pairs})


@pytest.mark.parametrize('name', WORKFLOWS)
def test_workflows_may_do_no_more_than_they_need(name):
    "All jobs read; those that publish may write where they publish, and run no command and check nothing out."
    assert flow(name)['permissions'] == {'contents': 'read'}
    for job, does in flow(name)['jobs'].items():
        rights = RIGHTS.get((name, job))
        assert does.get('permissions') == rights, job
        steps = does['steps']
        if rights:
            assert 'needs' in does and does['environment'] and not [
                s for s in steps if 'run' in s or 'checkout' in s['uses']]
        assert all(s['with']['persist-credentials'] is False for s in steps
                   if 'actions/checkout@' in s.get('uses', '')), 'no token stays in the checkout'
        assert 'secrets.' not in json.dumps(does)


def test_a_release_is_built_where_nothing_was_tested_or_kept():
    jobs = flow('release')['jobs']
    assert jobs['build']['needs'] == 'test' and jobs['publish']['needs'] == 'build'
    words = json.dumps(jobs['build'])
    assert 'make PYTHON=python dist' in words and 'make PYTHON=python test' not in words and 'download-artifact' not in words
    assert '"cache' not in json.dumps(jobs), 'a cache may hold what another run put there'


def test_newer_versions_are_proposed():
    bot = yaml.safe_load((ROOT / '.github' / 'dependabot.yml').read_text(encoding='utf-8'))
    assert {(u['package-ecosystem'], u['directory']) for u in bot['updates']} == {
        ('github-actions', '/'),
        ('pip', '/'),
        ('npm', '/nbs/_site'),
    }


def test_declared_versions_are_those_of_the_workflow():
    matrix = yaml.safe_load((ROOT / '.github/workflows/test.yml').read_text())['jobs']['test']['strategy']['matrix']
    settings = (ROOT / 'settings.ini').read_text(encoding='utf-8')
    assert f'min_python = {matrix["python"][0]}\npythons = {" ".join(matrix["python"])}\n' in settings
    oldest = re.search(r'\btorch>=(\S+)', settings)[1]
    assert [extra['torch'] for extra in matrix['include']] == [f'{oldest}.0', 'newest']


def test_changelog_tells_of_the_version():
    "The version of settings.ini stands in `lap_nb` and, with a date, in the changelog."
    import lap_nb
    version = re.search(r'^version = (\S+)$', (ROOT / 'settings.ini').read_text(encoding='utf-8'), re.M)[1]
    assert lap_nb.__version__ == version
    assert re.search(rf'^## \[{re.escape(version)}\] - \d{{4}}-\d\d-\d\d$',
                     (ROOT / 'CHANGELOG.md').read_text(encoding='utf-8'), re.M)


def test_each_requirement_has_its_row_in_the_guide():
    "Why each package is needed and what it costs stands in .github/MAINTAINING.md, and of no other."
    from dependencies import GUIDE, ROW, required
    assert sorted(name for name, why in ROW.findall(GUIDE.read_text(encoding='utf-8')) if why) == sorted(required())


def test_the_loss_needs_no_extra():
    """Without the packages of the extras all modules beside the laboratory import, three lines train, and what lacks a
    package names its extra."""
    code = (
        'import sys\n'
        'class Without:\n'
        '    def find_spec(self, name, path=None, target=None):\n'
        '        if name.partition(".")[0] in sys.argv[1].split(","): raise ModuleNotFoundError(f"No module named '
        '{name!r}", name=name)\n'
        'sys.meta_path.insert(0, Without())\n'
        'import importlib, torch, lap_nb as lap\n'
        'for name in sys.argv[2:]: importlib.import_module("lap_nb." + name)\n'
        'net = lap.dense_net(4, 2, K=2)\n'
        'la = lap.LeastAction(net)\n'
        'la(torch.nn.functional.cross_entropy(net(torch.randn(8, 4)), torch.arange(8) % 2)).backward()\n'
        'try: lap.digits()\n'
        'except ModuleNotFoundError as e: print(e)')
    extras = 'sklearn,ipywidgets,pandas,orjson,dask,distributed,voila,nbdev,nbformat,jupytext,pypandoc'
    said = python('-c', code, extras, *(name for name in modules() if not name.startswith('lab.')))
    assert said.strip() == "sklearn is not installed, expected it here: pip install 'lap_nb[lab]'"

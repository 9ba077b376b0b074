"""Every notebook runs from top to bottom under nbdev's runner: one case each, in a process of its own, without a
network."""
import ast
import json
import os
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from conftest import ROOT

NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
WORKERS, LIMIT = 2, 1200   # processes; seconds for each notebook
# The chapters that take longest start first, so that both cores are busy until the end.
LONG = '09_depth 05_least_action 14_own_network 04_transport 03_kinetic_bias 04a_regularity 13_guide'.split()
LOCAL = ('127.', '::1', 'localhost')
REFUSED = re.compile(r'^ImportError:\s+\w+ requires .*PyTorch', re.M)   # by transformers, at the first use of a network


def count_cells_as_modules():
    """For `make coverage`: an exported cell carries the file and the line numbers that it has in `lap_nb`, so that its
    lines count there."""
    from IPython.core.compilerop import CachingCompiler
    files = {path: path.read_text(encoding='utf-8') for path in (ROOT / 'lap_nb').rglob('*.py')}
    cache, parse, shift = CachingCompiler.cache, CachingCompiler.ast_parse, {}

    def named(self, code, *args, **kwargs):
        body = re.sub(r'\A(#\|.*\n|\s*\n)*', '', code).rstrip()
        for path, text in files.items():
            if body.count('\n') and (at := text.find(body)) >= 0:
                shift[str(path)] = text[:at].count('\n') - code[:code.index(body)].count('\n')
                return str(path)
        return cache(self, code, *args, **kwargs)

    def parsed(self, source, filename='<unknown>', *args, **kwargs):
        return ast.increment_lineno(parse(self, source, filename, *args, **kwargs), shift.get(filename, 0))

    CachingCompiler.cache, CachingCompiler.ast_parse = named, parsed


def run_here(notebook):
    "Run `notebook` in this process; addresses outside this machine are refused."
    if 'LAP_NB_COVERAGE' in os.environ: count_cells_as_modules()
    from nbdev.config import get_config
    from nbdev.test import test_nb as run_notebook

    connect = socket.socket.connect

    def connect_locally(self, address):
        if self.family != socket.AF_UNIX and not str(address[0]).startswith(LOCAL):
            raise ConnectionError(f'a notebook must run without a network, this one asked for {address[0]}')
        return connect(self, address)

    socket.socket.connect = connect_locally
    passed, _ = run_notebook(Path(notebook), skip_flags=get_config(path=ROOT).tst_flags.split(), basepath=ROOT)
    return passed


def run_forked(notebook, log):
    "Run `notebook` in this process, a fork that knows of no data folder, and write what it prints to the file `log`."
    with open(log, 'w', encoding='utf-8') as file:
        for stream in (1, 2): os.dup2(file.fileno(), stream)
    for name in ('LAP_NB_DATA', 'PYTHONPATH'): os.environ.pop(name, None)
    os.environ.update(MPLBACKEND='Agg', NO_COLOR='1')
    os.chdir(ROOT)
    import torch
    torch.set_num_threads(max(1, (os.cpu_count() or 1) // WORKERS))
    sys.exit(not run_here(notebook))


def run_apart(forked, notebook, log):
    """Run `notebook` in a process of its own, a fork of one that has imported the library already; what went wrong, or
    nothing."""
    process = forked.Process(target=run_forked, args=(notebook, log))
    process.start()
    process.join(LIMIT)
    if process.exitcode is None:
        process.kill()
        return f'was not at its end after {LIMIT} s'
    return process.exitcode and f'stopped with status {process.exitcode}'


@pytest.fixture(scope='module')
def runs(request, forked, tmp_path_factory):
    "The selected notebooks, started two at a time."
    place, logs = {name: at for at, name in enumerate(LONG)}, tmp_path_factory.mktemp('notebooks')
    selected = {item.callspec.params['notebook'] for item in request.session.items
                if item.path == Path(__file__) and hasattr(item, 'callspec')}
    order = sorted(selected, key=lambda path: (place.get(path.stem, len(LONG)), path.stem))
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {path: (pool.submit(run_apart, forked, path, logs / path.stem), logs / path.stem) for path in order}


def test_cells_can_be_told_apart_and_jupyter_asks_for_no_kernel():
    for path in NOTEBOOKS:
        notebook = json.loads(path.read_text(encoding='utf-8'))
        ids = [cell['id'] for cell in notebook['cells']]
        assert len(set(ids)) == len(ids) and notebook['metadata']['kernelspec']['name'] == 'python3', path.name


def test_nothing_is_lost_beside_a_title():
    "nbdev takes title, description and keywords from the first Markdown cell, and leaves out what else stands there."
    for path in NOTEBOOKS:
        cells = json.loads(path.read_text(encoding='utf-8'))['cells']
        title = next(''.join(c['source']) for c in cells if c['cell_type'] == 'markdown')
        lost = [line for line in title.split('\n')[1:] if line.strip() and not line.startswith(('> ', '- keywords: '))]
        assert title.startswith('# ') and not lost, f'{path.name}: {lost}'


def test_no_notebook_is_heavy():
    heavy = {path.name: size for path in NOTEBOOKS if (size := path.stat().st_size) >= 500 * 1024}
    assert not heavy, f'bytes: {heavy}; save smaller pictures, or move what is no lesson elsewhere'


def markdown(path):
    cells = json.loads(path.read_text(encoding='utf-8'))['cells']
    return [''.join(c['source']) for c in cells if c['cell_type'] == 'markdown']


@pytest.fixture
def statements(monkeypatch):
    "The names of the page of statements, made anew, and what it shows."
    monkeypatch.chdir(ROOT / 'nbs')
    cells = json.loads(Path('17_statements.ipynb').read_text(encoding='utf-8'))['cells']
    code = [cell for cell in cells if cell['cell_type'] == 'code']
    names = {'__name__': 'page'}   # of the module that a NamedTuple belongs to
    for cell in code: exec(''.join(cell['source']), names)
    return names, ''.join(code[-1]['outputs'][0]['data']['text/markdown'])


def test_statements_are_those_of_the_chapters(statements):
    "That each has a check, the page asserts itself."
    names, saved = statements
    assert '\n'.join(names['pages']()) == saved, 'run nbs/_site/execute.py nbs/17_statements.ipynb'


def test_a_statement_is_read_with_its_hypotheses_its_proof_and_its_checks(statements, tmp_path):
    text = '## Somewhere\n\nWords.\n\n**Theorem 3.1 (one).** Let $a$ be\n\n$$a = b .$$\n\n*Proof.* Clear.\n\n'
    text += '**Definition 3.2 (two).** It is\n\n$$c ,$$\n\nwhich is nice.\n\nNo part of it.'
    code = ['# checks theorem 3.1 and definition 3.3\nassert a', 'assert b']
    cells = [{'cell_type': 'markdown', 'source': [text]}, *({'cell_type': 'code', 'source': [c]} for c in code)]
    (tmp_path / '03_x.ipynb').write_text(json.dumps({'cells': cells}), encoding='utf-8')
    one, two = statements[0]['statements'](tmp_path / '03_x.ipynb')
    assert (one.text, one.proved, one.section, one.checks) == ('Let $a$ be\n\n$$a = b .$$', True, 'Somewhere', (code[0],))
    assert (two.text, two.proved, two.checks) == ('It is\n\n$$c ,$$\n\nwhich is nice.', False, ())


def test_what_is_referred_to_by_number_is_there():
    "Theorems of the book (those of other books follow a title in italics) and equations."
    texts = {path.name: '\n'.join(markdown(path)) for path in NOTEBOOKS}
    blocks = set(re.findall(r'\*\*(?:Definition|Theorem) (\d+[a-z]?\.\d+) \(', '\n'.join(texts.values())))
    assert len(blocks) > 30
    for name, text in texts.items():
        said = re.findall(r'(?<!\*, )\b(?:theorem|definition)s? (\d+[a-z]?\.\d+)', text, re.I)
        assert not (lost := set(said) - blocks), f'{name}: there is no theorem {lost}'
        tags = re.findall(r'\\tag\{([^}]*)\}', text)
        chapter = name.partition('_')[0].lstrip('0')
        said = re.findall(rf'\(({re.escape(chapter)}\.[1-9]\d?)\)', text) if chapter and tags else []
        assert not (lost := set(said) - set(tags)), f'{name}: there is no equation {lost}'
        assert len(tags) == len(set(tags)), f'{name}: a tag stands at two equations'


NUMBERED = r'(?:figures?|tables?|equations?|formulas?|inequalit(?:y|ies)|pictures?|plots?|panels?|diagrams?|curves?)'
AWAY = re.compile(rf'\b{NUMBERED}\b[^.,;:|]{{0,25}}\b(?:above|below)\b|\b(?:above|below)\b[^.,;:|]{{0,12}}\b{NUMBERED}\b'
                  r'|\[(?:above|below)\]\(|\(\d+[a-z]?\.\d+\) (?:above|below)', re.I)


def test_a_vague_reference_is_found():
    vague = 'The table below shows', 'see ([above](#there))', 'by (4.2) above', 'the above figure'
    assert all(map(AWAY.search, vague)) and not AWAY.search('The curve rises, and the loss is above it.')


def test_no_figure_table_or_equation_is_above_or_below():
    "They are named, numbered or linked, for a page may be folded or read in parts."
    vague = [(path.name, found[0]) for path in NOTEBOOKS for text in markdown(path) for found in AWAY.finditer(text)]
    assert not vague, vague


def test_there_are_notebooks():
    assert NOTEBOOKS, f'no notebook found in {ROOT / "nbs"}'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(request, runs, notebook):
    fault, log = runs[notebook]
    if not fault.result(): return
    said = log.read_text(encoding='utf-8')
    if REFUSED.search(said): request.getfixturevalue('transformers')   # skips if it refuses this PyTorch
    pytest.fail(f'{notebook.name} {fault.result()}\n{said[-8000:]}', pytrace=False)

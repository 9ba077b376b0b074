"""Records that survive kills, doubles and damage; studies in several processes and on Dask; the promises about bad
input."""
import errno
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
from contextlib import suppress
from dataclasses import replace
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import ttest_rel

import lap_nb
from lap_nb.data import digits
from lap_nb.lab import catalogue, cli, nets, run, store
from lap_nb.lab.analysis import decide_together, edge_of, load_records, overview, Records, standings, verdict
from lap_nb.lab.catalogue import load_study
from lap_nb.lab.design import Cell, checksum, Grid, Method, Net, Schedule, Study
from lap_nb.lab.nets import make_net
from lap_nb.lab.run import dataset, run_cell, run_study
from lap_nb.lab.store import append_rows, done, read_lines
from lap_nb.nets import SkipInit, StochasticDepth
from lap_nb.stats import confidence_interval, Interval

ROOT = Path(__file__).resolve().parents[1]
SMALL = dict(net=Net(K=2, width=8), schedule=Schedule(steps=6, points=2))
METHODS = (Method('default'), Method('small', init='orthogonal',
                                     gain=.1), Method('least', least_action=dict(lambda0=1., tau=1.)))
TINY = Study('tiny', 'Is no row lost?', (Grid(('circles',), (20, 30), METHODS, seeds=3, **SMALL),))
WANTED = {(cell.config, seed) for cell, seeds in TINY.cells() for seed in range(seeds)}


def written(path):
    "The networks of a record, each once, or the test fails."
    rows = [(line['config'], line['seed']) for line in read_lines(path) if 'seed' in line]
    assert len(rows) == len(set(rows))
    return set(rows)


@pytest.fixture
def registered(monkeypatch):
    monkeypatch.setitem(catalogue.STUDIES, 'tiny', lambda scale: replace(TINY, scale=scale))


# Descriptions.

def test_fingerprint_sees_every_change_and_no_more():
    cell = Cell('circles', 20, METHODS[0])
    others = [
        replace(cell, n=21),
        replace(cell, data='moons'),
        replace(cell, version=2),
        replace(cell, measures=('transport',)),
        replace(cell, net=Net(K=8)),
        replace(cell, schedule=Schedule(steps=501)),
        replace(cell, method=Method('default', h=.5)),
        replace(cell, method=METHODS[2]),
        replace(cell, method=Method('least', least_action=dict(lambda0=1., tau=2.)))]
    assert len({c.config for c in [cell, *others]}) == 10
    assert cell.config == Cell('circles', 20, Method('default', h=1.), Net(), Schedule(steps=500)).config
    # which was written otherwise when the first records were made
    schedule = Schedule(others=dict(optimizer='sgd', crop=2))
    assert replace(cell, data='digits', method=Method('default'), schedule=schedule).config == '5febd75a98db'
    assert Method('m', least_action=dict(tau=1.0, lambda0=2.0)) == Method(
        'm', least_action=(('lambda0', 2.0), ('tau', 1.0))
    )


@pytest.mark.parametrize('make, message', [
    (lambda: Grid(('circles',), (20,), ()), 'methods of a grid is empty'),
    (lambda: Grid((), (20,), METHODS), 'data of a grid is empty'),
    (lambda: Grid(('circles',), (20,), METHODS, seeds=1), 'at least 2'),
    (lambda: Study('s', '?', ()), 'no grid'),
    (lambda: Study('s', '?', (Grid(('circles',), (20, 20), METHODS),)), 'cells twice: circles/20'),
    (lambda: Study('s', '?', (Grid(('circles',), (20,), METHODS), Grid(('circles',), (20,), METHODS[:1]))), 'cells twice'),
    (lambda: Method('m', init='he'), "init of m is 'he'"),
    (lambda: load_study('kinetics'), "no study 'kinetics'; there are kinetic-bias"),
    (lambda: load_study('kinetic-bias', 'tpu'), 'expected cpu or gpu'),
    (lambda: TINY.cells('digits/*'), "no cell of tiny matches 'digits/*'; the first of its 6 cells is circles/20/"),
    (lambda: dataset('circles:nose=1'), 'asks for nose'),
    (lambda: dataset('ellipses'), "no data set 'ellipses'"),
])
def test_bad_descriptions(make, message):
    with pytest.raises(ValueError, match=re.escape(message)): make()


@pytest.mark.parametrize('name', catalogue.STUDIES)
@pytest.mark.parametrize('scale', ['cpu', 'gpu'])
def test_every_study_is_sound(name, scale):
    "Names are unique (checked as it is made), every cell names measures and networks that exist."
    for cell, seeds in load_study(name, scale).cells():
        assert seeds >= 2 and set(cell.measures) <= set(run.MEASURES) and cell.net.kind in nets.NETS
        assert cell.data.partition(':')[0] in 'circles moons digits mnist fashion_mnist cifar10_part'.split()


@pytest.mark.parametrize('kind', nets.NETS)
def test_every_network_takes_every_method(kind):
    "Each way to start and to run that some study asks of this kind of network, in small."
    asked = {(m.init, m.skip_init, m.h, bool(m.drop)) for name in catalogue.STUDIES for scale in ('cpu', 'gpu')
             for cell, _ in load_study(name, scale).cells() if cell.net.kind == kind for m in [cell.method]}
    assert asked
    for init, skip_init, h, drop in sorted(asked):
        net = make_net(Net(kind, 6, 8), Method('m', init=init, skip_init=skip_init, h=h, drop=.5 * drop), (3, 8, 8), 10)
        assert net(torch.rand(4, 3, 8, 8)).shape == (4, 10)
        assert (
            any(isinstance(m, StochasticDepth) for m in net.modules()) == drop
            and any(isinstance(m, SkipInit) for m in net.modules()) == skip_init
        )


@pytest.mark.parametrize('name', ['mnist-low-data', 'fashion-low-data', 'cifar-low-data', 'cifar-large'])
def test_rivals_have_the_same_budget(name):
    """At the scale of a GPU: on each data set, size and network eight families, three candidates in each, least action
    among them."""
    groups = {}
    for cell, _ in load_study(name, 'gpu').cells():
        groups.setdefault((cell.data, cell.n, cell.net), []).append(cell.method)
    for methods in groups.values():
        families = [m.family or m.name for m in methods if m.name != 'published']
        assert {family: families.count(family) for family in families} == dict.fromkeys(
            'default small-gain skip-init h-0.1 weight-decay stochastic-depth label-smoothing least-action'.split(), 3)


def test_flipped_labels_leave_the_test_part_alone():
    noisy, clean = dataset('digits:flip=0.4'), digits()
    changed = noisy.y != clean.y
    assert changed.sum() == round(.4 * len(clean.pool)) and not changed[clean.test].any()


def test_methods_start_where_they_say():
    """A zero-initialised branch and gain 0 do not move; the normal initialisation has the stated deviation; dropping is
    for training only."""
    x = torch.randn(50, 16)
    for method in (Method('skip', skip_init=True), Method('zero', init='orthogonal', gain=0.)):
        assert (make_net(Net(K=3), method, (16,), 2).trajectory(x).x == x).all()
    net = make_net(Net(width=400), Method('normal', init='normal', gain=.5), (100,), 2)
    torch.testing.assert_close(net.flow.blocks[0].velocity[0].weight.std().item(), .05, rtol=.02, atol=0)
    dropped = make_net(Net(K=2), Method('drop', drop=.5), (16,), 2)
    assert (dropped.train()(x) != dropped(x)).any() and (dropped.eval()(x) == dropped(x)).all()


# One cell.

def test_a_seed_does_not_depend_on_its_company():
    "A resumed study may train a seed with other seeds than before, or alone."
    cell, _ = TINY.cells('circles/30/*/least')[0]
    _, together = run_cell(cell, [0, 1, 2])
    _, (alone,) = run_cell(cell, [1])
    for key in ('test_accuracy_last', 'energy_per_sample', 'straightness', 'lambda', 'task_loss'):
        torch.testing.assert_close(together[1][key], alone[key], rtol=1e-4, atol=1e-6)


def test_divergence_is_a_result(tmp_path):
    "Loss beyond all bounds gives rows that say so, and statistics that refuse them."
    grid = Grid(('circles',), (20,), (Method('wild', lr=1e30),), seeds=2, **SMALL)
    run_study(Study('wild', '?', (grid,)), tmp_path, device='cpu')
    rows = [line for line in read_lines(tmp_path / 'wild.jsonl') if 'seed' in line]
    assert [row['diverged'] for row in rows] == [True, True]
    with pytest.raises(ValueError, match='finite'): Records(rows, {}).confidence_interval()


# Records.

NOTE = dict(config='c', cell='c', lap_nb='0', device='cpu', device_name='x', threads=1, device_seconds=1.,
            settings=dict(method=dict(name='m')))
COLUMNS = dict(study='tiny', scale='cpu', data='circles', n=20, net='dense', method='m')


def test_columns_that_readers_rely_on(tmp_path, registered):
    run_study(TINY, tmp_path, device='cpu')
    row = load_records('tiny', tmp_path).where(method='least', n=30).rows[0]
    for key in ('study data n method init gain seed test_accuracy_last test_accuracy_best val_accuracy_last '
                'energy_per_sample '
                'energy_per_block straightness lambda task_loss diverged').split(): assert key in row
    assert len(row['energy_per_block']) == 2 and row['lambda'] > 1 and row['K'] == 2
    torch.testing.assert_close(sum(row['energy_per_block']), row['energy_per_sample'], rtol=1e-4, atol=0)
    run = load_records('tiny', tmp_path).runs[row['run']]
    for key in 'device device_name cores modes torch commit config wall_seconds device_seconds format settings'.split():
        assert key in run
    assert written(tmp_path / 'tiny.jsonl') == WANTED
    assert run_study(TINY, tmp_path, device='cpu') == 0


def test_half_a_line_is_repaired(tmp_path):
    path = tmp_path / 'r.jsonl'
    append_rows(path, NOTE, [dict(seed=s) for s in range(3)], COLUMNS)
    whole = path.read_bytes()
    end = len(whole) - len(whole.splitlines()[-1]) - 1
    for cut in (end + 1, end + 10, len(whole) - 1):
        path.write_bytes(whole[:cut])
        assert {s for _, s in done(path)} == {0, 1}
        assert append_rows(path, NOTE, [dict(seed=s) for s in range(3)], COLUMNS) == 1
        assert written(path) == {('c', s) for s in range(3)}


def test_damage_is_named(tmp_path):
    path = tmp_path / 'r.jsonl'
    append_rows(path, NOTE, [dict(seed=s, test_accuracy_last=.5) for s in range(3)], COLUMNS)
    whole = path.read_text()
    path.write_text(whole.replace('0.5', '0.9', 1))
    with pytest.raises(ValueError, match='line 2 of r.jsonl was altered'): read_lines(path)
    path.write_text(whole.replace('{"study"', '"study"', 1))
    with pytest.raises(ValueError, match='line 2 of r.jsonl is not JSON'): read_lines(path)
    value = json.loads(whole.splitlines()[0]) | dict(format=99)
    value.pop('sha')
    path.write_text(store._line(value))
    with pytest.raises(ValueError, match='format 99, expected 1'): read_lines(path)
    with pytest.raises(ValueError, match='format 99'): append_rows(path, NOTE, [dict(seed=5)], COLUMNS)


def three(path, **note):
    "A record of three rows, as lines: the run and its rows."
    append_rows(path, NOTE | note,
                [dict(seed=s, test_accuracy_last=s / 4, energy_per_block=[1., 2.]) for s in range(3)], COLUMNS)
    return path.read_bytes().splitlines(keepends=True)


@pytest.mark.parametrize('order', ['AA', 'AAA', 'ABAB', 'ABCA', 'BACB'])
def test_rows_that_a_merge_doubled_are_taken_once(order, tmp_path):
    "Line by line merges of branches with the same rows, whatever their order."
    parts = {name: three(tmp_path / name, config=name) for name in 'ABC'}
    (tmp_path / 'r.jsonl').write_bytes(b''.join(line for name in order for line in parts[name]))
    with pytest.warns(
            UserWarning,
            match=rf'r.jsonl says {4 * (len(order) - len(set(order)))} things twice.* repeats line \d') as told:
        lines = read_lines(tmp_path / 'r.jsonl')
    assert len(told) == 1
    rows = [line for line in lines if 'seed' in line]
    assert [(row['config'], row['seed']) for row in rows] == [
        (name, seed) for name in dict.fromkeys(order) for seed in range(3)]
    assert len(lines) == 4 * len(set(order)) and Records(rows, {}).where(config='A').confidence_interval().n == 3


@pytest.mark.parametrize('name, value', [('test_accuracy_last', .9), ('energy_per_block', [1., 2., 3.]), ('method', 'other'), ('new', None), ('new', 1)])
def test_rows_that_contradict_each_other_are_named(name, value, tmp_path):
    path = tmp_path / 'r.jsonl'
    lines = three(path)
    other = store._parsed(lines[2], '') | {name: value}
    path.write_bytes(b''.join(lines) + store._line(other).encode())
    for read in (read_lines, done):
        if value is None: continue
        with pytest.raises(
                ValueError,
                match=rf'lines 3 and 5 of r.jsonl contradict each other: of circles/20/dense/\w+, seed 1, one has '
                      rf'{name} .*Keep one of the two'
        ):
            read(path)
    note = store._parsed(lines[0], '') | dict(threads=7)
    path.write_bytes(b''.join(lines) + store._line(note).encode())
    with pytest.raises(ValueError, match='lines 1 and 5 .* of the run .* one has threads 1, the other 7'):
        read_lines(path)


def test_the_same_numbers_from_two_runs_are_one_row(tmp_path):
    "Two machines did the same work, and their records were put together."
    a, b = three(tmp_path / 'a'), three(tmp_path / 'b')
    assert a[0] != b[0]
    (tmp_path / 'r.jsonl').write_bytes(b''.join(a + b))
    with pytest.warns(UserWarning, match='says 3 things twice'):
        rows = [line for line in read_lines(tmp_path / 'r.jsonl') if 'seed' in line]
    assert [row['run'] for row in rows] == [store._parsed(a[0], '')['id']] * 3


def sealed(value, sort):
    "A line under a checksum that fits: of its bytes, or as lines of before have it, of its values."
    if not sort: return store._line(value).encode()
    return (json.dumps(value | {'sha': checksum(value)}, separators=(',', ':')) + '\n').encode()


def changed_line(line, key, value, sort):
    return sealed({k: v for k, v in json.loads(line).items() if k != 'sha'} | {key: value}, sort)


@pytest.mark.parametrize('sort', [False, True])
@pytest.mark.parametrize('at, key, value, says', [
    (0, 'format', True, 'format True, expected 1'), (0, 'format', 1.0, 'format 1.0, expected 1'), (0, 'format', 2, 'format 2, expected 1'), (0, 'format', None, 'format None'),
    (0, 'threads', False, 'lacks threads'), (0, 'threads', -1, 'lacks threads'), (0, 'threads', 2 ** 63, 'lacks threads'), (0, 'threads', '1', 'lacks threads'),
    (0, 'device_seconds', True, 'lacks device_seconds'), (0, 'device_seconds', -1., 'lacks device_seconds'), (0, 'settings', {}, 'lacks settings.method.name'),
    (2, 'seed', -1, 'lacks seed'), (2, 'seed', 10 ** 400, 'lacks seed'), (2, 'seed', 2 ** 63, 'lacks seed'), (2, 'seed', True, 'lacks seed'), (2, 'seed', 1., 'lacks seed'),
    (2, 'seed', '1', 'lacks seed'), (2, 'seed', None, 'lacks seed'), (2, 'n', -20, 'lacks n'), (2, 'n', False, 'lacks n'), (2, 'n', 10 ** 400, 'lacks n'),
    (2, 'method', 3, 'lacks method'), (2, 'config', None, 'lacks config')])
def test_lines_of_the_wrong_kind_are_refused_by_their_number(at, key, value, says, sort, tmp_path, monkeypatch):
    monkeypatch.setattr(store, 'as_json', lambda value: value)   # a writer that lets everything pass
    path = tmp_path / 'r.jsonl'
    lines = three(path)
    lines[at] = changed_line(lines[at], key, value, sort)
    path.write_bytes(b''.join(lines))
    for read in (read_lines, done):
        with pytest.raises(ValueError, match=f'line {at + 1} of r.jsonl .*{re.escape(says)}'): read(path)


@pytest.mark.parametrize('at, old, new', [
    (2, b'"seed":1,', b'"seed":1,"seed":1,'), (2, b'"seed":1,', b'"seed":0,"seed":1,'), (2, b'"seed":1,', b'"seed" :0,"seed":1,'), (2, b'"seed":1,', b'"\\u0073eed":0,"seed":1,'),
    (2, b'{"study"', b'{"note":{"a":1,"a":2},"study"'), (2, b'{"study"', b'{"note":[{"a":1,"a":2}],"study"'), (0, b'{"name":"m"}', b'{"name":"o","name":"m"}'),
    (0, b'"format":1,', b'"format":1,"format":1,'), (2, b'{"study"', b'{"x":NaN,"study"'), (2, b'{"study"', b'{"x":1e999,"study"'), (2, b'{"study"', b'{"x":-Infinity,"study"')])
@pytest.mark.parametrize('sort', [False, True])
def test_what_json_forbids_is_refused_by_the_number_of_its_line(at, old, new, sort, tmp_path):
    path = tmp_path / 'r.jsonl'
    lines = three(path)
    assert old in lines[at]
    body = lines[at].rstrip()[:-22].replace(old, new, 1)
    sha = checksum(json.loads(body + b'}')) if sort else store._sha(body)
    lines[at] = body + b',"sha":"%s"}\n' % sha.encode()
    path.write_bytes(b''.join(lines))
    with pytest.raises(ValueError, match=f'line {at + 1} of r.jsonl is not JSON'): read_lines(path)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2 ** 63 + 1, 2 ** 63 - 1)
    | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3), max_leaves=6)


@given(st.dictionaries(st.text(max_size=6).filter(lambda k: k not in ('kind', 'id', 'sha', *store._ROW)), JSON, max_size=4), st.booleans(), st.sampled_from([None, (', ', ': '), (',', ' : ')]))
@settings(max_examples=150, deadline=None)
def test_a_glance_sees_what_a_close_look_does(more, sort, spaces):
    "Rows with any columns, in any spacing, with checksums of both kinds: the same values, or both refuse."
    row = dict(COLUMNS, run='r', config='c', seed=3, **more)
    line = sealed(store.as_json(row), sort).rstrip()
    if spaces: line = json.dumps(json.loads(line), separators=spaces).encode()
    assert store._parsed(line, '') == store.as_json(row)
    (quick,) = store._at_a_glance([line])
    assert quick is None or quick == store.as_json(row)
    assert quick is not None or sort or spaces or more


def test_most_lines_are_read_at_a_glance():
    "All that `append_rows` writes, runs of a study among them: reading quickly rests on it."
    for path in (ROOT / 'nbs' / 'results').glob('*-low-data.jsonl'):
        lines = path.read_bytes().splitlines()
        assert None not in store._at_a_glance(lines) and store._at_a_glance(lines[:3]) == [
            store._parsed(line, '') for line in lines[:3]]


def test_a_line_of_two_objects_is_found(tmp_path):
    "Taken together, the lines hold as many objects as there are lines."
    path = tmp_path / 'r.jsonl'
    lines = [line.rstrip() for line in three(path)]
    path.write_bytes(b'\n'.join([lines[0] + b',' + lines[1], lines[2][:40], lines[2][40:], lines[3], b'']))
    with pytest.raises(ValueError, match='line 1 of r.jsonl is not JSON'): read_lines(path)


@pytest.mark.parametrize('row, says', [(dict(seed=-1), 'seed of a row is -1'), (dict(seed=10 ** 400), 'seed of a row is a whole number of 1329 bits'), (dict(seed=True), 'has the seed True'),
                                       (dict(seed=1.), 'has the seed 1.0'), (dict(seed=0, x=2 ** 63), 'expected one below 2'), (dict(seed=0, x={1: 2}), 'found the key 1, expected a name')])
def test_what_could_not_be_read_is_not_written(row, says, tmp_path):
    with pytest.raises((ValueError, TypeError), match=says): append_rows(tmp_path / 'r.jsonl', NOTE, [row], COLUMNS)
    for columns in (dict(n=-1), dict(n=True), dict(method=3)):
        with pytest.raises(ValueError, match=f'{next(iter(columns))} is .*no record holds that'):
            append_rows(tmp_path / 'r.jsonl', NOTE, [dict(seed=0)], COLUMNS | columns)
    for note in (dict(threads=True), dict(device_seconds=-1.), dict(settings=dict(net=3, method=dict(name='m')))):
        with pytest.raises(ValueError, match='no record holds that'):
            append_rows(tmp_path / 'r.jsonl', NOTE | note, [dict(seed=0)], COLUMNS)
    assert not (tmp_path / 'r.jsonl').exists()


def test_a_frame_of_rows_and_back(tmp_path):
    "Rows come back as plain values; what one lacks is None in it, and NaN among numbers."
    rows = [
        dict(data='a', n=1, seed=0, gain=None, x=1., found=[1, 2]),
        dict(data='a', n=1, seed=1, gain=.1, x=None, diverged=True)]
    found = Records(rows, {})
    assert (
        found.rows == [row | {k: row.get(k) for k in ('gain', 'x', 'found', 'diverged')} for row in rows]
        and Records(found.frame, {}).rows == found.rows
    )
    assert [list(group.values('seed')) for group in found.by('gain').values()] == [[0], [1]] and list(
        found.by('gain', 'n')
    ) == [(None, 1), (0.1, 1)]
    assert (
        len(found.where(gain=None)) == len(found.where(gain=[0.1, 5])) == 1
        and len(found.where(gain=[None, 0.1])) == 2
        and all(type(r['seed']) is int for r in found.rows)
    )
    assert (
        found.values('x').isnan().tolist() == [False, True] and not len(found.where(n=2)) and len(Records([], {})) == 0
    )
    for column in ('data', 'found'):
        with pytest.raises(ValueError, match=f'{column} is no column of numbers'): found.values(column)
    with pytest.raises(ValueError, match='no column'): Records([dict(x=10 ** 400)], {}).values('y')
    with pytest.raises(ValueError, match='x is no column of numbers'): Records([dict(x=10 ** 400)], {}).values('x')


def test_an_append_reads_what_was_added_and_no_more(tmp_path, monkeypatch):
    "Counted, not timed: bytes looked through and lines parsed, in records of 30 and 3,000 rows."
    counts = {}
    original, parse = store._networks, store._parsed
    monkeypatch.setattr(
        store, '_networks', lambda lines, *where:
        (counts.update(bytes=counts['bytes'] + len(lines)), original(lines, *where))[1])
    monkeypatch.setattr(store, '_parsed', lambda *args: (counts.update(lines=counts['lines'] + 1), parse(*args))[1])
    cost = {}
    for n in (30, 3000):
        path = tmp_path / f'{n}.jsonl'
        counts.update(bytes=0, lines=0)
        append_rows(path, NOTE, [dict(seed=s) for s in range(n)], COLUMNS)
        for k in range(5):
            assert append_rows(path, NOTE | dict(config=f'c{k}'), [dict(seed=s) for s in range(3)], COLUMNS) == 3
            if k == 0: counts.update(bytes=0, lines=0)                      # the first time all is looked through
        cost[n] = counts['lines'], counts['bytes']
        assert append_rows(path, NOTE | dict(config='c3'), [dict(seed=s) for s in range(4)], COLUMNS) == 1
        assert len(written(path)) == n + 16
    assert cost[30] == cost[3000] and cost[30][0] == 4


@given(st.lists(st.sampled_from(['append', 'others', 'half', 'cut', 'replace', 'delete', 'rewrite', 'spaces']), max_size=8))
@settings(max_examples=40, deadline=None)
def test_what_a_writer_has_seen_does_not_mislead_it(steps):
    "Whatever others do to a file between two appends: each append finds what a fresh look would find."
    folder = Path(tempfile.mkdtemp())
    try:
        path = folder / 'r.jsonl'
        for k, step in enumerate(['append', *steps]):
            lines = (
                [line for line in path.read_bytes().splitlines(keepends=True) if line.endswith(b'\n')]
                if path.exists()
                else []
            )
            if step == 'others': path.write_bytes(b''.join(lines + three(folder / f'{k}', config=f'o{k}')))
            if step == 'half': path.write_bytes(b''.join(lines) + b'{"study":"tiny","half')
            if step == 'cut': path.write_bytes(b''.join(lines[:-1]))
            if step == 'replace': (folder / 'new').write_bytes(b''.join(lines[:4])); (folder / 'new').replace(path)
            if step == 'delete': path.unlink(missing_ok=True)
            if step == 'rewrite': path.write_bytes(b''.join(reversed(lines)))
            if step == 'spaces':
                path.write_bytes(b''.join(json.dumps(json.loads(line)).encode() + b'\n' for line in lines))
            fresh = store._Index(path.absolute()).look()
            assert store.networks_in(path) == fresh
            new = append_rows(path, NOTE | dict(config=f'c{k % 3}'), [dict(seed=s) for s in range(2)], COLUMNS)
            assert new == 2 - len({(f'c{k % 3}', s) for s in range(2)} & fresh)
            assert len(re.findall(rb'"config": ?"c%d", ?"seed"' % (k % 3), path.read_bytes())) == 2
    finally: shutil.rmtree(folder)


def full(*calls):
    "`os.fsync` on a disk that is full at these calls."
    count = itertools.count()
    def fsync(file):
        if next(count) in calls: raise OSError(errno.ENOSPC, 'No space left on device')
    return fsync


def test_a_full_disk_is_named_and_the_other_cells_are_tried(tmp_path, monkeypatch):
    path, ran, original = tmp_path / 'tiny.jsonl', [], run.run_cell
    monkeypatch.setattr(run, 'run_cell', lambda cell, *args: (ran.append(cell.name), original(cell, *args))[1])
    run_study(TINY, tmp_path, device='cpu', only='*/20/*/default')
    before = path.read_bytes()
    with monkeypatch.context() as patched:
        patched.setattr(os, 'fsync', full(*range(1000)))
        with pytest.raises(
                RuntimeError,
                match=rf'5 cells failed.*No space left on device; make room on that disk.*{re.escape(str(path))}'):
            run_study(TINY, tmp_path, device='cpu')
        with pytest.raises(OSError, match='No space left on device; make room') as error:
            append_rows(path, NOTE, [dict(seed=5)], COLUMNS)
        assert error.value.errno == errno.ENOSPC and error.value.filename == str(path)
    assert path.read_bytes() == before and ran == [
        cell.name for cell, _ in sorted(TINY.cells(), key=lambda c: c[0].name != ran[0])]
    assert run_study(TINY, tmp_path, device='cpu') == 15 and written(path) == WANTED


def test_what_a_full_disk_refused_is_written_when_there_is_room(tmp_path, monkeypatch):
    monkeypatch.setattr(os, 'fsync', full(1, 2))
    assert run_study(TINY, tmp_path, device='cpu') == 18 and written(tmp_path / 'tiny.jsonl') == WANTED


def test_half_of_a_write_is_taken_back(tmp_path, monkeypatch):
    path = tmp_path / 'r.jsonl'
    three(path)
    before = path.read_bytes()
    monkeypatch.setattr(os, 'fsync', full(0))
    with pytest.raises(OSError): append_rows(path, NOTE | dict(config='d'), [dict(seed=s) for s in range(9)], COLUMNS)
    assert path.read_bytes() == before
    assert append_rows(path, NOTE | dict(config='d'), [dict(seed=s) for s in range(9)], COLUMNS) == 9


@pytest.mark.parametrize('number', [errno.ENOLCK, errno.ENOTSUP])
def test_a_disk_without_locks_is_named(number, tmp_path, monkeypatch):
    def flock(*args): raise OSError(number, os.strerror(number))
    monkeypatch.setattr('fcntl.flock', flock)
    monkeypatch.setattr(run, 'run_cell', lambda *args: pytest.fail('it trained'))
    with pytest.raises(RuntimeError, match=rf'6 cells failed.*has no locks.*{re.escape(str(tmp_path))}'):
        run_study(TINY, tmp_path, device='cpu')
    with pytest.raises(OSError, match='has no locks') as error:
        append_rows(tmp_path / 'r.jsonl', NOTE, [dict(seed=5)], COLUMNS)
    assert error.value.errno == number and not list(tmp_path.glob('*.jsonl'))


def test_a_record_is_a_file(tmp_path):
    (tmp_path / 'r.jsonl').mkdir()
    for use in (read_lines, lambda path: append_rows(path, NOTE, [dict(seed=0)], COLUMNS)):
        with pytest.raises(OSError, match='is not a file, expected a record'): use(tmp_path / 'r.jsonl')


def test_versions_in_one_table_are_told():
    rows = [dict(data='a', n=1, net='d', method='m', seed=s, scale='cpu', run=str(s % 2)) for s in range(4)]
    run = dict(device='cpu', device_name='x', threads=1, epochs=3, torch='2.13.0')
    same, mixed = (Records(rows, {'0': run | dict(lap_nb='0.1.0'), '1': run | dict(lap_nb=other)})
                   for other in ('0.1.0', '0.2.0'))
    assert same.versions == ['lap_nb 0.1.0 with torch 2.13.0'] and 'version' not in repr(same) + same.caption
    for text in (repr(mixed), mixed.caption):
        assert text.endswith('; several versions: lap_nb 0.1.0 with torch 2.13.0, lap_nb 0.2.0 with torch 2.13.0')
    assert 'version' not in mixed.where(run='1').caption


def test_stale_rows_are_kept_but_not_read(tmp_path, registered, monkeypatch):
    run_study(TINY, tmp_path, device='cpu', only='*/default')
    monkeypatch.setitem(catalogue.STUDIES, 'tiny', lambda scale: replace(TINY, scale=scale, version=2))
    assert len(load_records('tiny', tmp_path)) == 0 and len(load_records('tiny', tmp_path, stale=True)) == 6
    row = next(r for r in overview(tmp_path) if (r['study'], r['scale']) == ('tiny', 'cpu'))
    assert (row['networks'], row['recorded'], row['stale']) == (18, 0, 6)


def test_reading(tmp_path, registered):
    with pytest.raises(FileNotFoundError, match='lap_study tiny'): load_records('tiny', tmp_path)
    run_study(TINY, tmp_path, device='cpu')
    found = load_records('tiny', tmp_path)
    a, b = found.where(method='least'), found.where(method='default')
    gap = a.advantage(b)
    both = {(r['n'], r['seed']): r['test_accuracy_last'] for r in b.rows}
    mean = sum(100 * (r['test_accuracy_last'] - both[r['n'], r['seed']]) for r in a.rows) / 6
    torch.testing.assert_close(gap.mean, mean)
    with pytest.raises(ValueError, match='do not pair'): a.advantage(b.where(n=20))
    with pytest.raises(ValueError, match='no column nn'): found.where(nn=1)
    tuned = found.tuned()
    assert len(tuned) == 18 # every family has one candidate
    merged = Records([row | dict(family='one') for row in found.rows], found.runs).tuned()
    for n in (20, 30):
        best = max(found.where(n=n).by('method').values(), key=lambda r: r.values('val_accuracy_last').mean())
        assert merged.where(n=n).rows[0]['method'] == best.rows[0]['method'] and len(merged.where(n=n)) == 3


@pytest.mark.parametrize('options, message', [
    (dict(seeds=[0, 1, 0]), r'seeds \[0\] are given twice'), (dict(seeds=[]), 'seeds is empty'),
    (dict(device='cuda:7'), 'no device'), (dict(only='moons/*'), 'no cell'), (dict(scheduler='tcp://127.0.0.1:9'), 'no Dask scheduler'),
    (dict(scheduler='nonsense'), 'no Dask scheduler')])
def test_bad_runs_write_nothing(tmp_path, options, message, monkeypatch):
    monkeypatch.setattr(run, 'PATIENCE', '1s')
    with pytest.raises((ValueError, OSError), match=message): run_study(TINY, tmp_path, **options)
    assert not (tmp_path / 'tiny.jsonl').exists()


def test_missing_data_is_said_before_any_work(tmp_path):
    both = Study('both', '?', (Grid(('circles', 'mnist'), (20,), METHODS[:1], seeds=2, **SMALL),))
    with pytest.raises(FileNotFoundError, match='LAP_NB_DATA'):
        run_study(both, tmp_path, device='cpu', root=str(tmp_path))
    assert not (tmp_path / 'both.jsonl').exists()
    assert run_study(both, tmp_path, device='cpu', root=str(tmp_path), only='circles/*') == 2


def test_no_cell_is_finished_on_another_device(tmp_path, monkeypatch):
    run_study(TINY, tmp_path, device='cpu', seeds=[0], only='*/20/*/default')
    monkeypatch.setattr(run, 'provenance', lambda device, **note: dict(note, device='cuda', device_name='GPU'))
    with pytest.raises(ValueError, match='was begun on .*, this is GPU'): run_study(TINY, tmp_path, device='cpu')


def test_a_failing_cell_does_not_stop_the_others(tmp_path):
    mixed = Study('mixed', '?', (Grid(('circles',), (20, 5000), METHODS[:1], seeds=2, **SMALL),))
    with pytest.raises(RuntimeError, match='1 cells failed, the others are recorded; the first, circles/5000'):
        run_study(mixed, tmp_path, device='cpu')
    assert len(written(tmp_path / 'mixed.jsonl')) == 2


# Processes.

LONGER = replace(TINY, grids=(replace(TINY.grids[0], sizes=(20, 30, 40)),))


def run_longer(folder, pipe):
    "Run the study; after each cell say so, and wait for an answer as long as anybody listens."
    def append_and_wait(*args):
        new = append_rows(*args)
        with suppress(EOFError, OSError): pipe.send('cell'); pipe.recv()
        return new
    torch.set_num_threads(1)
    run.append_rows = append_and_wait
    run_study(LONGER, folder, device='cpu')


def process(forked, folder):
    "A process that runs the study, and our end of its pipe."
    ours, theirs = forked.Pipe()
    p = forked.Process(target=run_longer, args=(folder, theirs))
    p.start(); theirs.close()
    return p, ours


def test_killed_again_and_again_two_at_once(tmp_path, forked):
    """Two processes on one record, both killed with SIGKILL when one has written a cell, twice, then one of two:
    complete, no row lost or doubled."""
    path, before = tmp_path / 'tiny.jsonl', set()
    for second_lives in (False, False, True):
        (first, to_first), (second, to_second) = process(forked, tmp_path), process(forked, tmp_path)
        assert any(pipe.recv() == 'cell' for pipe in wait([to_first, to_second]))
        first.kill()
        if not second_lives: second.kill()
        for pipe in (to_first, to_second): pipe.close()
        for p in (first, second): p.join(300)
        assert [first.exitcode, second.exitcode] == [-signal.SIGKILL, 0 if second_lives else -signal.SIGKILL]
        assert before < (before := written(path))
        with open(path, 'ab') as file: file.write(b'{"study":"tiny","half')
    assert run_study(LONGER, tmp_path, device='cpu') in (0, 3)   # the cell that the killed one was at
    assert written(path) == {(cell.config, seed) for cell, seeds in LONGER.cells() for seed in range(seeds)}


@pytest.mark.filterwarnings('ignore')
def test_dask_survives_the_death_of_a_worker(tmp_path, monkeypatch, forked):
    "A real scheduler and two worker processes, one killed in mid-study."
    import dask
    from dask.distributed import Client, LocalCluster
    monkeypatch.setitem(dask.config.config['distributed']['worker'], 'multiprocessing-method', 'forkserver')
    path = tmp_path / 'tiny.jsonl'
    slow = replace(TINY, grids=(replace(TINY.grids[0], schedule=Schedule(steps=100, points=2)),))
    with LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster, Client(cluster) as client:
        pids, killed, append = list(client.run(os.getpid).values()), [], run.append_rows
        assert len(set(pids)) == 2 and os.getpid() not in pids
        def append_and_kill(*args):
            if not killed:
                killed.append(pids[0])
                os.kill(pids[0], signal.SIGKILL)
            return append(*args)
        monkeypatch.setattr(run, 'append_rows', append_and_kill)
        assert run_study(slow, tmp_path, scheduler=cluster.scheduler_address, device='cpu') == 18
        assert killed and written(path) == {(c.config, s) for c, k in slow.cells() for s in range(k)}
        client.run(partial(setattr, lap_nb, '__version__', '0.0.7'), workers=[list(client.run(os.getpid))[0]])
        more = replace(slow, name='more')
        with pytest.raises(ValueError,
                           match='worker tcp.* has other versions: lap_nb 0.0.7, here .*install the same on all'):
            run_study(more, tmp_path, scheduler=cluster.scheduler_address, device='cpu')
        client.run(partial(setattr, lap_nb, '__version__', '0.0.7'))        # after the start
        with monkeypatch.context() as patched, pytest.raises(
                RuntimeError, match='6 cells failed.*the worker that trained it has other versions: lap_nb 0.0.7'):
            patched.setattr(run, '_common_device', lambda *args: run.provenance(torch.device('cpu'))['device_name'])
            run_study(more, tmp_path, scheduler=cluster.scheduler_address, device='cpu')
        assert not (tmp_path / 'more.jsonl').exists()
        lacking = Study('lacking', '?', (Grid(('mnist',), (20,), METHODS[:1], seeds=2, **SMALL),))
        with pytest.raises(ValueError, match='worker .* cannot run this study: .*mnist'):
            run_study(lacking, tmp_path, scheduler=cluster.scheduler_address, device='cpu', root=str(tmp_path))


def test_workers_of_different_kinds_are_refused():
    class Client:
        def wait_for_workers(self, *args, **kwargs): pass
        def run(self, *args): return {'tcp://a': ('GPU A', ''), 'tcp://b': ('GPU B', '')}
    with pytest.raises(ValueError, match="workers' devices differ: GPU A, GPU B"):
        run._common_device(Client(), 'cuda', None, [])


PARENT = """
import sys
sys.path.insert(0, {tests!r})
from test_studies import endless
if __name__ == "__main__": endless({folder!r})
"""


def announcing(*args):
    print(os.getpid(), flush=True)
    return run_cell(*args)


def endless(folder):
    run._run_there = announcing
    run_study(replace(LONGER, grids=(replace(LONGER.grids[0], schedule=Schedule(steps=10 ** 7, points=1)),)), folder,
              scheduler='local', device='cpu')


def test_local_workers_end_with_an_interrupt_of_their_parent(tmp_path):
    "All that hold its output have ended when it closes: they would train for days."
    script = tmp_path / 'parent.py'
    script.write_text(PARENT.format(tests=os.path.dirname(__file__), folder=str(tmp_path)))
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                          start_new_session=True,
                          env=os.environ | dict(DASK_DISTRIBUTED__COMM__TIMEOUTS__CONNECT='60s')) as parent:
        try:
            worker = int(parent.stdout.readline())
            assert worker != parent.pid
            os.kill(parent.pid, signal.SIGINT)
            parent.communicate(timeout=120)
        except BaseException:
            os.killpg(parent.pid, signal.SIGKILL)
            raise
    assert parent.returncode == -signal.SIGINT and not (tmp_path / 'tiny.jsonl').exists()


# The command.

COMMAND = '''
import contextlib, io, json, sys
from dataclasses import replace
from test_studies import TINY
from lap_nb.lab import catalogue, cli
catalogue.STUDIES["tiny"] = lambda scale: replace(TINY, scale=scale)
answers = []
for args in json.loads(sys.argv[1]):
    out, err, code, sys.argv = io.StringIO(), io.StringIO(), 0, ["lap_study", *args]
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try: cli.lap_study()
        except SystemExit as e: code = e.code or 0
    answers.append((code, out.getvalue(), err.getvalue()))
print(json.dumps(answers))
'''


def test_command(tmp_path):
    script, rest = tmp_path / 'command.py', ['--out', str(tmp_path), '--device', 'cpu']
    script.write_text(COMMAND)
    calls = [['tiny', *rest, '--seeds', '2', '--only', 'circles/20/*'], ['tiny', *rest], ['tiny', *rest, '--resume'],
             ['--list', *rest], ['tini', *rest], ['tiny', *rest, '--resume', '--seeds', '1,1']]
    run = subprocess.run([sys.executable, script, json.dumps(calls)], capture_output=True, text=True,
                         env=os.environ | dict(PYTHONPATH=os.pathsep.join(
                             (os.path.dirname(__file__), str(ROOT))), OMP_NUM_THREADS='1'))
    assert run.returncode == 0, run.stderr
    answers = json.loads(run.stdout)
    assert [code for code, _, _ in answers] == [0, 2, 0, 0, 2, 2]
    assert '6 rows written' in answers[0][1] and 'left' in answers[0][2]
    assert 'go on with it by --resume' in answers[1][2] and '12 rows written' in answers[2][1]
    assert re.search(r'^tiny +cpu +18 +18 +0 ', answers[3][1], re.M)
    assert "no study 'tini'" in answers[4][2] and 'given twice' in answers[5][2]
    assert all(err.count('\n') == 1 for _, _, err in (answers[1], *answers[4:]))


@pytest.mark.parametrize('scale', ['cpu', 'gpu'])
def test_commands_of_the_results_folder_train_every_cell(scale):
    "As a shell expands them: each names cells, and together they name all."
    text = (ROOT / 'nbs' / 'results' / 'README.md').read_text().split(f'## On a {scale.upper()}')[1]
    script = 'lap_study() { printf "%s\\t" "$@"; echo; }\nlap_bench() { :; }\npython() { :; }\n' + re.search(
        '```bash\n(.*?)```', text, re.S)[1]
    calls = subprocess.run(['bash', '-euc', script], capture_output=True, text=True, check=True).stdout.splitlines()
    found = {name: set() for name in catalogue.STUDIES}
    for name, *options in (call.strip('\t').split('\t') for call in calls):
        only = options[options.index('--only') + 1] if '--only' in options else ''
        assert '--resume' in options and ('cuda' if scale == 'gpu' else 'cpu') in options
        found[name] |= {cell.name for cell, _ in load_study(name, scale).cells(only)}
    assert found == {name: {cell.name for cell, _ in load_study(name, scale).cells()} for name in catalogue.STUDIES}


@pytest.mark.parametrize('text, seeds', [('', None), ('3', [0, 1, 2]), ('0,3,5', [0, 3, 5]), ('10:12', [10, 11])])
def test_seeds_of_the_command(text, seeds): assert cli._seeds(text) == seeds


def test_seeds_of_the_command_that_are_none():
    with pytest.raises(ValueError, match='expected a number like 20'): cli._seeds('many')


@pytest.mark.parametrize("spec, says", [("digits:flip=-0.1", "out of range"), ("digits:flip=1.5", "out of range"), ("circles:noise=.1,noise=.2", "twice"), ("digits:noise=.3", "only circles and moons"),
                                        ("circles:noise", "expected variations like"), ("circles:pool=2", "is for pictures"), ("digits:turn=3", "expected noise, flip or pool")])
def test_variations_that_cannot_be(spec, says):
    with pytest.raises(ValueError, match=says): dataset(spec)


def test_descriptions_that_cannot_be_meant(tmp_path):
    grid = TINY.grids[0]
    for changed, says in (
        (dict(data="circles"), "data is .*, expected"),
        (dict(schedule=Schedule(points=0)), "points is 0"),
        (dict(thin=0), "thin is 0"),
        (dict(net=Net("resnet", 10, 8)), "expected a multiple of its 3 stages"),
    ):
        with pytest.raises(ValueError, match=says): replace(TINY, grids=(replace(grid, **changed),))
    for changed, says in (
        (dict(measures=("transports",)), "no measure 'transports'"),
        (dict(net=Net("densee")), "no network 'densee'"),
    ):
        with pytest.raises(ValueError, match=says):
            run_study(replace(TINY, grids=(replace(grid, **changed),)), tmp_path, device="cpu")
    for described, says in ((dict(gain=.1), "which the default initialisation does not take"),
                            (dict(h=0.), "expected a positive number"), (dict(lr=0.), "expected a positive number")):
        with pytest.raises(ValueError, match=says): Method("mine", **described)


def test_columns_that_there_are_not():
    found = Records([
        dict(data="a", n=1, net="d", method="m", family="m", seed=s, test_accuracy_last=.5, diverged=False)
        for s in range(3)], {})
    for read in (lambda: found.by("way"), lambda: found.values("test_acc"),
                 lambda: found.confidence_interval("test_acc"), lambda: found.where(way="m")):
        with pytest.raises(ValueError, match="no column"): read()


def test_a_study_of_ones_own_in_a_new_session(tmp_path):
    run_study(replace(TINY, name="mine"), tmp_path, device="cpu")
    with pytest.raises(ValueError, match="is there, but no description of a study 'mine'.*stale=True"):
        load_records("mine", tmp_path)
    assert len(load_records("mine", tmp_path, stale=True)) == len(WANTED)


def test_a_measure_that_cannot_be_kept_fails_its_cells_only(tmp_path, monkeypatch):
    monkeypatch.setitem(run.MEASURES, "odd", lambda model, split: dict(odd=object()))
    monkeypatch.setitem(run.MEASURES, "norm", lambda model, split: dict(norm=sum(p.norm() for p in model.parameters())))
    first, second = (replace(TINY.grids[0], sizes=(n,), measures=(name,)) for n, name in ((20, "odd"), (30, "norm")))
    with pytest.raises(RuntimeError, match="cells failed, the others are recorded"):
        run_study(replace(TINY, grids=(first, second)), tmp_path, device="cpu")
    rows = [row for row in read_lines(tmp_path / "tiny.jsonl") if row.get("kind") != "run"]
    assert rows and all(isinstance(row["norm"], float) for row in rows)


@pytest.mark.parametrize("of", [np.float32, np.float64, torch.tensor])
def test_a_description_in_numbers_of_any_library_is_the_same(of):
    whole = np.int64 if of is not torch.tensor else torch.tensor
    def described(number, count):
        method = Method("m", h=number(.5), drop=number(.25), lr=number(.5), least_action=dict(tau=number(.5)))
        schedule = Schedule(steps=count(20), lr=number(.5), others=dict(momentum=number(.5)))
        return Study("s", "which?", (Grid(("digits",), (count(50),),
                                          (method,), count(2), Net(K=count(3)), schedule),), version=count(1))
    plain, given = described(float, int), described(of, whole)
    (a, n), (b, m) = plain.cells()[0], given.cells()[0]
    assert a.config == b.config and n == m and type(m) is int and a.name == b.name


def test_sizes_as_an_array():
    grid = Grid(("digits",), np.array([50, 100]), (Method("m"),))
    assert grid.sizes == (50, 100) and all(type(n) is int for n in grid.sizes)


def test_what_chapter_depth_says_of_longer_steps():
    "Longer steps against skipped blocks, by the areas under the depth curves on record."
    said = {}
    for (data, net), rows in (
        load_records('depth', ROOT / 'nbs' / 'results').where(diverged=False).by('data', 'net').items()
    ):
        gap = {
            m: confidence_interval(
                rows.where(method=m).values('area_lengthened') - rows.where(method=m).values('area_skip'))
            for m in ('default', 'constant-0.1')}
        said[data.partition(':')[0], net] = [verdict(gap[m]) for m in gap]
    constant = {place: word for place, (_, word) in said.items()}
    assert (
        len(constant) == 8
        and {place for place, word in constant.items() if word != 'better'} == {('mnist', 'vit8x32')}
        and constant['mnist', 'vit8x32'] == 'open'
    )
    worse = {('cifar10_part', 'dense9x64'), ('mnist', 'conv-bn9x16'), ('mnist', 'staged8x8'), ('mnist', 'vit8x32')}
    assert {place: word for place, (word, _) in said.items()} == {
        place: 'worse' if place in worse else 'better' for place in said
    }


@pytest.mark.parametrize('name', ['mnist-low-data', 'fashion-low-data', 'cifar-low-data'])
def test_decisions_that_stand_together_are_among_those_that_stand_alone(name):
    "As Holm's rule has it, written once more: with p-values from the differences themselves."
    found = load_records(name, ROOT / 'nbs' / 'results').where(net='dense9x64')
    table = [row for row in standings(found) if row['gap'] is not None]
    ours = {(row['n'], row['family']): row for row in table}
    chosen = {(n, family): rows for (n, family), rows in found.tuned().by('n', 'family').items()}
    p = {
        at: ttest_rel(
            chosen[at[0], 'least-action'].values('test_accuracy_last'), chosen[at].values('test_accuracy_last')
        ).pvalue
        for at in ours
    }
    ordered = sorted(p, key=p.get)
    first_open = next((k for k, at in enumerate(ordered) if p[at] > .05 / (len(ordered) - k)), len(ordered))
    assert {at for at, row in ours.items() if row['decides'] != 'open'} == set(ordered[:first_open])
    assert all(row['decides'] in ('open', verdict(row['gap'])) for row in table)


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(.01, 3)), max_size=9))
@settings(max_examples=60, deadline=None)
def test_one_decision_is_its_interval_and_more_are_stricter(gaps):
    gaps = [Interval(mean, mean - half, mean + half, 12) for mean, half in gaps]
    words = decide_together(gaps)
    assert all(
        decide_together([gap]) == [verdict(gap)] for gap in gaps
        if abs(abs(gap.mean) - (gap.high - gap.low) / 2) > 1e-6)
    assert all(word in ('open', verdict(gap)) for word, gap in zip(words, gaps)
               if abs(abs(gap.mean) - (gap.high - gap.low) / 2) > 1e-6)
    assert decide_together(gaps[::-1])[::-1] == words or len({abs(g.mean) / (g.high - g.low) for g in gaps}) < len(gaps)


def test_edges_of_grids():
    """One setting varied, two together, two crossed, a method alone, a grid of two, which has nothing but edges, and
    values beyond which nothing lies."""
    def edge(chosen, **methods):
        run = lambda settings: dict(settings=dict(method=dict(name='m', **settings)))
        rows = [dict(method=m, run=m) for m in methods]
        return edge_of(Records(rows, {m: run(settings) for m, settings in methods.items()}), chosen)
    rates = dict(low=dict(lr=3e-4), middle={}, high=dict(lr=3e-3))   # in the middle the schedule's
    assert [edge(m, **rates) for m in rates] == ['lr', '', 'lr']
    least = {
        f'{lam}': dict(least_action=[['lambda0', lam], ['tau', tau]]) for lam, tau in ((.1, .02), (1., .1), (5., 1.))}
    assert [edge(m, **least) for m in least] == ['lambda0, tau', '', 'lambda0, tau']
    assert (
        edge('a', a=dict(gain=0.1)) == ''
        and edge('a', a=dict(init='normal', gain=0.1), b=dict(init='normal', gain=0.2)) == 'gain'
        and edge('a', a=dict(gain=0.1), b=dict(init='normal', gain=0.2)) == ''   # the first start has none
        and edge('a', a=dict(drop=0.1), b=dict(drop=0.1, skip_init=True)) == ''
        and edge('a', a=dict(drop=0.), b=dict(drop=0.1)) == ''
    )
    crossed = {
        f'{lam}, {tau}': dict(least_action=[['lambda0', lam], ['tau', tau], ['every', every]])
        for lam, tau, every in ((.3, .1, 1), (1., .1, 1), (1., .3, 5), (1., .03, 1), (3., .1, 1))}
    edges = {'0.3, 0.1': 'lambda0', '1.0, 0.1': '', '1.0, 0.3': 'tau, every', '1.0, 0.03': 'tau', '3.0, 0.1': 'lambda0'}
    assert {m: edge(m, **crossed) for m in crossed} == edges

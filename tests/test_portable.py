"""What `make portable` wrote down: each assertion of a chapter that compares numbers has held with room on other
processors and for other seeds."""
import ast
import json
import math
import os
import subprocess
import sys

import pytest
import torch

from portable import CONFIGURATIONS, NOTEBOOKS, RECORD, ROOM, ROOT, TESTS, Recorder, Watch, claims_of, room_of


@pytest.fixture(scope='module')
def note():
    if not RECORD.exists(): pytest.skip(f'{RECORD.name} is missing: run `make portable` and commit it')
    return json.loads(RECORD.read_text(encoding='utf-8'))


def test_processors_and_seeds(note):
    """A training ended differently under at least six processors, so these were different ones; and all seeds were
    shifted three times."""
    assert len(set(note['trained'].values())) >= 6 and sum(name.startswith('seeds') for name in CONFIGURATIONS) >= 3


@pytest.mark.parametrize('unit', NOTEBOOKS + TESTS)
def test_room(unit, note):
    if unit not in note['rooms']:
        pytest.skip(f'not run on other processors and for other seeds yet: `python tests/portable.py --only {unit}`')
    little = {
        claim: room for claim, room in note['rooms'][unit].items()
        if room is not None and (isinstance(room, str) or room < ROOM)}
    assert not little, f'{unit}: widen what these say, or assert it of a committed record'


@pytest.mark.parametrize('chapter', NOTEBOOKS)
def test_recorded_claims_still_stand(chapter, note):
    "What is new since the record is told by `make portable`; what is gone makes the record of its chapter stale."
    if chapter not in note['rooms']: pytest.skip('not in the record')
    gone = set(note['rooms'][chapter]) - claims_of(chapter)[0]
    again = f'`python tests/portable.py --only {chapter}` (some minutes)'
    assert not gone, f'{chapter}: no longer asserted there; renew the record by {again} and commit {RECORD.name}'


def watched(source):
    recorder = Recorder()
    exec(compile(Watch(source).visit(ast.parse(source)), 'cell', 'exec'), dict(__portable__=recorder, torch=torch))
    note, = recorder.sites.values()
    return note['held'], note['failed'], note['at']


@pytest.mark.parametrize('source, held, distances', [
    ('assert 1 < 2 <= 5', True, [1, 3]),
    ('assert 3 > 1 and all(x >= 0 for x in (3, -1))', False, [2, 3, -1]),
    ('assert (torch.tensor([1., 4.]) < torch.tensor([3., 3.])).all(), "a message"', False, [-1]),
    ('assert 1 < 2 or 3 < 1', True, []),
    ('assert {1} <= {1, 2} and "a" < "b"', True, []),
    ('assert 1 <= 1.  # a bound', True, []),
    ('torch.testing.assert_close(torch.ones(2), torch.tensor([1., 1.25]), rtol=0, atol=.5)', True, [.5]),
    ('torch.testing.assert_close(torch.ones(2), torch.tensor([1., 2.]), rtol=0, atol=.5)', False, [-1])])
def test_what_is_watched(source, held, distances):
    holds, fails, at = watched(source)
    assert (holds, fails, [distance for distance, *_ in at]) == (held, not held, distances)


def test_room_is_the_least_distance_over_how_far_it_is_from_the_usual():
    assert (
        room_of([3.0, 1.0, 2.0]) == 1
        and room_of([9.0, 3.0, 3.0, -1.0]) == -0.25
        and room_of([2.0, 2.0, 5.0]) == math.inf
        and room_of([-1.0, -1.0]) == -math.inf
    )


def test_all_seeds_are_shifted():
    draw = (
        "import portable, random, torch, numpy as np; from sklearn.datasets import make_moons; import sys; by = "
        "int(sys.argv[1]); torch.manual_seed(by); "
        "print(torch.rand(1), torch.rand(1, generator=torch.Generator().manual_seed(by)), torch.initial_seed() - by, "
        "np.random.default_rng(by).random(), "
        "np.random.RandomState(by).rand(), random.Random(by).random(), make_moons(3, noise=1., random_state=by)[0])")
    said = [
        subprocess.run(
            [sys.executable, '-c', draw, str(by)],
            env=os.environ | dict(LAP_NB_SEED_SHIFT=str(5 - by)),
            cwd=ROOT / 'tests',
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        for by in (0, 5)
    ]
    assert said[0] == said[1] and said[0]

"What `make portable` wrote down: each assertion of a chapter that compares numbers has held with room on other processors and for other seeds."
import json

import pytest

from portable import CONFIGURATIONS, NOTEBOOKS, RECORD, ROOM, ROOT, compared

NOTE = json.loads(RECORD.read_text(encoding='utf-8'))


def test_processors_and_seeds():
    "Trainings ended differently under at least six processors, so these were different ones; and three shifts of all seeds."
    assert len(set(NOTE['trained'].values())) >= 6 and sum(name.startswith('seeds') for name in CONFIGURATIONS) >= 3


@pytest.mark.parametrize('unit', sorted(NOTE['rooms']))
def test_room(unit):
    little = {claim: room for claim, room in NOTE['rooms'][unit].items() if room is not None and (isinstance(room, str) or room < ROOM)}
    assert not little, f'{unit}: widen what these say, or assert it of a committed record'


@pytest.mark.parametrize('chapter', NOTEBOOKS)
def test_every_comparison_was_tried(chapter):
    new = set(compared(ROOT / 'nbs' / f'{chapter}.ipynb')) - set(NOTE['rooms'].get(chapter, {}))
    assert not new, f'not tried on other processors and for other seeds yet: run `python tests/portable.py --only {chapter}` (some minutes) and commit {RECORD.name}'

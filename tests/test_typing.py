"""The package is typed: a checker accepts its public signatures, and finds mistakes in code that uses them."""
import re
import shutil
import subprocess
import sys

import pytest

from conftest import ROOT

sys.path.insert(0, str(ROOT))
import stubs

USE = '''
import torch
import torch.nn.functional as F
from torch import nn
from lap_nb.attach import trace
from lap_nb.hooks import find_blocks
from lap_nb.data import Dataset, Split, digits
from lap_nb.dynamics import Trajectory
from lap_nb.kinetic import kinetic_energy
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.nets import dense_net
from lap_nb.training import Run, TrainConfig, fit

data: Dataset = digits()
split: Split = data.split(300, seed=0)
row: Split = data.splits(300, range(4)).to("cpu").member(2)
model = dense_net(64, 10, K=9)
la = LeastAction(model, DualAscent(1., tau=1.))
loss: torch.Tensor = la(F.cross_entropy(model(split.x), split.y))
lam: torch.Tensor = la.lam
la.remove()
run: Run = fit(model, split, la, epochs=3)
quick: Run = fit(model, split, None, TrainConfig(lr=.1), seed=3, epochs=3, optimizer="sgd", clip=1.)
accuracy: torch.Tensor = run.best_test_accuracy
trajectory: Trajectory = model.trajectory(split.x)
trajectory.save("a.npz")
again: Trajectory = Trajectory.load("a.npz")
straight: torch.Tensor = again.samples(slice(5)).straightness()
energy: torch.Tensor = kinetic_energy(again)
'''
MISUSE = '''
from lap_nb.data import digits
from lap_nb.least_action import LeastAction
from lap_nb.nets import dense_net
from lap_nb.training import fit

split = digits().split("300")          # not a number
split.members(0)                       # no such method
net = dense_net(64, classes=10, k=9)   # no such argument
number: int = net.flow                 # of another type
LeastAction(3)                         # not a network
fit(net, digits().split(300), epoch=3) # no such setting
fit(net, digits().split(300), lr="a")  # not a number
'''


@pytest.fixture(scope='module')
def checked(tmp_path_factory):
    "What mypy says: about the package, about code that uses it, and about code that misuses it."
    pytest.importorskip('mypy', reason='mypy is missing: run `make test`, which installs it')
    folder = tmp_path_factory.mktemp('typed')
    package = folder / 'lap_nb'
    package.mkdir()
    stubs.write_stubs(ROOT / 'lap_nb', package)
    shutil.copy(ROOT / 'lap_nb' / 'py.typed', package)
    (folder / 'use.py').write_text(USE)
    (folder / 'misuse.py').write_text(MISUSE)
    done = subprocess.run(
        [sys.executable, '-m', 'mypy', '--config-file', ROOT / 'pyproject.toml', '--cache-dir', folder / 'cache', '.'],
        cwd=folder, capture_output=True, text=True, timeout=300)
    assert not done.stderr, done.stderr
    found = re.findall(r'^(\S+?):(\d+): error: (.*)$', done.stdout, re.M)
    assert 'checked' in done.stdout, done.stdout
    return found


def test_public_signatures_are_sound(checked):
    assert not [error for error in checked if error[0].startswith('lap_nb')]


def test_use_is_accepted(checked):
    assert not [error for error in checked if error[0] == 'use.py']


def test_misuse_is_found(checked):
    assert {int(line) for name, line, _ in checked if name == 'misuse.py'} == {*range(7, 14)}


def test_methods_added_by_chapters_are_in_their_class():
    "Each `@patch` of the sources is seen by a checker."
    for path in (ROOT / 'lap_nb').rglob('*.py'):
        text = path.read_text()
        names = re.findall(r'^@patch.*\n(?:@.*\n)*def (\w+)', text, re.M)
        written = re.findall(r'^    def (\w+)', stubs.stub(text), re.M)
        assert not set(names) - set(written), path.name

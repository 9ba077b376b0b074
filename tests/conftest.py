"Fixtures shared by the test files."
import importlib.util
import math
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import traceback
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from hypothesis import settings

# the same examples each time: a change makes a test fail, not chance
settings.register_profile('same', derandomize=True, database=None)
settings.load_profile('same')
# as in the background of a shell; what tests start would ignore it, too
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
ROOT = Path(__file__).resolve().parent.parent
sys.path.append(str(ROOT / 'nbs' / '_site'))   # the modules that make the site
CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
FLAGS = ('--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking '
         '--disable-component-update --disable-sync').split()
# Files that take longest, the longest first; and the one that comes last, since it keeps two cores busy by itself.
LONG, LAST = (
    'test_install test_site test_studies test_ensembles test_compare test_attach test_training test_resume '
    'test_package '
    'test_playground').split(), 'test_notebooks'


def pytest_collection_modifyitems(items):
    "Two workers that take whole files in this order end at about the same time."
    place = {name: at for at, name in enumerate(LONG)} | {LAST: 1000}
    items.sort(key=lambda item: place.get(item.path.stem, len(LONG)))


@pytest.fixture
def copy(tmp_path):
    "A throw-away copy of the checkout: what git tracks or would track, and nothing else."
    return copy_checkout(tmp_path / 'checkout')


def copy_checkout(to):
    "Copy the tracked and the untracked, not ignored files of the checkout into the folder `to`."
    names = subprocess.run(['git', 'ls-files', '-z', '--cached', '--others', '--exclude-standard'],
                           cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for name in filter(None, names.split('\0')):
        source, target = ROOT / name, to / name
        if not os.path.lexists(source): continue
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(source, target, follow_symlinks=False)
    return to


def run(*args, cwd=ROOT, timeout=600):
    "Run `args` with nothing of the checkout, and none of the settings of tests, in the environment."
    env = {k: v for k, v in os.environ.items() if k not in ('PYTHONPATH', 'LAP_NB_DATA', 'VIRTUAL_ENV', 'IN_TEST')} | {
        'OMP_NUM_THREADS': '1'}
    return subprocess.run([str(a) for a in args], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)


def check(*args, cwd=ROOT):
    "Standard output of `run`; a failure shows what was printed."
    done = run(*args, cwd=cwd)
    if done.returncode:
        pytest.fail(f'{" ".join(map(str, args))}\n{done.stdout[-4000:]}\n{done.stderr[-4000:]}', pytrace=False)
    return done.stdout


def hook_count(model): return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.fixture
def odd_calls():
    """Calls a function with odd values in each of its arguments, and in pairs of them: it works, or raises an error
    that the package words itself."""
    return _call_with_odd_values


def _odd_values():
    import numpy as np
    import torch
    return [
        None, True, "x", "mean", b"x", 1j, math.nan, math.inf, -1., 0, 1e300, 1e-45, 10 ** 400, Fraction(1, 3),
        Decimal(1), [], [1, "a"], {}, {"a": 1}, object(), print, range(5),
        torch.tensor(1), torch.tensor(True), torch.tensor(1j), torch.tensor(-1.), torch.empty((), device="meta"),
        torch.ones(3).to_sparse(), torch.ones(2, 3), torch.empty(0),
        np.array([1., 2.]), np.float32(.5), np.int64(3), np.bool_(True), torch.float32]


def _call_with_odd_values(function, arguments, pairs=60):
    import lap_nb.checks
    odd = _odd_values()
    home, rng = str(Path(lap_nb.__file__).parent), random.Random(0)
    cases = [{name: value} for name in arguments for value in odd]
    if len(arguments) > 1:
        cases += [{name: rng.choice(odd) for name in rng.sample(sorted(arguments), 2)} for _ in range(pairs)]
    for case in cases:
        try:
            function(**arguments | case)
        except (TypeError, ValueError, RuntimeError) as e:
            *_, (frame, _) = traceback.walk_tb(e.__traceback__)
            assert type(e) in (
                TypeError,
                ValueError,
                RuntimeError,
                lap_nb.checks.WrongKind,
            ) and frame.f_code.co_filename.startswith(home), (case, e)


@pytest.fixture
def seed():
    import torch
    torch.manual_seed(0)


@pytest.fixture
def fresh_compiler():
    "A compiler that knows no network yet; afterwards none of this test."
    import torch
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.fixture(scope='session')
def transformers():
    "The library of that name, where it works with the PyTorch that is installed."
    if importlib.util.find_spec('transformers') is None:
        pytest.skip('transformers is not installed: pip install transformers, then run this again')
    import transformers as library
    if not library.is_torch_available():
        pytest.skip('transformers refuses this version of PyTorch: install a newer PyTorch, or an older transformers')
    library.logging.set_verbosity_error()
    return library


@pytest.fixture(scope='session')
def forked():
    """Starts processes that have imported the library, and what it imports late, already: forks of a server that does
    nothing else."""
    from multiprocessing.forkserver import ensure_running
    context = multiprocessing.get_context('forkserver')
    context.set_forkserver_preload([
        'distributed', 'nbdev.test', 'lap_nb.lab.run', 'scipy.stats', 'sklearn.datasets', 'torch._dynamo'])
    ensure_running()
    return context


@pytest.fixture(scope='session')
def browser():
    if importlib.util.find_spec('playwright') is None:
        pytest.skip('playwright is missing: run `make test`, which installs it')
    if CHROMIUM is None:
        pytest.skip('Chromium is missing: run `make test` as root, which installs it, or apt-get install chromium')
    from playwright.sync_api import sync_playwright
    with sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield chromium
        chromium.close()

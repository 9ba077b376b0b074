"Every notebook runs from top to bottom under nbdev's runner: one case each, in a process of its own, without a network."
import os
import socket
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted((ROOT / 'nbs').glob('*.ipynb'))
WORKERS = 2
LOCAL = ('127.', '::1', 'localhost')


def run_here(notebook):
    "Run `notebook` in this process; addresses outside this machine are refused."
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


def run_apart(notebook):
    "Run `notebook` in a fresh process that knows of no data folder."
    env = {k: v for k, v in os.environ.items() if k not in ('LAP_NB_DATA', 'PYTHONPATH')}
    threads = str(max(1, (os.cpu_count() or 1) // WORKERS))
    env.update(MPLBACKEND='Agg', OMP_NUM_THREADS=threads, NO_COLOR='1')
    return subprocess.run([sys.executable, __file__, str(notebook)], cwd=ROOT, env=env, capture_output=True, text=True)


@pytest.fixture(scope='module')
def runs(request):
    "The selected notebooks, started two at a time."
    selected = {item.callspec.params['notebook'] for item in request.session.items
                if item.path == Path(__file__) and hasattr(item, 'callspec')}
    with ThreadPoolExecutor(WORKERS) as pool:
        yield {notebook: pool.submit(run_apart, notebook) for notebook in sorted(selected)}


def test_there_are_notebooks():
    assert NOTEBOOKS, f'no notebook found in {ROOT / "nbs"}'


@pytest.mark.parametrize('notebook', NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(runs, notebook):
    done = runs[notebook].result()
    if done.returncode: pytest.fail(f'{notebook.name} stopped\n{done.stdout[-2000:]}\n{done.stderr[-6000:]}', pytrace=False)


if __name__ == '__main__': sys.exit(not run_here(sys.argv[1]))

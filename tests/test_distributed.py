"Two processes under torchrun are one training: the same numbers, the same lambda, one file; and one of them killed."
import os
import re
import signal
import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from lap_nb import training
from lap_nb.data import digits
from lap_nb.least_action import DualAscent, LeastAction
from lap_nb.nets import dense_net
from lap_nb.training import Checkpoints, fit, load_checkpoint

SETTINGS = dict(epochs=4, batch_size=32, eval_every=2, clip=1.)


def train(path, seed=0, device="cpu", resume=False, **settings):
    "The same lines for one process and for many; 90 samples in batches of 32, 32 and 26."
    torch.manual_seed(seed)
    model = dense_net(64, 10, 2, 16).to(device)
    la = LeastAction(model, DualAscent(target=.5))
    return fit(model, digits().split(90), la, checkpoints=Checkpoints(path, resume), **SETTINGS | settings), la


# What the processes do

def compare(folder, device="cpu"):
    "Weights of this process's own at the start: those of the first are taken by all."
    rank = os.environ["RANK"]
    run, la = train(folder / "run.pt", int(rank), device)
    train(folder / "resumed.pt", 0, device, epochs=2)
    resumed, _ = train(folder / "resumed.pt", 7, device, resume=True)
    weights = {name: p.cpu() for name, p in run.model.state_dict().items()}
    torch.save(
        dict(
            weights=weights,
            curves=run.curves,
            lam=la.lam.cpu(),
            resumed=resumed.curves,
            share=(dist.get_rank(), dist.get_world_size()),
        ),
        folder / f"{rank}.pt",
    )


def long(folder):
    "Until somebody stops it."
    def tell(training): print("point", flush=True)
    train(folder / "long.pt", epochs=100_000, callbacks=[tell])


if __name__ == "__main__":
    torch.set_num_threads(1)
    globals()[sys.argv[1]](Path(sys.argv[2]), *sys.argv[3:])


# The tests

def torchrun(*args, **options):
    command = [
        sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", __file__,
        *map(str, args)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
                            env=os.environ | {"OMP_NUM_THREADS": "1"}, **options)


def check_two(folder, device="cpu"):
    job = torchrun("compare", folder, device)
    try: said, _ = job.communicate(timeout=900)
    finally: job.kill()
    assert job.returncode == 0, said
    ranks = [torch.load(folder / f"{rank}.pt") for rank in range(2)]
    assert [r["share"] for r in ranks] == [(0, 2), (1, 2)]
    alone, _ = train(folder / "alone.pt", 0, device)
    for name, curve in alone.curves.items():
        tolerance = dict(rtol=0, atol=.01) if "accuracy" in name else dict(rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(ranks[0]["curves"][name], curve, **tolerance)
        assert torch.equal(ranks[0]["curves"][name], ranks[1]["curves"][name]), f"{name} differs between the ranks"
        assert torch.equal(ranks[0]["curves"][name], ranks[0]["resumed"][name]), f"{name} differs after resuming"
    for name, p in alone.model.state_dict().items():
        torch.testing.assert_close(ranks[0]["weights"][name], p.cpu(), rtol=1e-3, atol=1e-5)
        assert torch.equal(ranks[0]["weights"][name], ranks[1]["weights"][name])
    assert torch.equal(ranks[0]["lam"], ranks[1]["lam"])
    saved = load_checkpoint(folder / "run.pt")
    assert saved["fixed"]["processes"] == 2 and len(saved["rng"]) == 2
    assert sorted(p.name for p in folder.iterdir()) == ["0.pt", "1.pt", "alone.pt", "resumed.pt", "run.pt"]
    with pytest.raises(ValueError, match="processes 2, now 1"): train(folder / "run.pt", resume=True)
    assert train(folder / "run.pt", resume="force", epochs=5)[0].curves["epoch"][-1] == 5


def test_two_processes_are_one_training(tmp_path): check_two(tmp_path)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="NCCL needs two CUDA devices")
def test_two_gpus_are_one_training(tmp_path): check_two(tmp_path, "cuda")


def children(pid):
    return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks for the processes in /proc")
@pytest.mark.parametrize("rank", [0, 1])
def test_a_killed_process_ends_the_job_and_leaves_the_checkpoint(tmp_path, rank):
    "The one that writes, or another."
    job = torchrun("long", tmp_path)
    try:
        points = 0   # two processes print into one pipe: lines may be joined, or empty
        while points < 6 and (line := job.stdout.readline()): points += line.count("point")
        assert points >= 6, "the job ended by itself"
        os.kill(children(job.pid)[rank], signal.SIGKILL)
        said, _ = job.communicate(timeout=600)   # the other one ends, too
    finally: job.kill()
    assert job.returncode != 0
    assert re.search(f"process {1 - rank} of 2 (lost contact with the others|was told to stop) at step", said), said
    assert "long.pt (step" in said and "start again with resume=True" in said and "SIGKILL" in said, said
    state = load_checkpoint(tmp_path / "long.pt")
    assert state["step"] >= 6 and all(p.isfinite().all() for p in state["model"].values())
    # half a neighbour may be left by the one that wrote; the next start sweeps it up
    assert rank == 0 or not list(tmp_path.glob(".*.partial"))


def test_every_process_needs_a_sample(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "process_share", lambda: training.Processes(0, 4))
    with pytest.raises(ValueError, match="smallest batch has 1 samples, fewer than the 4 processes"):
        train(tmp_path / "run.pt", batch_size=89)


def test_another_error_is_not_taken_for_a_lost_process(monkeypatch, tmp_path):
    monkeypatch.setattr(training, "_wrapped", lambda model, config: model)
    monkeypatch.setattr(training, "process_share", lambda: training.Processes(0, 2))
    monkeypatch.setattr(training, "CheckpointFile", lambda *args: nullcontext())
    def failing(*args):
        raise RuntimeError("mat1 and mat2 shapes cannot be multiplied")
    monkeypatch.setattr(training, "run_epochs", failing)
    with pytest.raises(RuntimeError, match="^mat1 and mat2"): train(tmp_path / "run.pt")

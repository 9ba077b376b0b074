"The benchmark command: its arithmetic, its record, its errors, and what a step with least action may not do."
import json
import os
import subprocess
import sys

import pytest
import torch

from lap_nb.lab import bench
from lap_nb.lab.bench import BENCHMARKS, Sides, benchmark, measure, memory, run_benchmarks
from lap_nb.lab.cli import lap_bench
from lap_nb.kinetic import EnergyMeter

CPU = torch.device("cpu")


def scripted(costs):
    "A side that returns these costs, one after the other."
    it = iter(costs)
    return lambda: next(it)


@pytest.fixture
def fake():
    "A benchmark that costs nothing; off the list afterwards."
    before = dict(BENCHMARKS)

    @benchmark("fake")
    def make(device):
        return [
            Sides("fake", lambda: 2., lambda: 1., "two / one", goal=3.),
            Sides("fake-2", lambda: 8., lambda: 2., "four", goal=3., exact=True)]

    @benchmark("needy", needs="no_such_package")
    def needy(device): return []

    yield
    BENCHMARKS.clear(); BENCHMARKS.update(before)


# Arithmetic

def test_sides_run_in_turn_after_warm_up():
    calls = []
    def side(name, cost): return lambda: (calls.append(name), cost)[1]
    measure(Sides("x", side("A", 2.), side("B", 1.), "", least=3), seconds=1e-9)
    assert calls == list("AB" * 4)


def test_median_extremes_and_best():
    row = measure(Sides("x", scripted([9, 1, 2, 6, 2, 3]), scripted([9, 1, 1, 2, 1, 1]), "", goal=2.5, least=5),
                  seconds=1e-9)
    assert (row["ratio_median"], row["ratio_min"], row["ratio_max"], row["ratio_of_best"], row["pairs"]) == (
        2,
        1,
        3,
        1,
        5,
    )
    assert row["met"] is True and row["top"] == 2 and row["bottom"] == 1


@pytest.mark.parametrize("better,goal,met", [("lower", 2, True), ("lower", 1.9, False), ("higher", 2, True), ("higher", 2.1, False), ("lower", None, None)])
def test_goal(better, goal, met):
    assert measure(Sides("x", lambda: 2., lambda: 1., "", goal=goal, better=better, exact=True))["met"] is met


def test_memory_is_the_peak():
    w = torch.ones(10, 10, requires_grad=True)
    views = lambda: (w.detach() + 1).view(-1).unflatten(0, (5, 20)).t()
    assert memory(views, CPU) == 400                                     # views stand in the same memory
    assert memory(lambda: w.detach().clone().add_(1).mul_(2), CPU) == 400
    assert memory(lambda: [w.detach() + k for k in range(5)], CPU) == 5 * 400
    assert memory(lambda: [(w.detach() + k).sum().item() for k in range(5)], CPU) == 400 + 4
    assert memory(lambda: w.detach().mul_(1), CPU) == memory(lambda: None, CPU) == 0   # it was there before


def test_memory_counts_the_backward_pass():
    w = torch.ones(100, 100, requires_grad=True)
    loss = w.exp().sum()
    # the gradient, made in one or two steps; exp was there before
    assert 40_000 <= memory(loss.backward, CPU) <= 80_000 + 100
    with pytest.raises(ZeroDivisionError): memory(lambda: 1 / 0, CPU)
    assert memory(lambda: w.detach().clone(), CPU) == 40_000      # nothing of the failed step is left


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux tells the peak of a process: run it there")
def test_memory_agrees_with_the_size_of_the_process():
    "The system's own record of the peak, in a fresh process that gives large blocks back at once."
    code = """
import torch
from lap_nb.lab.bench import memory
from lap_nb.nets import dense_net
torch.manual_seed(0); torch.set_num_threads(1)
def size(field): return next(int(line.split()[1]) * 1024 for line in open("/proc/self/status") if line.startswith(field))
net, x = dense_net(64, 2, K=9, hidden=64), torch.randn(20_000, 64)
def step(n):
    for p in net.parameters(): p.grad = None
    net(x[:n]).square().mean().backward()
step(100)   # what is loaded only once
before = size('VmRSS:'); step(20_000); grown = size('VmHWM:') - before
print(grown / memory(lambda: step(20_000), torch.device("cpu")))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True,
                          env=dict(os.environ, MALLOC_MMAP_THRESHOLD_="65536"))
    assert done.returncode == 0, done.stderr
    assert abs(float(done.stdout) - 1) < .05


# Command

def test_command_writes_a_record(fake, tmp_path, capsys):
    out = tmp_path / "new" / "record.json"
    lap_bench(["fake"], device="cpu", out=str(out), seconds=.01)
    record = json.loads(out.read_text())
    assert [r["name"] for r in record["rows"]] == ["fake", "fake-2"]
    assert {"name", "ratio_median", "ratio_min", "ratio_max", "goal", "device", "pairs"} <= record["rows"][0].keys()
    assert record["provenance"]["device"] == "cpu" and record["rows"][1]["met"] is False
    said = capsys.readouterr().out
    assert record["wall_seconds"] > 0 and said.endswith(f"wrote {out} after {record['wall_seconds']:.0f} s\n")
    assert "fake: 2.000" in said and "fake-2: 4.000 (one pair), goal <= 3: NOT met" in said


def failing(capsys, *args, **kwargs):
    with pytest.raises(SystemExit) as stop: lap_bench(*args, device="cpu", seconds=.01, **kwargs)
    assert stop.value.code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("lap_bench: error: ")
    return lines[0]


def test_errors_take_one_line(fake, tmp_path, capsys):
    out = tmp_path / "record.json"
    assert "did you mean fake?" in failing(capsys, ["fak"], out=str(out))
    assert "needs no_such_package" in failing(capsys, ["needy"], out=str(out))
    assert "is a folder" in failing(capsys, ["fake"], out=str(tmp_path))
    out.write_text("mine")
    assert "overwrite with --force" in failing(capsys, ["fake"], out=str(out))
    assert "cannot write to the folder" in failing(capsys, ["fake"], out=str(out / "below.json"))
    assert out.read_text() == "mine"
    lap_bench(["fake"], device="cpu", out=str(out), seconds=.01, force=True)
    assert json.loads(out.read_text())["rows"]


def test_missing_packages_are_named_when_all_are_asked_for(fake, monkeypatch):
    for name in set(BENCHMARKS) - {"fake", "needy"}: monkeypatch.delitem(BENCHMARKS, name)
    said = []
    record = run_benchmarks(device="cpu", seconds=.01, report=said.append)
    assert record["left_out"] == {"needy": "needs no_such_package"} and "needy: left out, needs no_such_package" in said
    assert len(record["rows"]) == 2


def test_finished_rows_outlive_a_failure(fake, tmp_path):
    @benchmark("broken")
    def broken(device): raise RuntimeError("no")

    out = tmp_path / "record.json"
    with pytest.raises(RuntimeError, match="no"): run_benchmarks(["fake", "broken"], "cpu", .01, out)
    assert len(json.loads(out.read_text())["rows"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["record.json"]


def test_list(capsys):
    lap_bench(list=True)
    lines = capsys.readouterr().out.splitlines()
    assert lines[:2] == ["trace-overhead", "step-overhead"] and "published-loop (slow: only if named)" in lines


def test_command_line(tmp_path):
    run = lambda *args: subprocess.run([
        sys.executable, "-c", "from lap_nb.lab import cli\nfrom fastcore.script import anno_parser\n"
        "args = vars(anno_parser(cli.lap_bench.__wrapped__, 'lap_bench').parse_args())\nargs = {k: v for k, v in "
        "args.items() if k not in ('pdb', 'xtra')}\n"
        "cli.lap_bench(**args)", *args], capture_output=True, text=True)
    done = run("nothing", "step-overhead", "--out", str(tmp_path / "x.json"))
    assert done.returncode == 2 and "no benchmark 'nothing'" in done.stderr and done.stderr.count("\n") == 1


# The benchmarks themselves, small

def costs(sides):
    "What each side of each comparison costs, run once; all of it positive."
    rows = {s.name: (s.top(), s.bottom()) for s in sides}
    assert all(cost > 0 for pair in rows.values() for cost in pair)
    return rows


def test_loops_and_rows_of_networks_run():
    assert list(costs(bench._fit_overhead(CPU, epochs=1))) == ["fit-overhead"]
    assert list(costs(bench._ensemble_speedup(CPU, members=2, epochs=1))) == ["ensemble-speedup"]


def test_both_routes_part_the_circles_or_say_so():
    pytest.importorskip("torchdiffeq",
                        reason="torchdiffeq is not installed: pip install torchdiffeq, then run this again")
    costs(bench._ode_route(CPU))   # each side raises if it does not
    with pytest.raises(RuntimeError, match="do not do the same work"): bench._ode_route(CPU, steps=1)[0].top()


@pytest.mark.parametrize("name", ["trace-overhead", "step-overhead"])
def test_steps_are_compared_in_time_and_in_memory(monkeypatch, name):
    small = bench._Steps
    monkeypatch.setattr(bench, "_Steps", lambda device, batch: small(device, width=4, batch=2))
    rows = costs(BENCHMARKS[name](CPU))
    assert list(rows) == [name, f"{name}-memory"]
    top, bottom = rows[f"{name}-memory"]
    assert top <= 1.05 * bottom


def test_variants_of_a_gpu():
    assert bench._settings(CPU, 16) == [("", dict(batch=16))]
    assert [name for name, _ in bench._settings(torch.device("cuda"), 16)] == [
        "",
        "-bf16",
        "-compiled",
        "-compiled-bf16",
    ]


@pytest.mark.parametrize("name, n", [("exact-gap", 2048), ("exact-gap-4096", 4096)])
def test_gaps_are_compared_with_two_solvers(monkeypatch, name, n):
    few, threads = bench._moved_digits(60), torch.get_num_threads()
    monkeypatch.setattr(bench, "_moved_digits", lambda points: few)
    assert list(costs(BENCHMARKS[name](CPU))) == [f"exact-gap-{n}", f"exact-gap-{n}-pot", f"exact-gap-{n}-scipy"]
    assert torch.get_num_threads() == threads


def test_the_published_loop_is_compared(monkeypatch):
    pictures, conv_net = bench._pictures, bench.conv_net
    monkeypatch.setattr(bench, "_pictures", lambda n, test, device: pictures(40, 20, device))
    monkeypatch.setattr(bench, "conv_net", lambda shape, classes, width: conv_net(shape, classes, K=2, width=4))
    assert list(costs(BENCHMARKS["published-loop"](CPU))) == ["published-loop"]


# What a step may not do

@pytest.fixture(scope="module")
def steps(): return bench._Steps(CPU, width=4, batch=2)


@pytest.mark.parametrize("way", ["trace", "action"])
def test_no_second_forward_pass_and_no_more_memory(steps, way):
    net, calls = steps.way["plain"][0], []
    hook = net[0].register_forward_hook(lambda *args: calls.append(1))
    steps(way)
    hook.remove()
    assert len(calls) == 1
    assert steps(way, memory) <= 1.05 * steps("plain", memory)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())


def test_no_graph_break_is_added():
    steps = bench._Steps(CPU, width=4, batch=2)
    net, x = steps.way["plain"][0], steps.x
    torch._dynamo.reset()
    plain = torch._dynamo.explain(net)(x)
    torch._dynamo.reset()
    with EnergyMeter(net, steps.blocks) as meter:
        traced = torch._dynamo.explain(net)(x)
        assert len(meter.take()) == 5
    torch._dynamo.reset()
    assert (traced.graph_break_count, traced.graph_count) == (plain.graph_break_count, plain.graph_count) == (0, 1)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("way", ["trace", "action"])
def test_no_device_synchronisation(way, compiled):
    device = torch.device("cuda")
    steps = bench._Steps(device, width=8, batch=4, compiled=compiled)
    net, model, opt, watch = steps.way[way]
    watch = watch or steps._watch(net, way)
    for _ in range(2): steps.step(model, opt, watch)   # optimizer state, compilation
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try: steps.step(model, opt, watch)
    finally: torch.cuda.set_sync_debug_mode("default")

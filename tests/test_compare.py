"The comparison as users meet it: the command, its files, and its mistakes."
import gzip
import hashlib
import os
import shutil
import struct
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from cells import WIDEST

from lap_nb.data import digits
from lap_nb.nets import dense_net, init_velocities_
from lap_nb.ensembles import fit_many
from lap_nb.kinetic import block_energies
from lap_nb.lab import run
from lap_nb.lab.analysis import Records, standings
from lap_nb.lab.catalogue import comparison, load_study
from lap_nb.lab.cli import lap_compare
from lap_nb.lab.compare import METHODS, Comparison, compare
from lap_nb.lab.run import run_study
from lap_nb.least_action import DualAscent, LeastAction

SMALL = dict(seeds=2, epochs=2, n=30)
ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def out(tmp_path_factory): return tmp_path_factory.mktemp("compare")


@pytest.fixture(scope="module")
def result(out): return compare(**SMALL, out=out)


@pytest.fixture
def copy(result, out, tmp_path):
    "The files of `result`, in a folder of their own."
    for name in ("lap_compare.jsonl", "lap_compare.png"): shutil.copy(out / name, tmp_path)
    return tmp_path


@pytest.fixture
def no_training(monkeypatch):
    "Fail if anything is trained."
    def refuse(*args, **kwargs): raise AssertionError("training started before the mistake was found")
    monkeypatch.setattr(run, "fit_many", refuse)


def refused(capsys, **settings):
    "The message of a command that must end with status 2."
    with pytest.raises(SystemExit) as end: lap_compare(**settings)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_rows_are_complete(result):
    keys = {
        "method", "seed", "n", "test_accuracy_last", "test_accuracy_best", "energy_per_sample", "straightness",
        "lambda"}
    assert [[r["seed"] for r in result.of(m).rows] for m in METHODS] == [[0, 1]] * 6 and len(result.rows) == 12
    for method in METHODS:
        for row in result.of(method).rows:
            assert keys <= set(row) and (row["lambda"] is not None) == (method in ("constant-weight", "least-action"))
            assert row["energy_per_sample"] == pytest.approx(sum(row["energy_per_block"]), rel=1e-5)
            assert 0 <= row["straightness"] <= 1 and 0 <= row["test_accuracy_last"] <= 1


@pytest.mark.parametrize("method, gain, objective", [("plain", None, None), ("gain-0.5", .5, None), ("least-action", None, partial(LeastAction, controller=DualAscent(1., tau=1.)))])
def test_rows_are_what_a_training_by_hand_gives(result, method, gain, objective):
    "With `fit_many`'s own settings; a record keeps six digits."
    split = digits().splits(SMALL["n"], range(2))
    make = lambda: dense_net(64, 10) if gain is None else init_velocities_(dense_net(64, 10), gain)
    runs = fit_many(make, split, range(2), objective, epochs=SMALL["epochs"])
    for i, row in enumerate(result.tried.where(method=method).rows):
        with torch.no_grad(): traj = runs[i].model.eval().trajectory(split.x[split.test])
        mine = [
            runs[i].last["test_accuracy"].item(), runs[i].best_test_accuracy.item(),
            block_energies(traj).mean(1).sum().item(),
            traj.straightness().mean().item()]
        theirs = [row[k] for k in ("test_accuracy_last", "test_accuracy_best", "energy_per_sample", "straightness")]
        torch.testing.assert_close(torch.tensor(theirs), torch.tensor(mine), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("family", ["plain-lr", "plain-gain", "label-smoothing", "constant-weight"])
def test_settings_are_chosen_by_validation(result, family):
    tried = {
        method: rows.values("val_accuracy_last").mean().item()
        for method, rows in result.tried.where(family=family).by("method").items()}
    assert len(tried) == 3 and {r["method"] for r in result.of(family).rows} == {max(tried, key=tried.get)}


def test_no_choice_of_the_demo_is_at_the_edge_of_its_grid():
    recorded = Comparison.load(ROOT / "nbs" / "results")
    edges = {row["family"]: row["edge"] for row in standings(recorded.tried)}
    assert edges and not any(edges.values()), edges


def test_same_seeds_give_the_same_table(result, tmp_path):
    assert compare(**SMALL, out=tmp_path).table() == result.table()


def test_more_seeds_are_added_and_the_first_ones_stay(result, copy):
    before = (copy / "lap_compare.jsonl").read_bytes()
    more = compare(**SMALL | dict(seeds=3), out=copy, resume=True)
    for method in METHODS: assert len(more.of(method)) == 3
    assert more.of("plain").rows[:2] == result.of("plain").rows and (
        copy / "lap_compare.jsonl").read_bytes().startswith(before)


def test_a_record_holds_several_comparisons(result, copy):
    other = compare(**SMALL | dict(epochs=1), out=copy, resume=True)
    assert other.table() != result.table() == Comparison.load(copy, comparison(**SMALL)).table()


def test_advantage_is_paired(result):
    by_hand = [
        100 * (a["test_accuracy_last"] - b["test_accuracy_last"])
        for a, b in zip(result.of("least-action").rows,
                        result.of("plain").rows)]
    assert result.advantage("plain").mean == pytest.approx(sum(by_hand) / 2)


def test_saved_record_draws_the_same_table_and_picture(result, out):
    again = Comparison.load(out, comparison(**SMALL))
    assert again.table() == result.table() and again.png() == (out / "lap_compare.png").read_bytes()


def test_it_is_a_study_like_the_others(result, copy):
    study = comparison(**SMALL)
    assert load_study("lap_compare").grids == comparison().grids and run_study(study, copy, device="cpu") == 0


def test_the_table_of_the_demo_keeps_its_lines_on_the_page():
    assert max(map(len, Comparison.load(ROOT / "nbs" / "results").table().splitlines())) <= WIDEST


def test_the_demo_is_on_record():
    "Its means, as `fit_many` gives them by hand from the same seeds, to the digits of a record."
    recorded = Comparison.load(ROOT / "nbs" / "results")
    means = dict(zip(METHODS, (93.475712, 94.706881, 94.162479, 96.365163, 96.256275, 95.778895)))
    found = {m: recorded.of(m).confidence_interval() for m in METHODS}
    assert {m: i.mean for m, i in found.items()} == pytest.approx(means, abs=1e-4)
    assert [str(found[m]) for m in ("plain", "least-action")] == ["93.5 ± 0.4", "95.8 ± 0.3"]


def test_diverged_networks_are_not_averaged_away(result):
    rows = [
        row | dict(diverged=True, test_accuracy_last=None) if
        (row["method"], row["seed"]) == ("least-action", 1) else row for row in result.rows.rows]
    broken = replace(result, rows=Records(rows, result.rows.runs))
    for show in (broken.table, broken.plot, broken.advantage):
        with pytest.raises(
                FloatingPointError,
                match="least-action diverged with the seeds 1: there is nothing to compare, lower lambda0 or tau"):
            show()


def test_a_record_that_is_not_complete_is_refused(result, copy):
    with pytest.raises(ValueError, match="has 32 of 46 networks: go on with it by lap_compare --resume"):
        Comparison.load(copy, comparison(**SMALL | dict(seeds=3)))


def test_failed_write_leaves_nothing_behind(copy, monkeypatch):
    before = {p.name: p.read_bytes() for p in copy.iterdir() if p.is_file()}
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): compare(**SMALL, out=copy, force=True)
    assert {p.name: p.read_bytes() for p in copy.iterdir() if not p.name.startswith(".")} == before and not list(
        copy.glob(".lap_compare-*")
    )


def test_force_begins_anew(copy):
    before = (copy / "lap_compare.jsonl").read_bytes()
    compare(**SMALL, out=copy, force=True)
    after = (copy / "lap_compare.jsonl").read_bytes()
    assert (
        after != before
        and len(after.splitlines()) == len(before.splitlines())
        and not list(copy.glob(".lap_compare-*"))
    )


@pytest.mark.parametrize("settings, message", [
    (dict(data="squares"), "circles, "), (dict(device="abacus"), "cpu"), (dict(epochs=0), "epochs is 0, expected"),
    (dict(seeds=1), "seeds is 1, expected"), (dict(n=5000), "5,000"), (dict(n=9), "10 classes"), (dict(n=-3), "n is -3"),
    (dict(lambda0=0.), "lambda0 is 0.0"), (dict(tau=-1.), "tau is -1"), (dict(every=0), "every is 0"),
    (dict(data="mnist", root="/nowhere/at/all"), "/nowhere/at/all")])
def test_mistakes_are_said_before_any_training(settings, message, capsys, no_training, tmp_path):
    said = refused(capsys, out=str(tmp_path), **settings)
    assert said.startswith("lap_compare: error: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["lap_compare.jsonl", "lap_compare.png"])
def test_existing_results_are_kept(name, capsys, no_training, tmp_path):
    kept = tmp_path / name
    kept.write_text("mine")
    said = refused(capsys, out=str(tmp_path))
    assert str(kept) in said and "--force" in said and "--resume" in said and kept.read_text() == "mine"


def test_unwritable_folder_is_said_before_training(capsys, no_training, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write to the folder" in refused(capsys, out=str(tmp_path / "file" / "below"))


def test_read_only_folder_is_said_before_training(capsys, no_training, tmp_path):
    if os.geteuid() == 0: pytest.skip("root may write anywhere: run as an ordinary user to see this test")
    tmp_path.chmod(0o500)
    assert "cannot write to the folder" in refused(capsys, out=str(tmp_path))


def test_altered_data_file_names_file_and_checksums(capsys, no_training, tmp_path):
    folder = tmp_path / "mnist"
    folder.mkdir()
    for name, header in (
        ("train-images-idx3-ubyte", struct.pack(">4i", 2051, 1, 28, 28)),
        ("train-labels-idx1-ubyte", struct.pack(">2i", 2049, 1)),
        ("t10k-images-idx3-ubyte", struct.pack(">4i", 2051, 1, 28, 28)),
        ("t10k-labels-idx1-ubyte", struct.pack(">2i", 2049, 1)),
    ):
        (folder / f"{name}.gz").write_bytes(gzip.compress(header))
    said = refused(capsys, data="mnist", root=str(tmp_path), out=str(tmp_path / "out"))
    assert ".gz" in said and any(hashlib.md5(f.read_bytes()).hexdigest() in said for f in folder.iterdir())


def test_command_runs_on_the_plane(tmp_path):
    command = [
        str(Path(sys.executable).with_name("lap_compare")), "--data", "moons", "--n", "40", "--seeds", "2", "--epochs",
        "2", "--out",
        str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "least-action" in done.stdout and "100%" in done.stderr
    found = Comparison.load(tmp_path, comparison("moons", 40, 2, 2))
    assert {row["data"] for row in found.plane.rows} == {"moons"} and (tmp_path / "lap_compare.png").exists()


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_pictures_of_the_real_sets(name, tmp_path):
    root = os.environ.get("LAP_NB_DATA") or Path(__file__).parents[2] / "shared" / "data"
    if not all((Path(root) / name).is_dir() for name in ("mnist", "fashion-mnist")):
        pytest.skip("no folder with the larger data sets: set LAP_NB_DATA")
    rows = compare(name, n=100, seeds=2, epochs=2, root=str(root), out=tmp_path).rows.rows
    assert len(rows) == 12 and all(len(r["energy_per_block"]) == 9 for r in rows)

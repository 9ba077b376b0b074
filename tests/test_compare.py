"The comparison as users meet it: the command, its files, and its mistakes."
import gzip
import hashlib
import json
import os
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from lap_nb.lab import compare as module
from lap_nb.lab.cli import lap_compare
from lap_nb.lab.compare import Comparison, METHODS, compare

SMALL = dict(seeds=2, epochs=2, n=30)


@pytest.fixture(scope="module")
def result(): return compare(**SMALL)


@pytest.fixture
def no_training(monkeypatch):
    "Fail if anything is trained."
    def refuse(*args, **kwargs): raise AssertionError("training started before the mistake was found")
    monkeypatch.setattr(module, "fit_many", refuse)


def refused(capsys, **settings):
    "The message of a command that must end with status 2."
    with pytest.raises(SystemExit) as end: lap_compare(**settings)
    assert end.value.code == 2
    return capsys.readouterr().err


def test_rows_are_complete_and_plain_json(result):
    keys = {"method", "seed", "n", "test_accuracy_last", "test_accuracy_best", "energy_per_sample", "straightness", "lambda"}
    assert [(r["method"], r["seed"]) for r in result.rows] == [(m, s) for m in METHODS for s in range(2)]
    for row in result.rows:
        assert keys <= set(row) and (row["lambda"] is None) == (row["method"] != "least-action")
        assert row["energy_per_sample"] == pytest.approx(sum(row["energy_per_block"]))
        assert 0 <= row["straightness"] <= 1 and 0 <= row["test_accuracy_last"] <= 1
    json.dumps([result.provenance, result.rows, result.example], allow_nan=False)


def test_gain_is_chosen_by_validation(result):
    tried = result.provenance["validation_accuracy_of_gain"]
    assert {r["gain"] for r in result.rows if r["method"] == "plain-tuned"} == {float(max(tried, key=tried.get))}


def test_same_seeds_give_the_same_table(result): assert compare(**SMALL).table() == result.table()


def test_more_seeds_leave_the_first_ones_alone(result):
    more = compare(**SMALL | dict(seeds=3))
    for method in ("plain", "least-action"):
        torch.testing.assert_close(more.values(method, "energy_per_sample")[:2], result.values(method, "energy_per_sample"), rtol=1e-3, atol=0)


def test_advantage_is_paired(result):
    by_hand = [100 * (a["test_accuracy_last"] - b["test_accuracy_last"]) for a, b in zip(result.rows[4:], result.rows[:2])]
    assert result.advantage("plain").mean == pytest.approx(sum(by_hand) / 2)


def test_saved_record_draws_the_same_table_and_picture(result, tmp_path):
    record, picture = result.save(tmp_path)
    again = Comparison.load(record)
    assert again.table() == result.table() and again.png() == picture.read_bytes()


def test_failed_write_leaves_nothing_behind(result, tmp_path, monkeypatch):
    record, picture = result.save(tmp_path)
    before = record.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *a: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"): result.save(tmp_path, force=True)
    assert record.read_bytes() == before and {p.name for p in tmp_path.iterdir()} == {record.name, picture.name}


@pytest.mark.parametrize("content, message", [("{", "not a JSON file"), ("[]", "format None"), ('{"format": 99}', "format 99, expected 1")])
def test_foreign_records_are_refused(content, message, tmp_path):
    file = tmp_path / "x.json"
    file.write_text(content)
    with pytest.raises(ValueError, match=message): Comparison.load(file)


@pytest.mark.parametrize("settings, message", [
    (dict(data="squares"), "circles, "), (dict(device="abacus"), "cpu"), (dict(epochs=0), "epochs is 0, expected"),
    (dict(seeds=1), "seeds is 1, expected"), (dict(n=5000), "5,000"), (dict(n=9), "10 classes"), (dict(n=-3), "n is -3"),
    (dict(lambda0=0.), "lambda0 is 0.0"), (dict(tau=-1.), "tau is -1"), (dict(every=0), "every is 0"),
    (dict(data="mnist", root="/nowhere/at/all"), "/nowhere/at/all")])
def test_mistakes_are_said_before_any_training(settings, message, capsys, no_training, tmp_path):
    said = refused(capsys, out=str(tmp_path), **settings)
    assert said.startswith("lap_compare: error: ") and message in said and said.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_existing_results_are_kept(capsys, no_training, tmp_path):
    kept = tmp_path / "lap_compare.json"
    kept.write_text("mine")
    said = refused(capsys, out=str(tmp_path))
    assert str(kept) in said and "--force" in said and kept.read_text() == "mine"


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
    for name, header in (("train-images-idx3-ubyte", struct.pack(">4i", 2051, 1, 28, 28)), ("train-labels-idx1-ubyte", struct.pack(">2i", 2049, 1)),
                         ("t10k-images-idx3-ubyte", struct.pack(">4i", 2051, 1, 28, 28)), ("t10k-labels-idx1-ubyte", struct.pack(">2i", 2049, 1))):
        (folder / f"{name}.gz").write_bytes(gzip.compress(header))
    said = refused(capsys, data="mnist", root=str(tmp_path), out=str(tmp_path / "out"))
    assert ".gz" in said and any(hashlib.md5(f.read_bytes()).hexdigest() in said for f in folder.iterdir())


def test_command_runs_on_the_plane(tmp_path):
    command = [str(Path(sys.executable).with_name("lap_compare")), "--data", "moons", "--n", "40", "--seeds", "2", "--epochs", "2", "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "least-action" in done.stdout and "100%" in done.stderr
    assert json.loads((tmp_path / "lap_compare.json").read_text())["example"]["data"] == "moons"


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist"])
def test_pictures_of_the_real_sets(name):
    root = os.environ.get("LAP_NB_DATA") or Path(__file__).parents[2] / "shared" / "data"
    if not all((Path(root) / name).is_dir() for name in ("mnist", "fashion-mnist")): pytest.skip("no folder with the larger data sets: set LAP_NB_DATA")
    rows = compare(name, n=100, seeds=2, epochs=2, root=str(root)).rows
    assert len(rows) == 6 and all(len(r["energy_per_block"]) == 9 for r in rows)

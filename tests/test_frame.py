"""analysis.frame: a row for what there is, none for what can't be read, and fast enough for large sweeps."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest

from analysis import frame
from analysis.cells import read, unfinished
from hcache.records import config_hash, read_result
from tests.test_analysis_table import leave

ROOT = Path(__file__).parents[1]


def test_a_row_holds_what_the_record_says(tmp_path: Path) -> None:
    where = leave(
        tmp_path, "snapkv", 0.25, 0.75, resident=0.26, device="a GPU", host=7, options={"window": 4}
    )
    record = read_result(where)
    assert record is not None
    (row,) = frame.cells(read([tmp_path])).to_dict("records")
    assert row["directory"] == str(where)
    assert (row["method"], row["label"], row["budget"], row["kept"]) == ("snapkv", "snapkv", "f0.25", "0.25")
    assert (row["tag"], row["model"], row["benchmark"], row["seed"]) == ("tag", "m", "b", 0)
    assert (row["status"], row["score"], row["n"], row["device"]) == ("completed", 75.0, 20, "a GPU")
    assert row["config_hash"] == record["config_hash"]
    for column, path in (*frame.MEASURED.items(), *frame.PLACE.items()):
        value = record
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        assert row[column] == value or (value is None and pd.isna(row[column])), column
    assert row["resident_fraction"] == pytest.approx(0.26)
    assert row["host_kv_bytes"] == 7
    spread = [row[f"prefill_ms{part}"] for part in ("_p10", "", "_p90")]
    assert spread == [1.0, 1.0, pytest.approx(10.0)]


def test_tasks_and_examples_join_their_cells(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None, scores=[1.0, 0.5])
    leave(tmp_path, "snapkv", 0.25, scores=[0.0, 0.5], prefill_ms=3.0)
    found = read([tmp_path])
    tasks, examples = frame.tasks(found), frame.examples(found)
    assert list(tasks["task"]) == ["one", "two"] * 2
    assert list(tasks["score"]) == pytest.approx([75, 75, 25, 25])
    assert (tasks["low"] < tasks["score"]).all()
    assert (tasks["score"] < tasks["high"]).all()
    assert len(examples) == 8
    means = examples.groupby(["directory", "task"])["score"].mean()
    for row in tasks.itertuples():
        assert means[row.directory, row.task] == pytest.approx(row.score)
    assert set(examples["directory"]) == {str(cell.directory) for cell in found}
    assert list(frame.cells(found).columns[: len(frame.WHO)]) == list(frame.WHO)


def test_averages_of_a_benchmark_are_rows_of_their_own_kind(tmp_path: Path) -> None:
    where = leave(tmp_path, "snapkv", 0.25)
    record = json.loads((where / "result.json").read_text())
    record["aggregates"] = {"english": {"score": 40.0, "n": 20, "ci95": [30.0, 55.0]}}
    (where / "result.json").write_text(json.dumps(record))
    tasks = frame.tasks(read([tmp_path]))
    assert list(tasks["kind"]) == ["task", "task", "average"]
    last = tasks.iloc[-1]
    assert (last["task"], last["score"], last["low"], last["high"], last["n"]) == ("english", 40, 30, 55, 20)


def test_a_half_finished_sweep(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "fullkv", None)
    leave(tmp_path, "omnikv", 0.1, infeasible=0.2)
    begun = leave(tmp_path, "snapkv", 0.25)
    (begun / "result.json").unlink()
    torn = leave(tmp_path, "h2o", 0.25)
    (torn / "result.json").write_text((torn / "result.json").read_text()[:300])
    foreign = tmp_path / "tag" / "m" / "other" / "result.json"
    foreign.parent.mkdir()
    foreign.write_text('{"loss": 1}')
    (tmp_path / "tag" / "list").mkdir()
    (tmp_path / "tag" / "list" / "result.json").write_text("[]")
    found = read([tmp_path])
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 3
    assert sum(f"left out: {torn / 'result.json'} can't be read" in line for line in said) == 1
    assert sum(f"left out: {foreign} is no record of a cell" in line for line in said) == 1
    cells = frame.cells(found, unfinished([tmp_path])).set_index("method")
    assert dict(cells["status"]) == {"fullkv": "completed", "omnikv": "infeasible", "snapkv": "unfinished"}
    assert cells.loc["omnikv", "smallest_fraction"] == 0.2
    assert pd.isna(cells.loc["omnikv", "score"])
    assert (cells.loc["snapkv", "budget"], cells.loc["snapkv", "n"]) == ("f0.25", 20)
    assert set(frame.tasks(found)["method"]) == {"fullkv"}


def test_a_torn_line_is_named_and_the_others_count(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    where = leave(tmp_path, "snapkv", 0.25, scores=[1.0, 0.0])
    with (where / "predictions.jsonl").open("ab") as file:
        file.write(b'{"task": "one"}\n{"task": "one", "id": "9", "sco\xff')
    examples = frame.examples(read([tmp_path]))
    assert len(examples) == 4
    first, second = capsys.readouterr().err.splitlines()
    assert f"line 5 of {where / 'predictions.jsonl'}: it has no task, id and score" in first
    assert "line 6" in second


def test_nothing_that_can_be_read_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(ValueError, match=r"no result.json below .* can be read; give outputs"):
        read([tmp_path])


def test_one_directory_or_several_as_paths_or_text(tmp_path: Path) -> None:
    leave(tmp_path / "a", "snapkv", 0.25)
    leave(tmp_path / "b", "h2o", 0.25)
    one, both = read(tmp_path / "a"), read([tmp_path / "a", tmp_path / "b"])
    assert [cell.method for cell in one] == ["snapkv"]
    assert [cell.method for cell in both] == ["snapkv", "h2o"]
    assert read(str(tmp_path / "a")) == one
    assert read([str(tmp_path / "a"), tmp_path / "b"]) == both


def test_labels_tell_settings_apart_and_families_seeds(tmp_path: Path) -> None:
    for window, seed in ((8, 0), (8, 1), (16, 0)):
        leave(tmp_path, "snapkv", 0.25, options={"window": window}, seed=seed)
    leave(tmp_path, "snapkv", 0.25, options={"window": 32}, model="another")
    cells = frame.cells(read([tmp_path])).sort_values(["model", "label", "seed"])
    assert list(cells["label"]) == ["snapkv", "snapkv (window=16)", *["snapkv (window=8)"] * 2]
    assert cells["family"].nunique() == 2
    assert cells["setting"].nunique() == 3


def test_the_command_line_writes_each_frame(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path / "in", "snapkv", 0.25)
    for name, rows in (("cells", 1), ("tasks", 2), ("examples", 20)):
        out = tmp_path / "csv" / f"{name}.csv"
        assert frame.main([name, str(tmp_path / "in"), "--out", str(out)]) == 0
        assert len(pd.read_csv(out)) == rows
        assert frame.main([name, str(tmp_path / "in")]) == 0
        assert capsys.readouterr().out == out.read_text()
    assert frame.main(["cells", str(tmp_path / "none")]) == 2


def test_without_pandas_it_says_what_to_install() -> None:
    code = "import sys; sys.modules['pandas'] = None; import analysis.table"
    said = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert said.returncode == 1
    assert said.stderr.splitlines()[-1].endswith("not installed: pip install 'hcache[analysis]'")


def test_two_thousand_cells_load_in_five_seconds(tmp_path: Path) -> None:
    """Processor time, since other tests may share the machine; a third of it is what it takes."""
    where = leave(tmp_path / "one", "snapkv", 0.25)
    record, lines = read_result(where), (where / "predictions.jsonl").read_text()
    assert record is not None
    record["config"]["method"] |= {f"option{i}": {"floor": i} for i in range(15)}
    for number in range(2000):
        record["config"]["method"]["window"] = number // 4
        record["config"]["runtime"]["seed"] = number % 4
        record["config_hash"] = config_hash(record["config"])
        directory = tmp_path / "all" / f"snapkv-f0.25-s{number % 4}-{number:08x}"
        directory.mkdir(parents=True)
        (directory / "result.json").write_text(json.dumps(record, indent=1))
        (directory / "predictions.jsonl").write_text(lines)
    started = time.process_time()
    found = read([tmp_path / "all"])
    cells, tasks = frame.cells(found), frame.tasks(found)
    seconds = time.process_time() - started
    assert (len(cells), len(tasks)) == (2000, 4000)
    assert cells["label"].nunique() == 500
    assert seconds < 5, f"{seconds:.1f} s"

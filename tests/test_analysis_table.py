"""analysis.table on records as runs leave them: every figure is one of theirs, what is missing is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from analysis.table import main
from hcache.records import Cell, Predictions, config_hash, read_result, write_result
from runners.summary import summarise

PLACE = {"git": "0123456789abcdef", "dirty": False, "versions": {"torch": "2.1"}, "device": "a CPU"}


def leave(root: Path, method: str, kept: float | None, score: float = 0.5, **changes: Any) -> Path:
    """A cell as a run leaves it, 10 examples of two tasks; returns its directory.

    kept: fraction, None for a method without a budget. Changes: `infeasible` (the smallest fraction),
    `options` of the method, `model`, `tag`, `notes`, `seed`, `benchmark_seed`; `device`, `git`, `started` of
    the provenance; `scores` of the examples of each task, in place of 10 times `score`; else of the lines,
    see `line`.
    """
    seed, scores = changes.pop("seed", 0), changes.pop("scores", [score] * 10)
    facts = {"seed": changes.pop("benchmark_seed")} if "benchmark_seed" in changes else {}
    tag, model = changes.pop("tag", "tag"), changes.pop("model", "m")
    config = {
        "model": {"name": model},
        "benchmark": {"name": "b", "tasks": ["one", "two"], **facts},
        "method": {"name": method, **changes.pop("options", {})},
        "budget": None if kept is None else {"kept_fraction": kept, "kept_tokens": None},
        "runtime": {"seed": seed, "batch_size": 1},
    }
    label = "full" if kept is None else f"f{kept:g}"
    cell = Cell(tag, model, "b", method, label, seed, config_hash(config))
    place = {**PLACE, "started": "2026-01-02T03:04:05+00:00"}
    place |= {key: changes.pop(key) for key in list(changes) if key in place}
    result = {
        "schema": 1,
        "status": "completed",
        "cell": cell.record(),
        "config": config,
        "config_hash": cell.config_hash,
        "provenance": place,
        "notes": changes.pop("notes", []),
    }
    budget = {"requested_fraction": kept or 1.0, "requested_tokens": None}
    if "infeasible" in changes:
        error = {"message": "no", "smallest_fraction": changes["infeasible"], "smallest_tokens": 40}
        result |= {"status": "infeasible", "error": error, "budget": budget}
    else:
        fraction = {"resident": kept or 1.0, "attended": kept or 1.0}
        own = [(str(i), task, found) for i, found in enumerate(scores) for task in ("one", "two")]
        lines = [{"id": i, **line(task, found, **{**fraction, **changes})} for i, task, found in own]
        for slow in lines[:4]:  # so that a median is not a mean, nor another percentile
            slow |= {key: 10 * slow[key] for key in ("prefill_ms", "decode_ms")}
        result |= {**summarise(lines, budget), "score": 100 * sum(scores) / len(scores)}
        Predictions(cell.directory(root)).rewrite(lines)
    return write_result(cell.directory(root), result).parent


def line(
    task: str,
    score: float,
    resident: float,
    attended: float,
    prefill_ms: float = 1.0,
    decode_ms: float = 1.0,
    host: float = 0,
    moved: float = 0,
) -> dict[str, Any]:
    """A line of predictions.jsonl, with as much as the summary reads; one token is decoded."""
    memory = {"device_payload": 1000 * resident, "device_metadata": 0, "device_reserved": 0}
    memory |= {"host_payload": host, "full_kv_bytes": 1000, "peak_device_bytes": None}
    counters = {"attended_fraction": attended, "host_to_device_bytes": moved}
    known = {"task": task, "metric": "exact", "score": score, "adjusted_budget_tokens": None}
    times = {"prefill_ms": prefill_ms, "decode_ms": decode_ms, "decode_steps": 1, "batch": 0}
    return {**known, **times, "memory": memory, "counters": counters}


def shown(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> tuple[list[dict[str, str]], str]:
    """Rows by header, and the text below the table."""
    assert main([str(argument) for argument in arguments]) == 0
    table, below = capsys.readouterr().out.split("\n\n", 1)
    header, rule, *rows = ([part.strip() for part in row.strip("|").split("|")] for row in table.split("\n"))
    assert set(rule) == {"---"}
    assert {len(rule), *map(len, rows)} == {len(header)}
    return [dict(zip(header, row, strict=True)) for row in rows], below


def test_figures_are_those_of_the_records(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "fullkv", None, 1.0, prefill_ms=100, decode_ms=10)
    times = {"prefill_ms": 150, "decode_ms": 7.5, "host": 3 * 2**20, "moved": 2560}
    where = leave(tmp_path, "omnikv", 0.25, 0.8, resident=0.2531, attended=0.24, **times)
    (full, omnikv), below = shown(capsys, tmp_path)
    record = read_result(where)
    assert record is not None
    low, high = record["tasks"]["one"]["ci95"]
    assert omnikv == {
        "method": "omnikv",
        "kept": "0.25",
        "one": f"80 [{low:.1f}, {high:.1f}]",
        "two": f"80 [{low:.1f}, {high:.1f}]",
        "resident": "0.253",
        "attended": "0.240",
        "host MiB": "3.00",
        "KiB moved/token": "2.50",
        "prefill ms": "150.0 (1.50x)",
        "decode ms/token": "7.5 (0.75x)",
    }
    assert (full["kept"], full["host MiB"], full["prefill ms"]) == ("all", "0", "100.0")
    assert "m on b, n = 10 a task" in below
    assert "Device: a CPU. Started: 2026-01-02." in below
    assert "torch 2.1. Commit: 0123456." in below
    assert "read their ratios with care" not in below


def test_an_infeasible_cell_says_what_it_needs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "omnikv", 0.25)
    leave(tmp_path, "omnikv", 0.1, infeasible=0.33)
    (first, second), _ = shown(capsys, tmp_path)
    assert (first["kept"], first["one"]) == ("0.1", "infeasible, needs >= 0.33")
    assert {value for header, value in first.items() if header not in ("method", "kept", "one")} == {"-"}
    assert second["kept"] == "0.25"


def test_rows_are_ordered_and_a_budget_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for method in ("snapkv", "cake", "h2o"):
        for kept in (0.5, 0.1):
            leave(tmp_path, method, kept)
    leave(tmp_path, "fullkv", None)
    rows, _ = shown(capsys, tmp_path, "--budget", "f0.1")
    assert [row["method"] for row in rows] == ["fullkv", "cake", "h2o", "snapkv"]
    assert [row["kept"] for row in rows] == ["all", "0.1", "0.1", "0.1"]
    rows, _ = shown(capsys, tmp_path, "--order", "snapkv,cake")
    assert [row["method"] for row in rows[::2]] == ["fullkv", "snapkv", "cake", "h2o"]
    assert [row["kept"] for row in rows] == ["all", *["0.1", "0.5"] * 3]


def test_ratios_are_taken_in_one_tag_and_on_one_device(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "fullkv", None, prefill_ms=100)
    leave(tmp_path, "cake", 0.1, prefill_ms=50, device="a GPU", started="2026-01-03T00:00:00+00:00")
    leave(tmp_path, "h2o", 0.1, prefill_ms=50, tag="later")
    leave(tmp_path, "snapkv", 0.1, prefill_ms=50)
    rows, below = shown(capsys, tmp_path)
    assert [row["prefill ms"] for row in rows] == ["100.0", "50.0", "50.0", "50.0 (0.50x)"]
    assert "Device: a CPU; a GPU. Started: 2026-01-02, 2026-01-03." in below
    assert "different devices" in below
    assert "different days" in below


def test_notes_of_records_stand_below(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "heterocache", 0.1, notes=["5 heads stay full"])
    leave(tmp_path, "heterocache", 0.25, notes=["5 heads stay full", "and more"])
    _, below = shown(capsys, tmp_path)
    assert "- heterocache at 0.1, 0.25: 5 heads stay full\n" in below
    assert "- heterocache at 0.25: and more\n" in below


def test_the_table_is_written_where_asked(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path / "in", "snapkv", 0.25)
    assert main([str(tmp_path / "in"), "--out", str(tmp_path / "docs" / "table.md")]) == 0
    assert not capsys.readouterr().out
    assert main([str(tmp_path / "in")]) == 0
    assert (tmp_path / "docs" / "table.md").read_text() == capsys.readouterr().out


def test_what_cannot_be_shown_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def refused(*arguments: str) -> str:
        assert main([str(tmp_path), *arguments]) == 2
        return capsys.readouterr().err

    assert "no result.json below" in refused()
    leave(tmp_path, "omnikv", 0.1, infeasible=0.2)
    assert "no completed cell" in refused()
    leave(tmp_path, "omnikv", 0.25)
    assert "there are: f0.1, f0.25" in refused("--budget", "f25")
    assert "there are: omnikv" in refused("--order", "cake")
    broken = leave(tmp_path, "snapkv", 0.25, model="another")
    assert "differ in model.name" in refused()
    (broken / "result.json").write_text("{")
    assert main([str(tmp_path)]) == 0
    assert "result.json can't be read" in capsys.readouterr().err

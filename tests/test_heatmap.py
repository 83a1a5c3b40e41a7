"""analysis.heatmap: fields are means of records' examples, gaps stay gaps, other benchmarks are refused."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from analysis.cells import read
from analysis.heatmap import collect, draw, main, markdown
from hcache.records import Cell, Predictions, config_hash, write_result

pytest.importorskip("matplotlib")

Grid = Mapping[tuple[int, float], list[float]]
GRID: Grid = {
    (1024, 0.0): [1.0, 0.0],
    (1024, 50.0): [1.0, 1.0],
    (2048, 0.0): [0.25, 0.25],
    (2048, 50.0): [0.0, 0.0],
}


def leave(root: Path, method: str, kept: float | None, grid: Grid = GRID, **changes: Any) -> Path:
    """A cell of the needle as a run leaves it; returns its directory.

    kept: fraction, None for a method without a budget. Changes: `benchmark` (name), `seed` of the benchmark,
    `options` of the method, `status` with an `error`, `notes`, `git`.
    """
    name = changes.get("benchmark", "needle")
    settings = {"needle": "\nIt is here.\n", "question": "Where?", "haystack": None, "query_aware": True}
    config = {
        "model": {"name": "m"},
        "benchmark": {"name": name, "metric": "recall", "seed": changes.get("seed", 0), **settings},
        "method": {"name": method, **changes.get("options", {})},
        "budget": None if kept is None else {"kept_fraction": kept, "kept_tokens": None},
        "runtime": {"seed": 0, "batch_size": 1},
    }
    label = "full" if kept is None else f"f{kept:g}"
    cell = Cell("tag", "m", name, method, label, 0, config_hash(config))
    status = changes.get("status", "completed")
    result = {
        "schema": 1,
        "status": status,
        "cell": cell.record(),
        "config": config,
        "config_hash": cell.config_hash,
        "notes": changes.get("notes", []),
        "provenance": {
            "git": changes.get("git", "0123456789abcdef"),
            "dirty": False,
            "versions": {"torch": "2.1"},
            "device": "a CPU",
            "started": "2026-01-02T03:04:05+00:00",
        },
    }
    directory = cell.directory(root)
    if status == "completed":
        result["tasks"] = tasks(grid)
        Predictions(directory).append(lines(grid))
    else:
        result["error"] = {"message": "no", **changes.get("error", {})}
    write_result(directory, result)
    return directory


def lines(grid: Grid) -> list[dict[str, Any]]:
    return [
        {"task": f"needle_{length}", "id": f"{depth:g}-{i}", "length": length, "depth": depth, "score": score}
        for (length, depth), scores in grid.items()
        for i, score in enumerate(scores)
    ]


def tasks(grid: Grid) -> dict[str, Any]:
    """As result.json has them; the interval is made up, so that it can be known again."""
    found: dict[str, Any] = {}
    for length in {place[0] for place in grid}:
        own = [100 * score for place, scores in grid.items() if place[0] == length for score in scores]
        mean = sum(own) / len(own)
        found[f"needle_{length}"] = {"score": mean, "n": len(own), "ci95": [mean - 1.5, mean + 1.25]}
    return found


def field(axis: Any) -> list[list[float]]:
    """What is drawn, row by row; NaN for a gap."""
    (image,) = axis.images
    return [[float(value) for value in row] for row in image.get_array().filled(math.nan)]


def numbers(axis: Any) -> list[str]:
    return [text.get_text() for text in axis.texts]


def tables(text: str) -> dict[str, list[list[str]]]:
    """Rows of each table, by its heading."""
    found: dict[str, list[list[str]]] = {}
    heading = ""
    for line in text.splitlines():
        if line.startswith("## "):
            heading = line[3:]
        elif line.startswith("| "):
            found.setdefault(heading, []).append([part.strip() for part in line.strip("|").split("|")])
    return found


# --- the figure


def test_fields_are_means_with_depth_down_and_length_across(tmp_path: Path) -> None:
    leave(tmp_path, "snapkv", 0.25)
    (axis, _) = draw(collect(read([tmp_path]))).axes
    assert field(axis) == [[50.0, 25.0], [100.0, 0.0]]
    assert numbers(axis) == ["50", "25", "100", "0"]
    assert [tick.get_text() for tick in axis.get_xticklabels()] == ["1K", "2K"]
    assert [tick.get_text() for tick in axis.get_yticklabels()] == ["0", "50"]
    low, high = axis.get_ylim()
    assert low > high  # the start of the text is at the top
    assert axis.get_title("left") == "snapkv, 0.25 kept: 43.8"


def test_a_panel_for_each_method_and_budget_with_the_baseline_first(tmp_path: Path) -> None:
    for method, kept in (("snapkv", 0.25), ("snapkv", 0.05), ("h2o", 0.25), ("fullkv", None)):
        leave(tmp_path, method, kept, {(1024, 0.0): [0.5], (2048, 0.0): [0.75]} if method == "h2o" else GRID)
    *panels, scale = draw(collect(read([tmp_path]))).axes
    assert [axis.get_title("left").split(":")[0] for axis in panels] == [
        "fullkv, everything kept",
        "h2o, 0.25 kept",
        "snapkv, 0.05 kept",
        "snapkv, 0.25 kept",
    ]
    assert scale.get_ylim() == (0, 100)
    assert {axis.images[0].get_clim() for axis in panels} == {(0, 100)}
    labelled = [bool(axis.get_xlabel()) for axis in panels]
    assert labelled == [False, True, True, True]


def test_missing_fields_are_gaps_and_in_no_mean(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None)
    part = {place: scores for place, scores in GRID.items() if place != (1024, 0.0)}
    leave(tmp_path, "snapkv", 0.25, {**part, (4096, 50.0): [1.0]})
    heatmap = collect(read([tmp_path]))
    figure = draw(heatmap)
    full, snapkv = (field(axis) for axis in figure.axes[:2])
    assert [[math.isnan(score) for score in row] for row in full] == [[False, False, True]] * 2
    assert [[math.isnan(score) for score in row] for row in snapkv] == [
        [True, False, True],
        [False, False, False],
    ]
    assert numbers(figure.axes[1]) == ["25", "100", "0", "100"]
    assert figure.axes[1].get_title("left").endswith(f": {(25 + 100 + 0 + 100) / 4:.1f}")
    assert any(patch.get_hatch() for patch in figure.axes[1].patches)
    said = " ".join(text.get_text() for text in figure.texts).replace("\n", " ")
    assert "Hatched fields have no example." in said
    assert "n = 1 to 2 a field" in said
    found = tables(markdown(heatmap))
    assert found["snapkv, 0.25 kept"][1:] == [["0%", "-", "25", "-"], ["50%", "100", "0", "100"]]
    assert "snapkv, 0.25 kept: 2 of 6 fields have no example" in markdown(heatmap)


def test_a_cell_without_scores_is_a_panel_that_says_why(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None)
    leave(
        tmp_path,
        "omnikv",
        0.1,
        status="infeasible",
        error={"smallest_fraction": 0.33, "smallest_tokens": 40},
    )
    heatmap = collect(read([tmp_path]))
    axis = draw(heatmap).axes[1]
    assert axis.get_title("left") == "omnikv, 0.1 kept"
    assert numbers(axis) == ["infeasible, needs >= 0.33"]
    assert all(math.isnan(score) for row in field(axis) for score in row)
    assert "- omnikv, 0.1 kept: infeasible, needs >= 0.33\n" in markdown(heatmap)


def test_numbers_stand_in_fields_only_where_they_fit(tmp_path: Path) -> None:
    grid = {(1024 * n, 10.0 * depth): [1.0] for n in range(1, 41) for depth in range(11)}
    leave(tmp_path, "fullkv", None, {**grid, (1000, 0.0): [1.0]})
    leave(tmp_path, "snapkv", 0.25, grid)
    axis = draw(collect(read([tmp_path]))).axes[0]
    assert not numbers(axis)
    assert len(axis.get_xticks()) <= 9
    assert [label.get_text() for label in axis.get_xticklabels()[:2]] == ["1000", "5K"]


def test_settings_of_one_method_get_panels_of_their_own(tmp_path: Path) -> None:
    for window in (16, 32):
        leave(tmp_path, "snapkv", 0.25, options={"window": window})
    labels = [panel.label for panel in collect(read([tmp_path])).panels]
    assert sorted(labels) == ["snapkv (window=16)", "snapkv (window=32)"]


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_same_records_give_the_same_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path / "in", "fullkv", None)
    leave(tmp_path / "in", "snapkv", 0.25, {(1024, 0.0): [1.0]})
    files = []
    for name, clock in (("a", "1000000000"), ("b", "1500000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", clock)
        out, table = tmp_path / name / f"figure.{suffix}", tmp_path / name / "table.md"
        assert main([str(tmp_path / "in"), "--out", str(out), "--table", str(table)]) == 0
        files.append(out.read_bytes() + table.read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) > 1000


# --- the tables


def test_tables_hold_the_means_and_the_records_intervals(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "fullkv", None, {place: [1.0] for place in GRID})
    leave(tmp_path, "snapkv", 0.25, notes=["a note"])
    assert main([str(tmp_path)]) == 0
    text = capsys.readouterr().out
    found = tables(text)
    assert found["By length"] == [
        ["method", "kept", "all", "1024 tokens", "2048 tokens"],
        ["fullkv", "all", "100", "100 [98.5, 101.2]", "100 [98.5, 101.2]"],
        ["snapkv", "0.25", "43.8", "75 [73.5, 76.2]", "12.5 [11, 13.8]"],
    ]
    assert found["By depth"] == [
        ["method", "kept", "0%", "50%"],
        ["fullkv", "all", "100", "100"],
        ["snapkv", "0.25", "37.5", "50"],
    ]
    assert found["snapkv, 0.25 kept"] == [
        ["depth", "1024", "2048"],
        ["0%", "50", "25"],
        ["50%", "100", "0"],
    ]
    assert "Date: 2026-01-02. Commit: 0123456. Device: a CPU. Versions: torch 2.1." in text
    assert "Needle: `It is here.`. Question: `Where?`. Haystack: generated prose." in text
    assert text.endswith("## Notes\n\n- snapkv, 0.25 kept: a note\n")


def test_an_interval_of_another_mean_is_not_shown(tmp_path: Path) -> None:
    """Where fields have different numbers of examples, the record's mean is not the mean of the fields."""
    leave(tmp_path, "snapkv", 0.25, {(1024, 0.0): [1.0], (1024, 50.0): [0.0, 0.0, 0.0]})
    (_, row) = tables(markdown(collect(read([tmp_path]))))["By length"]
    assert row == ["snapkv", "0.25", "50", "50"]


# --- what can't be shown


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main([str(argument) for argument in arguments]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ")
    assert said.count("\n") == 1
    return said


def test_records_of_another_benchmark_are_refused_or_left_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "snapkv", 0.25, benchmark="retrieval")
    said = refused(capsys, tmp_path, "--out", tmp_path / "a.png")
    assert "no cell of benchmark needle among the records (there are: retrieval)" in said
    assert not (tmp_path / "a.png").exists()
    leave(tmp_path, "snapkv", 0.25)
    assert main([str(tmp_path)]) == 0
    shown = capsys.readouterr()
    assert "is of benchmark retrieval" in shown.err
    assert "snapkv" in shown.out


def test_other_settings_are_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "snapkv", 0.25)
    leave(tmp_path, "h2o", 0.25, seed=1)
    assert "differ in benchmark.seed (1 and 0)" in refused(capsys, tmp_path)


def test_what_cannot_be_drawn_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "no result.json below" in refused(capsys, tmp_path)
    leave(tmp_path, "omnikv", 0.1, status="failed")
    assert "no completed cell" in refused(capsys, tmp_path)
    directory = leave(tmp_path, "snapkv", 0.25)
    assert "suffix must be one of" in refused(capsys, tmp_path, "--out", tmp_path / "a.gif")
    with (directory / "predictions.jsonl").open("a") as file:
        file.write(json.dumps({"task": "needle_1024", "id": "x", "score": 1.0}) + "\n")
    assert "line 9 of its predictions has no length, depth or score" in refused(capsys, tmp_path)

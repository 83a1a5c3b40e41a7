"""analysis.compare on records written by hand."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from analysis.compare import differences, finished, main

RUNTIME = {"seed": 0, "batch_size": 1}


def leave(root: Path, method: str, scores: list[float], status: str = "completed") -> None:
    """A cell as a run leaves it, with as much as the comparison reads."""
    directory = root / f"{method}-f0.25"
    directory.mkdir(parents=True)
    cell = {"model": "m", "benchmark": "b", "seed": 0, "method": method, "budget": "f0.25"}
    names = {"model": {}, "benchmark": {}, "method": {"name": method}, "budget": None, "runtime": RUNTIME}
    result = {"status": status, "cell": cell, "config": names}
    (directory / "result.json").write_text(json.dumps(result))
    lines = [json.dumps({"task": "multi", "id": str(i), "score": s}) for i, s in enumerate(scores)]
    (directory / "predictions.jsonl").write_text("\n".join(lines) + "\n")


def test_a_planted_difference_is_found_and_none_is_not(tmp_path: Path) -> None:
    leave(tmp_path, "ours", [1.0, 0.5] * 60)
    leave(tmp_path, "worse", [0.75, 0.5] * 60)
    leave(tmp_path, "equal", [0.5, 1.0] * 60)
    cells = {cell.cell["method"]: cell for cell in finished(tmp_path)}
    n, gap = differences(cells["ours"], cells["worse"])["multi"]
    assert (n, gap.difference) == (120, 12.5)
    assert gap.p_value < 0.001
    assert gap.ci[0] > 0
    _, none = differences(cells["ours"], cells["equal"])["multi"]
    assert none.difference == 0
    assert none.p_value > 0.05


def test_different_examples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "ours", [1.0] * 5)
    leave(tmp_path, "other", [1.0] * 4)
    assert main([str(tmp_path), "--against", "ours"]) == 2
    assert "different examples of multi" in capsys.readouterr().err


def test_incomplete_cells_are_named_and_an_unknown_method_says_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "ours", [1.0])
    leave(tmp_path, "broken", [], status="failed")
    assert main([str(tmp_path), "--against", "broken"]) == 2
    said = capsys.readouterr().err
    assert "is failed" in said
    assert "there are: ours" in said


def test_the_table_names_both_methods(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "ours", [1.0] * 30)
    leave(tmp_path, "other", [0.0] * 30)
    assert main([str(tmp_path), "--against", "ours"]) == 0
    said = capsys.readouterr().out
    assert "+100.0" in said
    assert "other f0.25" in said

"""analysis.compare on records written by hand."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.compare import main
from tests.test_analysis_table import leave


def test_the_table_names_both_methods_and_the_numbers_are_those_of_the_csv(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path / "in", "ours", 0.25, scores=[1.0] * 29 + [0.5])
    leave(tmp_path / "in", "other", 0.25, scores=[0.0] * 29 + [0.5])
    out = tmp_path / "gaps.csv"
    assert main([str(tmp_path / "in"), "--against", "ours", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "p (Holm) of 1 comparisons" in said
    assert "p (Holm) of 2 comparisons" in said
    assert "other f0.25" in said
    assert "+96.7" in said
    assert "29/1/0" in said
    found = pd.read_csv(out)
    assert list(found["task"]) == ["all examples", "one", "two"]
    assert list(found["n"]) == [60, 30, 30], "all examples together count alike"
    assert list(found["difference"]) == pytest.approx([100 * 29 / 30] * 3)
    assert list(found["p_holm"]) == pytest.approx(list(found["p"] * [1, 2, 2])), "each table has its own"


def test_different_examples_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "ours", 0.25, scores=[1.0] * 5)
    leave(tmp_path, "other", 0.25, scores=[1.0] * 4)
    assert main([str(tmp_path), "--against", "ours"]) == 2
    assert "different examples of one" in capsys.readouterr().err


def test_incomplete_cells_are_named_and_an_unknown_method_says_what_there_is(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    leave(tmp_path, "ours", 0.25)
    leave(tmp_path, "broken", 0.25, infeasible=0.5)
    assert main([str(tmp_path), "--against", "broken"]) == 2
    said = capsys.readouterr().err
    assert "is infeasible" in said
    assert "there are: ours" in said


def test_a_cell_that_lies_twice_is_compared_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for where in ("a", "b"):
        leave(tmp_path / where, "ours", 0.25)
    leave(tmp_path / "a", "other", 0.25)
    assert main([str(tmp_path), "--against", "ours"]) == 0
    said = capsys.readouterr()
    assert "2 comparisons" in said.out
    assert "is the same cell as" in said.err

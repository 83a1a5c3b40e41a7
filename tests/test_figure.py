"""analysis.figure: every name draws, in the widths that papers have, with type that publishers take."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
import pytest

from analysis.cells import read
from analysis.drawing import COLUMN
from analysis.figure import FIGURES, main
from analysis.task_map import picture
from tests import test_heatmap
from tests.test_analysis_table import leave

pytest.importorskip("matplotlib")


def sweep(root: Path) -> Path:
    leave(root, "fullkv", None, 0.9)
    for kept in (0.1, 0.25):
        leave(root, "snapkv", kept, 2 * kept)
    leave(root, "omnikv", 0.1, infeasible=0.2)
    return root


@pytest.mark.parametrize("name", ["pareto", "budgets", "tasks", "needle"])
def test_a_figure_for_a_column_is_as_wide_and_its_caption_lies_beside_it(tmp_path: Path, name: str) -> None:
    if name == "needle":
        test_heatmap.leave(tmp_path / "in", "snapkv", 0.25)
    else:
        sweep(tmp_path / "in")
    for width, inches in COLUMN.items():
        out = tmp_path / f"{width}.svg"
        assert main([name, str(tmp_path / "in"), "--out", str(out), "--width", width]) == 0
        assert f'width="{72 * inches:g}pt"' in out.read_text()
        assert "commit 0123456" in out.with_suffix(".txt").read_text()
        numbers = pd.read_csv(out.with_suffix(".csv"))
        assert {"label", "method", "kept", "score", "n"} <= set(numbers)
        assert len(numbers) >= 4


def test_a_page_says_at_its_foot_what_a_caption_would(tmp_path: Path) -> None:
    out = tmp_path / "a.svg"
    assert main(["tasks", str(sweep(tmp_path / "in")), "--out", str(out)]) == 0
    assert 'width="576pt"' in out.read_text()
    assert out.with_suffix(".csv").exists()
    assert not out.with_suffix(".txt").exists()


def test_text_in_a_pdf_is_truetype(tmp_path: Path) -> None:
    out = tmp_path / "a.pdf"
    assert main(["pareto", str(sweep(tmp_path / "in")), "--out", str(out), "--width", "one"]) == 0
    content = out.read_bytes()
    assert b"/CIDFontType2" in content
    assert b"/Type3" not in content


def test_a_half_finished_sweep_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sweep(tmp_path / "in")
    torn = leave(tmp_path / "in", "h2o", 0.25) / "result.json"
    torn.write_text(torn.read_text()[:100])
    assert main(["pareto", str(tmp_path / "in"), "--out", str(tmp_path / "a.png")]) == 0
    assert f"left out: {torn}" in capsys.readouterr().err


def test_the_grid_of_tasks_holds_means_of_seeds_and_gaps(tmp_path: Path) -> None:
    leave(tmp_path, "omnikv", 0.1, infeasible=0.2)
    leave(tmp_path, "fullkv", None, 1.0, seed=0)
    for seed in (0, 1):
        leave(tmp_path, "snapkv", 0.25, float(seed), seed=seed)
    found = picture(read([tmp_path]))
    shown = found.data.pivot(index="label", columns="task", values="score")
    assert list(shown.columns) == ["all", "one", "two"]
    assert list(shown.loc["snapkv"]) == [50, 50, 50]
    assert list(shown.loc["fullkv"]) == [100, 100, 100]
    assert shown.loc["omnikv"].isna().all()
    axis = found.draw(6.9, []).axes[0]
    assert [label.get_text() for label in axis.get_yticklabels()] == ["fullkv", "omnikv, 0.1", "snapkv, 0.25"]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["one", "two", "all"]
    assert [text.get_text() for text in axis.texts] == ["100"] * 3 + ["50"] * 3
    assert any(patch.get_hatch() for patch in axis.patches)
    assert "omnikv, 0.1: infeasible, needs >= 0.2" in found.said[0]
    assert "2 seeds a row" in found.said[1]


def test_names_are_listed(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    said = capsys.readouterr().out
    assert all(f"\n    {name} " in said for name in FIGURES)

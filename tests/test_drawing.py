"""analysis.drawing: a file is that of the figure alone, whoever's settings are around it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis import drawing

matplotlib = pytest.importorskip("matplotlib")


def drawn() -> Any:
    figure = drawing.sheet(drawing.WIDTH, 2.0)
    axis = figure.subplots()
    axis.plot([0, 1], [1, 2], label="line")
    axis.set_ylabel("score")
    drawing.quiet(axis)
    drawing.write_foot(figure, ["one", "two"])
    return figure


@pytest.mark.parametrize("suffix", drawing.SUFFIXES)
def test_settings_of_the_user_neither_show_nor_change(tmp_path: Path, suffix: str) -> None:
    plain, among_others = (tmp_path / name / f"figure{suffix}" for name in ("plain", "among_others"))
    drawing.write(drawn, plain)
    with matplotlib.rc_context({"font.size": 20, "lines.linewidth": 9, "svg.hashsalt": "other"}):
        drawing.write(drawn, among_others)
        assert matplotlib.rcParams["font.size"] == 20
    assert among_others.read_bytes() == plain.read_bytes()


def test_a_notebook_shows_a_picture_with_what_must_be_said() -> None:
    """As wide as a page at 100 dots an inch, whatever the notebook's own settings are."""
    import pandas as pd
    from IPython.core.formatters import DisplayFormatter

    asked: list[tuple[float, list[str]]] = []

    def draw(width: float, foot: Any) -> Any:
        asked.append((width, list(foot)))
        return drawn()

    picture = drawing.Picture(draw, pd.DataFrame({"task": ["a", "b"], "score": 0}), ["", "what must be said"])
    with matplotlib.rc_context({"savefig.dpi": 20}):
        shown, _ = DisplayFormatter().format(picture)
    assert asked == [(drawing.WIDTH, ["what must be said"])]
    width, height = (int.from_bytes(shown["image/png"][place : place + 4], "big") for place in (16, 20))
    assert (width, height) == (800, 200)
    assert shown["text/plain"] == "Picture of 2 rows of task, score. what must be said"


def test_the_foot_fits_the_sheet_and_takes_the_room_it_says() -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    lines = drawing.wrapped(["word " * 200, "", "the end"])
    assert lines[-1] == "the end"
    assert " ".join(lines[:-1]).split() == ["word"] * 200
    figure = drawing.sheet(drawing.WIDTH, 4.0)
    drawing.write_foot(figure, lines)
    box = figure.texts[0].get_window_extent(FigureCanvasAgg(figure).get_renderer())
    left, right, bottom, top = (place / figure.dpi for place in (box.x0, box.x1, box.y0, box.y1))
    assert left == pytest.approx(drawing.LEFT, abs=0.02)
    assert drawing.WIDTH * 0.8 < right < drawing.WIDTH
    assert 0 < bottom < 0.1
    assert 0.8 * drawing.foot_inches(lines) < top < drawing.foot_inches(lines)


def test_tables_need_no_matplotlib() -> None:
    modules = "analysis.latency, analysis.heatmap, analysis.table, analysis.compare"
    code = f"import sys; sys.modules['matplotlib'] = None; import {modules}"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[1])

"""Figures of traces: kept, drift and roles show what the files hold, side by side for one example."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

from analysis import drift, kept, roles
from analysis.cells import read
from analysis.figure import main
from analysis.traces import traced
from hcache.trace import Trace, Window, write
from tests.test_analysis_table import leave

pytest.importorskip("matplotlib")

FIRST = [[[0, 1, 9], [0, 8, 9]], [[5, 6, 7], [9]]]
LAST = [[[0, 1, 9], [0, 2, 9]], [[5, 6], [9]]]
PLAN = {"roles": [["pivot", "satellite"], ["anchor", "volatile"]], "threshold": 0.5, "steps": 2}
WINDOWS = [
    Window(0, 0, 1, (0.9, 0.7), False),
    Window(0, 0, 2, (0.2, 0.4), True),
    Window(1, 1, 2, (1.0, 1.0), False),
]


def arrays(positions: Any) -> Any:
    return [[np.array(head, dtype=np.int64) for head in layer] for layer in positions]


def left(root: Path, method: str, kept_fraction: float = 0.25, ids: str = "0", **changes: Any) -> Path:
    where = leave(root, method, kept_fraction)
    own = {"plan": {}, "windows": [], "first": FIRST, "last": LAST, **changes}
    for name in ids:
        first, last = arrays(own["first"]), arrays(own["last"])
        write(where, Trace("one", name, method, 10, 4, first, last, own["windows"], own["plan"]))
    return where


def test_a_trace_is_read_back_as_it_was_written(tmp_path: Path) -> None:
    left(tmp_path, "heterocache", windows=WINDOWS, plan=PLAN)
    (one,) = traced(read([tmp_path]), None, lambda trace: True, "")
    assert [[head.tolist() for head in layer] for layer in one.trace.first] == FIRST
    assert [[head.tolist() for head in layer] for layer in one.trace.last] == LAST
    assert (list(one.trace.windows), one.trace.plan) == (WINDOWS, PLAN)


def test_positions_have_the_colour_of_what_became_of_them(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb

    left(tmp_path, "h2o")
    found = kept.picture(read([tmp_path]))
    image = found.draw(6.9, []).axes[0].images[0].get_array()
    assert image.shape == (4, 10, 3)
    row = {position: tuple(image[1, position]) for position in range(10)}
    expected = {0: kept.STAYED, 2: kept.CAME, 8: kept.LOST, 9: kept.STAYED}
    for position, colour in row.items():
        assert colour == pytest.approx(to_rgb(expected.get(position, "white"))), position
    own = found.data[(found.data["layer"] == 0) & (found.data["head"] == 1)]
    assert list(zip(own["position"], own["first"], own["last"], strict=True)) == [
        (0, True, True),
        (2, False, True),
        (8, True, False),
        (9, True, True),
    ]


def test_long_prompts_are_drawn_by_share() -> None:
    first = np.zeros((1, 100), dtype=bool)
    first[0, :25] = first[0, 50] = True
    image = kept.colours(first, first, 4)
    dark = 1 - (1 - 0x1A / 255) * np.array([1.0, 0.0, 1 / 25, 0.0])
    assert image[0, :, 0] == pytest.approx(dark)


def test_overlaps_triggers_and_threshold(tmp_path: Path) -> None:
    left(tmp_path, "heterocache", windows=WINDOWS, plan=PLAN)
    found = drift.picture(read([tmp_path]))
    assert list(found.data["overlap"]) == pytest.approx([0.8, 0.3, 1.0])
    assert list(found.data["overlap_2"]) == [0.7, 0.4, 1.0]
    assert list(found.data["drifted"]) == [False, True, False]
    above, below = found.draw(6.9, []).axes[:2]
    line, threshold = above.lines
    assert list(line.get_ydata()) == pytest.approx([0.8, 0.65])
    assert list(threshold.get_ydata()) == [0.5, 0.5]
    values = below.images[0].get_array()
    assert np.ma.filled(values, np.nan) == pytest.approx(np.array([[0.8, 0.3], [np.nan, 1.0]]), nan_ok=True)
    assert below.collections[0].get_offsets().tolist() == [[2, 0]]
    assert [label.get_text() for label in below.get_yticklabels()] == ["L0 H0", "L1 H1"]
    assert above.get_title("left") == "heterocache, 0.25 kept: 1 of 3 windows drifted"


def test_roles_have_letters_and_the_same_roles_one_panel(tmp_path: Path) -> None:
    left(tmp_path, "heterocache", 0.25, plan=PLAN)
    left(tmp_path, "heterocache", 0.5, plan=PLAN)
    left(tmp_path, "heterocache", 0.1, plan={**PLAN, "roles": [["anchor"] * 2] * 2})
    left(tmp_path, "snapkv", 0.1)
    found = roles.picture(read([tmp_path]))
    axes = found.draw(6.9, []).axes
    assert len(axes) == 2
    assert [text.get_text() for text in axes[1].texts] == ["P", "S", "A", "V"]
    assert axes[1].get_title("left") == "heterocache, 0.25 kept\nheterocache, 0.5 kept"
    assert len(found.data) == 12
    assert set(found.data["method"]) == {"heterocache"}


@pytest.mark.parametrize("name", ["kept", "drift", "roles"])
@pytest.mark.parametrize("width", ["one", "two", "page"])
def test_each_is_a_name_of_the_command(tmp_path: Path, name: str, width: str) -> None:
    left(tmp_path / "in", "heterocache", windows=WINDOWS, plan=PLAN)
    out = tmp_path / "a.svg"
    asked = [] if width == "page" else ["--width", width]
    assert main([name, str(tmp_path / "in"), "--out", str(out), *asked]) == 0
    assert f'width="{72 * {"one": 3.3, "two": 6.9, "page": 8.0}[width]:g}pt"' in out.read_text()
    assert set(pd.read_csv(out.with_suffix(".csv"))["id"]) == {0}
    assert out.with_suffix(".txt").exists() == (width != "page")


def test_one_example_that_all_have(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    left(tmp_path, "h2o", ids="012")
    left(tmp_path, "snapkv", ids="21")
    cells = read([tmp_path])
    assert set(kept.picture(cells).data["id"]) == {"1"}
    assert set(kept.picture(cells, "one/2").data["id"]) == {"2"}
    out = str(tmp_path / "a.png")
    assert main(["kept", str(tmp_path), "--out", out, "--example", "one/0"]) == 2
    assert "all have: one/1, one/2" in capsys.readouterr().err
    assert main(["drift", str(tmp_path), "--out", out]) == 2
    assert "no cell has traces with windows of pivots" in capsys.readouterr().err


def test_a_torn_trace_is_named_and_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    where = left(tmp_path, "h2o", ids="01")
    path = where / "traces" / "one-0.npz"
    path.write_bytes(path.read_bytes()[:100])
    assert set(kept.picture(read([tmp_path])).data["id"]) == {"1"}
    assert f"left out: {path} is no trace" in capsys.readouterr().err

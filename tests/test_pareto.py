"""analysis.pareto: what is drawn is what the records say, gaps stay gaps, the same records give one file."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import pytest

from analysis.cells import by_label, read
from analysis.figure import main
from analysis.pareto import Point, budgets, front, pareto, picture, points
from analysis.styles import STYLES, styles
from hcache.metrics import wilson
from hcache.records import read_result, write_result
from tests.test_analysis_table import leave

pytest.importorskip("matplotlib")


def drawn(axis: Any, label: str) -> Any:
    return next(shown for shown in axis.lines if shown.get_label() == label)


def test_points_and_intervals_are_those_of_the_records(tmp_path: Path) -> None:
    for kept, score in ((0.5, 0.8), (0.05, 0.2), (0.25, 0.4)):
        leave(tmp_path / f"{score}", "snapkv", kept, score, resident=kept + 0.01)
    cells = read([tmp_path / name for name in ("0.8", "0.2", "0.4")])
    axis = pareto(cells, ["one"]).axes[0]
    shown = drawn(axis, "snapkv")
    assert list(shown.get_xdata()) == pytest.approx([0.06, 0.26, 0.51])
    assert list(shown.get_ydata()) == pytest.approx([20, 40, 80])
    (band,) = [c for c in axis.collections if "FillBetween" in type(c).__name__]
    corners = {
        (round(float(x), 6), round(float(y), 6)) for path in band.get_paths() for x, y in path.vertices
    }
    for cell in cells:
        for bound in cell.result["tasks"]["one"]["ci95"]:
            assert (round(cell.result["budget"]["resident_fraction"], 6), round(bound, 6)) in corners


def test_an_infeasible_cell_breaks_the_line_and_is_named(tmp_path: Path) -> None:
    for kept in (0.05, 0.25, 0.5):
        leave(tmp_path, "omnikv", kept)
    leave(tmp_path, "omnikv", 0.1, infeasible=0.1234)
    figure = pareto(read([tmp_path]), ["one"])
    ys = [float(y) for y in drawn(figure.axes[0], "omnikv").get_ydata()]
    assert [math.isnan(y) for y in ys] == [False, True, False, False]
    said = " ".join(text.get_text() for text in figure.texts)
    assert "omnikv infeasible at 0.1 (needs >= 0.1234)" in said


def test_a_gap_of_several_seeds_is_named_once(tmp_path: Path) -> None:
    for seed in (0, 1):
        leave(tmp_path, "omnikv", 0.25, seed=seed)
        leave(tmp_path, "omnikv", 0.1, infeasible=0.2, seed=seed)
    said = " ".join(text.get_text() for text in pareto(read([tmp_path]), ["one"]).texts)
    assert "omnikv infeasible at 0.1 (needs >= 0.2)" in said


def test_a_point_alone_between_gaps_shows_its_interval(tmp_path: Path) -> None:
    leave(tmp_path, "omnikv", 0.25)
    leave(tmp_path, "omnikv", 0.1, infeasible=0.2)
    cells = read([tmp_path])
    axis = pareto(cells, ["one"]).axes[0]
    bars = [c for c in axis.collections if type(c).__name__ == "LineCollection"]
    (segment,) = [segment for bar in bars for segment in bar.get_segments()]
    low, high = next(c.result["tasks"]["one"]["ci95"] for c in cells if c.completed)
    assert [list(end) for end in segment] == [pytest.approx([0.25, low]), pytest.approx([0.25, high])]


def test_the_full_cache_is_a_dashed_line_over_the_panel(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None, 0.9)
    leave(tmp_path, "snapkv", 0.25)
    shown = drawn(pareto(read([tmp_path]), ["one"]).axes[0], "fullkv")
    assert (list(shown.get_xdata()), list(shown.get_ydata())) == ([0, 1], pytest.approx([90, 90]))
    assert shown.get_linestyle() == "--"


def test_who_holds_everything_stays_where_measured_and_says_its_budgets(tmp_path: Path) -> None:
    for kept, score in ((0.1, 0.2), (0.25, 0.9), (0.5, 0.9)):
        leave(tmp_path, "quest", kept, score, resident=1.06)
        leave(tmp_path, "snapkv", kept, score)
    cells = read([tmp_path])
    axis = pareto(cells, ["one"]).axes[0]
    assert list(drawn(axis, "quest").get_xdata()) == pytest.approx([1.06] * 3)
    assert sorted(text.get_text() for text in axis.texts) == ["0.1", "0.25, 0.5"]
    attended = pareto(cells, ["one"], "attended").axes[0]
    assert list(drawn(attended, "quest").get_xdata()) == pytest.approx([0.1, 0.25, 0.5])
    assert not attended.texts


def test_a_panel_for_each_task_and_one_for_all(tmp_path: Path) -> None:
    leave(tmp_path, "snapkv", 0.25, 0.7)
    figure = pareto(read([tmp_path]))
    assert [axis.get_title("left") for axis in figure.axes] == ["one", "two", "all tasks together"]
    assert list(drawn(figure.axes[2], "snapkv").get_ydata()) == pytest.approx([70])


def test_settings_of_one_method_get_lines_of_their_own(tmp_path: Path) -> None:
    for window in (16, 32):
        leave(tmp_path, "snapkv", 0.25, window / 100, options={"window": window, "kernel": 5})
    groups = by_label(read([tmp_path]))
    assert list(groups) == ["snapkv (window=16)", "snapkv (window=32)"]
    assert [points(group, "one", "resident")[0].y for group in groups.values()] == pytest.approx([16, 32])
    looks = styles(dict.fromkeys(groups, "snapkv"))
    assert len(set(looks.values())) == 2
    assert {look.colour for look in looks.values()} == {STYLES["snapkv"].colour}


def test_methods_look_alike_in_all_figures_and_no_two_the_same() -> None:
    names = [*STYLES, "mine", "other", "third"]
    looks = styles({name: name for name in names})
    assert len(set(looks.values())) == len(names)
    assert len({(look.marker, look.dashes) for look in STYLES.values()}) == len(STYLES)
    assert styles({"mine": "mine"})["mine"] == looks["mine"]


def test_the_caption_says_where_and_how_many(tmp_path: Path) -> None:
    for number, kept in enumerate((0.05, 0.1, 0.25, 0.5)):
        leave(tmp_path, "snapkv", kept, git=f"{number}" * 40)
    said = " ".join(text.get_text() for text in pareto(read([tmp_path])).texts).replace("\n", " ")
    assert "m on b, n = 10 a task and point; a CPU; commit 0000000, 1111111, 2222222 and others" in said


@pytest.mark.parametrize("suffix", ["png", "pdf", "svg"])
def test_the_same_records_give_the_same_file(
    tmp_path: Path, suffix: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    leave(tmp_path / "in", "fullkv", None)
    leave(tmp_path / "in", "snapkv", 0.25)
    files = []
    for name, clock in (("a", "1000000000"), ("b", "1500000000")):
        monkeypatch.setenv("SOURCE_DATE_EPOCH", clock)  # what matplotlib takes for the present
        out = tmp_path / name / f"figure.{suffix}"
        assert main(["pareto", str(tmp_path / "in"), "--out", str(out)]) == 0
        files.append(out.read_bytes())
    assert files[0] == files[1]
    assert len(files[0]) > 1000


def refused(capsys: pytest.CaptureFixture[str], *arguments: str | Path) -> str:
    assert main(["pareto", *map(str, arguments)]) == 2
    return capsys.readouterr().err


def test_other_settings_are_refused_and_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path, "snapkv", 0.25)
    leave(tmp_path, "h2o", 0.25, model="another")
    said = refused(capsys, tmp_path, "--out", tmp_path / "a.png")
    assert "differ in model.name (another and m)" in said
    assert not (tmp_path / "a.png").exists()


def test_what_cannot_be_drawn_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "a.png"
    assert "no result.json below" in refused(capsys, tmp_path, "--out", out)
    leave(tmp_path, "omnikv", 0.1, infeasible=0.2)
    assert "no completed cell" in refused(capsys, tmp_path, "--out", out)
    leave(tmp_path, "omnikv", 0.25)
    assert "there are: one, two, score" in refused(capsys, tmp_path, "--out", out, "--task", "three")
    assert ".png, .pdf, .svg" in refused(capsys, tmp_path, "--out", tmp_path / "a.gif")
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "pip install 'hcache[analysis]'" in refused(capsys, tmp_path, "--out", out)


def test_a_cell_that_lies_twice_is_drawn_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    leave(tmp_path / "a", "snapkv", 0.25)
    leave(tmp_path / "b", "snapkv", 0.25)
    axis = pareto(read([tmp_path / "a", tmp_path / "b", tmp_path / "a"]), ["one"]).axes[0]
    assert len(drawn(axis, "snapkv").get_xdata()) == 1
    assert capsys.readouterr().err.count("left out") == 1


def test_of_one_cell_run_twice_the_longer_counts(tmp_path: Path) -> None:
    short, long = leave(tmp_path / "a", "snapkv", 0.25, 0.2), leave(tmp_path / "b", "snapkv", 0.25, 0.8)
    for where, n in ((short, 5), (long, 50)):
        result = read_result(where)
        assert result is not None
        result["tasks"]["one"]["n"] = n
        result["provenance"]["dirty"] = True
        write_result(where, result)
    for order in ("ab", "ba"):
        figure = pareto(read([tmp_path / name for name in order]), ["one"])
        assert list(drawn(figure.axes[0], "snapkv").get_ydata()) == pytest.approx([80])
        assert "commit 0123456 with local changes" in " ".join(text.get_text() for text in figure.texts)


def test_a_record_of_another_schema_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = leave(tmp_path, "snapkv", 0.25) / "result.json"
    path.write_text(path.read_text().replace('"schema": 1', '"schema": 99'))
    assert "has schema 99" in refused(capsys, tmp_path, "--out", tmp_path / "a.png")


def test_the_front_is_what_no_other_point_beats() -> None:
    def at(x: float, y: float) -> Point:
        return Point("", x, y, math.nan, math.nan)

    cheap, dear, beaten, equal, dearer = at(1, 10), at(3, 50), at(2, 5), at(3, 40), at(4, 50)
    gap = at(math.nan, math.nan)
    assert front([dear, gap, beaten, equal, cheap, dearer]) == [cheap, dear]


def test_the_front_is_drawn_and_marked_in_the_data(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None, 0.9)
    for method, kept, score in (("snapkv", 0.25, 0.6), ("h2o", 0.25, 0.3), ("h2o", 0.5, 0.7)):
        leave(tmp_path, method, kept, score)
    cells = read([tmp_path])
    data = picture(cells, ["one"]).data
    on_front = data[data["on_front"]]
    assert list(zip(on_front["label"], on_front["kept"], strict=True)) == [
        ("fullkv", "all"),
        ("h2o", "0.5"),
        ("snapkv", "0.25"),
    ]
    assert len(data) == 4
    steps = drawn(pareto(cells, ["one"]).axes[0], "front")
    assert list(steps.get_xdata()) == pytest.approx([0.25, 0.5, 1.0])
    assert list(steps.get_ydata()) == pytest.approx([60, 70, 90])


def test_times_are_those_measured_and_of_one_device(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None, decode_ms=8.0)
    leave(tmp_path, "snapkv", 0.25, decode_ms=2.5)
    data = picture(read([tmp_path]), ["one"], "time").data.set_index("label")
    assert dict(data["time"]) == {"fullkv": 8.0, "snapkv": 2.5}
    leave(tmp_path, "h2o", 0.25, device="another")
    with pytest.raises(ValueError, match="times of different devices"):
        picture(read([tmp_path]), ["one"], "time")


def test_seeds_are_one_point_and_curves_stand_over_what_was_asked(tmp_path: Path) -> None:
    for seed, score in ((0, 1.0), (1, 0.0)):
        for kept in (0.1, 0.25):
            leave(tmp_path, "snapkv", kept, scores=[score] * 10, benchmark_seed=seed, resident=kept + 0.1)
    drawn_ = budgets(read([tmp_path]), ["one"])
    low, high = wilson(0.5, 20)
    assert list(drawn_.data["requested"]) == [0.1, 0.25]
    assert list(drawn_.data["score"]) == pytest.approx([50, 50])
    assert list(drawn_.data["low"]) == pytest.approx([100 * low] * 2)
    assert list(drawn_.data["high"]) == pytest.approx([100 * high] * 2)
    assert list(drawn_.data["n"]) == [20, 20]
    assert "on_front" not in drawn_.data
    assert "2 seeds a point" in " ".join(drawn_.said)
    axis = drawn_.draw(6.9, []).axes[0]
    assert list(drawn(axis, "snapkv").get_xdata()) == pytest.approx([0.1, 0.25])
    assert [text.get_text() for text in axis.get_xticklabels()] == ["0.1", "0.25"]

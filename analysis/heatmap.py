"""Needle heatmaps, one panel a method and budget: length across, depth down, the score as colour.

`python -m analysis.heatmap outputs/<tag> --out docs/needle.png --table docs/needle.md` reads the lines of
predictions.jsonl of every cell of the benchmark `needle`. A field without an example is a gap: grey and
hatched, and not in any mean. The same records give the same files.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

import pandas as pd

from analysis import command, drawing, fields
from analysis.cells import Cell, by_label, commits, days, devices, listed, short_tokens, side_by_side
from analysis.drawing import LEFT, WIDTH, Picture
from analysis.fields import NUMBER, TEXT
from analysis.markdown import bullets, document, section, table

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BENCHMARK = "needle"
Place = tuple[int, float]
"""Length in tokens, depth in percent."""

_NAN = float("nan")
_COLUMNS = 3
_PANEL = 1.6  # inches that a panel takes at least
_TITLE = 36  # characters above which a panel's title is set smaller
_TICKS = 9  # as many lengths or depths are named


@dataclass(frozen=True)
class Panel:
    """A cell's grid.

    Args:
        label: the method, with options where several were run.
        cell: its record.
        scores: means of a field's examples, 0 to 100; a field without any is missing.
        counts: its examples.
    """

    label: str
    cell: Cell
    scores: dict[Place, float]
    counts: dict[Place, int]

    @property
    def kept(self) -> str:
        """The budget in words."""
        return "everything kept" if self.cell.budget == "full" else f"{self.cell.kept} kept"

    def mean(self, length: int | None = None, depth: float | None = None) -> float:
        """Mean of the fields of a length, of a depth, or of all; NaN where there are none."""
        chosen = [
            score
            for (own_length, own_depth), score in self.scores.items()
            if length in (None, own_length) and depth in (None, own_depth)
        ]
        return fmean(chosen) if chosen else _NAN


@dataclass(frozen=True)
class Heatmap:
    """Panels, and the lengths and depths that any of them has."""

    panels: tuple[Panel, ...]
    lengths: tuple[int, ...]
    depths: tuple[float, ...]

    @property
    def done(self) -> list[Cell]:
        """The completed cells."""
        return [panel.cell for panel in self.panels if panel.cell.completed]

    @property
    def metric(self) -> str:
        """Name of the score."""
        return str(self.done[0].result["config"]["benchmark"]["metric"])

    @property
    def counts(self) -> str:
        """Examples of a field: `4`, or `1 to 4`."""
        found = sorted({count for panel in self.panels for count in panel.counts.values()})
        return " to ".join(dict.fromkeys((str(found[0]), str(found[-1]))))


def collect(cells: Sequence[Cell]) -> Heatmap:
    """The grids of all cells of the benchmark; cells of others are named on stderr.

    Raises:
        ValueError: no such cell, none completed, cells of different settings, or lines without a depth.
    """
    needles = [cell for cell in cells if cell.result["cell"]["benchmark"] == BENCHMARK]
    others = [cell for cell in cells if cell not in needles]
    if not needles:
        there = ", ".join(sorted({str(cell.result["cell"]["benchmark"]) for cell in others}))
        raise ValueError(
            f"no cell of benchmark {BENCHMARK} among the records (there are: {there}); run one with "
            f"benchmark={BENCHMARK}, or give its outputs/<tag>"
        )
    for cell in others:
        name = cell.result["cell"]["benchmark"]
        print(f"left out: {cell.directory} is of benchmark {name}", file=sys.stderr)
    groups = by_label(side_by_side(needles))
    panels = tuple(_panel(label, cell) for label, group in groups.items() for cell in group)
    places = {place for panel in panels for place in panel.scores}
    lengths, depths = ({place[axis] for place in places} for axis in (0, 1))
    return Heatmap(panels, tuple(int(length) for length in sorted(lengths)), tuple(sorted(depths)))


def _panel(label: str, cell: Cell) -> Panel:
    fields: dict[Place, list[float]] = {}
    for number, line in enumerate(cell.lines() if cell.completed else [], start=1):
        if not {"length", "depth", "score"} <= line.keys():
            raise ValueError(
                f"{cell.directory} line {number} of its predictions has no length, depth or score; move the "
                "directory away and run its cell again"
            )
        fields.setdefault((line["length"], float(line["depth"])), []).append(100 * line["score"])
    scores = {place: fmean(found) for place, found in fields.items()}
    return Panel(label, cell, scores, {place: len(found) for place, found in fields.items()})


# --- the figure


def picture(cells: Sequence[Cell]) -> Picture:
    """The grids of these cells as one figure. Errors as of `collect`."""
    heatmap = collect(cells)
    return Picture(
        lambda width, foot: _draw(heatmap, width, foot), pd.DataFrame(_rows(heatmap)), [_below(heatmap)]
    )


def _rows(heatmap: Heatmap) -> Iterator[dict[str, object]]:
    for panel in heatmap.panels:
        who = {"label": panel.label, "method": panel.cell.method, "kept": panel.cell.kept}
        for length in heatmap.lengths:
            for depth in heatmap.depths:
                place = length, depth
                score, count = panel.scores.get(place, _NAN), panel.counts.get(place, 0)
                yield {**who, "length": length, "depth": depth, "score": score, "n": count}


def draw(heatmap: Heatmap) -> Figure:
    """The figure, as wide as a page. Needs matplotlib."""
    return _draw(heatmap, WIDTH, drawing.wrapped([_below(heatmap)]))


def _draw(heatmap: Heatmap, width: float, foot: Sequence[str]) -> Figure:
    """A panel for each method and budget, one scale of colours from 0 to 100."""
    panels = heatmap.panels
    columns = max(1, min(len(panels), _COLUMNS, int((width - 1.35) / _PANEL)))
    rows = -(-len(panels) // columns)
    across = (width - 1.35) / columns - 0.15  # inches of a panel
    down = min(2.6, max(1.3, 0.2 * len(heatmap.depths)))
    bottom = 0.62 + drawing.foot_inches(foot)
    height = rows * (down + 0.5) + bottom - 0.1
    figure = drawing.sheet(width, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=LEFT / width,
        right=1 - 0.75 / width,
        top=1 - 0.3 / height,
        bottom=bottom / height,
        wspace=0.15 / across,
        hspace=0.5 / down,
    )
    fits = across / len(heatmap.lengths) >= NUMBER[0] and down / len(heatmap.depths) >= NUMBER[1]
    axes = list(grid.flat)
    for axis, panel in zip(axes, panels, strict=False):
        _field(axis, panel, heatmap, fits)
    _axes(axes[: len(panels)], heatmap, columns)
    for spare in axes[len(panels) :]:
        spare.remove()
    fields.scale(figure, bottom, 0.3)
    drawing.write_foot(figure, foot)
    return figure


def _field(axis: Axes, panel: Panel, heatmap: Heatmap, fits: bool) -> None:
    scores = [
        [panel.scores.get((length, depth), _NAN) for length in heatmap.lengths] for depth in heatmap.depths
    ]
    fields.grid(axis, scores)
    mean = panel.mean()
    said = f": {mean:.1f}" if mean == mean else ""
    title = f"{panel.label}, {panel.kept}{said}"
    axis.set_title(title, fontsize=8.5 if len(title) <= _TITLE else 6.5, loc="left")
    if not panel.cell.completed:
        axis.text(
            0.5, 0.5, panel.cell.status, transform=axis.transAxes, ha="center", va="center", fontsize=TEXT
        )
    if fits:
        fields.numbers(axis, scores)


def _axes(axes: Sequence[Axes], heatmap: Heatmap, columns: int) -> None:
    """Ticks: lengths below the last panel of a column, depths beside the first of a row."""
    xs, ys = _ticks(len(heatmap.lengths)), _ticks(len(heatmap.depths))
    for number, axis in enumerate(axes):
        axis.tick_params(length=2, labelsize=TEXT)
        axis.set_xticks(xs, [short_tokens(heatmap.lengths[x]) for x in xs])
        first = number % columns == 0
        axis.set_yticks(ys, [f"{heatmap.depths[y]:g}" if first else "" for y in ys])
        if first:
            axis.set_ylabel("depth, percent", fontsize=TEXT)
        if number + columns >= len(axes):
            axis.set_xlabel("length, tokens", fontsize=TEXT)


def _ticks(count: int) -> list[int]:
    """At most `_TICKS` evenly spread places of `count`, the first among them."""
    return list(range(0, count, -(-count // _TICKS)))


def _below(heatmap: Heatmap) -> str:
    """Under the figure: what is shown, and where it was measured."""
    model = heatmap.done[0].result["cell"]["model"]
    gaps = " Hatched fields have no example." if _has_gaps(heatmap) else ""
    return (
        f"{model} on {BENCHMARK}, {heatmap.metric}, n = {heatmap.counts} a field; "
        f"{listed(devices(heatmap.done))}; commit {listed(commits(heatmap.done))}. Beside the method: the "
        f"mean of its fields.{gaps}"
    )


def _has_gaps(heatmap: Heatmap) -> bool:
    fields = len(heatmap.lengths) * len(heatmap.depths)
    return any(len(panel.scores) < fields for panel in heatmap.panels)


# --- the tables


def markdown(heatmap: Heatmap) -> str:
    """Means of each method overall, by length and by depth; then every grid; then notes."""
    lengths = [f"{length} tokens" for length in heatmap.lengths]
    depths = [f"{depth:g}%" for depth in heatmap.depths]
    by_length = [
        [*_named(panel), _shown(panel.mean()), *(_of_length(panel, length) for length in heatmap.lengths)]
        for panel in heatmap.panels
    ]
    by_depth = [
        [*_named(panel), *(_shown(panel.mean(depth=depth)) for depth in heatmap.depths)]
        for panel in heatmap.panels
    ]
    parts = [
        _heading(heatmap),
        "## By length\n\n" + table(["method", "kept", "all", *lengths], by_length),
        "## By depth\n\n" + table(["method", "kept", *depths], by_depth),
        *(_grid(panel, heatmap) for panel in heatmap.panels if panel.scores),
        section("Notes", _notes(heatmap)),
    ]
    return document(parts)


def _heading(heatmap: Heatmap) -> str:
    first, settings = heatmap.done[0], heatmap.done[0].result["config"]["benchmark"]
    aware = "with the question known" if settings["query_aware"] else "before the question is known"
    said = [
        f"Date: {listed(days(heatmap.done))}. Commit: {listed(commits(heatmap.done))}. Device: "
        f"{listed(devices(heatmap.done))}. Versions: {first.versions}.",
        f"Score: {heatmap.metric}, 0 to 100; {heatmap.counts} examples a field. Compressed {aware}.",
        f"Needle: `{_line(settings['needle'])}`. Question: `{_line(settings['question'])}`. Haystack: "
        f"{settings['haystack'] or 'generated prose'}.",
        "A mean is that of its fields, all alike; in brackets the 95% interval of the record.",
    ]
    return f"# Needle in a haystack, {first.result['cell']['model']}\n\n{bullets(said)}"


def _line(text: str) -> str:
    return " ".join(text.split())


def _named(panel: Panel) -> list[str]:
    return [panel.label, panel.cell.kept]


def _of_length(panel: Panel, length: int) -> str:
    """The mean and, where the record has one of the same mean, its interval."""
    mean = panel.mean(length=length)
    task = panel.cell.result.get("tasks", {}).get(f"{BENCHMARK}_{length}")
    if mean != mean or task is None or abs(task["score"] - mean) > 1e-6:
        return _shown(mean)
    low, high = task["ci95"]
    return f"{_shown(mean)} [{_shown(low)}, {_shown(high)}]"


def _grid(panel: Panel, heatmap: Heatmap) -> str:
    rows = [
        [f"{depth:g}%", *(_shown(panel.scores.get((length, depth), _NAN)) for length in heatmap.lengths)]
        for depth in heatmap.depths
    ]
    header = ["depth", *(str(length) for length in heatmap.lengths)]
    return f"## {panel.label}, {panel.kept}\n\n{table(header, rows)}"


def _notes(heatmap: Heatmap) -> Iterator[str]:
    """Gaps, and what records say must be known."""
    fields = len(heatmap.lengths) * len(heatmap.depths)
    for panel in heatmap.panels:
        name = f"{panel.label}, {panel.kept}"
        if not panel.cell.completed:
            yield f"{name}: {panel.cell.status}"
        elif len(panel.scores) < fields:
            yield f"{name}: {fields - len(panel.scores)} of {fields} fields have no example (`-`)"
        for note in panel.cell.result.get("notes", []):
            yield f"{name}: {note}"


def _shown(number: float) -> str:
    return f"{number:.1f}".removesuffix(".0") if number == number else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    asking = command.parser("heatmap", __doc__)
    asking.add_argument("directories", type=Path, nargs="+", help="outputs/<tag> of runs of the needle")
    return command.figure_and_tables(asking, arguments, collect, draw, markdown)


if __name__ == "__main__":
    sys.exit(main())

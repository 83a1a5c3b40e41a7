"""Score against KV bytes, one line a method: the figure that says what a byte of cache buys.

`python -m analysis.figure pareto outputs/<tag> [more] --out docs/methods.png` draws one panel a task, and one
for all together where there are several. x is measured, of each cell (`--x resident`, or `attended`), y is
the score with its 95% interval from the record. A cell without numbers is a gap in its line, named below the
panels. The same records give the same file.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from analysis import command, drawing
from analysis.cells import Cell, by_label, commits, devices, listed, read, side_by_side, sizes, tasks
from analysis.drawing import WIDTH
from analysis.styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOGETHER = "score"
"""The panel of all tasks together, named as in the record."""

_NAN = float("nan")
_TICKS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)
_X_LABELS = {
    "resident": "KV bytes on the device / full cache (measured)",
    "attended": "share of the prompt read by a decode step (measured)",
}


@dataclass(frozen=True)
class Point:
    """A place on a line; x, y and the interval are NaN where the cell has no numbers, which breaks the line.

    Args:
        kept: the requested budget in words.
        x: fraction of the full cache, measured.
        y, low, high: score and its interval, 0 to 100; without an interval low and high are NaN.
    """

    kept: str
    x: float
    y: float
    low: float
    high: float

    @property
    def has_numbers(self) -> bool:
        return self.y == self.y


def points(cells: Sequence[Cell], task: str, x: str) -> list[Point]:
    """A method's cells as points, in their order (by_label sorts by requested budget)."""
    return [_point(cell, task, x) for cell in cells]


def panels(cells: Sequence[Cell], chosen: Sequence[str]) -> list[str]:
    """The tasks to draw: those asked for, or all and, where there are several, all together.

    Raises:
        ValueError: a task that no record has.
    """
    known = tasks(cells)
    for task in chosen:
        if task not in (*known, TOGETHER):
            raise ValueError(
                f"--task {task}: no cell has this task (there are: {', '.join(known)}, {TOGETHER})"
            )
    return list(dict.fromkeys(chosen)) or (known if len(known) == 1 else [*known, TOGETHER])


def pareto(cells: Sequence[Cell], chosen: Sequence[str] = (), x: str = "resident") -> Figure:
    """The figure. Needs matplotlib.

    chosen: tasks to draw, default all; x: resident or attended.

    Raises:
        ValueError: no completed cell, cells of different settings, or an unknown task.
    """
    cells = side_by_side(cells)
    names = panels(cells, chosen)
    groups = by_label(cells)
    looks = styles({label: group[0].method for label, group in groups.items()})
    lines = {name: {label: points(group, name, x) for label, group in groups.items()} for name in names}
    below = _below(cells, groups, lines)
    figure, axes = _grid(len(names), list(groups), below)
    references = {label for label, group in groups.items() if all(cell.budget == "full" for cell in group)}
    for axis, name in zip(axes, names, strict=True):
        _panel(axis, lines[name], looks, references)
        axis.set_title("all tasks together" if name == TOGETHER else name, fontsize=9.5, loc="left")
    _shared_x(axes, lines[names[0]], references, x)
    _legend(figure, axes[0], below)
    return figure


def _point(cell: Cell, task: str, x: str) -> Point:
    entry = cell.result if task == TOGETHER else cell.result.get("tasks", {}).get(task)
    if not cell.completed or entry is None:
        return Point(cell.kept, _NAN, _NAN, _NAN, _NAN)
    if entry["score"] is None:
        return Point(cell.kept, _NAN, _NAN, _NAN, _NAN)
    low, high = (None if task == TOGETHER else entry["ci95"]) or (_NAN, _NAN)
    place = cell.result["budget"][f"{x}_fraction"]
    if not place or place <= 0:
        raise ValueError(f"{cell.directory}: {x}_fraction={place} can't be drawn; choose another --x")
    return Point(cell.kept, place, entry["score"], low, high)


def _panel(
    axis: Axes, lines: Mapping[str, Sequence[Point]], looks: Mapping[str, Style], references: set[str]
) -> None:
    axis.set_xscale("log")
    drawing.quiet(axis)
    axis.set_ylim(*_y_limits([point for line in lines.values() for point in line if point.has_numbers]))
    holding_all = 0
    for label, line in lines.items():
        if label in references:
            _reference(axis, label, line, looks[label])
            continue
        _line(axis, label, line, looks[label])
        if _holds_all(line):
            _annotate(axis, [point for point in line if point.has_numbers], looks[label], holding_all)
            holding_all += 1


def _holds_all(line: Sequence[Point]) -> bool:
    """Whether every point lies at a full cache or more, so that x doesn't show what was asked for."""
    places = [point.x for point in line if point.has_numbers]
    return bool(places) and min(places) >= 1


def _reference(axis: Axes, label: str, line: Sequence[Point], look: Style) -> None:
    """A method without a budget: a dashed line over the whole panel, and its interval."""
    for point in (point for point in line if point.has_numbers):
        axis.axhline(point.y, color=look.colour, linestyle="--", linewidth=1.1, label=label, zorder=2)
        if point.low == point.low:
            axis.axhspan(point.low, point.high, color=look.colour, alpha=0.07, linewidth=0, zorder=1)


def _line(axis: Axes, label: str, line: Sequence[Point], look: Style) -> None:
    xs, ys = [point.x for point in line], [point.y for point in line]
    axis.plot(
        xs,
        ys,
        label=label,
        color=look.colour,
        marker=look.marker,
        linestyle=look.dashes,
        linewidth=1.4,
        markersize=5.5,
        markeredgecolor="white",
        markeredgewidth=0.5,
        zorder=3,
    )
    lows, highs = [point.low for point in line], [point.high for point in line]
    axis.fill_between(xs, lows, highs, color=look.colour, alpha=0.12, linewidth=0, zorder=1)
    # A band has no width where a point stands alone, or where all have one x: a bar shows those.
    alone = [point for part in _parts(line) if _is_narrow(part) for point in part]
    axis.vlines(
        [point.x for point in alone],
        [point.low for point in alone],
        [point.high for point in alone],
        color=look.colour,
        alpha=0.45,
        linewidth=1.2,
        zorder=2,
    )


def _parts(line: Sequence[Point]) -> Iterator[list[Point]]:
    """Stretches of a line without a gap."""
    for drawn, part in itertools.groupby(line, key=lambda point: point.has_numbers):
        if drawn:
            yield list(part)


def _is_narrow(part: Sequence[Point]) -> bool:
    xs = [point.x for point in part]
    return max(xs) / min(xs) < 1.05


def _annotate(axis: Axes, numbers: Sequence[Point], look: Style, place: int) -> None:
    """Requested budgets beside points whose x doesn't show them; those too close for two texts share one.

    place: of this method among those annotated, so that their texts don't cover each other.
    """
    low, high = axis.get_ylim()
    for same in _together(numbers, 0.06 * (high - low)):
        axis.annotate(
            _kept([point in same for point in numbers], [point.kept for point in numbers]),
            (same[0].x, sum(point.y for point in same) / len(same)),
            xytext=(6, -8 * place),
            textcoords="offset points",
            fontsize=6.5,
            color=look.colour,
            va="center",
            bbox={"facecolor": "white", "edgecolor": "none", "alpha": 0.85, "pad": 0.6},
            zorder=5,
        )


def _kept(chosen: Sequence[bool], budgets: Sequence[str]) -> str:
    """The chosen of a line's budgets; three or more in a row as a range."""
    names = [name for name, is_chosen in zip(budgets, chosen, strict=True) if is_chosen]
    first = list(chosen).index(True)
    in_a_row = all(chosen[first : first + len(names)])
    return f"{names[0]} to {names[-1]}" if in_a_row and len(names) > 2 else ", ".join(names)


def _together(numbers: Sequence[Point], distance: float) -> list[list[Point]]:
    """Points by height, in groups no two of which begin closer than `distance`."""
    groups: list[list[Point]] = []
    for point in sorted(numbers, key=lambda point: -point.y):
        if groups and groups[-1][0].y - point.y <= distance:
            groups[-1].append(point)
        else:
            groups.append([point])
    return groups


def _y_limits(numbers: Sequence[Point]) -> tuple[float, float]:
    """Everything drawn, with a margin; scores lie between 0 and 100."""
    values = [value for p in numbers for value in (p.y, p.low, p.high) if value == value]
    low, high = (min(values), max(values)) if values else (0.0, 100.0)
    margin = max(0.06 * (high - low), 2.0)
    return max(low - margin, -4.0), min(high + margin, 104.0)


def _grid(count: int, labels: Sequence[str], below: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels above, room for the legend and the lines below them."""
    columns = 1 if count == 1 else 2
    rows = -(-count // columns)
    legend_rows = -(-len(labels) // _legend_columns(labels))
    bottom = 0.62 + 0.19 * legend_rows + drawing.foot_inches(below)
    height = (3.9 if count == 1 else 2.45) * rows + bottom + 0.3
    figure = drawing.sheet(WIDTH, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=drawing.LEFT / WIDTH,
        right=0.985,
        top=1 - 0.3 / height,
        bottom=bottom / height,
        wspace=0.13,
        hspace=0.3,
    )
    for spare in list(grid.flat)[count:]:
        spare.remove()
    return figure, list(grid.flat)[:count]


def _legend_columns(labels: Sequence[str]) -> int:
    """As many as the longest label leaves room for, up to 4."""
    inches = 0.75 + 0.07 * max(len(label) for label in labels)
    return max(1, min(4, int(0.9 * WIDTH / inches)))


def _shared_x(
    axes: Sequence[Axes], lines: Mapping[str, Sequence[Point]], references: set[str], x: str
) -> None:
    """One range and one set of ticks for all panels, with room for texts beside the points at the right."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    shown = [line for label, line in lines.items() if label not in references]
    places = [p.x for line in shown for p in line if p.has_numbers] or [1.0]
    low, high = min(places) / 1.15, max(places) * (1.3 if len(axes) == 1 else 1.75)
    ticks = [tick for tick in _TICKS if low <= tick <= high]
    for axis in axes:
        axis.set_xlim(low, high)
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
        axis.xaxis.set_minor_locator(NullLocator())
    for axis in axes[::2]:
        axis.set_ylabel("score")
    for axis in axes[-2:]:
        axis.set_xlabel(_X_LABELS[x], fontsize=7.5)


def _legend(figure: Figure, axis: Axes, below: Sequence[str]) -> None:
    handles, labels = axis.get_legend_handles_labels()
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(drawing.LEFT / WIDTH, drawing.foot_inches(below) / figure.get_figheight()),
        ncols=_legend_columns(labels),
        frameon=False,
        fontsize=8,
        handlelength=3.2,
        borderpad=0,
        borderaxespad=0,
    )
    drawing.write_foot(figure, below)


def _below(
    cells: Sequence[Cell],
    groups: Mapping[str, Sequence[Cell]],
    lines: Mapping[str, Mapping[str, Sequence[Point]]],
) -> list[str]:
    """The lines under the figure: gaps, what is shown, and where it was measured."""
    done = [cell for cell in cells if cell.completed]
    cell = done[0].result["cell"]
    full = [
        label
        for label, line in next(iter(lines.values())).items()
        if _holds_all(line) and groups[label][0].budget != "full"
    ]
    caption = (
        f"{cell['model']} on {cell['benchmark']}, n = {sizes(done)} a task and point; "
        f"{listed(devices(done))}; commit {listed(commits(done))}. Bands: 95% intervals of each task's score"
        f"{'; all tasks together have none' if TOGETHER in lines else ''}."
        f"{f' Numbers beside points: the budget asked of {listed(full)}.' if full else ''}"
    )
    gaps = "; ".join(gap for label, group in groups.items() for gap in _gaps(label, group))
    return drawing.wrapped((gaps, caption))


def _gaps(label: str, group: Sequence[Cell]) -> Iterator[str]:
    """Which budgets of a method have no numbers, and why."""
    missing: dict[str, list[Cell]] = {}
    for cell in group:
        if not cell.completed:
            missing.setdefault(str(cell.result["status"]), []).append(cell)
    for status, lacking in missing.items():
        smallest = lacking[-1].smallest
        needs = f" (needs >= {smallest})" if smallest else ""
        yield f"{label} {status} at {', '.join(cell.kept for cell in lacking)}{needs}"


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns its exit code."""
    parser = command.parser("figure", __doc__)
    figures = parser.add_subparsers(dest="figure", required=True)
    asking = figures.add_parser("pareto", help="score against KV bytes, one line a method")
    add = asking.add_argument
    add("directories", type=Path, nargs="+", help="outputs/<tag>, or any directory above recorded cells")
    add("--out", type=Path, required=True, metavar="FILE", help="a png, pdf or svg file")
    add("--task", action="append", default=[], help=f"only this task, or {TOGETHER}; may be repeated")
    add("--x", choices=tuple(_X_LABELS), default="resident", help="fraction of the cache on the x axis")
    asked = parser.parse_args(arguments)

    def show() -> None:
        drawing.check(asked.out)
        cells = read(asked.directories)
        drawing.write(lambda: pareto(cells, asked.task, asked.x), asked.out)

    return command.answered(show)


if __name__ == "__main__":
    sys.exit(main())

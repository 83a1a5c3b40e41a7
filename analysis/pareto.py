"""Score against what it costs, one line a method: the figure that says what a byte or a millisecond buys.

`python -m analysis.figure pareto outputs/<tag> [more] --out docs/methods.png` draws one panel a task, and one
for all together where there are several. x is measured, of each cell (`--x resident`, `attended`, or `time`),
y is the score with its 95% interval, of several seeds together (analysis.seeds). Grey steps are the front:
the best score that a byte, or a millisecond, buys from any method. `figure budgets` draws the same against
the budget that was asked for, without a front. A cell without numbers is a gap in its line, named below the
panels.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING, Any

import pandas as pd

from analysis import drawing
from analysis.cells import Cell, by_label, commits, devices, listed, side_by_side, sizes, tasks
from analysis.drawing import Picture
from analysis.seeds import by_budget, score, seeds, total
from analysis.styles import Style, styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

TOGETHER = "score"
"""The panel of all tasks together, named as in the record."""

_NAN = float("nan")
COSTS = {
    "resident": "KV bytes on the device / full cache (measured)",
    "attended": "share of the prompt read by a decode step (measured)",
    "time": "ms a decode step (median, measured)",
    "requested": "budget asked for, share of the full cache",
    "tokens": "budget asked for, tokens a head",
}
"""What may be on the x axis, and how it is called; all but the last two have a front."""
_REQUESTED = ("requested", "tokens")
_FRONT = "front"
_NARROW = 5.0  # inches below which panels stand in one column


@dataclass(frozen=True)
class Point:
    """A place on a line; x, y and the interval are NaN where the cell has no numbers, which breaks the line.

    Args:
        kept: the requested budget in words.
        x: what it costs, as in COSTS.
        y, low, high: score and its interval, 0 to 100; without an interval low and high are NaN.
        n: examples.
    """

    kept: str
    x: float
    y: float
    low: float
    high: float
    n: int = 0

    @property
    def has_numbers(self) -> bool:
        return self.y == self.y


def points(cells: Sequence[Cell], task: str, x: str) -> list[Point]:
    """A method's cells as points, in their order (by_label sorts by requested budget); cells that differ in
    seeds alone are one.
    """
    return [_point(group, task, x) for group in by_budget(cells)]


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


def picture(cells: Sequence[Cell], chosen: Sequence[str] = (), x: str = "resident") -> Picture:
    """The figure of these cells.

    chosen: tasks to draw, default all; x: one of COSTS.

    Raises:
        ValueError: no completed cell, cells of different settings, an unknown task, or times of several
            devices.
    """
    cells = side_by_side(cells, seeds=True)
    names = panels(cells, chosen)
    groups = by_label(cells)
    lines = {name: {label: points(group, name, x) for label, group in groups.items()} for name in names}
    places = devices([cell for cell in cells if cell.completed])
    if x == "time" and len(places) > 1:
        raise ValueError(f"times of different devices can't stand side by side: {', '.join(places)}")

    def draw(width: float, foot: Sequence[str]) -> Figure:
        return _draw(groups, lines, x, width, foot)

    return Picture(draw, _data(groups, lines, x), _below(cells, groups, lines, x))


def budgets(cells: Sequence[Cell], chosen: Sequence[str] = ()) -> Picture:
    """Score against the budget that was asked for. Arguments and errors as of `picture`."""
    asked = {cell.in_tokens for cell in cells if cell.budget != "full"}
    if len(asked) > 1:
        raise ValueError("budgets in tokens and as fractions have no common axis; give cells of one kind")
    return picture(cells, chosen, "tokens" if asked == {True} else "requested")


def pareto(cells: Sequence[Cell], chosen: Sequence[str] = (), x: str = "resident") -> Figure:
    """The figure itself, as wide as a page. Needs matplotlib; else as `picture`."""
    return picture(cells, chosen, x).page()


def front(points: Sequence[Point]) -> list[Point]:
    """Points that no other beats: none is as cheap with a better score, or cheaper with one as good; by x."""
    best: list[Point] = []
    for point in sorted((p for p in points if p.has_numbers), key=lambda p: (p.x, -p.y)):
        if not best or point.y > best[-1].y:
            best.append(point)
    return best


def _draw(
    groups: Mapping[str, Sequence[Cell]],
    lines: Mapping[str, Mapping[str, Sequence[Point]]],
    x: str,
    width: float,
    foot: Sequence[str],
) -> Figure:
    looks = styles({label: group[0].method for label, group in groups.items()})
    references = {label for label, group in groups.items() if all(cell.budget == "full" for cell in group)}
    has_front = x not in _REQUESTED
    figure, axes = _grid(len(lines), [*groups, *([_FRONT] if has_front else [])], width, foot)
    for axis, (name, own) in zip(axes, lines.items(), strict=True):
        if has_front:
            _steps(axis, front([point for line in own.values() for point in line]))
        _panel(axis, own, looks, references, x)
        axis.set_title("all tasks together" if name == TOGETHER else name, fontsize=9.5, loc="left")
    _shared_x(axes, next(iter(lines.values())), set() if x == "time" else references, x)
    for axis in axes[-2:] if len(axes) > 1 and width > _NARROW else axes[-1:]:
        axis.set_xlabel(COSTS[x], fontsize=7.5)
    _legend(figure, axes[0], foot)
    return figure


def _data(
    groups: Mapping[str, Sequence[Cell]], lines: Mapping[str, Mapping[str, Sequence[Point]]], x: str
) -> pd.DataFrame:
    """Every point, gaps as well."""
    rows: list[dict[str, Any]] = []
    for task, own in lines.items():
        best = front([point for line in own.values() for point in line])
        for label, line in own.items():
            who = {"task": task, "label": label, "method": groups[label][0].method}
            for point in line:
                numbers = {"score": point.y, "low": point.low, "high": point.high, "n": point.n}
                on_front = {} if x in _REQUESTED else {"on_front": any(point is one for one in best)}
                rows.append({**who, "kept": point.kept, x: point.x, **numbers, **on_front})
    return pd.DataFrame(rows)


def _point(group: Sequence[Cell], task: str, x: str) -> Point:
    found = total(group) if task == TOGETHER else score(group, task)
    if found.mean != found.mean:
        return Point(group[0].kept, _NAN, _NAN, _NAN, _NAN)
    place = fmean(_cost(cell, x) for cell in group if cell.completed)
    return Point(group[0].kept, place, found.mean, found.low, found.high, found.n)


def _cost(cell: Cell, x: str) -> float:
    budget = cell.result["budget"]
    if x == "time":
        place = cell.result["latency"]["decode_ms_per_token"]["median"]
    elif x == "tokens":
        place = budget["requested_tokens"] or 1.0  # a method without a budget is drawn across the panel
    else:
        place = budget[f"{x}_fraction"]
    if not place or place <= 0:
        raise ValueError(f"{cell.directory}: {x}={place} can't be drawn; choose another --x")
    return float(place)


def _steps(axis: Axes, best: Sequence[Point]) -> None:
    """The front, behind everything else."""
    axis.plot(
        [point.x for point in best],
        [point.y for point in best],
        label=_FRONT,
        drawstyle="steps-post",
        color="0.72",
        linewidth=3.2,
        solid_joinstyle="miter",
        zorder=1.5,
    )


def _panel(
    axis: Axes, lines: Mapping[str, Sequence[Point]], looks: Mapping[str, Style], references: set[str], x: str
) -> None:
    axis.set_xscale("log")
    drawing.quiet(axis)
    axis.set_ylim(*_y_limits([point for line in lines.values() for point in line if point.has_numbers]))
    holding_all = 0
    for label, line in lines.items():
        if label in references:
            _reference(axis, label, line, looks[label], x)
            continue
        _line(axis, label, line, looks[label])
        if _shows_budgets(line, x):
            _annotate(axis, [point for point in line if point.has_numbers], looks[label], holding_all)
            holding_all += 1


def _shows_budgets(line: Sequence[Point], x: str) -> bool:
    """Whether every point lies at a full cache or more, so that x doesn't show what was asked for."""
    if x not in ("resident", "attended"):
        return False
    places = [point.x for point in line if point.has_numbers]
    return bool(places) and min(places) >= 1


def _reference(axis: Axes, label: str, line: Sequence[Point], look: Style, x: str) -> None:
    """A method without a budget: a dashed line over the whole panel, its interval, and a dot at its time."""
    for point in (point for point in line if point.has_numbers):
        if x == "time":
            axis.plot([point.x], [point.y], color=look.colour, marker="o", markersize=4, zorder=4)
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


def _grid(count: int, labels: Sequence[str], width: float, foot: Sequence[str]) -> tuple[Figure, list[Axes]]:
    """Panels above, room for the legend and the lines below them."""
    columns = 1 if count == 1 or width < _NARROW else 2
    rows = -(-count // columns)
    legend_rows = -(-len(labels) // _legend_columns(labels, width))
    bottom = 0.62 + 0.19 * legend_rows + drawing.foot_inches(foot)
    height = (min(3.9, 0.75 * width) if count == 1 else min(2.45, 0.5 * width)) * rows + bottom + 0.3
    figure = drawing.sheet(width, height)
    grid = figure.subplots(rows, columns, squeeze=False)
    figure.subplots_adjust(
        left=drawing.LEFT / width,
        right=0.985,
        top=1 - 0.3 / height,
        bottom=bottom / height,
        wspace=0.13,
        hspace=0.3,
    )
    for spare in list(grid.flat)[count:]:
        spare.remove()
    return figure, list(grid.flat)[:count]


def _legend_columns(labels: Sequence[str], width: float) -> int:
    """As many as the longest label leaves room for, up to 4."""
    longest = max(len(label) for label in labels)
    inches = 0.55 + 0.06 * longest if width < _NARROW else 0.75 + 0.07 * longest
    return max(1, min(4, int((width - 0.6) / inches)))


def _shared_x(
    axes: Sequence[Axes], lines: Mapping[str, Sequence[Point]], references: set[str], x: str
) -> None:
    """One range and one set of ticks for all panels, with room for texts beside the points at the right."""
    from matplotlib.ticker import FixedFormatter, FixedLocator, NullLocator

    shown = [line for label, line in lines.items() if label not in references]
    places = [p.x for line in shown for p in line if p.has_numbers] or [1.0]
    room = 1.15 if x in (*_REQUESTED, "time") else 1.3 if len(axes) == 1 else 1.75
    low, high = min(places) / 1.15, max(places) * room
    ticks = sorted(set(places)) if x in _REQUESTED else _ticks(low, high)
    for axis in axes:
        axis.set_xlim(low, high)
        axis.xaxis.set_major_locator(FixedLocator(ticks))
        axis.xaxis.set_major_formatter(FixedFormatter([f"{tick:g}" for tick in ticks]))
        axis.xaxis.set_minor_locator(NullLocator())
    left = min(axis.get_position().x0 for axis in axes)
    for axis in axes:
        if axis.get_position().x0 == left:
            axis.set_ylabel("score")


def _ticks(low: float, high: float) -> list[float]:
    """1, 2 and 5 of each power of ten within; the half steps too where these are too few."""
    powers = [10.0**power for power in range(-4, 8)]
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 4, 5, 7)):
        found = [step * power for power in powers for step in steps if low <= step * power <= high]
        if len(found) > 2:
            break
    return found


def _legend(figure: Figure, axis: Axes, foot: Sequence[str]) -> None:
    handles, labels = axis.get_legend_handles_labels()
    width, height = figure.get_size_inches()
    figure.legend(
        handles,
        labels,
        loc="lower left",
        bbox_to_anchor=(drawing.LEFT / width, drawing.foot_inches(foot) / height),
        ncols=_legend_columns(labels, width),
        frameon=False,
        fontsize=7 if width < _NARROW else 8,
        handlelength=2.4 if width < _NARROW else 3.2,
        columnspacing=1.2 if width < _NARROW else 2.0,
        borderpad=0,
        borderaxespad=0,
    )
    drawing.write_foot(figure, foot)


def _below(
    cells: Sequence[Cell],
    groups: Mapping[str, Sequence[Cell]],
    lines: Mapping[str, Mapping[str, Sequence[Point]]],
    x: str,
) -> list[str]:
    """What a reader must know: gaps, what is shown, and where it was measured."""
    done = [cell for cell in cells if cell.completed]
    cell = done[0].result["cell"]
    full = [
        label
        for label, line in next(iter(lines.values())).items()
        if _shows_budgets(line, x) and groups[label][0].budget != "full"
    ]
    caption = (
        f"{cell['model']} on {cell['benchmark']}, n = {sizes(done)} a task and "
        f"{'cell' if seeds(done) else 'point'}; {f'{seeds(done)}; ' if seeds(done) else ''}"
        f"{listed(devices(done))}; commit {listed(commits(done))}. Bands: 95% intervals"
        f"{'; all tasks together have none' if _without_interval(lines.get(TOGETHER, {})) else ''}."
        f"{f' Numbers beside points: the budget asked of {listed(full)}.' if full else ''}"
    )
    gaps = "; ".join(gap for label, group in groups.items() for gap in _gaps(label, group))
    return [gaps, caption]


def _without_interval(lines: Mapping[str, Sequence[Point]]) -> bool:
    return any(point.has_numbers and point.low != point.low for line in lines.values() for point in line)


def _gaps(label: str, group: Sequence[Cell]) -> Iterator[str]:
    """Which budgets of a method have no numbers, and why."""
    missing: dict[str, list[Cell]] = {}
    for cell in group:
        if not cell.completed:
            missing.setdefault(str(cell.result["status"]), []).append(cell)
    for status, lacking in missing.items():
        smallest = lacking[-1].smallest
        needs = f" (needs >= {smallest})" if smallest else ""
        yield f"{label} {status} at {', '.join(dict.fromkeys(cell.kept for cell in lacking))}{needs}"

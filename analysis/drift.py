"""What the pivots of HeteroCache saw while one answer was decoded: overlaps of windows, and drift.

`python -m analysis.figure drift outputs/<tag> --out drift.pdf`, of cells that ran with `runner.trace`. Above,
the median over pivots of a window's median overlap, with the band from p10 to p90 and the threshold; below,
each pivot's own, with a cross where it fell below the threshold and its satellites were refreshed.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import median
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import drawing
from analysis.cells import Cell
from analysis.drawing import LEFT, Picture
from analysis.traces import Traced, caption, traced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_COLOUR = "#0072B2"
_RIGHT = 0.75  # inches behind the panels


def picture(cells: Sequence[Cell], example: str | None = None) -> Picture:
    """The timeline of each traced cell that watched pivots. Errors as of `traces.traced`."""
    shown = traced(cells, example, lambda trace: trace.windows, "windows of pivots (method=heterocache)")

    def draw(width: float, foot: Sequence[str]) -> Figure:
        return _draw(shown, width, foot)

    said = "Above: median over pivots, band from p10 to p90; crosses below: satellites were refreshed."
    return Picture(draw, pd.DataFrame(_rows(shown)), [f"{caption(shown)} {said}"])


def _rate(one: Traced) -> str:
    windows = one.trace.windows
    return f"{sum(w.drifted for w in windows)} of {len(windows)} windows drifted"


def _rows(shown: Sequence[Traced]) -> Iterator[dict[str, object]]:
    for one in shown:
        for seen in one.trace.windows:
            where = {"layer": seen.layer, "head": seen.head, "window": seen.number}
            steps = {f"overlap_{step}": overlap for step, overlap in enumerate(seen.overlap, start=1)}
            yield {**one.names, **where, "overlap": median(seen.overlap), "drifted": seen.drifted, **steps}


def overlaps(one: Traced) -> tuple[list[tuple[int, int]], NDArray[np.float64], NDArray[np.bool_]]:
    """Pivots by layer and head, and of each its median overlap (NaN: none) and drift in each window."""
    windows = one.trace.windows
    pivots = sorted({(seen.layer, seen.head) for seen in windows})
    shape = len(pivots), max(seen.number for seen in windows)
    values, drifted = np.full(shape, np.nan), np.zeros(shape, dtype=bool)
    for seen in windows:
        place = pivots.index((seen.layer, seen.head)), seen.number - 1
        values[place], drifted[place] = median(seen.overlap), seen.drifted
    return pivots, values, drifted


def _draw(shown: Sequence[Traced], width: float, foot: Sequence[str]) -> Figure:
    parts = [overlaps(one) for one in shown]
    heights = [part for pivots, *_ in parts for part in (1.0, min(4.0, max(0.5, 0.16 * len(pivots))), 0.35)][
        :-1
    ]
    bottom = 0.5 + drawing.foot_inches(foot)
    height = sum(heights) + 0.12 * len(shown) + bottom + 0.3
    figure = drawing.sheet(width, height)
    grid = figure.add_gridspec(
        len(heights), 1, height_ratios=heights, left=LEFT / width, right=1 - _RIGHT / width,
        top=1 - 0.3 / height, bottom=bottom / height, hspace=0.08,
    )  # fmt: skip
    for place, (one, (pivots, values, drifted)) in enumerate(zip(shown, parts, strict=True)):
        above = figure.add_subplot(grid[3 * place])
        below = figure.add_subplot(grid[3 * place + 1], sharex=above)
        _line(above, one, values)
        _map(below, pivots, values, drifted)
        if place == len(shown) - 1:
            below.set_xlabel(f"window of {one.trace.plan['steps']} tokens")
    _scale(figure, bottom)
    drawing.write_foot(figure, foot)
    return figure


def _line(axis: Axes, one: Traced, values: NDArray[np.float64]) -> None:
    numbers = np.arange(1, values.shape[1] + 1)
    there = ~np.isnan(values).all(axis=0)
    low, middle, high = np.nanquantile(values[:, there], (0.1, 0.5, 0.9), axis=0)
    drawing.quiet(axis)
    axis.plot(numbers[there], middle, color=_COLOUR, marker="o", markersize=3, linewidth=1.3)
    axis.fill_between(numbers[there], low, high, color=_COLOUR, alpha=0.15, linewidth=0)
    threshold = one.trace.plan["threshold"]
    axis.axhline(threshold, color="0.2", linestyle="--", linewidth=1)
    axis.annotate(
        f"threshold {threshold:g}", (0, threshold), xycoords=("axes fraction", "data"), xytext=(3, 2),
        textcoords="offset points", fontsize=6.5,
    )  # fmt: skip
    axis.set_ylim(-0.03, 1.03)
    axis.set_ylabel("overlap", fontsize=8)
    axis.tick_params(labelbottom=False, labelsize=7.5)
    axis.set_title(f"{one.title}: {_rate(one)}", fontsize=8.5, loc="left")


def _map(
    axis: Axes, pivots: Sequence[tuple[int, int]], values: NDArray[np.float64], drifted: NDArray[np.bool_]
) -> None:
    from matplotlib.ticker import MaxNLocator

    extent = (0.5, values.shape[1] + 0.5, len(pivots) - 0.5, -0.5)
    axis.imshow(values, cmap="viridis", vmin=0, vmax=1, aspect="auto", interpolation="nearest", extent=extent)
    rows, columns = np.nonzero(drifted)
    # A white cross with a black edge can be seen on every colour.
    axis.scatter(columns + 1, rows, marker="X", s=18, color="white", edgecolor="black", linewidth=0.6)
    step = -(-len(pivots) // 16)
    axis.set_yticks(
        range(0, len(pivots), step), [f"L{layer} H{head}" for layer, head in pivots[::step]], fontsize=6.5
    )
    axis.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    axis.tick_params(length=2, labelsize=7)


def _scale(figure: Figure, bottom: float) -> None:
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    place = (1 - 0.6 / width, bottom / height, 0.12 / width, 1 - (bottom + 0.3) / height)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 1), "viridis"), cax=figure.add_axes(place))
    bar.set_label("median overlap of a window", labelpad=1, fontsize=8)
    bar.ax.tick_params(labelsize=8)
    bar.outline.set_linewidth(0.5)

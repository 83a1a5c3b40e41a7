"""The figures of a report as SVG: those of analysis.figure, heatmap and latency, of its cells."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from analysis import drawing, heatmap, latency, latency_records, pareto
from analysis.cells import Cell
from analysis.families import Family

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class Picture:
    """A figure, or why there is none.

    Args:
        words: what it shows, for who can't see it.
        has_scale: colours stand for numbers, so they must not be changed for a dark page.
    """

    caption: str
    words: str
    svg: bytes = b""
    missing: str = ""
    has_scale: bool = False


def of_family(family: Family) -> Iterator[Picture]:
    """Score against bytes for each seed, and the heatmap of a benchmark with depths."""
    for cells in family.by_seed.values():
        if any(cell.completed and cell.result.get("tasks") for cell in cells):
            caption = f"Score against KV bytes on the device, as measured{family.seed(cells[0])}."
            words = f"{caption} {family.name}: one line a method. Every number is in the table below."
            yield _picture(caption, words, partial(pareto.pareto, cells))
        if any(cell.result["cell"]["benchmark"] == heatmap.BENCHMARK and cell.has_lines for cell in cells):
            words = f"Score by length and depth, a panel for each method and budget of {family.name}."
            yield _picture("Score by length and depth.", words, partial(_heatmap, cells), has_scale=True)


def of_latency(cells: Sequence[Cell]) -> Picture:
    """Milliseconds a step against context."""
    caption = (
        "Milliseconds a decode step against context; python -m analysis.latency has every point in a table."
    )
    return _picture(caption, caption, lambda: latency.draw(latency_records.collect(cells)))


def _heatmap(cells: Sequence[Cell]) -> Figure:
    return heatmap.draw(heatmap.collect(cells))


def _picture(caption: str, words: str, draw: Callable[[], Figure], has_scale: bool = False) -> Picture:
    if importlib.util.find_spec("matplotlib") is None:
        return Picture(caption, words, missing="figures need matplotlib: pip install 'hcache[analysis]'")
    try:
        return Picture(caption, words, drawing.rendered(draw, ".svg"), has_scale=has_scale)
    except ValueError as error:
        return Picture(caption, words, missing=str(error))

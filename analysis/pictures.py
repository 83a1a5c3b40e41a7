"""The figures of a report as SVG: those of `analysis.figure` that its cells have something for."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from analysis import drawing, heatmap, latency, pareto
from analysis.families import Family
from analysis.latency_records import Sweep


@dataclass(frozen=True)
class Shown:
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


def of_family(family: Family) -> Iterator[Shown]:
    """Score against bytes, against the budget where there are several, and the heatmaps of needles."""
    beside = f"{family.name}: one line a method. The numbers are in the table."
    if any(cell.result.get("tasks") for cell in family.done):
        caption = "Score against KV bytes on the device, as measured, all seeds together."
        yield _shown(caption, f"{caption} {beside}", partial(pareto.picture, family.cells))
        if len({cell.budget for cell in family.done if cell.budget != "full"}) > 1:
            caption = "Score against the budget that was asked for, all seeds together."
            yield _shown(caption, f"{caption} {beside}", partial(pareto.budgets, family.cells))
    for cells in family.by_seed.values():
        if any(cell.result["cell"]["benchmark"] == heatmap.BENCHMARK and cell.has_lines for cell in cells):
            caption = f"Score by length and depth{family.seed(cells[0])}."
            words = f"{caption} A panel for each method and budget of {family.name}."
            yield _shown(caption, words, partial(heatmap.picture, cells), has_scale=True)


def of_latency(sweep: Sweep) -> Shown:
    """Milliseconds a step against context."""
    caption = "Milliseconds a decode step against context. The numbers are in the table."
    return _shown(caption, caption, partial(latency.picture, sweep.cells))


def _shown(
    caption: str, words: str, picture: Callable[[], drawing.Picture], has_scale: bool = False
) -> Shown:
    if importlib.util.find_spec("matplotlib") is None:
        return Shown(caption, words, missing="figures need matplotlib: pip install 'hcache[analysis]'")
    try:
        found = picture()
        svg = drawing.rendered(found.page, ".svg")
    except ValueError as error:
        return Shown(caption, words, missing=str(error))
    return Shown(caption, words, svg, has_scale=has_scale)

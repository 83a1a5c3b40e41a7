"""Which positions of one prompt each method kept: a panel a method, a row a layer and KV head.

`python -m analysis.figure kept outputs/<tag> --out kept.pdf`, of cells that ran with `runner.trace`. Dark is
kept from the prompt's end to the last step; orange was lost and blue brought in on the way.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from analysis import drawing
from analysis.cells import Cell
from analysis.drawing import LEFT, Picture
from analysis.traces import Traced, caption, traced
from hcache.trace import Positions

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

STAYED, LOST, CAME = "#1A1A1A", "#E69F00", "#0072B2"
_NAMES = {STAYED: "kept throughout", LOST: "lost while decoding", CAME: "brought in while decoding"}
_BINS = 150  # positions, or groups of them, in an inch
_NARROW = 5.0  # inches below which panels stand in one column


def picture(cells: Sequence[Cell], example: str | None = None) -> Picture:
    """What each traced cell kept of the example. Errors as of `traces.traced`."""
    shown = traced(cells, example, lambda trace: True, "what was kept")
    heads = f"Rows: layers, and the {len(shown[0].trace.first[0])} KV heads of each."

    def draw(width: float, foot: Sequence[str]) -> Figure:
        return _draw(shown, width, foot)

    return Picture(draw, pd.DataFrame(_rows(shown)), [f"{caption(shown)} {heads}"])


def _rows(shown: Sequence[Traced]) -> Iterator[dict[str, object]]:
    """A row for each position that a head held at either time."""
    for one in shown:
        for layer, heads in enumerate(one.trace.first):
            for head, first in enumerate(heads):
                before, after = set(first.tolist()), set(one.trace.last[layer][head].tolist())
                for position in sorted(before | after):
                    when = {"first": position in before, "last": position in after}
                    yield {**one.names, "layer": layer, "head": head, "position": position, **when}


def masks(positions: Positions, tokens: int) -> NDArray[np.bool_]:
    """[layers * heads, tokens]: whether a row holds a position."""
    rows = [head for layer in positions for head in layer]
    held = np.zeros((len(rows), tokens), dtype=bool)
    for row, own in zip(held, rows, strict=True):
        row[own] = True
    return held


def colours(first: NDArray[np.bool_], last: NDArray[np.bool_], bins: int) -> NDArray[np.float64]:
    """[rows, bins, 3]: each group of positions in the colours of what happened to them, by their share."""
    from matplotlib.colors import to_rgb

    edges = np.linspace(0, first.shape[1], min(bins, first.shape[1]) + 1).astype(int)
    image = np.ones((len(first), len(edges) - 1, 3))
    for colour, which in ((STAYED, first & last), (LOST, first & ~last), (CAME, ~first & last)):
        share = np.add.reduceat(which, edges[:-1], axis=1, dtype=float) / np.diff(edges)
        image -= share[..., None] * (1 - np.array(to_rgb(colour)))
    return image.clip(0, 1)


def _draw(shown: Sequence[Traced], width: float, foot: Sequence[str]) -> Figure:
    from matplotlib.patches import Patch

    columns = 1 if len(shown) == 1 or width < _NARROW else 2
    rows = -(-len(shown) // columns)
    trace = shown[0].trace
    down = min(2.6, max(0.9, 0.035 * len(trace.first) * len(trace.first[0])))
    legend = 0.25 if width > _NARROW else 0.6
    bottom = 0.45 + legend + drawing.foot_inches(foot)
    height = rows * (down + 0.42) + bottom
    figure = drawing.sheet(width, height)
    axes = list(figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flat)
    figure.subplots_adjust(
        left=LEFT / width, right=1 - 0.15 / width, top=1 - 0.28 / height, bottom=bottom / height,
        wspace=0.08, hspace=0.42 / down,
    )  # fmt: skip
    for axis, one in zip(axes, shown, strict=False):
        _panel(axis, one, int(_BINS * width / columns))
    for spare in axes[len(shown) :]:
        spare.remove()
    for place, axis in enumerate(axes[: len(shown)]):
        if place % columns == 0:
            axis.set_ylabel("layer")
        if place + columns >= len(shown):
            axis.tick_params(labelbottom=True)
            axis.set_xlabel("position in the prompt")
    figure.legend(
        handles=[Patch(color=colour, label=name) for colour, name in _NAMES.items()],
        loc="lower left", bbox_to_anchor=(LEFT / width, drawing.foot_inches(foot) / height),
        ncols=3 if width > _NARROW else 1, frameon=False, fontsize=8, borderpad=0, borderaxespad=0,
    )  # fmt: skip
    drawing.write_foot(figure, foot)
    return figure


def _panel(axis: Axes, one: Traced, bins: int) -> None:
    trace, heads = one.trace, len(one.trace.first[0])
    layers, tokens = len(trace.first), trace.prompt_tokens
    image = colours(masks(trace.first, tokens), masks(trace.last, tokens), bins)
    axis.imshow(image, aspect="auto", interpolation="nearest", extent=(0, tokens, layers, 0))
    for layer in range(1, layers):
        axis.axhline(layer, color="0.6", linewidth=0.4)
    step = -(-layers // 8)
    axis.set_yticks(
        [layer + 0.5 for layer in range(0, layers, step)], [str(n) for n in range(0, layers, step)]
    )
    axis.tick_params(length=2, labelsize=8)
    held = sum(len(head) for layer in trace.first for head in layer) / (layers * heads * tokens)
    axis.set_title(f"{one.title}: {held:.0%} held", fontsize=8.5, loc="left")

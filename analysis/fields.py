"""Grids of scores as colours, one scale from 0 to 100: fields, numbers, gaps, and the scale beside them.

Knows nothing of records; matplotlib is imported when something is drawn.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap
    from matplotlib.figure import Figure

TEXT = 8
"""Size of what is written beside the axes."""
NUMBER = (0.26, 0.13)
"""Inches that a number in a field needs, across and down."""

_COLOURS = "viridis"  # even in lightness: told apart by colour-blind eyes and in print
_GAP = "0.88"


def colours() -> Colormap:
    """The scale of all grids."""
    from matplotlib import colormaps

    return colormaps[_COLOURS]


def grid(axis: Axes, scores: Sequence[Sequence[float]]) -> None:
    """Rows of scores from the top; NaN is a gap, grey and hatched."""
    whole = (-0.5, len(scores[0]) - 0.5, len(scores) - 0.5, -0.5)
    axis.axhspan(whole[2], whole[3], facecolor=_GAP, edgecolor="0.6", hatch="////", linewidth=0, zorder=0)
    axis.imshow(
        scores, cmap=colours(), vmin=0, vmax=100, aspect="auto", interpolation="nearest", extent=whole
    )
    axis.set_xlim(whole[0], whole[1])
    axis.set_ylim(whole[2], whole[3])


def numbers(axis: Axes, scores: Sequence[Sequence[float]]) -> None:
    """Each score in its field, in what can be read on its colour."""
    for y, row in enumerate(scores):
        for x, score in enumerate(row):
            if score == score:
                red, green, blue, _ = colours()(score / 100)
                dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
                colour = "white" if dark else "black"
                axis.text(x, y, f"{score:.0f}", ha="center", va="center", fontsize=6.5, color=colour)


def scale(figure: Figure, bottom: float, top: float) -> None:
    """The scale at the right edge, between these heights in inches from below and from above."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    width, height = figure.get_size_inches()
    place = (1 - 0.6 / width, bottom / height, 0.12 / width, 1 - (bottom + top) / height)
    bar = figure.colorbar(ScalarMappable(Normalize(0, 100), colours()), cax=figure.add_axes(place))
    bar.set_label("score", labelpad=1, fontsize=TEXT)
    bar.ax.tick_params(labelsize=TEXT)
    bar.outline.set_linewidth(0.5)

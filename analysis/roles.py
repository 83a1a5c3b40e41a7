"""Roles of heads as HeteroCache ran with them: layers down, KV heads across, a colour and a letter a role.

`python -m analysis.figure roles outputs/<tag> --out roles.pdf`, of cells that ran with `runner.trace`. Roles
are those that were left after fitting to the budget; cells with the same roles are one panel.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import pandas as pd

from analysis import drawing
from analysis.cells import Cell
from analysis.drawing import LEFT, Picture
from analysis.traces import Traced, caption, traced

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Matrix = tuple[tuple[str, ...], ...]
"""Names of roles by layer and head."""

ROLES = {"anchor": "#DDDDDD", "volatile": "#D55E00", "pivot": "#0072B2", "satellite": "#F0E442"}
_LIGHT = {"anchor", "satellite"}  # a black letter can be read on them
_FIELD = 0.2  # inches of a head, at most
_LETTER = 0.11  # inches that a letter needs


def picture(cells: Sequence[Cell], example: str | None = None) -> Picture:
    """The roles of each traced cell that has some. Errors as of `traces.traced`."""
    shown = traced(cells, example, lambda trace: "roles" in trace.plan, "roles of heads (method=heterocache)")
    panels: dict[Matrix, list[Traced]] = {}
    for one in shown:
        panels.setdefault(tuple(tuple(row) for row in one.trace.plan["roles"]), []).append(one)
    rows = [
        {**one.names, "layer": layer, "head": head, "role": role}
        for matrix, members in panels.items()
        for one in members
        for layer, row in enumerate(matrix)
        for head, role in enumerate(row)
    ]

    def draw(width: float, foot: Sequence[str]) -> Figure:
        return _draw(panels, width, foot)

    return Picture(draw, pd.DataFrame(rows), [f"{caption(shown)} Roles as fitted to each budget."])


def _draw(panels: dict[Matrix, list[Traced]], width: float, foot: Sequence[str]) -> Figure:
    from matplotlib.patches import Patch

    layers, heads = len(next(iter(panels))), len(next(iter(panels))[0])
    columns = max(1, min(len(panels), int((width - LEFT) / 1.5)))
    rows = -(-len(panels) // columns)
    across = min((width - LEFT - 0.15) / columns - 0.35, heads * 2 * _FIELD)
    down = layers * min(_FIELD, max(0.07, across / heads / 1.4))
    entries = 4 if width > 5 else 2
    bottom = 0.45 + 0.2 * (4 // entries) + drawing.foot_inches(foot)
    gap = 0.55 + 0.13 * max(len(members) for members in panels.values())  # ticks, label, titles
    height = rows * (down + gap) + bottom - 0.4
    figure = drawing.sheet(width, height)
    for place, (matrix, members) in enumerate(panels.items()):
        left = LEFT + place % columns * (width - LEFT - 0.15) / columns
        under = bottom + (rows - 1 - place // columns) * (down + gap)
        axis = figure.add_axes((left / width, under / height, across / width, down / height))
        letters = min(across / heads, down / layers) >= _LETTER
        _panel(axis, matrix, letters)
        axis.set_title("\n".join(one.title for one in members), fontsize=7.5, loc="left")
        if place % columns == 0:
            axis.set_ylabel("layer")
        axis.set_xlabel("KV head")
    figure.legend(
        handles=[
            Patch(facecolor=colour, edgecolor="0.4", label=f"{name[0].upper()}  {name}")
            for name, colour in ROLES.items()
        ],
        loc="lower left", bbox_to_anchor=(LEFT / width, drawing.foot_inches(foot) / height), ncols=entries,
        frameon=False, fontsize=8, borderpad=0, borderaxespad=0,
    )  # fmt: skip
    drawing.write_foot(figure, foot)
    return figure


def _panel(axis: Axes, matrix: Matrix, letters: bool) -> None:
    from matplotlib.colors import ListedColormap

    names = list(ROLES)
    codes = [[names.index(role) for role in row] for row in matrix]
    axis.imshow(codes, cmap=ListedColormap(list(ROLES.values())), vmin=-0.5, vmax=3.5, aspect="auto")
    if letters:
        for layer, row in enumerate(matrix):
            for head, role in enumerate(row):
                colour = "black" if role in _LIGHT else "white"
                axis.text(head, layer, role[0].upper(), ha="center", va="center", fontsize=6.5, color=colour)
    step = -(-len(matrix) // 12)
    axis.set_yticks(range(0, len(matrix), step))
    axis.set_xticks(range(0, len(matrix[0]), -(-len(matrix[0]) // 8)))
    axis.tick_params(length=2, labelsize=7.5)

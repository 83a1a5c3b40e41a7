"""Families: cells that stand in one table, the same but for method, budget and seeds, and that table's rows.

Every format of a report is made from a family's grid, so all show the same. Knows no format.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from analysis.cells import Cell, by_label, family, shared, sizes, tasks, unique
from analysis.columns import Column, Field, columns

_SEEDS = {"seed": "runtime", "data seed": "benchmark"}


@dataclass(frozen=True)
class Row:
    """A cell in a table.

    Args:
        label: the method, with the options by which its cells differ.
        fields: one a column.
        best: places of the fields with the highest score at this budget; several where they are equal.
    """

    label: str
    cell: Cell
    fields: Sequence[Field]
    best: frozenset[int]


@dataclass(frozen=True)
class Family:
    """Cells of one model, benchmark and settings; name: by which it differs from others of a report."""

    name: str
    cells: Sequence[Cell]

    @property
    def done(self) -> list[Cell]:
        return [cell for cell in self.cells if cell.completed]

    @property
    def tasks(self) -> list[str]:
        return tasks(self.cells)

    @cached_property
    def labelled(self) -> list[tuple[str, Cell]]:
        """Cells with their labels, the baseline first, then by method and budget."""
        return [(label, cell) for label, group in by_label(self.cells).items() for cell in group]

    @cached_property
    def columns(self) -> list[Column]:
        kept, *others = columns(self.cells, self.cells, together=True)
        return [kept, *map(_seed_column, self._several), *others]

    @cached_property
    def rows(self) -> list[Row]:
        fields = [[column.field(cell) for column in self.columns] for _, cell in self.labelled]
        best = self._best(fields)
        return [
            Row(label, cell, own, frozenset(place for place in range(len(own)) if (number, place) in best))
            for number, ((label, cell), own) in enumerate(zip(self.labelled, fields, strict=True))
        ]

    @property
    def header(self) -> list[str]:
        return ["method", *(column.name for column in self.columns)]

    @property
    def by_seed(self) -> dict[tuple[str, ...], list[Cell]]:
        """The cells of each combination of seeds."""
        groups: dict[tuple[str, ...], list[Cell]] = {}
        for cell in self.cells:
            groups.setdefault(seeds(cell), []).append(cell)
        return groups

    @property
    def runs(self) -> str:
        """What stands beside the names of models and tasks: how many examples and seeds."""
        several = f", {len(self.by_seed)} seeds" if len(self.by_seed) > 1 else ""
        return f"n = {sizes(self.done)} a task and cell{several}"

    def seed(self, cell: Cell) -> str:
        """`, seed 1` where the family has several; empty otherwise."""
        return "".join(f", {list(_SEEDS)[place]} {seeds(cell)[place]}" for place in self._several)

    @cached_property
    def _several(self) -> list[int]:
        """Places of the kinds of seeds of which there are several."""
        return [place for place in range(len(_SEEDS)) if len({seeds(c)[place] for c in self.cells}) > 1]

    def _best(self, fields: Sequence[Sequence[Field]]) -> set[tuple[int, int]]:
        """(row, place) of the highest scores of methods at one budget and seed; none where all are alike."""
        groups: dict[tuple[str, ...], list[int]] = {}
        for number, (_, cell) in enumerate(self.labelled):
            if cell.budget != "full":
                groups.setdefault((cell.budget, *seeds(cell)), []).append(number)
        scores = [place for place, column in enumerate(self.columns) if column.is_score]
        return {
            (number, place)
            for place in scores
            for rows in groups.values()
            for number in _highest({number: fields[number][place] for number in rows})
        }


def _highest(fields: dict[int, Field]) -> list[int]:
    """The keys of the fields that show the highest number; none where all show the same."""
    numbers = {key: field.value for key, field in fields.items() if field.value is not None}
    texts = {fields[key].text for key in numbers}
    if len(texts) < 2:
        return []
    top = fields[max(numbers, key=lambda key: numbers[key])].text
    return [key for key in numbers if fields[key].text == top]


def families(cells: Sequence[Cell]) -> list[Family]:
    """All cells, each configuration once, in families, in the order of their first cells."""
    groups: dict[str, list[Cell]] = {}
    for cell in unique(cells):
        groups.setdefault(family(cell), []).append(cell)
    return [Family(name, group) for name, group in zip(_names(groups), groups.values(), strict=True)]


def _names(groups: dict[str, list[Cell]]) -> list[str]:
    """Model and benchmark of each group, and the options that tell it from others with the same."""
    heads = [_head(group[0]) for group in groups.values()]
    options = [shared(group[0]) for group in groups.values()]
    names = []
    for head, own in zip(heads, options, strict=True):
        alike = [other for name, other in zip(heads, options, strict=True) if name == head]
        told = [
            f"{path.split('.', 1)[-1]}={value}"
            for path, value in sorted(own.items())
            if any(other.get(path) != value for other in alike)
        ]
        names.append(", ".join([head, *told]))
    return names


def _head(cell: Cell) -> str:
    return f"{cell.result['cell']['model']} on {cell.result['cell']['benchmark']}"


def seeds(cell: Cell) -> tuple[str, ...]:
    """Seed of the run, and of the benchmark's data (empty where there is none)."""
    config = cell.result["config"]
    return tuple(str(config[section].get("seed", "")) for section in _SEEDS.values())


def _seed_column(place: int) -> Column:
    def field(cell: Cell) -> Field:
        text = seeds(cell)[place]
        return Field(text or "-", float(text) if text else None)

    return Column(list(_SEEDS)[place], field)

"""Examples on which methods disagree: what each of them answered, side by side.

They are chosen because the scores differ, so they say how methods fail, not how often.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest

from analysis.cells import Cell
from analysis.families import Family, seeds
from hcache.records import Line

_Key = tuple[str, str]  # task and id


@dataclass(frozen=True)
class Disagreement:
    """An example, and the line of each method for it, the best first.

    Args:
        kept: the budget in words.
        seed: of the cells, as Family.seed.
    """

    task: str
    id: str
    kept: str
    seed: str
    lines: Sequence[tuple[str, Line]]

    @property
    def answers(self) -> Sequence[str]:
        """What would have been right."""
        return [str(answer) for answer in self.lines[0][1].get("answers") or []]

    @property
    def spread(self) -> float:
        """From the worst score to the best, 0 to 1."""
        return float(self.lines[0][1]["score"] - self.lines[-1][1]["score"])


@dataclass(frozen=True)
class Chosen:
    """Some disagreements; of how many, and of how many examples that several methods answered."""

    shown: Sequence[Disagreement]
    disagree: int
    compared: int


def chosen(family: Family, count: int) -> Chosen:
    """The widest disagreements, of each budget, seed and task in turn."""
    groups: list[list[Disagreement]] = []
    compared = 0
    for cells in _beside(family):
        examples = list(_examples(family, cells))
        compared += len(examples)
        by_task: dict[str, list[Disagreement]] = defaultdict(list)
        for example in examples:
            if example.spread > 0:
                by_task[example.task].append(example)
        groups += [sorted(own, key=lambda example: -example.spread) for own in by_task.values()]
    turns = [example for turn in zip_longest(*groups) for example in turn if example is not None]
    return Chosen(turns[:count], len(turns), compared)


def _beside(family: Family) -> Iterator[list[tuple[str, Cell]]]:
    """Completed cells of each budget, those without one among them: of several runs of the same data the
    first."""
    done = [(label, cell) for label, cell in family.labelled if cell.completed and cell.has_lines]
    first: dict[tuple[str, str], str] = {}
    for _, cell in done:
        run, data = seeds(cell)
        if cell.budget != "full":
            first.setdefault((cell.kept, data), run)
    for (kept, data), run in first.items():
        yield [(label, cell) for label, cell in done if seeds(cell) == (run, data) and _held(cell, kept)]


def _held(cell: Cell, kept: str) -> bool:
    return cell.budget == "full" or cell.kept == kept


def _examples(family: Family, cells: Sequence[tuple[str, Cell]]) -> Iterator[Disagreement]:
    """Every example that two or more of the cells have a score of."""
    found: dict[_Key, list[tuple[str, Line]]] = defaultdict(list)
    for label, cell in cells:
        for line in cell.lines():
            if line["score"] is not None:
                found[line["task"], str(line["id"])].append((label, line))
    last = cells[-1][1]
    kept = next((cell.kept for _, cell in cells if cell.budget != "full"), last.kept)
    for (task, name), lines in found.items():
        if len(lines) > 1:
            ordered = sorted(lines, key=lambda line: -line[1]["score"])
            yield Disagreement(task, name, kept, family.seed(last), ordered)

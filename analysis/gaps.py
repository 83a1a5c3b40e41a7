"""Gaps: every method's scores minus one method's, paired on the same examples, within a family.

The statistics are those of analysis.statistics; here they are turned the way a reader asks: how far is a
method from the one it is held against?
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from analysis.cells import Cell
from analysis.frame import examples as examples_of
from analysis.statistics import Paired, comparisons, pooled


@dataclass(frozen=True)
class Gap(Paired):
    """A method minus the one it is held against, on one task, in points of 100.

    Args:
        label, kept: the method and its budget in words.
        against, against_kept: whom it is held against.
        p_holm: `p` corrected for all gaps beside it.
    """

    label: str
    kept: str
    against: str
    against_kept: str
    task: str
    p_holm: float

    @property
    def shown(self) -> str:
        """The difference with its interval."""
        return f"{self.difference:+.1f} [{self.low:+.1f}, {self.high:+.1f}]"

    @property
    def record(self) -> str:
        """Examples on which it is better, equal, worse."""
        return f"{self.wins}/{self.ties}/{self.losses}"


def p_shown(p: float) -> str:
    """A p-value, two digits of it."""
    return f"{p:#.2g}"


@dataclass(frozen=True)
class Gaps:
    """All gaps of a family.

    Args:
        by_task: one for each other method, budget and task.
        together: the same over all examples, each counting alike, which a headline takes. Empty for one
            task.
    """

    by_task: Sequence[Gap] = ()
    together: Sequence[Gap] = ()

    @property
    def headline(self) -> Sequence[Gap]:
        return self.together or self.by_task


def gaps(cells: Sequence[Cell], against: str) -> Gaps:
    """Of all completed cells with lines, against those of one method.

    Raises:
        ValueError: no completed cell of `against`, nobody to hold against it, or other examples.
    """
    examples = examples_of(cells)
    kept = {cell.budget: cell.kept for cell in cells}
    by_task = [_gap(row, kept) for row in comparisons(examples, against).to_dict("records")]
    if len({gap.task for gap in by_task}) < 2:
        return Gaps(by_task)
    rows = comparisons(pooled(examples), against).to_dict("records")
    return Gaps(by_task, [_gap(row, kept) for row in rows])


def _gap(row: Mapping[Hashable, Any], kept: Mapping[str, str]) -> Gap:
    """A row of `comparisons`, turned round: its `ours` is whom others are held against."""
    return Gap(
        label=row["other"],
        kept=kept[row["other_budget"]],
        against=row["ours"],
        against_kept=kept[row["ours_budget"]],
        task=row["task"],
        n=row["n"],
        difference=0.0 - row["difference"],  # not -0.0
        low=0.0 - row["high"],
        high=0.0 - row["low"],
        wins=row["losses"],
        ties=row["ties"],
        losses=row["wins"],
        p=row["p"],
        p_holm=row["p_holm"],
    )

"""What a family of cells says, in sentences that claim no more than its numbers carry.

A difference is stated where a test corrected for all gaps of the family supports it, and with its interval;
otherwise the sentence says that none could be shown, and how much the examples leave open.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from analysis.cells import BASELINE, Cell, devices, listed
from analysis.columns import dig, short
from analysis.families import Family
from analysis.gaps import Gap

LEVEL = 0.05
_OVER = 1.05
"""A cell that holds this many times what was asked for is named."""


@dataclass(frozen=True)
class Finding:
    """A sentence, and what stands below it."""

    text: str
    parts: Sequence[str] = ()


def findings(family: Family, gaps: Sequence[Gap]) -> list[Finding]:
    """The headlines of a family, in the order of what a reader asks first."""
    first = [scope(family), *_highest(family)]
    last = [*_bytes(family), *_times(family), *_missing(family)]
    return [*map(Finding, first), *_by_budget(gaps), *map(Finding, last)]


def scope(family: Family) -> str:
    """What was compared, on what."""
    methods = list(dict.fromkeys(label for label, _ in family.labelled))
    budgets = list(dict.fromkeys(cell.kept for cell in sorted(family.cells, key=lambda cell: cell.order)))
    asked = [kept for kept in budgets if kept != "all"]
    at = f", {_listed(asked)} kept" if asked else ""
    who = f"{_count(len(methods), 'method')} ({', '.join(methods)}){at}"
    if not family.done:
        return f"{who}; no cell is completed."
    return f"{who}; {_count(len(family.tasks), 'task')} ({_some(family.tasks)}), {family.runs}."


def _highest(family: Family) -> Iterator[str]:
    """The highest scores of all tasks at each budget; a look, not a test."""
    found = []
    for kept in dict.fromkeys(cell.kept for _, cell in family.labelled if cell.budget != "full"):
        scores = [
            (number, label)
            for label, cell in family.labelled
            if cell.kept == kept and (number := dig(cell, "score")) is not None
        ]
        if scores:
            top = short(max(scores)[0])
            names = dict.fromkeys(label for number, label in scores if short(number) == top)
            found.append(f"at {kept} {' and '.join(names)} ({top})")
    if found:
        yield f"Highest score of all tasks, of the completed cells: {', '.join(found)}; one sample, no test."


def _by_budget(gaps: Sequence[Gap]) -> Iterator[Finding]:
    """Who is shown to differ from the method all are held against, at each budget."""
    groups: dict[tuple[str, str, str], list[Gap]] = {}
    for gap in gaps:
        groups.setdefault((gap.kept, gap.against, gap.against_kept), []).append(gap)
    for (kept, against, against_kept), own in groups.items():
        text = (
            f"{_at(kept)}, against {_whom(against, against_kept)} on the same {_range(own)} examples "
            f"({' and '.join(dict.fromkeys(gap.task for gap in own))}; points with 95% intervals, "
            f"Holm at {LEVEL:.0%} over {_count(len(gaps), 'comparison')}):"
        )
        yield Finding(text, list(_parts(own)))


def _range(gaps: Sequence[Gap]) -> str:
    counts = sorted({gap.n for gap in gaps})
    return " to ".join(dict.fromkeys((str(counts[0]), str(counts[-1]))))


def _whom(against: str, kept: str) -> str:
    return against if kept == "all" else f"{against} with {kept} kept"


def _at(kept: str) -> str:
    return "With everything kept" if kept == "all" else f"At {kept} kept"


def _parts(gaps: Sequence[Gap]) -> Iterator[str]:
    """Who is shown to be lower, who to be higher, and of whom neither can be said."""
    sure = [gap for gap in gaps if gap.p_holm < LEVEL]
    groups = {
        "Lower": [gap for gap in sure if gap.difference < 0],
        "Higher": [gap for gap in sure if gap.difference > 0],
        "No difference shown": [gap for gap in gaps if gap.p_holm >= LEVEL],
    }
    for name, own in groups.items():
        if own:
            yield f"{name}: {'; '.join(map(_named, own))}."


def _named(gap: Gap) -> str:
    """A method and its gap; where no example differs, what that leaves open."""
    if gap.wins + gap.losses:
        return f"{gap.label} {gap.shown}"
    return f"{gap.label}, alike on all {gap.n} (at 95%, up to {unseen(gap.n):.0%} could still differ)"


def unseen(n: int) -> float:
    """The largest share of examples that may differ, at 95%, where none of n does."""
    return float(1 - 0.05 ** (1 / n))


def _bytes(family: Family) -> Iterator[str]:
    """What was held, as measured, and who holds more than was asked for."""
    held = [(label, cell, dig(cell, "budget", "resident_fraction")) for label, cell in family.labelled]
    over = {
        label: None
        for label, cell, fraction in held
        if fraction is not None and cell.budget.startswith("f") and fraction > _OVER * cell.order[1]
    }
    if over:
        yield (
            f"More on the device than the budget asks: {', '.join(over)} (see resident); compare them by "
            "what is measured, not by the budget."
        )


def _times(family: Family) -> Iterator[str]:
    timed = [
        (ms, label, cell)
        for label, cell in family.labelled
        if (ms := dig(cell, "latency", "decode_ms_per_token", "median")) is not None
    ]
    if not timed or len(devices(family.done)) > 1:
        return
    (least, first, fastest), (most, last, slowest) = min(timed, key=_ms), max(timed, key=_ms)
    own = [ms for ms, label, cell in timed if cell.method == BASELINE]
    base = f"; {BASELINE} {' and '.join(f'{ms:.1f}' for ms in own)}" if own else ""
    yield (
        f"A decode step took from {least:.1f} ms a token ({first}, {fastest.kept} kept) to {most:.1f} "
        f"({last}, {slowest.kept} kept){base}: medians of single runs on {listed(devices(family.done))}, "
        "without intervals."
    )


def _ms(timed: tuple[float, str, Cell]) -> float:
    return timed[0]


def _missing(family: Family) -> Iterator[str]:
    lacking: dict[tuple[str, str], list[str]] = {}
    for label, cell in family.labelled:
        if not cell.completed:
            lacking.setdefault((label, str(cell.result["status"])), []).append(cell.kept)
    if lacking:
        named = [f"{label} at {_listed(kept)} ({status})" for (label, status), kept in lacking.items()]
        yield f"Without numbers, and in no comparison: {'; '.join(named)}."


def _listed(names: Sequence[str]) -> str:
    """Each once, as a list in a sentence."""
    *others, last = dict.fromkeys(names)
    return f"{', '.join(others)} and {last}" if others else last


def _some(names: Sequence[str]) -> str:
    return ", ".join(names) if len(names) <= 6 else f"{', '.join(names[:5])} and {len(names) - 5} others"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"

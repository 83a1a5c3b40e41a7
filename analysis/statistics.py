"""What differences between methods can support: paired on the same examples, corrected for their number.

`comparisons` takes the examples frame (analysis.frame) and gives a frame of its own: one row for each setting
of the method asked for, each other method at the same budget or without one, and each task. An example run
under several seeds of the runtime counts once, with its mean. The interval is a percentile bootstrap over
examples, the p-value a sign-flip test (hcache.metrics), and `p_holm` is Holm's over all rows of the frame:
with it, the chance of even one false claim among them stays below the level that p_holm is held against.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import pandas as pd

from hcache.metrics import paired_bootstrap

POOLED = "all examples"
"""The examples of all tasks as those of one, each counting alike: not the benchmark's average of tasks."""

Unit = tuple[Hashable, str]
"""Seed of the benchmark and id: what makes an example."""

COLUMNS = (
    "model",
    "benchmark",
    "family",
    "ours",
    "ours_budget",
    "other",
    "other_budget",
    "task",
    "n",
    "difference",
    "low",
    "high",
    "wins",
    "ties",
    "losses",
    "p",
    "p_holm",
)
"""Of the frame of comparisons; ours and other are labels, difference is ours minus other's."""


@dataclass(frozen=True)
class Paired:
    """Ours minus theirs on the same examples.

    Args:
        n: examples.
        difference, low, high: of the means, with the 95% interval.
        wins, ties, losses: examples on which ours is better, equal, worse.
        p: how often chance alone would bring a difference as large, before any correction.
    """

    n: int
    difference: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int
    p: float


def paired(ours: Sequence[float], theirs: Sequence[float], seed: int = 0, draws: int = 10_000) -> Paired:
    """Compare two lists of scores, entry i of both on the same example.

    Raises:
        ValueError: unequal lengths, no scores, or scores that are no finite numbers.
    """
    found = paired_bootstrap(ours, theirs, seed, draws=draws)
    pairs = list(zip(ours, theirs, strict=True))
    wins, losses = sum(a > b for a, b in pairs), sum(a < b for a, b in pairs)
    ties = len(pairs) - wins - losses
    return Paired(len(pairs), found.difference, *found.ci, wins, ties, losses, found.p_value)


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values corrected for their number, in their order (Holm, Scand. J. Statist. 1979).

    Raises:
        ValueError: one that is not between 0 and 1.
    """
    if not all(0 <= p <= 1 for p in p_values):
        raise ValueError("p-values lie between 0 and 1")
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = largest
    return corrected


def comparisons(examples: pd.DataFrame, method: str, seed: int = 0) -> pd.DataFrame:
    """The method against every other one of the same family, by task.

    examples: the frame of that name; rows of several families are compared each among themselves.

    Raises:
        ValueError: no example of the method, nobody to compare it with, or two that ran on other examples.
    """
    known = sorted(examples["method"].unique())
    if method not in known:
        there = ", ".join(known) or "none"
        raise ValueError(f"--against {method}: no completed cell has this method (there are: {there})")
    rows = [
        row for _, family in examples.groupby("family", sort=False) for row in _family(family, method, seed)
    ]
    if not rows:
        raise ValueError(f"--against {method}: no other cell ran with the same model, benchmark and budget")
    for row, corrected in zip(rows, holm([row["p"] for row in rows]), strict=True):
        row["p_holm"] = corrected
    return pd.DataFrame(rows, columns=list(COLUMNS))


def pooled(examples: pd.DataFrame) -> pd.DataFrame:
    """The examples with POOLED for a task: few comparisons of many examples show what many of few can't."""
    return examples.assign(task=POOLED, id=examples["task"] + "/" + examples["id"])


def _family(examples: pd.DataFrame, method: str, seed: int) -> Iterator[dict[str, Any]]:
    groups = dict(iter(examples.groupby(["method", "label", "budget"], sort=False)))
    scores = {name: _scores(group) for name, group in groups.items()}
    names = {key: examples[key].iloc[0] for key in ("model", "benchmark", "family")}
    for (own, label, budget), ours in scores.items():
        for (another, other, other_budget), theirs in scores.items():
            if own != method or another == method or not _comparable(budget, other_budget):
                continue
            who = {"ours": label, "ours_budget": budget, "other": other, "other_budget": other_budget}
            for task in sorted(ours.keys() & theirs.keys()):
                a, b = _on_the_same(
                    ours[task], theirs[task], f"{label} {budget} and {other} {other_budget}", task
                )
                yield {**names, **who, "task": task, **asdict(paired(a, b, seed))}


def _comparable(ours: str, other: str) -> bool:
    return "full" in (ours, other) or ours == other


def _scores(group: pd.DataFrame) -> dict[str, dict[Unit, float]]:
    """Score by task and example, the mean of several runs."""
    scored = group.dropna(subset=["score"])
    means = scored.groupby(["task", scored["benchmark_seed"].fillna(-1), "id"])["score"].mean()
    found: dict[str, dict[Unit, float]] = {}
    for (task, benchmark_seed, name), value in means.items():
        found.setdefault(task, {})[benchmark_seed, name] = float(value)
    return found


def _on_the_same(
    ours: dict[Unit, float], theirs: dict[Unit, float], who: str, task: str
) -> tuple[list[float], list[float]]:
    if ours.keys() != theirs.keys():
        raise ValueError(f"{who} ran on different examples of {task}; run both to the same limit and seeds")
    order = sorted(ours, key=str)
    return [ours[unit] for unit in order], [theirs[unit] for unit in order]

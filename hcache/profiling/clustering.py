"""From overlap scores to roles: greedy star clustering, then anchors and volatile heads, then weights.

HeteroCache (arXiv 2601.13684). Within a layer, heads whose similarity reaches a threshold are neighbours.
While any unassigned head has an unassigned neighbour, the one with the most becomes a PIVOT (tie: lowest
index) and they its SATELLITES. A head left alone is an ANCHOR if its stability reaches a threshold, else
VOLATILE.

Plain Python on small matrices; it knows no model and no file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import TypeVar

_EPSILON = 1e-6

Matrix = Sequence[Sequence[float]]
T = TypeVar("T")


class Role(IntEnum):
    """What a KV head is; the numbers are those of the published files."""

    ANCHOR = 1
    VOLATILE = 2
    PIVOT = 3
    SATELLITE = 4

    @property
    def full(self) -> bool:
        """Whether a head of this role keeps its whole KV cache on the device."""
        return self in (Role.VOLATILE, Role.PIVOT)


@dataclass(frozen=True)
class Roles:
    """The role of every KV head of a model.

    Args:
        matrix: [L][H] roles.
        pivot_of: [L][H] the pivot (a head of the same layer) that a satellite follows; None for others.
        weights: [L][H] share of the budget, mean 1 over anchors and satellites; None for full heads.
        stable_threshold: the threshold that told anchors from volatile heads.
        stability: [L][H] the scores they came from, None where unknown (published profiles).
    """

    matrix: tuple[tuple[Role, ...], ...]
    pivot_of: tuple[tuple[int | None, ...], ...]
    weights: tuple[tuple[float | None, ...], ...]
    stable_threshold: float
    stability: tuple[tuple[float, ...], ...] | None = None

    @property
    def layers(self) -> int:
        """Layers, L."""
        return len(self.matrix)

    @property
    def kv_heads(self) -> int:
        """KV heads a layer, H."""
        return len(self.matrix[0])

    @property
    def counts(self) -> dict[str, int]:
        """Heads of each role, by lower-case name."""
        found = Counter(role for row in self.matrix for role in row)
        return {role.name.lower(): found[role] for role in Role}

    @property
    def full_heads(self) -> int:
        """Heads that keep everything: volatile ones and pivots."""
        return sum(role.full for row in self.matrix for role in row)

    def satellites(self, layer: int, pivot: int) -> tuple[int, ...]:
        """The heads that follow `pivot`, ascending; empty if it is no pivot."""
        return tuple(head for head, leader in enumerate(self.pivot_of[layer]) if leader == pivot)

    def weight_of(self, layer: int, head: int) -> float:
        """Weight of an anchor or satellite. Raises ValueError for a full head, which has none."""
        weight = self.weights[layer][head]
        if weight is None:
            raise ValueError(f"head {head} of layer {layer} keeps everything, so it has no weight")
        return weight

    def stability_of(self, layer: int, head: int) -> float:
        """Stability of a head; 0 where unknown, so that an order by it falls back on the order of heads."""
        return 0.0 if self.stability is None else self.stability[layer][head]

    def demote(self, layer: int, head: int) -> Roles:
        """The roles with one full head made an anchor, and so its satellites, which nobody watches for then.

        Weights are taken anew over the whole model; without stability the head gets 1, the mean weight.

        Raises:
            ValueError: the head is not a full one.
        """
        if not self.matrix[layer][head].full:
            raise ValueError(f"head {head} of layer {layer} is compressed already")
        freed = {head, *self.satellites(layer, head)}
        row = tuple(Role.ANCHOR if h in freed else role for h, role in enumerate(self.matrix[layer]))
        pivots = tuple(None if h in freed else pivot for h, pivot in enumerate(self.pivot_of[layer]))
        matrix = _with_row(self.matrix, layer, row)
        if self.stability is None:
            own = tuple(1.0 if h == head else weight for h, weight in enumerate(self.weights[layer]))
            weights = _with_row(self.weights, layer, own)
        else:
            weights = allocation_weights(self.stability, matrix)
        return replace(self, matrix=matrix, pivot_of=_with_row(self.pivot_of, layer, pivots), weights=weights)


def _with_row(rows: tuple[tuple[T, ...], ...], layer: int, row: tuple[T, ...]) -> tuple[tuple[T, ...], ...]:
    return (*rows[:layer], row, *rows[layer + 1 :])


def star_clusters(similarity: Matrix, threshold: float) -> dict[int, tuple[int, ...]]:
    """Pivots and their satellites of one layer.

    Args:
        similarity: [H][H], symmetric; the diagonal is not looked at.
        threshold: heads of at least this similarity are neighbours.

    Returns:
        pivot -> its satellites, ascending, in the order in which pivots were chosen.
    """
    heads = range(len(similarity))
    neighbours = {h: {o for o in heads if o != h and similarity[h][o] >= threshold} for h in heads}
    free = set(heads)
    clusters: dict[int, tuple[int, ...]] = {}
    while free:
        pivot = max(sorted(free), key=lambda head: len(neighbours[head] & free))
        satellites = neighbours[pivot] & free
        if not satellites:
            break
        clusters[pivot] = tuple(sorted(satellites))
        free -= satellites | {pivot}
    return clusters


def allocation_weights(
    stability: Matrix, matrix: Sequence[Sequence[Role]]
) -> tuple[tuple[float | None, ...], ...]:
    """Weights 1 / stability of anchors and satellites, mean 1 over the whole model; None for full heads."""
    raw = [
        [None if role.full else 1 / (score + _EPSILON) for score, role in zip(scores, roles, strict=True)]
        for scores, roles in zip(stability, matrix, strict=True)
    ]
    present = [weight for row in raw for weight in row if weight is not None]
    mean = sum(present) / len(present) if present else 1.0
    return tuple(tuple(None if weight is None else weight / mean for weight in row) for row in raw)


def assign_roles(
    stability: Matrix, similarity: Sequence[Matrix], stable_threshold: float, similarity_threshold: float
) -> Roles:
    """Roles of a whole model from its stability [L][H] and pairwise similarity [L][H][H]."""
    rows = [
        _layer_roles(scores, pairs, stable_threshold, similarity_threshold)
        for scores, pairs in zip(stability, similarity, strict=True)
    ]
    matrix = tuple(roles for roles, _ in rows)
    return Roles(
        matrix=matrix,
        pivot_of=tuple(pivots for _, pivots in rows),
        weights=allocation_weights(stability, matrix),
        stable_threshold=stable_threshold,
        stability=tuple(tuple(float(score) for score in scores) for scores in stability),
    )


def _layer_roles(
    stability: Sequence[float], similarity: Matrix, stable_threshold: float, similarity_threshold: float
) -> tuple[tuple[Role, ...], tuple[int | None, ...]]:
    roles = [Role.ANCHOR if score >= stable_threshold else Role.VOLATILE for score in stability]
    pivot_of: list[int | None] = [None] * len(roles)
    for pivot, satellites in star_clusters(similarity, similarity_threshold).items():
        roles[pivot] = Role.PIVOT
        for head in satellites:
            roles[head] = Role.SATELLITE
            pivot_of[head] = pivot
    return tuple(roles), tuple(pivot_of)

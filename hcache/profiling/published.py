"""Import of the head profiles published with HeteroCache (arXiv 2601.13684), JSON files of roles and weights.

They hold no raw scores, no fingerprint and no query heads: roles come back exactly as published, other
thresholds are refused, and only the numbers of layers and KV heads can be compared with a model. Role names
are spelt in two ways; `meta.type_map` gives the numbers either way. Thresholds stand in the file's name only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hcache.profiling.clustering import Role, Roles
from hcache.profiling.overlap import Graph
from hcache.profiling.profile import SIMILARITY_THRESHOLD, STABLE_THRESHOLD, HeadProfile, as_graph

_NAMES = {
    "anchor": Role.ANCHOR,
    "volatile": Role.VOLATILE,
    "pivot": Role.PIVOT,
    "satellite": Role.SATELLITE,
    "stable_unique": Role.ANCHOR,
    "decaying_unique": Role.VOLATILE,
    "similar_leader": Role.PIVOT,
    "similar_member": Role.SATELLITE,
}
_NO_WEIGHT = -1


@dataclass(frozen=True, eq=False, kw_only=True)
class PublishedProfile(HeadProfile):
    """Roles as a file states them, without the scores they came from.

    Args:
        published: the roles.
        similarity_threshold: the one heads were clustered with.
    """

    published: Roles
    similarity_threshold: float = SIMILARITY_THRESHOLD

    def roles(
        self,
        stable_threshold: float | None = None,
        similarity_threshold: float | None = None,
        graph: Graph | str = Graph.median,
    ) -> Roles:
        """The published roles. None, the file's own thresholds and the default graph mean "as published".

        Raises:
            ValueError: other settings, since the file has no scores to apply them to.
        """
        _refuse_other("stable_threshold", stable_threshold, self.published.stable_threshold)
        _refuse_other("similarity_threshold", similarity_threshold, self.similarity_threshold)
        if as_graph(graph) is Graph.last_step:
            _refuse_other("graph", Graph.last_step.value, Graph.prefill.value)
        return self.published

    def save(self, path: str | Path) -> Path:
        """Refused: without scores it would not be a profile of our format. Keep the published file."""
        raise ValueError(
            f"a published profile has no raw scores to save to {path}; keep the file it came from"
        )


def from_published(data: Mapping[str, Any], name: str) -> PublishedProfile:
    """The profile in the published JSON `data`, from a file called `name`.

    Raises:
        ValueError: unknown role names, or matrices that contradict each other.
        KeyError, TypeError: not the published format.
    """
    codes = {int(code): _role(role) for role, code in data["meta"]["type_map"].items()}
    matrix = tuple(tuple(codes[int(code)] for code in row) for row in data["classification_matrix"])
    weights = tuple(
        tuple(None if w == _NO_WEIGHT else float(w) for w in row) for row in data["allocation_matrix"]
    )
    pivots = _pivots(matrix, data["leader_member_relations"])
    roles = Roles(matrix, pivots, weights, _in_name(name, "th", STABLE_THRESHOLD))
    _check(roles, data["meta"].get("counts", {}))
    return PublishedProfile(
        layers=roles.layers,
        kv_heads=roles.kv_heads,
        stability=None,
        similarity={},
        settings={"published": name},
        published=roles,
        similarity_threshold=_in_name(name, "sim", SIMILARITY_THRESHOLD),
    )


def _refuse_other(name: str, asked: float | str | None, own: float | str) -> None:
    if asked is not None and asked != own:
        raise ValueError(
            f"roles.{name}={asked} can't be applied to a published profile: it was made with {own} and has "
            "no raw scores to do it again; leave the setting out, or make a profile of your own: "
            "python run.py runner=profile model=..."
        )


def _in_name(name: str, key: str, default: float) -> float:
    """A threshold from a file name such as Head_Analysis_x_topk1024_th0.5_sim0.4_step5000.json."""
    found = re.search(rf"_{key}(\d+(?:\.\d+)?)(?=_|\.|$)", name)
    return float(found[1]) if found else default


def _role(name: str) -> Role:
    key = name.strip().lower().replace(" ", "_").replace("-", "_")
    if key not in _NAMES:
        raise ValueError(f"unknown role {name!r}; known: {', '.join(_NAMES)}")
    return _NAMES[key]


def _pivots(
    matrix: Sequence[Sequence[Role]], relations: Sequence[Mapping[str, Sequence[int]]]
) -> tuple[tuple[int | None, ...], ...]:
    rows: list[tuple[int | None, ...]] = []
    for layer, (roles, stars) in enumerate(zip(matrix, relations, strict=True)):
        pivots: list[int | None] = [None] * len(roles)
        for pivot, satellites in stars.items():
            for head in satellites:
                if roles[int(pivot)] is not Role.PIVOT or pivots[head] is not None:
                    raise ValueError(f"layer {layer}: head {head} can't be a satellite of head {pivot}")
                pivots[head] = int(pivot)
        rows.append(tuple(pivots))
    return tuple(rows)


def _check(roles: Roles, counts: Mapping[str, int]) -> None:
    """Raise ValueError if the parts of the file contradict each other."""
    width = roles.kv_heads
    for layer, (row, pivots, weights) in enumerate(
        zip(roles.matrix, roles.pivot_of, roles.weights, strict=True)
    ):
        if not len(row) == len(weights) == width:
            raise ValueError(
                f"layer {layer} has {len(row)} roles and {len(weights)} weights, expected {width}"
            )
        for head, role in enumerate(row):
            if (pivots[head] is not None) != (role is Role.SATELLITE):
                raise ValueError(f"layer {layer}: the relations don't fit head {head}, a {role.name.lower()}")
            if (weights[head] is None) != role.full:
                raise ValueError(
                    f"layer {layer}: weight {weights[head]} of head {head}, a {role.name.lower()}"
                )
    stated = {_role(name).name.lower(): count for name, count in counts.items()}
    if stated and {role: n for role, n in roles.counts.items() if n or role in stated} != stated:
        raise ValueError(f"meta.counts says {stated}, the matrix has {roles.counts}")

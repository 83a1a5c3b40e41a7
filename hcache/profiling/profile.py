"""HeadProfile: the raw overlap scores of one model's KV heads, and its file.

The scores are stored, not the roles, so thresholds can change without the model running again. A profile is
tied to its model by the numbers of the attention and by the fingerprint of the weights. Knows nothing of how
the scores were taken (capture.py) or where profiles lie (library.py).

Files: .safetensors (scores as tensors, the rest in the metadata) or .json; one format, float64 throughout.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor

from hcache.geometry import Geometry
from hcache.profiling.clustering import Roles, assign_roles
from hcache.profiling.overlap import Graph

LOGGER = logging.getLogger(__name__)
FORMAT = "hcache-head-profile-1"
STABLE_THRESHOLD = 0.5
SIMILARITY_THRESHOLD = 0.5


class ForeignProfile(ValueError):
    """The profile was made of another model."""


@dataclass(frozen=True, eq=False)
class HeadProfile:
    """Scores of every KV head of one model.

    Args:
        layers: L.
        kv_heads: H.
        stability: [L, H] float64 in [0, 1]; None in a published profile.
        similarity: for each graph, [L, H, H] float64 in [0, 1], symmetric; empty if published.
        query_heads: Hq; None where the file doesn't say.
        head_dim: D; None where the file doesn't say.
        fingerprint: of the weights (hcache.models.fingerprint); None where unknown.
        settings: how the scores were taken (topk, kernel, prompt_tokens, ...), for the reader.

    Raises:
        ValueError: shapes that don't fit each other, or scores outside [0, 1].
    """

    layers: int
    kv_heads: int
    stability: Tensor | None
    similarity: Mapping[Graph, Tensor]
    query_heads: int | None = None
    head_dim: int | None = None
    fingerprint: str | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        shape = (self.layers, self.kv_heads)
        if self.stability is not None:
            _check_scores("stability", self.stability, shape)
        for graph, pairs in self.similarity.items():
            _check_scores(f"similarity {graph.value}", pairs, (*shape, self.kv_heads))
            if not torch.equal(pairs, pairs.transpose(1, 2)):
                raise ValueError(f"similarity {graph.value} of the profile is not symmetric")

    def roles(
        self,
        stable_threshold: float | None = None,
        similarity_threshold: float | None = None,
        graph: Graph | str = Graph.median,
    ) -> Roles:
        """Roles by these thresholds.

        Args:
            stable_threshold: a lone head of at least this stability is an anchor, else volatile;
                None is the profile's own (settings), or 0.5.
            similarity_threshold: heads of at least this similarity may share a cluster; None likewise.
            graph: the steps that similarity is taken from: median, prefill (as published) or last_step.

        Raises:
            ValueError: a threshold outside [0, 1], or an unknown graph.
        """
        own = self.settings
        stable = _threshold(
            "stable_threshold", stable_threshold, own.get("stable_threshold", STABLE_THRESHOLD)
        )
        similar = _threshold(
            "similarity_threshold",
            similarity_threshold,
            own.get("similarity_threshold", SIMILARITY_THRESHOLD),
        )
        assert self.stability is not None
        pairs = self.similarity[as_graph(graph)].tolist()
        return assign_roles(self.stability.tolist(), pairs, stable, similar)

    def check(self, geometry: Geometry) -> None:
        """Refuse another model's profile; warn where the weights can't be compared.

        Raises:
            ForeignProfile: other layers, heads, head dim or weights than the model's; names both.
        """
        numbers = ("layers", "query_heads", "kv_heads", "head_dim")
        known = {name: getattr(self, name) for name in numbers if getattr(self, name) is not None}
        differs = any(value != getattr(geometry, name) for name, value in known.items())
        comparable = self.fingerprint and geometry.fingerprint
        if differs or (comparable and self.fingerprint != geometry.fingerprint):
            theirs = {name: getattr(geometry, name) for name in numbers}
            raise ForeignProfile(
                f"the head profile belongs to another model: it is for {_describe(known, self.fingerprint)}, "
                f"the model has {_describe(theirs, geometry.fingerprint)}; use a profile of this model, "
                "or make one: python run.py runner=profile model=..."
            )
        if not comparable:
            owner = "model" if self.fingerprint else "head profile"
            _warn_once(f"the {owner} has no fingerprint of weights: only layers and heads were compared")

    def save(self, path: str | Path) -> Path:
        """Write the profile, atomically, in the format of its suffix, .safetensors or .json; return the path.

        Raises:
            ValueError: another suffix.
        """
        target = Path(path).expanduser()
        check_suffix(target)
        assert self.stability is not None
        scores = {"stability": self.stability.contiguous()}
        scores |= {
            f"similarity.{graph.value}": pairs.contiguous() for graph, pairs in self.similarity.items()
        }
        if target.suffix == ".json":
            lists = {name: tensor.tolist() for name, tensor in scores.items()}
            content = json.dumps({**self._header(), "scores": lists}).encode()
        else:
            content = safetensors_bytes(scores, metadata={"profile": json.dumps(self._header())})
        _write(target, content)
        return target

    def _header(self) -> dict[str, Any]:
        names = ("layers", "query_heads", "kv_heads", "head_dim", "fingerprint")
        facts = {name: getattr(self, name) for name in names}
        return {"format": FORMAT, **facts, "settings": dict(self.settings)}

    @classmethod
    def load(cls, path: str | Path) -> HeadProfile:
        """Read a profile from its file; see hcache.profiling.load_profile."""
        from hcache.profiling.library import (
            load_profile,
        )  # it knows the published format, built on this class

        return load_profile(path)


def assemble(header: Mapping[str, Any], scores: Mapping[str, Tensor]) -> HeadProfile:
    """A profile from the parts of its file. Raises ValueError, KeyError or TypeError if they aren't one."""
    if header.get("format") != FORMAT:
        raise ValueError(f"its format is {header.get('format')!r}, not {FORMAT!r}")
    return HeadProfile(
        layers=header["layers"],
        kv_heads=header["kv_heads"],
        stability=scores["stability"],
        similarity={graph: scores[f"similarity.{graph.value}"] for graph in Graph},
        query_heads=header["query_heads"],
        head_dim=header["head_dim"],
        fingerprint=header["fingerprint"],
        settings=header["settings"],
    )


def read_parts(source: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Header and scores in a profile's file, unchecked."""
    if source.suffix == ".json":
        header = json.loads(source.read_text(encoding="utf-8"))
        scores = header.pop("scores", {})
        return header, {name: torch.tensor(rows, dtype=torch.float64) for name, rows in scores.items()}
    with safe_open(source, framework="pt") as file:
        header = json.loads((file.metadata() or {}).get("profile", "{}"))
        return header, {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a mapping)


def _write(target: Path, content: bytes) -> None:
    target.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
        os.replace(name, target)
    except BaseException:
        os.unlink(name)
        raise


def check_suffix(path: Path) -> None:
    """Raise ValueError unless `path` ends as a profile does."""
    if path.suffix not in (".safetensors", ".json"):
        raise ValueError(
            f"profile={path}: a head profile is a .safetensors or .json file, not {path.suffix!r}"
        )


def as_graph(graph: Graph | str) -> Graph:
    """A graph from itself or its name. Raises ValueError for an unknown one."""
    try:
        return Graph(graph)
    except ValueError:
        known = ", ".join(member.value for member in Graph)
        raise ValueError(f"roles.graph={graph!r} is unknown; choose one of: {known}") from None


def _threshold(name: str, value: float | None, default: float) -> float:
    if value is not None and not 0 <= value <= 1:
        raise ValueError(f"roles.{name}={value!r} must be a number from 0 to 1")
    return default if value is None else value


def _check_scores(name: str, scores: Tensor, shape: tuple[int, ...]) -> None:
    if tuple(scores.shape) != shape:
        raise ValueError(f"{name} of the profile has shape {list(scores.shape)}, expected {list(shape)}")
    if not bool(((scores >= 0) & (scores <= 1)).all()):
        raise ValueError(f"{name} of the profile has scores outside 0 to 1")


@cache
def _warn_once(message: str) -> None:
    """A profile is checked for every prompt; the reader needs to be told once."""
    LOGGER.warning(message)


def _describe(numbers: Mapping[str, int], fingerprint: str | None) -> str:
    listed = ", ".join(f"{name} {value}" for name, value in numbers.items())
    return f"{listed}, weights {fingerprint or 'unknown'}"

"""Splits of a token budget over layers and heads, for any method that scores tokens.

An allocation is settings (a frozen dataclass, registered by name). For one prompt it makes a `Division`,
which is asked layer by layer while the prompt comes in. Every split gives whole tokens. Knows scores and
geometry; nothing of methods.

Shapes are of one sequence: q [Hq, n, D], k [H, n, D], scores [H, n]; L layers, H KV heads.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from enum import Enum
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor

from hcache.geometry import Geometry
from hcache.registry import Registry, choice, unknown_name
from hcache.scoring import top_positions, window_rows

Choice = TypeVar("Choice", bound=Enum)


def round_to_sum(shares: list[float], total: int, caps: list[int]) -> list[int]:
    """Largest remainder: whole numbers near `shares`, each at most its cap, that add up to `total`.

    Shares may add up to less than the total, where a cap cuts one, but not to more.

    Raises:
        ValueError: the caps don't admit the total.
    """
    if sum(caps) < total:
        raise ValueError(f"cannot place {total} tokens under caps that add up to {sum(caps)}")
    whole = [min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True)]
    missing = total - sum(whole)
    assert missing >= 0, f"shares of {sum(shares)} tokens are more than {total}"
    by_remainder = sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])
    while missing:
        open_shares = [i for i in by_remainder if whole[i] < caps[i]]
        for i in open_shares[:missing]:
            whole[i] += 1
        missing = total - sum(whole)
    return whole


def water_levels(weights: list[float], total: int, cap: int) -> list[float]:
    """Shares in proportion to `weights`, at most `cap` each, the clipped surplus going to the others.

    Their sum is min(total, cap * len(weights)). A share never rises when another weight joins in. Where no
    weight is left to go by (all zero, or not a number), the rest is split evenly.
    """
    left = float(min(total, cap * len(weights)))
    weights = [weight if math.isfinite(weight) and weight > 0 else 0.0 for weight in weights]
    shares = [0.0] * len(weights)
    open_ = set(range(len(weights)))
    while open_:
        mass = sum(weights[i] for i in open_)
        # In proportion first, so that a tiny mass can't overflow the level.
        wanted = {i: left * (weights[i] / mass if mass else 1 / len(open_)) for i in open_}
        full = {i for i in open_ if wanted[i] >= cap}
        if not full:
            return [wanted.get(i, share) for i, share in enumerate(shares)]
        shares = [float(cap) if i in full else share for i, share in enumerate(shares)]
        open_ -= full
        left = max(0.0, left - cap * len(full))
    return shares


def water_fill(weights: list[float], total: int, cap: int) -> list[int]:
    """`water_levels` in whole tokens; the sum is min(total, cap * len(weights)) exactly."""
    total = min(total, cap * len(weights))
    return round_to_sum(water_levels(weights, total, cap), total, [cap] * len(weights))


_SMALLEST_LOG = -700.0
"""Of a weight over the largest: further down it would be 0, and shares no longer in proportion."""


class Division(ABC):
    """One prompt's budget, divided while its layers come in, first to last."""

    cascades: bool = False
    """Whether a later layer lowers what earlier ones may keep."""

    @abstractmethod
    def counts(self, layer: int, scores_Hn: Tensor, q: Tensor, k: Tensor) -> list[int]:
        """Tokens that each head of this layer keeps, as far as is known now; asked once a layer, in order."""

    def revised(self, layer: int) -> list[int]:
        """What an earlier layer's heads may still keep; never more than it said before."""
        raise NotImplementedError


@dataclass(frozen=True)
class Allocation(ABC):
    """Base of all allocations. Fields of a subclass are its settings."""

    name: ClassVar[str] = ""

    @abstractmethod
    def divide(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> Division:
        """Divide `tokens` on average per KV head per layer; `protected` of them stay in every head."""

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        """Smallest feasible average."""
        return 1

    def kept_tokens(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> int:
        """What all heads together will keep; other than `tokens` each only where rounding is not exact."""
        return tokens * geometry.heads


ALLOCATIONS: Registry[Allocation] = Registry("allocation")


def make_allocation(given: Any) -> Allocation:
    """An allocation from its name, from a mapping with `name` and settings, or as it is.

    Raises:
        ValueError: unknown name or setting.
    """
    if isinstance(given, Allocation):
        return given
    settings = {"name": given} if isinstance(given, str) else given
    if not isinstance(settings, Mapping) or "name" not in settings:
        known = ", ".join(ALLOCATIONS.names())
        raise ValueError(
            f"method.allocation={given!r} must be one of {known}, or a mapping {{name: ..., settings}}"
        )
    cls = ALLOCATIONS.get(str(settings["name"]))
    options = [option.name for option in fields(cls)]
    rest = {str(key): value for key, value in settings.items() if key != "name"}
    for key in rest:
        if key not in options:
            raise ValueError(unknown_name(f"setting of allocation {cls.name}", key, options))
    try:
        return cls(**rest)
    except TypeError as error:
        raise ValueError(f"method.allocation={given!r} has a value of the wrong type: {error}") from error


class Fixed(Division):
    """Counts that are known before the prompt: [L][H]."""

    def __init__(self, table: list[list[int]]) -> None:
        self.table = table

    def counts(self, layer: int, scores_Hn: Tensor, q: Tensor, k: Tensor) -> list[int]:
        return self.table[layer]


@ALLOCATIONS.register("uniform")
@dataclass(frozen=True)
class Uniform(Allocation):
    """The same for every head."""

    def divide(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> Fixed:
        return Fixed([[tokens] * geometry.kv_heads for _ in range(geometry.layers)])


class PyramidSum(Enum):
    """How a pyramid's steps become whole tokens."""

    exact = "exact"
    official = "official"


@ALLOCATIONS.register("pyramid")
@dataclass(frozen=True)
class Pyramid(Allocation):
    """Falling linearly from the first layer to the last (PyramidKV, arXiv 2406.02069, section 4.2).

    With base = tokens - protected: the last layer gets base // beta, the first 2 * base less that; a first
    layer that would exceed the prompt is cut and the last raised. Prompts shorter than 2 * base are split
    evenly, as in the official code (KVCache-Factory c97f9d7).

    Args:
        beta: the average over the last layer's share; 1 is uniform.
        rounding: exact (the sum is the budget) or official (steps rounded down as in the official code, up
            to L * (L - 2) / 2 tokens above the budget a head).
    """

    beta: int = 20
    rounding: PyramidSum = PyramidSum.exact

    def __post_init__(self) -> None:
        rounding = choice(PyramidSum, "rounding of the pyramid allocation", self.rounding)
        object.__setattr__(self, "rounding", rounding)
        if not isinstance(self.beta, int) or self.beta < 1:
            raise ValueError(f"beta={self.beta} of the pyramid allocation must be a whole number, at least 1")

    def kept_tokens(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> int:
        return sum(map(sum, self.divide(geometry, tokens, prompt_tokens, protected).table))

    def divide(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> Fixed:
        base, room = tokens - protected, prompt_tokens - protected
        sizes = [protected + size for size in self._sizes(geometry.layers, base, room, prompt_tokens)]
        return Fixed([[size] * geometry.kv_heads for size in sizes])

    def _sizes(self, layers: int, base: int, room: int, prompt_tokens: int) -> list[int]:
        """Tokens of each layer besides the protected ones."""
        if layers == 1 or base <= 0 or prompt_tokens < 2 * base:
            return [base] * layers
        last = base // self.beta
        first = 2 * base - last
        if first >= room:
            first, last = room, 2 * base - room
        if self.rounding is PyramidSum.official:
            step = (first - last) // (layers - 1)
            return [first - layer * step for layer in range(layers)]
        shares = [first - layer * (first - last) / (layers - 1) for layer in range(layers)]
        return round_to_sum(shares, base * layers, [room] * layers)


@ALLOCATIONS.register("preference")
@dataclass(frozen=True)
class Preference(Allocation):
    """By each layer's preference, how widely and how unsteadily its window attends (CAKE, arXiv 2503.12491).

    P = H^(1/tau1) * V^(1/tau2), with the entropy H and the variance over time V of the window's attention to
    the prefix (equations 5 to 7). The budget of the layers seen so far is divided by water-filling, so a
    layer's share only falls when later ones join, and cutting in steps ends where cutting once would.

    Args:
        tau1, tau2: exponents' inverses; the paper tunes them for each model.
        window: last queries that are looked at, at least 2.
    """

    tau1: float = 1.0
    tau2: float = 1.0
    window: int = 32

    def __post_init__(self) -> None:
        for key in ("tau1", "tau2"):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key}={getattr(self, key)} of the preference allocation must be above 0")
        if not isinstance(self.window, int) or self.window < 2:
            raise ValueError(
                f"window={self.window} of the preference allocation must be a whole number of queries, at "
                "least 2: it measures how attention varies between them"
            )

    def divide(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> Division:
        if tokens >= prompt_tokens:
            return Uniform().divide(geometry, tokens, prompt_tokens, protected)
        return Cascade(self, geometry, tokens - protected, prompt_tokens - protected, protected)

    def preference(self, q: Tensor, k: Tensor) -> float:
        """log P of one layer; only ratios between layers matter, and P itself can overflow.

        -inf, which is no preference, where the prompt is all window.
        """
        if k.shape[1] <= self.window:
            return -math.inf
        entropy = shift = torch.zeros((), dtype=torch.float64, device=k.device)
        for rows_Gwn in window_rows(q, k, self.window):
            prefix_Gwm = rows_Gwn[..., : -rows_Gwn.shape[1]]
            shift = shift + prefix_Gwm.var(1).sum(dtype=torch.float64)
            entropy = entropy - torch.xlogy(prefix_Gwm, prefix_Gwm + 1e-10).sum(dtype=torch.float64)
        return float(entropy.clamp_min(0).log() / self.tau1 + shift.log() / self.tau2)


class Cascade(Division):
    """What the layers so far may keep, revised with each layer's preference.

    Args:
        settings: measures preference.
        base, room: average and largest number of tokens besides the protected ones.
    """

    cascades = True

    def __init__(
        self, settings: Preference, geometry: Geometry, base: int, room: int, protected: int
    ) -> None:
        self._settings, self._geometry = settings, geometry
        self._base, self._room, self._protected = base, room, protected
        self._logs: list[float] = []
        self._shares: list[int] = []

    def counts(self, layer: int, scores_Hn: Tensor, q: Tensor, k: Tensor) -> list[int]:
        assert layer == len(self._logs)
        self._logs.append(self._settings.preference(q, k))
        total = self._base * self._geometry.layers
        peak = max((log for log in self._logs if math.isfinite(log)), default=0.0)
        weights = [
            math.exp(max(log - peak, _SMALLEST_LOG)) if math.isfinite(log) else 0.0 for log in self._logs
        ]
        levels = water_levels(weights, total, self._room)
        caps = [*self._shares, self._room]
        if layer + 1 == self._geometry.layers:
            self._shares = round_to_sum(levels, min(total, self._room * len(levels)), caps)
        else:
            # Rounded up, so that the last division, which is exact, never asks for a token that has gone.
            self._shares = [min(math.ceil(level), cap) for level, cap in zip(levels, caps, strict=True)]
        return self.revised(layer)

    def revised(self, layer: int) -> list[int]:
        return [self._protected + self._shares[layer]] * self._geometry.kv_heads


@ALLOCATIONS.register("adaptive")
@dataclass(frozen=True)
class Adaptive(Allocation):
    """Head by head within a layer: the scores of all its heads compete (AdaKV, arXiv 2407.11550).

    Difference from the official code (FFY0/AdaKV efe4e2e), which mixes an even split and the competition's
    counts: here each head is given its own best tokens up to the floor, and all others compete for the rest.

    Args:
        floor: share of the layer's average, besides the protected tokens, that every head is sure of, 0 to 1.
        layers: how layers share the budget: the name or mapping of an allocation that is known beforehand
            (uniform or pyramid).
    """

    floor: float = 0.2
    layers: Any = "uniform"

    def __post_init__(self) -> None:
        if not 0 <= self.floor <= 1:
            raise ValueError(f"floor={self.floor} of the adaptive allocation must be between 0 and 1")
        if not isinstance(make_allocation(self.layers), Uniform | Pyramid):
            raise ValueError(
                f"layers={self.layers!r} of the adaptive allocation must be uniform or pyramid: heads "
                "compete within a layer whose share is known"
            )

    def kept_tokens(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> int:
        return make_allocation(self.layers).kept_tokens(geometry, tokens, prompt_tokens, protected)

    def divide(self, geometry: Geometry, tokens: int, prompt_tokens: int, protected: int) -> Division:
        fixed = make_allocation(self.layers).divide(geometry, tokens, prompt_tokens, protected)
        assert isinstance(fixed, Fixed)
        return Competition(fixed, protected, self.floor)


class Competition(Division):
    """A layer's tokens go to the best scores, whichever heads they are in."""

    def __init__(self, layers: Fixed, protected: int, floor: float) -> None:
        self._layers, self._protected, self._floor = layers, protected, floor

    def counts(self, layer: int, scores_Hn: Tensor, q: Tensor, k: Tensor) -> list[int]:
        average = self._layers.table[layer][0]
        sure = self._protected + math.floor(self._floor * max(0, average - self._protected))
        heads, tokens = scores_Hn.shape
        competing = scores_Hn.float().clone()
        for row in competing:
            row[top_positions(row, sure)] = -torch.inf
        best = top_positions(competing.flatten(), (average - sure) * heads)
        return (sure + torch.bincount(best // tokens, minlength=heads)).tolist()

"""H2O: heavy hitters by attention received since the beginning, and the latest tokens; constant in size.

Paper: H2O, NeurIPS 2023, arXiv 2306.14048 (section 4, Algorithm 1). Kept on the device: of each KV head, the
`recent` last tokens and the heavy hitters among those before them, with the attention each has received. Each
decode step adds the newest token's attention and evicts the token with the least, outside the recent ones.
Lost for good: all that is evicted.

Differences from the official code (FMInference/H2O ac75c2a): sums are taken over the query heads of a group
(theirs breaks under GQA), per sequence (theirs adds the batch up) and in float32; the causal column sums are
taken in blocks of rows, n x n is never built. Keys keep their original positions, as in their real-drop
class.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hcache.budget import Budget, InfeasibleBudget
from hcache.geometry import Geometry
from hcache.methods.eviction import EvictionLayer, EvictionMethod, Plan, RankedLayer
from hcache.methods.registry import register
from hcache.scoring import column_sums

if TYPE_CHECKING:
    from hcache.kernels.evict import Judging


@register("h2o")
@dataclass(frozen=True)
class H2O(EvictionMethod):
    """Accumulated attention; heavy and recent tokens add up to the budget.

    Args:
        heavy: tokens (int) or share of the budget (float) for heavy hitters; None: what recent leaves.
        recent: tokens or share of the budget for the latest tokens; None: what heavy leaves, half if both
            are None, as in the paper.
    """

    constant_size: ClassVar[bool] = True

    heavy: int | float | None = None
    recent: int | float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for key in ("heavy", "recent"):
            value = getattr(self, key)
            if value is not None and (value < 0 or (isinstance(value, float) and value > 1)):
                raise ValueError(
                    f"method.{key}={value} must be a number of tokens (an int) or a share of the budget "
                    "(a float from 0 to 1)"
                )

    def protected(self, tokens: int) -> int:
        if self.recent is not None:
            return _part(self.recent, tokens)
        return tokens - (tokens // 2 if self.heavy is None else min(tokens, _part(self.heavy, tokens)))

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        fixed = [value for value in (self.heavy, self.recent) if isinstance(value, int)]
        return max(2, sum(fixed), self.split.minimum_tokens(geometry, prompt_tokens))

    def shortage(self) -> str:
        return f": method.heavy={self.heavy} and method.recent={self.recent} must fit in it"

    def require(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> int:
        asked = budget.tokens(prompt_tokens)
        fixed = sum(value for value in (self.heavy, self.recent) if isinstance(value, int))
        if fixed > asked:
            message = f"method.h2o can't keep {asked} tokens{self.shortage()}"
            raise InfeasibleBudget(message, fixed, max(fixed, prompt_tokens))
        if self.heavy is not None and self.recent is not None:
            together = _part(self.heavy, asked) + _part(self.recent, asked)
            if together not in (asked, asked - 1):  # shares are rounded down
                raise ValueError(
                    f"method.heavy={self.heavy} and method.recent={self.recent} are {together} tokens, the "
                    f"budget is {asked}; leave one of them null, it takes what the other leaves"
                )
        return super().require(geometry, budget, prompt_tokens)

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return column_sums(q, k)

    def slot_bytes(self, geometry: Geometry, number_bytes: int) -> int:
        return super().slot_bytes(geometry, number_bytes) + RankedLayer.PLACE_BYTES + 4

    def layer_state(self, layer: int, plans: list[Plan], earlier: list[EvictionLayer]) -> H2OLayer:
        return H2OLayer(self, layer, plans, earlier)


def _part(size: int | float, tokens: int) -> int:
    return math.floor(size * tokens + 1e-9) if isinstance(size, float) else size


class H2OLayer(RankedLayer):
    """Accumulates the attention that stored tokens receive."""

    keeps_scores = True

    def finish(self) -> None:
        sums = [row for rows in self._scores for row in rows]
        super().finish()
        self._sums_SW = torch.zeros(self._order_SW.shape, device=self._order_SW.device)
        for s, row in enumerate(sums):
            self._sums_SW[s, : row.numel()] = row

    def rate(self, row_SGW: Tensor, newest_S: Tensor) -> Tensor:
        return self._sums_SW + row_SGW.sum(1)

    def judging(self, group: int) -> Judging:
        from hcache.kernels.evict import Judging

        return Judging()

    def received(self) -> Tensor:
        return self._sums_SW

    def forget(
        self, scores_SW: Tensor, victim_S: Tensor, newest_S: Tensor, full_S: Tensor, real_S: Tensor | None
    ) -> None:
        # The place behind the newest token is the next one's, which has received nothing yet.
        moved_SW = self.without(scores_SW, victim_S).scatter(1, newest_S.unsqueeze(1), 0.0)
        sums_SW = torch.where(full_S.unsqueeze(1), moved_SW, scores_SW)
        if real_S is not None:
            sums_SW = torch.where(real_S.unsqueeze(1), sums_SW, self._sums_SW)
        self._sums_SW.copy_(sums_SW)

    def widen(self, places: int) -> None:
        super().widen(places)
        self._sums_SW = torch.nn.functional.pad(self._sums_SW, (0, places))

"""What a compression method is: a frozen dataclass of hyper-parameters that makes layer states.

A method is stateless. It is asked for fresh states when the prompts of a batch are known, and knows no model
class, no runner and no stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from torch import Tensor

from hcache.budget import Budget, InfeasibleBudget
from hcache.cache.state import LayerState, StoreLayer
from hcache.geometry import Geometry
from hcache.scoring import top_positions


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Fields of a subclass are its hyper-parameters.

    Attributes:
        name: the registered name, set by the registry.
        uses_budget: False where the method keeps everything whatever the budget (FullKV).
        needs_fingerprint: True where the geometry must name the weights (HeteroCache's profile).
    """

    name: ClassVar[str] = ""
    uses_budget: ClassVar[bool] = True
    needs_fingerprint: ClassVar[bool] = False

    @abstractmethod
    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        """Fresh states, one a layer, for one batch of sequences with these prompt lengths (without pads).

        Raises:
            InfeasibleBudget: the method can't run within the budget.
        """

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        """Smallest feasible budget for a prompt, as average kept tokens per KV head per layer."""
        return 2

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        """What a reader of results must know about this run, for example roles given up for the budget."""
        return []

    def require(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> int:
        """Average tokens of the budget. Raises InfeasibleBudget if the method needs more."""
        tokens = min(budget.tokens(prompt_tokens), prompt_tokens)
        smallest = min(self.minimum_tokens(geometry, prompt_tokens), prompt_tokens)
        if tokens < smallest:
            message = f"method.{self.name} can't keep {tokens} of {prompt_tokens} tokens{self.shortage()}"
            raise InfeasibleBudget(message, smallest, prompt_tokens)
        return tokens

    def shortage(self) -> str:
        """Why a budget may be too small, as the end of a sentence."""
        return ""


@dataclass(frozen=True)
class EvictionMethod(Method):
    """Keeps the best-scored prompt tokens of each KV head and drops the rest for good.

    A subclass writes `score`, and `allocate` if its split over heads and layers is not uniform.
    """

    @abstractmethod
    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Importance [H, n] float32 of one sequence's prompt; +inf for what must stay.

        q [Hq, n, D], k and v [H, n, D].
        """

    def allocate(self, geometry: Geometry, tokens: int, prompt_tokens: int) -> list[list[int]]:
        """[L][H] tokens to keep, `tokens` on average."""
        return [[tokens] * geometry.kv_heads for _ in range(geometry.layers)]

    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        splits = [self.allocate(geometry, self.require(geometry, budget, n), n) for n in prompt_tokens]
        return [
            StoreLayer(partial(self.select, [split[layer] for split in splits]))
            for layer in range(geometry.layers)
        ]

    def select(
        self, counts: list[list[int]], q: Tensor, k: Tensor, v: Tensor, sequence: int
    ) -> list[Tensor] | None:
        """The `counts[sequence][h]` best positions of each head; None where that is all of them."""
        if min(counts[sequence]) >= k.shape[1]:
            return None
        scores = self.score(q, k, v)
        return [top_positions(row, count) for row, count in zip(scores, counts[sequence], strict=True)]

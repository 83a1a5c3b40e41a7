"""What a compression method is: a frozen dataclass of hyper-parameters that makes layer states.

A method is stateless. It is asked for fresh states when the prompts of a batch are known, and knows no model
class, no runner and no stream.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field, fields
from enum import Enum
from typing import Any, ClassVar

from hcache.budget import Budget, InfeasibleBudget
from hcache.cache.state import LayerState
from hcache.geometry import Geometry
from hcache.registry import choice


@dataclass(frozen=True)
class Usage:
    """What a method plans for one prompt, before anything runs; tests hold it to the measured bytes.

    Args:
        device_bytes: payload and metadata on the device after prefill, whole model.
        attended_tokens: prompt tokens that a decode step attends to, average per KV head per layer.
        host_bytes: payload in host memory, whole model.
        moved_bytes: host to device in one decode step, at most.
        parts: what the budget became, in the method's own terms: {"rank": 160, "selected": 1024}.
    """

    device_bytes: int
    attended_tokens: float
    host_bytes: int = 0
    moved_bytes: int = 0
    parts: dict[str, int | str] = field(default_factory=dict)


@dataclass(frozen=True)
class Method(ABC):
    """Base of all methods. Fields of a subclass are its hyper-parameters.

    Attributes:
        name: the registered name, set by the registry.
        uses_budget: False where the method keeps everything whatever the budget (FullKV).
        constant_size: evicts while decoding, so that its size stays.
        selects: each step attends to a choice of its own, which `LayerState.kept` tells after the step.
    """

    name: ClassVar[str] = ""
    uses_budget: ClassVar[bool] = True
    constant_size: ClassVar[bool] = False
    selects: ClassVar[bool] = False

    def __post_init__(self) -> None:
        # Choices by name too: a name that stayed one would be taken for another member.
        for option in fields(self):
            if isinstance(option.default, Enum):
                given = getattr(self, option.name)
                member = choice(type(option.default), f"method.{option.name}", given)
                object.__setattr__(self, option.name, member)

    @property
    def profiled(self) -> Any:
        """What goes by a head profile (has `profile` and `head_profile`); None for most methods.

        Where there is one, the geometry names the weights.
        """
        return None

    @property
    def needs_rope(self) -> bool:
        """True where states rotate keys themselves (LayerState.rope)."""
        return False

    @abstractmethod
    def layers(self, geometry: Geometry, budget: Budget, prompt_tokens: list[int]) -> list[LayerState]:
        """Fresh states, one a layer, for one batch of sequences with these prompt lengths (without pads).

        Raises:
            InfeasibleBudget: the method can't run within the budget.
        """

    @abstractmethod
    def usage(self, geometry: Geometry, budget: Budget, prompt_tokens: int, number_bytes: int) -> Usage:
        """What a prompt of this length will take; numbers (keys, values) take `number_bytes` each.

        Raises:
            InfeasibleBudget: as `layers`.
        """

    def minimum_tokens(self, geometry: Geometry, prompt_tokens: int) -> int:
        """Smallest feasible budget for a prompt, as average kept tokens per KV head per layer."""
        return 2

    def notes(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> list[str]:
        """What a reader of results must know about this run, for example roles given up for the budget."""
        return []

    def outline(self, geometry: Geometry, budget: Budget, prompt_tokens: int) -> dict[str, Any]:
        """What pictures of this method show beside what it keeps, as JSON data; most have nothing."""
        return {}

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

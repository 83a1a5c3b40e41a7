"""How much of the KV cache a method may keep.

A budget is what is KEPT, never what is removed. It says an average per KV head per layer and includes
everything a method keeps of the prompt: windows, sinks, pivots.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction


class InfeasibleBudget(ValueError):
    """A method can't run within the budget.

    Attributes:
        smallest_tokens: the smallest average of kept tokens per KV head that is feasible.
        smallest_fraction: the same as a fraction of the prompt.
    """

    def __init__(self, message: str, smallest_tokens: int, prompt_tokens: int) -> None:
        self.smallest_tokens = smallest_tokens
        # Rounded up: the fraction that is named must be feasible itself.
        rounded_up = math.ceil(smallest_tokens * 10_000 / max(prompt_tokens, 1)) / 10_000
        self.smallest_fraction = min(1.0, rounded_up)
        super().__init__(
            f"{message}; the smallest feasible budget for {prompt_tokens} prompt tokens is "
            f"kept_fraction={self.smallest_fraction:.4f} (kept_tokens={smallest_tokens})"
        )


@dataclass(frozen=True)
class Budget:
    """Kept share of the prompt's KV cache; exactly one of the two is set.

    Args:
        kept_fraction: in (0, 1], of the full KV bytes of the prompt.
        kept_tokens: tokens, at least 2, average per KV head per layer; may exceed the prompt.

    Raises:
        ValueError: neither or both set, or out of range.
    """

    kept_fraction: float | None = None
    kept_tokens: int | None = None

    def __post_init__(self) -> None:
        if (self.kept_fraction is None) == (self.kept_tokens is None):
            got = "both" if self.kept_tokens is not None else "neither"
            raise ValueError(f"set exactly one of budget.kept_fraction and budget.kept_tokens, got {got}")
        if self.kept_fraction is not None:
            self._check_fraction(self.kept_fraction)
        if self.kept_tokens is not None:
            self._check_tokens(self.kept_tokens)

    @staticmethod
    def _check_fraction(value: float) -> None:
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value <= 1:
            raise ValueError(
                f"budget.kept_fraction={value!r} must be a number above 0 and at most 1 "
                "(the fraction of the KV cache that is KEPT); for a count set budget.kept_tokens"
            )

    @staticmethod
    def _check_tokens(value: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"budget.kept_tokens={value!r} must be a whole number of tokens, at least 2")
        if value == 1:
            raise ValueError(
                "budget.kept_tokens=1 is ambiguous: write kept_fraction=1.0 to keep everything, "
                "or kept_tokens of at least 2"
            )

    @classmethod
    def of(cls, value: Budget | float | int) -> Budget:
        """A budget from itself, from a float (kept_fraction) or from an int (kept_tokens)."""
        if isinstance(value, Budget):
            return value
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ValueError(
                f"budget={value!r} must be a hcache.Budget, a float (fraction) or an int (tokens)"
            )
        return cls(kept_tokens=value) if isinstance(value, int) else cls(kept_fraction=value)

    def tokens(self, prompt_tokens: int) -> int:
        """Average kept tokens per KV head per layer for a prompt of `prompt_tokens`; may exceed it.

        A fraction is rounded down, in decimal, so 0.29 of 100 is 29 and not 28.
        """
        if self.kept_tokens is not None:
            return self.kept_tokens
        return math.floor(Fraction(str(self.kept_fraction)) * prompt_tokens)

    @property
    def label(self) -> str:
        """Short name for paths and tables, for example f0.25 or t512."""
        return f"t{self.kept_tokens}" if self.kept_tokens is not None else f"f{self.kept_fraction:g}"

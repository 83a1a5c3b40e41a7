"""PyramidKV: SnapKV's votes, with layer budgets that fall linearly with depth.

Paper: PyramidKV, arXiv 2406.02069 (sections 4.1 and 4.2). Kept on the device: the window and, for each KV
head, the best-voted earlier tokens, more in low layers than in high ones. Lost for good: the rest of the
prompt. Generated tokens all stay.

Differences from the official code (KVCache-Factory c97f9d7): `rounding: exact` spends the budget to the token
(the official steps are rounded down and exceed it by up to L * (L - 2) / 2 tokens a head; `official` does as
they do); KV is stored once per KV head; votes stay in float32. As in their code, prompts shorter than twice
the budget without the window are split evenly. The paper's LongBench runs used window 8, kernel 7 and max
pooling; the defaults are those that the code's models start with, which are SnapKV's too, so that the two
methods differ in allocation alone.
"""

from __future__ import annotations

from dataclasses import dataclass

from hcache.allocation import Allocation, Pyramid, PyramidSum
from hcache.methods.registry import register
from hcache.methods.snapkv import WindowMethod


@register("pyramidkv")
@dataclass(frozen=True)
class PyramidKV(WindowMethod):
    """Votes of the observation window under a pyramid.

    Args:
        beta: the average budget over the last layer's; 1 is uniform.
        rounding: exact, or official for parity with published runs.
    """

    beta: int = 20
    rounding: PyramidSum = PyramidSum.exact

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.allocation is not None and (self.beta, self.rounding) != (PyramidKV.beta, PyramidKV.rounding):
            raise ValueError(
                f"method.beta={self.beta} and method.rounding={self.rounding.value} have no effect with "
                f"method.allocation={self.allocation!r}; leave them out, or write "
                "method.allocation={name:pyramid,beta:...,rounding:...}"
            )

    def own_allocation(self) -> Allocation:
        return Pyramid(self.beta, self.rounding)

"""CAKE: layers that attend widely and unsteadily get more, and the budget is handed on in a cascade.

Paper: CAKE, ICLR 2025, arXiv 2503.12491 (sections 3.2 to 3.4). Kept on the device: the window and, for each
KV head, the earlier tokens with the highest indicator, mean + gamma * variance over the window's rows; layers
share the budget by preference (allocation.Preference) as they come in, so that the peak is the budget and one
layer. Each decode step evicts one token of each head, by what the newest token attends to. Lost for good: all
that is evicted.

Differences from the official code (antgroup/cakekv c4675ce): the budget is divided by water-filling, which
spends it exactly and never asks for tokens that have gone (theirs loses up to 3.6% and may regrow a layer);
prompts between the budget and the budget + window are cut too; kept tokens stay in text order, so that
pooling while decoding smooths over the text and not over the order of storage; float32 throughout (in float16
most variances are 0). The tuned tau1 and tau2 of single models are theirs to be set: 1 and 1 are the paper's
defaults for others.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from hcache.allocation import Allocation, Preference
from hcache.geometry import Geometry
from hcache.methods.eviction import EvictionLayer, Plan, RankedLayer
from hcache.methods.registry import register
from hcache.methods.snapkv import WindowMethod
from hcache.scoring import Group, Pooling, pool, reduce_group, window_rows

if TYPE_CHECKING:
    from hcache.kernels.evict import Judging


@register("cake")
@dataclass(frozen=True)
class Cake(WindowMethod):
    """Mean and variance of the window's attention, under layer preferences.

    Args:
        gamma: weight of the variance in a token's indicator.
        tau1, tau2: inverse exponents of entropy and variance in a layer's preference.
    """

    constant_size: ClassVar[bool] = True

    gamma: float = 200.0
    tau1: float = 1.0
    tau2: float = 1.0

    def __post_init__(self) -> None:
        if self.window < 2:
            raise ValueError(f"method.window={self.window} must be at least 2: CAKE needs a variance over it")
        super().__post_init__()
        if self.allocation is not None and (self.tau1, self.tau2) != (Cake.tau1, Cake.tau2):
            raise ValueError(
                f"method.tau1={self.tau1} and method.tau2={self.tau2} have no effect with "
                f"method.allocation={self.allocation!r}; give them as its settings, or leave allocation null"
            )

    def own_allocation(self) -> Allocation:
        return Preference(self.tau1, self.tau2, self.window)

    def score(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        indicators_HGn = [
            rows.mean(1).add_(rows.var(1), alpha=self.gamma) for rows in window_rows(q, k, self.window)
        ]
        return self.smooth(reduce_group(torch.stack(indicators_HGn), self.group))

    def slot_bytes(self, geometry: Geometry, number_bytes: int) -> int:
        return super().slot_bytes(geometry, number_bytes) + RankedLayer.PLACE_BYTES

    def layer_state(self, layer: int, plans: list[Plan], earlier: list[EvictionLayer]) -> CakeLayer:
        return CakeLayer(self, layer, plans, earlier)


class CakeLayer(RankedLayer):
    """Evicts by the newest token's own attention, pooled over neighbours in text order; the window stays."""

    _method: Cake

    def rate(self, row_SGW: Tensor, newest_S: Tensor) -> Tensor:
        rule = self._method
        before_S = (newest_S + 1 - self._protected_S).unsqueeze(1)
        prefix_SW = reduce_group(row_SGW, rule.group).masked_fill_(self._places() >= before_S, 0.0)
        return pool(prefix_SW, rule.kernel, rule.pooling)

    def judging(self, group: int) -> Judging:
        from hcache.kernels.evict import Judging

        rule = self._method
        divisor = group if rule.group is Group.mean else 1
        return Judging(rule.group is Group.max, divisor, rule.kernel, rule.pooling is Pooling.max)

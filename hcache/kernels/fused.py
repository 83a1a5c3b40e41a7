"""Where our kernels do the work of a step. Needs no Triton."""

from __future__ import annotations

from torch import Tensor


def fused(x: Tensor) -> bool:
    """Whether steps on this tensor's device are kernels of our own; plain torch does them elsewhere."""
    return x.is_cuda

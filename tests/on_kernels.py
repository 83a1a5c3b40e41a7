"""Where tests run Triton's kernels: on a GPU, or on a CPU under Triton's interpreter (TRITON_INTERPRET=1)."""

from __future__ import annotations

import os

import pytest
import torch

from hcache.cache import exchange
from hcache.methods import chunks, low_rank, omnikv
from tests.test_kernels import mend_interpreter


def kernel_device(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device on which methods use kernels for the rest of the test; skips it where there is none."""
    pytest.importorskip("triton", reason="Triton is not installed")
    if torch.cuda.is_available():
        return "cuda"
    if os.environ.get("TRITON_INTERPRET") != "1":
        pytest.skip("needs a CUDA device, or TRITON_INTERPRET=1")
    mend_interpreter(monkeypatch)
    for module in (exchange, chunks, low_rank, omnikv):
        monkeypatch.setattr(module, "fused", lambda tensor: True)
    return "cpu"

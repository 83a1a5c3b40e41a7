"""The Triton column sums against brute force: on a GPU, or on a CPU under Triton's interpreter.

pytest -m gpu tests/test_columns.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_columns.py     # without; Triton must be installed
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache import scoring
from hcache.contract.masked import causal_attention
from tests.on_kernels import kernel_device

pytestmark = pytest.mark.gpu

DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    return kernel_device(monkeypatch)


def random_qk(
    heads: int, group: int, tokens: int, dim: int, dtype: torch.dtype, device: str
) -> tuple[Tensor, Tensor]:
    """As a model hands them over: heads between the tokens."""
    generator = torch.Generator().manual_seed(tokens)
    q = 2 * torch.randn(tokens, heads * group, dim, generator=generator)
    k = torch.randn(tokens, heads, dim, generator=generator)
    return tuple(x.to(device, dtype).transpose(0, 1) for x in (q, k))  # type: ignore[return-value]


def brute_force(q: Tensor, k: Tensor) -> Tensor:
    weights = causal_attention(q.double(), k.double()).sum(1)
    return weights.unflatten(0, (k.shape[0], -1)).sum(1).float()


def small() -> object:
    """Many tiles of a short prompt: the interpreter is slow."""
    from hcache.kernels.columns import Tuning

    return Tuning(32, 16, 4, 2)


@DTYPES
@pytest.mark.parametrize("tokens", [1, 15, 16, 31, 33, 64, 100])
@pytest.mark.parametrize(("heads", "group", "dim"), [(1, 1, 16), (2, 4, 32), (2, 3, 24)])
def test_sums_are_those_of_causal_attention(
    heads: int, group: int, dim: int, tokens: int, dtype: torch.dtype, device: str
) -> None:
    from hcache.kernels.columns import column_sums

    q, k = random_qk(heads, group, tokens, dim, dtype, device)
    sums = column_sums(q, k, small())
    assert sums.dtype == torch.float32
    torch.testing.assert_close(sums, brute_force(q, k), rtol=1e-4, atol=1e-5)
    assert torch.equal(sums, column_sums(q, k, small()))


@pytest.mark.parametrize("dim", [64, 128, 256])
def test_the_tunings_in_use(dim: int, device: str) -> None:
    from hcache.kernels.columns import column_sums

    q, k = random_qk(1, 2, 300, dim, torch.bfloat16, device)
    torch.testing.assert_close(column_sums(q, k), brute_force(q, k), rtol=1e-4, atol=1e-5)


def test_large_logits_do_not_overflow(device: str) -> None:
    """Hidden weights may be as large as they like: only seen ones count."""
    from hcache.kernels.columns import column_sums

    q, k = random_qk(1, 2, 70, 16, torch.bfloat16, device)
    q, k = q * 10, k * 10
    torch.testing.assert_close(column_sums(q, k, small()), brute_force(q, k), rtol=1e-3, atol=1e-3)


@DTYPES
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_it_is_what_scoring_uses_on_cuda(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("triton")
    q, k = random_qk(8, 4, 3000, 128, dtype, "cuda")
    expected = scoring.column_sums_in_blocks(q, k)
    monkeypatch.delattr(scoring, "column_sums_in_blocks")
    torch.testing.assert_close(scoring.column_sums(q, k), expected, rtol=1e-3, atol=1e-4)

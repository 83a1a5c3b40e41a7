"""Attention over the prompt on CUDA: which of torch's kernels is asked first, and that nothing is copied."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend

from hcache.attention.backends import BACKENDS, fastest_kernels

CUDNN, FLASH = int(SDPBackend.CUDNN_ATTENTION), int(SDPBackend.FLASH_ATTENTION)
BF16 = torch.bfloat16


def order() -> list[int]:
    return torch._C._get_sdp_priority_order()


def on_device(generation: int, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype = BF16) -> Any:
    """What passes for a tensor on a GPU of this compute capability."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (generation, 0))
    return SimpleNamespace(is_cuda=True, dtype=dtype, device="cuda")


def test_cudnn_comes_first_on_hopper_and_the_order_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    like, before = on_device(9, monkeypatch), order()
    with fastest_kernels(like):
        assert order()[:2] == [CUDNN, FLASH]
    assert order() == before
    with pytest.raises(RuntimeError, match="in the middle"), fastest_kernels(like):
        raise RuntimeError("in the middle")
    assert order() == before


@pytest.mark.parametrize(("generation", "dtype"), [(8, BF16), (9, torch.float32)], ids=str)
def test_elsewhere_torch_decides(
    generation: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = order()
    with fastest_kernels(on_device(generation, monkeypatch, dtype)):
        assert order() == before
    with fastest_kernels(torch.zeros(1, dtype=BF16)):
        assert order() == before


def test_a_kernel_that_the_user_switched_off_stays_off(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.backends.cuda.enable_cudnn_sdp(False)
    try:
        with fastest_kernels(on_device(9, monkeypatch)):
            assert not torch.backends.cuda.cudnn_sdp_enabled()
            assert torch.backends.cuda.flash_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(True)


def as_a_model_gives(tokens: int, group: int, dim: int, dtype: torch.dtype) -> list[Tensor]:
    """q [1, Hq, T, D], k and v [1, H, T, D], heads between the tokens in memory."""
    generator = torch.Generator().manual_seed(tokens)
    heads = (2 * group, 2, 2)
    rows = [torch.randn(1, tokens, count, dim, generator=generator) for count in heads]
    return [x.to("cuda", dtype).transpose(1, 2) for x in rows]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [BF16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("dim", [16, 64, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", [1, 77, 1000])
def test_a_prompt_sees_what_the_reference_sees(tokens: int, group: int, dim: int, dtype: torch.dtype) -> None:
    q, k, v = as_a_model_gives(tokens, group, dim, dtype)
    out, expected = BACKENDS["sdpa"].prefill(q, k, v), BACKENDS["reference"].prefill(q, k, v)
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(out, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_keys_are_not_expanded_and_the_output_needs_no_copy() -> None:
    q, k, v = as_a_model_gives(20_000, 4, 128, BF16)
    BACKENDS["sdpa"].prefill(q, k, v)
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = BACKENDS["sdpa"].prefill(q, k, v)
    torch.cuda.synchronize()
    assert out.transpose(1, 2).is_contiguous()
    # The output is as large as q; expanding k and v over their group would take twice that again.
    assert torch.cuda.max_memory_allocated() - before < 1.5 * q.nbytes


@pytest.mark.gpu
@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability()[0] != 9, reason="needs a Hopper GPU"
)
@pytest.mark.filterwarnings("ignore:Warning. Profiler clears events")
def test_it_is_cudnn_that_attends_on_hopper() -> None:
    q, k, v = as_a_model_gives(1000, 4, 128, BF16)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        BACKENDS["sdpa"].prefill(q, k, v)
    assert any("cudnn_attention" in event.key for event in profile.key_averages())

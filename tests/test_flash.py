"""The flash-attn backend against the reference: with the real package on a GPU, and on a CPU with a slow
stand-in that is as strict about layouts.

    pytest -m gpu tests/test_flash.py     # needs flash-attn and a CUDA device
"""

from __future__ import annotations

import copy
import logging
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache.attention import flash
from hcache.attention.backends import BACKENDS, Pages
from hcache.attention.flash import FlashBackend
from hcache.cache.store import RaggedStore
from hcache.contract.masked import causal_attention
from hcache.contract.tiny_models import prompts, tiny_model

REFERENCE = BACKENDS["reference"]
LENGTHS = [[300], [0, 1, 255, 256], [257, 700, 5, 512]]
BF16 = torch.bfloat16


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool) -> Tensor:
    """[B, T, heads, D] all of them, as the package has it."""
    assert causal
    assert q.shape[:2] == k.shape[:2] == v.shape[:2]
    assert q.stride(-1) == k.stride(-1) == v.stride(-1) == 1
    group = q.shape[2] // k.shape[2]
    v_BHTD = v.transpose(1, 2).float().repeat_interleave(group, 1)
    pairs = zip(q.float().transpose(1, 2), k.float().transpose(1, 2), strict=True)
    weights = torch.stack([causal_attention(*pair) for pair in pairs])
    return (weights @ v_BHTD).to(q.dtype).transpose(1, 2).contiguous()


def flash_attn_with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, cache_seqlens: Tensor, block_table: Tensor | None
) -> Tensor:
    """q [R, 1, G, D] over caches [pages, size, 1, D] or, without a table, [R, slots, 1, D]."""
    rows, tokens, _, dim = q.shape
    assert tokens == 1
    assert cache_seqlens.dtype == torch.int32
    assert cache_seqlens.shape == (rows,)
    assert cache_seqlens.is_contiguous()
    assert k_cache.shape == v_cache.shape
    assert k_cache.shape[2:] == (1, dim)
    if block_table is None:
        assert k_cache.shape[0] == rows
    else:
        assert block_table.dtype == torch.int32
        assert block_table.shape[0] == rows
        assert block_table.stride(1) == 1
        assert k_cache.shape[1] % 256 == 0
    out = torch.zeros_like(q)
    for r, length in enumerate(cache_seqlens.tolist()):
        pages = slice(r, r + 1)
        if block_table is not None:
            assert length <= block_table.shape[1] * k_cache.shape[1]
            pages = block_table[r, : -(-length // k_cache.shape[1])].long()
        k, v = (x[pages].reshape(-1, dim)[:length].float() for x in (k_cache, v_cache))
        if length:
            out[r, 0] = ((q[r, 0].float() @ k.T * dim**-0.5).softmax(-1) @ v).to(q.dtype)
    return out


@pytest.fixture(params=["stand-in", pytest.param("real", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Where to test, with flash_attn to be imported."""
    if request.param == "real":
        if not torch.cuda.is_available():
            pytest.skip("needs a CUDA device")
        pytest.importorskip("flash_attn", reason="flash-attn is not installed")
        return "cuda"
    package = SimpleNamespace(
        flash_attn_func=flash_attn_func, flash_attn_with_kvcache=flash_attn_with_kvcache
    )
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    monkeypatch.setattr(flash, "refuse", lambda q: None)
    return "cpu"


@pytest.fixture(autouse=True)
def fresh_log() -> Iterator[None]:
    flash._say_that_pages_are_copied.cache_clear()
    yield
    flash._say_that_pages_are_copied.cache_clear()


def normal(*shape: int, device: str, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(device, BF16)


def filled(lengths: list[int], dim: int, device: str, granule: int = FlashBackend.granule) -> RaggedStore:
    like = torch.empty(0, dim, dtype=BF16, device=device)
    store = RaggedStore(lengths, like=like, spare=1, granule=granule)
    for s, length in enumerate(lengths):
        k, v = normal(2, length, dim, device=device, seed=s)
        store.write(s, 0, k, v)
    return store


def assert_near(out: Tensor, expected: Tensor) -> None:
    assert out.shape == expected.shape
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out.float(), expected.float(), rtol=2e-2, atol=1e-2)


@pytest.mark.parametrize("dim", [32, 64, 128])
@pytest.mark.parametrize("group", [1, 4])
@pytest.mark.parametrize("tokens", [1, 70, 300])
def test_a_prompt_sees_what_the_reference_sees(tokens: int, group: int, dim: int, device: str) -> None:
    q = normal(2, tokens, 2 * group, dim, device=device, seed=1).transpose(1, 2)
    k, v = (normal(2, tokens, 2, dim, device=device, seed=s).transpose(1, 2) for s in (2, 3))
    out = FlashBackend().prefill(q, k, v)
    assert_near(out, REFERENCE.prefill(q, k, v))
    assert out.transpose(1, 2).is_contiguous()  # as the output projection takes it: no copy


@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
@pytest.mark.parametrize("group", [1, 4, 7])
@pytest.mark.parametrize("integers", [torch.int32, torch.int64], ids=str)
def test_a_step_sees_what_the_reference_sees(
    lengths: list[int], group: int, integers: torch.dtype, device: str
) -> None:
    store = filled(lengths, 64, device)
    q = normal(1, group * len(lengths), 1, 64, device=device, seed=9)
    limits = torch.tensor(lengths, dtype=integers, device=device).unsqueeze(1)
    out = FlashBackend().decode(q, store.ragged(), limits)
    assert_near(out, REFERENCE.decode(q, store.ragged(), limits))
    for s, length in enumerate(lengths):
        assert (out[0, group * s : group * (s + 1)] == 0).all() == (length == 0)


def test_a_step_of_a_batch(device: str) -> None:
    store = filled([30, 600, 257, 1], 32, device)  # 2 sequences of 2 KV heads
    q = normal(2, 8, 1, 32, device=device, seed=9)
    limits = store.lengths.unsqueeze(1)
    assert_near(FlashBackend().decode(q, store.ragged(), limits), REFERENCE.decode(q, store.ragged(), limits))


@pytest.mark.parametrize("rows_per_segment", [1, 2])
def test_chosen_pages_are_copied_together_and_that_is_said(
    rows_per_segment: int, device: str, caplog: pytest.LogCaptureFixture
) -> None:
    store = filled([300, 700], 64, device)
    rows = 2 * rows_per_segment
    table = torch.tensor([[3, 0, 7, 17], [16, 11, 5, 1], [2, 4, 40, 16], [18, 3, 1, 0]][:rows])
    pages = Pages(table.to(device), 16)
    q = normal(1, 8, 1, 64, device=device, seed=9)
    limits = torch.tensor([[60], [33], [64], [0]][:rows], device=device)
    backend = FlashBackend()
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            out = backend.decode(q, store.ragged(), limits, pages)
    assert_near(out, REFERENCE.decode(q, store.ragged(), limits, pages))
    assert caplog.text.count("copied together in every step") == 1


def test_several_tokens_and_scores_are_those_of_the_sdpa_backend(
    device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = filled([300, 70], 64, device)
    backend = FlashBackend()
    monkeypatch.delattr(backend, "_attend_cache")
    q = normal(1, 4, 3, 64, device=device, seed=9)
    limits = torch.tensor([[298, 299, 300], [68, 69, 70]], device=device)
    assert_near(backend.decode(q, store.ragged(), limits), REFERENCE.decode(q, store.ragged(), limits))
    newest = q[:, :, 2:], store.ragged(), limits[:, 2:]
    (out, logits, totals), (expected, exact, exact_totals) = (
        b.decode_scored(*newest) for b in (backend, REFERENCE)
    )
    assert_near(out, expected)
    torch.testing.assert_close(totals, exact_totals, rtol=2e-2, atol=2e-2)
    seen = ~exact.isnan()
    torch.testing.assert_close(logits[seen], exact[seen], rtol=2e-2, atol=2e-2)


def test_a_store_of_smaller_pages_is_noticed(device: str) -> None:
    store = filled([70, 200], 64, device, granule=64)
    with pytest.raises(AssertionError):
        FlashBackend().decode(normal(1, 4, 1, 64, device=device), store.ragged(), store.lengths.unsqueeze(1))


def needs_the_real_one() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    pytest.importorskip("flash_attn", reason="flash-attn is not installed")


@pytest.mark.gpu
@pytest.mark.filterwarnings("ignore:Synchronization debug mode is a prototype")
def test_a_step_can_be_captured_and_lengths_move_on() -> None:
    """One graph for lengths, places and queries that change on the device."""
    needs_the_real_one()
    store = filled([300, 700], 128, "cuda")
    ragged, limits = store.ragged(), torch.tensor([[300], [700]], device="cuda")
    q = normal(1, 8, 1, 128, device="cuda", seed=9)
    backend = FlashBackend()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            backend.decode(q, ragged, limits)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = backend.decode(q, ragged, limits)
    for new_limits in ([[1], [256]], [[0], [257]], [[299], [513]]):
        limits.copy_(torch.tensor(new_limits))
        q.copy_(normal(1, 8, 1, 128, device="cuda", seed=new_limits[1][0]))
        graph.replay()
        assert_near(out, REFERENCE.decode(q, ragged, limits))
    ragged.first.copy_(ragged.first.flip(0))
    limits.copy_(torch.tensor([[700], [300]]))
    graph.replay()
    assert_near(out, REFERENCE.decode(q, ragged, limits))


@pytest.mark.gpu
@pytest.mark.parametrize(("method", "tolerance"), [("fullkv", 5e-2), ("snapkv", 0.1)])
def test_a_model_gives_nearly_the_logits_of_sdpa(method: str, tolerance: float) -> None:
    """Of tokens with nearly the same score, rounding decides which snapkv keeps."""
    from hcache import KVCache

    needs_the_real_one()
    model = copy.deepcopy(tiny_model("llama", 2)).to("cuda", BF16)
    ids, mask = (x.cuda() for x in prompts(2, 400, padded=True))
    hyper: dict[str, Any] = {} if method == "fullkv" else {"window": 16, "budget": 200}
    caches = [KVCache(model, method, backend=name, **hyper) for name in ("sdpa", "flash_attn")]
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    with torch.inference_mode():
        for step in range(8):
            theirs, ours = (
                model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache).logits[:, -1]
                for cache in caches
            )
            assert (ours - theirs).norm() / theirs.norm() < tolerance, step
            ids, positions = theirs.argmax(-1, keepdim=True), positions[:, -1:] + 1
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], 1)


@pytest.mark.parametrize(
    ("q", "message"),
    [
        (torch.zeros(1, 1, 1, 64), "needs float16 or bfloat16 on a CUDA device, got torch.float32 on cpu"),
        (torch.zeros(1, 1, 1, 64, dtype=BF16), "got torch.bfloat16 on cpu; load the model in bfloat16"),
        (SimpleNamespace(dtype=BF16, is_cuda=True, shape=(1, 1, 1, 36)), "the model has 36; choose"),
        (SimpleNamespace(dtype=BF16, is_cuda=True, shape=(1, 1, 1, 512)), "at most 256, the model has 512"),
    ],
)
def test_what_flash_attn_can_not_do_is_refused(q: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        flash.refuse(q)


def test_nothing_is_refused_that_it_can_do() -> None:
    for dtype in (torch.float16, BF16):
        flash.refuse(SimpleNamespace(dtype=dtype, is_cuda=True, shape=(1, 1, 1, 128)))  # type: ignore[arg-type]


def test_a_missing_package_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flash_attn", None)
    with pytest.raises(ValueError, match=r"needs the package flash-attn.*pip install 'hcache\[flash\]'"):
        FlashBackend()


@pytest.mark.parametrize("name", ["prefill", "decode"])
def test_the_model_is_refused_at_its_first_attention(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    package = SimpleNamespace(flash_attn_func=None, flash_attn_with_kvcache=None)
    monkeypatch.setitem(sys.modules, "flash_attn", package)
    q = torch.zeros(1, 2, 1, 64)
    others = (q, q) if name == "prefill" else (filled([5, 5], 64, "cpu").ragged(), torch.ones(2, 1))
    with pytest.raises(ValueError, match="needs float16 or bfloat16"):
        getattr(FlashBackend(), name)(q, *others)

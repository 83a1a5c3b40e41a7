"""Importance scores against brute force: attention of a window and of all rows, pooling, reduction, order."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache import scoring
from hcache.contract.masked import causal_attention
from hcache.scoring import (
    Group,
    Pooling,
    check_kernel,
    column_sums,
    pool,
    reduce_group,
    top_positions,
    window_attention,
    window_rows,
)

N, DIM, HEADS = 70, 16, 2
SHARES = pytest.mark.parametrize("share", [1, 2, 4])


def random_qk(share: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(share)
    q = 2 * torch.randn(HEADS * share, N, DIM, generator=generator)
    return q.to(dtype), torch.randn(HEADS, N, DIM, generator=generator).to(dtype)


@SHARES
@pytest.mark.parametrize("window", [1, 8, N, N + 5])
def test_window_attention_is_the_last_rows_of_causal_attention(share: int, window: int) -> None:
    q, k = random_qk(share)
    rows = causal_attention(q, k)[:, -window:].unflatten(0, (HEADS, share))
    torch.testing.assert_close(torch.stack(list(window_rows(q, k, window))), rows, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(window_attention(q, k, window), rows.sum(2), rtol=1e-4, atol=1e-6)


@SHARES
@pytest.mark.parametrize("numbers", [1, 700, 2**22], ids=["row by row", "blocks", "whole"])
def test_column_sums_are_those_of_causal_attention(
    share: int, numbers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(scoring, "SCRATCH_NUMBERS", numbers)
    q, k = random_qk(share)
    sums = causal_attention(q, k).sum(1).unflatten(0, (HEADS, share)).sum(1)
    torch.testing.assert_close(column_sums(q, k), sums, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_scored_in_float32(dtype: torch.dtype) -> None:
    q, k = random_qk(2, dtype)
    for score in (column_sums, lambda q, k: window_attention(q, k, 8)):
        assert score(q, k).dtype == torch.float32
        torch.testing.assert_close(score(q, k), score(q.float(), k.float()))


def test_the_group_of_a_kv_head_is_consecutive_query_heads() -> None:
    """Tiling instead of repeating is the classic mistake: query heads 0 to 3 belong to KV head 0."""
    q, k = random_qk(4)
    windowed, summed = window_attention(q, k, 4), column_sums(q, k)
    q[5] += 1.0
    changed = (window_attention(q, k, 4) - windowed).abs().amax(-1) > 0
    assert changed.tolist() == [[False] * 4, [False, True, False, False]]
    assert ((column_sums(q, k) - summed).abs().amax(-1) > 0).tolist() == [False, True]


@pytest.mark.parametrize("kernel", [1, 3, 7])
@pytest.mark.parametrize("kind", Pooling)
def test_pooling_equals_a_loop(kind: Pooling, kernel: int) -> None:
    scores, half = torch.rand(2, 3, 20) - 0.5, kernel // 2
    pooled = pool(scores, kernel, kind)
    assert pooled.shape == scores.shape
    for i in range(20):
        around = scores[..., max(0, i - half) : i + half + 1]
        expected = around.sum(-1) / kernel if kind is Pooling.avg else around.amax(-1)
        torch.testing.assert_close(pooled[..., i], expected)


def test_an_average_divides_by_the_kernel_at_the_edges_too() -> None:
    damped = pool(torch.ones(1, 8), 5, Pooling.avg)
    torch.testing.assert_close(damped, torch.tensor([[0.6, 0.8, 1, 1, 1, 1, 0.8, 0.6]]))


def test_groups_are_reduced_whatever_the_order_of_their_query_heads() -> None:
    scores = torch.rand(HEADS, 3, N)
    for group, one_by_one in ((Group.mean, sum), (Group.sum, sum), (Group.max, max)):
        reduced = reduce_group(scores, group)
        size = 3 if group is Group.mean else 1
        slow = [[one_by_one(column) / size for column in zip(*head, strict=True)] for head in scores.tolist()]
        torch.testing.assert_close(reduced, torch.tensor(slow))
        torch.testing.assert_close(reduce_group(scores[:, [2, 0, 1]], group), reduced)
        torch.testing.assert_close(reduce_group(scores.transpose(1, 2), group, dim=2), reduced)


def test_the_largest_come_out_sorted_and_ties_go_to_the_earlier_position() -> None:
    assert top_positions(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]
    assert top_positions(torch.tensor([1.0, torch.inf, -torch.inf, 2.0]), 2).tolist() == [1, 3]
    assert top_positions(torch.zeros(3), 0).tolist() == []
    assert top_positions(torch.zeros(1000), 400).tolist() == list(range(400))


@pytest.mark.parametrize("kernel", [-1, 0, 4])
def test_an_even_kernel_is_refused(kernel: int) -> None:
    with pytest.raises(ValueError, match=f"method.kernel={kernel} must be an odd number"):
        check_kernel(kernel)
    check_kernel(5)


def test_a_missing_triton_is_said_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(scoring, "find_spec", lambda name: None)
    scoring._has_triton.cache_clear()
    assert not any(scoring._has_triton() for _ in range(2))
    scoring._has_triton.cache_clear()
    assert caplog.text.count("no triton") == 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_half_precision_on_cuda_is_multiplied_as_it_is(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A CPU has no such product: here the way to it and back is tested, with a stand-in."""
    q, k = random_qk(4, dtype)
    expected = list(window_rows(q, k, 8))
    taken = []

    def mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype) -> Tensor:
        taken.append((a.dtype, a.shape, b.dtype, b.shape, out_dtype))
        return a.float() @ b.float()

    monkeypatch.setattr(scoring, "_half_on_cuda", lambda x: True)
    monkeypatch.setattr(torch, "mm", mm)
    torch.testing.assert_close(list(window_rows(q, k, 8)), expected)
    assert taken == [(dtype, (32, DIM), dtype, (DIM, N), torch.float32)] * HEADS


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scores_on_a_gpu_are_as_exact_as_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    q = 2 * torch.randn(2000, 8, 128, generator=generator).to("cuda", dtype).transpose(0, 1)
    k = torch.randn(2000, 2, 128, generator=generator).to("cuda", dtype).transpose(0, 1)
    exact = causal_attention(q.double(), k.double()).float()
    windowed = exact[:, -32:].sum(1).unflatten(0, (2, 4))
    torch.testing.assert_close(window_attention(q, k, 32), windowed, rtol=1e-4, atol=1e-6)
    summed = exact.double().sum(1).unflatten(0, (2, 4)).sum(1).float()
    torch.testing.assert_close(column_sums(q, k), summed, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(scoring.column_sums_in_blocks(q, k), summed, rtol=1e-4, atol=1e-4)

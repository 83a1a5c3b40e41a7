"""SnapKV and StreamingLLM against brute force, and the scores they share."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from hcache import Budget, Geometry
from hcache.attention.backends import BACKENDS
from hcache.methods import make
from hcache.scoring import Group, Pooling, pool, reduce_group, top_positions, window_attention
from tests.reference.masked import causal_attention

N, DIM, HEADS, GROUP = 70, 16, 2, 3
GEOMETRY = Geometry(layers=1, query_heads=HEADS * GROUP, kv_heads=HEADS, head_dim=DIM)


def random_prompt(seed: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(1, HEADS * GROUP, N, DIM, generator=generator)
    k, v = torch.randn(2, 1, HEADS, N, DIM, generator=generator)
    return q, k, v


def state_of(name: str, tokens: int, **hyper: object):
    (state,) = make(name, **hyper).layers(GEOMETRY, Budget(kept_tokens=tokens), [N])
    state.backend = BACKENDS["reference"]
    return state


def test_window_attention_is_the_last_rows_of_causal_attention() -> None:
    q, k, _ = random_prompt()
    for window in (1, 8, N):
        rows = causal_attention(q[0], k[0])[:, -window:].sum(1).unflatten(0, (HEADS, GROUP))
        torch.testing.assert_close(window_attention(q[0], k[0], window), rows, rtol=1e-4, atol=1e-6)


def test_the_group_of_a_kv_head_is_consecutive_query_heads() -> None:
    """Tiling instead of repeating is the classic mistake: query heads 0 to 2 belong to KV head 0."""
    q, k, _ = random_prompt()
    base = window_attention(q[0], k[0], 4)
    q[0, 4] += 1.0
    changed = (window_attention(q[0], k[0], 4) - base).abs().amax(-1) > 0
    assert changed.tolist() == [[False, False, False], [False, True, False]]


@pytest.mark.parametrize("kernel", [1, 3, 7])
def test_pooling_equals_a_loop(kernel: int) -> None:
    scores, half = torch.rand(2, 20), kernel // 2
    for kind in Pooling:
        pooled = pool(scores, kernel, kind)
        for i in range(20):
            around = scores[:, max(0, i - half) : i + half + 1]
            expected = around.sum(-1) / kernel if kind is Pooling.avg else around.amax(-1)
            torch.testing.assert_close(pooled[:, i], expected)


def test_ties_go_to_the_earlier_position_and_come_out_sorted() -> None:
    assert top_positions(torch.tensor([1.0, 3.0, 1.0, 3.0, 1.0]), 3).tolist() == [0, 1, 3]


@pytest.mark.parametrize("pooling", ["avg", "max"])
@pytest.mark.parametrize("group", ["mean", "max", "sum"])
@pytest.mark.parametrize(("window", "kernel", "capacity"), [(8, 5, 30), (1, 1, 10), (32, 7, 40)])
def test_snapkv_keeps_the_window_and_the_best_voted(
    pooling: str, group: str, window: int, kernel: int, capacity: int
) -> None:
    hyper = {"pooling": Pooling(pooling), "group": Group(group), "window": window, "kernel": kernel}
    state = state_of("snapkv", capacity, **hyper)
    q, k, v = random_prompt()
    state.prefill(q, k, v, None)
    votes = causal_attention(q[0], k[0])[:, -window:, : N - window].sum(1).unflatten(0, (HEADS, GROUP))
    votes = {"mean": votes.mean(1), "max": votes.amax(1), "sum": votes.sum(1)}[group]
    for h in range(HEADS):
        row, half = votes[h], kernel // 2
        smooth = torch.stack(
            [
                row[max(0, i - half) : i + half + 1].sum() / kernel
                if pooling == "avg"
                else row[max(0, i - half) : i + half + 1].max()
                for i in range(N - window)
            ]
        )
        kept = state.kept()[0][h].tolist()
        assert kept[-window:] == list(range(N - window, N))
        chosen, others = kept[:-window], sorted(set(range(N - window)) - set(kept))
        assert len(kept) == capacity
        assert smooth[chosen].min() >= smooth[others].max() - 1e-6


def test_snapkv_max_pooling_brings_the_neighbours_of_a_spike() -> None:
    q, k, v = random_prompt()
    k[:] = 0.01 * k
    k[0, :, 20] = 4 * q[0, ::GROUP, -1]
    state = state_of("snapkv", 8 + 7, window=8, kernel=7, pooling=Pooling.max, group=Group.max)
    state.prefill(q, k, v, None)
    assert state.kept()[0][0].tolist()[:7] == list(range(17, 24))


def test_snapkv_votes_are_those_of_each_head() -> None:
    q, k, v = random_prompt()
    state = state_of("snapkv", 20, window=4)
    state.prefill(q, k, v, None)
    assert state.kept()[0][0].tolist() != state.kept()[0][1].tolist()


def test_group_reduction_ignores_the_order_of_query_heads() -> None:
    scores = torch.rand(HEADS, GROUP, N)
    for group in Group:
        torch.testing.assert_close(reduce_group(scores[:, [2, 0, 1]], group), reduce_group(scores, group))


@pytest.mark.parametrize(("name", "hyper"), [("snapkv", {"window": 0}), ("snapkv", {"kernel": 4})])
def test_bad_hyper_parameters_are_refused(name: str, hyper: dict) -> None:
    with pytest.raises(ValueError, match=f"method.{next(iter(hyper))}="):
        make(name, **hyper)
    with pytest.raises(ValueError, match="method.sinks=-1"):
        make("streaming_llm", sinks=-1)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("capacity", [9, 30])
def test_streaming_keeps_sinks_and_the_latest_after_any_number_of_steps(sinks: int, capacity: int) -> None:
    state = state_of("streaming_llm", capacity, sinks=sinks)
    state.prefill(*random_prompt(), None)
    for t in range(10 * capacity):
        recent = capacity - sinks
        expected = [i for i in range(N) if i < sinks or i >= N + t - recent]
        assert all(head.tolist() == expected for head in state.kept()[0])
        state.step(torch.randn(1, HEADS * GROUP, 1, DIM), *torch.randn(2, 1, HEADS, 1, DIM), None)


def test_streaming_step_by_step_equals_one_pass_with_a_mask() -> None:
    """Sinks, the latest recents and itself: compared with dense masked attention over the whole history."""
    sinks, capacity, steps = 4, 12, 40
    state = state_of("streaming_llm", capacity, sinks=sinks)
    q, k, v = random_prompt()
    state.prefill(q, k, v, None)
    for t in range(steps):
        q1 = torch.randn(1, HEADS * GROUP, 1, DIM)
        k1, v1 = torch.randn(2, 1, HEADS, 1, DIM)
        out = state.step(q1, k1, v1, None)
        k, v = torch.cat([k, k1], 2), torch.cat([v, v1], 2)
        last = N + t
        visible = [i for i in range(last) if i < sinks or i >= last - (capacity - sinks)] + [last]
        for h in range(HEADS * GROUP):
            keys, values = k[0, h // GROUP, visible], v[0, h // GROUP, visible]
            weights = (keys @ q1[0, h, 0] * DIM**-0.5).softmax(0)
            torch.testing.assert_close(out[0, h, 0], weights @ values, rtol=1e-4, atol=1e-5)

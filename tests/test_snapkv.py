"""SnapKV against a slow reference in loops, written from its rule: votes of the window, pooling, the best."""

from __future__ import annotations

import itertools
import math
from statistics import mean
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from hcache import Budget, Generator, Geometry, KVCache
from hcache.attention.backends import BACKENDS
from hcache.contract import tiny_models
from hcache.contract.masked import attend_to, causal_attention
from hcache.methods import make
from hcache.methods.eviction import EvictionLayer
from hcache.scoring import Group, Pooling
from tests.padding import Qkv, left_padded

DIM, HEADS = 16, 2
SHARES = pytest.mark.parametrize("share", [1, 2, 4])
POOL = {Pooling.avg: lambda near, kernel: sum(near) / kernel, Pooling.max: lambda near, kernel: max(near)}
JOIN = {Group.mean: mean, Group.max: max, Group.sum: sum}


def geometry(share: int = 2, layers: int = 1) -> Geometry:
    return Geometry(layers=layers, query_heads=HEADS * share, kv_heads=HEADS, head_dim=DIM)


def prompt_of(tokens: int, share: int = 2, seed: int = 0) -> Qkv:
    """One sequence: q [Hq, n, D], k and v [H, n, D]."""
    generator = torch.Generator().manual_seed(1000 * seed + tokens)
    q = 2 * torch.randn(HEADS * share, tokens, DIM, generator=generator)
    k, v = torch.randn(2, HEADS, tokens, DIM, generator=generator)
    return q, k, v


def states_of(name: str, prompts: list[list[Qkv]], budget: float | int, **hyper: Any) -> list[EvictionLayer]:
    """The layers of a method, each prefilled with a batch of its own: prompts[layer][sequence]."""
    share = prompts[0][0][0].shape[0] // HEADS
    lengths = [k.shape[1] for _, k, _ in prompts[0]]
    states = make(name, **hyper).layers(geometry(share, len(prompts)), Budget.of(budget), lengths)
    for state, batch in zip(states, prompts, strict=True):
        state.backend = BACKENDS["reference"]
        state.prefill(*left_padded(batch))
    return states


def as_lists(kept: list[list[Tensor]]) -> list[list[list[int]]]:
    return [[head.tolist() for head in sequence] for sequence in kept]


def slow_scores(
    q: Tensor, k: Tensor, window: int, kernel: int, pooling: Pooling, group: Group
) -> list[list[float]]:
    """[H][n - window]: votes row by row, joined over the group, then pooled place by place."""
    heads, n, dim = k.shape
    share, prefix, half = q.shape[0] // heads, n - window, kernel // 2
    votes = [[0.0] * prefix for _ in q]
    for h, queries in enumerate(q.double()):
        for i in range(prefix, n):
            seen = k[h // share, : i + 1].double()
            weights = [math.exp(logit / dim**0.5) for logit in (seen @ queries[i]).tolist()]
            total = sum(weights)
            for j in range(prefix):
                votes[h][j] += weights[j] / total
    scores = []
    for h in range(heads):
        mine = votes[h * share : (h + 1) * share]
        joined = [JOIN[group](column) for column in zip(*mine, strict=True)]
        near = [joined[max(0, j - half) : j + half + 1] for j in range(prefix)]
        scores.append([POOL[pooling](some, kernel) for some in near])
    return scores


def best(scores: list[float], count: int) -> list[int]:
    """The places of the best, in order; the earlier one of equals."""
    return sorted(sorted(range(len(scores)), key=lambda j: (-scores[j], j))[:count])


def slow_kept(prompt: Qkv, capacity: int, window: int, *rule: Any) -> list[list[int]]:
    """[H] kept positions of one sequence."""
    n = prompt[1].shape[1]
    scores = slow_scores(prompt[0], prompt[1], window, *rule)
    return [best(row, capacity - window) + list(range(n - window, n)) for row in scores]


def assert_attends_to(state: EvictionLayer, prompts: list[Qkv], kept: list[list[list[int]]]) -> None:
    """A step gives what attention over the kept tokens and the new one gives."""
    q1, k1, v1 = (
        torch.stack(parts) for parts in zip(*(prompt_of(1, 2, seed=9) for _ in prompts), strict=True)
    )
    q1 = q1[:, :1].expand(-1, prompts[0][0].shape[0], -1, -1).contiguous()
    out = state.step(q1, k1, v1, None)
    for b, (_, k, v) in enumerate(prompts):
        visible = torch.zeros(HEADS, k.shape[1] + 1, dtype=torch.bool)
        for h, positions in enumerate(kept[b]):
            visible[h, [*positions, -1]] = True
        expected = attend_to(q1[b, :, 0], torch.cat([k, k1[b]], 1), torch.cat([v, v1[b]], 1), visible)
        torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)


@SHARES
@pytest.mark.parametrize("group", Group)
@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize(("window", "kernel", "kept"), [(1, 1, 0.1), (8, 5, 0.4), (32, 7, 0.7)])
def test_each_head_keeps_the_window_and_its_best(
    share: int, group: Group, pooling: Pooling, window: int, kernel: int, kept: float
) -> None:
    """Three lengths in one batch, whose left pads are NaN."""
    prompts = [prompt_of(n, share) for n in (70, 64, 87)]
    rule = {"window": window, "kernel": kernel, "pooling": pooling, "group": group}
    (state,) = states_of("snapkv", [prompts], kept, **rule)
    expected = [slow_kept(p, math.floor(kept * p[1].shape[1]), *rule.values()) for p in prompts]
    assert as_lists(state.kept()) == expected
    assert_attends_to(state, prompts, expected)


@SHARES
def test_a_budget_for_everything_keeps_everything(share: int) -> None:
    prompts = [prompt_of(n, share) for n in (40, 33)]
    for budget in (1.0, 40, 1000):
        (state,) = states_of("snapkv", [prompts], budget)
        everything = [[list(range(n))] * HEADS for n in (40, 33)]
        assert as_lists(state.kept()) == everything
        assert_attends_to(state, prompts, everything)


@pytest.mark.parametrize("capacity", [2, 20, 69])
def test_a_window_of_one_without_pooling_is_the_last_query_s_attention(capacity: int) -> None:
    prompts = [prompt_of(70, share=1)]
    (state,) = states_of("snapkv", [prompts], capacity, window=1, kernel=1)
    q, k, _ = prompts[0]
    for h, head in enumerate(as_lists(state.kept())[0]):
        logits = (k[h, :-1] @ q[h, -1]).tolist()
        assert head == [*best(logits, capacity - 1), 69]


def test_max_pooling_brings_the_neighbours_of_a_spike_before_lower_tokens_that_stand_alone() -> None:
    """A peak, and a lower one: seven of the first, then the seven of the second from their first on."""
    q, k, v = prompt_of(70)
    k = 0.001 * k
    k[:, 20] = q[::2, -1]
    k[:, 40] = 0.9 * q[::2, -1]
    rule = {"window": 1, "kernel": 7, "pooling": Pooling.max, "group": Group.max}
    for more in range(4):
        (state,) = states_of("snapkv", [[(q, k, v)]], 1 + 7 + more, **rule)
        expected = [*range(17, 24), *range(37, 37 + more), 69]
        assert as_lists(state.kept()) == [[expected] * HEADS]


@pytest.mark.parametrize("group", Group)
def test_the_order_of_a_group_s_query_heads_is_ignored(group: Group) -> None:
    q, k, v = prompt_of(70, share=4)
    shuffled = q[[2, 0, 3, 1, 5, 7, 6, 4]]
    (one,), (other,) = (states_of("snapkv", [[(x, k, v)]], 40, group=group) for x in (q, shuffled))
    assert as_lists(one.kept()) == as_lists(other.kept())


@pytest.mark.parametrize("pooling", Pooling)
@pytest.mark.parametrize(("window", "kernel"), [(32, 5), (16, 7)])
def test_with_a_query_head_for_each_kv_head_it_is_the_official_selection(
    pooling: Pooling, window: int, kernel: int
) -> None:
    """The official rule in torch, where every query head selects by itself; keys and values bit by bit."""
    q, k, v = prompt_of(200, share=1)
    votes = causal_attention(q, k)[:, -window:, :-window].sum(1)
    smooth = F.avg_pool1d if pooling is Pooling.avg else F.max_pool1d
    pooled = smooth(votes, kernel, stride=1, padding=kernel // 2)
    chosen = pooled.topk(60 - window, dim=-1).indices.sort(-1).values
    index = torch.cat([chosen, torch.arange(200 - window, 200).expand(HEADS, -1)], 1)
    rule = {"window": window, "kernel": kernel, "pooling": pooling}
    (state,) = states_of("snapkv", [[(q, k, v)]], 60, **rule)
    for h in range(HEADS):
        keys, values = state.store.read(h, 60)
        if pooling is Pooling.avg:  # which of a peak's equal neighbours topk takes is its own affair
            assert torch.equal(keys, k[h, index[h]])
            assert torch.equal(values, v[h, index[h]])
        worth = torch.cat([pooled[h], torch.full((window,), torch.inf)])
        kept = state.kept()[0][h]
        torch.testing.assert_close(worth[kept].sort().values, worth[index[h]].sort().values)


@pytest.mark.parametrize("through", ["generate", "Generator"])
def test_a_second_text_is_as_on_a_fresh_model(through: str) -> None:
    """Nothing of a longer prompt stays behind on the model."""

    def tokens(model: Any, ids: Tensor) -> list[int]:
        hyper = {"window": 4, "budget": 20}
        if through == "Generator":
            return Generator(model, "snapkv", **hyper).generate(ids, max_new_tokens=12).tokens[0].tolist()
        cache = KVCache(model, "snapkv", **hyper)
        out = model.generate(ids, past_key_values=cache, max_new_tokens=12, do_sample=False)
        return out[0, ids.shape[1] :].tolist()

    used, fresh = (tiny_models.tiny_model.__wrapped__() for _ in range(2))
    long, _ = tiny_models.prompts(1, 150, seed=1)
    short, _ = tiny_models.prompts(1, 60, seed=2)
    assert len(tokens(used, long)) == 12
    assert tokens(used, short) == tokens(fresh, short)


def test_defaults_are_those_of_the_official_models() -> None:
    method = make("snapkv")
    assert (method.window, method.kernel, method.pooling, method.group) == (32, 5, Pooling.avg, Group.mean)
    assert make("pyramidkv").beta == 20


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
@pytest.mark.parametrize("hyper", [{"window": 0}, {"kernel": 4}, {"kernel": 0}])
def test_bad_hyper_parameters_are_refused(name: str, hyper: dict[str, int]) -> None:
    ((key, value),) = hyper.items()
    with pytest.raises(ValueError, match=f"method.{key}={value} must be"):
        make(name, **hyper)


def test_choices_are_taken_by_name_too() -> None:
    """A name must not pass for another choice, as it would where choices are compared by identity."""
    named, chosen = (
        make("snapkv", pooling="max", group="max"),
        make("snapkv", pooling=Pooling.max, group=Group.max),
    )
    assert named == chosen
    prompts = [[prompt_of(70)]]
    for pooling, group in itertools.product(Pooling, Group):
        rule = {"window": 4, "kernel": 5, "pooling": pooling.value, "group": group.value}
        (state,) = states_of("snapkv", prompts, 30, **rule)
        assert as_lists(state.kept()) == [slow_kept(prompts[0][0], 30, 4, 5, pooling, group)]
    with pytest.raises(ValueError, match="unknown method.pooling 'mox'; did you mean 'max'"):
        make("snapkv", pooling="mox")
    with pytest.raises(ValueError, match="unknown method.group 'average'"):
        make("pyramidkv", group="average")


@pytest.mark.parametrize("name", ["snapkv", "pyramidkv"])
def test_a_budget_within_the_window_is_refused(name: str) -> None:
    method = make(name, window=8)
    with pytest.raises(ValueError, match="method.window=8 must be smaller than the budget.*kept_tokens=9"):
        method.layers(geometry(), Budget(kept_tokens=8), [70])
    method.layers(geometry(), Budget(kept_tokens=9), [70])
    method.layers(geometry(), Budget(kept_tokens=8), [8])

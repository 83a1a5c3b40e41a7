"""H2O against a slow reference: what is kept, which token goes at every step, and what it costs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache import Budget, Geometry, InfeasibleBudget, scoring
from hcache.attention.backends import BACKENDS
from hcache.contract.masked import attend_to, causal_attention
from hcache.methods.h2o import H2O, H2OLayer
from hcache.scoring import column_sums
from tests.operations import Operations
from tests.padding import Qkv, left_padded

DIM, HEADS = 16, 2
EMBEDDED = Geometry(layers=1, query_heads=8, kv_heads=4, head_dim=32)


def random_qkv(batch: int, tokens: int, seed: int, share: int = 2) -> Qkv:
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, HEADS * share, tokens, DIM, generator=generator)
    k, v = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return q, k, v


def prompt_of(tokens: int, share: int = 2) -> Qkv:
    q, k, v = random_qkv(1, tokens, seed=tokens, share=share)
    return q[0], k[0], v[0]


def layer_of(
    lengths: list[int], budget: float | int, share: int = 2, reserve: int = 64, **hyper: Any
) -> H2OLayer:
    shape = Geometry(layers=1, query_heads=HEADS * share, kv_heads=HEADS, head_dim=DIM)
    (state,) = H2O(**hyper).layers(shape, Budget.of(budget), lengths)
    assert isinstance(state, H2OLayer)
    state.backend, state.reserve_tokens = BACKENDS["sdpa"], reserve
    return state


@dataclass
class Token:
    """A stored token of one head, and the attention it has received."""

    position: int
    k: Tensor
    v: Tensor
    received: float


class Sequence:
    """H2O as it is written down, for one sequence: a list of tokens a head."""

    def __init__(self, prompt: Qkv, capacity: int, recent: int) -> None:
        q, k, v = prompt
        self.n = self.fed = k.shape[1]
        self.capacity, self.recent, self.share = capacity, recent, q.shape[0] // HEADS
        weights = causal_attention(q, k)
        self.heads = []
        for h in range(HEADS):
            sums = weights[h * self.share : (h + 1) * self.share].sum((0, 1)).tolist()
            tokens = [Token(i, k[h, i], v[h, i], sums[i]) for i in range(self.n)]
            self.heads.append(tokens if self.n <= capacity else self._best(tokens))

    def _best(self, tokens: list[Token]) -> list[Token]:
        older, latest = tokens[: self.n - self.recent], tokens[self.n - self.recent :]
        heavy = sorted(older, key=lambda token: -token.received)[: self.capacity - self.recent]
        return sorted(heavy, key=lambda token: token.position) + latest

    def feed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token (q [Hq, 1, D]) and evict; its output [Hq, D]."""
        outs = []
        for h, tokens in enumerate(self.heads):
            tokens.append(Token(self.fed, k[h, 0], v[h, 0], 0.0))
            keys, values = (torch.stack([getattr(token, part) for token in tokens]) for part in "kv")
            for query in q[h * self.share : (h + 1) * self.share, 0]:
                weights = (keys @ query / DIM**0.5).softmax(0)
                outs.append(weights @ values)
                for token, weight in zip(tokens, weights.tolist(), strict=True):
                    token.received += weight
            if len(tokens) > self.capacity:
                candidates = tokens[: len(tokens) - self.recent]
                tokens.remove(min(candidates, key=lambda token: token.received))
        self.fed += 1
        return torch.stack(outs)

    def kept(self) -> list[list[int]]:
        return [[token.position for token in head if token.position < self.n] for head in self.heads]


def held(state: H2OLayer, segment: int) -> tuple[Tensor, Tensor]:
    """Keys of a segment's tokens in text order, and what they have received."""
    count = int(state.count_S[segment])
    slots = state.store.offsets[segment] + state._order_SW[segment, :count].long()
    return state.store.keys[slots], state._sums_SW[segment, :count]


def assert_alike(state: H2OLayer, sequences: list[Sequence]) -> None:
    """The same tokens, with the same attention received."""
    for b, sequence in enumerate(sequences):
        assert [head.tolist() for head in state.kept()[b]] == sequence.kept()
        for h, tokens in enumerate(sequence.heads):
            keys, received = held(state, b * HEADS + h)
            assert torch.equal(keys, torch.stack([token.k for token in tokens]))
            torch.testing.assert_close(received, torch.tensor([token.received for token in tokens]))


SETTINGS: list[tuple[dict[str, Any], float | int, list[int]]] = [
    ({}, 32, [16, 16, 16]),
    ({}, 0.3, [11, 20, 4]),
    ({"heavy": 7}, 32, [25, 25, 25]),
    ({"heavy": 0.3}, 32, [23, 23, 23]),
    ({"recent": 5}, 0.5, [5, 5, 5]),
    ({"recent": 0.25}, 0.5, [8, 16, 3]),
    ({"heavy": 20, "recent": 12}, 32, [12, 12, 12]),
    ({"heavy": 0.5, "recent": 0.5}, 0.5, [17, 32, 7]),
    ({"recent": 0}, 24, [0, 0, 0]),
]
"""Settings, budget, and how many recent tokens they leave sequences of 70, 131 and 28 tokens."""


def compare(
    lengths: list[int], budget: float | int, latest: list[int], steps: int, share: int = 2, **hyper: Any
) -> None:
    """A batch against the slow reference, step by step; some steps bring no token."""
    prompts = [prompt_of(n, share) for n in lengths]
    capacities = [Budget.of(budget).tokens(n) for n in lengths]
    sequences = [Sequence(*given) for given in zip(prompts, capacities, latest, strict=True)]
    state = layer_of(lengths, budget, share, reserve=3, **hyper)
    state.prefill(*left_padded(prompts))
    assert_alike(state, sequences)
    for t in range(steps):
        token = random_qkv(len(lengths), 1, seed=1000 + t, share=share)
        real = torch.tensor([[t % 3 > 0], [True], [t % 5 > 0]])[: len(lengths)]
        for x in token:
            x[~real[:, 0]] = torch.nan
        out = state.step(*token, real)
        for b in real[:, 0].nonzero()[:, 0].tolist():
            expected = sequences[b].feed(*(x[b] for x in token))
            torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)
        assert_alike(state, sequences)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize(("hyper", "budget", "recent"), SETTINGS)
def test_every_step_is_that_of_the_slow_reference(
    hyper: dict[str, Any], budget: float | int, recent: list[int], share: int
) -> None:
    """Sequences of different lengths in one batch, one of them still growing."""
    compare([70, 131, 28], budget, recent, steps=25, share=share, **hyper)


@pytest.mark.parametrize("lengths", [[28], [28, 150]])
def test_a_head_that_grows_has_sums_of_its_own(lengths: list[int]) -> None:
    """Past the tables it began with, and past the slots of its neighbour in the store."""
    compare(lengths, 80, [40] * len(lengths), steps=90)


def test_several_tokens_at_once_are_steps_one_by_one() -> None:
    prompt, more = random_qkv(1, 60, seed=1), random_qkv(1, 9, seed=2)
    sequence = Sequence((prompt[0][0], prompt[1][0], prompt[2][0]), 20, 10)
    state = layer_of([60], 20)
    state.prefill(*prompt, None)
    out = state.extend(*more, None)
    for t in range(9):
        expected = sequence.feed(*(x[0, :, t : t + 1] for x in more))
        torch.testing.assert_close(out[0, :, t], expected, rtol=1e-4, atol=1e-5)
    assert_alike(state, [sequence])


@pytest.mark.parametrize("share", [1, 2, 4])
def test_the_prompt_receives_as_much_attention_as_it_has_queries(share: int) -> None:
    state = layer_of([50], 80, share)
    state.prefill(*random_qkv(1, 50, seed=3, share=share), None)
    torch.testing.assert_close(state._sums_SW.sum(1), torch.full((HEADS,), 50.0 * share))


@pytest.mark.parametrize(("n", "capacity"), [(60, 20), (10, 20)])
def test_the_size_stays_and_the_latest_tokens_with_it(n: int, capacity: int) -> None:
    state = layer_of([n], capacity, recent=6)
    prompt = random_qkv(1, n, seed=4)
    state.prefill(*prompt, None)
    latest = prompt[1][0, 0, -6:]
    before = state.kept()[0]
    for t in range(3 * capacity):
        token = random_qkv(1, 1, seed=100 + t)
        state.step(*token, None)
        latest = torch.cat([latest[1:], token[1][0, 0]])
        assert state.count_S.tolist() == [min(n + t + 1, capacity)] * HEADS
        assert torch.equal(held(state, 0)[0][-6:], latest)
        assert state.nbytes()["device"]["payload"] == min(n + t + 1, capacity) * HEADS * 2 * DIM * 4
        after = state.kept()[0]
        gone = [set(old.tolist()) - set(new.tolist()) for old, new in zip(before, after, strict=True)]
        assert all(len(head) <= 1 for head in gone)
        assert all(set(new.tolist()) <= set(old.tolist()) for old, new in zip(before, after, strict=True))
        before = after


def test_without_heavy_hitters_it_is_a_sliding_window() -> None:
    state = layer_of([40], 15, heavy=0)
    state.prefill(*random_qkv(1, 40, seed=5), None)
    for t in range(20):
        assert state.kept()[0][0].tolist() == list(range(25 + t, 40))
        state.step(*random_qkv(1, 1, seed=200 + t), None)


@pytest.mark.parametrize("recent", [None, 3, 0.5])
def test_as_long_as_everything_fits_it_is_full_attention(recent: int | float | None) -> None:
    q, k, v = random_qkv(1, 30, seed=6)
    state = layer_of([30], 50, reserve=2, recent=recent)
    state.prefill(q, k, v, None)
    for t in range(20):
        q1, k1, v1 = random_qkv(1, 1, seed=300 + t)
        k, v = torch.cat([k, k1], 2), torch.cat([v, v1], 2)
        out = state.step(q1, k1, v1, None)
        everything = torch.ones(HEADS, k.shape[2], dtype=torch.bool)
        expected = attend_to(q1[0, :, 0], k[0], v[0], everything)
        torch.testing.assert_close(out[0, :, 0], expected, rtol=1e-4, atol=1e-5)
    assert state.kept()[0][1].tolist() == list(range(30))
    state.step(*random_qkv(1, 1, seed=400), None)
    assert state.count_S.tolist() == [50] * HEADS


@pytest.mark.parametrize("heavy", [1, 5])
def test_a_token_that_all_rows_attend_to_stays(heavy: int) -> None:
    """For as long as it is attended to."""
    direction = torch.ones(DIM)
    q, k, v = random_qkv(1, 80, seed=7)
    q, k = q + 2 * direction, k - k.mean(-1, keepdim=True)
    k[0, :, 23] = 2 * direction
    state = layer_of([80], 10, heavy=heavy)
    state.prefill(q, k, v, None)
    for t in range(30):
        q1, k1, v1 = random_qkv(1, 1, seed=500 + t)
        state.step(q1 + 2 * direction, k1 - k1.mean(-1, keepdim=True), v1, None)
        assert all(23 in head for head in state.kept()[0])


# Column sums


@pytest.mark.parametrize("scratch", [1, 300, 2**22])
@pytest.mark.parametrize("share", [1, 2, 4])
def test_column_sums_in_blocks_are_those_of_masked_softmax(
    share: int, scratch: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One row at a time, a few, or all at once; the sum of what each query head of a group gives."""
    monkeypatch.setattr(scoring, "SCRATCH_NUMBERS", scratch)
    q, k, _ = prompt_of(90, share)
    each = causal_attention(q, k).sum(1)
    expected = torch.stack([each[h * share : (h + 1) * share].sum(0) for h in range(HEADS)])
    torch.testing.assert_close(column_sums(q, k), expected, rtol=1e-4, atol=1e-4)


def test_a_later_token_changes_nothing_of_what_earlier_rows_give(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scoring, "SCRATCH_NUMBERS", 1000)
    q, k, _ = prompt_of(70)
    changed_q, changed_k = q.clone(), k.clone()
    changed_q[:, 40:] += 3.0
    changed_k[:, 40:] -= 3.0
    from_later = [causal_attention(*pair)[:, 40:].sum(1) for pair in ((q, k), (changed_q, changed_k))]
    later, changed = (rows.unflatten(0, (HEADS, -1)).sum(1) for rows in from_later)
    from_earlier = column_sums(q[:, :40], k[:, :40])
    for sums, rest in ((column_sums(q, k), later), (column_sums(changed_q, changed_k), changed)):
        torch.testing.assert_close((sums - rest)[:, :40], from_earlier, rtol=1e-4, atol=1e-4)


# Bytes, memory, shapes


@pytest.mark.parametrize("n", [8192, pytest.param(32768, marks=pytest.mark.slow)])
def test_a_long_prompt_takes_what_is_planned_and_little_scratch(n: int) -> None:
    method, budget = H2O(), Budget(kept_fraction=0.25)
    (state,) = method.layers(EMBEDDED, budget, [n])
    state.backend = BACKENDS["sdpa"]
    q, k, v = (torch.randn(1, heads, n, 32) for heads in (8, 4, 4))
    with Operations() as operations:
        state.prefill(q, k, v, None)
    device = state.nbytes()["device"]
    plan = method.usage(EMBEDDED, budget, n, number_bytes=4)
    assert device["payload"] + device["metadata"] == pytest.approx(plan.device_bytes, rel=0.01)
    assert device["payload"] == n // 4 * 4 * 2 * 32 * 4
    assert sum(device.values()) <= operations.peak_bytes <= sum(device.values()) + 64 * 2**20


def test_every_tensor_of_the_state_is_counted() -> None:
    state = layer_of([500, 300], 0.5)
    state.prefill(*left_padded([prompt_of(n) for n in (500, 300)]))
    state.step(*random_qkv(2, 1, seed=8), None)
    tensors = [x for part in (state, state.store) for x in vars(part).values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(state.nbytes()["device"].values()) == sum(storages.values())


def test_a_step_has_fixed_shapes_and_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [60, 93]
    state = layer_of(lengths, 0.5)
    state.prefill(*left_padded([prompt_of(n) for n in lengths]))
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, None)
    traces, fixed = [], {name: x.data_ptr() for name, x in vars(state).items() if isinstance(x, Tensor)}
    for t in range(6):
        token, real = random_qkv(2, 1, seed=t), torch.tensor([[True], [t % 2 == 0]])
        with Operations() as operations:
            state.step(*token, real)
        assert not operations.synchronised()
        traces.append(operations.trace)
    assert all(trace == traces[0] for trace in traces)
    assert fixed == {name: x.data_ptr() for name, x in vars(state).items() if isinstance(x, Tensor)}


# Settings


@pytest.mark.parametrize("hyper", [{"heavy": -1}, {"recent": 1.5}, {"heavy": -0.1}])
def test_bad_parts_are_refused(hyper: dict[str, Any]) -> None:
    ((key, value),) = hyper.items()
    with pytest.raises(ValueError, match=f"method.{key}={value} must be a number of tokens"):
        H2O(**hyper)


@pytest.mark.parametrize("n", [20, 100])
@pytest.mark.parametrize("hyper", [{"heavy": 8, "recent": 8}, {"heavy": 0.5, "recent": 0.25}])
def test_parts_that_are_not_the_budget_are_refused(hyper: dict[str, Any], n: int) -> None:
    """However long the prompt is."""
    with pytest.raises(ValueError, match="the budget is 32; leave one of them null"):
        layer_of([n], 32, **hyper)


def test_the_smallest_budget_holds_the_fixed_parts() -> None:
    with pytest.raises(InfeasibleBudget, match="method.recent=20 must fit in it") as caught:
        layer_of([100], 19, recent=20)
    assert caught.value.smallest_tokens == 20
    layer_of([100], 20, recent=20)

"""The kernels of methods that evict while decoding: against loops, and against the same steps in plain torch.

pytest -m gpu tests/test_evict.py                        # on a CUDA device
TRITON_INTERPRET=1 pytest -m gpu tests/test_evict.py     # without; Triton must be installed
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache import Budget, Geometry
from hcache.attention.backends import Ragged, SdpaBackend
from hcache.methods import eviction, make, streaming_llm
from hcache.methods.eviction import ConstantLayer, RankedLayer
from hcache.methods.h2o import H2OLayer
from tests.on_kernels import kernel_device
from tests.padding import Qkv, left_padded

pytestmark = pytest.mark.gpu

DIM, HEADS, SHARE, TILE = 16, 2, 3, 16


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> str:
    device = kernel_device(monkeypatch)
    from hcache.kernels import evict

    monkeypatch.setattr(evict, "TILE", TILE)
    return device


# Against loops


@dataclass
class Segment:
    """One segment after a put: slots in text order, the newest token's last, and what is known of each."""

    order: list[int]
    weights: list[list[float]]
    sums: list[float]
    capacity: int
    protected: int
    prompt: int

    @classmethod
    def make(cls, tokens: int, capacity: int, protected: int, group: int, seed: int) -> Segment:
        """Weights are 0 or 1, so that there are many equals and every sum is exact."""
        generator = torch.Generator().manual_seed(seed)
        order = torch.randperm(tokens, generator=generator).tolist()
        weights = torch.randint(0, 2, (tokens, group), generator=generator).float().tolist()
        sums = torch.randint(0, 3, (tokens,), generator=generator).float().tolist()
        return cls(order, weights, [*sums[:-1], 0.0], capacity, protected, prompt=tokens // 2)

    def scores(self, largest: bool, mean: bool, kernel: int, highest: bool, summed: bool) -> list[float]:
        """Of each place; weights are those of slots."""
        rows = [self.weights[slot] for slot in self.order]
        joined = [max(row) if largest else sum(row) / (len(row) if mean else 1) for row in rows]
        if summed:
            return [a + b for a, b in zip(self.sums, joined, strict=True)]
        before = max(0, len(rows) - self.protected)
        prefix = [*joined[:before], *[0.0] * (len(rows) - before)]
        near = [prefix[max(0, i - kernel // 2) : i + kernel // 2 + 1] for i in range(len(rows))]
        return [max(some) if highest else sum(some) / kernel for some in near]

    def take_out(self, scores: list[float], summed: bool) -> None:
        if summed:
            self.sums = list(scores)
        if len(self.order) <= self.capacity:
            return
        before = max(1, len(self.order) - self.protected)
        victim = scores.index(min(scores[:before]))
        self.order.append(self.order.pop(victim))
        self.sums.pop(victim)
        self.sums.append(0.0)
        self.prompt -= victim < self.prompt


SEGMENTS = [(33, 32, 5), (33, 32, 0), (17, 16, 40), (9, 12, 3), (48, 47, 16), (1, 5, 2), (64, 63, 1)]
"""Tokens, capacity and protected of segments; some end at the end of a tile, one at the table's."""


def check_evict(
    device: str, group: int, real: list[bool] | None, seed: int, summed: bool = False, **judging: Any
) -> None:
    from hcache.kernels.evict import Judging, evict

    mean = judging.pop("mean", False)
    segments = [Segment.make(*sizes, group, seed + i) for i, sizes in enumerate(SEGMENTS)]
    width, count = max(len(one.order) for one in segments), len(segments)
    logits = torch.full((count * width, group), torch.nan)
    order, sums = torch.zeros(count, width, dtype=torch.int32), torch.zeros(count, width)
    for s, one in enumerate(segments):
        rest = range(len(one.order), width)
        order[s] = torch.tensor([*one.order, *rest])
        sums[s, : len(one.order)] = torch.tensor(one.sums)
        logits[s * width : s * width + len(one.order)] = torch.tensor(one.weights).log()
    lengths, capacity, protected, prompt = (
        torch.tensor(numbers, dtype=torch.int32, device=device)
        for numbers in (
            [len(one.order) for one in segments],
            *([getattr(one, name) for one in segments] for name in ("capacity", "protected", "prompt")),
        )
    )
    there, received = order.to(device), sums.to(device)
    evict(
        logits.to(device), torch.zeros(count, group, device=device),
        width * torch.arange(count, device=device), lengths, there, capacity, protected, prompt,
        Judging(divisor=group if mean else 1, **judging), received if summed else None,
        None if real is None else torch.tensor(real, device=device),
    )  # fmt: skip
    settings = {"largest": False, "kernel": 1, "highest": False, **judging}
    for s, one in enumerate(segments):
        if real is None or real[s]:
            one.take_out(one.scores(mean=mean, summed=summed, **settings), summed)
        assert there[s].tolist() == [*one.order, *range(len(one.order), width)]
        assert prompt[s] == one.prompt
        if summed:
            assert received[s].tolist() == [*one.sums, *[0.0] * (width - len(one.order))]


REAL = [None, [True, False, True, True, True, False, True]]


@pytest.mark.parametrize("real", REAL)
@pytest.mark.parametrize("group", [1, 3])
def test_sums_and_their_victims(device: str, group: int, real: list[bool] | None) -> None:
    for seed in range(5):
        check_evict(device, group, real, 10 * seed, summed=True)


JUDGINGS: list[dict[str, Any]] = [
    {"kernel": 5},
    {"mean": True, "kernel": 1},
    {"largest": True, "kernel": 7},
    {"largest": True, "kernel": 3, "highest": True},
    {"mean": True, "kernel": 5, "highest": True},
]


@pytest.mark.parametrize("judging", JUDGINGS, ids=str)
@pytest.mark.parametrize("group", [1, 4])
def test_pooled_scores_and_their_victims(device: str, group: int, judging: dict[str, Any]) -> None:
    """Equals go from the front; pooling looks over the edges of tiles."""
    for seed in range(4):
        check_evict(device, group, REAL[seed % 2], 10 * seed, **judging)


# Against plain torch


class Undefined(SdpaBackend):
    """Logits beyond the limits may be anything."""

    def decode_scored(self, q: Tensor, ragged: Ragged, limits_S1: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        out, logits, totals_SG = super().decode_scored(q, ragged, limits_S1)
        return out, logits.masked_fill(logits == -torch.inf, torch.nan), totals_SG


def random_qkv(batch: int, tokens: int, seed: int, layer: int = 0) -> Qkv:
    generator = torch.Generator().manual_seed(seed)
    q = (0.6 + layer) * torch.randn(batch, HEADS * SHARE, tokens, DIM, generator=generator)
    k, v = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return q, k, v


def prompts_of(lengths: list[int], layer: int) -> list[Qkv]:
    return [tuple(x[0] for x in random_qkv(1, n, 10 * n + layer, layer)) for n in lengths]  # type: ignore[misc]


def states_of(name: str, budget: float | int, lengths: list[int], device: str, **hyper: Any) -> list:
    """Filled states of two layers."""
    shape = Geometry(layers=2, query_heads=HEADS * SHARE, kv_heads=HEADS, head_dim=DIM)
    states = make(name, **hyper).layers(shape, Budget.of(budget), lengths)
    for layer, state in enumerate(states):
        assert isinstance(state, ConstantLayer)
        state.backend, state.reserve_tokens = Undefined(), 3
        state.prefill(*(x.to(device) for x in left_padded(prompts_of(lengths, layer))))
    return states


METHODS: list[tuple[str, dict[str, Any]]] = [
    ("h2o", {}),
    ("h2o", {"heavy": 0}),
    ("cake", {"window": 6}),
    ("cake", {"window": 2, "group": "max", "pooling": "max", "kernel": 7}),
    ("cake", {"window": 4, "group": "sum", "kernel": 1}),
    ("streaming_llm", {}),
    ("streaming_llm", {"sinks": 0}),
    ("streaming_llm", {"sinks": 40}),
]


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("budget", [60, 0.5])
@pytest.mark.parametrize(("name", "hyper"), METHODS, ids=str)
def test_steps_by_kernels_are_those_of_plain_torch(
    name: str,
    hyper: dict[str, Any],
    budget: float | int,
    padded: bool,
    device: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Heads that grow, fill up and evict, in the first of two layers; outputs, order, counts and sums."""
    lengths, kernels = [70, 131, 50], [False]
    if hyper.get("sinks") == 40:
        budget = 60
    for module in (eviction, streaming_llm):
        monkeypatch.setattr(module, "fused", lambda x: kernels[0])
    state, other = (states_of(name, budget, lengths, where, **hyper)[0] for where in ("cpu", device))
    for t in range(14):
        real = torch.tensor([[t % 3 > 0], [True], [t % 5 > 0]]) if padded else None
        token = random_qkv(3, 1, 1000 + t)
        if real is not None:
            for x in token:
                x[~real[:, 0]] = torch.nan
        kernels[0] = False
        expected = state.step(*token, real)
        kernels[0] = True
        out = other.step(*(x.to(device) for x in token), None if real is None else real.to(device))
        rows = slice(None) if real is None else real[:, 0]
        torch.testing.assert_close(out.cpu()[rows], expected[rows], rtol=1e-4, atol=1e-5)
        assert_same(state, other)


def assert_same(state: ConstantLayer, other: ConstantLayer) -> None:
    assert torch.equal(state.store.lengths, other.store.lengths.cpu())
    assert torch.equal(state.store.keys, other.store.keys.cpu())
    assert torch.equal(state.store.values, other.store.values.cpu())
    for ours, theirs in zip(state.kept(), other.kept(), strict=True):
        assert [head.tolist() for head in ours] == [head.tolist() for head in theirs]
    assert state.nbytes() == other.nbytes()
    if isinstance(state, RankedLayer):
        # Behind a full head's free slot there is nothing that is ever looked at.
        for count, order, same in zip(state.count_S, state._order_SW, other._order_SW.cpu(), strict=True):
            assert torch.equal(order[: count + 1], same[: count + 1])
    if isinstance(state, H2OLayer):
        torch.testing.assert_close(state._sums_SW, other._sums_SW.cpu())

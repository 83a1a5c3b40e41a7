"""CAKE against a slow reference: indicators, layers' shares, the cascade, evictions, and what it costs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from hcache import Budget, Geometry
from hcache.allocation import Preference
from hcache.attention.backends import BACKENDS
from hcache.contract.masked import attend_to, causal_attention
from hcache.methods import make
from hcache.methods.cake import Cake, CakeLayer
from hcache.scoring import Group, Pooling
from tests.operations import Operations
from tests.padding import Qkv, left_padded

DIM, HEADS, LAYERS = 16, 2, 4
EMBEDDED = Geometry(layers=6, query_heads=8, kv_heads=4, head_dim=32)


def geometry(share: int = 2, layers: int = LAYERS) -> Geometry:
    return Geometry(layers=layers, query_heads=HEADS * share, kv_heads=HEADS, head_dim=DIM)


def random_qkv(batch: int, tokens: int, seed: int, share: int = 2, sharpness: float = 2.0) -> Qkv:
    generator = torch.Generator().manual_seed(seed)
    q = sharpness * torch.randn(batch, HEADS * share, tokens, DIM, generator=generator)
    k, v = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return q, k, v


def prompt_of(tokens: int, layer: int, share: int = 2) -> Qkv:
    """A layer's prompt; layers attend more and less sharply, so that their preferences differ."""
    q, k, v = random_qkv(1, tokens, 10 * tokens + layer, share, sharpness=0.4 + 0.6 * (layer * 3 % LAYERS))
    return q[0], k[0], v[0]


def states_of(shape: Geometry, budget: float | int, lengths: list[int], **hyper: Any) -> list[CakeLayer]:
    states = []
    for state in Cake(**{"window": 6, **hyper}).layers(shape, Budget.of(budget), lengths):
        assert isinstance(state, CakeLayer)
        state.backend, state.reserve_tokens = BACKENDS["sdpa"], 3
        states.append(state)
    return states


def pooled(scores: list[float], kernel: int, pooling: Pooling) -> list[float]:
    around = [scores[max(0, i - kernel // 2) : i + kernel // 2 + 1] for i in range(len(scores))]
    return [max(near) if pooling is Pooling.max else sum(near) / kernel for near in around]


def joined(rows: list[list[float]], group: Group) -> list[float]:
    """The query heads of one KV head as one score a token."""
    columns = list(zip(*rows, strict=True))
    if group is Group.max:
        return [max(column) for column in columns]
    return [sum(column) / (len(rows) if group is Group.mean else 1) for column in columns]


def preference_of(prompt: Qkv, rule: Cake) -> float:
    q, k, _ = prompt
    prefix = causal_attention(q.double(), k.double())[:, -rule.window :, : -rule.window]
    entropy = -(prefix * (prefix + 1e-10).log()).sum()
    return float(entropy ** (1 / rule.tau1) * prefix.var(1).sum() ** (1 / rule.tau2))


def shares_of(preferences: list[float], total: int, room: int) -> list[int]:
    """min(room, level * P) for the level at which they add up, found by halving; the largest remainders."""
    low, high = 0.0, total / min(preferences)
    for _ in range(200):
        level = (low + high) / 2
        shares = [min(room, level * preference) for preference in preferences]
        low, high = (level, high) if sum(shares) < total else (low, level)
    whole = [int(share) for share in shares]
    for i in sorted(range(len(shares)), key=lambda i: whole[i] - shares[i])[: total - sum(whole)]:
        whole[i] += 1
    return whole


class Sequence:
    """CAKE as it is written down, for one sequence in one layer; the layer's share is known beforehand."""

    def __init__(self, prompt: Qkv, share: int, capacity: int, rule: Cake) -> None:
        self.k, self.v = ([list(head) for head in x] for x in prompt[1:])
        self.rule, self.n, self.capacity = rule, prompt[1].shape[1], capacity
        self.group = prompt[0].shape[0] // HEADS
        self.positions = [list(range(self.n)) for _ in range(HEADS)]
        if self.n > capacity:
            self.capacity = share + rule.window
            for h, scores in enumerate(self._indicators(prompt)):
                best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:share]
                self._keep(h, [*sorted(best), *range(self.n - rule.window, self.n)])

    def _indicators(self, prompt: Qkv) -> list[list[float]]:
        rule, attention = self.rule, causal_attention(prompt[0], prompt[1])
        rows = attention[:, -rule.window :, : -rule.window].double()
        each = (rows.mean(1) + rule.gamma * rows.var(1)).unflatten(0, (HEADS, -1)).tolist()
        return [pooled(joined(head, rule.group), rule.kernel, rule.pooling) for head in each]

    def _keep(self, head: int, at: list[int]) -> None:
        for part in (self.k, self.v, self.positions):
            part[head] = [part[head][i] for i in at]

    def feed(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Append one token (q [Hq, 1, D]) and evict; its output [Hq, D]."""
        outs, rule = [], self.rule
        for h in range(HEADS):
            self.k[h].append(k[h, 0])
            self.v[h].append(v[h, 0])
            self.positions[h].append(self.n)  # or later: no position of the prompt
            queries = q[h * self.group : (h + 1) * self.group, 0]
            weights = (queries @ torch.stack(self.k[h]).T / DIM**0.5).softmax(-1)
            outs.append(weights @ torch.stack(self.v[h]))
            if len(self.k[h]) > self.capacity:
                prefix = weights[:, : -rule.window].tolist()
                scores = pooled(joined(prefix, rule.group), rule.kernel, rule.pooling)
                gone = scores.index(min(scores))
                self._keep(h, [i for i in range(len(self.k[h])) if i != gone])
        return torch.cat(outs)

    def kept(self) -> list[list[int]]:
        return [[position for position in head if position < self.n] for head in self.positions]


def reference(prompts: list[list[Qkv]], budget: Budget, rule: Cake) -> list[list[Sequence]]:
    """[layer][sequence], every layer cut once, with the final shares."""
    layers: list[list[Sequence]] = [[] for _ in prompts]
    for b, first in enumerate(prompts[0]):
        n = first[1].shape[1]
        average = budget.tokens(n)
        preferences = [preference_of(layer[b], rule) for layer in prompts]
        total, room = (average - rule.window) * len(prompts), n - rule.window
        shares = shares_of(preferences, total, room) if average < n else [0] * len(prompts)
        for layer, share, sequences in zip(prompts, shares, layers, strict=True):
            sequences.append(Sequence(layer[b], share, average, rule))
    return layers


def keys_of(state: CakeLayer, segment: int) -> Tensor:
    """Keys of a segment's tokens in text order."""
    slots = state._order_SW[segment, : int(state.count_S[segment])].long()
    return state.store.keys[state.store.offsets[segment] + slots]


def assert_alike(state: CakeLayer, sequences: list[Sequence]) -> None:
    for b, sequence in enumerate(sequences):
        assert [head.tolist() for head in state.kept()[b]] == sequence.kept()
        for h, keys in enumerate(sequence.k):
            assert torch.equal(keys_of(state, b * HEADS + h), torch.stack(keys))


HYPER: list[dict[str, Any]] = [
    {},
    {"gamma": 0.0, "window": 10},
    {"gamma": 5.0, "tau1": 1.6, "tau2": 0.4, "kernel": 1},
    {"tau1": 0.4, "tau2": 0.6, "group": Group.max, "kernel": 7},
    {"group": Group.max, "pooling": Pooling.max, "kernel": 3},
    {"group": Group.mean, "pooling": Pooling.max},
    {"group": Group.sum, "window": 2},
]


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("budget", [32, 0.5])
@pytest.mark.parametrize("hyper", HYPER, ids=str)
def test_every_step_is_that_of_the_slow_reference(
    hyper: dict[str, Any], budget: float | int, share: int
) -> None:
    """The cascade ends where cutting once does; then one token a step goes from heads that are full."""
    lengths, shape = [70, 111, 28], geometry(share)
    prompts = [[prompt_of(n, layer, share) for n in lengths] for layer in range(LAYERS)]
    states = states_of(shape, budget, lengths, **hyper)
    for state, layer in zip(states, prompts, strict=True):
        state.prefill(*left_padded(layer))
    layers = reference(prompts, Budget.of(budget), Cake(**{"window": 6, **hyper}))
    for state, sequences in zip(states, layers, strict=True):
        assert_alike(state, sequences)
    assert len({tuple(state._counts) for state in states}) > 1
    for t in range(10):
        real = torch.tensor([[t % 3 > 0], [True], [t % 5 > 0]])
        for i, state in enumerate(states[:2]):
            token = random_qkv(3, 1, seed=1000 + 10 * t + i, share=share)
            for x in token:
                x[~real[:, 0]] = torch.nan
            out = state.step(*token, real)
            for b in real[:, 0].nonzero()[:, 0].tolist():
                expected = layers[i][b].feed(*(x[b] for x in token))
                torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)
            assert_alike(state, layers[i])


def filled(shape: Geometry, budget: float | int, n: int, same: bool = False, **hyper: Any) -> list[CakeLayer]:
    """States after one prompt, the same in all layers if asked."""
    states = states_of(shape, budget, [n], **hyper)
    for i, state in enumerate(states):
        q, k, v = prompt_of(n, 0 if same else i)
        state.prefill(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), None)
    return states


@pytest.mark.parametrize("n", [40, 100, 117])
@pytest.mark.parametrize("budget", [7, 23, 39])
def test_layers_share_the_budget_exactly(budget: int, n: int) -> None:
    window = 6
    states = filled(geometry(), budget, n, window=window)
    sizes = [[head.numel() for head in state.kept()[0]] for state in states]
    assert all(min(heads) == max(heads) for heads in sizes)
    assert sum(heads[0] for heads in sizes) == budget * LAYERS
    assert all(window <= heads[0] <= n for heads in sizes)
    latest = list(range(n - window, n))
    assert all(head.tolist()[-window:] == latest for state in states for head in state.kept()[0])


def test_equal_layers_get_equal_shares() -> None:
    states = filled(geometry(), 23, 100, same=True)
    assert [head.numel() for state in states for head in state.kept()[0]] == [23] * LAYERS * HEADS


@pytest.mark.parametrize("budget", [12, 30])
def test_after_every_layer_no_more_than_the_budget_is_stored(budget: int) -> None:
    """Up to one token a layer for rounding; no layer grows back."""
    n, window = 100, 6
    states = states_of(geometry(), budget, [n], window=window)
    sizes: list[int] = []
    for m, state in enumerate(states, 1):
        q, k, v = prompt_of(n, m - 1)
        state.prefill(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), None)
        before, sizes = sizes, [int(earlier.store.lengths[0]) for earlier in states[:m]]
        assert sum(sizes) <= (budget - window) * LAYERS + m * window + m
        assert all(now <= then for now, then in zip(sizes, before, strict=False))
    assert sum(sizes) == budget * LAYERS


@pytest.mark.parametrize("budget", [60, 50])
def test_as_long_as_everything_fits_it_is_full_attention(budget: int) -> None:
    """And the first token that doesn't fit makes one go."""
    n, prompts = 50, [prompt_of(50, i) for i in range(LAYERS)]
    states = filled(geometry(), budget, n)
    for t in range(budget - n + 1):
        for i, state in enumerate(states):
            q1, k1, v1 = random_qkv(1, 1, seed=10 * t + i)
            q, k, v = prompts[i]
            k, v = torch.cat([k, k1[0]], 1), torch.cat([v, v1[0]], 1)
            prompts[i] = (q, k, v)
            out = state.step(q1, k1, v1, None)
            everything = torch.ones(HEADS, k.shape[1], dtype=torch.bool)
            expected = attend_to(q1[0, :, 0], k, v, everything)
            torch.testing.assert_close(out[0, :, 0], expected, rtol=1e-4, atol=1e-5)
    assert all(state.count_S.tolist() == [budget] * HEADS for state in states)


def test_a_budget_within_the_window_slides() -> None:
    """A short prompt may grow up to a budget that is smaller than the window: then the oldest goes."""
    states = filled(geometry(layers=1), 12, 8, window=20)
    for t in range(9):
        states[0].step(*random_qkv(1, 1, seed=t), None)
    assert [head.tolist() for head in states[0].kept()[0]] == [[5, 6, 7]] * HEADS


@pytest.mark.parametrize("pooling", list(Pooling))
def test_without_variance_the_ranking_is_snapkvs(pooling: Pooling) -> None:
    n, hyper = 100, {"window": 6, "pooling": pooling}
    allocation = {"name": "preference", "window": 6}
    others = make("snapkv", allocation=allocation, **hyper).layers(geometry(), Budget(kept_tokens=20), [n])
    states = filled(geometry(), 20, n, gamma=0.0, **hyper)
    for i, other in enumerate(others):
        q, k, v = prompt_of(n, i)
        other.backend = BACKENDS["sdpa"]
        other.prefill(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), None)
    for state, other in zip(states, others, strict=True):
        assert [x.tolist() for x in state.kept()[0]] == [x.tolist() for x in other.kept()[0]]


def test_where_attention_does_not_change_there_is_no_preference() -> None:
    """All rows alike: no variance, shares are even, and gamma ranks nothing."""
    q, k, _ = prompt_of(80, 0)
    q[:] = 1.0
    k[:, -6:] = -100.0
    assert Preference(window=6).preference(q, k) == -torch.inf
    kept = []
    for gamma in (0.0, 200.0):
        states = states_of(geometry(), 20, [80], gamma=gamma)
        for state in states:
            state.prefill(q.unsqueeze(0), k.unsqueeze(0), k.unsqueeze(0), None)
        kept.append([head.tolist() for state in states for head in state.kept()[0]])
    assert kept[0] == kept[1]
    assert [len(head) for head in kept[0]] == [20] * LAYERS * HEADS


def test_the_size_stays_while_decoding() -> None:
    states = filled(geometry(), 20, 100)
    sizes = [state.count_S.tolist() for state in states]
    payloads = [state.nbytes()["device"]["payload"] for state in states]
    assert sum(payloads) == 20 * LAYERS * HEADS * 2 * DIM * 4
    for t in range(60):
        for i, state in enumerate(states):
            state.step(*random_qkv(1, 1, seed=10 * t + i), None)
            assert state.count_S.tolist() == sizes[i]
            assert state.nbytes()["device"]["payload"] == payloads[i]


# Bytes, memory, shapes


@pytest.mark.parametrize("n", [8192, 32768])
def test_a_long_prompt_takes_what_is_planned_and_little_scratch(n: int) -> None:
    """Layer by layer: beside what came in, never more than the budget and some scratch."""
    method, budget = Cake(), Budget(kept_fraction=0.25)
    states = method.layers(EMBEDDED, budget, [n])
    operations = Operations()
    plan = method.usage(EMBEDDED, budget, n, number_bytes=4)
    for i, state in enumerate(states):
        q, k, v = (torch.randn(1, heads, n, 32) for heads in (8, 4, 4))
        q *= 1 + i % 3
        state.backend = BACKENDS["sdpa"]
        with operations:
            state.prefill(q, k, v, None)
    devices = [state.nbytes()["device"] for state in states]
    measured = sum(device["payload"] + device["metadata"] for device in devices)
    assert measured == pytest.approx(plan.device_bytes, rel=0.01)
    assert sum(device["payload"] for device in devices) == 6 * n // 4 * 4 * 2 * 32 * 4
    everything = sum(sum(device.values()) for device in devices)
    # 34 MiB for the longer one: a few copies of one head's window attention.
    assert everything <= operations.peak_bytes <= everything + 40 * 2**20


def test_every_tensor_of_the_state_is_counted() -> None:
    state = filled(geometry(), 0.5, 300)[1]
    state.step(*random_qkv(1, 1, seed=8), None)
    tensors = [x for part in (state, state.store) for x in vars(part).values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(state.nbytes()["device"].values()) == sum(storages.values())


def test_a_step_has_fixed_shapes_and_asks_the_device_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    lengths = [60, 93]
    states = states_of(geometry(), 0.5, lengths)
    for i, state in enumerate(states):
        state.prefill(*left_padded([prompt_of(n, i) for n in lengths]))
    for name in ("tolist", "cpu", "numpy"):
        monkeypatch.setattr(Tensor, name, None)
    traces, fixed = [], {name: x.data_ptr() for name, x in vars(states[1]).items() if isinstance(x, Tensor)}
    for t in range(6):
        token, real = random_qkv(2, 1, seed=t), torch.tensor([[True], [t % 2 == 0]])
        with Operations() as operations:
            states[1].step(*token, real)
        assert not operations.synchronised()
        traces.append(operations.trace)
    assert all(trace == traces[0] for trace in traces)
    assert fixed == {name: x.data_ptr() for name, x in vars(states[1]).items() if isinstance(x, Tensor)}


def test_a_window_of_one_has_no_variance() -> None:
    with pytest.raises(ValueError, match="method.window=1 must be at least 2"):
        Cake(window=1)

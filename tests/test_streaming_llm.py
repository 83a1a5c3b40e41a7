"""StreamingLLM against slow references: sinks and window, positions, streaming prompts, and what it costs."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from hcache import Budget, Geometry, InfeasibleBudget, KVCache
from hcache.attention.backends import BACKENDS
from hcache.attention.rope import Rope
from hcache.contract.masked import attend_to
from hcache.contract.tiny_models import prompts as random_ids
from hcache.contract.tiny_models import tiny_model
from hcache.methods import streaming_llm
from hcache.methods.streaming_llm import Positions, Prefill, StreamingLayer, StreamingLLM
from tests.operations import Operations
from tests.padding import Qkv, left_padded

DIM, HEADS = 16, 2
EMBEDDED = Geometry(layers=1, query_heads=8, kv_heads=4, head_dim=32)


@cache
def rope() -> Rope:
    return Rope.of(tiny_model())


def random_qkv(batch: int, tokens: int, seed: int, share: int = 2) -> Qkv:
    """Before rotation."""
    generator = torch.Generator().manual_seed(seed)
    q = 2 * torch.randn(batch, HEADS * share, tokens, DIM, generator=generator)
    k, v = torch.randn(2, batch, HEADS, tokens, DIM, generator=generator)
    return q, k, v


def text_of(tokens: int, share: int = 2) -> Qkv:
    """One sequence's [heads, tokens, D], before rotation."""
    q, k, v = random_qkv(1, tokens, seed=tokens, share=share)
    return q[0], k[0], v[0]


def rotate(x_HTD: Tensor, positions: list[int]) -> Tensor:
    return rope().rotate(x_HTD.unsqueeze(0), torch.tensor([positions]))[0]


def at_positions(text: Qkv, start: int, stop: int) -> Qkv:
    """Tokens start..stop of a text as a state is given them: rotated to their true positions."""
    q, k, v = (x[:, start:stop] for x in text)
    positions = list(range(start, stop))
    return rotate(q, positions), rotate(k, positions), v


def layers_of(
    lengths: list[int], budget: float | int, share: int = 2, layers: int = 1, **hyper: Any
) -> list[StreamingLayer]:
    shape = Geometry(layers=layers, query_heads=HEADS * share, kv_heads=HEADS, head_dim=DIM)
    states = []
    for state in StreamingLLM(**hyper).layers(shape, Budget.of(budget), lengths):
        assert isinstance(state, StreamingLayer)
        state.backend, state.rope, state.reserve_tokens = BACKENDS["sdpa"], rope(), 3
        states.append(state)
    return states


class Stream:
    """The official cache as it is written down: keys before rotation, rotated by slot or by position.

    Args:
        tokens: of the text that are in the cache before the first one is fed; what is too much has gone.
    """

    def __init__(self, text: Qkv, capacity: int, sinks: int, positions: Positions, tokens: int = 0) -> None:
        self.text, self.capacity, self.fed = text, capacity, tokens
        self.sinks, self.positions = min(sinks, capacity - 1), positions
        self.cached = list(range(tokens))
        if tokens > capacity:
            self.cached = [*range(sinks), *range(tokens - (capacity - sinks), tokens)]

    def feed(self) -> Tensor:
        """The next token is appended and attends, then the oldest behind the sinks goes: [Hq, D]."""
        self.cached.append(self.fed)
        rolling = self.positions is Positions.rolling
        places = list(range(len(self.cached))) if rolling else self.cached
        q, k, v = self.text
        keys, query = rotate(k[:, self.cached], places), rotate(q[:, [self.fed]], places[-1:])
        everything = torch.ones(HEADS, len(self.cached), dtype=torch.bool)
        out = attend_to(query[:, 0], keys, v[:, self.cached], everything)
        self.fed += 1
        if len(self.cached) > self.capacity:
            del self.cached[self.sinks]
        return out

    def kept(self, prompt: int) -> list[list[int]]:
        return [[position for position in self.cached if position < prompt]] * HEADS


MODES = list(Positions)


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize("sinks", [0, 1, 4])
@pytest.mark.parametrize("budget", [12, 0.3])
@pytest.mark.parametrize("positions", MODES)
def test_every_step_is_that_of_the_slow_reference(
    positions: Positions, budget: float | int, sinks: int, share: int
) -> None:
    """A dense prompt, then steps; short prompts grow first, and some steps bring no token."""
    lengths = [40, 71, 2 if budget == 12 else 20]
    texts = [text_of(n + 40, share) for n in lengths]
    capacities = [Budget.of(budget).tokens(n) for n in lengths]
    streams = [
        Stream(text, capacity, sinks, positions, n)
        for text, capacity, n in zip(texts, capacities, lengths, strict=True)
    ]
    (state,) = layers_of(lengths, budget, share, sinks=sinks, positions=positions)
    prompts = [at_positions(text, 0, n) for text, n in zip(texts, lengths, strict=True)]
    state.prefill(*left_padded(prompts))
    for t in range(40):
        for ours, stream, n in zip(state.kept(), streams, lengths, strict=True):
            assert [head.tolist() for head in ours] == stream.kept(n)
        real = torch.tensor([t % 3 > 0, True, t % 5 > 0])
        token = [torch.full((3, x.shape[0], 1, DIM), torch.nan) for x in texts[0]]
        for b in real.nonzero()[:, 0].tolist():
            now = streams[b].fed
            for x, part in zip(token, at_positions(texts[b], now, now + 1), strict=True):
                x[b] = part
        out = state.step(token[0], token[1], token[2], real.unsqueeze(1))
        for b in real.nonzero()[:, 0].tolist():
            torch.testing.assert_close(out[b, :, 0], streams[b].feed(), rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize(("capacity", "sinks"), [(2, 4), (3, 4), (4, 4), (12, 8)])
def test_a_prompt_within_the_sinks_grows_and_then_slides(
    capacity: int, sinks: int, positions: Positions
) -> None:
    """A cache no larger than the sinks still has one place for the latest token."""
    text = text_of(20)
    stream = Stream(text, capacity, sinks, positions, 2)
    (state,) = layers_of([2], capacity, positions=positions, sinks=sinks)
    state.prefill(*(x.unsqueeze(0) for x in at_positions(text, 0, 2)), None)
    for t in range(2, 20):
        out = state.step(*(x.unsqueeze(0) for x in at_positions(text, t, t + 1)), None)
        torch.testing.assert_close(out[0, :, 0], stream.feed(), rtol=1e-4, atol=2e-5)
        assert [head.tolist() for head in state.kept()[0]] == stream.kept(2)


@pytest.mark.parametrize("positions", MODES)
@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize(("capacity", "block"), [(12, 256), (30, 7), (300, 256), (500, 64)])
def test_a_streamed_prompt_is_its_tokens_one_by_one(
    capacity: int, block: int, sinks: int, positions: Positions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In blocks, as a batch with pads, down to a prompt of two tokens; and the first steps after it."""
    monkeypatch.setattr(streaming_llm, "BLOCK", block)
    lengths = [300, 97, 2]
    texts = [text_of(n + 1) for n in lengths]
    streams = [Stream(text, capacity, sinks, positions) for text in texts]
    (state,) = layers_of(lengths, capacity, sinks=sinks, positions=positions, prefill=Prefill.streaming)
    *qkv, valid = left_padded([at_positions(text, 0, n) for text, n in zip(texts, lengths, strict=True)])
    out = state.attend_prompt(qkv[0], qkv[1], qkv[2], valid)
    state.prefill(qkv[0], qkv[1], qkv[2], valid)
    for b, (stream, n) in enumerate(zip(streams, lengths, strict=True)):
        expected = torch.stack([stream.feed() for _ in range(n)], dim=1)
        torch.testing.assert_close(out[b, :, valid[b]], expected, rtol=1e-4, atol=2e-5)
        assert [head.tolist() for head in state.kept()[b]] == stream.kept(n)
    last = [at_positions(text, n, n + 1) for text, n in zip(texts, lengths, strict=True)]
    out = state.step(*(torch.stack([token[part] for token in last]) for part in range(3)), None)
    for b, stream in enumerate(streams):
        torch.testing.assert_close(out[b, :, 0], stream.feed(), rtol=1e-4, atol=2e-5)


def test_original_positions_are_one_pass_with_a_mask() -> None:
    """Sinks, the window's tokens before, and itself; in blocks, and with the scratch for single rows."""
    n, sinks, capacity = 150, 4, 20
    q, k, v = at_positions(text_of(n), 0, n)
    hyper = {"sinks": sinks, "prefill": Prefill.streaming}
    (state,) = layers_of([n], capacity, **hyper)
    ours = state.attend_prompt(q.unsqueeze(0), k.unsqueeze(0), v.unsqueeze(0), None)[0]
    key, query = torch.arange(n), torch.arange(n).unsqueeze(1)
    visible = (key <= query) & ((key < sinks) | (query - key <= capacity - sinks))
    for t in range(n):
        expected = attend_to(q[:, t], k, v, visible[t].expand(HEADS, n))
        torch.testing.assert_close(ours[:, t], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("sinks", [0, 4])
@pytest.mark.parametrize("capacity", [9, 30])
def test_sinks_and_the_latest_stay_in_every_layer_and_the_size_with_them(sinks: int, capacity: int) -> None:
    """For 10 times the size; without sinks it is a sliding window."""
    n = 70
    states = layers_of([n], capacity, layers=2, sinks=sinks)
    for state in states:
        state.prefill(*random_qkv(1, n, seed=1), None)
    sizes = [state.nbytes() for state in states]
    for t in range(10 * capacity):
        for state, size in zip(states, sizes, strict=True):
            expected = [i for i in range(n) if i < sinks or i >= n + t - (capacity - sinks)]
            assert all(head.tolist() == expected for head in state.kept()[0])
            assert state.count_S.tolist() == [capacity] * HEADS
            state.step(*random_qkv(1, 1, seed=t), None)
            after = state.nbytes()["device"]
            assert after["payload"] == size["device"]["payload"]
            assert after["metadata"] - size["device"]["metadata"] < 1000
            assert sum(after.values()) - sum(size["device"].values()) < 1000


@pytest.mark.parametrize("positions", MODES)
def test_as_long_as_everything_fits_it_is_full_attention(positions: Positions) -> None:
    n, capacity, text = 30, 50, text_of(51)
    (state,) = layers_of([n], capacity, positions=positions)
    state.prefill(*(x.unsqueeze(0) for x in at_positions(text, 0, n)), None)
    q, k, v = at_positions(text, 0, 51)
    for t in range(n, capacity):
        out = state.step(*(x.unsqueeze(0) for x in at_positions(text, t, t + 1)), None)
        everything = torch.ones(HEADS, t + 1, dtype=torch.bool)
        expected = attend_to(q[:, t], k[:, : t + 1], v[:, : t + 1], everything)
        torch.testing.assert_close(out[0, :, 0], expected, rtol=1e-4, atol=2e-5)
    assert state.count_S.tolist() == [capacity] * HEADS


def test_rolling_distances_are_those_of_slots() -> None:
    """A stored key is as far from the query as its slot, so never farther than the cache is long."""
    n, sinks, capacity, text = 40, 3, 10, text_of(60)
    (state,) = layers_of([n], capacity, sinks=sinks, positions=Positions.rolling)
    state.prefill(*(x.unsqueeze(0) for x in at_positions(text, 0, n)), None)
    for t in range(n, 60):
        size = capacity + 1 - sinks
        ring = [sinks + (t - n + slot) % size for slot in range(size)]
        order = torch.tensor([*range(sinks), *ring])
        state.step(*(x.unsqueeze(0) for x in at_positions(text, t, t + 1)), None)
        attended = [*range(sinks), *range(t - (capacity - sinks), t + 1)]
        as_if_at = [t - (capacity - slot) for slot in range(capacity + 1)]
        stored = state.store.keys[state.store.first.unsqueeze(1) + order]
        expected = rotate(text[1][:, attended], as_if_at)
        torch.testing.assert_close(stored, expected, rtol=1e-4, atol=2e-5)
        assert as_if_at[sinks:] == attended[sinks:]


# Through a model


def slow_attention(module: Any, q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> tuple[Tensor, None]:
    """transformers' attention signature around `Stream`, for one sequence and a whole text."""
    positions = torch.arange(q.shape[2]).unsqueeze(0)
    plain = (module.rope.undo(q, positions)[0], module.rope.undo(k, positions)[0], v[0])
    stream = Stream(plain, 12, 4, module.positions)
    out = torch.stack([stream.feed() for _ in range(q.shape[2])])
    return out.unsqueeze(0), None


def slow_logits(
    model: PreTrainedModel, ids: Tensor, positions: Positions, monkeypatch: pytest.MonkeyPatch
) -> Tensor:
    AttentionInterface.register("slow_stream", slow_attention)
    AttentionMaskInterface.register("slow_stream", lambda *_, **__: None)
    with monkeypatch.context() as patch:
        patch.setattr(model.config, "_attn_implementation", "slow_stream")
        for layer in model.base_model.layers:
            patch.setattr(layer.self_attn, "rope", rope(), raising=False)
            patch.setattr(layer.self_attn, "positions", positions, raising=False)
        return model(ids, use_cache=False).logits


@pytest.mark.parametrize("positions", MODES)
def test_a_model_streams_as_the_slow_reference_does(
    positions: Positions, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All layers: the official cache, the prompt streamed in one pass, and token by token from the first."""
    model, (ids, _) = tiny_model(), random_ids(1, 60)
    hyper = {"positions": positions, "prefill": Prefill.streaming}
    expected = slow_logits(model, ids, positions, monkeypatch)
    at_once = model(ids, past_key_values=KVCache(model, "streaming_llm", 12, **hyper)).logits
    torch.testing.assert_close(at_once, expected, rtol=1e-4, atol=2e-4)
    grown = KVCache(model, "streaming_llm", 12, **hyper)
    steps = [model(token, past_key_values=grown).logits for token in ids.split(1, 1)]
    torch.testing.assert_close(torch.cat(steps, 1), expected, rtol=1e-4, atol=2e-4)
    dense = model(ids, past_key_values=KVCache(model, "streaming_llm", 12)).logits
    assert (dense - expected)[:, :13].abs().max() < 1e-3 < (dense - expected)[:, 13:].abs().max()


# Bytes, memory, shapes


@pytest.mark.parametrize("prefill", list(Prefill))
@pytest.mark.parametrize("n", [8192, 32768])
def test_a_long_prompt_takes_what_is_planned_and_little_scratch(n: int, prefill: Prefill) -> None:
    """Where it is streamed, the output of the layer is counted too."""
    method, budget = StreamingLLM(prefill=prefill), Budget(kept_tokens=n // 32)
    (state,) = method.layers(EMBEDDED, budget, [n])
    state.backend = BACKENDS["sdpa"]
    q, k, v = (torch.randn(1, heads, n, 32) for heads in (8, 4, 4))
    with Operations() as operations:
        if prefill is Prefill.streaming:
            state.attend_prompt(q, k, v, None)
        state.prefill(q, k, v, None)
    device = state.nbytes()["device"]
    plan = method.usage(EMBEDDED, budget, n, number_bytes=4)
    assert device["payload"] + device["metadata"] == pytest.approx(plan.device_bytes, rel=0.01)
    assert device["payload"] == n // 32 * 4 * 2 * 32 * 4
    output = q.nbytes if prefill is Prefill.streaming else 0
    assert operations.peak_bytes <= max(sum(device.values()), output) + 64 * 2**20


def test_a_stream_through_a_large_window_takes_little_scratch() -> None:
    """A block has as many rows as the scratch allows."""
    n, capacity = 5120, 4096
    method = StreamingLLM(prefill=Prefill.streaming, positions=Positions.rolling)
    (state,) = method.layers(EMBEDDED, Budget(kept_tokens=capacity), [n])
    assert isinstance(state, StreamingLayer)
    q, k, v = (torch.randn(1, heads, n, 32) for heads in (8, 4, 4))
    state.rope = Rope.of(tiny_model())
    state.rope.shift = lambda x, by: x  # of another head dim; the size is the same
    with Operations() as operations:
        state.attend_prompt(q, k, v, None)
    assert operations.peak_bytes <= q.nbytes + 64 * 2**20


@pytest.mark.parametrize("positions", MODES)
def test_every_tensor_of_the_state_is_counted(positions: Positions) -> None:
    (state,) = layers_of([500, 300], 0.5, positions=positions)
    state.prefill(*left_padded([text_of(n) for n in (500, 300)]))
    state.step(*random_qkv(2, 1, seed=8), None)
    tensors = [x for part in (state, state.store) for x in vars(part).values() if isinstance(x, Tensor)]
    storages = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    assert sum(state.nbytes()["device"].values()) == sum(storages.values())


@pytest.mark.parametrize("positions", MODES)
def test_a_step_has_fixed_shapes_and_asks_the_device_for_nothing(
    positions: Positions, monkeypatch: pytest.MonkeyPatch
) -> None:
    lengths = [60, 93]
    (state,) = layers_of(lengths, 0.5, positions=positions)
    state.prefill(*left_padded([text_of(n) for n in lengths]))
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


def test_sinks_must_leave_room() -> None:
    with pytest.raises(ValueError, match="method.sinks=-1 must be 0 or more"):
        StreamingLLM(sinks=-1)
    with pytest.raises(InfeasibleBudget, match="method.sinks=8 must be smaller than the budget") as caught:
        layers_of([100], 8, sinks=8)
    assert caught.value.smallest_tokens == 9
    layers_of([100], 9, sinks=8)


def test_a_stream_has_one_window() -> None:
    with pytest.raises(ValueError, match="method.allocation='pyramid' needs method.prefill=dense"):
        StreamingLLM(prefill=Prefill.streaming, allocation="pyramid")


@pytest.mark.parametrize(("sinks", "n"), [(100, 10), (70, 20)])
def test_more_sinks_than_a_short_prompt_has_slots_roll_too(sinks: int, n: int) -> None:
    model = tiny_model("llama", 2)
    ids, _ = random_ids(2, n)
    options = {"max_new_tokens": 12, "do_sample": False}
    expected = model.generate(ids, **options)
    cache = KVCache(model, "streaming_llm", 200, sinks=sinks, positions="rolling", reserve_tokens=1)
    assert torch.equal(model.generate(ids, past_key_values=cache, **options), expected)

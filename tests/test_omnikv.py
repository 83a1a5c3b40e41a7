"""OmniKV: which layers do what, what is selected (against brute force), and what comes back from the host."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from omegaconf import OmegaConf
from torch import Tensor
from transformers import PreTrainedModel

from hcache import Budget, Generator, Geometry, InfeasibleBudget, KVCache
from hcache.attention.backends import BACKENDS
from hcache.cache.room import Room, StickyRoom
from hcache.cache.state import LayerState, add_bytes, no_bytes
from hcache.contract.masked import attend_to
from hcache.contract.tiny_models import positions_of, prompts, tiny_model
from hcache.methods import make
from hcache.methods.heterocache import OffloadSettings
from hcache.methods.omnikv import FilterLayer, OmniKV, Selector, SparseLayer
from runners.config import schema_of
from tests.on_kernels import kernel_device
from tests.operations import Operations

DIM = 16
EMBEDDED = Geometry(layers=6, query_heads=8, kv_heads=4, head_dim=32)
"""Shape of the embedded model."""


def geometry(layers: int, heads: int = 2, group: int = 2) -> Geometry:
    return Geometry(layers, query_heads=heads * group, kv_heads=heads, head_dim=DIM)


def states_of(shape: Geometry, tokens: int, lengths: list[int], **hyper: Any) -> list[LayerState]:
    states = make("omnikv", **hyper).layers(shape, Budget(kept_tokens=tokens), lengths)
    for state in states:
        state.backend = BACKENDS["reference"]
    return states


def random_qkv(shape: Geometry, batch: int, tokens: int, seed: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of every layer; queries large enough to attend unevenly."""
    generator = torch.Generator().manual_seed(seed)
    draws = [
        torch.randn(batch, heads, tokens, shape.head_dim, generator=generator)
        for _ in range(shape.layers)
        for heads in (shape.query_heads, shape.kv_heads, shape.kv_heads)
    ]
    return [(2 * q, k, v) for q, k, v in zip(*[iter(draws)] * 3, strict=True)]


def valid_of(lengths: list[int]) -> Tensor:
    """Left pads up to the longest."""
    longest = max(lengths)
    return torch.arange(longest) >= torch.tensor([longest - n for n in lengths]).unsqueeze(1)


def slow_selection(
    queries: list[Tensor], k_HnD: Tensor, selector: Selector, window: int, count: int
) -> list[int]:
    """What OmniKV selects after these queries (each [Hq, D], those of the n prompt tokens first)."""
    n = k_HnD.shape[1]
    window = window if selector in (Selector.uniform, Selector.exp) else 1
    forced = 0 if window == 1 else min(n, max(0, window - (len(queries) - n)))
    keys = k_HnD.double()[:, : n - forced]
    scores = torch.zeros(n - forced, dtype=torch.float64)
    for age, q in enumerate(reversed(queries[-window:])):
        group = q.shape[0] // keys.shape[0]
        logits = torch.stack([keys[h // group] @ row for h, row in enumerate(q.double())]) * DIM**-0.5
        if selector is not Selector.last:
            logits = logits.softmax(-1)
        scores += logits.amax(0) * (0.5**age if selector is Selector.exp else 1)
    best = scores.argsort(descending=True, stable=True)[: count - forced].tolist()
    return sorted([*best, *range(n - forced, n)])


# Which layers do what


@pytest.mark.parametrize(
    ("layers", "filters", "wait", "dense"),
    [
        (32, (2, 8, 18), 1, [0, 1, 2, 3, 8, 9, 18, 19]),
        (32, (2, 8, 18), 2, [0, 1, 2, 3, 4, 8, 9, 10, 18, 19, 20]),
        (80, (4, 19, 41), 1, [0, 1, 2, 3, 4, 5, 19, 20, 41, 42]),
        (32, (8,), 1, [*range(10)]),
        (6, (0, 1), 2, [0, 1, 2, 3]),
        (6, (1, 5), 0, [0, 1, 5]),
        (6, (1, 5), 3, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_dense_layers_are_those_of_the_official_rule(
    layers: int, filters: tuple[int, ...], wait: int, dense: list[int]
) -> None:
    method = OmniKV(filter_layers=filters, wait_layers=wait)
    sources = method.sources(layers)
    assert [layer for layer, source in enumerate(sources) if source is None] == dense
    for layer, source in enumerate(sources):
        if source is not None:
            assert source == max(f for f in filters if f < layer)
    states = method.layers(geometry(layers), Budget(kept_fraction=1.0), [20])
    assert [not isinstance(state, SparseLayer) for state in states] == [i in dense for i in range(layers)]
    assert {i for i, state in enumerate(states) if isinstance(state, FilterLayer)} == set(sources) - {None}


@pytest.mark.parametrize(
    ("layers", "filters", "wait"),
    [(32, (2, 8, 18), 1), (28, (2, 7, 16), 1), (80, (5, 20, 45), 1), (16, (1, 4, 9), 1), (6, (0,), 0)],
)
def test_defaults_scale_with_the_depth(layers: int, filters: tuple[int, ...], wait: int) -> None:
    explicit = OmniKV(filter_layers=filters, wait_layers=wait)
    assert OmniKV().sources(layers) == explicit.sources(layers)


def test_a_quarter_of_the_cache_is_feasible_on_the_embedded_model_by_default() -> None:
    usage = OmniKV().usage(EMBEDDED, Budget(kept_fraction=0.25), 2048, 4)
    assert usage.parts == {"selected": (512 * 6 - 2048) // 5, "dense_layers": 1}


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("filter_layers", ()),
        ("filter_layers", (3, 3)),
        ("filter_layers", (5, 2)),
        ("filter_layers", (-1, 2)),
        ("wait_layers", -1),
        ("window", 0),
    ],
)
def test_bad_hyper_parameters_are_refused(key: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"method.{key}="):
        make("omnikv", **{key: value})


def test_a_filter_layer_beyond_the_model_is_refused() -> None:
    with pytest.raises(ValueError, match=r"method.filter_layers=\[2, 6\] must be below 6"):
        OmniKV(filter_layers=(2, 6)).minimum_tokens(EMBEDDED, 100)


def test_lists_of_a_configuration_become_tuples() -> None:
    config = schema_of(OmniKV)
    config.filter_layers, config.selector = [1, 4], "exp"
    method = OmegaConf.to_object(config)
    assert method == OmniKV(filter_layers=(1, 4), selector=Selector.exp)
    assert hash(method) == hash(OmniKV(filter_layers=(1, 4), selector=Selector.exp))


# Budget


@pytest.mark.parametrize("hyper", [{}, {"selector": Selector.uniform, "window": 5}], ids=["last", "window"])
def test_the_smallest_budget_is_the_smallest_that_runs(hyper: dict) -> None:
    for layers, filters, n in itertools.product((2, 6, 7), ((0,), (1,), (0, 1)), (1, 4, 30, 101)):
        method = OmniKV(filter_layers=filters, wait_layers=0, **hyper)
        shape = geometry(layers)
        dense = method.sources(layers).count(None)
        smallest = min(method.minimum_tokens(shape, n), n)
        for tokens in range(2, n + 3):
            if tokens < smallest:
                with pytest.raises(InfeasibleBudget) as caught:
                    method.layers(shape, Budget(kept_tokens=tokens), [n])
                assert caught.value.smallest_tokens == smallest
                continue
            k = method.selected_tokens(shape, Budget(kept_tokens=tokens), n)
            assert 1 <= k <= n
            if dense < layers:
                spent, given = dense * n + (layers - dense) * k, min(tokens, n) * layers
                assert given - (layers - dense) < spent <= given
                assert k == n or k > method.window * method.selector.windowed
            if tokens >= n:
                assert k == n


# Selection


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize(("heads", "group"), [(2, 2), (1, 4), (4, 1)])
@pytest.mark.parametrize("selector", Selector)
def test_selection_equals_brute_force(selector: Selector, heads: int, group: int, padded: bool) -> None:
    shape, window = geometry(2, heads, group), 6
    lengths = [90, 70, 131] if padded else [90, 90, 90]  # 75 tokens on average: k is 60, 70 (all) and 19
    budget = Budget(kept_tokens=75)
    states = states_of(shape, 75, lengths, selector=selector, window=window)
    counts = [OmniKV().selected_tokens(shape, budget, n) for n in lengths]
    valid = valid_of(lengths)
    prompt = random_qkv(shape, 3, max(lengths), seed=1)
    for state, qkv in zip(states, prompt, strict=True):
        state.prefill(*qkv, valid if padded else None)
    q, k, _ = prompt[0]
    queries = [list(q[b, :, valid[b]].unbind(1)) for b in range(3)]
    for t in range(9):
        for b in range(3):
            expected = slow_selection(queries[b], k[b, :, valid[b]], selector, window, counts[b])
            assert len(expected) == counts[b]
            assert [head.tolist() for head in states[1].kept()[b]] == [expected] * heads
        step = random_qkv(shape, 3, 1, seed=50 + t)
        for state, qkv in zip(states, step, strict=True):
            state.step(*qkv, None)
        for b in range(3):
            queries[b].append(step[0][0][b, :, 0])


def test_sparse_layers_share_the_set_of_the_filter_before_them_and_it_follows_the_query() -> None:
    shape = geometry(7)
    states = states_of(shape, 40, [80], filter_layers=(0, 3), wait_layers=0)
    for state, qkv in zip(states, random_qkv(shape, 1, 80, seed=3), strict=True):
        state.prefill(*qkv, None)
    seen = []
    for t in range(3):
        sets = [state.kept()[0] for state in states]
        assert all(torch.equal(head, layer[0]) for layer in sets for head in layer)
        assert [len(sets[layer][0]) for layer in (0, 3)] == [80, 80]
        for first, rest in ((1, (2,)), (4, (5, 6))):
            assert all(torch.equal(sets[first][0], sets[layer][0]) for layer in rest)
        assert not torch.equal(sets[1][0], sets[4][0])
        seen.append(sets[1][0].tolist())
        for state, qkv in zip(states, random_qkv(shape, 1, 1, seed=60 + t), strict=True):
            state.step(*qkv, None)
    assert seen[0] != seen[1] != seen[2]


def test_raw_logits_and_softmaxes_choose_differently_where_heads_differ_in_scale() -> None:
    """One query head with huge logits decides alone under `last`, and has one voice under softmax."""
    shape = geometry(2, heads=1, group=2)
    chosen = {}
    for selector in (Selector.last, Selector.softmax_before_last):
        states = states_of(shape, 44, [80], selector=selector)
        prompt = random_qkv(shape, 1, 80, seed=5)
        prompt[0][0][:, 0] *= 100
        for state, qkv in zip(states, prompt, strict=True):
            state.prefill(*qkv, None)
        q, k, _ = prompt[0]
        big, small = ((k[0, 0] @ q[0, h, -1]).argsort(descending=True).tolist() for h in range(2))
        chosen[selector] = states[1].kept()[0][0].tolist()
        assert big[0] in chosen[selector]
    assert chosen[Selector.last] == sorted(big[:8])
    assert small[0] in chosen[Selector.softmax_before_last]


@pytest.mark.parametrize("selector", [Selector.uniform, Selector.exp])
def test_prompt_tokens_still_in_the_window_are_selected(selector: Selector) -> None:
    shape, window = geometry(2), 5
    states = states_of(shape, 45, [80], selector=selector, window=window)
    prompt = random_qkv(shape, 1, 80, seed=7)
    # The end of the prompt is what no query looks at.
    prompt[0][1][:, :, -window:] = -0.1 * prompt[0][0][:, ::2, -1:]
    for state, qkv in zip(states, prompt, strict=True):
        state.prefill(*qkv, None)
    for t in range(window + 1):
        chosen = states[1].kept()[0][0].tolist()
        assert len(chosen) == 10
        assert set(range(75 + t, 80)) <= set(chosen)
        for state, qkv in zip(states, random_qkv(shape, 1, 1, seed=70 + t), strict=True):
            state.step(*qkv, None)


# Attention


def held(shape: Geometry, states: list[LayerState], n: int, steps: int, reserve: int) -> None:
    """Run prompt and steps; hold every output to attention over the kept and all later tokens."""
    cache = random_qkv(shape, 2, n, seed=11)
    for state, qkv in zip(states, cache, strict=True):
        state.reserve_tokens = reserve
        state.prefill(*qkv, None)
    for t in range(steps):
        for layer, (state, qkv) in enumerate(zip(states, random_qkv(shape, 2, 1, seed=80 + t), strict=True)):
            out = state.step(*qkv, None)
            _, keys, values = cache[layer] = tuple(
                torch.cat([old, new], 2) for old, new in zip(cache[layer], qkv, strict=True)
            )
            for b, heads in enumerate(state.kept()):
                visible = torch.zeros(shape.kv_heads, keys.shape[2], dtype=torch.bool)
                visible[:, n:] = True
                for h, positions in enumerate(heads):
                    visible[h, positions] = True
                expected = attend_to(qkv[0][b, :, 0], keys[b], values[b], visible)
                torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("selector", Selector)
def test_output_is_attention_to_the_selection_and_all_generated_tokens(selector: Selector) -> None:
    """The store moves on the way: there is room for 2 tokens and 70 come."""
    shape = geometry(3)
    hyper = {"selector": selector, "window": 6}
    held(shape, states_of(shape, 40, [61, 61], **hyper), 61, 70, reserve=2)


def test_a_budget_for_everything_attends_to_everything() -> None:
    shape = geometry(4)
    states = states_of(shape, 61, [61, 61], filter_layers=(0, 2), wait_layers=0)
    held(shape, states, 61, 20, reserve=20)
    assert all(head.tolist() == list(range(61)) for state in states for head in state.kept()[1])


HYPER: dict[str, Any] = {"filter_layers": (0, 3), "wait_layers": 0}
TWO_FILTERS = [HYPER, {**HYPER, "selector": Selector.exp, "window": 4}]


def logits_of(model: PreTrainedModel, cache: KVCache, calls: list[Tensor], mask: Tensor) -> Tensor:
    """Logits of all tokens, fed call by call."""
    positions, done, outs = positions_of(mask), 0, []
    for ids in calls:
        now = slice(done, done + ids.shape[1])
        done += ids.shape[1]
        with torch.inference_mode():
            call = {"attention_mask": mask[:, :done], "position_ids": positions[:, now]}
            outs.append(model(ids, past_key_values=cache, **call).logits)
    return torch.cat(outs, 1)


@pytest.mark.parametrize("hyper", TWO_FILTERS, ids=["last", "exp"])
def test_a_follow_up_equals_its_tokens_one_by_one(hyper: dict) -> None:
    """Through the model: each layer gets the whole follow-up before the next layer sees any of it."""
    model = tiny_model("llama", 2, layers=6)
    ids, mask = prompts(2, 60, padded=True)
    more, more_mask = prompts(2, 9, seed=4)
    more_mask[0, :2] = more_mask[1, 4] = 0  # pads before and in the middle
    last, last_mask = prompts(2, 1, seed=5)
    everything = torch.cat([mask, more_mask, last_mask], 1)
    block, single = (KVCache(model, "omnikv", 30, **hyper) for _ in range(2))
    together = logits_of(model, block, [ids, more, last], everything)
    apart = logits_of(model, single, [ids, *more.split(1, 1), last], everything)
    real = everything.bool()
    torch.testing.assert_close(together[real], apart[real], rtol=1e-4, atol=1e-4)
    for layer in range(6):
        for ours, theirs in zip(block.kept(layer), single.kept(layer), strict=True):
            assert [head.tolist() for head in ours] == [head.tolist() for head in theirs]
    assert block.counters() == single.counters()


@pytest.mark.parametrize("hyper", TWO_FILTERS, ids=["last", "exp"])
def test_offloading_changes_where_the_prompt_is_and_nothing_else(hyper: dict) -> None:
    model = tiny_model("llama", 2, layers=6)
    ids, mask = prompts(2, 60, padded=True)
    everything = torch.cat([mask, torch.ones_like(mask[:, :20])], 1)
    steps = prompts(2, 20, seed=4)[0].split(1, 1)
    near, far = (
        KVCache(model, "omnikv", 30, offload=OffloadSettings(enabled), **hyper) for enabled in (False, True)
    )
    ours, theirs = (logits_of(model, cache, [ids, *steps], everything) for cache in (near, far))
    real = everything.bool()
    assert torch.equal(ours[real], theirs[real])
    assert near.counters()["host_to_device_bytes"] == 0
    usages = [far.method.usage(far.geometry, far.budget, n, 4) for n in far.prompt_tokens]
    most = 20 * sum(usage.moved_bytes for usage in usages)
    assert 0 < far.counters()["host_to_device_bytes"] < most
    host = sum(usage.host_bytes for usage in usages)
    assert far.nbytes()["host"]["payload"] == host
    assert near.nbytes()["device"]["payload"] == far.nbytes()["device"]["payload"] + host
    assert near.nbytes()["host"]["payload"] == 0


@pytest.mark.parametrize("hyper", TWO_FILTERS, ids=["last", "exp"])
def test_a_sequence_is_the_same_alone_and_in_a_batch(hyper: dict) -> None:
    model = tiny_model("llama", 2, layers=6)
    ids, mask = prompts(3, 60, padded=True)
    generator = Generator(model, "omnikv", 0.5, **hyper)
    together = generator.generate(ids, mask, 12)
    moved = 0.0
    for b in range(3):
        alone = generator.generate(ids[b : b + 1, mask[b] == 1], None, 12)
        assert torch.equal(alone.tokens[0], together.tokens[b])
        moved += alone.counters["host_to_device_bytes"]
    assert together.counters["host_to_device_bytes"] == moved


@pytest.mark.parametrize("selector", [Selector.last, Selector.uniform])
def test_a_sequence_without_a_token_stays_as_it_is(selector: Selector) -> None:
    shape = geometry(2)
    states = states_of(shape, 40, [50, 50], selector=selector, window=4)
    for state, qkv in zip(states, random_qkv(shape, 2, 50, seed=13), strict=True):
        state.prefill(*qkv, None)
    before = states[1].kept()
    alone = torch.tensor([[True], [False]])
    latest, came = set(before[0][0].tolist()), 0
    for t in range(6):
        for state, qkv in zip(states, random_qkv(shape, 2, 1, seed=90 + t), strict=True):
            state.step(*qkv, alone)
        earlier, latest = latest, set(states[1].kept()[0][0].tolist())
        came += len(latest - earlier)
    after = states[1].kept()
    assert torch.equal(before[1][0], after[1][0])
    assert 0 < came < 6 * before[0][0].numel()
    assert states[1].counters()["host_to_device_bytes"] == came * shape.kv_heads * 2 * DIM * 4
    # The window goes on where it stopped: five more tokens alone are five more tokens in this batch.
    assert states[0]._fed_B1.flatten().tolist() == [6, 0]


# Bytes


@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize("offload", [True, False])
def test_measured_bytes_are_those_planned(n: int, offload: bool) -> None:
    """Four layers of the embedded model's shape: a filter, two sparse, and one more dense."""
    shape = Geometry(4, EMBEDDED.query_heads, EMBEDDED.kv_heads, EMBEDDED.head_dim)
    method = OmniKV(filter_layers=(0, 3), wait_layers=0, offload=OffloadSettings(offload))
    budget = Budget(kept_fraction=0.6)
    states = method.layers(shape, budget, [n])
    total = no_bytes()
    for state in states:
        q = torch.randn(1, shape.query_heads, n, shape.head_dim)
        k, v = torch.randn(2, 1, shape.kv_heads, n, shape.head_dim)
        state.backend = BACKENDS["sdpa"]
        state.prefill(q, k, v, None)
        total = add_bytes(total, state.nbytes())
    plan = method.usage(shape, budget, n, 4)
    device = total["device"]
    assert device["payload"] + device["metadata"] == pytest.approx(plan.device_bytes, rel=0.01)
    assert total["host"]["payload"] == plan.host_bytes
    kept = sum(head.numel() for state in states for head in state.kept()[0])
    assert kept / shape.heads == plan.attended_tokens
    slots = 2 * shape.head_dim * 4
    assert device["payload"] == kept * slots + (0 if offload else 2 * shape.kv_heads * n * slots)
    assert bool(method.notes(shape, budget, n)) is not offload


@pytest.mark.parametrize("selector", Selector)
def test_a_step_has_fixed_shapes_and_asks_the_device_for_nothing(
    selector: Selector, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Sequences of different lengths, one of which skips tokens."""
    shape, lengths = geometry(3), [61, 93]
    states = states_of(shape, 45, lengths, selector=selector, window=6)
    longest = max(lengths)
    valid = torch.stack([torch.arange(longest) >= longest - n for n in lengths])
    for state, qkv in zip(states, random_qkv(shape, 2, longest, seed=3), strict=True):
        state.backend = BACKENDS["sdpa"]
        state.prefill(*qkv, valid)
    monkeypatch.setattr(Tensor, "tolist", None)
    traces = []
    for t in range(6):
        token, real = random_qkv(shape, 2, 1, seed=70 + t), torch.tensor([[True], [t % 2 == 0]])
        with Operations() as operations:
            for state, qkv in zip(states, token, strict=True):
                state.step(*qkv, real)
        assert operations.synchronised() == []
        traces.append(operations.trace)
    assert all(trace == traces[0] for trace in traces)


@pytest.mark.parametrize("selector", [Selector.last, Selector.exp])
def test_prefill_takes_little_more_than_what_it_keeps(selector: Selector) -> None:
    n, shape = 32768, Geometry(2, EMBEDDED.query_heads, EMBEDDED.kv_heads, EMBEDDED.head_dim)
    states = OmniKV(selector=selector).layers(shape, Budget(kept_fraction=0.6), [n])
    q = torch.randn(1, shape.query_heads, n, shape.head_dim).bfloat16()
    k, v = torch.randn(2, 1, shape.kv_heads, n, shape.head_dim).bfloat16()
    for state in states:
        state.backend = BACKENDS["sdpa"]
        with Operations() as operations:
            state.prefill(q, k, v, None)
        kept = sum(sum(side.values()) for side in state.nbytes().values())
        assert kept <= operations.peak_bytes <= kept + 64 * 2**20


def test_a_step_writes_its_selection_in_place() -> None:
    """A captured step reads and writes the buffers it was captured with."""
    shape = geometry(3)
    states = states_of(shape, 45, [61], selector=Selector.last)
    for state, qkv in zip(states, random_qkv(shape, 1, 61, seed=3), strict=True):
        state.backend = BACKENDS["sdpa"]
        state.prefill(*qkv, None)
    (filter_layer,) = (state for state in states if isinstance(state, FilterLayer))
    selected = filter_layer.selected
    before = [x.data_ptr() for x in (selected.held_Bk, *selected.changed)]
    for t in range(3):
        for state, qkv in zip(states, random_qkv(shape, 1, 1, seed=9 + t), strict=True):
            state.step(*qkv, None)
    assert [x.data_ptr() for x in (selected.held_Bk, *selected.changed)] == before


# Steps that were captured, and kernels

DEEP: dict[str, Any] = {"filter_layers": (0, 3), "wait_layers": 0}
"""Two filters with two and three sparse layers."""


def prefilled_in(
    rooms: list[Room], lengths: list[int], device: str = "cpu", **hyper: Any
) -> list[LayerState]:
    shape = geometry(len(rooms))
    states = OmniKV(**DEEP, **hyper).layers(shape, Budget(kept_fraction=0.5), lengths)
    valid = None if len(set(lengths)) == 1 else valid_of(lengths).to(device)
    for state, room, qkv in zip(
        states, rooms, random_qkv(shape, len(lengths), max(lengths), 21), strict=True
    ):
        state.backend, state.reserve_tokens, state.room = BACKENDS["sdpa"], 20, room
        state.prefill(*(x.to(device) for x in qkv), valid)
        room.adopt(state)
    return states


def kept_lists(state: LayerState) -> list[list[int]]:
    return [head.tolist() for sequence in state.kept() for head in sequence]


@pytest.mark.parametrize("selector", Selector)
@pytest.mark.parametrize(
    ("first", "later"),
    [([102], [[61], [90]]), ([70, 102, 90], [[90, 50, 61], [40, 43, 102], [102, 61, 70]])],
    ids=["one", "batch"],
)
def test_steps_of_the_first_prompt_s_states_serve_other_prompts(
    first: list[int], later: list[list[int]], selector: Selector
) -> None:
    """A captured step knows tensors alone: the states it was captured with do the next prompt's steps."""
    rooms, batch, hyper = [StickyRoom() for _ in range(6)], len(first), {"selector": selector, "window": 4}
    captured = prefilled_in(rooms, first, **hyper)
    for state, qkv in zip(captured, random_qkv(geometry(6), batch, 1, seed=5), strict=True):
        state.step(*qkv, None)
    for lengths in later:
        ours = prefilled_in(rooms, lengths, **hyper)
        plain = prefilled_in([Room()] * 6, lengths, **hyper)
        assert [room.forget_changes() for room in rooms] == [0] * 6
        for t in range(15):
            token = random_qkv(geometry(6), batch, 1, seed=70 + t)
            assert [state.ready(even=True).kind for state in ours] == [0] * 6
            for held, slow, qkv in zip(captured, plain, token, strict=True):
                torch.testing.assert_close(held.advance(*qkv, None), slow.step(*qkv, None), rtol=0, atol=1e-6)
            for a, b in zip(ours, plain, strict=True):
                assert kept_lists(a) == kept_lists(b)
                assert a.counters() == b.counters()
        assert ours[1].counters()["host_to_device_bytes"] > 0


def traced(states: list[LayerState], batch: int, device: str) -> list[tuple[list[Tensor], Any]]:
    """Outputs of sequences that had a token, kept positions and counters after each of some steps."""
    trace = []
    for t in range(12):
        real = torch.tensor([[t % 2 == 0 or (t + b) % 3 > 0] for b in range(batch)])
        mask, outs = None if t % 2 == 0 else real.to(device), []
        for state, qkv in zip(states, random_qkv(geometry(6), batch, 1, seed=70 + t), strict=True):
            outs.append(state.step(*(x.to(device) for x in qkv), mask).cpu()[real[:, 0]])
        trace.append((outs, [(kept_lists(state), state.counters()) for state in states]))
    return trace


@pytest.mark.gpu
@pytest.mark.parametrize("selector", Selector)
@pytest.mark.parametrize("lengths", [[102], [61, 102]], ids=["one", "batch"])
def test_kernels_do_the_same_steps(
    lengths: list[int], selector: Selector, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = {"selector": selector, "window": 4}
    expected = traced(prefilled_in([Room()] * 6, lengths, **hyper), len(lengths), "cpu")
    device = kernel_device(monkeypatch)
    rooms = [StickyRoom() for _ in range(6)]
    found = traced(prefilled_in(rooms, lengths, device, **hyper), len(lengths), device)
    for (ours, state), (theirs, slow) in zip(found, expected, strict=True):
        assert state == slow
        for a, b in zip(ours, theirs, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)

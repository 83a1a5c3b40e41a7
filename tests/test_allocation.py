"""Budget splits: exact sums, water-filling, the cascade, competing heads, roles; any scorer, real bytes."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hcache import Budget, Generator, Geometry, KVCache
from hcache.allocation import (
    Adaptive,
    Cascade,
    Division,
    Preference,
    Pyramid,
    PyramidSum,
    Uniform,
    make_allocation,
    round_to_sum,
    water_fill,
    water_levels,
)
from hcache.attention.backends import BACKENDS
from hcache.contract.cases import profile_of
from hcache.contract.masked import causal_attention
from hcache.contract.tiny_models import prompts as random_ids
from hcache.contract.tiny_models import tiny_model
from hcache.methods import make
from hcache.profiling import Role
from hcache.role_weights import RoleWeights
from hcache.scoring import Group, Pooling
from runners import overrides
from runners.config import ConfigError, RunConfig, register
from runners.plan import compose_all
from tests.operations import Operations
from tests.test_snapkv import HEADS, as_lists, assert_attends_to, best, prompt_of, slow_scores, states_of

RULE = {"window": 4, "kernel": 5, "pooling": Pooling.avg, "group": Group.mean}
WEIGHTS = st.lists(st.floats(0, 1000) | st.floats(1e-300, 1e-290), min_size=1, max_size=24)
ODD = st.sampled_from([0.0, math.nan, math.inf, -math.inf, -1.0])


# --- whole tokens and water-filling


@given(st.lists(st.floats(0, 300), min_size=1, max_size=30), st.data())
def test_rounding_gives_the_total_within_one_of_each_share_or_at_its_cap(
    shares: list[float], data: st.DataObject
) -> None:
    caps = [math.ceil(share) + data.draw(st.integers(-5, 3)) for share in shares]
    caps = [max(0, cap) for cap in caps]
    floors = sum(min(math.floor(share), cap) for share, cap in zip(shares, caps, strict=True))
    total = data.draw(st.integers(floors, sum(caps)))
    whole = round_to_sum(shares, total, caps)
    assert sum(whole) == total
    assert all(min(math.floor(s), c) <= w <= c for s, w, c in zip(shares, whole, caps, strict=True))
    if total <= sum(min(math.ceil(share), cap) for share, cap in zip(shares, caps, strict=True)):
        assert all(w <= math.ceil(s) for s, w in zip(shares, whole, strict=True))


def test_the_largest_remainders_are_rounded_up_and_the_first_of_equals() -> None:
    assert round_to_sum([1.5, 2.9, 0.5, 3.1], 8, [9] * 4) == [2, 3, 0, 3]
    assert round_to_sum([1.5, 2.9, 0.5, 3.1], 8, [1, 9, 9, 9]) == [1, 3, 1, 3]
    assert round_to_sum([0.0, 0.0], 5, [9, 9]) == [3, 2]


def test_what_can_t_be_rounded_is_said() -> None:
    with pytest.raises(ValueError, match="cannot place 9 tokens under caps that add up to 8"):
        round_to_sum([4.5, 4.5], 9, [4, 4])
    with pytest.raises(AssertionError, match="more than 3"):
        round_to_sum([5.0, 5.0], 3, [9, 9])


def slow_levels(weights: list[float], total: int, cap: int) -> list[float]:
    """The level at which shares min(cap, level * weight) add up to the total, by halving an interval."""
    low, high = 0.0, 2.0 * cap / min(weights)
    for _ in range(200):
        level = (low + high) / 2
        spent = sum(min(cap, level * weight) for weight in weights)
        low, high = (level, high) if spent < total else (low, level)
    return [min(cap, high * weight) for weight in weights]


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=24), st.integers(0, 5000), st.integers(1, 400))
def test_water_levels_are_where_proportion_meets_the_cap(weights: list[float], total: int, cap: int) -> None:
    levels = water_levels(weights, total, cap)
    reachable = min(total, cap * len(weights))
    assert levels == pytest.approx(slow_levels(weights, reachable, cap), rel=1e-6, abs=1e-6)
    below = [pair for pair in zip(levels, weights, strict=True) if pair[0] < 0.999999 * cap]
    rates = [level / weight for level, weight in below]
    assert rates == pytest.approx([max(rates, default=0)] * len(rates))


@given(st.lists(ODD | st.floats(0, 1000), min_size=1, max_size=24), st.integers(0, 5000), st.integers(0, 400))
def test_water_is_exact_and_capped_whatever_the_weights(weights: list[float], total: int, cap: int) -> None:
    levels, whole = water_levels(weights, total, cap), water_fill(weights, total, cap)
    reachable = min(total, cap * len(weights))
    assert sum(levels) == pytest.approx(reachable)
    assert sum(whole) == reachable
    assert all(0 <= level <= cap + 1e-9 for level in levels)
    assert all(0 <= share <= cap for share in whole)
    assert all(abs(share - level) < 1 + 1e-9 for share, level in zip(whole, levels, strict=True))


@given(st.lists(ODD, min_size=1, max_size=24), st.integers(0, 5000), st.integers(1, 400))
def test_without_a_weight_to_go_by_water_is_even(weights: list[float], total: int, cap: int) -> None:
    reachable = min(total, cap * len(weights))
    assert water_levels(weights, total, cap) == pytest.approx([reachable / len(weights)] * len(weights))


@given(WEIGHTS, st.integers(0, 5000), st.integers(1, 400))
def test_no_share_rises_when_another_weight_joins(weights: list[float], total: int, cap: int) -> None:
    shares = [math.inf] * len(weights)
    for joined in range(1, len(weights) + 1):
        levels = water_levels(weights[:joined], total, cap)
        assert all(new <= old + 1e-6 for new, old in zip(levels, shares, strict=False))
        shares = levels + shares[joined:]


# --- the cascade


class Told(Preference):
    """Preferences that are given, layer by layer."""

    def tell(self, logs: list[float]) -> Told:
        object.__setattr__(self, "_logs", iter(logs))
        return self

    def preference(self, q: Tensor, k: Tensor) -> float:
        return next(self._logs)  # type: ignore[attr-defined]


@given(
    st.lists(st.floats(-50, 50) | st.sampled_from([math.nan, -math.inf, 300.0]), min_size=1, max_size=40)
    | st.lists(st.floats(-0.01, 0.01), min_size=1, max_size=40),
    st.integers(0, 300),
    st.integers(1, 600),
    st.integers(0, 40),
)
def test_the_cascade_never_asks_for_more_and_ends_where_one_division_would(
    logs: list[float], base: int, more_room: int, protected: int
) -> None:
    layers, room = len(logs), base + more_room
    shape = Geometry(layers=layers, query_heads=4, kv_heads=2, head_dim=8)
    division = Cascade(Told().tell(logs), shape, base, room, protected)
    nothing = torch.zeros(1, 1, 1)
    before = [protected + room] * layers
    for layer in range(layers):
        assert division.counts(layer, nothing, nothing, nothing) == division.revised(layer)
        now = [division.revised(earlier)[0] for earlier in range(layer + 1)]
        assert all(new <= old for new, old in zip(now, before, strict=False))
        stored = sum(now) - protected * len(now)
        reachable = min(base * layers, room * len(now))
        assert reachable <= stored <= reachable + len(now), "all that can be used, and a token a layer above"
        before = now
    assert sum(before) == (base + protected) * layers
    finite = [log for log in logs if math.isfinite(log)]
    weights = [math.exp(log - max(finite)) if math.isfinite(log) else 0.0 for log in logs]
    levels = water_levels(weights, base * layers, room)
    assert all(abs(share - protected - level) < 1 + 1e-6 for share, level in zip(before, levels, strict=True))


@pytest.mark.parametrize("share", [1, 2, 4])
@pytest.mark.parametrize(("tau1", "tau2"), [(1.0, 1.0), (1.6, 0.4)])
def test_preference_is_entropy_and_variance_of_the_window(share: int, tau1: float, tau2: float) -> None:
    """Equations 5 to 7 of the paper, number by number."""
    q, k, _ = prompt_of(60, share)
    rows = causal_attention(q.double(), k.double())[:, -6:, :-6]
    entropy = variance = 0.0
    for head in rows.tolist():
        entropy -= sum(a * math.log(a + 1e-10) for row in head for a in row)
        for column in zip(*head, strict=True):
            middle = sum(column) / 6
            variance += sum((a - middle) ** 2 for a in column) / 5
    expected = math.log(entropy ** (1 / tau1) * variance ** (1 / tau2))
    assert Preference(tau1, tau2, window=6).preference(q, k) == pytest.approx(expected, rel=1e-4)


def test_cutting_in_steps_keeps_what_cutting_once_would() -> None:
    """Layers that attend unlike each other, three lengths in one batch, left pads of NaN."""
    sharpness = (0.3, 2.0, 1.0, 0.5, 4.0)
    prompts = [
        [(s * q, k, v) for q, k, v in (prompt_of(n, seed=layer) for n in (70, 90, 61))]
        for layer, s in enumerate(sharpness)
    ]
    states = states_of("snapkv", prompts, 0.4, **RULE, allocation={"name": "preference", "window": 4})
    seen = set()
    for b, n in enumerate((70, 90, 61)):
        logs = [Preference(window=4).preference(*batch[b][:2]) for batch in prompts]
        base = math.floor(0.4 * n) - 4
        weights = [math.exp(log) for log in logs]
        levels = slow_levels(weights, base * 5, n - 4)
        sizes = [len(state.kept()[b][0]) for state in states]
        assert sum(sizes) == 5 * math.floor(0.4 * n)
        assert all(abs(size - 4 - level) < 1.001 for size, level in zip(sizes, levels, strict=True))
        for layer, (state, size) in enumerate(zip(states, sizes, strict=True)):
            scores = slow_scores(*prompts[layer][b][:2], *RULE.values())
            expected = [best(row, size - 4) + list(range(n - 4, n)) for row in scores]
            assert as_lists(state.kept())[b] == expected
        seen |= set(sizes)
    assert len(seen) > 6
    for layer, state in enumerate(states):
        assert_attends_to(state, prompts[layer], as_lists(state.kept()))


# --- heads that compete


def slow_competition(scores_Hn: list[list[float]], average: int, protected: int, floor: float) -> list[int]:
    """Each head's own best up to the floor; the layer's best of all others until its tokens are spent."""
    n = len(scores_Hn[0])
    rows = [[*row[: n - protected], *[math.inf] * protected] for row in scores_Hn]
    sure = protected + math.floor(floor * (average - protected))
    counts, others = [], []
    for h, row in enumerate(rows):
        own = set(best(row, sure))
        counts.append(len(own))
        others += [(-row[j], h, j) for j in range(n) if j not in own]
    for _, h, _ in sorted(others)[: average * len(rows) - sum(counts)]:
        counts[h] += 1
    return counts


FLOORS = pytest.mark.parametrize("floor", [0.0, 0.2, 0.7, 1.0])


@FLOORS
@pytest.mark.parametrize("layers", ["uniform", {"name": "pyramid", "beta": 3}])
@pytest.mark.parametrize("share", [1, 4])
def test_competing_heads_keep_what_the_slow_rule_says(share: int, layers: Any, floor: float) -> None:
    lengths = (70, 90, 150)
    prompts = [[prompt_of(n, share, seed=layer) for n in lengths] for layer in range(3)]
    for batch in prompts:  # head 0 attends sharply, head 1 widely
        for q, _, _ in batch:
            q[:share] *= 2
            q[share:] *= 0.5
    allocation = {"name": "adaptive", "floor": floor, "layers": layers}
    states = states_of("snapkv", prompts, 30, **RULE, allocation=allocation)
    shape = Geometry(layers=3, query_heads=HEADS * share, kv_heads=HEADS, head_dim=16)
    for b, n in enumerate(lengths):
        table = make_allocation(layers).divide(shape, 30, n, 4).table
        for layer, state in enumerate(states):
            average = table[layer][0]
            scores = slow_scores(*prompts[layer][b][:2], *RULE.values())
            counts = slow_competition([[*row, *[0.0] * 4] for row in scores], average, 4, floor)
            kept = as_lists(state.kept())[b]
            pairs = zip(scores, counts, strict=True)
            assert kept == [best(row, count - 4) + list(range(n - 4, n)) for row, count in pairs]
            assert sum(map(len, kept)) == average * HEADS
            assert min(map(len, kept)) >= 4 + math.floor(floor * (average - 4))
    for state, batch in zip(states, prompts, strict=True):
        payload = sum(len(head) for sequence in as_lists(state.kept()) for head in sequence) * 2 * 16 * 4
        assert state.nbytes()["device"]["payload"] == payload
        assert_attends_to(state, batch, as_lists(state.kept()))


def test_a_floor_of_one_is_uniform() -> None:
    prompts = [[prompt_of(n) for n in (70, 90)]]
    (floored,) = states_of("snapkv", prompts, 30, **RULE, allocation={"name": "adaptive", "floor": 1})
    (uniform,) = states_of("snapkv", prompts, 30, **RULE)
    assert as_lists(floored.kept()) == as_lists(uniform.kept())


def test_heads_of_different_lengths_take_no_more_memory_than_equal_ones() -> None:
    """All buffers of the store, not only what is counted as payload; one chunk of slack a head."""
    q, k, v = prompt_of(2000)
    q[:2] *= 4
    sizes = {}
    for floor in (0.0, 1.0):
        allocation = {"name": "adaptive", "floor": floor}
        (state,) = states_of("snapkv", [[(q, k, v)]], 500, window=8, allocation=allocation)
        lengths = [len(head) for head in as_lists(state.kept())[0]]
        assert sum(lengths) == 1000
        device = state.nbytes()["device"]
        assert device["payload"] == 1000 * 2 * 16 * 4
        sizes[floor] = device["payload"] + device["reserved"]
        assert sizes[floor] == state.store.keys.nbytes + state.store.values.nbytes
        assert (abs(lengths[0] - lengths[1]) > 300) == (floor == 0)
    assert abs(sizes[0.0] - sizes[1.0]) <= HEADS * 64 * 2 * 16 * 4


@given(st.data(), st.integers(1, 4), st.integers(2, 12), st.sampled_from([0.0, 0.3, 1.0]))
def test_a_layer_s_tokens_are_spent_whatever_the_scores(
    data: st.DataObject, heads: int, n: int, floor: float
) -> None:
    """Equal scores, infinite ones (sinks) and zeros too."""
    number = st.sampled_from([0.0, 1.0, math.inf]) | st.floats(0, 1, width=32)
    scores = data.draw(st.lists(st.lists(number, min_size=n, max_size=n), min_size=heads, max_size=heads))
    protected = data.draw(st.integers(0, n - 1))
    average = data.draw(st.integers(protected + 1, n))
    ranked = torch.tensor(scores)
    ranked[:, n - protected :] = math.inf
    shape = Geometry(layers=1, query_heads=heads, kv_heads=heads, head_dim=8)
    division = Adaptive(floor).divide(shape, average, n, protected)
    counts = division.counts(0, ranked, ranked, ranked)
    assert sum(counts) == average * heads
    assert all(protected + math.floor(floor * (average - protected)) <= count <= n for count in counts)


# --- roles


@pytest.mark.parametrize("protected", [0, 4, 30])
@pytest.mark.parametrize("tokens", [30, 51, 99])
def test_roles_give_full_heads_all_and_the_others_by_weight(tokens: int, protected: int) -> None:
    model = tiny_model(kv_heads=4, layers=3)
    profile, n = profile_of(model), 100
    shape = Geometry(layers=3, query_heads=4, kv_heads=4, head_dim=16, fingerprint=profile.fingerprint)
    roles = profile.roles()
    full = {(0, head) for head in range(4) if roles.matrix[0][head] in (Role.PIVOT, Role.VOLATILE)}
    assert len(full) == roles.full_heads == 2
    table = RoleWeights(profile).divide(shape, tokens, n, protected).table
    counts = {(layer, head): table[layer][head] for layer in range(3) for head in range(4)}
    assert sum(counts.values()) == tokens * 12
    assert all(counts[at] == n for at in full)
    others = {at: count for at, count in counts.items() if at not in full}
    sure = min(protected, (tokens * 12 - 2 * n) // 10)
    weights = [roles.weight_of(*at) for at in others]
    levels = slow_levels(weights, tokens * 12 - 2 * n - sure * 10, n - sure)
    for count, level in zip(others.values(), levels, strict=True):
        assert abs(count - sure - level) < 1.001
    smallest = RoleWeights(profile).minimum_tokens(shape, n)
    assert smallest == math.ceil(3 * n / 12)


def test_full_heads_are_given_up_where_they_exceed_the_budget() -> None:
    profile = profile_of(tiny_model(kv_heads=4, layers=3))
    shape = Geometry(3, 4, 4, 16, profile.fingerprint)
    fitting = RoleWeights(profile, {"fit_budget": True})
    assert fitting.minimum_tokens(shape, 100) == 1
    for tokens, full in ((25, 2), (24, 1), (16, 0), (2, 0)):
        table = fitting.divide(shape, tokens, 100, 0).table
        assert sum(map(sum, table)) == tokens * 12
        assert sum(count == 100 for row in table for count in row) == full


# --- all of them


def counts_of(division: Division, shape: Geometry, n: int, seed: int = 0) -> list[list[int]]:
    """What is left to every head after the whole prompt."""
    generator = torch.Generator().manual_seed(seed)
    counts = []
    for layer in range(shape.layers):
        q = torch.randn(shape.query_heads, n, shape.head_dim, generator=generator) * 2
        k = torch.randn(shape.kv_heads, n, shape.head_dim, generator=generator)
        scores = torch.rand(shape.kv_heads, n, generator=generator)
        counts.append(division.counts(layer, scores, q, k))
    return [division.revised(layer) for layer in range(shape.layers)] if division.cascades else counts


ALLOCATIONS = {
    "uniform": Uniform(),
    "pyramid": Pyramid(beta=7),
    "preference": Preference(window=3),
    "adaptive": Adaptive(),
    "adaptive-pyramid": Adaptive(0.1, {"name": "pyramid", "beta": 5}),
    "roles": RoleWeights(),
}


@pytest.mark.parametrize("name", ALLOCATIONS)
@settings(max_examples=40)
@given(data=st.data())
def test_every_allocation_spends_the_budget_exactly(name: str, data: st.DataObject) -> None:
    layers, heads = data.draw(st.integers(1, 4)), data.draw(st.sampled_from([1, 2, 4]))
    n, allocation = data.draw(st.integers(2, 80)), ALLOCATIONS[name]
    protected = data.draw(st.integers(0, n - 1))
    if name == "roles":
        profile = profile_of(tiny_model(kv_heads=heads, layers=layers))
        allocation = RoleWeights(profile, {"fit_budget": True})
        shape = Geometry(layers, 4, heads, 16, profile.fingerprint)
    else:
        shape = Geometry(layers, 4, heads, 16)
    tokens = data.draw(st.integers(protected + 1, n))
    counts = counts_of(allocation.divide(shape, tokens, n, protected), shape, n)
    assert [len(row) for row in counts] == [heads] * layers
    assert sum(map(sum, counts)) == tokens * layers * heads
    assert allocation.kept_tokens(shape, tokens, n, protected) == tokens * layers * heads
    if name != "roles":  # full heads may leave less than that
        assert all(protected <= count <= n for row in counts for count in row)


# --- with any scorer, on a model

SCORERS: dict[str, dict[str, Any]] = {
    "snapkv": {"window": 4},
    "pyramidkv": {"window": 4},
    "cake": {"window": 4},
    "h2o": {"recent": 8},
    "streaming_llm": {},
    "random": {"recent": 4},
}
SPLITS = ["uniform", "pyramid", "preference", "adaptive", "roles"]


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("name", SCORERS)
def test_any_scorer_goes_with_any_allocation(name: str, split: str) -> None:
    """The budget is spent exactly, the last tokens stay, and both ways of generating give the same tokens."""
    model = tiny_model(kv_heads=4, layers=3)
    allocation = {"name": "roles", "profile": profile_of(model)} if split == "roles" else split
    method = make(name, **SCORERS[name], allocation=allocation)
    (ids, mask), heads = random_ids(2, 90, padded=True), 12
    cache = KVCache(model, method, 0.45)
    with torch.inference_mode():
        model(ids, attention_mask=mask, past_key_values=cache)
        stored = cache.nbytes()["device"]["payload"]
        asked = sum(cache.budget.tokens(n) for n in cache.prompt_tokens)
        assert stored == asked * heads * 2 * 16 * 4
        last = {"h2o": 8, "streaming_llm": 1}.get(name, 4)
        for layer in range(3):
            for n, sequence in zip(cache.prompt_tokens, cache.kept(layer), strict=True):
                assert all(head[-last:].tolist() == list(range(n - last, n)) for head in sequence)
        if split != "uniform" and name != "pyramidkv":
            sizes = {len(head) for layer in range(3) for head in cache.kept(layer)[0]}
            assert len(sizes) > 1 or (name, split) == ("streaming_llm", "adaptive")
        out = Generator(model, method, 0.45).generate(ids, mask, max_new_tokens=5)
        assert out.memory.device_payload == stored
        again = KVCache(model, method, 0.45)
        whole = model.generate(
            ids, attention_mask=mask, past_key_values=again, max_new_tokens=5, do_sample=False
        )
    assert whole[:, 90:].tolist() == out.tokens.tolist()
    grown = again.nbytes()["device"]["payload"] - stored
    assert grown == (0 if method.constant_size else 4 * 2 * heads * 2 * 16 * 4)


def prefilled(method: Any, shape: Geometry, budget: Budget, n: int) -> Iterator[tuple[Any, int]]:
    """The layers after a random prompt, and the most bytes alive while each came in."""
    for state in method.layers(shape, budget, [n]):
        state.backend = BACKENDS["sdpa"]
        q, k, v = (torch.randn(1, heads, n, 32) for heads in (8, 4, 4))
        with Operations() as operations:
            state.prefill(q, k, v, None)
        yield state, operations.peak_bytes


@pytest.mark.parametrize("n", [8192, 32768])
@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("snapkv", {}),
        ("pyramidkv", {}),
        ("random", {}),
        ("snapkv", {"allocation": "adaptive"}),
        ("snapkv", {"allocation": "preference"}),
    ],
    ids=lambda x: x if isinstance(x, str) else "-".join(x.values()),
)
def test_a_long_prompt_takes_what_is_planned_and_64_mib_while_it_comes_in(
    name: str, hyper: dict[str, Any], n: int
) -> None:
    method, shape, budget = make(name, **hyper), Geometry(6, 8, 4, 32), Budget(kept_fraction=0.1)
    states, peaks = zip(*prefilled(method, shape, budget, n), strict=True)
    device = [state.nbytes()["device"] for state in states]
    measured = sum(part["payload"] + part["metadata"] for part in device)
    assert measured == pytest.approx(method.usage(shape, budget, n, 4).device_bytes, rel=0.01)
    assert sum(part["payload"] for part in device) == budget.tokens(n) * shape.heads * 2 * 32 * 4
    for layer, peak in enumerate(peaks):
        # Where a layer cuts earlier ones too, what these let go has been allocated before.
        kept = sum(device[layer].values()) if "allocation" not in hyper else budget.tokens(n) * 24 * 256
        assert peak <= kept + 64 * 2**20


# --- what is typed

MADE = [
    ("preference", Preference()),
    ("adaptive", Adaptive()),
    ("roles", RoleWeights()),
    ("{name:pyramid,beta:10}", Pyramid(10)),
    ("{name:pyramid,rounding:official}", Pyramid(rounding=PyramidSum.official)),
    ("{name:adaptive,floor:0.5,layers:{name:pyramid,beta:3}}", Adaptive(0.5, {"name": "pyramid", "beta": 3})),
    ("{name:roles,roles:{fit_budget:true}}", RoleWeights(roles={"fit_budget": True})),
    ("null", Uniform()),
]


@pytest.fixture(scope="module")
def registered() -> None:
    register()


def compose(*lines: str, multirun: bool = False) -> list[RunConfig]:
    overrides.check(overrides.parse(lines))
    return compose_all(lines, multirun)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize(("typed", "made"), MADE, ids=[typed for typed, _ in MADE])
def test_an_allocation_is_chosen_on_the_command_line(typed: str, made: Any) -> None:
    (run,) = compose("method=snapkv", f"method.allocation={typed}")
    assert run.method.split == made


@pytest.mark.usefixtures("registered")
def test_allocations_are_swept() -> None:
    runs = compose("method=snapkv", "method.allocation=uniform,{name:pyramid,beta:2}", "tag=x", multirun=True)
    assert [run.method.split for run in runs] == [Uniform(), Pyramid(2)]


WRONG = [
    ("adaptve", "unknown allocation 'adaptve'; did you mean 'adaptive'?"),
    ({"name": "pyramids"}, "unknown allocation 'pyramids'; did you mean 'pyramid'?"),
    ({"name": "pyramid", "betta": 3}, "unknown setting of allocation pyramid 'betta'; did you mean 'beta'?"),
    ({"beta": 3}, "must be one of adaptive, preference, pyramid, roles, uniform, or a mapping"),
    (3, "method.allocation=3 must be one of"),
    ({"name": "pyramid", "beta": 0}, "beta=0 of the pyramid allocation must be a whole number, at least 1"),
    ({"name": "pyramid", "rounding": "offical"}, "'offical'; did you mean 'official'?"),
    ({"name": "preference", "tau1": 0}, "tau1=0 of the preference allocation must be above 0"),
    ({"name": "preference", "tau2": "x"}, "has a value of the wrong type"),
    ({"name": "preference", "window": 1}, "window=1 of the preference allocation must be"),
    ({"name": "preference", "window": 2.5}, "window=2.5 of the preference allocation must be a whole number"),
    ({"name": "adaptive", "floor": 1.1}, "floor=1.1 of the adaptive allocation must be between 0 and 1"),
    ({"name": "adaptive", "layers": "preference"}, "must be uniform or pyramid"),
    ({"name": "adaptive", "layers": "pyramd"}, "did you mean 'pyramid'?"),
    (
        {"name": "roles", "roles": {"fitbudget": True}},
        "setting of roles 'fitbudget'; did you mean 'fit_budget'?",
    ),
    ({"name": "roles", "roles": {"graph": "meadian"}}, "roles.graph 'meadian'; did you mean 'median'?"),
]


@pytest.mark.parametrize(("given", "said"), WRONG, ids=[str(given) for given, _ in WRONG])
def test_wrong_allocations_are_refused_with_a_hint(given: Any, said: str) -> None:
    with pytest.raises(ValueError, match=".") as error:
        make("snapkv", allocation=given)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("typed", ["adaptve", "{name:pyramid,betta:3}"])
def test_wrong_allocations_on_the_command_line_are_refused_with_a_hint(typed: str) -> None:
    with pytest.raises(ConfigError, match="did you mean"):
        compose("method=snapkv", f"method.allocation={typed}")


@pytest.mark.parametrize("name", ["snapkv", "random", "h2o"])
def test_a_head_with_less_than_is_protected_keeps_the_latest(name: str) -> None:
    """Full heads leave the others fewer tokens than the window: what goes is the window's beginning."""
    model = tiny_model(kv_heads=4)
    hyper = {"snapkv": {"window": 32}, "random": {"sinks": 0, "recent": 32}, "h2o": {}}[name]
    allocation = {"name": "roles", "profile": profile_of(model)}
    cache = KVCache(model, make(name, **hyper, allocation=allocation), 40)
    with torch.inference_mode():
        model(random_ids(1, 100)[0], past_key_values=cache)
    for head in (head for layer in range(2) for head in cache.kept(layer)[0]):
        last = min(len(head), 20)
        assert head[-last:].tolist() == list(range(100 - last, 100))

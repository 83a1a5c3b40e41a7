"""PyramidKV: layer budgets by the rule, the official rounding's excess, and SnapKV's selection under them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcache import Budget, Generator, Geometry, KVCache
from hcache.allocation import Pyramid, PyramidSum
from hcache.contract.tiny_models import prompts as random_ids
from hcache.contract.tiny_models import tiny_model
from hcache.methods import make
from hcache.scoring import Group, Pooling
from tests.test_snapkv import HEADS, as_lists, assert_attends_to, prompt_of, slow_kept, states_of

EXACT, OFFICIAL = PyramidSum.exact, PyramidSum.official


def sizes(
    layers: int, tokens: int, prompt: int, window: int, beta: int = 20, rounding: PyramidSum = EXACT
) -> list[int]:
    """Tokens that each head of each layer keeps."""
    shape = Geometry(layers=layers, query_heads=4, kv_heads=2, head_dim=8)
    table = Pyramid(beta, rounding).divide(shape, tokens, prompt, window).table
    assert all(len(set(row)) == 1 and len(row) == 2 for row in table)
    return [row[0] for row in table]


def official_ends(tokens: int, prompt: int, window: int, beta: int) -> tuple[int, int]:
    """What the first and the last layer keep besides the window, by the official code's rule."""
    base = tokens - window
    last = base // beta
    first = 2 * base - last
    if first >= prompt - window:
        first = prompt - window
        last = 2 * base - first
    return first, last


@st.composite
def pyramids(draw: st.DrawFn) -> tuple[int, int, int, int, int]:
    """layers, tokens, prompt, window, beta of a prompt that is cut."""
    window = draw(st.integers(1, 64))
    tokens = window + draw(st.integers(1, 600))
    prompt = tokens + draw(st.integers(0, 3000))
    return draw(st.integers(1, 48)), tokens, prompt, window, draw(st.integers(1, 60))


@given(pyramids())
def test_exact_rounding_spends_the_budget_on_a_falling_line(shape: tuple[int, int, int, int, int]) -> None:
    layers, tokens, prompt, window, beta = shape
    kept = sizes(*shape)
    assert sum(kept) == layers * tokens
    assert kept == sorted(kept, reverse=True)
    assert window + (tokens - window) // beta <= kept[-1] <= kept[0] <= prompt
    if layers == 1 or prompt < 2 * (tokens - window):
        assert kept == [tokens] * layers
        return
    first, last = official_ends(tokens, prompt, window, beta)
    for layer, size in enumerate(kept):
        on_the_line = first - layer * (first - last) / (layers - 1)
        assert abs(size - window - on_the_line) < 1


@given(pyramids())
def test_official_rounding_exceeds_the_budget_by_what_its_steps_are_rounded_by(
    shape: tuple[int, int, int, int, int],
) -> None:
    layers, tokens, prompt, window, beta = shape
    kept = sizes(*shape, OFFICIAL)
    excess = sum(kept) - layers * tokens
    if layers == 1 or prompt < 2 * (tokens - window):
        assert kept == [tokens] * layers
        return
    first, last = official_ends(tokens, prompt, window, beta)
    step = (first - last) // (layers - 1)
    assert kept == [window + first - layer * step for layer in range(layers)]
    assert excess == layers * ((first - last) % (layers - 1)) / 2
    assert 0 <= excess <= layers * (layers - 2) / 2


@pytest.mark.parametrize(
    ("tokens", "window", "prompt", "first", "last", "excess"),
    [
        (128, 8, 8000, 242, 25, 176),
        (2048, 8, 8000, 3986, 111, 16),
        (2048, 32, 32768, 3964, 151, 304),
        (1024, 32, 131072, None, None, 416),
        (512, 8, 1008, 991, 61, 448),
        (512, 8, 1000, 512, 512, 0),
    ],
)
def test_32_layers_have_the_sizes_of_the_official_code(
    tokens: int, window: int, prompt: int, first: int | None, last: int | None, excess: int
) -> None:
    kept = sizes(32, tokens, prompt, window, rounding=OFFICIAL)
    assert sum(kept) == 32 * tokens + excess
    if first is not None:
        assert (kept[0], kept[-1]) == (first, last)
    assert sum(sizes(32, tokens, prompt, window)) == 32 * tokens


def prompts_of(layers: int, *lengths: int, share: int = 2) -> list[list[Any]]:
    return [[prompt_of(n, share, seed=layer) for n in lengths] for layer in range(layers)]


RULE = {"window": 4, "kernel": 5, "pooling": Pooling.avg, "group": Group.mean}


@pytest.mark.parametrize("rounding", PyramidSum)
@pytest.mark.parametrize("share", [1, 2, 4])
def test_each_layer_selects_as_snapkv_with_that_layer_s_size(share: int, rounding: PyramidSum) -> None:
    """Lengths in one batch that are split evenly, cut at the prompt, and neither; left pads are NaN."""
    prompts = prompts_of(5, 50, 61, 150, share=share)
    states = states_of("pyramidkv", prompts, 33, **RULE, rounding=rounding)
    for layer, state in enumerate(states):
        expected = []
        for prompt in prompts[layer]:
            size = sizes(5, 33, prompt[1].shape[1], 4, rounding=rounding)[layer]
            expected.append(slow_kept(prompt, size, *RULE.values()))
        assert as_lists(state.kept()) == expected
        assert_attends_to(state, prompts[layer], expected)


@pytest.mark.parametrize(
    ("prompt", "kept"),
    [
        (39, [39] * 4),
        (40, [40] * 4),
        (71, [40] * 4),
        (72, [72, 51, 29, 8]),
        (73, [73, 51, 29, 7]),
        (500, [75, 52, 28, 5]),
    ],
    ids=["cap - 1", "cap", "2 base - 1", "2 base", "cut at the prompt", "long"],
)
def test_all_branches(prompt: int, kept: list[int]) -> None:
    """A budget of 40 with a window of 4: base 36, from 72 tokens on a pyramid."""
    batches = prompts_of(4, prompt)
    states = states_of("pyramidkv", batches, 40, **RULE)
    for layer, (state, size) in enumerate(zip(states, kept, strict=True)):
        (heads,) = as_lists(state.kept())
        assert [len(head) for head in heads] == [size] * HEADS
        assert all(head[-4:] == list(range(prompt - 4, prompt)) for head in heads)
        if prompt <= 40:
            assert_attends_to(state, batches[layer], [[list(range(prompt))] * HEADS])


@pytest.mark.parametrize("layers", [1, 3])
def test_beta_of_one_is_snapkv(layers: int) -> None:
    """And so is any beta in a single layer."""
    for beta in (1, 20) if layers == 1 else (1,):
        for rounding in PyramidSum:
            prompts = prompts_of(layers, 70, 90)
            pyramid = states_of("pyramidkv", prompts, 30, **RULE, beta=beta, rounding=rounding)
            uniform = states_of("snapkv", prompts, 30, **RULE)
            assert [as_lists(x.kept()) for x in pyramid] == [as_lists(x.kept()) for x in uniform]


@pytest.mark.parametrize(
    ("name", "hyper"),
    [
        ("pyramidkv", {"rounding": OFFICIAL}),
        ("snapkv", {"allocation": {"name": "pyramid", "rounding": "official"}}),
        (
            "snapkv",
            {"allocation": {"name": "adaptive", "layers": {"name": "pyramid", "rounding": "official"}}},
        ),
    ],
    ids=["pyramidkv", "allocation", "adaptive"],
)
@pytest.mark.parametrize("budget", [33, 0.3, 0.9])
def test_what_official_rounding_keeps_above_the_budget_is_planned_measured_and_recorded(
    name: str, hyper: dict[str, Any], budget: float | int
) -> None:
    model, (ids, _) = tiny_model(layers=6), random_ids(1, 120)
    method = make(name, window=4, **hyper)
    cache = KVCache(model, method, budget)
    model(ids, past_key_values=cache)
    plan = method.usage(cache.geometry, cache.budget, 120, 4)
    stored = sum(head.numel() for layer in range(6) for head in cache.kept(layer)[0])
    asked = cache.budget.tokens(120) * cache.geometry.heads
    above = sum(sizes(6, cache.budget.tokens(120), 120, 4, rounding=OFFICIAL)) * 2 - asked
    assert (above > 0) == (budget != 0.9)
    assert stored == asked + above
    assert cache.nbytes()["device"]["payload"] == plan.device_bytes == stored * 2 * 16 * 4
    assert plan.attended_tokens == stored / cache.geometry.heads
    assert plan.parts.get("above_budget", 0) == above
    generation = Generator(model, method, budget).generate(ids, max_new_tokens=2)
    assert generation.memory.device_payload == plan.device_bytes
    assert generation.counters["attended_fraction"] == pytest.approx(plan.attended_tokens / 120)


def test_exact_rounding_plans_the_budget() -> None:
    shape = Geometry(layers=6, query_heads=4, kv_heads=2, head_dim=16)
    plan = make("pyramidkv", window=4).usage(shape, Budget(kept_tokens=31), 120, 4)
    assert plan.parts == {"tokens": 31}
    assert plan.device_bytes == 31 * shape.heads * 2 * 16 * 4


@pytest.mark.parametrize("hyper", [{"beta": 5}, {"rounding": OFFICIAL}, {"rounding": "official"}])
def test_a_pyramid_beside_another_allocation_is_refused(hyper: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="have no effect with method.allocation='uniform'"):
        make("pyramidkv", allocation="uniform", **hyper)
    assert make("pyramidkv", allocation="uniform", beta=20, rounding="exact").split.name == "uniform"


@pytest.mark.parametrize("beta", [0, -1, 2.5])
def test_a_beta_below_one_is_refused(beta: float) -> None:
    with pytest.raises(ValueError, match=f"beta={beta} of the pyramid allocation must be a whole number"):
        make("pyramidkv", beta=beta)

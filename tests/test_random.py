"""Random: the draw depends on seed, layer and head alone, and what must stay stays."""

from __future__ import annotations

import pytest
import torch

from hcache import Budget, InfeasibleBudget
from hcache.methods import make
from tests.test_snapkv import HEADS, as_lists, assert_attends_to, geometry, prompt_of, states_of

SMALL = {"sinks": 3, "recent": 5}


def kept_of(tokens: int = 30, layers: int = 2, prompts: int = 0, **hyper: int) -> list[list[list[list[int]]]]:
    batches = [[prompt_of(n, seed=prompts + layer) for n in (70, 90, 70)] for layer in range(layers)]
    states = states_of("random", batches, tokens, **{**SMALL, **hyper})
    return [as_lists(state.kept()) for state in states]


def test_a_seed_always_draws_the_same_tokens_whatever_the_prompt_says() -> None:
    assert kept_of() == kept_of(prompts=50)
    assert kept_of(seed=3) == kept_of(seed=3)
    assert kept_of(seed=3) != kept_of() != kept_of(seed=-1)


def test_layers_and_heads_draw_differently_and_sequences_of_one_length_alike() -> None:
    kept = kept_of(layers=4)
    drawn = {tuple(head) for layer in kept for sequence in layer for head in sequence}
    assert len(drawn) == 4 * 2 * HEADS
    assert all(layer[0] == layer[2] != layer[1] for layer in kept)


def test_neither_seeds_nor_layers_are_each_other_s() -> None:
    """Layer 1 of seed 0 is not layer 0 of seed 1."""
    by_seed = [kept_of(layers=3, seed=seed) for seed in range(3)]
    assert len({str(layer) for kept in by_seed for layer in kept}) == 9


@pytest.mark.parametrize("tokens", [9, 30, 69])
def test_sinks_and_recents_stay_and_each_head_has_its_share(tokens: int) -> None:
    for layer in kept_of(tokens):
        for n, sequence in zip((70, 90, 70), layer, strict=True):
            for head in sequence:
                assert len(head) == tokens
                assert head == sorted(set(head))
                assert head[:3] == [0, 1, 2]
                assert head[-5:] == list(range(n - 5, n))


def test_every_token_between_is_as_likely() -> None:
    """2000 draws of half the tokens: each is kept 1000 times, give or take four standard deviations."""
    times = torch.zeros(70)
    for seed in range(1000):
        method = make("random", seed=seed, sinks=0, recent=0)
        scores = method.score_layer(0, *prompt_of(70))
        for row in scores:
            times[row.topk(35).indices] += 1
    assert (times - 1000).abs().max() < 4 * 500**0.5


def test_a_step_attends_to_what_is_kept() -> None:
    prompts = [prompt_of(70), prompt_of(90)]
    (state,) = states_of("random", [prompts], 30, **SMALL)
    assert_attends_to(state, prompts, as_lists(state.kept()))


def test_what_must_stay_must_fit_the_budget() -> None:
    method = make("random", sinks=3, recent=5)
    with pytest.raises(
        InfeasibleBudget, match="method.sinks=3 and method.recent=5 must be smaller"
    ) as caught:
        method.layers(geometry(), Budget(kept_tokens=8), [70])
    assert caught.value.smallest_tokens == 9
    for key in SMALL:
        with pytest.raises(ValueError, match=f"method.{key}=-1 must be 0 or more"):
            make("random", **{key: -1})

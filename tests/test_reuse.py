"""Steps of one prompt's states serve another prompt: what a captured CUDA graph does, shown on a CPU.

The first prompt's state objects do the later prompt's steps, with all that is baked into them; the later
prompt's own states only count.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

from hcache import Budget, Geometry
from hcache.attention.backends import BACKENDS
from hcache.attention.rope import Rope
from hcache.cache.room import Room, StickyRoom
from hcache.cache.state import LayerState
from hcache.contract.tiny_models import tiny_model
from hcache.methods import make
from tests.padding import Qkv, left_padded

DIM, HEADS, SHARE, LAYERS, STEPS = 16, 2, 2, 3, 20

METHODS: list[tuple[str, dict[str, Any]]] = [
    ("h2o", {}),
    ("h2o", {"heavy": 0.25}),
    ("cake", {"window": 6}),
    ("cake", {"window": 4, "pooling": "max", "group": "max"}),
    ("streaming_llm", {}),
    ("streaming_llm", {"positions": "rolling"}),
    ("snapkv", {"window": 4, "allocation": {"name": "preference", "window": 4}}),
    ("snapkv", {"window": 4, "allocation": "adaptive"}),
    ("pyramidkv", {"window": 4}),
    ("quest", {"page_size": 4, "skip_layers": 0}),
    ("quest", {"page_size": 8, "skip_layers": 0, "group": "per_query_head"}),
]

PROMPTS = {"one": ([170], [101]), "batch": ([170, 171], [150, 64]), "growing": ([70, 71], [66, 30])}
"""Lengths of the prompt whose steps are used, and of the one that they are used for."""


def normal(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def prompt_of(tokens: int, layer: int) -> Qkv:
    """Later layers attend more sharply."""
    heads = (HEADS * SHARE, HEADS, HEADS)
    q, k, v = (normal(h, tokens, DIM, seed=100 * tokens + 10 * layer + i) for i, h in enumerate(heads))
    return (0.5 + layer) * q, k, v


def token_at(step: int, layer: int, batch: int) -> Qkv:
    q, k, v = (normal(batch, h, 1, DIM, seed=5000 + 50 * step + layer) for h in (HEADS * SHARE, HEADS, HEADS))
    return q, k, v


def filled(
    name: str, hyper: dict[str, Any], budget: float | int, lengths: list[int], rooms: Sequence[Room]
) -> list[LayerState]:
    """States after a prompt, whose rooms have taken over what they hold."""
    shape = Geometry(layers=LAYERS, query_heads=HEADS * SHARE, kv_heads=HEADS, head_dim=DIM)
    method = make(name, **hyper)
    states = method.layers(shape, Budget.of(budget), lengths)
    for layer, (state, room) in enumerate(zip(states, rooms, strict=True)):
        state.backend, state.reserve_tokens, state.room = BACKENDS["sdpa"], STEPS, room
        if method.needs_rope:
            state.rope = Rope.of(tiny_model())
        state.prefill(*left_padded([prompt_of(n, layer) for n in lengths]))
    assert not any(state.pending for state in states)
    for state, room in zip(states, rooms, strict=True):
        room.adopt(state)
    return states


@pytest.mark.parametrize("prompts", list(PROMPTS))
@pytest.mark.parametrize(("name", "hyper"), METHODS, ids=str)
def test_steps_of_one_prompt_serve_another(name: str, hyper: dict[str, Any], prompts: str) -> None:
    """Outputs, kept sets and bytes are those of states that never knew another prompt."""
    lengths, others = PROMPTS[prompts]
    # Larger than both prompts: heads grow, fill up, and then evict.
    budget: float | int = 80 if prompts == "growing" else 0.4
    rooms = [StickyRoom() for _ in range(LAYERS)]
    captured = filled(name, hyper, budget, lengths, rooms)
    kinds = [state.ready(True).kind for state in captured]
    for layer, state in enumerate(captured):
        state.advance(*token_at(99, layer, len(lengths)), None)
    fresh = filled(name, hyper, budget, others, rooms)
    plain = filled(name, hyper, budget, others, [Room()] * LAYERS)
    assert sum(room.forget_changes() for room in rooms) == 0
    for t in range(STEPS):
        for layer, (state, steps, own) in enumerate(zip(fresh, captured, plain, strict=True)):
            token = token_at(t, layer, len(others))
            assert state.ready(True).kind == kinds[layer]
            out, expected = steps.advance(*token, None), own.step(*token, None)
            torch.testing.assert_close(out, expected, rtol=1e-5, atol=1e-6)
            for ours, theirs in zip(state.kept(), own.kept(), strict=True):
                assert [head.tolist() for head in ours] == [head.tolist() for head in theirs]
    for state, own in zip(fresh, plain, strict=True):
        ours, theirs = state.nbytes()["device"], own.nbytes()["device"]
        assert ours["payload"] == theirs["payload"]
        assert ours["metadata"] == pytest.approx(theirs["metadata"], abs=600)  # the store's own tables


@pytest.mark.parametrize(("name", "hyper"), METHODS, ids=str)
def test_a_longer_prompt_says_that_steps_must_be_captured_anew(name: str, hyper: dict[str, Any]) -> None:
    """Some layers may be as small as before."""
    rooms = [StickyRoom() for _ in range(LAYERS)]
    filled(name, hyper, 0.4, [100], rooms)
    assert sum(room.forget_changes() for room in rooms) == 0
    filled(name, hyper, 0.4, [600], rooms)
    assert sum(room.forget_changes() for room in rooms) > 0
    filled(name, hyper, 0.4, [100], rooms)
    assert sum(room.forget_changes() for room in rooms) == 0

"""Invariants 1, 2, 4, 5: full budgets are exact, the kept set explains the output, batches don't matter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hcache import Generator, KVCache
from hcache.attention.backends import BACKENDS
from hcache.geometry import Geometry
from tests.contract.cases import CASES, Case, profile_of
from tests.reference.masked import attend_to
from tests.tiny_models import FAMILIES, VOCABULARY, positions_of, prompts, tiny_model

STEPS = 64
PROMPT = 40


@pytest.fixture(params=CASES, ids=str)
def case(request: pytest.FixtureRequest) -> Case:
    return request.param


def forced_logits(model: PreTrainedModel, cache: object, ids: Tensor, mask: Tensor, forced: Tensor) -> Tensor:
    """Logits [steps + 1, B, V] of the prompt's last token and of each forced token."""
    positions, logits = positions_of(mask), []
    with torch.inference_mode():
        out = model(ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        logits.append(out.logits[:, -1])
        for t in range(forced.shape[1]):
            mask = torch.cat([mask, torch.ones_like(mask[:, :1])], dim=1)
            out = model(
                forced[:, t : t + 1],
                attention_mask=mask,
                position_ids=positions[:, -1:] + 1 + t,
                past_key_values=cache,
            )
            logits.append(out.logits[:, -1])
    return torch.stack(logits)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("kv_heads", [4, 2, 1])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_budget_for_everything_equals_the_full_cache(
    case: Case, family: str, kv_heads: int, batch: int, padded: bool
) -> None:
    model = tiny_model(family, kv_heads)
    ids, mask = prompts(batch, PROMPT, padded)
    forced = torch.randint(3, VOCABULARY, (batch, STEPS), generator=torch.Generator().manual_seed(5))
    cache = case.cache(model, PROMPT + STEPS + 1)
    ours = forced_logits(model, cache, ids, mask, forced)
    theirs = forced_logits(model, DynamicCache(config=model.config), ids, mask, forced)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-4)


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
@pytest.mark.parametrize("batch", [1, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_tokens_equal_those_of_the_full_cache(
    case: Case, family: str, batch: int, padded: bool
) -> None:
    model = tiny_model(family)
    ids, mask = prompts(batch, PROMPT, padded)
    options = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    theirs = model.generate(ids, **options)
    ours = model.generate(ids, past_key_values=case.cache(model, PROMPT + STEPS + 1), **options)
    assert torch.equal(ours, theirs)
    generated = Generator(model, case.make(model), PROMPT + STEPS + 1).generate(ids, mask, STEPS)
    assert torch.equal(generated.tokens, theirs[:, PROMPT:])


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_generate_and_generator_give_the_same_tokens_when_compressed(case: Case, padded: bool) -> None:
    model = tiny_model("llama", 4)
    ids, mask = prompts(3, 60, padded)
    theirs = model.generate(
        ids,
        attention_mask=mask,
        past_key_values=case.cache(model, 0.5),
        max_new_tokens=30,
        do_sample=False,
    )
    ours = Generator(model, case.make(model), 0.5).generate(ids, mask, 30)
    assert torch.equal(ours.tokens, theirs[:, 60:])


def test_a_sequence_is_the_same_alone_and_in_a_batch_and_after_another(case: Case) -> None:
    model = tiny_model("llama", 4)
    ids, mask = prompts(3, 60, padded=True)
    generator = Generator(model, case.make(model), 0.5)
    together = generator.generate(ids, mask, 24).tokens
    for b in (2, 0, 1, 2):
        alone = generator.generate(ids[b : b + 1, mask[b] == 1], None, 24).tokens
        assert torch.equal(alone[0], together[b])


def test_a_sequence_that_has_ended_counts_no_longer(case: Case) -> None:
    """Tokens, lengths and counters of a batch are those of its sequences alone, one of which ends early."""
    model = tiny_model("llama", 4)
    ids, mask = prompts(2, 60)
    generator = Generator(model, case.make(model), 0.5)
    free = generator.generate(ids, mask, 24).tokens
    stop = [free[0, 2:4].tolist()]
    together = generator.generate(ids, mask, 24, stop=stop)
    alone = [generator.generate(ids[b : b + 1], None, 24, stop=stop) for b in range(2)]
    assert together.lengths == [out.lengths[0] for out in alone]
    for key in set(together.counters) - {"attended_fraction", "decode_steps"}:
        assert together.counters[key] == sum(out.counters[key] for out in alone)


def layer_states(case: Case, lengths: list[int], budget: float, heads: int = 4) -> list:
    """Fresh states of two layers for prompts of these lengths, reading with the reference backend."""
    model = tiny_model("llama", heads)
    cache = case.cache(model, budget, backend="reference")
    geometry = cache.geometry
    assert isinstance(geometry, Geometry)
    states = cache.method.layers(geometry, cache.budget, lengths)
    for state in states:
        state.backend = BACKENDS["reference"]
    return states


def random_qkv(batch: int, tokens: int, heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, tokens, 16, generator=generator)
    k, v = torch.randn(2, batch, heads, tokens, 16, generator=generator)
    return q, k, v


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_output_is_attention_restricted_to_the_kept_set(case: Case, heads: int) -> None:
    """The kept set, by a mask in plain torch, gives the method's own output, step after step."""
    n, batch, steps = 50, 2, 12
    q, k, v = random_qkv(batch, n, heads, seed=1)
    for state in layer_states(case, [n] * batch, 0.5, heads):
        state.prefill(q, k, v, None)
        keys, values = k, v
        for t in range(steps):
            before = state.kept()
            q1, k1, v1 = random_qkv(batch, 1, heads, seed=100 + t)
            out = state.step(q1, k1, v1, None)
            keys, values = torch.cat([keys, k1], 2), torch.cat([values, v1], 2)
            for b in range(batch):
                visible = torch.zeros(heads, keys.shape[2], dtype=torch.bool)
                visible[:, n:] = True
                for h in range(heads):
                    assert torch.equal(before[b][h], before[b][h].unique())
                    visible[h, before[b][h]] = True
                expected = attend_to(q1[b, :, 0], keys[b], values[b], visible)
                torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_stored_keys_are_the_full_keys_at_the_kept_positions(case: Case) -> None:
    n, heads = 50, 4
    q, k, v = random_qkv(2, n, heads, seed=2)
    for state in layer_states(case, [n, n], 0.5):
        state.prefill(q, k, v, None)
        for t in range(8):
            kept = state.kept()
            state.step(*random_qkv(2, 1, heads, seed=9 + t), None)
            for s, positions in enumerate(h for sequence in kept for h in sequence):
                length = int(state.store.lengths[s])
                for stored, full in zip(state.store.read(s, length), (k, v), strict=True):
                    wanted = full.flatten(0, 1)[s, positions]
                    found = (stored.unsqueeze(0) == wanted.unsqueeze(1)).all(-1)
                    assert found.any(1).all()


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_follow_up_equals_the_same_tokens_one_by_one(case: Case, padded: bool) -> None:
    n, heads, more = 50, 4, 9
    q, k, v = random_qkv(2, n, heads, seed=4)
    valid = torch.ones(2, more, dtype=torch.bool)
    if padded:
        valid[1, :3] = False  # pads in the middle of the whole sequence
        valid[0, 5] = False
    block = layer_states(case, [n, n], 0.5)[0]
    single = layer_states(case, [n, n], 0.5)[0]
    for state in (block, single):
        state.prefill(q, k, v, None)
    q2, k2, v2 = random_qkv(2, more, heads, seed=6)
    together = block.extend(q2, k2, v2, valid if padded else None)
    apart = torch.cat(
        [
            single.step(*(x[:, :, t : t + 1] for x in (q2, k2, v2)), valid[:, t : t + 1] if padded else None)
            for t in range(more)
        ],
        dim=2,
    )
    rows = valid[:, None, :, None].expand_as(together)
    torch.testing.assert_close(together[rows], apart[rows], rtol=1e-4, atol=1e-5)
    assert [[h.tolist() for h in s] for s in block.kept()] == [[h.tolist() for h in s] for s in single.kept()]


def test_a_follow_up_question_through_the_model_equals_the_full_cache(case: Case) -> None:
    model = tiny_model("qwen3")
    ids, mask = prompts(3, PROMPT, padded=True)
    more, more_mask = prompts(3, 12, padded=True, seed=8)
    more_mask[:, :] = 1
    more_mask[1, :4] = 0
    everything = torch.cat([mask, more_mask], 1)
    positions = positions_of(everything)
    with torch.inference_mode():
        expected = model(torch.cat([ids, more], 1), attention_mask=everything, position_ids=positions).logits[
            :, -1
        ]
    out = Generator(model, case.make(model), PROMPT + 20).generate(ids, mask, 1, follow_up=(more, more_mask))
    assert torch.equal(out.tokens[:, 0], expected.argmax(-1))


def test_profiles_of_the_cases_have_every_role() -> None:
    counts = profile_of(tiny_model("llama", 4)).roles().counts
    assert min(counts.values()) >= 1


def test_two_caches_live_on_one_model(case: Case) -> None:
    model = tiny_model("llama", 4)
    ids, mask = prompts(1, 60)
    alone = [Generator(model, case.make(model), b).generate(ids, mask, 10).tokens for b in (0.5, 0.8)]
    caches: list[KVCache] = [case.cache(model, b) for b in (0.5, 0.8)]
    tokens: list[list[Tensor]] = [[], []]
    with torch.inference_mode():
        feed = [ids, ids]
        for _ in range(10):
            for i, cache in enumerate(caches):
                feed[i] = model(feed[i], past_key_values=cache).logits[:, -1:].argmax(-1)
                tokens[i].append(feed[i])
    for expected, got in zip(alone, tokens, strict=True):
        assert torch.equal(torch.cat(got, 1), expected)
    assert model.config._attn_implementation == "sdpa"

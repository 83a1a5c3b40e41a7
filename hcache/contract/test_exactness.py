"""Invariants 1, 2, 4, 5: full budgets are exact, the kept set explains the output, batches don't matter."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hcache import Generator, KVCache
from hcache.attention.backends import BACKENDS
from hcache.attention.rope import Rope
from hcache.cache.state import LayerState, StoreLayer
from hcache.contract.cases import CASES, Case, profile_of
from hcache.contract.masked import attend_to
from hcache.contract.tiny_models import FAMILIES, VOCABULARY, positions_of, prompts, tiny_model

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
    model = case.model(family, kv_heads)
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
    model = case.model(family, 2)
    ids, mask = prompts(batch, PROMPT, padded)
    options = {"attention_mask": mask, "max_new_tokens": STEPS, "do_sample": False}
    theirs = model.generate(ids, **options)
    ours = model.generate(ids, past_key_values=case.cache(model, PROMPT + STEPS + 1), **options)
    assert torch.equal(ours, theirs)
    generated = Generator(model, case.make(model), PROMPT + STEPS + 1).generate(ids, mask, STEPS)
    assert torch.equal(generated.tokens, theirs[:, PROMPT:])


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_generate_and_generator_give_the_same_tokens_when_compressed(case: Case, padded: bool) -> None:
    model = case.model()
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
    model = case.model()
    ids, mask = prompts(3, 60, padded=True)
    generator = Generator(model, case.make(model), 0.5)
    together = generator.generate(ids, mask, 24).tokens
    for b in (2, 0, 1, 2):
        alone = generator.generate(ids[b : b + 1, mask[b] == 1], None, 24).tokens
        assert torch.equal(alone[0], together[b])


def test_a_sequence_that_has_ended_counts_no_longer(case: Case) -> None:
    """Tokens, lengths and counters of a batch are those of its sequences alone, one of which ends early."""
    model = case.model()
    ids, mask = prompts(2, 60)
    generator = Generator(model, case.make(model), 0.5)
    free = generator.generate(ids, mask, 24).tokens
    stop = [free[0, 2:4].tolist()]
    together = generator.generate(ids, mask, 24, stop=stop)
    alone = [generator.generate(ids[b : b + 1], None, 24, stop=stop) for b in range(2)]
    assert together.lengths == [out.lengths[0] for out in alone]
    for key in set(together.counters) - {"attended_fraction", "decode_steps"}:
        assert together.counters[key] == sum(out.counters[key] for out in alone)


def layer_states(case: Case, lengths: list[int], budget: float, heads: int = 4) -> list[LayerState]:
    """Fresh states of two layers for prompts of these lengths, reading with the reference backend."""
    model = case.model(kv_heads=heads)
    cache = case.cache(model, budget, backend="reference")
    states = cache.method.layers(cache.geometry, cache.budget, lengths)
    for state in states:
        state.backend = BACKENDS["reference"]
        if cache.method.needs_rope:
            state.rope = Rope.of(model)
    return states


def random_qkv(batch: int, tokens: int, heads: int, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    q = torch.randn(batch, 4, tokens, 16, generator=generator)
    k, v = torch.randn(2, batch, heads, tokens, 16, generator=generator)
    return q, k, v


class Run:
    """States in the order in which a model calls them, and everything each layer has been fed."""

    def __init__(self, case: Case, tokens: int, batch: int = 2, heads: int = 4) -> None:
        self.states = layer_states(case, [tokens] * batch, 0.5, heads)
        method = case.make(case.model(kv_heads=heads))
        self.selects = method.selects
        # Later on, methods of constant size evict generated tokens too, of which `kept` says nothing.
        self.longest = 4 if method.constant_size else 12
        self.batch, self.heads, self.steps = batch, heads, 0
        self.fed = [random_qkv(batch, tokens, heads, seed=layer) for layer in range(len(self.states))]
        for state, (q, k, v) in zip(self.states, self.fed, strict=True):
            state.prefill(q, k, v, None)

    def step(self) -> Iterator[tuple[LayerState, Tensor, Tensor, list[list[Tensor]]]]:
        """One token through all layers: a layer, its query, its output, and what it attended to."""
        self.steps += 1
        for layer, state in enumerate(self.states):
            q1, k1, v1 = random_qkv(self.batch, 1, self.heads, seed=100 * self.steps + layer)
            before = state.kept()
            out = state.step(q1, k1, v1, None)
            _, k, v = self.fed[layer]
            self.fed[layer] = (q1, torch.cat([k, k1], 2), torch.cat([v, v1], 2))
            yield state, q1, out, state.kept() if self.selects else before


def skip_unmasked(case: Case) -> None:
    if case.unmasked:
        pytest.skip(case.unmasked)


@pytest.mark.parametrize("heads", [4, 2, 1])
def test_output_is_attention_restricted_to_the_kept_set(case: Case, heads: int) -> None:
    """The kept set, by a mask in plain torch, gives the method's own output, step after step."""
    skip_unmasked(case)
    n = 50
    run = Run(case, n, heads=heads)
    for _ in range(run.longest):
        for layer, (_, q1, out, kept) in enumerate(run.step()):
            _, keys, values = run.fed[layer]
            for b in range(run.batch):
                visible = torch.zeros(heads, keys.shape[2], dtype=torch.bool)
                visible[:, n:] = True
                for h in range(heads):
                    assert torch.equal(kept[b][h], kept[b][h].unique())
                    visible[h, kept[b][h]] = True
                expected = attend_to(q1[b, :, 0], keys[b], values[b], visible)
                torch.testing.assert_close(out[b, :, 0], expected, rtol=1e-4, atol=1e-5)


def test_stored_keys_are_the_full_keys_at_the_kept_positions(case: Case) -> None:
    skip_unmasked(case)
    n, heads = 50, 4
    run = Run(case, n, heads=heads)
    for _ in range(8):
        for layer, (state, _, _, kept) in enumerate(run.step()):
            if not isinstance(state, StoreLayer):
                pytest.skip("has a store of its own")
            _, k, v = run.fed[layer]
            for s, positions in enumerate(h for sequence in kept for h in sequence):
                if not run.selects:  # a token that this step has evicted is gone
                    after = state.kept()[s // heads][s % heads]
                    positions = positions[torch.isin(positions, after)]
                length = int(state.store.lengths[s])
                for stored, full in zip(state.store.read(s, length), (k, v), strict=True):
                    wanted = full.flatten(0, 1)[s, positions]
                    found = (stored.unsqueeze(0) == wanted.unsqueeze(1)).all(-1)
                    assert found.any(1).all()


@pytest.mark.parametrize("padded", [False, True], ids=["plain", "padded"])
def test_a_follow_up_equals_the_same_tokens_one_by_one(case: Case, padded: bool) -> None:
    if case.dense_follow_ups:
        pytest.skip("several tokens at once are dense by rule")
    heads, more = 4, 9
    valid = torch.ones(2, more, dtype=torch.bool)
    if padded:
        valid[1, :3] = False  # pads in the middle of the whole sequence
        valid[0, 5] = False
    block, single = Run(case, 50, heads=heads).states, Run(case, 50, heads=heads).states
    qkv = [random_qkv(2, more, heads, seed=6 + layer) for layer in range(len(block))]
    together = [state.extend(*fed, valid if padded else None) for state, fed in zip(block, qkv, strict=True)]
    apart: list[list[Tensor]] = [[] for _ in single]
    for t in range(more):
        for state, fed, outs in zip(single, qkv, apart, strict=True):
            token = (x[:, :, t : t + 1] for x in fed)
            outs.append(state.step(*token, valid[:, t : t + 1] if padded else None))
    for a, b, outs, whole in zip(block, single, apart, together, strict=True):
        rows = valid[:, None, :, None].expand_as(whole)
        torch.testing.assert_close(whole[rows], torch.cat(outs, dim=2)[rows], rtol=1e-4, atol=1e-5)
        assert [[h.tolist() for h in s] for s in a.kept()] == [[h.tolist() for h in s] for s in b.kept()]


def test_a_follow_up_question_through_the_model_equals_the_full_cache(case: Case) -> None:
    model = case.model("qwen3", 2)
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
    counts = profile_of(tiny_model(kv_heads=4)).roles().counts
    assert min(counts.values()) >= 1


def test_two_caches_live_on_one_model(case: Case) -> None:
    model = case.model()
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

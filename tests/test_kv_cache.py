"""KVCache as transformers sees it: switched on for its own forwards only, clear about what it can't do."""

from __future__ import annotations

import copy
import gc

import pytest
import torch
from transformers import (
    DynamicCache,
    GemmaConfig,
    GemmaForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

from hcache import Budget, Generator, KVCache
from hcache.attention import function as attention
from hcache.contract.tiny_models import prompts, tiny_model

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 101,
}


def test_the_attention_function_is_ours_only_while_a_forward_carries_the_cache() -> None:
    model = tiny_model()
    ids, _ = prompts(1, 20)
    seen = []
    handle = model.model.layers[0].register_forward_pre_hook(
        lambda *_: seen.append(model.config._attn_implementation)
    )
    cache = KVCache(model, "snapkv", 12, window=4)
    with torch.inference_mode():
        model(ids)
        model(ids, past_key_values=cache)
        model(ids, past_key_values=DynamicCache(config=model.config))
    handle.remove()
    assert seen == ["sdpa", attention.NAME, "sdpa"]
    assert model.config._attn_implementation == "sdpa"


def test_hooks_go_with_the_cache() -> None:
    model = tiny_model()
    before = len(model.base_model._forward_pre_hooks)
    cache = KVCache(model, "fullkv")
    assert len(model.base_model._forward_pre_hooks) == before + 1
    del cache
    gc.collect()
    assert len(model.base_model._forward_pre_hooks) == before
    assert len(model.base_model._forward_hooks) == 0


def test_an_exception_inside_a_forward_breaks_the_cache_and_restores_the_model() -> None:
    model = tiny_model()
    ids, _ = prompts(1, 20)
    cache = KVCache(model, "snapkv", 12, window=4)

    def fail(*_: object) -> None:
        raise RuntimeError("planted")

    handle = model.model.layers[1].register_forward_pre_hook(fail)
    with torch.inference_mode(), pytest.raises(RuntimeError, match="planted"):
        model(ids, past_key_values=cache)
    handle.remove()
    assert model.config._attn_implementation == "sdpa"
    with torch.inference_mode(), pytest.raises(ValueError, match="broke off"):
        model(ids, past_key_values=cache)
    fresh = Generator(model, "snapkv", 12, window=4).generate(ids, max_new_tokens=4)
    assert fresh.tokens.shape == (1, 4)


def test_a_second_prompt_after_reset_is_a_fresh_cache() -> None:
    model = tiny_model()
    ids, _ = prompts(2, 60)
    cache = KVCache(model, "snapkv", 0.4, window=4)
    fresh = KVCache(model, "snapkv", 0.4, window=4)
    with torch.inference_mode():
        model(ids[:1], past_key_values=cache)
        cache.reset()
        again = model(ids[1:, :33], past_key_values=cache).logits
        expected = model(ids[1:, :33], past_key_values=fresh).logits
    assert torch.equal(again, expected)
    assert cache.prompt_tokens == [33]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_beams": 2}, "beam search"),
        ({"prefill_chunk_size": 8}, "chunked prefill"),
        ({"use_cache": False}, "use_cache=True"),
    ],
)
def test_what_generate_can_not_have_is_refused(options: dict, message: str) -> None:
    model = tiny_model()
    ids, _ = prompts(1, 20)
    cache = KVCache(model, "snapkv", 12, window=4)
    with pytest.raises(ValueError, match=message):
        model.generate(ids, past_key_values=cache, max_new_tokens=4, do_sample=False, **options)


def test_cropping_selecting_and_repeating_are_refused() -> None:
    cache = KVCache(tiny_model(), "fullkv")
    for call in (cache.crop, cache.batch_repeat_interleave):
        with pytest.raises(ValueError, match="KVCache"):
            call(1)
    with pytest.raises(ValueError, match="selecting"):
        cache.batch_select_indices(torch.tensor([0]))


def test_another_model_or_batch_is_refused() -> None:
    ids, _ = prompts(2, 20)
    cache = KVCache(tiny_model("llama"), "fullkv")
    with torch.inference_mode():
        with pytest.raises(ValueError, match="another model"):
            tiny_model("qwen2")(ids, past_key_values=cache)
        cache.reset()
        tiny_model("llama")(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="batch of 1"):
            tiny_model("llama")(ids[:1, :1], past_key_values=cache)


def test_sliding_windows_are_refused_and_never_ignored() -> None:
    config = MistralConfig(**SIZES, sliding_window=8)
    with pytest.raises(ValueError, match="sliding_window"):
        KVCache(MistralForCausalLM(config).eval(), "fullkv")


@pytest.mark.parametrize("name", ["softcap", "sliding_window", "s_aux"])
def test_attention_arguments_that_are_not_implemented_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        attention.refuse_arguments(torch.nn.Linear(1, 1), {name: 3.0})


def test_other_families_and_scalings_equal_their_own_cache() -> None:
    """Gemma (head_dim unlike hidden/heads) and a Llama whose attention is scaled differently."""
    torch.manual_seed(0)
    gemma = GemmaForCausalLM(GemmaConfig(**SIZES, initializer_range=0.2)).eval().requires_grad_(False)
    llama = LlamaForCausalLM(LlamaConfig(**SIZES, initializer_range=0.2)).eval().requires_grad_(False)
    for layer in llama.model.layers:
        layer.self_attn.scaling = 0.1
    ids, _ = prompts(1, 30)
    for model in (gemma, llama):
        model.generation_config.eos_token_id = None
        theirs = model.generate(ids, max_new_tokens=20, do_sample=False, pad_token_id=0)
        ours = Generator(model, "fullkv").generate(ids, max_new_tokens=20).tokens
        assert torch.equal(ours, theirs[:, 30:])


def test_budgets_and_names_are_checked_at_once() -> None:
    model = tiny_model()
    with pytest.raises(ValueError, match="needs a budget"):
        KVCache(model, "snapkv")
    with pytest.raises(ValueError, match="did you mean 'snapkv'"):
        KVCache(model, "snapvk", 0.5)
    with pytest.raises(ValueError, match="did you mean 'window'"):
        KVCache(model, "snapkv", 0.5, windw=3)
    assert KVCache(model, "snapkv", Budget(kept_tokens=40)).budget.kept_tokens == 40


def test_before_a_prompt_there_is_nothing_to_ask_for() -> None:
    cache = KVCache(tiny_model(), "fullkv")
    with pytest.raises(ValueError, match="has not seen a prompt"):
        cache.kept(0)
    assert cache.get_seq_length() == 0


def test_a_model_that_ignores_the_attention_interface_is_refused() -> None:
    model = copy.deepcopy(tiny_model())
    ids, _ = prompts(1, 20)

    def own_attention(hidden_states, position_embeddings=None, past_key_values=None, cache=None, **_):
        keys = torch.zeros(1, 2, hidden_states.shape[1], 16)
        (past_key_values if cache is None else cache).update(keys, keys, 0)
        return hidden_states, None

    model.model.layers[0].self_attn.forward = own_attention
    with torch.inference_mode(), pytest.raises(ValueError, match="did not attend through"):
        model(ids, past_key_values=KVCache(model, "fullkv"))
    assert model.config._attn_implementation == "sdpa"


def test_a_sequence_without_a_token_is_refused() -> None:
    (ids, mask), model = prompts(2, 20), tiny_model()
    mask[1] = 0
    with pytest.raises(ValueError, match="leaves sequence 1 of the batch without a token"):
        model(ids, attention_mask=mask, past_key_values=KVCache(model, "snapkv", 1.0))

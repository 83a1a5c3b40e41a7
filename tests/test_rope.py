"""The model's rotary embedding, taken off and put on, against what the models themselves store."""

from __future__ import annotations

import copy
import gc
import weakref
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    DynamicCache,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from hcache import KVCache
from hcache.attention.rope import Rope
from hcache.contract.tiny_models import FAMILIES, positions_of, prompts, tiny_model

SHAPE = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL = {**SHAPE, "num_key_value_heads": 2, "vocab_size": 101, "pad_token_id": 0}
SCALINGS: dict[str, dict[str, Any]] = {
    "default": {},
    "linear": {"factor": 4.0},
    "llama3": {
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 64,
    },
    "yarn": {"factor": 4.0, "original_max_position_embeddings": 64},
}


def scaled_model(kind: str, **options: Any) -> PreTrainedModel:
    parameters = {"rope_type": kind, "rope_theta": 10000.0, **SCALINGS.get(kind, {}), **options}
    torch.manual_seed(3)
    return LlamaForCausalLM(LlamaConfig(**SMALL, rope_parameters=parameters)).eval()


def keys_of(model: PreTrainedModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """The first layer's keys [B, H, T, D] as they go into its rotation, and as the model stores them."""
    attention, seen = model.base_model.layers[0].self_attn, []
    part = getattr(attention, "k_norm", attention.k_proj)
    handle = part.register_forward_hook(lambda module, args, out: seen.append(out))
    cache = DynamicCache(config=model.config)
    with torch.inference_mode():
        model(ids, attention_mask=mask, position_ids=positions_of(mask), past_key_values=cache)
    handle.remove()
    batch, tokens = ids.shape
    return seen[0].view(batch, tokens, -1, 16).transpose(1, 2), cache.layers[0].keys


def check_against(model: PreTrainedModel, tolerance: float = 1e-5) -> None:
    """Rotation, its inverse and a shift, with the model's own keys at the positions of a padded batch."""
    rope, (ids, mask) = Rope.of(model), prompts(3, 50, padded=True)
    plain, stored = keys_of(model, ids, mask)
    positions = positions_of(mask)
    close = {"rtol": tolerance, "atol": tolerance * float(stored.abs().max())}
    torch.testing.assert_close(rope.rotate(plain, positions), stored, **close)
    torch.testing.assert_close(rope.undo(stored, positions), plain, **close)
    by = torch.randint(-5, 300, positions.shape, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(rope.shift(stored, by), rope.rotate(plain, positions + by), **close)


@pytest.mark.parametrize("family", FAMILIES)
def test_rotation_is_that_of_the_model(family: str) -> None:
    check_against(tiny_model(family))


@pytest.mark.parametrize("kind", SCALINGS)
def test_scaled_rotation_is_that_of_the_model(kind: str) -> None:
    model = scaled_model(kind)
    check_against(model)
    assert (model.base_model.rotary_emb.attention_scaling != 1) == (kind == "yarn")


def test_positions_are_told_apart_up_to_a_hundred_thousand() -> None:
    """Against the rotation written out, halves of the head as real and imaginary parts."""
    rope = Rope.of(tiny_model("llama"))
    x = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([[1, 4097, 99_999, 100_000]])
    frequencies = 10000.0 ** (-torch.arange(0, 16, 2) / 16)
    angles = positions[..., None].float() * frequencies
    turned = torch.complex(*x.chunk(2, -1)) * torch.polar(torch.ones_like(angles), angles).unsqueeze(1)
    expected = torch.cat([turned.real, turned.imag], -1)
    # float32 angles of 100 000 are right to 0.008.
    torch.testing.assert_close(rope.rotate(x, positions), expected, rtol=0, atol=3e-2)
    torch.testing.assert_close(rope.undo(rope.rotate(x, positions), positions), x, rtol=0, atol=1e-6)
    assert (
        rope.rotate(x[:, :, :1], positions[:, 2:3]) - rope.rotate(x[:, :, :1], positions[:, 3:])
    ).norm() > 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("move", ["rotate", "undo", "shift"])
def test_numbers_are_float32_in_between(move: str, dtype: torch.dtype) -> None:
    rope = getattr(Rope.of(scaled_model("yarn")), move)
    x = torch.randn(1, 2, 3, 16, generator=torch.Generator().manual_seed(4)).to(dtype)
    positions = torch.tensor([[3, 5000, 100_000]])
    assert torch.equal(rope(x, positions), rope(x.float(), positions).to(dtype))


def test_a_rounded_rotation_of_a_bfloat16_model_is_followed() -> None:
    """`model.to` rounds the frequencies along with the weights; one that was made before follows."""
    model = copy.deepcopy(tiny_model("llama"))
    before = Rope.of(model)
    model.to(torch.bfloat16)
    check_against(model, tolerance=2e-2)
    x, positions = torch.randn(1, 2, 3, 16), torch.tensor([[0, 70_000, 100_000]])
    assert torch.equal(before.rotate(x, positions), Rope.of(model).rotate(x, positions))
    torch.testing.assert_close(before.undo(before.rotate(x, positions), positions), x, rtol=0, atol=1e-6)


def test_a_subclass_in_another_module_has_its_model_s_rotation() -> None:
    class Mine(LlamaForCausalLM):
        pass

    check_against(Mine(LlamaConfig(**SMALL)).eval())


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("dynamic", {"factor": 2.0}),
        (
            "longrope",
            {"short_factor": [1.0] * 8, "long_factor": [2.0] * 8, "original_max_position_embeddings": 64},
        ),
    ],
)
def test_scaling_that_depends_on_the_length_is_refused(kind: str, options: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"rope_type '{kind}', supported: default, linear"):
        Rope.of(scaled_model(kind, **options))


@pytest.mark.parametrize("kind", [*FAMILIES, *SCALINGS])
def test_the_common_layout_is_known_as_a_formula(kind: str) -> None:
    rope = Rope.of(scaled_model(kind) if kind in SCALINGS else tiny_model(kind))
    halves = rope.halves(16)
    assert halves is not None
    positions = torch.tensor([[0, 3, 70_001, 100_000]])
    x = torch.randn(1, 2, 4, 16, generator=torch.Generator().manual_seed(2))
    half = len(halves.frequencies_F)
    angles = positions[..., None].float() * halves.frequencies_F
    factors = torch.polar(torch.full_like(angles, halves.scaling), angles).unsqueeze(1)
    turned = torch.complex(x[..., :half].contiguous(), x[..., half : 2 * half].contiguous()) * factors
    expected = torch.cat([turned.real, turned.imag, x[..., 2 * half :]], -1)
    torch.testing.assert_close(rope.rotate(x, positions), expected, rtol=0, atol=1e-5)


def rope_like(layout: str, dim: int) -> Rope:
    """A rotation in the module's angles, of heads whose numbers are laid out otherwise."""

    def apply(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        cos, sin = (part[..., : part.shape[-1] // 2].unsqueeze(1) for part in (cos, sin))
        outs = []
        for x in (q, k):
            rest = x[..., 2 * cos.shape[-1] :]
            x = x[..., : 2 * cos.shape[-1]]
            if layout == "neighbours":
                left, right = x[..., ::2], x[..., 1::2]
                turned = torch.stack([left * cos - right * sin, right * cos + left * sin], -1).flatten(-2)
            else:
                left, right = x.chunk(2, -1)
                turned = torch.cat([left * cos - right * sin, right * cos + left * sin], -1)
            outs.append(torch.cat([turned, rest], -1))
        return outs[0], outs[1]

    config = LlamaConfig(hidden_size=dim, num_attention_heads=1, head_dim=dim)
    return Rope(LlamaRotaryEmbedding(config), apply, 1.0)


def test_layouts_are_told_by_what_they_do() -> None:
    partial = rope_like("halves", 8).halves(12)
    assert partial is not None
    assert len(partial.frequencies_F) == 4
    assert rope_like("neighbours", 8).halves(8) is None
    assert rope_like("halves", 16).halves(8) is None  # more angles than numbers
    bare = rope_like("halves", 8)
    del bare._rotary.inv_freq
    assert bare.halves(8) is None


def test_the_formula_follows_rounded_frequencies_and_is_tried_once() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    rope = Rope.of(model)
    exact = rope.halves(16)
    assert rope.halves(16) is exact
    model.to(torch.bfloat16)
    rounded = rope.halves(16)
    assert exact is not None
    assert rounded is not None
    assert torch.equal(rounded.frequencies_F, exact.frequencies_F.bfloat16().float())
    assert not torch.equal(rounded.frequencies_F, exact.frequencies_F)


def test_models_without_rotary_embedding_are_refused() -> None:
    with pytest.raises(ValueError, match="GPT2LMHeadModel has no rotary embedding.*choose a method"):
        Rope.of(GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50)))
    with pytest.raises(ValueError, match="SmolLM3ForCausalLM has layers without rotary embedding"):
        Rope.of(SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 0])))
    Rope.of(SmolLM3ForCausalLM(SmolLM3Config(**SMALL, no_rope_layers=[1, 1])))


def test_what_is_no_rotation_is_refused() -> None:
    """A layout that the model's function doesn't know, found by trying."""
    model = scaled_model("default")
    rotary = model.base_model.rotary_emb
    forward = rotary.forward
    rotary.forward = lambda x, positions: tuple(part + 1 for part in forward(x, positions))
    with pytest.raises(ValueError, match="is not a rotation by position"):
        Rope.of(model)
    rotary.forward = lambda x, positions: forward(x, positions)[0]
    with pytest.raises(ValueError, match="can't be applied"):
        Rope.of(model)


def test_a_cache_keeps_the_rotation_and_not_the_model() -> None:
    model = copy.deepcopy(tiny_model("llama"))
    cache, rope = KVCache(model, "shadowkv", 0.6), Rope.of(model)
    alive = [weakref.ref(model), weakref.ref(model.base_model), weakref.ref(model.lm_head.weight)]
    del model
    gc.collect()
    assert [ref() for ref in alive] == [None] * 3
    assert cache.method.needs_rope
    assert rope.rotate(torch.ones(1, 1, 1, 16), torch.tensor([[3]])).shape == (1, 1, 1, 16)

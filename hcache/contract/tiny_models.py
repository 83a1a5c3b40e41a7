"""Tiny random decoders of the supported families, made once a process."""

from __future__ import annotations

from functools import cache

import torch
from torch import Tensor
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCABULARY = 101
FAMILIES = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}


@cache
def tiny_model(family: str = "llama", kv_heads: int = 2, layers: int = 2) -> PreTrainedModel:
    """A float32 decoder, 4 query heads, head dim 16, random weights large enough to attend unevenly."""
    config_class, model_class = FAMILIES[family]
    config = config_class(
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=kv_heads,
        head_dim=16,
        vocab_size=VOCABULARY,
        max_position_embeddings=4096,
        initializer_range=0.2,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=0,
    )
    config._attn_implementation = "sdpa"
    torch.manual_seed(7)
    return model_class(config).eval().requires_grad_(False)


def prompts(batch: int, tokens: int, padded: bool = False, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Random ids [B, T] and their mask; with `padded`, every sequence but the first has left pads."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=generator)
    mask = torch.ones_like(ids)
    if padded:
        for b in range(1 if batch > 1 else 0, batch):
            mask[b, : 5 + 3 * b] = 0
    return ids.masked_fill(mask == 0, 0), mask


def positions_of(mask: Tensor) -> Tensor:
    """True positions of a left-padded batch."""
    return (mask.cumsum(1) - 1).clamp_min(0)

"""Models of a shape with random weights: as fast as the real ones, nothing to download.

Weights are made on the device itself, seeded, normal with the usual 0.02. They have no tokenizer, and no
fingerprint that anything could be tied to.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedConfig, PreTrainedModel, Qwen2Config

from hcache.models.spec import Architecture, Dtype, RopeScaling, Shape

_CONFIGS: dict[Architecture, type[PreTrainedConfig]] = {
    Architecture.llama: LlamaConfig,
    Architecture.qwen2: Qwen2Config,
}
_LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
"""config.json of meta-llama/Llama-3.1-8B."""


def number_format(dtype: Dtype) -> torch.dtype:
    """Of random weights: bfloat16 unless another is named."""
    return torch.bfloat16 if dtype is Dtype.auto else getattr(torch, dtype.value)


def shape_config(shape: Shape, dtype: Dtype = Dtype.auto) -> PreTrainedConfig:
    """A transformers config of this shape."""
    scaling = _LLAMA3 if shape.rope_scaling is RopeScaling.llama3 else {"rope_type": "default"}
    settings: dict[str, Any] = {
        "hidden_size": shape.hidden_size,
        "intermediate_size": shape.intermediate_size,
        "num_hidden_layers": shape.layers,
        "num_attention_heads": shape.query_heads,
        "num_key_value_heads": shape.kv_heads,
        "head_dim": shape.head_dim,
        "vocab_size": shape.vocabulary,
        "max_position_embeddings": shape.max_positions,
        "rope_parameters": {**scaling, "rope_theta": shape.rope_theta},
        "tie_word_embeddings": shape.tied,
        "initializer_range": 0.02,
        # Random weights end nothing: what is timed is a number of steps.
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        "dtype": number_format(dtype),
    }
    return _CONFIGS[shape.architecture](**settings)


def random_model(shape: Shape, dtype: Dtype, device: torch.device) -> PreTrainedModel:
    """The model on `device`, in eval mode without gradients; the caller's random state stays as it was."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices), torch.device(device):
        torch.manual_seed(shape.seed)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(
            shape_config(shape, dtype), dtype=number_format(dtype), attn_implementation="sdpa"
        )
    model.eval().requires_grad_(False)
    return model

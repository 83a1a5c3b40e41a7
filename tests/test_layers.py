"""Which decoder layers hcache.models.layers takes for its own; tests/test_projections.py runs them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import (
    GemmaConfig,
    GraniteConfig,
    LlamaConfig,
    MistralConfig,
    Olmo2Config,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.gemma.modeling_gemma import GemmaDecoderLayer
from transformers.models.granite.modeling_granite import GraniteDecoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
from transformers.models.mistral.modeling_mistral import MistralDecoderLayer
from transformers.models.olmo2.modeling_olmo2 import Olmo2DecoderLayer
from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from hcache.models.layers import is_plain


class Doubled(LlamaDecoderLayer):
    """Holds what a layer of Llama holds, and does more."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        return 2 * super().forward(hidden_states, **arguments)


class InOrder(LlamaDecoderLayer):
    """Norms behind instead of in front."""

    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        out, _ = self.self_attn(hidden_states=hidden_states, **arguments)
        x = hidden_states + self.input_layernorm(out)
        return x + self.post_attention_layernorm(self.mlp(x))


class Broken(LlamaDecoderLayer):
    def forward(self, hidden_states: Tensor, **arguments: Any) -> Tensor:
        raise RuntimeError("not today")


def layer_of(kind: Any, config: type[PreTrainedConfig], **settings: Any) -> nn.Module:
    shape = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
    made = config(**shape, num_hidden_layers=2, **settings)
    made._attn_implementation = "sdpa"
    layer: nn.Module = kind(made, 1)
    return layer


@pytest.mark.parametrize(
    ("kind", "config", "settings"),
    [
        (LlamaDecoderLayer, LlamaConfig, {}),
        (LlamaDecoderLayer, LlamaConfig, {"attention_bias": True}),
        (LlamaDecoderLayer, LlamaConfig, {"head_dim": 32}),
        (MistralDecoderLayer, MistralConfig, {"sliding_window": None}),
        (Qwen2DecoderLayer, Qwen2Config, {}),
        (Qwen3DecoderLayer, Qwen3Config, {}),
    ],
)
def test_plain_layers(kind: Any, config: Any, settings: dict[str, Any]) -> None:
    assert is_plain(layer_of(kind, config, **settings))


@pytest.mark.parametrize(
    ("kind", "config", "settings"),
    [
        (LlamaDecoderLayer, LlamaConfig, {"mlp_bias": True}),
        (LlamaDecoderLayer, LlamaConfig, {"hidden_act": "gelu"}),
        (Doubled, LlamaConfig, {}),
        (InOrder, LlamaConfig, {}),
        (Broken, LlamaConfig, {}),
        (GraniteDecoderLayer, GraniteConfig, {"residual_multiplier": 0.5}),
        (GemmaDecoderLayer, GemmaConfig, {"head_dim": 16}),
        (Olmo2DecoderLayer, Olmo2Config, {}),
    ],
)
def test_other_layers(kind: Any, config: Any, settings: dict[str, Any]) -> None:
    assert not is_plain(layer_of(kind, config, **settings))


def test_other_modules() -> None:
    assert not is_plain(nn.Linear(2, 2))
    assert not is_plain(layer_of(LlamaDecoderLayer, LlamaConfig).self_attn)


def test_asking_leaves_no_trace() -> None:
    """Neither on the layer and its config nor in a generator of random numbers."""
    layer = layer_of(LlamaDecoderLayer, LlamaConfig)
    weights, config = {n: p.clone() for n, p in layer.named_parameters()}, layer.self_attn.config.to_dict()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    assert is_plain(layer)
    assert torch.equal(torch.rand(3), expected)
    assert layer.self_attn.config.to_dict() == config
    assert all(torch.equal(parameter, weights[name]) for name, parameter in layer.named_parameters())

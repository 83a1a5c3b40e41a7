"""Decoder layers as a chain of our kernels, sums and rotation among them.

What a layer of Llama, Mistral, Qwen2 or Qwen3 does beside its call of attention is seven launches, each
of which starts while the one before it ends (hcache.kernels.chain). A layer counts as one of these if a
small one of its class and config computes what the chain does: other decoders with such layers are found too.

Shapes: x [B, T, K]; cos and sin [B or 1, T, D].
"""

from __future__ import annotations

import copy
import logging
from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcache.kernels.products import linears, rms_norm, rotate, swiglu

log = logging.getLogger(__name__)

PARTS = {"self_attn", "mlp", "input_layernorm", "post_attention_layernorm"}
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj")
HEAD_NORMS = ("q_norm", "k_norm")

WIDTH, HEAD_DIM = 8, 4

SMALL = {
    "hidden_size": WIDTH,
    "intermediate_size": 12,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": HEAD_DIM,
    "_attn_implementation": "sdpa",
}
"""Of the config of the small layer. Heads together are wider than the layer, so that none is taken for it."""


def is_plain(layer: nn.Module) -> bool:
    """Whether `advance` computes what the layer does, asked of a small one of its class."""
    attention = getattr(layer, "self_attn", None)
    if set(layer._modules) != PARTS or not isinstance(attention, nn.Module):
        return False
    if set(attention._modules) not in ({*PROJECTIONS}, {*PROJECTIONS, *HEAD_NORMS}):
        return False
    try:
        small = _small(layer)
        x, angle = _numbers(2, 3, WIDTH), 9 * _numbers(2, 3, HEAD_DIM)
        turn = (angle.cos(), angle.sin())
        with torch.no_grad():
            expected = small(x, attention_mask=None, position_embeddings=turn)
            answer = advance(small, x, None, turn)
    except Exception as error:
        log.info("%s keeps its own forward: %s", type(layer).__name__, error)
        return False
    return isinstance(expected, Tensor) and torch.allclose(answer, expected, rtol=1e-4, atol=1e-5)


def advance(
    layer: Any,
    x: Tensor,
    attention_mask: Tensor | None,
    position_embeddings: tuple[Tensor, Tensor],
) -> Tensor:
    """A layer's output [B, T, K]; its attention is the one that its config names.

    Args:
        x: of few tokens; see hcache.kernels.linear.
        attention_mask: as that attention takes it.
        position_embeddings: cos and sin.
    """
    attention, mlp, first, second = _parts(layer)
    biases = [part.bias for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    weights = [part.weight for part in (attention.q_proj, attention.k_proj, attention.v_proj)]
    given = [bias for bias in biases if bias is not None]
    q, k, v = linears(rms_norm(x, first.weight, first.variance_epsilon), weights, given)
    cos, sin = (part.expand(*x.shape[:-1], -1) for part in position_embeddings)
    q, k = rotate(q, k, cos, sin, *_head_norms(attention))
    heads = [part.unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in (q, k, v)]
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    window = getattr(attention, "sliding_window", None)
    out, _ = attend(
        attention, *heads, attention_mask, dropout=0.0, scaling=attention.scaling, sliding_window=window
    )
    x = _plus(x, out.flatten(2), attention.o_proj)
    gate, up = mlp.gate_proj.weight, mlp.up_proj.weight
    inner = swiglu(rms_norm(x, second.weight, second.variance_epsilon), gate, up)
    return _plus(x, inner, mlp.down_proj)


def _parts(layer: Any) -> tuple[Any, Any, Any, Any]:
    return layer.self_attn, layer.mlp, layer.input_layernorm, layer.post_attention_layernorm


def _head_norms(attention: Any) -> tuple[tuple[Tensor, Tensor] | None, float]:
    """Norms over the heads of queries and keys, and their epsilon."""
    norms = [getattr(attention, name, None) for name in HEAD_NORMS]
    if norms[0] is None or norms[1] is None:
        return None, 0.0
    return (norms[0].weight, norms[1].weight), norms[0].variance_epsilon


def _plus(x: Tensor, y: Tensor, part: nn.Linear) -> Tensor:
    """x + part(y)."""
    biases = [] if part.bias is None else [part.bias]
    return linears(y, [part.weight], biases, residual=x)[0]


def _small(layer: Any) -> nn.Module:
    """A layer of the same class and place with a few numbers a weight, on the CPU."""
    config = copy.deepcopy(layer.self_attn.config)
    for name, value in SMALL.items():
        setattr(config, name, value)
    # Numbers of our own, so that no generator of random ones is moved on.
    with torch.device("meta"):
        small: nn.Module = type(layer)(config, layer.self_attn.layer_idx).eval()
    for place, (name, parameter) in enumerate(list(small.named_parameters())):
        owner, _, own_name = name.rpartition(".")
        numbers = _numbers(*parameter.shape, start=37 * place)
        setattr(small.get_submodule(owner), own_name, nn.Parameter(numbers, requires_grad=False))
    return small


def _numbers(*shape: int, start: int = 0) -> Tensor:
    """The same every time, from -1 to 1."""
    count = torch.Size(shape).numel()
    return torch.arange(start, start + count, dtype=torch.float32, device="cpu").sin().view(shape)

"""The attention function that transformers calls while a forward carries one of our caches.

It knows LayerState's calls and transformers' attention signature; nothing of methods. A layer's state is
bound to its attention module by the cache's `update` just before.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

if TYPE_CHECKING:
    from hcache.cache.state import LayerState

NAME = "hcache"

_STATE, _STEPPING = "_hcache_state", "_hcache_stepping"

UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "head_mask", "position_bias")
"""Attention arguments that change the result and that no state implements."""


@torch.compiler.disable
def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **arguments: Any,
) -> tuple[Tensor, None]:
    """transformers' attention signature. query [B, Hq, T, D], key and value [B, H, T, D] of this call's
    tokens.

    Args:
        attention_mask: [B, T] bool, which of this call's tokens are real; None where all are.

    Returns:
        [B, T, Hq, D] and no weights.

    Raises:
        ValueError: an attention argument that is not implemented, or dropout.
    """
    refuse_arguments(module, arguments, dropout)
    # States score with 1/sqrt(D); another scaling is folded into the query.
    if scaling is not None and abs(scaling * query.shape[-1] ** 0.5 - 1) > 1e-6:
        query = query * (scaling * query.shape[-1] ** 0.5)
    steps: LayerState | None = module.__dict__.get(_STEPPING)
    if steps is not None:
        return steps.advance(query, key, value, None).transpose(1, 2).contiguous(), None
    state, is_prompt = bound(module)
    if is_prompt:
        out = state.attend_prompt(query, key, value, attention_mask)
        state.prefill(query, key, value, attention_mask)
        if not state.pending:
            state.room.adopt(state)
    elif query.shape[2] == 1:
        out = state.step(query, key, value, attention_mask)
    else:
        out = state.extend(query, key, value, attention_mask)
    return out.transpose(1, 2).contiguous(), None


def cache_argument(model: nn.Module) -> str:
    """What a transformers model calls the argument that takes a cache: `cache` from 5.24 on, for the models
    that have been moved to it, `past_key_values` before.
    """
    names = inspect.signature(model.forward).parameters
    return "cache" if "cache" in names else "past_key_values"


def bind(module: nn.Module, state: LayerState, is_prompt: bool) -> None:
    """Hand a layer's state to its attention module for the call that follows."""
    # Past nn.Module's own __setattr__: this is a note for one call, not a part of the model.
    object.__setattr__(module, _STATE, (state, is_prompt))


@contextmanager
def stepping(modules: list[nn.Module], states: list[LayerState]) -> Iterator[None]:
    """Within it, a forward without a cache is the `advance` of these states; the caller has counted."""
    for module, state in zip(modules, states, strict=True):
        object.__setattr__(module, _STEPPING, state)
    try:
        yield
    finally:
        for module in modules:
            module.__dict__.pop(_STEPPING, None)


def bound(module: nn.Module) -> tuple[LayerState, bool]:
    """Take the state that was bound, so that the module doesn't keep it alive."""
    pair: tuple[LayerState, bool] = module.__dict__.pop(_STATE)
    return pair


def unbind(modules: list[nn.Module]) -> int:
    """Take back states that no attention call has taken; how many there were."""
    return sum(module.__dict__.pop(_STATE, None) is not None for module in modules)


def refuse_arguments(module: nn.Module, arguments: dict[str, Any], dropout: float = 0.0) -> None:
    """Raise ValueError for an attention argument that would be ignored."""
    set_ones = [name for name in UNSUPPORTED if arguments.get(name) is not None]
    if dropout:
        set_ones.append("dropout")
    if set_ones:
        raise ValueError(
            f"{type(module).__name__} asks for {', '.join(set_ones)}, which compressed attention does not "
            "implement; use a model with plain full attention, in eval mode"
        )


def pass_padding(
    batch_size: int, q_length: int, attention_mask: Tensor | None = None, **_: Any
) -> Tensor | None:
    """transformers' mask signature: the padding of this call's tokens [B, T], never [B, 1, n, n].

    None where there are no pads among them.
    """
    if attention_mask is None:
        return None
    valid = attention_mask[:, -q_length:].bool()
    return None if bool(valid.all()) else valid


AttentionInterface.register(NAME, attend)
AttentionMaskInterface.register(NAME, pass_padding)

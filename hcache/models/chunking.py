"""Long prompts in pieces: MLPs and norms of a decoder that work on a few thousand tokens at a time.

At 224K tokens an 8B model's MLP holds three tensors of 6.6 GB, and a norm in float32 two of 3.8 GB. Both
treat every token by itself, so pieces give the same numbers and leave one output and a piece's scratch. Knows
module names and shapes; nothing of caches, attention or methods.

Shapes: x [B, T, hidden], T tokens.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

log = logging.getLogger(__name__)

PIECE_TOKENS = 8192
"""Large products still, with 0.7 GB of scratch for an 8B model's MLP."""

MIXING = ("router", "expert", "moe")
"""Parts of the names of modules and classes in which one token's output may depend on the others."""


@contextmanager
def chunked_mlps(model: PreTrainedModel, tokens: int = PIECE_TOKENS) -> Iterator[None]:
    """While entered, every MLP and norm of the decoder takes at most `tokens` tokens at a time.

    Switched on the modules of this model, never on their classes, and always switched back. A call that has
    no more tokens than that, or is given more than one tensor, goes as it always does.

    Args:
        model: a transformers decoder; layers without an attribute `mlp`, and those whose MLP may not treat
            tokens one by one (mixtures of experts), keep theirs.
        tokens: of all sequences together.

    Raises:
        ValueError: tokens below 1.
    """
    if tokens < 1:
        raise ValueError(f"tokens={tokens} must be at least 1: how much an MLP takes at a time")
    # Whatever is there by now (accelerate puts a forward on instances too) comes back at the end.
    before = [(module, module.__dict__.get("forward")) for module in tokenwise_modules(model)]
    try:
        for module, _ in before:
            module.__dict__["forward"] = _Pieces(module.forward, tokens, type(module).__name__)
        yield
    finally:
        for module, own in before:
            if own is None:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = own


def tokenwise_modules(model: PreTrainedModel) -> list[nn.Module]:
    """MLPs of the decoder layers, and every norm over the last dimension, each once."""
    found: list[nn.Module] = []
    for module in model.base_model.modules():
        mlp = getattr(module, "mlp", None)
        if _is_layer(module) and isinstance(mlp, nn.Module) and not _mixes(mlp):
            found.append(mlp)
        if _is_norm(module):
            found.append(module)
    return list(dict.fromkeys(found))


def _is_layer(module: nn.Module) -> bool:
    """Whether it holds a self-attention of a decoder."""
    return any(hasattr(part, "is_causal") and hasattr(part, "layer_idx") for part in module.children())


def _is_norm(module: nn.Module) -> bool:
    shape = getattr(module, "normalized_shape", (0,))
    return type(module).__name__.endswith(("RMSNorm", "LayerNorm")) and len(shape) == 1


def _mixes(mlp: nn.Module) -> bool:
    """Whether a token's output may depend on other tokens, as far as names tell."""
    for name, part in mlp.named_modules():
        words = f"{name} {type(part).__name__}".lower()
        if name.split(".")[-1] == "gate" or any(word in words for word in MIXING):
            return True
    return False


class _Pieces:
    """A module's forward, piece by piece.

    Args:
        forward: of the whole.
        tokens: most tokens of a piece, of all sequences together.
        name: of the module, for the log.
    """

    def __init__(self, forward: Callable[..., Any], tokens: int, name: str) -> None:
        self._forward, self._tokens, self._name = forward, tokens, name

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Tensor) or x.dim() < 3:
            return self._forward(*args, **kwargs)
        piece = max(1, self._tokens // x.shape[0])
        if x.shape[1] <= piece:
            return self._forward(x)
        return self._in_pieces(x, piece)

    def _in_pieces(self, x: Tensor, piece: int) -> Any:
        first = self._forward(x[:, :piece])
        if not isinstance(first, Tensor) or first.shape[:2] != (x.shape[0], piece):
            log.warning("%s does not return a tensor a token: it takes the whole prompt at once", self._name)
            return self._forward(x)
        out = torch.empty(
            (first.shape[0], x.shape[1], *first.shape[2:]), dtype=first.dtype, device=first.device
        )
        out[:, :piece] = first
        del first
        for start in range(piece, x.shape[1], piece):
            now = slice(start, start + piece)
            out[:, now] = self._forward(x[:, now])
        return out

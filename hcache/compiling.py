"""Decoder layers compiled by torch.compile, once for all layers, while steps are run or captured.

Attention over the cache is a deliberate graph break (hcache.attention.function): what is compiled is the rest
of a layer, which is the same code for every layer. Nothing of a model is left changed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import Enum
from typing import Any

import torch
from torch import nn


class Compile(Enum):
    """off; default: inductor as it comes; tuned: with coordinate descent over its kernels, slower to make."""

    off = "off"
    default = "default"
    tuned = "tuned"

    @property
    def options(self) -> dict[str, Any]:
        """What torch.compile is told."""
        if self is Compile.tuned:
            return {"coordinate_descent_tuning": True}
        return {}


class CompiledLayers:
    """The compiled twins of a model's decoder layers.

    Args:
        layers: decoder layers.
        how: see Compile.
        backend: as torch.compile takes it.
    """

    def __init__(
        self, layers: list[nn.Module], how: Compile, backend: str | Callable[..., Any] = "inductor"
    ) -> None:
        self._layers = layers if how is not Compile.off else []
        self._twins = [
            torch.compile(layer._call_impl, dynamic=False, options=how.options, backend=backend)
            for layer in self._layers
        ]

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it, calls of the layers go to their twins."""
        for layer, twin in zip(self._layers, self._twins, strict=True):
            layer._compiled_call_impl = twin
        try:
            yield
        finally:
            for layer in self._layers:
                layer._compiled_call_impl = None


def decoder_layers(model: nn.Module, attention_modules: list[nn.Module]) -> list[nn.Module]:
    """The module of each layer that holds its attention module: the members of the list they are in.

    Raises:
        ValueError: the layers don't stand in one list.
    """
    for candidates in model.modules():
        if isinstance(candidates, nn.ModuleList) and len(candidates) == len(attention_modules):
            pairs = zip(candidates, attention_modules, strict=True)
            if all(any(inner is wanted for inner in layer.modules()) for layer, wanted in pairs):
                return list(candidates)
    raise ValueError(f"{type(model).__name__} has no list of decoder layers")

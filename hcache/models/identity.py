"""Who a model is: its geometry, and a fingerprint of its weights.

The fingerprint is the first 16 hex digits of sha256 over the attention geometry and evenly spread samples of
each layer's query and key projections, rounded to bfloat16. A checkpoint in float32 or bfloat16 therefore has
one fingerprint whichever of the two it is loaded in, and the same from its files as from the live model.
bfloat16 weights keep it when loaded in float16; float32 weights loaded in float16 are rounded twice and may
not. Quantised weights (NF4) are other numbers, so they have another fingerprint.

Only the query and key projections count, since a head profile depends on where attention goes: a fine-tune
that leaves them alone is the same model here.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hcache.geometry import Geometry
from hcache.models.source import weight_files

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

_PROJECTION = re.compile(
    r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(?:\w+\.)*?(q_proj|k_proj|qkv_proj|query_key_value|c_attn)\.weight$"
)
_ROWS, _COLUMNS = 8, 32
# The smallest number up to which float16 holds every bfloat16 exactly; below it, samples count as zero.
_SMALLEST = 2.0**-16

Key = tuple[int, str]


def config_geometry(config: PreTrainedConfig, fingerprint: str | None = None) -> Geometry:
    """Geometry from a transformers config.

    Raises:
        ValueError: the config has no attention heads or layers (not a decoder with attention).
    """
    text = config.get_text_config()
    layers = getattr(text, "num_hidden_layers", None)
    heads = getattr(text, "num_attention_heads", None)
    if not layers or not heads:
        raise ValueError(
            f"model type {config.model_type!r} has no num_hidden_layers or num_attention_heads: "
            "not a decoder with attention"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // heads
    kv_heads = getattr(text, "num_key_value_heads", None) or heads
    return Geometry(layers, heads, kv_heads, head_dim, fingerprint)


def model_geometry(model: PreTrainedModel) -> Geometry:
    """Geometry of a live model, fingerprint included."""
    return config_geometry(model.config, fingerprint(model))


def fingerprint(model: PreTrainedModel) -> str:
    """Fingerprint of a live model, 16 hex digits; reads a few kilobytes of its weights.

    Raises:
        ValueError: no query and key projections under a known name, or weights that are not in memory.
    """
    weights = dict(model.named_parameters())
    keys = _projections(weights)
    absent = next((name for name in keys.values() if weights[name].is_meta), None)
    if absent is not None:
        raise ValueError(
            f"{absent} is not in memory (offloaded); take the fingerprint from the checkpoint instead"
        )
    samples = ((key, _sample(weights[name])) for key, name in keys.items())
    return _digest(config_geometry(model.config), samples)


def checkpoint_fingerprint(path: str | Path) -> str:
    """The same fingerprint from a checkpoint directory, without loading the model.

    Raises:
        ValueError: not a safetensors checkpoint, or no projections under a known name.
    """
    from transformers import AutoConfig

    directory = Path(path)
    if not (directory / "config.json").is_file():
        raise ValueError(f"{directory} has no config.json: not a checkpoint")
    geometry = config_geometry(AutoConfig.from_pretrained(directory))
    with ExitStack() as stack:
        files = [stack.enter_context(_open(file)) for file in weight_files(directory)]
        holder = {name: file for file in files for name in file.keys()}  # noqa: SIM118 (not a mapping)
        samples = [
            (key, _sample_slice(holder[name].get_slice(name))) for key, name in _projections(holder).items()
        ]
    return _digest(geometry, samples)


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{file} can't be read as safetensors ({error})") from error


def _projections(names: Iterable[str]) -> dict[Key, str]:
    """(layer, projection) -> parameter name, in that order."""
    found: dict[Key, str] = {}
    for name in names:
        match = _PROJECTION.search(name)
        if not match:
            continue
        key = (int(match[1]), match[2])
        if key in found:
            raise ValueError(f"layer {key[0]} has two weights called {key[1]}: {found[key]} and {name}")
        found[key] = name
    if not found:
        raise ValueError("the model has no query and key projections under a known name: no fingerprint")
    return dict(sorted(found.items()))


def _spread(size: int, count: int) -> list[int]:
    """At most `count` indices into `size`, evenly spread, both ends included."""
    count = min(size, count)
    return [i * (size - 1) // max(count - 1, 1) for i in range(count)]


def _sample(weight: Tensor) -> Tensor:
    matrix = weight.detach().flatten(1)
    rows = torch.tensor(_spread(matrix.shape[0], _ROWS), device=matrix.device)
    columns = torch.tensor(_spread(matrix.shape[1], _COLUMNS), device=matrix.device)
    return matrix[rows][:, columns].cpu()


def _sample_slice(weight: Any) -> Tensor:
    """The samples of a safetensors slice (a class without a public name); reads its rows only."""
    rows = [weight[row : row + 1] for row in _spread(weight.get_shape()[0], _ROWS)]
    matrix = torch.cat(rows).flatten(1)
    return matrix[:, _spread(matrix.shape[1], _COLUMNS)]


def _digest(geometry: Geometry, samples: Iterable[tuple[Key, Tensor]]) -> str:
    numbers = [geometry.layers, geometry.query_heads, geometry.kv_heads, geometry.head_dim]
    digest = hashlib.sha256(json.dumps(numbers).encode())
    for (layer, projection), sample in samples:
        rounded = sample.float().to(torch.bfloat16)
        rounded = rounded.masked_fill(rounded.abs() < _SMALLEST, 0)
        digest.update(f"{layer}.{projection}".encode())
        digest.update(rounded.contiguous().view(torch.int16).numpy().tobytes())
    return digest.hexdigest()[:16]

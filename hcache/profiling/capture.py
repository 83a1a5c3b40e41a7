"""Taking a head profile: run a model over calibration texts and watch where its last query looks.

For each layer only the attention of the last query over the prompt positions is computed, at the last prompt
token and at every greedy decode step, reduced to KV heads and handed to the overlap statistics; nothing of
size n x n exists and nothing touches the disk. Model classes stay untouched: while a profile is taken, the
model's config names an attention function and a mask function of ours, registered through transformers'
interfaces; the output itself comes from transformers' sdpa. Each text runs alone and without pads, so no mask
is needed.

Shapes: B batch, Hq query heads, H KV heads, G = Hq/H, T tokens of a call, S visible tokens, n prompt tokens,
D head dim.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from hcache.attention.function import cache_argument
from hcache.geometry import Geometry
from hcache.models.identity import config_geometry, fingerprint
from hcache.profiling.overlap import OverlapStatistics
from hcache.profiling.profile import HeadProfile
from hcache.scoring import Group, reduce_group

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel

LOGGER = logging.getLogger(__name__)
_NAME = "hcache_profile"
# Arguments with which attention is more than softmax(qk)v over all earlier tokens.
_UNSUPPORTED = ("sliding_window", "softcap", "s_aux", "position_bias")

Texts = Tensor | Sequence[Tensor] | Sequence[Sequence[int]]


class _Recorder:
    """Takes one row of attention per layer and step, and sees that no layer is left out."""

    def __init__(self, statistics: OverlapStatistics, geometry: Geometry, group: Group) -> None:
        self.statistics, self.geometry, self.group = statistics, geometry, group
        self.prompt_tokens = 0
        self._seen: set[int] = set()

    def record(self, layer: int, attention_HGS: Tensor) -> None:
        """One layer's attention of the last query, softmax over all visible tokens."""
        prompt_HGn = attention_HGS[..., : self.prompt_tokens]
        self.statistics.observe(layer, reduce_group(prompt_HGn, self.group))
        self._seen.add(layer)

    def end_step(self) -> None:
        """Raise ValueError if a layer didn't come through our attention function."""
        silent = set(range(self.geometry.layers)) - self._seen
        if silent:
            raise ValueError(
                f"layers {sorted(silent)} have no full attention, so their heads can't be profiled"
            )
        self._seen.clear()


_RECORDER: ContextVar[_Recorder] = ContextVar("hcache_profile_recorder")


def last_row(query_HqTD: Tensor, key_HSD: Tensor, scaling: float) -> Tensor:
    """Attention of the last query over all keys, softmax in float32: [H, G, S]."""
    heads = key_HSD.shape[0]
    query_HGD = query_HqTD[:, -1].float().unflatten(0, (heads, -1))
    logits_HGS = query_HGD @ key_HSD.float().transpose(1, 2) * scaling
    return logits_HGS.softmax(-1)


def _attend(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, **kwargs: Any
) -> tuple[Tensor, None]:
    """Attention as transformers' sdpa computes it, after the last query's row was recorded."""
    for name in _UNSUPPORTED:
        if kwargs.get(name) is not None:
            raise ValueError(f"a layer has {name}={kwargs[name]}: only plain full attention can be profiled")
    scaling = kwargs.get("scaling") or query.shape[-1] ** -0.5
    layer: int = module.layer_idx  # type: ignore[assignment]
    _RECORDER.get().record(layer, last_row(query[0], key[0], scaling))
    return ALL_ATTENTION_FUNCTIONS["sdpa"](module, query, key, value, None, **kwargs)


def _no_mask(*_args: Any, **_kwargs: Any) -> None:
    """No mask: one text without pads is causal, which sdpa does by itself; stock masks may be n x n."""


@contextmanager
def _capturing(model: PreTrainedModel, recorder: _Recorder) -> Iterator[None]:
    """Our attention function in the model's config, eval mode; everything as before afterwards."""
    ALL_ATTENTION_FUNCTIONS.register(_NAME, _attend)
    ALL_MASK_ATTENTION_FUNCTIONS.register(_NAME, _no_mask)
    before = [(config, config._attn_implementation) for config in _configs(model.config)]
    training = model.training
    token = _RECORDER.set(recorder)
    try:
        model.eval()
        model.config._attn_implementation = _NAME
        yield
    finally:
        # A config passes what it is given on to its sub-configs, so they come after it.
        for config, name in before:
            config._attn_implementation = name
        model.train(training)
        _RECORDER.reset(token)


def _configs(config: PreTrainedConfig) -> list[PreTrainedConfig]:
    parts = [getattr(config, key, None) for key in config.sub_configs]
    return [config, *(part for part in parts if part is not None)]


def profile_heads(
    model: PreTrainedModel,
    input_ids: Texts,
    decode_steps: int = 100,
    topk: int = 1024,
    *,
    attention_mask: Texts | None = None,
    kernel: int = 5,
    group: str | Group = "mean",
) -> HeadProfile:
    """Profile the KV heads of `model` over one or several texts.

    Args:
        model: a transformers decoder with full attention in every layer.
        input_ids: one text [n] or [B, n], or a list of texts of any lengths. Each runs alone.
        decode_steps: tokens generated greedily after each text; end-of-text tokens don't stop it.
        topk: positions in a head's set; clipped to the text.
        attention_mask: shaped as `input_ids`; tokens where it is 0 are left out as pads.
        kernel: odd width of the average pool that smooths attention over positions.
        group: how query heads that share a KV head are reduced: mean, max or sum.

    Returns:
        The scores pooled over texts: medians over all steps of all texts.

    Raises:
        ValueError: empty texts, settings out of range, or attention that isn't plain full attention.
    """
    texts = _texts(input_ids, attention_mask)
    reduction = _check_settings(texts, decode_steps, topk, kernel, group)
    geometry = config_geometry(model.config, _fingerprint(model))
    statistics = OverlapStatistics(geometry.layers, topk, kernel)
    recorder = _Recorder(statistics, geometry, reduction)
    with torch.inference_mode(), _capturing(model, recorder):
        for text in texts:
            _run_text(model, text, decode_steps, recorder)
    overlaps = statistics.result()
    settings = {
        "texts": len(texts),
        "prompt_tokens": [len(text) for text in texts],
        "decode_steps": decode_steps,
        "topk": topk,
        "kernel": kernel,
        "group": reduction.value,
        "dtype": str(model.dtype).removeprefix("torch."),
    }
    return HeadProfile(
        layers=geometry.layers,
        kv_heads=geometry.kv_heads,
        stability=overlaps.stability,
        similarity=overlaps.similarity,
        query_heads=geometry.query_heads,
        head_dim=geometry.head_dim,
        fingerprint=geometry.fingerprint,
        settings=settings,
    )


def _run_text(model: PreTrainedModel, text_n: Tensor, decode_steps: int, recorder: _Recorder) -> None:
    recorder.prompt_tokens = len(text_n)
    recorder.statistics.start_text()
    cache = DynamicCache()
    tokens = text_n[None].to(model.device)
    for _ in range(decode_steps + 1):
        call = {cache_argument(model): cache, "use_cache": True, "logits_to_keep": 1}
        logits = model(input_ids=tokens, **call).logits
        recorder.end_step()
        tokens = logits[:, -1:].argmax(-1)


def _texts(input_ids: Texts, attention_mask: Texts | None) -> list[Tensor]:
    """Each text as a LongTensor [n], without pads."""
    rows = _rows(input_ids)
    masks = [torch.ones_like(row) for row in rows] if attention_mask is None else _rows(attention_mask)
    if [len(row) for row in rows] != [len(mask) for mask in masks]:
        raise ValueError("attention_mask must have the shape of input_ids")
    texts = [row[mask.bool()] for row, mask in zip(rows, masks, strict=True)]
    if not texts or min(len(text) for text in texts) == 0:
        raise ValueError("input_ids has an empty text; give at least one token")
    return texts


def _rows(values: Texts) -> list[Tensor]:
    if isinstance(values, Tensor):
        return list(values) if values.ndim == 2 else [values]
    if len(values) and isinstance(values[0], int):
        return [torch.as_tensor(values)]
    return [torch.as_tensor(row).flatten() for row in values]


def _check_settings(
    texts: list[Tensor], decode_steps: int, topk: int, kernel: int, group: str | Group
) -> Group:
    if decode_steps < 1 or topk < 1:
        raise ValueError(f"decode_steps={decode_steps} and topk={topk} must be at least 1")
    if kernel < 1 or kernel % 2 == 0:
        raise ValueError(f"kernel={kernel} must be an odd number of positions, at least 1")
    shortest = min(len(text) for text in texts)
    if topk >= shortest:
        LOGGER.warning(
            "topk=%d covers a whole text (%d tokens): every overlap is 1; use longer texts or lower topk",
            topk,
            shortest,
        )
    try:
        return Group(group)
    except ValueError:
        raise ValueError(f"group={group!r} is unknown; choose one of: mean, max, sum") from None


def _fingerprint(model: PreTrainedModel) -> str | None:
    try:
        return fingerprint(model)
    except ValueError as error:
        LOGGER.warning("%s; the profile is tied to the numbers of layers and heads only", error)
        return None

"""transformers' own decoding, timed as ours is: what a user has without this library.

Greedy steps of the unmodified model with its own caches: DynamicCache with sdpa or flash_attention_2, and
StaticCache under torch.compile as transformers documents it (mode reduce-overhead, full graph). A step is one
forward and the argmax; generate's own bookkeeping is left out, which is in transformers' favour. What can't
run says why, and the others go on.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel, StaticCache
from transformers.utils import is_flash_attn_2_available

from hcache.attention.function import cache_argument
from hcache.models import LoadedModel
from runners.latency_settings import Baseline, LatencySettings
from runners.timing import (
    begin_peak,
    call_times,
    is_out_of_memory,
    peak_bytes,
    spread_of,
    synchronize,
    tokens_per_s,
)

log = logging.getLogger(__name__)
TRANSFORMERS = (Baseline.sdpa, Baseline.flash_attention_2, Baseline.static_compile)
"""The headline ratio is against the fastest of these."""


def measure_baseline(
    kind: Baseline,
    loaded: LoadedModel,
    settings: LatencySettings,
    context: int,
    batch: int,
    ids: Tensor | None,
) -> dict[str, Any]:
    """One baseline at one context and batch: status, and milliseconds where it ran.

    Args:
        ids: [batch, context] prompt; None fills the cache with random keys and values.
    """
    reason = _unavailable(kind, loaded)
    if reason:
        return {"status": "not_available", "message": reason}
    device = loaded.device
    begin_peak(device)
    try:
        with torch.no_grad(), _own_attention(loaded.model, kind):
            measured = _measure(kind, loaded.model, settings, context, batch, ids)
        return {"status": "completed", **measured, "peak_device_bytes": peak_bytes(device)}
    except Exception as error:  # whatever a baseline can't do is its result, never the end of ours
        status = "out_of_memory" if is_out_of_memory(error) else "failed"
        message = f"{type(error).__name__}: {' '.join(str(error).split())[:500]}"
        log.warning("baseline %s at %d x %d: %s: %s", kind.value, context, batch, status, message)
        return {"status": status, "message": message}
    finally:
        if kind is Baseline.static_compile:
            torch._dynamo.reset()  # compiled for this context; the next has other shapes


def _unavailable(kind: Baseline, loaded: LoadedModel) -> str:
    if kind is not Baseline.flash_attention_2:
        return ""
    if not is_flash_attn_2_available():
        return "flash-attn is not installed (or there is no GPU for it): pip install 'hcache[flash]'"
    if loaded.model.dtype not in (torch.float16, torch.bfloat16):
        return f"flash-attn needs float16 or bfloat16, the model is in {loaded.model.dtype}"
    return ""


@contextmanager
def _own_attention(model: PreTrainedModel, kind: Baseline) -> Iterator[None]:
    """The model with the baseline's attention."""
    before = model.config._attn_implementation
    name = "flash_attention_2" if kind is Baseline.flash_attention_2 else "sdpa"
    try:
        model.set_attn_implementation(name)
        yield
    finally:
        model.set_attn_implementation(before)


def _measure(
    kind: Baseline,
    model: PreTrainedModel,
    settings: LatencySettings,
    context: int,
    batch: int,
    ids: Tensor | None,
) -> dict[str, Any]:
    static = kind is Baseline.static_compile
    length = context + settings.new_tokens()

    def empty() -> Any:
        config = model.config
        return StaticCache(config=config, max_cache_len=length) if static else DynamicCache(config=config)

    prefill_ms = None
    # Prefill into a static cache needs a mask of prompt x cache, which long prompts have no memory for.
    if ids is None or static:
        cache = empty()
        fill(cache, model, context, batch)
    else:
        times = []
        for _ in range(1 + settings.prefills):
            cache = None
            cache = empty()
            times += call_times(_prefill(model, ids, cache), 1, 0, model.device)
        prefill_ms = spread_of(times[1:])
    step = _Step(model, cache, context, batch, _compiled(model) if static else model)
    try:
        times = call_times(step, settings.steps, settings.warmup, model.device)
    finally:
        step.end()
    return {
        "prefill_ms": prefill_ms,
        "decode_ms": spread_of(times),
        "tokens_per_s": tokens_per_s(batch, times),
    }


def _prefill(model: PreTrainedModel, ids: Tensor, cache: Any) -> Callable[[], object]:
    given = {cache_argument(model): cache}
    return lambda: model(input_ids=ids.to(model.device), use_cache=True, logits_to_keep=1, **given)


def fill(cache: Any, model: PreTrainedModel, tokens: int, batch: int) -> None:
    """Random keys and values of a prompt in every layer, as if the model had seen one."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    places = {"cache_position": torch.arange(tokens, device=model.device)}
    draw = torch.Generator(model.device).manual_seed(0)
    for layer in range(config.num_hidden_layers):
        k, v = (
            torch.randn(
                (batch, heads, tokens, head_dim), generator=draw, dtype=model.dtype, device=model.device
            )
            for _ in range(2)
        )
        cache.update(k, v, layer, places)
    synchronize(model.device)


class _Step:
    """One greedy step after another; everything that moves is a tensor of fixed place, as graphs need."""

    def __init__(self, model: PreTrainedModel, cache: Any, seen: int, batch: int, forward: Any) -> None:
        self._forward, self._argument, self._cache = forward, cache_argument(model), cache
        self._token = torch.ones((batch, 1), dtype=torch.int64, device=model.device)
        self._position = torch.full((batch, 1), seen, dtype=torch.int64, device=model.device)
        # Asked for by older releases alone; it is the place in a static cache.
        self._names_place = "cache_position" in inspect.signature(model.base_model.forward).parameters

    def __call__(self) -> None:
        place = {"cache_position": self._position[0]} if self._names_place else {}
        torch.compiler.cudagraph_mark_step_begin()
        output = self._forward(
            input_ids=self._token,
            position_ids=self._position,
            use_cache=True,
            logits_to_keep=1,
            **place,
            **{self._argument: self._cache},
        )
        self._token.copy_(output.logits[:, -1:].argmax(-1))
        self._position += 1

    def end(self) -> None:
        """Let go of model and cache, so that their memory can be freed."""
        self._forward = self._cache = None


def _compiled(model: PreTrainedModel) -> Any:
    """As transformers documents it for StaticCache."""
    return torch.compile(model.forward, mode="reduce-overhead", fullgraph=True)

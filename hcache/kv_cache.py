"""KVCache: any transformers decoder with any compression method, through `past_key_values` (from transformers
5.24 on also called `cache`).

It is a transformers Cache, so `model(ids, past_key_values=cache)` and `model.generate(ids,
past_key_values=cache)` both work. Model classes stay untouched: while a forward of this model carries this
cache, the model's attention function is ours, and it is always switched back, after an exception too. The
hooks go with the cache.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel
from transformers.cache_utils import CacheLayerMixin

from hcache.attention import function as attention
from hcache.attention.backends import CHUNK, resolve
from hcache.attention.rope import Rope
from hcache.budget import Budget
from hcache.cache.lane import lane_of
from hcache.cache.room import Room
from hcache.cache.state import Bytes, LayerState, Turn, add_bytes, no_bytes
from hcache.geometry import Geometry
from hcache.methods import Method, make
from hcache.models.identity import config_geometry, model_geometry

SIDE_BY_SIDE = 2
"""Layers whose background work runs at the same time."""


class _Length(CacheLayerMixin):
    """What transformers asks of a layer: how many tokens have come, pads included."""

    def __init__(self) -> None:
        super().__init__()
        self.seen = 0

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        self.is_initialized = True

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        self.seen += key_states.shape[2]
        self.is_initialized = True
        return key_states, value_states

    def get_seq_length(self) -> int:
        return self.seen

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.seen + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def get_max_cache_shape(self) -> int:
        return -1


class KVCache(Cache):
    """Compressed KV cache of one batch on one model.

    Args:
        model: a transformers causal LM whose layers all have plain full attention.
        method: registered name or Method.
        budget: Budget, float (kept_fraction) or int (kept_tokens); methods without a budget need none.
        backend: attention backend, "auto", "triton", "sdpa" or "reference".
        reserve_tokens: tokens expected after the prompt; more are fine, at the price of a copy.
        rooms: one a layer, where steps are captured; see hcache.cache.room.
        **hyper: the method's hyper-parameters.

    Raises:
        ValueError: unknown names, an attention that is not implemented, a missing budget.
        InfeasibleBudget: at the first forward, when the prompt's length is known.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "fullkv",
        budget: Budget | float | int | None = None,
        *,
        backend: str = "auto",
        reserve_tokens: int = CHUNK,
        rooms: Sequence[Room] | None = None,
        **hyper: Any,
    ) -> None:
        self.method = make(method, **hyper)
        self.budget = _budget(self.method, budget)
        self.backend_name, self._backend = resolve(backend, model.device.type)
        self.geometry: Geometry = (
            model_geometry(model) if self.method.profiled else config_geometry(model.config)
        )
        self._device = torch.device(model.device)
        self._rope = Rope.of(model) if self.method.needs_rope else None
        self._modules = attention_modules(model, self.geometry.layers)
        self._reserve = reserve_tokens
        self._rooms = rooms or [Room()] * self.geometry.layers
        self.states: list[LayerState] = []
        self.prompt_tokens: list[int] = []
        self._lengths = [_Length() for _ in range(self.geometry.layers)]
        super().__init__(layers=list(self._lengths))
        self._switch = _Switch(self, model, self._modules)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Called by an attention module before it attends: binds that layer's state to the module."""
        if not self._switch.active:
            raise ValueError("this KVCache belongs to another model; make a KVCache for each model")
        self._itemsize = key_states.element_size()
        is_prompt = self._lengths[layer_idx].seen == 0
        self._lengths[layer_idx].update(key_states, value_states)
        attention.bind(self._modules[layer_idx], self.states[layer_idx], is_prompt)
        return key_states, value_states

    def begin(self, batch: int, tokens: int, mask: Tensor | None) -> None:
        """A forward of this cache's model starts: the first one makes the states.

        Raises:
            ValueError: a batch of another size, chunked prefill, or a cache broken by an exception.
        """
        if self._switch.broken:
            raise ValueError(
                "this KVCache broke off in the middle of a forward and can't go on; make a new one"
            )
        if self.states:
            if batch != len(self.prompt_tokens):
                raise ValueError(
                    f"this KVCache holds {len(self.prompt_tokens)} sequences, got a batch of {batch}"
                )
            return
        _refuse_chunked_prefill()
        counts = [tokens] * batch if mask is None else mask[:, -tokens:].bool().sum(1).tolist()
        if not all(counts):
            raise ValueError(
                f"attention_mask leaves sequence {counts.index(0)} of the batch without a token; leave it out"
            )
        self._make_states(counts)

    def _make_states(self, counts: list[int]) -> None:
        states = self.method.layers(self.geometry, self.budget, counts)
        for state, room in zip(states, self._rooms, strict=True):
            state.backend, state.reserve_tokens, state.room = self._backend, self._reserve, room
            if self._rope is not None:
                state.rope = self._rope
        self.states, self.prompt_tokens = states, counts

    def fill(self, prompt_tokens: int, batch: int, dtype: torch.dtype, device: torch.device) -> None:
        """Random queries, keys and values for a prompt that the model never sees, to time what follows it.

        Unit normal, from torch's generator of the device; the same shapes in every layer as from the model.
        """
        if self.states:
            raise ValueError("this KVCache has a prompt already; make a new one")
        self._make_states([prompt_tokens] * batch)
        self._itemsize = dtype.itemsize
        kind: dict[str, Any] = {"dtype": dtype, "device": device}
        query_heads, kv_heads = (
            (batch, heads, prompt_tokens, self.geometry.head_dim)
            for heads in (self.geometry.query_heads, self.geometry.kv_heads)
        )
        # One buffer of queries for all layers: pieces of freed ones would be taken for what is kept.
        q = torch.empty(query_heads, **kind)
        for state, length in zip(self.states, self._lengths, strict=True):
            k, v = torch.randn(kv_heads, **kind), torch.randn(kv_heads, **kind)
            state.prefill(q.normal_(), k, v, None)
            if not state.pending:
                state.room.adopt(state)
            length.seen = prompt_tokens

    def adopt_pending(self) -> None:
        """Let rooms take over the states that the prompt's last layer has finished."""
        for state in self.states:
            state.room.adopt(state)

    @contextmanager
    def stepping(self) -> Iterator[None]:
        """Within it, a forward of one token without a cache is `advance` of the states."""
        with self._switch.on(), attention.stepping(self._modules, self.states):
            yield

    def ready(self) -> tuple[Turn, ...]:
        """Count one step of every sequence in all layers: their turns."""
        for length in self._lengths:
            length.seen += 1
        return tuple(state.ready(True) for state in self.states)

    def background(self) -> None:
        """Background work of all layers, several side by side: each is a chain of small operations."""
        # No lane without work: in a captured graph only what has begun there can be joined.
        lanes = [lane_of(self._device, f"layers{i}") for i in range(min(SIDE_BY_SIDE, len(self.states)))]
        for layer, state in enumerate(self.states):
            with lanes[layer % len(lanes)].beside():
                state.background()
        for lane in lanes:
            lane.join()

    def kept(self, layer: int) -> list[list[Tensor]]:
        """[sequence][KV head] -> sorted LongTensor of the prompt positions a decode step can attend to.

        Positions count without pads and cover the first prompt.
        """
        self._require_prompt()
        return self.states[layer].kept()

    def nbytes(self) -> Bytes:
        """{"device": {"payload", "metadata", "reserved"}, "host": {...}} of all layers, read from storage."""
        total = no_bytes()
        for state in self.states:
            total = add_bytes(total, state.nbytes())
        return total

    def full_nbytes(self) -> int:
        """Bytes that a full cache of the same prompts has, in the dtype that is stored."""
        self._require_prompt()
        token = 2 * self.geometry.heads * self.geometry.head_dim * self._itemsize
        return sum(self.prompt_tokens) * token

    def attended_fraction(self) -> float:
        """Share of the prompt that a decode step can attend to, averaged over layers and heads."""
        self._require_prompt()
        kept = sum(h.numel() for state in self.states for sequence in state.kept() for h in sequence)
        return kept / (self.geometry.heads * sum(self.prompt_tokens))

    def counters(self) -> dict[str, float]:
        """The method's counters, summed over layers."""
        total: dict[str, float] = {}
        for state in self.states:
            for key, value in state.counters().items():
                total[key] = total.get(key, 0) + value
        return total

    def _require_prompt(self) -> None:
        if not self.states:
            raise ValueError("this KVCache has not seen a prompt yet; run the model with it first")

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens so far, pads included: positions continue from here, whatever was dropped."""
        return self._lengths[layer_idx].seen

    def reset(self) -> None:
        """Forget everything; the next forward is a prompt."""
        self.states, self.prompt_tokens = [], []
        for length in self._lengths:
            length.seen = 0
        self._switch.broken = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        raise ValueError("KVCache does not support beam search: use num_beams=1")

    def crop(self, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            "KVCache can't be cropped: what was evicted is gone. Assisted decoding is not supported"
        )

    def batch_repeat_interleave(self, repeats: int) -> None:
        raise ValueError("KVCache does not support repeating sequences: repeat the inputs before the prompt")

    def batch_select_indices(self, indices: Tensor) -> None:
        raise ValueError(
            "KVCache does not support selecting sequences: make a new cache for the ones you need"
        )


class _Switch:
    """Turns the model's attention function to ours while a forward carries one cache, and always back.

    Hooks live as long as the cache does. A cache that dies while its model runs leaves a last call of them
    without keyword arguments.
    """

    def __init__(self, cache: KVCache, model: PreTrainedModel, modules: list[nn.Module]) -> None:
        self._modules = modules
        self.active = False
        self.broken = False
        self._cache = weakref.ref(cache)
        base = model.base_model
        self._configs = _attention_configs(base)
        self._before: list[str | None] = []
        handles = [
            base.register_forward_pre_hook(self._on, with_kwargs=True, prepend=True),
            base.register_forward_hook(self._off, with_kwargs=True, always_call=True),
        ]
        for handle in handles:
            weakref.finalize(cache, handle.remove)

    def _carries(self, kwargs: dict[str, Any] | None) -> KVCache | None:
        cache = self._cache()
        carried = [] if kwargs is None else [kwargs.get("cache"), kwargs.get("past_key_values")]
        return cache if cache is not None and any(one is cache for one in carried) else None

    def _on(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None) -> None:
        cache = self._carries(kwargs)
        if cache is None or kwargs is None:
            return
        tokens = kwargs.get("input_ids", args[0] if args else None)
        shape = (tokens if tokens is not None else kwargs["inputs_embeds"]).shape
        mask = kwargs.get("attention_mask")
        if mask is not None and mask.dim() != 2:
            raise ValueError(f"KVCache takes a 2-D attention_mask [B, T], got {mask.dim()} dimensions")
        if kwargs.get("use_cache") is False:
            raise ValueError(
                "use_cache=False beside a KVCache: generate would feed the whole text again at every step; "
                "pass use_cache=True, or set model.generation_config.use_cache"
            )
        cache.begin(shape[0], shape[1], mask)
        self._turn_on()
        self.active = True

    def _turn_on(self) -> None:
        self._before = [config._attn_implementation for config in self._configs]
        for config in self._configs:
            config._attn_implementation = attention.NAME

    def _turn_off(self) -> None:
        for config, name in zip(self._configs, self._before, strict=True):
            config._attn_implementation = name

    @contextmanager
    def on(self) -> Iterator[None]:
        """Within it, forwards that carry no cache use our attention function too."""
        self._turn_on()
        try:
            yield
        finally:
            self._turn_off()

    def _off(self, module: nn.Module, args: tuple[Any, ...], kwargs: Any, output: Any = None) -> None:
        if not self.active:
            return
        self._turn_off()
        self.active = False
        # torch calls this hook with no output when the forward raised.
        self.broken = output is None
        left = attention.unbind(self._modules)
        if left and not self.broken:
            self.broken = True
            raise ValueError(
                f"{type(module).__name__}: {left} attention modules stored tokens but did not attend through "
                "the attention interface of transformers; this model can't be compressed"
            )


def attention_modules(model: PreTrainedModel, layers: int) -> list[nn.Module]:
    """The model's self-attention modules by layer.

    Raises:
        ValueError: not one plain full attention for each layer.
    """
    found: dict[int, nn.Module] = {}
    for module in model.base_model.modules():
        layer = getattr(module, "layer_idx", None)
        if isinstance(layer, int) and hasattr(module, "is_causal"):
            found[layer] = module
    if sorted(found) != list(range(layers)):
        raise ValueError(
            f"{type(model).__name__} has {layers} layers but attention modules for {sorted(found)}; "
            "only decoders whose every layer is full attention can be compressed"
        )
    types = set(getattr(model.config, "layer_types", None) or []) - {"full_attention"}
    if types:
        listed = ", ".join(sorted(types))
        raise ValueError(
            f"{type(model).__name__} has layers of {listed}; only full_attention can be compressed"
        )
    for module in found.values():
        attention.refuse_arguments(module, _settings(module, model.config))
    return [found[layer] for layer in range(layers)]


def _settings(module: nn.Module, config: Any) -> dict[str, Any]:
    """A module's attention variants, under the names of the arguments they are passed as."""
    window = getattr(config, "sliding_window", None) if getattr(config, "use_sliding_window", True) else None
    # A config that lists its layers' types says there which of them slide.
    window = None if getattr(config, "layer_types", None) else window
    return {
        "sliding_window": getattr(module, "sliding_window", window),
        "softcap": getattr(module, "attn_logit_softcapping", None),
        "s_aux": getattr(module, "sinks", None),
    }


def _attention_configs(base: nn.Module) -> list[Any]:
    """Every distinct config that masks and attention modules read."""
    configs = [base.config] + [
        m.config for m in base.modules() if hasattr(m, "is_causal") and hasattr(m, "config")
    ]
    return list({id(config): config for config in configs}.values())


def _budget(method: Method, budget: Budget | float | int | None) -> Budget:
    """The given budget; everything for methods that have none."""
    if budget is None:
        if method.uses_budget:
            raise ValueError(
                f"method {method.name} needs a budget: a float (kept_fraction) or an int (kept_tokens)"
            )
        return Budget(kept_fraction=1.0)
    return Budget.of(budget)


def _refuse_chunked_prefill() -> None:
    """generate's prefill_chunk_size would make the second chunk look like a follow-up question.

    Nothing that a cache is handed tells a chunk from a prompt, so the caller's own setting is looked at.
    """
    frame = sys._getframe(1)
    while frame is not None:
        config = frame.f_locals.get("generation_config") if frame.f_code.co_name == "_prefill" else None
        if config is not None and getattr(config, "prefill_chunk_size", None):
            raise ValueError("KVCache does not support chunked prefill: leave prefill_chunk_size unset")
        frame = frame.f_back  # type: ignore[assignment]

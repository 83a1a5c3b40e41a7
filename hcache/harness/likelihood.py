"""Log-likelihoods of continuations after a context whose cache was compressed.

The context is a prompt: it is fed, compressed, and its last logits say the first token of the continuation.
The other tokens are fed together through the compressed cache, as a follow-up question would be. Knows
nothing of lm-evaluation-harness.

Shapes: N tokens, V vocabulary.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hcache.attention.function import cache_argument
from hcache.budget import Budget
from hcache.cache.offload import check_host_memory
from hcache.clock import Clock
from hcache.engine import Generation, Memory, Timings
from hcache.geometry import Geometry
from hcache.kv_cache import KVCache
from hcache.methods import Method
from hcache.models.chunking import PIECE_TOKENS, chunked_mlps

HOST_MARGIN = 1.125
"""Buffers in host memory are rounded up by as much."""


class Likelihood(NamedTuple):
    """Of one continuation.

    Args:
        log_prob: sum over its tokens, natural logarithm.
        greedy: every token was the most likely one.
    """

    log_prob: float
    greedy: bool


@dataclass
class Context:
    """A context in the cache, compressed.

    Args:
        cache: what was kept.
        logits_V: after its last token.
        generation: what was measured, as of a prompt after which nothing was generated.
        whole: nothing was compressed.
        followed: a continuation has been fed; the cache is no longer that of the context alone.
    """

    cache: KVCache
    logits_V: Tensor
    generation: Generation
    whole: bool
    followed: bool = field(default=False)


class Scorer:
    """Scores continuations with one method on one model, one context at a time.

    Args:
        model: a transformers causal LM.
        method: what compresses the context.
        backend: attention backend, as in KVCache.
        seed: of torch, before each context, for methods that draw random numbers.
    """

    def __init__(self, model: PreTrainedModel, method: Method, backend: str, seed: int) -> None:
        self._model, self._method, self._backend, self._seed = model, method, backend, seed
        self._device = torch.device(model.device)
        self._argument = cache_argument(model)
        self._clock = Clock(self._device)

    @torch.inference_mode()
    def compress(self, ids: list[int], budget: Budget) -> Context:
        """Feed a context of at least one token.

        Raises:
            InfeasibleBudget: the method can't run within the budget on it.
        """
        torch.manual_seed(self._seed)
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        cache = KVCache(self._model, self._method, budget, backend=self._backend)
        if cuda:
            plan = self._method.usage(cache.geometry, cache.budget, len(ids), self._model.dtype.itemsize)
            check_host_memory(int(HOST_MARGIN * plan.host_bytes))
        start = self._clock.now()
        logits_NV = self._forward(ids, 0, 1, cache)
        generation = self._measured(cache, self._clock.now() - start)
        return Context(cache, logits_NV[-1], generation, uncompressed(cache, self._model.dtype.itemsize)[0])

    @torch.inference_mode()
    def score(self, context: Context, continuation: list[int]) -> Likelihood:
        """Score a continuation of at least one token. One of several tokens takes the context with it."""
        first = _likelihood(context.logits_V.unsqueeze(0), continuation[:1])
        if len(continuation) == 1:
            return first
        assert not context.followed, "the cache holds a continuation already"
        context.followed = True
        fed = continuation[:-1]
        logits_NV = self._forward(fed, context.cache.prompt_tokens[0], len(fed), context.cache)
        rest = _likelihood(logits_NV, continuation[1:])
        return Likelihood(first.log_prob + rest.log_prob, first.greedy and rest.greedy)

    @torch.inference_mode()
    def exact(self, context: list[int], continuation: list[int]) -> tuple[Likelihood, float]:
        """Score by one plain forward without a cache; the milliseconds it took."""
        start = self._clock.now()
        fed = (context + continuation)[:-1]
        logits_NV = self._forward(fed, 0, len(continuation), None)
        return _likelihood(logits_NV, continuation), self._clock.now() - start

    def _forward(self, ids: list[int], position: int, logits: int, cache: KVCache | None) -> Tensor:
        """Logits [N, V] after the last `logits` of these tokens, which begin at `position`."""
        ids_1N = torch.tensor([ids], device=self._device)
        positions_1N = torch.arange(position, position + len(ids), device=self._device).unsqueeze(0)
        carried: dict[str, Any] = {} if cache is None else {self._argument: cache}
        with self._in_pieces(len(ids)):
            output = self._model(
                input_ids=ids_1N,
                position_ids=positions_1N,
                use_cache=cache is not None,
                logits_to_keep=logits,
                **carried,
            )
        found: Tensor = output.logits[0, -logits:]
        return found

    def _in_pieces(self, tokens: int) -> AbstractContextManager[None]:
        return chunked_mlps(self._model) if tokens > PIECE_TOKENS else nullcontext()

    def _measured(self, cache: KVCache, prefill_ms: float) -> Generation:
        sides = cache.nbytes()
        memory = Memory(
            device_payload=sides["device"]["payload"],
            device_metadata=sides["device"]["metadata"],
            device_reserved=sides["device"]["reserved"],
            host_payload=sides["host"]["payload"],
            full_kv_bytes=cache.full_nbytes(),
            peak_device_bytes=_peak(self._device),
        )
        counters = {**cache.counters(), "attended_fraction": cache.attended_fraction(), "fed_tokens": 0.0}
        return _without_tokens(cache.prompt_tokens[0], prefill_ms, memory, counters, cache.backend_name)


def exact_measure(model: PreTrainedModel, geometry: Geometry, tokens: int, forward_ms: float) -> Generation:
    """What stands for a forward without a cache: every key and value was there and was attended to."""
    full = full_bytes(geometry, tokens, model.dtype.itemsize)
    memory = Memory(full, 0, full, 0, full, None)
    return _without_tokens(tokens, forward_ms, memory, {"attended_fraction": 1.0, "fed_tokens": 0.0}, "none")


def full_bytes(geometry: Geometry, tokens: int, number_bytes: int) -> int:
    """Keys and values of so many tokens in every layer and head."""
    return 2 * geometry.heads * geometry.head_dim * tokens * number_bytes


def uncompressed(cache: KVCache, number_bytes: int) -> list[bool]:
    """Of which sequences nothing was compressed: every position can be attended to and takes all its bytes.

    Asked right after the prompt.
    """
    geometry = cache.geometry
    kept = [0] * len(cache.prompt_tokens)
    for layer in range(geometry.layers):
        for sequence, heads in enumerate(cache.kept(layer)):
            kept[sequence] += sum(positions.numel() for positions in heads)
    found = []
    for tokens, attended in zip(cache.prompt_tokens, kept, strict=True):
        plan = cache.method.usage(geometry, cache.budget, tokens, number_bytes)
        all_bytes = plan.device_bytes + plan.host_bytes >= full_bytes(geometry, tokens, number_bytes)
        found.append(all_bytes and attended >= geometry.heads * tokens)
    return found


def _likelihood(logits_NV: Tensor, tokens: list[int]) -> Likelihood:
    logits_NV = logits_NV.float()
    tokens_N = torch.tensor(tokens, device=logits_NV.device)
    chosen_N = logits_NV.gather(1, tokens_N.unsqueeze(1)).squeeze(1)
    log_prob = (chosen_N - logits_NV.logsumexp(1)).double().sum()
    return Likelihood(float(log_prob), bool((logits_NV.argmax(1) == tokens_N).all()))


def _without_tokens(
    tokens: int, prefill_ms: float, memory: Memory, counters: dict[str, float], backend: str
) -> Generation:
    engine = {"name": "eager", "reason": "", "backend": backend, "compile": "off", "captures": 0, "graphs": 0}
    timings = Timings(prefill_ms, [])
    return Generation(
        torch.empty(1, 0), [0], timings, memory, counters, [tokens], {**engine, "warmup_ms": 0.0}
    )


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

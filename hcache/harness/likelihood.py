"""Log-likelihoods of continuations after contexts whose cache was compressed.

A context is a prompt: it is fed, compressed, and its last logits say the first token of a continuation. The
other tokens are fed together through the compressed cache, as a follow-up question would be. Knows nothing of
lm-evaluation-harness.

Shapes: B contexts side by side, N tokens, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Sequence
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
class Contexts:
    """Contexts in the cache, side by side, compressed.

    Args:
        cache: what was kept.
        mask_BN: 0 at the pads in front of shorter contexts; None without pads.
        logits_BV: after the last token of each.
        generation: what was measured, as of prompts after which nothing was generated.
        whole: of which nothing was compressed.
        followed: continuations have been fed; the cache is no longer that of the contexts alone.
    """

    cache: KVCache
    mask_BN: Tensor | None
    logits_BV: Tensor
    generation: Generation
    whole: list[bool]
    followed: bool = field(default=False)


class Scorer:
    """Scores continuations with one method on one model.

    Args:
        model: a transformers causal LM.
        method: what compresses contexts.
        backend: attention backend, as in KVCache.
        seed: of torch, before each batch of contexts, for methods that draw random numbers.
    """

    def __init__(self, model: PreTrainedModel, method: Method, backend: str, seed: int) -> None:
        self._model, self._method, self._backend, self._seed = model, method, backend, seed
        self._device = torch.device(model.device)
        self._argument = cache_argument(model)
        self._clock = Clock(self._device)

    @torch.inference_mode()
    def compress(self, contexts: Sequence[list[int]], budget: Budget) -> Contexts:
        """Feed contexts of at least one token each.

        Raises:
            InfeasibleBudget: the method can't run within the budget on one of them.
        """
        torch.manual_seed(self._seed)
        cuda = self._device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats(self._device)
        cache, size = (
            KVCache(self._model, self._method, budget, backend=self._backend),
            self._model.dtype.itemsize,
        )
        if cuda:
            plans = (self._method.usage(cache.geometry, cache.budget, len(ids), size) for ids in contexts)
            check_host_memory(int(HOST_MARGIN * sum(plan.host_bytes for plan in plans)))
        ids_BN, mask_BN = self._padded(contexts)
        start = self._clock.now()
        logits_BNV = self._forward(ids_BN, mask_BN, places(ids_BN, mask_BN), 1, cache)
        generation = self._measured(cache, self._clock.now() - start)
        return Contexts(cache, mask_BN, logits_BNV[:, -1], generation, uncompressed(cache, size))

    def score(self, contexts: Contexts, asked: Sequence[Sequence[list[int]]]) -> list[list[Likelihood]]:
        """Score continuations of at least one token each.

        Args:
            asked: those of each context. Of several tokens there is one for every context, or none for any:
                it is fed, and takes the contexts with it.
        """
        longer = [next((own for own in one if len(own) > 1), None) for one in asked]
        rest = self._fed(contexts, [own for own in longer if own is not None])
        return [
            [self._likelihood(logits_V, own, rest_NV) for own in one]
            for one, logits_V, rest_NV in zip(asked, contexts.logits_BV, rest, strict=True)
        ]

    @torch.inference_mode()
    def _likelihood(self, logits_V: Tensor, continuation: list[int], rest_NV: Tensor | None) -> Likelihood:
        if len(continuation) == 1:
            return _likelihood(logits_V.unsqueeze(0), continuation)
        assert rest_NV is not None, "a continuation of several tokens is fed"
        return _likelihood(torch.cat([logits_V.unsqueeze(0), rest_NV]), continuation)

    @torch.inference_mode()
    def _fed(self, contexts: Contexts, continuations: Sequence[list[int]]) -> Sequence[Tensor | None]:
        """Logits after all tokens of the continuations but their last; None for each context without any."""
        count = len(contexts.cache.prompt_tokens)
        if not continuations:
            return [None] * count
        assert len(continuations) == count, "one for every context, or none for any"
        assert not contexts.followed, "the cache holds continuations already"
        contexts.followed = True
        ids_BN, own_BN = self._padded([own[:-1] for own in continuations])
        first_B = torch.tensor(contexts.cache.prompt_tokens, device=self._device)
        mask_BN = None
        if own_BN is not None:
            before_BN = contexts.mask_BN
            if before_BN is None:
                before_BN = torch.ones(count, int(first_B[0]), dtype=torch.int64, device=self._device)
            mask_BN = torch.cat([before_BN, own_BN], dim=1)
        positions_BN = places(ids_BN, own_BN) + first_B.unsqueeze(1)
        logits_BNV = self._forward(ids_BN, mask_BN, positions_BN, ids_BN.shape[1], contexts.cache)
        return [logits_NV[1 - len(own) :] for logits_NV, own in zip(logits_BNV, continuations, strict=True)]

    @torch.inference_mode()
    def exact(self, context: list[int], continuation: list[int]) -> tuple[Likelihood, float]:
        """Score by one plain forward without a cache; the milliseconds it took."""
        start = self._clock.now()
        ids_1N, _ = self._padded([(context + continuation)[:-1]])
        logits_1NV = self._forward(ids_1N, None, places(ids_1N, None), len(continuation), None)
        return _likelihood(logits_1NV[0], continuation), self._clock.now() - start

    def _padded(self, rows: Sequence[list[int]]) -> tuple[Tensor, Tensor | None]:
        """Ids and mask [B, N], padded on the left; no mask where there are no pads."""
        width = max(map(len, rows))
        ids_BN = torch.tensor([[0] * (width - len(row)) + row for row in rows], device=self._device)
        if min(map(len, rows)) == width:
            return ids_BN, None
        mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
        return ids_BN, torch.tensor(mask, device=self._device)

    def _forward(
        self, ids_BN: Tensor, mask_BN: Tensor | None, positions_BN: Tensor, logits: int, cache: KVCache | None
    ) -> Tensor:
        """Logits [B, N, V] after the last `logits` of these tokens."""
        carried: dict[str, Any] = {} if cache is None else {self._argument: cache}
        with self._in_pieces(ids_BN.numel()):
            output = self._model(
                input_ids=ids_BN,
                attention_mask=mask_BN,
                position_ids=positions_BN,
                use_cache=cache is not None,
                logits_to_keep=logits,
                **carried,
            )
        found: Tensor = output.logits[:, -logits:]
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
        return _without_tokens(cache.prompt_tokens, prefill_ms, memory, counters, cache.backend_name)


def places(ids_BN: Tensor, mask_BN: Tensor | None) -> Tensor:
    """Positions [B, N] counted without pads; those of pads mean nothing."""
    if mask_BN is None:
        return torch.arange(ids_BN.shape[1], device=ids_BN.device).expand_as(ids_BN)
    return (mask_BN.cumsum(1) - 1).clamp_min(0)


def exact_measure(model: PreTrainedModel, geometry: Geometry, tokens: int, forward_ms: float) -> Generation:
    """What stands for a forward without a cache: every key and value was there and was attended to."""
    full = full_bytes(geometry, tokens, model.dtype.itemsize)
    memory = Memory(full, 0, full, 0, full, None)
    return _without_tokens(
        [tokens], forward_ms, memory, {"attended_fraction": 1.0, "fed_tokens": 0.0}, "none"
    )


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
    tokens: Sequence[int], prefill_ms: float, memory: Memory, counters: dict[str, float], backend: str
) -> Generation:
    engine = {"name": "eager", "reason": "", "backend": backend, "compile": "off", "captures": 0, "graphs": 0}
    timings, none = Timings(prefill_ms, []), [0] * len(tokens)
    return Generation(
        torch.empty(len(tokens), 0),
        none,
        timings,
        memory,
        counters,
        list(tokens),
        {**engine, "warmup_ms": 0.0},
    )


def _peak(device: torch.device) -> int | None:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None

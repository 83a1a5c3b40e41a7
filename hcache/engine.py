"""Generator: prefill, then greedy decoding with a compressed cache, timed and counted.

Eager for now: each step is one forward of transformers' own model. Knows the cache's interface; nothing of
what a method does, of benchmarks or of text.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hcache.attention.function import cache_argument
from hcache.budget import Budget
from hcache.kv_cache import KVCache
from hcache.methods import Method, make


@dataclass
class Timings:
    """Wall-clock milliseconds of a batch, the device synchronised before each reading.

    Args:
        prefill_ms: prompt, compression, and the follow-up where there is one.
        decode_ms: one number a decode step; a step feeds one token of every sequence.
    """

    prefill_ms: float
    decode_ms: list[float]


@dataclass
class Memory:
    """Bytes of the batch after prefill, read from the storage; peak_device_bytes is None without CUDA."""

    device_payload: int
    device_metadata: int
    device_reserved: int
    host_payload: int
    full_kv_bytes: int
    peak_device_bytes: int | None

    @property
    def resident_fraction(self) -> float:
        """Device payload and metadata over the full cache of the same prompts."""
        return (self.device_payload + self.device_metadata) / self.full_kv_bytes


@dataclass
class Generation:
    """What came out.

    Args:
        tokens: [B, new] int64; behind a sequence's length the pad token.
        lengths: generated tokens of each sequence before its stop sequence or end-of-text token.
        timings, memory: see their classes.
        counters: the method's counters, attended_fraction, and decode_steps.
        prompt_tokens: prompt length of each sequence without pads, follow-up not counted.
    """

    tokens: Tensor
    lengths: list[int]
    timings: Timings
    memory: Memory
    counters: dict[str, float]
    prompt_tokens: list[int]


class Generator:
    """Greedy generation with one method and budget on one model.

    Args:
        model: a transformers causal LM.
        method, budget, backend, **hyper: as in KVCache.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "fullkv",
        budget: Budget | float | int | None = None,
        *,
        backend: str = "auto",
        **hyper: Any,
    ) -> None:
        self.model = model
        self.method = make(method, **hyper)
        self.budget = budget
        self.backend = backend
        self.device = torch.device(model.device)

    @torch.inference_mode()
    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[Sequence[int]] = (),
        seed: int | None = None,
        follow_up: tuple[Tensor, Tensor | None] | None = None,
    ) -> Generation:
        """Generate greedily until every sequence has stopped.

        Args:
            input_ids: [B, T] int64, left-padded.
            attention_mask: [B, T], 0 at pads; None where there are none.
            max_new_tokens: at least 1.
            stop: token sequences that end a sequence, besides the model's end-of-text tokens.
            seed: seeds torch for methods that draw random numbers.
            follow_up: (ids [B, T2], mask [B, T2] or None) fed after the prompt has been compressed.

        Raises:
            ValueError: max_new_tokens below 1.
            InfeasibleBudget: the method can't run within the budget on these prompts.
        """
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be at least 1")
        if seed is not None:
            torch.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        extra = 0 if follow_up is None else follow_up[0].shape[1]
        cache = KVCache(
            self.model, self.method, self.budget, backend=self.backend, reserve_tokens=max_new_tokens + extra
        )
        run = _Run(self, cache, stop, max_new_tokens)
        memory = run.prefill(input_ids, attention_mask, follow_up)
        run.decode()
        return run.result(memory)


class _Run:
    """One call of generate."""

    def __init__(
        self, generator: Generator, cache: KVCache, stop: Sequence[Sequence[int]], limit: int
    ) -> None:
        self._model, self._device, self._cache = generator.model, generator.device, cache
        self._ends = [(token,) for token in end_tokens(generator.model)] + [tuple(s) for s in stop if s]
        self._limit = limit
        self._argument = cache_argument(generator.model)
        self._prefill_ms = 0.0
        self._decode_ms: list[float] = []
        self._counters: dict[str, float] = {}

    def prefill(
        self, ids: Tensor, mask: Tensor | None, follow_up: tuple[Tensor, Tensor | None] | None
    ) -> Memory:
        """Feed prompt and follow-up; choose the first token."""
        ids = ids.to(self._device)
        mask = _padding(mask, self._device)
        start = self._now()
        logits = self._forward(ids, mask, _positions(ids, mask, None))
        self._next = (ids.shape[1] if mask is None else mask.sum(1)) * torch.ones_like(ids[:, 0])
        self._prefill_ms = self._now() - start
        memory = self._measure()
        if follow_up is not None:
            start = self._now()
            logits = self._follow(ids, mask, *follow_up)
            self._prefill_ms += self._now() - start
        self._token = logits.argmax(-1)
        self._lengths: list[int | None] = [None] * ids.shape[0]
        self._rows: list[list[int]] = [[] for _ in range(ids.shape[0])]
        self._record()
        return memory

    def _follow(self, ids: Tensor, mask: Tensor | None, more: Tensor, more_mask: Tensor | None) -> Tensor:
        """Feed a left-padded follow-up after the compressed prompt."""
        more, more_mask = more.to(self._device), _padding(more_mask, self._device)
        positions = _positions(more, more_mask, self._next)
        full = None
        if more_mask is not None:
            full = torch.cat([torch.ones_like(ids) if mask is None else mask, more_mask], dim=1)
        logits = self._forward(more, full, positions)
        self._next = self._next + (more.shape[1] if more_mask is None else more_mask.sum(1))
        return logits

    def decode(self) -> None:
        """Feed token by token until all sequences have ended or the limit is reached."""
        while None in self._lengths and len(self._rows[0]) < self._limit:
            start = self._now()
            logits = self._forward(self._token.unsqueeze(1), self._going_on(), self._next.unsqueeze(1))
            self._token = logits.argmax(-1)
            self._decode_ms.append(self._now() - start)
            self._next = self._next + 1
            self._record()

    def _going_on(self) -> Tensor | None:
        """Mask [B, 1] that leaves out sequences that have ended; None while there are none."""
        if not any(length is not None for length in self._lengths):
            return None
        alive = [[int(length is None)] for length in self._lengths]
        return torch.tensor(alive, device=self._device)

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Logits [B, V] after the last of these tokens."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._argument: self._cache},
        )
        return output.logits[:, -1]

    def _record(self) -> None:
        """Append the chosen tokens and see which sequences end with them."""
        for b, token in enumerate(self._token.tolist()):
            row = self._rows[b]
            row.append(token)
            if self._lengths[b] is None:
                ended = [end for end in self._ends if tuple(row[-len(end) :]) == end]
                if ended:
                    self._lengths[b] = len(row) - max(len(end) for end in ended)

    def _measure(self) -> Memory:
        """Bytes right after the prompt."""
        sides = self._cache.nbytes()
        cuda = self._device.type == "cuda"
        self._counters["attended_fraction"] = self._cache.attended_fraction()
        return Memory(
            device_payload=sides["device"]["payload"],
            device_metadata=sides["device"]["metadata"],
            device_reserved=sides["device"]["reserved"],
            host_payload=sides["host"]["payload"],
            full_kv_bytes=self._cache.full_nbytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(self._device) if cuda else None,
        )

    def result(self, memory: Memory) -> Generation:
        """Everything of the call; tokens behind a sequence's end are pads."""
        pad = next((end[0] for end in self._ends if len(end) == 1), 0)
        tokens = torch.tensor(self._rows)
        lengths = [tokens.shape[1] if length is None else length for length in self._lengths]
        behind = torch.arange(tokens.shape[1]) >= torch.tensor(lengths).unsqueeze(1)
        counters = {**self._counters, **self._cache.counters(), "decode_steps": len(self._decode_ms)}
        timings = Timings(self._prefill_ms, self._decode_ms)
        return Generation(
            tokens.masked_fill(behind, pad), lengths, timings, memory, counters, self._cache.prompt_tokens
        )

    def _now(self) -> float:
        """Milliseconds, after all work on the device is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter() * 1e3


def _padding(mask: Tensor | None, device: torch.device) -> Tensor | None:
    """The mask on the device as int64; None where it hides nothing."""
    return None if mask is None or bool(mask.all()) else mask.to(device).long()


def _positions(ids: Tensor, mask: Tensor | None, first_B: Tensor | None) -> Tensor:
    """True positions [B, T]: pads don't count; they get position 0 or `first`."""
    if mask is None:
        positions = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    else:
        positions = (mask.cumsum(1) - 1).clamp_min(0)
    return positions if first_B is None else positions + first_B.unsqueeze(1)


def end_tokens(model: PreTrainedModel) -> list[int]:
    """The model's end-of-text tokens, from its generation config."""
    ends = getattr(model.generation_config, "eos_token_id", None)
    if ends is None:
        return []
    return list(ends) if isinstance(ends, list | tuple) else [ends]

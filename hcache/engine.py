"""Generator: prefill, then decoding with a compressed cache, timed and counted.

On a GPU a whole step (append, select or evict, attend, MLP, the choice of a token, the look for an end) is
one CUDA graph, captured once and replayed for all prompts whose states fit; elsewhere each step is a forward
of transformers' own model. What was done, and why not otherwise, is in `Generation.engine`. Knows the cache's
interface; nothing of what a method does, of benchmarks or of text.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Hashable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hcache.attention.function import cache_argument
from hcache.budget import Budget
from hcache.cache.lane import lane_of
from hcache.cache.offload import check_host_memory
from hcache.cache.room import Held, Room, StickyRoom
from hcache.clock import Clock
from hcache.compiling import Compile, CompiledLayers, decoder_layers
from hcache.graphs import CaptureFailed, Graphs, Work, capture
from hcache.kv_cache import KVCache, attention_modules
from hcache.methods import Method, make
from hcache.models.chunking import PIECE_TOKENS, chunked_mlps
from hcache.models.projections import fused_projections
from hcache.registry import choice
from hcache.tape import Sampling, Tape, barred, padded, text_span

log = logging.getLogger(__name__)

LOOK_AHEAD = 8
"""Steps that are issued before the host looks whether all sequences had ended."""


class GraphMode(Enum):
    """auto: CUDA graphs where they can be; off: never; on: an error where they can't."""

    auto = "auto"
    off = "off"
    on = "on"


@dataclass(frozen=True)
class EngineSettings:
    """How steps are run; none of it changes what is computed, but for rounding.

    Args:
        graphs: see GraphMode.
        compile: decoder layers through torch.compile, in captured decoding only; see Compile.
    """

    graphs: GraphMode = GraphMode.auto
    compile: Compile = Compile.off

    @classmethod
    def of(cls, graphs: str, compile: str) -> EngineSettings:
        """From the names of the choices. Raises ValueError."""
        return cls(choice(GraphMode, "runtime.graphs", graphs), choice(Compile, "runtime.compile", compile))


@dataclass
class Timings:
    """Milliseconds of a batch: by the device's own clock where there is a GPU, else by the wall's.

    Args:
        prefill_ms: prompt, compression, and the follow-up where there is one; the device is done.
        step_ms: one number a decode step up to the last end; a step feeds one token of every sequence. None
            for steps that compiled or captured something.
        warmup_ms: what those took, captures included.
    """

    prefill_ms: float | None
    step_ms: list[float | None]
    warmup_ms: float = 0.0

    @property
    def decode_ms(self) -> list[float]:
        """Of all steps that have a time."""
        return self.first(len(self.step_ms))

    def first(self, steps: int) -> list[float]:
        """Of those among the first `steps` that have a time."""
        return [ms for ms in self.step_ms[:steps] if ms is not None]

    @property
    def warmup_steps(self) -> int:
        """Steps without a time."""
        return self.step_ms.count(None)


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
        counters: the method's counters, attended_fraction, and fed_tokens: what the counters are of. Captured
            steps go on for a few tokens behind an end, and feed sequences that have ended; eager ones don't.
        prompt_tokens: prompt length of each sequence without pads, follow-up not counted.
        engine: how steps were run; see Session.engine.
    """

    tokens: Tensor
    lengths: list[int]
    timings: Timings
    memory: Memory
    counters: dict[str, float]
    prompt_tokens: list[int]
    engine: dict[str, Any] = field(default_factory=dict)


class Generator:
    """Generation with one method and budget on one model.

    Memory for captured steps stays with the generator, so that the next prompt of the same batch size finds
    it; `release` lets it go.

    Args:
        model: a transformers causal LM.
        method, budget, backend, **hyper: as in KVCache.
        runtime: how steps are run.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        method: str | Method = "fullkv",
        budget: Budget | float | int | None = None,
        *,
        backend: str = "auto",
        runtime: EngineSettings | None = None,
        **hyper: Any,
    ) -> None:
        self.model = model
        self.method = make(method, **hyper)
        self.budget = budget
        self.backend = backend
        self.runtime = runtime or EngineSettings()
        self.device = torch.device(model.device)
        self._capture: Callable[[Work], Work] = capture
        self._captured: _Captured | None = None

    def generate(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[Sequence[int]] = (),
        seed: int | None = None,
        follow_up: tuple[Tensor, Tensor | None] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        never_empty: bool = False,
    ) -> Generation:
        """Generate until every sequence has stopped.

        Args:
            input_ids: [B, T] int64, left-padded.
            attention_mask: [B, T], 0 at pads; None where there are none.
            max_new_tokens: at least 1.
            stop: token sequences that end a sequence, besides the model's end-of-text tokens.
            seed: seeds torch for methods that draw random numbers, and for sampling.
            follow_up: (ids [B, T2], mask [B, T2] or None) fed after the prompt has been compressed.
            temperature, top_p: see Sampling; greedy by default.
            never_empty: no end that is a single token can be chosen as the first token.

        Raises:
            ValueError: max_new_tokens below 1, sampling that can't be.
            InfeasibleBudget: the method can't run within the budget on these prompts.
        """
        session = self.begin(
            input_ids, attention_mask, max_new_tokens, stop, seed, follow_up, temperature, top_p, never_empty
        )
        session.decode()
        return session.result()

    @torch.inference_mode()
    def begin(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        max_new_tokens: int = 128,
        stop: Sequence[Sequence[int]] = (),
        seed: int | None = None,
        follow_up: tuple[Tensor, Tensor | None] | None = None,
        temperature: float = 0.0,
        top_p: float = 1.0,
        never_empty: bool = False,
    ) -> Session:
        """The prompt alone: a session that can be decoded. Arguments as in `generate`."""
        extra = 0 if follow_up is None else follow_up[0].shape[1]
        session = self._session(input_ids.shape[0], max_new_tokens, stop, seed, extra, temperature, top_p)
        session.prefill(input_ids, attention_mask, follow_up, never_empty)
        return session

    @torch.inference_mode()
    def begin_filled(
        self, prompt_tokens: int, batch: int = 1, max_new_tokens: int = 128, seed: int | None = None
    ) -> Session:
        """A session after a prompt of random queries, keys and values that the model never saw.

        Times what follows a prompt without the time of its prefill; what comes out means nothing, and no
        token ends it.
        """
        session = self._session(batch, max_new_tokens, None, seed, 0, 0.0, 1.0)
        session.fill(prompt_tokens, batch)
        return session

    def release(self) -> None:
        """Let go of captured steps and their memory."""
        self._captured = None

    def _session(
        self,
        batch: int,
        limit: int,
        stop: Sequence[Sequence[int]] | None,
        seed: int | None,
        extra: int,
        temperature: float,
        top_p: float,
    ) -> Session:
        if limit < 1:
            raise ValueError(f"max_new_tokens={limit} must be at least 1")
        sampling = Sampling(temperature, top_p)
        if seed is not None:
            torch.manual_seed(seed)
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        captured, reason = self._engine_for(batch, sampling)
        if captured is not None:
            captured.join()
        cache = KVCache(
            self.model,
            self.method,
            self.budget,
            backend=self.backend,
            reserve_tokens=limit + extra,
            rooms=None if captured is None else captured.rooms,
        )
        ends: list[tuple[int, ...]] = [] if stop is None else [(token,) for token in end_tokens(self.model)]
        ends += [tuple(sequence) for sequence in stop or () if sequence]
        return Session(self.model, cache, sampling, limit, ends, captured, reason)

    def _engine_for(self, batch: int, sampling: Sampling) -> tuple[_Captured | None, str]:
        """Captured steps for this batch size, or why there are none."""
        reason = self._why_eager()
        if not reason:
            if self._captured is None or not self._captured.fits(batch, sampling):
                self._captured = None  # before the next one takes its memory
                self._captured = _Captured(self.model, batch, sampling, self.runtime, self._capture)
            if not self._captured.failure:
                return self._captured, ""
            reason = f"a step could not be captured: {self._captured.failure}"
        if self.runtime.graphs is GraphMode.on:
            raise ValueError(f"runtime.graphs=on, but {reason}; set runtime.graphs=auto")
        return None, reason

    def _why_eager(self) -> str:
        """Why steps of this model can't be captured here; empty if they can."""
        if self.runtime.graphs is GraphMode.off:
            return "runtime.graphs=off"
        if self.device.type != "cuda" and self._capture is capture:
            return f"the model is on {self.device.type}, CUDA graphs need a GPU"
        if len({parameter.device for parameter in self.model.parameters()}) > 1:
            return "the model is spread over several devices"
        if getattr(self.model, "is_quantized", False):
            return "the model is quantised"
        return ""


class Session:
    """One batch: its prompt, and decoding as far as one asks.

    Attributes:
        cache: the compressed cache.
        prefill_ms: None where there was no prompt to run.
        memory: bytes right after the prompt.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        cache: KVCache,
        sampling: Sampling,
        limit: int,
        ends: Sequence[Sequence[int]],
        captured: _Captured | None,
        reason: str,
    ) -> None:
        self._model, self._device, self.cache = model, torch.device(model.device), cache
        self._sampling, self._limit, self._ends = sampling, limit, ends
        self._captured, self._reason = captured, reason
        self._argument = cache_argument(model)
        self.clock = Clock(self._device)
        self.prefill_ms: float | None = None
        self._counters: dict[str, float] = {}
        self._step_ms: list[float | None] = []
        self._fed, self._broken = 0, False
        self._warmup_ms, self._warmed_before = 0.0, 0.0 if captured is None else captured.warmup_ms
        # Whose prompt the captured steps go on with: a later one takes their tensors.
        self._ticket = object()
        if captured is not None:
            captured.ticket = self._ticket

    def prefill(
        self,
        ids: Tensor,
        mask: Tensor | None,
        follow_up: tuple[Tensor, Tensor | None] | None,
        never_empty: bool = False,
    ) -> None:
        """Feed prompt and follow-up; choose the first token."""
        ids = ids.to(self._device)
        mask = _padding(mask, self._device)
        self._check_host([ids.shape[1]] * len(ids) if mask is None else mask.sum(1).tolist())
        start = self.clock.now()
        with self._in_pieces(ids):
            logits = self._forward(ids, mask, _positions(ids, mask, None))
        next_B = (ids.shape[1] if mask is None else mask.sum(1)) * torch.ones_like(ids[:, 0])
        self.prefill_ms = self.clock.now() - start
        self.memory = self._measure()
        if follow_up is not None:
            start = self.clock.now()
            logits, next_B = self._follow(ids, mask, next_B, *follow_up)
            self.prefill_ms += self.clock.now() - start
        if never_empty:
            logits = barred(logits, [end[0] for end in self._ends if len(end) == 1])
        self._start(self._sampling.choose(logits), next_B)

    def _in_pieces(self, ids: Tensor) -> AbstractContextManager[None]:
        """MLPs and norms of a long prompt a few thousand tokens at a time."""
        return chunked_mlps(self._model) if ids.numel() > PIECE_TOKENS else nullcontext()

    def _check_host(self, counts: list[int]) -> None:
        """Raise HostMemoryError where what is to wait beside the GPU doesn't fit in host memory."""
        if self._device.type == "cuda":
            cache, size = self.cache, self._model.dtype.itemsize
            plans = (cache.method.usage(cache.geometry, cache.budget, n, size) for n in counts)
            rooms = [] if self._captured is None else self._captured.rooms
            held = sum(room.pinned_bytes for room in rooms)
            needed = sum(plan.host_bytes for plan in plans)
            # Rooms round up by an eighth, and by a quarter more where they have to grow.
            check_host_memory(int(needed * (1.41 if held else 1.125)) - held if rooms else needed)

    def fill(self, prompt_tokens: int, batch: int) -> None:
        """Put random numbers where the prompt would be; token 0 comes first."""
        self._check_host([prompt_tokens] * batch)
        self.cache.fill(prompt_tokens, batch, self._model.dtype, self._device)
        self.memory = self._measure()
        first_B = torch.zeros(batch, dtype=torch.int64, device=self._device)
        self._start(first_B, first_B + prompt_tokens)

    def _follow(
        self, ids: Tensor, mask: Tensor | None, next_B: Tensor, more: Tensor, more_mask: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Feed a left-padded follow-up after the compressed prompt: its logits, and what position is next."""
        more, more_mask = more.to(self._device), _padding(more_mask, self._device)
        positions = _positions(more, more_mask, next_B)
        full = None
        if more_mask is not None:
            full = torch.cat([torch.ones_like(ids) if mask is None else mask, more_mask], dim=1)
        with self._in_pieces(more):
            logits = self._forward(more, full, positions)
        return logits, next_B + (more.shape[1] if more_mask is None else more_mask.sum(1))

    def _start(self, first_B: Tensor, next_B: Tensor) -> None:
        room = Room() if self._captured is None else self._captured.room
        self._feed = _Feed(first_B, next_B, self._limit, self._ends, room)
        if self._captured is not None:
            self._captured.take(self.cache, self._feed)

    @torch.inference_mode()
    def decode(self, steps: int | None = None) -> list[float]:
        """Feed token by token: `steps` of them, or until all sequences have ended or the limit is reached.

        Returns:
            Milliseconds of each step that neither compiled nor captured anything.
        """
        self._require_turn()
        left = self._limit - 1 - len(self._step_ms)
        until_end = steps is None
        wanted = left if steps is None else steps
        if wanted > left:
            raise ValueError(f"{wanted} steps are more than the {left} left of max_new_tokens={self._limit}")
        before = len(self._step_ms)
        if self._captured is not None:
            wanted = self._replay(wanted, until_end)
        if self._captured is None:  # from the start, or since a capture has failed
            self._eager(wanted, until_end)
        return [ms for ms in self._step_ms[before:] if ms is not None]

    def _require_turn(self) -> None:
        """Raise ValueError where the captured steps are another prompt's by now, or broke off."""
        if self._broken:
            raise ValueError(
                "this session broke off in the middle of a step and can't go on; begin a new one"
            )
        if self._captured is not None and self._captured.ticket is not self._ticket:
            raise ValueError(
                "another prompt has begun on this Generator since, and has taken this session's memory: "
                "finish one session before the next begins, or use two Generators"
            )

    def _eager(self, wanted: int, until_end: bool) -> None:
        tape = self._feed.tape
        for _ in range(wanted):
            done_B = tape.done_B.tolist()
            if until_end and all(done_B):
                return
            start = self.clock.now()
            alive = None if not any(done_B) or not until_end else (~tape.done_B).long().unsqueeze(1)
            logits = self._forward(self._feed.token_B1, alive, self._feed.position_B1)
            self._feed.take(self._sampling.choose(logits))
            self._step_ms.append(self.clock.now() - start)
            self._fed += len(done_B) if alive is None else done_B.count(False)

    def _replay(self, wanted: int, until_end: bool) -> int:
        """Captured steps. Returns how many are left to be done eagerly: none, unless a capture failed."""
        captured = self._captured
        assert captured is not None
        laps: list[Callable[[], float] | None] = []
        try:
            wanted = self._issue(captured, wanted, until_end, laps)
        except BaseException:
            self._broken = True
            raise
        finally:
            captured.join()
        self._step_ms += [None if lap is None else lap() for lap in laps]
        self._fed += len(laps) * self._feed.token_B1.shape[0]
        if captured.failure:
            self._give_up(captured)
        return wanted

    def _issue(
        self,
        captured: _Captured,
        wanted: int,
        until_end: bool,
        laps: list[Callable[[], float] | None],
    ) -> int:
        """Issue steps until enough are, all had ended LOOK_AHEAD steps ago, or a capture failed; how many are
        left. Notes a lap for each, None for those that warmed something up.
        """
        ended: deque[Callable[[], bool]] = deque()
        while wanted and not captured.failure:
            if until_end:
                ended.append(self.clock.flag(self._feed.tape.finished))
                if len(ended) > LOOK_AHEAD and ended.popleft()():
                    return 0
            lap = self.clock.lap()
            laps.append(lap() if captured.step(self.cache) else None)
            wanted -= 1
        return wanted

    def _give_up(self, captured: _Captured) -> None:
        """Go on eagerly after a step that couldn't be captured; the step itself has been done.

        Raises:
            ValueError: runtime.graphs=on.
        """
        self._reason = f"a step could not be captured: {captured.failure}"
        if captured.strict:
            raise ValueError(f"runtime.graphs=on, but {self._reason}; set runtime.graphs=auto")
        log.warning("decoding goes on eagerly: %s", self._reason)
        self._warmup_ms = captured.warmup_ms
        self._captured = None

    def _forward(self, ids: Tensor, mask: Tensor | None, positions: Tensor) -> Tensor:
        """Logits [B, V] after the last of these tokens."""
        output = self._model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{self._argument: self.cache},
        )
        return output.logits[:, -1]

    def _measure(self) -> Memory:
        """Bytes right after the prompt."""
        sides = self.cache.nbytes()
        cuda = self._device.type == "cuda"
        self._counters["attended_fraction"] = self.cache.attended_fraction()
        return Memory(
            device_payload=sides["device"]["payload"],
            device_metadata=sides["device"]["metadata"],
            device_reserved=sides["device"]["reserved"],
            host_payload=sides["host"]["payload"],
            full_kv_bytes=self.cache.full_nbytes(),
            peak_device_bytes=torch.cuda.max_memory_allocated(self._device) if cuda else None,
        )

    @property
    def engine(self) -> dict[str, Any]:
        """name (graph or eager), reason (why eager), backend, compile, captures, graphs, warmup_ms so far."""
        captured = self._captured
        return {
            "name": "eager" if captured is None else "graph",
            "reason": self._reason,
            "backend": self.cache.backend_name,
            "compile": Compile.off.name if captured is None else captured.compile.name,
            "captures": 0 if captured is None else captured.graphs.captures,
            "graphs": 0 if captured is None else len(captured.graphs),
            "warmup_ms": self._warmup_ms if captured is None else captured.warmup_ms,
        }

    def counters(self) -> dict[str, float]:
        """The method's counters so far, attended_fraction, and fed_tokens, all sequences together."""
        return {**self._counters, **self.cache.counters(), "fed_tokens": self._fed}

    def result(self) -> Generation:
        """Everything of the call; tokens behind a sequence's end are pads."""
        self._require_turn()
        rows = self._feed.tape.rows(1 + len(self._step_ms))
        spans = [text_span(row, self._ends) for row in rows]
        longest = max(through for _, through in spans)
        rows, lengths = [row[:longest] for row in rows], [before for before, _ in spans]
        pad = next((end[0] for end in self._ends if len(end) == 1), 0)
        warmup_ms = self._warmup_ms if self._captured is None else self._captured.warmup_ms
        return Generation(
            padded(rows, lengths, pad),
            lengths,
            Timings(self.prefill_ms, self._step_ms[: longest - 1], warmup_ms - self._warmed_before),
            self.memory,
            self.counters(),
            self.cache.prompt_tokens,
            self.engine,
        )


class _Feed(Held):
    """What goes into the next step, and the tape that its token goes to."""

    def __init__(
        self, first_B: Tensor, next_B: Tensor, limit: int, ends: Sequence[Sequence[int]], room: Room
    ) -> None:
        self.token_B1, self.position_B1 = first_B.unsqueeze(1).clone(), next_B.unsqueeze(1).clone()
        # Four dimensions: transformers hands it on as it is and looks for no pads.
        self.unmasked = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=first_B.device)
        self.tape = Tape(first_B, limit, ends, room)

    def take(self, token_B: Tensor) -> None:
        """The token that a step has chosen."""
        self.tape.write(token_B)
        self.token_B1.copy_(token_B.unsqueeze(1))
        self.position_B1 += 1


class _Captured:
    """Steps of one batch size, captured, and the room that their tensors stay in.

    Attributes:
        rooms: one a layer; `room` is that of what is fed.
        failure: why the latest step couldn't be captured; empty if it could.
        strict: a failure is an error.
        ticket: of the session whose prompt it is.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        batch: int,
        sampling: Sampling,
        runtime: EngineSettings,
        capture: Callable[[Work], Work],
    ) -> None:
        self._model, self._batch, self._sampling = model, batch, sampling
        modules = attention_modules(model, model.config.get_text_config().num_hidden_layers)
        self.rooms, self.room = [StickyRoom() for _ in modules], StickyRoom()
        self.compile, self.strict = runtime.compile, runtime.graphs is GraphMode.on
        self.failure, self.ticket = "", object()
        self._layers = CompiledLayers(decoder_layers(model, modules), self.compile)
        self.graphs, self._background = Graphs(capture), Graphs(capture, "background work")
        self._lane = lane_of(torch.device(model.device), "background")

    def fits(self, batch: int, sampling: Sampling) -> bool:
        """Whether these steps are those of such a batch."""
        return (self._batch, self._sampling) == (batch, sampling)

    @property
    def warmup_ms(self) -> float:
        """First runs and captures so far."""
        return self.graphs.warmup_ms + self._background.warmup_ms

    def take(self, cache: KVCache, feed: _Feed) -> None:
        """Go on with another prompt. What was captured stays good if everything fits in its room."""
        self.room.adopt(feed)
        cache.adopt_pending()
        self._feed = feed
        changes = [room.forget_changes() for room in (*self.rooms, self.room)]
        if any(changes) and len(self.graphs):
            log.info("steps are captured anew: %d tensors have outgrown their room", sum(changes))
            self.graphs.drop()
            self._background.drop()

    def step(self, cache: KVCache) -> bool:
        """One step of every sequence. True if all of it was replayed."""
        turns = cache.ready()
        kind = tuple(turn.kind for turn in turns)
        if any(turn.joins for turn in turns):
            self._lane.join()
        feed = self._feed
        replayed = self._run(self.graphs, kind, lambda: self._advance(cache, feed))
        if any(turn.starts for turn in turns):
            with self._lane.beside():
                replayed &= self._run(self._background, kind, cache.background)
        return replayed

    def join(self) -> None:
        """What follows waits for background work too."""
        self._lane.join()

    def _run(self, graphs: Graphs, kind: Hashable, work: Work) -> bool:
        try:
            return graphs.run(kind, work)
        except CaptureFailed as error:
            self.failure = str(error)
            work()
            return False

    def _projections(self) -> AbstractContextManager[None]:
        """Our projections, but for one sequence in compiled layers: products with one row are inductor's own,
        and faster; those with several it leaves to a library.
        """
        compiled = self.compile is not Compile.off
        if compiled and self._batch == 1:
            return nullcontext()
        return fused_projections(self._model, compiled)

    def _advance(self, cache: KVCache, feed: _Feed) -> None:
        with cache.stepping(), self._projections(), self._layers.on():
            output = self._model(
                input_ids=feed.token_B1,
                attention_mask=feed.unmasked,
                position_ids=feed.position_B1,
                use_cache=False,
                logits_to_keep=1,
            )
        feed.take(self._sampling.choose(output.logits[:, -1]))


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

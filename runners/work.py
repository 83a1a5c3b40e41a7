"""The part of an evaluation that has the model: batches in, lines of predictions.jsonl out.

The prompts of the latest cell are kept, as is its model, so that consecutive cells of a sweep make nothing
twice. Knows nothing of records on disk, resume or trackers.
"""

from __future__ import annotations

import dataclasses
import gc
import json
import logging
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hcache import records
from hcache.budget import Budget
from hcache.engine import EngineSettings, Generation, Generator, GraphMode
from hcache.models import LoadedModel
from hcache.records import Line
from hcache.stops import stop_ids
from runners import loading
from runners.config import RunConfig, budget_of
from runners.prompts import (
    Prompt,
    check_adjusted,
    check_lengths,
    left_pad,
    nearest_budget,
    prepare,
    second_prompts,
)
from runners.tracing import Tracing
from runners.wording import has_template

log = logging.getLogger(__name__)
OWN_KEYS = {"task", "id", "metric", "prediction", "answers", "score", "batch", "memory", "cut", "halved"}
"""Names in a line that no benchmark may give to what it keeps for rescoring."""

_latest: list[tuple[Any, list[Prompt]]] = []
"""The latest prompts with what they were made for; empty before the first."""


class Worker:
    """Everything one cell needs to run batches.

    Args:
        run: the cell's configuration.
        directory: of the cell, where traces go (runner.trace).

    Raises:
        InfeasibleBudget: the method can't run within the budget on these prompts.
        ValueError: too many examples too short for the budget; whatever model and benchmark refuse.
    """

    def __init__(self, run: RunConfig, directory: Path) -> None:
        if run.runtime.threads is not None:
            torch.set_num_threads(run.runtime.threads)
        self._run = run
        self._loaded = loading.loaded(run)
        self._budget = budget_of(run)
        self._latest_generator: Generator | None = None
        self.prompts = _prompts(run, self._loaded)
        _check_context(self.prompts, self._loaded)
        lengths = [prompt.tokens for prompt in self.prompts]
        self._budgets = check_lengths(run.method, self._loaded.geometry, self._budget, lengths)
        check_adjusted(self.prompts, self._budgets, self._budget)
        self._tracing = Tracing(directory, run.runner.trace, self.prompts)

    @property
    def device_name(self) -> str:
        """The machine's device in words."""
        return loading.device_name(self._loaded)

    def notes(self) -> list[str]:
        """What a reader must know: the method's notes at the shortest and the longest prompt, then others."""
        lengths = sorted({prompt.tokens for prompt in self.prompts})
        method, geometry = self._run.method, self._loaded.geometry
        found = [
            note for n in (lengths[0], lengths[-1]) for note in method.notes(geometry, self._budgets[n], n)
        ]
        asks_chat = any(prompt.example.chat for prompt in self.prompts)
        if asks_chat and not has_template(self._loaded.tokenizer):
            found.append("plain prompts: the protocol asks for a chat template, the tokenizer has none")
        return list(dict.fromkeys([*found, *self._run.benchmark.notes(), *self._tracing.notes()]))

    def run(self, batch: Sequence[Prompt]) -> list[Line]:
        """Generate and score a batch, in its order; sequences under another budget run by themselves."""
        by_budget: dict[Budget, list[Prompt]] = {}
        for prompt in batch:
            by_budget.setdefault(self._budgets[prompt.tokens], []).append(prompt)
        done = [line for budget, members in by_budget.items() for line in self._run_halving(budget, members)]
        place = {prompt.key: i for i, prompt in enumerate(batch)}
        return sorted(done, key=lambda line: place[line["task"], line["id"]])

    def _run_halving(self, budget: Budget, batch: Sequence[Prompt]) -> list[Line]:
        """Run a batch, in halves where the device has too little memory for all of it.

        Raises:
            torch.OutOfMemoryError: one sequence alone doesn't fit.
        """
        try:
            return self._run_under(budget, batch)
        except torch.OutOfMemoryError as error:
            if len(batch) == 1:
                raise
            log.warning("out of memory with %d sequences, going on with half: %s", len(batch), error)
        self._latest_generator = None
        gc.collect()
        torch.cuda.empty_cache()
        half = len(batch) // 2
        parts = [self._run_halving(budget, part) for part in (batch[:half], batch[half:])]
        return [{**line, "halved": str(i) + line.get("halved", "")} for i in (0, 1) for line in parts[i]]

    def _run_under(self, budget: Budget, batch: Sequence[Prompt]) -> list[Line]:
        started, clock = records.now(), time.perf_counter()
        generation = self._generate(budget, batch)
        replies = [self._text(prompt, generation, b) for b, prompt in enumerate(batch)]
        answers = self._answers(batch, replies)
        seconds = (time.perf_counter() - clock) / len(batch)
        adjusted = budget.kept_tokens if budget != self._budget else None
        return [
            {
                **self._scored(prompt, text),
                **measured(generation, b),
                **of_second,
                "batch": prompt.batch,
                "adjusted_budget_tokens": adjusted,
                "cut": prompt.cut,
                "started": started,
                "seconds": seconds,
            }
            for b, (prompt, (text, of_second)) in enumerate(zip(batch, answers, strict=True))
        ]

    def _answers(self, batch: Sequence[Prompt], replies: Sequence[str]) -> list[tuple[str, Line]]:
        """The replies; or those to second prompts, each with what its line says of it besides."""
        if batch[0].example.second is None:
            return [(reply, {}) for reply in replies]
        loaded = self._loaded
        prompts = second_prompts(self._run.benchmark, loaded.tokenizer, batch, replies, loaded.context_tokens)
        _check_context(prompts, loaded)
        budgets = [nearest_budget(self._run.method, loaded.geometry, self._budget, p.tokens) for p in prompts]
        found: dict[int, tuple[str, Line]] = {}
        for budget in dict.fromkeys(budgets):
            places = [place for place, own in enumerate(budgets) if own == budget]
            generation = self._generate(budget, [prompts[place] for place in places])
            for b, place in enumerate(places):
                own = {
                    "first_reply": replies[place],
                    "second_prompt_tokens": generation.prompt_tokens[b],
                    "second_new_tokens": generation.lengths[b],
                    "second_adjusted_budget_tokens": budget.kept_tokens if budget != self._budget else None,
                }
                found[place] = self._text(prompts[place], generation, b), own
        return [found[place] for place in range(len(batch))]

    def _generate(self, budget: Budget, batch: Sequence[Prompt]) -> Generation:
        tokenizer = self._loaded.tokenizer
        pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else (tokenizer.eos_token_id or 0)
        ids, mask = left_pad([prompt.ids for prompt in batch], pad)
        follow_ups = [prompt.follow_up for prompt in batch if prompt.follow_up is not None]
        first, runtime = batch[0].example, self._run.runtime
        asked: dict[str, Any] = {
            "max_new_tokens": first.max_new_tokens,
            "stop": [stop_ids(tokenizer, text) for text in first.stop],
            "seed": runtime.seed,
            "follow_up": left_pad(follow_ups, pad) if follow_ups else None,
            "temperature": runtime.temperature,
            "top_p": runtime.top_p,
            "never_empty": first.never_empty,
        }
        if self._tracing.wants(batch):
            eager = self._made(budget, EngineSettings(GraphMode.off))
            return self._tracing.generate(eager, batch, ids, mask, **asked)
        return self._generator(budget).generate(ids, mask, **asked)

    def _generator(self, budget: Budget) -> Generator:
        """The generator of the latest batch, with what it has captured, if the budget is the same."""
        if self._latest_generator is None or self._latest_generator.budget != budget:
            self._latest_generator = None  # before the next one takes its memory
            settings = self._run.runtime
            engine = EngineSettings.of(settings.graphs, settings.compile)
            self._latest_generator = self._made(budget, engine)
        return self._latest_generator

    def _made(self, budget: Budget, engine: EngineSettings) -> Generator:
        run = self._run
        return Generator(self._loaded.model, run.method, budget, backend=run.model.attention, runtime=engine)

    def _text(self, prompt: Prompt, generation: Generation, b: int) -> str:
        """The answer in what came out; the benchmark cuts it at stop texts that token ids didn't show."""
        tokens = generation.tokens[b, : generation.lengths[b]]
        text = self._loaded.tokenizer.decode(tokens, skip_special_tokens=True)
        answer: str = self._run.benchmark.postprocess(text, prompt.example)
        return answer

    def _scored(self, prompt: Prompt, text: str) -> Line:
        example = prompt.example
        score = self._run.benchmark.score(example, text, example.answers)
        own = {"task": example.task, "id": example.id, "metric": example.metric, "prediction": text}
        return {**own, "answers": list(example.answers), "score": float(score), **rescoring(example)}


def _check_context(prompts: Sequence[Prompt], loaded: LoadedModel) -> None:
    """Raise ValueError for a prompt that leaves the answer no room in the model's positions."""
    for prompt in prompts:
        question = 0 if prompt.follow_up is None else prompt.follow_up.numel()
        needed = prompt.tokens + question + prompt.example.max_new_tokens
        if needed > loaded.context_tokens:
            raise ValueError(
                f"example {prompt.example.id} of {prompt.example.task} needs {needed} tokens with its "
                f"answer, {loaded.name} has {loaded.context_tokens} positions; ask for shorter prompts"
            )


def rescoring(example: Any) -> dict[str, Any]:
    """What a benchmark put beside an example for rescoring, as JSON data under its own names."""
    extra = records.plain(dict(example.extra))
    json.dumps(extra, allow_nan=False)
    taken = sorted(set(extra) & OWN_KEYS)
    if taken:
        raise ValueError(
            f"example {example.id} of {example.task}: extra names {', '.join(taken)} are the record's own"
        )
    return extra


def measured(generation: Generation, b: int) -> dict[str, Any]:
    """One sequence's share of its batch's measurements: bytes and counters evenly, fractions as they are."""
    size = len(generation.lengths)
    memory = dataclasses.asdict(generation.memory)
    peak = memory.pop("peak_device_bytes")
    # The n-th token comes from step n-1; the step after the last one produced the stop.
    steps = generation.timings.first(max(1, generation.lengths[b]))
    counters = {
        name: value if name.endswith("_fraction") else value / size
        for name, value in generation.counters.items()
    }
    return {
        "prompt_tokens": generation.prompt_tokens[b],
        "new_tokens": generation.lengths[b],
        "prefill_ms": generation.timings.prefill_ms,
        "decode_ms": sum(steps),
        "decode_steps": len(steps),
        "memory": {**{name: value / size for name, value in memory.items()}, "peak_device_bytes": peak},
        "counters": counters,
        "warmup_ms": generation.timings.warmup_ms,
        "engine": generation.engine,
    }


def _prompts(run: RunConfig, loaded: LoadedModel) -> list[Prompt]:
    """The prompts of the latest cell if model, benchmark and batch size are the same."""
    key = (run.model, run.benchmark, run.runtime.batch_size)
    if not _latest or _latest[0][0] != key:
        _latest.clear()
        found = prepare(run.benchmark, loaded.tokenizer, run.runtime.batch_size, loaded.context_tokens)
        _latest.append((key, found))
    return _latest[0][1]

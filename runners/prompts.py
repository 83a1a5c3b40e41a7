"""From a benchmark's examples to batches of token ids, and from their lengths to the budget each one runs
under.

Batches are formed from the benchmark's full list whatever the limit, so raising the limit or resuming never
changes who shares a batch with whom; where every example is a batch of its own, no more is read than is run.
Knows no runner, no record and no method by name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcache.benchmarks.base import shard_of
from hcache.budget import Budget, InfeasibleBudget
from hcache.geometry import Geometry
from hcache.methods import Method
from runners.wording import worded

TASK_BATCHES = 1_000_000
"""More than a task has batches."""

ADJUSTED_SHARE = 0.05
"""Of a task's examples, how many may run under another budget than the one asked for."""


class EmptyShard(Exception):
    """There are more shards than batches and none is left for this one: nothing is wrong, nothing to do."""


@dataclass(frozen=True)
class Prompt:
    """One example as the model gets it.

    Args:
        example: of the benchmark.
        batch: number of the batch it belongs to, in the benchmark's full list.
        ids: [n] int64, the prompt that is compressed.
        follow_up: [n2] int64, fed after compression (query_aware=false); None where there is none.
        cut: the prompt was too long and has lost its middle.
    """

    example: Any
    batch: int
    ids: Tensor
    follow_up: Tensor | None
    cut: bool = False

    @property
    def key(self) -> tuple[str, str]:
        """What a line of predictions.jsonl is known by."""
        return self.example.task, self.example.id

    @property
    def tokens(self) -> int:
        """Length of the compressed prompt."""
        return int(self.ids.numel())


def prepare(benchmark: Any, tokenizer: Any, batch_size: int, window: int) -> list[Prompt]:
    """The prompts to run, in canonical order: batch by batch, a batch's members in the benchmark's order.

    Args:
        window: positions of the model.

    Raises:
        EmptyShard: all batches are in other shards.
        ValueError: there is no example at all, or two are alike.
    """
    wanted = benchmark.examples(tokenizer)
    everything = wanted
    if benchmark.limit is not None and batch_size > 1:
        everything = dataclasses.replace(benchmark, limit=None).examples(tokenizer)
        chosen = {(e.task, e.id) for e in wanted}
        wanted = [e for e in everything if (e.task, e.id) in chosen]
    batch_of = batches(everything, batch_size)
    own = _own_batches(benchmark.shard, [batch_of[e.task, e.id] for e in wanted])
    mine = [e for e in wanted if batch_of[e.task, e.id] in own]
    prompts = [_prompt(benchmark, tokenizer, e, batch_of[e.task, e.id], window) for e in mine]
    return sorted(prompts, key=lambda prompt: prompt.batch)


def _own_batches(name: str | None, batch_of_each: Sequence[int]) -> set[int]:
    """The batches of a shard, all of them where None is named: they are dealt out in turn.

    batch_of_each: of every example that is to be run. Raises as `prepare`.
    """
    numbers, shard = sorted(set(batch_of_each)), shard_of(name)
    if not numbers:
        raise ValueError("there is no example to run: benchmark.tasks and benchmark.limit leave none")
    own = {number for place, number in enumerate(numbers) if shard is None or shard.takes(place)}
    if not own:
        raise EmptyShard(
            f"benchmark.shard={name} has nothing to do: {len(batch_of_each)} examples make {len(numbers)} "
            f"batches, so {len(numbers)} shards are the most that have work"
        )
    return own


def second_prompts(
    benchmark: Any, tokenizer: Any, batch: Sequence[Prompt], replies: Sequence[str], window: int
) -> list[Prompt]:
    """What is asked after the replies to a batch."""
    return [
        _prompt(benchmark, tokenizer, prompt.example.asked_again(reply), prompt.batch, window)
        for prompt, reply in zip(batch, replies, strict=True)
    ]


def batches(examples: Sequence[Any], size: int) -> dict[tuple[str, str], int]:
    """Batch number of every example: those of one task and ending, the short ones together, `size` at a time.

    Numbers of a task begin at a multiple of TASK_BATCHES: more examples of one task change no other's.

    Raises:
        ValueError: two examples with one task and id, which a record could not tell apart.
    """
    found: dict[tuple[str, str], int] = {}
    for place, task in enumerate(dict.fromkeys(e.task for e in examples)):
        groups: dict[Any, list[Any]] = {}
        for e in examples:
            if e.task == task:
                groups.setdefault((e.max_new_tokens, e.stop) if size > 1 else e.id, []).append(e)
        ordered = [sorted(group, key=lambda e: len(e.prompt)) for group in groups.values()]
        chunks = [group[i : i + size] for group in ordered for i in range(0, len(group), size)]
        for number, chunk in enumerate(chunks, start=place * TASK_BATCHES):
            found.update({(e.task, e.id): number for e in chunk})
    if len(found) != len(examples):
        key, count = Counter((e.task, e.id) for e in examples).most_common(1)[0]
        raise ValueError(f"the benchmark has {count} examples with task {key[0]!r} and id {key[1]!r}")
    return found


def _prompt(benchmark: Any, tokenizer: Any, example: Any, batch: int, window: int) -> Prompt:
    rule = getattr(benchmark, "max_length", None) or benchmark.longest_prompt(window)
    chat = getattr(benchmark, "chat", None)
    if chat is not None:
        example = dataclasses.replace(example, chat=chat)
    words = worded(tokenizer, example, rule, window)
    if benchmark.query_aware:
        return Prompt(example, batch, _first(tokenizer, words.context + words.question), None, words.cut)
    follow_up = encode(tokenizer, words.question, start=False)
    return Prompt(example, batch, _first(tokenizer, words.context), follow_up, words.cut)


def _first(tokenizer: Any, text: str) -> Tensor:
    """Token ids of a text that begins a prompt; a start token that a template has written isn't doubled."""
    start = getattr(tokenizer, "bos_token", None)
    return encode(tokenizer, text, start=not (start and text.startswith(start)))


def encode(tokenizer: Any, text: str, start: bool = True) -> Tensor:
    """Token ids [n] of `text`, with the tokenizer's own start token or without."""
    return torch.tensor(tokenizer.encode(text, add_special_tokens=start), dtype=torch.int64)


def left_pad(rows: Sequence[Tensor], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and mask [B, T] of rows of any length, padded on the left."""
    width = max(row.numel() for row in rows)
    ids = torch.full((len(rows), width), pad, dtype=torch.int64)
    mask = torch.zeros_like(ids)
    for i, row in enumerate(rows):
        ids[i, width - row.numel() :] = row
        mask[i, width - row.numel() :] = 1
    return ids, mask


def check_lengths(
    method: Method, geometry: Geometry, budget: Budget, lengths: Iterable[int]
) -> dict[int, Budget]:
    """The budget for each prompt length: the one asked for, or the nearest feasible one for a prompt too
    short for it.

    Raises:
        InfeasibleBudget: no length is feasible, or a token budget is too small for a longer prompt.
    """
    if not method.uses_budget:
        return dict.fromkeys(lengths, budget)
    found: dict[int, Budget] = {}
    shortages: dict[int, InfeasibleBudget] = {}
    for tokens in sorted(set(lengths)):
        try:
            method.require(geometry, budget, tokens)
            found[tokens] = budget
        except InfeasibleBudget as shortage:
            shortages[tokens] = shortage
            found[tokens] = Budget(kept_tokens=max(2, shortage.smallest_tokens))
    # A fraction of a short prompt can be too few tokens; too few tokens for a prompt are so for longer ones
    # too.
    if shortages and (budget.kept_tokens is not None or len(shortages) == len(found)):
        by_tokens = budget.kept_tokens is not None
        raise max(shortages.values(), key=lambda s: s.smallest_tokens if by_tokens else s.smallest_fraction)
    return found


def nearest_budget(method: Method, geometry: Geometry, budget: Budget, tokens: int) -> Budget:
    """The budget asked for, or the nearest feasible one for a prompt too short for it."""
    if method.uses_budget:
        try:
            method.require(geometry, budget, tokens)
        except InfeasibleBudget as shortage:
            return Budget(kept_tokens=max(2, shortage.smallest_tokens))
    return budget


def check_adjusted(prompts: Sequence[Prompt], budgets: dict[int, Budget], budget: Budget) -> None:
    """Raise ValueError if more than 5% of a task run under another budget than the one asked for."""
    total = Counter(prompt.example.task for prompt in prompts)
    adjusted = Counter(prompt.example.task for prompt in prompts if budgets[prompt.tokens] != budget)
    for task, count in adjusted.items():
        if count > ADJUSTED_SHARE * total[task]:
            raise ValueError(
                f"{count} of {total[task]} examples of task {task} are too short for budget {budget.label}, "
                f"more than {ADJUSTED_SHARE:.0%}; raise the budget, or leave the task out (benchmark.tasks)"
            )

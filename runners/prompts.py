"""From a benchmark's examples to batches of token ids, and from their lengths to the budget each one runs
under.

Batches are formed from the benchmark's full list whatever the limit, so raising the limit or resuming never
changes who shares a batch with whom. Knows no runner, no record and no method by name.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from hcache.budget import Budget, InfeasibleBudget
from hcache.geometry import Geometry
from hcache.methods import Method

ADJUSTED_SHARE = 0.05
"""Of a task's examples, how many may run under another budget than the one asked for."""


@dataclass(frozen=True)
class Prompt:
    """One example as the model gets it.

    Args:
        example: of the benchmark.
        batch: number of the batch it belongs to, in the benchmark's full list.
        ids: [n] int64, the prompt that is compressed.
        follow_up: [n2] int64, fed after compression (query_aware=false); None where there is none.
    """

    example: Any
    batch: int
    ids: Tensor
    follow_up: Tensor | None

    @property
    def key(self) -> tuple[str, str]:
        """What a line of predictions.jsonl is known by."""
        return self.example.task, self.example.id

    @property
    def tokens(self) -> int:
        """Length of the compressed prompt."""
        return int(self.ids.numel())


def prepare(benchmark: Any, tokenizer: Any, batch_size: int) -> list[Prompt]:
    """The prompts to run, in canonical order: batch by batch, a batch's members in the benchmark's order."""
    everything = dataclasses.replace(benchmark, limit=None).examples(tokenizer)
    wanted = everything
    if benchmark.limit is not None:
        chosen = {(e.task, e.id) for e in benchmark.examples(tokenizer)}
        wanted = [e for e in everything if (e.task, e.id) in chosen]
    batch_of = batches(everything, batch_size)
    prompts = [_prompt(benchmark, tokenizer, e, batch_of[e.task, e.id]) for e in wanted]
    return sorted(prompts, key=lambda prompt: prompt.batch)


def batches(examples: Sequence[Any], size: int) -> dict[tuple[str, str], int]:
    """Batch number of every example: neighbours of one task, nominal length and ending, `size` at a time.

    Raises:
        ValueError: two examples with one task and id, which a record could not tell apart.
    """
    groups: dict[Any, list[tuple[str, str]]] = {}
    for e in examples:
        groups.setdefault((e.task, e.extra.get("length"), e.max_new_tokens, e.stop), []).append(
            (e.task, e.id)
        )
    chunks = [keys[i : i + size] for keys in groups.values() for i in range(0, len(keys), size)]
    numbered = {key: number for number, chunk in enumerate(chunks) for key in chunk}
    if len(numbered) != len(examples):
        key, count = Counter((e.task, e.id) for e in examples).most_common(1)[0]
        raise ValueError(f"the benchmark has {count} examples with task {key[0]!r} and id {key[1]!r}")
    return numbered


def _prompt(benchmark: Any, tokenizer: Any, example: Any, batch: int) -> Prompt:
    question = example.question + example.answer_prefix
    if benchmark.query_aware:
        return Prompt(example, batch, encode(tokenizer, example.context + question), None)
    follow_up = encode(tokenizer, question, start=False)
    return Prompt(example, batch, encode(tokenizer, example.context), follow_up)


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

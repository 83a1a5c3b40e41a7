"""Batches of prompts, their order and their lengths; what a worker makes of them. No model runs."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hcache.benchmarks.base import Benchmark, Example
from hcache.budget import Budget
from hcache.engine import Timings
from hcache.tiny.tokenizer import byte_tokenizer
from runners import work
from runners.prompts import TASK_BATCHES, Prompt, batches, prepare

LENGTHS = (50, 10, 40, 20, 30, 11)


def example(task: str, number: int, length: int, stop: tuple[str, ...] = ("\n",), new: int = 4) -> Example:
    return Example(task, str(number), "x" * length, "?", "", ("a",), new, stop, "exact")


@dataclass(frozen=True)
class Mixed(Benchmark):
    """Two tasks, none of whose examples come in the order of their lengths."""

    tasks: tuple[str, ...] = ("a", "b")

    def examples(self, tokenizer: Any) -> list[Example]:
        asked.append(self.limit)
        found = [example(task, i, length) for task in self.tasks for i, length in enumerate(LENGTHS)]
        return [one for one in found if self.limit is None or int(one.id) < self.limit]

    def score(self, *args: Any, **kwargs: Any) -> float:
        return 1.0


asked: list[int | None] = []


def prepared(benchmark: Benchmark, size: int) -> list[Prompt]:
    return prepare(benchmark, byte_tokenizer(), size, 9999)


def test_a_batch_has_one_task_and_one_ending_and_similar_lengths() -> None:
    examples = [example("a", i, length) for i, length in enumerate(LENGTHS)]
    examples += [example("a", 6, 12, stop=("z",)), example("a", 7, 12, new=9), example("b", 0, 12)]
    found: dict[int, set[str]] = {}
    for (task, name), number in batches(examples, 2).items():
        found.setdefault(number, set()).add(task + name)
    alone = [{"a6"}, {"a7"}, {"b0"}]
    assert sorted(found.values(), key=sorted) == sorted(
        [{"a1", "a5"}, {"a3", "a4"}, {"a2", "a0"}, *alone], key=sorted
    )
    assert batches(examples, 2)["b", "0"] == TASK_BATCHES


@pytest.mark.parametrize("size", [1, 2])
def test_more_examples_of_one_task_change_no_others_numbers(size: int) -> None:
    few = [example("a", i, 10) for i in range(3)]
    other = [example("b", i, 10) for i in range(3)]
    many = [*few, *(example("a", i, 10) for i in range(3, 500))]
    expected = {key: number for key, number in batches([*few, *other], size).items() if key[0] == "b"}
    assert batches([*many, *other], size).items() >= expected.items()


def test_two_examples_that_a_record_could_not_tell_apart() -> None:
    with pytest.raises(ValueError, match="2 examples with task 'a' and id '1'"):
        batches([example("a", 0, 5), example("a", 1, 5), example("a", 1, 6)], 1)


@pytest.mark.parametrize("limit", [1, 3, 5])
def test_a_limit_changes_nobodys_batch(limit: int) -> None:
    whole = {prompt.key: prompt.batch for prompt in prepared(Mixed(), 2)}
    found = prepared(Mixed(limit=limit), 2)
    assert len(found) == 2 * limit
    assert {prompt.key: prompt.batch for prompt in found}.items() <= whole.items()


def test_prompts_come_batch_by_batch_and_then_in_the_benchmarks_order() -> None:
    found = [(prompt.batch, int(prompt.key[1])) for prompt in prepared(Mixed(tasks=("a",)), 2)]
    assert found == [(0, 1), (0, 5), (1, 3), (1, 4), (2, 0), (2, 2)]


def test_no_more_is_read_than_is_run_where_each_example_is_a_batch() -> None:
    asked.clear()
    prepared(Mixed(limit=2), 1)
    assert asked == [2]
    prepared(Mixed(limit=2), 2)
    assert asked == [2, 2, None]


# --- the worker


def worker_of(**parts: Any) -> Any:
    """A worker that has loaded nothing; parts: its attributes."""
    worker = object.__new__(work.Worker)
    vars(worker).update(parts)
    return worker


def prompt(tokens: int, follow_up: int | None, new: int = 4, name: int = 0) -> Prompt:
    asked_later = None if follow_up is None else torch.zeros(follow_up, dtype=torch.int64)
    return Prompt(example("a", name, 1, new=new), 0, torch.zeros(tokens, dtype=torch.int64), asked_later)


@pytest.mark.parametrize(("tokens", "follow_up"), [(96, None), (90, 6)])
def test_a_prompt_must_leave_the_answer_room(tokens: int, follow_up: int | None) -> None:
    loaded: Any = SimpleNamespace(context_tokens=100, name="m")
    work._check_context([prompt(tokens, follow_up)], loaded)
    with pytest.raises(ValueError, match="example 0 of a needs 101 tokens with its answer, m has 100"):
        work._check_context([prompt(tokens, follow_up), prompt(tokens, follow_up, new=5)], loaded)


def test_a_batch_keeps_its_order_whatever_the_budgets(monkeypatch: pytest.MonkeyPatch) -> None:
    worker = worker_of(_budgets={10: Budget(kept_tokens=5), 20: Budget(kept_tokens=9)})
    monkeypatch.setattr(worker, "_run_halving", lambda budget, batch: [line_of(p, budget) for p in batch])

    def line_of(one: Prompt, budget: Budget) -> dict[str, Any]:
        return {"task": "a", "id": one.key[1], "kept": budget.kept_tokens}

    members = [prompt(tokens, None, name=i) for i, tokens in enumerate((10, 20, 10, 20))]
    lines = worker.run(members)
    assert [(line["id"], line["kept"]) for line in lines] == [("0", 5), ("1", 9), ("2", 5), ("3", 9)]


def test_a_generator_serves_one_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Budget] = []

    def generator(model: Any, method: Any, budget: Budget, **settings: Any) -> Any:
        made.append(budget)
        return SimpleNamespace(budget=budget)

    monkeypatch.setattr(work, "Generator", generator)
    runtime, model = SimpleNamespace(graphs="off", compile="off"), SimpleNamespace(attention="sdpa")
    run = SimpleNamespace(runtime=runtime, method=None, model=model)
    worker = worker_of(_latest_generator=None, _loaded=SimpleNamespace(model=None), _run=run)
    small, large = Budget(kept_tokens=5), Budget(kept_tokens=9)
    assert [worker._generator(budget).budget for budget in (small, small, large)] == [small, small, large]
    assert made == [small, large]


def test_notes_are_of_the_shortest_and_the_longest_prompt() -> None:
    method = SimpleNamespace(notes=lambda geometry, budget, n: [f"{budget.kept_tokens} of {n}", "always"])
    worker = worker_of(
        prompts=[prompt(tokens, None, name=i) for i, tokens in enumerate((20, 10, 30))],
        _budgets={tokens: Budget(kept_tokens=tokens) for tokens in (10, 20, 30)},
        _loaded=SimpleNamespace(geometry=None, tokenizer=SimpleNamespace(chat_template=None)),
        _run=SimpleNamespace(method=method, benchmark=SimpleNamespace(notes=lambda: ["its own"])),
        _tracing=SimpleNamespace(notes=list),
    )
    assert worker.notes() == ["10 of 10", "always", "30 of 30", "its own"]
    worker.prompts[1] = replace(worker.prompts[1], example=replace(worker.prompts[1].example, chat=True))
    assert any("the tokenizer has none" in note for note in worker.notes())
    worker._loaded.tokenizer.chat_template = "{}"
    assert not any("the tokenizer has none" in note for note in worker.notes())


def test_names_of_the_record_are_no_benchmarks() -> None:
    assert work.rescoring(replace(example("a", 0, 1), extra={"keys": ("k",)})) == {"keys": ["k"]}
    with pytest.raises(ValueError, match="extra names id, score are the record's own"):
        work.rescoring(replace(example("a", 0, 1), extra={"score": 1, "id": 2, "length": 3}))


@dataclass
class Memory:
    """As much of the engine's as is shared out."""

    device_payload: float = 30.0
    peak_device_bytes: float = 7.0


def test_a_sequences_share_of_its_batch() -> None:
    """Bytes and counters evenly, fractions and the peak as they are; times up to its own end."""
    generation: Any = SimpleNamespace(
        lengths=[1, 3, 0],
        prompt_tokens=[10, 11, 12],
        memory=Memory(),
        timings=Timings(5.0, [1.0, None, 4.0], 2.0),
        counters={"fed_tokens": 9.0, "attended_fraction": 0.5},
        engine={},
    )
    parts = [work.measured(generation, b) for b in range(3)]
    assert [(part["decode_ms"], part["decode_steps"]) for part in parts] == [(1.0, 1), (5.0, 2), (1.0, 1)]
    for part in parts:
        assert part["counters"] == {"fed_tokens": 3.0, "attended_fraction": 0.5}
        assert part["memory"] == {"device_payload": 10.0, "peak_device_bytes": 7.0}
    assert [part["prompt_tokens"] for part in parts] == [10, 11, 12]

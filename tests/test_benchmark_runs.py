"""Every benchmark from its files to its record, on the embedded model and a CPU, under all ten methods.

Files and prompts have the authors' layout and words of our own.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import run
from hcache import Generator, records
from hcache.records import Predictions
from hcache.tiny.prose import prose
from runners import interrupt
from runners.plan import PlannedCell
from tests.cells import line_without_timings, without_timings
from tests.test_ruler import CONSTANTS

METHODS = "fullkv,streaming_llm,h2o,snapkv,pyramidkv,cake,quest,shadowkv,omnikv,heterocache"
TASKS = ("qasper", "trec", "gov_report", "lcc")


@pytest.fixture(autouse=True)
def global_state(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Hydra sets up logging and argv for the process; put both back. No data but what a test wrote."""
    root, argv = logging.getLogger(), sys.argv
    handlers, level = list(root.handlers), root.level
    sys.argv = ["run.py"]
    monkeypatch.chdir(tmp_path)
    yield
    root.handlers[:], sys.argv = handlers, argv
    root.setLevel(level)
    interrupt.forget()


def put(path: Path, content: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(content, encoding="utf-8")


def text(number: int, size: int = 700) -> str:
    import random

    return prose(random.Random(number), size + 40 * number)


def longbench(place: Path) -> None:
    for task in (*TASKS, "samsum"):
        rows = [
            {
                "input": "Which one?",
                "context": text(i),
                "answers": ["green"],
                "length": 300,
                "dataset": task,
                "language": "en",
                "all_classes": ["green", "red"] if task == "trec" else None,
                "_id": f"{task}-{i}",
            }
            for i in range(6)
        ]
        put(place / f"data/{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    template = "Text: {context}\nQuestion: {input}\nAnswer:"
    prompts = place / "LongBench/config"
    put(prompts / "dataset2prompt.json", json.dumps(dict.fromkeys((*TASKS, "samsum"), template)))
    put(prompts / "dataset2maxlen.json", json.dumps(dict.fromkeys((*TASKS, "samsum"), 6)))


def longbench_v2(place: Path) -> None:
    rows = [
        {
            "_id": str(i),
            "domain": "Single-Document QA",
            "sub_domain": "x",
            "difficulty": ["easy", "hard"][i % 2],
            "length": ["short", "medium", "long"][i % 3],
            "question": "Which?",
            **{f"choice_{letter}": letter.lower() for letter in "ABCD"},
            "answer": "B",
            "context": text(i),
        }
        for i in range(4)
    ]
    put(place / "data.json", json.dumps(rows))
    asked = "Question: $Q$\nA $C_A$ B $C_B$ C $C_C$ D $C_D$\n"
    put(place / "prompts/0shot.txt", f"Text: $DOC$\n{asked}")
    put(place / "prompts/0shot_cot.txt", f"Text: $DOC$\n{asked}Think:")
    put(place / "prompts/0shot_cot_ans.txt", f"{asked}Thoughts: $COT$\nSo:")
    put(place / "prompts/0shot_no_context.txt", asked)


def infinitebench(place: Path) -> None:
    rows = [
        {"id": i, "context": text(i), "input": "What is it?", "answer": ["12345"], "options": []}
        for i in range(4)
    ]
    for task in ("passkey", "longbook_qa_eng"):
        put(place / f"{task}.jsonl", "".join(json.dumps(row) + "\n" for row in rows))
    templates = dict.fromkeys(("passkey", "number_string"), "Look: {context}\n{input}\nIt is")
    templates["longbook_qa_eng"] = "Book: {context}\nAsk: {question}\nSay:"
    put(place / "src/prompt.py", f"yarn_mistral_templates = {templates!r}\n")


def ruler(place: Path) -> None:
    put(place / "scripts/data/synthetic/constants.py", CONSTANTS)


BENCHMARKS = {
    "longbench": (longbench, ["benchmark.tasks=[qasper,trec]"]),
    "longbench_v2": (longbench_v2, ["benchmark.max_new_tokens=8"]),
    "infinitebench": (infinitebench, ["benchmark.tasks=[passkey]"]),
    "ruler": (ruler, ["benchmark.tasks=[vt]", "benchmark.lengths=[2000]"]),
    "needle": (None, ["benchmark.lengths=[1000]", "benchmark.depths=[50]"]),
}


def command(name: str, place: Path) -> list[str]:
    make, own = BENCHMARKS[name]
    if make is not None:
        make(place)
        own = [*own, f"benchmark.data_dir={place}", f"benchmark.prompt_dir={place}"]
    fixed = ["runtime.threads=2", "tracker=none", f"outputs={place / 'outputs'}"]
    return [f"benchmark={name}", *own, *fixed]


def results(place: Path) -> list[dict[str, Any]]:
    found = [records.read_result(path.parent) for path in sorted(place.rglob("result.json"))]
    return [result for result in found if result is not None]


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_method_runs(name: str, tmp_path: Path) -> None:
    line = [*command(name, tmp_path), "benchmark.limit=1", f"method={METHODS}", "budget.kept_fraction=0.5"]
    assert run.main(["-m", *line]) == 0
    found = results(tmp_path)
    assert len(found) == 10
    for result in found:
        assert result["status"] == "completed", result.get("error")
        assert result["tasks"]
        assert all(0 <= task["score"] <= 100 for task in result["tasks"].values())
        averages = result["aggregates"]
        assert all(low <= a["score"] <= high for a in averages.values() for low, high in [a["ci95"]])
        assert result["config"]["benchmark"]["protocol"]
    if name != "infinitebench":
        assert all(result["aggregates"] for result in found)


def test_samsum_ends_at_a_line_break_and_never_begins_with_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On the official code's terms; heterocache asks every task for a first token, and for no line break."""
    asked: list[dict[str, Any]] = []
    real = Generator.generate

    def noting(self: Generator, *args: Any, **kwargs: Any) -> Any:
        asked.append(kwargs)
        return real(self, *args, **kwargs)

    monkeypatch.setattr(Generator, "generate", noting)
    line = [*command("longbench", tmp_path), "method=fullkv", "benchmark.limit=1"]
    for protocol in ("official", "heterocache"):
        assert run.main([*line, "benchmark.tasks=[samsum,qasper]", f"benchmark.protocol={protocol}"]) == 0
    newline = [ord("\n")]
    assert [(kwargs["never_empty"], kwargs["stop"]) for kwargs in asked] == [
        (True, [newline]),
        (False, []),
        (True, []),
        (True, []),
    ]


@pytest.mark.parametrize("query_aware", [True, False])
def test_thoughts_are_asked_for_and_then_the_letter(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, query_aware: bool
) -> None:
    """Two calls a batch: the second has the replies to the first, no document, and a cache of its own."""
    asked: list[tuple[list[str], int]] = []
    real, replies = Generator.generate, iter(["because x", "since y", "for z", "as w"])

    def noting(self: Generator, ids: Tensor, mask: Tensor, **kwargs: Any) -> Any:
        texts = [bytes(row[own.bool()].tolist()).decode() for row, own in zip(ids, mask, strict=True)]
        if kwargs["follow_up"] is not None:
            more = zip(texts, *kwargs["follow_up"], strict=True)
            texts = [text + bytes(row[own.bool()].tolist()).decode() for text, row, own in more]
        asked.append((texts, kwargs["max_new_tokens"]))
        found = real(self, ids, mask, **kwargs)
        said = [next(replies) if "Think:" in text else "The correct answer is (B)" for text in texts]
        found.lengths = [len(text) for text in said]
        found.tokens = torch.tensor([list(text.ljust(40).encode()) for text in said])
        return found

    monkeypatch.setattr(Generator, "generate", noting)
    line = [*command("longbench_v2", tmp_path), "method=snapkv", "budget.kept_fraction=0.1"]
    more = ["benchmark.mode=cot", "runtime.batch_size=2", f"benchmark.query_aware={query_aware}"]
    assert run.main([*line, *more]) == 0
    assert [tokens for _, tokens in asked] == [8, 128, 8, 128]
    for first, second in (asked[:2], asked[2:]):
        for before, after in zip(first[0], second[0], strict=True):
            assert before.startswith("Text: ")
            assert before.endswith("Think:")
            assert after.startswith("Question: Which?")
            assert after.endswith("\nSo:")
            assert len(after) < 100
    (result,) = results(tmp_path)
    lines = Predictions(the_plan([*line, *more]).directory).load()
    assert sorted(li["first_reply"] for li in lines) == ["as w", "because x", "for z", "since y"]
    thoughts = [
        text.partition("Thoughts: ")[2][: -len("\nSo:")] for texts, _ in asked[1::2] for text in texts
    ]
    assert [li["first_reply"] for li in lines] == thoughts
    assert {li["prediction"] for li in lines} == {"The correct answer is (B)"}
    assert {(li["score"], li["second_new_tokens"]) for li in lines} == {(1.0, 25)}
    whole = [len(text) for texts, _ in asked[1::2] for text in texts]
    unseen = 0 if query_aware else len("\nSo:")
    assert [li["second_prompt_tokens"] for li in lines] == [size - unseen for size in whole]
    assert all(li["prompt_tokens"] > 700 for li in lines)  # of the document
    assert all(li["second_adjusted_budget_tokens"] for li in lines)  # a tenth of so few is less than a window
    assert result["score"] == 100.0
    assert any("second prompt" in note for note in result["notes"])


def test_guessing_runs_without_a_document(tmp_path: Path) -> None:
    line = [*command("longbench_v2", tmp_path), "method=fullkv", "benchmark.mode=no_context"]
    assert run.main(line) == 0
    assert results(tmp_path)[0]["status"] == "completed"
    assert all(li["prompt_tokens"] < 100 for li in Predictions(the_plan(line).directory).load())


def the_plan(lines: Sequence[str]) -> PlannedCell:
    (found,) = run.plan(lines, multirun=False, check=True)
    return found


def test_longbench_killed_ten_times_is_the_unbroken_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a random moment each time: before a line is written, after it, or in the middle of one."""
    import random

    class Killed(BaseException):
        pass

    draw, append = random.Random(7), Predictions.append
    line = [*command("longbench", tmp_path), "method=snapkv", "budget.kept_fraction=0.5"]
    line = [part for part in line if not part.startswith(("outputs=", "benchmark.tasks="))]
    line.append(f"benchmark.tasks=[{','.join(TASKS)}]")

    def torn(self: Predictions, lines: Sequence[records.Line]) -> None:
        chance = draw.random()
        if chance < 0.3:
            raise Killed
        append(self, lines)
        if chance < 0.6:
            with self.path.open("a", encoding="utf-8") as file:
                file.write('{"task": "qasper", "id": "qas'[: draw.randrange(30)])
            raise Killed

    broken, whole = [*line, f"outputs={tmp_path / 'broken'}"], [*line, f"outputs={tmp_path / 'whole'}"]
    kills = 0
    with monkeypatch.context() as patch:
        patch.setattr(Predictions, "append", torn)
        while kills < 10:
            try:
                run.main(broken)
                break
            except Killed:
                kills += 1
    assert kills == 10
    assert run.main(broken) == 0
    assert run.main(whole) == 0
    plans = [the_plan(lines) for lines in (broken, whole)]
    found, expected = (without_timings(records.read_result(plan.directory)) for plan in plans)
    del found["config"]["outputs"], expected["config"]["outputs"]
    assert found == expected
    lines = [list(map(line_without_timings, Predictions(plan.directory).load())) for plan in plans]
    assert sorted(lines[0], key=str) == sorted(lines[1], key=str)

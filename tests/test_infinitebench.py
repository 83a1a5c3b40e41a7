"""InfiniteBench: rows of every shape, prompts, protocols, rules, rescoring. All words are our own."""

from __future__ import annotations

import builtins
import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

from hcache import benchmarks
from hcache.benchmarks import infinitebench, prompt_files
from hcache.benchmarks.base import BENCHMARKS, Example, tree_mean
from hcache.benchmarks.infinitebench import InfiniteBench
from hcache.benchmarks.infinitebench_tasks import HETEROCACHE, OFFICIAL, TABLE, TASKS
from hcache.benchmarks.scoring import infinitebench as scoring
from hcache.benchmarks.source import DataError, HubFiles, RowError

CHOICES = "A: {OPTION_A}\nB: {OPTION_B}\nC: {OPTION_C}\nD: {OPTION_D}"
WORDS = {
    "passkey": "Keep one thing.\n\n{context}\n\n{input}\n\nIt was",
    "number_string": "Keep digits.\n\n{context}\n{input} They were",
    "kv_retrieval": "Look it up.\n\n{context}\n\n{input}",
    "longbook_sum_eng": "Shorten:\n\n{context}\n\nIn short:",
    "longbook_choice_eng": f"Read, choose.\n\n{{context}}\n\nAsked: {{question}}\n{CHOICES}\n\nLetter",
    "longbook_qa_eng": "Read, answer.\n\n{context}\n\nAsked: {question}\nSo:",
    "longbook_qa_chn": "请读。\n\n{context}\n\n问：{question}\n答",
    "math_find": "{prefix}\n\n{context}\n\n{input}",
    "math_calc": "Step by step, {{so}}.\n\nSum: {context}\nSteps:",
    "code_run": "See {func}.\n\n{context}\n\nWhat does {func_call} give? {func_call} gives",
    "code_debug": f"One is wrong.\n\n{{context}}\n\nWhich?\n{CHOICES}\n\nIt is",
    "longdialogue_qa_eng": "Who is hidden?\n\n{context}\n\nThe hidden one is",
}
INPUTS = {
    "math_find": "Only a number. The second largest number of the list is: ",
    "code_run": "Say what func_12(-3) gives, not func_7(1).",
    "math_calc": "",
}
CHOICE = ["ada", "bell", "cray", "dijkstra"]
OF_TASK: dict[str, Any] = {
    "math_find": [88],
    "math_calc": [4, 14, 6],
    "code_run": [4],
    "longbook_choice_eng": ["bell"],
    "code_debug": ["bell"],
}


def prompt_module(words: dict[str, str]) -> str:
    """A Python file as the authors', with literals, a sum of texts and a set that is computed."""
    summed = ", ".join(f"{task!r}: {text[:9]!r} + {text[9:]!r}" for task, text in words.items())
    return (
        '"""Words."""\n\nimport not_there\n\n'
        f"yarn_mistral_templates = {words!r}\n\n"
        f"kimi_templates = {{{summed}}}\n\n"
        "computed = {name: text.upper() for name, text in yarn_mistral_templates.items()}\n"
        "ALL = {'yarn': yarn_mistral_templates}\n"
    )


def row(task: str, number: int, **changes: Any) -> dict[str, Any]:
    """A whole row; a change to None takes the field away."""
    whole = {
        "id": number,
        "context": f"text {number} of {task} with {{braces}}",
        "input": INPUTS.get(task, f"what is asked, {number}?"),
        "answer": OF_TASK.get(task, [f"9{number}"]),
        "options": CHOICE if task in scoring.CHOICE_TASKS else [],
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Prompts of our own, an empty directory for rows, and nothing else to be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt_files, "CACHE", tmp_path / "cache")
    for path, words in (
        (OFFICIAL.path, WORDS),
        (HETEROCACHE.path, {task: f"Theirs. {text}" for task, text in WORDS.items()}),
    ):
        (tmp_path / "checkout" / path).parent.mkdir(parents=True)
        (tmp_path / "checkout" / path).write_text(prompt_module(words), encoding="utf-8")
    (tmp_path / "rows").mkdir()
    return {"data_dir": str(tmp_path / "rows"), "prompt_dir": str(tmp_path / "checkout")}


def write(places: dict[str, str], task: str, rows: list[Any]) -> Path:
    path = Path(places["data_dir"]) / f"{task}.jsonl"
    lines = [line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in rows]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def write_all(places: dict[str, str], count: int = 3) -> None:
    for task in TASKS:
        write(places, task, [row(task, number) for number in range(count)])


def one(places: dict[str, str], task: str, **changes: Any) -> Example:
    """The example of a file with one row."""
    write(places, task, [row(task, 0, **changes)])
    (example,) = InfiniteBench(tasks=(task,), **places).examples(None)
    return example


def again(example: Example, prediction: str, **extra: Any) -> float:
    """Scored from what a line of predictions.jsonl would hold."""
    line = json.loads(json.dumps({"answers": list(example.answers), **example.extra}))
    answers = line.pop("answers")
    return benchmarks.score("infinitebench", example.task, prediction, answers, **{**line, **extra})


# --- prompts


def whole_prompt(task: str, text: str, given: dict[str, Any]) -> str:
    """The template filled at once, with what each task's placeholders stand for written out."""
    named = {"context": given["context"], "input": given["input"], "question": given["input"]}
    named |= {"func": "func_12", "func_call": "func_12(-3)"}
    named["prefix"] = "What is the second largest number in the following list?"
    named |= {f"OPTION_{letter}": name for letter, name in zip("ABCD", CHOICE, strict=True)}
    return text.format(**named)


@pytest.mark.parametrize("protocol", ["official", "heterocache", "kvpress"])
def test_context_and_question_are_the_whole_prompt(places: dict[str, str], protocol: str) -> None:
    write_all(places)
    examples = InfiniteBench(protocol=protocol, tasks=TASKS, **places).examples(None)
    assert [(e.task, e.id) for e in examples] == [(task, str(n)) for task in TASKS for n in range(3)]
    for example in examples:
        text = ("Theirs. " if protocol == "heterocache" else "") + WORDS[example.task]
        given = row(example.task, int(example.id))
        assert example.context + example.question == whole_prompt(example.task, text, given)
        assert example.answer_prefix == ""
        assert given["context"] in example.context
        assert given["context"] not in example.question
        assert example.question
        assert not example.question[0].isspace()
        assert example.stop == ()


def test_the_question_begins_with_the_query(places: dict[str, str]) -> None:
    assert one(places, "passkey", input="which?").question == "which?\n\nIt was"
    assert one(places, "longbook_qa_eng", input="who?").question == "Asked: who?\nSo:"
    assert one(places, "math_calc").question == "Steps:"
    assert one(places, "math_calc", context="1 + 3").context == "Step by step, {so}.\n\nSum: 1 + 3\n"
    assert one(places, "code_run").question == "What does func_12(-3) give? func_12(-3) gives"


def test_texts_in_data_are_never_templates(places: dict[str, str]) -> None:
    example = one(places, "passkey", context="{input} {context} {0} }{", input="{context}")
    assert example.prompt == "Keep one thing.\n\n{input} {context} {0} }{\n\n{context}\n\nIt was"


def test_the_query_stands_behind_the_last_context(places: dict[str, str]) -> None:
    path = Path(places["prompt_dir"], OFFICIAL.path)
    path.write_text("yarn_mistral_templates = {'passkey': '{context} twice {context}\\n{input}'}\n")
    example = one(places, "passkey", context="text", input="what?")
    assert (example.context, example.question) == ("text twice text\n", "what?")


def test_another_set_of_templates(places: dict[str, str]) -> None:
    write(places, "passkey", [row("passkey", 0)])
    sums, plain = (
        InfiniteBench(tasks=("passkey",), templates=name, **places).examples(None)
        for name in ("kimi_templates", "yarn_mistral_templates")
    )
    assert sums == plain
    for name, message in (
        ("computed", "unknown set of templates 'computed'"),
        ("ALL", "unknown set of templates 'ALL'"),
        (
            "kimi_template",
            "benchmark.templates: .*did you mean 'kimi_templates'.* in src/prompt.py of OpenBMB",
        ),
    ):
        with pytest.raises(DataError, match=message):
            InfiniteBench(tasks=("passkey",), templates=name, **places).examples(None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nothing {input}", r"yarn_mistral_templates\['passkey'\] in src/prompt.py .* has no {context}"),
        ("{context} {inptu}", "unknown placeholder 'inptu'; did you mean 'input'"),
        ("{context} {", "is no template"),
        (None, "has no text for task passkey"),
    ],
)
def test_templates_that_cannot_be_filled(places: dict[str, str], text: str | None, message: str) -> None:
    write(places, "passkey", [row("passkey", 0)])
    path = Path(places["prompt_dir"], OFFICIAL.path)
    path.write_text(f"yarn_mistral_templates = { ({} if text is None else {'passkey': text})!r}\n")
    with pytest.raises(DataError, match=message):
        InfiniteBench(tasks=("passkey",), **places).examples(None)


def test_a_checkout_without_the_prompts(places: dict[str, str]) -> None:
    write(places, "passkey", [row("passkey", 0)])
    Path(places["prompt_dir"], OFFICIAL.path).unlink()
    with pytest.raises(DataError, match="has no src/prompt.py"):
        InfiniteBench(tasks=("passkey",), **places).examples(None)


# --- rows


@pytest.mark.parametrize(
    ("task", "answer", "answers", "prediction"),
    [
        ("passkey", "71432", ("71432",), "71432"),
        ("passkey", ["71432"], ("71432",), "71432"),
        ("kv_retrieval", "ab-1", ("ab-1",), "ab-1"),
        ("kv_retrieval", ["ab-1"], ("ab-1",), "ab-1"),
        ("longbook_sum_eng", "a short text", ("a short text",), "a short text"),
        ("longbook_qa_eng", "ada", ("ada",), "ada"),
        ("longbook_qa_eng", ["ada", "bell"], ("ada", "bell"), "bell"),
        ("longbook_qa_chn", ["山", "水"], ("山", "水"), "水"),
        ("longdialogue_qa_eng", ["ADA", "ADA B"], ("ADA", "ADA B"), "ada"),
        ("math_find", 88, ("88",), "88"),
        ("math_find", [88], ("88",), "88"),
        ("math_find", ["88"], ("88",), "88"),
        ("math_find", [88.0], ("88.0",), "88.0"),
        ("math_find", [12.5], ("12.5",), "12.5"),
        ("math_calc", [4, 14], ("4", "14"), "4 14"),
        ("math_calc", [[4, 14]], ("4", "14"), "4 14"),
        ("math_calc", ["4", "14"], ("4", "14"), "4 14"),
        ("code_run", [4], ("4",), "4"),
        ("code_run", ["4"], ("4",), "4"),
        ("code_run", -4, ("-4",), "-4"),
        ("longbook_choice_eng", ["bell"], ("bell", "B"), "B"),
        ("longbook_choice_eng", "bell", ("bell", "B"), "bell"),
        ("code_debug", ["bell"], ("bell", "B"), "B."),
        ("code_debug", ["bell", "B"], ("bell", "B"), "B."),
        ("code_debug", ["B"], ("bell", "B"), "B."),
    ],
)
def test_answers_of_every_shape(
    places: dict[str, str], task: str, answer: Any, answers: tuple[str, ...], prediction: str
) -> None:
    example = one(places, task, answer=answer)
    assert example.answers == answers
    assert InfiniteBench().score(example, prediction, example.answers) == 1
    assert again(example, prediction) == 1
    without = {key: value for key, value in example.extra.items() if key in ("options", "rules")}
    assert benchmarks.score("infinitebench", task, prediction, list(answers), **without) == 1
    assert benchmarks.score("infinitebench", task, prediction, answer, **without) == 1
    assert again(example, "wrong") == 0


def test_labels_keep_their_types(places: dict[str, str]) -> None:
    assert one(places, "math_find", answer=[88]).extra["label"] == [88]
    assert type(one(places, "math_find", answer=[88.0]).extra["label"][0]) is float
    assert one(places, "math_calc", answer=[[4, 14]]).extra["label"] == [4, 14]
    assert one(places, "code_debug").extra == {"rules": "2024-06", "label": ["bell", "B"], "options": CHOICE}
    assert one(places, "passkey").extra == {"rules": "2024-06"}


def test_content_stands_for_context_and_options_may_be_missing(places: dict[str, str]) -> None:
    assert one(places, "passkey", context=None, content="here").prompt.startswith("Keep one thing.\n\nhere\n")
    for options in (None, []):
        assert one(places, "passkey", options=options) == one(places, "passkey")
    example = one(places, "longbook_choice_eng", options=[1, 2, 3, 4], answer=[2])
    assert example.extra["label"] == ["2", "B"]
    assert one(places, "longbook_sum_eng", input=None).question == "In short:"
    assert one(places, "math_calc", input=None).question == "Steps:"
    assert one(places, "code_debug", input=None).question.startswith("Which?")


def test_ids_are_unique(places: dict[str, str]) -> None:
    rows = [row("passkey", 7), "", row("passkey", 7), row("passkey", 1, id=None), row("passkey", 2, id="x")]
    write(places, "passkey", rows)
    ids = [e.id for e in InfiniteBench(tasks=("passkey",), **places).examples(None)]
    assert ids == ["7", "7 (row 3)", "3", "x"]


@pytest.mark.parametrize(
    ("task", "changes", "message"),
    [
        ("passkey", {"context": None}, "row 2, field 'context': is missing"),
        ("passkey", {"context": 3}, "field 'context': must be a text, is a int"),
        ("passkey", {"input": None}, "field 'input': is missing"),
        ("passkey", {"answer": None}, "field 'answer': is missing"),
        ("passkey", {"answer": []}, "field 'answer': infinitebench passkey: needs one or more answers"),
        ("math_find", {"answer": ["many"]}, "field 'answer': .*must be a number, got 'many'"),
        ("math_find", {"input": "Which one?"}, "field 'input': does not say what number is wanted"),
        ("code_run", {"input": "run it"}, "field 'input': names no call"),
        ("code_debug", {"options": None}, "field 'options': must be 4 choices, there are 0"),
        ("code_debug", {"options": CHOICE[:3]}, "field 'options': must be 4 choices, there are 3"),
        ("code_debug", {"options": "ada"}, "field 'options': must be a list of texts"),
        ("code_debug", {"answer": ["turing"]}, "field 'answer': .*none of the options"),
    ],
)
def test_broken_rows_are_named_or_counted(
    places: dict[str, str], task: str, changes: dict[str, Any], message: str
) -> None:
    rows = [row(task, 0), row(task, 1, **changes), row(task, 2)]
    write(places, task, rows)
    with pytest.raises(RowError, match=f"{task}.jsonl.*{message}"):
        InfiniteBench(tasks=(task,), **places).examples(None)
    lenient = InfiniteBench(tasks=(task,), skip_bad_rows=True, limit=2, **places)
    assert [e.id for e in lenient.examples(None)] == ["0", "2"]
    (note,) = [note for note in lenient.notes() if "broken" in note]
    assert re.search(f"1 broken rows were left out, the first: .*{message}", note)


def test_lines_that_are_no_objects_and_empty_files(places: dict[str, str]) -> None:
    for line, message in (('{"id": 0,', "row 1: is no JSON"), ("[1]", "row 1: is a JSON list")):
        write(places, "passkey", [line])
        with pytest.raises(RowError, match=message):
            InfiniteBench(tasks=("passkey",), **places).examples(None)
    write(places, "passkey", [])
    with pytest.raises(DataError, match="passkey.jsonl has no row that can be run"):
        InfiniteBench(tasks=("passkey",), **places).examples(None)


def test_a_limit_reads_no_further(places: dict[str, str]) -> None:
    write(places, "passkey", [*(row("passkey", number) for number in range(3)), "no JSON"])
    found = InfiniteBench(tasks=("passkey",), limit=3, **places).examples(None)
    assert [e.id for e in found] == ["0", "1", "2"]
    with pytest.raises(RowError, match="row 4: is no JSON"):
        InfiniteBench(tasks=("passkey",), limit=4, **places).examples(None)


def test_questions_on_one_text_share_it(places: dict[str, str]) -> None:
    write(places, "longbook_qa_eng", [row("longbook_qa_eng", n, context="a long book") for n in range(2)])
    first, second = InfiniteBench(tasks=("longbook_qa_eng",), **places).examples(None)
    assert first.context is second.context
    assert first.question != second.question


# --- where files are


def test_rows_in_the_data_directory_below_the_working_directory(places: dict[str, str]) -> None:
    written = write(places, "passkey", [row("passkey", 0)])
    place = Path("data/infinitebench")
    place.mkdir(parents=True)
    written.rename(place / "passkey.jsonl")
    found = InfiniteBench(tasks=("passkey",), prompt_dir=places["prompt_dir"]).examples(None)
    assert [e.id for e in found] == ["0"]


def test_rows_from_the_hub(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    path = write(places, "passkey", [row("passkey", 0)])

    def fetch(self: HubFiles, filename: str) -> Path:
        asked.append((self.repo, self.revision, filename))
        return path

    monkeypatch.setattr(HubFiles, "fetch", fetch)
    bench = InfiniteBench(tasks=("passkey",), prompt_dir=places["prompt_dir"])
    assert len(bench.examples(None)) == 1
    assert bench.files() == [path, Path(places["prompt_dir"], OFFICIAL.path)]
    assert bench.identity()["data"] == f"{infinitebench.REPO}@{infinitebench.REVISION}"
    assert set(asked) == {(infinitebench.REPO, infinitebench.REVISION, "passkey.jsonl")}
    other = InfiniteBench(tasks=("passkey",), prompt_dir=places["prompt_dir"], revision="main")
    assert other.identity()["data"] == f"{infinitebench.REPO}@main"


def test_missing_files_say_what_to_do(places: dict[str, str]) -> None:
    with pytest.raises(DataError, match=r"data_dir=.* has no passkey.jsonl; put it there, or leave"):
        InfiniteBench(tasks=("passkey",), **places).examples(None)
    with pytest.raises(DataError, match=r"data_dir=nowhere is not a directory"):
        InfiniteBench(tasks=("passkey",), **{**places, "data_dir": "nowhere"}).examples(None)


def test_identity_follows_the_contents(places: dict[str, str]) -> None:
    write_all(places)
    bench = InfiniteBench(**places)
    before = bench.identity()
    assert before == InfiniteBench(limit=1, **places).identity()
    assert before["prompts"].startswith("files ")
    write(places, "code_run", [row("code_run", 5)])
    after = bench.identity()
    assert after["data"] != before["data"]
    assert after["prompts"] == before["prompts"]
    Path(places["prompt_dir"], OFFICIAL.path).write_text(prompt_module({**WORDS, "passkey": "{context}"}))
    assert bench.identity()["prompts"] != before["prompts"]
    pinned = InfiniteBench(data_dir=places["data_dir"])
    assert pinned.identity()["prompts"] == f"OpenBMB/InfiniteBench@{OFFICIAL.commit}"


# --- protocols and rules


def test_protocols(places: dict[str, str]) -> None:
    write_all(places, 1)

    def of(protocol: str) -> dict[str, Example]:
        return {e.task: e for e in InfiniteBench(protocol=protocol, tasks=TASKS, **places).examples(None)}

    official, heterocache, kvpress = of("official"), of("heterocache"), of("kvpress")
    lengths = {"passkey": 6, "number_string": 12, "kv_retrieval": 50, "longbook_sum_eng": 1200}
    lengths |= {"math_find": 3, "math_calc": 30000, "code_run": 5, "code_debug": 5}
    for task in TASKS:
        tokens = lengths.get(task, 40)
        assert official[task].max_new_tokens == tokens
        assert kvpress[task].max_new_tokens == tokens + 20
        ten = 1 if task in ("longbook_sum_eng", "math_calc") else 10
        assert heterocache[task].max_new_tokens == ten * tokens
        assert (official[task].chat, heterocache[task].chat, kvpress[task].chat) == (False, True, True)
        assert official[task].extra["rules"] == "2024-06"
        assert heterocache[task].extra["rules"] == kvpress[task].extra["rules"] == "2024-08"


def test_prompts_are_cut_to_the_protocols_length() -> None:
    assert InfiniteBench().longest_prompt(200_000) == 131_072
    assert InfiniteBench(protocol="heterocache").longest_prompt(200_000) == 128_500
    assert InfiniteBench(protocol="kvpress").longest_prompt(200_000) == 200_000
    assert InfiniteBench(max_length=4000).longest_prompt(200_000) == 4000


def test_tasks_are_those_of_the_protocol() -> None:
    assert InfiniteBench().tasks == TASKS == tuple(TABLE)
    nine = InfiniteBench(protocol="heterocache").tasks
    assert len(nine) == 9
    assert set(TASKS) - set(nine) == {"kv_retrieval", "math_calc", "code_run"}
    assert InfiniteBench(protocol="heterocache", tasks=("code_run",)).tasks == ("code_run",)
    assert set(TASKS) == set(scoring.TASKS)


def test_rules_are_a_setting_and_come_with_every_line(places: dict[str, str]) -> None:
    assert InfiniteBench().rules == "2024-06"
    assert InfiniteBench(protocol="heterocache").rules == "2024-08"
    write(places, "code_debug", [row("code_debug", 0)])
    late = InfiniteBench(tasks=("code_debug",), rules="2024-08", **places)
    (early_example,) = InfiniteBench(tasks=("code_debug",), **places).examples(None)
    (late_example,) = late.examples(None)
    assert again(early_example, "B") == InfiniteBench().score(early_example, "B", ("bell",)) == 0
    assert again(late_example, "B") == InfiniteBench().score(late_example, "B", ("bell",)) == 1
    assert again(early_example, "B", rules="2024-08") == 1
    assert late.score("code_debug", "B", ["bell"], options=CHOICE) == 1
    assert InfiniteBench().score("code_debug", "B", ["bell"], options=CHOICE) == 0


def test_gpt4_is_a_setting(places: dict[str, str]) -> None:
    write(places, "math_calc", [row("math_calc", 0)])
    (example,) = InfiniteBench(tasks=("math_calc",), model_family="gpt4", **places).examples(None)
    assert again(example, "1 4 14 6") == InfiniteBench().score(example, "1 4 14 6", example.answers) == 1
    assert InfiniteBench().score("math_calc", "1 4 14 6", [4, 14, 6]) == 0
    assert InfiniteBench(model_family="gpt4").score("math_calc", "1 4 14 6", [4, 14, 6]) == 1


def test_answers_count_where_the_label_is_another(places: dict[str, str]) -> None:
    example = one(places, "math_find", answer=[88])
    assert InfiniteBench().score(example, "7", ["7"]) == 1
    assert InfiniteBench().score(example, "88", [7]) == 0
    choice = one(places, "longbook_choice_eng")
    assert InfiniteBench().score(choice, "C", ["cray"]) == 1


def test_every_task_scores_from_a_record(places: dict[str, str]) -> None:
    write_all(places)
    right = {"math_find": "88", "math_calc": "[4, 14, 6]", "code_run": "4"}
    for example in InfiniteBench(**places).examples(None):
        said = right.get(example.task, "B." if example.task in scoring.CHOICE_TASKS else example.answers[0])
        assert again(example, said) == InfiniteBench().score(example, said, example.answers) == 1
        taken = {"task", "id", "metric", "prediction", "answers", "score", "batch", "memory"}
        assert not taken & set(example.extra)


# --- averages and notes


def test_averages_are_of_tasks_and_not_official(places: dict[str, str]) -> None:
    lines = [{"task": "passkey", "score": 1.0}] * 3 + [{"task": "passkey", "score": 0.0}]
    lines += [{"task": "longbook_qa_eng", "score": 0.25}]
    trees = InfiniteBench().aggregates(lines)
    assert {name: tree_mean(tree) for name, tree in trees.items()} == {
        "Retrieve.PassKey": 0.75,
        "En.QA": 0.25,
        "mean": 0.5,
    }
    assert InfiniteBench().aggregates([]) == {}
    assert InfiniteBench().aggregate({"passkey": 75.0, "longbook_qa_eng": 25.0}) == 50
    with pytest.raises(ValueError, match="no official average.*kind='mean'"):
        InfiniteBench().aggregate({"passkey": 75.0}, kind="official")
    with pytest.raises(ValueError, match="unknown kind of average 'men'; did you mean 'mean'"):
        InfiniteBench().aggregate({"passkey": 75.0}, kind="men")
    with pytest.raises(ValueError, match="did you mean 'passkey'"):
        InfiniteBench().aggregate({"paskey": 75.0})
    with pytest.raises(ValueError, match="no scores"):
        InfiniteBench().aggregate({})


def test_notes_say_what_is_not_as_published(places: dict[str, str]) -> None:
    (note,) = InfiniteBench().notes()
    assert "rules of 2024-06" in note
    assert "no official number" in note
    assert any("is not the one of" in note for note in InfiniteBench(**places).notes())
    assert any(
        "those of 2024-08" in n for n in InfiniteBench(protocol="heterocache", rules="2024-06").notes()
    )
    assert any("GPT-4 templates" in note for note in InfiniteBench(protocol="kvpress").notes())
    tasks = ("passkey", "code_run", "math_calc")
    notes = InfiniteBench(protocol="heterocache", tasks=tasks).notes()
    assert any("no scores of code_run, math_calc" in note for note in notes)


# --- settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["math_fnd"]}, "benchmark.tasks: unknown task 'math_fnd'; did you mean 'math_find'"),
        ({"tasks": ["passkey", "passkey"]}, "must name each task once"),
        ({"rules": "2024-7"}, "benchmark.rules: unknown rules '2024-7'; did you mean '2024-0"),
        ({"protocol": "hetero_cache"}, "benchmark.protocol: .*did you mean 'heterocache'"),
        ({"model_family": "gpt-4"}, "benchmark.model_family: .*did you mean 'gpt4'.*null for any other"),
        ({"limit": 0}, "benchmark.limit=0"),
        ({"max_length": 1}, "benchmark.max_length=1"),
        ({"rule": "2024-06"}, "unknown setting 'rule'; did you mean 'rules'"),
    ],
)
def test_wrong_settings_are_refused_before_any_file_is_read(
    settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError("a file was opened")

    monkeypatch.setattr(builtins, "open", never)
    monkeypatch.setattr(Path, "open", never)
    with pytest.raises(ValueError, match=message):
        benchmarks.load("infinitebench", **settings)


def test_unknown_tasks_and_rules_in_scoring() -> None:
    with pytest.raises(ValueError, match="did you mean 'code_run'"):
        benchmarks.score("infinitebench", "code_rnu", "4", ["4"])
    with pytest.raises(ValueError, match="unknown rules '2023-06'; did you mean '2024-06'"):
        benchmarks.score("infinitebench", "code_run", "4", ["4"], rules="2023-06")


def test_it_is_registered_and_its_shipped_configuration_is_the_default() -> None:
    assert BENCHMARKS.get("infinitebench") is InfiniteBench
    assert InfiniteBench(tasks=["passkey"]).tasks == ("passkey",)  # type: ignore[arg-type]
    shipped = Path(__file__).parents[1] / "conf/benchmark/infinitebench.yaml"
    settings = yaml.safe_load(shipped.read_text(encoding="utf-8"))
    del settings["defaults"]
    assert InfiniteBench(**settings) == InfiniteBench()

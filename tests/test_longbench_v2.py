"""LongBench v2: rows, prompts, lengths, letters in replies, averages by hand. All words are our own."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hcache import benchmarks
from hcache.benchmarks import longbench_v2, prompt_files
from hcache.benchmarks.base import BENCHMARKS, Example, tree_mean
from hcache.benchmarks.json_array import ArrayReader
from hcache.benchmarks.longbench_v2 import DOMAINS, LongBenchV2
from hcache.benchmarks.scoring.longbench_v2 import answered, extract
from hcache.benchmarks.source import DataError, RowError

TEMPLATE = (
    'Read on.\n<t>\n$DOC$\n</t>\n\nAsked: $Q$\nA $C_A$\nB $C_B$\nC $C_C$\nD $C_D$\n\nWrite "so (here)".\n'
)
THEIRS = 'import nothing\n\ntemplate_0shot = """Theirs $DOC$ then $Q$: $C_A$, $C_B$, $C_C$, $C_D$\n# end"""\n'


def row(number: int, **changes: Any) -> dict[str, Any]:
    """A whole row; a change to None takes the field away."""
    whole = {
        "_id": f"id{number}",
        "domain": DOMAINS[number % 6],
        "sub_domain": "ours",
        "difficulty": ("easy", "hard")[number % 2],
        "length": ("short", "medium", "long")[number % 3],
        "question": f"which of four, {number}?",
        **{f"choice_{letter}": f"choice {letter}{number}" for letter in "ABCD"},
        "answer": "ABCD"[number % 4],
        "context": f"document {number}",
    }
    return {name: value for name, value in {**whole, **changes}.items() if value is not None}


@pytest.fixture
def places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Prompts of our own, an empty directory for rows, and nothing else to be found."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(prompt_files, "CACHE", tmp_path / "cache")
    for path, text in (("prompts/0shot.txt", TEMPLATE), ("scripts/longbenchv2/pred.py", THEIRS)):
        (tmp_path / "checkout" / path).parent.mkdir(parents=True)
        (tmp_path / "checkout" / path).write_text(text, encoding="utf-8")
    (tmp_path / "rows").mkdir()
    return {"data_dir": str(tmp_path / "rows"), "prompt_dir": str(tmp_path / "checkout")}


def write(places: dict[str, str], rows: list[Any], name: str = "data.json") -> Path:
    path = Path(places["data_dir"]) / name
    lines = [json.dumps(entry, ensure_ascii=False) for entry in rows]
    text = "".join(f"{line}\n" for line in lines) if name.endswith("l") else json.dumps(rows, indent=1)
    path.write_text(text, encoding="utf-8")
    return path


# --- rows


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_rows_become_examples(places: dict[str, str], name: str) -> None:
    write(places, [row(0), row(5, context=" \n“long” — text\n\n")], name)
    first, second = benchmarks.load("longbench_v2", **places)
    assert (first.task, first.id, first.answers) == ("longbench_v2", "id0", ("A",))
    assert (second.id, second.answers) == ("id5", ("B",))
    assert second.extra == {
        "difficulty": "hard",
        "length": "long",
        "domain": "Long Structured Data Understanding",
        "extraction": "official",
    }
    assert second.prompt == (
        "Read on.\n<t>\n“long” — text\n</t>\n\nAsked: which of four, 5?\n"
        'A choice A5\nB choice B5\nC choice C5\nD choice D5\n\nWrite "so (here)".\n'
    )
    assert second.context == "Read on.\n<t>\n“long” — text"
    assert second.answer_prefix == ""
    assert second.stop == ()
    assert second.chat
    assert second.system is None
    assert second.max_new_tokens == 128


def test_no_value_of_a_row_is_filled_in_again(places: dict[str, str]) -> None:
    odd = row(1, context="see $Q$ and $C_A$ and $DOC$", question="cost $C_B$?", choice_A="$C_D$")
    write(places, [odd])
    (example,) = LongBenchV2(**places).examples(None)
    assert example.context.endswith("<t>\nsee $Q$ and $C_A$ and $DOC$")
    assert "Asked: cost $C_B$?\nA $C_D$\nB choice B1\n" in example.question


def test_the_limit_reads_no_further(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hcache.benchmarks.json_array.BLOCK", 64)
    path = write(places, [row(number) for number in range(50)])
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    assert [e.id for e in LongBenchV2(limit=3, **places).examples(None)] == ["id0", "id1", "id2"]
    with pytest.raises(DataError, match=r"data\.json row \d+ is no JSON .* cut short: get it again"):
        LongBenchV2(**places).examples(None)
    with pytest.raises(DataError, match="get it again"):  # a file that ends early is no bad row
        LongBenchV2(skip_bad_rows=True, **places).examples(None)


@pytest.mark.parametrize("cut", range(1, 12))
def test_an_array_cut_anywhere_is_refused(cut: int) -> None:
    whole = b'[{"a":1},"2"]'
    with pytest.raises(DataError, match="get it again"):
        list(ArrayReader(io.BytesIO(whole[:-cut]), "it", block=3).entries())


@pytest.mark.parametrize("block", [1, 2, 5, 1000])
@pytest.mark.parametrize(
    "entries",
    [[], [{}], [1234567, -2.5e10, 'é€𝄞\\"', None, [1, [2]], {"a": {"b": ["]", "}"]}}], ["x" * 3000, 12]],
)
def test_arrays_are_read_as_json_reads_them(entries: list[Any], block: int) -> None:
    for indent in (None, 2):
        for escaped in (True, False):
            raw = json.dumps(entries, indent=indent, ensure_ascii=escaped).encode() + b" \n"
            assert list(ArrayReader(io.BytesIO(raw), "it", block).entries()) == entries


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "begins with ''"),
        (b'{"a": 1}', "begins with '{'"),
        (b"[1 2]", "it row 1 is followed by '2'"),
        (b"[1, 2,]", "it row 3 is no JSON"),
        (b"[1, 2] 3", "it row 2 ends the array, and more follows"),
        (b'["\xff"]', "it is no UTF-8 text"),
        ('["é'.encode()[:-1], "it is no UTF-8 text"),
    ],
)
def test_what_is_no_array_is_refused(raw: bytes, message: str) -> None:
    with pytest.raises(DataError, match=re.escape(message)):
        list(ArrayReader(io.BytesIO(raw), "it", block=8).entries())


def test_an_array_is_read_as_far_as_it_is_asked_for() -> None:
    file = io.BytesIO(json.dumps([{"text": "x" * 80}] * 1000).encode())
    entries = ArrayReader(file, "it", block=100).entries()
    for _ in range(3):
        next(entries)
    assert file.tell() <= 600


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        *[({name: None}, f"field '{name}': is missing") for name in row(0) if name != "sub_domain"],
        ({"context": 7}, "field 'context': must be a text, is a int"),
        ({"question": " \n"}, "field 'question': is blank"),
        ({"answer": "E"}, "field 'answer': is 'E', must be one of A, B, C, D"),
        ({"length": "huge"}, "field 'length': is 'huge', must be one of short, medium, long"),
        ({"difficulty": "Easy"}, "field 'difficulty': is 'Easy', must be one of easy, hard"),
        ({"_id": "id0"}, "field '_id': 'id0' is that of an earlier row too"),
    ],
)
def test_a_broken_row_is_named(places: dict[str, str], changes: dict[str, Any], message: str) -> None:
    write(places, [row(0), row(1, **changes), row(2)])
    with pytest.raises(RowError, match=re.escape(f"data.json row 2, {message}")):
        LongBenchV2(**places).examples(None)
    skipping = LongBenchV2(skip_bad_rows=True, **places)
    assert [e.id for e in skipping.examples(None)] == ["id0", "id2"]
    (note,) = [note for note in skipping.notes() if "left out" in note]
    assert note.startswith("broken rows left out: 1, the first: ")
    assert message in note


def test_entries_that_are_no_objects_are_rows_too(places: dict[str, str]) -> None:
    for name in ("data.jsonl", "data.json"):
        write(places, [row(0), ["no", "row"], row(2)], name)
        with pytest.raises(RowError, match=r"row 2: is a JSON list, not an object"):
            LongBenchV2(**places).examples(None)
        assert len(LongBenchV2(skip_bad_rows=True, **places).examples(None)) == 2


def test_only_rows_that_are_run_are_counted_as_broken(places: dict[str, str]) -> None:
    write(places, [row(0), row(1), row(2, answer="X"), row(3)])
    for limit, left_out in ((2, False), (3, True)):
        benchmark = LongBenchV2(skip_bad_rows=True, limit=limit, **places)
        assert len(benchmark.examples(None)) == limit
        assert any("left out: 1" in note for note in benchmark.notes()) == left_out


def test_missing_questions_are_noted(places: dict[str, str]) -> None:
    write(places, [row(number) for number in range(4)])
    for settings, noted in (({}, True), ({"limit": 2}, False), ({"lengths": ["short"]}, False)):
        benchmark = LongBenchV2(**settings, **places)
        benchmark.examples(None)
        assert ("there are 4 questions, the authors' file has 503" in benchmark.notes()) == noted


def test_rows_are_chosen_by_class(places: dict[str, str]) -> None:
    write(places, [row(number) for number in range(12)])

    def chosen(**settings: Any) -> list[str]:
        return [e.id.removeprefix("id") for e in LongBenchV2(**settings, **places).examples(None)]

    assert chosen(difficulties=["hard"]) == ["1", "3", "5", "7", "9", "11"]
    assert chosen(lengths=["short", "long"], limit=3) == ["0", "2", "3"]
    assert chosen(domains=[DOMAINS[1]], difficulties=["hard"]) == ["1", "7"]
    with pytest.raises(DataError, match=r"has no row to run with difficulties \('easy',\)"):
        chosen(domains=[DOMAINS[1]], difficulties=["easy"])


# --- prompts and protocols


def test_prompts_without_a_placeholder_are_refused(places: dict[str, str]) -> None:
    write(places, [row(0)])
    (Path(places["prompt_dir"]) / "prompts/0shot.txt").write_text("$DOC$ $Q$ $C_A$ $C_B$ $C_D$")
    with pytest.raises(DataError, match=r"prompts/0shot.txt of THUDM/LongBench has no \$C_C\$"):
        LongBenchV2(**places).examples(None)
    (Path(places["prompt_dir"]) / "scripts/longbenchv2/pred.py").write_text("template_0shot = 5\n")
    with pytest.raises(DataError, match="has no text template_0shot"):
        LongBenchV2(protocol="heterocache", **places).examples(None)


def test_protocols_differ_as_published(places: dict[str, str]) -> None:
    write(places, [row(0)])

    def first(**settings: Any) -> tuple[LongBenchV2, Example]:
        benchmark = LongBenchV2(**settings, **places)
        (example,) = benchmark.examples(None)
        return benchmark, example

    official, example = first()
    assert official.longest_prompt(131072) == 120_000
    assert example.question.endswith('"so (here)".\n')
    theirs, example = first(protocol="heterocache")
    assert example.prompt == (
        "Theirs document 0 then which of four, 0?: choice A0, choice B0, choice C0, choice D0\n# end"
    )
    assert example.context == "Theirs document 0"
    assert example.max_new_tokens == 128
    assert theirs.longest_prompt(131072) == 128_500
    assert example.extra["extraction"] == "heterocache"
    press, example = first(protocol="kvpress")
    assert example.question.endswith('Write "so (here).\n')
    assert example.max_new_tokens == 16
    assert press.longest_prompt(131072) == 131072
    assert example.extra["extraction"] == "kvpress"
    own, example = first(max_new_tokens=4096, max_length=500)
    assert own.longest_prompt(131072) == 500
    assert example.max_new_tokens == 4096


THINK = "Think.\n$DOC$\n\nAsked: $Q$\nA $C_A$ B $C_B$ C $C_C$ D $C_D$\nStep by step:"
THEN = "Left out.\nAsked: $Q$\nA $C_A$ B $C_B$ C $C_C$ D $C_D$\nThoughts: $COT$\n\nSo which?"
GUESS = "Guess.\nAsked: $Q$\nA $C_A$ B $C_B$ C $C_C$ D $C_D$\n"


@pytest.fixture
def modes(places: dict[str, str]) -> dict[str, str]:
    prompts = Path(places["prompt_dir"]) / "prompts"
    for name, text in (("0shot_cot", THINK), ("0shot_cot_ans", THEN), ("0shot_no_context", GUESS)):
        (prompts / f"{name}.txt").write_text(text, encoding="utf-8")
    return places


def test_thoughts_take_two_prompts(modes: dict[str, str]) -> None:
    write(modes, [row(0, context=" doc $COT$ $Q$ ", question=" which $COT$? ")])
    (example,) = LongBenchV2(mode="cot", **modes).examples(None)
    choices = "A choice A0 B choice B0 C choice C0 D choice D0"
    assert example.context == "Think.\ndoc $COT$ $Q$"
    assert example.prompt == f"{example.context}\n\nAsked: which $COT$?\n{choices}\nStep by step:"
    assert (example.max_new_tokens, example.stop, example.chat) == (1024, (), True)
    again = example.asked_again("\n I think of $DOC$.\n")
    assert again.context == f"Left out.\nAsked: which $COT$?\n{choices}\nThoughts: I think of $DOC$."
    assert again.question == "\n\nSo which?"
    assert (again.max_new_tokens, again.second) == (128, None)
    assert (again.task, again.id, again.answers, again.chat) == ("longbench_v2", "id0", ("A",), True)


def test_a_document_in_the_second_prompt_is_omitted(modes: dict[str, str]) -> None:
    write(modes, [row(0)])
    (Path(modes["prompt_dir"]) / "prompts/0shot_cot_ans.txt").write_text(f"$DOC$ {THEN}")
    (example,) = LongBenchV2(mode="cot", **modes).examples(None)
    assert example.asked_again("so").prompt.startswith("The text is too long and omitted here. Left out.")
    assert "document 0" not in example.asked_again("so").prompt


def test_a_length_of_ones_own_is_that_of_the_thoughts(modes: dict[str, str]) -> None:
    write(modes, [row(0)])
    (example,) = LongBenchV2(mode="cot", max_new_tokens=9, **modes).examples(None)
    assert (example.max_new_tokens, example.asked_again("so").max_new_tokens) == (9, 128)


def test_guessing_goes_without_the_document(modes: dict[str, str]) -> None:
    write(modes, [row(0)])
    (example,) = LongBenchV2(mode="no_context", **modes).examples(None)
    assert example.prompt == GUESS.replace("$Q$", "which of four, 0?").replace("$C_", "choice ").replace(
        "$", "0"
    )
    assert (example.context, example.max_new_tokens, example.second) == ("", 128, None)


@pytest.mark.parametrize("mode", ["0shot", "cot", "no_context"])
def test_modes_name_their_files(modes: dict[str, str], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    write(modes, [row(0)])
    benchmark = LongBenchV2(mode=mode, **modes)
    names = {"0shot": ["0shot"], "cot": ["0shot_cot", "0shot_cot_ans"], "no_context": ["0shot_no_context"]}[
        mode
    ]
    assert [path.stem for path in benchmark.files()[1:]] == names
    unlike = "known to be the one" if mode == "no_context" else "the one"
    wanted = [f"prompts/{name}.txt is not {unlike} of THUDM/LongBench" for name in names]
    assert [note[: len(text)] for note, text in zip(benchmark.notes(), wanted, strict=False)] == wanted
    before = benchmark.identity()["prompts"]
    for name in names:
        (Path(modes["prompt_dir"]) / f"prompts/{name}.txt").write_text("other $DOC$$COT$")
        assert benchmark.identity()["prompts"] != before
        before = benchmark.identity()["prompts"]
    fetched = LongBenchV2(mode=mode, data_dir=modes["data_dir"])
    assert fetched.identity()["prompts"] == "THUDM/LongBench@2e00731f8d0bff23dc4325161044d0ed8af94c1e"


def test_a_file_of_unknown_hash_is_taken_from_its_commit(
    modes: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(modes, [row(0)])
    monkeypatch.setattr("urllib.request.urlopen", lambda url, timeout: io.BytesIO(GUESS.encode()))
    benchmark = LongBenchV2(mode="no_context", data_dir=modes["data_dir"])
    assert benchmark.files()[1].read_text() == GUESS
    with pytest.raises(DataError, match="has sha256 .* pinned is 6cc33d92"):
        LongBenchV2(mode="cot", data_dir=modes["data_dir"]).examples(None)
    monkeypatch.delattr("urllib.request.urlopen")
    assert "which of four, 0?" in benchmark.examples(None)[0].prompt


@pytest.mark.parametrize(
    ("file", "text", "mode", "missing"),
    [
        ("0shot_cot", GUESS, "cot", r"\$DOC\$"),
        ("0shot_cot_ans", GUESS, "cot", r"\$COT\$"),
        ("0shot_no_context", "$C_A$ $C_B$ $C_C$ $C_D$", "no_context", r"\$Q\$"),
    ],
)
def test_modes_want_their_placeholders(
    modes: dict[str, str], file: str, text: str, mode: str, missing: str
) -> None:
    write(modes, [row(0)])
    (Path(modes["prompt_dir"]) / f"prompts/{file}.txt").write_text(text)
    with pytest.raises(DataError, match=rf"prompts/{file}.txt of THUDM/LongBench has no {missing}"):
        LongBenchV2(mode=mode, **modes).examples(None)


def test_the_record_says_what_was_read(places: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(places, [row(0)])
    before = LongBenchV2(**places).identity()
    assert LongBenchV2(protocol="heterocache", **places).identity()["prompts"] != before["prompts"]
    assert LongBenchV2(**places).notes() == [
        "prompts/0shot.txt is not the one of THUDM/LongBench at 2e00731f8d0bff23dc4325161044d0ed8af94c1e"
    ]
    assert "extracted as by heterocache" in LongBenchV2(extraction="heterocache", **places).notes()[1]
    write(places, [row(1)])
    assert LongBenchV2(**places).identity()["data"] != before["data"]
    path.unlink()
    away = LongBenchV2(data_dir=places["data_dir"], revision="abc")
    assert away.identity() == {
        "data": "zai-org/LongBench-v2@abc",
        "prompts": "THUDM/LongBench@2e00731f8d0bff23dc4325161044d0ed8af94c1e",
    }
    assert away.notes() == []


def test_files_are_named(places: dict[str, str]) -> None:
    path = write(places, [row(0)])
    rows, prompts = LongBenchV2(**places).files()
    assert rows == path
    assert prompts.read_text() == TEMPLATE


def test_fetched_prompts_are_named_where_they_lie(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    write(places, [row(0)])
    monkeypatch.setattr(prompt_files.PromptFile, "_fetched", lambda self: TEMPLATE.encode())
    assert LongBenchV2(data_dir=places["data_dir"]).files()[1].read_text() == TEMPLATE


def test_rows_come_from_the_hub_where_they_are_not_here(
    places: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    elsewhere = write(places, [row(0)]).rename("elsewhere.json")
    asked: list[Any] = []
    monkeypatch.setattr(
        longbench_v2.HubFiles, "fetch", lambda self, name: (asked.append((self, name)), elsewhere)[1]
    )
    assert len(LongBenchV2(**places).examples(None)) == 1
    ((hub, name),) = asked
    assert (hub.repo, hub.revision, name) == ("zai-org/LongBench-v2", "2b48e49", "data.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["longbench_v1"]}, "did you mean 'longbench_v2'"),
        ({"protocol": "offical"}, "did you mean 'official'"),
        ({"lengths": ["shrt"]}, "benchmark.lengths: unknown value 'shrt'; did you mean 'short'"),
        ({"difficulties": ["medium"]}, "benchmark.difficulties: unknown value 'medium'"),
        ({"domains": ["Single Document QA"]}, "did you mean 'Single-Document QA'"),
        ({"extraction": "oficial"}, "did you mean 'official'"),
        ({"model_family": "deepsek", "extraction": "heterocache"}, "did you mean 'deepseek'"),
        ({"model_family": "deepseek"}, "has no effect on extraction official"),
        ({"max_new_tokens": 0}, "benchmark.max_new_tokens=0 must be at least 1"),
        ({"max_length": 1}, "benchmark.max_length=1 must be at least 2"),
        ({"mode": "cott"}, "benchmark.mode: unknown mode 'cott'; did you mean 'cot'"),
        ({"mode": "cot", "protocol": "heterocache"}, "benchmark.mode=cot is of the official code alone"),
        ({"mode": "no_context", "query_aware": False}, "leave benchmark.mode=no_context nothing to compress"),
    ],
)
def test_bad_settings_are_refused_before_a_file_is_read(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        LongBenchV2(data_dir="/nowhere", prompt_dir="/nowhere", **settings)


# --- answers

SENTENCE = "The correct answer is "


@pytest.mark.parametrize(
    ("reply", "official", "heterocache"),
    [
        (f"{SENTENCE}(B).", "B", "B"),
        (f"{SENTENCE}B", "B", "B"),
        (f"**{SENTENCE}**(*C*)**", "C", "C"),
        (f"{SENTENCE}Dutch", "D", "D"),
        (f"{SENTENCE}A or rather: {SENTENCE}(B)", "B", "B"),  # brackets are looked for first
        (f"{SENTENCE}(A). No, {SENTENCE}(B)", "A", "A"),
        ("the correct answer is (B)", None, "B"),
        (f"{SENTENCE}(b)", None, None),
        (f"{SENTENCE}: B", None, "B"),
        (f"{SENTENCE}E", None, None),
        ("Answer: D", None, "D"),
        ("A good question. I'd say D", None, "A"),
        ("Either (C) or {D}", None, "D"),
        ("B, that is (C)", None, "C"),
        ("Dutch", None, None),
        ("option_B", None, None),
        ("*", None, None),
        ("", None, None),
    ],
)
def test_letters_are_found_as_published(reply: str, official: str | None, heterocache: str | None) -> None:
    assert extract(reply) == extract(reply, "official", "deepseek") == official
    assert extract(reply, "heterocache") == extract(reply, "heterocache", "llama") == heterocache
    for letter in "ABCD":
        assert benchmarks.score("longbench_v2", "longbench_v2", reply, [letter]) == float(letter == official)
    assert answered(reply, "heterocache") == (heterocache is not None)


@pytest.mark.parametrize(
    ("reply", "letter"),
    [
        ("It is (C), surely", "A"),
        ("", "A"),
        ("Is it (B)?</think>So (C)", "C"),
        ("(B)</think>hm", None),
    ],
)
def test_thoughts_of_deepseek(reply: str, letter: str | None) -> None:
    assert extract(reply, "heterocache", "DeepSeek-R1") == letter
    found = benchmarks.score(
        "longbench_v2", "longbench_v2", reply, ["A"], extraction="heterocache", model_family="deepseek"
    )
    assert found == float(letter == "A")


def test_kvpress_takes_the_letter_anywhere() -> None:
    def right(reply: str) -> str:
        return "".join(
            letter
            for letter in "ABCD"
            if benchmarks.score("longbench_v2", "longbench_v2", reply, [letter], extraction="kvpress")
        )

    assert right("A or B") == "AB"
    assert right("CD player") == "CD"
    assert right("none") == ""
    assert answered("CD player", "kvpress")
    assert not answered("none", "kvpress")


def test_an_example_is_scored_as_it_was_made(places: dict[str, str]) -> None:
    write(places, [row(3)])
    (example,) = LongBenchV2(protocol="heterocache", model_family="deepseek", **places).examples(None)
    for score, reply in ((1.0, "hm</think>D"), (0.0, "D")):
        assert LongBenchV2().score(example, reply, example.answers) == score
        assert benchmarks.score("longbench_v2", example.task, reply, ["D"], **example.extra) == score
    assert LongBenchV2().score(example, "hm</think>D", ["D"], extraction="official") == 0.0
    assert LongBenchV2().postprocess(" D\n", example) == "D"
    json.dumps(example.extra)


def test_the_settings_decide_where_nothing_else_does() -> None:
    assert LongBenchV2(extraction="heterocache").score("longbench_v2", "Answer: D", ["D"]) == 1.0
    assert LongBenchV2(protocol="heterocache").score("longbench_v2", "Answer: D", ["D"]) == 1.0
    assert LongBenchV2().score("longbench_v2", "Answer: D", ["D"]) == 0.0


@pytest.mark.parametrize(
    ("task", "answers", "extra", "message"),
    [
        ("longbench", ["A"], {}, "did you mean 'longbench_v2'"),
        ("longbench_v2", ["A", "B"], {}, "there is one right answer"),
        ("longbench_v2", ["E"], {}, "got 'E'"),
        ("longbench_v2", ["A"], {"extraction": "hetrocache"}, "did you mean 'heterocache'"),
    ],
)
def test_bad_scoring_is_refused(task: str, answers: list[str], extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        benchmarks.score("longbench_v2", task, "A", answers, **extra)


# --- averages


def lines() -> Iterator[dict[str, Any]]:
    """Eight questions: difficulty, length, whether right, reply."""
    table = [
        ("easy", "short", 1.0, f"{SENTENCE}(A)"),
        ("easy", "short", 0.0, "no idea"),
        ("easy", "long", 1.0, f"{SENTENCE}A"),
        ("hard", "short", 0.0, f"{SENTENCE}(B)"),
        ("hard", "long", 0.0, ""),
        ("hard", "long", 1.0, f"{SENTENCE}Alps"),
        ("hard", "long", 0.0, f"{SENTENCE}(C)"),
        ("hard", "long", 0.0, "A"),
    ]
    for place, (difficulty, length, score, reply) in enumerate(table):
        classes = {"difficulty": difficulty, "length": length, "domain": DOMAINS[place // 6]}
        yield {"task": "longbench_v2", "score": score, "prediction": reply, **classes}


def test_averages_by_hand() -> None:
    means = {name: tree_mean(tree) for name, tree in LongBenchV2().aggregates(list(lines())).items()}
    assert means == pytest.approx(
        {
            "overall": 3 / 8,
            "easy": 2 / 3,
            "hard": 1 / 5,
            "short": 1 / 3,
            "long": 2 / 5,
            DOMAINS[0]: 3 / 6,
            DOMAINS[1]: 0 / 2,
            "compensated": (3 + 3 * 0.25) / 8,
            "no_answer": 3 / 8,
        }
    )
    assert LongBenchV2().aggregates([]) == {}


def test_averages_go_by_the_extraction_of_the_run() -> None:
    theirs = [{**line, "extraction": "heterocache"} for line in lines()]
    for benchmark, found in (
        (LongBenchV2(), LongBenchV2().aggregates(theirs)),
        (LongBenchV2(protocol="heterocache"), None),
    ):
        trees = found or benchmark.aggregates(list(lines()))
        assert tree_mean(trees["no_answer"]) == 2 / 8
        assert tree_mean(trees["compensated"]) == (3 + 2 * 0.25) / 8


def test_the_total_is_the_task() -> None:
    assert benchmarks.aggregate("longbench_v2", {"longbench_v2": 30.0}) == 30.0
    with pytest.raises(ValueError, match="unknown task 'easy'"):
        benchmarks.aggregate("longbench_v2", {"easy": 30.0, "hard": 40.0})
    with pytest.raises(ValueError, match="unknown kind of average"):
        benchmarks.aggregate("longbench_v2", {"longbench_v2": 30.0}, kind="kv_papers")


def test_it_is_registered() -> None:
    assert BENCHMARKS.get("longbench_v2") is LongBenchV2

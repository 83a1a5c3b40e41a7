"""RULER's examples: they fit their length, hold what they ask for where it was put, and can be made again."""

import hashlib
import json
import re
import time
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hcache import benchmarks
from hcache.benchmarks import ruler as module
from hcache.benchmarks.base import BENCHMARKS, Example
from hcache.benchmarks.ruler import TASKS, WITHOUT_FILES, Ruler
from hcache.benchmarks.ruler_fit import Room, best_size, sample
from hcache.benchmarks.ruler_tasks import (
    DEPTHS,
    NEEDLE_TASKS,
    NOISE,
    Chain,
    FrequentWords,
    Needles,
    NeedleTask,
    listed,
    zipf_count,
)
from hcache.benchmarks.ruler_template import PROMPTS, Parts, Template, read_templates
from hcache.benchmarks.ruler_words import Essays, Pairs, plain_words, split_at_stops
from hcache.benchmarks.source import DataError

CONSTANTS = '''
"""Made for a test."""
LINES = [len("computed")]
TASKS = {
    'niah': {
        'tokens_to_generate': 128,
        'template': """Some {type_needle_v} are here, careful.\\n{context}\\n"""
                    + """Say: what are all {type_needle_v} of {query}? The answers are above.""",
        'answer_prefix': """ The {type_needle_v} of {query} are""",
    },
    'variable_tracking': {
        'tokens_to_generate': 30,
        'template': """Follow them.\\n\\n{context}\\nQ: who has {query}?""",
        'answer_prefix': """ A: these {num_v} have {query}: """,
    },
    'common_words_extraction': {
        'tokens_to_generate': 120,
        'template': """Count.\\n{context}\\nQ: which ten come most?""",
        'answer_prefix': """ A: it is""",
    },
    'freq_words_extraction': {
        'tokens_to_generate': 50,
        'template': """Coded, with dots. {context}\\nQ: which three?""",
        'answer_prefix': """ A: these:""",
    },
    'qa': {
        'tokens_to_generate': 32,
        'template': """Read.\\n\\n{context}\\n\\nNow say, from these.\\n\\nQ: {query}""",
        'answer_prefix': """ A:""",
    },
}
'''

SENTENCE = "Plain prose about item number {i} goes on, and then it stops."
ESSAY = " ".join(SENTENCE.format(i=i) for i in range(150))


class Words:
    """A tokenizer that cuts words into pieces of up to four letters; a start token only where asked for."""

    def encode(self, text: str, add_special_tokens: bool = True) -> list[str]:
        return ["<s>"] * add_special_tokens + re.findall(r"\w{1,4}|[^\w\s]", text)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> str:
    place = tmp_path_factory.mktemp("prompts")
    file = place / "scripts/data/synthetic/constants.py"
    file.parent.mkdir(parents=True)
    file.write_text(CONSTANTS)
    return str(place)


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> str:
    """Every asset, small."""
    place = tmp_path_factory.mktemp("data")
    (place / "PaulGrahamEssays.json").write_text(json.dumps({"text": ESSAY.replace(" ", "\n", 30)}))
    (place / "dev-v2.0.json").write_text(json.dumps({"data": [squad_article(a) for a in range(6)]}))
    rows = [hotpot_row(i) for i in range(5)]
    (place / "hotpot_dev_distractor_v1.json").write_text(json.dumps(rows))
    return str(place)


def squad_article(number: int) -> dict:
    def paragraph(p: int) -> dict:
        answers = [{"text": f"city {number}{p}"}, {"text": f"the city {number}{p}"}]
        asked = {"question": f"Where is {number}{p}?", "answers": answers, "is_impossible": False}
        other = {"question": "Where is nothing?", "answers": [], "is_impossible": True}
        return {
            "context": f"Paragraph {number}{p}: it is in the city {number}{p}. " + "So it is. " * 5,
            "qas": [other, asked],
        }

    return {"title": f"T{number}", "paragraphs": [paragraph(p) for p in range(4)]}


def hotpot_row(i: int) -> dict:
    context = [[f"Title {i}{d}", [f"First of {i}{d}.", f" Second says fact{i}{d}."]] for d in range(10)]
    return {"question": f"What of {i}?", "answer": f"fact{i}3", "context": context}


@pytest.fixture(scope="module")
def made(prompts: str, data: str):
    """Makes examples of settings."""

    def make(tokenizer: Any = None, **settings: Any) -> list[Example]:
        settings = {"prompt_dir": prompts, "data_dir": data, "limit": 3, "lengths": [8192], **settings}
        return benchmarks.BENCHMARKS.get("ruler")(**settings).examples(tokenizer)

    return make


# --- answers, read from the prompt by other means


def solved(example: Example) -> set[str]:
    """What the prompt asks for, found in it; knows this file's templates alone."""
    task = example.task.rsplit("_", 1)[0]
    if task.startswith("niah"):
        asked = re.search(r" of (.+)\? The answers? ", example.question)
        assert asked is not None
        keys = re.split(r", and |, ", asked[1])
        facts = re.findall(r"One of the special magic \w+ for (.+?) is: (\S+)\.", example.context)
        return {value for key, value in facts if key in keys}
    if task == "vt":
        value = re.search(r"has (\d+)\?", example.question)
        assert value is not None
        known = {value[1]}
        while True:
            pairs = re.findall(r"VAR (\w+) = (?:VAR )?(\w+)", example.context)
            more = {name for name, source in pairs if source in known} - known
            if not more:
                return known - {value[1]}
            known |= more
    if task == "cwe":
        words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", example.context.split("\nCount.\n")[1].rstrip("\n"))
        return {word for word, _ in Counter(words).most_common(10)}
    if task == "fwe":
        words = example.context.removeprefix("Coded, with dots. ").split()
        ranked = Counter(words).most_common(4)
        assert ranked[0][0] == "..."
        return {word for word, _ in ranked[1:]}
    if task == "qa_1":
        place = re.search(r"Where is (\d+)\?", example.question)
        assert place is not None
        found = re.search(rf"Paragraph {place[1]}: it is in the (city \d+)\.", example.context)
        assert found is not None
        return {found[1], f"the {found[1]}"}
    place = re.search(r"What of (\d)\?", example.question)
    assert place is not None
    return {re.findall(rf"says (fact{place[1]}3)\.", example.context)[0]}


def step_tokens(task: str, length: int, tokenizer: Any) -> int:
    """Tokens that a step or two take: what a sample that was drawn again may be shorter."""
    kind = NEEDLE_TASKS[task].haystack if task in NEEDLE_TASKS else task
    lines = 5 if length < 4096 else 25
    uuids = 120 if task == "niah_multikey_3" else 90
    bytes_of = {"essay": 500 * 6, "noise": lines * 91, "needle": lines * uuids, "vt": 10 * 91}
    step = bytes_of.get(kind, 2 * 30 * 14)
    return step + 100 if tokenizer is None else step // 3 + 30


@pytest.mark.parametrize("tokenizer", [None, Words()], ids=["bytes", "words"])
@pytest.mark.parametrize("task", TASKS)
def test_prompts_fit_and_say_what_they_ask_for(made, task: str, tokenizer: Any) -> None:
    lengths = (7000, 8192) if tokenizer is None else (1000, 4096)
    for example in made(tokenizer, tasks=[task], lengths=lengths):
        assert solved(example) == set(example.answers), example.task
        assert Ruler().score(example, ", ".join(example.answers), example.answers) == 1.0
        assert not set(example.answers) & set(re.findall(r"\w+", example.question))
        count = (
            len(example.prompt.encode()) if tokenizer is None else len(Words().encode(example.prompt, False))
        )
        length = example.extra["length"]
        assert count + example.max_new_tokens == example.extra["tokens"] <= length
        if not task.startswith("qa"):  # whose files are small
            assert count + example.max_new_tokens > length - step_tokens(task, length, tokenizer)
        assert example.chat is True
        assert example.stop == ()
        json.dumps(example.extra)


def test_there_are_official_numbers_of_new_tokens(made) -> None:
    found = {e.task.rsplit("_", 1)[0]: e.max_new_tokens for e in made(Words(), tasks=TASKS, limit=1)}
    assert found == {
        **{task: 128 for task in TASKS if task.startswith("niah")},
        "vt": 30,
        "cwe": 120,
        "fwe": 50,
        "qa_1": 32,
        "qa_2": 32,
    }


def test_the_question_is_not_in_the_context(made) -> None:
    for example in made(tasks=TASKS, limit=1):
        family = module.FAMILIES[example.task.rsplit("_", 1)[0]]
        starts = {"niah": "Say: ", "qa": "Now say, from these.\n\nQ: "}
        assert example.question.startswith(starts.get(family, "Q: "))
        assert example.context[-1] == "\n"
        assert example.answer_prefix.startswith(" ")
        if family == "qa":
            assert example.context[-3:-1] != "\n\n" == example.context[-2:]


def test_prompts_are_the_same_everywhere(made) -> None:
    """A digest of this file's templates filled by the generators: a change makes results incomparable."""
    text = "".join(e.prompt + "|".join(e.answers) for e in made(tasks=TASKS))
    assert hashlib.sha256(text.encode()).hexdigest()[:16] == "30a30334e909f387"


def test_more_examples_change_none(made) -> None:
    few = {(e.task, e.id): e for e in made(Words(), tasks=TASKS)}
    more = {(e.task, e.id): e for e in made(Words(), tasks=TASKS, limit=None, examples_per_task=5)}
    alone = {(e.task, e.id): e for e in made(Words(), tasks=["vt"], lengths=[16384, 8192], limit=1)}
    assert len(few) == 39
    assert len(more) == 65
    assert all(more[key] == example for key, example in few.items())
    assert alone["vt_8192", "0"] == few["vt_8192", "0"]
    assert [e.id for e in made(tasks=["vt"])] == ["0", "1", "2"]
    assert len(made(tasks=["vt"], limit=9, examples_per_task=2)) == 2


def test_seeds_and_samples_differ(made) -> None:
    prompts = [e.prompt for seed in (42, 43) for e in made(tasks=["niah_multikey_3", "fwe"], seed=seed)]
    assert len(set(prompts)) == 12


# --- needles


def test_one_value_is_asked_in_the_singular_and_several_in_the_plural(made) -> None:
    one, several = made(tasks=["niah_single_1", "niah_multivalue"], limit=1)
    key = one.context.split(" for ")[1].split(" is: ")[0]
    # "are" becomes "is" inside "careful" too, as in RULER
    assert one.context.startswith("A number is here, cisful.\n")
    assert one.question == f"Say: what is number of {key}? The answer is above."
    assert one.answer_prefix == f" The number of {key} is"
    assert "One of the special magic numbers for " in one.context
    assert several.context.startswith("Some numbers are here, careful.\n")
    assert re.fullmatch(r"Say: what are all numbers of .+-.+\? The answers are above.", several.question)


def test_kinds_of_keys_and_values(made) -> None:
    tasks = ["niah_single_1", "niah_single_3", "niah_multikey_3"]
    number, uuid, pair = made(tasks=tasks, limit=1)
    hexes = r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}"
    assert re.fullmatch(r"[1-9]\d{6}", number.answers[0])
    assert re.fullmatch(hexes, uuid.answers[0])
    assert re.search(rf" of {hexes}\?", pair.question)


@pytest.mark.parametrize(
    ("task", "needles", "asked"),
    [
        ("niah_single_2", 1, 1),
        ("niah_multikey_1", 4, 1),
        ("niah_multivalue", 4, 4),
        ("niah_multiquery", 4, 4),
    ],
)
def test_needles_lie_between_sentences_at_drawn_depths(made, task: str, needles: int, asked: int) -> None:
    seen = set()
    for example in made(tasks=[task], limit=20):
        assert len(example.answers) == len(set(example.answers)) == asked
        body = example.context.split("\n", 1)[1].rstrip("\n")
        pieces = re.split(r"(One of the special magic .+? is: \S+?\.)(?: |$)", body)
        assert len(pieces) == 2 * needles + 1
        prose = "".join(pieces[::2]).split()
        assert prose == (ESSAY.split() * 5)[: len(prose)]
        sentences = split_at_stops(" ".join(prose))
        before = [len(split_at_stops("".join(pieces[: 2 * i + 1 : 2]))) for i in range(needles)]
        allowed = {int(len(sentences) * (depth / 100)) for depth in DEPTHS}
        assert set(before) <= allowed
        assert len(set(before)) == needles
        seen.update(before)
    assert len(seen) > 10


def test_depths_are_forty_from_0_to_100() -> None:
    np = pytest.importorskip("numpy")
    assert list(DEPTHS) == np.round(np.linspace(0, 100, num=40)).astype(int).tolist()


def test_needles_lie_among_lines_of_noise_or_other_needles(made) -> None:
    places = set()
    for example in made(tasks=["niah_single_1"], limit=20):
        lines = example.context.split("\n")[1:-1]
        (place,) = (i for i, text in enumerate(lines) if text != NOISE)
        places.add(place * 4 // len(lines))
    assert places == {0, 1, 2, 3}
    (example,) = made(tasks=["niah_multikey_2"], limit=1)
    lines = example.context.split("\n")[1:-1]
    facts = [re.fullmatch(r"One of the special magic numbers for (.+-.+) is: (\d{7})\.", x) for x in lines]
    assert all(facts)
    assert len({fact[1] for fact in facts if fact}) == len(lines) > 50


def test_names_are_listed_with_commas_and_an_and(made) -> None:
    assert listed(["a"]) == "a"
    assert listed(["a", "b"]) == "a, and b"
    assert listed(["a", "b", "c"]) == "a, b, and c"
    (example,) = made(tasks=["niah_multiquery"], limit=1)
    keys = re.search(r" of (.+, .+, .+, and .+)\? ", example.question)
    assert keys is not None
    order = re.split(r", and |, ", keys[1])
    values = dict(re.findall(r"numbers for (.+?) is: (\d+)\.", example.context))
    assert example.answers == tuple(values[key] for key in order)


# --- chains


def test_a_worked_example_comes_before_every_chain(made) -> None:
    seen = set()
    for example in made(Words(), tasks=["vt"], lengths=[4096]):
        first, second = example.context.split("\nFollow them.\n\n")
        prompt, _, names = first.rpartition(": ")
        assert prompt.startswith("Follow them.\n\n")
        assert prompt.endswith("\nQ: who has 12345? A: these 5 have 12345")
        assert re.fullmatch(r"(?:[A-Z]{3} ){4}[A-Z]{3}", names)
        tokens = len(Words().encode(prompt + ": ", False)) + 30
        assert 500 - 5 * len(Words().encode(NOISE, False)) < tokens <= 500
        seen.add(names)
        assert re.findall(r"VAR (\w+) =", prompt) == names.split()
        assert re.findall(r"VAR (\w+) =", second) == list(example.answers)
        assert all(re.fullmatch(r"[A-Z]{5}", name) for name in example.answers)
        lines = [text for text in second.split("\n") if text.startswith("VAR")]
        assert re.fullmatch(r"VAR [A-Z]{5} = [1-9]\d{4}", lines[0])
        assert all(re.fullmatch(r"VAR [A-Z]{5} = VAR [A-Z]{5} ", text) for text in lines[1:])
        assert set(second.split("\n")) - set(lines) == {NOISE, ""}
    assert len(seen) == 3


def test_an_example_too_long_for_its_budget_is_the_smallest_and_noted(prompts: str) -> None:
    for tokenizer, noted in ((None, True), (Words(), False)):
        ruler = Ruler(tasks=("vt",), prompt_dir=prompts, limit=1)
        (example,) = ruler.examples(tokenizer)
        first = example.context.split("\nFollow them.\n\n")[0]
        assert any("worked example takes more" in note for note in ruler.notes()) is noted
        assert (first.count(NOISE) == 5) is noted


def test_assignments_stand_before_their_line_of_noise() -> None:
    chain = Chain(["A", "B", "C"], 7, [0, 1, 3], 4)
    lines = ["VAR A = 7", NOISE, "VAR B = VAR A ", NOISE, NOISE, "VAR C = VAR B ", NOISE]
    assert chain.text == "\n".join(lines)


# --- counts


@pytest.mark.parametrize(
    ("length", "main", "worked", "size"), [(8192, (30, 3), (10, 3), 40), (2000, (6, 1), (3, 1), 20)]
)
def test_common_words_come_as_often_as_they_should(
    made, length: int, main: tuple[int, int], worked: tuple[int, int], size: int
) -> None:
    tokenizer = Words() if length == 8192 else None
    for example in made(tokenizer, tasks=["cwe"], lengths=[length]):
        first, second = example.context.split("\nCount.\n")
        shown, answer = first.removeprefix("Count.\n").split("\nQ: which ten come most? A: it is")
        for text, (common, others) in ((shown, worked), (second, main)):
            words = re.findall(r"\d+\. (.+?)(?= \d+\. |$)", text.rstrip("\n"))
            counts = Counter(words)
            assert Counter(counts.values()) == {common: 10, others: len(counts) - 10}
            assert text.startswith(f"1. {words[0]} 2. {words[1]} ")
            assert set(words) <= set(plain_words())
            if text is shown:
                assert len(counts) == size
                best = [word for word, count in counts.items() if count == common]
                assert re.fullmatch(r"( \d+\. .+?){10}", answer)
                assert set(re.findall(r"\d+\. (.+?)(?= \d+\. |$)", answer)) == set(best)


def test_words_are_the_8166_of_wonderwords() -> None:
    assert len(plain_words()) == len(set(plain_words())) == 8166
    assert list(plain_words()) == sorted(plain_words())


def test_more_words_than_there_are_need_a_list(made, monkeypatch, tmp_path: Path, prompts: str) -> None:
    few = [f"w{i:03}" for i in range(60)]
    monkeypatch.setattr("hcache.benchmarks.ruler_tasks.plain_words", lambda: few)
    with pytest.raises(DataError, match=r"cwe at 8192 tokens .* 60 .*put english_words.json"):
        made(Words(), tasks=["cwe"])
    (tmp_path / "english_words.json").write_text(json.dumps({str(i): f"x{i:05}" for i in range(9000)}))
    for example in made(Words(), tasks=["cwe"], data_dir=str(tmp_path)):
        assert solved(example) == set(example.answers)
        assert {word[0] for word in example.answers} == {"x"}
    (tmp_path / "english_words.json").write_text(json.dumps(few))
    ruler = Ruler(tasks=("cwe",), data_dir=str(tmp_path), prompt_dir=prompts, lengths=(8192,), limit=1)
    ruler.examples(Words())
    assert any("all 60 words" in note for note in ruler.notes())


def test_coded_words_follow_zipfs_law(made) -> None:
    for example in made(tasks=["fwe"]):
        words = example.context.removeprefix("Coded, with dots. ").split()
        counts = [count for _, count in Counter(words).most_common()]
        size = next(n for n in range(100, 5000) if zipf_count(n, 1) == counts[0])
        np = pytest.importorskip("numpy")
        expected = size * (np.arange(1, (8192 - 50) // 50 + 1) ** -2.0) / (np.pi**2 / 6)
        assert counts == pytest.approx([int(x) for x in expected if x >= 1], abs=1)
        assert all(re.fullmatch(r"[a-z]{6}", word) for word in set(words) - {"..."})


def test_the_first_ranks_never_tie() -> None:
    for size in range(FrequentWords.least, 5000):
        counts = [zipf_count(size, rank) for rank in range(1, 6)]
        assert sorted(set(counts), reverse=True) == counts


# --- questions


def test_documents_of_the_same_article_come_first(made) -> None:
    for index, example in enumerate(made(tasks=["qa_1"], limit=6, lengths=[900])):
        numbers = re.findall(r"Document (\d+):\nParagraph (\d)(\d):", example.context)
        assert [int(n) for n, _, _ in numbers] == list(range(1, len(numbers) + 1))
        articles = Counter(article for _, article, _ in numbers)
        asked = f"{index // 4}{index % 4}"
        assert example.question.endswith(f"Where is {asked}?")
        assert (asked[0], asked[1]) in [(a, p) for _, a, p in numbers]
        assert articles[asked[0]] == 4
        assert 4 < len(numbers) < 24
        assert example.answers == (f"city {asked}", f"the city {asked}")


def test_all_documents_of_a_question_stay(made, prompts: str, data: str) -> None:
    for index, example in enumerate(made(tasks=["qa_2"], limit=5, lengths=[1500])):
        titles = re.findall(r"Document \d+:\nTitle (\d)(\d)\nFirst of \d\d\. Second", example.context)
        assert sum(int(row) == index for row, _ in titles) == 10
        assert len(titles) == len(set(titles)) > 10
    ruler = Ruler(tasks=("qa_2",), lengths=(8192,), limit=1, prompt_dir=prompts, data_dir=data)
    (example,) = ruler.examples(None)
    assert example.context.count("Document ") == 50
    assert ruler.notes()[0].startswith("qa_2: all 50 words or documents")


def test_the_gold_document_stands_where_the_number_of_documents_says(made) -> None:
    places: dict[int, set[int]] = {}
    for example in made(tasks=["qa_1"], limit=12, lengths=[1500]):
        numbers = re.findall(r"Document \d+:\nParagraph (\d\d):", example.context)
        asked = example.question[-3:-1]
        places.setdefault(len(numbers), set()).add(numbers.index(asked))
    assert all(len(found) == 1 for found in places.values())


def test_documents_are_shuffled_by_the_seed_alone(made) -> None:
    for length in (900, 1300, 2000, 2600):
        (example,) = made(tasks=["qa_1"], limit=1, lengths=[length])
        numbers = re.findall(r"Document \d+:\nParagraph (\d\d):", example.context)
        order = list(range(len(numbers)))
        Random(42).shuffle(order)
        assert numbers.index("00") == order.index(0)
        assert {numbers.index(f"0{p}") for p in (1, 2, 3)} == {order.index(i) for i in (1, 2, 3)}


def test_no_more_questions_than_there_are(made) -> None:
    with pytest.raises(DataError, match="more than the 5 questions"):
        made(tasks=["qa_2"], limit=6)


# --- words and sentences


def test_pairs_are_those_of_a_list() -> None:
    first = ["high", "high-pitched", "a", "ab", "highest", "a-b", "a"]
    second = ["pitched-x", "x", "b-x", "zoo", "x", "a b"]
    listed_out = sorted({f"{a}-{b}" for a in first for b in second})
    pairs = Pairs(first, second)
    assert list(pairs) == listed_out
    assert len(pairs) == len(listed_out)
    with pytest.raises(IndexError):
        pairs[len(listed_out)]


def test_sentences_by_rule() -> None:
    text = 'One. Two 3.5 goes on? "Three!" Four (five.) six'
    assert split_at_stops(text) == ["One.", "Two 3.5 goes on?", '"Three!"', "Four (five.)", "six"]
    assert split_at_stops("  ") == []


def test_essays_begin_again_at_their_end() -> None:
    essays = Essays(["a.", "b", "c."], split_at_stops)
    assert essays.sentences(3) == ["a.", "b c."]
    assert essays.sentences(8) == ["a.", "b c.", "a.", "b c.", "a.", "b"]


def test_the_splitter_is_named(prompts: str, data: str, monkeypatch) -> None:
    ruler = Ruler(tasks=("niah_single_2",), prompt_dir=prompts, data_dir=data)
    monkeypatch.setattr(module, "sentence_splitter", lambda: None)
    assert ruler.identity()["sentences"] == "by rule"
    assert any("punkt_tab" in note for note in ruler.notes())
    monkeypatch.setattr(module, "sentence_splitter", lambda: str.splitlines)
    assert ruler.identity()["sentences"].startswith("nltk ")
    assert not any("punkt_tab" in note for note in ruler.notes())
    assert "sentences" not in Ruler(prompt_dir=prompts).identity()


# --- sizes


@pytest.mark.parametrize(
    ("task", "length", "step"),
    [
        ("noise", 4095, 5),
        ("noise", 4096, 25),
        ("needle", 4095, 5),
        ("needle", 8192, 25),
        ("essay", 512, 500),
        ("essay", 8192, 500),
    ],
)
def test_needles_shrink_by_steps(task: str, length: int, step: int) -> None:
    template = Template("", "", "", "", 1)
    assert Needles(NeedleTask(task), template, length, 42, None).step == step


def test_a_sample_that_is_too_long_shrinks_by_steps() -> None:
    class Growing(Line):
        """Each draw is longer than sizes say, the second and later samples more so."""

        def draw(self, size: int, index: int) -> Parts:
            drawn.append(size)
            return Parts("x" * (size + 20 * index), "", "", ())

    drawn: list[int] = []
    room = Room(len, 100, 10, "x")
    assert len(sample(Growing(15), room, 90, 0).text) == 90
    assert len(sample(Growing(15), room, 90, 2).text) == 85
    assert drawn == [90, 90, 75, 60, 45]
    assert len(sample(Growing(50), room, 60, 4).text) == 90
    with pytest.raises(ValueError, match=r"lengths=100 is too short for x: .* take 112 tokens"):
        sample(Growing(50), room, 60, 5)


class Line:
    """A prompt of `size` letters and five more."""

    least = 2

    def __init__(self, step: int, most: int | None = None) -> None:
        self.step, self.most = step, most

    def draw(self, size: int, index: int) -> Parts:
        return Parts("x" * size + "12345", "", "", ())


@pytest.mark.parametrize("step", [1, 7, 50, 1000])
@pytest.mark.parametrize(
    ("length", "most", "best"),
    [(100, None, 85), (10_000, None, 9985), (17, None, 2), (100, 60, 60), (100, 85, 85), (100, 86, 85)],
)
def test_sizes_are_the_largest_that_fit(step: int, length: int, most: int | None, best: int) -> None:
    assert best_size(Line(step, most), Room(len, length, 10, "x")) == best


def test_a_large_fixed_part_does_not_hide_the_size() -> None:
    class Long(Line):
        def draw(self, size: int, index: int) -> Parts:
            return Parts("x" * (size + 5000), "", "", ())

    assert best_size(Long(5), Room(len, 8000, 0, "x")) == 3000


def test_no_size_fits() -> None:
    with pytest.raises(ValueError, match=r"lengths=16 is too short for x: .* take 17 tokens"):
        best_size(Line(5), Room(len, 16, 10, "x"))


def test_a_length_too_short_for_a_task(made) -> None:
    with pytest.raises(ValueError, match=r"lengths=4096 is too short for cwe: .* take \d+ tokens"):
        made(tasks=["cwe"], lengths=[4096])


def test_making_is_fast(prompts: str) -> None:
    tasks = tuple(task for task in WITHOUT_FILES if task != "cwe")
    Ruler(tasks=tasks, prompt_dir=prompts, limit=1).examples(None)  # reads the word lists
    start = time.perf_counter()
    assert len(Ruler(tasks=tasks, prompt_dir=prompts, limit=40).examples(None)) == 200
    assert time.perf_counter() - start < 0.1 * 200


# --- settings, templates, files


def test_it_is_registered_with_the_tasks_that_need_no_file() -> None:
    assert BENCHMARKS.get("ruler") is Ruler
    assert Ruler().tasks == ("niah_single_1", "niah_multikey_2", "niah_multikey_3", "vt", "cwe", "fwe")
    assert Ruler(tasks=["vt"], lengths=[512]).lengths == (512,)  # type: ignore[arg-type]
    assert len(TASKS) == 13
    assert Ruler().longest_prompt(4096) is None
    assert Ruler(max_length=77).longest_prompt(4096) == 77


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tasks": ["niah_singel_1"]}, "did you mean 'niah_single_1'"),
        ({"tasks": []}, "must name each task once"),
        ({"lengths": []}, "at least 512"),
        ({"lengths": [511]}, "at least 512"),
        ({"lengths": [4096, 4096]}, "different lengths"),
        ({"examples_per_task": 0}, "benchmark.examples_per_task=0 must be at least 1"),
        ({"protocol": "kvpres"}, "did you mean 'kvpress'"),
        ({"source": "hubb"}, "did you mean 'hub'"),
        ({"revision": "main"}, "benchmark.revision=main has no effect on source=generated"),
        ({"source": "hub", "seed": 1}, "benchmark.seed=1 has no effect on source=hub; leave it at 42"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Ruler(**settings)


@pytest.mark.parametrize(
    ("task", "name"),
    [
        ("niah_single_2", "PaulGrahamEssays.json or PaulGrahamEssays.txt"),
        ("niah_multiquery", "PaulGrahamEssays.json"),
        ("qa_1", "dev-v2.0.json"),
        ("qa_2", "hotpot_dev_distractor_v1.json"),
    ],
)
def test_missing_files_are_named(tmp_path: Path, monkeypatch, task: str, name: str) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match=re.escape(f"benchmark.tasks: {task} needs")) as error:
        Ruler(tasks=("vt", task), data_dir=str(tmp_path)).examples(None)
    assert f"put {name}" in str(error.value)
    with pytest.raises(DataError, match="is not a directory"):
        Ruler(tasks=(task,), data_dir=str(tmp_path / "none")).examples(None)


@pytest.mark.parametrize(
    ("task", "name", "content", "message"),
    [
        ("niah_single_2", "PaulGrahamEssays.json", '{"texts": "a"}', "must hold the essays"),
        ("niah_single_2", "PaulGrahamEssays.json", '{"text": ', "is no JSON file"),
        ("niah_single_2", "PaulGrahamEssays.txt", " \n", "must hold the essays"),
        ("qa_1", "dev-v2.0.json", '{"data": [{"paragraph": []}]}', "not in the form of SQuAD"),
        ("qa_1", "dev-v2.0.json", '{"data": []}', "no question"),
        ("qa_2", "hotpotqa.json", '[{"context": [["a"]]}]', "not in the form of HotpotQA"),
        ("qa_2", "hotpotqa.json", "[[", "is no JSON file"),
        ("cwe", "english_words.json", '{"a": 1}', "JSON list of words"),
    ],
)
def test_broken_files_are_named(
    tmp_path: Path, prompts: str, task: str, name: str, content: str, message: str
) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message) as error:
        Ruler(tasks=(task,), data_dir=str(tmp_path), prompt_dir=prompts).examples(None)
    assert name in str(error.value)


def test_plain_text_essays_are_the_same(made, tmp_path: Path) -> None:
    (tmp_path / "PaulGrahamEssays.txt").write_text(ESSAY)
    assert made(tasks=["niah_single_2"], data_dir=str(tmp_path)) == made(tasks=["niah_single_2"])


def test_templates_keep_braces_of_the_context() -> None:
    template = Template("see {query}: ", "\n", "Q: {query} {{x}}?", " A", 5)
    parts = template.filled("a {query} {b", ("z",), before="before {c}\n", query="{d}")
    assert parts.context == "before {c}\nsee {d}: a {query} {b\n"
    assert parts.question == "Q: {d} {x}?"
    assert parts.text == parts.context + parts.question + " A"


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("TASKS = dict(a=1)", "no dictionary TASKS"),
        ("TASKS = {'vt': 1}", "lacks"),
        ("TASKS = {'vt': {'template': '{context}', 'answer_prefix': ''}}", "tokens_to_generate"),
        ("TASKS = {'vt': {'template': 'a', 'answer_prefix': '', 'tokens_to_generate': 1}}", "context} once"),
        ("TASKS = {}", "TASKS lacks 'variable_tracking'"),
        ("TASKS = (", "is no Python"),
    ],
)
def test_broken_templates_are_named(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / PROMPTS.path
    file.parent.mkdir(parents=True)
    file.write_text(content)
    with pytest.raises(DataError, match=re.escape(message)):
        Ruler(tasks=("vt",), prompt_dir=str(tmp_path)).examples(None)


def test_unknown_placeholders_are_named(prompts: str) -> None:
    with pytest.raises(DataError, match=r"can't be filled in .*'query'.*known are context, other"):
        read_templates(prompts)["qa"].filled("", (), other=1)


def test_the_record_says_what_the_prompts_were_made_of(prompts: str, data: str) -> None:
    ruler = Ruler(tasks=TASKS, prompt_dir=prompts, data_dir=data)
    found = ruler.identity()
    assert len(found["prompts"]) == 16
    assert found["words"] == "wonderwords 3.0.1"
    assert set(found["data"]) == {
        "PaulGrahamEssays.json",
        "dev-v2.0.json",
        "hotpot_dev_distractor_v1.json",
    }
    assert Ruler().identity()["prompts"] == f"NVIDIA/RULER@{PROMPTS.commit}"
    assert f"{PROMPTS.path} is not the one of NVIDIA/RULER" in " ".join(ruler.notes())
    assert Ruler().notes() == []
    assert {path.name for path in ruler.files()} == {"constants.py", *found["data"]}
    assert all(path.is_file() for path in ruler.files())


# --- rows of the Hub


def hub_rows(count: int) -> list[dict]:
    def row(task: str, i: int) -> dict:
        text = {"context": f"c{i}\n", "question": f"q{i} {task}", "answer_prefix": " is"}
        return {**text, "answer": [f"a{i}", "b"], "task": task, "max_new_tokens": 60}

    return [row(task, i) for task in ("vt", "qa_1", "fwe") for i in range(count)]


@pytest.mark.parametrize("form", ["jsonl", "parquet"])
def test_rows_of_the_hub_are_read_from_local_files(tmp_path: Path, form: str) -> None:
    write_rows(tmp_path, form, hub_rows(4))
    ruler = Ruler(source="hub", tasks=("qa_1", "vt"), lengths=(8192,), limit=2, data_dir=str(tmp_path))
    found = ruler.examples(None)
    assert [(e.task, e.id) for e in found] == [
        ("qa_1_8192", "0"),
        ("qa_1_8192", "1"),
        ("vt_8192", "0"),
        ("vt_8192", "1"),
    ]
    assert found[1].prompt == "c1\nq1 qa_1 is"
    assert found[1].answers == ("a1", "b")
    assert found[1].max_new_tokens == 60
    assert (found[1].metric, found[2].metric) == ("string_match_part", "string_match_all")
    assert found[1].extra == {"length": 8192}
    assert len(ruler.identity()["data"]["8192"]) == 16
    assert ruler.files() == [tmp_path / f"8192.{form}"]
    with pytest.raises(DataError, match="no row of task cwe"):
        Ruler(source="hub", tasks=("cwe",), lengths=(8192,), data_dir=str(tmp_path)).examples(None)


def write_rows(place: Path, form: str, rows: list[dict]) -> None:
    file = place / f"8192.{form}"
    if form == "jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), file)


@pytest.mark.parametrize(
    ("field", "value"), [("context", None), ("answer", []), ("answer", [1]), ("max_new_tokens", "9")]
)
def test_broken_rows_are_named_or_counted(tmp_path: Path, field: str, value: Any) -> None:
    rows = hub_rows(3)
    rows[1] = {**rows[1], field: value}
    write_rows(tmp_path, "jsonl", rows)
    settings: dict[str, Any] = {
        "source": "hub",
        "tasks": ("vt",),
        "lengths": (8192,),
        "data_dir": str(tmp_path),
    }
    with pytest.raises(DataError, match=f"row 2, field '{field}'"):
        Ruler(**settings).examples(None)
    ruler = Ruler(**settings, skip_bad_rows=True)
    assert [e.question for e in ruler.examples(None)] == ["q0 vt", "q2 vt"]
    assert [note[:9] for note in ruler.notes()] == ["1 broken "]


def test_rows_are_fetched_by_commit(tmp_path: Path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    root = tmp_path / "snapshots" / "c0ffee"
    (root / "4096").mkdir(parents=True)
    write_rows(root / "4096", "parquet", hub_rows(1))
    asked = []

    def download(repo: str, **how: Any) -> str:
        asked.append((repo, how["revision"], how["allow_patterns"]))
        return str(root)

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    ruler = Ruler(source="hub", tasks=("vt",), lengths=(4096,), revision="v1")
    assert [e.task for e in ruler.examples(None)] == ["vt_4096"]
    assert ruler.identity() == {"data": {"4096": "simonjegou/ruler@c0ffee"}}
    assert asked == [("simonjegou/ruler", "v1", ["4096/*.parquet"])] * 2
    with pytest.raises(DataError, match="no rows of length 8192"):
        Ruler(source="hub", tasks=("vt",), lengths=(8192,)).examples(None)


def test_no_network_says_how_to_go_on(tmp_path: Path, monkeypatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def download(repo: str, **how: Any) -> str:
        raise OSError("offline")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "snapshot_download", download)
    with pytest.raises(DataError, match=r"runner=fetch .*4096.parquet or 4096.jsonl into benchmark.data_dir"):
        Ruler(source="hub").examples(None)

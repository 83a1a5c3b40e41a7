"""The needle: it lies where it was asked, prompts have their length, scores are as worked out by hand."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import re
from pathlib import Path
from random import Random
from typing import Any

import pytest

from hcache import benchmarks
from hcache.benchmarks import BENCHMARKS, Example
from hcache.benchmarks.base import tree_mean
from hcache.benchmarks.needle import Needle
from hcache.benchmarks.needle_text import Files, Prose, Tokens, fitted
from hcache.benchmarks.scoring.needle import recall, rouge1
from hcache.tiny.tokenizer import byte_tokenizer
from runners.config import RunConfig, register
from runners.plan import compose_all

DEPTHS = (0, 12.5, 33, 50, 75, 99, 100)


class Words:
    """A tokenizer of pieces of up to four letters, with a start token; every text comes back whole."""

    def __init__(self, pattern: str = r"\w{1,4}|\W") -> None:
        self._pattern = re.compile(pattern, re.DOTALL)
        self._pieces: list[str] = ["<s>"]

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        found = [self._id(piece) for piece in self._pattern.findall(text)]
        return [0, *found] if add_special_tokens else found

    def decode(self, ids: list[int], **options: Any) -> str:
        return "".join(self._pieces[i] for i in ids)

    def _id(self, piece: str) -> int:
        if piece not in self._pieces:
            self._pieces.append(piece)
        return self._pieces.index(piece)


def pairs() -> Words:
    """Every two characters are a token, so that tokens merge over all seams."""
    return Words(".{1,2}")


def parts(benchmark: Needle, example: Example) -> tuple[str, str]:
    """The text before the needle and the text after it."""
    text = example.context.removeprefix(benchmark.prefix)
    if benchmark.suffix:
        text = text.removesuffix(benchmark.suffix)
    before, after = text.split(example.extra["needle"])
    return before, after


# --- where the needle lies


def test_the_needle_follows_the_last_full_stop_before_its_depth() -> None:
    benchmark = Needle(lengths=(1024, 3001), depths=DEPTHS, examples_per_depth=3)
    for example in benchmark.examples(None):
        before, after = parts(benchmark, example)
        text, depth = before + after, example.extra["depth"]
        target = int(len(text) * depth / 100)
        end = len(text) if depth == 100 else text.rfind(".", 0, target) + 1
        assert len(before) == end
        assert example.extra["placed"] == round(100 * end / len(text), 2)
        assert 0 <= target - end < 400


def test_start_and_end_are_just_that() -> None:
    benchmark = Needle(lengths=(1500,), depths=(0, 100))
    start, end = benchmark.examples(None)
    assert start.context.startswith(benchmark.prefix + benchmark.needle)
    assert end.context.endswith(benchmark.needle + benchmark.suffix)


def test_a_sentence_ends_with_a_token_that_ends_in_a_full_stop(tmp_path: Path) -> None:
    haystack = tmp_path / "text.txt"
    haystack.write_text("One two. Three four five six seven eight nine ten " * 40)
    tokenizer = Words(r"\w+|\W+")  # ". " is one token
    settings = {"needle": "<here>", "answer": "<here>", "question": "?", "prefix": "", "suffix": ""}
    benchmark = Needle(lengths=(300,), depths=(50,), haystack=str(haystack), **settings)
    (example,) = benchmark.examples(tokenizer)
    before, after = parts(benchmark, example)
    assert before.endswith("One two. ")
    assert after.startswith("Three four")
    assert 0 <= 50 - example.extra["placed"] < 100 * 21 / 300


def test_text_without_a_full_stop_has_the_needle_at_its_start(tmp_path: Path) -> None:
    haystack = tmp_path / "text.txt"
    haystack.write_text("no end to it " * 100)
    benchmark = Needle(lengths=(900,), depths=(80,), haystack=str(haystack))
    (example,) = benchmark.examples(None)
    assert parts(benchmark, example)[0] == ""
    assert example.extra["placed"] == 0


# --- lengths


@pytest.mark.parametrize("length", [700, 1024, 2777])
def test_prompts_have_exactly_the_length_in_bytes(length: int) -> None:
    for example in Needle(lengths=(length,), depths=DEPTHS).examples(None):
        assert len(example.prompt.encode()) == length == example.extra["length"]
    for example in Needle(lengths=(length,), depths=(40,)).examples(byte_tokenizer()):
        assert len(byte_tokenizer().encode(example.prompt)) == length


@pytest.mark.parametrize("tokenizer", [Words(), pairs()], ids=["words", "pairs"])
@pytest.mark.parametrize("length", [300, 1025, 2000])
def test_prompts_stay_just_below_the_length_in_other_tokens(tokenizer: Words, length: int) -> None:
    benchmark = Needle(lengths=(length,), depths=DEPTHS, examples_per_depth=2)
    for example in benchmark.examples(tokenizer):
        assert length - 2 <= len(tokenizer.encode(example.prompt)) <= length
        before, after = parts(benchmark, example)
        total = len(tokenizer.encode(before + after, add_special_tokens=False))
        reached = len(tokenizer.encode(before, add_special_tokens=False)) / total
        assert reached <= example.extra["depth"] / 100 + 1 / total
        assert example.extra["depth"] / 100 - reached < 200 / total


def test_a_buffer_bounds_text_and_needle_and_leaves_the_rest() -> None:
    benchmark = Needle(lengths=(1200,), depths=(50,), buffer_tokens=300)
    (example,) = benchmark.examples(None)
    before, after = parts(benchmark, example)
    assert len(before) + len(example.extra["needle"]) + len(after) == 900
    assert benchmark.prompt_lengths() is None


@pytest.mark.parametrize("seed", range(20))
def test_a_size_is_found_however_tokens_merge(seed: int) -> None:
    """A tokenizer that makes some more or less of every size: the size found fits, and by little."""
    noise = [Random(f"{seed}-{size}").randrange(-4, 5) for size in range(2000)]
    for limit in (50, 500, 1500):
        size = fitted(lambda size: size + noise[size], limit, limit - seed, 1900)
        assert size is not None
        assert 0 <= limit - size - noise[size] <= 8


def test_no_more_is_taken_than_there_is_and_nothing_where_nothing_fits() -> None:
    assert fitted(lambda size: size, 500, 90, 100) == 100
    assert fitted(lambda size: size + 500, 400, 30, 100) is None
    assert fitted(lambda size: 500, 400, 30, 100) is None


def test_lengths_are_known_ahead_only_where_the_whole_prompt_is_compressed() -> None:
    assert Needle(lengths=(600, 900)).prompt_lengths() == (600, 900)
    assert Needle(lengths=(600, 900), tasks=("needle_900",)).prompt_lengths() == (900,)
    assert Needle(query_aware=False).prompt_lengths() is None
    assert Needle(protocol="chat").prompt_lengths() is None


def test_a_character_cut_in_two_is_left_out() -> None:
    text = "Ünïcödé – äöü. "
    for tokens in (Tokens(None), Tokens(byte_tokenizer())):
        ids = tokens.ids(text)
        found = [tokens.text(ids[:count]) for count in range(len(ids) + 1)]
        assert all(text.startswith(start) for start in found)
        assert (found[0], found[1], found[-1]) == ("", "", text)


def test_how_much_prose_is_asked_for_changes_none_of_it() -> None:
    tokens = Tokens(Words(r"\w+|\W+"))
    longest = Prose(tokens).ids("name", 600)
    for count in range(1, 400):
        assert Prose(tokens).ids("name", count) == longest[:count]
    assert Prose(tokens).ids("other", 600) != longest


# --- the examples


def test_the_prompts_are_the_same_everywhere() -> None:
    prompts = "".join(e.prompt + "|".join(e.answers) for e in Needle().examples(None))
    assert hashlib.sha256(prompts.encode()).hexdigest()[:16] == "e49693ede7cd18bb"


def test_every_length_goes_through_all_depths_before_it_repeats_one() -> None:
    found = Needle(lengths=(600, 900), depths=(0, 100), examples_per_depth=2).examples(None)
    assert [(e.task, e.id) for e in found] == [
        (task, name) for task in ("needle_600", "needle_900") for name in ("0-0", "100-0", "0-1", "100-1")
    ]
    for example in found:
        assert (example.stop, example.max_new_tokens, example.chat, example.system) == (
            ("\n",),
            30,
            False,
            None,
        )
        json.dumps(example.extra)


@pytest.mark.parametrize("tokenizer", [None, Words()], ids=["bytes", "words"])
def test_more_examples_change_none(tokenizer: Words | None) -> None:
    def by_key(**settings: Any) -> dict[tuple[str, str], Example]:
        settings = {"lengths": (900,), "depths": (25, 75), **settings}
        return {(e.task, e.id): e for e in Needle(**settings).examples(tokenizer)}

    few = by_key()
    for more in (
        by_key(examples_per_depth=3),
        by_key(limit=2, examples_per_depth=2),
        by_key(lengths=(2000, 900), query_aware=False),
        by_key(lengths=(2000, 900), tasks=("needle_900",)),
        by_key(depths=(75, 0, 25)),
    ):
        assert all(more[key] == example for key, example in few.items())
    assert len(by_key(limit=1, examples_per_depth=5)) == 1
    assert {task for task, _ in by_key(lengths=(2000, 900), tasks=("needle_900",))} == {"needle_900"}
    other = by_key(seed=1)
    assert not any(other[key].context == few[key].context for key in few)


def test_fields_are_drawn_for_every_example_and_agree_in_it() -> None:
    settings = {"needle": "\nRoom {key} has number {value}.\n", "answer": "number {value}."}
    benchmark = Needle(lengths=(700,), depths=(50,), examples_per_depth=20, question="{key}?", **settings)
    found = benchmark.examples(None)
    for example in found:
        key, value = re.findall(r"\nRoom ([a-z]{4}) has number (\d{4})\.\n", example.context)[0]
        assert example.question == f"{key}?"
        assert example.answers == (f"number {value}.",)
        assert "{" not in example.prompt
    assert len({example.question for example in found}) == 20


def test_the_metric_says_what_is_compared_with() -> None:
    (example,) = Needle(lengths=(700,), depths=(50,), metric="rouge1").examples(None)
    assert example.metric == "rouge1"
    assert example.answers == (Needle().needle,)


def test_chat_and_its_system_message_are_handed_on() -> None:
    benchmark = Needle(lengths=(700,), depths=(50,), protocol="chat", system="Be brief.")
    (example,) = benchmark.examples(None)
    assert (example.chat, example.system) == (True, "Be brief.")
    assert example.context.startswith(benchmark.prefix)
    assert example.question == benchmark.question


def test_postprocessing_cuts_at_the_line_and_strips() -> None:
    (example,) = Needle(lengths=(700,), depths=(50,)).examples(None)
    assert Needle().postprocess(" in a teapot. \nQuestion:", example) == "in a teapot."


# --- haystacks of a user


def haystack_of(directory: Path, **texts: str) -> Path:
    directory.mkdir(exist_ok=True)
    for name, text in texts.items():
        (directory / f"{name}.txt").write_text(text, encoding="utf-8")
    return directory


def test_files_are_joined_in_the_order_of_their_names_and_repeated(tmp_path: Path) -> None:
    place = haystack_of(tmp_path / "texts", b="Second. ", a="First. ", c="Third. ")
    (place / "notes.md").write_text("not this")
    benchmark = Needle(lengths=(700,), depths=(100,), haystack=str(place))
    (example,) = benchmark.examples(None)
    before, after = parts(benchmark, example)
    whole = "First. Second. Third. "
    assert not after
    assert before == (whole * 40)[: len(before)]
    assert example.extra["repeats"] == -(-len(before) // len(whole))
    assert [path.name for path in benchmark.files()] == ["a.txt", "b.txt", "c.txt"]
    assert benchmark.notes() == [
        f"haystack of 3 files, {len(whole)} bytes, as often as a line's `repeats` says"
    ]
    (one,) = Needle(lengths=(700,), depths=(100,), haystack=str(place / "b.txt")).examples(None)
    assert parts(benchmark, one)[0].startswith("Second. Second. ")


def test_repeating_gives_as_many_tokens_as_asked_where_they_merge_over_the_seam(tmp_path: Path) -> None:
    place = haystack_of(tmp_path / "texts", a="odd, a length. ")  # 15 characters: 8 pairs, but twice are 15
    text = Files(Tokens(pairs()), [place / "a.txt"])
    for count in (7, 8, 9, 16, 17, 1000):
        assert len(text.ids("any", count)) == count
    assert [text.repeats(count) for count in (1, 8, 9)] == [1, 1, 2]


def test_identity_is_what_the_haystack_holds(tmp_path: Path) -> None:
    here, there = (haystack_of(tmp_path / name, a="Same. ") for name in ("here", "there"))
    other = haystack_of(tmp_path / "other", a="Other. ")
    identities = [Needle(haystack=str(place)).identity() for place in (here, there, other)]
    assert identities[0] == identities[1] != identities[2]
    assert Needle().identity() == {"haystack_content": "generated"}
    assert Needle().files() == Needle().notes() == []


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("missing", None, "is neither a file nor a directory with *.txt files"),
        ("blank.txt", b" \n", "holds no text"),
        ("latin.txt", b"caf\xe9.", "latin.txt is no UTF-8 text"),
    ],
)
def test_a_haystack_that_cannot_be_read_is_named(
    tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=re.escape(message)):
        Needle(haystack=str(tmp_path / name)).examples(None)


# --- errors


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lengths": []}, "benchmark.lengths=[] must name one or more different lengths"),
        ({"lengths": [900, 900]}, "different lengths"),
        ({"lengths": [0]}, "different lengths"),
        ({"depths": []}, "benchmark.depths=[] must name one or more different depths"),
        ({"depths": [50, 101]}, "each from 0 (start) to 100 (end) percent"),
        ({"depths": [-1]}, "each from 0"),
        ({"depths": [float("nan")]}, "each from 0"),
        ({"depths": [50, 50.0]}, "different depths"),
        ({"tasks": ["needle_248"]}, "did you mean 'needle_2048'"),
        ({"tasks": ["needle_2048", "needle_2048"]}, "must name each task once"),
        ({"limit": 0}, "benchmark.limit=0 must be at least 1"),
        ({"examples_per_depth": 0}, "benchmark.examples_per_depth=0 must be at least 1"),
        ({"max_new_tokens": 0}, "benchmark.max_new_tokens=0 must be at least 1"),
        ({"buffer_tokens": -1}, "benchmark.buffer_tokens=-1 must be at least 0"),
        ({"protocol": "chta"}, "did you mean 'chat'"),
        ({"metric": "rouge"}, "did you mean 'rouge1'"),
        ({"needle": " "}, "benchmark.needle is empty"),
        ({"question": ""}, "benchmark.question is empty"),
        ({"answer": "in a red teapot"}, "benchmark.answer has 'red', which is no word of benchmark.needle="),
        ({"answer": "piano"}, "benchmark.answer has 'piano'"),
        ({"question": "What of {key}?"}, "benchmark.question has {key} and benchmark.needle lacks it"),
        ({"system": "Be brief."}, "benchmark.system has no effect with benchmark.protocol=plain"),
        ({"examples_per_depth": 2, "haystack": "x"}, "would repeat one prompt"),
        ({"lenghts": [900]}, "did you mean 'lengths'"),
        ({"lengths": [200]}, "benchmark.lengths=200 is too short"),
        ({"lengths": [900], "buffer_tokens": 20}, "benchmark.buffer_tokens=20 must be at least"),
        ({"lengths": [310], "buffer_tokens": 300}, "benchmark.lengths=310 is too short"),
    ],
)
def test_bad_settings_say_what_is_allowed(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        benchmarks.load("needle", **settings)
    assert "\n" not in str(caught.value)


def test_a_length_is_too_short_by_one_token_or_long_enough() -> None:
    with pytest.raises(ValueError, match="too short") as caught:
        Needle(lengths=(100,)).examples(None)
    least = int(re.findall(r"take (\d+) tokens", str(caught.value))[0])
    with pytest.raises(ValueError, match="too short"):
        Needle(lengths=(least,)).examples(None)
    (example, *_) = Needle(lengths=(least + 1,)).examples(None)
    assert len(example.prompt) == least + 1


# --- scores


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("in a blue teapot under the piano.", 1.0),
        ("In a BLUE teapot,  under the piano.", 6 / 7),  # "teapot," is another word
        ("under the piano", 2 / 7),  # so is "piano"
        ("the the the", 1 / 7),
        ("It is in a blue teapot under the piano. the piano. of course", 1.0),
        ("a red jug", 1 / 7),
        ("", 0.0),
    ],
)
def test_recall_by_hand(response: str, score: float) -> None:
    assert recall(response, "In a blue teapot under the piano.") == pytest.approx(score, abs=1e-12)
    assert benchmarks.score("needle", "needle_4096", response, [Needle().answer]) == pytest.approx(score)


def test_recall_counts_different_words() -> None:
    assert recall("tick", "tick tick tock") == 0.5


@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("The keys are hidden.", 1.0),  # case, punctuation and the plural are nothing
        ("The keys are hiding", 3 / 4),  # hide is not hidden
        ("keys", 2 / 5),  # precision 1, recall 1/4
        ("the the key is here", 4 / 9),  # the once, key; 2 of 5 and 2 of 4
        ("", 0.0),
    ],
)
def test_rouge1_by_hand(response: str, score: float) -> None:
    """Words of letters and digits, stemmed where longer than three letters, each as often as in both."""
    assert rouge1(response, "The key, are: HIDDEN") == pytest.approx(score)


def test_scoring_by_rule_and_by_example() -> None:
    (example,) = Needle(lengths=(700,), depths=(50,), metric="rouge1").examples(None)
    said = "in a blue teapot under the piano."
    by_example = Needle().score(example, said, example.answers)
    assert by_example == Needle().score(example.task, said, example.answers, **example.extra)
    assert by_example == pytest.approx(2 * 7 / (7 + 18))  # the needle has 18 words, the answer 7 of them
    assert Needle(metric="rouge1").score("needle_700", said, example.answers) == by_example


@pytest.mark.parametrize(
    ("task", "answers", "extra", "message"),
    [
        ("nedle_2048", ["a"], {}, "did you mean 'needle_2048'"),
        ("needle_long", ["a"], {}, "unknown task 'needle_long'"),
        ("needle_64", ["a", "b"], {}, "compares with one text; got 2"),
        ("needle_64", ["a"], {"rule": "recal"}, "did you mean 'recall'"),
        ("needle_64", [" "], {}, "at least one word"),
    ],
)
def test_what_cannot_be_scored_is_said(
    task: str, answers: list[str], extra: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        benchmarks.score("needle", task, "a", answers, **extra)


def test_averages_are_means_of_fields() -> None:
    grid = {(600, 0.0): [1.0, 0.0], (600, 50.0): [1.0], (900, 0.0): [0.25], (900, 50.0): [0.0]}
    lines = [
        {"task": f"needle_{length}", "length": length, "depth": depth, "score": score}
        for (length, depth), scores in grid.items()
        for score in scores
    ]
    found = {name: tree_mean(tree) for name, tree in Needle().aggregates(lines).items()}
    assert found == {
        "overall": (0.5 + 1 + 0.25 + 0) / 4,
        "length_600": 0.75,
        "length_900": 0.125,
        "depth_0": 0.375,
        "depth_50": 0.5,
    }
    assert Needle().aggregates([]) == {}
    assert benchmarks.aggregate("needle", {"needle_600": 75.0, "needle_900": 12.5}) == 43.75


# --- what is shipped


def composed(*lines: str) -> list[RunConfig]:
    register()
    return compose_all(lines, multirun=len(lines) > 1)


def test_the_file_says_the_defaults_of_the_class() -> None:
    (run,) = composed("benchmark=needle")
    assert run.benchmark == Needle()


def test_the_embedded_models_file_is_in_its_format_and_can_be_answered() -> None:
    (run,) = composed("benchmark=needle_tiny")
    shorter = dataclasses.replace(run.benchmark, lengths=(1024,))
    found = shorter.examples(None)
    assert len(found) == 4 * 9
    for example in found:
        asked = re.fullmatch(r"\nQ: the code of (\w{4}) is ", example.question)
        assert asked is not None
        said = re.findall(rf"\nThe code of {asked[1]} is (\d{{4}})\.\n", example.context)
        assert len(said) == 1
        assert Needle().score(example, f"{said[0]}.", example.answers) == 1.0
        assert Needle().score(example, f"{int(said[0]) ^ 1:04d}.", example.answers) == 0.0


def test_the_experiment_runs_three_methods_on_it() -> None:
    runs = composed("experiment=needle_tiny", "tracker=none")
    assert [run.method.name for run in runs] == ["fullkv", "snapkv", "heterocache"]
    assert all(type(run.benchmark) is Needle and run.budget.kept_fraction == 0.25 for run in runs)
    assert {run.tag for run in runs} == {"needle_tiny"}


def test_it_is_registered_and_frozen() -> None:
    assert BENCHMARKS.get("needle") is Needle
    assert Needle.name == "needle"
    assert Needle(lengths=[900], depths=[1, 2]).depths == (1.0, 2.0)  # type: ignore[arg-type]
    with pytest.raises(dataclasses.FrozenInstanceError):
        Needle().seed = 1  # type: ignore[misc]

"""LongBench's scores: by hand, at their edges, and against slow references written another way."""

from __future__ import annotations

import builtins
import itertools
import math
import random
import sys
import warnings
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest

from hcache.benchmarks.scoring import longbench as scoring
from hcache.benchmarks.scoring.longbench import (
    best,
    classification,
    code_sim,
    count,
    cut_chinese,
    first_line,
    qa_f1_zh,
    retrieval,
    retrieval_zh,
    rouge_l,
    rouge_zh,
)
from hcache.benchmarks.scoring.words import qa_f1

# --- F1


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("The Red fox.", "red fox", 1.0),
        ("a red fox runs", "red fox", 0.8),  # precision 2/3, recall 1
        ("red red red", "red red blue", 2 / 3),  # multisets: two in common
        ("a theatre and an anthem", "theatre anthem", 0.8),  # articles are whole words
        ("re-d fox", "red fox", 1.0),  # punctuation goes without leaving a space
        ("“red” fox", "red fox", 0.5),  # other punctuation than ASCII stays
        ("red—fox", "red fox", 0.0),
        ("", "red", 0.0),
        ("the", "a", 0.0),
        ("red\n\tfox", "red fox", 1.0),
        ("blue", "red", 0.0),
    ],
)
def test_f1_of_words(prediction: str, answer: str, score: float) -> None:
    assert qa_f1(prediction, answer) == pytest.approx(score, abs=1e-12)


def test_f1_is_symmetric_and_does_not_depend_on_order() -> None:
    rng = random.Random(1)
    for _ in range(200):
        said, right = ([rng.choice(["abcde", "the", "Fox,"]) for _ in range(rng.randint(1, 8))] for _ in "xy")
        forth = qa_f1(" ".join(said), " ".join(right))
        assert forth == pytest.approx(qa_f1(" ".join(right), " ".join(said)))
        assert forth == pytest.approx(qa_f1(" ".join(sorted(said)), " ".join(right)))
        assert 0 <= forth <= 1


def test_chinese_f1_drops_space_case_and_both_kinds_of_punctuation() -> None:
    assert qa_f1_zh("北京大学。", "北京大学") == 1.0
    assert qa_f1_zh("“ABC”, 北京 大学！", "abc北京大学") < 1.0  # cut before the space is dropped
    assert qa_f1_zh("ABC", "abc") == 1.0
    assert qa_f1_zh("ＡＢＣ", "abc") == 0.0  # fullwidth letters are others
    assert qa_f1_zh("。！？", "北京") == 0.0
    assert qa_f1_zh("", "北京") == 0.0


def test_chinese_punctuation_that_counts_as_a_word() -> None:
    """The official list has a closing double angle bracket, but not the opening one; nor the middle dot."""
    assert qa_f1_zh("北京》", "北京") == 1.0
    for kept in "《·〈〉．":
        assert qa_f1_zh(f"北京{kept}", "北京") == pytest.approx(2 / 3)
    for dropped in "！？｡。，；：、（）「」『』【】—–‘’“”…‧﹏.`~{}":
        assert qa_f1_zh(f"北京{dropped}", "北京") == 1.0


# --- ROUGE-L


def slow_rouge(prediction: str, answer: str) -> float:
    """By definition: lengths by trying every subsequence, the way back by recursion."""

    def sentences(text: str) -> list[tuple[str, ...]]:
        return [tuple(" ".join(part.split()).split(" ")) for part in text.split(".") if part != ""]

    @cache
    def longest(x: tuple[str, ...], y: tuple[str, ...]) -> int:
        for size in range(min(len(x), len(y)), 0, -1):
            if set(itertools.combinations(x, size)) & set(itertools.combinations(y, size)):
                return size
        return 0

    def back(x: tuple[str, ...], y: tuple[str, ...]) -> Iterator[str]:
        if not x or not y:
            return
        if x[-1] == y[-1]:
            yield x[-1]
            yield from back(x[:-1], y[:-1])
        elif longest(x[:-1], y) > longest(x, y[:-1]):
            yield from back(x[:-1], y)
        else:
            yield from back(x, y[:-1])

    said, right = sentences(prediction), sentences(answer)
    if not said or not right:
        return 0.0
    union = {word for r, s in itertools.product(right, said) for word in back(r, s)}
    p = len(union) / len(set(itertools.chain(*said)))
    r = len(union) / len(set(itertools.chain(*right)))
    return 2 * p * r / (p + r + 1e-8)


def test_rouge_equals_a_slow_reference() -> None:
    rng = random.Random(0)
    different = set()
    for _ in range(400):
        said, right = (
            " ".join(rng.choice(["a", "b", "c", "d", "A", ".", ". ", "b."]) for _ in range(rng.randint(0, 9)))
            for _ in "xy"
        )
        assert rouge_l(said, right) == pytest.approx(slow_rouge(said, right), abs=1e-12), (said, right)
        different.add(round(rouge_l(said, right), 3))
    assert len(different) > 12


@pytest.mark.parametrize(
    ("prediction", "answer", "score"),
    [
        ("one two three", "one two three", 0.999999995),
        ("", "one", 0.0),
        ("one", "", 0.0),
        ("...", "one", 0.0),
        ("one. ", "one", 2 / 3),  # what follows the full stop is a sentence of the word ""
        ("one. ", "one. ", 1.0),
        ("One", "one", 0.0),
        ("two one", "one two", 0.5),  # in common is one word of two
        ("one one one", "one", 1.0),  # words count once
        ("one two. three", "three one two", 1.0),  # the union over sentences
        ("one\ttwo\n three", "one two three", 1.0),
    ],
)
def test_rouge_by_hand(prediction: str, answer: str, score: float) -> None:
    assert rouge_l(prediction, answer) == pytest.approx(score, abs=2e-8)


def test_identical_texts_have_the_official_number() -> None:
    assert rouge_l("one two three", "one two three") == pytest.approx(0.999999995, abs=1e-12)


def test_the_way_back_goes_left_on_a_tie() -> None:
    """Either of two words could be in common; which one decides what the second sentence adds."""
    # Rows are the answer's words: going left drops the prediction's "one", and leaves "two".
    assert rouge_l("two one", "one two. two") == pytest.approx(2 * 0.5 * 0.5 / (1 + 1e-8), abs=1e-12)
    assert rouge_l("two one", "one two. one") == pytest.approx(1.0, abs=1e-7)


def test_long_sentences_are_scored_and_it_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    scoring._say_deep.cache_clear()
    numbers = [str(n) for n in range(3 * sys.getrecursionlimit())]
    assert rouge_l(" ".join(numbers), " ".join(numbers[::2])) == pytest.approx(2 / 3, abs=1e-3)
    rouge_l(" ".join(numbers), " ".join(numbers[:1100]))
    assert caplog.text.count("runs out of stack") == 1
    scoring._say_deep.cache_clear()
    caplog.clear()
    rouge_l(" ".join(numbers[:400]), " ".join(numbers[:400]))
    assert "stack" not in caplog.text


def test_chinese_rouge_is_that_of_the_words() -> None:
    words = ["北京", "大学", "在", "海淀"]
    assert cut_chinese("北京大学在海淀") == ["北京大学", "在", "海淀"]
    assert rouge_zh("北京大学在海淀", "海淀在北京大学") == pytest.approx(1 / 3, abs=1e-7)
    assert rouge_zh("".join(words), "".join(words)) == pytest.approx(0.999999995, abs=1e-12)
    assert rouge_zh("", "北京") == 0.0


def test_a_chinese_full_stop_ends_no_sentence() -> None:
    """In one sentence order counts across it; in two it does not."""
    whole = rouge_zh("我们去图书馆。他们回家", "他们回家。我们去图书馆")
    apart = rouge_zh("我们去图书馆.他们回家", "他们回家.我们去图书馆")
    assert whole < 0.8 < apart


# --- other metrics


def test_classes_are_removed_as_officially_every_other_one() -> None:
    assert classification("abcd", "abcd", ["a", "ab", "abc", "abcd"]) == 0.5
    assert classification("abcd", "abcd", ["a", "abcd"]) == 1.0
    assert classification("abcd", "abcd", ["abcd", "a"]) == 1.0
    assert classification("abcd", "abcd", ["a", "b", "c", "d", "abcd"]) == pytest.approx(1 / 3)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("It is a Food.", 1.0),
        ("food", 0.0),  # case counts
        ("Food or Sport", 0.5),
        ("Sport", 0.0),
        ("", 0.0),
        ("Food and Sport and Other", 1 / 3),
    ],
)
def test_named_classes_share_the_point(prediction: str, score: float) -> None:
    assert classification(prediction, "Food", ["Food", "Sport", "Other"]) == pytest.approx(score)


def test_a_class_listed_twice_counts_twice() -> None:
    assert classification("x", "x", ["x", "x"]) == 0.5
    assert classification("ab", "ab", ["a", "ab", "a"]) == 1.0


@pytest.mark.parametrize(
    ("metric", "prediction", "answer", "score"),
    [
        (retrieval, "Paragraph 15", "Paragraph 15", 1.0),
        (retrieval, "15", "Paragraph 15", 1.0),
        (retrieval, "Paragraph 15 or 16", "Paragraph 15", 0.5),
        (retrieval, "Paragraph 150", "Paragraph 15", 0.0),
        (retrieval, "none", "Paragraph 15", 0.0),
        (retrieval_zh, "段落27", "段落27", 1.0),
        (retrieval_zh, "是第27段，不是28", "段落27", 0.5),
        (count, "17", "17", 1.0),
        (count, "17.0", "17", 0.5),
        (count, "17 17 3 17", "17", 0.75),
        (count, "seventeen", "17", 0.0),
        (count, "", "17", 0.0),
        (count, "017", "17", 0.0),
    ],
)
def test_numbers(metric: Any, prediction: str, answer: str, score: float) -> None:
    assert metric(prediction, answer) == score


def test_an_answer_without_a_paragraph_is_an_error() -> None:
    with pytest.raises(ValueError, match="'15' names no paragraph"):
        retrieval("15", "15")
    with pytest.raises(ValueError, match="names no paragraph"):
        retrieval_zh("15", "Paragraph 15")


def slow_likeness(a: str, b: str) -> int:
    """Percent: twice the longest common subsequence over both lengths."""

    @cache
    def common(i: int, j: int) -> int:
        if not i or not j:
            return 0
        if a[i - 1] == b[j - 1]:
            return common(i - 1, j - 1) + 1
        return max(common(i - 1, j), common(i, j - 1))

    return round(100 * 2 * common(len(a), len(b)) / (len(a) + len(b)))


def test_code_is_compared_by_the_longest_common_subsequence() -> None:
    rng = random.Random(3)
    for _ in range(200):
        said, right = ("".join(rng.choice("ab (=") for _ in range(rng.randint(1, 12))) for _ in "xy")
        assert code_sim(said, right) == pytest.approx(slow_likeness(said, right) / 100, abs=0.0101)
        assert round(100 * code_sim(said, right)) == pytest.approx(100 * code_sim(said, right), abs=1e-9)


@pytest.mark.parametrize(
    ("prediction", "score"),
    [
        ("x = 1", 1.0),
        ("\n\nx = 1\ny = 2", 1.0),
        ("```python\n# set\nsee // below\nx = 1", 1.0),
        ("x = 1 # set\nx = 1", 1.0),
        (" \nx = 1", 0.33),  # a line of one space is the first; 2 of 6 characters
        ("  x = 1", 0.83),  # indentation counts: 10 of 12
        ("# only\n`this`", 0.0),
        ("", 0.0),
    ],
)
def test_the_first_line_of_code_counts(prediction: str, score: float) -> None:
    assert code_sim(prediction, "x = 1") == score


def test_first_line() -> None:
    assert first_line("\n\nred \nblue") == "red "
    assert first_line(" \nblue") == " "
    assert first_line("") == ""
    assert first_line("red\rblue") == "red\rblue"


# --- best of several


def test_the_best_answer_counts() -> None:
    assert best("qa_f1", "red fox", ["blue", "red", "fox red"]) == 1.0
    assert best("qa_f1", "red fox", ["blue", "red"]) == pytest.approx(2 / 3)
    assert best("classification", "Food", ["Sport", "Food"], ["Food", "Sport"]) == 1.0


def test_every_metric_is_a_share_of_anything() -> None:
    texts = ["", " ", ".", "\n", "Paragraph 3", "段落3", "a. b", "the", "\u3000", "😀", "x" * 300, "#", "٣"]
    for metric, prediction in itertools.product([*scoring.METRICS, "classification"], texts):
        value = best(metric, prediction, ["Paragraph 3 段落3"], ["Paragraph 3 段落3", "a"])
        assert 0 <= value <= 1
        assert math.isfinite(value)


@pytest.mark.parametrize(
    ("metric", "answers", "classes", "message"),
    [
        ("qa_f2", ["x"], None, "did you mean 'qa_f1'"),
        ("qa_f1", [], None, "needs one or more answers"),
        ("classification", ["x"], None, "needs all_classes"),
        ("classification", ["x"], [], "needs all_classes"),
    ],
)
def test_what_is_missing_is_said(metric: str, answers: list, classes: list | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        best(metric, "x", answers, classes)


def test_missing_jieba_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def without(name: str, *args: Any, **kwargs: Any) -> Any:
        if name == "jieba":
            raise ImportError(name)
        return real(name, *args, **kwargs)

    scoring.chinese_cutter.cache_clear()
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ValueError, match=r"pip install 'hcache\[zh\]'"):
        qa_f1_zh("北京", "北京")
    monkeypatch.undo()
    assert qa_f1_zh("北京", "北京") == 1.0


def test_jieba_says_nothing(capfd: pytest.CaptureFixture[str]) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scoring.chinese_cutter.cache_clear()
        assert cut_chinese("北京") == ["北京"]
    assert capfd.readouterr().err == ""

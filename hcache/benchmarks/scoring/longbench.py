"""Scores of LongBench (Bai et al. 2024, arXiv 2308.14508), 0 to 1 where the official ones are 0 to 100.

Written from the behaviour of `LongBench/metrics.py` and `eval.py` of github.com/THUDM/LongBench at 2e00731,
with their quirks; ROUGE-L is that of PyPI `rouge` 1.0.1, code similarity that of fuzzywuzzy with
python-Levenshtein. Knows no prompt and no file.
"""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

from hcache.benchmarks.scoring.words import bare_chinese, f1, qa_f1
from hcache.registry import unknown_name

log = logging.getLogger(__name__)

FIRST_LINE_TASKS = ("trec", "triviaqa", "samsum", "lsht")
"""Tasks of which only the first line of a prediction counts."""

CHINESE_METRICS = ("qa_f1_zh", "rouge_zh")
"""Metrics that need jieba."""

_OFFICIAL_DEPTH = 990
"""Steps back through one pair of sentences after which the official code overflows its stack and scores 0."""


def first_line(prediction: str) -> str:
    """What counts of a prediction in FIRST_LINE_TASKS: its first line after leading line breaks."""
    return prediction.lstrip("\n").split("\n")[0]


def best(
    metric: str, prediction: str, answers: Sequence[str], all_classes: Sequence[str] | None = None
) -> float:
    """The best score over the answers, at least 0.

    Args:
        metric: a name in METRICS, or `classification`, which needs `all_classes`.

    Raises:
        ValueError: an unknown metric, no answers, no classes, or an answer the metric can't read.
    """
    if not answers:
        raise ValueError(f"metric {metric} needs one or more answers")
    if metric == "classification":
        if not all_classes:
            raise ValueError("metric classification needs all_classes=[...], the names of the classes")
        return max(classification(prediction, answer, all_classes) for answer in answers)
    if metric not in METRICS:
        raise ValueError(unknown_name("metric", metric, [*METRICS, "classification"]))
    return max(METRICS[metric](prediction, answer) for answer in answers)


def qa_f1_zh(prediction: str, answer: str) -> float:
    """F1 of the words that jieba finds, without case, punctuation and space."""
    return f1(_chinese_words(prediction), _chinese_words(answer))


def _chinese_words(text: str) -> list[str]:
    return [bare for bare in map(bare_chinese, cut_chinese(text)) if bare]


def rouge_l(prediction: str, answer: str) -> float:
    """F of the words in the longest common subsequences of all pairs of sentences, as one set.

    The set is common to all pairs, so a word counts once however often it occurs. Case and endings count.
    """
    said, right = _sentences(prediction), _sentences(answer)
    if not said or not right:
        return 0.0
    common: set[str] = set()
    for sentence in right:
        for other in said:
            common |= _common_subsequence(sentence, other)
    precision = len(common) / len({word for sentence in said for word in sentence})
    recall = len(common) / len({word for sentence in right for word in sentence})
    return 2 * precision * recall / (precision + recall + 1e-8)


def rouge_zh(prediction: str, answer: str) -> float:
    """The same of the words that jieba finds; sentences still end at an ASCII full stop alone."""
    return rouge_l(" ".join(cut_chinese(prediction)), " ".join(cut_chinese(answer)))


def _sentences(text: str) -> list[list[str]]:
    """Words of every piece between full stops; a piece of nothing but space has the one word ""."""
    return [" ".join(piece.split()).split(" ") for piece in text.split(".") if piece]


def _common_subsequence(rows: list[str], columns: list[str]) -> set[str]:
    """Words of one longest common subsequence: traced back from the end, up only where that is longer."""
    lengths = [[0] * (len(columns) + 1)]
    for word in rows:
        above, current = lengths[-1], [0]
        for j, other in enumerate(columns):
            current.append(above[j] + 1 if word == other else max(above[j + 1], current[j]))
        lengths.append(current)
    words, i, j, steps = set(), len(rows), len(columns), 0
    while i and j:
        steps += 1
        if rows[i - 1] == columns[j - 1]:
            words.add(rows[i - 1])
            i, j = i - 1, j - 1
        elif lengths[i - 1][j] > lengths[i][j - 1]:
            i -= 1
        else:
            j -= 1
    if steps > _OFFICIAL_DEPTH:
        _say_deep()
    return words


@lru_cache(maxsize=1)
def _say_deep() -> None:
    """Once a process: a prediction without full stops can be one sentence."""
    log.warning(
        "a sentence of about %d words or more is scored by ROUGE-L; the official code gives its example 0 "
        "(it runs out of stack)",
        _OFFICIAL_DEPTH,
    )


def classification(prediction: str, answer: str, all_classes: Sequence[str]) -> float:
    """1 / (classes named) if the right one is named. Named classes that are part of the right one are taken
    out, but the official loop removes while it goes through the list, so the one after each is not looked at.
    """
    named = [name for name in all_classes if name in prediction]
    i = 0
    while i < len(named):
        if named[i] in answer and named[i] != answer:
            named.remove(named[i])  # the first of that name, should a class be listed twice
        i += 1
    return 1 / len(named) if answer in named else 0.0


def retrieval(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the one of "Paragraph N"."""
    return _share_of_numbers(prediction, _numbered(r"Paragraph (\d+)", answer))


def retrieval_zh(prediction: str, answer: str) -> float:
    """The same of "段落N"."""
    return _share_of_numbers(prediction, _numbered(r"段落(\d+)", answer))


def count(prediction: str, answer: str) -> float:
    """Share of the numbers in the prediction that are the answer; "17.0" has two numbers."""
    return _share_of_numbers(prediction, answer)


def _numbered(pattern: str, answer: str) -> str:
    found = re.search(pattern, answer)
    if found is None:
        raise ValueError(f"the answer {answer!r} names no paragraph as {pattern!r} does")
    return found[1]


def _share_of_numbers(prediction: str, wanted: str) -> float:
    numbers = re.findall(r"\d+", prediction)
    return numbers.count(wanted) / len(numbers) if numbers else 0.0


def code_sim(prediction: str, answer: str) -> float:
    """Likeness of the first line that is no comment and no fence: round(rapidfuzz ratio) / 100."""
    from rapidfuzz import fuzz

    lines = prediction.lstrip("\n").split("\n")
    code = next((line for line in lines if not any(mark in line for mark in ("`", "#", "//"))), "")
    return round(fuzz.ratio(code, answer)) / 100


def cut_chinese(text: str) -> list[str]:
    """The words that jieba finds.

    Raises:
        ValueError: jieba is not installed.
    """
    return list(chinese_cutter().cut(text))


@lru_cache(maxsize=1)
def chinese_cutter() -> Any:
    """jieba, silenced. Raises ValueError if it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its pkg_resources and of its escape sequences
            import jieba
    except ImportError as error:
        raise ValueError(
            "Chinese tasks of LongBench need jieba, which is not installed: pip install 'hcache[zh]', or run "
            "others (benchmark=longbench_en16)"
        ) from error
    jieba.setLogLevel(logging.CRITICAL + 10)
    return jieba


METRICS: dict[str, Callable[[str, str], float]] = {
    "qa_f1": qa_f1,
    "qa_f1_zh": qa_f1_zh,
    "rouge-l": rouge_l,
    "rouge_zh": rouge_zh,
    "retrieval": retrieval,
    "retrieval_zh": retrieval_zh,
    "count": count,
    "code_sim": code_sim,
}
"""Every metric that needs the prediction and an answer alone."""

"""RULER's scores: substrings, shares, empty predictions, averages of lengths."""

import re

import pytest

from hcache.benchmarks.base import BENCHMARKS, Benchmark, Example, tree_mean
from hcache.benchmarks.ruler import FAMILIES, OFFICIAL_LENGTHS, Ruler, split_name
from hcache.benchmarks.scoring.ruler import preprocessed, string_match_all, string_match_part


@pytest.mark.parametrize(
    ("prediction", "answers", "every", "some"),
    [
        ("alpha, beta and gamma", ["alpha", "beta", "gamma"], 1.0, 1.0),
        ("GAMMA. Beta", ["alpha", "beta", "gamma"], 2 / 3, 1.0),
        ("nothing", ["alpha", "beta"], 0.0, 0.0),
        ("12345678", ["1234567"], 1.0, 1.0),  # inside a longer number
        ("alphabet", ["ALPHA", "bet", "x"], 2 / 3, 1.0),  # inside one word, overlapping
        ("alpha alpha", ["alpha", "alpha", "beta"], 2 / 3, 1.0),  # a repeated answer counts each time
        ("", ["alpha"], 0.0, 0.0),
        ("alpha beta", ["alpha  beta"], 0.0, 0.0),  # space is compared as it is
    ],
)
def test_matches(prediction: str, answers: list[str], every: float, some: float) -> None:
    assert string_match_all(prediction, answers) == pytest.approx(every)
    assert string_match_part(prediction, answers) == some


@pytest.mark.parametrize("rule", [string_match_all, string_match_part])
def test_no_answer_is_an_error(rule) -> None:
    with pytest.raises(ValueError, match="at least one answer"):
        rule("text", [])


@pytest.mark.parametrize(
    ("raw", "official", "kvpress"),
    [
        ("  a b \n", "a b", "a b"),
        ("a\nb", "a\nb", "ab"),
        ("a\tb\x00c\x1fd\x20e\x7ff", "a\nb\nc\nd e\x7ff", "abcd e\x7ff"),
        ("\x00 a \x00", "a", "a"),
        ("\x01\x02", "", ""),
        ("", "", ""),
    ],
)
def test_control_characters(raw: str, official: str, kvpress: str) -> None:
    assert preprocessed(raw) == official == preprocessed(official)
    assert preprocessed(raw, "") == kvpress == preprocessed(kvpress, "")


def test_protocols_differ_in_line_breaks() -> None:
    example = Example("cwe_4096", "0", "", "", "", ("haystack",), 9, (), "string_match_all", {"length": 4096})
    for protocol, score in (("official", 0.0), ("kvpress", 1.0)):
        ruler = Ruler(protocol=protocol)
        assert ruler.score("cwe_4096", "hay\nstack", ["haystack"]) == score
        assert ruler.score(example, ruler.postprocess(" hay\nstack ", example), example.answers) == score


@pytest.mark.parametrize("task", FAMILIES)
def test_only_questions_take_any_answer(task: str) -> None:
    any_will_do = task.startswith("qa")
    for name in (task, f"{task}_4096", f"{task}_131072"):
        assert Ruler().score(name, "one", ["one", "two"]) == (1.0 if any_will_do else 0.5)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("niah_singel_1_4096", "did you mean 'niah_single_1'"),
        ("niah_4096", "unknown task 'niah'"),
        ("vt_", "did you mean 'vt'"),
        ("qa_3", "unknown task"),
        ("", "unknown task ''"),
    ],
)
def test_unknown_tasks_are_named(name: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        Ruler().score(name, "x", ["x"])


def test_names_of_rows() -> None:
    assert split_name("qa_1") == ("qa_1", None)
    assert split_name("qa_1_4096") == ("qa_1", 4096)
    assert split_name("niah_single_1_131072") == ("niah_single_1", 131072)


def line(task: str, length: int, score: float, prediction: str = "x") -> dict:
    return {"task": f"{task}_{length}", "length": length, "score": score, "prediction": prediction}


def test_a_length_is_the_mean_of_its_tasks_not_of_its_examples() -> None:
    lines = [
        line("vt", 8192, 1.0),
        line("vt", 4096, 1.0),
        line("vt", 4096, 0.0),
        line("vt", 4096, 0.5),
        line("cwe", 4096, 0.1, "  "),
    ]
    trees = Ruler().aggregates(lines)
    assert list(trees) == ["mean_4096", "mean_8192", "empty_predictions"]
    assert tree_mean(trees["mean_4096"]) == pytest.approx((0.5 + 0.1) / 2)
    assert tree_mean(trees["mean_8192"]) == 1.0
    assert trees["empty_predictions"] == [0.0, 0.0, 0.0, 0.0, 1.0]
    assert Ruler().aggregates([]) == {}


def official_table() -> tuple[dict[str, float], dict[int, float]]:
    """Llama-3.1-8B-Instruct by length, from RULER's own table, spread over two tasks."""
    means = dict(zip(OFFICIAL_LENGTHS, (95.5, 93.8, 91.6, 87.4, 84.7, 77.0), strict=True))
    rows = {f"vt_{n}": mean + 2 for n, mean in means.items()} | {f"cwe_{n}": m - 2 for n, m in means.items()}
    return rows, means


def test_published_averages_of_all_lengths() -> None:
    rows, _ = official_table()
    assert round(Ruler().aggregate(rows), 1) == 88.3
    assert round(Ruler().aggregate(rows, kind="wavg_inc"), 1) == 85.4
    assert round(Ruler().aggregate(rows, kind="wavg_dec"), 1) == 91.3


def test_averages_of_fewer_lengths() -> None:
    ruler: Benchmark = BENCHMARKS.get("ruler")()
    scores = {"vt_4096": 100.0, "cwe_4096": 50.0, "vt_8192": 25.0}
    assert ruler.aggregate(scores) == (75.0 + 25.0) / 2
    assert ruler.aggregate({"vt": 40.0, "cwe": 20.0}) == 30.0
    with pytest.raises(ValueError, match="wavg_inc needs the lengths 4096, .*131072; got 4096, 8192"):
        ruler.aggregate(scores, kind="wavg_inc")
    with pytest.raises(ValueError, match="did you mean 'wavg_dec'"):
        ruler.aggregate(scores, kind="wavg_dce")
    with pytest.raises(ValueError, match="no scores"):
        ruler.aggregate({})

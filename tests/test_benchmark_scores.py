"""How scores are asked for: every benchmark by name, answers in every shape, rules by keyword."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import hcache
from hcache.benchmarks import VARIANTS, aggregate, load, score
from hcache.benchmarks.longbench_tasks import E_TASKS, KV_PAPERS, TASKS

NAMES = ["ada", "bell", "cray", "dijkstra"]

ANSWERED: list[tuple[str, str, str, str, dict[str, Any]]] = [
    ("longbench", "qasper", "red fox", "a red fox", {"length": 300, "all_classes": None}),
    ("longbench", "gov_report", "the fox", "the fox", {}),
    ("longbench", "trec", "Food\nSport", "Food", {"all_classes": ["Food", "Sport"]}),
    ("longbench", "passage_count", "17", "17", {}),
    ("longbench", "passage_retrieval_en", "15", "Paragraph 15", {}),
    ("longbench", "lcc", "x = 1", "x = 1", {}),
    ("longbench_e", "qasper_e", "red fox", "a red fox", {"length": 3000}),
    ("longbench_e", "qasper", "red fox", "a red fox", {"length": 3000}),
    ("longbench_en16", "hotpotqa", "red fox", "a red fox", {}),
    (
        "longbench_v2",
        "longbench_v2",
        "The correct answer is (B)",
        "B",
        {"difficulty": "easy", "length": "long"},
    ),
    ("infinitebench", "passkey", "71432.", "71432", {}),
    ("infinitebench", "longbook_qa_eng", "red fox", "a red fox", {"rules": "2024-08"}),
    ("infinitebench", "longbook_choice_eng", "B", "bell", {"options": NAMES}),
    ("infinitebench", "code_debug", "B.", "bell", {"options": NAMES}),
    ("infinitebench", "longdialogue_qa_eng", "Lea", "LEA", {"options": []}),
    ("infinitebench", "code_run", "It is 4", "4", {}),
    ("ruler", "niah_single_1", "it is 1234567", "1234567", {}),
    ("ruler", "vt_4096", "ABCDE", "abcde", {"length": 4096}),
    ("ruler", "qa_1", "In Paris.", "paris", {}),
    ("needle", "needle_4096", "in a teapot", "in a teapot", {"length": 4096, "depth": 50.0}),
    ("needle", "needle", "in a teapot", "in a teapot", {}),
    ("retrieval", "single_4096", "4821.", "4821", {}),
]


@pytest.mark.parametrize(("name", "task", "prediction", "answer", "extra"), ANSWERED)
def test_an_answer_counts_in_every_shape(
    name: str, task: str, prediction: str, answer: str, extra: dict[str, Any]
) -> None:
    """Alone or in a list of one, as data files and data frames have it."""
    for answers in (answer, [answer], (answer,), np.array([answer], dtype=object)):
        assert score(name, task, prediction, answers, **extra) == pytest.approx(1.0, abs=1e-8)
        assert score(name, task, "@", answers, **extra) == 0.0


def test_numbers_are_answers_too() -> None:
    assert score("longbench", "passage_count", "17", 17) == 1.0
    assert score("longbench", "passage_count", "17", np.array([17, 18])) == 1.0
    assert score("ruler", "niah_single_1", "it is 1234567", [1234567]) == 1.0
    assert score("ruler", "niah_single_1", "7654321", "1234567") == 0.0  # a text is no list of its digits
    assert score("infinitebench", "math_find", "88", np.array([88])) == 1.0
    assert score("infinitebench", "math_find", "88.0", np.array([88])) == 0.0  # still an int
    assert score("infinitebench", "math_calc", "4 14 6", [np.array([4, 14, 6]).tolist()]) == 1.0


def test_classes_and_options_of_data_frames() -> None:
    assert score("longbench", "trec", "Food", ["Food"], all_classes=np.array(["Food", "Sport"])) == 1.0
    assert score("infinitebench", "code_debug", "B.", ["bell"], options=np.array(NAMES)) == 1.0


@pytest.mark.parametrize("name", ["longbench", "longbench_v2", "infinitebench", "ruler", "needle"])
def test_no_answer_is_an_error(name: str) -> None:
    tasks = {"longbench": "qasper", "longbench_v2": name, "infinitebench": "passkey", "ruler": "vt"}
    for answers in (None, [], ()):
        with pytest.raises(ValueError, match="answer|compares with one text"):
            score(name, tasks.get(name, "needle"), "x", answers)


@pytest.mark.parametrize(
    ("name", "task", "prediction", "answers", "scores"),
    [
        (
            "longbench",
            "lcc",
            "   x = 1",
            "x = 1",
            {None: 0.77, "official": 0.77, "heterocache": 0.77, "kvpress": 1},
        ),
        ("longbench_e", "lcc", "   x = 1", "x = 1", {"official": 0.77, "kvpress": 0.77}),
        ("longbench_v2", "longbench_v2", "Answer: D", "D", {None: 0, "heterocache": 1, "kvpress": 1}),
        (
            "infinitebench",
            "longdialogue_qa_eng",
            "Lea Moon",
            ["LEA MOON"],
            {None: 0, "heterocache": 1, "kvpress": 1},
        ),
        ("ruler", "niah_single_1", "123\n4567", "1234567", {None: 0, "official": 0, "kvpress": 1}),
    ],
)
def test_protocols_have_rules(
    name: str, task: str, prediction: str, answers: Any, scores: dict[str | None, float]
) -> None:
    for protocol, value in scores.items():
        assert score(name, task, prediction, answers, protocol=protocol) == pytest.approx(value)


def test_rules_are_keywords() -> None:
    assert score("infinitebench", "longdialogue_qa_eng", "Lea Moon", ["LEA MOON"], rules="2024-08") == 1
    assert score("infinitebench", "longdialogue_qa_eng", "Lea Moon", ["LEA MOON"], rules="2024-06") == 0
    assert score("longbench_v2", "longbench_v2", "Answer: D", "D", extraction="heterocache") == 1
    assert score("infinitebench", "math_calc", "1 4", [4], model_family="gpt4") == 1
    assert score("needle", "needle_4096", "the teapots", "the teapot", metric="rouge1") == 1.0
    assert score("needle", "needle_4096", "the teapots", "the teapot") == 0.5


def test_the_readme_of_the_design_holds() -> None:
    """The calls that the library is described by."""
    assert hcache.benchmarks.score("longbench", "qasper", "red", ["red"]) == 1.0
    assert hcache.benchmarks.aggregate("longbench", {"qasper": 31.2, "lcc": 50.0}, kind="official") == 40.6


def test_names_of_settings_are_names(tmp_path: Any) -> None:
    """As in conf/benchmark: they load their tasks, and can be asked for fewer."""
    assert VARIANTS["longbench_e"][1]["tasks"] == E_TASKS
    assert VARIANTS["longbench_en16"][1]["tasks"] == KV_PAPERS
    assert set(E_TASKS).isdisjoint(TASKS)
    for name, task in (
        ("longbench_e", "qasper_e"),
        ("longbench_en16", "narrativeqa"),
        ("longbench_e", "lcc_e"),
    ):
        options = {} if task != "lcc_e" else {"tasks": ["lcc_e"]}
        (tmp_path / "LongBench/config").mkdir(parents=True, exist_ok=True)
        for file in ("dataset2prompt.json", "dataset2maxlen.json"):
            (tmp_path / "LongBench/config" / file).write_text("{}")
        with pytest.raises(ValueError, match=f"has none of {task}.jsonl"):
            load(name, data_dir=str(tmp_path), prompt_dir=str(tmp_path), **options)


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown benchmark 'longbench_f'; did you mean 'longbench_"):
        score("longbench_f", "qasper", "x", "x")
    with pytest.raises(ValueError, match="unknown task 'qaspr'; did you mean 'qasper"):
        score("longbench_e", "qaspr", "x", "x")
    with pytest.raises(ValueError, match="unknown protocol 'kvpres'; did you mean 'kvpress'"):
        score("ruler", "vt", "x", "x", protocol="kvpres")
    with pytest.raises(ValueError, match="unknown setting 'task'; did you mean 'tasks'"):
        load("longbench_e", task=["lcc_e"])


def test_a_benchmark_has_an_average_of_its_own() -> None:
    assert aggregate("infinitebench", {"passkey": 100.0, "code_run": 50.0}) == 75.0
    assert aggregate("longbench", {"qasper": 30.0, "lcc": 50.0}) == 40.0
    assert aggregate("longbench_e", {"qasper_e": 30.0, "lcc_e": 50.0}) == 40.0
    with pytest.raises(ValueError, match="no official average"):
        aggregate("infinitebench", {"passkey": 1.0}, kind="official")

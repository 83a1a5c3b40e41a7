"""runner=score: other rules give other scores, beside those of the records, which stay as they are."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import pytest
from rich.console import Console

from hcache import records
from hcache.benchmarks import Benchmark, Example
from hcache.benchmarks.base import Tree, by_task
from hcache.benchmarks.infinitebench import InfiniteBench
from hcache.benchmarks.longbench import LongBench
from hcache.benchmarks.longbench_v2 import LongBenchV2
from hcache.benchmarks.ruler import Ruler
from hcache.methods import METHODS
from hcache.metrics import bootstrap_ci, tree_ci
from hcache.records import Line
from runners import score
from runners.config import RunConfig
from runners.lines import LineError
from runners.prediction_files import read_directory
from runners.score import ScoreSettings


@dataclass(frozen=True)
class Paper(Benchmark):
    """Right is what equals an answer (strict), or also what contains one (loose)."""

    name: ClassVar[str] = "paper"
    rules: str = "strict"

    def examples(self, tokenizer: Any | None) -> list[Example]:
        raise AssertionError("nothing is run")

    def score(self, example: Example | str, prediction: str, answers: Sequence[str], **extra: Any) -> float:
        if "rules" in extra:
            raise AssertionError("the settings of the run were handed on")
        if example == "weighed":
            return float(extra["weight"]) * float(prediction in answers)
        found = [
            prediction == answer or (self.rules == "loose" and answer in prediction) for answer in answers
        ]
        return float(any(found))

    def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
        return {"by_task": list(by_task(lines).values()), "easy": [x["score"] for x in lines if x["easy"]]}


PREDICTIONS = {
    "count": [("12", ["12"], True), ("about 12", ["12"], True), ("13", ["12"], False), ("no", ["12"], False)],
    "name": [("Ann", ["Ann", "A."], False), ("it is A.", ["Ann", "A."], True)],
}


def lines_of(tasks: Mapping[str, Any], rules: str = "strict") -> list[Line]:
    paper = Paper(rules=rules)
    return [
        {
            "task": task,
            "id": str(i),
            "metric": "match",
            "prediction": text,
            "answers": answers,
            "score": paper.score(task, text, answers),
            "easy": easy,
            "rules": rules,
            "batch": i,
            "memory": {},
            "decode_ms": 1.0,
        }
        for task, rows in tasks.items()
        for i, (text, answers, easy) in enumerate(rows)
    ]


def write_cell(outputs: Path, method: str, lines: list[Line], **changes: Any) -> Path:
    """A cell as a run would leave it, without what isn't read."""
    directory = outputs / "mine" / "tiny" / "paper" / f"{method}-f0.1-s0-abcdef01"
    tasks = {
        task: {"metric": "match", "n": len(scores), "score": 100 * sum(scores) / len(scores)}
        for task, scores in by_task(lines).items()
    }
    result = {
        "schema": 1,
        "status": "completed",
        "cell": {"model": "tiny", "method": method, "budget": "f0.1", "seed": 0},
        "config": {"benchmark": {"name": "paper", "rules": "strict", "protocol": "plain"}},
        "config_hash": "abcdef01" * 8,
        "tasks": tasks,
        "score": sum(task["score"] for task in tasks.values()) / len(tasks),
        "aggregates": {"easy": {"score": 12.5}},
        "provenance": {},
        **changes,
    }
    records.Predictions(directory).rewrite(lines)
    records.write_result(directory, result)
    return directory


def command(outputs: Path, benchmark: Benchmark, **settings: Any) -> RunConfig:
    run = RunConfig(method=METHODS.get("fullkv")(), benchmark=benchmark, outputs=str(outputs), tag="mine")
    run.score = ScoreSettings(**settings)
    return run


def scored(run: RunConfig, path: Path) -> list[dict[str, str]]:
    """The rows of the CSV after a run that was completed."""
    outcome = score.run(run)
    assert outcome.status == "completed", outcome.message
    assert outcome.directory is None
    assert str(path) in outcome.message
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def failed(run: RunConfig) -> str:
    outcome = score.run(run)
    assert outcome.status == "failed"
    assert "\n" not in outcome.message
    return outcome.message


@pytest.fixture(autouse=True)
def shown(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """What is printed."""
    text = io.StringIO()
    monkeypatch.setattr(score, "get_console", lambda: Console(file=text))
    return text


# --- cells


def test_other_rules_give_other_scores_beside_those_of_the_record(tmp_path: Path) -> None:
    write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    rows = scored(command(tmp_path, Paper(rules="loose")), tmp_path / "mine" / "scores-paper-loose.csv")
    by_name = {row["name"]: row for row in rows}
    assert list(by_name) == ["count", "name", "by_task", "easy", "score"]
    count, name = by_name["count"], by_name["name"]
    assert (count["score"], count["stored_score"], count["difference"]) == ("50.0000", "25.0000", "25.0000")
    assert (count["n"], count["changed"], count["kind"], count["metric"]) == ("4", "1", "task", "match")
    assert (name["score"], name["stored_score"], name["changed"]) == ("100.0000", "50.0000", "1")
    low, high = bootstrap_ci([1.0, 1.0, 0.0, 0.0], seed=0)
    assert (count["ci_low"], count["ci_high"]) == (f"{100 * low:.4f}", f"{100 * high:.4f}")
    assert low < 0.5 < high
    for row in rows:
        assert row["source"] == "tiny/paper/snapkv-f0.1-s0-abcdef01"
        assert [row[key] for key in ("model", "method", "budget", "seed")] == ["tiny", "snapkv", "f0.1", "0"]
        assert (row["benchmark"], row["rules"], row["stored_rules"]) == ("paper", "loose", "strict")
        assert row["config_hash"] == "abcdef01" * 8


def test_averages_are_the_benchmarks_own(tmp_path: Path) -> None:
    """Loose scores are 1, 1, 0, 0 and 1, 1; the easy ones among them 1, 1 and 1."""
    write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    rows = scored(command(tmp_path, Paper(rules="loose")), tmp_path / "mine" / "scores-paper-loose.csv")
    by_task, easy, overall = (row for row in rows if row["kind"] == "aggregate")
    assert (by_task["score"], by_task["n"], by_task["stored_score"]) == ("75.0000", "6", "")
    low, high = tree_ci([[1.0, 1.0, 0.0, 0.0], [1.0, 1.0]], seed=0)
    assert (by_task["ci_low"], by_task["ci_high"]) == (f"{100 * low:.4f}", f"{100 * high:.4f}")
    assert (easy["score"], easy["n"], easy["stored_score"], easy["difference"]) == (
        "100.0000",
        "3",
        "12.5000",
        "87.5000",
    )
    assert (overall["score"], overall["stored_score"], overall["n"]) == ("75.0000", "37.5000", "")
    assert {row["changed"] for row in (by_task, easy, overall)} == {""}


def test_the_same_rules_give_the_same_scores(tmp_path: Path, shown: io.StringIO) -> None:
    write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    rows = scored(command(tmp_path, Paper()), tmp_path / "mine" / "scores-paper-strict.csv")
    assert [row["difference"] for row in rows if row["kind"] == "task"] == ["0.0000", "0.0000"]
    assert [row["changed"] for row in rows if row["kind"] == "task"] == ["0", "0"]
    assert "25.00 [0.0-75.0]" in shown.getvalue()


def test_no_record_is_changed(tmp_path: Path) -> None:
    """Nor a torn file of a run that goes on."""
    write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    write_cell(tmp_path, "h2o", lines_of(PREDICTIONS), status="failed")
    torn = tmp_path / "mine" / "tiny" / "paper" / "h2o-f0.1-s0-abcdef01" / "predictions.jsonl"
    torn.write_bytes(torn.read_bytes()[:-5])
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    scored(command(tmp_path, Paper(rules="loose")), tmp_path / "mine" / "scores-paper-loose.csv")
    after = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert before.items() <= after.items()
    assert [path.name for path in after.keys() - before.keys()] == ["scores-paper-loose.csv"]


def test_every_completed_cell_of_the_benchmark_and_no_other(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    lines = lines_of({"name": PREDICTIONS["name"]})
    whole = write_cell(tmp_path, "snapkv", lines)
    write_cell(tmp_path, "h2o", lines)
    write_cell(tmp_path, "quest", lines, status="failed")
    write_cell(tmp_path, "cake", lines, config={"benchmark": {"name": "other", "protocol": "plain"}})
    unfinished = write_cell(tmp_path, "random", lines)
    (unfinished / "result.json").unlink()
    shard = whole / "shards" / "0of1"
    shard.mkdir(parents=True)
    for path in whole.glob("*.json*"):
        (shard / path.name).write_bytes(path.read_bytes())
    rows = scored(command(tmp_path, Paper()), tmp_path / "mine" / "scores-paper-strict.csv")
    assert [row["method"] for row in rows if row["name"] == "name"] == ["h2o", "snapkv"]
    for method in ("quest", "random"):
        assert f"{method}-f0.1-s0-abcdef01: the cell is not completed" in caplog.text


def test_source_and_out_can_be_chosen(tmp_path: Path) -> None:
    directory = write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    write_cell(tmp_path, "h2o", lines_of(PREDICTIONS))
    out = tmp_path / "new" / "mine.csv"
    rows = scored(command(tmp_path / "x", Paper(), source=str(directory), out=str(out)), out)
    assert {(row["method"], row["source"]) for row in rows} == {("snapkv", ".")}


def test_lines_that_the_result_does_not_count_are_mentioned(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    directory = write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    records.Predictions(directory).append([{**lines_of(PREDICTIONS)[0], "id": "9"}])
    scored(command(tmp_path, Paper()), tmp_path / "mine" / "scores-paper-strict.csv")
    assert "all 7 predictions are scored, the record's scores are of 6" in caplog.text


def test_what_scoring_needs_comes_from_the_line(tmp_path: Path) -> None:
    lines = lines_of({"name": PREDICTIONS["name"]})
    weighed = [{**line, "task": "weighed", "weight": 0.25} for line in lines]
    directory = write_cell(tmp_path, "snapkv", weighed)
    rows = scored(command(tmp_path, Paper()), tmp_path / "mine" / "scores-paper-strict.csv")
    assert rows[0]["score"] == "12.5000"
    del weighed[1]["weight"]
    records.Predictions(directory).rewrite(weighed)
    message = failed(command(tmp_path, Paper()))
    assert f"{directory / 'predictions.jsonl'} line 2: can't be scored as task weighed of paper" in message
    assert "KeyError: 'weight'" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda line: line.pop("task"), "field 'task': is missing"),
        (lambda line: line.pop("prediction"), "field 'prediction': is missing"),
        (lambda line: line.update(answers="12"), "field 'answers': must be a list of texts, it is text"),
        (lambda line: line.update(answers=[12]), "must be a list of texts, it is a list with a number"),
        (lambda line: line.update(prediction=None), "field 'prediction': must be text, it is null"),
        (lambda line: line.update(score="1"), "field 'score': must be a number, it is text"),
        (lambda line: line.update(id=3), "field 'id': must be text, it is a number"),
    ],
)
def test_a_broken_line_is_named(tmp_path: Path, change: Any, message: str) -> None:
    lines = lines_of(PREDICTIONS)
    directory = write_cell(tmp_path, "snapkv", lines)
    change(lines[2])
    path = directory / "predictions.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    found = failed(command(tmp_path, Paper()))
    assert f"{path} line 3" in found
    assert message in found
    assert not list(tmp_path.rglob("*.csv")), "nothing is written where something is wrong"


def test_lines_that_are_no_objects(tmp_path: Path) -> None:
    directory = write_cell(tmp_path, "snapkv", lines_of(PREDICTIONS))
    path = directory / "predictions.jsonl"
    whole = path.read_text()
    for text, message in (
        (whole + '{"task": "co', "line 7: is no JSON"),
        ("[1]\n" + whole, "line 1: must be a JSON object, it is a list"),
        ("\n", "holds no line"),
    ):
        path.write_text(text)
        assert message in failed(command(tmp_path, Paper()))


def test_sources_without_cells_to_score(tmp_path: Path) -> None:
    assert "score.source=" in failed(command(tmp_path, Paper()))
    write_cell(tmp_path, "cake", lines_of(PREDICTIONS), config={"benchmark": {"name": "other"}})
    assert "has completed cells of other, and benchmark=paper" in failed(command(tmp_path, Paper()))
    (tmp_path / "empty").mkdir()
    message = failed(command(tmp_path, Paper(), source=str(tmp_path / "empty")))
    assert "prediction files: unknown benchmark 'paper'" in message


def test_averages_that_lack_a_field_say_so(tmp_path: Path) -> None:
    lines = [{k: v for k, v in line.items() if k != "easy"} for line in lines_of(PREDICTIONS)]
    write_cell(tmp_path, "snapkv", lines)
    assert "the averages of paper need field 'easy'" in failed(command(tmp_path, Paper()))


@pytest.mark.parametrize(
    ("settings", "label"),
    [
        ({"rules": "late", "extraction": "chain", "protocol": "official"}, "late"),
        ({"rules": None, "extraction": "chain", "protocol": "official"}, "chain"),
        ({"extraction": None, "protocol": "official"}, "official"),
        ({"protocol": "official"}, "official"),
    ],
)
def test_rules_have_a_name(settings: dict[str, Any], label: str) -> None:
    assert score.rules_of(settings) == label


# --- files of other programs


def named(name: str) -> Benchmark:
    """`Paper` under another benchmark's name, with averages that need nothing."""

    class Other(Paper):
        def aggregates(self, lines: Sequence[Mapping[str, Any]]) -> dict[str, Tree]:
            return {}

    Other.name = name
    return Other()


def write_lines(path: Path, lines: Sequence[Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines), encoding="utf-8")


def test_longbench(tmp_path: Path) -> None:
    """A directory a model, a file a task; official scripts leave a result.json of their own there."""
    rows = [
        {"pred": "12", "answers": ["12", "twelve"], "all_classes": None, "length": 4000},
        {"pred": "\n13", "answers": ["12"], "all_classes": ["a"], "length": 9},
    ]
    write_lines(tmp_path / "llama" / "qasper.jsonl", rows)
    write_lines(tmp_path / "llama" / "trec.jsonl", rows[:1])
    (tmp_path / "llama" / "result.json").write_text('{"qasper": 50.0}')
    (found,) = read_directory("longbench", tmp_path / "llama").values()
    first = found[1].values
    assert (first["task"], first["id"], first["prediction"], first["answers"]) == (
        "qasper",
        "2",
        "\n13",
        ["12"],
    )
    assert (first["all_classes"], first["length"]) == (["a"], 9)
    run = command(tmp_path / "outputs", named("longbench"), source=str(tmp_path / "llama"))
    out = tmp_path / "outputs" / "mine" / "scores-longbench-strict.csv"
    table = scored(run, out)
    assert [(row["model"], row["name"], row["n"], row["score"], row["stored_score"]) for row in table] == [
        ("llama", "qasper", "2", "50.0000", ""),
        ("llama", "trec", "1", "100.0000", ""),
        ("llama", "score", "", "75.0000", ""),
    ]
    assert {row["changed"] for row in table} == {""}
    for broken, message in (
        ({**rows[0], "answers": "12"}, "field 'answers': must be a list of texts, it is text"),
        ({"prediction": "12"}, "field 'all_classes': is missing"),
        ({**rows[0], "pred": None}, "field 'pred': must be text, it is null"),
    ):
        write_lines(tmp_path / "llama" / "trec.jsonl", [rows[0], broken])
        assert f"{tmp_path / 'llama' / 'trec.jsonl'} line 2, {message}" in failed(run)


def test_longbench_v2(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A file a model; without replies the letters that were found in them are put into sentences."""
    row = {"_id": "x1", "answer": "B", "difficulty": "easy", "length": "short", "domain": "Code"}
    write_lines(tmp_path / "a.jsonl", [{**row, "response": "I say (B)", "pred": None, "judge": False}])
    write_lines(tmp_path / "b.jsonl", [{**row, "pred": "C"}, {**row, "pred": None}])
    found = read_directory("longbench_v2", tmp_path)
    assert list(found) == ["a", "b"]
    (line,) = found["a"]
    assert (line.values["task"], line.values["id"], line.values["prediction"]) == (
        "longbench_v2",
        "x1",
        "I say (B)",
    )
    assert line.values["answers"] == ["B"]
    assert (line.values["difficulty"], line.values["length"]) == ("easy", "short")
    assert [line.values["prediction"] for line in found["b"]] == ["The correct answer is (C)", ""]
    assert "b.jsonl has no replies" in caplog.text
    assert "a.jsonl has no replies" not in caplog.text
    assert list(read_directory("longbench_v2", tmp_path / "a.jsonl")) == ["a"], "a file will do"
    write_lines(tmp_path / "b.jsonl", [{**row, "pred": 3}])
    with pytest.raises(LineError, match="b.jsonl line 1, field 'pred': must be text, it is a number"):
        read_directory("longbench_v2", tmp_path)
    write_lines(tmp_path / "b.jsonl", [row])
    with pytest.raises(LineError, match="field 'response or pred': is missing"):
        read_directory("longbench_v2", tmp_path)


@pytest.mark.parametrize(
    ("given", "answers"),
    [
        ("71432", ["71432"]),
        (["ACE", "ACE ROTHSTEIN"], ["ACE", "ACE ROTHSTEIN"]),
        ([88], ["88"]),
        ([12.5], ["12.5"]),
        (4, ["4"]),
        ([[1, 2, 3], [4]], ["1", "2", "3"]),
    ],
)
def test_infinitebench(tmp_path: Path, given: Any, answers: list[str]) -> None:
    for name in ("ground_truth", "answer"):
        write_lines(tmp_path / "m" / "preds_math_find.jsonl", [{"id": 7, "prediction": "88 of", name: given}])
        ((line,),) = read_directory("infinitebench", tmp_path / "m").values()
        assert (line.values["task"], line.values["id"]) == ("math_find", "7")
        assert line.values["answers"] == answers
    write_lines(tmp_path / "m" / "preds_math_find.jsonl", [{"prediction": "88", "ground_truth": [None]}])
    with pytest.raises(LineError, match="line 1, field 'ground_truth or answer': must hold texts or numbers"):
        read_directory("infinitebench", tmp_path / "m")
    (tmp_path / "m" / "preds_math_find.jsonl").rename(tmp_path / "m" / "math_find.jsonl")
    with pytest.raises(LineError, match="neither cells .* nor files preds_<task>.jsonl of infinitebench"):
        read_directory("infinitebench", tmp_path / "m")


def test_longbench_e(tmp_path: Path) -> None:
    row = {"pred": "12", "answers": ["12"], "all_classes": None, "length": 9000}
    write_lines(tmp_path / "pred_e" / "llama" / "qasper.jsonl", [row])
    found = read_directory("longbench", tmp_path / "pred_e" / "llama")
    assert found["llama"][0].values["task"] == "qasper_e"


def test_ruler(tmp_path: Path) -> None:
    """`length` in a line is that of its prompt; the nominal one is a directory's name."""
    row = {"index": 3, "pred": " 12", "outputs": ["12", "13"], "length": 4001, "input": "long"}
    place = tmp_path / "llama" / "synthetic" / "4096" / "pred"
    write_lines(place / "vt.jsonl", [row])
    found = read_directory("ruler", place)
    assert list(found) == ["llama"]
    values = found["llama"][0].values
    assert (values["task"], values["length"]) == ("vt_4096", 4096)
    assert (values["prediction"], values["answers"]) == (" 12", ["12", "13"])
    write_lines(tmp_path / "llama" / "vt.jsonl", [row])
    values = read_directory("ruler", tmp_path / "llama")["llama"][0].values
    assert (values["task"], "length" in values) == ("vt", False)
    write_lines(place / "vt.jsonl", [{**row, "outputs": None}])
    with pytest.raises(
        LineError, match="vt.jsonl line 1, field 'outputs': must be a list of texts, it is null"
    ):
        read_directory("ruler", place)


# --- with the benchmarks themselves


def by_name(rows: list[dict[str, str]]) -> dict[str, float]:
    return {row["name"]: float(row["score"]) for row in rows}


def test_infinitebench_under_both_rules(tmp_path: Path) -> None:
    """A bare letter is right by the later rules alone; what a line says of its own run doesn't count."""
    label = ["solve", "B"]
    line = {
        "task": "code_debug",
        "id": "0",
        "metric": "choice",
        "prediction": "B",
        "answers": label,
        "label": label,
        "options": ["a", "solve", "c", "d"],
        "rules": "2024-06",
        "score": 0.0,
    }
    own = {"name": "infinitebench", "rules": "2024-06", "protocol": "official"}
    write_cell(tmp_path, "snapkv", [line], config={"benchmark": own})
    for rules, expected in (("2024-06", 0.0), ("2024-08", 100.0)):
        run = command(tmp_path, InfiniteBench(rules=rules))
        rows = scored(run, tmp_path / "mine" / f"scores-infinitebench-{rules}.csv")
        assert by_name(rows)["code_debug"] == expected
        assert by_name(rows)["mean"] == by_name(rows)["score"] == expected
        assert (rows[0]["stored_rules"], rows[0]["stored_score"]) == ("2024-06", "0.0000")
    write_lines(tmp_path / "m" / "preds_code_debug.jsonl", [{"prediction": "B", "ground_truth": label}])
    calc = {"id": 1, "prediction": "1 2 4", "ground_truth": [[1, 2, 3, 4], [9]]}
    write_lines(tmp_path / "m" / "preds_math_calc.jsonl", [calc])
    run = command(tmp_path, InfiniteBench(rules="2024-08"), source=str(tmp_path / "m"))
    rows = scored(run, tmp_path / "mine" / "scores-infinitebench-2024-08.csv")
    assert (by_name(rows)["code_debug"], by_name(rows)["math_calc"]) == (100.0, 50.0)


def test_longbench_v2_by_other_extractions(tmp_path: Path) -> None:
    row = {"_id": "x", "answer": "B", "difficulty": "easy", "length": "short", "domain": "Single-Document QA"}
    write_lines(tmp_path / "r" / "llama.jsonl", [{**row, "response": "Answer: B"}])
    for settings, label, expected in (
        ({}, "official", 0.0),
        ({"extraction": "heterocache"}, "heterocache", 100.0),
    ):
        run = command(tmp_path, LongBenchV2(**settings), source=str(tmp_path / "r"))
        rows = scored(run, tmp_path / "mine" / f"scores-longbench_v2-{label}.csv")
        assert by_name(rows)["overall"] == by_name(rows)["easy"] == expected
        assert by_name(rows)["no_answer"] == 100.0 - expected


def test_longbench_and_ruler_score_their_official_files(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    row = {"pred": "the cat", "answers": ["a cat"], "all_classes": None, "length": 5000}
    for task in ("qasper", "trec"):
        classes = ["cat", "dog"] if task == "trec" else None
        answers = ["cat"] if task == "trec" else row["answers"]
        line = {**row, "all_classes": classes, "answers": answers}
        write_lines(tmp_path / "pred" / "llama" / f"{task}.jsonl", [line])
    write_lines(tmp_path / "pred_e" / "llama" / "qasper.jsonl", [row])
    for place, names in (("pred", {"qasper", "trec"}), ("pred_e", {"qasper_e", "4-8k"})):
        run = command(tmp_path, LongBench(), source=str(tmp_path / place / "llama"))
        found = by_name(scored(run, tmp_path / "mine" / "scores-longbench-official.csv"))
        assert names <= set(found)
        assert {found[name] for name in names} == {100.0}
    word = {"pred": "it is AB", "outputs": ["ab", "cd"], "length": 4000}
    write_lines(tmp_path / "llama" / "4096" / "pred" / "vt.jsonl", [word])
    source = tmp_path / "llama" / "4096" / "pred"
    run = command(tmp_path, Ruler(), source=str(source))
    found = by_name(scored(run, tmp_path / "mine" / "scores-ruler-official.csv"))
    assert found == {"vt_4096": 50.0, "mean_4096": 50.0, "empty_predictions": 0.0, "score": 50.0}
    write_lines(tmp_path / "flat" / "vt.jsonl", [word])
    run = command(tmp_path, Ruler(), source=str(tmp_path / "flat"))
    assert by_name(scored(run, tmp_path / "mine" / "scores-ruler-official.csv")) == {
        "vt": 50.0,
        "score": 50.0,
    }
    assert "the averages of ruler need field 'length'" in caplog.text


def test_settings_are_checked(tmp_path: Path) -> None:
    run = replace(command(tmp_path, Paper()))
    run.score = {"sorce": "x"}
    assert "sorce" in failed(run)
    assert score.settings_of(None) == ScoreSettings()
    assert score.settings_of({"source": "x"}).source == "x"

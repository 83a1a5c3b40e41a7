"""runner=merge: shards become the record of the whole cell, or nothing is written and the reason is said."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hcache import records
from hcache.records import Line, Predictions, Result
from runners import evaluate, interrupt, merge
from runners.config import RunConfig
from runners.notes import counted
from runners.plan import planned
from tests.cells import cell, limited, line_without_timings, without_timings, write_checkpoint


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished cell of 10 examples in 6 batches. Don't write to it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    run = cell(checkpoint, tmp_path_factory.mktemp("whole"), batch_size=2, benchmark={"examples_per_task": 5})
    assert evaluate.run(run).status == "completed"
    torch.set_num_threads(before)
    return run


@pytest.fixture(autouse=True)
def resumable() -> Any:
    yield
    interrupt.forget()


def sharded(run: RunConfig, shard: str) -> RunConfig:
    return replace(run, benchmark=replace(run.benchmark, shard=shard))


def dealt_out(whole: RunConfig, outputs: Path, count: int) -> RunConfig:
    """The lines of a finished cell as shards in `outputs`, with the results that runs of them would leave."""
    run = replace(whole, outputs=str(outputs))
    lines = Predictions(planned(whole).directory).load()
    batches = sorted({line["batch"] for line in lines})
    for index in range(count):
        name = f"{index}/{count}"
        own = [line for line in lines if batches.index(line["batch"]) % count == index]
        write(planned(sharded(run, name)).directory, whole, name, own)
    return run


def write(directory: Path, whole: RunConfig, name: str, lines: list[Line]) -> None:
    result = records.read_result(planned(whole).directory)
    assert result is not None
    counts = Counter(line["task"] for line in lines)
    config = {**result["config"], "benchmark": {**result["config"]["benchmark"], "shard": name}}
    tasks = {task: {"n": n, "score": 0.0, "metric": "", "ci95": [0.0, 0.0]} for task, n in counts.items()}
    Predictions(directory).rewrite(lines)
    records.write_result(directory, {**result, "config": config, "tasks": tasks, "score": -1.0})


def changed(directory: Path, change: Callable[[Result], None]) -> None:
    """Write the result in `directory` again, changed."""
    result = json.loads((directory / "result.json").read_text())
    change(result)
    (directory / "result.json").write_text(json.dumps(result))


def shard_directory(run: RunConfig, label: str) -> Path:
    return planned(run).directory / "shards" / label


def result_of(run: RunConfig) -> Result:
    found = records.read_result(planned(run).directory)
    assert found is not None
    return found


def refused(run: RunConfig) -> str:
    """Why a merge failed; nothing was written."""
    outcome = merge.run(run)
    assert outcome.status == "failed"
    assert outcome.directory is None
    assert not (planned(run).directory / "result.json").exists()
    assert not (planned(run).directory / "predictions.jsonl").exists()
    return outcome.message


@pytest.mark.parametrize("count", [1, 2, 3, 6, 8])
def test_shards_give_the_record_of_the_whole_cell(unbroken: RunConfig, tmp_path: Path, count: int) -> None:
    run = dealt_out(unbroken, tmp_path, count)
    outcome = merge.run(run)
    assert outcome.status == "completed", outcome.message
    assert outcome.directory == planned(run).directory
    assert outcome.message == f"10 examples of {count} shards merged"
    assert result_of(run) == result_of(unbroken)
    for name in ("predictions.jsonl", "result.json"):
        merged, whole = (planned(one).directory / name for one in (run, unbroken))
        assert merged.read_bytes() == whole.read_bytes()


class Told:
    """A tracker that remembers."""

    def __init__(self) -> None:
        self.started: list[object] = []
        self.finished: list[object] = []

    def start(self, config: object, finished: list[Line]) -> None:
        self.started += [config, len(finished)]

    def finish(self, result: object, lines: list[Line]) -> None:
        self.finished += [result, len(lines)]


def test_the_tracker_is_told_of_the_whole(
    unbroken: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told = Told()
    monkeypatch.setattr(merge, "make_tracker", lambda *_: told)
    run = dealt_out(unbroken, tmp_path, 2)
    assert merge.run(run).status == "completed"
    result = result_of(run)
    assert told.started == [result["config"], 10]
    assert told.finished == [result, 10]


def test_real_shards_are_merged_and_then_the_cell_is_done(
    unbroken: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(unbroken, outputs=str(tmp_path))
    for shard in ("1/2", "0/2"):
        assert evaluate.run(sharded(run, shard)).status == "completed"
    assert merge.run(run).status == "completed"
    found, expected = without_timings(result_of(run)), without_timings(result_of(unbroken))
    expected["config"]["outputs"] = run.outputs
    assert found == expected
    merged, whole = (Predictions(planned(one).directory).load() for one in (run, unbroken))
    assert [*map(line_without_timings, merged)] == [*map(line_without_timings, whole)]
    monkeypatch.setattr(evaluate, "Worker", lambda run: pytest.fail("the model was asked for"))
    assert evaluate.run(run).status == "completed"


def test_shards_with_nothing_to_do_leave_no_trace(unbroken: RunConfig, tmp_path: Path) -> None:
    run, whole = (limited(replace(unbroken, outputs=str(tmp_path / name)), 1) for name in ("parts", "whole"))
    outcomes = [evaluate.run(sharded(run, f"{part}/4")) for part in range(4)]
    assert [outcome.status for outcome in outcomes] == ["completed"] * 4
    assert "2 examples make 2 batches, so 2 shards are the most" in outcomes[3].message
    empty = records.read_result(shard_directory(run, "3of4"))
    assert empty is not None
    assert (empty["tasks"], empty["score"], empty["notes"]) == ({}, None, [outcomes[3].message])
    assert (shard_directory(run, "3of4") / "predictions.jsonl").read_bytes() == b""
    assert evaluate.run(whole).status == "completed"
    assert merge.run(run).message == "2 examples of 4 shards merged"
    found, expected = without_timings(result_of(run)), without_timings(result_of(whole))
    expected["config"]["outputs"] = run.outputs
    assert found == expected


def test_an_empty_shard_is_run_when_there_is_more(unbroken: RunConfig, tmp_path: Path) -> None:
    run = sharded(replace(unbroken, outputs=str(tmp_path)), "5/6")
    assert "nothing to do" in evaluate.run(limited(run, 1)).message
    assert not evaluate.run(run).message
    assert len(Predictions(planned(run).directory).load()) == 1


def test_order_within_a_batch_is_that_of_the_shard(unbroken: RunConfig, tmp_path: Path) -> None:
    """A resumed shard has its batches in any order, each of them whole."""
    run = dealt_out(unbroken, tmp_path, 2)
    predictions = Predictions(shard_directory(run, "0of2"))
    lines = predictions.load()
    predictions.rewrite(sorted(lines, key=lambda line: -line["batch"]))
    assert merge.run(run).status == "completed"
    assert result_of(run) == result_of(unbroken)


def test_merging_twice_changes_nothing(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 3)
    assert [merge.run(run).status for _ in range(2)] == ["completed"] * 2
    assert result_of(run) == result_of(unbroken)


# --- gaps


def test_no_shards_or_a_missing_one(unbroken: RunConfig, tmp_path: Path) -> None:
    assert "there are no shards" in refused(replace(unbroken, outputs=str(tmp_path / "none")))
    run = dealt_out(unbroken, tmp_path, 4)
    for label in ("1of4", "3of4"):
        shutil.rmtree(shard_directory(run, label))
    assert "lacks 2 of 4 shards: run benchmark.shard=1/4, 3/4" in refused(run)


def test_shards_that_are_not_completed(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    directory = shard_directory(run, "1of2")
    changed(directory, lambda result: result.update(status="failed", error={"message": "no memory"}))
    assert "shard 1/2 is failed (no memory)" in refused(run)
    (directory / "result.json").unlink()
    assert "shard 1/2 has no result" in refused(run)


def test_lines_that_the_result_counts_and_the_file_lacks(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    predictions = Predictions(shard_directory(run, "1of2"))
    lines = predictions.load()
    predictions.rewrite(lines[:-1])
    message = refused(run)
    n = sum(line["task"] == lines[-1]["task"] for line in lines)
    assert f"shard 1/2 has {n - 1} lines of task {lines[-1]['task']}, its result counts {n}" in message


def test_an_empty_shard_that_should_not_be(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 8)
    lines = Predictions(shard_directory(run, "1of8")).load()
    write(shard_directory(run, "1of8"), unbroken, "1/8", [])
    assert f"batch {lines[0]['batch'] + 1} of shard 2/8 is number 1" in refused(run)
    Predictions(shard_directory(run, "1of8")).append(lines)
    assert f"shard 1/8 has {len(lines)} lines of task {lines[0]['task']}, its result counts 0" in refused(run)
    for part in range(8):
        write(shard_directory(run, f"{part}of8"), unbroken, f"{part}/8", [])
    assert "none of the 8 shards has an example" in refused(run)


@pytest.mark.parametrize("place", range(5))
def test_a_batch_in_no_shard(unbroken: RunConfig, tmp_path: Path, place: int) -> None:
    """Even where each shard's result agrees with its lines: later batches are in the wrong shards."""
    run = dealt_out(unbroken, tmp_path, 2)
    batches = sorted({line["batch"] for line in Predictions(planned(unbroken).directory).load()})
    label = f"{place % 2}of2"
    lines = Predictions(shard_directory(run, label)).load()
    kept = [line for line in lines if line["batch"] != batches[place]]
    write(shard_directory(run, label), unbroken, label.replace("of", "/"), kept)
    assert f"batch {batches[place + 1]} of shard {1 - place % 2}/2 is number {place}" in refused(run)


def test_a_torn_line_is_named_and_left(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    path = shard_directory(run, "0of2") / "predictions.jsonl"
    torn = path.read_bytes()[:-9]
    path.write_bytes(torn)
    assert f"{path} line {torn.count(10) + 1}: is no JSON" in refused(run)
    assert path.read_bytes() == torn


# --- overlaps


def test_an_example_twice(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    first, second = (Predictions(shard_directory(run, label)).load() for label in ("0of2", "1of2"))
    write(shard_directory(run, "1of2"), unbroken, "1/2", [*second, first[0]])
    message = refused(run)
    assert (
        f"example {first[0]['id']} of task {first[0]['task']} is in shard 0/2 and again in shard 1/2"
        in message
    )
    write(shard_directory(run, "1of2"), unbroken, "1/2", [*second, second[0]])
    assert "is in shard 1/2 and again in shard 1/2" in refused(run)


def test_a_batch_in_two_shards(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    first, second = (Predictions(shard_directory(run, label)).load() for label in ("0of2", "1of2"))
    assert first[0]["batch"] == first[1]["batch"]
    write(shard_directory(run, "0of2"), unbroken, "0/2", first[1:])
    write(shard_directory(run, "1of2"), unbroken, "1/2", [*second, first[0]])
    assert f"batch {first[0]['batch']} is in shard 0/2 and in shard 1/2" in refused(run)


def test_a_run_of_the_whole_cell_is_not_overwritten(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    lines = Predictions(planned(unbroken).directory).load()
    Predictions(planned(run).directory).append([{**lines[0], "prediction": "another"}])
    outcome = merge.run(run)
    assert outcome.status == "failed"
    assert "holds lines that no shard has (line 1)" in outcome.message
    assert not (planned(run).directory / "result.json").exists()
    Predictions(planned(run).directory).rewrite(lines[:3])
    assert merge.run(run).status == "completed", (
        "these are in the shards: an earlier merge with a lower limit"
    )


# --- what doesn't belong together


def test_shards_of_another_count(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    dealt_out(unbroken, tmp_path, 3)
    assert "shards of different counts (<i>of2 and <i>of3)" in refused(run)


def test_a_shard_in_another_ones_place(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    shutil.rmtree(shard_directory(run, "0of2"))
    shutil.copytree(shard_directory(run, "1of2"), shard_directory(run, "0of2"))
    assert "says shard 1/2, its directory says 0/2" in refused(run)
    shard_directory(run, "0of2").rename(shard_directory(run, "old"))
    assert "old is no shard" in refused(run)


def test_other_configurations_schemas_and_limits(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 2)
    directory = shard_directory(run, "1of2")
    content = (directory / "result.json").read_text()
    for change, message in (
        ({"config_hash": "ab" * 32}, "is of another configuration, hash abababab"),
        ({"schema": 0}, "its schema is 0, this version reads 1"),
    ):
        changed(directory, lambda result, change=change: result.update(change))  # type: ignore[misc]
        assert message in refused(run)
        (directory / "result.json").write_text(content)
    changed(directory, lambda result: result["config"]["benchmark"].update(limit=2))
    assert "shard 1/2 ran with benchmark.limit=2, the command says null" in refused(run)
    (directory / "result.json").write_text(content)
    assert "shard 0/2 ran with benchmark.limit=null, the command says 3" in refused(limited(run, 3))


def test_a_shard_in_the_command_is_refused(unbroken: RunConfig) -> None:
    outcome = merge.run(sharded(unbroken, "0/2"))
    assert outcome.status == "failed"
    assert "benchmark.shard=0/2 has no effect with runner=merge" in outcome.message


# --- what is joined


def test_notes_and_provenance_of_several_machines(unbroken: RunConfig, tmp_path: Path) -> None:
    run = dealt_out(unbroken, tmp_path, 3)
    for label, device, commit in (("0of3", "A", "c1"), ("1of3", "B", "c1"), ("2of3", "A", "c2")):
        predictions = Predictions(shard_directory(run, label))
        lines = [{**line, "cut": place == 0} for place, line in enumerate(predictions.load())]
        predictions.rewrite(lines)

        def change(result: Result, lines: Any = lines, device: str = device, commit: str = commit) -> None:
            result["notes"] = ["keeps the window", *counted(lines), f"only on {device}"]
            result["provenance"].update(device=device, git=commit, dirty=device == "B")

        changed(shard_directory(run, label), change)
    assert merge.run(run).status == "completed"
    result = result_of(run)
    *notes, versions = result["notes"]
    fixed = ["keeps the window", "only on A", "only on B"]
    assert notes == [*fixed, "3 of 10 prompts were too long and lost their middle"]
    assert "0/3, 1/3 on git c1" in versions
    assert "2/3 on git c2" in versions
    assert result["provenance"]["device"] == "A + B"
    assert result["provenance"]["dirty"] is True


@pytest.mark.parametrize("empty", [False, True])
def test_infeasible_in_all_shards_or_in_some(unbroken: RunConfig, tmp_path: Path, empty: bool) -> None:
    """A shard with nothing to do decides nothing."""
    run = dealt_out(unbroken, tmp_path, 3 if empty else 2)
    own = ("0of3", "2of3") if empty else ("0of2", "1of2")
    if empty:
        write(shard_directory(run, "1of3"), unbroken, "1/3", [])
    for label, smallest in zip(own, (0.3, 0.4), strict=True):
        error = {"type": "InfeasibleBudget", "message": label, "smallest_fraction": smallest}

        def change(result: Result, error: Any = error) -> None:
            result.update(status="infeasible", error=error)

        if label == own[1]:
            assert f"shard {own[0].replace('of', '/')} is infeasible ({own[0]})" in refused(run)
        changed(shard_directory(run, label), change)
    outcome = merge.run(run)
    assert (outcome.status, outcome.directory) == ("infeasible", planned(run).directory)
    assert result_of(run)["error"]["smallest_fraction"] == 0.4
    assert result_of(run)["config"]["benchmark"]["shard"] is None


def test_counted_notes() -> None:
    line = {"adjusted_budget_tokens": None, "batch": 0}
    assert counted([line]) == []
    lines = [
        line,
        {**line, "cut": True},
        {**line, "batch": 1, "halved": "0"},
        {**line, "batch": 1, "halved": "1"},
    ]
    lines.append({**line, "adjusted_budget_tokens": 40})
    assert counted(lines) == [
        "1 examples too short for the budget ran under the nearest feasible one",
        "1 of 5 prompts were too long and lost their middle",
        "1 batches had too little memory and ran in parts",
    ]

"""runner=evaluate on a small real model: records, resume, limits, failures, stops."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hcache import records
from hcache.benchmarks.retrieval import Retrieval
from hcache.budget import Budget, InfeasibleBudget
from hcache.geometry import Geometry
from hcache.methods import METHODS
from hcache.methods.heterocache import RoleSettings
from hcache.models import checkpoint_fingerprint
from hcache.profiling import Graph, HeadProfile
from hcache.records import Predictions
from runners import evaluate, interrupt, loading, prompts, work
from runners.config import RunConfig
from runners.plan import planned
from runners.tracking import NoTracker
from tests.cells import LENGTH, cell, limited, line_without_timings, without_timings, write_checkpoint

GEOMETRY = Geometry(2, 4, 2, 16)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


@pytest.fixture(autouse=True)
def one_thread() -> Any:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
    interrupt.forget()


def result_of(run: RunConfig) -> dict[str, Any]:
    found = records.read_result(planned(run).directory)
    assert found is not None
    return found


def lines_of(run: RunConfig) -> list[dict[str, Any]]:
    return Predictions(planned(run).directory).load()


def evaluated(run: RunConfig) -> dict[str, Any]:
    outcome = evaluate.run(run)
    assert outcome.status == "completed", outcome.message
    return result_of(run)


@pytest.fixture(scope="module")
def unbroken(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """A finished cell in batches of two, which others are compared with. Don't write to it."""
    run = cell(checkpoint, tmp_path_factory.mktemp("unbroken"), batch_size=2)
    evaluated(run)
    return run


def test_record_has_the_documented_schema(unbroken: RunConfig) -> None:
    result = result_of(unbroken)
    assert result["schema"] == 1
    assert result["status"] == "completed"
    assert result["cell"]["method"] == "snapkv"
    assert result["config"]["method"]["window"] == 32
    assert planned(unbroken).directory.name == f"snapkv-f0.25-s0-{result['config_hash'][:8]}"
    assert records.config_hash(result["config"]) == result["config_hash"]
    assert set(result["tasks"]) == {f"single_{LENGTH}", f"multi_{LENGTH}"}
    for task in result["tasks"].values():
        low, high = task["ci95"]
        assert task["n"] == 3
        assert 0 <= low <= task["score"] <= high <= 100
    assert result["score"] == pytest.approx(sum(t["score"] for t in result["tasks"].values()) / 2)
    assert result["budget"]["requested_fraction"] == 0.25
    for name in ("prefill_ms", "decode_ms_per_token"):
        spread = result["latency"][name]
        assert 0 < spread["p10"] <= spread["median"] <= spread["p90"]
    assert result["latency"]["tokens_per_s"] > 0
    assert set(result["memory"]) >= {"device_kv_bytes", "full_kv_bytes", "host_kv_bytes", "peak_device_bytes"}
    provenance = {"git", "dirty", "versions", "device", "started", "seconds", "seed"}
    assert set(result["provenance"]) == provenance
    assert "CPU" in result["provenance"]["device"]


def test_bytes_are_measured(unbroken: RunConfig) -> None:
    """2 layers x 2 KV heads x K and V x 16 numbers of 4 bytes: the budget shows in what was counted."""
    result, per_token = result_of(unbroken), 2 * 2 * 2 * 16 * 4
    full = result["memory"]["full_kv_bytes"]
    assert full == pytest.approx(LENGTH * per_token, rel=0.01)
    assert 0.25 <= result["budget"]["resident_fraction"] < 0.27
    payload = result["memory"]["device_kv_bytes"] - result["memory"]["device_metadata_bytes"]
    assert payload == pytest.approx(0.25 * full, rel=0.01)


def test_lines_hold_what_rescoring_needs(unbroken: RunConfig) -> None:
    line = next(line for line in lines_of(unbroken) if line["task"].startswith("multi"))
    score = Retrieval().score(line["task"], line["prediction"], line["answers"], keys=line["keys"])
    assert score == line["score"]
    assert {"id", "prompt_tokens", "new_tokens", "prefill_ms", "decode_ms"} <= set(line)


def test_killed_anywhere_it_resumes_to_the_same_result(unbroken: RunConfig, tmp_path: Path) -> None:
    whole = planned(unbroken).directory / "predictions.jsonl"
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == 0x0A]
    for number, cut in enumerate([0, ends[0] - 7, ends[0], ends[2] + 5, ends[3], ends[-1] - 1, ends[-1]]):
        run = replace(unbroken, outputs=str(tmp_path / str(number)))
        directory = planned(run).directory
        directory.mkdir(parents=True)
        (directory / "predictions.jsonl").write_bytes(content[:cut])
        assert without_timings(evaluated(run)) == {
            **without_timings(result_of(unbroken)),
            "config": {**result_of(unbroken)["config"], "outputs": run.outputs},
        }
        found = sorted(lines_of(run), key=lambda line: (line["batch"], line["id"]))
        expected = sorted(lines_of(unbroken), key=lambda line: (line["batch"], line["id"]))
        assert [*map(line_without_timings, found)] == [*map(line_without_timings, expected)]


def test_partial_batch_runs_whole(
    unbroken: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(unbroken, outputs=str(tmp_path))
    lines = lines_of(unbroken)
    stays = [line for line in lines if line["batch"] == prompts.TASK_BATCHES]
    half = [line for line in lines if line["batch"] == 0][:1]
    Predictions(planned(run).directory).append([*half, *stays])
    ran: list[list[tuple[str, str]]] = []
    original = work.Worker.run
    monkeypatch.setattr(
        work.Worker, "run", lambda self, batch: (ran.append([p.key for p in batch]), original(self, batch))[1]
    )
    told: list[int] = []
    monkeypatch.setattr(NoTracker, "start", lambda self, config, finished: told.append(len(finished)))
    result = evaluated(run)
    assert told == [len(stays)], "the half batch doesn't count as finished"
    assert [len(batch) for batch in ran] == [2, 1, 1]
    assert list(result["tasks"]) == list(result_of(unbroken)["tasks"]), "not in the order they were run"
    assert (half[0]["task"], half[0]["id"]) in ran[0]
    found = lines_of(run)
    assert len(found) == len({(line["task"], line["id"]) for line in found}) == 6
    assert found[: len(stays)] == stays


def test_completed_cell_is_read_back(unbroken: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    before = (planned(unbroken).directory / "result.json").read_bytes()
    monkeypatch.setattr(evaluate, "Worker", lambda run: pytest.fail("the model was asked for"))
    for run in (
        unbroken,
        limited(unbroken, 2),
        replace(unbroken, runtime=replace(unbroken.runtime, threads=1)),
    ):
        assert evaluate.run(run).status == "completed"
    assert (planned(unbroken).directory / "result.json").read_bytes() == before


def test_raised_limit_extends(unbroken: RunConfig, tmp_path: Path) -> None:
    run = limited(replace(unbroken, outputs=str(tmp_path)), 1)
    assert [task["n"] for task in evaluated(run)["tasks"].values()] == [1, 1]
    assert len(lines_of(run)) == 2
    larger = limited(run, None)
    assert planned(larger).directory == planned(run).directory
    found = without_timings(evaluated(larger))
    expected = without_timings(result_of(unbroken))
    del found["config"], expected["config"]
    assert found == expected


def test_batches_come_from_the_full_list(checkpoint: Path, tmp_path: Path) -> None:
    tokenizer = loading.loaded(cell(checkpoint, tmp_path)).tokenizer
    benchmark = cell(checkpoint, tmp_path, benchmark={"examples_per_task": 7}).benchmark
    everything = {p.key: p.batch for p in prompts.prepare(benchmark, tokenizer, 3, 9999)}
    for limit in (1, 2, 5, 7):
        found = prompts.prepare(replace(benchmark, limit=limit), tokenizer, 3, 9999)
        assert len(found) == 2 * limit
        assert {p.key: p.batch for p in found}.items() <= everything.items()
        assert [p.batch for p in found] == sorted(p.batch for p in found)
    assert len(set(everything.values())) == 6


def test_numbers_of_batches_of_one_do_not_hang_on_the_limit(checkpoint: Path, tmp_path: Path) -> None:
    """Or lines of two runs of a cell would claim to have been one batch."""
    tokenizer = loading.loaded(cell(checkpoint, tmp_path)).tokenizer
    benchmark = cell(checkpoint, tmp_path, benchmark={"examples_per_task": 7}).benchmark
    everything = {p.key: p.batch for p in prompts.prepare(benchmark, tokenizer, 1, 9999)}
    assert len(set(everything.values())) == 14
    for limit in (1, 5):
        found = prompts.prepare(replace(benchmark, limit=limit), tokenizer, 1, 9999)
        assert {p.key: p.batch for p in found}.items() <= everything.items()


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize("limit", [None, 5])
def test_shards_hold_every_batch_once(
    checkpoint: Path, tmp_path: Path, batch_size: int, limit: int | None
) -> None:
    tokenizer = loading.loaded(cell(checkpoint, tmp_path)).tokenizer
    benchmark = cell(checkpoint, tmp_path, benchmark={"examples_per_task": 7, "limit": limit}).benchmark
    whole = [(p.key, p.batch) for p in prompts.prepare(benchmark, tokenizer, batch_size, 9999)]
    parts = []
    for shard in ("0/3", "1/3", "2/3"):
        own = prompts.prepare(replace(benchmark, shard=shard), tokenizer, batch_size, 9999)
        assert own
        parts += [(p.key, p.batch) for p in own]
    assert sorted(parts) == sorted(whole)


def test_a_benchmark_without_examples_fails_in_every_shard(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Retrieval, "examples", lambda self, tokenizer: [])
    for shard in (None, "0/2", "1/2"):
        outcome = evaluate.run(cell(checkpoint, tmp_path, benchmark={"shard": shard, "examples_per_task": 9}))
        assert outcome.status == "failed"
        assert "there is no example to run" in outcome.message


@pytest.mark.parametrize("shard", ["3/3", "1", "a/b", "-1/2", "1/0"])
def test_shards_that_can_not_be(checkpoint: Path, tmp_path: Path, shard: str) -> None:
    with pytest.raises(ValueError, match=r"benchmark\.shard"):
        cell(checkpoint, tmp_path, benchmark={"shard": shard})


def test_a_shard_has_records_of_its_own(checkpoint: Path, tmp_path: Path) -> None:
    run = cell(checkpoint, tmp_path, batch_size=3, benchmark={"shard": "1/2"})
    place = planned(run).directory
    assert place.parts[-2:] == ("shards", "1of2")
    assert place.parent.parent == planned(cell(checkpoint, tmp_path, batch_size=3)).directory
    evaluated(run)
    assert result_of(run)["config"]["benchmark"]["shard"] == "1/2"
    assert 0 < len(lines_of(run)) < 6


def test_a_batch_that_does_not_fit_runs_in_halves(
    tmp_path: Path, unbroken: RunConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the same answers, and the record says so."""
    original = work.Worker._run_under

    def cramped(worker: Any, budget: Any, batch: Any) -> Any:
        if len(batch) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return original(worker, budget, batch)

    monkeypatch.setattr(work.Worker, "_run_under", cramped)
    three = replace(unbroken.runtime, batch_size=3)
    run = replace(unbroken, outputs=str(tmp_path), runtime=three)
    result = evaluated(run)
    expected = {(line["task"], line["id"]): line["prediction"] for line in lines_of(unbroken)}
    assert {(line["task"], line["id"]): line["prediction"] for line in lines_of(run)} == expected
    assert [line["halved"] for line in lines_of(run) if line["batch"] == 0] == ["0", "10", "11"]
    assert any("too little memory" in note for note in result["notes"])


def test_one_sequence_that_does_not_fit_fails_the_cell(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(worker: Any, budget: Any, batch: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(work.Worker, "_run_under", never)
    outcome = evaluate.run(cell(checkpoint, tmp_path))
    assert outcome.status == "failed"
    assert "out of memory" in outcome.message


def test_consecutive_cells_load_and_prepare_once(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[str] = []
    load, prepare = loading.load, work.prepare
    monkeypatch.setattr(loading, "_latest", [])
    monkeypatch.setattr(work, "_latest", [])
    monkeypatch.setattr(loading, "load", lambda *args: (made.append("model"), load(*args))[1])
    monkeypatch.setattr(work, "prepare", lambda *args: (made.append("prompts"), prepare(*args))[1])
    for method in ("fullkv", "snapkv", "streaming_llm"):
        evaluated(limited(cell(checkpoint, tmp_path, method), 1))
    assert made == ["model", "prompts"]
    evaluated(limited(cell(checkpoint, tmp_path, batch_size=2), 1))
    assert made[2:] == ["prompts"]
    other = cell(checkpoint, tmp_path, batch_size=2)
    evaluated(limited(replace(other, model=replace(other.model, attention="reference")), 1))
    assert made[3:] == ["model", "prompts"]


def test_fullkv_has_one_cell_whatever_the_budget(checkpoint: Path, tmp_path: Path) -> None:
    places = {
        planned(cell(checkpoint, tmp_path, "fullkv", **budget)).directory
        for budget in ({}, {"kept_fraction": 0.1}, {"kept_tokens": 64})
    }
    assert len(places) == 1
    assert places.pop().name.startswith("fullkv-full-s0-")
    run = limited(cell(checkpoint, tmp_path, "fullkv", kept_fraction=0.1), 1)
    budget = evaluated(run)["budget"]
    assert budget["requested_fraction"] == 1.0
    assert budget["resident_fraction"] == pytest.approx(1.0, abs=0.02)


def test_question_after_compression(checkpoint: Path, tmp_path: Path) -> None:
    run = cell(checkpoint, tmp_path, batch_size=3, benchmark={"query_aware": False})
    evaluated(run)
    aware = prompts.prepare(replace(run.benchmark, query_aware=True), loading.loaded(run).tokenizer, 3, 9999)
    whole = {p.key: p.tokens for p in aware}
    for line in lines_of(run):
        assert 0 < line["prompt_tokens"] < whole[line["task"], line["id"]]


def head_profile(checkpoint: Path) -> HeadProfile:
    """A pivot with a satellite in each layer."""
    pairs = torch.ones(2, 2, 2, dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.6], [0.8, 0.7]], dtype=torch.float64)
    print_ = checkpoint_fingerprint(checkpoint)
    return HeadProfile(2, 2, scores, {g: pairs.clone() for g in Graph}, 4, 16, print_)


def test_heterocache_with_a_found_profile(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of the heads are full, so a quarter is infeasible unless roles give way; the record says so."""
    monkeypatch.setenv("HCACHE_PROFILES", str(tmp_path))
    profile = head_profile(checkpoint)
    assert profile.fingerprint is not None
    profile.save(tmp_path / f"{profile.fingerprint}.safetensors")
    refused = cell(checkpoint, tmp_path / "o", "heterocache")
    assert evaluate.run(refused).status == "infeasible"
    assert 0.5 < result_of(refused)["error"]["smallest_fraction"] < 0.8
    fitted = cell(checkpoint, tmp_path / "o", "heterocache", hyper={"roles": RoleSettings(fit_budget=True)})
    result = evaluated(limited(fitted, 1))
    assert result["budget"]["resident_fraction"] == pytest.approx(0.25, abs=0.02)
    assert any("fit_budget" in note for note in result["notes"])
    enough = cell(checkpoint, tmp_path / "o", "heterocache", kept_fraction=0.8)
    result = evaluated(limited(enough, 1))
    assert result["memory"]["host_kv_bytes"] > 0
    assert result["counters"]["windows"] > 0


def test_another_profile_is_another_cell(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCACHE_PROFILES", str(tmp_path))
    run = cell(checkpoint, tmp_path / "o", "heterocache")
    profile = head_profile(checkpoint)
    places = []
    flat = torch.full((2, 2), 0.5, dtype=torch.float64)
    own = {**profile.settings, "similarity_threshold": 0.9}
    for other in (profile, replace(profile, stability=flat), replace(profile, settings=own)):
        other.save(tmp_path / f"{profile.fingerprint}.safetensors")
        places.append(planned(run).directory)
        other.save(tmp_path / "named.safetensors")
        named = replace(run, method=replace(run.method, profile=str(tmp_path / "named.safetensors")))
        places.append(planned(named).directory)
    assert places[0] == places[1], "named or found, it is the same"
    assert places[2] == places[3]
    assert places[4] == places[5]
    assert len(set(places)) == 3, "scores and the profile's own thresholds decide roles"


def test_infeasible_is_known_before_the_model_loads(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(evaluate, "Worker", lambda run: pytest.fail("the model was asked for"))
    run = cell(checkpoint, tmp_path, kept_fraction=0.01)
    outcome = evaluate.run(run)
    assert outcome.status == "infeasible"
    result = result_of(run)
    assert result["error"]["smallest_fraction"] == pytest.approx(33 / LENGTH, abs=1e-4)
    assert "traceback" not in result["error"]
    feasible = cell(checkpoint, tmp_path, kept_fraction=result["error"]["smallest_fraction"])
    monkeypatch.undo()
    evaluated(limited(feasible, 1))


def test_failure_is_recorded_and_tried_again(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = limited(cell(checkpoint, tmp_path), 1)

    def broken(*args: Any, **kwargs: Any) -> float:
        raise RuntimeError("the metric is broken")

    monkeypatch.setattr(Retrieval, "score", broken)
    outcome = evaluate.run(run)
    assert outcome.status == "failed"
    error = result_of(run)["error"]
    assert error["message"] == "the metric is broken"
    assert "in broken" in error["traceback"]
    monkeypatch.setattr(Retrieval, "score", lambda *args, **kwargs: 1.0)
    assert evaluated(run)["score"] == 100


def test_system_exit_inside_a_cell_is_a_failure(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave(*args: Any, **kwargs: Any) -> float:
        raise SystemExit(3)

    monkeypatch.setattr(Retrieval, "score", leave)
    assert evaluate.run(limited(cell(checkpoint, tmp_path), 1)).status == "failed"


def test_sigterm_ends_after_the_batch(
    unbroken: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(unbroken, outputs=str(tmp_path))
    original, handler = work.Worker.run, signal.getsignal(signal.SIGTERM)

    def killed(self: Any, batch: Any) -> Any:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self, batch)

    monkeypatch.setattr(work.Worker, "run", killed)
    outcome = evaluate.run(run)
    assert outcome.status == "interrupted"
    assert "goes on from here" in outcome.message
    assert signal.getsignal(signal.SIGTERM) is handler
    assert len(lines_of(run)) == 2
    assert records.read_result(planned(run).directory) is None
    assert evaluate.run(run).status == "interrupted", "later cells don't begin"
    monkeypatch.undo()
    interrupt.forget()
    found, expected = without_timings(evaluated(run)), without_timings(result_of(unbroken))
    assert found["tasks"] == expected["tasks"]
    assert found["memory"] == expected["memory"]


def test_failing_tracker_loses_nothing(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from runners.config import TrackerConfig
    from runners.tracking import WandbTracker

    def broken(*args: Any) -> None:
        raise RuntimeError("no space for the tracker")

    run = replace(limited(cell(checkpoint, tmp_path), 1), tracker=TrackerConfig(name="wandb"))
    for call in ("start", "example", "finish"):
        monkeypatch.setattr(WandbTracker, "start", lambda *args: None)
        monkeypatch.setattr(WandbTracker, "example", lambda *args: None)
        monkeypatch.setattr(WandbTracker, "finish", lambda *args: None)
        monkeypatch.setattr(WandbTracker, call, broken)
        again = replace(run, outputs=str(tmp_path / call))
        assert evaluated(again)["status"] == "completed"
        assert "no space for the tracker" in caplog.text
        caplog.clear()


# --- budgets by length


def test_short_prompts_get_the_nearest_feasible_budget() -> None:
    snapkv = METHODS.get("snapkv")()
    budget = Budget(kept_fraction=0.25)
    found = prompts.check_lengths(snapkv, GEOMETRY, budget, [1000, 100, 132, 100])
    assert found == {1000: budget, 132: budget, 100: Budget(kept_tokens=33)}


def test_all_too_short_is_infeasible() -> None:
    with pytest.raises(InfeasibleBudget) as error:
        prompts.check_lengths(METHODS.get("snapkv")(), GEOMETRY, Budget(kept_fraction=0.25), [100, 90])
    assert error.value.smallest_fraction == pytest.approx(33 / 90, abs=1e-4)


def test_a_token_budget_is_never_too_large_for_short_prompts() -> None:
    snapkv = METHODS.get("snapkv")()
    budget = Budget(kept_tokens=64)
    assert prompts.check_lengths(snapkv, GEOMETRY, budget, [10, 1000]) == {10: budget, 1000: budget}
    with pytest.raises(InfeasibleBudget) as error:
        prompts.check_lengths(snapkv, GEOMETRY, Budget(kept_tokens=20), [10, 1000])
    assert error.value.smallest_tokens == 33


@dataclasses.dataclass(frozen=True)
class Uneven(Retrieval):
    """Some of the contexts are cut to 64 bytes."""

    short: int = 0

    def examples(self, tokenizer: Any) -> list[Any]:
        found = super().examples(tokenizer)
        return [replace(e, context=e.context[-64:]) if int(e.id) < self.short else e for e in found]

    def prompt_lengths(self) -> None:
        return None


Uneven.name = "uneven"


def uneven(checkpoint: Path, outputs: Path, short: int, batch_size: int) -> RunConfig:
    run = cell(checkpoint, outputs, batch_size=batch_size, hyper={"window": 60})
    lengths = {"tasks": ("single",), "lengths": (400,), "distractors": 2}
    return replace(run, benchmark=Uneven(short=short, examples_per_task=20, **lengths))


def test_adjusted_examples_are_counted(checkpoint: Path, tmp_path: Path) -> None:
    result = evaluated(uneven(checkpoint, tmp_path / "some", short=1, batch_size=10))
    assert result["budget"]["adjusted_examples"] == 1
    assert any("1 examples too short" in note for note in result["notes"])
    too_many = uneven(checkpoint, tmp_path / "many", short=2, batch_size=10)
    assert evaluate.run(too_many).status == "failed"
    assert "2 of 20 examples of task single_400" in result_of(too_many)["error"]["message"]


def test_record_is_json_without_nan(unbroken: RunConfig) -> None:
    text = (planned(unbroken).directory / "result.json").read_text()
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} in the record"))


def test_corrupt_result_is_not_overwritten(unbroken: RunConfig, tmp_path: Path) -> None:
    run = replace(unbroken, outputs=str(tmp_path))
    directory = planned(run).directory
    shutil.copytree(planned(unbroken).directory, directory)
    (directory / "result.json").write_text("{")
    with pytest.raises(records.CorruptRecord, match="move it away or delete it"):
        evaluate.run(run)
    assert (directory / "result.json").read_text() == "{"

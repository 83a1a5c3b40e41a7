"""runner.trace on small real runs: what is left is what the cache held, and nothing else changes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from hcache import records
from hcache.kv_cache import KVCache
from hcache.methods.heterocache import RoleSettings
from hcache.models.identity import checkpoint_fingerprint
from hcache.profiling import Graph, HeadProfile
from hcache.trace import Trace, read
from runners import evaluate
from runners.config import ConfigError, RunConfig, RunnerConfig
from runners.plan import planned
from runners.prompts import prepare
from tests.cells import LENGTH, cell, limited, line_without_timings, write_checkpoint

LAYERS, HEADS = 2, 2


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(tmp_path_factory.mktemp("model"))


def traced(run: RunConfig, count: int = 1) -> RunConfig:
    return replace(run, runner=RunnerConfig(trace=count))


def left(run: RunConfig) -> dict[str, Trace]:
    """Run the cell: its traces by file name."""
    outcome = evaluate.run(run)
    assert outcome.status == "completed", outcome.message
    return {path.name: read(path) for path in sorted(planned(run).directory.glob("traces/*"))}


def lines(run: RunConfig) -> list[dict[str, Any]]:
    return records.Predictions(planned(run).directory).load()


def test_the_first_examples_of_each_task_are_traced_and_no_number_changes(
    checkpoint: Path, tmp_path: Path
) -> None:
    plain = cell(checkpoint, tmp_path / "plain", "h2o", kept_fraction=0.25)
    looked_at = traced(cell(checkpoint, tmp_path / "traced", "h2o", kept_fraction=0.25), 2)
    assert planned(plain).cell.config_hash == planned(looked_at).cell.config_hash
    assert left(plain) == {}
    found = left(looked_at)
    names = [f"{task}_{LENGTH}-{i}.npz" for task in ("multi", "single") for i in (0, 1)]
    assert list(found) == names

    def comparable(run: RunConfig) -> list[dict[str, Any]]:
        return [{k: v for k, v in line_without_timings(line).items() if k != "engine"} for line in lines(run)]

    assert comparable(plain) == comparable(looked_at)
    reasons = [line["engine"]["reason"] == "runtime.graphs=off" for line in lines(looked_at)]
    assert reasons == [True, True, False] * 2
    notes = records.read_result(planned(looked_at).directory)["notes"]
    assert any("traced examples: 4" in note for note in notes)
    for line in lines(looked_at):
        trace = found.get(f"{line['task']}-{line['id']}.npz")
        if trace is not None:
            assert (trace.prompt_tokens, trace.new_tokens) == (line["prompt_tokens"], line["new_tokens"])


def test_positions_are_those_of_the_cache(checkpoint: Path, tmp_path: Path) -> None:
    from runners import loading

    run = limited(traced(cell(checkpoint, tmp_path, "h2o", kept_fraction=0.25)), 1)
    trace = next(iter(left(run).values()))
    loaded = loading.loaded(run)
    prompts = prepare(run.benchmark, loaded.tokenizer, 1, loaded.context_tokens)
    prompt = next(prompt for prompt in prompts if prompt.key == (trace.task, trace.id))
    cache = KVCache(loaded.model, run.method, 0.25)
    with torch.inference_mode():
        loaded.model(prompt.ids[None], past_key_values=cache)
    for layer in range(LAYERS):
        for head in range(HEADS):
            first, last = trace.first[layer][head], trace.last[layer][head]
            assert first.tolist() == cache.kept(layer)[0][head].tolist()
            assert set(last.tolist()) < set(first.tolist()), "h2o evicts prompt tokens for new ones"
    assert trace.plan == {}
    assert not trace.windows


def test_each_sequence_of_a_batch_has_its_own(checkpoint: Path, tmp_path: Path) -> None:
    alone = traced(cell(checkpoint, tmp_path / "alone", "snapkv"), 3)
    together = traced(cell(checkpoint, tmp_path / "together", "snapkv", batch_size=3), 3)
    one, three = left(alone), left(together)
    assert one.keys() == three.keys()
    for name, trace in one.items():
        assert [h.tolist() for row in trace.first for h in row] == [
            h.tolist() for row in three[name].first for h in row
        ]


def test_heterocache_leaves_roles_and_windows(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HCACHE_PROFILES", str(tmp_path))
    pairs = torch.ones(2, 2, 2, dtype=torch.float64)
    scores = torch.tensor([[0.9, 0.6], [0.8, 0.7]], dtype=torch.float64)
    name = checkpoint_fingerprint(checkpoint)
    profile = HeadProfile(2, 2, scores, {g: pairs.clone() for g in Graph}, 4, 16, name)
    profile.save(tmp_path / f"{profile.fingerprint}.safetensors")
    run = traced(cell(checkpoint, tmp_path / "o", "heterocache", kept_fraction=0.8, batch_size=2))
    found = left(limited(run, 2))
    counters = [line["counters"] for line in lines(limited(run, 2))]
    for task in ("multi", "single"):
        trace = found[f"{task}_{LENGTH}-0.npz"]
        assert sorted(trace.plan["roles"][0]) == ["pivot", "satellite"]
        assert (trace.plan["steps"], trace.plan["threshold"]) == (5, profile.roles().stable_threshold)
        assert {len(window.overlap) for window in trace.windows} == {5}
        assert all(trace.plan["roles"][window.layer][window.head] == "pivot" for window in trace.windows)
        numbers = [window.number for window in trace.windows if window.layer == 0]
        assert numbers == list(range(1, len(numbers) + 1))
        assert len(numbers) == trace.new_tokens // 5
    assert 0 < sum(len(trace.windows) for trace in found.values()) <= sum(c["windows"] for c in counters)
    fitted = cell(checkpoint, tmp_path / "o", "heterocache", hyper={"roles": RoleSettings(fit_budget=True)})
    roles = [
        role
        for trace in left(limited(traced(fitted), 1)).values()
        for row in trace.plan["roles"]
        for role in row
    ]
    assert "anchor" in roles, "roles are those that were left after fitting"


def test_what_can_not_be_traced_is_refused(tmp_path: Path) -> None:
    for settings in ({"trace": -1}, {"name": "latency", "trace": 1}):
        with pytest.raises(ConfigError, match="runner.trace="):
            RunnerConfig(**settings)


def test_a_torn_trace_is_none(checkpoint: Path, tmp_path: Path) -> None:
    run = limited(traced(cell(checkpoint, tmp_path)), 1)
    left(run)
    path = next(planned(run).directory.glob("traces/*"))
    path.write_bytes(path.read_bytes()[:200])
    with pytest.raises(ValueError, match="is no trace that can be read"):
        read(path)
    path.write_text(json.dumps({}))
    with pytest.raises(ValueError, match="is no trace that can be read"):
        read(path)

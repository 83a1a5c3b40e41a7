"""What W&B gets of real runs: every figure of the record, the configuration, and a row for every example."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from hcache import records
from runners import latency
from runners.latency_settings import Baseline
from runners.tracking import point_metrics
from tests import test_latency
from tests.offline_runs import OFFLINE, Tracked, needle_run, tracked, without_account


def leaves(value: Any, path: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], Any]]:
    """Every number of a record with its place; truth values are none."""
    if isinstance(value, Mapping | list):
        named = value.items() if isinstance(value, Mapping) else enumerate(value)
        for name, part in named:
            yield from leaves(part, (*path, name))
    elif isinstance(value, int | float) and not isinstance(value, bool):
        yield path, value


def measured(result: records.Result) -> dict[tuple[str | int, ...], Any]:
    """All numbers of a record but those of its configuration."""
    return dict(leaves({key: value for key, value in result.items() if key != "config"}))


@pytest.fixture(autouse=True, scope="module")
def client(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with without_account(tmp_path_factory.mktemp("wandb-home")):
        yield


@pytest.fixture(scope="module", params=["snapkv", "shadowkv", "fullkv"])
def example_run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tracked:
    return needle_run(tmp_path_factory.mktemp(request.param), request.param)


def test_every_figure_of_the_record_is_in_the_summary(example_run: Tracked) -> None:
    found = measured(example_run.result)
    for part in ("score", "tasks", "aggregates", "budget", "memory", "latency", "engine", "counters"):
        assert any(path[0] == part for path in found), f"this run measures no {part}"
    ends = {path[-1] for path in found if path[0] == "latency"}
    assert ends == {"median", "p10", "p90", "tokens_per_s", "host_to_device_bytes_per_token"}
    assert any("ci95" in path for path in found)
    assert 0 < found["score",] < 100
    logged = dict(leaves(example_run.summary))
    missing = {path: value for path, value in found.items() if logged.get(path) != value}
    assert missing == {}


def test_the_rest_of_the_record_is_there_as_well(example_run: Tracked) -> None:
    for key, value in example_run.result.items():
        if key != "config":
            assert example_run.summary[key] == value
    assert example_run.config == example_run.result["config"]


def test_every_example_is_a_row(example_run: Tracked) -> None:
    assert len(example_run.lines) == 6
    assert len(example_run.history) == len(example_run.lines)
    for step, (row, line) in enumerate(zip(example_run.history, example_run.lines, strict=True)):
        assert row["_step"] == step
        assert row[f"score/{line['task']}"] == row["score/all"] == 100 * line["score"]
        assert row["decode_ms_per_token"] == line["decode_ms"] / line["decode_steps"]
        assert row["device_kv_bytes"] == line["memory"]["device_payload"] + line["memory"]["device_metadata"]
        for key in ("prompt_tokens", "new_tokens", "prefill_ms"):
            assert row[key] == line[key]
    assert example_run.history[-1]["predictions/nrows"] == len(example_run.lines)


def test_latency_is_there_as_points_and_as_rows(tmp_path: Path) -> None:
    latency._shared.clear()
    run = replace(test_latency.cell(tmp_path, baselines=[Baseline.sdpa]), tracker=OFFLINE)
    assert latency.run(run).status == "completed"
    found = tracked(run)
    points = found.result["latency"]["points"]
    numbers = measured(found.result)
    assert ("latency", "points", 1, "decode_ms", "median") in numbers
    logged = dict(leaves(found.summary))
    assert {path: value for path, value in numbers.items() if logged.get(path) != value} == {}
    assert found.config == found.result["config"]
    assert [row["latency/context"] for row in found.history] == [64, 128]
    for row, point in zip(found.history, points, strict=True):
        assert row["latency/decode_ms"] == point["decode_ms"]["median"]
        assert row["latency/tokens_per_s"] == point["tokens_per_s"]
        assert row["latency/speedup"] == point["speedup"]
        assert point_metrics(point).items() <= row.items()


def test_an_infeasible_latency_cell_says_what_it_needs(tmp_path: Path) -> None:
    latency._shared.clear()
    run = replace(test_latency.cell(tmp_path, fraction=0.01, contexts=[64]), tracker=OFFLINE)
    assert latency.run(run).status == "infeasible"
    found = tracked(run)
    assert found.summary["error"] == found.result["error"]
    assert found.summary["error"]["smallest_fraction"] > 0.01
    assert found.history[0].keys() >= {"latency/context", "latency/smallest_fraction"}

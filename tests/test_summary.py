"""From lines to numbers, and the table that shows them."""

from __future__ import annotations

import io
import random
from typing import Any

import pytest
from rich.console import Console

from hcache.metrics import wilson
from hcache.records import Line
from runners.progress import CellProgress
from runners.summary import mean, percentile, summarise
from runners.table import comparison, show

REQUESTED = {"requested_fraction": 0.25, "requested_tokens": None}


def line(task: str, score: float, batch: int = 0, **changes: Any) -> Line:
    memory = {
        "device_payload": 200.0,
        "device_metadata": 50.0,
        "device_reserved": 10.0,
        "host_payload": 70.0,
        "full_kv_bytes": 1000.0,
        "peak_device_bytes": None,
    }
    counters = {"attended_fraction": 0.5, "triggers": 2.0, "host_to_device_bytes": 40.0}
    times = {"prefill_ms": 100.0, "decode_ms": 30.0, "decode_steps": 3, "new_tokens": 4}
    base = {"task": task, "metric": "exact", "score": score, "batch": batch, "adjusted_budget_tokens": None}
    return {**base, **times, "memory": memory, "counters": counters, **changes}


def test_numbers_of_two_batches() -> None:
    lines = [
        line("a", 1.0, 0),
        line("a", 0.0, 0, decode_ms=60.0, decode_steps=4, new_tokens=4),
        line("b", 0.5, 1, counters={"attended_fraction": 0.2}, adjusted_budget_tokens=33),
    ]
    found = summarise(lines, REQUESTED)
    assert found["tasks"]["a"] == {
        "metric": "exact",
        "score": 50.0,
        "n": 2,
        "ci95": pytest.approx([9.453, 90.547], abs=1e-2),
    }
    assert found["budget"] == {
        **REQUESTED,
        "resident_fraction": 0.25,
        "attended_fraction": pytest.approx(0.4),
        "adjusted_examples": 1,
    }
    assert found["memory"]["device_kv_bytes"] == 250
    assert found["memory"]["host_kv_bytes"] == 70
    assert found["memory"]["peak_device_bytes"] is None
    assert found["counters"]["triggers"] == 4
    assert found["latency"]["decode_ms_per_token"]["median"] == 10
    # Batch 0 decodes side by side for 60 ms, batch 1 for 30 ms: 10 steps' tokens in 90 ms.
    assert found["latency"]["tokens_per_s"] == pytest.approx(10 / 0.090)
    assert found["latency"]["host_to_device_bytes_per_token"] == pytest.approx(80 / 10)


def test_nothing_decoded_is_a_gap() -> None:
    found = summarise([line("a", 1.0, decode_ms=0.0, decode_steps=0)], REQUESTED)
    assert found["latency"]["decode_ms_per_token"] == {"median": None, "p10": None, "p90": None}
    assert found["latency"]["tokens_per_s"] is None


def test_no_lines_is_an_error() -> None:
    with pytest.raises(ValueError, match=r"benchmark\.limit"):
        summarise([], REQUESTED)


def test_wilson_covers_the_truth() -> None:
    """At least 93% of intervals of binomial draws hold the true mean, and none is empty at 0 or 1."""
    rng = random.Random(0)
    for truth in (0.05, 0.5, 0.9):
        held = 0
        for _ in range(2000):
            score = sum(rng.random() < truth for _ in range(50)) / 50
            low, high = wilson(score, 50)
            held += low <= truth <= high
        assert held / 2000 > 0.93
    assert wilson(0.0, 10)[1] == pytest.approx(0.2775, abs=1e-3)
    assert wilson(1.0, 10)[0] == pytest.approx(0.7225, abs=1e-3)


def test_percentile_and_mean() -> None:
    values = [5.0, 1.0, 2.0, 4.0, 3.0]
    assert [percentile(values, q) for q in (0, 0.1, 0.5, 0.9, 1)] == pytest.approx([1, 1.4, 3, 4.6, 5])
    assert percentile([], 0.5) is None
    assert mean([1e16, 1.0, 1.0]) == mean([1.0, 1.0, 1e16]) == (1e16 + 2.0) / 3


def result(method: str, budget: str, decode_ms: float, **changes: Any) -> dict[str, Any]:
    spread = {"median": decode_ms, "p10": decode_ms, "p90": decode_ms}
    cell = {"tag": "x", "model": "tiny", "benchmark": "b", "method": method, "budget": budget, "seed": 0}
    measured = {
        "score": 75.0,
        "tasks": {name: {"score": 75.0, "n": 10, "ci95": [44.1, 92.2]} for name in ("single", "multi")},
        "budget": {"resident_fraction": 0.251},
        "latency": {"prefill_ms": spread, "decode_ms_per_token": spread},
    }
    return {"status": "completed", "cell": cell, "config": config(method), **measured, **changes}


def config(method: str, **options: Any) -> dict[str, Any]:
    return {
        "model": {"name": "tiny"},
        "method": {"name": method, **options},
        "benchmark": {"name": "b"},
        "budget": None,
        "runtime": {"seed": 0, "batch_size": 1},
    }


def printed(results: list[dict[str, Any]]) -> str:
    file = io.StringIO()
    show(results, Console(file=file))
    return file.getvalue()


def test_table_compares_with_fullkv() -> None:
    text = printed([result("fullkv", "full", 10.0), result("snapkv", "f0.25", 5.0, notes=["one note"])])
    row = next(line for line in text.splitlines() if line.startswith(" snapkv"))
    assert "75.0 [44-92]" in row
    assert "5.0 (0.50x)" in row
    assert "0.251" in row
    assert "snapkv f0.25: one note" in text
    assert "n = 10 a task" in text
    assert "status" not in text


def test_cells_without_numbers_are_gaps() -> None:
    bad = {
        "status": "infeasible",
        "cell": result("heterocache", "f0.05", 0)["cell"],
        "config": config("heterocache"),
        "error": {"message": "needs 0.2"},
        "budget": {"requested_fraction": 0.05},
    }
    text = printed([result("snapkv", "f0.05", 5.0), bad])
    row = next(line for line in text.splitlines() if line.startswith(" heterocache"))
    assert "infeasible" in row
    assert "75" not in row
    assert "heterocache f0.05: infeasible: needs 0.2" in text
    assert "x)" not in row
    assert "fullkv" not in text


def test_table_names_what_differs() -> None:
    other = result("snapkv", "f0.25", 5.0)
    other["cell"] = {**other["cell"], "model": "large"}
    assert [c.header for c in comparison([other]).columns][2] == "single"
    assert [c.header for c in comparison([result("snapkv", "f0.25", 5.0), other]).columns][2] == "model"


def test_a_swept_option_is_a_column_and_other_settings_share_no_base() -> None:
    cells = [result("snapkv", "f0.25", 5.0, config=config("snapkv", window=w)) for w in (8, 16)]
    headers = [column.header for column in comparison([*cells, result("fullkv", "full", 10.0)]).columns]
    assert headers[2] == "method.window"
    other = result("fullkv", "full", 10.0)
    other["config"]["benchmark"]["seed"] = 7
    assert "0.50x" not in printed([result("snapkv", "f0.25", 5.0), other])


def test_progress_without_terminal_says_little() -> None:
    file = io.StringIO()
    with CellProgress("cell", 100, [line("a", 1.0)] * 20, Console(file=file)) as progress:
        for _ in range(80):
            progress.update(line("a", 0.0))
    lines = file.getvalue().splitlines()
    assert lines[0] == "cell: 100 examples, 20 done before"
    assert lines[-1] == "cell: 100/100  score 20.0  10.0 ms/token"
    assert 8 <= len(lines) <= 14


def test_progress_on_a_terminal_is_live() -> None:
    file = io.StringIO()
    console = Console(file=file, force_terminal=True, width=120)
    with CellProgress("cell", 2, [], console) as progress:
        progress.update(line("a", 1.0))
    assert "1/2" in file.getvalue()
    assert "score 100.0  10.0 ms/token" in file.getvalue()

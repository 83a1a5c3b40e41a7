"""analysis.seeds: one run says what its record says, several are joined by example."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from analysis.cells import read
from analysis.seeds import by_budget, score, seeds, total
from hcache.metrics import mean_interval, wilson
from tests.test_analysis_table import leave


def test_one_run_says_what_its_record_says(tmp_path: Path) -> None:
    leave(tmp_path, "snapkv", 0.25, scores=[1.0, 1.0, 0.0, 0.5])
    cells = read([tmp_path])
    found, entry = score(cells, "one"), cells[0].result["tasks"]["one"]
    assert (found.mean, [found.low, found.high], found.n) == (entry["score"], entry["ci95"], 4)
    assert total(cells).mean == cells[0].result["score"]
    tasks = [score(cells, name) for name in ("one", "two")]
    low, high = mean_interval([t.mean for t in tasks], [(t.low, t.high) for t in tasks])
    assert (total(cells).low, total(cells).high, total(cells).n) == pytest.approx((low, high, 8))
    assert seeds(cells) == ""
    assert math.isnan(score(cells, "three").mean)


def test_an_example_run_twice_counts_once_and_another_seeds_examples_are_more(tmp_path: Path) -> None:
    for seed, first in ((0, 1.0), (1, 0.0)):
        leave(tmp_path / "runs", "snapkv", 0.25, scores=[first, 0.5, 0.5], seed=seed)
        leave(tmp_path / "facts", "snapkv", 0.25, scores=[first, 0.5, 0.5], benchmark_seed=seed)
    for name, n in (("runs", 3), ("facts", 6)):
        found = score(read([tmp_path / name]), "one")
        low, high = wilson(0.5, n)
        assert (found.mean, found.low, found.high, found.n) == pytest.approx((50, 100 * low, 100 * high, n))
        assert seeds(read([tmp_path / name])) == "2 seeds a point"


def test_all_tasks_together_take_the_interval_of_the_record_and_none_where_it_is_not_known(
    tmp_path: Path,
) -> None:
    """A benchmark may weigh its tasks: an interval of the plain mean would be another score's."""
    leave(tmp_path, "snapkv", 0.25, scores=[1.0, 0.0])
    (cell,) = read([tmp_path])
    cell.result["score"] = 61.0
    assert math.isnan(total([cell]).low)
    cell.result["aggregates"] = {"other": {"score": 50.0, "ci95": [1, 2]}}
    assert math.isnan(total([cell]).low)
    cell.result["aggregates"]["official"] = {"score": 61.0, "ci95": [40.0, 70.0]}
    found = total([cell])
    assert (found.mean, found.low, found.high) == (61, 40, 70)
    cell.result["score"] = cell.result["aggregates"]["official"]["score"] = 50.0
    assert total([cell]).low == 40, "an official score has its own, plain mean or not"
    cell.result["aggregates"] = {"overall": {"score": 50.0, "ci95": [50, 50]}}
    assert total([cell]).low == pytest.approx(21.3, abs=0.1), "a plain mean has that of its tasks"


def test_a_task_without_a_score_leaves_none_to_several_runs(tmp_path: Path) -> None:
    """As lm_eval leaves one whose metric isn't chosen."""
    for seed in (0, 1):
        leave(tmp_path, "snapkv", 0.25, seed=seed)
    found = read([tmp_path])
    for cell in found:
        cell.result["tasks"]["two"] |= {"score": None, "ci95": None}
        cell.result["tasks"]["three"] = {"score": None, "ci95": None, "n": 0, "metric": "x"}
    assert math.isnan(score(found, "three").mean)
    assert total(found).mean == 50
    assert math.isnan(total(found).low)
    assert math.isnan(total(found[:1]).low)


def test_cells_without_numbers_are_in_their_budget_and_in_no_mean(tmp_path: Path) -> None:
    leave(tmp_path, "omnikv", 0.1, infeasible=0.2)
    leave(tmp_path, "omnikv", 0.25, 0.5, seed=0)
    leave(tmp_path, "omnikv", 0.25, 0.7, seed=1)
    small, large = by_budget(sorted(read([tmp_path]), key=lambda cell: cell.order))
    assert [cell.budget for cell in small + large] == ["f0.1", "f0.25", "f0.25"]
    assert math.isnan(score(small, "one").mean)
    assert math.isnan(total(small).mean)
    assert total(large).mean == pytest.approx(60)

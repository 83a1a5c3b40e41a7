"""analysis.statistics against scipy and statsmodels, and by simulation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from analysis import frame
from analysis.cells import read
from analysis.statistics import comparisons, holm, paired
from tests.test_analysis_table import leave

stats = pytest.importorskip("scipy.stats")
multitest = pytest.importorskip("statsmodels.stats.multitest")


def pairs(seed: int, n: int, gap: float = 0.0, noise: float = 10.0) -> tuple[list[float], list[float]]:
    """Scores of two methods in points, on examples of one difficulty each: `gap` apart on average, and each
    difference with a standard deviation of `noise`."""
    rng = np.random.default_rng(seed)
    difficulty = 100 * rng.random(n)
    return list(difficulty + gap + noise * rng.standard_normal(n)), list(difficulty)


def scipy_p(a: list[float], b: list[float]) -> float:
    """Exact: all sign flips."""
    test = stats.permutation_test(
        (a, b), lambda x, y, axis: np.mean(x - y, axis=axis), permutation_type="samples", vectorized=True
    )
    return float(test.pvalue)


@pytest.mark.parametrize("seed", range(4))
def test_the_p_value_is_scipys_exact_one(seed: int) -> None:
    a, b = pairs(seed, 11, gap=4.0)
    assert paired(a, b, draws=40_000).p == pytest.approx(scipy_p(a, b), abs=0.01)


def test_the_interval_is_scipys_percentile_bootstrap() -> None:
    a, b = pairs(1, 60, gap=3.0)
    gaps = np.subtract(a, b)
    settings = {"n_resamples": 20_000, "method": "percentile", "rng": np.random.default_rng(0)}
    theirs = stats.bootstrap((gaps,), np.mean, **settings).confidence_interval
    found = paired(a, b, draws=20_000)
    assert (found.low, found.high) == pytest.approx((theirs.low, theirs.high), abs=0.15)
    assert found.difference == pytest.approx(gaps.mean())


@pytest.mark.parametrize("seed", range(5))
def test_holm_is_that_of_statsmodels(seed: int) -> None:
    rng = np.random.default_rng(seed)
    p_values = [*rng.random(7) ** 3, 0.04, 0.041, 0.5, 0.5, 0.0, 1.0]
    rng.shuffle(p_values)
    theirs = multitest.multipletests(p_values, method="holm")[1]
    assert holm(p_values) == pytest.approx(list(theirs), abs=1e-12)


def test_holm_of_nothing_and_of_no_p_value() -> None:
    assert holm([]) == []
    with pytest.raises(ValueError, match="between 0 and 1"):
        holm([0.5, float("nan")])


def test_a_planted_difference_of_three_points_is_found() -> None:
    """200 examples, differences of 3 +- 10 points: 4.2 standard errors, so 98% power."""
    found = [paired(*pairs(seed, 200, gap=3.0), draws=1000) for seed in range(60)]
    assert np.mean([one.p < 0.05 for one in found]) > 0.9
    assert np.mean([one.low <= 3.0 <= one.high for one in found]) > 0.85
    assert np.mean([one.difference for one in found]) == pytest.approx(3.0, abs=0.3)


def test_under_the_null_alarms_are_as_rare_as_promised() -> None:
    """Of 400 comparisons at 5%: 20 expected, and from 9 to 32 in 99.5% of all cases."""
    alarms = sum(paired(*pairs(seed, 200), draws=400).p <= 0.05 for seed in range(1000, 1400))
    assert 9 <= alarms <= 32


def test_holm_keeps_families_silent_under_the_null() -> None:
    """60 families of 8 comparisons: 3 with a false alarm expected at 5%; without correction 20."""
    families = [[paired(*pairs(8 * f + i, 40), draws=400).p for i in range(8)] for f in range(300, 360)]
    alarms = sum(min(holm(p_values)) <= 0.05 for p_values in families)
    assert alarms <= 8 < sum(min(p_values) <= 0.05 for p_values in families)


def test_wins_ties_and_losses() -> None:
    found = paired([1.0, 0.5, 0.0, 1.0], [0.0, 0.5, 1.0, 0.5])
    assert (found.wins, found.ties, found.losses, found.n) == (2, 1, 1, 4)


# --- on records


def test_a_method_meets_others_at_its_budget_and_those_without_one(tmp_path: Path) -> None:
    leave(tmp_path, "fullkv", None, scores=[1.0] * 20)
    for kept in (0.1, 0.25):
        leave(tmp_path, "ours", kept, scores=[1.0] * 10 + [0.0] * 10)
        leave(tmp_path, "other", kept, scores=[kept] * 20)
    found = comparisons(frame.examples(read([tmp_path])), "ours")
    met = {(row.ours_budget, row.other, row.other_budget, row.task) for row in found.itertuples()}
    budgets = {
        (own, other, kept)
        for own in ("f0.1", "f0.25")
        for other, kept in (("fullkv", "full"), ("other", own))
    }
    assert met == {(*names, task) for names in budgets for task in ("one", "two")}
    row = found.set_index(["ours_budget", "other", "task"]).loc[("f0.1", "other", "one")]
    assert (row["n"], row["wins"], row["ties"], row["losses"]) == (20, 10, 0, 10)
    assert row["difference"] == pytest.approx(40)
    assert list(found["p_holm"]) == pytest.approx(holm(list(found["p"])))
    alone = paired([100.0] * 10 + [0.0] * 10, [10.0] * 20)
    assert row["p"] == pytest.approx(alone.p, abs=0.01)


def test_another_seed_of_the_runtime_is_no_new_evidence_and_one_of_the_benchmark_is(tmp_path: Path) -> None:
    for seed in (0, 1):
        leave(tmp_path / "runs", "ours", 0.25, scores=[float(seed)] * 6, seed=seed)
        leave(tmp_path / "runs", "other", 0.25, scores=[0.25] * 6, seed=seed)
        leave(tmp_path / "facts", "ours", 0.25, scores=[float(seed)] * 6, benchmark_seed=seed)
        leave(tmp_path / "facts", "other", 0.25, scores=[0.25] * 6, benchmark_seed=seed)
    runs, facts = (comparisons(frame.examples(read([tmp_path / name])), "ours") for name in ("runs", "facts"))
    assert list(runs["n"]) == [6, 6]
    assert list(facts["n"]) == [12, 12]
    assert list(runs["difference"]) == list(facts["difference"]) == pytest.approx([25.0, 25.0])
    assert list(runs["wins"]) == list(facts["wins"]) == [6, 6]
    assert list(facts["losses"]) == [6, 6]


def test_settings_of_the_method_asked_for_stand_apart(tmp_path: Path) -> None:
    for window in (8, 16):
        leave(tmp_path, "ours", 0.25, scores=[window / 16] * 5, options={"window": window})
    leave(tmp_path, "other", 0.25, scores=[0.5] * 5)
    found = comparisons(frame.examples(read([tmp_path])), "ours")
    gaps = dict(zip(found["ours"], found["difference"], strict=True))
    assert gaps == {"ours (window=8)": 0.0, "ours (window=16)": 50.0}


def test_nobody_to_compare_with_is_said(tmp_path: Path) -> None:
    leave(tmp_path, "ours", 0.25)
    leave(tmp_path, "other", 0.1)
    leave(tmp_path, "third", 0.25, model="another")
    examples = frame.examples(read([tmp_path]))
    with pytest.raises(ValueError, match="no other cell ran with the same model, benchmark and budget"):
        comparisons(examples, "ours")
    with pytest.raises(ValueError, match="there are: other, ours, third"):
        comparisons(examples, "mine")

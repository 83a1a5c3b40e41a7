"""Scores and statistics against exact values: enumeration, the normal limit, known coverage."""

import itertools

import numpy as np
import pytest

from hcache.metrics import (
    bootstrap_ci,
    exact_match,
    mean_interval,
    paired_bootstrap,
    tree_ci,
    tree_mean,
    tree_size,
    wilson,
)


def test_exact_match_is_the_share_of_right_places() -> None:
    assert exact_match(["1", "2", ""], ["1", "3", "4"]) == pytest.approx(1 / 3)
    assert exact_match(["1"], ["1"]) == 1.0
    assert exact_match(["1 "], ["1"]) == 0.0


@pytest.mark.parametrize(("said", "right"), [(["1"], ["1", "2"]), ([], [])])
def test_exact_match_needs_pairs(said: list[str], right: list[str]) -> None:
    with pytest.raises(ValueError, match="one by one"):
        exact_match(said, right)


def test_interval_is_the_quantiles_of_all_resamples() -> None:
    values = [0.0, 0.2, 0.9, 1.0, 0.4]
    means = [np.mean(sample) for sample in itertools.product(values, repeat=5)]
    low, high = bootstrap_ci(values, seed=0, draws=40_000)
    assert low == pytest.approx(np.quantile(means, 0.025), abs=0.025)
    assert high == pytest.approx(np.quantile(means, 0.975), abs=0.025)


def test_interval_nears_the_normal_one() -> None:
    values = np.random.default_rng(1).random(2000)
    low, high = bootstrap_ci(list(values), seed=0, level=0.9)
    half = 1.6449 * values.std() / np.sqrt(2000)
    assert low == pytest.approx(values.mean() - half, abs=half / 10)
    assert high == pytest.approx(values.mean() + half, abs=half / 10)


def test_intervals_depend_on_the_seed_only() -> None:
    values = list(np.random.default_rng(2).random(50))
    assert bootstrap_ci(values, seed=3) == bootstrap_ci(values, seed=3)
    assert bootstrap_ci(values, seed=3) != bootstrap_ci(values, seed=4)
    assert bootstrap_ci([0.7] * 10, seed=0) == pytest.approx((0.7, 0.7))


def test_p_value_is_the_share_of_all_sign_flips() -> None:
    rng = np.random.default_rng(5)
    a, b = rng.random(10) + 0.15, rng.random(10)
    gaps = a - b
    flipped = [abs(np.dot(signs, gaps)) for signs in itertools.product((-1, 1), repeat=10)]
    exact = np.mean(np.array(flipped) >= abs(gaps.sum()) - 1e-9)
    found = paired_bootstrap(list(a), list(b), seed=0, draws=40_000)
    assert found.p_value == pytest.approx(exact, abs=0.01)
    assert found.difference == pytest.approx(gaps.mean())


def test_pairing_finds_what_separate_intervals_hide() -> None:
    rng = np.random.default_rng(6)
    difficulty = rng.random(300)
    better, worse = difficulty + 0.02 + 0.01 * rng.standard_normal(300), difficulty
    found = paired_bootstrap(list(better), list(worse), seed=0)
    assert found.p_value < 0.001
    assert 0 < found.ci[0] < 0.02 < found.ci[1] + 0.005
    assert bootstrap_ci(list(better), 0)[0] < bootstrap_ci(list(worse), 0)[1]


def test_no_difference_is_no_evidence() -> None:
    same = [0.0, 1.0, 1.0, 0.0]
    found = paired_bootstrap(same, same, seed=0)
    assert (found.difference, found.ci, found.p_value) == (0.0, (0.0, 0.0), 1.0)


def test_the_sides_are_symmetric() -> None:
    rng = np.random.default_rng(7)
    a, b = list(rng.integers(0, 2, 60).astype(float)), list(rng.integers(0, 2, 60).astype(float))
    forth, back = paired_bootstrap(a, b, seed=1), paired_bootstrap(b, a, seed=1)
    assert forth.difference == -back.difference
    assert forth.p_value == back.p_value
    assert forth.ci == pytest.approx((-back.ci[1], -back.ci[0]))


def test_false_alarms_are_as_rare_as_promised() -> None:
    rng = np.random.default_rng(8)
    alarms = 0
    for trial in range(200):
        a, b = rng.random(40), rng.random(40)
        alarms += paired_bootstrap(list(a), list(b), seed=trial, draws=400).p_value <= 0.05
    assert 2 <= alarms <= 22


@pytest.mark.parametrize(
    ("values", "options", "message"),
    [
        ([], {}, "one or more scores"),
        ([float("nan")], {}, "finite"),
        ([1.0], {"level": 1.0}, "between 0 and 1"),
        ([1.0], {"draws": 0}, "at least 1"),
    ],
)
def test_impossible_questions_are_refused(values: list[float], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_ci(values, seed=0, **options)
    with pytest.raises(ValueError, match=message):
        paired_bootstrap(values, values, seed=0, **options)


def test_pairs_need_the_same_examples() -> None:
    with pytest.raises(ValueError, match="got 2 and 1"):
        paired_bootstrap([1.0, 0.0], [1.0], seed=0)


def test_a_trees_mean_is_that_of_its_means() -> None:
    assert tree_mean([1.0, 0.0, 0.5]) == 0.5
    assert tree_mean([[1.0, 1.0, 1.0], [0.0]]) == 0.5
    assert tree_mean([[[1.0], [0.0, 0.0]], [[0.5]]]) == 0.5
    assert tree_size([[[1.0], [0.0, 0.0]], [[0.5]]]) == 4
    for empty in ([], [[1.0], []]):
        with pytest.raises(ValueError, match="no score"):
            tree_mean(empty)


def test_a_trees_interval() -> None:
    """One list is the plain bootstrap; a task of few examples widens the mean of tasks as it should."""
    values = [float(i % 3 == 0) for i in range(40)]
    assert tree_ci(values, seed=3) == bootstrap_ci(values, seed=3)
    low, high = tree_ci([values, [1.0]], seed=0)
    mean = tree_mean([values, [1.0]])
    assert low < mean < high
    plain_low, plain_high = bootstrap_ci(values, seed=0)
    assert high - low == pytest.approx((plain_high - plain_low) / 2, rel=0.1)


def test_interval_of_a_mean_of_tasks() -> None:
    """One task has its own; symmetric ones are those of a sum of independent errors; none is no number."""
    assert mean_interval([0.9], [wilson(0.9, 20)]) == pytest.approx(wilson(0.9, 20))
    assert mean_interval([50, 20], [(44, 56), (12, 28)]) == pytest.approx((35 - 5, 35 + 5))
    low, high = mean_interval([100, 100], [(90, 100), (90, 100)])
    assert (low, high) == pytest.approx((100 - 10 / 2**0.5, 100)), "all right is not sure"
    assert np.isnan(mean_interval([1.0, 2.0], [(0.0, 1.5), (float("nan"), 2.5)])[0])
    for scores, intervals in (([], []), ([1.0], [])):
        with pytest.raises(ValueError, match="its interval"):
            mean_interval(scores, intervals)


def test_interval_of_a_mean_of_tasks_covers_as_often_as_promised() -> None:
    """Simulation: three tasks, easy, middling and hard, 30 answers each."""
    rng = np.random.default_rng(0)
    truth, n, runs = np.array([0.95, 0.5, 0.1]), 30, 4000
    covered = 0
    for scores in rng.binomial(n, truth, (runs, 3)) / n:
        low, high = mean_interval(list(scores), [wilson(score, n) for score in scores])
        covered += low <= truth.mean() <= high
    assert covered / runs == pytest.approx(0.95, abs=0.02)

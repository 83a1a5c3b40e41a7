"""Budgets: what is kept, exactly."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hcache.allocation import round_to_sum, water_fill
from hcache.budget import Budget, InfeasibleBudget


@pytest.mark.parametrize("value", [0, 0.0, 1.7, -0.1, True, "abc"])
def test_fractions_out_of_range_are_refused(value: object) -> None:
    with pytest.raises(ValueError, match="kept_fraction"):
        Budget(kept_fraction=value)  # type: ignore[arg-type]


@pytest.mark.parametrize(("value", "message"), [(1, "ambiguous"), (0, "whole number"), (2.5, "whole number")])
def test_token_counts_out_of_range_are_refused(value: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Budget(kept_tokens=value)  # type: ignore[arg-type]


def test_exactly_one_must_be_set() -> None:
    with pytest.raises(ValueError, match="neither"):
        Budget()
    with pytest.raises(ValueError, match="both"):
        Budget(kept_fraction=0.5, kept_tokens=100)


def test_a_float_is_a_fraction_and_an_int_is_tokens() -> None:
    assert Budget.of(0.25) == Budget(kept_fraction=0.25)
    assert Budget.of(1.0) == Budget(kept_fraction=1.0)
    assert Budget.of(512) == Budget(kept_tokens=512)
    with pytest.raises(ValueError, match="ambiguous"):
        Budget.of(1)


def test_fractions_round_down_in_decimal() -> None:
    assert Budget(kept_fraction=0.29).tokens(100) == 29  # 28.999... in binary
    assert Budget(kept_fraction=0.1).tokens(30) == 3
    assert Budget(kept_fraction=0.25).tokens(2047) == 511


def test_infeasible_names_the_smallest_feasible() -> None:
    error = InfeasibleBudget("too little", 200, 1000)
    assert error.smallest_fraction == 0.2
    assert "kept_fraction=0.2000" in str(error)
    assert "kept_tokens=200" in str(error)


WEIGHTS = st.lists(st.floats(0.01, 100), min_size=1, max_size=40)


@given(WEIGHTS, st.integers(0, 5000), st.integers(1, 300))
def test_water_filling_is_exact_capped_and_monotone(weights: list[float], total: int, cap: int) -> None:
    shares = water_fill(weights, total, cap)
    assert sum(shares) == min(total, cap * len(weights))
    assert all(0 <= share <= cap for share in shares)
    by_weight = sorted(zip(weights, shares, strict=True))
    assert all(a <= b + 1 for (_, a), (_, b) in itertools.pairwise(by_weight))


def test_water_filling_gives_the_clipped_surplus_to_the_others() -> None:
    assert water_fill([10.0, 1.0, 1.0], 120, 60) == [60, 30, 30]


@given(WEIGHTS, st.data())
def test_largest_remainder_stays_within_one_of_the_share(shares: list[float], data: st.DataObject) -> None:
    total = data.draw(st.integers(int(sum(map(int, shares))), round(sum(shares))))
    whole = round_to_sum(shares, total, [1000] * len(shares))
    assert sum(whole) == total
    assert all(abs(w - s) <= 1 for w, s in zip(whole, shares, strict=True))


@given(st.integers(2, 500), st.integers(1, 4000))
def test_the_named_fraction_is_feasible_itself(tokens: int, extra: int) -> None:
    prompt = tokens + extra
    fraction = InfeasibleBudget("", tokens, prompt).smallest_fraction
    assert Budget(kept_fraction=fraction).tokens(prompt) >= tokens

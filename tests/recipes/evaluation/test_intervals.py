"""Intervals against numbers worked out by hand, and against what they must never do."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.evaluation.intervals import Z, mean, share


def test_wilson_by_hand() -> None:
    """5 of 10: middle 1/2, half-width z·√(1/40 + z²/400) / (1 + z²/10). 0 of n: 0 to z²/(n+z²)."""
    half = Z * math.sqrt(0.25 / 10 + Z * Z / 400) / (1 + Z * Z / 10)
    figure = share(5, 10)
    assert (figure.low, figure.high) == pytest.approx((0.5 - half, 0.5 + half))
    assert (figure.low, figure.high) == pytest.approx((0.2366, 0.7634), abs=1e-4)
    assert (share(0, 10).low, share(0, 10).high) == pytest.approx((0.0, 0.2775), abs=1e-4)
    assert (share(10, 10).low, share(10, 10).high) == pytest.approx((0.7225, 1.0), abs=1e-4)
    assert (share(81, 263).low, share(81, 263).high) == pytest.approx((0.2553, 0.3662), abs=1e-4)


def test_no_answers_no_interval() -> None:
    for figure in (share(0, 0), mean([])):
        assert math.isnan(figure.value) and math.isnan(figure.low) and figure.count == 0
        assert figure.to_dict() == {"value": None, "low": None, "high": None, "count": 0}
    alone = mean([3.0])
    assert alone.value == 3.0 and math.isnan(alone.low) and math.isnan(alone.high)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_share_within_0_and_1(numbers: tuple[int, int]) -> None:
    right, count = numbers
    figure, other = share(right, count), share(count - right, count)
    assert 0.0 <= figure.low <= figure.value <= figure.high <= 1.0
    assert figure.high > figure.low
    assert (other.low, other.high) == pytest.approx((1 - figure.high, 1 - figure.low))


def test_bootstrap_of_two_values_is_binomial() -> None:
    """Resamples of 0, 0, 1, 1 have 0 to 4 ones with 1/16, 4/16, 6/16, 4/16 and 1/16: the 2.5 % and
    97.5 % of their means are 0 and 1. Of 50 zeros and 50 ones: 0.40 and 0.60 (binomial, n = 100).
    """
    few = mean([0.0, 0.0, 1.0, 1.0])
    assert (few.value, few.low, few.high) == (0.5, 0.0, 1.0)
    many = mean([0.0] * 50 + [1.0] * 50)
    assert (many.low, many.high) == pytest.approx((0.40, 0.60), abs=0.011)


def test_bootstrap_of_many_values_is_normal_and_seeded() -> None:
    values = np.random.default_rng(1).normal(3.0, 1.0, 400)
    figure = mean(values.tolist())
    error = 1.96 * values.std() / math.sqrt(len(values))
    assert figure.value == pytest.approx(values.mean())
    assert (figure.low, figure.high) == pytest.approx(
        (figure.value - error, figure.value + error), abs=0.012
    )
    assert mean(values.tolist()) == figure != mean(values.tolist(), seed=1)
    assert mean([2.0, 2.0, 2.0]).low == mean([2.0, 2.0, 2.0]).high == 2.0

"""Temporal diversity by hand, and what must hold of any spans."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.temporal_diversity import adjacent_similarity, temporal_diversity
from rl.errors import RewardError


def test_by_hand():
    spans = [
        np.array([[2.0, 0.0], [0.0, 2.0]]),  # mean (1, 1)
        np.array([[3.0, 0.0]]),  # mean (3, 0): cos² with (1, 1) is 1/2
        np.array([[0.0, 1.0], [0.0, 5.0]]),  # mean (0, 3): cos² with (3, 0) is 0
        np.array([[0.0, -1.0]]),  # cos² with (0, 3) is 1, though they point apart
    ]
    assert adjacent_similarity(spans) == pytest.approx((0.5 + 0.0 + 1.0) / 3)
    assert temporal_diversity(spans) == pytest.approx(-0.5)


def test_fewer_than_two_spans_have_no_neighbours():
    assert adjacent_similarity([]) == 0.0
    assert adjacent_similarity([np.ones((3, 2))]) == 0.0
    assert adjacent_similarity([np.ones((3, 2)), np.ones((0, 2))]) == 0.0  # cut short at its start
    assert str(temporal_diversity([])) == "0.0"


def test_a_zero_mean_is_orthogonal_and_nan_is_an_error():
    assert adjacent_similarity([np.array([[1.0, 0.0], [-1.0, 0.0]]), np.ones((1, 2))]) == 0.0
    with pytest.raises(RewardError, match="NaN"):
        adjacent_similarity([np.ones((1, 2)), np.full((1, 2), np.nan)])


@given(st.integers(0, 2**32 - 1), st.lists(st.integers(1, 4), max_size=5), st.floats(1e-3, 1e3))
def test_range_scale_and_direction(seed, lengths, factor):
    rng = np.random.default_rng(seed)
    spans = [rng.normal(size=(n, 3)) for n in lengths]
    value = adjacent_similarity(spans)
    assert 0.0 <= value <= 1.0
    assert -1.0 <= temporal_diversity(spans) <= 0.0
    scaled = [span * (factor if i % 2 else -1.0) for i, span in enumerate(spans)]
    assert adjacent_similarity(scaled) == pytest.approx(value, abs=1e-4)
    assert adjacent_similarity(spans[::-1]) == pytest.approx(value, abs=1e-6)

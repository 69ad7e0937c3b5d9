"""T-GRPO's bonus, by hand and at its edges."""

import math

import pytest

from rewards.temporal_order import temporal_order, temporal_order_rewards
from rl.errors import RecipeError

NAN = math.nan


def test_by_hand():
    # Mean 2/4 in order; shuffled 1/2 asks for 0.4, which it has; shuffled 2/2 asks for 0.8.
    correct = [1.0, 0.0, 1.0, 0.0]
    assert temporal_order(correct, [1.0, 0.0]) == [1.0, 0.0, 1.0, 0.0]
    assert temporal_order(correct, [1.0, 1.0]) == [0.0, 0.0, 0.0, 0.0]
    # Exactly 0.8 times as good is enough: 4/8 against 5/8.
    assert temporal_order([1.0, 0.0] * 4, [1.0] * 5 + [0.0] * 3) == [1.0, 0.0] * 4


def test_the_edges_at_zero():
    assert temporal_order([0.0, 0.0], [0.0]) == [0.0, 0.0]  # 0 >= 0 passes and pays nobody
    assert temporal_order([1.0, 0.0], [0.0]) == [1.0, 0.0]
    assert temporal_order([0.0, 0.0], [1.0]) == [0.0, 0.0]


def test_other_thresholds():
    correct, control = [1.0, 1.0, 0.0, 0.0], [1.0, 0.0]  # 1/2 and 1/2
    assert temporal_order(correct, control, threshold=1.0) == correct
    assert temporal_order(correct, control, threshold=1.01) == [0.0] * 4
    assert temporal_order(correct, [1.0, 1.0], threshold=0.0) == correct
    # 1/10 is 0.1 · 3/3, though 0.1 · 3 · 10 is 3.0000000000000004 in floating point.
    assert temporal_order([1.0] + [0.0] * 9, [1.0] * 3, threshold=0.1)[0] == 1.0
    for threshold in (-0.1, NAN, math.inf):
        with pytest.raises(RecipeError, match=f"threshold is {threshold}"):
            temporal_order(correct, control, threshold=threshold)
        with pytest.raises(RecipeError, match=f"threshold is {threshold}"):
            temporal_order_rewards(
                outcomes=[], shuffled_outcomes=[], group_ids=[], threshold=threshold
            )


def test_invalid_outcomes_are_left_out():
    # In order 1/2 of the valid ones, not 1/3; shuffled 1/2, not 1/3.
    assert temporal_order([1.0, 0.0, NAN], [1.0, 0.0, NAN], threshold=1.0) == [1.0, 0.0, None]
    assert temporal_order([1.0, 0.0], [NAN, NAN]) == [None, None]
    assert temporal_order([1.0, 0.0], []) == [None, None]
    assert temporal_order([NAN, NAN], [1.0]) == [None, None]
    assert temporal_order([], [1.0]) == []


def test_every_group_has_its_own_control():
    values = temporal_order_rewards(
        outcomes=[1.0, 0.0, 1.0, 0.0, 1.0],
        shuffled_outcomes=[[1.0], [1.0], [0.0], [0.0], [NAN]],
        group_ids=[0, 0, 1, 1, 2],
    )
    assert values == [0.0, 0.0, 1.0, 0.0, None]

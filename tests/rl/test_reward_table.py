"""Scores as TRL sums them, worked out by hand."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.interfaces import GroupScores
from rl.reward_table import reward_table

NAN = math.nan
NAMES = ("accuracy", "shape")


def table(outcome, shape, **kwargs):
    scores = GroupScores(outcome, {"accuracy": outcome, "shape": shape}, **kwargs)
    return reward_table(NAMES, [scores])


def test_missing_shaping_is_put_at_the_mean_and_an_invalid_outcome_empties_its_row():
    found = table([1.0, 0.0, NAN, 1.0], [3.0, NAN, 7.0, 1.0])
    # The third has no outcome, so its 7 counts nowhere; the mean of the others is 2.
    expected = torch.tensor([[1.0, 3.0], [0.0, 2.0], [NAN, NAN], [1.0, 1.0]])
    torch.testing.assert_close(found, expected, equal_nan=True)


def test_shaping_of_a_gated_group_is_the_same_for_all():
    found = table([0.0, 0.0, 0.0], [3.0, NAN, 1.0], gated=True)
    torch.testing.assert_close(found, torch.tensor([[0.0, 2.0]] * 3))


def test_a_reward_without_any_value_moves_nobody():
    torch.testing.assert_close(
        table([1.0, 0.0], [NAN, NAN]), torch.tensor([[1.0, 0.0], [0.0, 0.0]])
    )


def test_groups_follow_each_other():
    scores = [GroupScores([float(i)], {"accuracy": [float(i)], "shape": [2.0]}) for i in range(2)]
    assert reward_table(NAMES, scores).tolist() == [[0.0, 2.0], [1.0, 2.0]]


VALUE = st.floats(-1, 1, width=32)


@given(st.lists(st.tuples(st.sampled_from([0.0, 1.0]), VALUE), min_size=2, max_size=8), VALUE)
def test_an_invalid_member_leaves_the_others_advantages_alone(members, shape):
    """Mean, deviation and so every advantage, computed as TRL does, without NaN rows."""
    outcome, shaping = [o for o, _ in members], [s for _, s in members]
    alone = table(outcome, shaping).sum(1)
    beside = table([*outcome, NAN], [*shaping, shape]).sum(1)
    assert math.isnan(beside[-1])
    torch.testing.assert_close(beside[:-1], alone)


@given(st.lists(VALUE, min_size=1, max_size=6))
def test_a_missing_value_leaves_the_mean_alone(shaping):
    outcome = [1.0] * len(shaping)
    alone = table(outcome, shaping)[:, 1]
    beside = table([*outcome, 0.0], [*shaping, NAN])[:, 1]
    assert beside.mean().item() == pytest.approx(alone.mean().item(), abs=1e-6)
    assert beside[-1].item() == pytest.approx(alone.mean().item(), abs=1e-6)

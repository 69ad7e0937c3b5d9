"""DAPO's soft overlong punishment."""

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.length import length_rewards, soft_overlong
from rl.errors import RecipeError
from rl.trajectory import Sample, Sampling
from tests.rewards.test_scorer import trajectory


@pytest.mark.parametrize(
    ("length", "value"),
    # DAPO's own setting: free up to 16384, then (16384 - length) / 4096, -1 from 20480 on.
    [(0, 0.0), (16384, 0.0), (17408, -0.25), (18432, -0.5), (20480, -1.0), (20481, -1.0)],
)
def test_dapo_by_hand(length, value):
    assert soft_overlong(length, max_length=20480, buffer=4096) == value


def test_a_buffer_of_one_and_of_everything():
    assert [soft_overlong(n, max_length=3, buffer=1) for n in (2, 3, 4)] == [0.0, -1.0, -1.0]
    values = [soft_overlong(n, max_length=4, buffer=4) for n in range(6)]
    assert values == [0.0, -0.25, -0.5, -0.75, -1.0, -1.0]


@pytest.mark.parametrize(("most", "buffer"), [(10, 0), (10, 11), (10, -1), (0, 1), (0, 0)])
def test_lengths_that_make_no_sense(most, buffer):
    with pytest.raises(RecipeError, match=f"max_length is {most} and buffer {buffer}"):
        soft_overlong(1, max_length=most, buffer=buffer)
    with pytest.raises(RecipeError, match="length: max_length"):
        length_rewards([], trajectories=[], max_length=most, buffer=buffer)


def rewards_of(*lengths, most=20, **options):
    one = trajectory(Sample("s", "s.mp4", "?", "A"), "text")
    one = replace(one, sampling=Sampling(max_new_tokens=most))
    ids = [[0] * n for n in lengths]
    return length_rewards(ids, trajectories=[one] * len(ids), **options)


def test_the_defaults_are_the_sampling_s():
    # 20 tokens, a fifth of it 4: free up to 16.
    assert rewards_of(16, 17, 18, 20) == [0.0, -0.25, -0.5, -1.0]
    assert rewards_of(16, 17, 18, 20, buffer=2) == [0.0, 0.0, 0.0, -1.0]
    assert rewards_of(16, 17, 18, 20, max_length=40) == [0.0] * 4
    assert rewards_of(2, 3, most=3) == [0.0, -1.0]  # a fifth of 3 is still one token
    with pytest.raises(RecipeError, match="max_length is 20 and buffer 30"):
        rewards_of(1, buffer=30)


@given(st.integers(1, 10**6), st.data())
def test_range_and_order(most, data):
    buffer = data.draw(st.integers(1, most))
    lengths = sorted(data.draw(st.lists(st.integers(0, 2 * most), min_size=1)))
    values = [soft_overlong(n, max_length=most, buffer=buffer) for n in lengths]
    assert values == sorted(values, reverse=True)  # longer is never better
    assert all(-1.0 <= value <= 0.0 for value in values)
    # Continuous: one token costs at most 1 / buffer.
    step = values[0] - soft_overlong(lengths[0] + 1, max_length=most, buffer=buffer)
    assert -1e-12 <= step <= 1 / buffer + 1e-12

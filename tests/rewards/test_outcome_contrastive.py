"""The outcome-contrastive reward: hand-computed values of both scales, and what must hold of any
group.
"""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.outcome_contrastive import outcome_contrastive, prefix_similarity
from rl.errors import RecipeError, RewardError

E = math.e
EAST, NORTH, WEST = (np.array([[x, y]]) for x, y in [(1.0, 0.0), (0.0, 1.0), (-1.0, 0.0)])
# One step each: sim is 1 between equal ones, 1/2 across a right angle, 0 between EAST and WEST.


def published(latents, correct, temperature=0.5):
    return outcome_contrastive(latents, correct, temperature=temperature, scale="published")


def test_similarity_runs_over_the_shared_prefix():
    long = np.array([[3.0, 0.0], [0.0, 2.0], [1.0, 1.0]])
    short = np.array([[1.0, 0.0], [0.0, -1.0]])
    # Steps 1 and 2 only: cosines 1 and -1, so (1 + 0) / 2; the third step of `long` has no partner.
    assert prefix_similarity([long, short])[0, 1] == pytest.approx(0.5)
    assert prefix_similarity([long, short[:1]])[0, 1] == pytest.approx(1.0)


def test_mixed_group_by_hand():
    latents, correct = [EAST, EAST, NORTH, WEST], [True, True, False, False]
    # First: best right other 1, wrong ones 1/2 and 0; divided by tau = 1/2: 2, 1 and 0.
    # NORTH: right ones at 1/2; wrong ones itself (1) and WEST (1/2): 1, 2 and 1.
    # WEST: right ones at 0; wrong ones NORTH (1/2) and itself (1): 0, 1 and 2.
    first = E**2 / (E**2 + E + 1)
    expected = [first, first, E / (E + E**2 + E), 1 / (1 + E + E**2)]
    assert published(latents, correct) == pytest.approx(expected, abs=1e-6)
    # The mean over the *other* wrong ones: first (e + 1)/2, NORTH e (only WEST), WEST e (only
    # NORTH).
    first = E**2 / (E**2 + (E + 1) / 2)
    expected = [first, first, E / (E + E), 1 / (1 + E)]
    assert outcome_contrastive(latents, correct) == pytest.approx(expected, abs=1e-6)


def test_all_wrong_by_hand():
    latents = [EAST, EAST, WEST]
    # 1 / (1 + sum): the first two see themselves and each other (e² each) and WEST (1); WEST sees
    # 1, 1, e².
    expected = [1 / (1 + 2 * E**2 + 1)] * 2 + [1 / (1 + 2 + E**2)]
    assert published(latents, [False] * 3) == pytest.approx(expected, abs=1e-6)
    # The missing right side is 1/2, e^1: e / (e + mean). Means: (e² + 1)/2 twice, and (1 + 1)/2.
    expected = [E / (E + (E**2 + 1) / 2)] * 2 + [E / (E + 1)]
    assert outcome_contrastive(latents, [False] * 3) == pytest.approx(expected, abs=1e-6)


def test_all_right_by_hand():
    latents = [EAST, NORTH, EAST]
    # Best other / tau: 1, 1/2 and 1 over 1/2: beyond anything a mixed group pays.
    assert published(latents, [True] * 3) == pytest.approx([2.0, 1.0, 2.0], abs=1e-6)
    # Against a wrong side of 1/2: e²/(e² + e), e/(e + e), e²/(e² + e).
    expected = [E / (E + 1), 0.5, E / (E + 1)]
    assert outcome_contrastive(latents, [True] * 3) == pytest.approx(expected, abs=1e-6)


def test_sole_right_trajectory_is_its_own_positive_only_as_published():
    latents, correct = [EAST, NORTH], [True, False]
    # Published: sim with itself 1 against 1/2: e²/(e² + e); the wrong one 1/2 against itself: e/(e
    # + e²).
    assert published(latents, correct) == pytest.approx([E / (E + 1), 1 / (1 + E)], abs=1e-6)
    # Bounded: the right one knows only the wrong one at 1/2, and the wrong one only the right one.
    assert outcome_contrastive(latents, correct) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_no_latents_is_zero_as_published_and_no_value_otherwise():
    latents, correct = [EAST, None, np.zeros((0, 2))], [True, False, True]
    assert published(latents, correct) == pytest.approx([2.0, 0.0, 0.0])  # itself: 1 / tau
    assert outcome_contrastive(latents, correct) == [None, None, None]  # nobody to compare with
    assert outcome_contrastive([EAST], [True]) == [None]
    assert published([EAST], [True]) == [0.0]
    assert outcome_contrastive([], []) == []
    assert outcome_contrastive([None, None], [True, False]) == [None, None]


def test_collapsed_latents_earn_one_half():
    values = outcome_contrastive([EAST] * 6, [True, True, True, False, False, False])
    assert values == pytest.approx([0.5] * 6)


def test_zero_vectors_count_as_unrelated():
    zero = np.zeros((1, 2))
    assert outcome_contrastive([zero, EAST], [True, True]) == pytest.approx([0.5, 0.5])


def test_wrong_input_is_named():
    with pytest.raises(RecipeError, match="scale is 'paper'"):
        outcome_contrastive([EAST, EAST], [True, True], scale="paper")  # pyright: ignore
    with pytest.raises(RecipeError, match="temperature is 0"):
        outcome_contrastive([EAST, EAST], [True, True], temperature=0)
    with pytest.raises(RewardError, match="NaN"):
        outcome_contrastive([EAST, EAST * np.nan], [True, True])
    with pytest.raises(RewardError, match="2 latents, 1 outcomes"):
        outcome_contrastive([EAST, EAST], [True])


@st.composite
def groups(draw):
    size, width = draw(st.integers(1, 7)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = draw(st.lists(st.integers(0, 5), min_size=size, max_size=size))
    latents = [rng.normal(size=(n, width)) if n else None for n in lengths]
    correct = draw(st.lists(st.booleans(), min_size=size, max_size=size))
    return latents, correct


def same(first, second):
    return [v is None for v in first] == [v is None for v in second] and [
        v for v in first if v is not None
    ] == pytest.approx([v for v in second if v is not None], abs=1e-4)


@given(groups(), st.sampled_from([0.05, 0.5, 2.0]))
def test_ranges(group, temperature):
    for value in outcome_contrastive(*group, temperature=temperature):
        assert value is None or 0.0 <= value <= 1.0
    for value in published(*group, temperature=temperature):
        assert value is not None and 0.0 <= value <= max(1.0, 1 / temperature) + 1e-9


@given(groups(), st.sampled_from(["bounded", "published"]), st.randoms())
def test_permuting_a_group_permutes_its_values(group, scale, random):
    latents, correct = group
    order = list(range(len(latents)))
    random.shuffle(order)
    values = outcome_contrastive(latents, correct, scale=scale)
    shuffled = outcome_contrastive(
        [latents[i] for i in order], [correct[i] for i in order], scale=scale
    )
    assert same(shuffled, [values[i] for i in order])


@given(groups(), st.sampled_from(["bounded", "published"]), st.floats(1e-3, 1e3))
@settings(deadline=None)
def test_the_length_of_latent_vectors_does_not_matter(group, scale, factor):
    latents, correct = group
    values = outcome_contrastive(latents, correct, scale=scale)
    scaled = [None if z is None else z * (factor if i % 2 else 1) for i, z in enumerate(latents)]
    assert same(outcome_contrastive(scaled, correct, scale=scale), values)


@given(groups(), st.sampled_from(["bounded", "published"]))
def test_a_member_without_latents_changes_nothing_for_the_others(group, scale):
    latents, correct = group
    if len(latents) < 2:  # published: a group of one gets 0
        return
    values = outcome_contrastive(latents, correct, scale=scale)
    longer = outcome_contrastive([*latents, None], [*correct, True], scale=scale)
    assert same(longer[:-1], values)


@given(st.integers(0, 2**32 - 1), st.integers(1, 4))
def test_bounded_does_not_depend_on_how_many_were_equally_wrong(seed, copies):
    rng = np.random.default_rng(seed)
    right, other, wrong = rng.normal(size=(3, 2, 4))
    once = outcome_contrastive([right, other, wrong], [True, True, False])
    often = outcome_contrastive([right, other] + [wrong] * copies, [True, True] + [False] * copies)
    assert same(often[:2], once[:2])

"""What must hold of every shaping reward, whatever the group: ranges, permutations, latent scale,
and that a member without a value leaves the others alone.

Of single formulas more is asked in their own files.
"""

import math
import random
from dataclasses import replace

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rewards.format import Grammar, format_reward, format_rewards
from rewards.outcome_contrastive import outcome_contrastive, outcome_contrastive_rewards
from rewards.repetition import repetition_rewards, repetition_score
from rewards.temporal_diversity import temporal_diversity_rewards
from rewards.temporal_order import temporal_order, temporal_order_rewards
from rl.trajectory import Sample, Trajectory
from tests.rewards.test_scorer import trajectory

SAMPLE = Sample("one", "one.mp4", "?", "A")
OUTCOME = st.sampled_from([0.0, 1.0, math.nan])
SCALES = st.sampled_from(["bounded", "published"])
PIECES = st.sampled_from(
    [
        *("<|latent_start|>", "<|latent|>", "<|latent_end|>", "<reason>", "</reason>"),
        *("<answer>", "</answer>", "</", "<|", "|>", "\x00", "\n", " ", "go " * 8),
    ]
)
TEXTS = st.one_of(st.text(), st.lists(st.one_of(PIECES, st.text(max_size=5))).map("".join))


@st.composite
def batches(draw: st.DrawFn) -> tuple[list[Trajectory], list[float]]:
    """A group of up to six trajectories of up to three spans, and their outcomes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    lengths = st.lists(st.integers(1, 3), max_size=3)
    spans = draw(st.lists(lengths, min_size=1, max_size=6))
    made = [
        trajectory(SAMPLE, "text", *[rng.normal(size=(n, 2)).tolist() for n in own])
        for own in spans
    ]
    return made, [draw(OUTCOME) for _ in made]


def contrastive(trajectories, outcomes, **options):
    return outcome_contrastive_rewards(
        trajectories=trajectories, group_ids=[0] * len(trajectories), outcomes=outcomes, **options
    )


def order(outcomes, control):
    return temporal_order_rewards(
        outcomes=outcomes,
        shuffled_outcomes=[control] * len(outcomes),
        group_ids=[0] * len(outcomes),
    )


def same(first, second, tolerance=1e-6):
    return len(first) == len(second) and all(
        a is b if a is None or b is None else abs(a - b) <= tolerance
        for a, b in zip(first, second, strict=True)
    )


def rescaled(one: Trajectory, factor: float) -> Trajectory:
    return replace(one, latents=one.latents * torch.tensor(factor, dtype=one.latents.dtype))


@given(batches(), st.sampled_from([0.05, 0.5, 2.0]), st.lists(OUTCOME))
@settings(deadline=None)
def test_ranges(batch, temperature, control):
    trajectories, outcomes = batch
    for value in contrastive(trajectories, outcomes, temperature=temperature):
        assert value is None or 0.0 <= value <= 1.0
    top = max(1.0, 1.0 / temperature) + 1e-9
    options = {"temperature": temperature, "scale": "published"}
    values = contrastive(trajectories, outcomes, **options)
    assert [v is None for v in values] == [math.isnan(o) for o in outcomes]
    assert all(value is None or 0.0 <= value <= top for value in values)
    diversity = temporal_diversity_rewards(trajectories=trajectories)
    assert all(-1.0 <= value <= 0.0 for value in diversity)
    assert {*order(outcomes, control)} <= {0.0, 1.0, None}


@given(TEXTS)
def test_text_rewards_stay_in_their_range_on_any_text(text):
    assert 0.0 <= repetition_score(text) <= 1.0
    (penalty,) = repetition_rewards([text])
    assert -1.0 <= penalty <= 0.0
    grammars: list[Grammar] = ["any", "reason_first", "latent_first", "answer"]
    values = {grammar: format_reward(text, grammar=grammar) for grammar in grammars}
    assert {*values.values()} <= {0.0, 1.0}
    assert values["any"] == values["reason_first"] + values["latent_first"]
    assert format_rewards([text], grammar="answer") == [values["answer"]]


@given(batches(), SCALES, st.lists(OUTCOME), st.randoms())
@settings(deadline=None)
def test_permuting_a_group_permutes_its_values(batch, scale, control, rng: random.Random):
    trajectories, outcomes = batch
    places = list(range(len(trajectories)))
    rng.shuffle(places)
    moved, moved_outcomes = [trajectories[i] for i in places], [outcomes[i] for i in places]
    values = contrastive(trajectories, outcomes, scale=scale)
    assert same(contrastive(moved, moved_outcomes, scale=scale), [values[i] for i in places])
    values = order(outcomes, control)
    assert same(order(moved_outcomes, control), [values[i] for i in places])
    rng.shuffle(control)  # nor does the order of the control matter
    assert same(order(outcomes, control), values)


@given(batches(), SCALES, st.lists(st.integers(-6, 6), min_size=6, max_size=6))
@settings(deadline=None)
def test_the_length_of_latents_does_not_matter(batch, scale, powers):
    # By powers of two, which bfloat16 multiplies without rounding; each trajectory by its own.
    trajectories, outcomes = batch
    scaled = [rescaled(t, 2.0**p) for t, p in zip(trajectories, powers, strict=False)]
    before = contrastive(trajectories, outcomes, scale=scale)
    assert same(contrastive(scaled, outcomes, scale=scale), before, 1e-5)
    before = temporal_diversity_rewards(trajectories=trajectories)
    assert same(temporal_diversity_rewards(trajectories=scaled), before, 1e-5)


@given(batches(), batches(), st.integers(0, 6), st.sampled_from([0.0, 1.0]))
@settings(deadline=None)
def test_members_without_a_value_leave_the_others_alone(batch, strangers, place, outcome):
    trajectories, outcomes = batch
    before = contrastive(trajectories, outcomes)
    place = min(place, len(trajectories))
    for added, its_outcome in [
        (trajectory(SAMPLE, "text"), outcome),  # no latents
        (strangers[0][0], math.nan),  # no outcome, whatever it imagined
    ]:
        after = contrastive(
            [*trajectories[:place], added, *trajectories[place:]],
            [*outcomes[:place], its_outcome, *outcomes[place:]],
        )
        assert after[place] is None
        assert same(after[:place] + after[place + 1 :], before)


@given(st.lists(OUTCOME, min_size=1), st.lists(OUTCOME), st.integers(1, 3))
def test_invalid_outcomes_leave_the_order_bonus_alone(correct, control, count):
    nothing = [math.nan] * count
    before = temporal_order(correct, control)
    assert temporal_order(correct + nothing, nothing + control) == before + [None] * count


@given(batches())
@settings(deadline=None)
def test_the_batch_function_is_the_formula_of_each_group(batch):
    trajectories, outcomes = batch
    valid = [(t, o) for t, o in zip(trajectories, outcomes, strict=True) if not math.isnan(o)]
    latents = [t.latents.float().numpy() if t.imagined else None for t, _ in valid]
    expected = iter(outcome_contrastive(latents, [o == 1.0 for _, o in valid]))
    values = contrastive(trajectories, outcomes)
    assert values == [None if math.isnan(o) else next(expected) for o in outcomes]

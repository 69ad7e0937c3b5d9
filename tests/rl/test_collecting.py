"""Collecting groups: kept by outcome, refilled in bounds, the same again from the same place."""

from collections.abc import Sequence

import numpy as np
import pytest
import torch

from rl.collecting import GroupCollector
from rl.trajectory import (
    MediaKey,
    RolloutRequest,
    Sample,
    Sampling,
    Trajectory,
    TrajectoryGroup,
)

SAMPLES = [Sample(f"s{i}", "clip.mp4", "?", "A") for i in range(10)]


class Rollouts:
    """Remembers what it was asked for; trajectories do not matter to a collector."""

    def __init__(self) -> None:
        self.asked: list[list[RolloutRequest]] = []

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        self.asked.append(list(requests))
        return [TrajectoryGroup(r.sample, ()) for r in requests]


class Outcomes:
    """Samples with an odd number have contrast, the others are all right."""

    def outcomes(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
        return [[1.0, float(int(g.sample.id[1:]) % 2 == 0)] for g in groups]


def collector(max_refills: int = 50, **kwargs) -> tuple[GroupCollector, Rollouts]:
    rollouts = Rollouts()
    made = GroupCollector(
        rollouts,  # type: ignore[arg-type]
        Outcomes(),  # type: ignore[arg-type]
        SAMPLES,
        seed=0,
        low=0.0,
        high=1.0,
        max_refills=max_refills,
        **kwargs,
    )
    return made, rollouts


def test_dropped_groups_are_replaced():
    made, rollouts = collector()
    found = made.collect(SAMPLES[:4], 2, Sampling(), "0")
    assert len(found.groups) == 4 and all(c.trained for c in found.groups)
    assert all(int(c.group.sample.id[1:]) % 2 for c in found.groups)
    assert found.refills == len(rollouts.asked) - 1 > 0
    asked = sum(len(requests) for requests in rollouts.asked)
    assert found.reasons == {"kept": 4, "all_right": asked - 4}
    assert made.cursor == asked - 4


def test_refills_are_bounded_and_the_rest_is_marked():
    made, rollouts = collector(max_refills=0)
    found = made.collect(SAMPLES[:4], 2, Sampling(), "0")
    assert [c.trained for c in found.groups] == [True, True, False, False]
    assert len(rollouts.asked) == 1 and found.refills == 0


def test_without_filtering_all_stay_in_order():
    made, _ = collector()
    found = made.collect(SAMPLES[:4], 2, Sampling(), "0", filtering=False)
    assert [c.group.sample.id for c in found.groups] == ["s0", "s1", "s2", "s3"]
    assert all(c.trained for c in found.groups)


def test_the_same_place_gives_the_same_requests():
    first, second = collector(), collector()
    for made, _ in (first, second):
        made.cursor = 7
        made.collect(SAMPLES[:4], 2, Sampling(), "train/3/0")
    assert first[1].asked == second[1].asked
    third, rollouts = collector()
    third.cursor = 7
    third.collect(SAMPLES[:4], 2, Sampling(), "train/4/0")
    seeds = [
        {s for r in asked for q in r for s in q.seeds} for asked in (first[1].asked, rollouts.asked)
    ]
    assert not seeds[0] & seeds[1]


def test_processes_draw_different_refills():
    drawn = []
    for rank in range(2):
        made, rollouts = collector(max_refills=1, world=2, rank=rank)
        made.collect([SAMPLES[0]] * 5, 2, Sampling(), "0")
        drawn.append([r.sample.id for r in rollouts.asked[1]])
    assert sorted(drawn[0] + drawn[1]) == [s.id for s in SAMPLES]


@pytest.mark.parametrize("size", [1, 8])
def test_seeds_are_all_different(size):
    made, rollouts = collector()
    made.collect(SAMPLES, size, Sampling(), "0", filtering=False)
    seeds = [s for r in rollouts.asked[0] for s in r.seeds]
    assert len(set(seeds)) == len(seeds) == 10 * size


def seen(sample: Sample, frames: tuple[int, ...]) -> TrajectoryGroup:
    """A group of one trajectory that was shown `frames`, which its sample does not list."""
    trajectory = Trajectory(
        sample_id=sample.id,
        prompt_ids=np.array([0]),
        completion_ids=np.array([1]),
        decision=np.ones(1, dtype=np.int8),
        logprobs=np.zeros(1, dtype=np.float32),
        kept=np.zeros(1, dtype=np.int32),
        latents=torch.zeros(0, 2),
        latent_logprobs=np.zeros(0),
        span_lengths=(),
        filler=9,
        media=(MediaKey(sample.video, frames, "p"),),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text="",
    )
    return TrajectoryGroup(sample, (trajectory,))


def test_the_control_sees_the_same_frames_in_another_order():
    made, rollouts = collector()
    sampling = Sampling(temperature=0.7)
    groups = [seen(sample, (0, 3, 6, 9)) for sample in SAMPLES]
    outcomes = made.shuffled(groups, 4, sampling, "train/3")
    assert outcomes == [[1.0, float(i % 2 == 0)] for i in range(10)]  # what the scorer said of each
    (asked,) = rollouts.asked
    assert [(r.sample.id, r.sample.video, r.sample.answer) for r in asked] == [
        (s.id, s.video, s.answer) for s in SAMPLES
    ]
    orders = [r.sample.frames for r in asked]
    assert all(sorted(order) == [0, 3, 6, 9] and order != (0, 3, 6, 9) for order in orders)
    assert len(set(orders)) > 3  # each group has an order of its own
    assert all(type(frame) is int for order in orders for frame in order)  # as in a manifest
    assert {r.sampling for r in asked} == {sampling}
    seeds = [s for r in asked for s in r.seeds]
    assert len(set(seeds)) == len(seeds) == 40


def test_the_control_is_the_same_at_the_same_place_and_has_seeds_of_its_own():
    groups = [seen(sample, (0, 1, 2, 3, 4, 5)) for sample in SAMPLES]
    asked = []
    for place in ("train/3", "train/3", "train/4"):
        made, rollouts = collector()
        made.shuffled(groups, 2, Sampling(), place)
        made.collect(SAMPLES, 2, Sampling(), place, filtering=False)
        asked.append(rollouts.asked)
    assert asked[0] == asked[1]
    assert asked[0][0] != asked[2][0]
    control, ordered = ({s for r in requests for s in r.seeds} for requests in asked[0])
    assert not control & ordered


@pytest.mark.parametrize(
    ("frames", "order"), [((7,), (7,)), ((2, 2), (2, 2)), ((0, 5), (5, 0)), ((5, 0), (5, 0))]
)
def test_the_control_of_a_clip_with_few_orders(frames, order):
    made, rollouts = collector()
    made.shuffled([seen(SAMPLES[0], frames)] * 8, 1, Sampling(), "0")
    assert [r.sample.frames for r in rollouts.asked[0]] == [order] * 8

"""Collecting groups: kept by outcome, refilled in bounds, the same again from the same place."""

import json
from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
import torch

from rl.collecting import GroupCollector
from rl.data.broken import BrokenClips
from rl.errors import VideoError
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

    def __init__(self, bad: Sequence[str] = ()) -> None:
        self.asked: list[list[RolloutRequest]] = []
        self.looked_at: list[str] = []
        self.bad = bad

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        self.looked_at += [s.id for s in samples]
        return {s.id: VideoError(f"sample {s.id!r}: no") for s in samples if s.id in self.bad}

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        self.asked.append(list(requests))
        return [TrajectoryGroup(r.sample, ()) for r in requests]


class Outcomes:
    """Samples with an odd number have contrast, the others are all right."""

    def outcomes(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
        return [[1.0, float(int(g.sample.id[1:]) % 2 == 0)] for g in groups]


def collector(
    max_refills: int = 50, bad: Sequence[str] = (), **kwargs
) -> tuple[GroupCollector, Rollouts]:
    rollouts = Rollouts(bad)
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


# -- clips that cannot be shown --------------------------------------------------------------------


def asked(rollouts: Rollouts) -> list[list[str]]:
    return [[r.sample.id for r in requests] for requests in rollouts.asked]


def test_without_a_rule_nothing_is_looked_at():
    made, rollouts = collector(bad=["s1"])
    made.collect(SAMPLES[:4], 2, Sampling(), "0", filtering=False)
    assert not rollouts.looked_at and asked(rollouts) == [["s0", "s1", "s2", "s3"]]


def test_skipped_clips_make_a_step_smaller_but_not_its_batch(tmp_path):
    broken = BrokenClips(tmp_path / "skipped.jsonl", rule="skip")
    made, rollouts = collector(bad=["s1", "s2"], broken=broken)
    found = made.collect(SAMPLES[:4], 2, Sampling(), "0", filtering=False)
    assert asked(rollouts) == [["s0", "s3"]]
    assert [(c.group.sample.id, c.trained) for c in found.groups] == [
        ("s0", True),
        ("s3", True),
        ("s0", False),  # so that there are four, and nothing is trained on twice
        ("s3", False),
    ]
    assert found.reasons == {"video": 2, "all_right": 1, "kept": 1} and made.cursor == 0
    rows = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert rows == broken.rows and [row["id"] for row in rows] == ["s1", "s2"]
    assert rows[0] == {"id": "s1", "file": "clip.mp4", "reason": "sample 's1': no"}
    made.collect(SAMPLES[:4], 2, Sampling(), "1", filtering=False)
    assert rollouts.looked_at == ["s0", "s1", "s2", "s3", "s0", "s3"]  # none is tried again
    assert len(broken) == 2
    again = BrokenClips(tmp_path / "skipped.jsonl", rule="skip")  # a resumed run
    again.add(SAMPLES[1], VideoError("no"))
    assert len((tmp_path / "skipped.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("rule", ["skip", "replace"])
def test_refills_are_of_clips_that_can_be_shown(rule):
    made, rollouts = collector(bad=["s1", "s2", "s5"], broken=BrokenClips(rule=rule))
    found = made.collect(SAMPLES[:4], 2, Sampling(), "0")
    assert not {"s1", "s2", "s5"} & {name for names in asked(rollouts) for name in names}
    assert len(found.groups) == 4 and found.reasons["video"] >= 2
    trained = [c.group.sample.id for c in found.groups if c.trained]
    assert len(trained) == (2 if rule == "skip" else 4)
    assert set(trained) <= {"s3", "s7", "s9"}


def test_replaced_clips_come_in_the_order_of_refills():
    plain, _ = collector()
    order = [s.id for s in plain._refill(10)]
    bad = ["s1", "s2", order[1]]
    made, rollouts = collector(bad=bad, broken=BrokenClips(rule="replace"))
    found = made.collect(SAMPLES[:4], 2, Sampling(), "0", filtering=False)
    left = [name for name in order if name not in bad]
    expected = ["s0", left[0], left[1], "s3"]
    if "s0" in bad or "s3" in bad:
        pytest.fail("choose other samples: the order of refills has changed")
    assert sorted(asked(rollouts)[0]) == sorted(expected)
    assert all(c.trained for c in found.groups)
    # A resumed run, which has forgotten what was broken, draws the same.
    resumed, again = collector(bad=bad, broken=BrokenClips(rule="replace"))
    resumed.cursor = made.cursor
    made.collect(SAMPLES[:4], 2, Sampling(), "1", filtering=False)
    resumed.collect(SAMPLES[:4], 2, Sampling(), "1", filtering=False)
    assert asked(rollouts)[1] == asked(again)[0] and made.cursor == resumed.cursor


@pytest.mark.parametrize("rule", ["skip", "replace"])
def test_when_no_clip_can_be_shown_the_search_ends(rule):
    made, _ = collector(bad=[s.id for s in SAMPLES], broken=BrokenClips(rule=rule))
    with pytest.raises(VideoError, match="no clip of a step can be shown, nor of 10 rows"):
        made.collect(SAMPLES[:3], 2, Sampling(), "0")
    assert made.cursor == 10


@pytest.mark.parametrize("rule", ["skip", "replace"])
def test_refills_without_a_clip_leave_the_step_what_it_has(rule):
    bad = [s.id for s in SAMPLES]
    made, rollouts = collector(max_refills=3, bad=bad, broken=BrokenClips(rule=rule))
    step = [Sample("s10", "clip.mp4", "?", "A"), Sample("s11", "clip.mp4", "?", "A")]
    found = made.collect(step, 2, Sampling(), "0")
    assert asked(rollouts) == [["s10", "s11"]] and found.refills == 3
    handed = [(c.group.sample.id, c.trained) for c in found.groups]
    assert handed == [("s11", True), ("s10", False)]


def test_a_refill_without_a_clip_is_not_the_last():
    plain, _ = collector()
    drawn = [s.id for s in plain._refill(3)]
    made, rollouts = collector(max_refills=3, bad=drawn[:2], broken=BrokenClips(rule="skip"))
    made.collect([Sample("s10", "clip.mp4", "?", "A")], 2, Sampling(), "0")
    assert asked(rollouts)[1] == drawn[2:]


def test_skipping_a_whole_step_takes_one_other_row():
    made, rollouts = collector(bad=["s0", "s1"], broken=BrokenClips(rule="skip"))
    found = made.collect(SAMPLES[:2], 2, Sampling(), "0", filtering=False)
    assert len(asked(rollouts)[0]) >= 1 and len(found.groups) == 2
    assert found.groups[0].trained


def test_the_control_s_frames_are_those_of_the_file():
    made, rollouts = collector()
    row = replace(SAMPLES[0], frames=(0, 2), pool=4, window=(1.0, 2.0))
    made.shuffled([seen(row, (9, 13))], 1, Sampling(), "0")
    (request,) = rollouts.asked[0]
    assert request.sample == replace(row, frames=(13, 9), pool=0, window=None)

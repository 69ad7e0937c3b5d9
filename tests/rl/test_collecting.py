"""Collecting groups: kept by outcome, refilled in bounds, the same again from the same place."""

from collections.abc import Sequence

import pytest

from rl.collecting import GroupCollector
from rl.trajectory import RolloutRequest, Sample, Sampling, TrajectoryGroup

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

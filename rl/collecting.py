"""Dynamic sampling: groups of trajectories, kept by their outcomes, refilled within bounds.

Source: DAPO (arXiv 2503.14476), which samples until enough groups have both right and wrong
answers. TRL has no such step. Ours bounds the tries and says of every dropped group why it was
dropped.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import get_args

import numpy as np

from rl.data.broken import BrokenClips
from rl.errors import VideoError
from rl.interfaces import GroupScores, Rollouts, Scorer
from rl.latent_stats import neighbour_cosine
from rl.objective import Reason, judge_group
from rl.trajectory import RolloutRequest, Sample, Sampling, TrajectoryGroup


@dataclass(frozen=True)
class CollectedGroup:
    """A group, its outcomes [G] (NaN = no value), and whether it is trained on."""

    group: TrajectoryGroup
    outcome: list[float]
    trained: bool


@dataclass(frozen=True)
class Collected:
    """One group a prompt that was asked for, `refills` rounds of refills later.

    `reasons` counts all groups that were sampled by the verdict on them (see
    `rl.objective.Verdict`). Sampling them all took `seconds`, for so many `tokens` and among these
    `latents`.
    """

    groups: list[CollectedGroup]
    refills: int
    reasons: Counter[str]
    seconds: float
    tokens: int
    latents: int


@dataclass(frozen=True)
class ScoredRollout:
    """What one step trains on: N groups with their scores, and TRL's advantages of their
    trajectories laid end to end. `number` counts the rollouts of a step.
    """

    step: int
    number: int
    groups: list[CollectedGroup]
    scores: list[GroupScores]
    advantages: list[float]


class GroupCollector:
    """Samples groups and replaces those without contrast by groups of other prompts.

    Keeps a group when `low` < accuracy < `high`; samples at most `max_refills` more rounds of
    prompts for those it drops, and hands out dropped groups, marked, where that was not enough.
    `cursor` counts the refill prompts drawn so far, in an order of their own; a resumed run sets
    it. Of `world` processes this is number `rank`.

    What becomes of prompts whose clips cannot be shown `broken` says. "skip": a step has fewer
    groups of its own. "replace": prompts in the order of refills take their places, at most as
    many as there are samples. Both are counted under the reason "video".
    """

    def __init__(
        self,
        rollouts: Rollouts,
        scorer: Scorer,
        samples: Sequence[Sample],
        *,
        seed: int,
        low: float,
        high: float,
        max_refills: int,
        world: int = 1,
        rank: int = 0,
        broken: BrokenClips | None = None,
    ) -> None:
        self._rollouts, self._scorer, self._samples = rollouts, scorer, list(samples)
        self._seed, self._low, self._high, self._max_refills = seed, low, high, max_refills
        self._world, self._rank = world, rank
        self._broken = BrokenClips() if broken is None else broken
        self.cursor = 0

    def collect(
        self,
        samples: Sequence[Sample],
        size: int,
        sampling: Sampling,
        place: str,
        *,
        filtering: bool = True,
    ) -> Collected:
        """One group of `size` trajectories for each of `samples`, or for what replaces it.

        `place` names the point in the run: with the run's seed it decides every trajectory's seed,
        so that a resumed run samples what an uninterrupted one would have. Where there are fewer
        groups than samples, because clips are broken, groups come once more, marked as dropped: a
        step's shape is fixed. Raises `VideoError` if that is not allowed, or if there is no group.
        """
        kept: list[CollectedGroup] = []
        dropped: list[CollectedGroup] = []
        reasons: Counter[str] = Counter()
        (pending, lost), refills = self._readable(samples), 0
        if lost:
            reasons["video"] += lost
        wanted = len(pending)
        seconds, tokens, latents = 0.0, 0, 0
        while True:
            started = time.perf_counter()
            groups = self._rollouts.generate(
                [
                    RolloutRequest(s, self._seeds(f"{place}/{refills}/{i}/{s.id}", size), sampling)
                    for i, s in enumerate(pending)
                ]
            )
            seconds += time.perf_counter() - started
            tokens += sum(len(t.completion_ids) for group in groups for t in group)
            latents += sum(len(t.latents) for group in groups for t in group)
            for group, outcome in zip(groups, self._scorer.outcomes(groups), strict=True):
                verdict = judge_group(outcome, self._low, self._high)
                reasons[verdict.reason] += 1
                trained = verdict.keep or not filtering
                (kept if trained else dropped).append(CollectedGroup(group, list(outcome), trained))
            missing = wanted - len(kept)
            pending = []
            while not pending and missing and refills < self._max_refills and filtering:
                pending, lost = self._readable(self._refill(missing), needed=False)
                if lost:
                    reasons["video"] += lost
                refills += 1
            if not pending:
                handed = kept + dropped[:missing]
                spare = itertools.islice(itertools.cycle(handed), len(samples) - len(handed))
                handed = handed + [replace(c, trained=False) for c in spare]
                return Collected(handed, refills, reasons, seconds, tokens, latents)

    def shuffled(
        self, groups: Sequence[TrajectoryGroup], size: int, sampling: Sampling, place: str
    ) -> list[list[float]]:
        """A control without the order of the frames (T-GRPO of Video-R1): for each group, the
        outcomes [size] of as many trajectories of its sample that saw its frames in another order.

        The order is random, one a group, and never the ascending one. A clip that shows one frame,
        or one frame over and over, has no other order: its control sees what the group saw. `place`
        decides order and seeds as in `collect`.
        """
        requests = []
        for i, group in enumerate(groups):
            here = f"{place}/shuffled/{i}/{group.sample.id}"
            (seed,) = self._seeds(f"{here}/order", 1)
            frames = _disordered(group.trajectories[0].media[0].frames, seed)
            # Frames of the file, whatever they were in the row.
            sample = replace(group.sample, frames=frames, pool=0, window=None)
            requests.append(RolloutRequest(sample, self._seeds(here, size), sampling))
        return [list(row) for row in self._scorer.outcomes(self._rollouts.generate(requests))]

    def _readable(
        self, samples: Sequence[Sample], *, needed: bool = True
    ) -> tuple[list[Sample], int]:
        """The samples whose clips can be shown, with "replace" others in the places of those that
        cannot, and how many those were. If `needed`, at least one: where none is left, others are
        tried.
        """
        if self._broken.rule == "stop":
            return list(samples), 0
        places: list[Sample | None] = list(samples)
        lost, tries = 0, len(self._samples)
        while True:
            shown = [s for s in places if s is not None and s.id not in self._broken]
            for name, error in self._rollouts.broken(shown).items():
                self._broken.add(next(s for s in shown if s.id == name), error)
            for place, sample in enumerate(places):
                if sample is not None and sample.id in self._broken:
                    places[place], lost = None, lost + 1
            empty = [place for place, sample in enumerate(places) if sample is None]
            if self._broken.rule == "skip" and (len(empty) < len(places) or not needed):
                empty = []
            drawn = self._refill(min(len(empty), tries))
            if not drawn:
                break
            tries -= len(drawn)
            for place, sample in zip(empty, drawn, strict=False):
                places[place] = sample
        left = [sample for sample in places if sample is not None]
        if needed and not left:
            last = self._broken.rows[-1]
            raise VideoError(
                f"no clip of a step can be shown, nor of {len(self._samples)} rows tried in their "
                f"places; check data.video_root and the files. The last: {last['reason']}"
            )
        return left, lost

    def _refill(self, count: int) -> list[Sample]:
        """The next `count` prompts of this process, each process with its own."""
        drawn = []
        for _ in range(count):
            epoch, index = divmod(self.cursor * self._world + self._rank, len(self._samples))
            order = np.random.default_rng((self._seed, epoch)).permutation(len(self._samples))
            drawn.append(self._samples[order[index]])
            self.cursor += 1
        return drawn

    def _seeds(self, place: str, size: int) -> tuple[int, ...]:
        def seed(member: int) -> int:
            text = f"{self._seed}/{place}/{member}".encode()
            return int.from_bytes(hashlib.blake2b(text, digest_size=7).digest(), "big")

        return tuple(seed(member) for member in range(size))


def rollout_metrics(collected: Collected, step: int) -> dict[str, float]:
    """What to log about a rollout of update `step`: verdicts, latents, staleness, speed."""
    trajectories = [t for c in collected.groups for t in c.group]
    lag = [step - t.policy_version for t in trajectories]
    cosine = neighbour_cosine(trajectories)
    likeness = {
        "latents/neighbour_cosine": cosine.latents,
        "latents/neighbour_span_cosine": cosine.spans,
    }
    return {
        "groups/refills": collected.refills,
        "groups/trained": float(np.mean([c.trained for c in collected.groups])),
        **{f"groups/{reason}": collected.reasons[reason] for reason in get_args(Reason)},
        "latents/share_imagining": float(np.mean([t.imagined for t in trajectories])),
        "latents/spans": float(np.mean([len(t.span_lengths) for t in trajectories])),
        "latents/per_completion": float(np.mean([len(t.latents) for t in trajectories])),
        "rollouts/staleness": float(np.mean(lag)),
        "rollouts/seconds": collected.seconds,
        "rollouts/tokens_per_second": collected.tokens / collected.seconds,
        "rollouts/latents_per_second": collected.latents / collected.seconds,
        **{name: value for name, value in likeness.items() if value is not None},
    }


def _disordered(frames: Sequence[int], seed: int) -> tuple[int, ...]:
    """`frames` in a random order other than the ascending one, if they have one."""
    ascending, rng = tuple(sorted(frames)), np.random.default_rng(seed)
    order = ascending
    while order == ascending and len({*frames}) > 1:
        order = tuple(int(frame) for frame in rng.permutation(ascending))
    return order

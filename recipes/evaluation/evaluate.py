"""A policy answers samples greedily, with imagining left free, forced or forbidden."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Protocol

from recipes.evaluation.benchmarks.base import Breakdown
from recipes.evaluation.grading import Grade, Grader, by_rule, right_or_wrong
from recipes.evaluation.predictions import Answer, AnswerStore
from recipes.evaluation.scores import Evaluation, Graded, check_columns, summarise
from rewards.accuracy import extract_answer
from rl.data.broken import BrokenClips, of_sample
from rl.errors import VideoError
from rl.policy.protocol import Imagine
from rl.trajectory import RolloutRequest, Sample, Sampling, TrajectoryGroup

MODES: tuple[Imagine, ...] = ("free", "always", "never")
CHUNK = 256  # requests handed over at once: progress shows, and answers are kept, between chunks

Outcomes = Callable[[Sequence[TrajectoryGroup]], Sequence[Sequence[float]]]
GradedRows = dict[str, list[Graded]]  # by mode, in the order of the samples


class Sampler(Protocol):
    """What evaluation needs: a pool or a single engine."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]: ...

    def broken(self, samples: Sequence[Sample]) -> Mapping[str, VideoError]: ...


def evaluate(
    sampler: Sampler,
    samples: Sequence[Sample],
    modes: Sequence[Imagine],
    max_new_tokens: int,
    *,
    by: str | None = None,
    advance: Callable[[int], None] = lambda _count: None,
    outcomes: Outcomes | None = None,
    broken: BrokenClips | None = None,
) -> Evaluation:
    """Answer every sample greedily in each mode, and count what is right.

    `by` names a column to break the figures down by (`DataError` if rows lack it); `advance` is
    told how many answers have come in. `outcomes` decides what is right (1, 0, NaN for no value),
    by default `rewards.accuracy`. Samples whose clips cannot be read are added to `broken` and left
    out; without it, or where its rule is stop, they are errors.
    """
    breakdowns = () if by is None else (Breakdown(by),)
    check_columns(samples, [b.column for b in breakdowns])
    rows = answer(
        sampler, samples, modes, max_new_tokens, advance=advance, outcomes=outcomes, broken=broken
    )
    return summarise(rows, breakdowns, skipped=skipped_of(broken))


def answer(
    sampler: Sampler,
    samples: Sequence[Sample],
    modes: Sequence[Imagine],
    max_new_tokens: int,
    *,
    show: Callable[[Sample], Sample] = lambda sample: sample,
    grader: Grader = by_rule,
    outcomes: Outcomes | None = None,
    store: AnswerStore | None = None,
    broken: BrokenClips | None = None,
    advance: Callable[[int], None] = lambda _count: None,
) -> GradedRows:
    """The graded answers of every sample in each mode.

    `show` makes of a sample what the policy is asked; grades are those of the sample itself, by
    `outcomes` where that is given, else by `grader`. What `store` holds is not asked again, and
    what is asked goes into it. For `advance` and `broken` see `evaluate`.
    """
    found: dict[tuple[str, int], Answer] = {}
    if store is not None:
        found = {(a.mode, a.row): a for a in store.read()}
        advance(sum(mode in modes for mode, _ in found))
    verdicts: dict[tuple[str, int], Grade] = {}
    for mode in modes:
        sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, imagine=mode)
        missing = [row for row in range(len(samples)) if (mode, row) not in found]
        for start in range(0, len(missing), CHUNK):
            chunk = missing[start : start + CHUNK]
            shown = _shown(sampler, samples, chunk, show, broken)
            # A greedy trajectory uses no random number, so any seed will do.
            requests = [RolloutRequest(sample, (0,), sampling) for sample in shown.values()]
            began = time.perf_counter()
            groups = sampler.generate(requests) if requests else []
            seconds = (time.perf_counter() - began) / max(len(groups), 1)
            new = [
                Answer.of(group.trajectories[0], row, mode, seconds)
                for row, group in zip(shown, groups, strict=True)
            ]
            found |= {(mode, a.row): a for a in new}
            if outcomes is not None:
                for a, (value,) in zip(new, outcomes(groups) if groups else [], strict=True):
                    grade = right_or_wrong(value, extract_answer(a.text) or None)
                    verdicts[mode, a.row] = grade
            if store is not None and new:
                store.add(new)
            advance(len(chunk))
    if outcomes is None:
        asked = [place for place in found if place[0] in modes]
        texts = [found[place].text for place in asked]
        grades = grader([samples[row] for _, row in asked], texts)
        verdicts = dict(zip(asked, grades, strict=True))
    return {
        mode: [
            (sample, found[mode, row], verdicts[mode, row])
            for row, sample in enumerate(samples)
            if (mode, row) in found
        ]
        for mode in modes
    }


def skipped_of(broken: BrokenClips | None) -> dict[str, str]:
    """Why samples were left out, by id."""
    return {} if broken is None else {row["id"]: row["reason"] for row in broken.rows}


def _shown(
    sampler: Sampler,
    samples: Sequence[Sample],
    rows: Sequence[int],
    show: Callable[[Sample], Sample],
    broken: BrokenClips | None,
) -> dict[int, Sample]:
    """The samples of `rows` as they are asked; those whose clips cannot be read go to `broken`, or
    raise `VideoError`.
    """
    skips = broken is not None and broken.rule != "stop"
    shown: dict[int, Sample] = {}
    for row in rows:
        if broken is not None and samples[row].id in broken:
            continue
        try:
            shown[row] = show(samples[row])
        except VideoError as error:
            named = of_sample(samples[row], error)
            if broken is None or not skips:
                raise named from error
            broken.add(samples[row], named)
    if broken is None or not skips or not shown:
        return shown
    found = sampler.broken(list(shown.values()))
    for row in [row for row, sample in shown.items() if sample.id in found]:
        broken.add(samples[row], found[samples[row].id])
        del shown[row]
    return shown

"""Greedy accuracy of a policy, with imagining left free, forced or forbidden."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rich import box
from rich.table import Table

from rewards.accuracy import accuracy
from rl.errors import DataError
from rl.policy.protocol import Imagine
from rl.trajectory import RolloutRequest, Sample, Sampling, Trajectory, TrajectoryGroup

MODES: tuple[Imagine, ...] = ("free", "always", "never")
_CHUNK = 256  # requests handed over at once: progress shows between chunks
_HEADINGS = {"free": "free", "always": "forced", "never": "forbidden"}


Outcomes = Callable[[Sequence[TrajectoryGroup]], Sequence[Sequence[float]]]


class Sampler(Protocol):
    """What evaluation needs: a pool or a single engine."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]: ...


@dataclass(frozen=True)
class Score:
    """One mode's figures over `answers` answers.

    `judged` of them have a reference that can be judged, `right` of those are right. `imagining` is
    the share of answers with a latent span, `cut_short` the share that hit the length limit;
    `spans`, `latents` and `tokens` are means an answer (tokens without latents).
    """

    answers: int
    judged: int
    right: int
    imagining: float
    spans: float
    latents: float
    tokens: float
    cut_short: float

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN if none could be judged."""
        return self.right / self.judged if self.judged else math.nan

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `accuracy`, √(p(1-p)/n)."""
        p = self.accuracy
        return math.sqrt(p * (1.0 - p) / self.judged) if self.judged else math.nan

    def to_dict(self) -> dict[str, Any]:
        def number(value: float) -> float | None:
            return None if math.isnan(value) else value

        return asdict(self) | {
            "accuracy": number(self.accuracy),
            "standard_error": number(self.standard_error),
        }


@dataclass(frozen=True)
class Evaluation:
    """Scores by mode and, with a column `by`, by mode and the column's value."""

    scores: dict[str, Score]
    by: str | None
    parts: dict[str, dict[str, Score]]

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "modes": {mode: score.to_dict() for mode, score in self.scores.items()},
            "by": self.by,
            "parts": {
                mode: {value: score.to_dict() for value, score in parts.items()}
                for mode, parts in self.parts.items()
            },
        }

    def table(self, title: str = "Greedy accuracy") -> Table:
        """The same for a terminal."""
        table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
        table.add_column("imagining", no_wrap=True)
        if self.by is not None:
            table.add_column(self.by)
        for heading in ("accuracy", "answers", "imagined", "spans", "latents", "cut short"):
            table.add_column(heading, justify="right", no_wrap=True)
        for mode, score in self.scores.items():
            name = _HEADINGS.get(mode, mode)
            table.add_row(*([name] if self.by is None else [name, "all"]), *_cells(score))
            for value, part in self.parts.get(mode, {}).items():
                table.add_row("", value, *_cells(part))
        return table


def evaluate(
    pool: Sampler,
    samples: Sequence[Sample],
    modes: Sequence[Imagine],
    max_new_tokens: int,
    *,
    by: str | None = None,
    advance: Callable[[int], None] = lambda _count: None,
    outcomes: Outcomes | None = None,
) -> Evaluation:
    """Answer every sample greedily in each mode.

    `by` names a manifest column to break the figures down by (`DataError` if rows lack it);
    `advance` is told how many answers have come in. `outcomes` decides what is right (1, 0, NaN for
    no value), by default `rewards.accuracy`.
    """
    outcomes = outcomes or _by_rule
    if by is not None and (lacking := [s.id for s in samples if by not in s.extra]):
        raise DataError(
            f"sample {lacking[0]!r} and {len(lacking) - 1} others have no column {by!r} to break "
            "figures down by; add it to the manifest, or leave the breakdown out"
        )
    scores: dict[str, Score] = {}
    parts: dict[str, dict[str, Score]] = {}
    for mode in modes:
        sampling = Sampling(temperature=0.0, max_new_tokens=max_new_tokens, imagine=mode)
        answers: list[tuple[Sample, Trajectory, float]] = []
        for start in range(0, len(samples), _CHUNK):
            # A greedy trajectory uses no random number, so any seed will do.
            requests = [RolloutRequest(s, (0,), sampling) for s in samples[start : start + _CHUNK]]
            groups = pool.generate(requests)
            for group, (outcome,) in zip(groups, outcomes(groups), strict=True):
                answers.append((group.sample, group.trajectories[0], outcome))
            advance(len(requests))
        scores[mode] = _score(answers)
        if by is not None:
            values = sorted({str(s.extra[by]) for s in samples}, key=_numbers_first)
            parts[mode] = {
                v: _score([row for row in answers if str(row[0].extra[by]) == v]) for v in values
            }
    return Evaluation(scores, by, parts)


def _by_rule(groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
    verdicts = [[accuracy(t.text, g.sample.answer, g.sample.options) for t in g] for g in groups]
    return [[math.nan if value is None else value for value in row] for row in verdicts]


def _score(answers: Sequence[tuple[Sample, Trajectory, float]]) -> Score:
    outcomes = [outcome for _, _, outcome in answers]
    trajectories = [t for _, t, _ in answers]
    return Score(
        answers=len(answers),
        judged=sum(not math.isnan(o) for o in outcomes),
        right=sum(o == 1.0 for o in outcomes),
        imagining=_mean(t.imagined for t in trajectories),
        spans=_mean(len(t.span_lengths) for t in trajectories),
        latents=_mean(len(t.latents) for t in trajectories),
        tokens=_mean(len(t.completion_ids) - len(t.latents) for t in trajectories),
        cut_short=_mean(t.finish_reason == "length" for t in trajectories),
    )


def _mean(values: Iterable[float]) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers)


def _cells(score: Score) -> list[str]:
    return [
        f"{100 * score.accuracy:.1f} ± {100 * score.standard_error:.1f} %"
        if score.judged
        else "none judged",
        str(score.answers),
        f"{score.imagining:.1%}",
        f"{score.spans:.2f}",
        f"{score.latents:.1f}",
        f"{score.cut_short:.1%}",
    ]


def _numbers_first(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value

"""The figures of an evaluation, with 95 % intervals."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from recipes.evaluation.benchmarks.base import Breakdown
from recipes.evaluation.grading import Grade
from recipes.evaluation.intervals import Figure, mean, share
from recipes.evaluation.predictions import Answer
from rl.errors import DataError
from rl.trajectory import Sample

Graded = tuple[Sample, Answer, Grade]


@dataclass(frozen=True)
class Score:
    """One mode's figures over `answers` answers.

    `judged` of them have a value; `reasons` counts why the others have none. Of an evaluation that
    tells right from wrong, `right` are right; one with a judge has `grades` instead, each with its
    mean, and among them "mean", of all grades of an answer. `unparsed` answers hold nothing that
    could be compared, and count as wrong. `imagining` is the share of answers with a latent span,
    `cut_short` the share that hit the length limit; `spans`, `latents` and `tokens` (without
    latents) are means an answer, `neighbours` the mean cosine of neighbouring latents over the
    answers that have some.
    """

    answers: int
    judged: int
    right: int | None
    unparsed: int
    imagining: float
    spans: float
    latents: float
    tokens: float
    cut_short: float
    neighbours: float
    grades: dict[str, Figure] = field(default_factory=dict)
    reasons: dict[str, int] = field(default_factory=dict)

    @property
    def figures(self) -> dict[str, Figure]:
        """What was measured: "accuracy", or a judge's grades."""
        if self.right is None:
            return self.grades
        return {"accuracy": share(self.right, self.judged)}

    @property
    def accuracy(self) -> float:
        """Share of right answers; NaN if none could be judged, or a judge gave grades."""
        return self.right / self.judged if self.right is not None and self.judged else math.nan

    @property
    def standard_error(self) -> float:
        """Binomial standard error of `accuracy`, √(p(1-p)/n)."""
        p = self.accuracy
        return math.nan if math.isnan(p) else math.sqrt(p * (1.0 - p) / self.judged)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON, null where there is none."""
        plain = {k: v for k, v in vars(self).items() if k not in ("grades", "right")}
        if self.right is not None:
            rates = {"accuracy": self.accuracy, "standard_error": self.standard_error}
            plain |= {"right": self.right, **rates}
        plain = {k: None if v != v else v for k, v in plain.items()}  # NaN differs from itself
        return plain | {"figures": {name: f.to_dict() for name, f in self.figures.items()}}


@dataclass(frozen=True)
class Evaluation:
    """Scores by mode and, for each column that figures are broken down by, by its values.

    `breakdowns[column][mode][value]` are in the order of tables. `skipped` are the samples that
    could not be asked, by id, with the reason: clips that cannot be read. They are in no figure.
    """

    scores: dict[str, Score]
    breakdowns: dict[str, dict[str, dict[str, Score]]] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)

    def to_dict(self) -> dict[str, Any]:
        """Plain values for JSON."""
        return {
            "modes": {mode: score.to_dict() for mode, score in self.scores.items()},
            "breakdowns": {
                column: {
                    mode: {value: score.to_dict() for value, score in parts.items()}
                    for mode, parts in modes.items()
                }
                for column, modes in self.breakdowns.items()
            },
            "skipped": self.skipped,
        }


def summarise(
    rows: dict[str, list[Graded]],
    breakdowns: Sequence[Breakdown] = (),
    *,
    grades: Sequence[str] = (),
    skipped: dict[str, str] | None = None,
) -> Evaluation:
    """The figures of graded answers by mode; `grades` are the names of a judge's."""
    parts: dict[str, dict[str, dict[str, Score]]] = {}
    for breakdown in breakdowns:
        column = breakdown.column
        parts[column] = {}
        for mode, graded in rows.items():
            by_value: dict[str, list[Graded]] = {}
            for row in graded:
                by_value.setdefault(str(row[0].extra[column]), []).append(row)
            order = breakdown.order(by_value)
            parts[column][mode] = {value: score(by_value[value], grades) for value in order}
    scores = {mode: score(graded, grades) for mode, graded in rows.items()}
    return Evaluation(scores, parts, skipped or {})


def score(rows: Sequence[Graded], grades: Sequence[str] = ()) -> Score:
    """The figures of one set of graded answers; NaN for means of none."""
    answers = [answer for _, answer, _ in rows]
    valued = [grade for _, _, grade in rows if not math.isnan(grade.value)]
    means = {name: mean([g.grades[name] for g in valued]) for name in grades}
    if grades:
        means["mean"] = mean([g.value for g in valued])
    return Score(
        answers=len(rows),
        judged=len(valued),
        right=None if grades else sum(g.value == 1.0 for g in valued),
        unparsed=sum(grade.extracted is None for _, _, grade in rows),
        imagining=_mean(a.latents > 0 for a in answers),
        spans=_mean(len(a.span_lengths) for a in answers),
        latents=_mean(a.latents for a in answers),
        tokens=_mean(a.tokens for a in answers),
        cut_short=_mean(a.finish_reason == "length" for a in answers),
        neighbours=_mean(a.neighbours for a in answers if a.neighbours is not None),
        grades=means,
        reasons=dict(Counter(g.reason for _, _, g in rows if math.isnan(g.value))),
    )


def check_columns(samples: Iterable[Sample], columns: Iterable[str]) -> None:
    """Raises `DataError` if a sample lacks a column that figures are to be broken down by."""
    samples = list(samples)
    for column in columns:
        if lacking := [s.id for s in samples if column not in s.extra]:
            others = f" and {len(lacking) - 1} others have" if len(lacking) > 1 else " has"
            raise DataError(
                f"sample {lacking[0]!r}{others} no column {column!r} to break figures down by; add "
                "it to the data, or leave the breakdown out"
            )


def _mean(values: Iterable[float]) -> float:
    numbers = [float(v) for v in values]
    return sum(numbers) / len(numbers) if numbers else math.nan

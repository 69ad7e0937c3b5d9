"""Which rows show that seeing helps: visual gain, and what is kept for it. Pure functions.

Source: Future-L1 (arXiv 2606.05769), which asks the base model each question
several times in two ways, in text only and with the intermediate frames as hints, and takes

    p_text = success rate without hints     p_hint = success rate with hints
    gain   = p_hint - p_text

Easy rows and rows with no gain or a negative one are dropped, and of the others those with the
largest gain are kept. What is easy, the prompts and how ties are broken is not public: ours is a
reconstruction.

The gain of the rows that are kept is larger than what they would show if they were probed again:
they were chosen for it, and n answers tell it only to about 1/√n.

A judge is asked about the answers that the rule does not call right, so the answers without a
verdict are never among the right ones, and a rate over the others is too high. A row with less than
half of the answers of a probe judged has no rate, and is asked again (`Probed.settled`).

Rates and gains are fractions, so that equal ones are equal: 2/3 - 1/3 is 1/3, which it is not in
floating point.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from recipes.schema.selection import KeepSection
from rl.trajectory import Trajectory

Reason = Literal[
    "kept", "beyond top", "little gain", "no gain", "negative gain", "easy", "unjudged", "skipped"
]


LEAST_JUDGED = Fraction(1, 2)  # of a probe's answers


@dataclass(frozen=True)
class Probe:
    """The answers to one question in one probe: so many `judged`, so many of them `right`.

    `invalid` ones have no outcome and count for nothing; `cut_short` ones, among all, ran into the
    length limit.
    """

    right: int
    judged: int
    invalid: int
    cut_short: int

    @property
    def rate(self) -> Fraction | None:
        """Success rate of the judged answers; None if too few were judged."""
        enough = self.judged >= LEAST_JUDGED * (self.judged + self.invalid)
        return Fraction(self.right, self.judged) if self.judged and enough else None


@dataclass(frozen=True)
class Probed:
    """Both probes of one row, or why it was `skipped`."""

    text: Probe | None = None
    hinted: Probe | None = None
    skipped: str = ""

    @property
    def settled(self) -> bool:
        """Whether it has a gain or was skipped; if not, the judge may have come back."""
        return bool(self.skipped) or self.gain is not None

    @property
    def p_text(self) -> Fraction | None:
        return self.text and self.text.rate

    @property
    def p_hint(self) -> Fraction | None:
        return self.hinted and self.hinted.rate

    @property
    def gain(self) -> Fraction | None:
        """Visual gain, in [-1, 1]; None without a success rate in both probes."""
        if self.p_text is None or self.p_hint is None:
            return None
        return self.p_hint - self.p_text


@dataclass(frozen=True)
class Verdict:
    """What becomes of a row. `rank`, from 1, orders those that the rule lets through."""

    reason: Reason
    rank: int | None = None

    @property
    def kept(self) -> bool:
        return self.reason == "kept"


def count_outcomes(outcomes: Sequence[float], trajectories: Sequence[Trajectory]) -> Probe:
    """A probe's counts from the outcomes of its answers: 1, 0, or NaN for none."""
    invalid = sum(math.isnan(outcome) for outcome in outcomes)
    return Probe(
        right=sum(outcome == 1.0 for outcome in outcomes),
        judged=len(outcomes) - invalid,
        invalid=invalid,
        cut_short=sum(t.finish_reason == "length" for t in trajectories),
    )


def choose(rows: Mapping[str, Probed], keep: KeepSection) -> dict[str, Verdict]:
    """What becomes of each row, by its id.

    Rows that pass `keep` are ranked by gain; among equal ones the lower p_text comes first (harder
    without hints), then the smaller id. The order of `rows` does not matter.
    """
    verdicts = {id: Verdict(sift(probed, keep)) for id, probed in rows.items()}
    passed = [id for id, verdict in verdicts.items() if verdict.kept]

    def place(id: str) -> tuple[Any, ...]:
        gain, p_text = rows[id].gain, rows[id].p_text
        assert gain is not None
        return -gain, p_text, id

    for rank, id in enumerate(sorted(passed, key=place), start=1):
        beyond = keep.top is not None and rank > keep.top
        verdicts[id] = Verdict("beyond top" if beyond else "kept", rank)
    return verdicts


def sift(probed: Probed, keep: KeepSection) -> Reason:
    """What the rule says of one row, before the best are picked: "kept" if it passes."""
    gain, p_text = probed.gain, probed.p_text
    if probed.skipped:
        return "skipped"
    if gain is None or p_text is None:
        return "unjudged"
    if keep.drop_easy is not None and p_text >= _exact(keep.drop_easy):
        return "easy"
    passes = gain > 0 if keep.min_gain is None else gain >= _exact(keep.min_gain)
    if passes:
        return "kept"
    if gain < 0:
        return "negative gain"
    return "little gain" if gain > 0 else "no gain"


def _exact(number: float) -> Fraction:
    """The fraction that was written: 0.1 is a tenth, which the float is not."""
    return Fraction(repr(number))

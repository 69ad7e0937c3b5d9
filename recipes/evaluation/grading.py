"""From completions to grades: by the accuracy rule, or by the first letter of an answer."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from string import ascii_uppercase

from rewards.accuracy import accuracy, extract_answer
from rl.trajectory import Sample

NO_REFERENCE = "the row's reference answer cannot be judged"
LETTERS = 4  # of a question whose options are not known


@dataclass(frozen=True)
class Grade:
    """What one completion is worth.

    `value` is 1 for right and 0 for wrong, or the mean of a judge's `grades`; NaN where there is
    none, with the `reason`. `extracted` is the answer found in the completion; None if there was
    none to be found: such an answer is *unparsed*, and wrong.
    """

    value: float
    extracted: str | None
    reason: str = ""
    grades: dict[str, float] = field(default_factory=dict)


# Grades completions of samples, one each.
Grader = Callable[[Sequence[Sample], Sequence[str]], list[Grade]]


def by_rule(samples: Sequence[Sample], texts: Sequence[str]) -> list[Grade]:
    """`rewards.accuracy`, the rule that training rewards by."""
    return [
        right_or_wrong(accuracy(text, s.answer, s.options), extract_answer(text) or None)
        for s, text in zip(samples, texts, strict=True)
    ]


def by_letter(samples: Sequence[Sample], texts: Sequence[str]) -> list[Grade]:
    """The first letter of an option inside ``<answer>…</answer>``, as FutureBench is scored
    (OpenGVLab/Future-L1).
    """
    grades = []
    for sample, text in zip(samples, texts, strict=True):
        letter = first_letter(text, len(sample.options) or LETTERS)
        said = f"<answer>{letter}</answer>" if letter else ""
        value = accuracy(said, sample.answer, sample.options, kind="choice")
        grades.append(right_or_wrong(value, letter))
    return grades


def first_letter(text: str, options: int = LETTERS) -> str | None:
    """The first of the first `options` capital letters inside the last complete
    ``<answer>…</answer>``; None without such a block, or such a letter in it.

    So "B", "(B)", "B. left" and "option B" are B. Small letters are words' and do not count.
    """
    found = re.search(f"[{ascii_uppercase[:options]}]", extract_answer(text) or "")
    return found[0] if found else None


def right_or_wrong(value: float | None, extracted: str | None) -> Grade:
    """A grade of 1 or 0; None or NaN: the reference cannot be judged."""
    if value is None or math.isnan(value):
        return Grade(math.nan, extracted, NO_REFERENCE)
    return Grade(value, extracted)

"""What a benchmark says."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Literal

from rl.data.frames import FrameRule
from rl.data.media import question_text
from rl.trajectory import Sample

Scoring = Literal["letter", "rule", "judge"]


@dataclass(frozen=True)
class Breakdown:
    """A column of the data to break figures down by.

    `headings` are the values that a table shows, in their order, with what it calls them; other
    values follow under their own names.
    """

    column: str
    headings: dict[str, str] = field(default_factory=dict)

    def order(self, values: Iterable[str]) -> list[str]:
        """The values that occur: those with headings first, then numbers, then texts."""
        found = set(values)
        known = [value for value in self.headings if value in found]
        return known + sorted(found - set(known), key=_numbers_first)

    def heading(self, value: str) -> str:
        return self.headings.get(value, value)


@dataclass(frozen=True)
class Benchmark:
    """How a data set is asked and graded. Answers are greedy.

    `format` is the reader's (`rl.data.formats.read_samples`), `frames` hold for rows that list
    none. `instruction` ends every question, after its options. `scoring`: "letter", the first
    letter in ``<answer>``; "rule", `rewards.accuracy`; "judge", a language model's grades from 0 to
    5. `overall` is what a table calls the figure over all answers.
    """

    name: str
    title: str
    format: str
    frames: FrameRule
    max_new_tokens: int
    scoring: Scoring
    instruction: str = ""
    breakdowns: tuple[Breakdown, ...] = ()
    overall: str = "all"

    def prompt(self, sample: Sample) -> Sample:
        """`sample` as it is shown to the policy: its question with options and instruction."""
        if not self.instruction:
            return sample
        return replace(sample, question=f"{question_text(sample)}\n{self.instruction}")


def _numbers_first(value: str) -> tuple[bool, float, str]:
    try:
        return False, float(value), value
    except ValueError:
        return True, 0.0, value

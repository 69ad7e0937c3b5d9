"""One reward of a run: what to call, how much it counts, what it may take."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from rewards.functions import Source
from rewards.process import Seat
from rewards.values import RewardFunction
from rl.errors import RecipeError


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a run.

    `options` reach the function as keywords and win over columns of the same name. `range` bounds
    its values: those outside are invalid. `timeout_s` is the deadline of one call over the whole
    batch. Terms with the same `process` share one; None is one of its own, bounded by `memory_mb`
    beyond what its imports took and with a share of `gpus`.
    """

    name: str
    function: RewardFunction | Source
    weight: float = 1.0
    shaping: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)
    range: tuple[float, float] | None = None
    timeout_s: float = 60.0
    process: str | None = None
    memory_mb: int | None = None
    gpus: float = 0.0

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise RecipeError(f"reward {self.name!r}: weight is {self.weight}; it must be finite")

    @property
    def seat(self) -> Seat:
        target = self.function.target if isinstance(self.function, Source) else self.function
        return Seat(self.name, target, self.options, self.range)


def check_terms(terms: Sequence[RewardTerm]) -> None:
    """Exactly one reward decides the outcome, and each has a name of its own. Raises
    `RecipeError`.
    """
    outcomes = [term.name for term in terms if not term.shaping]
    if len(outcomes) != 1:
        raise RecipeError(
            f"rewards: {outcomes or 'none'} of {[t.name for t in terms]} decide the outcome; "
            "exactly one must. Add `{use: accuracy}`, or mark one with `outcome: true`"
        )
    names = [term.name for term in terms]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise RecipeError(f"rewards: {twice} appear more than once; give each its own `name`")


def overweight(terms: Sequence[RewardTerm], ranges: Mapping[str, tuple[float, float]]) -> list[str]:
    """A sentence for each shaping reward that could count for more than right and wrong do, and one
    if they only do so together. `ranges` are those of the rewards that have one.

    Shaping that outweighs the outcome pays for wrong answers in the right manner.
    """
    limit = sum(abs(term.weight) for term in terms if not term.shaping)
    weighted = {
        term.name: abs(term.weight) * (ranges[term.name][1] - ranges[term.name][0])
        for term in terms
        if term.shaping and term.name in ranges
    }
    found = [
        f"reward {name!r} can outweigh the outcome: weight times range is {span:.3g}, and right or "
        f"wrong counts {limit:.3g}; lower its weight"
        for name, span in weighted.items()
        if span > limit
    ]
    if not found and (total := sum(weighted.values())) > limit:
        found = [
            f"rewards {', '.join(weighted)} together can outweigh the outcome: weights times "
            f"ranges sum to {total:.3g}, and right or wrong counts {limit:.3g}; lower their weights"
        ]
    return found

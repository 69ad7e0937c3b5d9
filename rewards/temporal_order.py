"""Does the policy use the order of the frames?

Source: T-GRPO of Video-R1 (tulerfeng/Video-R1). Beside each group of G trajectories, a control of
G/2 answers the same question about the same frames in a random order. Where

    mean accuracy (in order) >= 0.8 · mean accuracy (shuffled)

every right trajectory of the group earns a bonus: 1 here, times the weight, which is 0.3 as
published. Nobody earns it in a group that does better without the order.

Three edges follow from that comparison, and are kept:

- it is "at least", so a group that is all wrong passes against a control that is all wrong; it has
  no right trajectory to pay;
- any right answer passes against a control that is all wrong;
- the factor 0.8 lets a group pass that is a little *worse* than its control: the rule asks only
  that the order does no harm. `threshold` above 1 asks that it helps.

Video-R1 calls an answer right above an accuracy of 0.1, for its graded tasks; outcomes here are 1
or 0.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import groupby
from typing import Any

from rl.errors import RecipeError


def temporal_order(
    correct: Sequence[float], shuffled: Sequence[float], *, threshold: float = 0.8
) -> list[float | None]:
    """The bonus of each trajectory of one group; see the module for the rule.

    `correct` [G] are the group's outcomes, `shuffled` [S] those of its control: 1 right, 0 wrong,
    NaN invalid. Invalid ones are left out of both means. 1 for the right members of a group that
    passes, else 0; None for an invalid member, and for all where the control has no valid outcome.
    Raises `RecipeError` for a `threshold` that is negative or not finite. Range: {0, 1}.
    """
    _check_threshold(threshold)
    ordered = [value for value in correct if not math.isnan(value)]
    control = [value for value in shuffled if not math.isnan(value)]
    if not ordered or not control:
        return [None] * len(correct)
    # Multiplied out, with room for rounding: what is equal passes.
    gap = sum(ordered) * len(control) - threshold * sum(control) * len(ordered)
    passed = gap >= -1e-9
    return [None if math.isnan(v) else float(passed and v == 1.0) for v in correct]


def temporal_order_rewards(
    *,
    outcomes: Sequence[float],
    shuffled_outcomes: Sequence[Sequence[float]],
    group_ids: Sequence[int],
    threshold: float = 0.8,
    **_: Any,
) -> list[float | None]:
    """`temporal_order` of each group, with TRL's signature.

    Trajectories of a group stand together, and each carries the outcomes of its group's control.
    """
    _check_threshold(threshold)  # a wrong option fails even on an empty batch
    values: list[float | None] = []
    rows = zip(group_ids, outcomes, shuffled_outcomes, strict=True)
    for _group, members in groupby(rows, key=lambda row: row[0]):
        own = list(members)
        control = own[0][2]
        values += temporal_order([row[1] for row in own], control, threshold=threshold)
    return values


def _check_threshold(threshold: float) -> None:
    if not 0.0 <= threshold < math.inf:
        raise RecipeError(
            f"temporal_order: threshold is {threshold}; it must be finite and at least 0"
        )

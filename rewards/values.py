"""What a reward function gives for one trajectory: a number, no value, or why there is none."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Invalid:
    """In the place of a number: the value could not be determined, and `reason` says why.

    It is counted and named, unlike None ("this reward does not apply here"); both leave the mean,
    deviation and count of the group alone. TRL knows None only: a reward that should also run there
    returns None.
    """

    reason: str


Value = float | None | Invalid
RewardFunction = Callable[..., Sequence[Value] | Awaitable[Sequence[Value]]]

"""Is a completion about to run out of room?

Source: the soft overlong punishment of DAPO (arXiv 2503.14476), with L the greatest length and B
the buffer before it:

    0                    length <= L - B
    (L - B - length)/B   L - B < length <= L
    -1                   length > L

DAPO has L = 20480 and B = 4096, a fifth of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rl.errors import RecipeError

if TYPE_CHECKING:
    from rl.trajectory import Trajectory


def soft_overlong(length: int, *, max_length: int, buffer: int) -> float:
    """The punishment of a completion of `length` tokens; see the module for the formula.

    0 up to ``max_length - buffer``, falling evenly to -1 at `max_length`. Raises `RecipeError` for
    a `buffer` outside of 1 to `max_length`. Range: [-1, 0].
    """
    _check(max_length, buffer)
    free = max_length - buffer
    return 0.0 if length <= free else max((free - length) / buffer, -1.0)


def length_rewards(
    completion_ids: Sequence[Sequence[int]],
    *,
    trajectories: Sequence[Trajectory] | None = None,
    max_length: int | None = None,
    buffer: int | None = None,
    **_: Any,
) -> list[float]:
    """`soft_overlong` of each completion, with TRL's signature.

    Every position counts: tokens, span markers and latents alike, for each costs one step of the
    model and one place of the budget. `max_length` None takes each trajectory's own
    ``max_new_tokens``, `buffer` None a fifth of the greatest length.
    """
    _check(max_length, buffer)  # a wrong option fails even on an empty batch
    if max_length is not None:
        limits = [max_length] * len(completion_ids)
    elif completion_ids and trajectories is None:
        raise RecipeError("length: without trajectories it needs the option max_length")
    else:
        limits = [trajectory.sampling.max_new_tokens for trajectory in trajectories or ()]
    values = []
    for ids, most in zip(completion_ids, limits, strict=True):
        share = max(most // 5, 1) if buffer is None else buffer
        values.append(soft_overlong(len(ids), max_length=most, buffer=share))
    return values


def _check(max_length: int | None, buffer: int | None) -> None:
    too_short = max_length is not None and max_length < 1
    if too_short or (buffer is not None and not 1 <= buffer <= (max_length or buffer)):
        raise RecipeError(
            f"length: max_length is {max_length} and buffer {buffer} tokens; max_length must be at "
            "least 1, and buffer from 1 to max_length"
        )

"""A reward that reads what the policy imagined."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import torch

    from rl.trajectory import Trajectory

DECISION = 2  # `rl.policy.protocol.Slot.DECISION`: the policy chose to end or to continue the span


class SpanCount:
    """How near the number of latent spans is to `wanted`: 1 - |n - wanted| / max(n, wanted).

    A span counts if the policy ended it itself (the budget did not) and its latents moved: the
    distance from first to last is at least `least_change` times the norm of the first.

    The pattern: options go to `__init__`, which refuses wrong ones before the run starts; what must
    be loaded once is loaded there, too. A reward that names `trajectories` gets them.
    """

    range = (0.0, 1.0)

    def __init__(self, wanted: int = 2, least_change: float = 0.0) -> None:
        if wanted < 1 or least_change < 0:
            raise ValueError(
                f"span_count: wanted is {wanted} and least_change {least_change}; they must be at "
                "least 1 and 0"
            )
        self.wanted, self.least_change = wanted, least_change

    def __call__(self, trajectories: Sequence[Trajectory], **_: Any) -> list[float]:
        return [self.score(t) for t in trajectories]

    def score(self, trajectory: Trajectory) -> float:
        ended = (span for span, own in spans_and_ends(trajectory) if own)
        n = sum(change(span) >= self.least_change for span in ended)
        return 1.0 - abs(n - self.wanted) / max(n, self.wanted)


def spans_and_ends(trajectory: Trajectory) -> Iterator[tuple[torch.Tensor, bool]]:
    """The latents [T, H] of each span that has any, and whether the policy ended it itself."""
    # Where the latents are among the tokens. The end of a span follows its last latent.
    places = np.flatnonzero(trajectory.completion_ids == trajectory.filler)
    last = -1
    for span in trajectory.spans():
        if len(span):
            last += len(span)
            end = places[last] + 1
            whole = end < len(trajectory.decision)  # else the completion was cut off in the span
            yield span, bool(whole and trajectory.decision[end] == DECISION)


def change(span: torch.Tensor) -> float:
    """The distance from the first to the last latent, in norms of the first."""
    first, last = span[0].float(), span[-1].float()
    return float((last - first).norm() / first.norm().clamp(min=1e-12))

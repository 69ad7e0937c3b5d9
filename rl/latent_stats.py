"""How alike neighbouring latents are: what homogenisation of latents shows in.

A policy whose latents all point the same way no longer thinks in them. The released objective of
Future-L1 (`rl.published`) pulls each latent's mean towards its neighbour; ours does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

from rl.trajectory import Trajectory


@dataclass(frozen=True)
class NeighbourCosine:
    """Mean cosines over all pairs of neighbours; None where there is no pair."""

    latents: float | None  # of latents that follow one another in the same span
    spans: float | None  # of the means of spans that follow one another


def neighbour_cosine(trajectories: Iterable[Trajectory]) -> NeighbourCosine:
    """The mean cosine of neighbouring latents of a span, and of neighbouring spans' means.

    Every pair counts once, whichever trajectory it is of. A zero vector has cosine 0 with all
    others, and spans without latents (a completion cut short) are skipped.
    """
    inside, between = _Mean(), _Mean()
    for trajectory in trajectories:
        spans = [span.float() for span in trajectory.spans() if len(span)]
        for span in spans:
            inside.add(_cosines(span))
        if len(spans) > 1:
            between.add(_cosines(torch.stack([span.mean(0) for span in spans])))
    return NeighbourCosine(inside.value, between.value)


def _cosines(rows: torch.Tensor) -> torch.Tensor:
    """Of neighbouring rows of [n, H]: [n - 1]."""
    units = normalize(rows, dim=-1)
    return (units[:-1] * units[1:]).sum(-1)


class _Mean:
    """The mean of what was added; None of nothing."""

    def __init__(self) -> None:
        self._sum, self._count = 0.0, 0

    def add(self, values: torch.Tensor) -> None:
        self._sum += float(values.sum(dtype=torch.float64))
        self._count += len(values)

    @property
    def value(self) -> float | None:
        return self._sum / self._count if self._count else None

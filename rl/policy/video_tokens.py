"""The video's tokens in a row: where they stand, and what they are to latents."""

from __future__ import annotations

from dataclasses import dataclass, fields
from typing import NamedTuple

import torch

from rl.policy.injection import Memory


@dataclass(frozen=True)
class VideoRows:
    """Where a packed row of T tokens has V video tokens and shows R of them again, and whose
    they are. Groups are numbered as they lie in the row.
    """

    rows: torch.Tensor  # int64 [V], places in the row
    groups: torch.Tensor  # int64 [V], the group each belongs to
    latent_groups: torch.Tensor  # int64 [L], that of each latent, in the order of `latent_rows`
    replayed: torch.Tensor  # int64 [R], where tokens are shown again
    sources: torch.Tensor  # int64 [R], where they were shown first

    @property
    def visible(self) -> torch.Tensor:
        """Which video tokens each latent sees: bool [1, L, V]."""
        return (self.latent_groups[:, None] == self.groups)[None]

    def to(self, device: torch.device | str) -> VideoRows:
        return VideoRows(*(getattr(self, f.name).to(device) for f in fields(self)))


class SeenVideo(NamedTuple):
    """N videos as latents see them."""

    memory: Memory
    visible: torch.Tensor  # bool [N, Q or 1, V]


@dataclass
class InputEmbeds:
    """What the language model was last given."""

    value: torch.Tensor | None = None  # [B, T, H]

    def at(self, rows: torch.Tensor) -> torch.Tensor:
        """What stands at `rows` [V] of a single row: [1, V, H]."""
        assert self.value is not None, "the language model has not been called"
        return self.value.flatten(0, 1)[rows][None]

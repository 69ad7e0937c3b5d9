"""Visual replay: before each latent, the video tokens that matter most now are shown again.

Source: the replay of visual-enhanced depth scaling (arXiv 2604.10500; Simon98-AI/Vedas, which
calls it SCF-VR). Of the video tokens that were not shown again yet, the k to which the last token
attends most are re-inserted before the latent, at their original positions, where all that follows
sees them. What makes them cohere in space: the window with most of them in it gives a target, the
mean of its features, that the mean of the replayed tokens is pulled to.

Differences from the release, which make this our reconstruction: tokens keep their positions (it
numbers them anew) and their scale (it multiplies each by its share of attention); the target is
pooled from the features of the window's tokens (it crops the picture and encodes it once more); the
pull acts on what is fed, through a residual layer that begins at zero (it acts on a copy, through a
layer that nothing else uses); and the window is a box in time, height and width.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from rl.errors import PolicyError


@dataclass(frozen=True)
class VisualReplayConfig:
    """`tokens` replayed before a latent; `window` of the target region, in merged tokens (time,
    height, width): (1, 4, 4) is the published one, cut down where a clip is smaller. Raises
    `PolicyError`.
    """

    tokens: int = 32
    window: tuple[int, int, int] = (1, 4, 4)

    def __post_init__(self) -> None:
        object.__setattr__(self, "window", tuple(self.window))
        if self.tokens < 1 or len(self.window) != 3 or min(self.window) < 1:
            raise PolicyError(
                f"visual replay of {self.tokens} tokens with the window {self.window}: at least 1 "
                "token, and a window of three sizes (time, height, width) of at least 1"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def build(self, hidden_size: int) -> VisualReplay:
        return VisualReplay(hidden_size)


class VisualReplay(nn.Module):
    """What a video token is when it is shown again: itself, and at first nothing more."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.inner = nn.Linear(hidden_size, hidden_size)
        self.outer = nn.Linear(hidden_size, hidden_size)

    def reset(self) -> None:
        """What `_init_weights` of transformers would draw at random."""
        init.zeros_(self.outer.weight)
        init.zeros_(self.outer.bias)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """[..., H] to [..., H]."""
        return tokens + self.outer(F.relu(self.inner(self.norm(tokens))))


def choose(saliency: torch.Tensor, free: torch.Tensor, count: int) -> torch.Tensor:
    """The `count` most salient of the tokens that are `free` (bool [B, V]) by `saliency` [B, V], in
    the order of the video: int64 [B, count], -1 behind them where fewer are left. Of equal ones the
    earlier is taken.
    """
    ranked = saliency.masked_fill(~free, -torch.inf)
    order = ranked.argsort(dim=-1, descending=True, stable=True)[:, :count]
    last = free.shape[-1]
    places = torch.where(free.gather(1, order), order, last).sort(-1).values
    places = F.pad(places, (0, count - places.shape[1]), value=last)
    return torch.where(places == last, -1, places)


def densest_window(hits: torch.Tensor, window: Sequence[int]) -> tuple[slice, slice, slice]:
    """Where the box of size `window` with most of `hits` (bool [T, H, W]) in it lies; the first of
    several. It is cut down where the grid is smaller.
    """
    size = tuple(min(w, n) for w, n in zip(window, hits.shape, strict=True))
    sums = F.avg_pool3d(hits.double()[None, None], size, stride=1)[0, 0]
    best = int(sums.flatten().argmax())
    starts = torch.unravel_index(torch.tensor(best), sums.shape)
    t, h, w = (slice(int(a), int(a) + n) for a, n in zip(starts, size, strict=True))
    return t, h, w


def region_target(
    features: torch.Tensor, places: torch.Tensor, grid: Sequence[int], window: Sequence[int]
) -> torch.Tensor:
    """The mean feature [H] of the densest window of the tokens at `places` (int64 [k], -1: none)
    of a video with `features` [T·H·W, H] in the order of its `grid` (T, H, W); without gradient.
    """
    hits = torch.zeros(len(features), dtype=torch.bool, device=features.device)
    hits[places[places >= 0]] = True
    region = densest_window(hits.view(*grid), window)
    return features.detach().view(*grid, -1)[region].flatten(0, 2).mean(0)

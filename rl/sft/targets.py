"""Targets of latents: pooled features of future frames under the policy's own vision tower,
computed once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from rl.data.media import MediaProcessor
from rl.policy.model import LatentPolicy
from rl.sft.alignment import pool_frames, target_variance
from rl.trajectory import Sample

BATCH_PATCHES = (
    1 << 15
)  # patches that go through the tower at the same time, unless one clip alone has more

Progress = Callable[[int, int], object]  # called with (clips done, clips in all)


@dataclass(frozen=True)
class Targets:
    """The targets of N samples in one tensor; sample i owns rows ``offsets[i]`` to ``offsets[i +
    1]``.
    """

    features: torch.Tensor  # float32 [L, H]
    offsets: tuple[int, ...]  # [N + 1]
    mean: torch.Tensor  # [H]
    variance: float  # mean variance of a dimension; 1 where there are no two targets to differ

    def of(self, index: int) -> torch.Tensor:
        """The targets [L_i, H] of sample `index`, span after span."""
        return self.features[self.offsets[index] : self.offsets[index + 1]]


@torch.no_grad()
def compute_targets(
    policy: LatentPolicy,
    media: MediaProcessor,
    samples: Sequence[Sample],
    *,
    tokens_per_patch: int = 1,
    progress: Progress | None = None,
) -> Targets:
    """Features of all frames in the samples' `imagine`, through `policy`'s tower. Raises
    `VideoError`.

    Each span is a clip of its own, as if it were shown to the model; only its pooled features are
    kept.
    """
    keys = [media.key(s, span) for s in samples for span in s.imagine]
    parts: list[torch.Tensor] = []
    waiting: list[dict[str, torch.Tensor]] = []
    for number, key in enumerate(keys, start=1):
        waiting.append(media.process(key).inputs)
        patches = sum(len(clip["pixel_values_videos"]) for clip in waiting)
        if patches >= BATCH_PATCHES or number == len(keys):
            parts += _pooled(policy, media, waiting, tokens_per_patch)
            waiting = []
        if progress is not None:
            progress(number, len(keys))
    width = policy.config.get_text_config().hidden_size
    features = torch.cat(parts) if parts else torch.zeros(0, width)
    lengths = iter(len(part) for part in parts)
    counts = (sum(next(lengths) for _ in s.imagine) for s in samples)
    variance = target_variance(features) if len(features) > 1 else 0.0
    return Targets(
        features, tuple(accumulate(counts, initial=0)), features.mean(0), variance or 1.0
    )


def _pooled(
    policy: Any,
    media: MediaProcessor,
    clips: Sequence[dict[str, torch.Tensor]],
    tokens_per_patch: int,
) -> list[torch.Tensor]:
    grid = torch.cat([clip["video_grid_thw"] for clip in clips])
    pixels = torch.cat([clip["pixel_values_videos"] for clip in clips])
    output = policy.get_video_features(
        pixels.to(policy.device, policy.dtype), grid.to(policy.device)
    )
    return [
        pool_frames(tokens.view(int(thw[0]), -1, tokens.shape[-1]), tokens_per_patch).float().cpu()
        for tokens, thw in zip(output.pooler_output, grid, strict=True)
    ]

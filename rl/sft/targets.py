"""Targets of latents: features of future frames under the policy's own vision tower and merger,
without what DeepStack adds to deeper layers, computed once.

Either the merged tokens of a temporal patch are averaged into a fixed number of latents, or each of
them is a latent. How many these are depends on the shape of the frames, so lengths are read off the
processed clips (`rl.sft.target_clips`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from rl.data.media import MediaProcessor
from rl.errors import PolicyError, VideoError
from rl.policy.model import LatentPolicy
from rl.sft.alignment import pool_frames, target_variance
from rl.sft.target_clips import TargetClips, TokensPerPatch
from rl.trajectory import Sample

BATCH_PATCHES = (
    1 << 15
)  # patches that go through the tower at the same time, unless one clip alone has more

Progress = Callable[[int, int], object]  # called with (clips done, clips in all)
OnBroken = Callable[[Sample, VideoError], object]  # called for a sample that cannot be read


@dataclass(frozen=True)
class Targets:
    """The targets of N samples in one tensor, sample after sample, span after span."""

    features: torch.Tensor  # float32 [L, H]
    lengths: tuple[tuple[int, ...], ...]  # latents in each span of each sample; L in all
    mean: torch.Tensor  # [H]
    variance: float  # mean variance of a dimension; 1 where there are no two targets to differ

    @classmethod
    def of_features(cls, features: torch.Tensor, lengths: Sequence[Sequence[int]]) -> Targets:
        """From features [L, H] and the lengths of each sample's spans."""
        variance = target_variance(features) if len(features) > 1 else 0.0
        spans = tuple(tuple(spans) for spans in lengths)
        return cls(features, spans, features.mean(0), variance or 1.0)

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """[N + 1]: sample i owns the rows from ``offsets[i]`` to ``offsets[i + 1]``."""
        return tuple(accumulate(map(sum, self.lengths), initial=0))

    def of(self, index: int) -> torch.Tensor:
        """The targets [L_i, H] of sample `index`, span after span."""
        return self.features[self.offsets[index] : self.offsets[index + 1]]


@torch.no_grad()
def compute_targets(
    policy: LatentPolicy,
    media: MediaProcessor,
    samples: Sequence[Sample],
    *,
    tokens_per_patch: TokensPerPatch = 1,
    progress: Progress | None = None,
    on_broken: OnBroken | None = None,
) -> Targets:
    """Features of all frames in the samples' `imagine`, through `policy`'s tower.

    Each span is a clip of its own, as if it were shown to the model; only its features are kept.
    With `tokens_per_patch` "all" a span has at most the protocol's `max_length` of them. A sample
    of which a clip cannot be read has no targets if `on_broken` takes its error; without one the
    `VideoError` is raised.
    """
    clips = TargetClips(media, tokens_per_patch=tokens_per_patch, budget=policy.protocol.max_length)
    parts: deque[torch.Tensor] = deque()
    spans: list[int] = []  # of each sample
    waiting: list[dict[str, torch.Tensor]] = []
    done, total = 0, sum(len(s.imagine) for s in samples)
    for sample in samples:
        found = []
        try:
            for span in sample.imagine:
                found.append(clips.clip(sample, span).inputs)
                if progress is not None:
                    progress(done + len(found), total)
        except VideoError as error:
            if on_broken is None:
                raise
            on_broken(sample, error)
            found = []
        waiting += found
        spans.append(len(found))
        done += len(sample.imagine)
        if sum(len(clip["pixel_values_videos"]) for clip in waiting) >= BATCH_PATCHES:
            parts += _features(policy, waiting, tokens_per_patch)
            waiting = []
    if waiting:
        parts += _features(policy, waiting, tokens_per_patch)
    width = policy.config.get_text_config().hidden_size
    lengths = [len(part) for part in parts]
    features = torch.empty(sum(lengths), width)
    for rows in features.split(lengths):  # `torch.cat` would hold all of them twice
        rows.copy_(parts.popleft())
    counts = iter(lengths)
    return Targets.of_features(features, [[next(counts) for _ in range(n)] for n in spans])


@torch.no_grad()
def start_head_at(head: nn.Module, mean: torch.Tensor) -> None:
    """Make the head predict `mean` [H] whatever it sees; `PolicyError` if its last layer is no
    linear one with bias.
    """
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not linears or linears[-1].bias is None:
        raise PolicyError(
            "start_at_mean needs a latent head that ends in a linear layer with a bias; choose "
            "another head or unset it"
        )
    linears[-1].weight.zero_()
    linears[-1].bias.copy_(mean)


def _features(
    policy: Any, clips: Sequence[dict[str, torch.Tensor]], tokens_per_patch: TokensPerPatch
) -> list[torch.Tensor]:
    """The targets [L_i, H] of each clip."""
    grid = torch.cat([clip["video_grid_thw"] for clip in clips])
    pixels = torch.cat([clip["pixel_values_videos"] for clip in clips])
    output = policy.get_video_features(
        pixels.to(policy.device, policy.dtype), grid.to(policy.device)
    )
    found = []
    for tokens, thw in zip(output.pooler_output, grid, strict=True):
        if tokens_per_patch != "all":
            patches = tokens.view(int(thw[0]), -1, tokens.shape[-1])
            tokens = pool_frames(patches, tokens_per_patch)
        found.append(tokens.float().cpu())
    return found

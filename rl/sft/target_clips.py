"""The clips of future frames, as the vision tower sees them to give targets.

A span's frames are a clip of their own. Its last frame is repeated until its temporal patches are
full, as the processors do by themselves wherever they take so short a clip: a span may depict a
single frame.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, Literal

from transformers.image_utils import SizeDict

from rl.data.media import MediaProcessor
from rl.interfaces import Media
from rl.trajectory import MediaKey, Sample

TokensPerPatch = int | Literal["all"]


class TargetClips:
    """Makes the clips of spans with `media`.

    With `tokens_per_patch` "all" each merged token of a clip becomes a latent, so its frames are
    shrunk until a clip has at most `budget` of them, shared evenly by its temporal patches
    (Future-L1: at most 32 tokens a frame). Small frames are then not enlarged either.
    """

    def __init__(
        self, media: MediaProcessor, *, tokens_per_patch: TokensPerPatch, budget: int
    ) -> None:
        self.media = media
        self.budget = budget if tokens_per_patch == "all" else None
        self._bounded: dict[int, MediaProcessor] = {}

    def frames(self, span: Sequence[int]) -> tuple[int, ...]:
        """The frames of a span with the last one repeated until temporal patches are full."""
        return (*span, *[span[-1]] * (-len(span) % self.media.temporal_patch_size))

    def key(self, sample: Sample, span: Sequence[int]) -> MediaKey:
        """The key of a span's clip before it is shrunk. Raises `VideoError`."""
        return self.media.key(sample, self.frames(span))

    def clip(self, sample: Sample, span: Sequence[int]) -> Media:
        """The processed clip of a span. Raises `VideoError`."""
        if self.budget is None:
            return self.media.process(self.key(sample, span))
        frames = self.frames(span)
        share = self.budget // (len(frames) // self.media.temporal_patch_size)
        video = self.media.processor.video_processor
        side = video.patch_size * video.merge_size  # of a merged token, in pixels
        pixels = float(share * side**2)
        while True:
            bound = pixels * len(frames) if _bounds_whole_clips(video) else pixels
            media = self._within(int(bound))
            clip = media.process(media.key(sample, frames))
            found = merged_tokens(clip, self.media)
            if found <= share:
                return clip
            # A long and narrow frame keeps one token's height, so its length goes with the root.
            pixels *= (share / found) ** 2

    def _within(self, pixels: int) -> MediaProcessor:
        """`media` with its processor's own bound (on a clip or on a frame) set to `pixels`."""
        if pixels not in self._bounded:
            processor = copy.copy(self.media.processor)
            processor.video_processor = copy.deepcopy(processor.video_processor)
            processor.video_processor.size = SizeDict(shortest_edge=1, longest_edge=pixels)
            bounded = copy.copy(self.media)
            bounded.processor = processor
            bounded.fingerprint = MediaProcessor(processor).fingerprint
            self._bounded[pixels] = bounded
        return self._bounded[pixels]


def merged_tokens(clip: Media, media: MediaProcessor) -> int:
    """How many tokens each temporal patch of a clip has once merged."""
    _, rows, columns = clip.inputs["video_grid_thw"][0].tolist()
    return rows * columns // media.merge_size**2


def _bounds_whole_clips(video: Any) -> bool:
    """Whether a video processor bounds the pixels of a clip (Qwen3-VL) or of a frame
    (Qwen2.5-VL): of large frames, do two temporal patches take twice as many patches as one?
    """
    side, depth = 64 * video.patch_size * video.merge_size, video.temporal_patch_size
    bounds = {"min_pixels": 1, "max_pixels": side**2 // 16}
    one, two = (video.get_num_of_video_patches(n * depth, side, side, bounds) for n in (1, 2))
    return two < 2 * one

"""The rows of SFT: what is shown of each, and which of them can be shown at all."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from rl.data.broken import BrokenClips, of_sample
from rl.data.media import MediaProcessor
from rl.errors import VideoError
from rl.interfaces import MediaSource
from rl.policy.model import LatentPolicy
from rl.sft.targets import Targets
from rl.sft.taught import Lesson, taught_trajectory
from rl.trajectory import MediaKey, Sample, Trajectory


class TaughtRows:
    """Samples as trajectories of what they are taught. `broken` says what becomes of those whose
    clips cannot be read, and lists them.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        policy: LatentPolicy,
        media: MediaProcessor,
        source: MediaSource,
        broken: BrokenClips,
    ) -> None:
        self.samples = list(samples)
        self.source, self.broken = source, broken
        self._policy, self._media = policy, media
        self._prompts: dict[int, tuple[np.ndarray, MediaKey]] = {}

    def teach(self, index: int, lesson: Lesson, targets: Targets | None) -> Trajectory:
        """The taught trajectory of one sample, with its targets as latents, or zeros for want of
        them.
        """
        prompt, key = self._prompt(index)
        if targets is None:
            latents = torch.zeros(lesson.latents, self._policy.config.get_text_config().hidden_size)
        else:
            latents = targets.of(index)[: lesson.latents]  # all of them or none
        return taught_trajectory(
            self.samples[index], prompt, key, lesson.tokens, latents, self._policy
        )

    def readable(self, rows: Sequence[int], seed: Sequence[int]) -> list[int]:
        """The rows of a micro-batch without those that cannot be shown, or with others for them.
        Which others is a function of the `seed`.
        """
        if self.broken.rule == "stop":
            return list(rows)
        shown = [i for i in rows if self._shows(i)]
        missing = len(rows) - len(shown) if self.broken.rule == "replace" else int(not shown)
        others = iter(np.random.default_rng(seed).permutation(len(self.samples)).tolist())
        for _ in range(missing):
            other = next((i for i in others if i not in shown and self._shows(i)), None)
            if other is None and not shown:
                last = self.broken.rows[-1]["reason"]
                raise VideoError(
                    f"no clip of {len(self.samples)} rows can be shown; check data.video_root and "
                    f"the files. The last: {last}"
                )
            shown += [] if other is None else [other]
        return shown

    def lose(self, sample: Sample, error: VideoError) -> None:
        """Remember that a sample has no targets; raise its error where that stops the run."""
        named = of_sample(sample, error)
        if self.broken.rule == "stop":
            raise named from error
        self.broken.add(sample, named)

    def _shows(self, index: int) -> bool:
        """Whether all clips of a sample can be read."""
        sample = self.samples[index]
        if sample.id not in self.broken:
            try:
                self._prompt(index)
            except VideoError as error:
                self.broken.add(sample, error)
        return sample.id not in self.broken

    def _prompt(self, index: int) -> tuple[np.ndarray, MediaKey]:
        if index not in self._prompts:
            sample = self.samples[index]
            try:
                clip = self.source.get(self._media.key(sample))
            except VideoError as error:
                raise of_sample(sample, error) from error
            self._prompts[index] = self._media.encode(sample, [clip]).input_ids, clip.key
        return self._prompts[index]

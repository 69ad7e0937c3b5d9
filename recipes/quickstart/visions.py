"""What a policy imagines, made visible: each latent as the state whose feature it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor

from recipes.quickstart.texts import ANSWER_CLOSE, ANSWER_OPEN, SIZE
from recipes.quickstart.world import FPS, FRAMES_PER_STATE, OBSERVED, render
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.loading import load_policy
from rl.sft.alignment import pool_frames
from rl.trajectory import RolloutRequest, Sample, Sampling, Trajectory
from rollouts.transformers_engine import TransformersEngine

CELLS = np.array([(row, column) for row in range(SIZE) for column in range(SIZE)])


@dataclass(frozen=True)
class Vision:
    """One clip as frames, one a state: uint8 [T, H, W, 3], and what was imagined of it.

    `nearest` has one frame a latent; `agreement` says of each latent whether it is nearest to the
    state that it stands for: the last observed one, then the future ones.
    """

    observed: np.ndarray
    future: np.ndarray
    nearest: list[np.ndarray]
    agreement: list[bool]
    title: str


def see(policy_folder: str | Path, samples: Sequence[Sample]) -> list[Vision]:
    """Let the policy imagine each sample greedily, and look its latents up among all states of the
    clip's board: the ball on each of its cells.
    """
    galleries = [render(np.asarray(s.extra["board"]), CELLS) for s in samples]
    found = look_up(policy_folder, samples, galleries)
    return [_vision(*clip) for clip in zip(samples, galleries, found, strict=True)]


@torch.no_grad()
def look_up(
    policy_folder: str | Path, samples: Sequence[Sample], galleries: Sequence[np.ndarray]
) -> list[tuple[Trajectory, list[int]]]:
    """Let the policy imagine each sample greedily; the trajectory, and of each latent which state
    of the sample's gallery (uint8 [states, H, W, 3]) it is nearest to.

    A state's feature is that of the policy's own vision tower, pooled as in SFT; nearest is by
    Euclidean distance.
    """
    processor = MediaProcessor(AutoProcessor.from_pretrained(policy_folder))
    policy = load_policy(policy_folder).eval()
    engine = TransformersEngine(policy, processor, LocalMedia(processor))
    sampling = Sampling(temperature=0.0, max_new_tokens=16, imagine="always")
    groups = engine.generate([RolloutRequest(s, (0,), sampling) for s in samples])
    found = []
    for group, gallery in zip(groups, galleries, strict=True):
        # One clip a state: within a longer clip the processor would shrink the frames.
        clips = gallery[:, None].repeat(FRAMES_PER_STATE, axis=1)
        inputs = processor.process_frames(clips, FPS, [range(FRAMES_PER_STATE)] * len(clips))
        tokens = policy.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
        features = torch.cat([pool_frames(state[None]) for state in tokens.pooler_output])
        (trajectory,) = group.trajectories
        nearest = torch.cdist(trajectory.latents.float(), features.float()).argmin(-1)
        found.append((trajectory, nearest.tolist()))
    return found


def _vision(sample: Sample, gallery: np.ndarray, found: tuple[Trajectory, list[int]]) -> Vision:
    trajectory, nearest = found
    path = np.asarray(sample.extra["path"])
    states = render(np.asarray(sample.extra["board"]), path)
    answer = trajectory.text.rpartition(ANSWER_OPEN)[2].partition(ANSWER_CLOSE)[0]
    return Vision(
        observed=states[:OBSERVED],
        future=states[OBSERVED:],
        nearest=[gallery[i] for i in nearest],
        agreement=[
            bool((CELLS[i] == cell).all())
            for i, cell in zip(nearest, path[OBSERVED - 1 :], strict=False)
        ],
        title=f"{sample.question} The policy says {answer}, right is {sample.answer}.",
    )

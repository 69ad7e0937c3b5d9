"""What a policy imagines, made visible: each latent as the state whose feature it is nearest to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoProcessor

from recipes.quickstart.texts import SIZE
from recipes.quickstart.world import FPS, FRAMES_PER_STATE, OBSERVED, render
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.model import load_policy
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


@torch.no_grad()
def see(policy_folder: str | Path, samples: Sequence[Sample]) -> list[Vision]:
    """Let the policy imagine each sample greedily, and look its latents up among all states of the
    clip's board.

    The gallery is the board with the ball on each of its cells, through the policy's own vision
    tower, pooled as in SFT; nearest is by Euclidean distance.
    """
    processor = MediaProcessor(AutoProcessor.from_pretrained(policy_folder))
    policy = load_policy(policy_folder).eval()
    engine = TransformersEngine(policy, processor, LocalMedia(processor, len(samples)))
    sampling = Sampling(temperature=0.0, max_new_tokens=16, imagine="always")
    groups = engine.generate([RolloutRequest(s, (0,), sampling) for s in samples])
    return [_look_up(policy, processor, g.sample, g.trajectories[0]) for g in groups]


def _look_up(
    policy: Any, processor: MediaProcessor, sample: Sample, trajectory: Trajectory
) -> Vision:
    board, path = np.asarray(sample.extra["board"]), np.asarray(sample.extra["path"])
    gallery = render(board, CELLS)
    # One clip a cell: within a longer clip the processor would shrink the frames.
    clips = gallery[:, None].repeat(FRAMES_PER_STATE, axis=1)
    inputs = processor.process_frames(clips, FPS, [range(FRAMES_PER_STATE)] * len(clips))
    tokens = policy.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    features = torch.cat([pool_frames(cell[None]) for cell in tokens.pooler_output])
    nearest = torch.cdist(trajectory.latents.float(), features.float()).argmin(-1).tolist()
    states = render(board, path)
    answer = trajectory.text.rsplit(policy.protocol.end_token, 1)[-1].strip()
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

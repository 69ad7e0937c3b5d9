"""What a policy imagines of a clip, made visible: each latent as the state whose feature it is nearest to."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import AutoProcessor

from recipes.quickstart.texts import SIZE
from recipes.quickstart.world import FPS, FRAMES_PER_STATE, OBSERVED, render
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.model import load_policy
from rl.sft.alignment import pool_frames
from rl.trajectory import RolloutRequest, Sample, Sampling
from rollouts.transformers_engine import TransformersEngine


@dataclass(frozen=True)
class Vision:
    """One clip as frames, one a state: uint8 [T, H, W, 3]; `nearest` has one frame a latent."""

    observed: np.ndarray
    future: np.ndarray
    nearest: list[np.ndarray]
    title: str


@torch.no_grad()
def see(policy_folder: str | Path, sample: Sample) -> Vision:
    """Let the policy imagine `sample` greedily, and look up each latent among all states of the clip's board.

    The gallery is the board with the ball on each of its cells, through the policy's own vision tower, pooled as in
    SFT; nearest is by Euclidean distance.
    """
    processor = MediaProcessor(AutoProcessor.from_pretrained(policy_folder))
    policy = load_policy(policy_folder).eval()
    engine = TransformersEngine(policy, processor, LocalMedia(processor, 1))
    request = RolloutRequest(sample, (0,), Sampling(0.0, 16, "always"))
    trajectory = engine.generate([request])[0].trajectories[0]

    board = np.asarray(sample.extra["board"])
    cells = np.array([(row, column) for row in range(SIZE) for column in range(SIZE)])
    gallery = render(board, cells)
    frames = gallery.repeat(FRAMES_PER_STATE, axis=0)
    inputs = processor.process_frames([frames], FPS, [range(len(frames))])
    tokens = policy.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    features = pool_frames(
        tokens.pooler_output[0].view(len(cells), -1, tokens.pooler_output[0].shape[-1]), 1
    )
    nearest = torch.cdist(trajectory.latents.float(), features.float()).argmin(-1).tolist()

    states = render(board, np.asarray(sample.extra["path"]))
    answer = trajectory.text.rsplit("<|latent_end|>", 1)[-1].strip()
    return Vision(
        states[:OBSERVED],
        states[OBSERVED:],
        [gallery[i] for i in nearest],
        f"{sample.question} The policy says {answer}, right is {sample.answer}.",
    )

"""Latents looked up among states of a clip's board."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from recipes.quickstart import visions
from recipes.quickstart.checkpoint import make_checkpoint
from recipes.quickstart.world import render, write_world
from rl.data import MediaProcessor, read_manifest
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.trajectory import Sample


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A policy that has learned nothing, and two clips."""
    folder = tmp_path_factory.mktemp("visions")
    make_checkpoint(folder / "plain", seed=0)
    processor = AutoProcessor.from_pretrained(folder / "plain")
    torch.manual_seed(0)
    protocol = LatentProtocol(min_length=7, max_length=7, max_spans=1)
    policy = make_policy(folder / "plain", processor, protocol, HeadConfig("linear"))
    policy.save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    write_world(folder, "train", 2, seed=0)
    return folder


def pooled(policy: Any, media: MediaProcessor, state: np.ndarray) -> torch.Tensor:
    """The mean feature of one state, shown for two frames."""
    inputs = media.process_frames(state[None, None].repeat(2, axis=1), 2, [range(2)])
    out = policy.get_video_features(inputs["pixel_values_videos"], inputs["video_grid_thw"])
    return out.pooler_output[0].mean(0)


@torch.no_grad()
def test_a_latent_is_looked_up_among_all_states(folder: Path) -> None:
    samples: list[Sample] = read_manifest(folder / "train.jsonl")
    galleries = [render(np.array(s.extra["board"]), visions.CELLS[:5]) for s in samples]
    found = visions.look_up(folder / "policy", samples, galleries)
    policy = visions.load_policy(folder / "policy").eval()
    media = MediaProcessor(AutoProcessor.from_pretrained(folder / "policy"))
    for (trajectory, nearest), gallery in zip(found, galleries, strict=True):
        assert len(nearest) == len(trajectory.latents) == 7
        features = [pooled(policy, media, state) for state in gallery]
        for latent, index in zip(trajectory.latents, nearest, strict=True):
            distances = [float((latent - feature).norm()) for feature in features]
            assert distances[index] == pytest.approx(min(distances), rel=1e-5)


def test_what_is_seen_of_a_clip(folder: Path) -> None:
    (first, _) = visions.see(folder / "policy", read_manifest(folder / "train.jsonl"))
    assert first.observed.shape == (2, 32, 32, 3) and first.future.shape == (6, 32, 32, 3)
    assert len(first.nearest) == len(first.agreement) == 7
    assert "The policy says" in first.title and "right is" in first.title

"""The clips of future frames and the features that become targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from rl.data import MediaProcessor, read_manifest
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.sft.target_clips import TargetClips
from rl.sft.targets import compute_targets
from rl.trajectory import Sample
from tests.tiny import FAMILIES, Family, save_tiny_checkpoint, tiny_processor, write_clip

TOKEN = 8  # pixels of a merged token's side


@pytest.fixture(scope="module", params=FAMILIES)
def media(request: pytest.FixtureRequest) -> MediaProcessor:
    return MediaProcessor(tiny_processor(request.param))


@pytest.mark.parametrize(
    ("height", "width", "frames", "budget", "grid"),
    [
        (16, 16, 2, 4, (1, 2, 2)),  # fits as it is
        (16, 16, 1, 32, (1, 2, 2)),  # a single frame; it is not enlarged
        (32, 16, 2, 4, (1, 2, 1)),  # 8 tokens; half as many pixels are 22 x 11, so 2 x 1 tokens
        (32, 32, 4, 9, (2, 2, 2)),  # two patches share 9: 4 each
        (32, 32, 3, 3, (2, 1, 1)),  # the odd frame is doubled
        (16, 256, 2, 2, (1, 1, 2)),  # so narrow that a token's height alone is too much
    ],
)
def test_frames_shrink_until_their_tokens_fit(
    height: int,
    width: int,
    frames: int,
    budget: int,
    grid: tuple[int, ...],
    media: MediaProcessor,
    tmp_path: Path,
) -> None:
    path = write_clip(tmp_path / "clip.mp4", np.full((4, height, width, 3), 90, np.uint8))
    clips = TargetClips(media, tokens_per_patch="all", budget=budget)
    clip = clips.clip(Sample("a", str(path), "", ""), tuple(range(frames)))
    patches, rows, columns = clip.inputs["video_grid_thw"][0].tolist()
    assert (patches, rows // 2, columns // 2) == grid
    assert patches * (rows // 2) * (columns // 2) <= budget


@pytest.mark.parametrize("family", FAMILIES)
def test_all_targets_are_the_merged_tokens_in_order(
    family: Family, clips: Path, tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path, family)
    processor: Any = AutoProcessor.from_pretrained(tmp_path)
    policy = make_policy(tmp_path, processor, LatentProtocol(max_length=4))
    media = MediaProcessor(processor)
    rows = read_manifest(clips / "manifest.jsonl")
    single = replace(rows[0], imagine=((3,),))
    found = compute_targets(policy, media, [*rows[1:], single], tokens_per_patch="all")
    # Pairs of 16x16 px have 4 merged tokens; the last row's two pairs share 4, so 1 x 1 each.
    assert found.lengths == ((4, 4), (4,), (2,), (4,))
    assert found.offsets == (0, 8, 12, 14, 18) and found.features.shape == (18, 32)
    for row, span, features in (
        (rows[1], (4, 5), found.of(0)[:4]),
        (rows[1], (6, 7), found.of(0)[4:]),
        (single, (3, 3), found.of(3)),
    ):
        clip = media.process(media.key(row, span)).inputs
        tokens = policy.get_video_features(clip["pixel_values_videos"], clip["video_grid_thw"])
        torch.testing.assert_close(features, tokens.pooler_output[0], rtol=1e-4, atol=1e-5)
        assert features.std(0).min() > 0  # so their order shows
    pooled = compute_targets(policy, media, [single])
    torch.testing.assert_close(pooled.of(0)[0], found.of(3).mean(0), rtol=1e-4, atol=1e-5)

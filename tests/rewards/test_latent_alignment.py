"""Latents against the features of the frames they should depict."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rewards.latent_alignment import LatentAlignment, latent_alignment
from rewards.values import Invalid
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.errors import RecipeError, RewardError
from rl.policy.protocol import Slot
from rl.sft.targets import compute_targets
from rl.trajectory import Sample, Sampling, Trajectory
from tests.latent import thinking_policy

EAST, NORTH, WEST = [3.0, 0.0], [0.0, 0.5], [-1.0, 0.0]


def test_formula_by_hand():
    spans = [np.array([EAST, NORTH]), np.array([WEST])]
    targets = [np.array([EAST, EAST]), np.array([EAST])]
    # Cosines 1, 0 and -1: (1 + 1/2 + 0) / 3.
    assert latent_alignment(spans, targets) == pytest.approx(0.5)
    assert latent_alignment(spans[:1], targets) == pytest.approx(0.75)  # (1 + 1/2) / 2
    assert latent_alignment(spans, targets[:1]) == pytest.approx(0.75)
    assert latent_alignment([np.zeros((1, 2))], targets) == pytest.approx(0.5)


def test_targets_are_resampled_to_the_span():
    # Three latents, two targets: floor(k · 2 / 3) = 0, 0, 1.
    target = np.array([EAST, NORTH])
    assert latent_alignment([np.array([EAST, EAST, NORTH])], [target]) == pytest.approx(1.0)
    # The middle one meets EAST: (1 + 1/2 + 1) / 3.
    assert latent_alignment([np.array([EAST, NORTH, NORTH])], [target]) == pytest.approx(2.5 / 3)
    # Two latents, five targets: floor(k · 5 / 2) = 0, 2.
    target = np.array([EAST, WEST, NORTH, WEST, WEST])
    assert latent_alignment([np.array([EAST, NORTH])], [target]) == pytest.approx(1.0)


def test_nothing_to_compare_is_no_value():
    some = [np.array([EAST])]
    empty = [np.zeros((0, 2))]
    assert [latent_alignment(a, b) for a, b in [([], some), (some, []), (empty, some)]] == [
        None
    ] * 3
    assert latent_alignment([*empty, *some], [*some, *some]) == pytest.approx(1.0)


def test_wrong_latents_are_named():
    with pytest.raises(RewardError, match="width 2 and targets 3"):
        latent_alignment([np.ones((1, 2))], [np.ones((1, 3))])
    with pytest.raises(RewardError, match="NaN"):
        latent_alignment([np.full((1, 2), np.nan)], [np.ones((1, 2))])


@given(st.integers(0, 2**32 - 1), st.integers(1, 5), st.integers(1, 5), st.floats(1e-3, 1e3))
def test_range_and_scale(seed, latents, targets, factor):
    rng = np.random.default_rng(seed)
    span, target = rng.normal(size=(latents, 3)), rng.normal(size=(targets, 3))
    value = latent_alignment([span], [target])
    assert value is not None and 0.0 <= value <= 1.0
    assert latent_alignment([span * factor], [target]) == pytest.approx(value)
    assert latent_alignment([-span], [target]) == pytest.approx(1.0 - value)


# -- with a real tower -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def policy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, MediaProcessor]:
    folder = tmp_path_factory.mktemp("policy")
    model, processor = thinking_policy(tmp_path_factory.mktemp("plain"))
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder, model, MediaProcessor(processor)


def trajectory(sample: Sample, *spans: torch.Tensor) -> Trajectory:
    """One that consists of `spans` [T_j, H] and nothing else."""
    ids = [i for span in spans for i in [1, *[2] * len(span), 3]] or [1]
    latents = torch.cat(spans) if spans else torch.zeros(0, 32)
    return Trajectory(
        sample_id=sample.id,
        prompt_ids=np.array([1]),
        completion_ids=np.array(ids),
        decision=np.full(len(ids), Slot.TOKEN, np.int8),
        logprobs=np.zeros(len(ids), np.float32),
        kept=np.zeros(len(ids), np.int32),
        latents=latents,
        latent_logprobs=np.zeros(len(latents)),
        span_lengths=tuple(len(span) for span in spans),
        filler=2,
        media=(),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text="",
    )


def score(reward: LatentAlignment, rows: list[tuple[Sample, Trajectory]]) -> list[Any]:
    return reward(
        trajectories=[t for _, t in rows],
        id=[s.id for s, _ in rows],
        video=[s.video for s, _ in rows],
        imagine=[s.imagine for s, _ in rows],
        window=[s.window for s, _ in rows],
        pool=[s.pool for s, _ in rows],
        images=[s.images for s, _ in rows],
    )


def test_the_targets_themselves_score_one(policy, clips: Path):
    folder, model, media = policy
    samples = read_manifest(clips / "manifest.jsonl")
    targets = compute_targets(model, media, samples)
    assert samples[1].imagine == ((4, 5), (6, 7))  # two spans of a patch each
    two = targets.of(1)[:1], targets.of(1)[1:]
    torch.manual_seed(0)
    rows = [
        (samples[1], trajectory(samples[1], *two)),
        (samples[1], trajectory(samples[1], 3 * two[0], two[1], torch.randn(2, 32))),
        (samples[1], trajectory(samples[1], two[1], two[0])),
        (samples[3], trajectory(samples[3], targets.of(3))),  # one span of two patches
        (samples[3], trajectory(samples[3], torch.randn(2, 32))),
        (samples[3], trajectory(samples[3])),
    ]
    reward = LatentAlignment(policy=str(folder))
    values = score(reward, rows)
    assert [values[0], values[1], values[3]] == pytest.approx([1.0] * 3, abs=1e-6)
    assert 0.0 <= values[2] < 1.0 - 1e-4
    assert 0.0 <= values[4] < 0.9
    assert values[5] is None  # no latents


def test_only_the_tower_is_kept(policy, clips: Path):
    folder, model, _ = policy
    sample = read_manifest(clips / "manifest.jsonl")[0]
    reward = LatentAlignment(policy=str(folder))
    assert not vars(reward)["_tower"]  # nothing is loaded before it is needed
    score(reward, [(sample, trajectory(sample, torch.ones(1, 32)))])
    assert reward._tower is not None
    left = {name for name, _ in reward._tower[0].named_parameters()}
    assert left == {name for name, _ in model.named_parameters() if ".visual." in name}


def test_a_plain_video_model_will_do(tiny_checkpoint: Path, policy, clips: Path):
    rows = [
        (s, trajectory(s, torch.ones(1, 32))) for s in read_manifest(clips / "manifest.jsonl")[:2]
    ]
    values = score(LatentAlignment(policy=str(tiny_checkpoint)), rows)
    # The tiny policy is made from the same seed, so its tower is the same.
    assert values == pytest.approx(score(LatentAlignment(policy=str(policy[0])), rows))


@pytest.mark.parametrize("tokens", [4, "all"])
def test_more_latents_a_patch(policy, clips: Path, tokens: Any):
    folder, model, media = policy
    samples = read_manifest(clips / "manifest.jsonl")
    targets = compute_targets(model, media, samples, tokens_per_patch=tokens)
    rows = [(samples[0], trajectory(samples[0], targets.of(0)))]
    reward = LatentAlignment(policy=str(folder), tokens_per_patch=tokens)
    assert score(reward, rows) == [pytest.approx(1.0, abs=1e-6)]
    assert score(LatentAlignment(policy=str(folder)), rows)[0] < 1.0 - 1e-4


def test_a_pool_and_a_window_choose_the_targets(policy, clips: Path):
    folder, model, media = policy
    whole = read_manifest(clips / "manifest.jsonl")[3]  # 12 frames, 8 a second
    listed = replace(whole, imagine=((4, 7),))
    row = replace(whole, imagine=((0, 1),), pool=2, window=(0.375, 1.125))  # of frames 3 to 8
    assert media.key(row, (0, 1)).frames == (4, 7)
    targets = compute_targets(model, media, [listed]).of(0)
    reward = LatentAlignment(policy=str(folder))
    values = score(reward, [(s, trajectory(s, targets)) for s in (row, listed, whole)])
    assert values[:2] == pytest.approx([1.0, 1.0], abs=1e-6) and values[2] < 1.0 - 1e-4


def test_rows_without_frames_and_broken_videos(policy, clips: Path, tmp_path: Path):
    good = read_manifest(clips / "manifest.jsonl")[0]
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    z = torch.ones(1, 32)
    bad = Sample("bad", str(broken), "?", "A", imagine=((2, 3),))
    far = Sample("far", good.video, "?", "A", imagine=((2, 300),))
    none = Sample("none", str(broken), "?", "A")
    rows = [(s, trajectory(s, z)) for s in (bad, bad, good, far, none, good)]
    reward = LatentAlignment(policy=str(policy[0]))
    values = score(reward, rows)
    assert isinstance(values[0], Invalid) and values[0] == values[1]
    assert "sample 'bad'" in values[0].reason and str(broken) in values[0].reason
    assert "sample 'far'" in values[3].reason and "frame 300" in values[3].reason
    assert values[4] is None
    assert 0.0 <= values[2] == values[5] <= 1.0
    broken.write_bytes(Path(good.video).read_bytes())  # repaired: the next call tries again
    assert score(reward, rows)[0] == values[2]


def test_targets_are_kept_within_bounds(policy, clips: Path):
    samples = read_manifest(clips / "manifest.jsonl")
    rows = [(s, trajectory(s, torch.ones(1, 32))) for s in samples]
    reward = LatentAlignment(policy=str(policy[0]), capacity=2)
    values = score(reward, rows)
    assert [row[:2] for row in reward._targets] == [(s.video, s.imagine) for s in samples[2:]]
    kept = reward._targets[samples[3].video, samples[3].imagine, None, 0, ()]
    assert score(reward, rows[3:]) == values[3:]
    assert reward._targets[samples[3].video, samples[3].imagine, None, 0, ()] is kept
    assert score(reward, rows) == values


def test_wrong_options_are_named(tmp_path: Path, clips: Path):
    with pytest.raises(RecipeError, match="policy is ''"):
        LatentAlignment(policy="")
    with pytest.raises(RecipeError, match="tokens_per_patch is 0"):
        LatentAlignment(policy="p", tokens_per_patch=0)
    with pytest.raises(RecipeError, match=r"tokens_per_patch is 'most'; .* or all"):
        LatentAlignment(policy="p", tokens_per_patch="most")  # type: ignore[arg-type]
    with pytest.raises(RecipeError, match="decode_timeout_s is 0"):
        LatentAlignment(policy="p", decode_timeout_s=0)
    with pytest.raises(RecipeError, match="capacity is '9'"):
        LatentAlignment(policy="p", capacity="9")  # type: ignore[arg-type]
    sample = read_manifest(clips / "manifest.jsonl")[0]
    reward = LatentAlignment(policy=str(tmp_path))
    with pytest.raises(RecipeError, match=r"policy .* cannot be loaded"):
        score(reward, [(sample, trajectory(sample, torch.ones(1, 32)))])

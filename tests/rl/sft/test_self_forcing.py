"""Latent self-forcing against a loop that computes everything anew for each latent."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn.functional import cosine_similarity

from rl.errors import DataError
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol
from rl.scoring import collate
from rl.sft.self_forcing import alignment_loss, diversity_loss, segments, self_forced
from rl.trajectory import Sampling
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.rl.policy.test_modules import COMBINATIONS, modules
from tests.tiny import FAMILIES

PROTOCOL = LatentProtocol(min_length=4, max_length=4, max_spans=1)


@pytest.fixture
def taught(tmp_path):
    """A policy, and rows of one span of its own greedy latents."""

    def make(family="qwen3_vl", parts=None):
        policy, processor = thinking_policy(tmp_path / "p", family, PROTOCOL, modules=parts)
        engine = engine_for(policy, processor)
        sampling = Sampling(0.0, 9, imagine="always")
        groups = engine.generate(requests_for(square_samples(tmp_path / "clips"), 1, sampling))
        rows = [t for group in groups for t in group]
        return policy, engine.media, rows

    return make


def blank(rows):
    """The rows as they are taught: nobody knows their latents, nor what is shown again."""
    return [
        dataclasses.replace(t, latents=torch.zeros_like(t.latents), replayed=None) for t in rows
    ]


def forced(policy, rows, media, steps=None, align_to="segments"):
    return self_forced(policy, rows, media, steps=steps, align_to=align_to)


def gradients(policy, loss):
    policy.zero_grad()
    loss.backward()
    return {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}


def objective(logprobs, latents, targets, count):
    """The loss, term by term and latent by latent."""
    align = diverse = 0.0
    rows = latents.split(count)
    for row, target in zip(rows, targets, strict=True):
        for z, v in zip(row, target, strict=True):
            align = align + (1 - cosine_similarity(z, v, dim=0)) / len(latents)
        for i, j in itertools.permutations(range(count), 2):
            cosine = cosine_similarity(row[i], row[j], dim=0)
            diverse = diverse + cosine**2 / (len(rows) * count * (count - 1))
    return -logprobs.sum() + align + diverse


def naive(policy, rows, media, steps):
    """Every latent from a pass over whole rows, without a cache."""
    batch = collate(rows, policy, media)
    order = batch.inputs["slots"].latent_rows.argsort()
    count = len(rows[0].latents)
    fed = torch.zeros(len(rows), count, policy.config.get_text_config().hidden_size)
    means = fed
    for k in range(count):
        scores = policy(**{**batch.inputs, "latents": fed.flatten(0, 1)[order]})
        means = scores.means.view_as(fed)
        z = means[:, k] if k >= count - steps else means[:, k].detach()
        fed = torch.cat([fed[:, :k], z[:, None], fed[:, k + 1 :]], 1)
    scores = policy(**{**batch.inputs, "latents": fed.flatten(0, 1)[order]})
    return scores.logprobs, scores.means


def naive_targets(policy, rows, media, count):
    found = []
    for row in rows:
        clip = media.get(row.media[0]).inputs
        features = policy.get_video_features(
            clip["pixel_values_videos"], clip["video_grid_thw"]
        ).pooler_output[0]
        frames = int(clip["video_grid_thw"][0, 0])
        per_frame = features.view(frames, -1, features.shape[-1]).mean(1).detach()
        found.append(
            torch.stack(
                [
                    per_frame[k * frames // count : -(-(k + 1) * frames // count)].mean(0)
                    for k in range(count)
                ]
            )
        )
    return found


@pytest.mark.parametrize(("family", "names"), [(f, ()) for f in FAMILIES] + COMBINATIONS)
def test_it_makes_the_latents_that_generation_makes(family, names, taught):
    policy, media, rows = taught(family, modules(names))
    for steps in (None, 1):
        found = forced(policy, blank(rows), media, steps)
        latents = torch.cat([t.latents for t in rows])
        torch.testing.assert_close(found.scores.means, latents, atol=2e-5, rtol=0)
        with torch.no_grad():
            expected = policy(**collate(rows, policy, media).inputs)
        torch.testing.assert_close(found.scores.logprobs, expected.logprobs, atol=2e-5, rtol=0)


@pytest.mark.parametrize("steps", [1, 2, 4])
@pytest.mark.parametrize(
    ("family", "names"),
    [(f, ()) for f in FAMILIES]
    + [("qwen3_vl", ("injection", "depth", "visual_replay")), ("qwen3_5", ("injection", "depth"))],
)
def test_gradients_are_those_of_a_naive_loop(family, names, steps, taught):
    policy, media, rows = taught(family, modules(names))
    count = len(rows[0].latents)
    found = forced(policy, blank(rows), media, steps)
    loss = -found.scores.logprobs.sum() + found.align + found.diversity
    ours = gradients(policy, loss)
    logprobs, latents = naive(policy, rows, media, steps)
    expected = objective(logprobs, latents, naive_targets(policy, rows, media, count), count)
    torch.testing.assert_close(loss, expected, atol=1e-4, rtol=1e-5)
    theirs = gradients(policy, expected)
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        torch.testing.assert_close(ours[name], value, atol=2e-4, rtol=2e-3, msg=name)

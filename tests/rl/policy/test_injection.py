"""Latent injection: by hand, against a loop over latents and video tokens, and at its start."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from rl.errors import PolicyError
from rl.policy.heads import HeadConfig
from rl.policy.injection import InjectionConfig, VideoInjection
from rl.policy.loading import make_policy
from rl.policy.modules import ModulesConfig
from rl.policy.settings import placeholder_ids
from rl.policy.unroll import Unroll
from rl.scoring import collate, prompt_inputs
from rl.trajectory import Sampling
from tests.latent import engine_for, plain_inputs, requests_for, square_samples, thinking_policy
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_processor

INJECTION = ModulesConfig(injection=InjectionConfig(heads=2, width=16))


@pytest.fixture(scope="module", params=FAMILIES)
def world(request, tmp_path_factory):
    """A policy with injection, its media, and trajectories of four prompts, in groups of three."""
    folder = tmp_path_factory.mktemp("injection")
    policy, processor = thinking_policy(folder / "p", request.param, modules=INJECTION)
    engine = engine_for(policy, processor)
    groups = engine.generate(requests_for(square_samples(folder / "clips")))
    trajectories = [t for group in groups for t in group]
    assert sum(len(t.latents) for t in trajectories) > 10
    return policy, engine.media, trajectories


def test_one_head_by_hand():
    module = VideoInjection(2, 2, heads=1)
    with torch.no_grad():
        for linear in (module.query, module.key, module.value, module.output):
            linear.weight.copy_(torch.eye(2))
        module.gate.copy_(torch.tensor([0.5, 2.0]))
    # Normed, the hidden state is (1, -1) and the two video tokens are ±(1, -1): their scores are
    # ±2/√2, their probabilities p and 1 - p, and 2p - 1 = tanh √2.
    memory = module.remember(torch.tensor([[[2.0, 0.0], [0.0, 4.0]]]))
    found = module(torch.tensor([[[3.0, 1.0]]]), memory, torch.ones(1, 1, 2, dtype=torch.bool))
    expected = torch.tensor([[[0.5, -2.0]]]) * math.tanh(math.sqrt(2))
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
    # Of one token that is seen, the score does not matter.
    found = module(torch.tensor([[[3.0, 1.0]]]), memory, torch.tensor([[[False, True]]]))
    torch.testing.assert_close(found, torch.tensor([[[-0.5, 2.0]]]), atol=1e-4, rtol=0)


def test_who_sees_no_video_gets_zeros():
    module = VideoInjection(4, 4, heads=2)
    torch.nn.init.ones_(module.gate)
    hidden, visible = torch.randn(2, 3, 4), torch.ones(2, 3, 5, dtype=torch.bool)
    visible[0, 1] = visible[1] = False
    found = module(hidden, module.remember(torch.randn(2, 5, 4)), visible)
    assert found.isfinite().all() and found[0, 1].eq(0).all() and found[1].eq(0).all()
    assert found[0, [0, 2]].ne(0).all()
    found.sum().backward()
    assert all(p.grad.isfinite().all() for p in module.parameters())  # type: ignore[union-attr]
    nothing = module(hidden, module.remember(torch.randn(2, 0, 4)), visible[..., :0])
    assert torch.equal(nothing, torch.zeros(2, 3, 4))


def naive(policy, hidden, video):
    """What is added to the mean behind one hidden state [H], for its video tokens [V, H]."""
    module = policy.latent_injection
    heads, added = [], []
    for rows, weight in ((hidden[None], module.query), (video, module.key), (video, module.value)):
        norm = module.norm_hidden if weight is module.query else module.norm_video
        heads.append([weight(norm(row)).chunk(module.heads) for row in rows])
    (query,), keys, values = heads
    for head in range(module.heads):
        scores = [float(query[head] @ key[head]) / len(query[head]) ** 0.5 for key in keys]
        masses = [math.exp(score - max(scores)) for score in scores]
        parts = [m * v[head] for m, v in zip(masses, values, strict=True)]
        added.append(sum(parts) / sum(masses))
    return module.gate * module.output(torch.cat(added))


def features_of(policy, media, trajectory):
    clips = [media.get(key).inputs for key in trajectory.media]
    found = [
        policy.get_video_features(c["pixel_values_videos"], c["video_grid_thw"]).pooler_output[0]
        for c in clips
    ]
    return (
        torch.cat(found) if found else torch.zeros(0, policy.config.get_text_config().hidden_size)
    )


def naive_means(policy, media, trajectory):
    """Latent by latent, from the trajectory alone in a row of its own."""
    inputs = plain_inputs(policy, media, trajectory)
    hidden = policy.hidden_states(**inputs, use_cache=False).last_hidden_state[0]
    video = features_of(policy, media, trajectory)
    at = (trajectory.completion_ids == trajectory.filler).nonzero()[0]
    behind = hidden[at + len(trajectory.prompt_ids) - 1]
    means = [policy.latent_head(h) for h in behind]
    if len(video):
        means = [m + naive(policy, h, video) for m, h in zip(means, behind, strict=True)]
    return torch.stack(means) if len(at) else hidden[:0]


@torch.no_grad()
def test_packed_rows_against_a_loop(world):
    policy, media, trajectories = world
    blind = [
        dataclasses.replace(t, media=(), prompt_ids=np.array([5, 6, 7]), sample_id="blind")
        for t in [t for t in trajectories if len(t.latents)][:2]
    ]
    for rows in (trajectories, trajectories[:5] + blind, blind):
        found = policy(**collate(rows, policy, media).inputs).means
        expected = torch.cat([naive_means(policy, media, t) for t in rows])
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-4)


@torch.no_grad()
def test_padded_prompts_against_a_loop(world):
    policy, media, trajectories = world
    rows = trajectories[::3]
    clips = [[media.get(key) for key in t.media] for t in rows]
    inputs = prompt_inputs(policy, [t.prompt_ids for t in rows], clips, pad=0)
    assert (inputs["attention_mask"] == 0).any()
    unroll = Unroll(policy, inputs)
    video = [features_of(policy, media, t) for t in rows]
    assert len({len(v) for v in video}) > 1
    expected = [
        policy.latent_head(h) + naive(policy, h, v)
        for h, v in zip(unroll.hidden, video, strict=True)
    ]
    torch.testing.assert_close(unroll.means(), torch.stack(expected), atol=2e-5, rtol=1e-4)
    some = torch.tensor([2, 0])
    torch.testing.assert_close(
        unroll.means(some), torch.stack(expected)[some], atol=2e-5, rtol=1e-4
    )


@pytest.mark.parametrize("head", ["identity", "mlp"])
def test_a_new_module_changes_no_mean(head, tmp_path):
    folder, processor = save_tiny_checkpoint(tmp_path / "base"), tiny_processor()
    policy = make_policy(folder, processor, head=HeadConfig(head), modules=INJECTION).eval()
    engine = engine_for(policy, processor)
    sampling = Sampling(1.0, 6, imagine="always")
    groups = engine.generate(requests_for(square_samples(tmp_path / "clips", 2), 2, sampling))
    batch = collate([t for group in groups for t in group], policy, engine.media)
    found = policy(**batch.inputs).means
    policy.zero_grad()
    (found * torch.randn_like(found)).sum().backward()
    module, policy.latent_injection = policy.latent_injection, None
    assert len(found) and torch.equal(found, policy(**batch.inputs).means)
    # The gate can leave its start, and then so can what it lets through.
    assert module.gate.grad.abs().min() > 0
    assert not module.output.weight.grad.any()


def test_a_call_that_forgets_the_video_is_refused(world):
    policy, media, trajectories = world
    inputs = collate(trajectories, policy, media).inputs
    inputs.pop("video")
    with pytest.raises(PolicyError, match="says nothing about it"):
        policy(**inputs)


def test_config_errors():
    with pytest.raises(PolicyError, match="4 heads, which do not divide its width 10"):
        InjectionConfig(heads=4, width=10).build(32)
    with pytest.raises(PolicyError, match="0 heads"):
        InjectionConfig(heads=0)
    with pytest.raises(PolicyError, match="5 heads, which do not divide its width 32"):
        InjectionConfig(heads=5).build(32)
    assert InjectionConfig(heads=2, width=6).build(32).query.weight.shape == (6, 32)


def test_placeholders_are_what_the_means_look_at(world):
    policy, media, trajectories = world
    batch = collate(trajectories, policy, media)
    at = torch.isin(batch.inputs["input_ids"][0], torch.tensor(placeholder_ids(policy.config)))
    assert torch.equal(batch.inputs["video"].rows, at.nonzero()[:, 0])

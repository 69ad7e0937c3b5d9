"""The published baseline computes what the released code of Future-L1 does, index by index."""

import copy

import numpy as np
import pytest
import torch

from rl.errors import ObjectiveError
from rl.policy.protocol import LatentProtocol, Slot
from rl.published import bounded_reference, collate_published, latent_slots, replay_published
from rl.trajectory import RolloutRequest, Sampling
from tests.latent import PROTOCOL, engine_for, plain_inputs, square_samples, thinking_policy
from tests.rl.test_la_dapo import first_update, logs, trainer_for, watched

STILL = LatentProtocol(min_length=2, max_length=4, max_spans=2)  # without noise
KAPPA = 0.02


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("published")
    policy, processor = thinking_policy(folder / "base", protocol=STILL, boldness=1.2)
    return policy, processor, square_samples(folder / "clips", 8)


@pytest.fixture(scope="module")
def sampled(world):
    """Media and trajectories: some imagine, some are cut short inside a span."""
    policy, processor, samples = world
    engine = engine_for(policy, processor)
    requests = [
        RolloutRequest(s, (10 * i, 10 * i + 1), Sampling(0.9, length, imagine, top_p=0.95))
        for i, (s, length, imagine) in enumerate(
            zip(samples, (20, 3, 20, 2) * 2, ("free", "always") * 4, strict=True)
        )
    ]
    found = [t for group in engine.generate(requests) for t in group]
    assert any(t.completion_ids[-1] == t.filler for t in found)
    assert any(len(t.span_lengths) > 1 for t in found) and any(not t.imagined for t in found)
    return engine.media, found


def released(policy, media, trajectory, kappa):
    """One trajectory as the release scores it: a whole forward pass of the plain model over tokens,
    log-probs rolled so that entry p is of token p + 1, and entry p overwritten where the INPUT at p
    was a latent.
    """
    inputs = plain_inputs(policy, media, trajectory)
    del inputs["latents"]
    ids = inputs["input_ids"][0].tolist()
    hidden = policy.base_model(**inputs).last_hidden_state[0]
    logits = policy.lm_head(hidden) / trajectory.sampling.temperature
    log_probs = [
        torch.log_softmax(logits[p], -1)[token] for p, token in enumerate((*ids[1:], ids[0]))
    ]
    latents = iter(trajectory.latents)
    prompt, length = len(trajectory.prompt_ids), len(trajectory.completion_ids)
    for p in range(prompt, prompt + length):
        if ids[p] == trajectory.filler:
            log_probs[p] = kappa * torch.dot(policy.latent_head(hidden[p]), next(latents))
    return torch.stack(log_probs[prompt - 1 : prompt + length - 1])


def test_slots_by_hand():
    s, f, e = 50, 51, 52
    inside, slots = latent_slots(np.array([7, s, f, f, e, 3, s, f]), f)
    # The first filler keeps its own log-prob; the end of the span does not; the last latent, with
    # which the completion was cut, has nowhere to go.
    assert inside.tolist() == [True, True, False] and slots.tolist() == [3, 4]
    inside, slots = latent_slots(np.array([7, 3]), f)
    assert inside.tolist() == slots.tolist() == []


@torch.no_grad()
def test_scores_are_the_releases(world, sampled):
    policy, (media, trajectories) = world[0], sampled
    found = replay_published(policy, collate_published(trajectories, policy, media), KAPPA)
    assert found.latent_logprobs is None
    latent_slots_seen = 0
    for row, t in enumerate(trajectories):
        expected, own = released(policy, media, t, KAPPA), found.logprobs[row]
        torch.testing.assert_close(own[: len(expected)], expected, atol=1e-5, rtol=0)
        assert not own[len(expected) :].any()
        latent_slots_seen += int((own[: len(expected)] > 0).sum())  # no log-prob is
        # It is not what the sampler did: inside and behind spans the gap is wide.
        if t.imagined and len(t.completion_ids) > 4:
            gap = (own[: len(expected)] - torch.from_numpy(t.logprobs)).abs()
            assert gap[torch.from_numpy(t.decision != Slot.FORCED)].max() > 1e-2
    assert latent_slots_seen > 10


def test_a_latents_gradient_is_kappa_z(world, sampled):
    policy, (media, trajectories) = world[0], sampled
    found = replay_published(policy, collate_published(trajectories, policy, media), KAPPA)
    (gradient,) = torch.autograd.grad(found.logprobs.sum(), found.means)
    scored = np.concatenate([latent_slots(t.completion_ids, t.filler)[0] for t in trajectories])
    latents = torch.cat([t.latents for t in trajectories])
    expected = KAPPA * latents * torch.from_numpy(scored)[:, None]
    torch.testing.assert_close(gradient, expected)
    assert 0 < scored.sum() < len(scored)


def test_the_kl_is_bounded_as_in_easyr1():
    delta = torch.tensor([0.0, 1.0, 2.6, 2.7, 5.0, 300.0, -10.0, -12.0])
    logprobs = torch.zeros(8, requires_grad=True)
    moved = bounded_reference(logprobs, delta) - logprobs
    k3 = moved.exp() - moved - 1.0
    plain = delta.double().exp() - delta.double() - 1.0
    torch.testing.assert_close(k3.detach().double(), plain.clamp(max=10.0), rtol=1e-5, atol=1e-5)
    (gradient,) = torch.autograd.grad(k3.sum(), logprobs)
    assert (
        (gradient != 0) == torch.tensor([False, True, True, False, False, False, True, False])
    ).all()


def build(world, folder, **changes):
    settings = {
        "objective": "published",
        "published_kappa": KAPPA,
        "latent_alpha": 0.0,
        "max_mismatch": None,
        "temperature": 0.9,
        **changes,
    }
    return trainer_for(world, folder, **settings)


def test_the_update_is_the_releases(world, tmp_path):
    """At ratio 1 its gradient is that of -Σ A_i Σ_t score_it / Σ n_i over ALL tokens."""
    trainer = build(world, tmp_path, max_steps=1, max_grad_norm=0.0, beta=0.1)
    seen = watched(trainer)
    policy = copy.deepcopy(trainer.policy)
    gradients, line = first_update(trainer)
    media, trajectories = trainer.rollouts.media, seen["trajectories"]
    scores = [released(policy, media, t, KAPPA) for t in trajectories]
    total = sum(map(len, scores))
    assert (seen["completion_mask"] * seen["tool_mask"]).sum() == total
    terms = [a * s.sum() for a, s in zip(seen["advantages"], scores, strict=True)]
    (-torch.stack(terms).sum() / total).backward()
    for name, parameter in policy.named_parameters():
        if parameter.grad is None:
            assert name not in gradients or not gradients[name].any()
            continue
        expected = parameter.grad
        scale = float(expected.abs().max())
        torch.testing.assert_close(
            gradients[name], expected, rtol=1e-3, atol=1e-4 * scale + 1e-8, msg=name
        )
    counts = torch.tensor([float(len(s)) for s in scores])
    expected_loss = -(seen["advantages"] * counts).sum() / total
    assert line["loss"] == pytest.approx(expected_loss.item(), abs=1e-5)
    assert line["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is scored the same way
    assert line["clip_ratio/region_mean"] == 0.0
    assert line["published/gap_max"] > line["published/gap"] > 1e-2
    assert "replay/max_gap" not in line


def test_a_budget_changes_nothing(world, tmp_path):
    settings = {"learning_rate": 1e-2, "optim": "sgd", "beta": 0.1, "filter_groups": False}
    whole = build(world, tmp_path / "whole", **settings)
    cut = build(world, tmp_path / "cut", **settings, max_tokens_per_microbatch=140)
    whole.train()
    cut.train()
    for found, expected in zip(logs(cut), logs(whole), strict=True):
        for name in ("loss", "kl", "entropy", "published/gap_max"):
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name
    assert logs(whole)[1]["kl"] > 1e-6


def test_kappas_kl_cannot_explode(world, tmp_path):
    settings = {"published_kappa": 1e5, "beta": 0.1, "learning_rate": 1e-2, "imagine": "always"}
    trainer = build(world, tmp_path, **settings)
    trainer.train()
    assert 0.1 < logs(trainer)[1]["kl"] <= 10.0


def test_what_the_release_does_not_do_is_refused(world, tmp_path):
    for name, value in (
        ("latent_alpha", 0.5),
        ("latent_beta", 0.1),
        ("max_mismatch", 1e-3),
        ("off_policy_mask_threshold", 0.5),
        ("published_kappa", 0.0),
        ("num_iterations", 2),
        ("steps_per_generation", 2),
        ("objective", "ours"),
    ):
        with pytest.raises(ObjectiveError, match=name):
            build(world, tmp_path, **{name: value})
    noisy = copy.deepcopy(world[0])
    noisy.set_protocol(PROTOCOL)
    with pytest.raises(ObjectiveError, match=r"objective is published.*noise_scale is 0\.3"):
        build((noisy, *world[1:]), tmp_path)

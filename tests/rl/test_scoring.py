"""Replay gives back the sampler's log-probs; each way of getting it wrong shows."""

import dataclasses

import numpy as np
import pytest
import torch
from torch.distributed.fsdp import fully_shard

from rl import scoring
from rl.errors import TrajectoryError
from rl.policy import linear_scores, packed_attention, scores
from rl.policy.density import log_density
from rl.policy.layout import PackLayout
from rl.policy.model import LatentPolicy
from rl.policy.protocol import LatentProtocol, Slot
from rl.scoring import collate, replay
from rl.trajectory import RolloutRequest, Sampling
from tests.latent import engine_for, square_samples, thinking_policy
from tests.tiny import FAMILIES, Family


def sampled(folder, family: Family = "qwen3_vl", size=10, **kwargs):
    """Trajectories of four clips of different lengths, half of them opening with a span."""
    policy, processor = thinking_policy(folder / "policy", family, **kwargs)
    engine = engine_for(policy, processor)
    requests = [
        RolloutRequest(
            s, tuple(100 * i + g for g in range(size)), Sampling(1.0, 28, ("free", "always")[i % 2])
        )
        for i, s in enumerate(square_samples(folder / "clips"))
    ]
    trajectories = [t for group in engine.generate(requests) for t in group]
    return policy, engine.media, trajectories


@torch.no_grad()
def gaps(policy, media, trajectories) -> dict[str, float]:
    """Largest difference between sampler and replay, by kind. Latents in units of the objective's
    default reduction, the sum over the width divided by √H.
    """
    batch = collate(trajectories, policy, media)
    found = replay(policy, batch, policy)
    result = {}
    for name, kind in (("token", Slot.TOKEN), ("decision", Slot.DECISION), ("forced", Slot.FORCED)):
        result[name] = max(
            np.abs(found.logprobs[row, : len(t.logprobs)].numpy() - t.logprobs)[
                t.decision == kind
            ].max(initial=0)
            for row, t in enumerate(trajectories)
        )
    old = np.concatenate([t.latent_logprobs for t in trajectories])
    assert found.latent_logprobs is not None
    width = found.means.shape[-1]
    result["latent"] = float(np.abs(found.latent_logprobs.numpy() - old).max() / width**0.5)
    return result


# The error of a latent's log-density is that of its mean divided by the noise: at a noise scale of
# 0.1 it is ten times what it is here. `docs/exactness.md` has the measured figures.
PROTOCOLS = {
    "free length, Gaussian": LatentProtocol(
        min_length=1, max_length=4, max_spans=3, noise_scale=1.0
    ),
    "fixed length, von Mises-Fisher": LatentProtocol(
        min_length=3, max_length=3, max_spans=2, noise_scale=1.0, density="vmf"
    ),
}


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS.keys())
@pytest.mark.parametrize("family", FAMILIES)
def test_fresh_trajectories_replay_exactly(family, protocol, tmp_path):
    # Qwen3.5 decodes by another algorithm (recurrent) than it scores (chunked): more rounding.
    boldness = 0.6 if family == "qwen3_5" else 0.8
    policy, media, trajectories = sampled(
        tmp_path, family, protocol=protocol, boldness=boldness, head="identity"
    )
    kinds = np.concatenate([t.decision for t in trajectories])
    assert sum(len(t.span_lengths) > 1 for t in trajectories) > 1
    assert {t.finish_reason for t in trajectories} == {"stop", "length"}
    if protocol.min_length < protocol.max_length:
        ends = [t.completion_ids[t.decision == Slot.DECISION] for t in trajectories]
        assert {int(i) for e in ends for i in e} == {
            policy.latent_tokens.end,
            policy.latent_tokens.filler,
        }
    assert (kinds == Slot.FORCED).any()
    found = gaps(policy, media, trajectories)
    assert max(found.values()) <= 1e-5, found
    assert found["forced"] == 0


@pytest.mark.parametrize("head", ["mlp", "swiglu"])
def test_heads_replay_exactly(head, tmp_path):
    protocol = PROTOCOLS["free length, Gaussian"]
    policy, media, trajectories = sampled(tmp_path, head=head, protocol=protocol)
    found = gaps(policy, media, trajectories)
    assert max(found.values()) <= 1e-5, found


def test_bf16_replays_within_its_precision(tmp_path):
    policy, media, trajectories = sampled(
        tmp_path,
        protocol=PROTOCOLS["free length, Gaussian"],
        dtype=torch.bfloat16,
        boldness=0.3,
        head="identity",
    )
    assert all(t.latents.dtype == torch.bfloat16 for t in trajectories)
    found = gaps(policy, media, trajectories)
    assert max(found.values()) <= 2e-2, found


def test_small_noise_makes_latents_as_much_less_exact(tmp_path):
    small = dataclasses.replace(PROTOCOLS["free length, Gaussian"], noise_scale=0.1)
    policy, media, trajectories = sampled(tmp_path, protocol=small, head="identity")
    found = gaps(policy, media, trajectories)
    assert max(found["token"], found["decision"]) <= 1e-5
    assert found["latent"] <= 1e-5 / 0.1


def test_fsdp2_replays_what_it_would_alone(tmp_path):
    policy, media, trajectories = sampled(tmp_path, size=2)
    inputs = collate(trajectories, policy, media).inputs
    alone = policy(**inputs)
    alone.logprobs.sum().backward()
    expected = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    # An engine of vLLM in this process (other tests have one) has started it, of one process too.
    started = not torch.distributed.is_initialized()
    if started:
        torch.distributed.init_process_group(
            "gloo", init_method=f"file://{tmp_path / 'rendezvous'}", rank=0, world_size=1
        )
    try:
        for layer in policy.base_model.language_model.layers:
            fully_shard(layer)
        fully_shard(policy)
        sharded = policy(**inputs)
        torch.testing.assert_close(sharded.logprobs, alone.logprobs, atol=1e-6, rtol=0)
        torch.testing.assert_close(sharded.means, alone.means, atol=1e-6, rtol=0)
        sharded.logprobs.sum().backward()
        for name, parameter in policy.named_parameters():
            if name in expected:
                found = parameter.grad.full_tensor()
                torch.testing.assert_close(found, expected[name], atol=1e-5, rtol=1e-4)
    finally:
        if started:
            torch.distributed.destroy_process_group()


def test_rows_do_not_depend_on_their_batch(tmp_path):
    policy, media, trajectories = sampled(tmp_path)
    whole = replay(policy, collate(trajectories, policy, media), policy)
    for row in (0, len(trajectories) - 1):
        t = trajectories[row]
        alone = replay(policy, collate([t], policy, media), policy)
        torch.testing.assert_close(
            whole.logprobs[row, : len(t.logprobs)], alone.logprobs[0], atol=1e-5, rtol=0
        )


# Each mutation is a defect of published code (`docs/exactness.md`); the exactness test must see it.


def not_fed_back(monkeypatch):
    # The trainer of Future-L1's release scores text on the filler's token embedding.
    original = LatentPolicy.hidden_states

    def blind(self, *args, latents=None, **kwargs):
        return original(self, *args, latents=None, **kwargs)

    monkeypatch.setattr(LatentPolicy, "hidden_states", blind)


def one_position_off(monkeypatch):
    # Monet, HyLaR and Future-L1 compare z_k with the hidden state it produces, not the one that
    # produced it.
    original = scores.score_slots

    def shifted(hidden, slots, **kwargs):
        slots = dataclasses.replace(slots, latent_rows=slots.latent_rows + 1)
        return original(hidden, slots, **kwargs)

    monkeypatch.setattr("rl.policy.model.score_slots", shifted)


def forced_counted(monkeypatch):
    # Forced ends scored as if they had been decisions.
    original = scoring.decision_slots

    def eager(trajectories, policy, before, width):
        slots, places = original(trajectories, policy, before, width)
        end = policy.latent_tokens.end
        at = [
            (row, p)
            for row, t in enumerate(trajectories)
            for p in ((t.decision == Slot.FORCED) & (t.completion_ids == end)).nonzero()[0]
        ]
        extra = {
            "rows": [before[row][p] for row, p in at],
            "ids": [end] * len(at),
            "kinds": [Slot.DECISION] * len(at),
            "may_start": [False] * len(at),
            "temperature": [1.0] * len(at),
            "kept": [0] * len(at),
        }
        longer = {
            name: torch.cat([value := getattr(slots, name), torch.tensor(more, dtype=value.dtype)])
            for name, more in extra.items()
        }
        places = torch.cat([places, torch.tensor([row * width + p for row, p in at])])
        return dataclasses.replace(slots, **longer), places

    monkeypatch.setattr("rl.scoring.decision_slots", eager)


def one_completion_off(monkeypatch):
    # The first token of a completion scored by the end of the completion before it.
    original = scoring.decision_slots

    def behind(trajectories, policy, before, width):
        wrong = [np.concatenate([[places[1] - 1], places[1:]]) for places in before]
        return original(trajectories, policy, wrong, width)

    monkeypatch.setattr("rl.scoring.decision_slots", behind)


def completions_not_kept_apart(monkeypatch):
    # Positions and prompts as they should be, but a completion sees those before it.
    def alone(layout):
        return PackLayout.of((g.stop - g.start - 1, (1,)) for g in layout.groups)

    original = packed_attention.packed_attention
    monkeypatch.setattr(
        "rl.policy.packed_attention.packed_attention",
        lambda q, k, v, layout, scale: original(q, k, v, alone(layout), scale=scale),
    )


def positions_run_on(monkeypatch):
    # Completions positioned behind one another instead of behind the prompt.
    original = scoring.collate

    def collate(*args):
        batch = original(*args)
        positions = batch.inputs["position_ids"]
        for g in batch.inputs["layout"].groups:
            more = torch.arange(g.stop - g.answers)
            positions[:, :, g.answers : g.stop] = positions[:, :, g.answers, None] + more
        return batch

    monkeypatch.setattr("tests.rl.test_scoring.collate", collate)


def bans_forgotten(monkeypatch):
    original = linear_scores._logits

    def free(rows, weight, bias, kinds, *rest):
        return original(rows, weight, bias, torch.full_like(kinds, Slot.DECISION), *rest)

    monkeypatch.setattr("rl.policy.linear_scores._logits", free)


@pytest.mark.parametrize(
    ("mutation", "kind"),
    [
        (not_fed_back, "token"),
        (one_position_off, "latent"),
        (forced_counted, "forced"),
        (one_completion_off, "token"),
        (completions_not_kept_apart, "token"),
        (positions_run_on, "token"),
        (bans_forgotten, "token"),
    ],
)
def test_mutations_are_seen(mutation, kind, tmp_path, monkeypatch):
    policy, media, trajectories = sampled(tmp_path)
    assert gaps(policy, media, trajectories)[kind] <= 1e-5
    mutation(monkeypatch)
    assert gaps(policy, media, trajectories)[kind] > 1e-2


def test_gradient_of_the_latent_term_by_finite_differences(tmp_path):
    policy, media, trajectories = sampled(tmp_path, dtype=torch.float64, size=2)
    batch = collate(trajectories, policy, media)

    def value() -> torch.Tensor:
        found = replay(policy, batch, policy)
        assert found.latent_logprobs is not None
        return found.latent_logprobs.mean()

    value().backward()
    torch.manual_seed(0)
    for name in ("latent_head.3.weight", "model.language_model.layers.0.mlp.up_proj.weight"):
        parameter = policy.get_parameter(name)
        direction = torch.randn_like(parameter)
        slope = (parameter.grad * direction).sum().item()
        step = 1e-4
        with torch.no_grad():
            parameter.add_(direction, alpha=step)
            up = value().item()
            parameter.sub_(direction, alpha=2 * step)
            down = value().item()
            parameter.add_(direction, alpha=step)
        assert slope == pytest.approx((up - down) / (2 * step), rel=1e-3), name
        assert abs(slope) > 1e-4


def test_another_protocol_is_refused(tmp_path):
    policy, media, trajectories = sampled(tmp_path)
    policy.set_protocol(dataclasses.replace(policy.protocol, min_length=1))
    with pytest.raises(TrajectoryError, match="another protocol"):
        collate(trajectories, policy, media)


def test_densities_of_stored_latents_are_those_of_the_protocol(tmp_path):
    policy, media, trajectories = sampled(tmp_path)
    found = replay(policy, collate(trajectories, policy, media), policy)
    latents = torch.cat([t.latents for t in trajectories])
    expected = log_density(latents, found.means, policy.protocol.noise_scale, "gaussian")
    torch.testing.assert_close(found.latent_logprobs, expected)

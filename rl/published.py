"""BASELINE, not our objective: the scores that the released code of Future-L1 computes.

`objective: published` trains on these in the place of the exact replay of `rl.scoring`, so that the
difference can be measured. Source: our reading of OpenGVLab/Future-L1 (RL_v2; the log-probs of
Monet and HyLaR are shifted in the same way). What it does, and what is wrong with it:

- The filler's own token embedding stands where the sampler fed a latent: everything behind a span
  is scored under inputs that it was not sampled under.
- Every token of a completion is an action, forced ones too, scored by the softmax over the whole
  vocabulary at the sampling temperature, whatever the sampler could choose from.
- With the filler of latent z_k at position p of the completion, μ_k is the hidden state AT p, which
  is the mean of z_{k+1}, and its score is v_k = κ·⟨μ_k, z_k⟩: no normalised density, so that it
  grows with the norm of μ_k (its gradient by μ_k is κ·z_k).
- v_k takes the place of the log-prob of the token at p + 1. So the first filler of a span keeps the
  log-prob of a token that was forced, and the last latent's value stands where the end of the span
  was decided. A latent that is the last token of a cut completion has no such place.
- These values enter ratio, clip and KL of TRL's token loss as if they were log-probs; there is no
  latent term. The old log-probs are the trainer's own: with one update a rollout, the same values
  without a gradient.
- The k3 estimator of its KL is bounded as in EasyR1, on which the release is built.

Latents are as the sampler stored them, without noise. The release has no latent head by default;
where a policy has one, μ is what it gives.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.interfaces import MediaSource
from rl.policy.model import LatentPolicy
from rl.policy.protocol import Slot
from rl.policy.scores import ScoreSlots
from rl.scoring import Replay, ReplayBatch, collate
from rl.trajectory import Trajectory

# EasyR1's bound on the k3 of a token, and a log-ratio where it is reached: e^x - x - 1 = 10.
_MOST_KL = 10.0
_MOST_KL_AT = 2.610868638149876


def latent_slots(completion_ids: np.ndarray, filler: int) -> tuple[np.ndarray, np.ndarray]:
    """Which of a completion's L latents have a slot (bool [L]), and these slots: the positions
    behind their fillers, if the completion goes on there.
    """
    behind = (completion_ids == filler).nonzero()[0] + 1
    inside = behind < len(completion_ids)
    return inside, behind[inside]


@dataclass(frozen=True)
class PublishedBatch:
    """A `ReplayBatch` without latents in its inputs, and where their values go."""

    batch: ReplayBatch
    scored: torch.Tensor  # int64 [S], which of the L latents have a slot
    slots: torch.Tensor  # int64 [S], their slots among B completions of length C

    def to(self, device: torch.device | str) -> PublishedBatch:
        return PublishedBatch(self.batch.to(device), self.scored.to(device), self.slots.to(device))


def collate_published(
    trajectories: Sequence[Trajectory], policy: LatentPolicy, media: MediaSource
) -> PublishedBatch:
    """As `rl.scoring.collate`, for `replay_published`."""
    batch = collate(trajectories, policy, media, slots=_all_tokens)
    del batch.inputs["latents"]  # the filler's own embedding stays
    scored, slots, before = [], [], 0
    for row, t in enumerate(trajectories):
        inside, own = latent_slots(t.completion_ids, t.filler)
        scored.append(before + inside.nonzero()[0])
        slots.append(row * batch.width + own)
        before += len(inside)
    joined = (torch.from_numpy(np.concatenate(parts)) for parts in (scored, slots))
    return PublishedBatch(batch, *joined)


def _all_tokens(
    trajectories: Sequence[Trajectory],
    policy: LatentPolicy,
    before: Sequence[np.ndarray],
    width: int,
) -> tuple[ScoreSlots, torch.Tensor]:
    """Every token of every completion, and the hidden states at the latents."""
    rows, ids, heat, latent_rows, places = [], [], [], [], []
    for row, (t, deciding) in enumerate(zip(trajectories, before, strict=True)):
        rows.append(deciding)
        ids.append(t.completion_ids)
        heat.append(np.full(len(deciding), t.sampling.temperature or 1.0, dtype=np.float32))
        # At a latent, not before it: the release is off by one. Nothing stands in between, as this
        # objective does not go with visual replay.
        latent_rows.append(deciding[t.completion_ids == t.filler] + 1)
        places.append(row * width + np.arange(len(deciding)))
    count = sum(map(len, ids))
    slots = ScoreSlots(
        rows=torch.from_numpy(np.concatenate(rows)),
        ids=torch.from_numpy(np.concatenate(ids)),
        kinds=torch.full((count,), Slot.TOKEN, dtype=torch.int8),
        may_start=torch.ones(count, dtype=torch.bool),
        temperature=torch.from_numpy(np.concatenate(heat)),
        kept=torch.zeros(count, dtype=torch.int32),
        latent_rows=torch.from_numpy(np.concatenate(latent_rows)),
        most_kept=0,
        plain=True,
    )
    return slots, torch.from_numpy(np.concatenate(places))


def latent_values(means: torch.Tensor, latents: torch.Tensor, kappa: float) -> torch.Tensor:
    """κ·⟨μ, z⟩ of each of [S, H] in float32: [S]."""
    return kappa * (means.float() * latents.float()).sum(-1)


def replay_published(model: Any, batch: PublishedBatch, kappa: float) -> Replay:
    """The release's scores, in the form of a `Replay`: its `logprobs` [B, C] hold log-probs of
    tokens and, at the slots of latents, κ·⟨μ, z⟩; `latent_logprobs` is None.
    """
    own = batch.batch
    scores = model(**own.inputs)
    shape = len(own.latent_counts), own.width
    blank = torch.zeros(shape, device=scores.logprobs.device).flatten()
    values = latent_values(scores.means[batch.scored], own.latents[batch.scored], kappa)
    tokens = blank.scatter(0, own.places, scores.logprobs)
    return Replay(
        logprobs=tokens.scatter(0, batch.slots, values).view(shape),
        entropies=blank.scatter(0, own.places, scores.entropies).view(shape),
        means=scores.means,
        latent_logprobs=None,
        tokens=own.tokens,
    )


def bounded_reference(logprobs: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """`reference`, moved where k3 = e^d - d - 1 with d = reference - logprobs would be above
    EasyR1's bound: there k3 is the bound, and has no gradient.
    """
    delta = (reference - logprobs).detach()
    beyond = delta.exp() - delta - 1.0 > _MOST_KL
    return torch.where(beyond, logprobs + _MOST_KL_AT, reference)


def sampler_gaps(replayed: Replay, trajectories: Sequence[Trajectory]) -> tuple[float, float]:
    """Mean and largest distance of the release's scores from the sampler's own log-probs, over what
    the sampler decided (forced positions have none).
    """
    found = replayed.logprobs.detach().float().cpu().numpy()
    gaps = np.concatenate(
        [
            np.abs(found[row, : len(t.logprobs)] - t.logprobs)[t.decision != Slot.FORCED]
            for row, t in enumerate(trajectories)
        ]
    )
    return float(gaps.mean()), float(gaps.max())

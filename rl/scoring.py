"""Replay: log-probs of stored trajectories under a policy, with the stored latents fed as
inputs.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.errors import TrajectoryError
from rl.interfaces import MediaSource
from rl.policy.density import log_density
from rl.policy.model import LatentPolicy
from rl.policy.scores import Scores, ScoreSlots
from rl.trajectory import Trajectory


@dataclass(frozen=True)
class ReplayBatch:
    """A batch of B trajectories as tensors: prompts padded on the left to P, completions on the
    right to C.
    """

    inputs: dict[str, Any]  # what the model's forward takes, `latents` and `slots` included
    prompt_length: int  # P
    latent_counts: tuple[int, ...]  # latents of each row

    def to(self, device: torch.device | str) -> ReplayBatch:
        moved = {name: value.to(device) for name, value in self.inputs.items()}
        return dataclasses.replace(self, inputs=moved)


def collate(
    trajectories: Sequence[Trajectory],
    policy: LatentPolicy,
    media: MediaSource,
    *,
    pad_id: int,
) -> ReplayBatch:
    """Lay trajectories out for one forward pass of `policy`, their clips fetched from `media` by
    key.
    """
    p = max(len(t.prompt_ids) for t in trajectories)
    c = max(len(t.completion_ids) for t in trajectories)
    shape = (len(trajectories), p + c)
    ids = np.full(shape, pad_id, dtype=np.int64)
    mask = np.zeros(shape, dtype=np.int64)
    slots = np.zeros(shape, dtype=np.int8)
    may_start = np.zeros(shape, dtype=bool)
    kept = np.zeros(shape, dtype=np.int32)
    for row, t in enumerate(trajectories):
        trace = policy.protocol.trace(t.completion_ids, policy.latent_tokens, t.sampling.imagine)
        if not np.array_equal(trace.slots, t.decision):
            raise TrajectoryError(
                f"trajectory of sample {t.sample_id!r}: its decisions are not those the policy's "
                "protocol allows; it was sampled under another protocol"
            )
        start, end = p - len(t.prompt_ids), p + len(t.completion_ids)
        ids[row, start:end] = np.concatenate([t.prompt_ids, t.completion_ids])
        mask[row, start:end] = 1
        slots[row, p:end], may_start[row, p:end] = trace.slots, trace.may_start
        kept[row, p:end] = t.kept
    input_ids = torch.from_numpy(ids)
    clips = [media.get(key).inputs for t in trajectories for key in t.media]
    inputs: dict[str, Any] = {
        "input_ids": input_ids,
        "attention_mask": torch.from_numpy(mask),
        "mm_token_type_ids": media_types(input_ids, policy.config),
        **{name: torch.cat([clip[name] for clip in clips]) for name in (clips[0] if clips else {})},
        "latents": torch.cat([t.latents for t in trajectories]),
        "slots": ScoreSlots(
            input_ids,
            torch.from_numpy(slots),
            torch.from_numpy(may_start),
            # A greedy trajectory is scored at temperature 1: its own distribution is a point.
            torch.tensor(
                [t.sampling.temperature or 1.0 for t in trajectories], dtype=torch.float32
            ),
            torch.from_numpy(kept),
        ),
    }
    return ReplayBatch(
        inputs,
        p,
        tuple(len(t.latents) for t in trajectories),
    )


def media_types(input_ids: torch.Tensor, config: Any) -> torch.Tensor:
    """What each token stands for, as transformers numbers it: 0 text, 1 image, 2 video."""
    types = torch.zeros_like(input_ids)
    for number, kind in enumerate(("image", "video"), start=1):
        token = getattr(config, f"{kind}_token_id", None)
        if token is not None:
            types[input_ids == token] = number
    return types


@dataclass(frozen=True)
class Replay:
    """A replayed batch of B trajectories with completions padded to C, and L latents in all."""

    logprobs: torch.Tensor  # float32 [B, C]
    entropies: torch.Tensor  # float32 [B, C]
    means: torch.Tensor  # [L, H]
    latent_logprobs: torch.Tensor | None  # float64 [L]; None when the policy has no noise


def replay(model: Callable[..., Scores], batch: ReplayBatch, policy: LatentPolicy) -> Replay:
    """Score a batch. `model` is `policy` itself or the wrapper (DDP, FSDP, PEFT) through which it
    must be called.
    """
    scores = model(**batch.inputs)
    scale, latents = policy.protocol.noise_scale, batch.inputs["latents"]
    return Replay(
        logprobs=scores.logprobs[:, batch.prompt_length :],
        entropies=scores.entropies[:, batch.prompt_length :],
        means=scores.means,
        latent_logprobs=log_density(latents, scores.means, scale, policy.protocol.density)
        if scale > 0
        else None,
    )


@dataclass(frozen=True)
class Gaps:
    """Largest differences between the log-probs of sampler and replay."""

    tokens: float  # of tokens and of decisions
    latents: float  # of latents, summed over the width H and divided by √H

    @property
    def largest(self) -> float:
        """The larger of the two; NaN if either is."""
        return float(np.max([self.tokens, self.latents]))


def replay_gaps(replayed: Replay, trajectories: Sequence[Trajectory]) -> Gaps:
    """How far a replay is from what the sampler wrote down about the same trajectories."""
    found = replayed.logprobs.detach().float().cpu().numpy()
    tokens = max(
        float(np.abs(found[row, : len(t.logprobs)] - t.logprobs).max())
        for row, t in enumerate(trajectories)
    )
    latents = 0.0
    if replayed.latent_logprobs is not None and len(replayed.latent_logprobs):
        old = np.concatenate([t.latent_logprobs for t in trajectories])
        difference = np.abs(replayed.latent_logprobs.detach().cpu().numpy() - old)
        latents = float(difference.max()) / replayed.means.shape[-1] ** 0.5
    return Gaps(tokens, latents)

"""The latent part of LA-DAPO's loss on one micro-batch: α·L_latent + β_z·KL_latent."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rl.la_dapo_config import LADAPOConfig
from rl.objective import latent_surrogate, reduce_width
from rl.policy.density import latent_kl
from rl.policy.protocol import LatentProtocol
from rl.scoring import Replay
from rl.trajectory import Trajectory

# What `LatentTerm.totals` sums, but for the loss and the number of latents.
MEANS = ("ratio", "clip_ratio", "kl")


@dataclass(frozen=True)
class LatentTerm:
    """The loss, and what to log: loss, sums over the trained latents by `MEANS`, their number.

    `totals` has the same shape whatever the batch holds, so that processes can add theirs up.
    """

    loss: torch.Tensor
    totals: torch.Tensor  # float64 [5]


def latent_term(
    replayed: Replay,
    trajectories: Sequence[Trajectory],
    advantage_N: torch.Tensor,
    trained_N: torch.Tensor,
    normalizer: torch.Tensor,
    config: LADAPOConfig,
    protocol: LatentProtocol,
    reference_means: Sequence[torch.Tensor] | None = None,
) -> LatentTerm:
    """The term over N trajectories, of which those with `trained_N` count.

    `normalizer` is the number of latents of the whole batch (as DAPO's token mean, but over
    latents); `reference_means` has the reference policy's means [L_i, H] of each trajectory, for
    β_z.
    """
    device = replayed.means.device
    counts_N = torch.tensor([len(t.latents) for t in trajectories], device=device)
    on_L = trained_N.repeat_interleave(counts_N)
    totals = torch.zeros(len(MEANS) + 2, dtype=torch.float64, device=device)
    # The head stays in the graph even where no latent is trained, so that DDP finds its gradients.
    loss = replayed.means.sum() * 0.0
    if replayed.latent_logprobs is None or not bool(on_L.any()):
        return LatentTerm(loss, totals)
    dim = replayed.means.shape[-1]
    old_L = torch.from_numpy(np.concatenate([t.latent_logprobs for t in trajectories])).to(device)
    high = config.latent_epsilon_high
    surrogate = latent_surrogate(
        replayed.latent_logprobs[on_L],
        old_L[on_L],
        advantage_N.repeat_interleave(counts_N)[on_L],
        dim=dim,
        reduction=config.latent_reduction,
        clip_low=config.latent_epsilon,
        clip_high=config.latent_epsilon if high is None else high,
        normalizer=normalizer,
    )
    loss = loss + config.latent_alpha * surrogate.loss
    kl_L = torch.zeros_like(surrogate.ratio_L)
    if reference_means is not None and config.latent_beta != 0.0:
        reference = torch.cat(list(reference_means)).to(device)
        scale, density = protocol.noise_scale, protocol.density
        kl_L = latent_kl(replayed.means, reference, scale, density)[on_L]
        kl_L = reduce_width(kl_L, dim, config.latent_reduction)
        loss = loss + config.latent_beta * kl_L.sum() / normalizer
    sums = [surrogate.ratio_L.sum(), surrogate.clipped_L.sum(), kl_L.sum(), on_L.sum()]
    logged = torch.stack([s.detach().double() for s in (surrogate.loss, *sums)])
    return LatentTerm(loss, logged)

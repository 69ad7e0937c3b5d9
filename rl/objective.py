"""The LA-DAPO objective, as pure functions: L = L_token + α·L_latent + β·KL_token + β_z·KL_latent.

Names carry their shapes: G trajectories of one group, N trajectories of a batch, L latents of a
batch. `L_token` and `KL_token` are TRL's own (`loss_type="dapo"`: token mean, clip 0.2 / 0.28; k3
estimator); what TRL does not have is here. Sources: DAPO (arXiv 2503.14476) for the filter and the
clipping, HyLaR / DePO (arXiv 2604.20328) and Future-L1 (arXiv 2606.05769) for a latent term with a
clip range of its own. The reductions over the hidden width are our reconstruction: a sum over
thousands of dimensions makes ratios explode, a mean makes them all 1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch

from rl.errors import ObjectiveError

Objective = Literal["exact", "published"]  # published: the baseline of `rl.published`
Reduction = Literal["sum", "sqrt_dim", "mean"]
Reason = Literal["kept", "all_wrong", "all_right", "too_hard", "too_easy", "invalid", "video"]


def reduce_width(value_L: torch.Tensor, dim: int, reduction: Reduction) -> torch.Tensor:
    """Scale a quantity that was summed over the hidden width H=`dim`: by 1, 1/√H or 1/H."""
    match reduction:
        case "sum":
            return value_L
        case "sqrt_dim":
            return value_L / math.sqrt(dim)
        case "mean":
            return value_L / dim
    raise ObjectiveError(f"latent_reduction is {reduction!r}; choose one of {get_args(Reduction)}")


@dataclass(frozen=True)
class LatentSurrogate:
    """The clipped latent term and what to log about it."""

    loss: torch.Tensor  # scalar
    ratio_L: torch.Tensor
    clipped_L: torch.Tensor  # bool, where the clip stopped the gradient


def latent_surrogate(
    logprob_L: torch.Tensor,
    old_logprob_L: torch.Tensor,
    advantage_L: torch.Tensor,
    *,
    dim: int,
    reduction: Reduction,
    clip_low: float,
    clip_high: float,
    normalizer: torch.Tensor | float,
) -> LatentSurrogate:
    """L_latent = -Σ min(r·A, clip(r, 1-clip_low, 1+clip_high)·A) / normalizer, with r =
    exp(reduce(Δ log π)).

    `logprob_L` and `old_logprob_L` are log-densities summed over H; `advantage_L` is the
    trajectory's advantage, repeated for each of its latents.
    """
    delta_L = reduce_width(logprob_L - old_logprob_L, dim, reduction)
    ratio_L = delta_L.exp()
    clamped_L = ratio_L.clamp(1.0 - clip_low, 1.0 + clip_high)
    advantage_L = advantage_L.to(ratio_L.dtype)
    loss_L = -torch.min(ratio_L * advantage_L, clamped_L * advantage_L)
    too_low = (ratio_L < 1.0 - clip_low) & (advantage_L < 0)
    too_high = (ratio_L > 1.0 + clip_high) & (advantage_L > 0)
    return LatentSurrogate(loss_L.sum() / normalizer, ratio_L, too_low | too_high)


@dataclass(frozen=True)
class Verdict:
    """Whether a group is trained on, and if not, why not."""

    keep: bool
    reason: Reason


def judge_group(outcome_G: Sequence[float], low: float, high: float) -> Verdict:
    """Keep a group when low < accuracy < high, over its valid outcomes (NaN = no value).

    Only the outcome counts, never a shaped reward: a filter on shaped rewards keeps groups in which
    everything is wrong and trains on noise. DAPO uses low = 0 and high = 1, Future-L1 0.1 and 0.9.
    """
    valid = [v for v in outcome_G if not math.isnan(v)]
    if len(valid) < 2:
        return Verdict(False, "invalid")
    accuracy = sum(valid) / len(valid)
    if accuracy <= low:
        return Verdict(False, "all_wrong" if accuracy <= 0.0 else "too_hard")
    if accuracy >= high:
        return Verdict(False, "all_right" if accuracy >= 1.0 else "too_easy")
    return Verdict(True, "kept")


def fill_missing(value_G: torch.Tensor) -> torch.Tensor:
    """A reward's values in one group with each "no value" (NaN) put at the mean of the others.

    There it moves neither the group's mean nor anyone's advantage; counted as 0, as a sum that
    skips it would, it would be a verdict. Without any value the result stays NaN.
    """
    return torch.where(value_G.isnan(), value_G.nanmean(), value_G)

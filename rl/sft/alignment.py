"""Latent alignment: how far the means of latents are from the features of the frames they should
depict.

Source: the SFT loss of Future-L1 (arXiv 2606.05769), the mean squared error between the hidden
state before a latent and the vision tower's feature of a future frame, or one minus their cosine.
Dividing the error by the targets' variance is ours: pooled features vary little (0.02 to 0.06 a
dimension in the quickstart), so the raw error is tiny beside the cross-entropy and, at the
published weight of 0.2, is not learned at all. Divided, 1 is the error of the constant prediction
"the mean target", whatever the tower.
"""

from __future__ import annotations

from typing import Literal

import torch

LatentLoss = Literal["mse", "cosine"]


def latent_alignment_loss(
    means: torch.Tensor, targets: torch.Tensor, *, variance: float, kind: LatentLoss = "mse"
) -> torch.Tensor:
    """Mean over L latents of ‖μ - f‖² / (H · variance) ("mse") or of 1 - cos(μ, f) ("cosine"): a
    float32 scalar.

    `means` and `targets` are [L, H]; `variance` comes from `target_variance`. Without latents (L =
    0) it is a 0 that still hangs on `means`, so that every parameter gets a gradient on every rank.
    """
    means, targets = means.float(), targets.float()
    if not len(means):
        return means.sum() * 0.0
    if kind == "cosine":
        return (1.0 - torch.nn.functional.cosine_similarity(means, targets, dim=-1)).mean()
    return (means - targets).square().mean() / variance


def target_variance(targets: torch.Tensor) -> float:
    """Mean over H of the variance of `targets` [L, H] in each dimension (divided by L, not L -
    1).
    """
    return float(targets.float().var(0, correction=0).mean())


def pool_frames(features: torch.Tensor, tokens_per_patch: int = 1) -> torch.Tensor:
    """Average the merged tokens of each temporal patch into a few latents.

    `features` [T, N, H]: N merged tokens, row by row, of each of T temporal patches. Returns
    [T · tokens_per_patch, H]; with 1 each patch becomes its mean, with more the tokens are averaged
    in as many runs of (nearly) equal length, as Future-L1 does for a fixed budget.
    """
    pooled = torch.nn.functional.adaptive_avg_pool1d(features.transpose(1, 2), tokens_per_patch)
    return pooled.transpose(1, 2).flatten(0, 1)


def neighbour_cosines(means: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Cosines [K] of the `means` [L, H] of latents that follow one another in the same span, where
    their `rows` [L] in the sequence do. Near 1 all latents of a span say the same.
    """
    means = means.float()
    return torch.nn.functional.cosine_similarity(means[1:], means[:-1], dim=-1)[rows.diff() == 1]

"""Are a trajectory's latents closer to right trajectories of its group than to wrong ones?

Source: the outcome-contrastive term of Future-L1's LA-DAPO (OpenGVLab/Future-L1).
With the latents of all spans in one row, two trajectories are compared step by step over the length
of the shorter one:

    sim(a, b) = mean over t <= min(T_a, T_b) of (1 + cos(a_t, b_t)) / 2

which lies in [0, 1] and is 1/2 for unrelated (orthogonal) latents. Two scales are offered.

``scale="published"`` repeats the release, oddities and all. P are the other right trajectories, N
all wrong ones:

    both:     e^{max_P sim/τ} / (e^{max_P sim/τ} + Σ_N e^{sim/τ})    in (0, 1)
    only N:   1 / (1 + Σ_N e^{sim/τ})                                in (0, 1/2]
    only P:   max_P sim / τ                                          in [0, 1/τ]
    no latents, or a group of one: 0

A sole right trajectory is its own positive and a wrong one its own negative (sim = 1 either way);
the value falls with the number of wrong trajectories; a group that is all right is paid on a scale
1/τ times larger than a mixed one; and a trajectory without latents gets 0, the least of all values,
so that the reward also pays for having any.

``scale="bounded"``, the default, is OUR reconstruction of the same idea, not the paper's:

    R = logistic((s⁺ - s⁻) / τ)
    s⁺ = max over right others of sim
    s⁻ = τ · log of the mean over wrong others of e^{sim/τ}

which for a mixed group is the published fraction with the *mean* over N in place of the sum. Why it
differs:

- a trajectory is never compared with itself: its value says something about the others, or there is
  none;
- the mean makes the value independent of how many trajectories happened to be wrong;
- a side without others counts as 1/2, the similarity of unrelated latents, so that all cases share
  one scale, on which 1/2 means "no closer to right than to wrong"; where both sides have others, a
  policy whose latents have collapsed to one vector earns exactly that;
- no latents, or nobody to compare with, is "no value" (None) rather than a low one.

Both scales ignore the length of each latent vector and treat right and wrong trajectories alike: a
wrong trajectory whose latents resemble the right ones is rewarded for them.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from rl.errors import RecipeError, RewardError

if TYPE_CHECKING:
    from rl.trajectory import Trajectory

Scale = Literal["bounded", "published"]


def outcome_contrastive(
    latents: Sequence[np.ndarray | None],
    correct: Sequence[bool],
    *,
    temperature: float = 0.5,
    scale: Scale = "bounded",
) -> list[float | None]:
    """The reward of each trajectory of one group; see the module for the formulas.

    `latents[i]` is [T_i, H], the latents of all spans of trajectory i in order, or None (or T_i =
    0) if it has none; `correct[i]` is its outcome. Range: "bounded" [0, 1] or None; "published"
    [0, max(1, 1/temperature)].
    """
    _check_options(temperature, scale)
    if len(latents) != len(correct):
        raise RewardError(f"outcome_contrastive: {len(latents)} latents, {len(correct)} outcomes")
    missing = 0.0 if scale == "published" else None
    values: list[float | None] = [missing] * len(latents)
    members = [i for i, z in enumerate(latents) if z is not None and len(z)]
    if len(latents) < 2 or not members:
        return values
    similarity = prefix_similarity([z for z in latents if z is not None and len(z)])
    right = np.asarray([bool(correct[i]) for i in members])
    score = _published if scale == "published" else _bounded
    for i, value in zip(members, score(similarity, right, temperature), strict=True):
        values[i] = missing if np.isnan(value) else float(value)
    return values


def prefix_similarity(latents: Sequence[np.ndarray]) -> np.ndarray:
    """Pairwise sim [n, n] of n >= 1 arrays [T_i, H]; a zero vector is orthogonal to everything."""
    lengths = np.asarray([len(z) for z in latents])
    steps = np.zeros((lengths.max(), len(latents), latents[0].shape[1]), dtype=np.float32)
    for i, z in enumerate(latents):
        steps[: len(z), i] = z
    gram = np.matmul(steps, steps.transpose(0, 2, 1)).astype(np.float64)  # [T, n, n]
    if not np.isfinite(gram).all():
        raise RewardError("outcome_contrastive: latents hold NaN, infinity or values beyond 1e16")
    norms = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))  # [T, n]
    scale = norms[:, :, None] * norms[:, None, :]
    cosine = np.clip(gram / np.where(scale > 0, scale, 1.0), -1.0, 1.0)
    shared = np.minimum(lengths[:, None], lengths[None, :])  # [n, n]
    inside = np.arange(len(steps))[:, None, None] < shared
    return np.where(inside, (1.0 + cosine) / 2.0, 0.0).sum(axis=0) / shared


def _bounded(similarity: np.ndarray, right: np.ndarray, tau: float) -> np.ndarray:
    """[n], NaN where there is nobody to compare with."""
    other = ~np.eye(len(right), dtype=bool)
    positive, negative = other & right, other & ~right  # [n, n]: row i looks at column j
    best = _masked_max(similarity, positive)
    count = negative.sum(axis=1)
    typical = tau * (_log_sum_exp(similarity / tau, negative) - np.log(np.maximum(count, 1)))
    best = np.where(positive.any(axis=1), best, 0.5)
    typical = np.where(count > 0, typical, 0.5)
    value = np.exp(-np.logaddexp(0.0, (typical - best) / tau))
    return np.where(other.any(axis=1), value, np.nan)


def _published(similarity: np.ndarray, right: np.ndarray, tau: float) -> np.ndarray:
    """[n]."""
    positive = ~np.eye(len(right), dtype=bool) & right
    # A sole right trajectory compares with itself.
    positive |= right & ~positive.any(axis=1, keepdims=True)
    negative = np.broadcast_to(~right, positive.shape)
    best = _masked_max(similarity, positive) / tau
    against = _log_sum_exp(similarity / tau, negative)
    if right.all():
        return best
    if not right.any():
        best = np.zeros_like(best)  # e^0 = 1 stands in for the missing positive
    return np.exp(best - np.logaddexp(best, against))


def _masked_max(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    return np.where(mask, values, -np.inf).max(axis=1)


def _log_sum_exp(values: np.ndarray, mask: np.ndarray) -> np.ndarray:
    """log Σ exp over the masked columns of each row; -inf where the mask is empty."""
    return np.logaddexp.reduce(np.where(mask, values, -np.inf), axis=1)


def _check_options(temperature: float, scale: str) -> None:
    if scale not in get_args(Scale):
        raise RecipeError(
            f"outcome_contrastive: scale is {scale!r}; choose one of {get_args(Scale)}"
        )
    if not 1e-6 <= temperature < float("inf"):
        raise RecipeError(
            f"outcome_contrastive: temperature is {temperature}; it must be finite and >= 1e-6"
        )


def outcome_contrastive_rewards(
    *,
    trajectories: Sequence[Trajectory],
    group_ids: Sequence[int],
    outcomes: Sequence[float],
    temperature: float = 0.5,
    scale: Scale = "bounded",
    **_: Any,
) -> list[float | None]:
    """`outcome_contrastive` of each group, with TRL's signature.

    Trajectories of a group stand together. One with an invalid (NaN) outcome is neither right nor
    wrong: it gets no value and the others are not compared with it.
    """
    _check_options(temperature, scale)
    values: list[float | None] = []
    rows = zip(group_ids, trajectories, outcomes, strict=True)
    for _group, members in groupby(rows, key=lambda row: row[0]):
        pairs = [(t, outcome) for _id, t, outcome in members]
        valid = [(t, outcome) for t, outcome in pairs if not np.isnan(outcome)]
        scores = iter(
            outcome_contrastive(
                [t.latents.float().numpy() if t.imagined else None for t, _outcome in valid],
                [outcome == 1.0 for _t, outcome in valid],
                temperature=temperature,
                scale=scale,
            )
        )
        values += [None if np.isnan(outcome) else next(scores) for _t, outcome in pairs]
    return values

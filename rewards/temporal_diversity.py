"""Do neighbouring latent spans imagine different things?

Source: the temporal-diversity term of Future-L1's LA-DAPO (OpenGVLab/Future-L1): C = mean over j of
cos²(b_j, b_{j+1}), b_j the mean of span j; the reward is -C. Its scale is bounded as published, so
there is only one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from rl.errors import RewardError

if TYPE_CHECKING:
    from rl.trajectory import Trajectory


def adjacent_similarity(spans: Sequence[np.ndarray]) -> float:
    """Mean squared cosine of the means of neighbouring spans, each [T_j, H].

    0 for fewer than two spans; spans without latents (a completion cut short) are skipped, and a
    span whose mean is the zero vector is orthogonal to every other. Range: [0, 1].
    """
    pooled = [np.asarray(span, dtype=np.float32).mean(axis=0) for span in spans if len(span)]
    if len(pooled) < 2:
        return 0.0
    means = np.stack(pooled).astype(np.float64)  # [n, H]
    norms = np.linalg.norm(means, axis=1)
    if not np.isfinite(norms).all():
        raise RewardError("temporal_diversity: a latent span holds NaN or infinity")
    units = means / np.where(norms > 0, norms, 1.0)[:, None]
    cosines = (units[:-1] * units[1:]).sum(axis=1)
    return float(np.minimum(cosines**2, 1.0).mean())


def temporal_diversity(spans: Sequence[np.ndarray]) -> float:
    """Minus `adjacent_similarity`: in [-1, 0], and 0 for fewer than two spans."""
    return 0.0 - adjacent_similarity(spans)  # 0.0 - x: no negative zero in the logs


def temporal_diversity_rewards(*, trajectories: Sequence[Trajectory], **_: Any) -> list[float]:
    """`temporal_diversity` of each trajectory, with TRL's signature."""
    return [temporal_diversity([s.float().numpy() for s in t.spans()]) for t in trajectories]

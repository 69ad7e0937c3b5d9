"""From scores to the table of rewards that TRL weighs, sums and turns into advantages."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from rl.interfaces import GroupScores
from rl.objective import fill_missing


def reward_table(names: Sequence[str], scores: Sequence[GroupScores]) -> torch.Tensor:
    """Rewards [N, F] of N trajectories by F = len(names) rewards, the outcome first.

    A row whose outcome is invalid is NaN throughout: TRL leaves it out of its group's mean,
    deviation and count. Any other missing value is put at the mean of its group's others, where it
    moves nobody (0 in a group without any), and so is the shaping of a gated group.
    """
    return torch.cat([_rows(names, score) for score in scores])


def _rows(names: Sequence[str], score: GroupScores) -> torch.Tensor:
    valid_G = ~torch.tensor(score.outcome).isnan()
    columns = []
    for place, name in enumerate(names):
        value_G = torch.tensor(score.components[name]).masked_fill(~valid_G, torch.nan)
        if score.gated and place > 0:
            value_G = value_G.nanmean().expand_as(value_G)
        columns.append(fill_missing(value_G).nan_to_num(nan=0.0))
    return torch.stack(columns, dim=1).masked_fill(~valid_G[:, None], torch.nan)

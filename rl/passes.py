"""Which trajectories go through the model together: whole groups, up to a token budget."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from accelerate import Accelerator

from rl.interfaces import MediaSource
from rl.policy.model import LatentPolicy
from rl.published import collate_published, replay_published
from rl.scoring import Replay, collate, prompt_groups, replay
from rl.trajectory import Trajectory


class Passes:
    """Forward passes over trajectories: which go together, and their replay.

    A pass holds at most `budget` tokens (see `plan_passes`), or without a budget `rows`
    trajectories as they come. `kappa` makes the scores those of the published baseline
    (`rl.published`); None: the exact ones.
    """

    def __init__(
        self,
        policy: LatentPolicy,
        media: MediaSource,
        accelerator: Accelerator,
        *,
        budget: int | None,
        rows: int,
        kappa: float | None = None,
    ) -> None:
        self._policy, self._media, self._accelerator = policy, media, accelerator
        self._budget, self._rows, self._kappa = budget, rows, kappa

    def plan(self, trajectories: Sequence[Trajectory]) -> list[list[int]]:
        """Rows of `trajectories` for each pass; as many passes on every process."""
        if self._budget is None:
            rows = list(range(len(trajectories)))
            return [rows[i : i + self._rows] for i in range(0, len(rows), self._rows)]
        plan = plan_passes(trajectories, self._budget)
        if self._accelerator.num_processes > 1:
            own = torch.tensor([len(plan)], device=self._accelerator.device)
            gathered: Any = self._accelerator.gather(own)
            plan = plan_passes(trajectories, self._budget, at_least=int(gathered.max()))
        return plan

    def replay(self, model: Any, trajectories: Sequence[Trajectory]) -> Replay:
        """One pass. `model` is the policy, as it is wrapped."""
        policy, media, device = self._policy, self._media, self._accelerator.device
        if self._kappa is not None:
            baseline = collate_published(trajectories, policy, media).to(device)
            with self._accelerator.autocast():
                return replay_published(model, baseline, self._kappa)
        batch = collate(trajectories, policy, media).to(device)
        with self._accelerator.autocast():
            return replay(model, batch, policy)

    @torch.no_grad()
    def score(
        self, model: Any, trajectories: Sequence[Trajectory]
    ) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """All passes, without gradients: for each trajectory its row, its log-probs [C], padded
        with zeros, and the means of its latents [L, H].
        """
        for rows in self.plan(trajectories):
            part = [trajectories[row] for row in rows]
            found = self.replay(model, part)
            means = found.means.split([len(t.latents) for t in part])
            yield from zip(rows, found.logprobs, means, strict=True)


def plan_passes(
    trajectories: Sequence[Trajectory], budget: int, *, at_least: int = 1
) -> list[list[int]]:
    """Rows of `trajectories` for each forward pass, so that no pass computes more than `budget`
    tokens, a shared prompt counted once.

    Groups stay whole where they fit, and are cut into as few parts as possible where they do not; a
    single trajectory above the budget goes alone. Passes are filled longest first, each into the
    fullest that has room. With `at_least`, there are that many passes or as many as rows: processes
    that train together need the same number.
    """
    groups = prompt_groups(trajectories)
    pieces = [piece for rows in groups for piece in _cut_group(trajectories, rows, budget)]
    passes: list[list[list[int]]] = []
    used: list[int] = []
    for piece in sorted(pieces, key=lambda rows: -_cost(trajectories, rows)):
        cost = _cost(trajectories, piece)
        room = [i for i, tokens in enumerate(used) if tokens + cost <= budget]
        if room:
            fullest = max(room, key=used.__getitem__)
            passes[fullest].append(piece)
            used[fullest] += cost
        else:
            passes.append([piece])
            used.append(cost)
    while len(passes) < min(at_least, len(trajectories)):
        passes += _halves(passes.pop(passes.index(max(passes, key=lambda p: sum(map(len, p))))))
    return sorted(sorted(row for piece in a_pass for row in piece) for a_pass in passes)


def _halves(a_pass: list[list[int]]) -> tuple[list[list[int]], list[list[int]]]:
    """Two passes out of one, between groups if it has several."""
    if len(a_pass) > 1:
        return a_pass[::2], a_pass[1::2]
    (rows,) = a_pass
    return [rows[::2]], [rows[1::2]]


def _cost(trajectories: Sequence[Trajectory], rows: Sequence[int]) -> int:
    """Tokens of one group's rows: its prompt and their completions."""
    completions = sum(trajectories[row].row_tokens for row in rows)
    return len(trajectories[rows[0]].prompt_ids) + completions


def _cut_group(
    trajectories: Sequence[Trajectory], rows: Sequence[int], budget: int
) -> list[list[int]]:
    room = budget - len(trajectories[rows[0]].prompt_ids)
    pieces: list[list[int]] = []
    used = 0
    for row in rows:
        tokens = trajectories[row].row_tokens
        if pieces and used + tokens <= room:
            pieces[-1].append(row)
            used += tokens
        else:
            pieces.append([row])
            used = tokens
    return pieces


def take_rows(batch: dict[str, Any], rows: Sequence[int]) -> dict[str, Any]:
    """Some rows of what TRL calls a batch: of its lists and tensors that have one entry a
    trajectory. Everything else is about the whole batch and stays as it is.
    """
    size = len(batch["trajectories"])

    def part(value: Any) -> Any:
        if isinstance(value, torch.Tensor) and value.dim() > 0 and len(value) == size:
            return value[list(rows)]
        if isinstance(value, list) and len(value) == size:
            return [value[row] for row in rows]
        return value

    return {name: part(value) for name, value in batch.items()}


def deal_groups(batch: dict[str, Any], group: int, hands: int) -> list[dict[str, Any]]:
    """A batch of groups of `group` rows in random order, cut into `hands` equal parts.

    TRL deals single rows. Whole groups share the computation of their prompt.
    """
    starts = torch.randperm(len(batch["trajectories"]) // group) * group
    rows = (starts[:, None] + torch.arange(group)).flatten().tolist()
    size = len(rows) // hands
    return [take_rows(batch, rows[i * size : (i + 1) * size]) for i in range(hands)]

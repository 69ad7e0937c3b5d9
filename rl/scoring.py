"""Replay: log-probs of stored trajectories under a policy, with the stored latents fed as
inputs.
"""

from __future__ import annotations

import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.errors import TrajectoryError
from rl.interfaces import Media, MediaSource
from rl.policy.density import log_density
from rl.policy.layout import PackLayout
from rl.policy.model import LatentPolicy
from rl.policy.protocol import Slot
from rl.policy.scores import Scores, ScoreSlots
from rl.trajectory import MediaKey, Trajectory


@dataclass(frozen=True)
class ReplayBatch:
    """B trajectories as one row of T tokens: `[prompt | completion 1 | … | completion G]` for each
    prompt among them.
    """

    inputs: dict[str, Any]  # what the policy's forward takes
    places: torch.Tensor  # int64 [N]: where each scored slot stands among B completions of length C
    latents: torch.Tensor  # [L, H], of the trajectories in order; in `inputs` they are in the row's
    latent_counts: tuple[int, ...]  # of each trajectory
    width: int  # C, of the longest completion

    @property
    def tokens(self) -> int:
        """T, what the model computes."""
        return self.inputs["input_ids"].shape[1]

    def to(self, device: torch.device | str) -> ReplayBatch:
        """The batch on another device; its layout stays Python numbers."""
        moved = {
            name: value.to(device) if hasattr(value, "to") else value
            for name, value in self.inputs.items()
        }
        return dataclasses.replace(
            self, inputs=moved, places=self.places.to(device), latents=self.latents.to(device)
        )


def prompt_groups(trajectories: Sequence[Trajectory]) -> list[list[int]]:
    """The rows of `trajectories` whose prompt and clips are the same, and so are computed once."""
    groups: dict[tuple[Any, ...], list[int]] = {}
    for row, t in enumerate(trajectories):
        groups.setdefault((t.media, t.prompt_ids.tobytes()), []).append(row)
    return list(groups.values())


# Says what to score of trajectories, as `_slots` does and with its arguments.
SlotChooser = Callable[
    [Sequence[Trajectory], LatentPolicy, dict[int, int], dict[int, int], int],
    tuple[ScoreSlots, torch.Tensor],
]


def collate(
    trajectories: Sequence[Trajectory],
    policy: LatentPolicy,
    media: MediaSource,
    *,
    slots: SlotChooser | None = None,
) -> ReplayBatch:
    """Lay trajectories out for one forward pass of `policy`, their clips fetched from `media` by
    key.

    Trajectories with the same prompt and clips, wherever they stand, share one copy of them, and a
    clip is there once however many prompts show it. `slots` chooses what is scored in the place of
    what the policy decided. Raises `TrajectoryError` for one that was sampled under another
    protocol.
    """
    # Sequences of equal length stand side by side, where attention computes them together.
    groups = [
        sorted(rows, key=lambda row: len(trajectories[row].completion_ids))
        for rows in prompt_groups(trajectories)
    ]
    groups.sort(key=lambda rows: (len(rows) > 1, _length(trajectories[rows[0]])))
    layout = PackLayout.of(
        (
            len(trajectories[rows[0]].prompt_ids),
            [len(trajectories[row].completion_ids) for row in rows],
        )
        for rows in groups
    )
    starts: dict[int, int] = {}  # where each completion begins, and the last token of its prompt
    ends: dict[int, int] = {}
    clips: dict[MediaKey, Media] = {}
    ids, positions, shown = [], [], []
    for group, rows in zip(layout.groups, groups, strict=True):
        first, place = trajectories[rows[0]], group.answers
        shown.extend(first.media)
        clips.update((key, media.get(key)) for key in first.media if key not in clips)
        prompt, behind = _prompt_positions(first, [clips[k] for k in first.media], policy)
        ids.append(first.prompt_ids)
        positions.append(prompt)
        for row in rows:
            completion = trajectories[row].completion_ids
            starts[row], ends[row] = place, group.answers - 1
            ids.append(completion)
            positions.append((behind + torch.arange(len(completion))).expand(3, -1))
            place += len(completion)
    fed = [trajectories[row].latents for rows in groups for row in rows]
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "layout": layout,
        **_clip_inputs(shown, clips),
        "latents": torch.cat(fed),
    }
    width = max(len(t.completion_ids) for t in trajectories)
    inputs["slots"], places = (slots or _slots)(trajectories, policy, starts, ends, width)
    return ReplayBatch(
        inputs,
        places,
        torch.cat([t.latents for t in trajectories]),
        tuple(len(t.latents) for t in trajectories),
        width,
    )


def _length(trajectory: Trajectory) -> int:
    return len(trajectory.prompt_ids) + len(trajectory.completion_ids)


def _slots(
    trajectories: Sequence[Trajectory],
    policy: LatentPolicy,
    starts: dict[int, int],
    ends: dict[int, int],
    width: int,
) -> tuple[ScoreSlots, torch.Tensor]:
    """What to score, trajectory by trajectory, and the places of the results in [B, C]. In the row,
    the completion of trajectory i begins at `starts[i]`, and its prompt's last token is `ends[i]`.
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    places = []
    for row, t in enumerate(trajectories):
        trace = policy.protocol.trace(t.completion_ids, policy.latent_tokens, t.sampling.imagine)
        if not np.array_equal(trace.slots, t.decision):
            raise TrajectoryError(
                f"trajectory of sample {t.sample_id!r}: its decisions are not those the policy's "
                "protocol allows; it was sampled under another protocol"
            )
        before = starts[row] - 1 + np.arange(len(t.completion_ids))
        before[0] = ends[row]
        at = (trace.slots != Slot.FORCED).nonzero()[0]
        # A greedy trajectory is scored at temperature 1: its own distribution is a point.
        heat = np.full(len(at), t.sampling.temperature or 1.0, dtype=np.float32)
        for name, values in (
            ("rows", before[at]),
            ("ids", t.completion_ids[at]),
            ("kinds", trace.slots[at]),
            ("may_start", trace.may_start[at]),
            ("temperature", heat),
            ("kept", t.kept[at]),
            ("latent_rows", before[t.completion_ids == t.filler]),
        ):
            parts[name].append(values)
        places.append(row * width + at)
    joined = {name: torch.from_numpy(np.concatenate(values)) for name, values in parts.items()}
    most = int(joined["kept"].max()) if len(joined["kept"]) else 0
    return ScoreSlots(**joined, most_kept=most, plain=False), torch.from_numpy(
        np.concatenate(places)
    )


def _prompt_positions(
    trajectory: Trajectory, clips: Sequence[Media], policy: LatentPolicy
) -> tuple[torch.Tensor, int]:
    """Positions [3, P] of a prompt, and the one behind it."""
    ids = torch.tensor(trajectory.prompt_ids)[None]  # a copy: what Ray hands over is read-only
    positions, behind = policy.position_ids(
        {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "mm_token_type_ids": media_types(ids, policy.config),
            **{
                name: torch.cat([clip.inputs[name] for clip in clips])
                for name in (clips[0].inputs if clips else {})
                if name != "pixel_values_videos"
            },
        }
    )
    return positions[:, 0], int(behind)


def _clip_inputs(shown: Sequence[MediaKey], clips: dict[MediaKey, Media]) -> dict[str, Any]:
    """The tensors of the distinct clips, the grid of every clip that is shown, and which of the
    distinct ones each of these is.
    """
    if not shown:
        return {}
    order = {key: index for index, key in enumerate(clips)}
    return {
        "pixel_values_videos": torch.cat([c.inputs["pixel_values_videos"] for c in clips.values()]),
        "video_grid_thw": torch.cat([clips[key].inputs["video_grid_thw"] for key in shown]),
        "clips": tuple(order[key] for key in shown),
    }


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
    tokens: int  # T, what the model computed for it


def replay(model: Callable[..., Scores], batch: ReplayBatch, policy: LatentPolicy) -> Replay:
    """Score a batch. `model` is `policy` itself or the wrapper (DDP, FSDP, PEFT) through which it
    must be called.
    """
    scores = model(**batch.inputs)
    shape = len(batch.latent_counts), batch.width
    blank = torch.zeros(shape, device=scores.logprobs.device).flatten()
    scale = policy.protocol.noise_scale
    return Replay(
        logprobs=blank.scatter(0, batch.places, scores.logprobs).view(shape),
        entropies=blank.scatter(0, batch.places, scores.entropies).view(shape),
        means=scores.means,
        latent_logprobs=log_density(batch.latents, scores.means, scale, policy.protocol.density)
        if scale > 0
        else None,
        tokens=batch.tokens,
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

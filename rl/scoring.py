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
from rl.policy.settings import placeholder_ids
from rl.policy.video_tokens import VideoRows
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


# Says what to score of trajectories, as `decision_slots` does and with its arguments.
SlotChooser = Callable[
    [Sequence[Trajectory], LatentPolicy, Sequence[np.ndarray], int],
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
    replays = policy.modules_config.visual_replay is not None
    for t in trajectories:
        if len(t.latents) and (t.replayed is not None) != replays:
            raise TrajectoryError(
                f"trajectory of sample {t.sample_id!r} was sampled "
                f"{'without' if replays else 'with'} visual replay, and the policy scores "
                f"{'with' if replays else 'without'} it; they must be of one policy"
            )
    # Sequences of equal length stand side by side, where attention computes them together.
    laid = [_Completion.of(t) for t in trajectories]
    lengths = [len(t.prompt_ids) + len(c.ids) for t, c in zip(trajectories, laid, strict=True)]
    shared = prompt_groups(trajectories)
    if not policy.modules_config.shares_prompts:
        shared = [[row] for rows in shared for row in rows]
    groups = [sorted(rows, key=lengths.__getitem__) for rows in shared]
    groups.sort(key=lambda rows: (len(rows) > 1, lengths[rows[0]]))
    layout = PackLayout.of(
        (len(trajectories[rows[0]].prompt_ids), [len(laid[row].ids) for row in rows])
        for rows in groups
    )
    before: list[np.ndarray] = [np.empty(0, np.int64)] * len(trajectories)
    clips: dict[MediaKey, Media] = {}
    ids, positions, shown = [], [], []
    video = _VideoPlaces(policy)
    for number, (group, rows) in enumerate(zip(layout.groups, groups, strict=True)):
        first, place = trajectories[rows[0]], group.answers
        shown.extend(first.media)
        clips.update((key, media.get(key)) for key in first.media if key not in clips)
        prompt, behind = _prompt_positions(first, [clips[k] for k in first.media], policy)
        tokens = video.prompt(first.prompt_ids, group.start, number)
        ids.append(first.prompt_ids)
        positions.append(prompt)
        for row in rows:
            completion = laid[row]
            before[row] = completion.before(place, group.answers - 1)
            ids.append(completion.ids)
            positions.append(completion.positions(behind, prompt[:, tokens]))
            video.completion(completion, place, tokens + group.start, number)
            place += len(completion.ids)
    fed = [trajectories[row].latents for rows in groups for row in rows]
    inputs: dict[str, Any] = {
        "input_ids": torch.from_numpy(np.concatenate(ids))[None],
        "position_ids": torch.cat(positions, dim=1)[:, None],
        "layout": layout,
        **_clip_inputs(shown, clips),
        "latents": torch.cat(fed),
    }
    width = max(len(t.completion_ids) for t in trajectories)
    inputs["slots"], places = (slots or decision_slots)(trajectories, policy, before, width)
    if policy.modules_config.wants_video:
        group_of = {row: number for number, rows in enumerate(groups) for row in rows}
        inputs["video"] = video.rows(
            [group_of[row] for row, t in enumerate(trajectories) for _ in range(len(t.latents))]
        )
    return ReplayBatch(
        inputs,
        places,
        torch.cat([t.latents for t in trajectories]),
        tuple(len(t.latents) for t in trajectories),
        width,
    )


@dataclass(frozen=True)
class _Completion:
    """A completion as the model sees it, with the video tokens that are shown again before its
    latents.
    """

    ids: np.ndarray  # int64 [C + R]
    at: np.ndarray  # int64 [C], where the completion's own tokens stand among them
    again: np.ndarray  # int64 [R], where the others do
    sources: np.ndarray  # int64 [R], which of the prompt's video tokens they are

    @classmethod
    def of(cls, t: Trajectory) -> _Completion:
        length = len(t.completion_ids)
        shown = np.zeros(length, np.int64)  # how many are shown again right before each token
        sources = np.empty(0, np.int64)
        if t.replayed is not None:
            there = t.replayed >= 0
            shown[t.completion_ids == t.filler] = there.sum(1)
            sources = t.replayed[there].astype(np.int64)
        at = np.arange(length) + shown.cumsum()
        own = np.zeros(length + len(sources), dtype=bool)
        own[at] = True
        # Whatever ids the others have, their embeddings are put in their places.
        ids = np.zeros(len(own), np.int64)
        ids[at] = t.completion_ids
        return cls(ids, at, (~own).nonzero()[0], sources)

    def before(self, place: int, prompt_end: int) -> np.ndarray:
        """Which hidden state of the row decides at each token [C], if this begins at `place`: that
        of the token before, which is none that is shown again.
        """
        return np.concatenate([[prompt_end], place + self.at[:-1]])

    def positions(self, behind: int, video: torch.Tensor) -> torch.Tensor:
        """[3, C + R]: from `behind` on, and those of the prompt's video tokens [3, V] again."""
        found = torch.empty(3, len(self.ids), dtype=torch.long)
        found[:, self.at] = behind + torch.arange(len(self.at))
        found[:, self.again] = video[:, self.sources]
        return found


class _VideoPlaces:
    """Collects where a row has video tokens, for policies whose modules need to know."""

    def __init__(self, policy: LatentPolicy) -> None:
        self._ids = placeholder_ids(policy.config)
        self._parts: dict[str, list[np.ndarray]] = defaultdict(list)

    def prompt(self, prompt_ids: np.ndarray, start: int, group: int) -> np.ndarray:
        """Takes in a prompt that begins at `start`; where in it its video tokens are [V]."""
        found = np.isin(prompt_ids, self._ids).nonzero()[0]
        self._parts["rows"].append(found + start)
        self._parts["groups"].append(np.full(len(found), group))
        return found

    def completion(self, laid: _Completion, place: int, tokens: np.ndarray, group: int) -> None:
        """Takes in a completion at `place`, whose prompt's video tokens stand at `tokens`."""
        self._parts["replayed"].append(laid.again + place)
        self._parts["sources"].append(tokens[laid.sources])

    def rows(self, latent_groups: Sequence[int]) -> VideoRows:
        parts = {name: np.concatenate(values) for name, values in self._parts.items()}
        parts["latent_groups"] = np.array(latent_groups, dtype=np.int64)
        return VideoRows(**{name: torch.from_numpy(value) for name, value in parts.items()})


def decision_slots(
    trajectories: Sequence[Trajectory],
    policy: LatentPolicy,
    before: Sequence[np.ndarray],
    width: int,
) -> tuple[ScoreSlots, torch.Tensor]:
    """What to score, trajectory by trajectory, and the places of the results in [B, C]; `before`
    says for each trajectory which hidden state decides at each of its tokens [C].
    """
    parts: dict[str, list[np.ndarray]] = defaultdict(list)
    places = []
    for row, (t, deciding) in enumerate(zip(trajectories, before, strict=True)):
        trace = policy.protocol.trace(t.completion_ids, policy.latent_tokens, t.sampling.imagine)
        if not np.array_equal(trace.slots, t.decision):
            raise TrajectoryError(
                f"trajectory of sample {t.sample_id!r}: its decisions are not those the policy's "
                "protocol allows; it was sampled under another protocol"
            )
        at = (trace.slots != Slot.FORCED).nonzero()[0]
        # A greedy trajectory is scored at temperature 1: its own distribution is a point.
        heat = np.full(len(at), t.sampling.temperature or 1.0, dtype=np.float32)
        for name, values in (
            ("rows", deciding[at]),
            ("ids", t.completion_ids[at]),
            ("kinds", trace.slots[at]),
            ("may_start", trace.may_start[at]),
            ("temperature", heat),
            ("kept", t.kept[at]),
            ("latent_rows", deciding[t.completion_ids == t.filler]),
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


def prompt_inputs(
    policy: Any, prompts: Sequence[np.ndarray], clips: Sequence[Sequence[Media]], pad: int
) -> dict[str, torch.Tensor]:
    """What `policy` takes for prompts alone, int64 [P_i] each, left-padded with `pad`, which show
    these clips.
    """
    width = max(len(p) for p in prompts)
    ids = torch.full((len(prompts), width), pad)
    mask = torch.zeros_like(ids)
    for row, prompt in enumerate(prompts):
        ids[row, width - len(prompt) :] = torch.as_tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    tensors = [clip.inputs for group in clips for clip in group]
    batch = {
        "input_ids": ids,
        "attention_mask": mask,
        "mm_token_type_ids": media_types(ids, policy.config),
        **{name: torch.cat([t[name] for t in tensors]) for name in (tensors[0] if tensors else {})},
    }
    if "pixel_values_videos" in batch:
        batch["pixel_values_videos"] = batch["pixel_values_videos"].to(policy.dtype)
    return {name: tensor.to(policy.device) for name, tensor in batch.items()}


@dataclass(frozen=True)
class Replay:
    """A replayed batch of B trajectories with completions padded to C, and L latents in all."""

    logprobs: torch.Tensor  # float32 [B, C]
    entropies: torch.Tensor  # float32 [B, C]
    means: torch.Tensor  # [L, H]
    latent_logprobs: torch.Tensor | None  # float64 [L]; None when the policy has no noise
    tokens: int  # T, what the model computed for it
    depth: torch.Tensor | None = None  # share of tokens that take a second pass, a scalar


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
        depth=scores.depth,
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

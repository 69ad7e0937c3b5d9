"""Latent self-forcing: the policy thinks in its own latents while it learns, and gradients flow
back through them.

There is nothing to imitate: rows are plain questions about videos with their answers. The latents
of a row, a span at the start of its completion, are made one after the other by the policy in
training, each from the state behind the one before, as in Coconut (arXiv 2412.06769); the loss of
what follows goes back through them, through all or the last m. Two terms keep them about the video
and apart: each latent is pulled to its segment of the video, and away from the others.

Only the abstract of VideoLatent (arXiv 2606.22870) is public: latent self-forcing with alignment
and diversity objectives. Everything else here is our reconstruction.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from rl.errors import DataError
from rl.interfaces import Media, MediaSource
from rl.policy.depth import counted_depth, second_pass_share
from rl.policy.model import LatentPolicy
from rl.policy.scores import Scores
from rl.policy.unroll import Unroll
from rl.policy.visual_replay import region_target
from rl.scoring import collate, decision_slots, prompt_inputs
from rl.sft.own_latents import in_eval_mode
from rl.trajectory import Trajectory

AlignTo = Literal["segments", "question"]


@dataclass(frozen=True)
class SelfForced:
    """What came of B rows with L latents in all. The terms are means over the latents."""

    scores: Scores  # of what was decided [N], and the means [L, H] of the latents
    align: torch.Tensor  # mean 1 - cos(z, segment)
    diversity: torch.Tensor  # mean over rows of cos² between their latents
    replay: torch.Tensor  # mean squared error of what was shown again and its region
    neighbours: torch.Tensor  # [K], cosines of latents that follow one another


def self_forced(
    policy: LatentPolicy,
    rows: Sequence[Trajectory],
    media: MediaSource,
    *,
    steps: int | None = None,
    align_to: AlignTo = "segments",
) -> SelfForced:
    """Run `rows`, whose latents are placeholders, with latents of the policy's own. Gradients flow
    back through the last `steps` latents of a row (None: all); those before are constants to what
    follows, and have only their own alignment. Raises `DataError` for a row with a span elsewhere
    than at its start.
    """
    # Of one length each: padding takes a mask, with which attention copies its keys once a head.
    alike: dict[tuple[int, int], list[Trajectory]] = defaultdict(list)
    for row in rows:
        tokens = policy.latent_tokens
        if len(row.span_lengths) > 1 or (
            row.span_lengths and row.completion_ids[0] != tokens.start
        ):
            raise DataError(
                f"sample {row.sample_id!r}: self-forcing takes one latent span, at the start of "
                "the completion; use train.latents: own for rows with others"
            )
        alike[len(row.latents), len(row.prompt_ids)].append(row)
    parts = []
    with counted_depth() as levels:
        for (count, _), group in sorted(alike.items()):
            if count:
                clips = [[media.get(key) for key in row.media] for row in group]
                parts.append(_unrolled(policy, group, clips, count, steps, align_to))
            else:
                scores = policy(**collate(group, policy, media).to(policy.device).inputs)
                nothing = scores.means.sum()
                parts.append(SelfForced(scores, nothing, nothing, nothing, scores.means[:, 0]))
    latents = sum(len(part.scores.means) for part in parts)

    def mean(name: str) -> torch.Tensor:
        values = [getattr(part, name) * len(part.scores.means) for part in parts]
        return torch.stack(values).sum() / max(latents, 1)

    scores = Scores(
        torch.cat([part.scores.logprobs for part in parts]),
        torch.cat([part.scores.entropies for part in parts]),
        torch.cat([part.scores.means for part in parts]),
        second_pass_share(levels),
    )
    neighbours = torch.cat([part.neighbours for part in parts])
    return SelfForced(scores, mean("align"), mean("diversity"), mean("replay"), neighbours)


def _unrolled(
    policy: Any,
    rows: Sequence[Trajectory],
    clips: Sequence[Sequence[Media]],
    count: int,
    steps: int | None,
    align_to: AlignTo,
) -> SelfForced:
    """B rows of `count` latents each."""
    start, filler = policy.latent_tokens.start, policy.latent_tokens.filler
    pad = policy.latent_tokens.end  # which is masked wherever it pads
    prompts = [np.append(row.prompt_ids, start) for row in rows]
    inputs = prompt_inputs(policy, prompts, clips, pad)
    unroll = Unroll(policy, inputs, tail=2, look=True, ask=align_to == "question")
    hidden = [unroll.tail]
    fillers = inputs["input_ids"].new_full((len(rows), count), filler)
    constant = 0 if steps is None else max(0, count - steps)
    replayed = []
    if constant:
        with in_eval_mode(policy):  # where nothing is learned, nothing drops out
            fed, replayed = _alone(unroll.detached(), fillers[:, :constant])
        again = torch.stack(replayed, 1) if replayed else None
        hidden.append(unroll.extend(fillers[:, :constant], fed.flatten(0, 1), replays=again))
    # The means of constants hang on the states before them, and are not what was fed.
    means = [unroll.means_of(torch.cat(hidden, 1)[:, 1 : constant + 1])] if constant else []
    for step in range(constant, count):
        means.append(unroll.means()[:, None])
        unroll.feed(fillers[:, step], means[-1][:, 0])
        hidden.append(unroll.hidden[:, None])
        if unroll.replayed is not None:
            replayed.append(unroll.replayed)
    latents = torch.cat(means, 1)
    rest, real = _behind(rows, count, inputs["input_ids"], pad)
    hidden.append(unroll.extend(rest, latents[:0, 0], real=real))
    states = torch.cat(hidden, 1)
    places = [np.arange(len(r.completion_ids)) + i * states.shape[1] for i, r in enumerate(rows)]
    slots, _ = decision_slots(rows, policy, places, states.shape[1])
    slots = replace(slots, latent_rows=slots.latent_rows[:0]).to(states.device)
    scores = replace(policy.score(states, slots), means=latents.flatten(0, 1))
    features, grids = unroll.videos.features, [_grid(group, policy) for group in clips]
    return SelfForced(
        scores,
        alignment_loss(latents, segments(features, grids, count, unroll.question)),
        diversity_loss(latents),
        _replay_loss(policy, features, grids, replayed),
        F.cosine_similarity(latents[:, 1:].float(), latents[:, :-1].float(), dim=-1).flatten(),
    )


@torch.no_grad()
def _alone(unroll: Unroll, fillers: torch.Tensor) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """The latents [B, n, H] that the policy makes at `fillers` [B, n], and which video tokens it
    showed again before each, [B, k].
    """
    latents, replayed = [], []
    for ids in fillers.unbind(1):
        latents.append(unroll.means())
        unroll.feed(ids, latents[-1])
        if unroll.replayed is not None:
            replayed.append(unroll.replayed)
    return torch.stack(latents, 1), replayed


def _behind(
    rows: Sequence[Trajectory], count: int, like: torch.Tensor, pad: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """What follows the latents of each row, int64 [B, A], and where it is no padding."""
    parts = [torch.from_numpy(row.completion_ids[1 + count :]) for row in rows]
    ids = torch.nn.utils.rnn.pad_sequence(parts, batch_first=True, padding_value=pad)
    lengths = torch.tensor([len(part) for part in parts])
    real = torch.arange(ids.shape[1]) < lengths[:, None]
    return ids.to(like.device), real.to(like.device)


def _grid(clips: Sequence[Media], policy: Any) -> tuple[int, int, int]:
    """How many merged tokens the clip of a prompt has in time, height and width."""
    if len(clips) != 1:
        raise DataError(f"self-forcing takes prompts with one clip, not {len(clips)}")
    frames, rows, columns = clips[0].inputs["video_grid_thw"][0].tolist()
    merge = policy.config.vision_config.spatial_merge_size
    return frames, rows // merge, columns // merge


# -- the terms -------------------------------------------------------------------------------------


def segments(
    features: torch.Tensor,
    grids: Sequence[tuple[int, int, int]],
    count: int,
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """The mean features [B, count, H] of `count` segments of each video, in the order of time,
    without gradient.

    `features` [B, V, H] are those of its tokens, of which ``prod(grid)`` count. A segment is
    a run of temporal patches, of nearly equal numbers; neighbours share one where the numbers do
    not divide, and several have the same one where there are fewer patches than segments. `weights`
    [B, V], of at least 0, make the means weighted ones.
    """
    found = []
    for row, (frames, height, width) in enumerate(grids):
        tokens = features[row, : frames * height * width].detach().float()
        weight = tokens.new_ones(len(tokens)) if weights is None else weights[row, : len(tokens)]
        weight = weight.float().clamp_min(1e-12)[:, None]
        # Weighted sums and weights of the frames, and then of runs of frames.
        sums = torch.cat([tokens * weight, weight], -1).view(frames, height * width, -1).sum(1)
        pooled = F.adaptive_avg_pool1d(sums.T[None], count)[0].T
        found.append(pooled[:, :-1] / pooled[:, -1:])
    return torch.stack(found)


def alignment_loss(latents: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
    """Mean of 1 - cos(z_k, v_k) over latents and their targets, both [B, K, H]: a scalar."""
    return (1.0 - F.cosine_similarity(latents.float(), targets.float(), dim=-1)).mean()


def diversity_loss(latents: torch.Tensor) -> torch.Tensor:
    """Mean of cos²(z_i, z_j) over the pairs i ≠ j of latents [B, K, H] of a row: a scalar, 0 for a
    single latent.
    """
    unit = F.normalize(latents.float(), dim=-1)
    count = latents.shape[1]
    squares = (unit @ unit.transpose(1, 2)).square()
    others = squares.sum() - squares.diagonal(dim1=1, dim2=2).sum()
    return others / max(len(latents) * count * (count - 1), 1)


def _replay_loss(
    policy: Any,
    features: torch.Tensor,
    grids: Sequence[tuple[int, int, int]],
    replayed: Sequence[torch.Tensor],
) -> torch.Tensor:
    """Mean over latents of the squared error, per dimension, between the mean of the tokens shown
    again before one and the mean feature of the densest window of these tokens; 0 for a latent
    before which nothing is, as all of the video was.
    """
    config = policy.modules_config.visual_replay
    if config is None:
        return features.sum() * 0.0
    errors = []
    for places in replayed:
        for row, grid in enumerate(grids):
            own = places[row][places[row] >= 0]
            if len(own):
                tokens = features[row, : int(np.prod(grid))]
                shown = policy.visual_replay(tokens[own]).float().mean(0)
                target = region_target(tokens, own, grid, config.window).float()
                errors.append((shown - target).square().mean())
    latents = len(grids) * len(replayed)
    return torch.stack(errors).sum() / latents if errors else features.sum() * 0.0

"""The record that engines, rewards and the trainer exchange."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch

from rl.errors import TrajectoryError
from rl.policy.protocol import Imagine, Slot

# numpy has no bfloat16: latents are pickled as integers with the same bits.
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@dataclass(frozen=True)
class MediaKey:
    """Names one processed clip without holding a pixel.

    `files` are the images that a clip is made of where there is no video file; `path` then only
    names it in messages. `content` is a fingerprint of what the files hold, where one was taken.
    """

    path: str
    frames: tuple[int, ...]  # indices into the file, in order
    processor: str  # fingerprint of the processor that turns frames into tensors
    files: tuple[str, ...] = ()
    content: str = ""


@dataclass(frozen=True)
class Sample:
    """One manifest row, checked.

    `question` is the user's text, `answer` the reference answer and `options` the choices it was
    taken from (empty for open answers). `frames` are the frame indices shown to the model;
    `imagine` lists, for each latent span that SFT should teach, the frame indices it should depict,
    and `reasoning` the texts around those spans: before the first, between, and behind the last
    (one more than spans; one text where there are no spans; none where there is nothing to teach).

    `window` is the part of the video that counts, in seconds. With a `pool`, `frames` and `imagine`
    do not count frames of the file but places (from 0) among so many spread over it
    (`rl.data.frames.pool_indices`).
    `images` are the files of a clip that is no video file; `video` then names it in messages.
    `extra` holds the other columns, for rewards.
    """

    id: str
    video: str
    question: str
    answer: str
    options: tuple[str, ...] = ()
    frames: tuple[int, ...] = ()
    imagine: tuple[tuple[int, ...], ...] = ()
    extra: dict[str, Any] = field(default_factory=dict)
    reasoning: tuple[str, ...] = ()
    window: tuple[float, float] | None = None
    pool: int = 0
    images: tuple[str, ...] = ()


@dataclass(frozen=True)
class Sampling:
    """How to sample. `temperature` 0 means greedy: the likeliest token and decision, and each
    latent its mean.

    `imagine`: "free" lets the policy open spans, "always" forces one at the start, "never" forbids
    them. `top_k` (0: no limit) and `top_p` (1: no limit) truncate the distribution of free tokens:
    to the likeliest k, then to the fewest of those whose mass reaches p (see
    `rl.policy.scores.truncate`). Decisions and latents are never truncated, nor is greedy sampling.
    Raises `TrajectoryError`.
    """

    temperature: float = 1.0
    max_new_tokens: int = 256
    imagine: Imagine = "free"
    top_p: float = 1.0
    top_k: int = 0

    def __post_init__(self) -> None:
        if not 0.0 < self.top_p <= 1.0:
            raise TrajectoryError(
                f"top_p is {self.top_p}; it must be above 0 and at most 1, which keeps all tokens"
            )
        if self.top_k < 0:
            raise TrajectoryError(
                f"top_k is {self.top_k}; it must be at least 0, which keeps all tokens"
            )

    @property
    def truncated(self) -> bool:
        """Whether free tokens are drawn from fewer than all tokens that are allowed."""
        return self.temperature > 0 and (self.top_p < 1.0 or self.top_k > 0)


@dataclass(frozen=True)
class RolloutRequest:
    """Sample `len(seeds)` trajectories of one prompt. `media` is filled in from the sample when
    empty.
    """

    sample: Sample
    seeds: tuple[int, ...]
    sampling: Sampling = Sampling()


@dataclass(frozen=True)
class Trajectory:
    """One sampled completion: C tokens, among them L latents of width H.

    `logprobs[t]` is the sampler's own log-probability of what was decided at position t, under its
    temperature, bans and truncation: of the token at a TOKEN slot, of ending or continuing at a
    DECISION slot, 0 where it was forced. `kept[t]` says how many tokens truncated sampling kept at
    a TOKEN slot, 0 where nothing was cut off. `latent_logprobs[l]` is the log-density of
    `latents[l]` (summed over H), 0 when sampling was greedy. `replayed` is set where the policy
    replays video tokens (`rl.policy.visual_replay`): which of its prompt's were shown again before
    each latent, -1 where there were no more.
    """

    sample_id: str
    prompt_ids: np.ndarray  # int64 [P]
    completion_ids: np.ndarray  # int64 [C]
    decision: np.ndarray  # int8 [C], values of `Slot`
    logprobs: np.ndarray  # float32 [C]
    kept: np.ndarray  # int32 [C]
    latents: torch.Tensor  # [L, H], exactly the vectors fed, in the dtype fed
    latent_logprobs: np.ndarray  # float64 [L]
    span_lengths: tuple[int, ...]
    filler: int  # the id that stands at each latent
    media: tuple[MediaKey, ...]  # in the order of the prompt
    policy_version: int
    finish_reason: Literal["stop", "length"]
    sampling: Sampling
    seed: int
    text: str  # the completion decoded, latent markers kept, end-of-sequence dropped
    replayed: np.ndarray | None = None  # int32 [L, k]

    def __post_init__(self) -> None:
        where = f"trajectory of sample {self.sample_id!r}"
        length, latents = len(self.completion_ids), self.latents.shape[0]
        fillers = int((self.completion_ids == self.filler).sum())
        if self.latents.ndim != 2:
            raise TrajectoryError(
                f"{where}: latents have shape {tuple(self.latents.shape)}, not [L, H]"
            )
        if not latents == fillers == sum(self.span_lengths) == len(self.latent_logprobs):
            raise TrajectoryError(
                f"{where}: {latents} latents, {fillers} filler tokens, span lengths that sum to "
                f"{sum(self.span_lengths)} and {len(self.latent_logprobs)} latent log-probs; these "
                "must be equal"
            )
        if not length == len(self.decision) == len(self.logprobs) == len(self.kept):
            raise TrajectoryError(
                f"{where}: {length} tokens, {len(self.decision)} decisions, {len(self.logprobs)} "
                f"log-probs, {len(self.kept)} kept counts; these must be equal"
            )
        if self.replayed is not None and (self.replayed.ndim != 2 or len(self.replayed) != latents):
            raise TrajectoryError(
                f"{where}: replayed tokens have shape {self.replayed.shape} for {latents} latents; "
                "they need one row a latent"
            )
        if len(self.prompt_ids) == 0 or length == 0:
            raise TrajectoryError(f"{where}: the prompt or the completion is empty")
        if self.logprobs[self.decision == Slot.FORCED].any():
            raise TrajectoryError(
                f"{where}: a forced position has a log-prob; forced positions carry none"
            )
        truncated = (self.decision == Slot.TOKEN) & self.sampling.truncated
        most = self.sampling.top_k or np.iinfo(np.int32).max
        if not np.array_equal(self.kept > 0, truncated) or not (
            np.all(self.kept >= 0) and np.all(self.kept <= most)
        ):
            raise TrajectoryError(
                f"{where}: its kept counts do not fit temperature {self.sampling.temperature}, "
                f"top_p {self.sampling.top_p} and top_k {self.sampling.top_k}; they are above 0 "
                "(and at most top_k) at free tokens if sampling was truncated, and 0 elsewhere"
            )

    def __getstate__(self) -> dict[str, Any]:
        """Latents as an array, which travels between processes several times faster than a tensor
        does.
        """
        dtype = self.latents.dtype
        bits = self.latents.contiguous().view(_SAME_SIZE[dtype.itemsize]).numpy()
        return vars(self) | {"latents": (bits, dtype)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        bits, dtype = state["latents"]
        # A copy: what comes from Ray's object store must not be written to.
        self.__dict__.update(state, latents=torch.from_numpy(bits.copy()).view(dtype))

    @property
    def imagined(self) -> bool:
        """Whether it has at least one latent."""
        return bool(self.latents.shape[0])

    @property
    def row_tokens(self) -> int:
        """How many tokens the model computes for it in a replay, beside its prompt."""
        again = 0 if self.replayed is None else int((self.replayed >= 0).sum())
        return len(self.completion_ids) + again

    def spans(self) -> list[torch.Tensor]:
        """The latents span by span: tensors [T_j, H]."""
        return list(self.latents.split(list(self.span_lengths))) if self.span_lengths else []


@dataclass(frozen=True)
class TrajectoryGroup:
    """The G trajectories of one prompt."""

    sample: Sample
    trajectories: tuple[Trajectory, ...]

    def __post_init__(self) -> None:
        for t in self.trajectories:
            if t.sample_id != self.sample.id:
                raise TrajectoryError(
                    f"group of sample {self.sample.id!r} holds a trajectory of {t.sample_id!r}"
                )

    def __len__(self) -> int:
        return len(self.trajectories)

    def __iter__(self) -> Iterator[Trajectory]:
        return iter(self.trajectories)

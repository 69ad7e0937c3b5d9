"""What the trainer asks of the parts it does not import: engines, media, rewards."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from rl.errors import VideoError
from rl.trajectory import MediaKey, RolloutRequest, Sample, TrajectoryGroup


@dataclass(frozen=True)
class Media:
    """One clip, processed: the tensors a model's forward takes, and when its frames were.

    `inputs` holds `pixel_values_videos` [N, D], `video_grid_thw` [1, 3] and whatever else the model
    family needs (`second_per_grid_ts` [1] for Qwen2.5-VL). `placeholder` is the text that replaces
    the clip's one video token in the prompt (timestamps and as many video tokens as the clip has
    merged patches).
    """

    key: MediaKey
    inputs: dict[str, torch.Tensor]
    placeholder: str
    timestamps: tuple[float, ...] = ()  # seconds, one a frame


@dataclass(frozen=True)
class WeightUpdate:
    """Parameters of one policy version, by the names of the policy's own state dict."""

    version: int
    state: dict[str, torch.Tensor]
    checksum: str


class MediaSource(Protocol):
    """Hands out processed clips by key."""

    def get(self, key: MediaKey) -> Media: ...


class Engine(Protocol):
    """Samples latent trajectories of one policy version."""

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]: ...

    def update_weights(self, update: WeightUpdate) -> int: ...

    def health(self) -> dict[str, Any]: ...


class Rollouts(Engine, Protocol):
    """An engine, or a fleet of them, together with the media its trajectories refer to."""

    @property
    def media(self) -> MediaSource: ...

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        """Decode and process the clips of `samples`, for `generate` to find, and say of those that
        cannot be shown why: errors that name sample and file, by the samples' ids.
        """
        ...


@dataclass(frozen=True)
class GroupScores:
    """Rewards of one group of G trajectories. NaN stands for "no value".

    `components[name]` are the unweighted values [G] of one reward; `outcome` [G] is 1 for right, 0
    for wrong. `gated`: shaping must not teach in this group. `invalid[name]` says of each
    trajectory why it has no value of that reward, "" where nothing went wrong; rewards without a
    fault are left out.
    """

    outcome: list[float]
    components: dict[str, list[float]] = field(default_factory=dict)
    gated: bool = False
    invalid: dict[str, list[str]] = field(default_factory=dict)


@dataclass(frozen=True)
class ScoringLog:
    """What scoring has to say beside the scores, since it was last asked.

    `metrics` are numbers by name, in the order they were logged; `extras` columns of the
    completions table, one value a trajectory of the last `Scorer.score`.
    """

    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)


class Scorer(Protocol):
    """Scores groups: first the outcome (which the group filter looks at), then everything else."""

    names: Sequence[str]  # one a reward, the outcome first
    weights: Sequence[float]

    @property
    def wants_shuffled(self) -> bool:
        """Whether `score` needs the outcomes of a control with shuffled frames."""
        ...

    def begin(self, state: Any) -> None:
        """Where training is (transformers' `TrainerState`), for what is scored from here on."""
        ...

    def outcomes(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]: ...

    def score(
        self,
        groups: Sequence[TrajectoryGroup],
        outcomes: Sequence[Sequence[float]],
        shuffled: Sequence[Sequence[float]] | None = None,
    ) -> list[GroupScores]: ...

    def log(self) -> ScoringLog: ...

"""Do the latents of an answer look like what then happened?

OUR reconstruction, from published parts: Future-L1's SFT teaches the latents of a span to be the
vision tower's features of future frames (`rl.sft.alignment`), and this asks in RL, of rows whose
manifest says which frames those are (`imagine`), how close the sampled latents come to them. Span j
of a trajectory is compared with target j, resampled to the span's length: with T latents and K
targets, latent k meets target floor(k · K / T). Over all latents that meet one,

    R = mean of (1 + cos(z, f)) / 2

which is 1 for latents that point where the features do and 1/2 for unrelated ones. Features of all
frames share most of their direction, so the values of a real tower lie close together and high;
what counts is how they differ inside a group. Spans beyond the targets and targets beyond the spans
are not compared, so another span costs nothing and earns nothing.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from rewards.values import Invalid, Value
from rl.data.video import TIMEOUT_S
from rl.errors import RecipeError, RewardError, VideoError

if TYPE_CHECKING:
    from rl.trajectory import Trajectory

Frames = tuple[tuple[int, ...], ...]  # a row's `imagine`
Row = tuple[str, Frames, tuple[float, ...] | None, int, tuple[str, ...]]  # and what its clip is


def latent_alignment(spans: Sequence[np.ndarray], targets: Sequence[np.ndarray]) -> float | None:
    """The reward of one trajectory; see the module for the formula.

    `spans` [T_j, H] are its latents, `targets` [K_j, H] the features. A zero vector is orthogonal
    to everything. None where nothing can be compared. Range: [0, 1]. Raises `RewardError` for
    widths that differ, NaN and infinity.
    """
    values = []
    for span, target in zip(spans, targets, strict=False):
        if not len(span) or not len(target):
            continue
        if span.shape[1] != target.shape[1]:
            raise RewardError(
                f"latent_alignment: latents have width {span.shape[1]} and targets "
                f"{target.shape[1]}; set `policy` to the model that is trained"
            )
        nearest = target[np.arange(len(span)) * len(target) // len(span)]
        values.append(_cosines(span, nearest))
    return float((1.0 + np.concatenate(values)).mean() / 2.0) if values else None


def _cosines(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """Cosine [T] of each row of two arrays [T, H]."""
    norms = np.sqrt(_dots(first, first)) * np.sqrt(_dots(second, second))
    if not np.isfinite(norms).all():
        raise RewardError("latent_alignment: a latent or a target holds NaN or infinity")
    return np.clip(_dots(first, second) / np.where(norms > 0, norms, 1.0), -1.0, 1.0)


def _dots(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    return np.einsum("th,th->t", first, second)


class LatentAlignment:
    """`latent_alignment` of each trajectory, with TRL's signature.

    The targets come from the vision tower of the model in `policy`, as it was saved: training does
    not move them. It is a policy or a plain video model and should be the one that the run starts
    from, with the same `tokens_per_patch` as its SFT, a number or "all". It is loaded at the first
    call, to the GPU if there is one, and only its tower is kept. The targets of the last `capacity`
    rows are kept too.

    Rows without `imagine` and trajectories without latents have no value (None); where a row's
    video cannot be decoded, in `decode_timeout_s` seconds a reader, its trajectories are `Invalid`.
    Range: [0, 1].
    """

    range = (0.0, 1.0)

    def __init__(
        self,
        *,
        policy: str,
        tokens_per_patch: int | Literal["all"] = 1,
        capacity: int = 1024,
        decode_timeout_s: float = TIMEOUT_S,
    ) -> None:
        if not isinstance(policy, str) or not policy.strip():
            raise RecipeError(
                f"latent_alignment: policy is {policy!r}; it must be a model's folder"
            )
        if tokens_per_patch != "all" and not _is_count(tokens_per_patch):
            raise RecipeError(
                f"latent_alignment: tokens_per_patch is {tokens_per_patch!r}; it must be at least "
                "1, or all"
            )
        if not _is_count(capacity):
            raise RecipeError(f"latent_alignment: capacity is {capacity!r}; it must be at least 1")
        if type(decode_timeout_s) not in (int, float) or not 0 < decode_timeout_s < np.inf:
            raise RecipeError(
                f"latent_alignment: decode_timeout_s is {decode_timeout_s!r}; give seconds above 0"
            )
        self.policy = policy
        self.tokens_per_patch: int | Literal["all"] = tokens_per_patch
        self.capacity = capacity
        self.decode_timeout_s = decode_timeout_s
        self._tower: tuple[Any, Any] | None = (
            None  # the model that has nothing else left, and media
        )
        self._targets: OrderedDict[Row, list[np.ndarray]] = OrderedDict()

    def __call__(
        self,
        *,
        trajectories: Sequence[Trajectory],
        id: Sequence[str],
        video: Sequence[str],
        imagine: Sequence[Sequence[Sequence[int]]],
        window: Sequence[Sequence[float] | None],
        pool: Sequence[int],
        images: Sequence[Sequence[str]],
        **_: Any,
    ) -> list[Value]:
        """One value a trajectory. `id` to `images`: manifest columns, which say as in
        `rl.trajectory.Sample` what the spans depict.
        """
        values: list[Value] = []
        failed: dict[Row, Invalid] = {}  # for this call; the next one tries again
        columns = zip(trajectories, id, video, imagine, window, pool, images, strict=True)
        for trajectory, name, path, spans, part, places, files in columns:
            row: Row = (
                path,
                tuple(tuple(frames) for frames in spans or ()),
                None if part is None else tuple(part),
                places,
                tuple(files),
            )
            if not row[1] or not trajectory.imagined:
                values.append(None)
                continue
            if row not in failed:
                try:
                    targets = self._of(row)
                except VideoError as error:
                    failed[row] = Invalid(f"sample {name!r} has no targets: {error}")
                else:
                    latents = [span.float().cpu().numpy() for span in trajectory.spans()]
                    values.append(latent_alignment(latents, targets))
                    continue
            values.append(failed[row])
        return values

    def _of(self, row: Row) -> list[np.ndarray]:
        """The targets of a row, one [K_j, H] a span. Raises `VideoError`."""
        from rl.sft.targets import compute_targets
        from rl.trajectory import Sample

        if row in self._targets:
            self._targets.move_to_end(row)
            return self._targets[row]
        if self._tower is None:
            self._tower = _load_tower(self.policy, self.decode_timeout_s)
        model, media = self._tower
        # A sample a span, so that the targets come back span by span.
        video, imagine, window, pool, images = row
        clip: dict[str, Any] = {"window": window, "pool": pool, "images": images}
        samples = [Sample(video, video, "", "", imagine=(frames,), **clip) for frames in imagine]
        found = compute_targets(model, media, samples, tokens_per_patch=self.tokens_per_patch)
        self._targets[row] = [found.of(i).numpy() for i in range(len(samples))]
        if len(self._targets) > self.capacity:
            self._targets.popitem(last=False)
        return self._targets[row]


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def _load_tower(path: str, decode_timeout_s: float) -> tuple[Any, Any]:
    """The model in `path`, of whose weights only the vision tower's are left, and its media
    processor. Raises `RecipeError` if there is no model.
    """
    import torch
    from transformers import AutoProcessor

    from rl.data.media import MediaProcessor
    from rl.export import is_policy
    from rl.policy.loading import load_policy, make_policy
    from rl.policy.vision import vision_tower

    try:
        processor = AutoProcessor.from_pretrained(path)
        if is_policy(Path(path)):
            model = load_policy(path, dtype="auto")
        else:
            model = make_policy(path, processor, dtype="auto")
    except (OSError, ValueError) as error:  # what transformers raises where there is no model
        raise RecipeError(
            f"latent_alignment: policy {path!r} cannot be loaded: {error}. Give the folder of a "
            "policy or of a video model with its processor"
        ) from error
    kept = {id(weight) for weight in vision_tower(model).parameters()}
    for module in model.modules():
        for name, weight in module._parameters.items():
            if id(weight) not in kept:
                module._parameters[name] = None
    model.eval().requires_grad_(False).to("cuda" if torch.cuda.is_available() else "cpu")
    # Its frame rule is never asked: rows list the frames of their targets.
    return model, MediaProcessor(processor, decode_timeout_s=decode_timeout_s)

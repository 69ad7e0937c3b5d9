"""Targets on disk: computed by the first run, read by those that would compute the same."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from rl.data.media import MediaProcessor
from rl.errors import DataError, VideoError, VideoTimeoutError
from rl.policy.model import LatentPolicy
from rl.policy.vision import vision_tower
from rl.sft.target_clips import TargetClips, TokensPerPatch
from rl.sft.targets import OnBroken, Progress, Targets, compute_targets
from rl.trajectory import Sample
from rl.weights import state_checksum
from rl.writing import write_whole


@dataclass(frozen=True)
class _Origin:
    """Digests of all that targets depend on. The names are those of messages."""

    tower: str
    processor: str
    rows: str
    settings: str

    @classmethod
    def of(
        cls,
        policy: LatentPolicy,
        media: MediaProcessor,
        samples: Sequence[Sample],
        tokens_per_patch: TokensPerPatch,
    ) -> _Origin:
        budget = policy.protocol.max_length
        clips = TargetClips(media, tokens_per_patch=tokens_per_patch, budget=budget)
        rows = [[_identity(clips, s, span) for span in s.imagine] for s in samples]
        settings = f"{tokens_per_patch} a patch, {clips.budget} a span"
        tower = state_checksum(vision_tower(policy).state_dict())
        return cls(tower, media.fingerprint, _digest(rows), _digest(settings))


def cached_targets(
    path: Path,
    policy: LatentPolicy,
    media: MediaProcessor,
    samples: Sequence[Sample],
    *,
    tokens_per_patch: TokensPerPatch = 1,
    progress: Progress | None = None,
    on_broken: OnBroken | None = None,
    tell: Callable[[str], object] = print,
) -> Targets:
    """`compute_targets`, or what an earlier call with the same tower, processor, rows (and files)
    and settings left in the safetensors file `path`.

    A file of other targets or a damaged one is replaced, and `tell` told why. What could not be
    read when the targets were computed counts as that until its files change; where that was for
    lack of time, no file is written. Raises `DataError` where `path` is a folder, and `VideoError`
    where `on_broken` does not take it.
    """
    if path.is_dir():
        raise DataError(f"target_cache: {path} is a folder; name a file, such as {path}/targets")
    origin = _Origin.of(policy, media, samples, tokens_per_patch)
    if path.exists():
        found = _read(path, origin, samples)
        if not isinstance(found, str):
            targets, broken = found
            for place, reason in broken.items():
                error = VideoError(
                    f"{reason} (so {path} says; delete it to have the file read again)"
                )
                if on_broken is None:
                    raise error
                on_broken(samples[place], error)
            return targets
        tell(f"{path}: {found}; computing the targets anew")
    broken = {}
    late: list[str] = []

    def lose(sample: Sample, error: VideoError) -> None:
        if on_broken is None:
            raise error
        if isinstance(error, VideoTimeoutError):
            late.append(sample.id)
        broken[places[id(sample)]] = str(error)
        on_broken(sample, error)

    places = {id(sample): place for place, sample in enumerate(samples)}
    targets = compute_targets(
        policy,
        media,
        samples,
        tokens_per_patch=tokens_per_patch,
        progress=progress,
        on_broken=lose,
    )
    if late:  # another time it may be faster
        tell(
            f"{path}: not written, because {len(late)} videos took too long, such as {late[0]!r}'s"
        )
    else:
        _write(path, origin, targets, broken)
    return targets


def _write(path: Path, origin: _Origin, targets: Targets, broken: dict[int, str]) -> None:
    lengths = [length for spans in targets.lengths for length in spans]
    tensors = {"features": targets.features, "lengths": torch.tensor(lengths, dtype=torch.int64)}
    written = {**asdict(origin), "broken": json.dumps(broken), "checksum": state_checksum(tensors)}
    write_whole(path, lambda draft: save_file(tensors, draft, metadata=written))


def _read(
    path: Path, origin: _Origin, samples: Sequence[Sample]
) -> tuple[Targets, dict[int, str]] | str:
    """The targets in a file and why samples (by their places) have none; or why it is of no use."""
    wanted = asdict(origin)
    needed = {*wanted, "broken", "checksum"}
    try:
        with safe_open(path, framework="pt") as file:
            written = file.metadata() or {}
            names = {*file.keys()}
            if names != {"features", "lengths"} or not needed <= written.keys():
                return "it holds no targets"
            if changed := [name for name in wanted if written[name] != wanted[name]]:
                return f"it is of other targets ({' and '.join(changed)} changed)"
            tensors = {name: file.get_tensor(name) for name in names}
    except SafetensorError as error:
        return f"it is damaged ({error})"
    if state_checksum(tensors) != written["checksum"]:
        return "it is damaged (its checksum is wrong)"
    broken = {int(place): reason for place, reason in json.loads(written["broken"]).items()}
    lengths = iter(tensors["lengths"].tolist())
    spans = [0 if i in broken else len(s.imagine) for i, s in enumerate(samples)]
    found = [[next(lengths) for _ in range(count)] for count in spans]
    return Targets.of_features(tensors["features"], found), broken


def _identity(clips: TargetClips, sample: Sample, span: Sequence[int]) -> object:
    """What tells a clip from others, also from one that later stands in the same file."""
    try:
        key = clips.key(sample, span)
    except VideoError as error:  # computing the targets will meet it too
        return sample.video, str(error)
    return key.content, key.frames


def _digest(value: object) -> str:
    return hashlib.blake2b(repr(value).encode(), digest_size=16).hexdigest()

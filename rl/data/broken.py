"""Clips that cannot be shown: found before they are needed, counted and listed."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rl.errors import VideoError
from rl.trajectory import MediaKey, Sample

if TYPE_CHECKING:
    from rl.data.media import MediaProcessor
    from rl.interfaces import MediaSource

BadVideos = Literal["stop", "skip", "replace"]


class BrokenClips:
    """The samples of one data set whose clips cannot be shown, and why; none is tried twice.

    Ids name samples within a set only, so each set has an object of its own. `rule` is what is to
    be done about such samples: stop with their error, skip them, or take others in their place.
    With a `path`, which the sets of a run may share, each is also a JSON line there (`id`, `file`,
    `reason`), once, also if the run is resumed; a line that a killed run left unfinished goes.
    """

    def __init__(self, path: Path | None = None, *, rule: BadVideos = "stop") -> None:
        self.rule: BadVideos = rule
        self._path = path
        self._found: dict[str, dict[str, str]] = {}
        self._listed: set[tuple[str, str]] = set()
        if path is not None and path.is_file():
            self._listed = {(row["id"], row["file"]) for row in _whole_lines(path)}

    def add(self, sample: Sample, error: VideoError) -> None:
        """Remember a sample; its `error` says what is wrong with which file."""
        self.note(sample.id, sample.video, str(error))

    def note(self, sample_id: str, file: str, reason: str) -> None:
        """Remember a row that is no sample, its file being missing."""
        if sample_id in self._found:
            return
        row = {"id": sample_id, "file": file, "reason": reason}
        self._found[sample_id] = row
        if self._path is not None and (sample_id, file) not in self._listed:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a", encoding="utf-8") as listed:
                listed.write(json.dumps(row) + "\n")

    @property
    def rows(self) -> list[dict[str, str]]:
        """One for each sample, in the order in which they were found."""
        return list(self._found.values())

    def __contains__(self, sample_id: str) -> bool:
        return sample_id in self._found

    def __len__(self) -> int:
        return len(self._found)


def broken_samples(
    processor: MediaProcessor,
    samples: Sequence[Sample],
    check: Callable[[Iterable[MediaKey]], Mapping[MediaKey, VideoError]],
) -> dict[str, VideoError]:
    """For each of `samples` whose clip cannot be shown the error, which names the sample, by its
    id. `check` is `broken_clips` for one's own source of media.
    """
    found: dict[str, VideoError] = {}
    keys: dict[str, MediaKey] = {}
    for sample in samples:
        try:
            keys[sample.id] = processor.key(sample)
        except VideoError as error:
            found[sample.id] = error
    errors = check(keys.values())
    found |= {name: errors[key] for name, key in keys.items() if key in errors}
    return {s.id: of_sample(s, found[s.id]) for s in samples if s.id in found}


def broken_clips(media: MediaSource, keys: Iterable[MediaKey]) -> dict[MediaKey, VideoError]:
    """Process clips, and return the errors of those that cannot be."""
    found = {}
    for key in dict.fromkeys(keys):
        try:
            media.get(key)
        except VideoError as error:
            found[key] = error
    return found


def _whole_lines(path: Path) -> list[dict[str, str]]:
    """The rows of a file of JSON lines, whose end is cut off where no line ends there."""
    content = path.read_bytes()
    whole = content[: content.rfind(b"\n") + 1]
    if len(whole) < len(content):
        os.truncate(path, len(whole))
    return [json.loads(line) for line in whole.split(b"\n") if line]


def of_sample(sample: Sample, error: VideoError) -> VideoError:
    """The same error, naming the sample too."""
    return type(error)(f"sample {sample.id!r}: {error}")

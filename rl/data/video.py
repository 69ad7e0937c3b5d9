"""Clips: what they hold, and their frames. Everything that decodes does so in a process of its own.

That process (`rl.data.readers`) is started, not forked, at the first clip and serves all that
follow. One that does not answer in time is killed, and so is one that crashed, that has served
many clips or has grown large: decord leaks. Frames come back through shared memory. decord reads
videos; what it cannot read, PyAV tries; Pillow reads images.
"""

from __future__ import annotations

import hashlib
import os
import re
import stat
from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from itertools import zip_longest
from pathlib import Path
from typing import Any

import numpy as np

from rl.data.decoding import Clip, decoder
from rl.data.readers import VideoInfo
from rl.errors import FrameError, VideoError

TIMEOUT_S = 60.0  # for one clip
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

_BLOCK = 1 << 14  # bytes of a file that go into its fingerprint, at its start, middle and end
_REMEMBERED = 1 << 16  # descriptions of clips


def find_clip(path: str | Path, images: Sequence[str] = ()) -> Clip:
    """The clip in a video file, an image file or a folder of images, or made of `images`.

    The fingerprint is of the files' sizes and some of their blocks: it is cheap, and notices that
    a file was replaced or rewritten. Raises `VideoError` for a file that is missing or empty.
    """
    name, files = str(path), tuple(images)
    if not files and os.path.isdir(name):
        files = images_in(name)
        if not files:
            raise VideoError(
                f"{name}: a folder, not a video file, and one without images; correct the path in "
                f"the manifest, or put images in it ({', '.join(IMAGE_SUFFIXES)})"
            )
    marks = [(file, _stat(name, file)) for file in files or (name,)]
    if not files and name.lower().endswith(IMAGE_SUFFIXES):
        files = (name,)
    found = _contents.get((name, files), marks)
    if found is None:
        digest = hashlib.blake2b(digest_size=12)
        for file, (_, size) in marks:
            digest.update(size.to_bytes(8, "big"))
            for block in _blocks(name, file, size):
                digest.update(block)
        found = digest.hexdigest()
        _contents.put((name, files), marks, found)
    return Clip(name, files, found)


def images_in(folder: str) -> tuple[str, ...]:
    """The images in a folder, those with numbers in the order of the numbers."""
    names = [n for n in os.listdir(folder) if n.lower().endswith(IMAGE_SUFFIXES)]
    # isdecimal, not isdigit: "²" is a digit, and no number to `int`.
    parts = {n: [int(p) if p.isdecimal() else p for p in re.split(r"(\d+)", n)] for n in names}
    return tuple(os.path.join(folder, name) for name in sorted(names, key=parts.__getitem__))


def probe(
    path: str | Path, *, images: Sequence[str] = (), timeout_s: float = TIMEOUT_S
) -> VideoInfo:
    """What a clip says about itself. Raises `VideoError` as `read_clip` does."""
    return describe(find_clip(path, images), timeout_s)


def describe(clip: Clip, timeout_s: float = TIMEOUT_S) -> VideoInfo:
    """What a clip says about itself; a clip that did not change is opened once."""
    info = _infos.get((clip.path, clip.files), clip.content)
    if info is None:
        _, info = decoder().read(clip, (), True, timeout_s)
        assert info is not None
        _infos.put((clip.path, clip.files), clip.content, info)
    return info


def read_frames(path: str | Path, indices: Sequence[int], **options: Any) -> np.ndarray:
    """The frames at `indices`, in that order: uint8 [T, H, W, 3]. `options` and errors are those of
    `read_clip`.
    """
    return read_clip(path, indices, **options)[0]


def read_clip(
    path: str | Path,
    indices: Sequence[int],
    *,
    images: Sequence[str] = (),
    timeout_s: float = TIMEOUT_S,
) -> tuple[np.ndarray, VideoInfo]:
    """The frames at `indices`, uint8 [T, H, W, 3] in RGB, and what the clip says about itself.

    Raises `VideoError`, which names the file, if it is missing, empty, no video, truncated or
    without frames, `FrameError` if an index lies outside of it, and `VideoTimeoutError` if a reader
    takes longer than `timeout_s` seconds.
    """
    return read(find_clip(path, images), indices, timeout_s)


def read(
    clip: Clip, indices: Sequence[int], timeout_s: float = TIMEOUT_S
) -> tuple[np.ndarray, VideoInfo]:
    """`read_clip` of a clip that was found."""
    wanted = tuple(int(i) for i in indices)
    if not wanted:
        raise FrameError(f"{clip.path}: no frames were asked for; give at least one frame index")
    frames, info = None, _infos.get((clip.path, clip.files), clip.content)
    if info is None:
        frames, info = decoder().read(clip, wanted, True, timeout_s)
        assert info is not None
        _infos.put((clip.path, clip.files), clip.content, info)
    if outside := [i for i in wanted if not 0 <= i < info.frames]:
        raise FrameError(
            f"{clip.path}: frame {outside[0]} was asked for, but the video has {info.frames} "
            f"frames (0 to {info.frames - 1}); correct the row's `frames` or `imagine`"
        )
    if frames is None:
        frames, _ = decoder().read(clip, wanted, False, timeout_s)
        assert frames is not None
    return frames, info


def read_ahead(clip: Clip, indices: Sequence[int]) -> None:
    """Begin to decode what `read` will be asked for next, while this process does something else.
    Problems come up there.
    """
    unknown = _infos.get((clip.path, clip.files), clip.content) is None
    decoder().begin(clip, tuple(int(i) for i in indices), unknown)


def read_each(
    paths: Iterable[str | Path], indices: Sequence[int], timeout_s: float = TIMEOUT_S
) -> Iterator[np.ndarray]:
    """The same frames of many clips, one after the other: uint8 [T, H, W, 3]. The next one is
    decoded while this process is busy with the last. Errors are those of `read_clip`.
    """
    paths = list(paths)
    for path, behind in zip_longest(paths, paths[1:]):
        frames, _ = read(find_clip(path), indices, timeout_s)
        if behind is not None:
            with suppress(VideoError):  # which comes up again when it is its turn
                read_ahead(find_clip(behind), indices)
        yield frames


# -- what is remembered of files -------------------------------------------------------------------


class _Remembered:
    """Values by name, each valid as long as its mark is."""

    def __init__(self) -> None:
        self._values: OrderedDict[Any, tuple[Any, Any]] = OrderedDict()

    def get(self, name: Any, mark: Any) -> Any:
        known, value = self._values.get(name, (None, None))
        return value if known == mark else None

    def put(self, name: Any, mark: Any, value: Any) -> None:
        self._values[name] = mark, value
        self._values.move_to_end(name)
        if len(self._values) > _REMEMBERED:
            self._values.popitem(last=False)


_contents = _Remembered()
_infos = _Remembered()


def _stat(name: str, file: str) -> tuple[int, int]:
    """When a file was changed, and its size."""
    which = name if file == name else f"{name}: the image {file}"
    try:
        found = os.stat(file)
    except (OSError, ValueError) as error:
        raise VideoError(
            f"{which}: no such video file; correct the path in the manifest"
        ) from error
    if not stat.S_ISREG(found.st_mode):
        raise VideoError(f"{which}: not a regular file; correct the path in the manifest")
    if not found.st_size:
        raise VideoError(f"{which}: the file is empty (0 bytes); copy or download it again")
    return found.st_mtime_ns, found.st_size


def _blocks(name: str, file: str, size: int) -> list[bytes]:
    starts = {0, max(0, size // 2 - _BLOCK // 2), max(0, size - _BLOCK)}
    try:
        with open(file, "rb", buffering=0) as opened:
            return [os.pread(opened.fileno(), _BLOCK, start) for start in sorted(starts)]
    except OSError as error:
        raise VideoError(
            f"{name}: {file} cannot be read ({error.strerror}); check its permissions"
        ) from error

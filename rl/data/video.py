"""Frames out of video files, through decord. This is the one place that meets its errors."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import decord
import numpy as np

from rl.errors import DataError, VideoError

# What FFmpeg would print about a broken file comes back to the user as a VideoError that names it.
decord.logging.set_level(decord.logging.QUIET)

_REMEDY = "check that it plays, re-encode it as H.264 MP4, or remove its rows from the manifest"


@dataclass(frozen=True)
class VideoInfo:
    """What a file says about itself: number of frames, frames a second, and their size in
    pixels.
    """

    frames: int
    fps: float
    height: int
    width: int

    @property
    def seconds(self) -> float:
        return self.frames / self.fps


def probe(path: str | Path) -> VideoInfo:
    """Open the file and decode its first frame. Raises `VideoError` as `read_clip` does."""
    _, info, _ = _open(path)
    return info


def read_frames(path: str | Path, indices: Sequence[int]) -> np.ndarray:
    """The frames at `indices`, in that order: uint8 [T, H, W, 3]. Raises `VideoError` as
    `read_clip` does.
    """
    return read_clip(path, indices)[0]


def read_clip(path: str | Path, indices: Sequence[int]) -> tuple[np.ndarray, VideoInfo]:
    """The frames at `indices`, uint8 [T, H, W, 3] in RGB, and what the file says about itself.

    Raises `VideoError`, which names the file, if it is missing, empty, no video, truncated or
    without frames, and if an index lies outside of it.
    """
    reader, info, padded = _open(path)
    if not indices:
        raise VideoError(f"{path}: no frames were asked for; give at least one frame index")
    if outside := [i for i in indices if not 0 <= i < info.frames]:
        raise VideoError(
            f"{path}: frame {outside[0]} was asked for, but the video has {info.frames} frames (0 "
            f"to {info.frames - 1}); correct the row's `frames` or `imagine`"
        )
    try:
        if padded:
            frames = np.stack([_unpad(reader[int(i)].asnumpy()) for i in indices])
        else:
            frames = reader.get_batch([int(i) for i in indices]).asnumpy()
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(
            f"{path}: decoding stopped among frames {min(indices)} to {max(indices)} of "
            f"{info.frames}; the file is truncated or damaged; {_REMEDY} ({_first_line(error)})"
        ) from error
    return frames, info


def uniform_indices(total: int, count: int) -> tuple[int, ...]:
    """`count` frame indices spread evenly over a video of `total` frames, the first and the last
    among them.

    That is ``round(i · (total - 1) / (count - 1))``, Qwen3-VL's own rule; one index is the middle
    frame, and a video shorter than `count` gives all its frames. Rows that list their `frames` do
    not come here.
    """
    if total < 1 or count < 1:
        raise DataError(
            f"cannot take {count} frames of a video with {total}; both must be at least 1"
        )
    if count == 1:
        return ((total - 1) // 2,)
    return tuple(int(i) for i in np.linspace(0, total - 1, min(count, total)).round())


def _open(path: str | Path) -> tuple[decord.VideoReader, VideoInfo, bool]:
    """A reader, the file's description, and whether its frames come padded (see `_unpad`)."""
    file = Path(path)
    if not file.is_file():
        what = "a folder, not a video file" if file.is_dir() else "no such video file"
        raise VideoError(f"{path}: {what}; correct the path in the manifest")
    if file.stat().st_size == 0:
        raise VideoError(f"{path}: the file is empty (0 bytes); copy or download it again")
    try:
        # One thread: workers decode side by side, and more threads only fight over the cores.
        reader = decord.VideoReader(str(file), num_threads=1)
        frames = len(reader)
        first = reader[0].asnumpy() if frames else None
    except (decord.DECORDError, RuntimeError) as error:
        raise VideoError(
            f"{path}: not a video that can be decoded (no video stream, truncated, or another kind "
            f"of file); {_REMEDY} ({_first_line(error)})"
        ) from error
    if first is None:
        raise VideoError(f"{path}: the video has 0 frames; {_REMEDY}")
    fps = float(reader.get_avg_fps())
    if not (math.isfinite(fps) and fps > 0):
        raise VideoError(
            f"{path}: the file gives {fps} frames a second, so its frames have no times; {_REMEDY}"
        )
    height, width, channels = first.shape
    return reader, VideoInfo(frames, fps, height, width), channels != 3


def _unpad(frame: np.ndarray) -> np.ndarray:
    """Undo decord's reading of line padding as channels: [H, W, >3] to [H, W, 3].

    decord 0.6 takes the bytes of a line over its width for the number of channels. Lines are
    padded, and in videos narrower than 64 pixels (16, 24 or 48, say) the padding fills a "fourth
    channel"; its batch reader fails on them.
    """
    height, width, _ = frame.shape
    return frame.reshape(height, -1)[:, : width * 3].reshape(height, width, 3)


def _first_line(error: Exception) -> str:
    """decord's message without its times, source lines and stack."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", line)[:160]

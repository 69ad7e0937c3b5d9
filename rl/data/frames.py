"""Which frames of a clip are shown: one rule for SFT, RL, evaluation and rewards.

The public code of Future-L1 chooses frames in two ways, one for SFT and one for RL, so that the two
stages see different frames of the same row. Here every stage asks `select_frames`.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal, get_args

import numpy as np

from rl.data.readers import VideoInfo
from rl.errors import DataError, FrameError, RecipeError
from rl.trajectory import Sample

Placement = Literal["ends", "middle"]
_ROUNDING = 1e-6  # of a frame: what times in seconds may be off by


@dataclass(frozen=True)
class FrameRule:
    """How many frames of a clip are shown, and which, where its row lists none.

    With `fps` as many as that rate gives over the clip, at most `count` and at least 2 (1 where
    there is only one); without it `count`. They are spread evenly: `at` "ends" has the first and
    the last frame among them (Qwen3-VL's own rule), "middle" takes the middles of equal parts.
    Raises `RecipeError`.
    """

    count: int = 16
    fps: float | None = None
    at: Placement = "ends"

    def __post_init__(self) -> None:
        if self.count < 1:
            raise RecipeError(f"frames.count is {self.count}; show at least 1 frame")
        if self.fps is not None and not (math.isfinite(self.fps) and self.fps > 0):
            raise RecipeError(
                f"frames.fps is {self.fps}; give a rate above 0, or none for a fixed count"
            )
        if self.at not in get_args(Placement):
            raise RecipeError(
                f"frames.at is {self.at!r}; choose of {', '.join(get_args(Placement))}"
            )


def select_frames(sample: Sample, info: VideoInfo, rule: FrameRule) -> tuple[int, ...]:
    """The frames of `sample`'s clip that are shown, as indices into its file: those it lists, else
    what `rule` gives over its window, or the whole clip.

    Raises `FrameError` (a `VideoError`) for frames and windows that the clip does not have.
    """
    if sample.frames:
        return resolve_frames(sample, info, sample.frames)
    first, stop = _window(sample, info)
    count = rule.count
    if rule.fps is not None:
        seconds = (stop - first) / info.fps
        if info.times is not None:
            end = info.times[stop] if stop < info.frames else info.times[-1] + 1 / info.fps
            seconds = end - info.times[first]
        count = min(count, max(2, int(seconds * rule.fps + _ROUNDING)))
    return _spread(first, stop, min(count, stop - first), rule.at, info)


def resolve_frames(sample: Sample, info: VideoInfo, frames: Sequence[int]) -> tuple[int, ...]:
    """`frames`, written as in the sample's row, as indices into its file: with a pool they are
    places in it. Raises `FrameError` as `select_frames` does.
    """
    total = sample.pool or info.frames
    if outside := [i for i in frames if not 0 <= i < total]:
        kind = "place" if sample.pool else "frame"
        has = (
            f"the row's pool has {total} places" if sample.pool else f"the video has {total} frames"
        )
        raise FrameError(
            f"{sample.video}: {kind} {outside[0]} was asked for, but {has} (0 to {total - 1}); "
            "correct the row's `frames` or `imagine`"
        )
    if not sample.pool:
        return tuple(frames)
    first, stop = _window(sample, info)
    pool = pool_indices(stop - first, sample.pool)
    return tuple(first + pool[place] for place in frames)


def uniform_indices(total: int, count: int) -> tuple[int, ...]:
    """`count` indices spread evenly over `total` frames, the first and the last among them.

    That is ``round(i · (total - 1) / (count - 1))``, Qwen3-VL's own rule; one index is the middle
    frame, and a clip shorter than `count` gives all its frames.
    """
    _require_both(total, count)
    if count == 1:
        return ((total - 1) // 2,)
    return tuple(int(i) for i in np.linspace(0, total - 1, min(count, total)).round())


def middle_indices(total: int, count: int) -> tuple[int, ...]:
    """The frames in the middles of `count` equal parts of `total` frames:
    ``floor((i + 1/2) · total / count)``. With fewer frames than parts, some come more than once.
    """
    _require_both(total, count)
    return tuple((2 * i + 1) * total // (2 * count) for i in range(count))


def pool_indices(total: int, count: int) -> tuple[int, ...]:
    """The frames that the `count` places of a pool stand for: TwiFF's rule, by which its rows and
    Future-L1's count frames (LiuJunhua02/TwiFF, OpenGVLab/Future-L1's SFT).

    The first place is frame 1 and the last frame `total` - 2, both one off the ends; between them
    lie the middles of equal parts, with borders rounded down. Where there are fewer frames than
    places, the last one fills the rest.
    """
    _require_both(total, count)
    first = 1 if total > 2 else 0
    last = total - 2 if total - 2 > first else total - 1
    parts = max(0, min(count - 2, last - first))
    borders = np.linspace(first + 1, last, parts + 1).astype(int)
    middles = [int(a + b - 1) // 2 for a, b in pairwise(borders)]
    pool = [first, *middles, last][:count]
    return (*pool, *[pool[-1]] * (count - len(pool)))


def _require_both(total: int, count: int) -> None:
    if total < 1 or count < 1:
        raise DataError(
            f"cannot take {count} frames of a video with {total}; both must be at least 1"
        )


def _spread(first: int, stop: int, count: int, at: Placement, info: VideoInfo) -> tuple[int, ...]:
    """`count` of the frames `first` to `stop` - 1, spread evenly; where frames differ in length,
    evenly in time.
    """
    if info.times is None:
        spread = uniform_indices if at == "ends" else middle_indices
        return tuple(first + i for i in spread(stop - first, count))
    times = info.times[first:stop]
    end = info.times[stop] if stop < info.frames else times[-1] + 1 / info.fps
    if at == "ends" and count > 1:
        moments = np.linspace(times[0], times[-1], count).tolist()
        return tuple(first + i for i in _nearest_once(times, moments))
    width = (end - times[0]) / count
    moments = [times[0] + (i + 0.5) * width for i in range(count)]
    return tuple(first + bisect_right(times, moment) - 1 for moment in moments)


def _nearest_once(times: Sequence[float], moments: Sequence[float]) -> list[int]:
    """For each moment the frame nearest to it, no frame twice: neighbours make room."""
    chosen: list[int] = []
    for left, moment in zip(range(len(moments) - 1, -1, -1), moments, strict=True):
        i = bisect_left(times, moment)
        if i == len(times) or (i and moment - times[i - 1] <= times[i] - moment):
            i -= 1
        least = chosen[-1] + 1 if chosen else 0
        chosen.append(min(max(i, least), len(times) - 1 - left))
    return chosen


def _window(sample: Sample, info: VideoInfo) -> tuple[int, int]:
    """The frames on which a sample's window opens and closes: `first`, and one past the last.

    They are those that begin in the window; a window between two frames has the one it sees.
    """
    if sample.window is None:
        return 0, info.frames
    start, end = sample.window
    if not (start < end and start < info.seconds and end > 0):
        raise FrameError(
            f"{sample.video}: the row's window is {start:g} to {end:g} s, but the video is "
            f"{info.seconds:.3g} s long; correct the row's window"
        )
    if info.times is None:
        bounds = [math.ceil(t * info.fps - _ROUNDING) for t in (start, end)]
    else:
        bounds = [bisect_left(info.times, t - _ROUNDING) for t in (start, end)]
    first, stop = (min(max(bound, 0), info.frames) for bound in bounds)
    return (first, stop) if first < stop else (max(stop - 1, 0), max(stop, 1))

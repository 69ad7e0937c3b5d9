"""The frame rule, and that every stage obeys the same one."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.data import FrameRule, VideoInfo, select_frames
from rl.data.frames import middle_indices, pool_indices, resolve_frames, uniform_indices
from rl.errors import DataError, FrameError, RecipeError
from rl.trajectory import Sample

SAMPLE = Sample("s", "v.mp4", "What comes next?", "A")


def info(frames: int, fps: float = 8.0, times: tuple[float, ...] | None = None) -> VideoInfo:
    return VideoInfo(frames, fps, 16, 16, times)


@pytest.mark.parametrize(
    ("total", "count", "expected"),
    [
        (10, 4, (0, 3, 6, 9)),
        (8, 4, (0, 2, 5, 7)),
        (3, 8, (0, 1, 2)),
        (1, 8, (0,)),
        (9, 1, (4,)),
        (10, 1, (4,)),
    ],
)
def test_uniform_indices(total: int, count: int, expected: tuple[int, ...]) -> None:
    assert uniform_indices(total, count) == expected


def test_uniform_indices_need_frames() -> None:
    with pytest.raises(DataError, match="cannot take 0 frames of a video with 5"):
        uniform_indices(5, 0)


def test_middles_of_equal_parts() -> None:
    assert middle_indices(80, 8) == (5, 15, 25, 35, 45, 55, 65, 75)
    assert middle_indices(10, 4) == (1, 3, 6, 8)
    assert middle_indices(3, 6) == (0, 0, 1, 1, 2, 2)
    assert middle_indices(7, 1) == (3,)


@pytest.mark.parametrize(
    ("rule", "frames", "expected"),
    [
        (FrameRule(4), 80, (0, 26, 53, 79)),
        (FrameRule(4, at="middle"), 80, (10, 30, 50, 70)),
        (FrameRule(16, fps=0.5), 80, (0, 20, 40, 59, 79)),  # 10 s: 5
        (FrameRule(4, fps=2), 80, (0, 26, 53, 79)),  # 20 would be too many
        (FrameRule(16, fps=0.1), 80, (0, 79)),  # 1, but there are 2
        (FrameRule(16, fps=2), 1, (0,)),
        (FrameRule(1, fps=2), 80, (39,)),
        (FrameRule(4, at="middle"), 3, (0, 1, 2)),
    ],
)
def test_rules(rule: FrameRule, frames: int, expected: tuple[int, ...]) -> None:
    assert select_frames(SAMPLE, info(frames), rule) == expected


@pytest.mark.parametrize(
    ("window", "expected"),
    [
        ((2.0, 4.0), (16, 21, 26, 31)),  # frame 32 begins when the window is over
        ((2.01, 4.01), (17, 22, 27, 32)),
        ((9.0, 99.0), (72, 74, 77, 79)),  # it may reach beyond the end
        ((-1.0, 0.5), (0, 1, 2, 3)),
        ((1.01, 1.02), (8,)),  # between two frames: the one that is seen
        ((9.95, 11.0), (79,)),
    ],
)
def test_windows(window: tuple[float, float], expected: tuple[int, ...]) -> None:
    sample = replace(SAMPLE, window=window)
    assert select_frames(sample, info(80), FrameRule(4)) == expected


def test_a_window_and_a_rate() -> None:
    sample = replace(SAMPLE, window=(2.0, 5.0))
    assert len(select_frames(sample, info(80), FrameRule(16, fps=2))) == 6


@pytest.mark.parametrize("window", [(10.0, 12.0), (4.0, 4.0), (5.0, 4.0), (-2.0, 0.0)])
def test_a_window_outside_of_the_video(window: tuple[float, float]) -> None:
    sample = replace(SAMPLE, window=window)
    with pytest.raises(FrameError, match=r"v\.mp4: the row's window is .*10 s long"):
        select_frames(sample, info(80), FrameRule())


def test_what_a_row_lists_wins() -> None:
    sample = replace(SAMPLE, frames=(9, 3), window=(2.0, 4.0))
    assert select_frames(sample, info(80), FrameRule(4, fps=1)) == (9, 3)


def test_places_in_a_pool() -> None:
    sample = replace(SAMPLE, frames=(0, 7), pool=8)
    # Borders 2, 14, 27, 40, 52, 65, 78; the middle of frames 14 to 26 is 20.
    assert pool_indices(80, 8) == (1, 7, 20, 33, 45, 58, 71, 78)
    assert select_frames(sample, info(80), FrameRule()) == (1, 78)
    assert resolve_frames(sample, info(80), (2,)) == (20,)
    within = replace(sample, window=(5.0, 10.0))  # frames 40 to 79
    assert select_frames(within, info(80), FrameRule()) == (41, 78)
    assert pool_indices(4, 8) == (1, 1, 2, 2, 2, 2, 2, 2)
    assert pool_indices(1, 8) == (0,) * 8


def test_frames_that_are_not_there() -> None:
    for sample, message in [
        (replace(SAMPLE, frames=(3, 80)), "frame 80 was asked for, but the video has 80 frames"),
        (replace(SAMPLE, frames=(-1,)), "frame -1"),
        (replace(SAMPLE, frames=(8,), pool=8), "place 8 .* pool has 8 places"),
    ]:
        with pytest.raises(FrameError, match=message):
            select_frames(sample, info(80), FrameRule())


def test_rules_that_make_no_sense() -> None:
    for wrong, message in [
        ({"count": 0}, "frames.count is 0"),
        ({"fps": 0.0}, "frames.fps is 0.0"),
        ({"fps": float("nan")}, "frames.fps is nan"),
        ({"at": "start"}, "frames.at is 'start'"),
    ]:
        with pytest.raises(RecipeError, match=message):
            FrameRule(**wrong)


def test_frames_of_unequal_length_are_spread_in_time() -> None:
    # Ten frames a second, and a long one: frame 4 stands from 0.4 to 2.0 s.
    times = (0.0, 0.1, 0.2, 0.3, 0.4, 2.0, 2.1, 2.2, 2.3, 2.4)
    clip = info(10, 9 / 2.4, times)
    assert select_frames(SAMPLE, clip, FrameRule(3)) == (0, 4, 9)  # 1.2 s is nearest to frame 4
    assert select_frames(SAMPLE, clip, FrameRule(5)) == (0, 4, 5, 6, 9)
    assert select_frames(SAMPLE, clip, FrameRule(99)) == tuple(range(10))
    assert select_frames(SAMPLE, clip, FrameRule(3, at="middle")) == (4, 4, 7)
    assert select_frames(replace(SAMPLE, window=(1.0, 2.15)), clip, FrameRule()) == (5, 6)
    assert select_frames(replace(SAMPLE, window=(1.0, 1.5)), clip, FrameRule()) == (4,)


@settings(deadline=None)
@given(
    frames=st.integers(1, 5000),
    fps=st.floats(0.5, 120),
    count=st.integers(1, 64),
    rate=st.none() | st.floats(0.05, 60),
    at=st.sampled_from(["ends", "middle"]),
    start=st.floats(0, 0.999),
    length=st.floats(0.001, 1),
    uneven=st.booleans(),
)
def test_selected_frames_exist_and_ascend(
    frames: int, fps: float, count: int, rate: float | None, at, start, length, uneven: bool
) -> None:
    times = tuple(i / fps + (0.4 / fps) * (i % 2) for i in range(frames)) if uneven else None
    clip = info(frames, fps, times)
    window = (start * clip.seconds, (start + length) * clip.seconds)
    for sample in (SAMPLE, replace(SAMPLE, window=window)):
        chosen = select_frames(sample, clip, FrameRule(count, rate, at))
        assert 1 <= len(chosen) <= count
        assert all(0 <= i < frames for i in chosen)
        assert list(chosen) == sorted(chosen)
        if at == "ends" or not uneven:
            assert len(set(chosen)) == len(chosen)
        if sample.window is None and rate is None and (at == "ends" or not uneven):
            assert len(chosen) == min(count, frames)
        if sample.window is None and at == "ends" and len(chosen) > 1:
            assert (chosen[0], chosen[-1]) == (0, frames - 1)

from __future__ import annotations

import pickle
from pathlib import Path

import av
import numpy as np
import pytest

from rl.data import VideoInfo, probe, read_clip, read_frames
from rl.errors import VideoError
from tests.tiny import moving_square, write_clip


def refused(path: Path, indices: list[int] | None = None) -> str:
    with pytest.raises(VideoError) as caught:
        read_frames(path, [0] if indices is None else indices)
    assert str(pickle.loads(pickle.dumps(caught.value))) == str(caught.value)  # it crosses Ray
    message = str(caught.value)
    assert message.startswith(f"{path}: ")
    return message


def write_streamable(path: Path, frames: np.ndarray) -> Path:
    """An H.264 MP4 whose index comes first, so that a file cut short still opens."""
    with av.open(str(path), "w", options={"movflags": "faststart"}) as container:
        stream = container.add_stream("libx264", rate=8)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return path


@pytest.mark.parametrize("size", [8, 16, 24, 32, 48, 64])  # decord misreads 8, 16, 24 and 48
def test_frames_come_back(tmp_path: Path, size: int) -> None:
    frames = moving_square(12, size)
    path = write_clip(tmp_path / "a.mp4", frames, fps=8)
    assert probe(path) == VideoInfo(frames=12, fps=8.0, height=size, width=size)
    assert probe(path).seconds == 1.5
    read, info = read_clip(path, [7, 0, 7, 11])
    assert (read.shape, read.dtype, info.frames) == ((4, size, size, 3), np.uint8, 12)
    # Colours are stored at half the resolution: far from exact, yet nearer to their own frame than
    # to others.
    for got, index in zip(read, [7, 0, 7, 11], strict=True):
        errors = np.abs(got.astype(float) - frames).mean((1, 2, 3))
        assert errors[index] == errors.min() < 4
    np.testing.assert_array_equal(read[0], read[2])
    np.testing.assert_array_equal(read_frames(path, range(12))[[7, 0, 7, 11]], read)


def test_height_and_width_are_not_confused(tmp_path: Path) -> None:
    frames = np.zeros((4, 32, 16, 3), np.uint8)
    frames[:, :8] = 200  # the top quarter is bright
    path = write_clip(tmp_path / "a.mp4", frames)
    assert (probe(path).height, probe(path).width) == (32, 16)
    assert np.abs(read_frames(path, [2])[0].astype(int) - frames[2]).mean() < 4


def test_index_past_the_end(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "a.mp4", moving_square(5))
    message = refused(path, [0, 5])
    assert "frame 5 was asked for, but the video has 5 frames (0 to 4)" in message
    assert "correct the row's `frames`" in message
    assert "frame -1 was asked for" in refused(path, [-1])
    assert "at least one frame index" in refused(path, [])


def test_files_that_are_no_videos(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    text = tmp_path / "text.mp4"
    text.write_text("this is no video " * 50)
    message = refused(text)
    assert "not a video that can be decoded" in message and "re-encode it" in message
    empty = tmp_path / "empty.mp4"
    empty.touch()
    message = refused(empty)
    assert "the file is empty (0 bytes)" in message and "copy or download it again" in message
    assert "no such video file; correct the path" in refused(tmp_path / "none.mp4")
    assert "a folder, not a video file" in refused(tmp_path)
    assert "moov" not in "".join(capfd.readouterr())  # FFmpeg's own complaints stay away


def test_video_without_frames(tmp_path: Path) -> None:
    path = tmp_path / "none.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 16, 16, "yuv420p"
        container.start_encoding()
        container.mux(stream.encode())
    message = refused(path)
    assert "no video stream" in message and "remove its rows" in message


def test_truncated_before_the_index(tmp_path: Path) -> None:
    whole = write_clip(tmp_path / "a.mp4", moving_square(12)).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) // 2])
    message = refused(cut)
    assert "truncated" in message and "re-encode it" in message


def test_cut_short_or_damaged_among_the_frames(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 64, 64, 3), dtype=np.uint8)
    whole = write_streamable(tmp_path / "a.mp4", noise).read_bytes()
    cut = tmp_path / "cut.mp4"
    cut.write_bytes(whole[: len(whole) * 6 // 10])
    message = refused(cut, [0, 99])
    assert "truncated" in message and "re-encode it" in message
    damaged = tmp_path / "damaged.mp4"
    middle = len(whole) // 2
    damaged.write_bytes(whole[:middle] + bytes(20_000) + whole[middle + 20_000 :])
    message = refused(damaged, [0, 50, 99])
    assert "decoding stopped among frames 0 to 99 of 100" in message and "re-encode it" in message
    assert "/" not in message.split("(")[-1]  # no paths of decord's own sources

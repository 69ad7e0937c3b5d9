"""Broken and odd videos: each is shown right, or refused with an error that names the file."""

from __future__ import annotations

import os
import re
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import av
import numpy as np
import pytest
from PIL import Image

from rl.data import decoding, probe, read_clip, read_frames, video
from rl.data.readers import DecordReader, PyAVReader
from rl.errors import DecoderError, FrameError, VideoError, VideoTimeoutError

WHITE = 235


def picture(i: int, height: int = 64, width: int = 96) -> np.ndarray:
    """Frame `i`: grey, lighter with each frame, with a white block in the upper left corner."""
    frame = np.full((height, width, 3), 20 + 8 * i, np.uint8)
    frame[: height // 2, : width // 2] = WHITE
    return frame


def write(
    path: Path,
    *,
    count: int = 12,
    size: tuple[int, int] = (64, 96),
    codec: str = "libx264",
    pixels: str = "yuv420p",
    rate: int = 8,
    times_ms: list[int] | None = None,
    container: dict[str, str] | None = None,
    settings: dict[str, str] | None = None,
    format: str | None = None,
) -> Path:
    with av.open(str(path), "w", options=container or {}, format=format) as file:
        stream: Any = file.add_stream(codec, rate=rate, options=settings or {})
        stream.height, stream.width, stream.pix_fmt = *size, pixels
        stream.codec_context.thread_count = 1
        if times_ms is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        file.start_encoding()
        for i in range(count):
            frame = av.VideoFrame.from_ndarray(picture(i, *size), format="rgb24")
            if times_ms is not None:
                frame.pts, frame.time_base = times_ms[i], Fraction(1, 1000)
            file.mux(stream.encode(frame))
        file.mux(stream.encode())
    return path


def turned(path: Path, matrix: tuple[int, ...]) -> Path:
    """Writes how a player is to turn the picture into the header of an MP4."""
    data = bytearray(write(path).read_bytes())
    place = data.find(b"tkhd") + 44
    data[place : place + 36] = struct.pack(">9i", *matrix)
    path.write_bytes(data)
    return path


def with_sound(path: Path, *, picture_too: bool) -> Path:
    with av.open(str(path), "w") as file:
        video_stream: Any = file.add_stream("libx264", rate=8) if picture_too else None
        sound: Any = file.add_stream("aac", rate=16000)
        if picture_too:
            video_stream.height, video_stream.width, video_stream.pix_fmt = 64, 96, "yuv420p"
            for i in range(12):
                frame = av.VideoFrame.from_ndarray(picture(i), format="rgb24")
                file.mux(video_stream.encode(frame))
            file.mux(video_stream.encode())
        samples = np.zeros((1, 16000), np.float32)
        heard = av.AudioFrame.from_ndarray(samples, format="fltp", layout="mono")
        heard.sample_rate = 16000
        file.mux(sound.encode(heard))
        file.mux(sound.encode())
    return path


def edited(path: Path, change: Callable[[bytes], bytes], **options: Any) -> Path:
    path.write_bytes(change(write(path, **options).read_bytes()))
    return path


def images(folder: Path, count: int = 12, **other: np.ndarray) -> Path:
    folder.mkdir()
    for i in range(count):
        Image.fromarray(picture(i)).save(folder / f"frame{i}.png")  # frame10 after frame9
    for name, pixels in other.items():
        Image.fromarray(pixels).save(folder / f"{name}.png")
    return folder


FASTSTART = {"movflags": "faststart"}
UP, DOWN = 1 << 16, -(1 << 16)
LAST = (0, 0, 1 << 30)

# What is shown as it should be: 12 frames of 64x96 pixels, unless it says so.
SHOWN: dict[str, Callable[[Path], Path]] = {
    "h264": lambda d: write(d / "a.mp4"),
    "b_frames": lambda d: write(d / "a.mp4", settings={"bf": "3", "g": "12"}),
    "one_keyframe": lambda d: write(d / "a.mkv", settings={"g": "999"}),
    "mpeg4_avi": lambda d: write(d / "a.avi", codec="mpeg4"),
    "vp9_webm": lambda d: write(d / "a.webm", codec="libvpx-vp9", settings={"cpu-used": "8"}),
    "transport_stream": lambda d: write(d / "a.ts"),
    "hdr_10_bits": lambda d: write(d / "a.mp4", codec="libx264", pixels="yuv420p10le"),
    "full_chroma": lambda d: write(d / "a.mp4", pixels="yuv444p"),
    "grey": lambda d: write(d / "a.mp4", pixels="gray"),
    "alpha": lambda d: write(d / "a.mov", codec="png", pixels="rgba"),
    "lossless_rgb": lambda d: write(d / "a.mkv", codec="ffv1", pixels="bgr0"),
    "wrong_extension": lambda d: write(d / "a.avi", format="mp4"),
    "no_extension": lambda d: write(d / "clip", format="matroska"),
    "image_s_extension": lambda d: write(d / "a.png", format="mp4"),
    "with_sound": lambda d: with_sound(d / "a.mp4", picture_too=True),
    "fragmented": lambda d: write(d / "a.mp4", container={"movflags": "frag_keyframe+empty_moov"}),
    "odd_name": lambda d: write(d / "ein Vídeo, 100 % 'gut' #1.mp4"),
    "rubbish_behind": lambda d: edited(d / "a.mp4", lambda b: b + os.urandom(999)),
    "folder_of_images": lambda d: images(d / "frames"),
    "late_start": lambda d: write(d / "a.mkv", times_ms=[5000 + 125 * i for i in range(12)]),
}
# What cannot be shown: what is said of it.
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "missing": (lambda d: d / "a.mp4", "no such video file"),
    "empty": (lambda d: edited(d / "a.mp4", lambda b: b""), r"empty \(0 bytes\)"),
    "text": (lambda d: edited(d / "a.mp4", lambda b: b"no video " * 99), "not a video"),
    "noise": (lambda d: edited(d / "a.mp4", lambda b: os.urandom(4000)), "not a video"),
    "zeros": (lambda d: edited(d / "a.mp4", lambda b: bytes(4000)), "not a video"),
    "header_only": (lambda d: edited(d / "a.mp4", lambda b: b[:32]), "not a video"),
    "index_cut_off": (lambda d: edited(d / "a.mp4", lambda b: b[: len(b) // 2]), "not a video"),
    "frames_cut_off": (
        lambda d: edited(
            d / "a.mp4",
            lambda b: b[: len(b) * 3 // 4],
            container=FASTSTART,
            codec="mpeg4",
            settings={"qmin": "1", "qmax": "1"},
        ),
        "truncated",
    ),
    "no_frames": (lambda d: write(d / "a.mp4", count=0, codec="mpeg4"), "no video stream|0 frames"),
    "only_sound": (lambda d: with_sound(d / "a.mp4", picture_too=False), "no video stream"),
    "empty_folder": (lambda d: d, "a folder, not a video"),
    "images_of_two_sizes": (
        lambda d: images(d / "frames", 11, z=np.zeros((8, 8, 3), np.uint8)),
        "images differ in size",
    ),
    "pipe": (lambda d: os.mkfifo(d / "a.mp4") or d / "a.mp4", "not a regular file"),
    "name_with_a_zero": (lambda d: d / "a\0.mp4", "no such video file"),
}


@pytest.mark.parametrize("name", SHOWN)
def test_shown(tmp_path: Path, name: str) -> None:
    path = SHOWN[name](tmp_path)
    info = probe(path)
    assert (info.frames, info.height, info.width, info.times) == (12, 64, 96, None)
    assert info.fps == pytest.approx(1.0 if "folder" in name else 8.0)
    frames = read_frames(path, [0, 11, 5])
    assert frames.shape == (3, 64, 96, 3) and frames.dtype == np.uint8
    for frame, i in zip(frames, (0, 11, 5), strict=True):
        off = np.abs(frame.astype(int) - picture(i))[[4, 60, 4, 60], [4, 4, 90, 90]]
        # Grey is stored in full range and marked as if it were not: players stretch it, too.
        assert off.max() <= (25 if name == "grey" else 6), f"{i}: {frame[4, 4]}, {frame[60, 90]}"
    if path.is_file() and name not in ("transport_stream", "image_s_extension"):  # as both readers
        for reader in (DecordReader(str(path)), PyAVReader(str(path))):
            assert np.abs(reader.frames([0, 11, 5]).astype(int) - frames).mean() < 2


@pytest.mark.parametrize("name", REFUSED)
def test_refused(tmp_path: Path, name: str) -> None:
    make, message = REFUSED[name]
    path = make(tmp_path)
    with pytest.raises(VideoError, match=message) as caught:
        read_clip(path, [0, 11])
    assert str(caught.value).startswith(f"{path}: ")
    assert re.search("check|correct|copy|scale|re-encode|again", str(caught.value))


@pytest.mark.parametrize(
    ("matrix", "shape", "corner"),
    [
        ((0, UP, 0, DOWN, 0, 0, 64 * UP, *LAST[1:]), (96, 64), (0, -1)),  # clockwise
        ((DOWN, 0, 0, 0, DOWN, 0, 96 * UP, 64 * UP, LAST[2]), (64, 96), (-1, -1)),
        ((0, DOWN, 0, UP, 0, 0, 0, 96 * UP, LAST[2]), (96, 64), (-1, 0)),
    ],
)
def test_turned_upright(
    tmp_path: Path, matrix: tuple[int, ...], shape: tuple[int, int], corner: tuple[int, int]
) -> None:
    path = turned(tmp_path / "a.mp4", matrix)
    assert (probe(path).height, probe(path).width) == shape
    for frame in (read_frames(path, [0])[0], PyAVReader(str(path)).frames([0])[0]):
        for row in (0, -1):
            for column in (0, -1):
                white = frame[row, column].mean() > 150
                assert white == ((row, column) == corner)


@pytest.mark.parametrize("size", [(62, 90), (50, 34), (18, 66), (8, 8), (130, 16)])
def test_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    finest = {"qmin": "1", "qmax": "1"}
    path = write(tmp_path / "a.mp4", size=size, codec="mpeg4", settings=finest)
    frames, info = read_clip(path, [0, 11])
    assert frames.shape == (2, *size, 3) and (info.height, info.width) == size
    assert np.abs(frames[1].astype(int) - picture(11, *size)).mean() < 12


def test_sides_of_an_odd_length(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", size=(33, 71), codec="ffv1", pixels="bgr0")
    frames = read_frames(path, [0, 11])
    np.testing.assert_array_equal(frames, [picture(0, 33, 71), picture(11, 33, 71)])


@pytest.mark.parametrize("suffix", ["mkv", "mp4"])
def test_variable_frame_rate(tmp_path: Path, suffix: str) -> None:
    times = [0, 100, 200, 300, 400, 2000, 2100, 2200, 2300, 2400, 2500, 2600]
    path = write(
        tmp_path / f"a.{suffix}",
        times_ms=times,
        container={"video_track_timescale": "1000"} if suffix == "mp4" else None,
    )
    for info in (probe(path), PyAVReader(str(path)).info()):
        assert info.times == pytest.approx([t / 1000 for t in times], abs=2e-3)
        assert info.fps == pytest.approx(11 / 2.6, rel=1e-3)


def test_a_rate_that_the_file_gets_wrong(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mkv", times_ms=[100 * i for i in range(12)])  # it says 8
    info = probe(path)
    assert info.fps == pytest.approx(10) and info.times is None


def test_pictures(tmp_path: Path) -> None:
    deep = (np.arange(64 * 96).reshape(64, 96) % 256 * 256).astype(np.uint16)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    np.testing.assert_array_equal(read_frames(tmp_path / "deep.png", [0])[0, ..., 0], deep >> 8)
    photo = Image.fromarray(picture(0))
    photo.getexif()[0x0112] = 6  # the camera was turned: show it a quarter clockwise
    photo.save(tmp_path / "photo.jpg", exif=photo.getexif(), quality=95)
    assert probe(tmp_path / "photo.jpg").height == 96
    assert read_frames(tmp_path / "photo.jpg", [0])[0, 4, -4].mean() > 200
    Image.fromarray(picture(0)).save(tmp_path / "picture.mp4", format="png")
    np.testing.assert_array_equal(read_frames(tmp_path / "picture.mp4", [0])[0], picture(0))
    (tmp_path / "broken.png").write_bytes((tmp_path / "deep.png").read_bytes()[:60])
    with pytest.raises(VideoError, match=r"broken\.png"):
        probe(tmp_path / "broken.png")


def test_frames_that_are_not_there(tmp_path: Path) -> None:
    with pytest.raises(FrameError, match="frame 12 was asked for, but the video has 12 frames"):
        read_frames(write(tmp_path / "a.mp4"), [0, 12])


# -- the process that decodes ----------------------------------------------------------------------


PARENT = """
import subprocess, sys, time
from multiprocessing import Pipe
end, other = Pipe()
started = subprocess.Popen(
    [sys.executable, "-P", sys.argv[1], str(other.fileno()), "0"],
    pass_fds=[other.fileno()],
    stdout=subprocess.DEVNULL,
)
end.recv()
end.send(("images", "a", (sys.argv[2],), "", (0,), False))
time.sleep(0.5)
print(started.pid, flush=True)
time.sleep(60)
"""


def child() -> int:
    process = decoding.decoder()._process
    assert process is not None
    return process.pid


def test_a_reader_that_hangs_is_ended(tmp_path: Path) -> None:
    good, bad = write(tmp_path / "a.mp4"), write(tmp_path / "b.mkv")
    read_frames(good, [0])
    hung = child()
    os.kill(hung, signal.SIGSTOP)
    # decord hangs, and PyAV then reads it in a process of its own.
    assert read_frames(bad, [3], timeout_s=2.0).shape == (1, 64, 96, 3)
    assert child() != hung
    with pytest.raises(ProcessLookupError):
        os.kill(hung, 0)
    assert read_frames(good, [0]).shape == (1, 64, 96, 3)


def test_every_reader_hangs(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4", count=2)
    with pytest.raises(VideoTimeoutError, match=r"a\.mp4: pyav did not decode it within 0 s"):
        read_frames(path, [0], timeout_s=0.0)
    assert read_frames(path, [0]).shape == (1, 64, 96, 3)


def test_only_what_the_first_reader_refuses_is_left_to_the_second(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    late, refused = write(tmp_path / "a.mp4", count=3), write(tmp_path / "b.mp4", count=4)
    decoder = decoding.Decoder()
    asked: list[tuple[str, str]] = []
    ask = decoder._ask

    def first_fails(request: Any, timeout_s: float) -> Any:
        asked.append((request[0], Path(request[1]).name))
        if request[0] == "decord":
            raise VideoTimeoutError("late") if request[1] == str(late) else VideoError("no")
        return ask(request, timeout_s)

    monkeypatch.setattr(decoder, "_ask", first_fails)
    try:
        for clip in (video.find_clip(late), video.find_clip(refused)) * 2:
            decoder.read(clip, (0,), False, 60.0)
    finally:
        decoder.close()
    a, b = [("decord", "a.mp4"), ("pyav", "a.mp4")], [("decord", "b.mp4"), ("pyav", "b.mp4")]
    assert asked == [*a, *b, *a, b[1]]
    assert decoder.clips_by_second_reader == 2


@pytest.mark.parametrize(
    ("program", "message"),
    [
        ("raise SystemExit(7)", "ended with code 7 as it started"),
        ("import time; time.sleep(60)", "was not ready within 0.2 s"),
        (None, "cannot be started .*No such file"),
        (
            "import sys; from multiprocessing.connection import Connection; "
            "Connection(int(sys.argv[1])).send(())",
            "ends as soon as it has started",
        ),
    ],
)
def test_a_machine_that_cannot_decode_is_no_broken_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, program: str | None, message: str
) -> None:
    clip = video.find_clip(write(tmp_path / "a.mp4", count=2))
    if program is None:
        monkeypatch.setattr(decoding.sys, "executable", str(tmp_path / "none"))
    else:
        (tmp_path / "program.py").write_text(program)
        monkeypatch.setattr(decoding.readers, "__file__", str(tmp_path / "program.py"))
    if "sleep" in (program or ""):
        monkeypatch.setattr(decoding, "_START_S", 0.2)
    if "send" in (program or ""):  # it is ready, and gone before it is asked
        wait = decoding._Process._await_start
        monkeypatch.setattr(
            decoding._Process, "_await_start", lambda p: (wait(p), p._process.wait())[0]
        )
    before = len(os.listdir("/proc/self/fd"))
    decoder = decoding.Decoder()
    with pytest.raises(DecoderError, match=message) as caught:
        decoder.read(clip, (0,), True, 5.0)
    assert not isinstance(caught.value, VideoError)
    assert len(os.listdir("/proc/self/fd")) == before  # no memory or pipe is left open


def test_the_process_ends_with_a_killed_parent(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "hangs.png")  # opening it waits for a writer who never comes
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, decoding.readers.__file__, str(tmp_path / "hangs.png")],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert parent.stdout is not None
    with parent, parent.stdout:
        hanging = int(parent.stdout.readline())
        parent.kill()
    ends = time.monotonic() + 10.0
    while Path(f"/proc/{hanging}/cmdline").exists() and time.monotonic() < ends:
        if not Path(f"/proc/{hanging}/cmdline").read_bytes():
            break  # dead, and not collected yet
        time.sleep(0.1)
    else:
        if Path(f"/proc/{hanging}").exists():
            os.kill(hanging, signal.SIGKILL)
            pytest.fail("the decoding process outlives the one that started it")


def test_a_crash_takes_nothing_with_it(tmp_path: Path) -> None:
    path = write(tmp_path / "a.mp4")
    read_frames(path, [0])
    crashed = child()
    os.kill(crashed, signal.SIGKILL)
    assert read_frames(path, [11]).shape == (1, 64, 96, 3)
    assert child() != crashed


def test_a_worn_process_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path / "a.mp4")
    read_frames(path, [0])
    old = child()
    monkeypatch.setattr(decoding, "_BYTES_PER_PROCESS", 1)
    read_frames(path, [0])
    assert child() != old


def test_what_was_begun_is_used_or_dropped(tmp_path: Path) -> None:
    first, second = write(tmp_path / "a.mp4"), write(tmp_path / "b.mp4", count=6)
    a, b = video.find_clip(first), video.find_clip(second)
    expected = [read_frames(first, [11]), read_frames(second, [5])]
    video.read_ahead(a, [11])
    np.testing.assert_array_equal(video.read(a, [11])[0], expected[0])
    video.read_ahead(a, [11])
    np.testing.assert_array_equal(video.read(b, [5])[0], expected[1])

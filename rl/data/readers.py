"""Reads frames out of video files and images, one class a kind of file; run as a program, it does
so for another process (`rl.data.decoding`).

decord hangs on some files, leaks, and takes its process with it on others (dmlc/decord#269, #218,
#157), so no other process should call it. This module imports nothing of `rl`, whose import takes
seconds: run by its path, it is ready in the time that decord takes to load.
"""

from __future__ import annotations

import mmap
import os
import re
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from multiprocessing.connection import Connection
from typing import Any, Literal, Protocol, cast

import numpy as np

ReaderName = Literal["decord", "pyav", "images"]

REMEDY = "check that it plays, re-encode it as H.264 MP4, or remove its rows from the manifest"
IMAGE_FPS = 1.0  # images have no times: they are taken to be a second apart


@dataclass(frozen=True)
class VideoInfo:
    """What a clip says about itself: number of frames, frames a second, and their size in pixels.

    `times` are the moments [frames], in seconds from the first, at which the frames begin, where
    these do not follow from the rate: variable frame rate. `fps` is then their mean rate.
    """

    frames: int
    fps: float
    height: int
    width: int
    times: tuple[float, ...] | None = None

    @property
    def seconds(self) -> float:
        return self.frames / self.fps

    def positions(self, indices: Sequence[int]) -> list[float]:
        """Where frames are in time, in units of 1 / `fps` seconds."""
        if self.times is None:
            return [float(i) for i in indices]
        return [self.times[i] * self.fps for i in indices]


class Unreadable(Exception):
    """A reader cannot read a file: the text says why and what to do, without the file's name."""


class VideoReader(Protocol):
    """One open clip. Raises `Unreadable`."""

    def info(self) -> VideoInfo: ...

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        """The frames at `indices`, in that order: uint8 [T, H, W, 3], RGB, turned upright."""
        ...


class DecordReader:
    """Videos through decord, which jumps to the frames it needs."""

    def __init__(self, path: str) -> None:
        import decord

        # What FFmpeg prints about broken files comes back as an error that names them.
        decord.logging.set_level(decord.logging.QUIET)
        self._errors = (decord.DECORDError, RuntimeError)
        try:
            # One thread: processes decode side by side; more threads only fight over the cores.
            self._reader = decord.VideoReader(path, num_threads=1)
            self._count = len(self._reader)
        except self._errors as error:
            raise Unreadable(_no_video(error)) from error
        if not self._count:
            raise Unreadable(f"the video has 0 frames; {REMEDY}")

    def info(self) -> VideoInfo:
        try:
            first = self._reader[0].asnumpy()
            times = self._reader.get_frame_timestamp(range(self._count))[:, 0].astype(np.float64)
        except self._errors as error:
            raise Unreadable(_no_video(error)) from error
        if first.shape[2] != 3:
            raise Unreadable("decord pads the lines of narrow videos")
        fps, uneven = _rate(times, float(self._reader.get_avg_fps()))
        height, width, _ = first.shape
        return VideoInfo(self._count, fps, height, width, uneven)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        try:
            return self._reader.get_batch(list(indices)).asnumpy()
        except self._errors as error:
            raise Unreadable(_stopped(indices, self._count, error)) from error


class PyAVReader:
    """Videos through PyAV, from the first frame to the last that is needed: slow, and right."""

    def __init__(self, path: str) -> None:
        import av

        self._av, self._path = av, path
        try:
            with av.open(path) as container:
                if not container.streams.video:
                    raise Unreadable(_no_video("no video stream"))
                stream = container.streams.video[0]
                packets = [p for p in container.demux(stream) if p.size]
                if len(packets) < stream.frames:
                    raise Unreadable(
                        f"truncated: the file has {len(packets)} of its {stream.frames} frames; "
                        f"{REMEDY}"
                    )
                stamps: list[Any] = [p.pts for p in packets if not p.is_discard]
                self._known = None not in stamps and len(set(stamps)) == len(stamps)
                self._stamps = sorted(stamps) if self._known else list(range(len(stamps)))
                rate = stream.average_rate or stream.guessed_rate or 0
                unit = float(stream.time_base or 0) if self._known else 0.0
        except self._av.FFmpegError as error:
            raise Unreadable(_no_video(error)) from error
        if not self._stamps:
            raise Unreadable(f"the video has 0 frames; {REMEDY}")
        times = (np.array(self._stamps, np.float64) - self._stamps[0]) * unit if unit else None
        self._fps, self._uneven = _rate(times, float(rate))

    def info(self) -> VideoInfo:
        height, width, _ = self.frames([0])[0].shape  # turned, if need be
        return VideoInfo(len(self._stamps), self._fps, height, width, self._uneven)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        if max(indices) >= len(self._stamps):
            raise Unreadable(_stopped(indices, len(self._stamps), "frames are missing"))
        found: dict[int, np.ndarray | None] = dict.fromkeys(self._stamps[i] for i in indices)
        missing, last = len(found), max(found)
        try:
            with self._av.open(self._path) as container:
                stream = container.streams.video[0]
                stream.codec_context.thread_count = 1
                size: dict[str, int] = {}
                for number, frame in enumerate(container.decode(stream)):
                    stamp = frame.pts if self._known else number
                    if stamp in found and found[stamp] is None and not frame.is_corrupt:
                        size = size or {"width": frame.width, "height": frame.height}
                        upright = frame.rotation // 90 % 4  # metadata turn anticlockwise, as numpy
                        pixels = frame.to_ndarray(format="rgb24", **size)
                        found[stamp] = np.rot90(pixels, upright)
                        missing -= 1
                    if not missing or stamp is None or stamp > last:
                        break
        except self._av.FFmpegError as error:
            raise Unreadable(_stopped(indices, len(self._stamps), error)) from error
        if missing:
            raise Unreadable(_stopped(indices, len(self._stamps), "frames are missing"))
        return np.stack([cast(np.ndarray, found[self._stamps[i]]) for i in indices])


class ImagesReader:
    """Images, each a frame, a second apart."""

    def __init__(self, files: Sequence[str]) -> None:
        self._files = files

    def info(self) -> VideoInfo:
        height, width, _ = self._image(0).shape
        return VideoInfo(len(self._files), IMAGE_FPS, height, width)

    def frames(self, indices: Sequence[int]) -> np.ndarray:
        images = {i: self._image(i) for i in dict.fromkeys(indices)}
        if len(sizes := {image.shape: i for i, image in images.items()}) > 1:
            (a, i), (b, j) = list(sizes.items())[:2]
            raise Unreadable(
                f"its images differ in size: {self._files[i]} has {a[0]}x{a[1]} pixels, "
                f"{self._files[j]} has {b[0]}x{b[1]}; scale them to one size"
            )
        return np.stack([images[i] for i in indices])

    def _image(self, index: int) -> np.ndarray:
        from PIL import Image, ImageOps

        try:
            with Image.open(self._files[index]) as image:
                image = ImageOps.exif_transpose(image)
                if image.mode.startswith("I"):  # 16 bits, which `convert` would cut off
                    grey = (np.asarray(image).astype(np.uint32) >> 8).clip(0, 255).astype(np.uint8)
                    return np.repeat(grey[..., None], 3, axis=2)
                return np.asarray(image.convert("RGB"))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            raise Unreadable(
                f"the image {self._files[index]} cannot be decoded; save it again as PNG or JPEG "
                f"({_first_line(error)})"
            ) from error


def _rate(times: np.ndarray | None, said: float) -> tuple[float, tuple[float, ...] | None]:
    """A clip's frames a second, and the times of its frames if they do not follow from that.

    A container's rate is used unless a frame is half a frame or more off.
    """
    if times is not None and len(times) > 1:
        real = (len(times) - 1) / (times[-1] - times[0]) if times[-1] > times[0] else 0.0
        steady = np.arange(len(times))
        for rate in (said, real):
            if 0 < rate < np.inf and np.abs(times * rate - steady).max() < 0.5:
                return rate, None
        if real > 0:
            return real, tuple(times.tolist())
    if not 0 < said < np.inf:
        raise Unreadable(
            f"the file gives {said} frames a second, so its frames have no times; {REMEDY}"
        )
    return said, None


def _no_video(error: object) -> str:
    return (
        "not a video that can be decoded (no video stream, truncated, or another kind of file); "
        f"{REMEDY} ({_first_line(error)})"
    )


def _stopped(indices: Sequence[int], count: int, error: object) -> str:
    return (
        f"decoding stopped among frames {min(indices)} to {max(indices)} of {count}; the file is "
        f"truncated or damaged; {REMEDY} ({_first_line(error)})"
    )


def _first_line(error: object) -> str:
    """A library's message without its times, source lines and stack."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return re.sub(r"\[[\d:]+\] \S+:\d+: ", "", line)[:160]


# -- the program -----------------------------------------------------------------------------------

_WATCH_S = 1.0  # between looks at whether the other side still lives

# (reader, path, files, content, indices, whether to describe the clip)
Request = tuple[ReaderName, str, tuple[str, ...], str, tuple[int, ...], bool]


class Server:
    """Answers requests for frames. The clip last asked for stays open: it is mostly described first
    and read then. `memory` is the file that frames are written to.
    """

    def __init__(self, memory: int) -> None:
        self._memory, self._map = memory, None
        self._open: tuple[Any, VideoReader] | None = None

    def answer(self, request: Request) -> tuple[Any, ...]:
        """("frames", shape, description), each None if not asked for, or ("error", text). The
        shape is None, too, if an index lies outside of the clip that is described.
        """
        clip, (indices, describe) = request[:4], request[4:]
        try:
            if self._open is None or self._open[0] != clip:
                self._open = None  # closes the file before the next one is opened
                self._open = clip, _reader(*clip)
            reader = self._open[1]
            info = reader.info() if describe else None
            outside = info is not None and not all(0 <= i < info.frames for i in indices)
            shape = self._write(reader.frames(indices)) if indices and not outside else None
        except Unreadable as error:
            self._open = None
            return "error", str(error)
        except Exception as error:  # for the other side to raise
            self._open = None
            return "error", f"its reader failed ({type(error).__name__}: {error}); {REMEDY}"
        return "frames", shape, None if info is None else astuple(info)

    def _write(self, frames: np.ndarray) -> tuple[int, ...]:
        if self._map is None or len(self._map) < frames.nbytes:
            os.ftruncate(self._memory, frames.nbytes)
            self._map = mmap.mmap(self._memory, frames.nbytes)
        target = np.frombuffer(self._map, np.uint8, frames.size).reshape(frames.shape)
        target[:] = frames
        return frames.shape


def _reader(name: ReaderName, path: str, files: tuple[str, ...], _: str) -> VideoReader:
    match name:
        case "decord":
            return DecordReader(path)
        case "pyav":
            return PyAVReader(path)
        case "images":
            return ImagesReader(files)


def serve(connection: Connection, memory: int) -> None:
    """Answer until the other side is gone. The first message says that this process is ready."""
    import decord  # noqa: F401 - what takes most of the time, here and not on a clip's account

    threading.Thread(target=_end_with, args=(os.getppid(),), daemon=True).start()
    server = Server(memory)
    connection.send(())
    while True:
        try:
            request = connection.recv()
        except (EOFError, ConnectionResetError):
            return
        connection.send((*server.answer(request), _resident()))


def _end_with(parent: int) -> None:
    """End this process, whatever its decoder hangs in, soon after the one that started it."""
    # Not prctl's death signal: that comes when the parent's *thread* ends, which in Ray they do.
    while os.getppid() == parent:
        time.sleep(_WATCH_S)
    os._exit(1)


def _resident() -> int:
    """Memory of this process, in bytes."""
    try:
        with open("/proc/self/statm") as file:
            return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:  # no /proc, as on macOS: the most it ever had
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])), int(sys.argv[2]))

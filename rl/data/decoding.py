"""The process that decodes, and what asks it (see `rl.data.video`)."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any, Literal

import numpy as np

from rl.data import readers
from rl.data.readers import REMEDY, ReaderName, Request, VideoInfo
from rl.errors import VideoError, VideoTimeoutError

_START_S = 60.0
_CLIPS_PER_PROCESS = 4096
_BYTES_PER_PROCESS = 2 << 30


@dataclass(frozen=True)
class Clip:
    """A clip on disk: `files` are its images where it is made of some, and `content` a fingerprint
    of what is in its files.
    """

    path: str
    files: tuple[str, ...]
    content: str


class _Gone(Exception):
    """The decoding process did not answer: it crashed, or was killed."""


class _Process:
    """One decoding process and the memory it shares with this one."""

    def __init__(self) -> None:
        self._memory = _shared_file()
        self._map: mmap.mmap | None = None
        self.clips, self.resident = 0, 0
        self._end, other = Pipe()
        with other:
            # Not forked: FFmpeg, torch and CUDA all have threads that a fork would cut off. -P: the
            # folder of the script is no place to import from.
            self._process = subprocess.Popen(
                [sys.executable, "-P", readers.__file__, str(other.fileno()), str(self._memory)],
                pass_fds=(other.fileno(), self._memory),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                process_group=0,  # Ctrl-C is for this process, which then ends that one
            )
        self._await_start()

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def worn(self) -> bool:
        return self.clips >= _CLIPS_PER_PROCESS or self.resident > _BYTES_PER_PROCESS

    def send(self, request: Request) -> None:
        self.clips += 1
        try:
            self._end.send(request)
        except OSError as error:
            raise _Gone from error

    def receive(self, deadline: float) -> tuple[Any, ...] | None:
        """The answer, None if there is none at `deadline`. Raises `_Gone`."""
        try:
            if not self._end.poll(max(0.0, deadline - time.monotonic())):
                return None
            *answer, self.resident = self._end.recv()
        except (EOFError, OSError) as error:
            raise _Gone from error
        return tuple(answer)

    def frames(self, shape: tuple[int, ...]) -> np.ndarray:
        size = int(np.prod(shape))
        if self._map is None or len(self._map) < size:
            self._map = mmap.mmap(self._memory, os.fstat(self._memory).st_size)
        return np.frombuffer(self._map, np.uint8, size).reshape(shape).copy()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._end.close()
        os.close(self._memory)

    def _await_start(self) -> None:
        try:
            if self._end.poll(_START_S) and self._end.recv() == ():
                return
        except (EOFError, OSError):
            pass
        self.close()
        raise VideoError(
            f"the process that decodes videos did not start within {_START_S:.0f} s; try "
            f"`{sys.executable} -c 'import decord'`"
        )


class Decoder:
    """Asks the decoding process, and replaces it when it must be."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._begun: Request | None = None
        self._second: dict[str, ReaderName] = {}  # by content: clips that the first cannot read

    def begin(self, clip: Clip, indices: tuple[int, ...], describe: bool) -> None:
        with self._lock:
            if self._begun is None:
                self._send((self._names(clip)[0], *_named(clip), indices, describe))

    def read(
        self, clip: Clip, indices: tuple[int, ...], describe: bool, timeout_s: float
    ) -> tuple[np.ndarray | None, VideoInfo | None]:
        """The frames, if any were asked for, and the description, if asked for, from the first
        reader that has them. Raises `VideoError`: the last one's.
        """
        with self._lock:
            names = self._names(clip)
            for number, name in enumerate(names):
                try:
                    found = self._ask((name, *_named(clip), indices, describe), timeout_s)
                except VideoError:
                    if number == len(names) - 1:
                        raise
                else:
                    if number:
                        self._second[clip.content] = name
                    return found
            raise AssertionError("a clip without readers")

    def close(self) -> None:
        """End the process; the next clip starts another."""
        if self._process is not None:
            self._process.close()
        self._process, self._begun = None, None

    def _names(self, clip: Clip) -> tuple[ReaderName, ...]:
        """The readers to try, in turn."""
        if clip.content in self._second:
            return (self._second[clip.content],)
        if clip.files == (clip.path,):
            return ("images", "pyav")  # a file with an image's name may still be a video
        return ("images",) if clip.files else ("decord", "pyav")

    def _send(self, request: Request) -> None:
        if self._process is not None and self._process.worn:
            self.close()
        if self._process is None:
            self._process = _Process()
        try:
            self._process.send(request)
        except _Gone:  # it died since its last answer
            self.close()
            self._process = _Process()
            self._process.send(request)
        self._begun = request

    def _ask(
        self, request: Request, timeout_s: float
    ) -> tuple[np.ndarray | None, VideoInfo | None]:
        name, path = request[:2]
        if self._begun not in (None, request):  # another clip was begun: nobody wants it now
            self._answer(timeout_s)
        if self._begun is None:
            self._send(request)
        answer = self._answer(timeout_s)
        if isinstance(answer, str):  # something else may have killed it
            self._send(request)
            answer = self._answer(timeout_s)
        if isinstance(answer, str):
            raise VideoError(f"{path}: the file crashes its decoder ({name}); {REMEDY}")
        if answer is None:
            raise VideoTimeoutError(
                f"{path}: {name} did not decode it within {timeout_s:g} s; {REMEDY}, or raise "
                "data.decode_timeout_s"
            )
        if answer[0] == "error":
            raise VideoError(f"{path}: {answer[1]}")
        _, shape, info = answer
        assert self._process is not None
        frames = None if shape is None else self._process.frames(shape)
        return frames, None if info is None else VideoInfo(*info)

    def _answer(self, timeout_s: float) -> tuple[Any, ...] | Literal["died"] | None:
        """The answer to what was begun; None if it takes too long. Without one the process ends."""
        assert self._process is not None
        answer: tuple[Any, ...] | Literal["died"] | None
        try:
            answer = self._process.receive(time.monotonic() + timeout_s)
        except _Gone:
            answer = "died"
        self._begun = None
        if not isinstance(answer, tuple):
            self.close()
        return answer


def _named(clip: Clip) -> tuple[str, tuple[str, ...], str]:
    return clip.path, clip.files, clip.content


_the_decoder = Decoder()


def decoder() -> Decoder:
    """The decoder of this process. A forked process starts one of its own."""
    global _the_decoder
    if _the_decoder.owner != os.getpid():
        _the_decoder = Decoder()
    return _the_decoder


def _shared_file() -> int:
    """A file without a name, in memory where the system has that."""
    if hasattr(os, "memfd_create"):
        return os.memfd_create("foresight-frames")
    with tempfile.TemporaryFile() as file:
        return os.dup(file.fileno())

"""The process that decodes, and what asks it (see `rl.data.video`)."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import Pipe
from typing import Any, Literal

import numpy as np

from rl.data import readers
from rl.data.readers import REMEDY, ReaderName, Request, VideoInfo
from rl.errors import DecoderError, VideoError, VideoTimeoutError

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
        self._map: mmap.mmap | None = None
        self.clips, self.resident = 0, 0
        with ExitStack() as opened:  # which closes everything if the process does not start
            try:
                self._memory = _shared_file()
                opened.callback(os.close, self._memory)
                self._end, other = Pipe()
                opened.callback(self._end.close)
                with other:
                    self._process = _start(other.fileno(), self._memory)
            except OSError as error:  # no memory, no process, no file handle left
                raise DecoderError(
                    f"the process that decodes videos cannot be started ({error}); look at what "
                    "this machine has left of memory, processes and open files"
                ) from error
            opened.callback(self._end_process)
            self._await_start()
            self._opened = opened.pop_all()

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
        self._opened.close()

    def _end_process(self) -> None:
        self._process.kill()
        self._process.wait()

    def _await_start(self) -> None:
        try:
            if self._end.poll(_START_S):
                self._end.recv()
                return
            what = f"was not ready within {_START_S:g} s"
        except (EOFError, OSError):
            what = f"ended with code {self._process.wait()} as it started"
        raise DecoderError(
            f"the process that decodes videos {what}; try `{sys.executable} -c 'import decord'`"
        )


class Decoder:
    """Asks the decoding process, and replaces it when it must be."""

    def __init__(self) -> None:
        self.owner = os.getpid()
        self._lock = threading.Lock()
        self._process: _Process | None = None
        self._begun: Request | None = None
        self._second: dict[str, ReaderName] = {}  # by content: clips that the first cannot read
        self._rescued: set[str] = set()  # these, and clips that the first did not read in time

    @property
    def clips_by_second_reader(self) -> int:
        """How many clips the first reader did not read, but the second did."""
        return len(self._rescued)

    def begin(self, clip: Clip, indices: tuple[int, ...], describe: bool) -> None:
        with self._lock:
            if self._begun is None:
                self._send((self._names(clip)[0], *_named(clip), indices, describe))

    def read(
        self, clip: Clip, indices: tuple[int, ...], describe: bool, timeout_s: float
    ) -> tuple[np.ndarray | None, VideoInfo | None]:
        """The frames, if any were asked for, and the description, if asked for, from the first
        reader that has them; each has `timeout_s` seconds. Raises `VideoError`: the last one's;
        `DecoderError` if there is no process to ask.
        """
        with self._lock:
            names, late = self._names(clip), False
            for number, name in enumerate(names):
                try:
                    found = self._ask((name, *_named(clip), indices, describe), timeout_s)
                except VideoError as error:
                    if number == len(names) - 1:
                        raise
                    late = late or isinstance(error, VideoTimeoutError)
                else:
                    if number:
                        self._rescued.add(clip.content)
                        if not late:  # a busy machine is no reason to do without the first
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
            try:
                self._process.send(request)
            except _Gone as error:
                self.close()
                raise DecoderError(
                    "the process that decodes videos ends as soon as it has started; something on "
                    "this machine kills it, such as a limit on memory"
                ) from error
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


def _start(end: int, memory: int) -> subprocess.Popen[bytes]:
    """Start `rl.data.readers` on its end of the pipe and the shared memory."""
    # Not forked: FFmpeg, torch and CUDA all have threads that a fork would cut off. -P: the folder
    # of the script is no place to import from.
    return subprocess.Popen(
        [sys.executable, "-P", readers.__file__, str(end), str(memory)],
        pass_fds=(end, memory),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        process_group=0,  # Ctrl-C is for this process, which then ends that one
    )


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

"""The quickstart world: a ball blown across a board of coloured tiles, as MP4 files with a JSONL
manifest.

The board has 4x4 tiles, each of one of three random colours. The ball rests on a tile and each move
carries it where that tile's colour says: one row down and one column left (red), straight (green)
or right (blue), around the edges like a torus. A clip holds eight states; the first two are shown
to the model, the six others are what it must imagine to say in which column the ball ends. The
board is new in every clip, so nothing can be learned by heart: the answer takes six look-ups, one
after the other. Chance is 25 %, and a perfect player gets all of them right.

Each state is drawn in two frames, because Qwen3-VL merges frames in pairs. A tile is 8 px, a frame
32x32 px.
"""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import av
import numpy as np

from recipes.quickstart import texts
from rl.errors import DataError
from rl.writing import write_text, write_whole

OBSERVED = 2  # states shown
FUTURE = 6  # states to imagine
STATES = OBSERVED + FUTURE
FRAMES_PER_STATE = 2
FPS = 2
TILE_PX = 8
FRAME_PX = texts.SIZE * TILE_PX
PALETTE = np.array(
    [[230, 26, 26], [26, 204, 26], [38, 64, 242]], dtype=np.uint8
)  # red, green, blue
MOVES = np.array([[1, -1], [1, 0], [1, 1]])  # (rows, columns) a colour moves the ball
SPLITS = ("train", "rl", "validation", "held_out")  # the last is for the final table only

Progress = Callable[[int, int], object]  # called with (clips done, clips in all)


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn."""

    board: np.ndarray  # int64 [4, 4], indices into `texts.COLOURS`
    path: np.ndarray  # int64 [STATES, 2], the ball's (row, column) in each state
    template: int  # which of `texts.QUESTIONS` is asked

    @property
    def answer(self) -> str:
        return texts.COLUMNS[self.path[-1, 1]]


def follow(
    board: np.ndarray, start: Sequence[int] | np.ndarray, states: int = STATES
) -> np.ndarray:
    """The ball's positions [states, 2] on `board` [4, 4] from the (row, column) `start`."""
    path = [np.asarray(start)]
    for _ in range(states - 1):
        row, column = path[-1]
        path.append((path[-1] + MOVES[board[row, column]]) % texts.SIZE)
    return np.stack(path)


def draw_clip(seed: int, split: str, index: int) -> Clip:
    """Clip `index` of a split: a function of its arguments alone, so a longer split begins with a
    shorter one.
    """
    rng = np.random.default_rng([seed, index, *split.encode()])
    board = rng.integers(0, len(texts.COLOURS), (texts.SIZE, texts.SIZE))
    path = follow(board, rng.integers(0, texts.SIZE, 2))
    return Clip(board, path, int(rng.integers(0, len(texts.QUESTIONS))))


def render(board: np.ndarray, path: np.ndarray) -> np.ndarray:
    """Draw the states `path` [T, 2] on `board` [4, 4]: uint8 [T, 32, 32, 3], one frame a state."""
    tiles = PALETTE[board].astype(np.float64)
    empty = tiles.repeat(TILE_PX, axis=0).repeat(TILE_PX, axis=1)
    frames = np.repeat(empty[None], len(path), axis=0)
    disc = _disc()[..., None]
    for frame, (row, column) in zip(frames, path, strict=True):
        tile = frame[row * TILE_PX : (row + 1) * TILE_PX, column * TILE_PX : (column + 1) * TILE_PX]
        tile[:] = tile * (1 - disc) + 255 * disc
    return frames.round().astype(np.uint8)


def _disc() -> np.ndarray:
    """How much of each pixel of a tile the ball covers: [8, 8] in [0, 1], with a soft edge."""
    offset = np.arange(TILE_PX) - (TILE_PX - 1) / 2
    radius = np.hypot(offset[:, None], offset[None])
    return np.clip(0.38 * TILE_PX - radius + 0.5, 0, 1)


def manifest_row(clip: Clip, split: str, index: int) -> dict[str, Any]:
    """The manifest row of a clip; `video` is relative to the manifest."""
    shown = OBSERVED * FRAMES_PER_STATE
    # The span begins with the last state shown, the anchor: from there on, each latent is one move
    # from the one before.
    imagine = list(range(shown - FRAMES_PER_STATE, STATES * FRAMES_PER_STATE))
    return {
        "id": f"{split}-{index + 1:05d}",
        "video": f"{split}/{index + 1:05d}.mp4",
        "question": texts.QUESTIONS[clip.template],
        "answer": clip.answer,
        "options": list(texts.COLUMNS),
        "frames": list(range(shown)),
        "imagine": [imagine],
        "board": clip.board.tolist(),
        "path": clip.path.tolist(),
        "template": clip.template,
    }


def encode_mp4(frames: np.ndarray, fps: int = FPS) -> bytes:
    """An H.264 file of `frames` (uint8 [T, H, W, 3]); lossless but for the rounding of RGB to YUV
    (1 of 255).
    """
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as container:
        # 4:4:4 keeps the colour of every pixel; at 8 px a tile, 4:2:0 would smear them by up to 100
        # of 255.
        stream = container.add_stream(
            "libx264", rate=fps, options={"qp": "0", "preset": "superfast"}
        )
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = "yuv444p"
        stream.thread_count = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def write_world(
    folder: str | Path, split: str, count: int, seed: int, progress: Progress | None = None
) -> Path:
    """Write `count` clips as ``folder/split/00001.mp4 ...`` and the manifest
    ``folder/split.jsonl``.

    Returns the manifest's path. What an earlier, perhaps interrupted call with the same seed left
    is kept: only missing clips are encoded (2 ms each, too little to share between processes).
    Files appear whole or not at all, the manifest last. Raises `DataError` for a `folder/split`
    that holds anything else.
    """

    def clip(index: int) -> tuple[dict[str, Any], np.ndarray]:
        drawn = draw_clip(seed, split, index)
        return manifest_row(drawn, split, index), render(drawn.board, drawn.path)

    origin = {"world": 1, "split": split, "seed": seed}
    return write_clips(folder, split, count, clip, origin, progress)


def write_clips(
    folder: str | Path,
    split: str,
    count: int,
    clip: Callable[[int], tuple[dict[str, Any], np.ndarray]],
    origin: dict[str, Any],
    progress: Progress | None = None,
) -> Path:
    """Write a split of any world, as `write_world` does for this one.

    `clip(index)` gives a manifest row and a frame a state (uint8 [STATES, H, W, 3]), each shown
    `FRAMES_PER_STATE` times; `origin` says what the clips are a function of.
    """
    clips, manifest = Path(folder, split), Path(folder, f"{split}.jsonl")
    _claim(clips, manifest, origin=json.dumps(origin))
    there = {path.name for path in clips.glob("*.mp4")}
    rows: list[dict[str, Any]] = []
    for index in range(count):
        row, frames = clip(index)
        rows.append(row)
        path = Path(folder, row["video"])
        if path.name not in there:
            film = encode_mp4(frames.repeat(FRAMES_PER_STATE, axis=0))
            write_whole(path, lambda draft, film=film: draft.write_bytes(film))
        if progress:
            progress(index + 1, count)
    return write_jsonl(manifest, rows)


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write `rows` as a manifest, if the file does not say the same already."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        write_text(path, text)
    return path


def _claim(folder: Path, manifest: Path, origin: str) -> None:
    """Make `folder` ours: clips of another `origin` (another seed) go, anything else is refused."""
    source = folder / "source.json"
    if source.exists() and source.read_text() != origin:
        manifest.unlink(missing_ok=True)  # first: a manifest must never speak of other clips
        for clip in folder.glob("*.mp4"):
            clip.unlink()
    elif not source.exists() and any(path.suffix != ".part" for path in folder.glob("*")):
        raise DataError(
            f"{folder} holds files that are not a quickstart world's; choose another folder or "
            "empty it"
        )
    folder.mkdir(parents=True, exist_ok=True)
    write_text(source, origin)

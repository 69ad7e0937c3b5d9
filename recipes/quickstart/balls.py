"""A second procedural world, for what one word cannot hold: balls that fly across a board and
bounce off its walls and off one another, as MP4 files with a JSONL manifest.

A lattice gas (after Hardy, Pomeau and de Pazzis, 1973). Three balls of equal mass move one of 4x4
tiles a state along a row or a column; a wall turns a ball back. Balls that arrive on the same tile
collide: two exchange their velocities, as equal masses do in an elastic collision; of three, each
takes that of the next (a rule of ours). A clip has eight states of two frames, a moment apart, so
that one frame pair, and therefore one pooled feature, shows where the balls are and where they are
heading. They shine in channels of their own, so that none hides another. The first two states are
shown; in which quarter of the board one of the balls is in the last state is the question (A top
left, B top right, C bottom left, D bottom right). That ball collides in the unseen part, and
whether it ends left or right, above or below of where it was last seen is drawn evenly: neither
flying straight on nor staying is an answer. Chance is 25 %.

Where a ball goes next depends on places and directions of all three, while a word of a text chain
names the tile of one ball. That is the difference to the tiles of `recipes.quickstart.world`, where
a state is one word. There are few paths, though (with two balls 94 % of held-out clips had been
seen in training): those of validation and held-out clips are set apart by their checksum.
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recipes.quickstart import texts
from recipes.quickstart.world import Progress, write_clips
from recipes.quickstart.worlds import Facts, Packer, Questions, Words, World
from rl.trajectory import Sample

if TYPE_CHECKING:
    from recipes.quickstart.perception import Perception

OBSERVED = 2  # states shown
FUTURE = 6  # states to imagine
STATES = OBSERVED + FUTURE
FRAMES_PER_STATE = 2
FPS = 2
SIZE = texts.SIZE  # tiles along each side of the board
TILE_PX = 8
FRAME_PX = SIZE * TILE_PX
RADIUS = 3.5  # pixels
HEADING = 2.0  # pixels that a ball is on its way in the second frame of a state
COLLISIONS = 1  # of the asked ball in the unseen part, at least
UNSEEN = ("validation", "held_out")  # splits with paths of their own
DIRECTIONS = np.array([[-1, 0], [1, 0], [0, -1], [0, 1]])  # (rows, columns)

BALLS_WORDS = ("red", "green", "blue")  # the channel of a frame in which each shines
QUESTIONS = tuple(f"Where does {ball} end?" for ball in BALLS_WORDS)
OPTIONS = texts.COLUMNS


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn."""

    places: np.ndarray  # int64 [STATES, balls, 2], (row, column)
    velocities: np.ndarray  # int64 [STATES, balls, 2], with which the balls leave
    ball: int  # the one that is asked for

    @property
    def answer(self) -> str:
        return OPTIONS[_quarter(self.places[-1, self.ball])]

    @property
    def cells(self) -> np.ndarray:
        """The tile of each ball in each state: int64 [STATES, balls], row by row."""
        return self.places[..., 0] * SIZE + self.places[..., 1]


def fly(
    places: np.ndarray, velocities: np.ndarray, states: int = STATES
) -> tuple[np.ndarray, np.ndarray]:
    """Places and velocities [states, N, 2] of balls that start at `places` with `velocities`
    [N, 2], a velocity being one tile up, down, left or right.

    Balls on tiles of one colour of a chessboard stay on such, so they meet on tiles and never
    between two.
    """
    path, moves = [places.tolist()], [velocities.tolist()]
    for _ in range(states - 1):
        there: dict[tuple[int, ...], list[int]] = {}
        place, velocity = [], []
        for ball, (here, move) in enumerate(zip(path[-1], moves[-1], strict=True)):
            turned = [-v if not 0 <= x + v < SIZE else v for x, v in zip(here, move, strict=True)]
            velocity.append(turned)
            place.append([x + v for x, v in zip(here, turned, strict=True)])
            there.setdefault(tuple(place[-1]), []).append(ball)
        after = list(velocity)
        for balls in there.values():
            for ball, other in zip(balls, balls[1:] + balls[:1], strict=True):
                after[ball] = velocity[other]
        path.append(place)
        moves.append(after)
    return np.array(path), np.array(moves)


def collides(places: np.ndarray, ball: int) -> np.ndarray:
    """In which states `ball` shares its tile: bool [T], of `places` [T, N, 2]."""
    return (places == places[:, ball, None]).all(-1).sum(1) > 1


def draw_clip(seed: int, split: str, index: int) -> Clip:
    """Clip `index` of a split: a function of its arguments alone, so a longer split begins with a
    shorter one.
    """
    rng = np.random.default_rng([seed, index, *split.encode()])
    ball = int(rng.integers(len(BALLS_WORDS)))
    turn = int(rng.integers(4))  # how the last quarter differs from the last one shown
    while True:
        parity = int(rng.integers(2))  # the colour of the tiles that the balls start on
        tiles = rng.choice(SIZE * SIZE // 2, len(BALLS_WORDS), replace=False)
        row, half = np.divmod(tiles, SIZE // 2)
        places = np.stack([row, 2 * half + (row + parity) % 2], 1)
        velocities = DIRECTIONS[rng.integers(0, len(DIRECTIONS), len(BALLS_WORDS))]
        path, moves = fly(places, velocities)
        first, last = path[OBSERVED - 1, ball], path[-1, ball]
        if (
            collides(path[OBSERVED:-1], ball).sum() >= COLLISIONS
            and _unseen(path) == (split in UNSEEN)
            and _quarter(first) ^ _quarter(last) == turn
        ):
            return Clip(path, moves, ball)


def _unseen(path: np.ndarray) -> bool:
    """Whether a path is one of the quarter that is never trained on."""
    return zlib.crc32(path.astype(np.int8).tobytes()) % 4 == 0


def _quarter(place: np.ndarray) -> int:
    """Of the board, row by row."""
    return 2 * int(place[0] >= SIZE // 2) + int(place[1] >= SIZE // 2)


def render(clip: Clip) -> np.ndarray:
    """Draw all states: uint8 [STATES · 2, 32, 32, 3]. A ball is a disc with a soft edge, in the
    middle of its tile in a state's first frame and on its way in the second.
    """
    middle = (clip.places + 0.5) * TILE_PX
    centres = np.stack([middle, middle + HEADING * clip.velocities], 1).reshape(
        -1, *middle.shape[1:]
    )
    pixels = np.arange(FRAME_PX) + 0.5
    away = np.hypot(
        pixels[None, :, None, None] - centres[:, None, None, :, 0],
        pixels[None, None, :, None] - centres[:, None, None, :, 1],
    )  # [T, rows, columns, balls]
    frames = np.zeros((*away.shape[:-1], 3), dtype=np.uint8)
    frames[..., : away.shape[-1]] = (255 * np.clip(RADIUS + 0.5 - away, 0.0, 1.0)).round()
    return frames


def manifest_row(clip: Clip, split: str, index: int) -> dict[str, Any]:
    """The manifest row of a clip; `video` is relative to the manifest."""
    shown = OBSERVED * FRAMES_PER_STATE
    # As in the first world, the span begins with the last state shown.
    imagine = list(range(shown - FRAMES_PER_STATE, STATES * FRAMES_PER_STATE))
    return {
        "id": f"{split}-{index + 1:05d}",
        "video": f"{split}/{index + 1:05d}.mp4",
        "question": QUESTIONS[clip.ball],
        "answer": clip.answer,
        "options": list(OPTIONS),
        "frames": list(range(shown)),
        "imagine": [imagine],
        "cells": clip.cells.tolist(),
        "ball": clip.ball,
    }


def write_balls(
    folder: str | Path, split: str, count: int, seed: int, progress: Progress | None = None
) -> Path:
    """Write `count` clips and their manifest; see `recipes.quickstart.world.write_world`."""

    def clip(index: int) -> tuple[dict[str, Any], np.ndarray]:
        drawn = draw_clip(seed, split, index)
        return manifest_row(drawn, split, index), render(drawn)

    origin = {"world": "balls", "split": split, "seed": seed}
    return write_clips(folder, split, count, clip, origin, progress=progress)


# -- what checkpoint and perception see ------------------------------------------------------------


def cells() -> list[str]:
    """All cell words, row by row."""
    return texts.cells()


def corpus() -> list[str]:
    """Texts that contain every word the tokenizer must know as one token."""
    words = [texts.WHERE, texts.READ, texts.NEXT, *BALLS_WORDS, *cells()]
    every = [*QUESTIONS, *OPTIONS, *words, *(f" {word}" for word in words)]
    return every + [f"{role}\n" for role in texts.ROLES] + ["\n", *BALLS.seconds]


def facts(samples: Sequence[Sample]) -> Facts:
    """`cells` [N, STATES, balls]."""
    return {"cells": torch.tensor([s.extra["cells"] for s in samples])}


def ask(facts: Facts, words: Words, config: Perception, generator: torch.Generator) -> Questions:
    """On which tiles the balls are in the last state shown, and of `config.reads` states where they
    are in them and one state later.
    """
    places = words.kinds["cell"][facts["cells"]]
    count, _, balls = places.shape
    names = words.kinds["ball"][:, None].expand(-1, count)
    packer = Packer(count, words)

    def tell(task: str, given: torch.Tensor | None, cells: torch.Tensor) -> None:
        packer.open(task, given)
        for ball in range(balls):
            packer.go_on(task, names[ball], cells[:, ball])

    tell(texts.WHERE, None, places[:, OBSERVED - 1])
    states: list[torch.Tensor] = []
    rows = torch.arange(count)
    for _ in range(config.reads):
        state = torch.randint(0, STATES - 1, (count,), generator=generator)
        tell(texts.READ, packer.latent, places[rows, state])
        tell(texts.NEXT, packer.latent, places[rows, state + 1])
        states.append(state)
    return packer.done(states)


BALLS = World(
    frame_px=FRAME_PX,
    fps=FPS,
    frames_per_state=FRAMES_PER_STATE,
    observed=OBSERVED,
    states=STATES,
    corpus=corpus,
    vocabulary={"cell": cells(), "ball": BALLS_WORDS},
    tasks=(texts.WHERE, texts.READ, texts.NEXT),
    facts=facts,
    ask=ask,
)

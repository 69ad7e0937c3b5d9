"""A second procedural world, whose state is more than one word: two balls that the colours of a
board carry on, each its own way, as MP4 files with a JSONL manifest.

The board and its winds are those of `recipes.quickstart.world`: each move carries both balls one
row down and one column left, straight or right, by the colour of the tile that each is on, around
the edges like a torus. The question is on which side both end (A: both left; B: white left, black
right; C: white right, black left; D: both right). A state is two places, so a chain of words needs
two words a state where a chain of latents needs one latent. Two states are shown, six are to be
imagined; boards are new in every clip, and the four answers equally frequent (after fewer moves, A
and D are a little more so). Chance is 25 %, and a perfect player gets all of them right.

Each ball has half of a tile to itself, so that none hides the other, and the two never meet: from
there on they would be one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recipes.quickstart import texts
from recipes.quickstart.tiles import ask_colours
from recipes.quickstart.world import (
    FPS,
    FRAME_PX,
    FRAMES_PER_STATE,
    OBSERVED,
    PALETTE,
    STATES,
    TILE_PX,
    Progress,
    follow,
    write_clips,
)
from recipes.quickstart.worlds import Facts, Packer, Questions, Words, World
from rl.trajectory import Sample

if TYPE_CHECKING:
    from recipes.quickstart.perception import Perception

NAMES = ("white", "black")
SHADES = (255, 0)
WIDTH = TILE_PX // len(NAMES)  # of a ball, in pixels
QUESTION = "On which side does each ball end?"
OPTIONS = texts.COLUMNS
PERCEPTION_STEPS = 600  # to see two balls takes longer than to see one


@dataclass(frozen=True)
class Clip:
    """One clip before it is drawn."""

    board: np.ndarray  # int64 [4, 4], indices into `texts.COLOURS`
    paths: np.ndarray  # int64 [STATES, balls, 2], (row, column)

    @property
    def answer(self) -> str:
        return OPTIONS[sides(self.paths[-1])]

    @property
    def cells(self) -> np.ndarray:
        """The tile of each ball in each state: int64 [STATES, balls], row by row."""
        return self.paths[..., 0] * texts.SIZE + self.paths[..., 1]


def sides(places: np.ndarray) -> int:
    """The option that says on which side the balls are, of their `places` [2, 2]."""
    white, black = places[:, 1] >= texts.SIZE // 2
    return 2 * int(white) + int(black)


def draw_clip(seed: int, split: str, index: int) -> Clip:
    """Clip `index` of a split: a function of its arguments alone, so a longer split begins with a
    shorter one.
    """
    rng = np.random.default_rng([seed, index, *split.encode()])
    wanted = int(rng.integers(len(OPTIONS)))
    while True:
        board = rng.integers(0, len(texts.COLOURS), (texts.SIZE, texts.SIZE))
        starts = rng.integers(0, texts.SIZE, (len(NAMES), 2))
        paths = np.stack([follow(board, start) for start in starts], axis=1)
        apart = len(np.unique(paths[-1], axis=0)) == len(NAMES)  # balls that meet stay together
        if apart and sides(paths[-1]) == wanted:
            return Clip(board, paths)


def render(clip: Clip) -> np.ndarray:
    """Draw all states: uint8 [STATES, 32, 32, 3], one frame a state."""
    empty = PALETTE[clip.board].repeat(TILE_PX, axis=0).repeat(TILE_PX, axis=1)
    frames = np.repeat(empty[None], len(clip.paths), axis=0)
    for frame, places in zip(frames, clip.paths, strict=True):
        for ball, (row, column) in enumerate(places):
            left = column * TILE_PX + ball * WIDTH
            frame[row * TILE_PX : (row + 1) * TILE_PX, left : left + WIDTH] = SHADES[ball]
    return frames


def manifest_row(clip: Clip, split: str, index: int) -> dict[str, Any]:
    """The manifest row of a clip; `video` is relative to the manifest."""
    shown = OBSERVED * FRAMES_PER_STATE
    # As in the first world, the span begins with the last state shown.
    imagine = list(range(shown - FRAMES_PER_STATE, STATES * FRAMES_PER_STATE))
    return {
        "id": f"{split}-{index + 1:05d}",
        "video": f"{split}/{index + 1:05d}.mp4",
        "question": QUESTION,
        "answer": clip.answer,
        "options": list(OPTIONS),
        "frames": list(range(shown)),
        "imagine": [imagine],
        "board": clip.board.tolist(),
        "cells": clip.cells.tolist(),
    }


def write_balls(
    folder: str | Path, split: str, count: int, seed: int, progress: Progress | None = None
) -> Path:
    """Write `count` clips and their manifest; see `recipes.quickstart.world.write_world`."""

    def clip(index: int) -> tuple[dict[str, Any], np.ndarray]:
        drawn = draw_clip(seed, split, index)
        return manifest_row(drawn, split, index), render(drawn)

    origin = {"world": "balls", "split": split, "seed": seed}
    return write_clips(folder, split, count, clip, origin, progress)


# -- what checkpoint and perception see ------------------------------------------------------------


def corpus() -> list[str]:
    """Texts that contain every word the tokenizer must know as one token."""
    tasks = (texts.WHERE, texts.TILE, texts.READ, texts.NEXT)
    words = [*tasks, *texts.COLOURS, *NAMES, *texts.cells()]
    every = [QUESTION, *OPTIONS, *words, *(f" {word}" for word in words)]
    return every + [f"{role}\n" for role in texts.ROLES] + ["\n", *BALLS.seconds]


def facts(samples: Sequence[Sample]) -> Facts:
    """`boards` [N, 16] colours and `cells` [N, STATES, balls]."""
    return {
        "boards": torch.tensor([s.extra["board"] for s in samples]).flatten(1),
        "cells": torch.tensor([s.extra["cells"] for s in samples]),
    }


def ask(facts: Facts, words: Words, config: Perception, generator: torch.Generator) -> Questions:
    """Where the balls are in the last state shown, what colour `config.tiles` tiles have, and of
    `config.reads` states where the balls are in them and one move later.
    """
    places = words.kinds["cell"][facts["cells"]]
    count, _, balls = places.shape
    names = words.kinds["ball"][:, None].expand(-1, count)
    packer, rows = Packer(count, words), torch.arange(count)

    def tell(task: str, cells: torch.Tensor) -> None:
        """Of a latent, ball by ball: the answer is due at the latent itself, where a span's next
        latent will be, and not from words further on.
        """
        for ball in range(balls):
            packer.open(task, names[ball])
            packer.go_on(task, packer.latent, cells[:, ball])

    packer.open(texts.WHERE, None)
    for ball in range(balls):
        packer.go_on(texts.WHERE, names[ball], places[:, OBSERVED - 1, ball])
    ask_colours(packer, facts, words, config, generator)
    states: list[torch.Tensor] = []
    for _ in range(config.reads):
        # Any but the last: each has a next one.
        state = torch.randint(0, STATES - 1, (count,), generator=generator)
        tell(texts.READ, places[rows, state])
        tell(texts.NEXT, places[rows, state + 1])
        states += [state] * balls
    return packer.done(states)


BALLS = World(
    frame_px=FRAME_PX,
    fps=FPS,
    frames_per_state=FRAMES_PER_STATE,
    observed=OBSERVED,
    states=STATES,
    corpus=corpus,
    vocabulary={"cell": texts.cells(), "colour": texts.COLOURS, "ball": NAMES},
    tasks=(texts.WHERE, texts.TILE, texts.READ, texts.NEXT),
    facts=facts,
    ask=ask,
)

"""Perception: the tiny model learns to see, from nothing. It stands in for the pretraining of a real video model.

One sequence a clip holds the two observed states as video and a few short texts about them (see `texts`): where the
ball is, what colour some tiles have, and, from the pooled feature of a single state fed as a latent, where the ball
is in it and where it will be one move later. The last two make a state's pooled feature something that can be read
and moved on from, which is what latents will have to be.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recipes.quickstart import texts
from recipes.quickstart.world import FPS, FRAMES_PER_STATE, OBSERVED, STATES
from rl.data.media import MediaProcessor
from rl.data.video import read_frames
from rl.errors import CheckpointError
from rl.trajectory import Sample

TASKS = ("where", "tile", "read", "next")
STATE_FILE = "perception.pt"


@dataclass(frozen=True)
class Perception:
    """How to pretrain. `tiles` and `reads` are questions a clip: tiles named, and pooled states read and moved on."""

    steps: int = 300
    batch_size: int = 64
    learning_rate: float = 4e-3
    warmup: int = 50
    final_rate: float = 0.05  # of the learning rate, where the cosine ends
    tiles: int = 3
    reads: int = 2
    max_grad_norm: float = 1.0
    checkpoint_every: int = 100


@dataclass(frozen=True)
class Questions:
    """The packed texts of a batch of B clips: which states are pooled, and what is asked after the video."""

    ids: torch.Tensor  # int64 [B, Q]
    asked: torch.Tensor  # int64 [A], where in Q the words to be predicted stand
    tasks: tuple[str, ...]  # [A]
    states: torch.Tensor  # int64 [B, R], the states whose pooled features are the latents, in order


@dataclass(frozen=True)
class Words:
    """Token ids of the words of `texts`, as they stand in running text."""

    task: dict[str, int]
    cell: torch.Tensor  # int64 [16], row by row
    colour: torch.Tensor  # int64 [3]
    latent: int

    @classmethod
    def of(cls, tokenizer: Any, latent: int) -> Words:
        def one(word: str) -> int:
            ids = tokenizer(f" {word}", add_special_tokens=False)["input_ids"]
            if len(ids) != 1:
                raise ValueError(f"{word!r} is {len(ids)} tokens; the tokenizer must know each word as one")
            return ids[0]

        return cls(
            task={task: one(task) for task in TASKS},
            cell=torch.tensor([one(cell) for cell in texts.cells()]),
            colour=torch.tensor([one(colour) for colour in texts.COLOURS]),
            latent=latent,
        )


def ask(
    boards: torch.Tensor, paths: torch.Tensor, words: Words, config: Perception, generator: torch.Generator
) -> Questions:
    """Draw the questions of a batch: `boards` [B, 16] colours, `paths` [B, STATES] cells."""
    count = len(boards)
    rows = torch.arange(count)
    columns: list[torch.Tensor] = []
    asked: list[int] = []
    tasks: list[str] = []

    def add(task: str, given: torch.Tensor | None, answer: torch.Tensor) -> None:
        columns.append(torch.full((count,), words.task[task]))
        if given is not None:
            columns.append(given)
        asked.append(len(columns))
        tasks.append(task)
        columns.append(answer)

    def random(high: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    latent = torch.full((count,), words.latent)
    add("where", None, words.cell[paths[:, OBSERVED - 1]])
    for _ in range(config.tiles):
        tile = random(boards.shape[1])
        add("tile", words.cell[tile], words.colour[boards[rows, tile]])
    states: list[torch.Tensor] = []
    for _ in range(config.reads):
        state = random(STATES - 1)  # any but the last: each has a next one
        add("read", latent, words.cell[paths[rows, state]])
        add("next", latent, words.cell[paths[rows, state + 1]])
        states += [state, state]
    return Questions(
        torch.stack(columns, 1), torch.tensor(asked), tuple(tasks), torch.stack(states, 1)
    )


class Clips:
    """All states of the training clips as the video processor gives them, and what is true of them."""

    def __init__(self, samples: Sequence[Sample], media: MediaProcessor, progress: Callable[[int, int], object]) -> None:
        self.boards = torch.tensor([s.extra["board"] for s in samples]).flatten(1)
        path = torch.tensor([s.extra["path"] for s in samples])
        self.paths = path[..., 0] * texts.SIZE + path[..., 1]
        frames = range(STATES * FRAMES_PER_STATE)
        parts = []
        for first in range(0, len(samples), 64):
            batch = samples[first : first + 64]
            clips = np.stack([read_frames(s.video, frames) for s in batch])
            pixels = media.process_frames(clips, FPS, [frames] * len(batch))["pixel_values_videos"]
            # Half precision halves the memory, and is finer than the 8 bits of a pixel.
            parts.append(pixels.half().view(len(batch), STATES, -1, pixels.shape[-1]))
            progress(first + len(batch), len(samples))
        self.pixels = torch.cat(parts)  # [N, STATES, patches, D]

    def __len__(self) -> int:
        return len(self.boards)

    def states(self, rows: torch.Tensor, states: torch.Tensor) -> torch.Tensor:
        """Patches [B * S * patches, D] of `states` [B, S] of the clips `rows` [B]."""
        return self.pixels[rows[:, None], states].flatten(0, 2).float()

"""The first world, `recipes.quickstart.world`, as checkpoint and perception see it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from recipes.quickstart import texts
from recipes.quickstart.world import FPS, FRAME_PX, FRAMES_PER_STATE, OBSERVED, STATES
from recipes.quickstart.worlds import Facts, Packer, Questions, Words, World
from rl.trajectory import Sample

if TYPE_CHECKING:
    from recipes.quickstart.perception import Perception


def facts(samples: Sequence[Sample]) -> Facts:
    """`boards` [N, 16] colours and `paths` [N, STATES] cells."""
    path = torch.tensor([s.extra["path"] for s in samples])
    return {
        "boards": torch.tensor([s.extra["board"] for s in samples]).flatten(1),
        "paths": path[..., 0] * texts.SIZE + path[..., 1],
    }


def ask(facts: Facts, words: Words, config: Perception, generator: torch.Generator) -> Questions:
    """Where the ball is, what colour `config.tiles` tiles have, and of `config.reads` states where
    the ball is in them and one move later.
    """
    boards, paths = facts["boards"], facts["paths"]
    count = len(boards)
    rows = torch.arange(count)
    cell, colour = words.kinds["cell"], words.kinds["colour"]
    packer = Packer(count, words)

    def random(high: int) -> torch.Tensor:
        return torch.randint(0, high, (count,), generator=generator)

    packer.add(texts.WHERE, None, cell[paths[:, OBSERVED - 1]])
    for _ in range(config.tiles):
        tile = random(boards.shape[1])
        packer.add(texts.TILE, cell[tile], colour[boards[rows, tile]])
    states: list[torch.Tensor] = []
    for _ in range(config.reads):
        state = random(STATES - 1)  # any but the last: each has a next one
        packer.add(texts.READ, packer.latent, cell[paths[rows, state]])
        packer.add(texts.NEXT, packer.latent, cell[paths[rows, state + 1]])
        states.append(state)
    return packer.done(states)


TILES = World(
    frame_px=FRAME_PX,
    fps=FPS,
    frames_per_state=FRAMES_PER_STATE,
    observed=OBSERVED,
    states=STATES,
    corpus=texts.corpus,
    vocabulary={"cell": texts.cells(), "colour": texts.COLOURS},
    tasks=(texts.WHERE, texts.TILE, texts.READ, texts.NEXT),
    facts=facts,
    ask=ask,
)

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
    paths = facts["paths"]
    count = len(paths)
    rows, cell = torch.arange(count), words.kinds["cell"]
    packer = Packer(count, words)
    packer.add(texts.WHERE, None, cell[paths[:, OBSERVED - 1]])
    ask_colours(packer, facts, words, config, generator)
    states: list[torch.Tensor] = []
    for _ in range(config.reads):
        # Any but the last: each has a next one.
        state = torch.randint(0, STATES - 1, (count,), generator=generator)
        packer.add(texts.READ, packer.latent, cell[paths[rows, state]])
        packer.add(texts.NEXT, packer.latent, cell[paths[rows, state + 1]])
        states.append(state)
    return packer.done(states)


def ask_colours(
    packer: Packer, facts: Facts, words: Words, config: Perception, generator: torch.Generator
) -> None:
    """What colour `config.tiles` tiles have."""
    boards = facts["boards"]
    count, tiles = boards.shape
    for _ in range(config.tiles):
        tile = torch.randint(0, tiles, (count,), generator=generator)
        colour = words.kinds["colour"][boards[torch.arange(count), tile]]
        packer.add(texts.TILE, words.kinds["cell"][tile], colour)


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

"""The study's questions: clips of either world, asked about like FutureBench over one hop or two.

A hop is three moves. The reasoning that is taught for it is a latent span, which depicts the state
it starts from and the three that follow, and then in words the cell of each ball behind it. In a
"seen" row the clip shows everything up to the answer, so that nothing is left to foresee: this is
what the base model learns to answer, and what the hinted probe of the selection shows. A "steps"
row has the whole chain of thought, step by step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipes.quickstart import balls, texts, tiles, world
from recipes.quickstart.perception import Perception
from recipes.quickstart.world import FRAMES_PER_STATE, OBSERVED
from recipes.quickstart.worlds import World

Style = Literal["latents", "text", "direct", "seen", "steps"]
Row = dict[str, Any]  # of a manifest
Questions = Mapping[int, tuple[str, str]]  # by the number of hops, in two wordings

MOVES = 3  # of one hop
LATENTS = 1 + MOVES  # of one hop's span: the state it starts from, and one for each move
REASON_OPEN, REASON_CLOSE = "<reason>", "</reason>"
# How often an answer to each wording is taught step by step. In between the policy cannot know, and
# that is what reinforcement learning has to decide (docs/quickstart.md).
SHARES = (0.75, 0.3)


@dataclass(frozen=True)
class Setting:
    """A world as the study asks about it. Both show as many states, in as many frames."""

    world: World
    write: Callable[..., Path]
    draw: Callable[[int, str, int], Any]  # (seed, split, index) -> clip
    row: Callable[[Any, str, int], Row]  # of a clip's manifest
    answer: Callable[[Any, int], str]  # (clip, state) -> letter
    cells: Callable[[Any, int], list[str]]  # (clip, state) -> a word for each ball
    questions: Questions
    perception: Perception


def _with_words(world: World, questions: Questions) -> World:
    """`world`, whose texts contain the study's words too."""
    asked = [question for wordings in questions.values() for question in wordings]
    return replace(
        world,
        corpus=lambda: [*world.corpus(), *asked],
        tags=(*world.tags, REASON_OPEN, REASON_CLOSE),
    )


_COLUMN: Questions = {
    1: ("Which column after three more moves?", "In which column three moves later?"),
    2: ("Which column after six more moves?", "In which column six moves later?"),
}
_SIDES: Questions = {
    1: ("Which sides after three more moves?", "On which sides three moves later?"),
    2: ("Which sides after six more moves?", "On which sides six moves later?"),
}
SETTINGS = {
    "tiles": Setting(
        world=_with_words(tiles.TILES, _COLUMN),
        write=world.write_world,
        draw=world.draw_clip,
        row=world.manifest_row,
        answer=lambda clip, state: texts.COLUMNS[clip.path[state, 1]],
        cells=lambda clip, state: [texts.cell(*clip.path[state].tolist())],
        questions=_COLUMN,
        perception=Perception(),
    ),
    "balls": Setting(
        world=_with_words(balls.BALLS, _SIDES),
        write=balls.write_balls,
        draw=balls.draw_clip,
        row=balls.manifest_row,
        answer=lambda clip, state: balls.OPTIONS[balls.sides(clip.paths[state])],
        cells=lambda clip, state: [texts.cell(*place) for place in clip.paths[state].tolist()],
        questions=_SIDES,
        perception=Perception(steps=balls.PERCEPTION_STEPS),
    ),
}


def row_of(
    setting: Setting, seed: int, split: str, index: int, style: Style, hops: int | None = None
) -> Row:
    """The manifest row of clip `index` of `split`, a function of the arguments alone.

    "latents" rows are taught span by span, "text" rows with every state in words behind an opening
    word (as often as `SHARES` says; else with the last state of each hop), "direct" rows not at
    all. All show the same two states, "seen" rows those that follow as well. "steps" rows
    have the column `steps`: of each move the cells behind it. The question is over so many `hops`,
    by default over one or two at random.
    """
    clip = setting.draw(seed, split, index)
    rng = np.random.default_rng([seed, index, *split.encode(), MOVES])
    drawn = int(rng.integers(1, len(setting.questions) + 1))
    hops = drawn if hops is None else hops
    chance = rng.random()
    row = setting.row(clip, split, index)
    row.setdefault("template", int(rng.integers(2)))  # the second world has one wording of its own
    row |= {
        "question": setting.questions[hops][row["template"]],
        "answer": setting.answer(clip, _end(hops)),
        "frames": _frames(0, _end(hops) if style == "seen" else OBSERVED - 1),
        "question_type": f"hop{hops}",
    }
    del row["imagine"]
    landings = [" ".join(setting.cells(clip, _end(hop))) for hop in range(1, hops + 1)]
    if style == "latents":
        row["imagine"] = [_frames(_end(hop), _end(hop + 1)) for hop in range(hops)]
        row["reasoning"] = ["", *landings]
    elif style == "text":
        states = range(OBSERVED, _end(hops) + 1)
        steps = [texts.NEXT, *(word for s in states for word in setting.cells(clip, s))]
        row["reasoning"] = " ".join(steps if chance < SHARES[row["template"]] else landings)
    elif style == "steps":
        moves = range(OBSERVED, _end(hops) + 1)
        row["steps"] = [" ".join(setting.cells(clip, state)) for state in moves]
    return row


def _end(hop: int) -> int:
    """The state in which the ball is behind hop number `hop`; 0: the last one shown."""
    return OBSERVED - 1 + MOVES * hop


def _frames(first: int, last: int) -> list[int]:
    """The frames of the states `first` to `last`."""
    return list(range(FRAMES_PER_STATE * first, FRAMES_PER_STATE * (last + 1)))

"""The study's questions: the quickstart's clips, asked about like FutureBench over one hop or two.

A hop is three moves of the ball. The reasoning that is taught for it is a latent span, which
depicts the state it starts from and the three that follow, and then in words the cell in which the
ball is behind it. In a "seen" row the clip shows everything up to the answer, so that nothing is
left to foresee: this is what the base model learns to answer, and what the hinted probe of the
selection shows.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np

from recipes.quickstart import texts
from recipes.quickstart.tiles import TILES
from recipes.quickstart.world import FRAMES_PER_STATE, OBSERVED, Clip, draw_clip
from rl.writing import write_text

Style = Literal["latents", "text", "direct", "seen"]

MOVES = 3  # of one hop
LATENTS = 1 + MOVES  # of one hop's span: the state it starts from, and one for each move
QUESTIONS = {
    1: ("Which column after three more moves?", "In which column three moves later?"),
    2: ("Which column after six more moves?", "In which column six moves later?"),
}
REASON_OPEN, REASON_CLOSE = "<reason>", "</reason>"
# How often an answer to each wording is taught step by step. In between the policy cannot know, and
# that is what reinforcement learning has to decide (docs/quickstart.md).
SHARES = (0.75, 0.3)


def corpus() -> list[str]:
    """Texts with every word of the study."""
    return [*texts.corpus(), *(q for questions in QUESTIONS.values() for q in questions)]


HOPS = replace(TILES, corpus=corpus, tags=(*TILES.tags, REASON_OPEN, REASON_CLOSE))


def row_of(seed: int, split: str, index: int, style: Style) -> dict[str, Any]:
    """The manifest row of clip `index` of `split`, a function of the arguments alone.

    "latents" rows are taught span by span, "text" rows with every state as a word behind an
    opening word (as often as `SHARES` says; else with one word a hop), "direct" rows not at all.
    All show the same two states, "seen" rows those that follow as well.
    """
    clip = draw_clip(seed, split, index)
    rng = np.random.default_rng([seed, index, *split.encode(), MOVES])
    hops = int(rng.integers(1, len(QUESTIONS) + 1))
    stepwise = bool(rng.random() < SHARES[clip.template])
    row: dict[str, Any] = {
        "id": f"{split}-{index + 1:05d}",
        "video": f"{split}/{index + 1:05d}.mp4",
        "question": QUESTIONS[hops][clip.template],
        "answer": texts.COLUMNS[clip.path[_end(hops), 1]],
        "options": list(texts.COLUMNS),
        "frames": _frames(0, OBSERVED - 1),
        "question_type": f"hop{hops}",
        "template": clip.template,
        "board": clip.board.tolist(),
        "path": clip.path.tolist(),
    }
    landings = [_cell(clip, _end(hop)) for hop in range(1, hops + 1)]
    if style == "latents":
        row["imagine"] = [_frames(_end(hop), _end(hop + 1)) for hop in range(hops)]
        row["reasoning"] = ["", *landings]
    elif style == "text":
        steps = [texts.NEXT, *(_cell(clip, s) for s in range(OBSERVED, _end(hops) + 1))]
        row["reasoning"] = " ".join(steps if stepwise else landings)
    elif style == "seen":
        row["frames"] = _frames(0, _end(hops))
    return row


def write_rows(path: Path, seed: int, parts: Iterable[tuple[str, Sequence[int], Style]]) -> Path:
    """Write a manifest of `parts`, each some clips of a split in one style."""
    return write_jsonl(
        path,
        [row_of(seed, split, index, style) for split, indices, style in parts for index in indices],
    )


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> Path:
    """Write `rows` as a manifest, if the file does not say the same already."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    if not path.exists() or path.read_text() != text:
        write_text(path, text)
    return path


def _end(hop: int) -> int:
    """The state in which the ball is behind hop number `hop`; 0: the last one shown."""
    return OBSERVED - 1 + MOVES * hop


def _frames(first: int, last: int) -> list[int]:
    """The frames of the states `first` to `last`."""
    return list(range(FRAMES_PER_STATE * first, FRAMES_PER_STATE * (last + 1)))


def _cell(clip: Clip, state: int) -> str:
    row, column = clip.path[state]
    return texts.cell(int(row), int(column))

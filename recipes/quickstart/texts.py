"""Every text the tiny model ever reads or writes, and the answer format. The tokenizer is trained
on these words.

Rows are numbered 1-4 from the top, columns 1-4 (or A-D) from the left. A cell is one word, such as
``r2c3``. A word is one token with or without a space before it, so texts can be chained with
spaces:

    where r2c3                the ball's cell in the last observed frame
    tile r2c3 red             the colour of a tile
    read<latent> r2c3         the ball's cell in the frame whose pooled feature is the latent
    next<latent> r3c3         the ball's cell one move later
"""

from __future__ import annotations

SIZE = 4  # tiles along each side of the board
COLOURS = ("red", "green", "blue")
COLUMNS = ("A", "B", "C", "D")

# Both questions mean the same and are six tokens long, so that all prompts have one length.
QUESTIONS = ("Which column after six more moves?", "In which column six moves later?")

WHERE = "where"
TILE = "tile"
READ = "read"
NEXT = "next"

ROLES = ("system", "user", "assistant")  # of a chat

ANSWER_OPEN = "<answer>"
ANSWER_CLOSE = "</answer>"


def cell(row: int, column: int) -> str:
    """The word of a cell; `row` and `column` count from 0."""
    return f"r{row + 1}c{column + 1}"


def answer(letter: str) -> str:
    """A completion's final answer."""
    return f"{ANSWER_OPEN}{letter}{ANSWER_CLOSE}"


def cells() -> list[str]:
    """All cell words, row by row."""
    return [cell(row, column) for row in range(SIZE) for column in range(SIZE)]


def corpus() -> list[str]:
    """Texts that contain every word the tokenizer must know as one token."""
    words = [WHERE, TILE, READ, NEXT, *COLOURS, *cells()]
    texts = [
        *QUESTIONS,
        *COLUMNS,
        *words,
        *(f" {word}" for word in words),
        *(f"{role}\n" for role in ROLES),
        "\n",
    ]
    # Qwen3-VL writes the time before each frame pair; at 2 frames a second pair t of a clip lies at
    # t + 0.25 s.
    return texts + [f"<{pair + 0.25:.1f} seconds>" for pair in range(8)]

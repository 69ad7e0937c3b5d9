"""TwiFF and what Future-L1 made of it: questions about the future of a clip, with the frames that a
chain of thought should depict.

Frames are numbers 1 to 8 of eight places spread over the clip (`Sample.pool`). The field names are
those of the TwiFF and Future-L1 repositories (arXiv 2606.05769).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rl.data.formats.draft import Draft, Format
from rl.data.formats.markup import exchanges, thoughts, turns, without_media
from rl.data.rows import Row
from rl.errors import DataError

POOL = 8


def _future_l1(row: Row) -> Iterator[Draft]:
    question, told = _one_exchange(row, "conversations")
    pieces, tagged = thoughts(told, "<image>")
    answer = row.get("answer")
    yield _taught(
        row,
        question,
        answer if answer is not None else tagged,
        pieces,
        shown=row.places("image", POOL, ascend=True),
        spans=row.places("reasoning_image", POOL),
    )


def _chat(row: Row) -> Iterator[Draft]:
    """Chats about a clip, their reasoning in words alone."""
    question, told = _one_exchange(row, "messages")
    pieces, answer = thoughts(told, "<image>")
    thought = pieces[0]
    videos, images = (_listed(row, column) for column in ("videos", "images"))
    if len(videos) > 1 or (videos and images):
        raise DataError(
            f"{row.where}: the row has {len(videos)} videos and {len(images)} images; a row shows "
            "one video, or images alone"
        )
    if len(pieces) > 1:
        raise DataError(
            f"{row.where}: the answer in column 'messages' has pictures of its own; only rows with "
            "'reasoning_image' say which frames those are"
        )
    system = [text for role, text in turns(row, "messages") if role == "system"]
    yield Draft(
        id=row.id(),
        question=without_media(question),
        answer=answer if answer is not None else thought,
        videos=videos,
        images=images,
        reasoning=(thought,) if answer is not None and thought else (),
        extra={"system": system[0]} if system else {},
        columns={"video": "videos", "answer": "messages"},
    )


def _twiff(row: Row) -> Iterator[Draft]:
    question, told = _one_exchange(row, "conversations")
    pieces, answer = thoughts(told, "<rimage>")
    if answer is None:
        raise DataError(
            f"{row.where}: the model's turn in column 'conversations' has no <ans>...</ans>; write "
            "the answer there"
        )
    yield _taught(
        row,
        question,
        answer,
        pieces,
        shown=row.places("frames", POOL, ascend=True),
        spans=row.places("recon_frames", POOL),
    )


def _twiff_bench(row: Row) -> Iterator[Draft]:
    """The answer column holds the reference's thoughts too. The pictures in the row are shown where
    the clip's file is not there.
    """
    pieces, answer = thoughts(row.text("answer"), "<rimage>")
    if answer is None:  # the answer alone
        pieces, answer = (), row.text("answer")
    draft = _taught(
        row,
        row.text("question"),
        answer,
        pieces,
        shown=row.places("question_images_index", POOL, ascend=True),
        spans=row.places("reasoning_images_index", POOL),
    )
    draft.images = row.get("question_images") or []
    row.get("reasoning_images")
    yield draft


def _one_exchange(row: Row, column: str) -> tuple[str, str]:
    pairs = exchanges(row, column)
    if len(pairs) > 1:
        raise DataError(
            f"{row.where}: column {column!r} has {len(pairs)} questions; give each a row"
        )
    return pairs[0]


def _taught(
    row: Row,
    question: str,
    answer: Any,
    pieces: tuple[str, ...],
    shown: list[int],
    spans: list[int],
) -> Draft:
    if pieces and len(pieces) != len(spans) + 1:
        raise DataError(
            f"{row.where}: the thoughts have {len(pieces) - 1} pictures, and the row lists "
            f"{len(spans)} frames for them; they must be as many"
        )
    video = row.get("video")
    return Draft(
        id=row.id(),
        question=without_media(question),
        answer=answer,
        videos=[video] if video else [],
        frames=tuple(shown),
        imagine=tuple((place,) for place in spans),
        reasoning=pieces,
        pool=POOL,
    )


def _listed(row: Row, column: str) -> list[Any]:
    value = row.get(column)
    return [] if value is None else value if isinstance(value, list) else [value]


FORMATS = (
    Format(
        "future_l1",
        "Future-L1-50K and TwiFF SFT records",
        ("video", "image", "reasoning_image", "conversations"),
        _future_l1,
    ),
    Format("future_l1_chat", "Future-L1's chat records", ("messages", "videos|images"), _chat),
    Format("twiff", "TwiFF-2.7M", ("video", "frames", "recon_frames", "conversations"), _twiff),
    Format(
        "twiff_bench",
        "TwiFF-Bench",
        (
            *("video|question_images", "question", "answer"),
            *("question_images_index", "reasoning_images_index"),
        ),
        _twiff_bench,
    ),
)

"""Data sets people train on: Video-R1, EasyR1, V1-33K, LLaVA's conversations; and rows of any other
names, by a mapping.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rl.data.formats.draft import Draft, Format
from rl.data.formats.markup import exchanges, thoughts, turns, without_media
from rl.data.rows import Row
from rl.errors import DataError

# Our columns that a mapping may give.
MAPPABLE = (
    *("id", "video", "images", "question", "answer", "options"),
    *("frames", "imagine", "reasoning", "start", "end"),
)
# EasyR1's own mapping, as its configs have it by default.
EASYR1_COLUMNS = {"question": "problem", "answer": "answer", "images": "images", "video": "videos"}


def _video_r1(row: Row) -> Iterator[Draft]:
    """Video-R1-260k and COT-165k: the solution stands in answer tags, the process in thoughts."""
    _, answer = thoughts(row.text("solution"), "<image>")
    reasoning = ()
    if isinstance(process := row.get("process"), str) and process.strip():
        pieces, _ = thoughts(process, "\0")  # a mark that is in no text: one piece
        reasoning = pieces
    choice = row.text("problem_type") == "multiple choice"
    row_options = row.texts("options") if choice else None
    kind, path = row.text("data_type"), row.get("path")
    if kind not in ("video", "image"):
        raise DataError(f"{row.where}: column 'data_type' is {kind!r}; write video or image")
    clip = [path] if path else []
    row.get("options")
    yield Draft(
        id=row.id("problem_id"),
        question=without_media(row.text("problem")),
        answer=answer if answer is not None else row.text("solution"),
        options=row_options or None,
        videos=clip if kind == "video" else [],
        images=clip if kind == "image" else [],
        reasoning=reasoning,
        extra={"problem_type": row.text("problem_type")},
        columns={"question": "problem", "answer": "solution", "video": "path"},
    )


def _v1_33k(row: Row) -> Iterator[Draft]:
    """V1-33K: up to two questions a row, with options and without.

    `full_video_path` names the whole video, whose end is the answer: give the folder of the first
    parts as the video root.
    """
    video = row.text("full_video_path")
    for column in ("mc_qa", "oe_qa"):
        if row.get(column) is None:
            continue
        texts = [text for role, text in turns(row, column) if role != "system"]
        if len(texts) != 2:
            raise DataError(
                f"{row.where}: column {column!r} has {len(texts)} texts; it should have a question "
                "and its answer"
            )
        pieces, tagged = thoughts(texts[1], "\0")
        own = row.id()
        yield Draft(
            id=None if own is None else f"{own}:{column.removesuffix('_qa')}",
            question=without_media(texts[0]),
            answer=tagged if tagged is not None else texts[1],
            videos=[video, *_below(video)],
            reasoning=pieces if tagged is not None and pieces[0] else (),
            extra={"question_form": column.removesuffix("_qa")},
            columns={"answer": column, "question": column, "video": "full_video_path"},
        )


def _llava(row: Row) -> Iterator[Draft]:
    """LLaVA's conversations: each exchange is a question of its own."""
    video = row.get("video")
    images = None if video else row.get("image")
    own, pairs = row.id(), exchanges(row, "conversations")
    for number, (question, told) in enumerate(pairs, start=1):
        pieces, tagged = thoughts(told, "\0")
        yield Draft(
            id=own if own is None or len(pairs) == 1 else f"{own}:{number}",
            question=without_media(question),
            answer=tagged if tagged is not None else told,
            videos=[video] if video else [],
            images=images if isinstance(images, list) else [images] if images else [],
            reasoning=pieces if tagged is not None and pieces[0] else (),
            columns={"answer": "conversations", "question": "conversations"},
        )


def mapped(columns: Mapping[str, str]) -> Format:
    """The format of rows whose columns are called otherwise: `columns` gives ours theirs."""

    def value(row: Row, ours: str) -> Any:
        return row.get(columns[ours]) if ours in columns else None

    def clips(row: Row, ours: str) -> list[Any]:
        given = value(row, ours)
        return [clip for clip in (given if isinstance(given, list) else [given]) if clip]

    def read(row: Row) -> Iterator[Draft]:
        videos = clips(row, "video")
        if len(videos) > 1:
            raise DataError(
                f"{row.where}: column {columns['video']!r} lists {len(videos)} videos; a row shows "
                "one"
            )
        imagine = row.spans(columns["imagine"]) if "imagine" in columns else ()
        yield Draft(
            id=row.id(columns["id"]) if "id" in columns else None,
            question=without_media(row.text(columns["question"])),
            answer=row.given(columns["answer"]),
            options=row.texts(columns["options"]) if "options" in columns else None,
            videos=[str(video) if type(video) is int else video for video in videos],
            images=clips(row, "images"),
            frames=row.frames(columns.get("frames", "frames"), value(row, "frames")),
            imagine=imagine,
            reasoning=()
            if "reasoning" not in columns
            else row.reasoning(columns["reasoning"], len(imagine)),
            window=None if "start" not in columns else row.window(columns["start"], columns["end"]),
            columns=dict(columns),
            search=True,
        )

    return Format("columns", "a mapping of columns", (), read, own_ids="id" in columns)


def _below(path: str) -> list[str]:
    """A path of its authors' machine as it may stand below our root: without its first folder."""
    return [path.partition("/")[2]] if "/" in path.strip("/") else []


def easyr1(columns: Mapping[str, str]) -> Format:
    """EasyR1, some of its keys called otherwise, as its configs allow."""
    keys = {**EASYR1_COLUMNS, **columns}
    needs = (keys["question"], keys["answer"], f"{keys['images']}|{keys['video']}")
    return Format("easyr1", "EasyR1", needs, mapped(keys).read)


FORMATS = (
    Format(
        "video_r1",
        "Video-R1-260k and COT-165k",
        ("problem", "data_type", "problem_type", "solution", "path"),
        _video_r1,
    ),
    easyr1({}),
    Format("v1_33k", "V1-33K", ("full_video_path", "mc_qa|oe_qa"), _v1_33k),
    Format("llava", "LLaVA-style conversations", ("conversations", "video|image"), _llava),
)

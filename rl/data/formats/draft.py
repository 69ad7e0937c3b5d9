"""From what a reader found in a row to a checked `Sample`."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from rl.data.answers import (
    AnswerForm,
    answer_letter,
    clean_options,
    same_options,
    split_question,
)
from rl.data.formats.files import Files
from rl.data.rows import Row
from rl.errors import DataError, MissingVideoError
from rl.trajectory import Sample


@dataclass
class Draft:
    """What a reader takes from a row, nothing of it normalised yet.

    `answer` and `options` are as the data set has them, None for no options. `videos` are names of
    one and the same clip, the likeliest first; `images` stand for it where there is no such file.
    `columns` says how the data set calls our columns, for messages. The other fields are those of
    `Sample`.
    """

    question: str
    answer: Any
    options: Sequence[str] | None = None
    answer_form: AnswerForm = "any"
    videos: Sequence[str] = ()
    images: Sequence[Any] = ()
    id: str | None = None
    frames: tuple[int, ...] = ()
    imagine: tuple[tuple[int, ...], ...] = ()
    reasoning: tuple[str, ...] = ()
    window: tuple[float, float] | None = None
    pool: int = 0
    extra: dict[str, Any] = field(default_factory=dict)
    columns: dict[str, str] = field(default_factory=dict)
    search: bool = False  # the clip's name may lack its folder and suffix
    folder_fps: float | None = None  # rate of clips that are folders of images
    as_written: bool = False  # ours: options stay in the question, and each is a different text


@dataclass(frozen=True)
class Format:
    """How one data set writes its rows.

    A row has all the columns `needs` (dotted paths; of "a|b" one is enough). `own_ids`: its ids
    name its rows, so that a repeated one is a mistake; else repeated ones get numbers.
    """

    name: str
    what: str
    needs: tuple[str, ...]
    read: Callable[[Row], Iterable[Draft]]
    own_ids: bool = False


def finish(row: Row, draft: Draft, files: Files, default_id: str) -> tuple[Sample, bool]:
    """Check and normalise a draft; also whether its images stand for a video that it names and
    that is not there. Raises `DataError`, `MissingVideoError` for a clip that is not there, always
    naming the row.
    """
    named = {**{c: c for c in ("question", "answer", "options", "video")}, **draft.columns}
    question, options, answer = _normalised(row, draft, named)
    video, images, stand_in = _clip(row, draft, files, named["video"])
    window = draft.window
    if images and window is not None and draft.folder_fps is not None:
        first, last = (round(second * draft.folder_fps) for second in window)
        images, window = images[first : max(last, first + 1)] or images[-1:], None
    sample = Sample(
        id=draft.id if draft.id is not None else default_id,
        video=images[0] if images else video,
        question=question,
        answer=answer,
        options=options,
        frames=draft.frames,
        imagine=draft.imagine,
        reasoning=draft.reasoning,
        window=window,
        pool=draft.pool,
        images=images,
        extra={**row.extra(), **draft.extra},
    )
    # Where a clip's file is not there, its images are the frames shown; there are none to imagine.
    if stand_in and draft.pool and not draft.as_written:
        sample = replace(sample, frames=(), imagine=(), reasoning=(), pool=0)
    return sample, stand_in and bool(draft.videos)


def _clip(row: Row, draft: Draft, files: Files, column: str) -> tuple[str, tuple[str, ...], bool]:
    """The clip's file, its images, and whether they stand for a file that is not there."""
    if draft.videos:
        if not all(isinstance(name, str) for name in draft.videos):
            raise row.wrong_type(column, draft.videos[0], "the path of a file, in quotes")
        try:
            return *files.video(row, column, draft.videos, search=draft.search), False
        except MissingVideoError:
            if not draft.images:
                raise
    if draft.images:
        images = files.images(row, column, draft.images)
        return images[0], images, True
    raise MissingVideoError(
        f"{row.where}: the row has no video; put the path of its file in the column {column!r} "
        f"(the row has: {row.columns()})"
    )


def _normalised(row: Row, draft: Draft, named: dict[str, str]) -> tuple[str, tuple[str, ...], str]:
    question, options = draft.question, clean_options(draft.options or ())
    key = named["answer"]
    where = row.where if key == "answer" else f"{row.where}: column {key!r}"
    embedded = None
    if not draft.as_written:
        question = question.strip()
        embedded = split_question(question)
    if draft.options is not None and (draft.as_written or options):
        # A letter says which of two equal texts is meant; data sets have such rows.
        by_letter = isinstance(draft.answer, str) and len(draft.answer) == 1
        distinct = draft.as_written and not by_letter
        row.check_options(named["options"], options, distinct=distinct)
    if options:
        if embedded is not None and same_options(embedded.options, options):
            question = embedded.question or question
        answer = answer_letter(draft.answer, options, where=where, form=draft.answer_form)
        return question, options, answer
    if embedded is not None and embedded.question:
        # Letters in a text need not be options: the answer says whether they are.
        try:
            answer = answer_letter(draft.answer, embedded.options, where=where)
        except DataError:
            pass
        else:
            return embedded.question, embedded.options, answer
    return question, (), _open_answer(row, draft.answer, named["answer"])


def _open_answer(row: Row, answer: Any, column: str) -> str:
    if isinstance(answer, int | float) and not isinstance(answer, bool):
        return str(answer)
    if not isinstance(answer, str):
        raise row.missing(column) if answer is None else row.wrong_type(column, answer, "a text")
    if not answer.strip():
        raise DataError(f"{row.where}: column {column!r} is empty; fill it in or remove the row")
    return answer.strip()

"""Benchmarks, by the field names of their releases. What breaks their figures down stays in
`Sample.extra` under its own name: `question_type`, `task_type`, `duration`, `domain`, `dim`, ...
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from rl.data.formats.draft import Draft, Format
from rl.data.formats.markup import without_media
from rl.data.rows import Row, without_last

_NEXTQA = tuple(f"a{i}" for i in range(5))
# MVBench's clips of TVQA are folders of images, three a second.
_FOLDER_FPS = 3.0


def _future_bench(row: Row) -> Iterator[Draft]:
    """FutureBench: paths are those of its authors' machine, of which what follows "video_dataset/"
    counts. Some questions list their options as well.
    """
    path = row.text("video_path")
    names = [path, path.partition("video_dataset/")[2], path.partition("/")[2]]
    yield Draft(
        id=row.id(),
        question=row.text("qa.Question"),
        answer=row.text("qa.Answer"),
        answer_form="letter",
        options=row.texts("qa.Options"),
        videos=[name.lstrip("/") if i else name for i, name in enumerate(names) if name],
        columns={"answer": "qa.Answer", "options": "qa.Options", "video": "video_path"},
    )


def _nextqa(row: Row) -> Iterator[Draft]:
    yield Draft(
        id=_numbered(row, "video", "qid"),
        question=row.text("question"),
        answer=row.given("answer"),
        answer_form="index",
        options=[row.text(column) for column in _NEXTQA],
        videos=[_name(row, "video")],
        search=True,
        columns={"options": "a0"},
    )


def _nextqa_open(row: Row) -> Iterator[Draft]:
    yield Draft(
        id=_numbered(row, "video", "qid"),
        question=row.text("question"),
        answer=row.text("answer"),
        videos=[_name(row, "video")],
        search=True,
    )


def _mvbench(row: Row) -> Iterator[Draft]:
    """MVBench: a file a task, which gives the task its name. Clips are looked for by their names
    below the root, because the release spreads them over the folders of their data sets.
    """
    yield Draft(
        id=row.id(),
        question=row.text("question"),
        answer=row.given("answer"),
        answer_form="text",
        options=row.texts("candidates"),
        videos=[_name(row, "video")],
        window=row.window("start", "end"),
        search=True,
        folder_fps=_FOLDER_FPS,
        extra={"task": row.source},
        columns={"options": "candidates"},
    )


def _video_mme(row: Row) -> Iterator[Draft]:
    yield Draft(
        id=row.id("question_id"),
        question=row.text("question"),
        answer=row.text("answer"),
        answer_form="letter",
        options=row.texts("options"),
        videos=[_name(row, "videoID")],
        search=True,
        columns={"video": "videoID"},
    )


def _temp_compass(row: Row) -> Iterator[Draft]:
    yield Draft(
        question=row.text("question"),
        answer=row.text("answer"),
        videos=[_name(row, "video_id")],
        search=True,
        columns={"video": "video_id"},
    )


def _egoschema(row: Row) -> Iterator[Draft]:
    yield Draft(
        id=row.id("question_idx"),
        question=row.text("question"),
        answer=row.given("answer"),
        answer_form="index",
        options=row.texts("option"),
        videos=[_name(row, "video_idx")],
        search=True,
        columns={"options": "option", "video": "video_idx"},
    )


def _long_video_bench(row: Row) -> Iterator[Draft]:
    """LongVideoBench, its options as a list or, in Parquet, as option0, option1, ..."""
    options = row.texts("candidates")
    if options is None:
        columns = [f"option{i}" for i in range(26) if f"option{i}" in row.values]
        given = [row.get(column) for column in columns]
        options = [row.text(c) for c in columns[: len(without_last(given, None, "", "N/A"))]]
    yield Draft(
        id=row.id(),
        question=row.text("question"),
        answer=row.given("correct_choice"),
        answer_form="index",
        options=options,
        videos=[_name(row, "video_path")],
        search=True,
        columns={"answer": "correct_choice", "options": "candidates", "video": "video_path"},
    )


def _mlvu(row: Row) -> Iterator[Draft]:
    """MLVU: its questions list the options."""
    yield Draft(
        question=without_media(row.text("question")),
        answer=row.text("answer"),
        videos=[_name(row, "video_name")],
        search=True,
        columns={"video": "video_name"},
    )


def _name(row: Row, column: str) -> str:
    """The name of a clip; some data sets write it as a number."""
    value: Any = row.given(column)
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        raise row.wrong_type(column, value, "the name of a video")
    return str(value)


def _numbered(row: Row, video: str, number: str) -> str | None:
    """An id from the video's name and the number that a question has within it."""
    own = row.id(number)
    return None if own is None else f"{_name(row, video)}:{own}"


FORMATS = (
    Format(
        "futurebench",
        "FutureBench",
        ("video_path", "qa.Question", "qa.Options", "qa.Answer"),
        _future_bench,
    ),
    Format(
        "nextqa", "NExT-QA, multiple choice", ("video", "question", "answer", *_NEXTQA), _nextqa
    ),
    Format(
        "nextqa_open",
        "NExT-QA, open-ended",
        ("video", "question", "answer", "additional_ref_answer"),
        _nextqa_open,
    ),
    Format("mvbench", "MVBench", ("video", "question", "candidates", "answer"), _mvbench),
    Format(
        "video_mme",
        "Video-MME",
        ("videoID", "question_id", "question", "options", "answer"),
        _video_mme,
        own_ids=True,
    ),
    Format("tempcompass", "TempCompass", ("video_id", "question", "answer", "dim"), _temp_compass),
    Format("egoschema", "EgoSchema", ("video_idx", "question", "option", "answer"), _egoschema),
    Format(
        "longvideobench",
        "LongVideoBench",
        ("video_path", "question", "candidates|option0", "correct_choice"),
        _long_video_bench,
        own_ids=True,
    ),
    Format("mlvu", "MLVU", ("video_name", "question", "answer", "task_type"), _mlvu),
)

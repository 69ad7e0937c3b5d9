"""What a policy answered: the answers that a killed evaluation goes on from, and its predictions.

Answers are kept as they come in, ungraded, as Parquet files of a chunk each beside the settings
that decided them. Graded they are the predictions of a benchmark, one Parquet file with a row an
answer. Every file is written whole or not at all. The columns of predictions:

| column | |
|---|---|
| benchmark, mode, row, id | what was asked, and whether it might imagine; `row` counts from 0 |
| by_<column> | the row's value of each column that figures are broken down by |
| video, frames | the clip, and the frames of it that were shown |
| question, options, answer | as in the data, `answer` being the reference |
| text | the completion, latent markers kept |
| extracted | the answer found in it; null: none |
| value | 1 right, 0 wrong, or the mean grade; null: none, for `reason` |
| grade_<name> | a judge's grades |
| span_lengths, spans, latents, tokens | latents of each span, spans, latents, and tokens besides |
| finish_reason | stop, or length: cut short |
| neighbours | mean cosine of neighbouring latents of a span; null: there are none |
| seconds | of its chunk, divided by the chunk's answers |
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from recipes.evaluation.grading import Grade
from rl.errors import RecipeError
from rl.latent_stats import neighbour_cosine
from rl.trajectory import Sample, Trajectory
from rl.writing import write_json, write_whole

SETTINGS = "settings.json"


@dataclass(frozen=True)
class Answer:
    """One greedy completion without its arrays. `row` is its sample's place in the data, `tokens`
    does not count latents, `seconds` is its share of the time its chunk took.
    """

    row: int
    mode: str
    text: str
    span_lengths: tuple[int, ...]
    latents: int
    tokens: int
    finish_reason: str
    frames: tuple[int, ...]
    neighbours: float | None
    seconds: float

    @classmethod
    def of(cls, trajectory: Trajectory, row: int, mode: str, seconds: float) -> Answer:
        return cls(
            row=row,
            mode=mode,
            text=trajectory.text,
            span_lengths=tuple(trajectory.span_lengths),
            latents=len(trajectory.latents),
            tokens=len(trajectory.completion_ids) - len(trajectory.latents),
            finish_reason=trajectory.finish_reason,
            frames=tuple(i for key in trajectory.media for i in key.frames),
            neighbours=neighbour_cosine([trajectory]).latents,
            seconds=seconds,
        )


_MEASURED = ("latents", "tokens", "finish_reason", "neighbours", "seconds")
_ANSWER = pa.schema(
    [
        ("row", pa.int64()),
        ("mode", pa.string()),
        ("text", pa.string()),
        ("span_lengths", pa.list_(pa.int64())),
        ("latents", pa.int64()),
        ("tokens", pa.int64()),
        ("finish_reason", pa.string()),
        ("frames", pa.list_(pa.int64())),
        ("neighbours", pa.float64()),
        ("seconds", pa.float64()),
    ]
)


class AnswerStore:
    """The answers of a benchmark in `folder`, chunk by chunk.

    `settings` are what decides the answers. Raises `RecipeError` if the folder holds answers that
    other settings gave; it names the settings.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        self._folder = folder
        wanted = json.loads(json.dumps(settings))
        stored = folder / SETTINGS
        if stored.is_file():
            _require_same(json.loads(stored.read_text()), wanted, folder)
        else:
            folder.mkdir(parents=True, exist_ok=True)
            write_json(stored, wanted)

    def read(self) -> list[Answer]:
        """All answers so far, in no particular order."""
        found: list[Answer] = []
        for path in self._chunks():
            for row in pq.read_table(path).to_pylist():
                row |= {name: tuple(row[name]) for name in ("span_lengths", "frames")}
                found.append(Answer(**row))
        return found

    def add(self, answers: Sequence[Answer]) -> None:
        """Keep another chunk."""
        number = 1 + max((int(path.stem.rsplit("-", 1)[1]) for path in self._chunks()), default=-1)
        columns = {f.name: [getattr(a, f.name) for a in answers] for f in fields(Answer)}
        _write(pa.table(columns, schema=_ANSWER), self._folder / f"chunk-{number:06d}.parquet")

    def _chunks(self) -> list[Path]:
        return sorted(self._folder.glob("chunk-*.parquet"))


def write_predictions(
    path: Path,
    benchmark: str,
    columns: Sequence[str],
    rows: Iterable[tuple[Sample, Answer, Grade]],
    grades: Sequence[str] = (),
) -> None:
    """Write graded answers as the module says; `columns` are those of the data to take along,
    `grades` the names of a judge's.
    """
    plain = [_row(benchmark, columns, *row) for row in rows]
    table = pa.Table.from_pylist(plain, schema=_schema(columns, grades))
    path.parent.mkdir(parents=True, exist_ok=True)
    _write(table, path)


def read_predictions(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of predictions."""
    return pq.read_table(path).to_pylist()


def _row(
    benchmark: str, columns: Sequence[str], sample: Sample, answer: Answer, grade: Grade
) -> dict[str, Any]:
    given = {f.name: getattr(answer, f.name) for f in fields(Answer)}
    return given | {
        "benchmark": benchmark,
        "id": sample.id,
        "video": sample.video,
        "question": sample.question,
        "options": sample.options,
        "answer": sample.answer,
        "extracted": grade.extracted,
        "value": None if math.isnan(grade.value) else grade.value,
        "reason": grade.reason or None,
        "spans": len(answer.span_lengths),
        **{f"by_{column}": str(sample.extra[column]) for column in columns},
        **{f"grade_{name}": value for name, value in grade.grades.items()},
    }


def _schema(columns: Sequence[str], grades: Sequence[str]) -> pa.Schema:
    return pa.schema(
        [
            ("benchmark", pa.string()),
            _ANSWER.field("mode"),
            _ANSWER.field("row"),
            ("id", pa.string()),
            *((f"by_{column}", pa.string()) for column in columns),
            ("video", pa.string()),
            _ANSWER.field("frames"),
            ("question", pa.string()),
            ("options", pa.list_(pa.string())),
            ("answer", pa.string()),
            _ANSWER.field("text"),
            ("extracted", pa.string()),
            ("value", pa.float64()),
            ("reason", pa.string()),
            *((f"grade_{name}", pa.float64()) for name in grades),
            _ANSWER.field("span_lengths"),
            ("spans", pa.int64()),
            *(_ANSWER.field(name) for name in _MEASURED),
        ]
    )


def _write(table: pa.Table, path: Path) -> None:
    write_whole(path, lambda draft: pq.write_table(table, draft))


def _require_same(stored: Mapping[str, Any], wanted: Mapping[str, Any], folder: Path) -> None:
    changed = list(_changes(stored, wanted))
    if changed:
        raise RecipeError(
            f"{folder} holds answers that were given under other settings: {'; '.join(changed)}. "
            "Undo the change to go on from them, or give another output, or delete the folder"
        )


def _changes(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> Iterator[str]:
    for name in sorted(stored.keys() | wanted.keys()):
        old, new = stored.get(name), wanted.get(name)
        if old != new:
            yield f"{name} was {old!r} and is {new!r}"

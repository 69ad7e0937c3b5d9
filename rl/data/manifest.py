"""Manifests: one JSON object a line, one question about one video each.

    {"video": "a/01.mp4", "question": "What comes next?", "options": ["up", "down"], "answer": "A"}

| column | | |
|---|---|---|
| video | path | relative to the manifest's folder, or to `video_root` |
| question | text | |
| answer | text | with options: a letter (A, B, ...) or the text of an option |
| options | texts | optional; the choices |
| frames | integers | optional; the frames shown to the model, ascending |
| imagine | lists of integers | optional; for each latent span, the frames it should depict |
| reasoning | texts | optional; what to write around the spans: one text more than spans |
| id | text or integer | optional; "<manifest's name>:<line>" otherwise |

Every other column is kept in `Sample.extra`, where rewards find it.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rl.errors import DataError, MissingVideoError
from rl.trajectory import Sample

COLUMNS = ("id", "video", "question", "answer", "options", "frames", "imagine", "reasoning")


def read_manifest(
    path: str | Path, *, video_root: str | Path | None = None, limit: int | None = None
) -> list[Sample]:
    """Read and check the rows of a manifest, the first `limit` of them if given.

    Answers to questions with options come back as the option's letter, videos as absolute paths.
    Raises `DataError`, for videos `MissingVideoError`; the message names file, line and column and
    says what to do.
    """
    manifest = Path(path)
    if limit is not None and limit < 1:
        raise DataError(
            f"limit is {limit}; leave it out to read all rows of {path}, or give at least 1"
        )
    root = Path(video_root) if video_root is not None else manifest.parent
    samples: list[Sample] = []
    lines: dict[str, int] = {}
    for number, line in enumerate(_lines(manifest), start=1):
        if not line.strip():
            continue
        if limit is not None and len(samples) == limit:
            break
        sample = _Row(f"{path}, line {number}", line).sample(f"{manifest.stem}:{number}", root)
        if sample.id in lines:
            raise DataError(
                f"{path}, line {number}: id {sample.id!r} is already used in line "
                f"{lines[sample.id]}; ids must differ (leave the column out to have them numbered)"
            )
        lines[sample.id] = number
        samples.append(sample)
    if not samples:
        raise DataError(f"{path}: the manifest has no rows; write one JSON object a line")
    return samples


def _lines(manifest: Path) -> list[str]:
    try:
        return manifest.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(
            f"{manifest}: not a text file in UTF-8 ({error}); save it as UTF-8 JSON lines"
        ) from error
    except OSError as error:
        raise DataError(
            f"{manifest}: the manifest cannot be read ({error.strerror}); check the path in the "
            "recipe"
        ) from error


class _Row:
    """One line being checked; `where` opens each of its error messages."""

    def __init__(self, where: str, line: str) -> None:
        self.where = where
        try:
            self.values: dict[str, Any] = json.loads(line)
        except json.JSONDecodeError as error:
            raise DataError(
                f"{where}: not valid JSON ({error.msg}, character {error.pos + 1}); write one JSON "
                "object a line, on a single line"
            ) from error
        if not isinstance(self.values, dict):
            raise DataError(
                f"{where}: a row is a JSON object with the columns video, question and answer, not "
                f"{_kind(self.values)}"
            )

    def sample(self, default_id: str, root: Path) -> Sample:
        options = self.options()
        return Sample(
            id=self.id(default_id),
            video=self.video(root),
            question=self.text("question"),
            answer=self.answer(options),
            options=options,
            frames=self.frames("frames", self.values.get("frames")),
            imagine=(imagine := self.imagine()),
            reasoning=self.reasoning(len(imagine)),
            extra={k: v for k, v in self.values.items() if k not in COLUMNS},
        )

    def id(self, default: str) -> str:
        value = self.values.get("id")
        if value is None:
            return default
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong_type("id", value, "a text or an integer, or leave the column out")
        return str(value)

    def text(self, column: str) -> str:
        value = self.values.get(column)
        if value is None:
            raise DataError(
                f"{self.where}: column {column!r} is missing; add it (the row has: "
                f"{', '.join(self.values) or 'none'})"
            )
        if not isinstance(value, str):
            raise self.wrong_type(column, value, "a text, in quotes")
        if not value.strip():
            raise DataError(
                f"{self.where}: column {column!r} is empty; fill it in or remove the row"
            )
        return value

    def video(self, root: Path) -> str:
        value = self.values.get("video")
        if value is None or value == "":
            raise MissingVideoError(
                f"{self.where}: the row has no video; put the path of its file in the column "
                f"'video' (the row has: {', '.join(self.values) or 'none'})"
            )
        if not isinstance(value, str):
            raise self.wrong_type("video", value, "the path of a file, in quotes")
        file = (root / value).absolute()
        if not file.is_file():
            raise MissingVideoError(
                f"{self.where}: column 'video' names {value!r}, and there is no file {file}; paths "
                "are relative to the manifest's folder unless a video root is given: correct the "
                "path or the video root"
            )
        return str(file)

    def options(self) -> tuple[str, ...]:
        value = self.values.get("options")
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
            raise self.wrong_type(
                "options", value, "a list of texts, or leave the column out for an open answer"
            )
        options = tuple(option.strip() for option in value)
        if (
            not 2 <= len(options) <= len(ascii_uppercase)
            or len(set(options)) < len(options)
            or "" in options
        ):
            raise DataError(
                f"{self.where}: column 'options' is {value}; give 2 to {len(ascii_uppercase)} "
                "different texts, or leave the column out for an open answer"
            )
        return options

    def answer(self, options: tuple[str, ...]) -> str:
        """The answer; with options, the letter of the right one."""
        answer = self.text("answer").strip()
        if not options:
            return answer
        letters = ascii_uppercase[: len(options)]
        by_letter = letters.find(answer) if len(answer) == 1 else -1
        by_text = options.index(answer) if answer in options else -1
        listed = ", ".join(
            f"{letter} = {option!r}" for letter, option in zip(letters, options, strict=True)
        )
        if by_letter < 0 and by_text < 0:
            raise DataError(
                f"{self.where}: answer {answer!r} is not among the options ({listed}); give a "
                "letter or the exact text of an option"
            )
        if by_letter >= 0 and by_text >= 0 and by_letter != by_text:
            raise DataError(
                f"{self.where}: answer {answer!r} is the letter of one option and the text of "
                f"another ({listed}); reword the options or reorder them so that letter and text "
                "agree"
            )
        return letters[max(by_letter, by_text)]

    def frames(self, column: str, value: Any) -> tuple[int, ...]:
        if value is None:
            return ()
        if not isinstance(value, list) or not all(type(i) is int for i in value):
            raise self.wrong_type(column, value, "a list of frame numbers, such as [0, 4, 8]")
        if not value:
            raise DataError(
                f"{self.where}: column {column!r} has an empty list; list frames or leave the "
                "column out"
            )
        if value[0] < 0 or any(b <= a for a, b in pairwise(value)):
            raise DataError(
                f"{self.where}: column {column!r} holds {value}; frames count from 0 and must "
                "ascend without repeats"
            )
        return tuple(value)

    def imagine(self) -> tuple[tuple[int, ...], ...]:
        value = self.values.get("imagine")
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(span, list) for span in value):
            raise self.wrong_type(
                "imagine", value, "a list of spans, each a list of frame numbers: [[4, 5], [6, 7]]"
            )
        return tuple(self.frames("imagine", span) for span in value)

    def reasoning(self, spans: int) -> tuple[str, ...]:
        value = self.values.get("reasoning")
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.wrong_type("reasoning", value, "a list of texts, or one text")
        if len(texts) != spans + 1:
            raise DataError(
                f"{self.where}: column 'reasoning' has {len(texts)} texts, and 'imagine' {spans} "
                "spans; give one text more than there are spans (empty ones where nothing is "
                "written)"
            )
        return tuple(texts)

    def wrong_type(self, column: str, value: Any, wanted: str) -> DataError:
        return DataError(f"{self.where}: column {column!r} is {_kind(value)}; write {wanted}")


def _kind(value: Any) -> str:
    """A JSON value as a person would name it, with the start of what it is."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
    }
    return f"{names.get(type(value), 'null')} ({json.dumps(value)[:60]})"

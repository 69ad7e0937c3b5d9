"""One row being checked, whatever data set it is of."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from itertools import pairwise
from string import ascii_uppercase
from typing import Any

from rl.errors import DataError

OURS = (
    "id", "video", "question", "answer", "options", "frames", "imagine", "reasoning",
    "window", "pool", "images",
)  # fmt: skip


class Row:
    """A row's values and what of them was asked for; `where` opens each of its error messages.

    Columns may be dotted paths into nested objects, as in "qa.Question". `source` is the name of
    what the row comes from, without folder and suffix.
    """

    def __init__(self, where: str, values: Any, source: str) -> None:
        self.where = where
        self.source = source
        if not isinstance(values, Mapping):
            raise DataError(
                f"{where}: a row is a JSON object with columns such as video, question and answer, "
                f"not {kind(values)}"
            )
        self.values: Mapping[str, Any] = values
        self._used: set[str] = set()

    def get(self, column: str) -> Any:
        """The value of a column, None where there is none."""
        value, top = look_up(self.values, column)
        self._used.add(top)
        return value

    def extra(self) -> dict[str, Any]:
        """The columns that nobody asked for, as far as JSON can hold them.

        One with a name of our own is called "row_..." there, because rewards get ours under it.
        """
        return {
            f"row_{k}" if k in OURS else k: v
            for k, v in self.values.items()
            if k not in self._used and _is_json(v)
        }

    def id(self, column: str = "id") -> str | None:
        value = self.get(column)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
            raise self.wrong_type(column, value, "a text or an integer, or leave the column out")
        return str(value)

    def text(self, column: str) -> str:
        """A column that must hold a text that is not empty."""
        value = self.get(column)
        if value is None:
            raise self.missing(column)
        if not isinstance(value, str):
            raise self.wrong_type(column, value, "a text, in quotes")
        if not value.strip():
            raise DataError(
                f"{self.where}: column {column!r} is empty; fill it in or remove the row"
            )
        return value

    def given(self, column: str) -> Any:
        """A column that must hold something."""
        if (value := self.get(column)) is None:
            raise self.missing(column)
        return value

    def texts(self, column: str) -> list[str] | None:
        value = self.get(column)
        if value is None:
            return None
        if isinstance(value, Mapping) and sorted(value) == list(ascii_uppercase[: len(value)]):
            # {"A": ..., "B": ...}, which Parquet fills up with nulls to the longest of all rows.
            value = without_last([text for _, text in sorted(value.items())], None)
        if not isinstance(value, list) or not all(isinstance(option, str) for option in value):
            raise self.wrong_type(
                column, value, "a list of texts, or leave the column out for an open answer"
            )
        return value

    def check_options(self, column: str, options: Sequence[str], *, distinct: bool) -> None:
        if (
            not 2 <= len(options) <= len(ascii_uppercase)
            or (distinct and len(set(options)) < len(options))
            or "" in options
        ):
            different = "different " if distinct else ""
            raise DataError(
                f"{self.where}: column {column!r} is {list(options)}; give 2 to "
                f"{len(ascii_uppercase)} {different}texts, or leave the column out for an open "
                "answer"
            )

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

    def spans(self, column: str) -> tuple[tuple[int, ...], ...]:
        value = self.get(column)
        if value is None:
            return ()
        if not isinstance(value, list) or not all(isinstance(span, list) for span in value):
            raise self.wrong_type(
                column, value, "a list of spans, each a list of frame numbers: [[4, 5], [6, 7]]"
            )
        return tuple(self.frames(column, span) for span in value)

    def reasoning(self, column: str, spans: int) -> tuple[str, ...]:
        value = self.get(column)
        if value is None:
            return ()
        texts = [value] if isinstance(value, str) else value
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise self.wrong_type(column, value, "a list of texts, or one text")
        if len(texts) != spans + 1:
            raise DataError(
                f"{self.where}: column {column!r} has {len(texts)} texts, and 'imagine' {spans} "
                "spans; give one text more than there are spans (empty ones where nothing is "
                "written)"
            )
        return tuple(texts)

    def places(self, column: str, pool: int, *, ascend: bool = False) -> list[int]:
        """Numbers 1 to `pool` as places from 0; whether they must `ascend`."""
        value = self.get(column)
        numbers = [value] if isinstance(value, int) else value if value is not None else []
        if not isinstance(numbers, list) or not all(
            type(i) is int and 1 <= i <= pool for i in numbers
        ):
            raise self.wrong_type(column, value, f"a list of numbers from 1 to {pool}")
        if ascend and any(b <= a for a, b in pairwise(numbers)):
            raise DataError(
                f"{self.where}: column {column!r} holds {numbers}; frames must ascend without "
                "repeats"
            )
        return [number - 1 for number in numbers]

    def window(self, start: str, end: str) -> tuple[float, float] | None:
        """The seconds from column `start` to column `end`, None where neither has a value."""
        bounds = [self.get(start), self.get(end)]
        if bounds == [None, None]:
            return None
        if not all(isinstance(b, int | float) and not isinstance(b, bool) for b in bounds) or not (
            0 <= bounds[0] < bounds[1] < math.inf
        ):
            raise DataError(
                f"{self.where}: columns {start!r} and {end!r} are {bounds}; write the seconds "
                "where the part that counts begins and ends, or leave both out"
            )
        return float(bounds[0]), float(bounds[1])

    def missing(self, column: str) -> DataError:
        return DataError(
            f"{self.where}: column {column!r} is missing; add it (the row has: {self.columns()})"
        )

    def wrong_type(self, column: str, value: Any, wanted: str) -> DataError:
        return DataError(f"{self.where}: column {column!r} is {kind(value)}; write {wanted}")

    def columns(self) -> str:
        return ", ".join(self.values) or "none"


def look_up(values: Mapping[str, Any], column: str) -> tuple[Any, str]:
    """The value at a dotted path, None where there is none, and the top column it is in."""
    if column in values:
        return values[column], column
    here: Any = values
    for step in column.split("."):
        here = here.get(step) if isinstance(here, Mapping) else None
    return here, column.split(".")[0]


def without_last(values: Sequence[Any], *blanks: Any) -> list[Any]:
    """The values up to the last one that is none of `blanks`."""
    kept = list(values)
    while kept and kept[-1] in blanks:
        kept.pop()
    return kept


def kind(value: Any) -> str:
    """A JSON value as a person would name it, with the start of what it is."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        int: "a number",
        float: "a number",
        type(None): "null",
    }
    name = names.get(type(value), f"a {type(value).__name__}")
    return f"{name} ({json.dumps(value, default=repr)[:60]})"


def _is_json(value: Any) -> bool:
    if isinstance(value, Mapping):
        return all(isinstance(k, str) and _is_json(v) for k, v in value.items())
    if isinstance(value, list):
        return all(map(_is_json, value))
    return value is None or isinstance(value, str | bool | int | float)

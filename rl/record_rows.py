"""One line of a record (see `rl.records`) or of a plain file of completions, checked."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Hashable, Mapping
from dataclasses import fields
from typing import Any, get_args

from rl.errors import DataError
from rl.policy.protocol import Imagine
from rl.trajectory import MediaKey, Sample, Sampling

# A manifest row's own columns.
COLUMNS = tuple(f.name for f in fields(Sample) if f.name != "extra")
VERSION = 2
MARK = "foresight_record"  # the key by which a line says that it is a record's

Row = dict[str, Any]
PLACE = ("step", "rollout", "rank", "group")
EMPTY: Row = {
    **{"video": "", "answer": "", "options": [], "frames": [], "imagine": []},
    **{"reasoning": [], "window": None, "pool": 0, "images": []},
}

Check = tuple[Callable[[Any], bool], str]  # is the value right, and what to write instead


def read_row(line: str, where: str) -> Row:
    """One line as a row with the keys of a record; a plain line lacks those about the run.

    Its `id` is None where the line has none. Null numbers are NaN. Raises `DataError`, which starts
    with `where`.
    """
    try:
        values = json.loads(line)
    except (ValueError, RecursionError) as error:  # ValueError: numbers of 5000 digits too
        raise DataError(
            f"{where}: not valid JSON ({error}); write one JSON object a line, on a single line"
        ) from error
    if not isinstance(values, dict):
        raise DataError(
            f"{where}: a line is a JSON object with a completion and a question, not "
            f"{json.dumps(values)[:60]}"
        )
    row = _recorded(values, where) if MARK in values else _plain(values, where)
    row["outcome"] = _number(row["outcome"])
    return row


def group_key(row: Row) -> Hashable:
    """What neighbouring rows share if they belong to one group."""
    if MARK in row:
        return "record", *(row[key] for key in PLACE)
    if row["id"] is not None:
        return "id", row["id"]
    return "sample", json.dumps([row[column] for column in COLUMNS])


def _recorded(values: Row, where: str) -> Row:
    if type(values[MARK]) is not int or not 1 <= values[MARK] <= VERSION:
        raise DataError(
            f"{where}: {MARK} is {_short(values[MARK])}; this Foresight reads versions 1 to "
            f"{VERSION}. Read the file with the Foresight that wrote it"
        )
    if values[MARK] == 1 and _object(values.get("sampling")):  # before there was truncation
        values = {**values, "sampling": {"top_p": 1.0, "top_k": 0, **values["sampling"]}}
    _check(values, {**SAMPLE, **RECORD}, where, optional=tuple(EMPTY.keys() - {"video", "answer"}))
    for key in ("invalid", "arrays"):
        if key in values:
            _check(values, {key: OPTIONAL[key]}, where)
    row = {**EMPTY, **values}
    row["rewards"] = {name: _number(value) for name, value in values["rewards"].items()}
    row["total"], row["advantage"] = _number(values["total"]), _number(values["advantage"])
    return row


def _plain(values: Row, where: str) -> Row:
    given = {key: value for key, value in values.items() if value is not None}
    said = _first_of(given, ("completion", "text"), where)
    asked = _first_of(given, ("question", "prompt"), where)
    used = {*COLUMNS, "outcome", said, asked}
    given |= {"text": _text_of(given, said, where), "question": _text_of(given, asked, where)}
    _check(given, SAMPLE, where, optional=tuple(SAMPLE))
    return {
        **EMPTY,
        **{key: given[key] for key in COLUMNS if key in given},
        "id": str(given["id"]) if "id" in given else None,
        "extra": {key: value for key, value in values.items() if key not in used},
        "text": given["text"],
        "outcome": given.get("outcome"),
    }


def _first_of(given: Row, names: tuple[str, str], where: str) -> str:
    for name in names:
        if name in given:
            return name
    raise DataError(
        f"{where}: column {names[0]!r} is missing; add it, or {names[1]!r} in its place (the line "
        f"has: {', '.join(given) or 'none'})"
    )


def _text_of(given: Row, column: str, where: str) -> str:
    """A text, or that of the last message of a conversation in TRL's form."""
    value = given[column]
    if isinstance(value, list) and value and isinstance(value[-1], dict):
        value = value[-1].get("content")
        if isinstance(value, list) and all(isinstance(part, dict) for part in value):
            value = "".join(str(part.get("text", "")) for part in value)
    if not isinstance(value, str):
        raise _wrong(where, column, given[column], "a text, or a list of messages with a content")
    return value


def _check(
    values: Row, checks: Mapping[str, Check], where: str, optional: tuple[str, ...] = ()
) -> None:
    for key, (right, wanted) in checks.items():
        if key not in values and key not in optional:
            raise DataError(f"{where}: key {key!r} is missing; restore the line as it was written")
        if key in values and not right(values[key]):
            raise _wrong(where, key, values[key], wanted)


def _wrong(where: str, column: str, value: Any, wanted: str) -> DataError:
    return DataError(f"{where}: column {column!r} is {_short(value)}; write {wanted}")


def _short(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)[:60]


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


# -- what the value of a key may be ----------------------------------------------------------------


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _flag(value: Any) -> bool:
    return isinstance(value, bool)


def _whole(value: Any) -> bool:
    return type(value) is int


def _maybe(value: Any) -> bool:
    return value is None or type(value) in (int, float)


def _list(value: Any, of: Callable[[Any], bool]) -> bool:
    return isinstance(value, list) and all(of(item) for item in value)


def _wholes(value: Any) -> bool:
    return _list(value, _whole)


def _object(value: Any, of: Callable[[Any], bool] = lambda _: True) -> bool:
    return isinstance(value, dict) and all(of(item) for item in value.values())


def _media(value: Any) -> bool:
    return (
        _object(value)
        and value.keys() == {f.name for f in fields(MediaKey)}
        and _text(value["path"])
        and _wholes(value["frames"])
        and _text(value["processor"])
        and _list(value["files"], _text)
        and _text(value["content"])
    )


def _sampling(value: Any) -> bool:
    return (
        _object(value)
        and value.keys() == {f.name for f in fields(Sampling)}
        and type(value["temperature"]) in (int, float)
        and _whole(value["max_new_tokens"])
        and value["imagine"] in get_args(Imagine)
        and type(value["top_p"]) in (int, float)
        and 0 < value["top_p"] <= 1
        and _whole(value["top_k"])
        and value["top_k"] >= 0
    )


def _arrays(value: Any) -> bool:
    return (
        _object(value)
        and value.keys() == {"file", "row"}
        and _text(value["file"])
        # Beside the lines and nowhere else.
        and re.fullmatch(r"[\w.-]+\.safetensors", value["file"]) is not None
        and _whole(value["row"])
        and value["row"] >= 0
    )


AS_WRITTEN = "what the run wrote"
SAMPLE: dict[str, Check] = {
    "id": (lambda v: _text(v) or _whole(v), "a text or an integer"),
    "video": (_text, "the path of a file, in quotes"),
    "question": (_text, "a text"),
    "answer": (_text, "a text, in quotes"),
    "options": (lambda v: _list(v, _text), "a list of texts"),
    "frames": (_wholes, "a list of frame numbers, such as [0, 4, 8]"),
    "imagine": (
        lambda v: _list(v, _wholes),
        "a list of spans, each a list of frame numbers: [[4, 5], [6, 7]]",
    ),
    "reasoning": (lambda v: _list(v, _text), "a list of texts"),
    "window": (
        lambda v: v is None or (_list(v, _maybe) and len(v) == 2 and None not in v),
        "two times in seconds, such as [1.5, 4], or null",
    ),
    "pool": (_whole, "the number of frames that `frames` and `imagine` choose from"),
    "images": (lambda v: _list(v, _text), "a list of paths"),
    "outcome": (
        lambda v: v is None or _flag(v) or (_maybe(v) and v in (0, 1)),
        "1 (or true) for right, 0 (or false) for wrong, null where it is unknown",
    ),
}
RECORD: dict[str, Check] = {
    **dict.fromkeys(PLACE, (_whole, AS_WRITTEN)),
    "extra": (_object, AS_WRITTEN),
    "text": (_text, AS_WRITTEN),
    "trained": (_flag, AS_WRITTEN),
    "gated": (_flag, AS_WRITTEN),
    "rewards": (lambda v: _object(v, _maybe), AS_WRITTEN),
    "weights": (lambda v: _object(v, _maybe), AS_WRITTEN),
    "total": (_maybe, AS_WRITTEN),
    "advantage": (_maybe, AS_WRITTEN),
    "tokens": (_whole, AS_WRITTEN),
    "latents": (_whole, AS_WRITTEN),
    "span_lengths": (_wholes, AS_WRITTEN),
    "finish_reason": (lambda v: v in ("stop", "length"), AS_WRITTEN),
    "policy_version": (_whole, AS_WRITTEN),
    "seed": (_whole, AS_WRITTEN),
    "sampling": (_sampling, AS_WRITTEN),
    "filler": (_whole, AS_WRITTEN),
    "media": (lambda v: _list(v, _media), AS_WRITTEN),
}
OPTIONAL: dict[str, Check] = {
    "invalid": (lambda v: _object(v, _text), AS_WRITTEN),
    "arrays": (_arrays, AS_WRITTEN),
}

"""Texts as data sets write them, with marks for pictures, thoughts and answers in them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from rl.data.rows import Row
from rl.errors import DataError

_MEDIA = re.compile(r"(?:^[ \t]*frame_\d+[ \t]*:?\s*)?<(?:image|video|audio)>\s*", re.M)
_FRAME_LINE = re.compile(r"^[ \t]*frame_\d+[ \t]*:?[ \t]*(?:\n|\Z)", re.M)
_THOUGHT = re.compile(r"\bTHOUGHT\s+\d+\s*:\s*")
_TAGS = re.compile(r"</?(?:reason|think)>")
_ANSWER = re.compile(r"<(ans|answer)>\s*(.*?)\s*(?:</\1>|\Z)", re.DOTALL)

_USERS = ("human", "user")
_POLICIES = ("gpt", "assistant")


def without_media(text: str) -> str:
    """The text without "<image>" and "<video>", and without lines that only name a frame."""
    return _FRAME_LINE.sub("", _MEDIA.sub("", text)).strip()


def thoughts(text: str, mark: str) -> tuple[tuple[str, ...], str | None]:
    """What is thought before, between and behind the pictures at `mark`, and what the answer tags
    hold, None without any. "THOUGHT 1:" and tags go.
    """
    answer = _ANSWER.search(text)
    text = text[: answer.start()] if answer else text
    pieces = tuple(_THOUGHT.sub("", _TAGS.sub("", p)).strip() for p in text.split(mark))
    return pieces, answer[2] if answer else None


def turns(row: Row, column: str) -> list[tuple[str, str]]:
    """A conversation as (role, text): role "user", "policy" or what else the data set writes.

    It is a list of objects with from/value or role/content, or, as `datasets` turns it, an object
    of two lists. Content may be a list of parts, of which the texts count. Raises `DataError`.
    """
    value = row.given(column)
    if isinstance(value, Mapping):
        length = max((len(v) for v in value.values() if isinstance(v, list)), default=0)
        value = [{k: v[i] for k, v in value.items()} for i in range(length)]
    if not isinstance(value, list) or not all(isinstance(turn, Mapping) for turn in value):
        raise row.wrong_type(column, value, 'a list of turns: [{"from": "human", "value": ...}]')
    return [
        (_role(turn), _content(row, column, turn.get("value", turn.get("content"))))
        for turn in value
    ]


def exchanges(row: Row, column: str) -> list[tuple[str, str]]:
    """The (question, answer) pairs of a conversation. Raises `DataError` where they do not
    alternate.
    """
    spoken = [(role, text) for role, text in turns(row, column) if role in ("user", "policy")]
    roles = [role for role, _ in spoken]
    if not roles or roles != ["user", "policy"] * (len(roles) // 2):
        raise DataError(
            f"{row.where}: column {column!r} has turns of {', '.join(roles) or 'nobody'}; user and "
            "policy (human and gpt) must alternate, the user first"
        )
    texts = [text for _, text in spoken]
    return list(zip(texts[::2], texts[1::2], strict=True))


def _role(turn: Mapping[str, Any]) -> str:
    role = str(turn.get("from", turn.get("role", "")))
    return "user" if role in _USERS else "policy" if role in _POLICIES else role


def _content(row: Row, column: str, content: Any) -> str:
    if isinstance(content, list):
        return "".join(str(part.get("text") or "") for part in content if isinstance(part, Mapping))
    if not isinstance(content, str):
        raise row.wrong_type(column, content, "turns with texts")
    return content

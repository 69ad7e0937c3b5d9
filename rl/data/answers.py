"""Options and answers: the one place where they become texts and a letter.

Data sets list options in a column, with or without their letters ("A. left"), or in the question
itself; and give the answer as a letter, as a number, or as the text of an option. Here the options
become plain texts and the answer the letter of the right one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any, Literal

from rl.errors import DataError

# What an answer may be. "any" takes all three, and refuses what two of them understand differently.
AnswerForm = Literal["any", "letter", "index", "text"]

_BARE_LETTER = re.compile(r"\(?([A-Z])[).:]{0,2}")
_LETTER_AND_TEXT = re.compile(r"(?:\(([A-Z])\)|([A-Z])[).:])\s*(.+)", re.DOTALL)
# How options are lettered inside a question; in each the letter is group 1.
_STYLES = (
    re.compile(r"(?<![^\s,;:?!])\(([A-Z])\)[.:]?(?=\s|\w)"),
    re.compile(r"(?<![^\s,;:?!(])([A-Z])\)(?=\s)"),
    re.compile(r"(?<![^\s,;:?!(])([A-Z])\.(?=\s)"),
    re.compile(r"(?<![^\s,;?!(])([A-Z]):(?=\s)"),
)
_LABEL = re.compile(r"(?:^|(?<=[\s.?!:]))(?:answer )?(?:options|choices|candidates)\s*:?\s*$", re.I)


@dataclass(frozen=True)
class Embedded:
    """A question that listed its options: the rest of the question, and the options."""

    question: str
    options: tuple[str, ...]


def clean_options(options: Sequence[str]) -> tuple[str, ...]:
    """The options without white space around them, and without their letters where each has its
    own in front: "A. left", "(A) left", "A) left" or "A: left".
    """
    texts = [option.strip() for option in options]
    stripped = []
    for letter, text in zip(ascii_uppercase, texts, strict=False):
        match = _LETTER_AND_TEXT.fullmatch(text)
        if match is None or (match[1] or match[2]) != letter:
            return tuple(texts)
        stripped.append(match[3].strip())
    return tuple(stripped) if len(stripped) == len(texts) else tuple(texts)


def split_question(question: str) -> Embedded | None:
    """A question and the options listed in it, None where it lists none.

    Options are lettered from A on, at least two, all in one style: "(A) left", "A) left",
    "A. left" or "A: left"; each on a line of its own, or one behind the other. What follows the
    last option's line stays a part of the question, and so does what stands before the first; a
    heading such as "Options:" goes.
    """
    for style in _STYLES:
        for start in reversed([m for m in style.finditer(question) if m[1] == "A"]):
            if found := _options_from(question, style, start):
                return found
    return None


def _options_from(question: str, style: re.Pattern[str], first: re.Match[str]) -> Embedded | None:
    head = question[: first.start()]
    own_line = not (line := head.rpartition("\n")[2]).strip() or _LABEL.fullmatch(line.strip())
    marks = [first]
    for mark in style.finditer(question, first.end()):
        starts_line = not question[: mark.start()].rpartition("\n")[2].strip()
        # Where A has a line of its own, "B." in the middle of a line belongs to an option's text.
        if mark[1] == ascii_uppercase[len(marks) % 26] and (
            starts_line or not own_line or "\n" not in question[first.end() :]
        ):
            marks.append(mark)
    if not 2 <= len(marks) <= len(ascii_uppercase):
        return None
    ends = [mark.start() for mark in marks[1:]]
    last_line, newline, tail = question[marks[-1].end() :].partition("\n")
    texts = [
        " ".join(question[mark.end() : end].split()) for mark, end in zip(marks, ends, strict=False)
    ]
    if len({text[-1:] for text in texts}) == 1 and texts[0][-1:] in ",;|/":
        texts = [text[:-1].strip() for text in texts]
    texts.append(" ".join(last_line.split()))
    if not all(texts):
        return None
    kept = [_LABEL.sub("", head.strip()).strip(), tail.strip() if newline else ""]
    return Embedded("\n".join(filter(None, kept)), tuple(texts))


def same_options(left: Sequence[str], right: Sequence[str]) -> bool:
    """Whether two lists of options differ in nothing but case, white space and final stops."""
    return list(map(_plain, left)) == list(map(_plain, right))


def answer_letter(
    answer: Any, options: Sequence[str], *, where: str, form: AnswerForm = "any"
) -> str:
    """The letter of the right option.

    `answer` is a letter ("B", "(B)", "B.", "B. its text"), the index of an option counted from 0,
    or the exact text of one; `form` says which where the data set does. Raises `DataError`, which
    `where` opens, for what is none of them, or the one of one option and the other of another.
    """
    letters = ascii_uppercase[: len(options)]
    listed = ", ".join(f"{a} = {b!r}" for a, b in zip(letters, options, strict=True))
    found = {place for place in _readings(answer, options, form) if place is not None}
    if len(found) == 1:
        return letters[found.pop()]
    wanted = {
        "any": "a letter or the exact text of an option",
        "letter": "a letter",
        "index": "the number of an option, from 0",
        "text": "the exact text of one option",
    }[form]
    if not found:
        raise DataError(
            f"{where}: answer {answer!r} is not among the options ({listed}); give {wanted}"
        )
    raise DataError(
        f"{where}: answer {answer!r} is the letter of one option and the text of another "
        f"({listed}), or the text of several; reword the options or reorder them so that letter "
        "and text agree"
    )


def _readings(answer: Any, options: Sequence[str], form: AnswerForm) -> list[int | None]:
    """What an answer may stand for, as indices of options."""
    places: list[int | None] = []
    if form in ("any", "index") and isinstance(answer, int) and not isinstance(answer, bool):
        places.append(answer if 0 <= answer < len(options) else None)
    if form == "index" and isinstance(answer, str) and answer.strip().isdecimal():
        places += _readings(int(answer), options, form)
    if form in ("any", "text") and not isinstance(answer, bool):
        text = str(answer).strip()
        places += [i for i, option in enumerate(options) if option == text]
    if form in ("any", "letter") and isinstance(answer, str):
        places.append(_by_letter(answer.strip(), options))
    return places


def _by_letter(answer: str, options: Sequence[str]) -> int | None:
    letters = ascii_uppercase[: len(options)]
    if (match := _BARE_LETTER.fullmatch(answer)) and match[1] in letters:
        return letters.index(match[1])
    match = _LETTER_AND_TEXT.fullmatch(answer)
    if match is None or (letter := match[1] or match[2]) not in letters:
        return None
    place = letters.index(letter)
    # "B. text" counts by both: a letter with another option's text is no answer.
    return place if _plain(match[3]) == _plain(options[place]) else None


def _plain(text: str) -> str:
    return " ".join(text.split()).rstrip(" .").casefold()

"""Right or wrong: the outcome of a trajectory.

Source: the rule half of Future-L1's accuracy reward (`methods.md` 1.5), which compares the text
inside ``<answer>`` with the reference. How a choice may be written is ours. The release also sets
the accuracy of a repetitive answer to -1; here repetition is a reward of its own, so that the
outcome stays what it says.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any

from rewards.text import Completion, completion_text

ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
LABEL = re.compile(
    r"\(([A-Za-z])\)\s*|([A-Za-z])[.):]\s*|([A-Za-z])$"
)  # "(B)", "B." "B)" "B:", "B"


def extract_answer(text: str) -> str | None:
    """The inside of the last complete ``<answer>…</answer>``, stripped; None if there is none."""
    found = ANSWER.findall(text)
    return found[-1].strip() if found else None


def accuracy(text: str, answer: str, options: Sequence[str] = ()) -> float | None:
    """1 if the answer in `text` is `answer`, else 0; 0 too where `text` has no complete answer.

    With `options`, both sides may name the choice by its letter ("B", "b.", "(B)"), its text, or
    both ("B. red"); a letter that contradicts the text beside it names nothing. Without, the two
    texts must be equal up to case, spacing and a final full stop. None, no value, where the row
    cannot be judged: a blank reference, or one that is none of the options. Range: {0, 1}.
    """
    reference = _choice(answer, options) if options else _plain(answer)
    if not reference:
        return None
    given = extract_answer(text)
    if given is None:
        return 0.0
    return float((_choice(given, options) if options else _plain(given)) == reference)


def _plain(text: str) -> str:
    return " ".join(text.casefold().split()).removesuffix(".").rstrip()


def _choice(text: str, options: Sequence[str]) -> str | None:
    """The option, in plain form and without its own label, that `text` names."""
    plain = [_unlabelled(option, place) for place, option in enumerate(options)]
    text = text.strip()
    if (wanted := _plain(text)) in plain:
        return wanted
    label = LABEL.match(text)
    if label is None or (place := _place(label)) >= len(plain):
        return None
    rest = text[label.end() :]
    other = LABEL.fullmatch(rest)
    contradicted = _place(other) != place if other else _plain(rest) in set(plain) - {plain[place]}
    return None if contradicted else plain[place]


def _place(label: re.Match[str]) -> int:
    letter = next(group for group in label.groups() if group)
    return string.ascii_lowercase.index(letter.lower())


def _unlabelled(option: str, place: int) -> str:
    """For "B. red" at place 1 "red"; any other letter, or a letter alone, belongs to the option."""
    option = option.strip()
    label = LABEL.match(option)
    own = label is not None and label.end() < len(option) and _place(label) == place
    return _plain(option[label.end() :] if label and own else option)


def accuracy_rewards(
    completions: Sequence[Completion],
    *,
    answer: Sequence[str],
    options: Sequence[Sequence[str]],
    **_: Any,
) -> list[float | None]:
    """`accuracy` of each completion, with TRL's signature. `answer`, `options`: manifest
    columns.
    """
    rows = zip(completions, answer, options, strict=True)
    return [accuracy(completion_text(c), a, o) for c, a, o in rows]

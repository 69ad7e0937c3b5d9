"""Right or wrong: the outcome of a trajectory.

Source: the rule half of Future-L1's accuracy reward (OpenGVLab/Future-L1), which compares the text
inside ``<answer>`` with the reference, by string and by a maths checker. How a choice may be
written is ours. The release also sets the accuracy of a repetitive answer to -1; here repetition is
a reward of its own, so that the outcome stays what it says.
"""

from __future__ import annotations

import re
import string
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rewards.maths import LONGEST, is_maths, read_number, same_maths, same_numbers
from rewards.text import Completion, completion_text, normal
from rl.errors import RecipeError

Kind = Literal["auto", "choice", "number", "text"]

ANSWER = re.compile(r"<answer>((?:(?!<answer>).)*?)</answer>", re.DOTALL)
LABEL = re.compile(
    r"\(([A-Za-z])\)\s*|([A-Za-z])[.):]\s*|([A-Za-z])$"
)  # "(B)", "B." "B)" "B:", "B"
ARTICLE = re.compile(r"(?:an?|the) ")


def extract_answer(text: str) -> str | None:
    """The inside of the last complete ``<answer>…</answer>``, stripped; None if there is none."""
    found = ANSWER.findall(text)
    return found[-1].strip() if found else None


def accuracy(
    text: str, answer: str, options: Sequence[str] = (), *, kind: Kind = "auto"
) -> float | None:
    """1 if the answer in `text` is `answer`, else 0; 0 too where `text` has no complete answer.

    What `answer` is decides how the two are compared; `kind` says so where "auto" would guess
    wrong:

    - "choice" (a row with `options`): both sides may name the choice by its letter ("B", "b.",
      "(B)"), its text, or both ("B. red"); a letter that contradicts the text beside it names
      nothing. Without `options`, the letters alone are compared.
    - "number" (a plain number with at most one word behind it, or a formula in LaTeX): equal
      values, see `rewards.maths`. "2 red balls" is text, "2 balls" a number with its unit.
    - "text": equal up to case, spacing, Unicode variants, punctuation at the end and one leading
      article.

    None, no value, where the row cannot be judged: a blank reference, or one that is none of the
    options, or no number where `kind` asks for one. Range: {0, 1}.
    """
    _check_kind(kind)
    given = extract_answer(text)
    if kind == "choice" or (kind == "auto" and options):
        return _judge(_choice(answer, options), given and _choice(given, options))
    if kind == "number" or (kind == "auto" and _is_number(answer)):
        same = _same_value(answer, given or "")
        if same is not None or kind == "number":
            return same
    return _judge(_plain(answer), given and _plain(given))


def _judge(reference: str | None, given: str | None) -> float | None:
    return float(given == reference) if reference else None


def _is_number(answer: str) -> bool:
    number = read_number(normal(answer))
    return is_maths(answer) if number is None else len(number.units) <= 1


def _same_value(answer: str, given: str) -> float | None:
    """1 or 0; None if `answer` is no number."""
    reference, number = read_number(normal(answer)), read_number(normal(given))
    if reference is not None and number is not None:
        return float(same_numbers(reference, number))
    short = given if len(given) <= LONGEST else ""  # nobody's formula, and not for the cache
    same = same_maths(answer, short)
    return None if same is None else float(same or normal(given) == normal(answer))


def _plain(text: str) -> str:
    text = normal(text)
    article = ARTICLE.match(text)
    return text[article.end() :] if article else text


def _choice(text: str, options: Sequence[str]) -> str | None:
    """The option, in plain form and without its own label, that `text` names."""
    if not options:
        label = LABEL.match(text.strip())
        return None if label is None else string.ascii_lowercase[_place(label)]
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
    kind: Kind = "auto",
    **_: Any,
) -> list[float | None]:
    """`accuracy` of each completion, with TRL's signature; `answer`, `options` are columns."""
    _check_kind(kind)  # a wrong option fails even on an empty batch
    rows = zip(completions, answer, options, strict=True)
    return [accuracy(completion_text(c), a, o, kind=kind) for c, a, o in rows]


def _check_kind(kind: str) -> None:
    if kind not in get_args(Kind):
        raise RecipeError(f"accuracy: kind is {kind!r}; choose one of {get_args(Kind)}")

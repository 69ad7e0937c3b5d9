"""Which format rows are in: by the columns that all of the first ones have."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

from rl.data.formats import benchmarks, training, twiff
from rl.data.formats.draft import Format
from rl.data.formats.training import MAPPABLE, easyr1, mapped
from rl.data.manifest import MANIFEST
from rl.data.rows import look_up
from rl.errors import DataError

FORMATS = {f.name: f for f in (MANIFEST, *twiff.FORMATS, *training.FORMATS, *benchmarks.FORMATS)}
_SHOWN = 24  # columns in a message


def choose_format(
    name: str, columns: Mapping[str, str] | None, first: Sequence[Any], source: str
) -> tuple[Format, str]:
    """The format of rows, and a sentence that says which it is and why.

    `first` are the first rows' values. Raises `DataError` for an unknown name, a mapping that does
    not fit, and rows that are like none or several of the known data sets.
    """
    if name not in ("auto", *FORMATS):
        raise DataError(
            f"format {name!r} is unknown{_close(name, FORMATS)}; write auto, or one of "
            f"{', '.join(FORMATS)}"
        )
    rows = [row for row in first if isinstance(row, Mapping)]
    if columns:
        if name not in ("auto", "easyr1"):
            raise DataError(
                f"format {name!r} has its own columns, so a mapping of columns is not read; leave "
                "one of the two out"
            )
        whole = columns if name == "auto" else {**training.EASYR1_COLUMNS, **columns}
        _check_mapping(columns, whole, rows, source)
        told = ", ".join(f"{ours} is {theirs}" for ours, theirs in columns.items())
        found = easyr1(columns) if name == "easyr1" else mapped(columns)
        return found, f"{found.name}: {told}, as the mapping says"
    if name != "auto":
        return FORMATS[name], f"{name}: {FORMATS[name].what}, as asked for"
    fitting = [f for f in FORMATS.values() if rows and _fits(f, rows)]
    if not fitting and (not rows or any(_fits(MANIFEST, [row]) for row in rows)):
        fitting = [MANIFEST]  # ours with a mistake in some row, which reading will name
    best = [f for f in fitting if not any(_more_special(g, f) for g in fitting)]
    if len(best) == 1:
        needs = [need.replace("|", " or ") for need in best[0].needs]
        names = " and ".join(filter(None, [", ".join(needs[:-1]), needs[-1]]))
        return best[0], f"{best[0].name}: {best[0].what}, because rows have {names}"
    seen = list(_dotted(rows))
    problem = (
        f"its rows look like several data sets ({', '.join(f.name for f in best)}); write one as "
        "`format`"
        if best
        else "its rows are like none of the data sets that are known by their columns "
        f"({', '.join(FORMATS)})"
    )
    raise DataError(
        f"{source}: {problem}, or say which columns are which, as in\n    columns: "
        f"{_example(seen)}\nThe rows have: {_listed(seen)}"
    )


def _fits(candidate: Format, rows: Sequence[Mapping[str, Any]]) -> bool:
    return all(
        any(look_up(row, name)[0] is not None for name in need.split("|"))
        for need in candidate.needs
        for row in rows
    )


def _more_special(left: Format, right: Format) -> bool:
    """Whether rows of `left` have all that rows of `right` need, and more."""
    given = {name for need in left.needs for name in need.split("|")}
    covered = all(given & set(need.split("|")) for need in right.needs)
    return covered and len(left.needs) > len(right.needs)


def _check_mapping(
    columns: Mapping[str, str],
    whole: Mapping[str, str],
    rows: Sequence[Mapping[str, Any]],
    source: str,
) -> None:
    for ours in columns:
        if ours not in MAPPABLE:
            raise DataError(
                f"{source}: columns.{ours} is no column of ours{_close(ours, MAPPABLE)}; those are "
                f"{', '.join(MAPPABLE)}"
            )
    lacking = [c for c in ("question", "answer") if c not in whole]
    if "video" not in whole and "images" not in whole:
        lacking.append("video")
    if ("start" in whole) != ("end" in whole):
        lacking.append("start" if "end" in whole else "end")
    seen = list(_dotted(rows))
    if lacking:
        raise DataError(
            f"{source}: the mapping of columns lacks {' and '.join(lacking)}; add what the rows "
            f"call them. They have: {_listed(seen)}"
        )
    for ours, theirs in columns.items():
        if theirs not in seen:
            raise DataError(
                f"{source}: columns.{ours} is {theirs!r}, which the first rows do not have"
                f"{_close(theirs, seen)}. They have: {_listed(seen)}"
            )


def _dotted(rows: Sequence[Mapping[str, Any]], prefix: str = "") -> Iterator[str]:
    """All columns of the rows, those of nested objects too."""
    names = dict.fromkeys(name for row in rows for name in row)
    for name in names:
        yield prefix + name
        nested = [row[name] for row in rows if isinstance(row.get(name), Mapping)]
        if nested:
            yield from _dotted(nested, f"{prefix}{name}.")


def _example(seen: Sequence[str]) -> str:
    """A mapping to start from: names that sound like ours, else a placeholder."""
    alike = {
        "video": ("video", "path", "clip", "file", "vid"),
        "question": ("question", "problem", "prompt", "query"),
        "answer": ("answer", "solution", "label", "target"),
    }
    guessed = {}
    for ours, words in alike.items():
        guesses = [c for w in words for c in seen if w in c.rpartition(".")[2].lower()]
        guessed[ours] = guesses[0] if guesses else f"their name for the {ours}"
    return "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in guessed.items()) + "}"


def _close(name: str, known: Any) -> str:
    close = get_close_matches(name, list(known), n=1)
    return f"; did you mean {close[0]!r}?" if close else ""


def _listed(names: Sequence[str]) -> str:
    more = f", and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more if names else "no columns"

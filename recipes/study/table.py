"""The study's table: means over seeds with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

from recipes.evaluation.tables import Grid

# 97.5 % quantiles of Student's t, by degrees of freedom: for up to ten seeds.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T) + 1
COLUMNS = {
    "hop1": "1-Hop",
    "hop2": "2-Hop",
    "all": "AVG",
    "imagining": "imagine",
    "neighbours": "neighbours' cosine",
}
_PERCENT = ("hop1", "hop2", "all", "imagining")

Figures = dict[str, float | None]  # by the names of COLUMNS; None where there is none


def figures(evaluation: Mapping[str, Any]) -> Figures:
    """One row's figures of one seed, from an evaluation's dictionary with one mode."""
    (mode,) = evaluation["modes"]
    score = evaluation["modes"][mode]
    parts = evaluation["breakdowns"]["question_type"][mode]
    values = {hop: part["accuracy"] for hop, part in parts.items()}
    values |= {"all": score["accuracy"], "imagining": score["imagining"]}
    values["neighbours"] = score["neighbours"]
    return values


def interval(values: Sequence[float | None]) -> tuple[float, float | None]:
    """The mean over seeds and half the width of its 95 % interval (Student's t); None for one seed.

    The interval is about seeds, not about how many questions were asked.
    """
    found = [v for v in values if v is not None]
    if not found:
        return math.nan, None
    if len(found) == 1:
        return found[0], None
    return fmean(found), _T[len(found) - 2] * stdev(found) / math.sqrt(len(found))


def cell(name: str, values: Sequence[float | None]) -> str:
    """The interval as text, "-" without a value."""
    mean, half = interval(values)
    if math.isnan(mean):
        return "-"
    scale, digits = (100, 1) if name in _PERCENT else (1, 2)
    spread = "" if half is None else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def study_table(
    found: Mapping[str, Sequence[Figures]], labels: Mapping[str, str], title: str
) -> Grid:
    """A row for each name in `found`, which holds its figures by seed."""
    rows = (
        (labels[name], *(cell(c, [f.get(c) for f in seeds]) for c in COLUMNS))
        for name, seeds in found.items()
    )
    return Grid(title, ("", *COLUMNS.values()), tuple(rows))

"""The study's tables: means over seeds with 95 % intervals."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, NamedTuple

from recipes.evaluation.tables import Grid

# 97.5 % quantiles of Student's t, by degrees of freedom: for up to ten seeds.
_T = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
MOST_SEEDS = len(_T) + 1


class Column(NamedTuple):
    """How figures are shown: multiplied by `scale`, with so many `digits`."""

    heading: str
    scale: int = 1
    digits: int = 2


Columns = Mapping[str, Column]  # by the names of figures
Figures = dict[str, float | None]  # by the names of columns; None where there is none

# Of questions over one hop and two.
HOPS: Columns = {
    "hop1": Column("1-Hop", 100, 1),
    "hop2": Column("2-Hop", 100, 1),
    "all": Column("AVG", 100, 1),
    "imagining": Column("imagine", 100, 1),
    "neighbours": Column("neighbours' cosine"),
}
# Of one kind of question: accuracy and what it takes.
COST: Columns = {
    "accuracy": Column("accuracy", 100, 1),
    "tokens": Column("tokens", digits=1),
    "latents": Column("latents", digits=1),
    "steps": Column("AR steps", digits=1),
    "neighbours": Column("neighbours' cosine"),
    "seconds": Column("training, s", digits=0),
}


def by_hops(evaluation: Mapping[str, Any]) -> Figures:
    """The figures of `HOPS` of one seed, from an evaluation's dictionary with one mode."""
    (mode,) = evaluation["modes"]
    score = evaluation["modes"][mode]
    parts = evaluation["breakdowns"]["question_type"][mode]
    values = {hop: part["accuracy"] for hop, part in parts.items()}
    values |= {"all": score["accuracy"], "imagining": score["imagining"]}
    values["neighbours"] = score["neighbours"]
    return values


def by_cost(evaluation: Mapping[str, Any], seconds: float) -> Figures:
    """The figures of `COST` of one seed, from an evaluation's dictionary with one mode and how long
    training took.

    An autoregressive step makes a token, markers and the end of sequence among them, or a latent.
    """
    (score,) = evaluation["modes"].values()
    values = {name: score[name] for name in ("accuracy", "tokens", "latents", "neighbours")}
    return values | {"steps": score["tokens"] + score["latents"], "seconds": seconds}


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


def cell(column: Column, values: Sequence[float | None]) -> str:
    """The interval as text, "-" without a value."""
    mean, half = interval(values)
    if math.isnan(mean):
        return "-"
    _, scale, digits = column
    spread = "" if half is None else f" ± {scale * half:.{digits}f}"
    return f"{scale * mean:.{digits}f}{spread}"


def study_table(
    found: Mapping[str, Sequence[Figures]],
    labels: Mapping[str, str],
    columns: Columns,
    title: str,
) -> Grid:
    """A row for each name in `found`, which holds its figures by seed."""
    rows = (
        (labels[name], *(cell(c, [f.get(key) for f in seeds]) for key, c in columns.items()))
        for name, seeds in found.items()
    )
    return Grid(title, ("", *(c.heading for c in columns.values())), tuple(rows))

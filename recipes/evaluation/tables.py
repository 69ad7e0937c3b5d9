"""The tables of an evaluation: one in the shape of the paper's, and one of what is behind it.

Both are made once, as rows of texts, and shown either in a terminal or as Markdown.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from rich import box
from rich.console import Console
from rich.table import Table

from recipes.evaluation.benchmarks.base import Benchmark, Breakdown
from recipes.evaluation.intervals import Figure
from recipes.evaluation.scores import Evaluation, Score

_MODES = {"free": "free", "always": "forced", "never": "forbidden"}
_GRADES = {"reasoning": "CoT", "answer": "Answer", "mean": "Avg"}
_WIDE = 5  # values of a breakdown that have columns of their own; more of them are rows
_SHORT = 24  # characters of a label that is never wrapped
NOTHING = "-"


@dataclass(frozen=True)
class Grid:
    """A table of texts; the first `labels` columns are names, the others numbers."""

    title: str
    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    labels: int = 1

    def rich(self) -> Table:
        table = Table(
            title=self.title,
            title_justify="left",
            box=box.SIMPLE,
            pad_edge=False,
            collapse_padding=True,
        )
        for place, heading in enumerate(self.header):
            label = place < self.labels
            cells = [heading, *(row[place] for row in self.rows)]
            longest = max(len(word) for cell in cells for word in cell.split())
            # Where a terminal is narrow, an interval goes below its value.
            table.add_column(
                heading,
                justify="left" if label else "right",
                no_wrap=label and max(map(len, cells)) <= _SHORT,
                min_width=min(longest, _SHORT),
            )
        for row in self.rows:
            table.add_row(*row)
        return table

    def markdown(self) -> str:
        rule = ["---" if i < self.labels else "---:" for i in range(len(self.header))]
        lines = [self.header, rule, *self.rows]
        cells = (" | ".join(text.replace("|", "\\|") for text in line) for line in lines)
        return "\n".join([f"**{self.title}**", "", *(f"| {line} |" for line in cells)])


def grids(evaluation: Evaluation, benchmark: Benchmark | None = None) -> list[Grid]:
    """The tables of an evaluation: a main one for each breakdown, and the counts behind them."""
    title = benchmark.title if benchmark else "Greedy accuracy"
    overall = benchmark.overall if benchmark else "all"
    known = {b.column: b for b in benchmark.breakdowns} if benchmark else {}
    judged = any(score.right is None for score in evaluation.scores.values())
    unit = "grades from 0 to 5" if judged else "% right"
    title = f"{title}: {unit}, 95 % interval in brackets"
    found = []
    for column in evaluation.breakdowns:
        breakdown = known.get(column, Breakdown(column))
        found.append(_broken_down(title, evaluation, breakdown, overall))
    return [*(found or [_plain(title, evaluation, overall)]), _behind(evaluation)]


def skipped_lines(evaluation: Evaluation, most: int = 20) -> list[str]:
    """What was left out, one line a sample, at most so many."""
    lines = [
        f"skipped {name}: {reason.removeprefix(f'sample {name!r}: ')}"
        for name, reason in evaluation.skipped.items()
    ]
    left = len(lines) - most
    return lines[:most] + ([f"... and {left} more"] if left > 0 else [])


def show(evaluation: Evaluation, console: Console, benchmark: Benchmark | None = None) -> None:
    """Print the tables of an evaluation, and what was skipped."""
    for grid in grids(evaluation, benchmark):
        console.print(grid.rich())
    for line in skipped_lines(evaluation):
        console.print(line, highlight=False, markup=False)


def _plain(title: str, evaluation: Evaluation, overall: str) -> Grid:
    names = list(next(iter(evaluation.scores.values())).figures)
    header = ["imagining", *(_heading(name, overall) for name in names)]
    rows = [[_mode(m), *_cells(s, names)] for m, s in evaluation.scores.items()]
    return _grid(title, header, rows)


def _broken_down(title: str, evaluation: Evaluation, breakdown: Breakdown, overall: str) -> Grid:
    parts = evaluation.breakdowns[breakdown.column]
    values = breakdown.order(value for by_value in parts.values() for value in by_value)
    (name, *others) = next(iter(evaluation.scores.values())).figures
    if len(values) <= _WIDE and not others:
        rows = [
            [
                _mode(mode),
                *(
                    _cell(parts[mode][v].figures[name]) if v in parts[mode] else NOTHING
                    for v in values
                ),
                _cell(score.figures[name]),
            ]
            for mode, score in evaluation.scores.items()
        ]
        return _grid(title, ["imagining", *map(breakdown.heading, values), overall], rows)
    names = [name, *others]
    modes = list(evaluation.scores)
    columns = [(mode, n) for mode in modes for n in names]
    header = [breakdown.column, "answers"] + [
        _mode(mode) if not others else f"{_mode(mode)}: {_heading(n, overall)}"
        for mode, n in columns
    ]
    lines: list[tuple[str, dict[str, Score]]] = [
        (breakdown.heading(v), {m: parts[m][v] for m in modes if v in parts[m]}) for v in values
    ]
    lines.append((overall, evaluation.scores))
    rows = [
        [
            label,
            str(max(score.answers for score in scores.values())),
            *(_cell(scores[m].figures[n]) if m in scores else NOTHING for m, n in columns),
        ]
        for label, scores in lines
    ]
    return _grid(title, header, rows)


def _behind(evaluation: Evaluation) -> Grid:
    header = [
        "imagining", "answers", "no value", "unparsed", "cut short", "with spans", "spans",
        "latents", "tokens",
    ]  # fmt: skip
    rows = [
        [
            _mode(mode),
            str(s.answers),
            str(s.answers - s.judged),
            str(s.unparsed),
            _percent(s.cut_short),
            _percent(s.imagining),
            _number(s.spans, 2),
            _number(s.latents, 1),
            _number(s.tokens, 1),
        ]
        for mode, s in evaluation.scores.items()
    ]
    title = "behind it; spans, latents and tokens are means an answer"
    if evaluation.skipped:
        title = f"{title}; skipped samples: {len(evaluation.skipped)}"
    return _grid(title, header, rows)


def _grid(title: str, header: Sequence[str], rows: Iterable[Sequence[str]]) -> Grid:
    return Grid(title, tuple(header), tuple(tuple(row) for row in rows))


def _cells(score: Score, names: Sequence[str]) -> list[str]:
    return [_cell(score.figures[name]) for name in names]


def _cell(figure: Figure) -> str:
    if math.isnan(figure.value):
        return "no value"
    scale, digits = (100, 1) if figure.share else (1, 2)
    value, low, high = (
        f"{scale * number:.{digits}f}" for number in (figure.value, figure.low, figure.high)
    )
    return value if math.isnan(figure.low) else f"{value} [{low}-{high}]"


def _heading(name: str, overall: str) -> str:
    return _GRADES.get(name, overall)


def _mode(mode: str) -> str:
    return _MODES.get(mode, mode)


def _percent(value: float) -> str:
    return NOTHING if math.isnan(value) else f"{value:.1%}"


def _number(value: float, digits: int) -> str:
    return NOTHING if math.isnan(value) else f"{value:.{digits}f}"

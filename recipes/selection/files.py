"""What a selection by visual gain leaves: a table, a manifest, a picture, figures."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, get_args

import pyarrow as pa
import pyarrow.parquet as pq
from rich import box
from rich.table import Table

from recipes.schema.selection import SelectRecipe
from recipes.selection.picture import draw_selection
from recipes.selection.rules import Probe, Probed, Reason, Verdict
from rl.data.formats import SkippedRow
from rl.data.manifest import manifest_row
from rl.errors import DataError
from rl.trajectory import Sample
from rl.writing import write_json, write_text, write_whole

_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("video", pa.string()),
        ("question", pa.string()),
        ("answer", pa.string()),
        ("options", pa.list_(pa.string())),
        ("p_text", pa.float64()),
        ("p_hint", pa.float64()),
        ("gain", pa.float64()),
        ("n", pa.int64()),
        ("invalid_text", pa.int64()),
        ("invalid_hint", pa.int64()),
        ("cut_short_text", pa.int64()),
        ("cut_short_hint", pa.int64()),
        ("kept", pa.bool_()),
        ("rank", pa.int64()),
        ("reason", pa.string()),
        ("skipped", pa.string()),
    ]
)


@dataclass(frozen=True)
class Selection:
    """The rows, in the order of the data, with what their probes gave and what becomes of them, by
    id. `unread` are rows that could not even be read.
    """

    samples: Sequence[Sample]
    probed: Mapping[str, Probed]
    verdicts: Mapping[str, Verdict]
    unread: Sequence[SkippedRow]

    def kept(self) -> list[Sample]:
        """The rows that are kept, best first."""
        by_rank = {self.verdicts[s.id].rank or 0: s for s in self.samples if self._kept(s)}
        return [by_rank[rank] for rank in sorted(by_rank)]

    def skipped(self) -> list[dict[str, str]]:
        """The rows that were not probed, as `id`, `file` and `reason`."""
        rows = [
            {"id": s.id, "file": s.video, "reason": reason}
            for s in self.samples
            if (reason := self.probed[s.id].skipped)
        ]
        return rows + [row._asdict() for row in self.unread]

    def summary(self) -> dict[str, Any]:
        """Counts and means as plain values for JSON; null where there is nothing to average."""
        reasons = Counter(verdict.reason for verdict in self.verdicts.values())
        parts = {
            reason: self._figures(self._with(reason)) for reason in _REASONS if reasons[reason]
        }
        kept = self.kept()
        return {
            **self._figures(list(self.probed.values())),
            "kept": reasons["kept"],
            "unread": len(self.unread),
            "least_gain_kept": _plain(self.probed[kept[-1].id].gain) if kept else None,
            "reasons": parts,
            "probes": {
                "text": _shares([p.text for p in self.probed.values() if p.text]),
                "hinted": _shares([p.hinted for p in self.probed.values() if p.hinted]),
            },
        }

    def table(self) -> Table:
        """Counts and means for a terminal."""
        figures = self.summary()
        table = Table(title="Visual gain", title_justify="left", box=box.SIMPLE, pad_edge=False)
        table.add_column("rows")
        for heading in ("count", "p_text", "p_hint", "gain"):
            table.add_column(heading, justify="right", no_wrap=True)
        for name, part in [("all", figures), *figures["reasons"].items()]:
            means = (part[key] for key in ("p_text", "p_hint", "gain"))
            table.add_row(
                name, str(part["rows"]), *("" if v is None else f"{v:.3f}" for v in means)
            )
        return table

    def notes(self) -> list[str]:
        """What to know besides the table: answers that count for nothing, rows that are missing."""
        lines = [
            f"{name}: {part['answers']} answers, {part['invalid']:.1%} without an outcome, "
            f"{part['cut_short']:.1%} cut short"
            for name, part in self.summary()["probes"].items()
            if part["answers"]
        ]
        if unsettled := sum(not probed.settled for probed in self.probed.values()):
            lines.append(
                f"{unsettled} rows have too few answers with an outcome; start again to ask anew"
            )
        if any(probed.skipped for probed in self.probed.values()):
            lines.append("skipped rows stay so; to probe one, remove its line from probes.jsonl")
        if self.unread:
            lines.append(f"{len(self.unread)} more rows could not be read, see skipped.jsonl")
        return lines

    def columns(self) -> dict[str, list[Any]]:
        """The columns of `selection.parquet`."""
        rows = [(s, self.probed[s.id], self.verdicts[s.id]) for s in self.samples]

        def column(value: Callable[[Sample, Probed, Verdict], Any]) -> list[Any]:
            return [value(*row) for row in rows]

        return {
            **{
                name: [getattr(s, name) for s in self.samples]
                for name in ("id", "video", "question", "answer", "options")
            },
            "p_text": column(lambda _s, p, _v: _plain(p.p_text)),
            "p_hint": column(lambda _s, p, _v: _plain(p.p_hint)),
            "gain": column(lambda _s, p, _v: _plain(p.gain)),
            "n": column(lambda _s, p, _v: p.text and p.text.judged + p.text.invalid),
            "invalid_text": column(lambda _s, p, _v: p.text and p.text.invalid),
            "invalid_hint": column(lambda _s, p, _v: p.hinted and p.hinted.invalid),
            "cut_short_text": column(lambda _s, p, _v: p.text and p.text.cut_short),
            "cut_short_hint": column(lambda _s, p, _v: p.hinted and p.hinted.cut_short),
            "kept": column(lambda _s, _p, v: v.kept),
            "rank": column(lambda _s, _p, v: v.rank),
            "reason": column(lambda _s, _p, v: v.reason),
            "skipped": column(lambda _s, p, _v: p.skipped or None),
        }

    def _kept(self, sample: Sample) -> bool:
        return self.verdicts[sample.id].kept

    def _with(self, reason: Reason) -> list[Probed]:
        return [self.probed[id] for id, v in self.verdicts.items() if v.reason == reason]

    def _figures(self, rows: Sequence[Probed]) -> dict[str, Any]:
        return {
            "rows": len(rows),
            "p_text": _mean(p.p_text for p in rows),
            "p_hint": _mean(p.p_hint for p in rows),
            "gain": _mean(p.gain for p in rows),
        }


_REASONS: tuple[Reason, ...] = get_args(Reason)


def write_selection(selection: Selection, folder: Path, recipe: SelectRecipe) -> None:
    """Write `selection.parquet`, `kept.jsonl`, `skipped.jsonl`, `histogram.png` and, last,
    `summary.json` to the run folder; each is the old file or the new one, never half of one.
    """
    table = pa.table(selection.columns(), schema=_SCHEMA)
    write_whole(folder / "selection.parquet", lambda path: pq.write_table(table, path))
    kept = [_manifest_line(sample) for sample in selection.kept()]
    _write_lines(folder / "kept.jsonl", kept)
    _write_lines(folder / "skipped.jsonl", map(json.dumps, selection.skipped()))
    pairs = [
        (float(p.p_text), float(p.p_hint), selection.verdicts[id].kept)
        for id, p in selection.probed.items()
        if p.p_text is not None and p.p_hint is not None
    ]
    write_whole(
        folder / "histogram.png", lambda path: draw_selection(pairs, recipe.sampling.n, path)
    )
    keep = recipe.keep.model_dump(mode="json")
    write_json(folder / "summary.json", selection.summary() | {"keep": keep})


def _manifest_line(sample: Sample) -> str:
    row = manifest_row(sample)
    try:
        return json.dumps(row, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise DataError(
            f"sample {sample.id!r}: it cannot be written as a line of a manifest ({error}); leave "
            "out the column that holds such a value"
        ) from error


def _write_lines(path: Path, lines: Iterable[str]) -> None:
    write_text(path, "".join(line + "\n" for line in lines))


def _shares(probes: Sequence[Probe]) -> dict[str, Any]:
    answers = sum(p.judged + p.invalid for p in probes)
    share = (lambda count: count / answers) if answers else (lambda _count: None)
    return {
        "answers": answers,
        "invalid": share(sum(p.invalid for p in probes)),
        "cut_short": share(sum(p.cut_short for p in probes)),
    }


def _mean(values: Iterable[Fraction | None]) -> float | None:
    numbers = [value for value in values if value is not None]
    return float(sum(numbers) / len(numbers)) if numbers else None


def _plain(value: Fraction | None) -> float | None:
    return None if value is None else float(value)

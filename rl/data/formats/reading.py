"""Rows of any known data set as `Sample`s."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import chain, islice
from pathlib import Path
from typing import Literal, NamedTuple

from rl.data.formats.draft import Format, finish
from rl.data.formats.files import Files
from rl.data.formats.recognise import choose_format
from rl.data.formats.source import open_source
from rl.data.rows import Row
from rl.errors import DataError, MissingVideoError
from rl.trajectory import Sample

_FIRST = 8  # rows that a format is recognised by


class SkippedRow(NamedTuple):
    """A row whose clip was not there. `file` is where it was looked for, "" if the row names
    none.
    """

    id: str
    file: str
    reason: str


@dataclass(frozen=True)
class SampleSet:
    """The rows of a data set.

    `recognised` says in a sentence which data set it was taken for and why, and how many rows are
    shown by pictures because their video is not there.
    """

    samples: list[Sample]
    recognised: str
    format: str
    skipped: list[SkippedRow]


def read_samples(
    source: str | Path,
    *,
    format: str = "auto",
    columns: Mapping[str, str] | None = None,
    video_root: str | Path | None = None,
    limit: int | None = None,
    missing: Literal["stop", "skip"] = "stop",
) -> SampleSet:
    """Read and check the rows of a data set, the first `limit` of those it keeps if given.

    `source` is a file (JSON lines, a JSON list, Parquet, CSV), a folder of such files, a folder
    that `datasets` saved ("folder:split" where it has several), or what `datasets` can load
    ("owner/name:split", "owner/name/config:split"). `format` is one of `FORMATS`, or "auto" to tell
    by the columns. `columns` maps our names to theirs, dotted where nested
    (``{"question": "qa.Question"}``), for rows of no known format. Paths of videos start from
    `video_root`, by default from the source's folder.

    Answers of questions with options become the option's letter (`rl.data.answers`), clips absolute
    paths; a clip that is a folder of images, or that only has images, comes as `Sample.images`.
    Rows whose clip is not there stop the reading with `MissingVideoError`, or are skipped with
    `missing="skip"`. All else that is wrong with a row raises `DataError`, naming file and row. A
    file's existence is looked up as its row is read: there is no second pass.
    """
    if limit is not None and limit < 1:
        raise DataError(
            f"limit is {limit}; leave it out to read all rows of {source}, or give at least 1"
        )
    opened = open_source(source)
    look = format == "auto" or bool(columns)
    first = list(islice(opened.rows, _FIRST)) if look else []
    if look and not first:
        raise _empty(source)
    values = [row.values for row in first]
    chosen, recognised = choose_format(format, columns, values, str(source))
    files = Files(Path(video_root) if video_root is not None else opened.folder)
    samples, stand_ins = _Samples(chosen), 0
    skipped: list[SkippedRow] = []
    for raw in chain(first, opened.rows):
        row = Row(raw.where, raw.values, raw.source)
        for part, draft in enumerate(chosen.read(row), start=1):
            default = f"{opened.name}:{raw.number}" + (f":{part}" if part > 1 else "")
            try:
                sample, stands_in = finish(row, draft, files, default)
            except MissingVideoError as error:
                if missing == "stop":
                    raise
                file = files.path(draft.videos[0]) if draft.videos else ""
                skipped.append(SkippedRow(draft.id or default, str(file), str(error)))
            else:
                samples.add(sample, raw.where)
                stand_ins += stands_in
        if limit is not None and len(samples.kept) >= limit:
            break
    if not samples.kept and skipped:
        first_reason = skipped[0].reason
        raise MissingVideoError(
            f"{source}: none of its {len(skipped)} rows has its video; the first: {first_reason}"
        )
    if not samples.kept:
        raise _empty(source)
    if stand_ins:
        recognised += (
            f"; {stand_ins} rows are shown by pictures alone, because their video files are missing"
        )
    return SampleSet(samples.kept[:limit], recognised, chosen.name, skipped)


def _empty(source: str | Path) -> DataError:
    return DataError(f"{source}: the manifest has no rows; write one JSON object a line")


class _Samples:
    """Samples so far, under ids that differ."""

    def __init__(self, chosen: Format) -> None:
        self.chosen = chosen
        self.kept: list[Sample] = []
        self._places: dict[str, str] = {}  # where each id was used
        self._repeats: dict[str, int] = {}

    def add(self, sample: Sample, where: str) -> None:
        if (before := self._places.get(sample.id)) is not None:
            if self.chosen.own_ids:
                raise DataError(
                    f"{where}: id {sample.id!r} is already used in {before}; ids must differ "
                    "(leave the column out to have them numbered)"
                )
            sample = replace(sample, id=self._numbered(sample.id))
        self._places[sample.id] = where.rpartition(", ")[2]
        self.kept.append(sample)

    def _numbered(self, name: str) -> str:
        """The first of "name#2", "name#3", ... that is free."""
        number = self._repeats.get(name, 1) + 1
        while (numbered := f"{name}#{number}") in self._places:
            number += 1
        self._repeats[name] = number
        return numbered

"""Small data sets on disk: files of rows, and clips of which existence is all that matters."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow
from pyarrow import parquet

from rl.data.formats import SampleSet, read_samples
from rl.trajectory import Sample

Row = dict[str, Any]


def write(folder: Path, name: str, rows: list[Row], clips: tuple[str, ...] = ()) -> Path:
    """Rows as .json, .jsonl or .parquet, and empty files for `clips`."""
    for clip in clips:
        (folder / clip).parent.mkdir(parents=True, exist_ok=True)
        (folder / clip).write_bytes(b"0")
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if file.suffix == ".parquet":
        names = dict.fromkeys(name for row in rows for name in row)
        whole = [{name: row.get(name) for name in names} for row in rows]
        parquet.write_table(pyarrow.Table.from_pylist(whole), file)
    elif file.suffix == ".jsonl":
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    else:
        file.write_text(json.dumps(rows))
    return file


def read(file: Path, expected: str, **arguments: Any) -> list[Sample]:
    """The samples of a file, which must be recognised as `expected`, and read alike when told."""
    found = read_samples(file, **arguments)
    assert found.format == expected and found.recognised.startswith(f"{expected}: ")
    told: SampleSet = read_samples(file, **{**arguments, "format": expected})
    assert told.samples == found.samples
    return found.samples

"""Rows from files, folders and `datasets`, one after the other."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rl.errors import DataError

if TYPE_CHECKING:
    import pyarrow

FILES = (".parquet", ".jsonl", ".json", ".ndjson", ".csv")
_BATCH = 256  # rows of Parquet held at once: some data sets keep their images in them


@dataclass(frozen=True)
class RawRow:
    where: str  # opens messages: the file and its line or row
    source: str  # what the row comes from, without folder and suffix
    number: int  # from 1: the line in a file, the row in the whole of what has several
    values: Any


@dataclass(frozen=True)
class Source:
    """`name` is what ids of unnamed rows begin with; paths of videos are relative to `folder`."""

    name: str
    folder: Path
    rows: Iterator[RawRow]


def names_file(name: str) -> bool:
    """Whether a name has the suffix of a file that holds rows."""
    return name.lower().endswith(FILES)


def open_source(source: str | Path) -> Source:
    """The rows of a file (.jsonl, .json, .parquet, .csv; any other is read as JSON lines), of a
    folder of such files or one that `datasets` saved, or of a data set that `datasets` can load.

    Names other than a file's may end in ":split", those for `datasets` in "/config:split". Raises
    `DataError`.
    """
    path = Path(source)
    if path.is_file():
        return Source(path.stem, path.parent, _file_rows(path))
    if path.is_dir():
        return _folder(path, None)
    base, colon, split = str(source).rpartition(":")
    name, split = (base, split) if colon else (str(source), None)
    if Path(name).is_dir():
        return _folder(Path(name), split)
    if (parent := Path(name).parent).is_dir() and parent != Path(name).root and _on_disk(parent):
        return _loaded(str(parent), Path(name).name, split, folder=parent)
    if path.is_absolute() or names_file(name) or name.startswith((".", "~")):
        raise DataError(
            f"{source}: the manifest cannot be read (No such file or directory); check the path in "
            "the recipe"
        )
    parts = name.split("/")
    config = parts.pop() if len(parts) == 3 else None
    return _loaded("/".join(parts), config, split, folder=Path.cwd())


def _on_disk(folder: Path) -> bool:
    """Whether a folder describes configurations of a data set."""
    card = folder / "README.md"
    return card.is_file() and "configs:" in card.read_text(encoding="utf-8", errors="replace")


def _folder(folder: Path, split: str | None) -> Source:
    if (folder / "state.json").is_file() or (folder / "dataset_dict.json").is_file():
        from datasets import load_from_disk

        saved = load_from_disk(str(folder))
        data = _one_split(saved, split, str(folder))
        return Source(_name(folder.name, split), folder, _arrow_rows(data, folder))
    if _on_disk(folder):
        return _loaded(str(folder), None, split, folder=folder)
    for suffix in FILES:
        if files := sorted(folder.rglob(f"*{suffix}")):
            files = _of_split(folder, files, split)
            return Source(_name(folder.name, split), folder, _numbered(files))
    raise DataError(
        f"{folder}: the folder holds no data ({', '.join(FILES)}, or a data set that `datasets` "
        "saved); name the file or folder with the rows"
    )


def _of_split(folder: Path, files: list[Path], split: str | None) -> list[Path]:
    """The files of a split, by "train-00000-of-00004.parquet", "train.jsonl" or "train/..."."""
    known = ("train", "validation", "valid", "val", "dev", "test")
    by_split: dict[str, list[Path]] = {}
    for file in files:
        parts = file.relative_to(folder).parts
        first = parts[-1].split(".")[0].split("-")[0].split("_")[0]
        named = next((p for p in parts[:-1] if p == split or p in known), first)
        by_split.setdefault(named, []).append(file)
    if split is not None:
        if split not in by_split:
            raise DataError(
                f"{folder}: no file there belongs to the split {split!r}; there are "
                f"{', '.join(sorted(by_split))}"
            )
        return by_split[split]
    if len(several := sorted(set(by_split) & set(known))) > 1:
        raise DataError(
            f"{folder}: the folder has the splits {', '.join(several)}; write {folder}:{several[0]}"
        )
    return files


def _loaded(name: str, config: str | None, split: str | None, *, folder: Path) -> Source:
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        loaded = load_dataset(name, config, split=split)
    except (OSError, ValueError, DatasetsError) as error:
        raise DataError(
            f"{name}: there is no such file or folder, and `datasets` cannot load it "
            f"({str(error).splitlines()[0]}); check the name, and write name/config:split where "
            "the data set has several"
        ) from error
    whole = f"{name}/{config}" if config else name
    data = _one_split(loaded, split, whole)
    ids = _name(whole.replace("/", "_"), split)
    return Source(ids, folder, _arrow_rows(data, Path(config or name)))


def _name(source: str, split: str | None) -> str:
    """What ids begin with: those of two splits must differ."""
    return source if split is None else f"{source}:{split}"


def _one_split(data: Any, split: str | None, name: str) -> Any:
    """The `datasets.Dataset` that is meant."""
    from datasets import Dataset

    if isinstance(data, Dataset):
        return data
    if split is None and len(data) == 1:
        return next(iter(data.values()))
    if split is None:
        raise DataError(
            f"{name}: has the splits {', '.join(data)}; write {name}:{next(iter(data))}"
        )
    if split not in data:
        close = get_close_matches(split, data, n=1)
        hint = f"did you mean {close[0]!r}?" if close else f"it has {', '.join(data)}"
        raise DataError(f"{name}: has no split {split!r}; {hint}")
    return data[split]


def _numbered(files: list[Path]) -> Iterator[RawRow]:
    number = 0
    for file in files:
        for row in _file_rows(file):
            number += 1
            yield RawRow(row.where, row.source, number, row.values)


def _file_rows(file: Path) -> Iterator[RawRow]:
    suffix = file.suffix.lower()
    try:
        if suffix == ".parquet":
            yield from _parquet_rows(file)
        elif suffix == ".csv":
            yield from _csv_rows(file)
        elif suffix == ".json" and _is_one_document(file):
            yield from _json_rows(file)
        else:
            yield from _line_rows(file)
    except UnicodeDecodeError as error:
        raise DataError(
            f"{file}: not a text file in UTF-8 ({error}); save it as UTF-8 JSON lines"
        ) from error
    except OSError as error:
        raise DataError(
            f"{file}: the manifest cannot be read ({error.strerror or error}); check the path in "
            "the recipe"
        ) from error


def _is_one_document(file: Path) -> bool:
    """Whether a .json file is one list or object, and not one object a line."""
    with file.open(encoding="utf-8-sig") as stream:
        while (character := stream.read(1)).isspace():
            pass
        if character != "{":
            return True
        try:
            first = json.loads(character + stream.readline())
        except json.JSONDecodeError:
            return True
    return isinstance(first.get("data"), list)


def _line_rows(file: Path) -> Iterator[RawRow]:
    with file.open(encoding="utf-8-sig", newline="\n") as stream:
        for number, line in enumerate(stream, start=1):
            if not line.strip():
                continue
            where = f"{file}, line {number}"
            try:
                values = json.loads(line)
            except json.JSONDecodeError as error:
                raise DataError(
                    f"{where}: not valid JSON ({error.msg}, character {error.pos + 1}); write one "
                    "JSON object a line, on a single line"
                ) from error
            yield RawRow(where, file.stem, number, values)


def _json_rows(file: Path) -> Iterator[RawRow]:
    try:
        data = json.loads(file.read_text(encoding="utf-8-sig"))
    except json.JSONDecodeError as error:
        raise DataError(
            f"{file}: not valid JSON ({error.msg}, line {error.lineno}); write a list of objects"
        ) from error
    if isinstance(data, dict) and isinstance(data.get("data"), list):
        data = data["data"]
    if not isinstance(data, list):
        raise DataError(
            f"{file}: holds one JSON object, not a list of rows; write a list, or one object a line"
        )
    for number, values in enumerate(data, start=1):
        yield RawRow(f"{file}, row {number}", file.stem, number, values)


def _parquet_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(file) as parquet:
            yield from _batches(parquet.iter_batches(batch_size=_BATCH), str(file), file.stem)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a Parquet file that can be read ({error})") from error


def _csv_rows(file: Path) -> Iterator[RawRow]:
    import pyarrow
    from pyarrow import csv

    try:
        table = csv.read_csv(file)
    except pyarrow.ArrowInvalid as error:
        raise DataError(f"{file}: not a CSV file that can be read ({error})") from error
    yield from _batches(iter(table.to_batches()), str(file), file.stem)


def _arrow_rows(data: Any, path: Path) -> Iterator[RawRow]:
    # As Arrow: pictures and clips stay the bytes and paths they are stored as.
    for start, table in enumerate(data.with_format("arrow").iter(batch_size=_BATCH)):
        for place, values in enumerate(table.to_pylist(), start=start * _BATCH + 1):
            yield RawRow(f"{path}, row {place}", path.name, place, values)


def _batches(batches: Iterator[pyarrow.RecordBatch], name: str, stem: str) -> Iterator[RawRow]:
    number = 0
    for batch in batches:
        for values in batch.to_pylist():
            number += 1
            yield RawRow(f"{name}, row {number}", stem, number, values)

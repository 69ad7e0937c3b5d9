"""From what a row says about its clip to files that are there."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rl.data.rows import Row
from rl.data.video import images_in
from rl.errors import DataError, MissingVideoError

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".avi", ".mov")


class Files:
    """Finds the clips of rows below `root`. Nothing is looked up before a row asks for it."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._names: dict[str, list[Path]] | None = None

    def path(self, name: str) -> Path:
        """Where a file of this name would be."""
        return (self.root / name).absolute()

    def video(
        self, row: Row, column: str, names: Sequence[str], *, search: bool = False
    ) -> tuple[str, tuple[str, ...]]:
        """A clip as (file, ()) or, where the name is a folder of images, as (first, all of them).

        The first of `names` that is there counts. With `search`, a name may lack its suffix and
        its folder; there must be one such file below the root. Raises `MissingVideoError`, and
        `DataError` for a name that several files have.
        """
        for name in names:  # os.path, because Path's own questions raise for too long a name
            path = self.path(name)
            if os.path.isfile(path):
                return str(path), ()
            if os.path.isdir(path) and (images := images_in(str(path))):
                return images[0], images
        if search:
            for name in names:
                for suffix in VIDEO_SUFFIXES:
                    path = self.path(f"{name}{suffix}")
                    if os.path.isfile(path):
                        return str(path), ()
                if found := self._search(row, column, name):
                    images = images_in(str(found)) if found.is_dir() else ()
                    return (images[0], images) if images else (str(found), ())
        tried = self.path(names[0])
        suffixes = f"{', '.join(VIDEO_SUFFIXES[:-1])} or {VIDEO_SUFFIXES[-1]}"
        looked = f", nor one with {suffixes} anywhere below {self.root}" if search else ""
        raise MissingVideoError(
            f"{row.where}: column {column!r} names {names[0]!r}, and there is no file {tried}"
            f"{looked}; paths are relative to the manifest's folder unless a video root is given: "
            "correct the path or the video root"
        )

    def images(self, row: Row, column: str, values: Sequence[Any]) -> tuple[str, ...]:
        """The files of images: those named, and those held in the row itself ({"bytes": ...}, as
        `datasets` writes them into Parquet), which are stored once beside its other caches.

        Raises `MissingVideoError`.
        """
        return tuple(self._image(row, column, value) for value in values)

    def _image(self, row: Row, column: str, value: Any) -> str:
        if isinstance(value, Mapping):
            if value.get("bytes"):
                return _stored(value["bytes"])
            value = value.get("path")
        if not isinstance(value, str) or not value:
            raise row.wrong_type(column, value, "paths of images, or images as `datasets` has them")
        path = self.path(value)
        if not os.path.isfile(path):
            raise MissingVideoError(
                f"{row.where}: column {column!r} names {value!r}, and there is no file {path}; "
                "correct the path or the video root"
            )
        return str(path)

    def _search(self, row: Row, column: str, name: str) -> Path | None:
        if self._names is None:
            self._names = {}
            for folder, folders, files in os.walk(self.root):
                clips = [f for f in files if f.lower().endswith(VIDEO_SUFFIXES)]
                for entry in (*folders, *clips):
                    path = Path(folder, entry)
                    keys = {entry, path.stem} if entry in clips else {entry}
                    for key in keys:
                        self._names.setdefault(key, []).append(path)
        found = self._names.get(Path(name).name, [])
        found = [f for f in found if not f.is_dir() or images_in(str(f))]
        if len(found) > 1:
            raise DataError(
                f"{row.where}: column {column!r} names {name!r}, and below {self.root} several "
                f"clips are called so: {found[0]}, {found[1]}; give a video root that holds one"
            )
        return found[0].absolute() if found else None


def _stored(content: bytes) -> str:
    from datasets.config import HF_DATASETS_CACHE

    folder = Path(HF_DATASETS_CACHE, "foresight_images")
    file = folder / hashlib.sha256(content).hexdigest()
    if not file.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        part = file.with_suffix(f".{os.getpid()}")
        part.write_bytes(content)
        part.replace(file)  # whole or not there, whoever else writes the same
    return str(file)

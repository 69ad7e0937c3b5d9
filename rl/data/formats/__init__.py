"""Data sets as their authors publish them, read into `rl.trajectory.Sample`.

    read_samples("futurebench.json", video_root="first_part_video").samples

A new one is a `Format`: the columns by which its rows are known, and a function from a `Row` to
`Draft`s. What all share stands elsewhere: options and answers in `rl.data.answers`, finding clips
in `files`, ids in `reading`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rl.data.formats.reading import SampleSet, SkippedRow, read_samples
    from rl.data.formats.recognise import FORMATS

__all__ = ["FORMATS", "SampleSet", "SkippedRow", "read_samples"]

# Resolved on first use: `rl.data.manifest` is a format as well, and needs this package's parts.
_HOMES = {
    **dict.fromkeys(("SampleSet", "SkippedRow", "read_samples"), "reading"),
    "FORMATS": "recognise",
}


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"{__name__}.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")

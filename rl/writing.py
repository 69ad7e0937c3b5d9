"""Files that are written whole or not at all: a reader finds the old one or the new one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a draft beside `path`, then put it in its place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(path.name + ".part")
    write(draft)
    draft.replace(path)


def write_text(path: Path, text: str) -> None:
    """Write `text` in UTF-8."""
    write_whole(path, lambda draft: draft.write_text(text, encoding="utf-8"))


def write_json(path: Path, value: Any) -> None:
    """Write `value` as JSON for people: indented, keys sorted."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True) + "\n")

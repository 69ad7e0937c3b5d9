"""What the probes of a selection gave, row by row, on disk: what a resumed run goes on from.

One JSON object a line, in the order in which rows were probed:

    {"id": "a", "fingerprint": "0f…", "text": {"right": 1, "judged": 8, "invalid": 0, "cut_short": 0}, "hinted": {…}}
    {"id": "b", "fingerprint": "9c…", "skipped": "sample 'b': b.mp4: the file is empty …"}
"""  # noqa: E501

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from recipes.selection.rules import Probe, Probed
from rl.errors import CheckpointError, RecipeError


class ProbeLog:
    """The file at `path`. Opening it touches no disk."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def read(self) -> dict[str, tuple[str, Probed]]:
        """Fingerprint and result of each row so far, by id.

        A last line that was not written to its end is cut off the file. Raises `CheckpointError`
        for any other line that is none of ours.
        """
        if not self.path.is_file():
            return {}
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        if whole != content:
            os.truncate(self.path, len(whole))
        found: dict[str, tuple[str, Probed]] = {}
        for number, line in enumerate(whole.splitlines(), start=1):
            try:
                values = json.loads(line)
                found[values["id"]] = values["fingerprint"], _probed(values)
            except (ValueError, KeyError, TypeError) as error:
                raise CheckpointError(
                    f"{self.path}, line {number}: damaged ({type(error).__name__}: {error}); "
                    "remove the line to have its row probed again"
                ) from error
        return found

    def add(self, rows: Iterable[tuple[str, str, Probed]]) -> None:
        """Append ids, fingerprints and results, and wait until they are on disk."""
        lines = [json.dumps(_values(*row), ensure_ascii=False) + "\n" for row in rows]
        with self.path.open("a", encoding="utf-8") as file:
            file.writelines(lines)
            file.flush()
            os.fsync(file.fileno())


def check_fingerprints(
    found: Mapping[str, tuple[str, Probed]], wanted: Mapping[str, str], path: Path
) -> None:
    """Refuse to go on from what was probed of rows that have changed since. Raises
    `RecipeError`.
    """
    changed = [id for id, now in wanted.items() if id in found and found[id][0] != now]
    if changed:
        raise RecipeError(
            f"{path} holds probes of {len(changed)} rows that have changed since, such as "
            f"{changed[0]!r}: their text, answer or frames, or the probe template, is another one. "
            "Undo the change, or give another `output`"
        )


def _values(id: str, fingerprint: str, probed: Probed) -> dict[str, Any]:
    row: dict[str, Any] = {"id": id, "fingerprint": fingerprint}
    if probed.text is None or probed.hinted is None:
        return row | {"skipped": probed.skipped}
    return row | {"text": asdict(probed.text), "hinted": asdict(probed.hinted)}


def _probed(values: Mapping[str, Any]) -> Probed:
    if "skipped" in values:
        return Probed(skipped=str(values["skipped"]))
    return Probed(Probe(**values["text"]), Probe(**values["hinted"]))

"""What a run keeps on disk, and what that says about resuming it.

recipe.yaml         the recipe with all its defaults
rows.json           which rows were trained on last: their number, and a digest of their ids
start/              the policy the run started from, if it had to be made
checkpoints/        checkpoint-<step>/, whole once they hold their state file
metrics.jsonl       one line a log
trajectories/       what was sampled, and every reward of it, a file a step
faults.jsonl        what went wrong with rewards, if anything did
skipped.jsonl       rows without a video that can be read, if there were any
policy/             the trained policy
result.json         written last: the run is finished
"""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from recipes.loading import dump_recipe
from recipes.schema import RecipeBase
from rl.checkpoints import last_complete, read_state
from rl.errors import RecipeError
from rl.export import CHECKPOINTS, POLICY, START
from rl.writing import write_json, write_text


@dataclass(frozen=True)
class Resumption:
    """Where a run goes on: a whole checkpoint and its step (None and 0 for a fresh run)."""

    checkpoint: Path | None
    step: int
    incomplete: tuple[str, ...]  # checkpoints that were not written to their end


class RunFolder:
    """The folder of one run. Creating it touches no disk."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.recipe = root / "recipe.yaml"
        self.start = root / START
        self.checkpoints = root / CHECKPOINTS
        self.metrics = root / "metrics.jsonl"
        self.trajectories = root / "trajectories"
        self.faults = root / "faults.jsonl"
        self.skipped = root / "skipped.jsonl"
        self.policy = root / POLICY
        self._result = root / "result.json"
        self._rows = root / "rows.json"

    def claim(self, recipe: RecipeBase) -> None:
        """Store the recipe; refuse a folder in which another one has run."""
        if self.recipe.is_file():
            stored = yaml.safe_load(self.recipe.read_text(encoding="utf-8"))
            changed = [k for k in differing_keys(stored, recipe) if not _harmless(k, recipe)]
            if changed:
                raise RecipeError(
                    f"{self.root} holds a run of another recipe, which differs in "
                    f"{', '.join(changed[:8])}; to start anew give another `output` or delete the "
                    "folder, to resume undo the change"
                )
        elif self.checkpoints.exists():
            raise RecipeError(
                f"{self.root} holds checkpoints but no recipe.yaml that says what they are of; "
                "give another `output`"
            )
        write_text(self.recipe, dump_recipe(recipe))

    def resumption(self) -> Resumption:
        """The last whole checkpoint. Metrics logged after it are dropped: their steps come
        again.
        """
        newest = last_complete(self.checkpoints)
        whole = {newest} if newest else set()
        found = sorted(self.checkpoints.glob("checkpoint-*"))
        step = int(read_state(newest)["step"]) if newest else 0
        later = (p for p in found if p not in whole and int(p.name.rsplit("-", 1)[1]) > step)
        if self.metrics.is_file():
            kept = [
                line
                for line in self.metrics.read_text().splitlines()
                if _step(line) in range(step + 1)
            ]
            # A fresh start logs step 0 itself.
            kept = kept if newest else []
            write_text(self.metrics, "".join(line + "\n" for line in kept))
        return Resumption(newest, step, tuple(p.name for p in later))

    def claim_rows(self, ids: Sequence[str], *, resumes: bool) -> str | None:
        """Store which rows the run trains on from here; for one that `resumes` returns what is to
        be said if they are others than before: files that came or went may change them, and with
        them the order of all rows.
        """
        digest = hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:16]
        now = {"train": len(ids), "digest": digest}
        before = json.loads(self._rows.read_text()) if resumes and self._rows.is_file() else now
        write_json(self._rows, now)
        if before == now:
            return None
        return (
            f"the rows to train on have changed since this run was interrupted: {now['train']} "
            f"now, {before['train']} then. Their order is another from here on, so some may come "
            "again early and others late; put rows and video files back to go on as before, or "
            "give another `output` to start anew"
        )

    def set_aside(self, checkpoint: str) -> None:
        """Rename an incomplete checkpoint, so that the limit on checkpoints does not count it."""
        aside = self.checkpoints / f"incomplete-{checkpoint}"
        shutil.rmtree(aside, ignore_errors=True)
        (self.checkpoints / checkpoint).rename(aside)

    def log(self, step: int, values: dict[str, Any]) -> None:
        """Append one line to the metrics."""
        with self.metrics.open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def finish(self, result: dict[str, Any]) -> None:
        """Write the result: from here on the run is finished."""
        write_json(self._result, result)

    def result(self) -> dict[str, Any] | None:
        """What `finish` wrote, or None."""
        return json.loads(self._result.read_text()) if self._result.is_file() else None


def differing_keys(stored: Any, recipe: RecipeBase) -> list[str]:
    """Dotted keys in which the stored values of a recipe differ from `recipe`."""
    return sorted(_differences(stored, yaml.safe_load(dump_recipe(recipe)), ""))


def _differences(a: Any, b: Any, prefix: str) -> Iterator[str]:
    if isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        a, b = dict(enumerate(a)), dict(enumerate(b))
    if isinstance(a, dict) and isinstance(b, dict) and (a and b):
        for key in a.keys() | b.keys():
            yield from _differences(a.get(key), b.get(key), f"{prefix}{key}.")
    elif a != b:
        yield prefix.rstrip(".")


def _harmless(key: str, recipe: RecipeBase) -> bool:
    return any(fnmatch(key, pattern) or fnmatch(key, f"{pattern}.*") for pattern in recipe.HARMLESS)


def _step(line: str) -> int:
    """The step of a line of metrics; -1 for one that a killed run left half written."""
    try:
        return int(json.loads(line)["step"])
    except json.JSONDecodeError:
        return -1

"""Recipes on the tiny checkpoint and clips of `tests.conftest`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import yaml

# A whole LA-DAPO run of seconds: every group is trained on, whatever its outcome.
LA_DAPO: dict[str, Any] = {
    "stage": "la_dapo",
    "output": "run",
    "policy": {"path": "", "noise_scale": 0.1, "max_length": 2},
    "data": {"train": ""},
    "train": {
        "max_steps": 2,
        "prompts_per_step": 2,
        "group_size": 2,
        "max_completion_length": 6,
        "max_refills": 0,
        "save_every": 1,
        "gradient_checkpointing": False,
    },
}


def write_recipe(
    folder: Path, model: Path, manifest: Path, changes: dict[str, Any] | None = None
) -> Path:
    """`LA_DAPO` with dotted `changes` (None deletes a key) as ``folder/recipe.yaml``."""
    values = copy.deepcopy(LA_DAPO)
    values["policy"]["path"], values["data"]["train"] = str(model), str(manifest)
    for key, value in copy.deepcopy(changes or {}).items():
        *parents, last = key.split(".")
        here = values
        for parent in parents:
            here = here.setdefault(parent, {})
        if value is None:
            del here[last]
        else:
            here[last] = value
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(values))
    return path

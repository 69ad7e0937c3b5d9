"""Checkpoints that are known to be whole.

transformers writes a checkpoint file by file, so a killed run leaves a folder that looks like one.
Ours gets a state file once everything else is written; a folder without it is not resumed from.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from rl.errors import CheckpointError
from rl.writing import write_json

STATE_FILE = "foresight_state.json"


class CompleteCheckpoints(TrainerCallback):
    """Writes the state file of each checkpoint, last; `state` gives what else a resumed run needs
    to know.
    """

    def __init__(self, state: Callable[[], dict[str, Any]] = dict) -> None:
        self._state = state

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.is_world_process_zero and args.output_dir is not None:
            folder = Path(args.output_dir) / f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}"
            write_json(folder / STATE_FILE, {"step": state.global_step, **self._state()})


def last_complete(folder: str | Path) -> Path | None:
    """The newest whole checkpoint in `folder`, or None."""
    whole = [p.parent for p in Path(folder).glob(f"{PREFIX_CHECKPOINT_DIR}-*/{STATE_FILE}")]
    return max(whole, key=lambda p: int(p.name.rsplit("-", 1)[1]), default=None)


def read_state(checkpoint: str | Path) -> dict[str, Any]:
    """The state file of a checkpoint."""
    path = Path(checkpoint) / STATE_FILE
    try:
        return json.loads(path.read_text())
    except FileNotFoundError:
        raise CheckpointError(
            f"{checkpoint} is no whole checkpoint: it has no {STATE_FILE}. Resume from another one"
        ) from None

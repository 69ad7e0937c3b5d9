"""The arrays of a step's trajectories in one safetensors file (see `rl.records`)."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from rl.errors import DataError, TrajectoryError
from rl.record_rows import Row
from rl.trajectory import MediaKey, Sampling, Trajectory

# The arrays of a trajectory, and the offsets each is cut by.
ARRAYS = {
    "prompt_ids": "prompt_offsets",
    "completion_ids": "completion_offsets",
    "decision": "completion_offsets",
    "logprobs": "completion_offsets",
    "kept": "completion_offsets",
    "latents": "latent_offsets",
    "latent_logprobs": "latent_offsets",
}
# And of those sampled with visual replay.
OPTIONAL = {"replayed": "latent_offsets"}


def pack(trajectories: Sequence[Trajectory]) -> dict[str, torch.Tensor]:
    """The arrays of N trajectories, each kind end to end, and the offsets [N + 1] they begin at."""
    kinds = {(t.latents.dtype, t.latents.shape[1]) for t in trajectories}
    if len(kinds) != 1:
        raise TrajectoryError(
            f"latents of dtype and width {sorted(map(str, kinds))} cannot be recorded together; "
            "the trajectories of a step come from one policy"
        )
    tensors = {}
    there = {n: o for n, o in OPTIONAL.items() if getattr(trajectories[0], n) is not None}
    if any((getattr(t, n) is None) == (n in there) for n in OPTIONAL for t in trajectories):
        raise TrajectoryError(
            "trajectories with and without visual replay cannot be recorded together; those of a "
            "step come from one policy"
        )
    for name, offsets in {**ARRAYS, **there}.items():
        parts = [getattr(t, name) for t in trajectories]
        ends = list(accumulate((len(part) for part in parts), initial=0))
        tensors[offsets] = torch.tensor(ends)
        tensors[name] = (
            torch.cat(parts) if name == "latents" else torch.from_numpy(np.concatenate(parts))
        )
    return tensors


class Arrays:
    """The arrays files beside one file of lines; each is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._read: dict[str, dict[str, torch.Tensor]] = {}

    def trajectory(self, row: Row, where: str) -> Trajectory:
        """The trajectory of a row that names its arrays, exactly as it was.

        Raises `DataError`, which starts with `where` or the file.
        """
        file, place = self._folder / row["arrays"]["file"], row["arrays"]["row"]
        if file.name not in self._read:
            self._read[file.name] = _load(file)
        try:
            own = _slice(self._read[file.name], place)
            if len(own["completion_ids"]) != row["tokens"]:
                raise TrajectoryError(
                    f"it has {len(own['completion_ids'])} tokens, the line says {row['tokens']}"
                )
            return Trajectory(
                sample_id=row["id"],
                latents=own.pop("latents"),
                **{name: tensor.numpy() for name, tensor in own.items()},
                span_lengths=tuple(row["span_lengths"]),
                filler=row["filler"],
                media=tuple(
                    MediaKey(
                        key["path"],
                        tuple(key["frames"]),
                        key["processor"],
                        tuple(key["files"]),
                        key["content"],
                    )
                    for key in row["media"]
                ),
                policy_version=row["policy_version"],
                finish_reason=row["finish_reason"],
                sampling=Sampling(**row["sampling"]),
                seed=row["seed"],
                text=row["text"],
            )
        except (TrajectoryError, IndexError, TypeError) as error:
            raise DataError(
                f"{where}: row {place} of {file.name} is not this line's ({error}); copy both "
                "files of a record together, from the same run"
            ) from error


def _slice(tensors: dict[str, torch.Tensor], place: int) -> dict[str, torch.Tensor]:
    rows = len(tensors["prompt_offsets"]) - 1
    if place >= rows:
        raise IndexError(f"the file has {rows} rows")
    # Copies: a slice would keep the arrays of the whole step alive, and be pickled with them.
    return {
        name: tensors[name][slice(*tensors[offsets][place : place + 2].tolist())].clone()
        for name, offsets in (ARRAYS | OPTIONAL).items()
        if name in tensors
    }


def _load(file: Path) -> dict[str, torch.Tensor]:
    try:
        tensors = load_file(file)
    except FileNotFoundError as error:
        raise DataError(
            f"{file}: the arrays of this record are missing; copy the file beside the lines, or "
            "take the key 'arrays' out of them"
        ) from error
    except (OSError, SafetensorError) as error:
        raise DataError(
            f"{file}: damaged, or no file of arrays ({error}); copy it again"
        ) from error
    if "kept" not in tensors and "completion_ids" in tensors:
        # Version 1: nothing was truncated. Where something was, the trajectory refuses zeros.
        tensors["kept"] = torch.zeros_like(tensors["completion_ids"], dtype=torch.int32)
    if missing := sorted({*ARRAYS, *ARRAYS.values()} - tensors.keys()):
        raise DataError(f"{file}: has no {', '.join(missing)}, so it is no record's; copy it again")
    return tensors

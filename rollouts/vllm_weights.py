"""Weight updates on their way into a vLLM engine: files that its workers read."""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from rl.interfaces import WeightUpdate
from rl.policy.loading import model_class, policy_class, read_config

_SHARED_MEMORY = Path("/dev/shm")


def parameter_shapes(folder: str | Path) -> tuple[dict[str, tuple[int, ...]], frozenset[str]]:
    """Shapes of all entries of a policy's state dict by name, and the names of those that are
    another one under a second name (tied embeddings). Loads no weights.
    """
    config = read_config(folder)
    with torch.device("meta"):
        policy: Any = policy_class(model_class(config, folder))(config)
    policy.tie_weights()
    tied = frozenset(getattr(policy, "all_tied_weights_keys", None) or ())
    return {name: tuple(value.shape) for name, value in policy.state_dict().items()}, tied


class WeightFiles:
    """Keeps the newest value of every parameter that was ever updated, as safetensors.

    They lie in shared memory where it has room. `shapes` and `tied` come from `parameter_shapes`.
    """

    def __init__(self, shapes: dict[str, tuple[int, ...]], tied: frozenset[str]) -> None:
        self._needed = shapes.keys() - tied
        self._tied = tied
        self._where: dict[str, Path] = {}
        self._folders: dict[Path, tempfile.TemporaryDirectory[str]] = {}

    def add(self, update: WeightUpdate) -> tuple[list[tuple[str, list[str]]], bool]:
        """Write an update. Returns the files with the names to load of each, and whether other
        parameters are still those the engine was started with.
        """
        state = {n: v.contiguous() for n, v in update.state.items() if n not in self._tied}
        folder = tempfile.TemporaryDirectory(prefix="foresight-weights-", dir=_roomy(state))
        path = Path(folder.name, "weights.safetensors")
        save_file(state, path)
        self._folders[path] = folder
        self._where |= dict.fromkeys(state, path)
        files: dict[Path, list[str]] = {}
        for name, where in self._where.items():
            files.setdefault(where, []).append(name)
        for old in self._folders.keys() - files.keys():
            self._folders.pop(old).cleanup()
        return [(str(p), names) for p, names in files.items()], self._needed > self._where.keys()

    def drop_whole(self) -> None:
        """Delete all files."""
        self._where.clear()
        for folder in self._folders.values():
            folder.cleanup()
        self._folders.clear()


def _roomy(state: dict[str, torch.Tensor]) -> Path | None:
    """Shared memory if twice the size of `state` is free there, else None, the place for
    temporary files.
    """
    size = sum(value.nbytes for value in state.values())
    if _SHARED_MEMORY.is_dir() and shutil.disk_usage(_SHARED_MEMORY).free > 2 * size:
        return _SHARED_MEMORY
    return None

"""Foresight, the learning side: the latent policy, trajectories, the objective and the trainers."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from rl.torchvision_shim import install as _install_torchvision_shim

# Here, because every module of Foresight that imports transformers imports a part of `rl` first, in
# Ray workers too, and the shim must run before that. It costs the import of torch, which `rl` needs
# anyway.
_install_torchvision_shim()

# Public names and where they live. Resolved on first use, so that `import rl` stays light.
_EXPORTS = {
    "LADAPOConfig": "rl.la_dapo",
    "LADAPOTrainer": "rl.la_dapo",
    "LatentProtocol": "rl.policy.protocol",
    "HeadConfig": "rl.policy.heads",
    "Sample": "rl.trajectory",
    "Sampling": "rl.trajectory",
    "Trajectory": "rl.trajectory",
    "TrajectoryGroup": "rl.trajectory",
    "load_policy": "rl.policy.model",
    "make_policy": "rl.policy.model",
    "read_manifest": "rl.data.manifest",
}
__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    if name not in _EXPORTS:
        raise AttributeError(f"module 'rl' has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)

"""Foresight, the learning side: the latent policy, trajectories, the objective and the trainers."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from rl.torchvision_shim import install as _install_torchvision_shim

if TYPE_CHECKING:
    from rl.data.manifest import read_manifest
    from rl.la_dapo import LADAPOTrainer
    from rl.la_dapo_config import LADAPOConfig
    from rl.policy.heads import HeadConfig
    from rl.policy.loading import load_policy, make_policy
    from rl.policy.protocol import LatentProtocol
    from rl.trajectory import Sample, Sampling, Trajectory, TrajectoryGroup

__all__ = [
    "HeadConfig",
    "LADAPOConfig",
    "LADAPOTrainer",
    "LatentProtocol",
    "Sample",
    "Sampling",
    "Trajectory",
    "TrajectoryGroup",
    "load_policy",
    "make_policy",
    "read_manifest",
]

# Here, because every module of Foresight that imports transformers imports a part of `rl` first, in
# Ray workers too, and the shim must run before that. It costs the import of torch, which `rl` needs
# anyway.
_install_torchvision_shim()

# Where the public names live. Resolved on first use, so that `import rl` stays light.
_HOMES = {
    "rl.data.manifest": ("read_manifest",),
    "rl.la_dapo": ("LADAPOTrainer",),
    "rl.la_dapo_config": ("LADAPOConfig",),
    "rl.policy.heads": ("HeadConfig",),
    "rl.policy.loading": ("load_policy", "make_policy"),
    "rl.policy.protocol": ("LatentProtocol",),
    "rl.trajectory": ("Sample", "Sampling", "Trajectory", "TrajectoryGroup"),
}


def __getattr__(name: str) -> Any:
    for module, names in _HOMES.items():
        if name in names:
            return getattr(import_module(module), name)
    raise AttributeError(f"module 'rl' has no attribute {name!r}")

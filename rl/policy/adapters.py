"""What LoRA adapters and the like leave of a latent policy."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from rl.policy.modules import WEIGHTS

if TYPE_CHECKING:
    from peft import PeftConfig


def with_whole_modules(adapters: PeftConfig, policy: Any) -> PeftConfig:
    """A copy of the config of adapters for `policy`, by which its latent head, if it has weights,
    and its latent modules are trained and saved whole.
    """
    changed: Any = copy.deepcopy(adapters)
    whole = {WEIGHTS[name] for name in policy.modules_config.names}
    if any(True for _ in policy.latent_head.parameters()):
        whole.add("latent_head")
    if whole:
        changed.modules_to_save = sorted({*(changed.modules_to_save or ()), *whole})
    return changed

"""What LoRA adapters and the like leave of a latent policy."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from peft import PeftConfig


def with_whole_head(adapters: PeftConfig, policy: Any) -> PeftConfig:
    """A copy of the config of adapters for `policy`, by which its latent head, if it has weights,
    is trained and saved whole.
    """
    changed: Any = copy.deepcopy(adapters)
    if any(True for _ in policy.latent_head.parameters()):
        changed.modules_to_save = sorted({*(changed.modules_to_save or ()), "latent_head"})
    return changed

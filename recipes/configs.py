"""From a recipe to the config of its trainer."""

from __future__ import annotations

from typing import Any

import torch

from recipes.loading import Recipe
from recipes.schema import LADAPORecipe, LoraSection, RecipeBase
from rl.errors import ForesightError, RecipeError
from rl.export import CHECKPOINTS
from rl.policy.adapters import with_whole_modules


def config_class(recipe: Recipe) -> type[Any]:
    """The dataclass that configures the trainer of the recipe's stage."""
    if isinstance(recipe, LADAPORecipe):
        from rl.la_dapo_config import LADAPOConfig

        return LADAPOConfig
    from rl.sft.trainer import LatentSFTConfig

    return LatentSFTConfig


def uses_gpu(recipe: RecipeBase) -> bool:
    """Whether the run computes on GPUs."""
    return recipe.device == "auto" and torch.cuda.is_available()


def trainer_config(recipe: Recipe) -> Any:
    """The trainer's config: the recipe's settings, `train.extra`, and what follows from the
    machine.
    """
    on_gpu = uses_gpu(recipe)
    arguments: dict[str, Any] = {
        "output_dir": str(recipe.output / CHECKPOINTS),
        "seed": recipe.seed,
        "use_cpu": not on_gpu,
        "bf16": on_gpu,
        "save_strategy": "steps",
        "report_to": "none",
        **recipe.train.arguments(),
        **recipe.train.extra,
    }
    if not isinstance(recipe, LADAPORecipe):  # in RL the pool keeps the clips
        arguments["media_cache_gb"] = recipe.data.media_cache_gb
    try:
        return config_class(recipe)(**arguments)
    except ForesightError:
        raise
    except (ValueError, TypeError) as error:
        raise RecipeError(
            f"train: the trainer refuses these settings ({' '.join(str(error).split())}); correct "
            "`train` or `train.extra`"
        ) from error


def lora_config(section: LoraSection | None) -> Any:
    """PEFT's config, or None."""
    if section is None:
        return None
    from peft import LoraConfig

    settings: dict[str, Any] = {"r": section.r, "lora_alpha": section.alpha}
    return LoraConfig(**settings, target_modules=section.target_modules)


def with_adapters(policy: Any, section: LoraSection | None) -> Any:
    """The policy with LoRA adapters on it (its latent head is trained whole), or itself without a
    section.
    """
    if section is None:
        return policy
    from peft import get_peft_model

    return get_peft_model(policy, with_whole_modules(lora_config(section), policy))

"""Which latent modules a recipe's policy will have, and what does not go with them."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from recipes.schema import LADAPORecipe, PolicySection, RecipeBase, SFTRecipe
from rl.errors import PolicyError, RecipeError
from rl.policy.modules import ModulesConfig


def wanted_modules(section: PolicySection) -> ModulesConfig:
    """The modules that a recipe asks for."""
    asked = {name: getattr(section, name) for name in ("injection", "depth", "visual_replay")}
    return ModulesConfig.from_dict(
        {name: part.model_dump() for name, part in asked.items() if part is not None}
    )


def check_modules(recipe: RecipeBase, modules: ModulesConfig, config: PretrainedConfig) -> None:
    """Whether a model of this `config` can have the `modules`, and the recipe's stage can work with
    them. Raises `PolicyError` and `RecipeError`, which give the reason.
    """
    text: Any = config.get_text_config()
    kinds = list(getattr(text, "layer_types", None) or ["full_attention"])
    kinds = (kinds * text.num_hidden_layers)[: text.num_hidden_layers]
    if modules.injection is not None:
        modules.injection.check(text.hidden_size)
    if modules.depth is not None:
        modules.depth.chosen(kinds)
    if modules.visual_replay is not None and "linear_attention" in kinds:
        raise PolicyError(
            f"policy.visual_replay: a {config.model_type} model has recurrent layers, which read "
            "tokens in the order they come, so a video token cannot be shown again at its place; "
            "leave the key out, or choose Qwen3-VL or Qwen2.5-VL"
        )
    if isinstance(recipe, SFTRecipe):
        _check_sft(recipe, modules)
    elif _is_published(modules):
        raise RecipeError(_cannot_sample("this stage samples"))
    la_dapo = isinstance(recipe, LADAPORecipe)
    if la_dapo and recipe.train.objective == "published" and modules.names:
        raise RecipeError(
            "train.objective is published, whose release knows none of the policy's modules "
            f"({', '.join(modules.names)}); write exact, or start from a policy without them"
        )


def _check_sft(recipe: SFTRecipe, modules: ModulesConfig) -> None:
    train = recipe.train
    if modules.visual_replay is not None and train.latents != "self_forcing":
        raise RecipeError(
            f"train.latents is {train.latents}, but with policy.visual_replay what is shown again "
            "before a latent depends on the latents before it, which must be made one after the "
            "other; write self_forcing"
        )
    if _is_published(modules):
        if train.latents == "self_forcing":
            raise RecipeError(_cannot_sample("self-forcing makes latents one after the other"))
        if train.validate_every is not None:
            raise RecipeError(_cannot_sample("train.validate_every asks for answers"))
        if recipe.evaluation is not None:
            raise RecipeError(_cannot_sample("evaluation asks for answers"))


def _is_published(modules: ModulesConfig) -> bool:
    return modules.depth is not None and modules.depth.router == "published"


def _cannot_sample(why: str) -> str:
    return (
        "policy.depth.router is published, which chooses among all tokens of a sequence, those to "
        f"come included, so it cannot generate; but {why}. Write policy.depth.router: token, or "
        "leave that out"
    )

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


def check_modules(
    recipe: RecipeBase, had: ModulesConfig, modules: ModulesConfig, config: PretrainedConfig
) -> None:
    """Whether a model of this `config`, which `had` some modules, can have the `modules`, and the
    recipe's stage can work with them. Raises `PolicyError` and `RecipeError`, which give the
    reason.
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
    new = [name for name in modules.names if name not in had.names]
    if new and not isinstance(recipe, SFTRecipe | LADAPORecipe):
        raise RecipeError(
            f"policy.{new[0]}: {recipe.policy.path} has none, and this stage does not train, so it "
            "would be measured untrained; leave the key out, or name a policy that has it"
        )
    if isinstance(recipe, SFTRecipe):
        _check_sft(recipe, modules)
    elif _is_published(modules):
        raise RecipeError(_cannot_sample(f"stage {recipe.stage} samples"))
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
        if train.latents != "teacher":
            raise RecipeError(
                f"policy.depth.router is published, and train.latents {train.latents}: the "
                "policy's own latents would be made with a look at the answer behind them, as this "
                "router chooses among all tokens of a sequence. Write policy.depth.router: token, "
                "or train.latents: teacher"
            )
        if train.validate_every is not None:
            raise RecipeError(
                _cannot_sample("train.validate_every asks for answers", ", or leave that out")
            )
        if recipe.evaluation is not None:
            raise RecipeError(_cannot_sample("evaluation asks for answers", ", or leave that out"))


def _is_published(modules: ModulesConfig) -> bool:
    return modules.depth is not None and modules.depth.router == "published"


def _cannot_sample(why: str, otherwise: str = "") -> str:
    return (
        "policy.depth.router is published, which chooses among all tokens of a sequence, those to "
        f"come included, so it cannot generate; but {why}. Write policy.depth.router: "
        f"token{otherwise}"
    )


def inert_keys(recipe: RecipeBase, modules: ModulesConfig) -> list[str]:
    """Warnings about keys that the recipe writes and that change nothing."""
    if not isinstance(recipe, SFTRecipe):
        return []
    train = recipe.train
    forced, question = train.latents == "self_forcing", train.align_to == "question"
    token = modules.depth is not None and modules.depth.router == "token"
    reasons = {
        "align_weight": None if forced else "train.latents is not self_forcing",
        "diversity_weight": None if forced else "train.latents is not self_forcing",
        "align_to": None
        if forced and (train.align_weight or not question)
        else "there is no alignment (train.latents, train.align_weight)",
        "replay_weight": None if modules.visual_replay else "there is no policy.visual_replay",
        "depth_weight": None if token else "there is no policy.depth whose router is token",
        "latent_weight": "latents have no targets"
        if train.start_latents is not None or train.curriculum is not None
        else None,
    }
    written = train.model_fields_set
    warnings = [
        f"train.{key} changes nothing here: {reason}"
        for key, reason in reasons.items()
        if reason is not None and key in written
    ]
    if (plan := train.curriculum) is not None:
        if (begins := plan.max_stage * plan.steps_per_stage) >= train.max_steps:
            warnings.append(
                f"train.curriculum: stage {plan.max_stage} would begin at update {begins}, and "
                f"train.max_steps is {train.max_steps}"
            )
        if plan.merge_steps is not None and plan.merge_steps < plan.max_stage:
            warnings.append(
                f"train.curriculum: chains have at most {plan.merge_steps} steps (merge_steps), so "
                f"stages behind {plan.merge_steps} are all alike"
            )
    return warnings

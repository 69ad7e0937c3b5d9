"""How much memory a recipe's updates will take: `foresight check --memory`."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from recipes.check import Plan, first_clip, media_processor
from recipes.configs import lora_config, trainer_config
from recipes.loading import Recipe
from recipes.schema import LADAPORecipe, SFTRecipe
from rl.data.media import MediaProcessor
from rl.errors import RecipeError
from rl.memory import MemoryEstimate, MemorySetting, estimate_memory
from rl.sft.curriculum import steps_of
from rl.sft.lessons import longest_spans
from rl.sft.taught import taught_texts
from rl.trajectory import Sample


@dataclass(frozen=True)
class RecipeMemory:
    """An estimate, and what it is for."""

    setting: MemorySetting
    estimate: MemoryEstimate
    prompt: int  # tokens
    sample: str  # whose prompt it is

    def __str__(self) -> str:
        s = self.setting
        kind = str(s.autocast or s.dtype).removeprefix("torch.")
        rows = f"{s.groups} x {s.group_size}" if s.group_size > 1 else f"{s.groups}"
        return (
            f"an update takes about {self.estimate}, computed in {kind}, {rows} completions of "
            f"{s.completion_tokens} tokens at a time to prompts like that of row {self.sample!r} "
            f"({self.prompt} tokens). Sampling comes on top"
        )


def recipe_memory(recipe: Recipe, plan: Plan) -> RecipeMemory:
    """Peak memory of an update of `recipe`, whose `plan` is that of `check_recipe`.

    The prompt is that of the first row that can be shown, and completions are as long as they may
    become. With ``device: auto`` it is the memory of a GPU, where runs compute in bfloat16. Raises
    `RecipeError` for self-forcing, whose latents are made one after the other.
    """
    if isinstance(recipe, SFTRecipe) and recipe.train.latents == "self_forcing":
        raise RecipeError(
            "the memory of train.latents: self_forcing cannot be estimated yet; docs/costs.md says "
            "what it grows with. For a run without gradients through latents, ask with --set "
            "train.latents=own --set train.bptt_steps=null --set policy.visual_replay=null"
        )
    media = media_processor(recipe.data, plan.processor)
    sample, clip = first_clip(media, plan.train, recipe.data.bad_videos)
    prompt = media.encode(sample, [clip])
    video = int((prompt.mm_token_type_ids == 2).sum())
    frames, rows, columns = clip.inputs["video_grid_thw"][0].tolist()
    common = {
        "model": recipe.policy.path,
        "grid": (frames, rows, columns),
        "text_tokens": len(prompt.input_ids) - video,
        "dtype": getattr(torch, recipe.policy.dtype),
        "autocast": torch.bfloat16 if recipe.device == "auto" else None,
        "gradient_checkpointing": recipe.train.gradient_checkpointing,
        "peft_config": lora_config(recipe.train.lora),
        "head": plan.head,
        "modules": plan.modules,
    }
    if isinstance(recipe, LADAPORecipe):
        setting = _la_dapo(recipe, plan, len(prompt.input_ids), common)
    else:
        setting = _sft(recipe, plan, media, common)
    return RecipeMemory(setting, estimate_memory(setting), len(prompt.input_ids), sample.id)


def _la_dapo(
    recipe: LADAPORecipe, plan: Plan, prompt: int, common: dict[str, object]
) -> MemorySetting:
    train, budget = recipe.train, recipe.train.max_tokens_per_microbatch
    completion = train.max_completion_length
    if budget is None:
        rows = train.rows_per_pass
        groups, size = max(1, rows // train.group_size), min(rows, train.group_size)
    else:
        groups = min(train.prompts_per_step, budget // (prompt + train.group_size * completion))
        fitting = max(1, (budget - prompt) // completion)
        groups, size = max(1, groups), train.group_size if groups else fitting
    return MemorySetting(
        **common,  # type: ignore[arg-type]
        group_size=size,
        groups=groups,
        completion_tokens=completion,
        latents=min(plan.protocol.max_length * plan.protocol.max_spans, completion - 2),
        micro_batches=-(-train.rows_per_step // (groups * size)),
        train_vision=not train.freeze_vision,
        reference=train.beta > 0.0 or train.latent_beta > 0.0,
    )


def _sft(
    recipe: SFTRecipe, plan: Plan, media: MediaProcessor, common: dict[str, object]
) -> MemorySetting:
    train = recipe.train

    spans = longest_spans(
        plan.train,
        trainer_config(recipe),
        plan.protocol,
        temporal_patch_size=media.temporal_patch_size,
    )

    def text(sample: Sample) -> int:
        if train.curriculum is not None:  # at its first stage, where the chain is whole
            sample = replace(sample, reasoning=("\n".join(steps_of(sample)),), imagine=())
        texts = taught_texts(
            sample,
            0 if train.start_latents else len(sample.imagine),
            answer_template=train.answer_template,
            reasoning_template=train.reasoning_template,
            tokenizer=media.tokenizer,
        )
        return sum(map(len, texts)) + 1

    latents = max(map(sum, spans))
    markers = 2 * max(map(len, spans))
    return MemorySetting(
        **common,  # type: ignore[arg-type]
        group_size=1,
        groups=train.rows_per_pass,
        completion_tokens=latents + markers + max(text(sample) for sample in plan.train),
        latents=latents,
        micro_batches=train.rows_per_step // train.rows_per_pass,
        train_vision=not train.freeze_vision,
    )

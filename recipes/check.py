"""What can be known to be wrong with a recipe before anything heavy starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoProcessor

from recipes.engines import EngineChoice, recipe_engine
from recipes.loading import Recipe
from recipes.schema import LADAPORecipe, SFTRecipe
from rewards.batch import make_batch
from rewards.look import look
from rewards.registry import BUILTIN, build_terms, check_signature
from rewards.terms import RewardTerm, check_terms, overweight
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.errors import ObjectiveError, PolicyError, RecipeError
from rl.export import POLICY
from rl.policy.heads import HeadConfig
from rl.policy.model import CONFIG_KEY, policy_settings
from rl.policy.protocol import LatentProtocol
from rl.trajectory import Sample


@dataclass(frozen=True)
class Plan:
    """A recipe with everything read that is cheap to read."""

    train: list[Sample]
    validation: list[Sample]
    evaluation: list[Sample]
    processor: Any
    protocol: LatentProtocol
    head: HeadConfig
    is_policy: bool  # whether `policy.path` is a policy already
    as_it_is: bool  # whether training starts from exactly that policy
    rewards: list[RewardTerm]  # none in SFT
    warnings: list[str]  # what is allowed, and probably not meant
    engine: EngineChoice | None  # what samples; None in SFT


def check_recipe(recipe: Recipe) -> Plan:
    """Read manifests, the policy's config and processor, and the first clip.

    Also refuses to train in several processes or on several GPUs (`check_processes`). Raises the
    error of whatever is wrong: `PolicyError`, `ProtocolError`, `DataError`,
    `VideoError`, `ObjectiveError` or `RecipeError`.
    """
    check_processes(recipe)
    settings = read_settings(recipe.policy.path)
    protocol, head = _protocol(recipe, settings), _head(recipe, settings)
    train, validation, evaluation = _samples(recipe)
    _check_objective(recipe, protocol)
    rewards, warnings = _check_rewards(recipe, train)
    if len(train) < (needed := _rows_needed(recipe)):
        key = "train.prompts_per_step" if isinstance(recipe, LADAPORecipe) else "train.batch_size"
        raise RecipeError(
            f"{key} is {needed}, but {recipe.data.train} gives {len(train)} rows to train on; "
            f"lower it to {len(train)} or less, or add rows"
        )
    processor = AutoProcessor.from_pretrained(recipe.policy.path)
    media = media_processor(recipe, processor)
    if not isinstance(recipe, LADAPORecipe):
        _check_lessons(recipe, train, protocol, head, media)
    for samples in filter(None, (train, validation, evaluation)):
        media.process(media.key(samples[0]))
    own = LatentProtocol.from_dict(settings["protocol"]) if settings else None
    return Plan(
        train,
        validation,
        evaluation,
        processor,
        protocol,
        head,
        settings is not None,
        protocol == own,
        rewards,
        warnings,
        recipe_engine(recipe),
    )


def check_processes(recipe: Recipe) -> None:
    """Refuse several trainer processes (``WORLD_SIZE``, as launchers set it) and several GPUs in
    one, over which transformers would spread the model by itself. Raises `RecipeError`.
    """
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    if processes > 1:
        raise RecipeError(
            f"this version trains in one process, but it was started as one of {processes} "
            "(WORLD_SIZE); start it without a launcher such as torchrun or accelerate. Sampling "
            "scales with rollouts.workers"
        )
    gpus = torch.cuda.device_count() if recipe.device == "auto" else 0
    if gpus > 1:
        raise RecipeError(
            f"this version trains on one GPU, but the trainer would see {gpus}; set "
            "CUDA_VISIBLE_DEVICES to one of them for this command, or write device: cpu"
        )


def media_processor(recipe: Recipe, processor: Any) -> MediaProcessor:
    """The recipe's way of showing clips and asking questions."""
    return MediaProcessor(
        processor,
        default_frames=recipe.data.default_frames,
        system_prompt=recipe.data.system_prompt,
    )


def read_settings(path: str) -> dict[str, Any] | None:
    """The ``foresight`` entry of a model's config, None for a plain model.

    Raises `PolicyError` if there is no model, or one that takes no video.
    """
    from rl.policy.model import model_class, policy_class

    if Path(path).is_absolute() and not Path(path, "config.json").is_file():
        what = "has no config.json" if Path(path).is_dir() else "is no folder"
        if Path(path, POLICY, "config.json").is_file():
            what = f"is a run; its policy is in {Path(path, POLICY)}"
        raise PolicyError(
            f"policy.path: {path} {what}; give the folder of a policy or a video model, or its "
            "name on the Hub"
        )
    try:
        config = AutoConfig.from_pretrained(path)
    except (OSError, ValueError) as error:
        raise PolicyError(
            f"policy.path: the config of {path} cannot be read ({str(error).splitlines()[0]}); "
            "check the path or name"
        ) from error
    policy_class(model_class(config, path))
    return policy_settings(config) if hasattr(config, CONFIG_KEY) else None


def _protocol(recipe: Recipe, settings: dict[str, Any] | None) -> LatentProtocol:
    own = LatentProtocol.from_dict(settings["protocol"]) if settings else LatentProtocol()
    keys = ("min_length", "max_length", "max_spans", "noise_scale", "density")
    wanted = {key: getattr(recipe.policy, key) for key in keys}
    return replace(own, **{key: value for key, value in wanted.items() if value is not None})


def _head(recipe: Recipe, settings: dict[str, Any] | None) -> HeadConfig:
    section = recipe.policy.head
    wanted = HeadConfig(section.kind, section.width) if section else None
    if settings is None:
        return wanted or HeadConfig()
    own = HeadConfig(**settings["head"])
    if wanted not in (None, own):
        raise PolicyError(
            f"policy.head: {recipe.policy.path} has a head of kind {own.kind!r} and keeps it; "
            "leave the key out, or start from a plain model"
        )
    return own


def _samples(recipe: Recipe) -> tuple[list[Sample], list[Sample], list[Sample]]:
    data, evaluation = recipe.data, recipe.evaluation
    train = read_manifest(data.train, video_root=data.video_root, limit=data.limit)
    validation: list[Sample] = []
    if data.validation is not None:
        validation = read_manifest(
            data.validation, video_root=data.video_root, limit=data.validation_limit
        )
    elif recipe.train.validate_every is not None:
        raise RecipeError(
            "train.validate_every asks for validation, but data.validation names no manifest; add "
            "one, or leave validate_every out"
        )
    held_out: list[Sample] = []
    if evaluation is not None:
        held_out = read_manifest(
            evaluation.manifest, video_root=data.video_root, limit=evaluation.limit
        )
        if evaluation.by is not None and not all(evaluation.by in s.extra for s in held_out):
            raise RecipeError(
                f"evaluation.by is {evaluation.by!r}, which is no column of every row of "
                f"{evaluation.manifest}; leave it out, or name another column"
            )
    return train, validation, held_out


def _rows_needed(recipe: Recipe) -> int:
    if isinstance(recipe, LADAPORecipe):
        return recipe.train.prompts_per_step
    return recipe.train.batch_size


def _check_objective(recipe: Recipe, protocol: LatentProtocol) -> None:
    from recipes.configs import trainer_config  # here, because it loads the trainers

    if isinstance(recipe, LADAPORecipe):
        train = recipe.train
        if protocol.noise_scale == 0.0 and (train.latent_alpha > 0.0 or train.latent_beta > 0.0):
            raise ObjectiveError(
                f"train.latent_alpha is {train.latent_alpha} and train.latent_beta "
                f"{train.latent_beta}, but the policy's noise_scale is 0: latents without noise "
                "have no density, and the latent term's gradient is exactly zero. Set "
                "policy.noise_scale above 0 (0.1 is a start), or set both weights to 0"
            )
    trainer_config(recipe)


def _check_lessons(
    recipe: SFTRecipe,
    samples: Sequence[Sample],
    protocol: LatentProtocol,
    head: HeadConfig,
    media: MediaProcessor,
) -> None:
    """Whether the protocol allows what the manifest's `imagine` asks for."""
    from rl.sft.taught import span_lengths

    if recipe.train.start_at_mean and head.kind == "identity":
        raise PolicyError(
            "train.start_at_mean needs a latent head with a bias, but the policy's head is the "
            "identity; leave it out, or choose another policy.head"
        )
    for sample in samples:
        span_lengths(
            sample,
            protocol,
            temporal_patch_size=media.temporal_patch_size,
            tokens_per_patch=recipe.train.tokens_per_patch,
        )


def reward_terms(recipe: LADAPORecipe) -> list[RewardTerm]:
    """The recipe's rewards. Nothing of a user's is imported."""
    specs = [spec.model_dump(exclude_none=True) for spec in recipe.rewards]
    for spec in specs:
        if spec["use"] == "latent_alignment":  # its tower is the starting policy's
            spec["options"] = {"policy": recipe.policy.path, **spec["options"]}
    return build_terms(specs)


def _check_rewards(recipe: Recipe, samples: Sequence[Sample]) -> tuple[list[RewardTerm], list[str]]:
    """The rewards, and what is to be said about them. Those of users are imported, each in a
    process of its own. Raises `RecipeError` naming the reward.
    """
    if not isinstance(recipe, LADAPORecipe):
        return [], []
    terms = reward_terms(recipe)
    check_terms(terms)
    manifest = {column for sample in samples for column in sample.extra}
    ranges = {term.name: term.range for term in terms if term.range is not None}
    make_batch(samples, [[] for _ in samples], [])  # refuses columns with names of Foresight's
    warnings = []
    theirs = [
        (term, spec.use)
        for term, spec in zip(terms, recipe.rewards, strict=True)
        if spec.use not in BUILTIN
    ]
    targets = [term.seat.target for term, _ in theirs]
    for (term, use), found in zip(theirs, look(targets), strict=True):
        if isinstance(found, RecipeError):
            raise RecipeError(f"reward {term.name!r} (use: {use}): {found}")
        warnings += check_signature(term, found, manifest)
        if found.range is not None:
            ranges.setdefault(term.name, found.range)
    return terms, warnings + overweight(terms, ranges)

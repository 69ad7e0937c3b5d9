"""What can be known to be wrong with a recipe before anything heavy starts."""

from __future__ import annotations

import os
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import AutoConfig, AutoProcessor

from recipes.check_modules import check_modules, inert_keys, wanted_modules
from recipes.engines import EngineChoice, engine_of
from recipes.loading import Recipe
from recipes.schema import ClipSection, LADAPORecipe, RecipeBase, RewardSection, SFTRecipe
from rewards.batch import make_batch
from rewards.look import look
from rewards.registry import BUILTIN, build_terms, check_signature
from rewards.terms import RewardTerm, check_terms, overweight
from rl.data.broken import BadVideos, of_sample
from rl.data.formats import SampleSet, SkippedRow, read_samples
from rl.data.frames import FrameRule
from rl.data.media import Media, MediaProcessor
from rl.errors import ObjectiveError, PolicyError, RecipeError, VideoError
from rl.export import POLICY
from rl.policy.heads import HeadConfig
from rl.policy.loading import read_config
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol
from rl.policy.settings import CONFIG_KEY, policy_settings
from rl.trajectory import Sample


@dataclass(frozen=True)
class Start:
    """The policy that a recipe starts from: what it will be, and whether it has to be made."""

    processor: Any
    protocol: LatentProtocol
    head: HeadConfig
    modules: ModulesConfig
    is_policy: bool  # whether `policy.path` is a policy already
    as_it_is: bool  # whether the run starts from exactly that policy


@dataclass(frozen=True)
class Plan(Start):
    """A recipe with everything read that is cheap to read."""

    train: list[Sample]
    validation: list[Sample]
    evaluation: list[Sample]
    recognised: list[str]  # what data sets of others were taken for
    skipped: dict[str, list[SkippedRow]]  # without their video, by set: "train", "validation", ...
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
    start = read_start(recipe)
    sets = _samples(recipe)
    train, validation, evaluation = (s.samples if s is not None else [] for s in sets)
    _check_objective(recipe, start.protocol)
    rewards, warnings = _check_rewards(recipe, train)
    if len(train) < (needed := _rows_needed(recipe)):
        key = "train.prompts_per_step" if isinstance(recipe, LADAPORecipe) else "train.batch_size"
        raise RecipeError(
            f"{key} is {needed}, but {recipe.data.train} gives {len(train)} rows to train on; "
            f"lower it to {len(train)} or less, or add rows"
        )
    media = media_processor(recipe.data, start.processor)
    if not isinstance(recipe, LADAPORecipe):
        _check_lessons(recipe, train, start.protocol, start.head, media)
    for samples in filter(None, (train, validation, evaluation)):
        first_clip(media, samples, recipe.data.bad_videos)
    return Plan(
        **vars(start),
        train=train,
        validation=validation,
        evaluation=evaluation,
        recognised=_recognised(sets),
        skipped={
            name: s.skipped if s is not None else []
            for name, s in zip(("train", "validation", "evaluation"), sets, strict=True)
        },
        rewards=rewards,
        warnings=[*warnings, *inert_keys(recipe, start.modules)],
        engine=engine_of(recipe, start.modules.names) if isinstance(recipe, LADAPORecipe) else None,
    )


def first_clip(
    media: MediaProcessor, samples: Sequence[Sample], bad_videos: BadVideos
) -> tuple[Sample, Media]:
    """The first sample and its clip, or the first that can be shown where the recipe does without
    others. Raises `VideoError`.
    """
    for sample in samples[:-1] if bad_videos != "stop" else ():
        with suppress(VideoError):
            return sample, media.process(media.key(sample))
    sample = samples[0] if bad_videos == "stop" else samples[-1]
    try:
        return sample, media.process(media.key(sample))
    except VideoError as error:
        raise of_sample(sample, error) from error


def read_start(recipe: RecipeBase) -> Start:
    """Read the config and the processor of the recipe's policy, or of the plain model it will be
    made of. Raises `PolicyError`, for what the recipe wants changed also `ProtocolError`.
    """
    settings = read_settings(recipe.policy.path)
    protocol = _protocol(recipe, settings)
    own = LatentProtocol.from_dict(settings["protocol"]) if settings else None
    had = ModulesConfig.from_dict((settings or {}).get("modules", {}))
    modules = had.added(wanted_modules(recipe.policy))
    check_modules(recipe, had, modules, read_config(recipe.policy.path))
    return Start(
        AutoProcessor.from_pretrained(recipe.policy.path),
        protocol,
        _head(recipe, settings),
        modules,
        settings is not None,
        (protocol, modules) == (own, had),
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


def media_processor(data: ClipSection, processor: Any) -> MediaProcessor:
    """The recipe's way of showing clips and asking questions."""
    return MediaProcessor(
        processor,
        FrameRule(**data.frames.model_dump()),
        system_prompt=data.system_prompt,
        decode_timeout_s=data.decode_timeout_s,
    )


def read_settings(path: str) -> dict[str, Any] | None:
    """The ``foresight`` entry of a model's config, None for a plain model.

    Raises `PolicyError` if there is no model, or one that takes no video.
    """
    from rl.policy.loading import model_class, policy_class

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


def _protocol(recipe: RecipeBase, settings: dict[str, Any] | None) -> LatentProtocol:
    own = LatentProtocol.from_dict(settings["protocol"]) if settings else LatentProtocol()
    keys = ("min_length", "max_length", "max_spans", "noise_scale", "density")
    wanted = {key: getattr(recipe.policy, key) for key in keys}
    return replace(own, **{key: value for key, value in wanted.items() if value is not None})


def _head(recipe: RecipeBase, settings: dict[str, Any] | None) -> HeadConfig:
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


def _samples(recipe: Recipe) -> tuple[SampleSet, SampleSet | None, SampleSet | None]:
    """The rows to train on, those for validation and those to evaluate on."""
    data, evaluation = recipe.data, recipe.evaluation
    missing: Literal["stop", "skip"] = "stop" if data.bad_videos == "stop" else "skip"

    def read(source: str, limit: int | None) -> SampleSet:
        return read_samples(
            source,
            format=data.format,
            columns=data.columns,
            video_root=data.video_root,
            limit=limit,
            missing=missing,
        )

    train = read(data.train, data.limit)
    validation = held_out = None
    if data.validation is not None:
        validation = read(data.validation, data.validation_limit)
    elif recipe.train.validate_every is not None:
        raise RecipeError(
            "train.validate_every asks for validation, but data.validation names no manifest; add "
            "one, or leave validate_every out"
        )
    if evaluation is not None:
        held_out = read_samples(
            evaluation.manifest,
            format=evaluation.format,
            columns=evaluation.columns,
            video_root=evaluation.video_root or data.video_root,
            limit=evaluation.limit,
            missing=missing,
        )
        rows = held_out.samples
        if evaluation.by is not None and not all(evaluation.by in s.extra for s in rows):
            raise RecipeError(
                f"evaluation.by is {evaluation.by!r}, which is no column of every row of "
                f"{evaluation.manifest}; leave it out, or name another column"
            )
    return train, validation, held_out


def _recognised(sets: Sequence[SampleSet | None]) -> list[str]:
    keys = ("data.train", "data.validation", "evaluation.manifest")
    return [
        f"{key} is {found.recognised}"
        for key, found in zip(keys, sets, strict=True)
        if found is not None and found.format != "manifest"
    ]


def _rows_needed(recipe: Recipe) -> int:
    if isinstance(recipe, LADAPORecipe):
        return recipe.train.prompts_per_step
    return recipe.train.batch_size


def _check_objective(recipe: Recipe, protocol: LatentProtocol) -> None:
    from recipes.configs import trainer_config  # here, because it loads the trainers

    if isinstance(recipe, LADAPORecipe):
        train = recipe.train
        if protocol.noise_scale > 0.0 and train.objective == "published":
            raise ObjectiveError(
                "train.objective is published, but the policy's noise_scale is "
                f"{protocol.noise_scale}: the release's latents have no noise. Set "
                "policy.noise_scale to 0, or leave train.objective at exact"
            )
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
    """Whether rows have what their lessons need, and the protocol allows these at all times."""
    from recipes.configs import trainer_config
    from rl.sft.lessons import longest_spans

    if recipe.train.start_at_mean and head.kind == "identity":
        raise PolicyError(
            "train.start_at_mean needs a latent head with a bias, but the policy's head is the "
            "identity; leave it out, or choose another policy.head"
        )
    longest_spans(
        samples,
        trainer_config(recipe),
        protocol,
        temporal_patch_size=media.temporal_patch_size,
    )


def reward_terms(recipe: LADAPORecipe) -> list[RewardTerm]:
    """The recipe's rewards. Nothing of a user's is imported."""
    specs = [spec.model_dump(exclude_none=True) for spec in recipe.rewards]
    for spec in specs:
        if spec["use"] == "latent_alignment":  # its tower is the starting policy's
            own = {"policy": recipe.policy.path, "decode_timeout_s": recipe.data.decode_timeout_s}
            spec["options"] = {**own, **spec["options"]}
    return build_terms(specs)


def _check_rewards(recipe: Recipe, samples: Sequence[Sample]) -> tuple[list[RewardTerm], list[str]]:
    """The rewards, and what is to be said about them."""
    if not isinstance(recipe, LADAPORecipe):
        return [], []
    terms = reward_terms(recipe)
    return terms, check_rewards(terms, recipe.rewards, samples)


def check_rewards(
    terms: Sequence[RewardTerm], sections: Sequence[RewardSection], samples: Sequence[Sample]
) -> list[str]:
    """What is to be said about rewards, `terms`, that a recipe writes as `sections`. Those of users
    are imported, each in a process of its own. Raises `RecipeError` naming the reward.
    """
    check_terms(terms)
    manifest = {column for sample in samples for column in sample.extra}
    ranges = {term.name: term.range for term in terms if term.range is not None}
    make_batch(samples, [[] for _ in samples], [])  # refuses columns with names of Foresight's
    warnings = []
    theirs = [
        (term, spec.use)
        for term, spec in zip(terms, sections, strict=True)
        if spec.use not in BUILTIN
    ]
    targets = [term.seat.target for term, _ in theirs]
    for (term, use), found in zip(theirs, look(targets), strict=True):
        if isinstance(found, RecipeError):
            raise RecipeError(f"reward {term.name!r} (use: {use}): {found}")
        warnings += check_signature(term, found, manifest)
        if found.range is not None:
            ranges.setdefault(term.name, found.range)
    return warnings + overweight(terms, ranges)

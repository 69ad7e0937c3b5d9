"""What a run samples and scores with: rollout workers, engines, rewards. And evaluation with its
progress shown.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerState

from recipes.callbacks import progress_bar
from recipes.check import Plan
from recipes.configs import uses_gpu
from recipes.evaluate import Evaluation, Outcomes, Sampler, evaluate
from recipes.loading import Recipe
from recipes.run_folder import RunFolder
from recipes.schema import LADAPORecipe
from rewards.scorer import RewardSet
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import RecipeError
from rl.policy.protocol import Imagine
from rl.trajectory import Sample
from rollouts.pool import RolloutPool
from rollouts.transformers_engine import TransformersEngine
from rollouts.worker import EngineSpec

_SIDE_BY_SIDE = 32  # answers of an engine in the trainer's own process (SFT)


def gpu_share(workers: int, gpus: int, booked: float = 0.0) -> float:
    """The share of a GPU that each of `workers` gets of `gpus`, of which `booked` are for others: 1
    at most, 0 without GPUs.

    A worker has to fit on one GPU, so 3 workers on 2 GPUs take 0.5 each, not 0.66. Ray counts in
    ten-thousandths, so the share is rounded down to those. Raises `RecipeError` if nothing is left.
    """
    if gpus == 0:
        return 0.0
    left = gpus if booked < 1.0 else gpus - math.ceil(booked)  # whole GPUs, or room on each
    if left < 1:
        raise RecipeError(
            f"the rewards' `gpus` add up to {booked:g}, and there are {gpus}: none is left for the "
            "rollout workers. Lower them, or set rollouts.gpus_per_worker"
        )
    room = 1.0 - booked if booked < 1.0 else 1.0
    return math.floor(1e4 * room / math.ceil(workers / left)) / 1e4


def start_pool(
    spec: EngineSpec, media: MediaProcessor, workers: int, console: Console, **options: Any
) -> RolloutPool:
    """A `RolloutPool` with these `options`; says so while the workers start."""
    with console.status(f"starting {workers} rollout workers"):
        return RolloutPool(spec, media, workers, **options)


def evaluate_with_bar(
    sampler: Sampler,
    samples: Sequence[Sample],
    modes: Sequence[Imagine],
    max_new_tokens: int,
    console: Console,
    *,
    by: str | None = None,
    outcomes: Outcomes | None = None,
) -> Evaluation:
    """`recipes.evaluate.evaluate` with a bar over the answers of all modes."""
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(modes) * len(samples))
        return evaluate(
            sampler,
            samples,
            modes,
            max_new_tokens,
            by=by,
            advance=lambda count: bar.advance(task, count),
            outcomes=outcomes,
        )


@contextmanager
def rollout_pool(
    recipe: Recipe, media: MediaProcessor, start: str, console: Console
) -> Iterator[RolloutPool | None]:
    """The workers that sample; None for a stage that samples nothing."""
    if not isinstance(recipe, LADAPORecipe):
        yield None
        return
    settings = recipe.rollouts
    gpus = settings.gpus_per_worker
    if gpus is None:
        there = torch.cuda.device_count() if uses_gpu(recipe) else 0
        gpus = gpu_share(settings.workers, there, sum(spec.gpus for spec in recipe.rewards))
    dtype = settings.dtype
    if dtype == "auto":
        dtype = "bfloat16" if gpus else "float32"
    spec = EngineSpec(
        policy=start,
        dtype=dtype,
        device="cuda" if gpus else "cpu",
        max_batch_size=settings.max_batch_size,
        default_frames=recipe.data.default_frames,
        system_prompt=recipe.data.system_prompt,
        threads=max(1, int(settings.cpus_per_worker)),
    )
    with start_pool(
        spec,
        media,
        settings.workers,
        console,
        address=settings.ray.address,
        timeout=settings.timeout_s,
        media_capacity=recipe.data.media_cache,
        cpus_per_worker=settings.cpus_per_worker,
        gpus_per_worker=gpus,
    ) as pool:
        yield pool


@contextmanager
def reward_set(
    recipe: Recipe, plan: Plan, run: RunFolder, console: Console
) -> Iterator[RewardSet | None]:
    """The rewards, each in its process; None for a stage that has none. Ray must be running."""
    if not isinstance(recipe, LADAPORecipe):
        yield None
        return
    rewards = RewardSet(
        plan.rewards,
        gate_shaping=recipe.scoring.gate_shaping,
        max_invalid=recipe.scoring.max_invalid,
        faults=run.faults,
        isolated=True,
    )
    try:
        with console.status("starting the rewards"):
            rewards.start()
            rewards.begin(TrainerState())  # validation may come before the first step
        yield rewards
    finally:
        rewards.close()


def local_engine(
    recipe: Recipe, policy: Any, media: MediaProcessor, device: torch.device | str
) -> TransformersEngine:
    clips = LocalMedia(media, recipe.data.media_cache)
    return TransformersEngine(policy, media, clips, max_batch_size=_SIDE_BY_SIDE, device=device)


@contextmanager
def engine_on(recipe: Recipe, policy: Any, media: MediaProcessor) -> Iterator[TransformersEngine]:
    """An engine on a policy that is being trained, in its own process."""
    training = policy.training
    try:
        yield local_engine(recipe, policy, media, policy.device)
    finally:
        policy.train(training)

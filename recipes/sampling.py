"""What a run samples and scores with: rollout workers, engines, rewards. And evaluation with its
progress shown.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from rich.console import Console
from transformers import TrainerState

from recipes.callbacks import progress_bar
from recipes.check import Plan
from recipes.engines import (
    EngineChoice,
    SamplingRecipe,
    vllm_options,
    worker_dtype,
    worker_gpus,
)
from recipes.evaluation.evaluate import Evaluation, Outcomes, Sampler, evaluate
from recipes.loading import Recipe
from recipes.run_folder import RunFolder
from recipes.schema import LADAPORecipe
from rewards.scorer import RewardSet
from rl.data.broken import BrokenClips
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.protocol import Imagine
from rl.trajectory import Sample
from rollouts.pool import RolloutPool
from rollouts.transformers_engine import TransformersEngine
from rollouts.vllm_options import VLLMOptions
from rollouts.worker import EngineSpec

_SIDE_BY_SIDE = 32  # answers of an engine in the trainer's own process (SFT)


def evaluate_with_bar(
    sampler: Sampler,
    samples: Sequence[Sample],
    modes: Sequence[Imagine],
    max_new_tokens: int,
    console: Console,
    *,
    by: str | None = None,
    outcomes: Outcomes | None = None,
    broken: BrokenClips | None = None,
) -> Evaluation:
    """`recipes.evaluation.evaluate.evaluate` with a bar over the answers of all modes."""
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
            broken=broken,
        )


@contextmanager
def rollout_pool(
    recipe: Recipe, plan: Plan, media: MediaProcessor, start: str, console: Console
) -> Iterator[RolloutPool | None]:
    """The workers that sample; None for a stage that samples nothing."""
    if not isinstance(recipe, LADAPORecipe) or plan.engine is None:
        yield None
        return
    with pool_of(recipe, plan.engine, media, start, console) as pool:
        yield pool


def pool_of(
    recipe: SamplingRecipe,
    choice: EngineChoice,
    media: MediaProcessor,
    policy: str,
    console: Console,
) -> RolloutPool:
    """The recipe's workers, with the engine of `choice`, on the policy in the folder `policy`."""
    settings, gpus = recipe.rollouts, worker_gpus(recipe)
    dtype, trainer = worker_dtype(settings, gpus), isinstance(recipe, LADAPORecipe)
    console.print(str(choice))
    spec = EngineSpec(
        policy=policy,
        engine=choice.engine,
        options=vllm_options(settings, gpus, trainer=trainer)
        if choice.engine == "vllm"
        else VLLMOptions(),
        dtype=dtype,
        device="cuda" if gpus else "cpu",
        max_batch_size=settings.max_batch_size,
        frames=media.frames,
        decode_timeout_s=media.decode_timeout_s,
        system_prompt=recipe.data.system_prompt,
        threads=max(1, int(settings.cpus_per_worker)),
    )
    with console.status(f"starting {settings.workers} rollout workers"):
        return RolloutPool(
            spec,
            media,
            settings.workers,
            address=settings.ray.address,
            timeout=settings.timeout_s,
            media_gb=recipe.data.media_cache_gb,
            cpus_per_worker=settings.cpus_per_worker,
            gpus_per_worker=gpus,
        )


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
    with started(rewards, console):
        yield rewards


@contextmanager
def started(rewards: RewardSet, console: Console) -> Iterator[None]:
    """Start the rewards, and end them behind the block. Ray must be running."""
    try:
        with console.status("starting the rewards"):
            rewards.start()
            rewards.begin(TrainerState())  # validation may come before the first step
        yield
    finally:
        rewards.close()


def local_engine(
    recipe: Recipe, policy: Any, media: MediaProcessor, device: torch.device | str
) -> TransformersEngine:
    clips = LocalMedia(media, recipe.data.media_cache_gb)
    return TransformersEngine(policy, media, clips, max_batch_size=_SIDE_BY_SIDE, device=device)

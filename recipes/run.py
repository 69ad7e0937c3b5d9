"""The main loop: a recipe becomes a trained policy on disk. `run_recipe` is where to start
reading.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import AutoProcessor, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from recipes.callbacks import MetricsFile, TrainingProgress, Validation, progress_bar
from recipes.check import Plan, check_recipe, media_processor, reward_specs
from recipes.configs import lora_config, trainer_config, uses_gpu, with_adapters
from recipes.evaluate import Evaluation, Sampler, evaluate
from recipes.loading import Recipe
from recipes.run_folder import RunFolder
from recipes.schema import LADAPORecipe
from rewards.registry import build_rewards
from rl.data.media import LocalMedia, MediaProcessor
from rl.export import export_policy, save_policy, whole_folder
from rl.policy.model import load_policy, make_policy
from rl.trajectory import Sample
from rl.weights import weight_update
from rollouts.pool import RolloutPool
from rollouts.transformers_engine import TransformersEngine
from rollouts.worker import EngineSpec

# An engine in the trainer's own process (SFT): answers side by side, and clips kept.
_SIDE_BY_SIDE, _CLIPS = 32, 256


@dataclass(frozen=True)
class RunResult:
    """A finished run. `evaluation` is `Evaluation.to_dict()`, None without one in the recipe."""

    output: Path
    policy: Path
    steps: int
    resumed_from: int | None  # the step of the checkpoint this call went on from
    evaluation: dict[str, Any] | None


def run_recipe(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Train what the recipe says, resuming where an earlier call stopped. Raises
    `ForesightError`s.
    """
    console = console or Console()
    run = RunFolder(recipe.output)

    if (done := run.result()) is not None:
        run.claim(recipe)  # refuses another recipe than the one that ran
        console.print(
            f"{recipe.name} is finished: {run.policy} (delete {run.root} to run it again)"
        )
        return RunResult(run.root, run.policy, done["steps"], None, done["evaluation"])

    # 1. Everything that can be wrong is found here, before anything is written or started.
    plan = check_recipe(recipe)
    run.claim(recipe)

    # 2. Where to go on.
    found = run.resumption()
    for name in found.incomplete:
        console.print(f"ignoring {name}: it was not written to its end")
    if found.checkpoint is not None:
        console.print(
            f"resuming from step {found.step} of {recipe.train.max_steps}, {found.checkpoint}"
        )
    elif found.incomplete:
        console.print("no whole checkpoint to resume from, starting anew")

    # 3. Train, unless only what comes after training is missing.
    set_seed(recipe.seed)
    start = _start_policy(recipe, plan, run, console)
    media = media_processor(recipe, AutoProcessor.from_pretrained(start))
    with _pool(recipe, media, start, console) as pool:
        if found.step < recipe.train.max_steps:
            policy = load_policy(start, dtype=getattr(torch, recipe.policy.dtype))
            _train(recipe, plan, run, policy, media, pool, found.checkpoint, console)
            del policy

        # 4. The trained policy, as a folder that stands on its own.
        with console.status("saving the policy"):
            export_policy(run.checkpoints, run.policy, base=start, overwrite=True)

        # 5. How good it is.
        figures = None
        if recipe.evaluation is not None:
            trained = load_policy(run.policy)
            if pool is not None:
                pool.update_weights(weight_update(trained, recipe.train.max_steps))
            device = "cuda" if uses_gpu(recipe) else "cpu"
            sampler = pool or _engine(trained, media, device)
            evaluation = _evaluate(recipe, plan.evaluation, sampler, console)
            console.print(evaluation.table())
            figures = evaluation.to_dict()

    run.finish({"steps": recipe.train.max_steps, "evaluation": figures})
    return RunResult(run.root, run.policy, recipe.train.max_steps, found.step or None, figures)


def _train(
    recipe: Recipe,
    plan: Plan,
    run: RunFolder,
    policy: Any,
    media: MediaProcessor,
    pool: RolloutPool | None,
    checkpoint: Path | None,
    console: Console,
) -> None:
    """Run the stage's trainer to its last step."""
    progress = TrainingProgress(console, recipe.name)
    callbacks: list[TrainerCallback] = [MetricsFile(run), progress]
    validation = None
    if recipe.train.validate_every is not None:
        validation = Validation(recipe.train.validate_every)
        callbacks.append(validation)
    trainer: Any
    if isinstance(recipe, LADAPORecipe):
        from rl.la_dapo import LADAPOTrainer

        assert pool is not None
        trainer = LADAPOTrainer(
            policy,
            rollouts=pool,
            scorer=build_rewards(reward_specs(recipe)),
            samples=plan.train,
            args=trainer_config(recipe),
            processing_class=media.processor,
            peft_config=lora_config(recipe.train.lora),
            callbacks=callbacks,
        )
    else:
        from rl.sft.trainer import LatentSFTTrainer

        model = with_adapters(policy, recipe.train.lora)
        trainer = LatentSFTTrainer(
            model, trainer_config(recipe), plan.train, media, callbacks=callbacks
        )
    for callback in (PrinterCallback, ProgressCallback):  # ours shows more in less space
        trainer.remove_callback(callback)

    def answers() -> Evaluation:
        length, samples = recipe.train.max_completion_length, plan.validation
        if pool is not None:
            trainer.sync_weights()
            return evaluate(pool, samples, ("free",), length)
        with _answering(trainer.policy, media) as engine:
            return evaluate(engine, samples, ("free",), length)

    if validation is not None:
        validation.prepare(trainer, answers)
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.stop()


def _start_policy(recipe: Recipe, plan: Plan, run: RunFolder, console: Console) -> str:
    """Where the policy to start from is; made and kept in the run folder if the recipe's path is
    not that policy.
    """
    if plan.as_it_is:
        return recipe.policy.path
    if not run.start.is_dir():
        with console.status("making the policy"), whole_folder(run.start) as draft:
            if plan.is_policy:
                policy = load_policy(recipe.policy.path, dtype="auto")
                policy.set_protocol(plan.protocol)
            else:
                policy = make_policy(
                    recipe.policy.path, plan.processor, plan.protocol, plan.head, dtype="auto"
                )
            save_policy(policy, plan.processor, draft)
    return str(run.start)


@contextmanager
def _pool(
    recipe: Recipe, media: MediaProcessor, start: str, console: Console
) -> Iterator[RolloutPool | None]:
    """The workers that sample; None for a stage that samples nothing."""
    if not isinstance(recipe, LADAPORecipe):
        yield None
        return
    settings = recipe.rollouts
    gpus = settings.gpus_per_worker
    if gpus is None:  # this machine's, shared out evenly; Ray counts them in ten-thousandths
        there = torch.cuda.device_count() if uses_gpu(recipe) else 0
        gpus = min(1.0, math.floor(1e4 * there / settings.workers) / 1e4)
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
    with console.status(f"starting {settings.workers} rollout workers"):
        pool = RolloutPool(
            spec,
            media,
            settings.workers,
            address=settings.ray.address,
            timeout=settings.timeout_s,
            cpus_per_worker=settings.cpus_per_worker,
            gpus_per_worker=gpus,
        )
    with pool:
        yield pool


def _engine(policy: Any, media: MediaProcessor, device: torch.device | str) -> TransformersEngine:
    clips = LocalMedia(media, _CLIPS)
    return TransformersEngine(policy, media, clips, max_batch_size=_SIDE_BY_SIDE, device=device)


@contextmanager
def _answering(policy: Any, media: MediaProcessor) -> Iterator[TransformersEngine]:
    """An engine on a policy that is being trained, in its own process."""
    training = policy.training
    try:
        yield _engine(policy, media, policy.device)
    finally:
        policy.train(training)


def _evaluate(
    recipe: Recipe, samples: Sequence[Sample], sampler: Sampler, console: Console
) -> Evaluation:
    assert recipe.evaluation is not None
    modes, length = recipe.evaluation.modes, recipe.train.max_completion_length
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(modes) * len(samples))
        return evaluate(
            sampler,
            samples,
            modes,
            length,
            by=recipe.evaluation.by,
            advance=lambda count: bar.advance(task, count),
        )

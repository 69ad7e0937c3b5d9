"""The main loop: a recipe becomes a trained policy on disk. `run_recipe` is where to start
reading.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from transformers import AutoProcessor, TrainerCallback, set_seed
from transformers.trainer_callback import PrinterCallback, ProgressCallback
from transformers.trainer_utils import SaveStrategy

from recipes.callbacks import MetricsFile, TrainingProgress
from recipes.check import Plan, check_recipe, media_processor
from recipes.configs import lora_config, trainer_config, uses_gpu, with_adapters
from recipes.evaluation.callback import EvaluationCallback
from recipes.evaluation.tables import show
from recipes.loading import Recipe
from recipes.run_folder import RunFolder
from recipes.sampling import (
    evaluate_with_bar,
    local_engine,
    reward_set,
    rollout_pool,
)
from recipes.schema import LADAPORecipe, SFTRecipe
from recipes.start import start_policy
from rewards.scorer import RewardSet
from rl.checkpoints import last_complete, read_state
from rl.collecting import ScoredRollout
from rl.data.broken import BrokenClips
from rl.data.media import MediaProcessor
from rl.errors import CheckpointError
from rl.export import export_policy, is_policy
from rl.policy.loading import load_policy
from rl.records import write_record
from rl.weights import weight_update
from rollouts.pool import RolloutPool

if TYPE_CHECKING:
    from rl.sft.trainer import LatentSFTTrainer


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
        return _finished(recipe, run, done, console)

    # 1. Everything that can be wrong is found here, before anything is written or started.
    plan = check_recipe(recipe)
    run.claim(recipe)

    # 2. Where to go on.
    found = run.resumption()
    for name in found.incomplete:
        console.print(f"ignoring {name}: it was not written to its end")
        run.set_aside(name)
    if found.checkpoint is not None:
        console.print(
            f"resuming from step {found.step} of {recipe.train.max_steps}, {found.checkpoint}"
        )
    elif found.incomplete:
        console.print("no whole checkpoint to resume from, starting anew")
    if found.step < recipe.train.max_steps:
        ids = [sample.id for sample in plan.train]
        if changed := run.claim_rows(ids, resumes=found.checkpoint is not None):
            console.print(f"note: {changed}")

    # 3. Train, unless only what comes after training is missing.
    set_seed(recipe.seed)
    start = start_policy(recipe, plan, run, console)
    media = media_processor(recipe.data, AutoProcessor.from_pretrained(start))
    with (
        rollout_pool(recipe, plan, media, start, console) as pool,
        reward_set(recipe, plan, run, console) as rewards,
    ):
        if found.step < recipe.train.max_steps:
            policy = load_policy(start, dtype=getattr(torch, recipe.policy.dtype))
            _train(recipe, plan, run, policy, media, pool, rewards, found.checkpoint, console)
            del policy
            gc.collect()  # the trainer and its callbacks refer to each other
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

        # 4. The trained policy, as a folder that stands on its own.
        last = _last_checkpoint(recipe, run)
        with console.status("saving the policy"):
            export_policy(last, run.policy, base=start, overwrite=True)

        # 5. How good it is.
        figures = _evaluate(recipe, plan, run, media, pool, rewards, console)

    _write_result(recipe, run, figures)
    return RunResult(run.root, run.policy, recipe.train.max_steps, found.step or None, figures)


def _finished(recipe: Recipe, run: RunFolder, done: dict[str, Any], console: Console) -> RunResult:
    """The result of a run that is finished; evaluated again if the recipe now asks for other
    figures.
    """
    figures, wanted = done["evaluation"], _evaluation_section(recipe)
    again = wanted is not None and wanted != done.get("evaluation_section")
    if again and not is_policy(run.policy):
        raise CheckpointError(
            f"{run.root} is finished, but {run.policy} is gone, so it cannot be evaluated again; "
            "delete result.json to export the policy from its last checkpoint"
        )
    plan = check_recipe(recipe) if again else None
    run.claim(recipe)  # refuses another recipe than the one that ran
    console.print(f"{recipe.name} is finished: {run.policy} (delete {run.root} to run it again)")
    if wanted is None:
        figures = None
    elif plan is not None:
        console.print("the recipe's evaluation has changed since: evaluating again")
        media = media_processor(recipe.data, AutoProcessor.from_pretrained(run.policy))
        with (
            rollout_pool(recipe, plan, media, str(run.policy), console) as pool,
            reward_set(recipe, plan, run, console) as rewards,
        ):
            figures = _evaluate(recipe, plan, run, media, pool, rewards, console)
        _write_result(recipe, run, figures)
    return RunResult(run.root, run.policy, done["steps"], None, figures)


def _evaluation_section(recipe: Recipe) -> dict[str, Any] | None:
    return recipe.evaluation and recipe.evaluation.model_dump(mode="json")


def _write_result(recipe: Recipe, run: RunFolder, figures: dict[str, Any] | None) -> None:
    """Finish the run; what the figures are of is kept with them."""
    asked = {"evaluation_section": _evaluation_section(recipe)}
    run.finish({"steps": recipe.train.max_steps, "evaluation": figures, **asked})


def _last_checkpoint(recipe: Recipe, run: RunFolder) -> Path:
    """The checkpoint of the last step. Raises `CheckpointError` if training left another."""
    last, wanted = last_complete(run.checkpoints), recipe.train.max_steps
    step = int(read_state(last)["step"]) if last else None
    if last is None or step != wanted:
        newest = "there is none" if last is None else f"the newest is of step {step}"
        raise CheckpointError(
            f"{run.checkpoints} has no whole checkpoint of step {wanted}, the last one: {newest}. "
            "Nothing was exported; start the run again to go on from there"
        )
    return last


def _train(
    recipe: Recipe,
    plan: Plan,
    run: RunFolder,
    policy: Any,
    media: MediaProcessor,
    pool: RolloutPool | None,
    rewards: RewardSet | None,
    checkpoint: Path | None,
    console: Console,
) -> None:
    """Run the stage's trainer to its last step."""
    progress = TrainingProgress(console, recipe.name)
    callbacks: list[TrainerCallback] = [MetricsFile(run), progress]
    trainer: Any
    if isinstance(recipe, LADAPORecipe):
        from rl.la_dapo import LADAPOTrainer

        assert pool is not None and rewards is not None
        trainer = LADAPOTrainer(
            policy,
            rollouts=pool,
            scorer=rewards,
            samples=plan.train,
            args=trainer_config(recipe),
            processing_class=media.processor,
            peft_config=lora_config(recipe.train.lora),
            callbacks=callbacks,
            recorder=_recorder(recipe, run, rewards),
            broken=_broken(recipe, plan, run, "train"),
        )
        _silence(trainer)
    else:
        trainer = sft_trainer(recipe, plan, run, policy, media, console, callbacks)

    if recipe.train.validate_every is not None:
        modes = (recipe.train.imagine,) if isinstance(recipe, LADAPORecipe) else ("free",)
        trainer.add_callback(
            EvaluationCallback(
                trainer,
                plan.validation,
                every=recipe.train.validate_every,
                modes=modes,
                max_new_tokens=recipe.train.max_completion_length,
                media=media,
                sampler=pool,
                outcomes=None if rewards is None else rewards.outcomes,
                broken=_broken(recipe, plan, run, "validation"),
            )
        )
    try:
        trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))
    finally:
        progress.stop()


def sft_trainer(
    recipe: SFTRecipe,
    plan: Plan,
    run: RunFolder,
    policy: Any,
    media: MediaProcessor,
    console: Console,
    callbacks: Sequence[TrainerCallback],
    *,
    checkpoints: bool = True,
) -> LatentSFTTrainer:
    """The trainer that an SFT recipe describes, around `policy`; without `checkpoints` it keeps
    none.
    """
    from rl.sft.trainer import LatentSFTTrainer

    config = trainer_config(recipe)
    if not checkpoints:
        config.save_strategy = SaveStrategy.NO
    trainer = LatentSFTTrainer(
        with_adapters(policy, recipe.train.lora),
        config,
        plan.train,
        media,
        callbacks=callbacks,
        broken=_broken(recipe, plan, run, "train"),
        tell=console.print,
    )
    _silence(trainer)
    return trainer


def _silence(trainer: Any) -> None:
    """Take transformers' own progress off: ours shows more in less space."""
    for callback in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(callback)


def _broken(recipe: Recipe, plan: Plan, run: RunFolder, name: str) -> BrokenClips:
    """What cannot be shown of the set `name`: at first the rows whose video is not there."""
    broken = BrokenClips(run.skipped, rule=recipe.data.bad_videos)
    for row in plan.skipped[name]:
        broken.note(*row)
    return broken


def _recorder(
    recipe: LADAPORecipe, run: RunFolder, rewards: RewardSet
) -> Callable[[ScoredRollout], object] | None:
    """Keeps what was sampled and how it was scored, as often as the recipe says."""
    every, latents_every = recipe.train.record_every, recipe.train.record_latents_every
    weights = dict(zip(rewards.names, rewards.weights, strict=True))

    def record(rollout: ScoredRollout) -> None:
        arrays = latents_every is not None and rollout.step % latents_every == 0
        if arrays or (every is not None and rollout.step % every == 0):
            write_record(
                run.trajectories,
                rollout.step,
                [c.group for c in rollout.groups],
                rollout.scores,
                trained=[c.trained for c in rollout.groups],
                advantages=rollout.advantages,
                weights=weights,
                arrays=arrays,
                rollout=rollout.number,
            )

    return None if every is None and latents_every is None else record


def _evaluate(
    recipe: Recipe,
    plan: Plan,
    run: RunFolder,
    media: MediaProcessor,
    pool: RolloutPool | None,
    rewards: RewardSet | None,
    console: Console,
) -> dict[str, Any] | None:
    """Show and return the figures of the run's policy; None without an evaluation in the recipe."""
    if recipe.evaluation is None:
        return None
    trained = load_policy(run.policy)
    if pool is not None:
        pool.update_weights(weight_update(trained, recipe.train.max_steps))
    device = "cuda" if uses_gpu(recipe) else "cpu"
    evaluation = evaluate_with_bar(
        pool or local_engine(recipe, trained, media, device),
        plan.evaluation,
        recipe.evaluation.modes,
        recipe.train.max_completion_length,
        console,
        by=recipe.evaluation.by,
        outcomes=None if rewards is None else rewards.outcomes,
        broken=_broken(recipe, plan, run, "evaluation"),
    )
    show(evaluation, console)
    return evaluation.to_dict()

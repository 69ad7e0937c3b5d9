"""The main loop: a recipe becomes a trained policy on disk. `run_recipe` is where to start reading."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from transformers import set_seed
from transformers.trainer_callback import PrinterCallback

from recipes.callbacks import MetricsFile, TrainingProgress, Validation, progress_bar
from recipes.check import Plan, check_recipe, media_processor, reward_specs
from recipes.configs import lora_config, trainer_config
from recipes.evaluate import Evaluation, Sampler, evaluate
from recipes.loading import Recipe
from recipes.run_folder import RunFolder
from recipes.schema import LADAPORecipe, RolloutsSection
from rewards.registry import build_rewards
from rl.data.media import LocalMedia
from rl.export import export_policy, save_policy, whole_folder
from rl.policy.model import load_policy, make_policy
from rl.weights import weight_update
from rollouts.pool import RolloutPool
from rollouts.transformers_engine import TransformersEngine
from rollouts.worker import EngineSpec

_VALIDATION_BATCH = 32  # answers sampled side by side in the trainer's own process (SFT)


@dataclass(frozen=True)
class RunResult:
    """A finished run. `evaluation` is `Evaluation.to_dict()`, None without one in the recipe."""

    output: Path
    policy: Path
    steps: int
    resumed_from: int | None  # the step of the checkpoint this call went on from
    evaluation: dict[str, Any] | None


def run_recipe(recipe: Recipe, console: Console | None = None) -> RunResult:
    """Train what the recipe says, resuming where an earlier call stopped. Raises `ForesightError`s."""
    console = console or Console()
    run = RunFolder(recipe.output)

    # 1. Everything that can be wrong is found here, before anything is written or started.
    plan = check_recipe(recipe)
    run.claim(recipe)
    if (done := run.result()) is not None:
        console.print(f"{recipe.name} is finished: {run.policy} (delete {run.root} to run it again)")
        return RunResult(run.root, run.policy, done["steps"], None, done["evaluation"])

    # 2. Where to go on.
    found = run.resumption()
    for name in found.incomplete:
        console.print(f"ignoring {name}: it was not written to its end")
    if found.checkpoint is not None:
        console.print(f"resuming from step {found.step} of {recipe.train.max_steps}, {found.checkpoint}")
    elif found.incomplete:
        console.print("no whole checkpoint to resume from, starting anew")

    # 3. Train, unless only what comes after training is missing.
    set_seed(recipe.seed)
    start = _start_policy(recipe, plan, run, console)
    with ExitStack() as stack:
        if isinstance(recipe, LADAPORecipe):
            pool = stack.enter_context(_pool(recipe, plan, start, console))
            if found.step < recipe.train.max_steps:
                _train_la_dapo(recipe, plan, run, load_start(recipe, start), pool, found.checkpoint, console)
        elif found.step < recipe.train.max_steps:
            _train_sft(recipe, plan, run, load_start(recipe, start), found.checkpoint, console)

        # 4. The trained policy, as a folder that stands on its own.
        with console.status("saving the policy"):
            export_policy(run.checkpoints, run.policy, base=start, overwrite=True)

        # 5. How good it is.
        evaluation: Evaluation | None = None
        if recipe.evaluation is not None:
            policy = load_policy(run.policy)
            if isinstance(recipe, LADAPORecipe):
                pool.update_weights(weight_update(policy, recipe.train.max_steps))
                sampler: Sampler = pool
            else:
                sampler = _local_engine(recipe, plan, policy)
            modes, length = recipe.evaluation.modes, _answer_length(recipe)
            with progress_bar(console, transient=True) as bar:
                task = bar.add_task("evaluating", total=len(modes) * len(plan.evaluation))
                evaluation = evaluate(
                    sampler, plan.evaluation, modes, length,
                    by=recipe.evaluation.by, advance=lambda count: bar.advance(task, count),
                )  # fmt: skip
            console.print(evaluation.table())

    figures = evaluation.to_dict() if evaluation else None
    run.finish({"steps": recipe.train.max_steps, "policy": str(run.policy), "evaluation": figures})
    return RunResult(run.root, run.policy, recipe.train.max_steps, found.step or None, figures)

"""`foresight diagnose gradients`: an SFT recipe trained for the sake of its gradients."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import (
    AutoProcessor,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
    set_seed,
)

from recipes.callbacks import TrainingProgress
from recipes.check import check_recipe, media_processor
from recipes.diagnose.picture import NAMES, draw_gradients, mean_length, mean_norm, quarters
from recipes.run import sft_trainer
from recipes.run_folder import RunFolder
from recipes.schema import SFTRecipe
from recipes.start import start_policy
from rl.errors import RecipeError
from rl.gradient_norms import GradientNorms
from rl.policy.loading import load_policy

NUMBERS, PICTURE = "gradients.jsonl", "gradients.png"


def diagnose_gradients(
    recipe: SFTRecipe, console: Console, *, output: Path | None = None, steps: int | None = None
) -> list[dict[str, Any]]:
    """Train for the first `steps` updates of the recipe, by default for all of them; returns the
    lines of ``gradients.jsonl``, one an update, which it writes to the folder `output` with a
    picture of them.

    The schedule of the learning rate is that of the whole recipe. What training itself would keep
    is thrown away; results that an earlier measurement left in the folder are replaced. Raises
    `ForesightError`s.
    """
    last = recipe.train.max_steps
    if steps is not None and steps > last:
        raise RecipeError(
            f"--steps is {steps}, but train.max_steps is {last}; ask for fewer, or add --set "
            f"train.max_steps={steps}"
        )
    plan = check_recipe(recipe)
    folder = recipe.output / "gradients" if output is None else output
    folder.mkdir(parents=True, exist_ok=True)
    (folder / PICTURE).unlink(missing_ok=True)  # it would not be of the numbers beside it
    with TemporaryDirectory(dir=folder, prefix=".training-") as scratch:
        # The run of a recipe and its measurement must not take each other's folders for their own.
        recipe = recipe.model_copy(update={"output": Path(scratch)})
        run = RunFolder(recipe.output)
        set_seed(recipe.seed)
        start = start_policy(recipe, plan, run, console)
        media = media_processor(recipe.data, AutoProcessor.from_pretrained(start))
        policy = load_policy(start, dtype=getattr(torch, recipe.policy.dtype))
        measured = _Measured(folder / NUMBERS, GradientNorms(policy), steps or last)
        progress = TrainingProgress(console, recipe.name, steps)
        trainer = sft_trainer(
            recipe, plan, run, policy, media, console, [measured, progress], checkpoints=False
        )
        try:
            with measured.norms:
                trainer.train()
        finally:
            progress.stop()
    draw_gradients(measured.lines, folder / PICTURE)
    console.print(gradients_table(measured.lines))
    console.print(f"Norms of each update: {folder / NUMBERS}", soft_wrap=True)
    console.print(f"Picture: {folder / PICTURE}", soft_wrap=True)
    return measured.lines


class _Measured(TrainerCallback):
    """Writes down the norms of every update, and stops training after the last that is wanted."""

    def __init__(self, path: Path, norms: GradientNorms, steps: int) -> None:
        self.norms, self.lines = norms, list[dict[str, Any]]()
        self._path, self._steps = path, steps
        path.write_text("")

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        found = self.norms.take()
        line = {
            "step": state.global_step + 1,  # counted once the optimizer has made it
            "tokens": found.tokens,
            "norms": found.embeddings,
            "layers": found.layers,
            "lengths": found.lengths,
        }
        self.lines.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        control.should_training_stop |= state.global_step >= self._steps


def gradients_table(lines: Sequence[dict[str, Any]]) -> Table:
    """The norms at the input embeddings, in the first and in the last quarter of the updates, and
    how long the embeddings are in the last.
    """
    first, last = quarters(lines)
    table = Table(
        title=f"Gradient norms at the input embeddings, means over {len(lines)} updates",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("kind", no_wrap=True)
    for heading in ("tokens", "first quarter", "last quarter", "to question", "length"):
        table.add_column(heading, justify="right", no_wrap=True)
    question = mean_norm(last, "question")
    for kind, name in NAMES.items():
        tokens = sum(line["tokens"][kind] for line in lines) / len(lines)
        before, after = mean_norm(first, kind), mean_norm(last, kind)
        ratio = after / question if after is not None and question else None
        table.add_row(
            name,
            f"{tokens:.0f}",
            *("-" if norm is None else f"{norm:.2e}" for norm in (before, after)),
            "-" if ratio is None else f"x {ratio:.2f}",
            "-" if after is None else f"{mean_length(last, kind):.2f}",
        )
    return table

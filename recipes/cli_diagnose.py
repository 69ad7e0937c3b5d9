"""`foresight diagnose gradients`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from recipes.cli_base import Debug, RecipeFile, Settings, errors_shown, loading

diagnose_app = typer.Typer(no_args_is_help=True, help="Measure what goes on inside training.")


@diagnose_app.command("gradients")
def diagnose_gradients(
    recipe: RecipeFile,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder for the picture and its numbers; by default `gradients` in the recipe's "
            "output.",
            show_default=False,
        ),
    ] = None,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Stop after so many updates; by default the recipe's train.max_steps.",
            show_default=False,
        ),
    ] = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Train as an SFT recipe says, keep nothing of it, and draw how strongly the loss pulls on
    visual tokens, text and latents.
    """
    with errors_shown(debug):
        from recipes.loading import load_any_recipe
        from recipes.schema import SFTRecipe
        from rl.errors import RecipeError

        loaded = load_any_recipe(recipe, settings or [])
        if not isinstance(loaded, SFTRecipe):
            raise RecipeError(
                f"{recipe}: its stage is {loaded.stage}; `foresight diagnose gradients` measures "
                "the training of recipes of stage sft"
            )
        with loading():
            from recipes.diagnose.gradients import diagnose_gradients as measure
        measure(loaded, Console(), output=output, steps=steps)

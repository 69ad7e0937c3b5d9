"""`foresight rewards list` and `foresight rewards try`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from recipes.cli_base import Debug, errors_shown, write_figures

rewards_app = typer.Typer(no_args_is_help=True, help="Show rewards, and try one out.")


@rewards_app.command("list")
def rewards_list(debug: Debug = False) -> None:
    """Show the rewards that come with Foresight and those of installed packages."""
    with errors_shown(debug):
        with Console(stderr=True).status("importing rewards"):
            from recipes.rewards_list import OWN, rewards_table

            table = rewards_table()
        Console().print(table)
        Console().print(OWN, highlight=False)


@rewards_app.command("try")
def rewards_try(
    use: Annotated[
        str,
        typer.Argument(
            help="As in a recipe: a name, file.py:function or package.module:function.",
            show_default=False,
        ),
    ],
    on: Annotated[
        Path,
        typer.Option(
            "--on",
            metavar="PATH",
            help="A run, its folder of trajectories, or a JSONL file with questions and "
            "completions.",
            show_default=False,
        ),
    ],
    options: Annotated[
        list[str] | None,
        typer.Option("--option", metavar="KEY=VALUE", help="An option of the reward."),
    ] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many groups.")] = None,
    step: Annotated[
        int | None, typer.Option(help="Of a run; by default the newest recorded.")
    ] = None,
    timeout: Annotated[
        float | None, typer.Option(min=0.001, help="Deadline in seconds; by default as in a run.")
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write all rows and figures here as well.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Run a reward, as training would, on completions that a run recorded or that you wrote."""
    with errors_shown(debug):
        with Console(stderr=True).status("loading"):
            from recipes.rewards_command import try_reward
        trial = try_reward(
            use,
            on,
            options=options or [],
            limit=limit,
            step=step,
            timeout=timeout,
            console=Console(stderr=True),
        )
        trial.print(Console())
        write_figures(json_file, trial.to_dict())
    if trial.failed:
        raise typer.Exit(1)

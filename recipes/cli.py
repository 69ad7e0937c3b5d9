"""The command line. Imports that load torch stand inside the commands, so that ``--help`` is
immediate.
"""

from __future__ import annotations

from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from recipes.cli_base import Debug, RecipeFile, Settings, errors_shown, loading
from recipes.cli_diagnose import diagnose_app
from recipes.cli_evaluate import evaluate
from recipes.cli_rewards import rewards_app
from rollouts import vllm_cpu

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Reinforcement learning for video models that think in latents.",
)
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in the target.")]


def _print_version(wanted: bool) -> None:
    if wanted:
        try:
            typer.echo(f"foresight {version('foresight-rl')}")
        except PackageNotFoundError:
            typer.echo("foresight (run from its sources, not installed)")
        raise typer.Exit


@app.callback()
def main(
    show_version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    """Reinforcement learning for video models that think in latents."""
    vllm_cpu.install()  # before anything imports TRL, which imports a vLLM that it finds


@app.command()
def run(recipe: RecipeFile, settings: Settings = None, debug: Debug = False) -> None:
    """Do what a recipe says, or resume where that stopped."""
    with errors_shown(debug):
        from recipes.loading import load_any_recipe

        loaded = load_any_recipe(recipe, settings or [])
        with loading():
            from recipes.stages import run_stage
        _say(run_stage(loaded, Console()))


@app.command()
def select(recipe: RecipeFile, settings: Settings = None, debug: Debug = False) -> None:
    """Keep the rows in which seeing the intermediate frames helps to answer."""
    with errors_shown(debug):
        from recipes.loading import load_any_recipe

        loaded = load_any_recipe(recipe, settings or [])
        if loaded.stage != "select":
            raise typer.BadParameter(
                f"its stage is {loaded.stage}; `foresight select` runs recipes of stage select",
                param_hint=str(recipe),
            )
        with loading():
            from recipes.stages import run_stage
        _say(run_stage(loaded, Console()))


@app.command()
def check(
    recipe: RecipeFile,
    settings: Settings = None,
    memory: Annotated[
        bool,
        typer.Option("--memory", help="Estimate how much memory an update of training will take."),
    ] = False,
    debug: Debug = False,
) -> None:
    """Find what is wrong with a recipe, its data and its policy, before anything heavy starts."""
    with errors_shown(debug):
        from recipes.loading import load_any_recipe

        loaded = load_any_recipe(recipe, settings or [])
        with loading():
            from recipes.stages import check_stage

            lines = check_stage(loaded, memory=memory)
        typer.echo(f"{recipe}:")
        _say(lines)


app.command()(evaluate)
app.add_typer(rewards_app, name="rewards")
app.add_typer(diagnose_app, name="diagnose")


@app.command()
def keys(
    stage: Annotated[
        str | None, typer.Argument(help="sft, la_dapo, select or evaluate; by default all.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Every key of a recipe, with its default and what it means, in Markdown."""
    with errors_shown(debug):
        from recipes.keys import reference

        typer.echo(reference(None if stage is None else [stage]), nl=False)


@app.command("data")
def show_data(
    source: Annotated[
        str,
        typer.Argument(
            help="A file with rows, a folder of them, or a data set's name; :split may follow.",
            show_default=False,
        ),
    ],
    format: Annotated[
        str, typer.Option(help="How rows are written; auto: told by their columns.")
    ] = "auto",
    columns: Annotated[
        list[str] | None,
        typer.Option(metavar="OURS=THEIRS", help="A column of ours and what the rows call it."),
    ] = None,
    video_root: Annotated[Path | None, typer.Option(help="Where video paths start from.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many rows.")] = None,
    debug: Debug = False,
) -> None:
    """Look at a data set: what it is recognised as, rows as the model is asked, what is missing."""
    with errors_shown(debug):
        with loading():
            from recipes.data_command import show_data as show
        show(
            source,
            Console(),
            format=format,
            columns=columns or [],
            video_root=video_root,
            limit=limit,
        )


@app.command()
def export(
    source: Annotated[
        Path, typer.Argument(help="A run, a checkpoint or a policy.", show_default=False)
    ],
    target: Annotated[Path, typer.Argument(help="Folder to write to.", show_default=False)],
    base: Annotated[
        Path | None, typer.Option(help="Policy that LoRA adapters belong to, if it was moved.")
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="float32 or bfloat16; by default as it is.")
    ] = None,
    overwrite: Overwrite = False,
    debug: Debug = False,
) -> None:
    """Write a plain, verified policy folder."""
    if dtype not in (None, "float32", "bfloat16"):
        raise typer.BadParameter("choose float32 or bfloat16", param_hint="--dtype")
    with errors_shown(debug):
        with loading():
            import torch

            from rl.export import export_policy
        with Console(stderr=True).status("exporting"):
            kind = None if dtype is None else getattr(torch, dtype)
            path = export_policy(source, target, base=base, overwrite=overwrite, dtype=kind)
            from recipes.stages import where_policy
        _say(where_policy(str(path)))


@app.command()
def quickstart(
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/quickstart"),
    debug: Debug = False,
) -> None:
    """Teach a tiny video model to imagine, from video files to an exported policy, in minutes on a
    CPU.
    """
    with errors_shown(debug):
        with loading():
            from recipes.quickstart.main import run_quickstart
        run_quickstart(output, seed)


@app.command()
def study(
    seeds: Annotated[str, typer.Option(help="Of everything random, with commas.")] = "0,1,2",
    system: Annotated[
        Literal["future_l1", "video_latent", "depth_scaling"],
        typer.Option(help="Whose parts are compared."),
    ] = "future_l1",
    variants: Annotated[
        str | None,
        typer.Option(
            help="Rows of the table, with commas; by default all. future_l1: la_dapo, no_contrast, "
            "no_diversity, text_only, fixed_budget, published, published_scaled, no_noise. "
            "video_latent: direct, chain, self_forcing, no_injection, no_align, no_diversity, "
            "question, truncated, pause. depth_scaling: direct, chain, curriculum, replay, depth, "
            "both."
        ),
    ] = None,
    world: Annotated[
        Literal["tiles", "balls"], typer.Option(help="One ball on a board of tiles, or two.")
    ] = "tiles",
    output: Annotated[
        Path, typer.Option(help="Folder to write to, one inside for each world.")
    ] = Path("runs/study"),
    debug: Debug = False,
) -> None:
    """A system's recipes and their ablations on a world that a laptop can learn."""
    with errors_shown(debug):
        with loading():
            from recipes.study.main import run_study
        chosen = None if variants is None else variants.split(",")
        try:
            numbers = [int(seed) for seed in seeds.split(",")]
        except ValueError as error:
            raise typer.BadParameter(
                "give whole numbers, as in 0,1,2", param_hint="--seeds"
            ) from error
        run_study(output, numbers, chosen, Console(), world=world, system=system)


def _say(lines: list[str]) -> None:
    for line in lines:
        typer.echo(line)

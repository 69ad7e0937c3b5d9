"""The command line. Imports that load torch stand inside the commands, so that ``--help`` is
immediate.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from rollouts import vllm_cpu

app = typer.Typer(
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_show_locals=False,
    help="Reinforcement learning for video models that think in latents.",
)

rewards_app = typer.Typer(no_args_is_help=True, help="Show rewards, and try one out.")
app.add_typer(rewards_app, name="rewards")

_USER_MISTAKES = (
    "RecipeError",
    "DataError",
    "VideoError",
    "ProtocolError",
    "PolicyError",
    "ObjectiveError",
    "CheckpointError",
)

RecipeFile = Annotated[Path, typer.Argument(help="A recipe in YAML.", show_default=False)]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Change a key, as in train.max_steps=60."),
]
Debug = Annotated[bool, typer.Option("--debug", help="Show the traceback of an error.")]
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
    """Train what a recipe says, or resume where that stopped."""
    with _errors(debug):
        from recipes.loading import load_recipe

        loaded = load_recipe(recipe, settings or [])
        with _loading():
            from recipes.run import run_recipe
        _announce(run_recipe(loaded, Console()).policy)


@app.command()
def check(
    recipe: RecipeFile,
    settings: Settings = None,
    memory: Annotated[
        bool, typer.Option("--memory", help="Estimate how much memory an update will take.")
    ] = False,
    debug: Debug = False,
) -> None:
    """Find what is wrong with a recipe, its data and its policy, before anything heavy starts."""
    estimate = None
    with _errors(debug):
        from recipes.loading import load_recipe

        loaded = load_recipe(recipe, settings or [])
        with _loading():
            from recipes.check import check_recipe

            plan = check_recipe(loaded)
            if memory:
                from recipes.memory import recipe_memory

                estimate = recipe_memory(loaded, plan)
    rows = {"training": plan.train, "validation": plan.validation, "evaluation": plan.evaluation}
    counts = ", ".join(f"{len(samples)} for {name}" for name, samples in rows.items() if samples)
    for warning in plan.warnings:
        typer.echo(f"note: {warning}")
    typer.echo(f"{recipe} is fine: rows {counts}; runs to {loaded.output}")
    if plan.engine is not None:
        typer.echo(str(plan.engine))
    if estimate is not None:
        typer.echo(str(estimate))


@app.command()
def evaluate(
    policy: Annotated[
        Path, typer.Argument(help="A policy folder or a finished run.", show_default=False)
    ],
    data: Annotated[Path, typer.Option(help="Manifest to evaluate on.", show_default=False)],
    modes: Annotated[
        str, typer.Option(help="Of free, always and never: whether answers imagine.")
    ] = "free,always,never",
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many rows.")] = None,
    by: Annotated[str | None, typer.Option(help="Manifest column to break down by.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens in an answer.")] = 2048,
    frames: Annotated[int, typer.Option(min=1, help="Frames shown of rows that list none.")] = 16,
    video_root: Annotated[Path | None, typer.Option(help="Where video paths start from.")] = None,
    system_prompt: Annotated[str | None, typer.Option(help="Opens every prompt.")] = None,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"],
        typer.Option(help="What samples; auto: vllm on GPUs, if installed."),
    ] = "auto",
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here as well.")
    ] = None,
    debug: Debug = False,
) -> None:
    """Greedy accuracy of a policy: imagining left free, forced and forbidden."""
    with _errors(debug):
        with _loading():
            from recipes.evaluate_command import evaluate_policy
        evaluation = evaluate_policy(
            policy,
            data,
            modes=modes.split(","),
            workers=workers,
            limit=limit,
            by=by,
            max_new_tokens=max_new_tokens,
            default_frames=frames,
            video_root=video_root,
            system_prompt=system_prompt,
            engine=engine,
            console=Console(),
        )
        Console().print(evaluation.table())
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(evaluation.to_dict(), indent=2) + "\n")


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
    with _errors(debug):
        with _loading():
            import torch

            from rl.export import export_policy
        with Console(stderr=True).status("exporting"):
            kind = None if dtype is None else getattr(torch, dtype)
            path = export_policy(source, target, base=base, overwrite=overwrite, dtype=kind)
        _announce(path)


@app.command()
def quickstart(
    seed: Annotated[int, typer.Option(help="Of everything random.")] = 0,
    output: Annotated[Path, typer.Option(help="Folder to write to.")] = Path("runs/quickstart"),
    debug: Debug = False,
) -> None:
    """Teach a tiny video model to imagine, from video files to an exported policy, in minutes on a
    CPU.
    """
    with _errors(debug):
        with _loading():
            from recipes.quickstart.main import run_quickstart
        run_quickstart(output, seed)


@rewards_app.command("list")
def rewards_list(debug: Debug = False) -> None:
    """Show the rewards that come with Foresight and those of installed packages."""
    with _errors(debug):
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
    with _errors(debug):
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
        if json_file is not None:
            json_file.parent.mkdir(parents=True, exist_ok=True)
            json_file.write_text(json.dumps(trial.to_dict(), indent=2) + "\n")
    if trial.failed:
        raise typer.Exit(1)


@contextmanager
def _loading() -> Iterator[None]:
    """torch, transformers and TRL take seconds to load; say so meanwhile. Their chatter is left
    out.
    """
    with Console(stderr=True).status("loading"):
        from transformers.utils import logging

        import rl  # noqa: F401 - before transformers, for the sake of torchvision

        logging.set_verbosity_error()
        logging.disable_progress_bar()
        yield


@contextmanager
def _errors(debug: bool) -> Iterator[None]:
    """Turn errors raised on purpose into one message and an exit code: 2 for what the user can
    correct, else 1.
    """
    try:
        yield
    except KeyboardInterrupt:
        typer.echo("stopped; a run goes on from its last checkpoint when started again", err=True)
        raise typer.Exit(130) from None
    except Exception as error:
        from rl import errors  # here, because it loads torch

        if debug or not isinstance(error, errors.ForesightError):
            raise
        mistakes = tuple(getattr(errors, name) for name in _USER_MISTAKES)
        console = Console(stderr=True, soft_wrap=True, highlight=False)
        console.print("error", style="bold red", end=": ")
        console.print(str(error), markup=False)
        raise typer.Exit(2 if isinstance(error, mistakes) else 1) from None


def _announce(policy: Path) -> None:
    typer.echo(f"The policy is in {policy}. To load it:")
    typer.echo(f'    from rl import load_policy; policy = load_policy("{policy}")')

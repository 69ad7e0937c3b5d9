"""`foresight evaluate`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.console import Console

from recipes.cli_base import Debug, Settings, errors_shown, loading, write_figures


def evaluate(
    context: typer.Context,
    what: Annotated[
        str,
        typer.Argument(
            metavar="POLICY|RECIPE",
            help="A policy folder, a finished run, a plain video model (a folder, or its name on "
            "the Hub), or a recipe of stage evaluate.",
            show_default=False,
        ),
    ],
    data: Annotated[
        str | None, typer.Option(help="Rows to evaluate a policy on.", show_default=False)
    ] = None,
    benchmark: Annotated[
        str | None,
        typer.Option(
            help="What they are: futurebench, twiff_bench, mvbench, next_qa or video_mme; by "
            "default one's own, scored by the accuracy rule."
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            help="Of free, always and never: whether answers imagine; by default all, of a "
            "benchmark free, and never for a plain model."
        ),
    ] = None,
    workers: Annotated[int, typer.Option(min=1, help="Ray workers.")] = 1,
    limit: Annotated[int | None, typer.Option(min=1, help="First so many rows.")] = None,
    by: Annotated[str | None, typer.Option(help="Column to break figures down by.")] = None,
    max_new_tokens: Annotated[
        int | None,
        typer.Option(min=1, help="Most tokens in an answer; by default the benchmark's, or 2048."),
    ] = None,
    frames: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Frames shown of rows that list none; by default the benchmark's, or 16.",
        ),
    ] = None,
    fps: Annotated[
        float | None, typer.Option(help="So many frames a second, at most --frames.")
    ] = None,
    video_root: Annotated[Path | None, typer.Option(help="Where video paths start from.")] = None,
    bad_videos: Annotated[
        Literal["stop", "skip"], typer.Option(help="What becomes of videos that cannot be read.")
    ] = "stop",
    system_prompt: Annotated[str | None, typer.Option(help="Opens every prompt.")] = None,
    engine: Annotated[
        Literal["auto", "transformers", "vllm"],
        typer.Option(help="What samples; auto: vllm on GPUs, if installed."),
    ] = "auto",
    judge_url: Annotated[
        str | None, typer.Option(help="OpenAI-compatible server of a benchmark's judge, up to /v1.")
    ] = None,
    judge_model: Annotated[str | None, typer.Option(help="The judge's model there.")] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            help="Folder to keep predictions, figures and tables in; a killed evaluation goes on "
            "from it."
        ),
    ] = None,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here as well.")
    ] = None,
    settings: Settings = None,
    debug: Debug = False,
) -> None:
    """Figures of a policy: greedy answers to one's own rows or to benchmarks."""
    is_recipe = what.endswith((".yaml", ".yml"))
    if is_recipe:
        _require_no_options(context, besides=("what", "settings", "json_file", "debug"))
    elif data is None:
        raise typer.BadParameter("give the rows to evaluate the policy on", param_hint="--data")
    elif settings:
        raise typer.BadParameter("changes a key of a recipe, not of a policy", param_hint="--set")
    with errors_shown(debug):
        if is_recipe:
            from recipes.loading import load_any_recipe
            from recipes.schema import EvaluateRecipe

            loaded = load_any_recipe(what, settings or [])
            if not isinstance(loaded, EvaluateRecipe):
                raise typer.BadParameter(
                    f"its stage is {loaded.stage}; `foresight evaluate` runs recipes of stage "
                    "evaluate, `foresight run` those of any",
                    param_hint=what,
                )
            with loading():
                from recipes.evaluation.run import PREDICTIONS, RESULTS, TABLE, run_evaluation
            done = run_evaluation(loaded, Console())
            typer.echo(f"In {done.output}: {PREDICTIONS}/, {RESULTS} and {TABLE}")
            figures = {name: e.to_dict() for name, e in done.evaluations.items()}
        else:
            with loading():
                from recipes.evaluation.command import evaluate_policy
            judge = {"base_url": judge_url, "model": judge_model}
            judge = {name: value for name, value in judge.items() if value is not None}
            figures = evaluate_policy(
                what,
                data or "",
                benchmark=benchmark,
                modes=modes.split(",") if modes else None,
                workers=workers,
                limit=limit,
                by=by,
                max_new_tokens=max_new_tokens,
                frames=frames,
                fps=fps,
                video_root=video_root,
                bad_videos=bad_videos,
                system_prompt=system_prompt,
                engine=engine,
                judge=judge or None,
                output=output,
                console=Console(),
            ).to_dict()
        write_figures(json_file, figures)


def _require_no_options(context: typer.Context, besides: Sequence[str]) -> None:
    """Options that a recipe would silently win over."""
    given = [
        f"--{name.replace('_', '-')}"
        for name in context.params
        if name not in besides
        and getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise typer.BadParameter(
            "a recipe says this itself; change it there, or with --set", param_hint=given
        )

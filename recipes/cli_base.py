"""What the commands share: options, errors as messages, and a sign while torch loads."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

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


@contextmanager
def loading() -> Iterator[None]:
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
def errors_shown(debug: bool) -> Iterator[None]:
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


def write_figures(path: Path | None, figures: Any) -> None:
    """Write `figures` as JSON to the file of ``--json``, if that was given."""
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(figures, indent=2) + "\n")

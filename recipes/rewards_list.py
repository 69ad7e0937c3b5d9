"""`foresight rewards list`: which rewards there are."""

from __future__ import annotations

import sys

from rich import box
from rich.table import Table
from rich.text import Text

from rewards.functions import Signature, installed, load, read_signature
from rewards.look import look
from rewards.registry import BUILTIN, SHAPING_WEIGHT
from rl.errors import RecipeError

OWN = (
    "Your own reward needs no package: write file.py:function, or package.module:function, in the "
    "place of a name."
)


def rewards_table() -> Table:
    """The rewards that come with Foresight and those of installed packages.

    The latter are imported in processes of their own; one whose import fails is shown with why.
    """
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
    table.add_column("reward", style="bold", no_wrap=True)
    table.add_column("decides")
    table.add_column("weight", justify="right")
    table.add_column("range", no_wrap=True)
    table.add_column("what it looks at (options)", overflow="fold")
    for name, builtin in BUILTIN.items():
        function = load(builtin.target)
        table.add_row(
            _named(name, "built in"),
            "shaping" if builtin.shaping else "outcome",
            f"{builtin.weight:g}",
            _span(builtin.span({})),
            # What their functions say is about columns; what is rewarded, their modules say.
            _described(
                _sentence(sys.modules[function.__module__].__doc__), read_signature(function)
            ),
        )
    points = installed()
    for point, found in zip(points, look([point.value for point in points]), strict=True):
        name = _named(point.name, point.dist.name if point.dist else point.value)
        if isinstance(found, RecipeError):
            why = str(found).splitlines()[0].removeprefix(f"{point.value} ")
            table.add_row(name, "", "", "", Text(why, style="red"))
            continue
        about = _described(_sentence(found.summary), found)
        if point.name in BUILTIN:
            about.append(f"\nhidden by the built-in one; use {point.value}", style="yellow")
        table.add_row(name, "shaping", f"{SHAPING_WEIGHT:g}", _span(found.range), about)
    return table


def _named(name: str, origin: str) -> Text:
    return Text.assemble(name, (f"\n{origin}", "not bold dim"))


def _described(summary: str, signature: Signature) -> Text:
    text = Text(summary)
    needed = [name for name, default in signature.options.items() if default is None]
    others = [f"{n}={default}" for n, default in signature.options.items() if default is not None]
    parts = [f"needed: {', '.join(needed)}"] if needed else []
    parts += [", ".join(others)] if others else []
    if parts:
        text.append(f"{chr(10) if summary else ''}({'; '.join(parts)})", style="dim")
    return text


def _sentence(text: str | None) -> str:
    """The first sentence of a docstring."""
    words = " ".join((text or "").strip().split("\n\n")[0].split())
    ends = [words.find(end) + 1 for end in (". ", "? ", "! ") if end in words]
    return words[: min(ends)] if ends else words


def _span(span: tuple[float, float] | None) -> str:
    return "any" if span is None else f"{span[0]:g} to {span[1]:g}"

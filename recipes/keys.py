"""All keys of all recipes, as docs/keys.md and `foresight keys` show them."""

from __future__ import annotations

from collections.abc import Iterator
from enum import Enum
from pathlib import Path
from typing import Any, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

from recipes.loading import STAGES
from rl.errors import RecipeError

INTRODUCTION = """\
# All keys of a recipe

Written by `foresight keys > docs/keys.md` from the schema, which is the one place of every
default. `N` counts the entries of a list from 0. "needed" keys have no default; those of a section
that is null are needed only where the section is given.
"""


def reference(stages: list[str] | None = None) -> str:
    """The keys of these stages, by default of all, with defaults and descriptions, in Markdown.
    Raises `RecipeError` for an unknown stage.
    """
    if unknown := [stage for stage in stages or [] if stage not in STAGES]:
        raise RecipeError(f"no stage is called {unknown[0]!r}; there are {', '.join(STAGES)}")
    parts = [INTRODUCTION]
    for stage in stages or list(STAGES):
        lines = [f"| `{key}` | {default} | {what} |" for key, default, what in _keys(STAGES[stage])]
        parts.append(f"## `stage: {stage}`\n\n| key | default | |\n|---|---|---|\n")
        parts[-1] += "\n".join(lines) + "\n"
    return "\n".join(parts)


def _keys(model: type[BaseModel], prefix: str = "") -> Iterator[tuple[str, str, str]]:
    """Dotted key, default and description of every key, sections before what is in them."""
    for name, field in model.model_fields.items():
        section, many = _section(field.annotation)
        default = field.get_default(call_default_factory=True)
        shown = _shown(default)
        if default is PydanticUndefined and not (section and not many):
            shown = "needed"
        if field.description or not section:
            text = (field.description or "").replace("|", "\\|")
            yield prefix + name, shown, text
        if section is not None:
            yield from _keys(section, f"{prefix}{name}.{'N.' if many else ''}")


def _shown(default: Any) -> str:
    if default is PydanticUndefined:
        return ""
    if default is None:
        return "`null`"
    if isinstance(default, bool):
        return f"`{str(default).lower()}`"
    first = default[0] if isinstance(default, list) and default else default
    if isinstance(first, BaseModel | Path):
        return ""  # the keys below say more, or the description does
    if isinstance(default, list):
        return f"`[{', '.join(map(str, default))}]`"
    return f"`{default.value if isinstance(default, Enum) else default}`"


def _section(annotation: Any) -> tuple[type[BaseModel] | None, bool]:
    """The section in an annotation, if any, and whether a list of them is meant."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation, False
    many = get_origin(annotation) is list
    for inner in get_args(annotation):
        section, nested = _section(inner)
        if section is not None:
            return section, many or nested
    return None, False

"""Where reward functions come from: Foresight itself, a user's file, an installed package.

`find` only looks; nothing of a user's is imported by it. `load` imports, and is called in the
process that runs the reward (`rewards.host`), never in the trainer's.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

from rewards.batch import COLUMNS
from rl.errors import RecipeError

ENTRY_POINTS = "foresight.rewards"


@dataclass(frozen=True)
class Source:
    """Where a reward is: `target` is "package.module:name", or "/folder/file.py:name"."""

    target: str
    origin: str  # for people: "built in", the file, or the package

    @property
    def attribute(self) -> str:
        return self.target.rpartition(":")[2]


@dataclass(frozen=True)
class Signature:
    """What a reward takes and says of itself, as plain values.

    `columns` are the keywords it names that may be columns, `required` those of them without a
    default, `options` what a recipe may set, with the default as text (None if it must be set),
    `keywords` whether it takes any further column, `made` whether it is a class, whose options are
    those of its making. `range` is an attribute it may have.

    A keyword-only parameter with a default is an option and never a column, unless it has the name
    of one of Foresight's; any other parameter with a default may be either.
    """

    columns: tuple[str, ...]
    required: tuple[str, ...]
    options: dict[str, str | None]
    keywords: bool
    made: bool = False
    range: tuple[float, float] | None = None
    summary: str = ""

    def wants(self, column: str) -> bool:
        """Whether to send it a column. `trajectories` are large: only to those that name them."""
        if column in self.columns:
            return True
        option = column in self.options and not self.made
        return self.keywords and not option and column != "trajectories"

    @property
    def settable(self) -> list[str]:
        """What a recipe may give as an option: a column of the manifest too, which is then the same
        for all trajectories.
        """
        columns = [] if self.made else [n for n in self.required if n not in COLUMNS]
        return [*self.options, *columns]


def find(use: str, folder: Path, builtin: Mapping[str, str]) -> Source:
    """The source that a recipe's `use` names; paths start from `folder`.

    ``name`` is built in (`builtin` maps names to targets) or an entry point of the group
    ``foresight.rewards``; ``file.py:name`` a file; ``package.module:name`` a module that can be
    imported. Raises `RecipeError` for a name that nobody has and a file that is not there.
    """
    where, colon, attribute = use.rpartition(":")
    if not colon:
        return _by_name(use, builtin)
    if not where or not attribute.isidentifier():
        raise RecipeError(f"{use!r} names no reward; write file.py:function or package:function")
    if not where.endswith(".py"):
        return Source(use, where.partition(".")[0])
    file = Path(folder, Path(where).expanduser()).resolve()
    if not file.is_file():
        raise RecipeError(f"{use!r}: there is no file {file}; paths start from the recipe's folder")
    return Source(f"{file}:{attribute}", str(file))


def _by_name(name: str, builtin: Mapping[str, str]) -> Source:
    if name in builtin:
        return Source(builtin[name], "built in")
    offered = [point for point in installed() if point.name == name]
    if len({point.value for point in offered}) > 1:
        packages = sorted(_package(point) for point in offered)
        raise RecipeError(
            f"several packages offer a reward {name!r}: {', '.join(packages)}; write the one you "
            f"mean as package.module:function, such as {offered[0].value}"
        )
    if offered:
        return Source(offered[0].value, _package(offered[0]))
    known = sorted({*builtin, *(point.name for point in installed())})
    close = get_close_matches(name, known, n=1)
    hint = f"did you mean {close[0]!r}? " if close else ""
    raise RecipeError(
        f"unknown reward {name!r}; {hint}known: {known}; one of your own is file.py:function or "
        "package.module:function"
    )


def installed() -> list[EntryPoint]:
    """What installed packages offer, by name. Reads metadata and imports nothing."""
    return sorted(entry_points(group=ENTRY_POINTS), key=lambda point: point.name)


def _package(point: EntryPoint) -> str:
    return point.dist.name if point.dist is not None else point.value


def load(target: str) -> Any:
    """Import the function or class at `target`. Raises whatever its import raises.

    A file is imported under a name of its own, so that it hides no installed module; its folder
    comes last on the path, so that it may import its neighbours and hides nothing either.
    """
    where, _, attribute = target.rpartition(":")
    if where.endswith(".py"):
        name = f"_foresight_reward_{Path(where).stem}"
        spec = importlib.util.spec_from_file_location(name, where)
        assert spec is not None and spec.loader is not None  # a path that ends in .py has both
        module = importlib.util.module_from_spec(spec)
        sys.modules[name] = module  # dataclasses and pickle look a module up there
        sys.path.append(str(Path(where).parent))
        spec.loader.exec_module(module)
    else:
        module = importlib.import_module(where)
    found = getattr(module, attribute, None)
    if not callable(found):
        near = [n for n in vars(module) if callable(getattr(module, n)) and not n.startswith("_")]
        what = "has no" if found is None else "holds no function or class"
        hint = get_close_matches(attribute, near, n=1) or near[:5]
        raise AttributeError(f"{where} {what} {attribute!r}; it has {', '.join(hint) or 'none'}")
    return found


def read_signature(function: Any) -> Signature:
    """What a reward function or class takes. Raises `TypeError` for a class that is no reward."""
    is_class = inspect.isclass(function)
    if is_class and "__call__" not in vars(function) and not _inherits_call(function):
        raise TypeError(f"class {function.__name__} has no __call__, so it cannot score anything")
    call = inspect.signature(function.__call__ if is_class else function).parameters
    variable = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)
    named = [p for p in call.values() if p.name != "self" and p.kind not in variable]
    if positional := [p.name for p in named if p.kind is p.POSITIONAL_ONLY]:
        raise TypeError(f"parameters {positional} are positional only; rewards get keywords")
    keywords = any(p.kind is p.VAR_KEYWORD for p in call.values())
    if is_class:
        made = inspect.signature(function).parameters.values()
        options = [p for p in made if p.kind not in variable]
        columns = named
    else:
        options = [p for p in named if p.default is not p.empty and p.name not in COLUMNS]
        columns = [p for p in named if p not in options or p.kind is not p.KEYWORD_ONLY]
    span = getattr(function, "range", None)
    return Signature(
        columns=tuple(p.name for p in columns),
        required=tuple(p.name for p in named if p.default is p.empty),
        options={p.name: None if p.default is p.empty else str(p.default) for p in options},
        keywords=keywords,
        made=is_class,
        range=None if span is None else (float(span[0]), float(span[1])),
        summary=(inspect.getdoc(function) or "").split("\n")[0],
    )


def _inherits_call(kind: type) -> bool:
    return any("__call__" in vars(base) for base in kind.__mro__[1:-1])

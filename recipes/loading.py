"""From a YAML file and `--set` values to a `Recipe`, or one message with everything that is
wrong.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import BaseModel, TypeAdapter, ValidationError

from recipes.schema import EvaluateRecipe, LADAPORecipe, RecipeBase, SelectRecipe, SFTRecipe
from rl.errors import RecipeError

Recipe = LADAPORecipe | SFTRecipe  # of the stages that train
STAGES: dict[str, type[RecipeBase]] = {
    "sft": SFTRecipe,
    "la_dapo": LADAPORecipe,
    "select": SelectRecipe,
    "evaluate": EvaluateRecipe,
}
_SHOWN = 12  # problems in one message: it should fit a screen


def load_recipe(path: str | Path, overrides: Sequence[str] = ()) -> Recipe:
    """Read the recipe of a stage that trains, as `load_any_recipe` does."""
    recipe = load_any_recipe(path, overrides)
    if not isinstance(recipe, Recipe):
        raise RecipeError(
            f"{path}: stage {recipe.stage!r} trains nothing; start it with `foresight run`"
        )
    return recipe


def load_any_recipe(path: str | Path, overrides: Sequence[str] = ()) -> RecipeBase:
    """Read a recipe; `overrides` are ``a.b=value`` with a value in YAML, as if written in the file.

    Raises `RecipeError` that lists every problem with its key.
    """
    file = Path(path)
    try:
        values = yaml.load(file.read_text(encoding="utf-8"), _UniqueKeys)
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file in UTF-8"
        raise RecipeError(
            f"{path}: the recipe cannot be read ({reason}); check the path"
        ) from error
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not valid YAML; correct it here: {_one_line(error)}") from error
    if not isinstance(values, dict):
        raise RecipeError(f"{path}: a recipe is a mapping of keys to values, not {_given(values)}")
    for override in overrides:
        _override(values, override)
    return parse_recipe(values, source=str(path), folder=file.absolute().parent)


def parse_recipe(values: Mapping[str, Any], *, source: str, folder: Path) -> RecipeBase:
    """Check the values of a recipe; `source` opens messages, relative paths start from `folder`."""
    stage = values.get("stage")
    if not isinstance(stage, str) or stage not in STAGES:
        given = "is missing" if stage is None else f"is {stage!r}"
        raise RecipeError(f"{source}: stage {given}; write one of {', '.join(STAGES)}")
    model = STAGES[stage]
    try:
        recipe = model.model_validate(values, context={"folder": folder})
    except ValidationError as error:
        found = [_problem(model, dict(details)) for details in error.errors(include_url=False)]
        problems = list({line.split(":")[0]: line for line in reversed(found)}.values())[::-1]
    else:
        problems = list(_extra_problems(recipe))
        if not problems:
            return recipe
    shown = problems[:_SHOWN]
    if left := len(problems) - len(shown):
        shown.append(f"... and {left} more")
    count = "a problem" if len(problems) == 1 else f"{len(problems)} problems"
    raise RecipeError("\n  ".join([f"{source}: {count} in the recipe", *shown]))


def dump_recipe(recipe: RecipeBase) -> str:
    """The recipe with all its defaults, as YAML."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False, allow_unicode=True)


class _UniqueKeys(yaml.SafeLoader):
    """YAML lets a repeated key win silently; here it is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            if key_node.value in seen:
                raise yaml.constructor.ConstructorError(
                    problem=f"key {key_node.value!r} appears twice",
                    problem_mark=key_node.start_mark,
                )
            seen.add(key_node.value)
        return super().construct_mapping(node, deep)


def _override(values: dict[str, Any], text: str) -> None:
    key, equals, value = text.partition("=")
    path = key.strip().split(".")
    if not equals or not all(path):
        raise RecipeError(f"--set {text}: write key=value, such as train.max_steps=60")
    try:
        parsed = yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise RecipeError(
            f"--set {text}: the value is not valid YAML; {_one_line(error)}"
        ) from error
    here: Any = values
    for place, step in enumerate(path):
        last = place == len(path) - 1
        if isinstance(here, list) and step.isdigit() and int(step) < len(here):
            index: Any = int(step)
        elif isinstance(here, dict):
            index = step
            if not last and here.get(step) is None:
                here[step] = {}
        else:
            raise RecipeError(f"--set {text}: {'.'.join(path[:place])} has no key {step!r}")
        if last:
            here[index] = parsed
        here = here[index]


def _problem(model: type[BaseModel], details: dict[str, Any]) -> str:
    """One line: dotted key, what is wrong, what to do."""
    loc = _location(model, details["loc"])
    key = ".".join(str(part) for part in loc)
    if details["type"] == "extra_forbidden":
        return f"{key}: unknown key; {_suggestion(model, loc)}"
    if details["type"] == "missing":
        field = _model_at(model, loc[:-1]).model_fields[str(loc[-1])]
        return f"{key}: missing; {field.description or 'add this section'}"
    if details["type"] == "value_error":
        return f"{key}: {details['ctx']['error']}"
    expected = details["msg"].removeprefix("Input should be ").split(", unable")[0]
    return f"{key}: must be {expected}, got {_given(details['input'])}"


def _location(model: type[BaseModel], loc: Sequence[Any]) -> tuple[Any, ...]:
    """Without the names of alternatives that pydantic puts where a value may have several types."""
    known = set(_dotted(model))
    parts: list[Any] = []
    for place, part in enumerate(loc):
        names = [str(p) for p in (*parts, part) if not isinstance(p, int)]
        here = ".".join(names)
        parent = ".".join(names[:-1])
        free = parent in known and not any(k.startswith(parent + ".") for k in known)
        if isinstance(part, int) or here in known or (place == len(loc) - 1 and not free):
            parts.append(part)
    return tuple(parts)


def _suggestion(model: type[BaseModel], loc: tuple[Any, ...]) -> str:
    known = list(_model_at(model, loc[:-1]).model_fields)
    if close := get_close_matches(str(loc[-1]), known, n=1):
        return f"did you mean {close[0]!r}?"
    if elsewhere := [k for k in _dotted(model) if k.rpartition(".")[2] == loc[-1]]:
        return f"did you mean {elsewhere[0]!r}?"
    return f"known here: {', '.join(known)}"


def _model_at(model: type[BaseModel], loc: Sequence[Any]) -> type[BaseModel]:
    """The section that holds the keys at `loc`."""
    for part in loc:
        if isinstance(part, str) and part in model.model_fields:
            model = _section(model.model_fields[part].annotation) or model
    return model


def _dotted(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield prefix + name
        if section := _section(field.annotation):
            yield from _dotted(section, f"{prefix}{name}.")


def _section(annotation: Any) -> type[BaseModel] | None:
    """The section inside ``Section``, ``Section | None`` or ``list[Section]``."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next(filter(None, map(_section, get_args(annotation))), None)


def _extra_problems(recipe: RecipeBase) -> Iterator[str]:
    """What is wrong with `train.extra`: unknown arguments, wrong types, and what has a key of its
    own.
    """
    if not isinstance(recipe, Recipe) or not recipe.train.extra:
        return
    from recipes.configs import config_class  # here, because it loads the trainers

    types = {
        name: field.type
        for name, field in config_class(recipe).__dataclass_fields__.items()
        if field.init
    }
    own = {argument: key for key, argument in recipe.train.RENAMED.items()}
    own |= {a: a for a in recipe.train.arguments() if a not in own}
    for name, value in recipe.train.extra.items():
        key = f"train.extra.{name}"
        if name in types and name in _SET_BY_RUN:
            yield f"{key}: Foresight sets this itself; {_SET_BY_RUN[name]}"
        elif name in types and name in _NOT_OURS:
            yield f"{key}: not supported; {_NOT_OURS[name]}"
        elif name in own:
            yield f"{key}: the recipe has a key for this; write train.{own[name]}"
        elif name not in types:
            close = get_close_matches(name, types, n=1)
            hint = f"did you mean {close[0]!r}?" if close else "it names no argument of the trainer"
            yield f"{key}: unknown argument; {hint}"
        elif not _fits(value, types[name]):
            yield f"{key}: must be {types[name]}, got {_given(value)}"


# Arguments a run decides by itself, and what to do instead.
_SET_BY_RUN = {
    "output_dir": "write output",
    "seed": "write seed",
    "per_device_train_batch_size": "write train.micro_batch",
    "gradient_accumulation_steps": "write train.micro_batch",
    "bf16": "it follows from the machine",
    "use_cpu": "it follows from the machine",
    "fp16": "it follows from the machine",
    "disable_tqdm": "leave it out",
    "media_cache_gb": "write data.media_cache_gb",
    "save_strategy": "write train.save_every",
    "reward_weights": "write rewards with their weights",
}
# Arguments of a trainer that would break a run or do nothing in it, and why.
_SAMPLING = (
    "trajectories are sampled and scored without it; of sampling, write train.temperature, "
    "train.top_p or train.top_k"
)
_ENTROPY = "LA-DAPO's objective has no entropy term; leave it out"
_NOT_OURS = {
    "save_only_model": "a run could not be resumed; leave it out",
    "load_best_model_at_end": "the policy of the last step is what a run exports; leave it out",
    "sync_ref_model": "the reference stays the policy that the run starts from; leave it out",
    "generation_kwargs": _SAMPLING,
    "repetition_penalty": _SAMPLING,
    "min_p": _SAMPLING,
    "entropy_coef": _ENTROPY,
    "use_adaptive_entropy": _ENTROPY,
    "entropy_coef_min": _ENTROPY,
    "entropy_coef_max": _ENTROPY,
    "entropy_coef_delta": _ENTROPY,
    "entropy_target": _ENTROPY,
}


def _fits(value: Any, declared: Any) -> bool:
    """Whether a value fits a dataclass annotation, as far as pydantic can judge it."""
    namespace = {"Any": Any}
    try:
        adapter = TypeAdapter(eval(declared, namespace) if isinstance(declared, str) else declared)
    except NameError:  # a type of transformers' own: its config checks it
        return True
    try:
        adapter.validate_python(value)
    except ValidationError:
        return False
    return True


def _given(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _one_line(error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
        mark = error.problem_mark
        return f"line {mark.line + 1}, column {mark.column + 1}: {error.problem}"
    return " ".join(str(error).split())

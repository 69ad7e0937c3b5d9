"""Rewards by name: what a recipe's `rewards:` list turns into."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from rewards.batch import COLUMNS
from rewards.functions import Signature, find, load, read_signature
from rewards.terms import RewardTerm
from rl.errors import RecipeError

Range = tuple[float, float]
SPEC_KEYS = (
    "use", "name", "weight", "options", "outcome", "range", "timeout_s", "memory_mb", "gpus",
)  # fmt: skip
OUTCOME_WEIGHT, SHAPING_WEIGHT = 0.9, 0.1  # of what has no weight of its own
# Limits of a user's reward, which stop a mistake before it stops the machine.
PLUGIN_TIMEOUT = 60.0  # seconds
PLUGIN_MEMORY = 8192  # MiB
# Options of built-in rewards that are paths; in a recipe they start from its folder.
PATH_OPTIONS = {"judge": ("template", "cache"), "latent_alignment": ("policy",)}
# Options that say where and how a judge is reached; they may change while a run is interrupted.
SERVING_OPTIONS = (
    "base_url", "api_key_env", "concurrency", "retries", "timeout_s", "patience_s", "cache",
)  # fmt: skip


@dataclass(frozen=True)
class BuiltinReward:
    """A reward that comes with Foresight, and what holds if the recipe says nothing else.

    `range` of its values may depend on its options. `alone`: it waits for others or may take long,
    so it has a process of its own; the formulas share one.
    """

    target: str
    weight: float
    range: Range | Callable[[Mapping[str, Any]], Range]
    shaping: bool = True
    alone: bool = False
    timeout_s: float = 60.0

    def span(self, options: Mapping[str, Any]) -> Range:
        return self.range(options) if callable(self.range) else self.range


def _contrastive_range(options: Mapping[str, Any]) -> Range:
    published = options.get("scale") == "published"
    return 0.0, max(1.0, 1.0 / options.get("temperature", 0.5)) if published else 1.0


# The weights are LA-DAPO's (OpenGVLab/Future-L1) but for repetition and length, which have none
# there; of temporal order it is T-GRPO's bonus.
BUILTIN: dict[str, BuiltinReward] = {
    "accuracy": BuiltinReward(
        "rewards.accuracy:accuracy_rewards", 0.9, (0.0, 1.0), shaping=False
    ),
    "format": BuiltinReward("rewards.format:format_rewards", 0.1, (0.0, 1.0)),
    "outcome_contrastive": BuiltinReward(
        "rewards.outcome_contrastive:outcome_contrastive_rewards", 0.2, _contrastive_range
    ),
    "temporal_diversity": BuiltinReward(
        "rewards.temporal_diversity:temporal_diversity_rewards", 0.1, (-1.0, 0.0)
    ),
    "repetition": BuiltinReward("rewards.repetition:repetition_rewards", 0.1, (-1.0, 0.0)),
    "length": BuiltinReward("rewards.length:length_rewards", 0.1, (-1.0, 0.0)),
    "temporal_order": BuiltinReward(
        "rewards.temporal_order:temporal_order_rewards", 0.3, (0.0, 1.0)
    ),
    "latent_alignment": BuiltinReward(
        "rewards.latent_alignment:LatentAlignment", 0.1, (0.0, 1.0), alone=True, timeout_s=600.0
    ),
    "judge": BuiltinReward(
        "rewards.judge:Judge", 0.1, (0.0, 1.0), alone=True, timeout_s=600.0
    ),
}  # fmt: skip


def build_terms(specs: Sequence[Mapping[str, Any]], folder: Path | None = None) -> list[RewardTerm]:
    """The rewards of a recipe, whose paths start from `folder`. Nothing of a user's is imported.

    Each spec is ``{use: reward, weight: number, options: {…}}``, where all but `use` may be left
    out, and further `name` (in logs, by default the reward's), `outcome` (whether it decides right
    and wrong), `range` [low, high], `timeout_s`, `memory_mb` and `gpus`. The built-in accuracy
    decides the outcome unless another one is marked. Raises `RecipeError` for an unknown name, key
    or option, or an option value that a built-in reward refuses.
    """
    marked = any(spec.get("outcome") for spec in specs)
    return [
        _build(spec, f"rewards[{place}]", folder or Path.cwd(), marked)
        for place, spec in enumerate(specs)
    ]


def _build(spec: Mapping[str, Any], where: str, folder: Path, marked: bool) -> RewardTerm:
    _check_keys(spec, SPEC_KEYS, where, "key")
    if "use" not in spec:
        raise RecipeError(f"{where} has no `use`; name one of {sorted(BUILTIN)}")
    use = str(spec["use"])
    try:
        source = find(use, folder, {name: builtin.target for name, builtin in BUILTIN.items()})
    except RecipeError as error:
        raise RecipeError(f"{where}: {error}") from None
    builtin = BUILTIN.get(use)
    name = str(spec.get("name") or (source.attribute if ":" in use else use))
    where = f"{where} ({name})"
    options = dict(spec.get("options") or {})
    if builtin is not None:
        _check_builtin(builtin, options, where)
    outcome = spec.get("outcome")
    if outcome is None:
        outcome = builtin is not None and not builtin.shaping and not marked
    if outcome and use == "temporal_order":
        raise RecipeError(f"{where}: it compares outcomes, so it cannot decide them")
    timeout = _number(spec, "timeout_s", where, builtin.timeout_s if builtin else PLUGIN_TIMEOUT)
    if use == "judge":
        _check_judge(options, outcome, timeout, where)
    gpus = _number(spec, "gpus", where, 0.0)
    # A CUDA context reserves far more than it uses, so there no limit would mean anything.
    memory = None if builtin or gpus else PLUGIN_MEMORY
    weight = builtin.weight if builtin and builtin.shaping else SHAPING_WEIGHT
    return RewardTerm(
        name,
        source,
        weight=_number(spec, "weight", where, OUTCOME_WEIGHT if outcome else weight),
        shaping=not outcome,
        options=options,
        range=spec.get("range") or (builtin.span(options) if builtin else None),
        timeout_s=timeout,
        process="formulas" if builtin and not builtin.alone else None,
        memory_mb=spec.get("memory_mb") or memory,
        gpus=gpus,
    )


def _check_judge(options: dict[str, Any], outcome: bool, timeout: float, where: str) -> None:
    """A judge must be done before its deadline, or what it was answered would be lost with it."""
    patience = options.setdefault("patience_s", min(300.0, 0.8 * timeout))
    if patience >= timeout:
        raise RecipeError(
            f"{where}: option patience_s is {patience:g} seconds and the reward's timeout_s "
            f"{timeout:g}; patience_s must be lower, or answers that came in time would be lost"
        )
    if outcome and options.get("style") == "score" and options.get("threshold") is None:
        raise RecipeError(
            f"{where}: it decides the outcome, which is 1 or 0, but gives grades; set the option "
            "threshold to the least grade that is right, such as 0.6"
        )


def _number(spec: Mapping[str, Any], key: str, where: str, default: float) -> float:
    value = default if spec.get(key) is None else spec[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise RecipeError(f"{where}: {key} is {value!r}; it must be a number")
    return float(value)


def _check_builtin(builtin: BuiltinReward, options: Mapping[str, Any], where: str) -> None:
    """Make it, or let it score an empty batch: rewards check their options before anything else."""
    function = load(builtin.target)
    signature = read_signature(function)
    _check_keys(options, signature.options, where, "option")
    _check_set(options, signature, where)
    try:
        if inspect.isclass(function):
            function(**options)
        else:
            function(**dict.fromkeys(signature.required, ()), **options)
    except (RecipeError, TypeError) as error:
        raise RecipeError(f"{where}: {error}") from None


def check_signature(term: RewardTerm, signature: Signature, columns: Iterable[str]) -> list[str]:
    """Whether a reward of a user's fits what it will get: its options and the columns of the batch,
    `columns` being those of the manifest. Returns what is allowed and probably not meant; raises
    `RecipeError`.
    """
    where, columns = f"reward {term.name!r}", [*columns]
    _check_keys(term.options, signature.settable, where, "option")
    _check_set(term.options, signature, where)
    known = {*COLUMNS, *columns, *term.options}
    if not term.shaping:
        known -= {"outcomes", "shuffled_outcomes"}  # which it decides itself
    if lacking := [name for name in signature.required if name not in known]:
        raise RecipeError(
            f"{where} asks for {lacking}, which is neither a column of the data nor handed over by "
            f"Foresight; there are {sorted(known)}"
        )
    hidden = [c for c in columns if c in signature.options and not signature.wants(c)]
    return [
        f"{where}: the column {column!r} does not reach it, because its parameter of that name is "
        "an option (keyword-only, with a default)"
        for column in hidden
        if not signature.made
    ]


def _check_set(options: Mapping[str, Any], signature: Signature, where: str) -> None:
    unset = [name for name, value in signature.options.items() if value is None]
    if unset := [name for name in unset if name not in options]:
        raise RecipeError(f"{where}: its options {unset} have no default; set them in `options`")


def _check_keys(given: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RecipeError(f"{where}: unknown {what} {key!r}; {hint}known: {known or 'none'}")

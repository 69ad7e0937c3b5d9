"""Rewards by name: what a recipe's `rewards:` list turns into."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from rewards.accuracy import accuracy_rewards
from rewards.format import format_rewards
from rewards.outcome_contrastive import outcome_contrastive_rewards
from rewards.repetition import repetition_rewards
from rewards.scorer import RewardFunction, RewardSet, RewardTerm
from rewards.temporal_diversity import temporal_diversity_rewards
from rl.errors import RecipeError

SPEC_KEYS = ("use", "weight", "options")


@dataclass(frozen=True)
class BuiltinReward:
    """A reward that comes with Foresight, and the weight it has if the recipe names none."""

    function: RewardFunction
    weight: float
    shaping: bool = True

    @property
    def options(self) -> tuple[str, ...]:
        """Names of its options: the keyword parameters that have a default."""
        parameters = inspect.signature(self.function).parameters.values()
        return tuple(p.name for p in parameters if p.default is not inspect.Parameter.empty)


# The weights are LA-DAPO's (methods.md 1.5); repetition has none there, so its weight is ours.
BUILTIN: dict[str, BuiltinReward] = {
    "accuracy": BuiltinReward(accuracy_rewards, 0.9, shaping=False),
    "format": BuiltinReward(format_rewards, 0.1),
    "outcome_contrastive": BuiltinReward(outcome_contrastive_rewards, 0.2),
    "temporal_diversity": BuiltinReward(temporal_diversity_rewards, 0.1),
    "repetition": BuiltinReward(repetition_rewards, 0.1),
}


def build_rewards(specs: Sequence[Mapping[str, Any]]) -> RewardSet:
    """The rewards of a recipe: each spec is ``{use: name, weight: number, options: {…}}``, the last
    two optional.

    Raises `RecipeError` for an unknown name, key or option, or an option value that the reward
    refuses.
    """
    return RewardSet([_build(spec, f"rewards[{place}]") for place, spec in enumerate(specs)])


def _build(spec: Mapping[str, Any], where: str) -> RewardTerm:
    _check_keys(spec, SPEC_KEYS, where, "key")
    if "use" not in spec:
        raise RecipeError(f"{where} has no `use`; name one of {sorted(BUILTIN)}")
    name = str(spec["use"])
    _check_keys([name], BUILTIN, where, "reward")
    builtin = BUILTIN[name]
    options = dict(spec.get("options") or {})
    _check_keys(options, builtin.options, f"{where} ({name})", "option")
    weight = spec.get("weight", builtin.weight)
    if isinstance(weight, bool) or not isinstance(weight, int | float):
        raise RecipeError(f"{where} ({name}): weight is {weight!r}; it must be a number")
    _check_options(builtin, options)
    return RewardTerm(name, builtin.function, float(weight), builtin.shaping, options)


def _check_options(builtin: BuiltinReward, options: Mapping[str, Any]) -> None:
    """Score an empty batch: rewards check their options before they look at a completion."""
    columns = inspect.signature(builtin.function).parameters.values()
    required = [p.name for p in columns if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    builtin.function(**dict.fromkeys(required, ()), **options)


def _check_keys(given: Iterable[str], known: Iterable[str], where: str, what: str) -> None:
    known = list(known)
    for key in given:
        if key not in known:
            close = get_close_matches(key, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RecipeError(f"{where}: unknown {what} {key!r}; {hint}known: {known or 'none'}")

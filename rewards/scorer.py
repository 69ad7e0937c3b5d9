"""The rewards of a run as one object: the outcome first, then the shaping.

`RewardSet` implements `rl.interfaces.Scorer`. A reward is a function with TRL's signature,

    f(prompts, completions, completion_ids, **columns) -> list[float | None]

called once over a whole batch of groups laid end to end. None (or NaN) is "no value". `columns`
are the manifest's own, one value a trajectory, and further `trajectories` (the `Trajectory`
objects), `group_ids` (equal inside a group; groups stand together) and, for shaping, `outcomes` (1
right, 0 wrong, NaN invalid).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rl.errors import DataError, RecipeError, RewardError

if TYPE_CHECKING:
    from rl.interfaces import GroupScores
    from rl.trajectory import TrajectoryGroup

RewardFunction = Callable[..., Sequence[float | None]]


@dataclass(frozen=True)
class RewardTerm:
    """One reward of a run.

    `options` reach the function as keywords and win over columns of the same name.
    """

    name: str
    function: RewardFunction
    weight: float = 1.0
    shaping: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not math.isfinite(self.weight):
            raise RecipeError(f"reward {self.name!r}: weight is {self.weight}; it must be finite")

    @property
    def __name__(self) -> str:  # what TRL calls the reward in its logs
        return self.name

    def __call__(self, **columns: Any) -> list[float]:
        """One value a trajectory, NaN for "no value"; `RewardError` if the function fails.

        This is the seam where later the deadline, the process boundary and the counting of faults
        go.
        """
        expected = len(columns["completions"])
        try:
            values = list(self.function(**{**columns, **self.options}))
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error}. Try it on stored "
                "completions, or take it out of the recipe's `rewards`"
            ) from error
        if len(values) != expected:
            raise RewardError(
                f"reward {self.name!r} returned {len(values)} values for {expected} completions; "
                "it must return one a completion, None where it has none"
            )
        return [self._number(value, columns, place) for place, value in enumerate(values)]

    def _number(self, value: Any, columns: Mapping[str, Any], place: int) -> float:
        if value is None:
            return math.nan
        # Strings convert too, but a reward that returns one has a bug worth showing.
        number = (
            math.inf if isinstance(value, str) or not hasattr(value, "__float__") else float(value)
        )
        if math.isinf(number):
            raise RewardError(
                f"reward {self.name!r} returned {value!r} for sample {columns['id'][place]!r}; it "
                "must return finite numbers, or None for no value"
            )
        return number


class RewardSet:
    """Scores groups with one outcome reward and any number of shaping rewards."""

    def __init__(self, terms: Sequence[RewardTerm]) -> None:
        outcomes = [term for term in terms if not term.shaping]
        if len(outcomes) != 1:
            raise RecipeError(
                f"rewards: {len(outcomes)} of {[t.name for t in terms]} decide the outcome; "
                "exactly one must. Add `{use: accuracy}`"
            )
        names = [term.name for term in terms]
        if twice := sorted({name for name in names if names.count(name) > 1}):
            raise RecipeError(
                f"rewards: {twice} appear more than once; each reward needs its own name"
            )
        self.outcome = outcomes[0]
        self.shaping = tuple(term for term in terms if term.shaping)
        self.terms = (self.outcome, *self.shaping)
        # The three attributes of `rl.interfaces.Scorer`.
        self.names: Sequence[str] = tuple(term.name for term in self.terms)
        self.weights: Sequence[float] = tuple(term.weight for term in self.terms)
        self.functions: Sequence[Callable[..., Any]] = self.terms

    def outcomes(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
        """1 for right, 0 for wrong, NaN for invalid: one list a group, one value a trajectory."""
        values = self.outcome(**_columns(groups))
        if graded := [
            value for value in values if value not in (0.0, 1.0) and not math.isnan(value)
        ]:
            raise RewardError(
                f"reward {self.outcome.name!r} decides the outcome but returned {graded[0]}; an "
                "outcome is 1, 0 or None"
            )
        return _split(values, groups)

    def score(
        self, groups: Sequence[TrajectoryGroup], outcomes: Sequence[Sequence[float]]
    ) -> list[GroupScores]:
        """Every component of every trajectory, given what `outcomes` returned for the same groups.

        A trajectory whose outcome is invalid gets NaN in every component: TRL leaves a row without
        any value out of its group's mean, standard deviation and count. Shaping of groups that are
        all right or all wrong is returned too; whether it counts is the trainer's decision.
        """
        from rl.interfaces import GroupScores  # here, because it loads torch

        if [len(g) for g in groups] != [len(o) for o in outcomes]:
            raise RewardError(
                f"outcomes for groups of {[len(o) for o in outcomes]} trajectories, but the groups "
                f"have {[len(g) for g in groups]}"
            )
        flat = [value for row in outcomes for value in row]
        columns = _columns(groups) | {"outcomes": flat}
        components = {self.outcome.name: _split(flat, groups)}
        for term in self.shaping:
            values = term(**columns)
            valid = [math.nan if math.isnan(o) else v for v, o in zip(values, flat, strict=True)]
            components[term.name] = _split(valid, groups)
        return [
            GroupScores(list(row), {name: rows[i] for name, rows in components.items()})
            for i, row in enumerate(outcomes)
        ]


def _columns(groups: Sequence[TrajectoryGroup]) -> dict[str, list[Any]]:
    """The keyword arguments of a reward function: lists with one item a trajectory."""
    rows = [(place, group.sample, t) for place, group in enumerate(groups) for t in group]
    columns: dict[str, list[Any]] = {
        "prompts": [[{"role": "user", "content": s.question}] for _, s, _ in rows],
        "completions": [[{"role": "assistant", "content": t.text}] for _, _, t in rows],
        "completion_ids": [t.completion_ids.tolist() for _, _, t in rows],
        "id": [s.id for _, s, _ in rows],
        "video": [s.video for _, s, _ in rows],
        "question": [s.question for _, s, _ in rows],
        "answer": [s.answer for _, s, _ in rows],
        "options": [s.options for _, s, _ in rows],
        "trajectories": [t for _, _, t in rows],
        "group_ids": [place for place, _, _ in rows],
    }
    extra = dict.fromkeys(key for group in groups for key in group.sample.extra)
    if taken := sorted({*columns, "outcomes"} & {*extra}):
        raise DataError(
            f"manifest columns {taken} have names that rewards get from Foresight; rename them"
        )
    return columns | {key: [s.extra.get(key) for _, s, _ in rows] for key in extra}


def _split(values: Sequence[float], groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
    rest = iter(values)
    return [[next(rest) for _ in group] for group in groups]

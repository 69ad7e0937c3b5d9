"""What reward functions see: the columns of a batch of groups laid end to end."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from rl.errors import DataError

if TYPE_CHECKING:
    from rl.trajectory import Sample, TrajectoryGroup

# Columns with these names come from Foresight; a manifest may not use them.
RESERVED = frozenset({"outcomes", "shuffled_outcomes", "trainer_state", "log_metric", "log_extra"})


@dataclass(frozen=True)
class Batch:
    """Keyword arguments of a reward function, lists with one item a trajectory; `sizes` are those
    of the groups.
    """

    columns: Mapping[str, list[Any]]
    sizes: tuple[int, ...]
    # Where `rewards.process` remembers what of this batch it has stored for other processes.
    stored: dict[str, Any] = field(default_factory=dict, compare=False, repr=False)

    def __len__(self) -> int:
        return sum(self.sizes)

    def with_column(self, name: str, groups: Iterable[Sequence[Any]]) -> Batch:
        """With one more column, given group by group."""
        return Batch({**self.columns, name: [v for group in groups for v in group]}, self.sizes)

    def parts(self) -> list[Batch]:
        """One batch a group."""
        parts, start = [], 0
        for size in self.sizes:
            end = start + size
            part = {name: values[start:end] for name, values in self.columns.items()}
            parts.append(Batch(part, (size,)))
            start = end
        return parts

    def split(self, values: Sequence[Any]) -> list[list[Any]]:
        """Values, one a trajectory, group by group."""
        rest = iter(values)
        return [[next(rest) for _ in range(size)] for size in self.sizes]


def make_batch(
    samples: Sequence[Sample],
    texts: Sequence[Sequence[str]],
    trajectories: Sequence[Any] | None,
    extras: Sequence[Sequence[Mapping[str, Any]]] | None = None,
) -> Batch:
    """The columns of groups of completions: `texts[g]` are those of `samples[g]`.

    `trajectories`, all of them in order, give the columns `trajectories` and `completion_ids`;
    completions that were only written down have neither. `extras[g]` are the manifest columns of
    each completion, where those of a group need not be equal; else they are the sample's. Raises
    `DataError` for a manifest column that has a name of ours.
    """
    rows = [(g, sample) for g, sample in enumerate(samples) for _ in texts[g]]
    columns: dict[str, list[Any]] = {
        "prompts": [[{"role": "user", "content": s.question}] for _, s in rows],
        "completions": [[{"role": "assistant", "content": t}] for group in texts for t in group],
        "id": [s.id for _, s in rows],
        "video": [s.video for _, s in rows],
        "question": [s.question for _, s in rows],
        "answer": [s.answer for _, s in rows],
        "options": [s.options for _, s in rows],
        "frames": [s.frames for _, s in rows],
        "imagine": [s.imagine for _, s in rows],
        "window": [s.window for _, s in rows],
        "pool": [s.pool for _, s in rows],
        "images": [s.images for _, s in rows],
        "group_ids": [g for g, _ in rows],
    }
    if trajectories is not None:
        columns["completion_ids"] = [t.completion_ids.tolist() for t in trajectories]
        columns["trajectories"] = list(trajectories)
    if extras is None:
        extras = [[sample.extra] * len(group) for sample, group in zip(samples, texts, strict=True)]
    own = [extra for group in extras for extra in group]
    extra = dict.fromkeys(key for row in own for key in row)
    if taken := sorted((columns.keys() | RESERVED) & extra.keys()):
        raise DataError(
            f"manifest columns {taken} have names that rewards get from Foresight; rename them"
        )
    columns |= {key: [row.get(key) for row in own] for key in extra}
    return Batch(columns, tuple(len(group) for group in texts))


# All that a function may get beside the manifest's own columns.
COLUMNS = frozenset(make_batch([], [], []).columns) | RESERVED


def group_batch(groups: Sequence[TrajectoryGroup]) -> Batch:
    """The columns of sampled groups."""
    return make_batch(
        [group.sample for group in groups],
        [[t.text for t in group] for group in groups],
        [t for group in groups for t in group],
    )

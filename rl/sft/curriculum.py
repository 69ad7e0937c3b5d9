"""The curriculum of latent reasoning: stage after stage, latents take the place of one more step of
a row's chain of thought.

Source: Coconut (arXiv 2412.06769), and the release of visual-enhanced depth scaling (arXiv
2604.10500), which is built on it. At stage n the first n steps of a row give way to latents and the
others stay text; the policy's own latents are fed, as there is nothing they should equal.

What is ours: the latents are a span of the protocol, ``S z_1 … z_L E`` (the second release marks
them with nothing), so a policy learns by itself to open and to end it. A stage is counted in
updates (the releases count epochs, 3 and 4 a stage) and therefore the same in a resumed run. The
releases drop all steps that are left after the last stage; here `merge_steps` of at most
`max_stage` gets there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
from transformers import TrainerCallback

from rl.checkpoints import read_state
from rl.errors import CheckpointError, DataError, ObjectiveError
from rl.policy.protocol import LatentProtocol
from rl.sft.taught import Lesson, Writer
from rl.trajectory import Sample

STEPS = "steps"  # the manifest column with a row's chain of thought


@dataclass(frozen=True)
class CurriculumConfig:
    """When each stage begins and what it replaces by what.

    `steps_per_stage` counts updates; with a `max_stage` of 0 chains stay chains. `merge_steps`
    joins a chain of thought into at most so many steps. A row of fewer steps than the stage has as
    many latents as it has steps, or with `pad_latents` as many as others. `mix` is the probability
    that a row is taught at a stage drawn from all of them. With `reset_optimizer` the optimizer
    forgets its moments at each new stage; the schedule of the learning rate goes on. Raises
    `ObjectiveError` for what cannot work.
    """

    steps_per_stage: int
    max_stage: int = 5
    latents_per_step: int = 1
    merge_steps: int | None = None
    mix: float = 0.0
    reset_optimizer: bool = False
    pad_latents: bool = False

    def __post_init__(self) -> None:
        for name in ("steps_per_stage", "max_stage", "latents_per_step", "merge_steps"):
            value, least = getattr(self, name), int(name != "max_stage")
            if not (name == "merge_steps" and value is None) and (
                not isinstance(value, int) or isinstance(value, bool) or value < least
            ):
                raise ObjectiveError(
                    f"curriculum: {name} is {value!r}; it must be a whole number, at least {least}"
                )
        if not 0.0 <= self.mix <= 1.0:
            raise ObjectiveError(f"curriculum: mix is {self.mix}; a probability is between 0 and 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> CurriculumConfig:
        known = [f.name for f in fields(cls)]
        if unknown := sorted({*values} - {*known}):
            raise ObjectiveError(f"curriculum: unknown keys {unknown}; known: {', '.join(known)}")
        if "steps_per_stage" not in values:
            raise ObjectiveError("curriculum: steps_per_stage is missing; give updates a stage")
        return cls(**values)

    def stage_at(self, update: int) -> int:
        """The stage of an update, which are counted from 0."""
        return min(update // self.steps_per_stage, self.max_stage)

    def begins_stage(self, update: int) -> bool:
        """Whether an update is the first of a stage that follows another."""
        return update > 0 and self.stage_at(update) > self.stage_at(update - 1)

    def row_stage(self, update: int, *, seed: int, epoch: int, row: int) -> int:
        """The stage at which a row is taught: that of the update or, with probability `mix`, one
        drawn from 0 to `max_stage`. A function of its arguments.
        """
        if self.mix:
            draws = np.random.default_rng((seed, epoch, row))
            if draws.random() < self.mix:
                return int(draws.integers(self.max_stage + 1))
        return self.stage_at(update)

    def written(self, updates: int) -> dict[str, Any]:
        """What a checkpoint after so many updates holds: the schedule and the last one's stage."""
        return {
            "curriculum": {"schedule": asdict(self), "stage": self.stage_at(max(updates - 1, 0))}
        }

    def latents(self, stage: int, steps: int) -> int:
        """How many latents a row of so many `steps` has at a stage."""
        return self.latents_per_step * (stage if self.pad_latents else min(stage, steps))


def curriculum_lesson(
    sample: Sample, stage: int, config: CurriculumConfig, writer: Writer
) -> Lesson:
    """What a row is taught at a stage: a span of latents for its first `stage` steps, those that
    are left as reasoning, one a line, and the answer. At stage 0 there is no span.

    Raises `DataError` for a row without steps, and `ProtocolError` where the span is longer than
    the protocol allows (`check_curriculum` finds that beforehand).
    """
    steps = merged(steps_of(sample), config.merge_steps)
    left = replace(sample, imagine=(), reasoning=("\n".join(steps[stage:]),))
    return writer.opening(left, config.latents(stage, len(steps)))


def steps_of(sample: Sample) -> tuple[str, ...]:
    """The chain of thought of a row, step by step: its column `steps`, or else the lines of its
    reasoning that are not blank. Raises `DataError` for a row that has neither.
    """
    steps = sample.extra.get(STEPS)
    if steps is None:
        lines = (line.strip() for text in sample.reasoning for line in text.splitlines())
        steps = [line for line in lines if line]
        if not steps:
            raise DataError(
                f"sample {sample.id!r}: the curriculum replaces a chain of thought step by step, "
                f"and the row has none; give it a column {STEPS!r} (a list of texts) or "
                "'reasoning' (a step a line), or leave it out"
            )
    if (
        not isinstance(steps, list | tuple)
        or not steps
        or not all(isinstance(step, str) and step.strip() for step in steps)
    ):
        raise DataError(
            f"sample {sample.id!r}: column {STEPS!r} is {str(steps)[:60]!r}; write a list of "
            "texts that are not empty, one for each step of the chain of thought"
        )
    return tuple(steps)


def merged(steps: Sequence[str], most: int | None) -> tuple[str, ...]:
    """The steps joined, line by line, into at most so many runs that are as long as one another or
    one step longer, the longer ones first. None: as they are.
    """
    runs = len(steps) if most is None else min(most, len(steps))
    size, longer = divmod(len(steps), runs)
    ends = [(i + 1) * size + min(i + 1, longer) for i in range(runs)]
    return tuple("\n".join(steps[a:b]) for a, b in zip([0, *ends[:-1]], ends, strict=True))


def check_curriculum(sample: Sample, config: CurriculumConfig, protocol: LatentProtocol) -> int:
    """The most latents that a row has at any stage. Raises `DataError`, which names the row, where
    it has no steps or the protocol does not allow its span at some stage.
    """
    steps = len(steps_of(sample))
    if not config.max_stage:
        return 0
    steps = min(steps, config.merge_steps or steps)
    fewest, most = config.latents(1, steps), config.latents(config.max_stage, steps)
    where = f"sample {sample.id!r}: in the curriculum it"
    if fewest < protocol.min_length:
        raise DataError(
            f"{where} has a span of {fewest} latents at stage 1, and the protocol's min_length is "
            f"{protocol.min_length}; set min_length to {fewest}, or raise latents_per_step"
        )
    if most > protocol.max_length:
        raise DataError(
            f"{where} has a span of {most} latents by stage {config.max_stage}, and the protocol's "
            f"max_length is {protocol.max_length}; set max_length to {most}, or lower max_stage, "
            "merge_steps or latents_per_step"
        )
    return most


def check_resumed(checkpoint: str | Path, schedule: CurriculumConfig | None) -> None:
    """Raise a `CheckpointError` where a checkpoint is of another schedule, or of none."""
    was = read_state(checkpoint).get("curriculum", {}).get("schedule", {})
    now = {} if schedule is None else schedule.to_dict()
    changed = [
        f"{key} was {was.get(key, 'not set')} and is {now.get(key, 'not set')}"
        for key in {**was, **now}
        if (key in was, was.get(key)) != (key in now, now.get(key))
    ]
    if changed:
        raise CheckpointError(
            f"{checkpoint} is of another curriculum: {'; '.join(changed)}. Give the one that it "
            "was taught by, or start a new run from its policy"
        )


class ResetOptimizer(TrainerCallback):
    """Lets the optimizer forget its moments at the first update of each new stage: a function of
    the update, so that a run which resumes there does too.
    """

    def __init__(self, schedule: CurriculumConfig) -> None:
        self._schedule = schedule

    def on_step_begin(
        self, args: Any, state: Any, control: Any, optimizer: Any = None, **kwargs: Any
    ) -> None:
        if self._schedule.begins_stage(state.global_step):
            optimizer.state.clear()

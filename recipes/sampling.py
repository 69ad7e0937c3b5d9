"""Rollout workers for recipes and commands, and evaluation with its progress shown."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rich.console import Console

from recipes.callbacks import progress_bar
from recipes.evaluate import Evaluation, Sampler, evaluate
from rl.data.media import MediaProcessor
from rl.policy.protocol import Imagine
from rl.trajectory import Sample
from rollouts.pool import RolloutPool
from rollouts.worker import EngineSpec


def gpu_share(workers: int, gpus: int) -> float:
    """The share of a GPU that each of `workers` gets of `gpus`: 1 at most, 0 without GPUs.

    A worker has to fit on one GPU, so 3 workers on 2 GPUs take 0.5 each, not 0.66. Ray counts in
    ten-thousandths, so the share is rounded down to those.
    """
    if gpus == 0:
        return 0.0
    return math.floor(1e4 / math.ceil(workers / gpus)) / 1e4


def start_pool(
    spec: EngineSpec, media: MediaProcessor, workers: int, console: Console, **options: Any
) -> RolloutPool:
    """A `RolloutPool` with these `options`; says so while the workers start."""
    with console.status(f"starting {workers} rollout workers"):
        return RolloutPool(spec, media, workers, **options)


def evaluate_with_bar(
    sampler: Sampler,
    samples: Sequence[Sample],
    modes: Sequence[Imagine],
    max_new_tokens: int,
    console: Console,
    *,
    by: str | None = None,
) -> Evaluation:
    """`recipes.evaluate.evaluate` with a bar over the answers of all modes."""
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task("evaluating", total=len(modes) * len(samples))
        return evaluate(
            sampler,
            samples,
            modes,
            max_new_tokens,
            by=by,
            advance=lambda count: bar.advance(task, count),
        )

"""How a benchmark's samples are shown and graded, ready for `recipes.evaluation.evaluate`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

from recipes.evaluation.benchmarks.base import Benchmark
from recipes.evaluation.benchmarks.judged import GRADES, JudgeGrader
from recipes.evaluation.grading import Grader, by_letter, by_rule
from rl.data.media import MediaProcessor
from rl.errors import RecipeError
from rl.trajectory import Sample


@dataclass(frozen=True)
class Asking:
    """`show` makes of a sample what the policy is asked, `grader` grades what it answers; `grades`
    are the names of a judge's.
    """

    show: Callable[[Sample], Sample]
    grader: Grader
    grades: tuple[str, ...] = ()


def asking(
    benchmark: Benchmark,
    media: MediaProcessor,
    judge: Mapping[str, Any] | None = None,
    advance: Callable[[int], None] = lambda _count: None,
) -> Asking:
    """How `benchmark` asks and grades. Of `media` it takes the processor, and has its own frames.

    `judge` are the options of its judge, if it has one, and `advance` is told how many replies that
    gave. Raises `RecipeError`.
    """
    frames = MediaProcessor(
        media.processor, benchmark.frames, decode_timeout_s=media.decode_timeout_s
    )

    def show(sample: Sample) -> Sample:
        # Indices of the file: whoever samples needs no rule, so one pool serves all benchmarks.
        key = frames.key(sample)
        return replace(benchmark.prompt(sample), frames=key.frames, window=None, pool=0)

    if benchmark.scoring == "judge":
        if judge is None:
            raise RecipeError(
                f"{benchmark.title} is graded by a judge: give `judge` with base_url and model, an "
                "OpenAI-compatible chat server and a model that it serves"
            )
        return Asking(show, JudgeGrader(judge, advance), GRADES)
    if judge is not None:
        raise RecipeError(f"{benchmark.title} is graded without a judge; leave `judge` out")
    return Asking(show, by_letter if benchmark.scoring == "letter" else by_rule)

"""What can be known to be wrong with a recipe of stage evaluate before a worker starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from recipes.check import Start, media_processor, read_start
from recipes.engines import EngineChoice, engine_of
from recipes.evaluation.benchmarks import Benchmark, Breakdown, find_benchmark
from recipes.evaluation.benchmarks.asking import asking
from recipes.evaluation.evaluate import MODES
from recipes.evaluation.scores import check_columns
from recipes.schema.evaluation import BenchmarkSection, EvaluateRecipe
from rl.data.formats import SkippedRow, read_samples
from rl.data.frames import FrameRule
from rl.errors import RecipeError
from rl.policy.protocol import Imagine
from rl.trajectory import Sample

MAX_NEW_TOKENS = 2048  # of answers to one's own rows


@dataclass(frozen=True)
class Job:
    """A benchmark as the recipe wants it, with its rows; `skipped` are those without a clip."""

    section: BenchmarkSection
    benchmark: Benchmark
    samples: list[Sample]
    skipped: list[SkippedRow]
    recognised: str
    modes: tuple[Imagine, ...]


@dataclass(frozen=True)
class EvaluationPlan:
    """A recipe of stage evaluate with everything read that is cheap to read."""

    start: Start
    jobs: list[Job]
    engine: EngineChoice


def check_evaluation(recipe: EvaluateRecipe) -> EvaluationPlan:
    """Read the data, the policy's config and processor, and the first clip of each benchmark.

    Raises the error of whatever is wrong: `PolicyError`, `DataError`, `VideoError`, `RecipeError`.
    """
    if recipe.data.bad_videos == "replace":
        raise RecipeError(
            "data.bad_videos is replace, but an evaluation has no other rows to put in the place "
            "of those whose videos cannot be read; write skip, which counts and lists them, or "
            "stop"
        )
    start = read_start(recipe)
    media = media_processor(recipe.data, start.processor)
    jobs = [_job(recipe, section, start.is_policy) for section in recipe.benchmarks]
    for job in jobs:
        ask = asking(job.benchmark, media, job.section.judge)
        if recipe.data.bad_videos == "stop":
            first = ask.show(job.samples[0])
            media.encode(first, [media.process(media.key(first))])
    return EvaluationPlan(start, jobs, engine_of(recipe, start.modules.names))


def _job(recipe: EvaluateRecipe, section: BenchmarkSection, is_policy: bool) -> Job:
    benchmark = _benchmark(recipe, section)
    found = read_samples(
        section.data,
        format=section.format or ("auto" if section.columns else benchmark.format),
        columns=section.columns,
        video_root=section.video_root or recipe.data.video_root,
        limit=section.limit,
        missing="skip" if recipe.data.bad_videos == "skip" else "stop",
    )
    check_columns(found.samples, [b.column for b in benchmark.breakdowns])
    modes: Sequence[Imagine] = section.modes or ()
    if not modes:
        modes = ("never",) if not is_policy else ("free",) if section.use else MODES
    return Job(
        section,
        benchmark,
        found.samples,
        found.skipped,
        f"{len(found.samples)} rows; {found.recognised}",
        tuple(dict.fromkeys(modes)),
    )


def _benchmark(recipe: EvaluateRecipe, section: BenchmarkSection) -> Benchmark:
    """The preset, or rows of one's own, with what the recipe changes."""
    if section.use is not None:
        benchmark = find_benchmark(section.use)
    else:
        benchmark = Benchmark(
            name=section.called,
            title=section.name or Path(section.data).name,
            format="auto",
            frames=FrameRule(**recipe.data.frames.model_dump()),
            max_new_tokens=MAX_NEW_TOKENS,
            scoring="rule",
        )
    known = {b.column: b for b in benchmark.breakdowns}
    changes = {
        "frames": section.frames and FrameRule(**section.frames.model_dump()),
        "max_new_tokens": section.max_new_tokens,
        "breakdowns": section.by is not None
        and tuple(known.get(column, Breakdown(column)) for column in section.by),
    }
    return replace(benchmark, **{k: v for k, v in changes.items() if v or v == ()})

"""`foresight evaluate`: a recipe of stage evaluate becomes predictions, figures and tables.

recipe.yaml         the recipe with all its defaults
start/              the policy, if it had to be made of a plain model
answers/            what was answered so far, by benchmark: what a killed evaluation goes on from
predictions/        graded answers, a Parquet file a benchmark (`recipes.evaluation.predictions`)
results.json        all figures
table.md            the tables; like results.json of the benchmarks of the last call
skipped/            rows whose clips cannot be read, a file a benchmark
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from transformers import AutoProcessor

from recipes.callbacks import progress_bar
from recipes.check import media_processor
from recipes.engines import worker_dtype, worker_gpus
from recipes.evaluation.benchmarks.asking import asking
from recipes.evaluation.evaluate import answer, skipped_of
from recipes.evaluation.plan import EvaluationPlan, Job, check_evaluation
from recipes.evaluation.predictions import AnswerStore, write_predictions
from recipes.evaluation.scores import Evaluation, summarise
from recipes.evaluation.tables import grids, show, skipped_lines
from recipes.loading import dump_recipe
from recipes.run_folder import RunFolder
from recipes.sampling import pool_of
from recipes.schema.evaluation import EvaluateRecipe
from recipes.start import start_policy
from rl.data.broken import BrokenClips
from rl.data.media import MediaProcessor
from rl.errors import RecipeError, VideoError
from rl.trajectory import RolloutRequest, Sample, TrajectoryGroup
from rl.writing import write_json, write_text
from rollouts.pool import RolloutPool

ANSWERS, PREDICTIONS, SKIPPED = "answers", "predictions", "skipped"
RESULTS, TABLE = "results.json", "table.md"


@dataclass(frozen=True)
class EvaluationRun:
    """A finished evaluation: its folder, and the figures of each benchmark by its name."""

    output: Path
    evaluations: dict[str, Evaluation]


def run_evaluation(
    recipe: EvaluateRecipe, console: Console | None = None, *, keep: bool = True
) -> EvaluationRun:
    """Evaluate what the recipe says, going on from the answers of an earlier call, and show the
    tables.

    Without `keep` no answers, predictions and tables are left in the output folder. Raises
    `ForesightError`s; `RecipeError` where the folder holds answers of another policy, other
    settings or other data.
    """
    console = console or Console()
    plan = check_evaluation(recipe)
    for job in plan.jobs:
        console.print(f"{job.section.called}: {job.recognised}", highlight=False)
    run = RunFolder(recipe.output)
    _claim(recipe, run)
    start = start_policy(recipe, plan.start, run, console)
    media = media_processor(recipe.data, AutoProcessor.from_pretrained(start))
    evaluations: dict[str, Evaluation] = {}
    with ExitStack() as stack:
        pool = _OnDemand(
            lambda: stack.enter_context(pool_of(recipe, plan.engine, media, start, console))
        )
        policy = _policy_hash(Path(start), console) if keep else ""
        for job in plan.jobs:
            store = None
            if keep:
                settings = {"policy": policy, **_settings(recipe, plan, job)}
                store = AnswerStore(run.root / ANSWERS / job.section.called, settings)
            evaluations[job.section.called] = _evaluate(
                recipe, job, pool, media, store, run, console
            )
            if keep:
                _write(recipe, plan, evaluations, run)
    return EvaluationRun(run.root, evaluations)


class _OnDemand:
    """A pool that starts when something is asked of it: not where all answers are there."""

    def __init__(self, start: Callable[[], RolloutPool]) -> None:
        self._start = start
        self._pool: RolloutPool | None = None

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        return self._started().generate(requests)

    def broken(self, samples: Sequence[Sample]) -> Mapping[str, VideoError]:
        return self._started().broken(samples)

    def _started(self) -> RolloutPool:
        if self._pool is None:
            self._pool = self._start()
        return self._pool


def _evaluate(
    recipe: EvaluateRecipe,
    job: Job,
    pool: _OnDemand,
    media: MediaProcessor,
    store: AnswerStore | None,
    run: RunFolder,
    console: Console,
) -> Evaluation:
    """Answer, grade, keep and show one benchmark."""
    name, benchmark = job.section.called, job.benchmark
    listed = None if store is None else run.root / SKIPPED / f"{name}.jsonl"
    broken = BrokenClips(listed, rule=recipe.data.bad_videos)
    for row in job.skipped:
        broken.note(*row)
    total = len(job.modes) * len(job.samples)
    with progress_bar(console, transient=True) as bar:
        task = bar.add_task(name, total=total)
        judging = bar.add_task(f"{name}: judging", total=total, visible=False)
        ask = asking(
            benchmark,
            media,
            job.section.judge,
            lambda count: bar.update(judging, advance=count, visible=True),
        )
        rows = answer(
            pool,
            job.samples,
            job.modes,
            benchmark.max_new_tokens,
            show=ask.show,
            grader=ask.grader,
            store=store,
            broken=broken,
            advance=lambda count: bar.advance(task, count),
        )
    evaluation = summarise(
        rows, benchmark.breakdowns, grades=ask.grades, skipped=skipped_of(broken)
    )
    if store is not None:
        write_predictions(
            run.root / PREDICTIONS / f"{name}.parquet",
            name,
            [b.column for b in benchmark.breakdowns],
            [row for mode in job.modes for row in rows[mode]],
            ask.grades,
        )
    show(evaluation, console, benchmark)
    return evaluation


def _write(
    recipe: EvaluateRecipe,
    plan: EvaluationPlan,
    evaluations: Mapping[str, Evaluation],
    run: RunFolder,
) -> None:
    """Write the figures and tables of the benchmarks that are done."""
    results, parts = {}, [f"# {recipe.policy.path}"]
    for job in plan.jobs:
        if (evaluation := evaluations.get(job.section.called)) is None:
            continue
        results[job.section.called] = {
            "benchmark": asdict(job.benchmark),
            "data": job.recognised,
            **evaluation.to_dict(),
        }
        parts.append(f"## {job.benchmark.title}\n\n{_about(job)}")
        parts += [grid.markdown() for grid in grids(evaluation, job.benchmark)]
        if lines := skipped_lines(evaluation):
            parts.append("\n".join(f"- {line}" for line in lines))
    write_json(run.root / RESULTS, {"policy": recipe.policy.path, "benchmarks": results})
    write_text(run.root / TABLE, "\n\n".join(parts) + "\n")


def _about(job: Job) -> str:
    """How a benchmark was asked and graded, in a sentence."""
    frames, benchmark = job.benchmark.frames, job.benchmark
    rate = "" if frames.fps is None else f"at most, {frames.fps:g} a second, "
    how = {
        "letter": "the first letter in `<answer>` counts",
        "rule": "scored by the accuracy rule",
        "judge": f"graded by {(job.section.judge or {}).get('model')} with our prompt",
    }[benchmark.scoring]
    return (
        f"{frames.count} frames {rate}of rows that list none, greedy, at most "
        f"{benchmark.max_new_tokens} new tokens; {how}."
    )


def _claim(recipe: EvaluateRecipe, run: RunFolder) -> None:
    """Store the recipe. Raises `RecipeError` for a folder in which something else has run."""
    if run.recipe.is_file():
        stored = yaml.safe_load(run.recipe.read_text(encoding="utf-8"))
        if stored.get("stage") != recipe.stage:
            raise RecipeError(
                f"{run.root} holds a run of stage {stored.get('stage')!r}; give another `output` "
                "to evaluate to"
            )
        policy = recipe.policy.model_dump(mode="json")
        if run.start.is_dir() and stored.get("policy") != policy:
            raise RecipeError(
                f"{run.root} holds an evaluation of a policy made of "
                f"{stored.get('policy', {}).get('path')}, with other settings than `policy` has "
                "now; give another `output`, or delete the folder"
            )
    write_text(run.recipe, dump_recipe(recipe))


def _settings(recipe: EvaluateRecipe, plan: EvaluationPlan, job: Job) -> dict[str, Any]:
    """What decides the answers to a benchmark, beside the policy."""
    asked = [
        (s.id, s.video, s.question, s.options, s.frames, s.window, s.pool, s.images)
        for s in job.samples
    ]
    rows = hashlib.sha256(repr(asked).encode()).hexdigest()
    return {
        "data": f"{len(job.samples)} rows, {rows[:16]}",
        "frames": asdict(job.benchmark.frames),
        "instruction": job.benchmark.instruction,
        "system_prompt": recipe.data.system_prompt,
        "max_new_tokens": job.benchmark.max_new_tokens,
        "engine": plan.engine.engine,
        "dtype": worker_dtype(recipe.rollouts, worker_gpus(recipe)),
    }


def _policy_hash(folder: Path, console: Console) -> str:
    """A fingerprint of a policy's files: weights, configs, tokenizer, processor."""
    digest = hashlib.sha256()
    with console.status("reading the policy"):
        for path in sorted(folder.glob("*")):
            if path.suffix in (".safetensors", ".json", ".jinja", ".txt"):
                with path.open("rb") as file:
                    content = hashlib.file_digest(file, "sha256").hexdigest()
                digest.update(f"{path.name}:{content}\n".encode())
    return digest.hexdigest()[:16]

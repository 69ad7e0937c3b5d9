"""`foresight select`: a recipe and rows become the rows worth training on.

The run folder holds

recipe.yaml         the recipe with all its defaults
start/              the policy that was probed, if it had to be made of a plain model
probes.jsonl        what the probes gave, a line a row; a resumed run goes on behind the last
faults.jsonl        what went wrong with the outcome reward, if anything did
selection.parquet   every row with its rates, its gain and what became of it
kept.jsonl          the rows that are kept, best first: a manifest, the next stage's `data.train`
skipped.jsonl       the rows that were not probed, and why
histogram.png       the gains, and success with hints against success without
summary.json        counts and means; written last
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from rich.console import Console
from transformers import AutoProcessor, TrainerState, set_seed

from recipes.callbacks import progress_bar
from recipes.check import Start, check_rewards, media_processor, read_start
from recipes.engines import EngineChoice, engine_of
from recipes.run_folder import RunFolder
from recipes.sampling import pool_of, started
from recipes.schema.selection import SelectRecipe
from recipes.selection.files import Selection, write_selection
from recipes.selection.probe_log import ProbeLog, check_fingerprints
from recipes.selection.probes import KINDS, ProbePrompts, Prober
from recipes.selection.rules import Probed, choose, count_outcomes
from recipes.start import start_policy
from rewards.registry import build_terms
from rewards.scorer import RewardSet
from rewards.terms import RewardTerm
from rl.data.broken import of_sample
from rl.data.formats import SkippedRow, read_samples
from rl.errors import RecipeError, VideoError
from rl.interfaces import Rollouts
from rl.trajectory import RolloutRequest, Sample, TrajectoryGroup

NO_HINTS = "no hints: `imagine` lists no frame beyond those shown"


@dataclass(frozen=True)
class SelectionPlan(Start):
    """A recipe of this stage with everything read that is cheap to read."""

    samples: list[Sample]
    unread: list[SkippedRow]  # rows that could not be read
    prompts: ProbePrompts
    outcome: RewardTerm
    warnings: list[str]
    engine: EngineChoice


def run_selection(recipe: SelectRecipe, console: Console | None = None) -> Selection:
    """Probe every row that has not been probed yet, and choose. Raises `ForesightError`s.

    Called again on a finished run it samples nothing and chooses anew, by what `keep` says now.
    """
    console = console or Console()
    run = RunFolder(recipe.output)
    log = ProbeLog(run.root / "probes.jsonl")

    # 1. Everything that can be wrong is found here, before anything is written or started.
    plan = check_selection(recipe)
    run.claim(recipe)

    # 2. What is left to do.
    prober = _prober(recipe, plan, recipe.policy.path)
    fingerprints = {sample.id: prober.fingerprint(sample) for sample in plan.samples}
    found = log.read()
    check_fingerprints(found, fingerprints, log.path)
    left = [s for s in plan.samples if s.id not in found or not found[s.id][1].settled]
    if found:
        done = len(plan.samples) - len(left)
        console.print(f"{done} of {len(plan.samples)} rows are probed already")

    # 3. The probes.
    if left:
        set_seed(recipe.seed)  # a policy may be made
        start = start_policy(recipe, plan, run, console)
        prober = _prober(recipe, plan, start)
        rewards = RewardSet(
            [plan.outcome], max_invalid=recipe.max_invalid, faults=run.faults, isolated=True
        )
        with (
            pool_of(recipe, plan.engine, prober.media, start, console) as pool,
            started(rewards, console),
            progress_bar(console, transient=True) as bar,
        ):
            task = bar.add_task("probing", total=len(plan.samples))
            bar.advance(task, len(plan.samples) - len(left))
            skip = recipe.data.bad_videos != "stop"
            for number, chunk in enumerate(_chunks(left, recipe.chunk)):
                rewards.begin(TrainerState(global_step=number))
                results = probe(chunk, prober, pool, rewards, skip_broken=skip)
                log.add((s.id, fingerprints[s.id], results[s.id]) for s in chunk)
                bar.advance(task, len(chunk))

    # 4. What is kept.
    found = log.read()
    probed = {sample.id: found[sample.id][1] for sample in plan.samples}
    selection = Selection(plan.samples, probed, choose(probed, recipe.keep), plan.unread)
    with console.status("writing the selection"):
        write_selection(selection, run.root, recipe)
    console.print(selection.table())
    for note in selection.notes():
        console.print(note)
    return selection


def check_selection(recipe: SelectRecipe) -> SelectionPlan:
    """Read rows, template, the policy's config and processor, and the first clip. Raises the error
    of whatever is wrong, as `recipes.check.check_recipe` does.
    """
    if recipe.data.bad_videos == "replace":
        raise RecipeError(
            "data.bad_videos is replace, but every row is probed already, so there is none to put "
            "in the place of another; write skip, which counts and lists them, or stop"
        )
    start = read_start(recipe)
    prompts = ProbePrompts(recipe.probes)
    samples, unread = _samples(recipe)
    section = recipe.outcome.model_copy(update={"outcome": True})
    terms = build_terms([section.model_dump(exclude_none=True)])
    warnings = check_rewards(terms, [section], samples)
    plan = SelectionPlan(
        **vars(start),
        samples=samples,
        unread=unread,
        prompts=prompts,
        outcome=terms[0],
        warnings=warnings,
        engine=engine_of(recipe, start.modules.names),
    )
    _check_first(recipe, plan)
    return plan


def probe(
    samples: Sequence[Sample],
    prober: Prober,
    pool: Rollouts,
    rewards: RewardSet,
    *,
    skip_broken: bool,
) -> dict[str, Probed]:
    """Both probes of some rows, by id. With `skip_broken` a row whose video cannot be read is
    skipped, else its `VideoError` is raised.
    """
    results: dict[str, Probed] = {}
    asked: list[tuple[Sample, tuple[RolloutRequest, RolloutRequest]]] = []
    for sample in samples:
        try:
            requests = prober.requests(sample)
        except VideoError as error:
            named = of_sample(sample, error)
            if not skip_broken:
                raise named from error
            results[sample.id] = Probed(skipped=str(named))
            continue
        if requests is None:
            results[sample.id] = Probed(skipped=NO_HINTS)
        else:
            asked.append((sample, requests))
    if skip_broken:
        broken: dict[str, VideoError] = {}
        for kind in range(len(KINDS)):  # apart, because both have the row's id
            broken |= pool.broken([pair[kind].sample for _, pair in asked])
        results |= {id: Probed(skipped=str(error)) for id, error in broken.items()}
        asked = [(sample, pair) for sample, pair in asked if sample.id not in broken]
    if not asked:
        return results
    sampled = pool.generate([request for _, pair in asked for request in pair])
    # Judged as answers to the row's own question, not to the probe's.
    rows = [sample for sample, pair in asked for _ in pair]
    groups = [TrajectoryGroup(s, g.trajectories) for s, g in zip(rows, sampled, strict=True)]
    counts = [
        count_outcomes(outcomes, group.trajectories)
        for outcomes, group in zip(rewards.outcomes(groups), groups, strict=True)
    ]
    for (sample, _), text, hinted in zip(asked, counts[::2], counts[1::2], strict=True):
        results[sample.id] = Probed(text, hinted)
    return results


def _prober(recipe: SelectRecipe, plan: SelectionPlan, policy: str) -> Prober:
    media = media_processor(recipe.data, AutoProcessor.from_pretrained(policy))
    return Prober(plan.prompts, media, recipe.sampling, recipe.seed)


def _samples(recipe: SelectRecipe) -> tuple[list[Sample], list[SkippedRow]]:
    """The rows, and those that could not be read."""
    data = recipe.data
    found = read_samples(
        data.candidates,
        format=data.format,
        columns=data.columns,
        video_root=data.video_root,
        limit=data.limit,
        missing="stop" if data.bad_videos == "stop" else "skip",
    )
    if not any(sample.imagine for sample in found.samples):
        raise RecipeError(
            f"data.candidates: no row of {data.candidates} has `imagine`, the frames that hint at "
            "the answer, so there is nothing to select by; name data with intermediate frames"
        )
    return found.samples, found.skipped


def _check_first(recipe: SelectRecipe, plan: SelectionPlan) -> None:
    """Whether the clips and prompts of the first row with hints can be made."""
    prober = _prober(recipe, plan, recipe.policy.path)
    for sample in plan.samples:
        try:
            requests = prober.requests(sample)
            for request in requests or ():
                clip = prober.media.process(prober.media.key(request.sample))
                prober.media.encode(request.sample, [clip])
        except VideoError:
            if recipe.data.bad_videos == "stop":
                raise
            continue
        if requests is not None:
            return
    raise RecipeError(
        f"data.candidates: no row of {recipe.data.candidates} can be probed: each has a video that "
        "cannot be read, or no frame in `imagine` beyond those in `frames`"
    )


def _chunks(samples: Sequence[Sample], size: int) -> Iterator[Sequence[Sample]]:
    for start in range(0, len(samples), size):
        yield samples[start : start + size]

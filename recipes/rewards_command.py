"""`foresight rewards try`: what a reward gives for stored completions."""

from __future__ import annotations

import json
import logging
import math
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import yaml
from rich.console import Console
from rich.markup import escape

from recipes.reward_trial import Trial, TriedRow
from rewards.batch import Batch, make_batch
from rewards.functions import Signature, load, read_signature
from rewards.look import look
from rewards.registry import BUILTIN, PATH_OPTIONS, build_terms, check_signature
from rewards.scorer import RewardSet
from rewards.terms import RewardTerm
from rl.errors import DataError, RecipeError
from rl.record_rows import MARK
from rl.records import NAME, RecordedGroup, find_records, read_record

# As in `recipes.run_folder`, which takes seconds to import.
RECIPE, TRAJECTORIES = "recipe.yaml", "trajectories"
RULE = "accuracy by rule"  # judges where the file does not say what is right
FLUSH = 0.5  # seconds until what a reward printed has come here
# What a record has only where latents were recorded.
ARRAYS = ("trajectories", "completion_ids")


def try_reward(
    use: str,
    path: Path,
    *,
    options: Sequence[str] = (),
    limit: int | None = None,
    step: int | None = None,
    timeout: float | None = None,
    console: Console | None = None,
) -> Trial:
    """What a reward, named as in a recipe, gives for the completions that a run recorded or a
    person wrote down.

    `path` is a run, a folder of records (of which `step`, by default the newest that has what the
    reward asks for, is taken) or a JSONL file. `options` are texts "key=value". The reward runs in
    a Ray process, as in training; Ray is started, and stopped, unless it is running. Raises
    `RecipeError` for a reward that is unknown, cannot be imported or asks for what no file has, and
    `DataError` for a file that cannot be read.
    """
    console = console or Console(stderr=True)
    chosen = _options(use, options, path)
    if use in BUILTIN:
        _check_needed(use, read_signature(load(BUILTIN[use].target)), chosen)
    term = _term(use, chosen, timeout)
    with console.status("importing the reward"):
        signature = _signature(use, term)
    _check_needed(term.name, signature, chosen)
    if "shuffled_outcomes" in signature.required:
        raise RecipeError(
            f"reward {term.name!r} compares with a control that saw the frames in a random order "
            "(shuffled_outcomes), which records do not keep; it can only be run in training"
        )
    asked = [column for column in ARRAYS if column in signature.columns]
    files = _files(path, step, prefer_arrays=bool(asked))
    groups = [group for file in files for group in read_record(file, arrays=bool(asked))][:limit]
    batch = _batch(groups)
    if lacking := [c for c in asked if c in signature.required and c not in batch.columns]:
        raise RecipeError(_without_arrays(term, lacking, path, step))
    for note in check_signature(term, signature, batch.columns):
        console.print(f"[yellow]note[/]: {escape(note)}", soft_wrap=True)
    number = NAME.fullmatch(files[0].name)
    at = int(number[1]) if number else None
    with _ray(console), tempfile.TemporaryDirectory() as folder:
        notes = Path(folder, "faults.jsonl")
        return _run(use, term, signature, batch, groups, files, at, notes, console)


def _run(
    use: str,
    term: RewardTerm,
    signature: Signature,
    batch: Batch,
    groups: Sequence[RecordedGroup],
    files: Sequence[Path],
    step: int | None,
    notes: Path,
    console: Console,
) -> Trial:
    (rule,) = build_terms([{"use": "accuracy", "name": RULE}])
    # One process for both: a second one takes seconds to start, and the rule is done before.
    term = replace(term, process="trial")
    rule = replace(rule, process="trial", memory_mb=term.memory_mb)
    terms = [rule, term] if term.shaping else [term]
    outcomes = [value for group in groups for value in group.outcome]
    with _quiet(), RewardSet(terms, isolated=True, faults=notes) as rewards:
        if "trainer_state" in signature.columns:
            from transformers import TrainerState  # here, because it takes seconds

            rewards.begin(TrainerState(global_step=step or 0))
        with console.status("running the reward"):
            by_rule = term.shaping and _unjudged(groups)
            if by_rule:
                outcomes = rewards.run([rule], batch)[RULE].values
            if term.shaping:
                batch = batch.with_column("outcomes", batch.split(outcomes))
            rewards.log()
            scored = rewards.run([term], batch)[term.name]
        log = rewards.log()
    faults = notes.read_text(encoding="utf-8").splitlines() if notes.is_file() else []
    own = f"rewards/{term.name}/"
    columns = batch.columns
    return Trial(
        reward=term.name,
        use=use,
        options=dict(term.options),
        files=tuple(map(str, files)),
        step=step,
        rows=tuple(
            TriedRow(
                columns["group_ids"][i],
                columns["id"][i],
                outcomes[i],
                columns["completions"][i][-1]["content"],
                scored.values[i],
                scored.reasons[i],
                {name: values[i] for name, values in log.extras.items()},
            )
            for i in range(len(batch))
        ),
        seconds=sum(value for name, value in log.metrics if name == f"{own}seconds"),
        weight=term.weight,
        outcome_weight=rule.weight if term.shaping else None,
        metrics=tuple(
            (n, v) for n, v in log.metrics if not n.startswith((own, f"rewards/{RULE}/"))
        ),
        faults=tuple(
            fault for line in faults if (fault := json.loads(line))["reward"] == term.name
        ),
        by_rule=by_rule,
    )


def _options(use: str, texts: Sequence[str], path: Path) -> dict[str, Any]:
    """Options from "key=value", the value in YAML as in a recipe."""
    options: dict[str, Any] = {}
    for text in texts:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise RecipeError(f"--option {text}: write key=value, such as words=80")
        try:
            options[key.strip()] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise RecipeError(f"--option {text}: the value is not valid YAML ({error})") from error
    for key in PATH_OPTIONS.get(use, ()):
        if key in options and Path(str(options[key])).exists():
            options[key] = str(Path(str(options[key])).resolve())
    recipe = path / RECIPE
    if use == "latent_alignment" and "policy" not in options and recipe.is_file():
        # As in training: the model that the run started from.
        options["policy"] = yaml.safe_load(recipe.read_text(encoding="utf-8"))["policy"]["path"]
    return options


def _term(use: str, options: Mapping[str, Any], timeout: float | None) -> RewardTerm:
    spec: dict[str, Any] = {"use": use, "options": options}
    if timeout is not None:
        spec["timeout_s"] = timeout
    where = use.rpartition(":")[0]
    if where.endswith(".py") and not (file := Path(where).expanduser()).is_file():
        raise RecipeError(
            f"{use!r}: there is no file {file.resolve()}; paths start from the current folder"
        )
    try:
        (term,) = build_terms([spec])
    except RecipeError as error:
        # It speaks of the place in a recipe, and there is no recipe.
        text = str(error).removeprefix("rewards[0]: ").replace("rewards[0]", "reward", 1)
        raise RecipeError(text) from None
    return term


def _check_needed(name: str, signature: Signature, options: Mapping[str, Any]) -> None:
    """Whether every option without a default is given, in the words of a command line."""
    unset = [n for n, v in signature.options.items() if v is None and n not in options]
    # A misspelt one may be the one that is missing, and is complained about next.
    if unset and all(option in signature.settable for option in options):
        needed = " and ".join(f"--option {option}=…" for option in unset)
        raise RecipeError(f"reward {name!r} needs {needed}")


def _signature(use: str, term: RewardTerm) -> Signature:
    """What it takes, read without importing anything of a user's here."""
    if use in BUILTIN:
        return read_signature(load(BUILTIN[use].target))
    (found,) = look([term.seat.target])
    if isinstance(found, RecipeError):
        raise RecipeError(f"reward {term.name!r}: {found}")
    return found


def _files(path: Path, step: int | None, *, prefer_arrays: bool) -> list[Path]:
    """The file at `path`, or those of one step of the run or folder there."""
    if path.is_file():
        if step is not None:
            raise RecipeError(f"--step chooses among the records of a run, but {path} is a file")
        return [path]
    if not path.is_dir():
        raise DataError(
            f"{path}: nothing is there; give a run, its folder of trajectories or a JSONL file"
        )
    folder, steps = _steps(path)
    if not steps:
        raise DataError(
            f"{folder} has no records of trajectories; a run writes them every "
            "train.record_every steps"
        )
    if step is not None:
        if step not in steps:
            known = ", ".join(map(str, steps))
            raise RecipeError(f"--step {step}: {folder} has records of the steps {known}")
        return steps[step]
    whole = _with_arrays(steps) if prefer_arrays else []
    return steps[max(whole or steps)]


def _steps(path: Path) -> tuple[Path, dict[int, list[Path]]]:
    """The folder of records of a run, or `path` itself, and its files by step."""
    folder = path / TRAJECTORIES if (path / TRAJECTORIES).is_dir() else path
    steps: dict[int, list[Path]] = {}
    for file in find_records(folder):
        name = NAME.fullmatch(file.name)
        assert name is not None  # that is how they were found
        steps.setdefault(int(name[1]), []).append(file)
    return folder, steps


def _with_arrays(steps: Mapping[int, Sequence[Path]]) -> list[int]:
    return [
        step
        for step, files in steps.items()
        if all(file.with_suffix(".safetensors").is_file() for file in files)
    ]


def _without_arrays(term: RewardTerm, lacking: Sequence[str], path: Path, step: int | None) -> str:
    told = f"reward {term.name!r} asks for {' and '.join(lacking)}, which "
    if path.is_file():
        written = "" if "trajectories" in lacking else f"write {lacking[0]} into each line, or "
        return (
            f"{told}{path} does not have; {written}try it on a run that recorded latents "
            "(train.record_latents_every in its recipe)"
        )
    if step is not None and (whole := _with_arrays(_steps(path)[1])):
        known = ", ".join(map(str, whole))
        return f"{told}the record of step {step} does not have; choose a --step that has: {known}"
    return (
        f"{told}no record in {path} has; set train.record_latents_every in the recipe, and runs "
        "keep them for every so many steps"
    )


def _batch(groups: Sequence[RecordedGroup]) -> Batch:
    trajectories = None
    if all(group.trajectories is not None for group in groups):
        trajectories = [t for group in groups for t in group.trajectories or ()]
    return make_batch(
        [group.sample for group in groups],
        [group.completions for group in groups],
        trajectories,
        [[row["extra"] for row in group.rows] for group in groups],
    )


def _unjudged(groups: Sequence[RecordedGroup]) -> bool:
    """Whether a person's file has answers, but does not say which completions are right. In a
    record, an unknown outcome is one that could not be determined.
    """
    rows = [row for group in groups for row in group.rows]
    return (
        all(math.isnan(row["outcome"]) and MARK not in row for row in rows)
        and any(row["answer"] for row in rows)
    )  # fmt: skip


@contextmanager
def _ray(console: Console) -> Iterator[None]:
    """A Ray of this machine for as long as needed, unless one is there."""
    import ray

    if ray.is_initialized():
        yield
        return
    with console.status("starting Ray"):
        ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.WARNING)
    try:
        yield
        time.sleep(FLUSH)
    finally:
        ray.shutdown()


@contextmanager
def _quiet() -> Iterator[None]:
    """Faults are shown at the end, all together: not on the terminal as they happen."""
    logger, silent = logging.getLogger("rewards"), logging.NullHandler()
    logger.addHandler(silent)
    try:
        yield
    finally:
        logger.removeHandler(silent)

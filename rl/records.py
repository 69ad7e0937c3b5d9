"""What a training step sampled, on disk: for people, and for trying rewards on it later.

A step is one file, or two, in a folder. ``step-000020.jsonl`` has one line a trajectory:

| key | |
|---|---|
| foresight_record | the version of this layout, 2 (1 knew no top_p, top_k and `kept`) |
| step, rollout, rank, group | the step, its rollout, the process, and the group's number in it |
| id, video, question, answer, options, frames, imagine, extra | the manifest row |
| text | the completion |
| outcome | 1 right, 0 wrong, null invalid |
| trained, gated | of the group: is it trained on, is its shaping switched off |
| rewards, weights | by reward: the value (null for none) and its weight |
| invalid | by reward: why it has no value; only where something went wrong |
| total, advantage | the reward as trained on (see `totals`), null for none; the advantage |
| tokens, latents, span_lengths, finish_reason | of the completion |
| policy_version, seed, sampling, filler, media | how it was sampled |
| arrays | its file and row of arrays, if they were recorded |

``step-000020.safetensors`` holds the arrays of all N trajectories end to end (`prompt_ids`,
`completion_ids`, `decision`, `logprobs`, `kept`, `latents`, `latent_logprobs`, with visual replay
also `replayed`, each in its own dtype) and where each begins (`prompt_offsets`,
`completion_offsets`, `latent_offsets` [N + 1]). With it, every `Trajectory` comes back exactly. A
line names its row, so lines may be cut out and reordered. Records of version 1 are read as what
they are: sampled without truncation.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file

from rl.errors import DataError, TrajectoryError
from rl.interfaces import GroupScores
from rl.record_arrays import Arrays, pack
from rl.record_rows import COLUMNS, MARK, VERSION, Row, group_key, read_row
from rl.reward_table import reward_table
from rl.trajectory import Sample, Trajectory, TrajectoryGroup
from rl.writing import write_whole

NAME = re.compile(r"step-(\d+)(?:-(\d+))?(?:-rank(\d+))?\.jsonl")


@dataclass(frozen=True)
class RecordedGroup:
    """One group of a record, or of a file of completions that a person wrote.

    Each of `rows` is a line of the file with the keys of the module's table; a plain file gives the
    manifest row, `text` and `outcome`. Null numbers are NaN. `sample.extra` has the columns in
    which the rows agree, `row["extra"]` all of a row's. `trajectories` is None if their arrays were
    not recorded.
    """

    sample: Sample
    rows: tuple[Row, ...]
    trajectories: tuple[Trajectory, ...] | None

    @property
    def completions(self) -> list[str]:
        return [row["text"] for row in self.rows]

    @property
    def outcome(self) -> list[float]:
        """1 for right, 0 for wrong, NaN where it is unknown."""
        return [row["outcome"] for row in self.rows]


# -- writing ---------------------------------------------------------------------------------------


def write_record(
    folder: Path,
    step: int,
    groups: Sequence[TrajectoryGroup],
    scores: Sequence[GroupScores],
    *,
    trained: Sequence[bool],
    advantages: Sequence[float],
    weights: Mapping[str, float],
    arrays: bool = False,
    rollout: int = 0,
    rank: int = 0,
) -> Path:
    """Write the record of one step and return its JSONL file.

    `rollout` numbers the rollouts of a step, where it has several, and `rank` the process.
    `scores` and `trained` have one item a group, `advantages` one a trajectory, groups end to end.
    `weights` are the rewards' weights by name, the outcome's first. An older record of the same
    rollout is replaced. A JSONL file that is there is whole, and so are the arrays it names. Raises
    `TrajectoryError` for arguments that do not fit each other and `DataError` for a manifest column
    that JSON cannot hold.
    """
    _check_sizes(step, groups, scores, trained, advantages, weights)
    several = (f"-{rollout}" if rollout else "") + (f"-rank{rank}" if rank else "")
    path = folder / f"step-{step:06d}{several}.jsonl"
    file = path.with_suffix(".safetensors")
    run = {MARK: VERSION, "step": step, "rollout": rollout, "rank": rank}
    sums = iter(zip(totals(scores, weights), advantages, strict=True))
    rows: list[Row] = []
    for number, (group, score, on) in enumerate(zip(groups, scores, trained, strict=True)):
        for member in range(len(group)):
            row = {**run, "group": number, **_about(group, score, member), "trained": bool(on)}
            row["weights"] = dict(weights)
            row["total"], row["advantage"] = next(sums)
            row |= _facts(group.trajectories[member])
            if arrays:
                row["arrays"] = {"file": file.name, "row": len(rows)}
            rows.append(_plain(row, f"record of step {step}, sample {group.sample.id!r}"))
    lines = [json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n" for row in rows]
    # A lone surrogate has no UTF-8; its backslash escape is JSON's own.
    text = "".join(lines).encode(errors="backslashreplace")
    tensors = pack([t for group in groups for t in group]) if arrays else None
    folder.mkdir(parents=True, exist_ok=True)
    # The old lines go first: they must not be found beside new arrays.
    path.unlink(missing_ok=True)
    file.unlink(missing_ok=True)
    if tensors is not None:
        write_whole(file, lambda draft: save_file(tensors, draft))
    write_whole(path, lambda draft: draft.write_bytes(text))
    return path


def totals(scores: Sequence[GroupScores], weights: Mapping[str, float]) -> list[float]:
    """The weighted sum of rewards of each trajectory, groups end to end, as it is trained on.

    See `rl.reward_table` for what a missing value and gated shaping count; NaN for an invalid
    outcome. `weights` has the outcome's reward first.
    """
    table = reward_table(list(weights), scores).double()
    return (table @ torch.tensor(list(weights.values()), dtype=torch.float64)).tolist()


def _check_sizes(
    step: int,
    groups: Sequence[TrajectoryGroup],
    scores: Sequence[GroupScores],
    trained: Sequence[bool],
    advantages: Sequence[float],
    weights: Mapping[str, float],
) -> None:
    sizes = [len(group) for group in groups]
    if not len(sizes) == len(scores) == len(trained) or sum(sizes) != len(advantages):
        raise TrajectoryError(
            f"record of step {step}: {len(sizes)} groups of {sum(sizes)} trajectories, "
            f"{len(scores)} scores, {len(trained)} flags, {len(advantages)} advantages; give one "
            "score and flag a group and one advantage a trajectory"
        )
    for group, score in zip(groups, scores, strict=True):
        columns = [score.outcome, *score.components.values(), *score.invalid.values()]
        if {len(column) for column in columns} != {len(group)}:
            raise TrajectoryError(
                f"record of step {step}: the scores of sample {group.sample.id!r} have "
                f"{sorted({len(column) for column in columns})} values for {len(group)} "
                "trajectories; they need one a trajectory"
            )
        if set(weights) != set(score.components):
            raise TrajectoryError(
                f"record of step {step}: weights for {sorted(weights)}, but sample "
                f"{group.sample.id!r} has rewards {sorted(score.components)}; they must be the same"
            )


def _about(group: TrajectoryGroup, score: GroupScores, member: int) -> Row:
    """What was asked, what one member answered, and what rewards say of it."""
    row = {name: getattr(group.sample, name) for name in (*COLUMNS, "extra")}
    row |= {"text": group.trajectories[member].text, "outcome": score.outcome[member]}
    row |= {"rewards": {name: values[member] for name, values in score.components.items()}}
    reasons = {name: column[member] for name, column in score.invalid.items() if column[member]}
    if reasons:
        row["invalid"] = reasons
    return {**row, "gated": score.gated}


def _facts(t: Trajectory) -> Row:
    """What a trajectory is beside its text and its arrays."""
    return {
        "tokens": len(t.completion_ids),
        "latents": len(t.latents),
        "span_lengths": t.span_lengths,
        "finish_reason": t.finish_reason,
        "policy_version": t.policy_version,
        "seed": t.seed,
        "sampling": asdict(t.sampling),
        "filler": t.filler,
        "media": [asdict(key) for key in t.media],
    }


def _plain(value: Any, where: str) -> Any:
    """`value` as JSON has it: numpy and torch as plain numbers and lists, NaN as null, infinity as
    text.
    """
    if value is None or isinstance(value, bool | str | int):
        return value
    if isinstance(value, float):
        return None if math.isnan(value) else str(value) if math.isinf(value) else float(value)
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {key: _plain(item, f"{where}, {key!r}") for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, np.generic | np.ndarray | torch.Tensor):
        plain = value.tolist()
        if not isinstance(plain, np.generic):  # a long double stays what it was
            return _plain(plain, where)
    raise DataError(
        f"{where}: {repr(value)[:80]} of type {type(value).__name__} cannot be written as JSON; "
        "use texts, numbers, and lists and objects (with texts as keys) of them"
    )


# -- reading ---------------------------------------------------------------------------------------


def find_records(folder: Path) -> list[Path]:
    """The JSONL files that `write_record` left in a folder, by step, rollout and rank."""
    found = [(NAME.fullmatch(path.name), path) for path in folder.glob("step-*.jsonl")]
    named = [([int(number or 0) for number in m.groups()], path) for m, path in found if m]
    return [path for _, path in sorted(named)]


def read_record(path: Path, *, arrays: bool = True) -> list[RecordedGroup]:
    """The groups of a record, or of a plain file of completions.

    A plain file has one JSON object a line: `completion` (or `text`) and `question` (or `prompt`),
    texts or lists of messages; optional are `id`, `answer`, `options`, `outcome` (0, 1, true, false
    or null), `video`, `frames` and `imagine`; any other column goes to `extra`. Lines that follow
    each other form a group if they have the same `id`, or no `id` and equal questions, answers and
    so on. With `arrays` false, recorded arrays are left unread. Raises `DataError`,
    which names file, line and column.
    """
    files, groups = Arrays(path.parent), []
    for _, placed in groupby(_rows(path), key=lambda item: group_key(item[1])):
        members = list(placed)
        sample = _common_sample(path, members)
        rows = tuple({**row, "id": sample.id} for _, row in members)
        trajectories = None
        if arrays and all("arrays" in row for row in rows):
            trajectories = tuple(
                files.trajectory(row, f"{path}, line {number}")
                for row, (number, _) in zip(rows, members, strict=True)
            )
        groups.append(RecordedGroup(sample, rows, trajectories))
    if not groups:
        raise DataError(f"{path}: the file has no rows; write one JSON object a line")
    return groups


def _rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Each row with the number of its line."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text file in UTF-8 ({error}); save it as UTF-8") from error
    except OSError as error:
        raise DataError(
            f"{path}: the file cannot be read ({error.strerror}); check the path"
        ) from error
    for number, line in enumerate(lines, start=1):
        if line.strip():
            yield number, read_row(line, f"{path}, line {number}")


def _common_sample(path: Path, members: Sequence[tuple[int, Row]]) -> Sample:
    """The sample of a group's rows, which must agree in all but the extra columns."""
    (first_number, first), *others = members
    extra = first["extra"]
    for number, row in others:
        for column in COLUMNS:
            if row[column] != first[column]:
                raise DataError(
                    f"{path}, line {number}: column {column!r} differs from line {first_number}, "
                    f"of the same group (id {row['id']!r}); give different questions different ids"
                )
        # As JSON, where NaN is equal to itself and 1 is not true.
        extra = {k: v for k, v in extra.items() if json.dumps(v) == _dumped(row["extra"], k)}
    return Sample(
        id=f"{path.stem}:{first_number}" if first["id"] is None else str(first["id"]),
        video=first["video"],
        question=first["question"],
        answer=first["answer"],
        options=tuple(first["options"]),
        frames=tuple(first["frames"]),
        imagine=tuple(tuple(span) for span in first["imagine"]),
        extra=extra,
        reasoning=tuple(first["reasoning"]),
        window=None if first["window"] is None else (first["window"][0], first["window"][1]),
        pool=first["pool"],
        images=tuple(first["images"]),
    )


def _dumped(values: Mapping[str, Any], key: str) -> str | None:
    return json.dumps(values[key]) if key in values else None

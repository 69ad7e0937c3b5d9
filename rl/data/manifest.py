"""Manifests: one JSON object a line, one question about one video each.

    {"video": "a/01.mp4", "question": "What comes next?", "options": ["up", "down"], "answer": "A"}

| column | | |
|---|---|---|
| video | path | relative to the manifest's folder, or to `video_root` |
| question | text | |
| answer | text | with options: a letter (A, B, ...) or the text of an option |
| options | texts | optional; the choices |
| frames | integers | optional; the frames shown to the model, ascending |
| imagine | lists of integers | optional; for each latent span, the frames it should depict |
| reasoning | texts | optional; what to write around the spans: one text more than spans |
| steps | texts | optional; a chain of thought, for a curriculum of latents |
| window | two numbers | optional; the part of the video that counts, in seconds |
| pool | integer | optional; `frames` and `imagine` are places among so many, spread over the clip |
| images | paths | in the place of `video`: the images that a clip is made of |
| id | text or integer | optional; "<manifest's name>:<line>" otherwise |

Every other column is kept in `Sample.extra`, where rewards find it. The rows may also stand in a
JSON list or in Parquet. Those of other data sets: see `rl.data.formats`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from string import ascii_uppercase
from typing import Any

from rl.data.formats.draft import Draft, Format
from rl.data.rows import OURS, Row
from rl.errors import DataError
from rl.trajectory import Sample


def read_manifest(
    path: str | Path, *, video_root: str | Path | None = None, limit: int | None = None
) -> list[Sample]:
    """Read and check the rows of a manifest, the first `limit` of them if given.

    Answers to questions with options come back as the option's letter, videos as absolute paths.
    Raises `DataError`, for videos `MissingVideoError`; the message names file, line and column and
    says what to do.
    """
    from rl.data.formats.reading import read_samples  # which knows this format too

    return read_samples(path, format="manifest", video_root=video_root, limit=limit).samples


def manifest_row(sample: Sample) -> dict[str, Any]:
    """The row that `read_manifest` reads as `sample`, with absolute paths; values are JSON's if
    those of `extra` are.

    Raises `DataError` for an `extra` column that has the name of one of ours.
    """
    if taken := sorted({*sample.extra} & {*OURS}):
        raise DataError(
            f"sample {sample.id!r}: its further columns {taken} have names of Foresight's own; "
            "rename them in the data"
        )
    answer, options = sample.answer, sample.options
    if answer in options and (own := options[ascii_uppercase.index(answer)]) != answer:
        answer = f"{answer}. {own}"  # the letter alone would also be another option's text
    listed = {
        "options": options,
        "frames": sample.frames,
        "imagine": [list(span) for span in sample.imagine],
        "reasoning": sample.reasoning,
        "window": sample.window or (),
    }
    return {
        "id": sample.id,
        **({"images": list(sample.images)} if sample.images else {"video": sample.video}),
        "question": sample.question,
        "answer": answer,
        **{column: list(values) for column, values in listed.items() if values},
        **({"pool": sample.pool} if sample.pool else {}),
        **sample.extra,
    }


def _drafts(row: Row) -> Iterator[Draft]:
    options, imagine = row.texts("options"), row.spans("imagine")
    video = row.get("video")
    if not isinstance(video, str | None):
        raise row.wrong_type("video", video, "the path of a file, in quotes")
    pool, images = row.get("pool"), row.texts("images") or ()
    if pool is not None and (type(pool) is not int or pool < 1):
        raise row.wrong_type("pool", pool, "a whole number, at least 1, or leave the column out")
    yield Draft(
        id=row.id(),
        videos=[video] if video and not images else [],
        images=images,
        question=row.text("question"),
        answer=row.text("answer").strip(),
        options=options,
        frames=row.frames("frames", row.get("frames")),
        imagine=imagine,
        reasoning=row.reasoning("reasoning", len(imagine)),
        window=_window(row),
        pool=pool or 0,
        as_written=True,
    )


def _window(row: Row) -> tuple[float, float] | None:
    value = row.get("window")
    if value is None:
        return None
    numbers = isinstance(value, list) and all(type(v) in (int, float) for v in value)
    if not numbers or len(value) != 2 or not 0 <= value[0] < value[1] < math.inf:
        raise row.wrong_type("window", value, "the seconds it begins and ends at: [2.5, 7]")
    return float(value[0]), float(value[1])


MANIFEST = Format(
    "manifest",
    "Foresight's own rows",
    ("video|images", "question", "answer"),
    _drafts,
    own_ids=True,
)

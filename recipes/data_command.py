"""`foresight data`: a look at a data set before anything is trained on it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.markup import escape

from rl.data.formats import SampleSet, read_samples
from rl.data.media import question_text
from rl.errors import RecipeError
from rl.trajectory import Sample

_ROWS = 3  # shown
_MISSING = 5  # named


def show_data(
    source: str,
    console: Console,
    *,
    format: str = "auto",
    columns: Sequence[str] = (),
    video_root: Path | None = None,
    limit: int | None = None,
) -> None:
    """Print what a data set was recognised as, how many rows there are of what kind, three of them
    as the model is asked, and which have no video.

    `columns` are ``ours=theirs``. Raises `RecipeError` for one that is not, and the errors of
    `read_samples`.
    """
    found = read_samples(
        source,
        format=format,
        columns=dict(map(_pair, columns)) or None,
        video_root=video_root,
        limit=limit,
        missing="skip",
    )
    console.print(escape(found.recognised), soft_wrap=True)
    console.print(_counts(found))
    for place in sorted({0, len(found.samples) // 2, len(found.samples) - 1})[:_ROWS]:
        _print_row(found.samples[place], console)
    for name, _, reason in found.skipped[:_MISSING]:
        console.print(f"missing: {escape(name)}: {escape(reason)}", soft_wrap=True)
    if (left := len(found.skipped) - _MISSING) > 0:
        console.print(f"... and {left} more without a video")


def _pair(text: str) -> tuple[str, str]:
    ours, equals, theirs = text.partition("=")
    if not equals or not ours.strip() or not theirs.strip():
        raise RecipeError(f"--columns {text}: write ours=theirs, such as question=qa.Question")
    return ours.strip(), theirs.strip()


def _counts(found: SampleSet) -> str:
    samples = found.samples
    kinds = {
        "with options": sum(bool(s.options) for s in samples),
        "with frames to imagine": sum(bool(s.imagine) for s in samples),
        "with reasoning": sum(bool(s.reasoning) for s in samples),
        "of images": sum(bool(s.images) for s in samples),
        "of a part of the video": sum(s.window is not None for s in samples),
        "without their video": len(found.skipped),
    }
    told = [f"{count} {kind}" for kind, count in kinds.items() if count]
    letters = Counter(s.answer for s in samples if s.options)
    if letters:
        told.append("answers " + ", ".join(f"{a} {letters[a]}" for a in sorted(letters)))
    return "; ".join([f"{len(samples)} rows", *told])


def _print_row(sample: Sample, console: Console) -> None:
    clip = f"{len(sample.images)} images from {sample.video}" if sample.images else sample.video
    console.rule(escape(sample.id), align="left")
    console.print(escape(clip), soft_wrap=True, style="dim")
    console.print(escape(question_text(sample)), soft_wrap=True)
    console.print(f"[bold]answer[/bold] {escape(sample.answer)}", soft_wrap=True)
    if sample.imagine:
        where = f" of {sample.pool} places" if sample.pool else ""
        console.print(f"shown {list(sample.frames)}, imagined {list(sample.imagine)}{where}")
    if sample.extra:
        console.print(f"also {', '.join(map(escape, sample.extra))}", soft_wrap=True, style="dim")

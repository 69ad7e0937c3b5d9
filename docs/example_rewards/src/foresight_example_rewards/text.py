"""Rewards that read what was written. They know nothing of Foresight and run in TRL as they are."""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Sequence
from typing import Any

MARKER = re.compile(r"<\|.*?\|>")  # <|latent_start|> and the like: not words


def text_of(completion: str | Sequence[dict[str, str]]) -> str:
    """A completion is a text, or a conversation whose last message is the answer."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def brevity(completions: Sequence[Any], *, words: int = 60, **_: Any) -> list[float]:
    """1 up to `words` words, beyond that `words` divided by their number.

    The pattern: columns come by name, one item a completion, and out goes one value for each.
    `words` has a default, so it is an option that a recipe may set; `**_` takes the columns that
    are of no interest.
    """
    if words < 1:
        raise ValueError(f"brevity: words is {words}; allow at least 1")
    counts = [len(MARKER.sub(" ", text_of(completion)).split()) for completion in completions]
    return [min(1.0, words / max(count, 1)) for count in counts]


# Foresight takes a value outside of the range for a fault, not for a reward.
brevity.range = (0.0, 1.0)


async def mentions(
    completions: Sequence[Any],
    objects: Sequence[Sequence[str] | None],
    log_metric: Callable[[str, float], None] | None = None,
    **_: Any,
) -> list[float | None]:
    """The share of a row's `objects` that its completion names; None for a row without any.

    The pattern: `objects` is a column of the manifest, such as ``"objects": ["ball", "ramp"]``. It
    has no default, so a manifest in which no row has it is refused. None is "does not apply here"
    and leaves the group's mean alone, as 0 would not.
    """
    asked = zip(completions, objects, strict=True)
    values = await asyncio.gather(*[_named(text_of(text), names) for text, names in asked])
    if log_metric is not None:
        log_metric("mentions/rows_with_objects", sum(map(bool, objects)) / max(len(objects), 1))
    return list(values)


mentions.range = (0.0, 1.0)


async def _named(text: str, names: Sequence[str] | None) -> float | None:
    # Where a service has to be asked, await it here: all completions wait at the same time.
    if not names:
        return None
    found = [re.search(rf"\b{re.escape(name)}\b", text, re.IGNORECASE) for name in names]
    return sum(map(bool, found)) / len(names)

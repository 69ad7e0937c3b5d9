"""How much of a text repeats itself.

Source: Future-L1's release takes the largest of three signs (4-grams, consecutive windows of 50
words, duplicate lines) and calls an answer with a score above 0.5 wrong (OpenGVLab/Future-L1).
This is our reconstruction of that score: how the windows are counted is ours. As a reward it is a
penalty of its own and leaves the outcome alone.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Sequence
from typing import Any

from rewards.text import Completion, completion_text, replace_spans

GRAM = 4
WINDOWS = (50, 25)  # words
SHORT_LINE = 10  # characters: lines up to this length repeat honestly ("}", "Yes.")
TAGS = re.compile(r"<\|[^|<>]*\|>|</?(?:reason|think|answer)>")


def repetition_score(text: str) -> float:
    """The largest of three shares, each in [0, 1]; latent spans and tags do not count.

    - 4-grams: 1 - distinct / all, over words split at spaces;
    - loops: the share of words inside the longest run of equal neighbouring windows of 50 or 25
      words;
    - lines: 1 - distinct / all, over lines longer than 10 characters, if there are at least three.

    0 for fewer than five words. Range: [0, 1].
    """
    text = TAGS.sub(" ", replace_spans(text, " "))
    words = text.split()
    if len(words) <= GRAM:
        return 0.0
    grams = [tuple(words[i : i + GRAM]) for i in range(len(words) - GRAM + 1)]
    lines = [line for raw in text.splitlines() if len(line := raw.strip()) > SHORT_LINE]
    loops = max(_looping(words, window) for window in WINDOWS) / len(words)
    return max(_repeated(grams), loops, _repeated(lines) if len(lines) > 2 else 0.0)


def _repeated(items: Sequence[Hashable]) -> float:
    return 1.0 - len(set(items)) / len(items)


def _looping(words: Sequence[str], window: int) -> int:
    """Words in the longest run of two or more equal neighbouring windows.

    Words i and i + window agree throughout a loop, so a stretch of n agreements holds n // window +
    1 copies.
    """
    longest = stretch = 0
    for first, second in zip(words, words[window:], strict=False):
        stretch = stretch + 1 if first == second else 0
        longest = max(longest, stretch)
    copies = longest // window
    return (copies + 1) * window if copies else 0


def repetition_rewards(completions: Sequence[Completion], **_: Any) -> list[float]:
    """Minus `repetition_score` of each completion, with TRL's signature. Range: [-1, 0]."""
    return [-repetition_score(completion_text(c)) for c in completions]

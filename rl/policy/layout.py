"""How groups lie in one row of tokens: `[prompt | completion 1 | … | completion G]`, group after
group, without padding.

In group-relative RL every prompt is answered G times, and for video the prompt is nearly all of the
sequence. Laid out like this it is computed once. What keeps the answers apart is the attention
(`rl.policy.packed_attention`), the recurrence (`rl.policy.packed_recurrence`) and the positions.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass


@dataclass(frozen=True)
class PackedGroup:
    """One prompt of P tokens, which begins at `start`, and the completions that follow it, of
    C_1 … C_G tokens. Every completion sees the prompt and itself.
    """

    start: int
    prompt: int  # P, at least 1
    completions: tuple[int, ...]  # G of them, each at least 1

    @property
    def answers(self) -> int:
        """Where the first completion begins."""
        return self.start + self.prompt

    @property
    def stop(self) -> int:
        return self.answers + sum(self.completions)


@dataclass(frozen=True)
class PackLayout:
    """The groups of one row, in order. Python numbers only, so that no pass waits for a device."""

    groups: tuple[PackedGroup, ...]

    @classmethod
    def of(cls, lengths: Iterable[tuple[int, Sequence[int]]]) -> PackLayout:
        """The layout of groups with these lengths: (P, (C_1, …, C_G)) each."""
        groups, start = [], 0
        for prompt, completions in lengths:
            groups.append(PackedGroup(start, prompt, tuple(completions)))
            start = groups[-1].stop
        return cls(tuple(groups))

    @property
    def length(self) -> int:
        """T, the tokens of the row."""
        return self.groups[-1].stop if self.groups else 0


_following: ContextVar[set[int] | None] = ContextVar("layers that keep to a layout", default=None)


@contextmanager
def followers() -> Iterator[set[int]]:
    """Collects the numbers of the layers that keep to a layout while this lasts."""
    layers: set[int] = set()
    token = _following.set(layers)
    try:
        yield layers
    finally:
        _following.reset(token)


def follow(layer: int) -> None:
    """Called by the attention or recurrence of layer number `layer` when it keeps to a layout."""
    layers = _following.get()
    if layers is not None:  # None in backward, where checkpointed layers run once more
        layers.add(layer)

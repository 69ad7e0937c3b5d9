"""How much the last token of each sequence attends to those before it.

Attention maps of whole sequences never exist: kernels do not give them, and at the length of a
video prompt they would not fit. Only the row of the last query is computed, from the queries and
keys that a layer attends with anyway, and only while someone watches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_watching: ContextVar[Saliency | None] = ContextVar("what attention is summed up for", default=None)


class Saliency:
    """Attention of the last tokens, summed over heads and calls."""

    def __init__(self) -> None:
        self._sum: torch.Tensor | None = None
        self._rows = 0

    @property
    def value(self) -> torch.Tensor:
        """Mean over layers and heads of the attention of each sequence's last token: float32 [B,
        K], K the tokens that it could see.
        """
        assert self._sum is not None, "no attention was computed while this watched"
        return self._sum / self._rows

    @torch.no_grad()
    def add(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> None:
        """From a layer's query [B, Hq, T, D] and key [B, Hkv, K, D]; `mask` [B, 1, T, K] is bool
        (True: visible), or is added to the scores.
        """
        last = query[:, :, -1].unflatten(1, (key.shape[1], -1))  # [B, Hkv, Hq / Hkv, D]
        scores = torch.einsum("bkgd,bktd->bkgt", last.float(), key.float()) * scale
        if mask is not None:
            row = mask[:, :, -1:, : key.shape[2]]
            scores = (
                scores.masked_fill(~row, -torch.inf) if row.dtype == torch.bool else scores + row
            )
        found = scores.softmax(-1).sum((1, 2))
        self._sum = found if self._sum is None else self._sum + found
        self._rows += query.shape[1]


@contextmanager
def watched() -> Iterator[Saliency]:
    """Sums up the attention of all layers while this lasts, which should be one forward pass."""
    found = Saliency()
    token = _watching.set(found)
    try:
        yield found
    finally:
        _watching.reset(token)


@contextmanager
def unwatched() -> Iterator[None]:
    """Attention in here does not count."""
    token = _watching.set(None)
    try:
        yield
    finally:
        _watching.reset(token)


def watching() -> Saliency | None:
    """What is summed up for now, if anything."""
    return _watching.get()

"""How much the last token of each sequence, or a few, attend to those before.

Attention maps of whole sequences never exist: kernels do not give them, and at the length of a
video prompt they would not fit. Only the rows that are asked for are computed, from the queries and
keys that a layer attends with anyway, and only while someone watches.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar

import torch

_watching: ContextVar[Saliency | None] = ContextVar("what attention is summed up for", default=None)


class Saliency:
    """Attention of the last tokens of a pass, and of some `rows` (bool [B, T], at least one each)
    if they are asked for, summed over heads and calls.
    """

    def __init__(self, rows: torch.Tensor | None = None) -> None:
        self._rows = rows
        self._last: torch.Tensor | None = None
        self._mean: torch.Tensor | None = None
        self._heads = 0

    @property
    def last(self) -> torch.Tensor:
        """Mean over layers and heads of the attention of each sequence's last token: float32 [B,
        K], K the tokens that it could see.
        """
        assert self._last is not None, "no attention was computed while this watched"
        return self._last / self._heads

    @property
    def mean(self) -> torch.Tensor:
        """The same of the rows that were asked for, mean over these too."""
        assert self._mean is not None, "no rows were asked for"
        return self._mean / self._heads

    @torch.no_grad()
    def add(
        self, query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
    ) -> None:
        """From a layer's query [B, Hq, T, D] and key [B, Hkv, K, D]; `mask` [B, 1, T, K] is bool
        (True: visible), or is added to the scores.
        """
        found = _attention(query[:, :, -1:], key, mask, scale).sum((1, 2, 3))
        self._last = found if self._last is None else self._last + found
        self._heads += query.shape[1]
        if self._rows is not None:
            first = int(self._rows.any(0).long().argmax())  # before it nobody asks
            weight = self._rows[:, first:].float()
            weight = weight / weight.sum(1, keepdim=True)
            rows = _attention(query[:, :, first:], key, mask, scale).sum((1, 2))
            found = (rows * weight[..., None]).sum(1)
            self._mean = found if self._mean is None else self._mean + found


def _attention(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, scale: float
) -> torch.Tensor:
    """Attention [B, Hkv, Hq / Hkv, R, K] of the last R of a pass's queries [B, Hq, R, D]."""
    count, length = query.shape[2], key.shape[2]
    grouped = query.unflatten(1, (key.shape[1], -1))
    scores = torch.einsum("bkgrd,bktd->bkgrt", grouped, key).float() * scale
    places = torch.arange(length, device=key.device)
    behind = places > places[length - count :, None]
    scores = scores.masked_fill(behind, -torch.inf)
    if mask is not None:
        rows = mask[:, :, None, -count:, :length]
        scores = (
            scores.masked_fill(~rows, -torch.inf) if rows.dtype == torch.bool else scores + rows
        )
    return scores.softmax(-1)


@contextmanager
def watched(rows: torch.Tensor | None = None) -> Iterator[Saliency]:
    """Sums up the attention of all layers while this lasts, which should be one forward pass: that
    of the last tokens, and of `rows`.
    """
    found = Saliency(rows)
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

"""The latent protocol: how a completion alternates between text and latent spans.

A latent span is ``S z_1 … z_T E``: the start token, T continuous vectors whose token ids are the
filler, the end token. This module is the one place that knows which positions of a completion are
free choices, which are end-or-continue decisions and which are forced. It works on ids alone, so
every engine and the replay share it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from enum import IntEnum
from typing import Any, Literal, Protocol, get_args

import numpy as np

from rl.errors import ProtocolError

Density = Literal["gaussian", "vmf"]
Imagine = Literal["free", "always", "never"]


class Slot(IntEnum):
    """What was decided at one position of a completion."""

    # No choice: a filler below the minimum, an end at the maximum, a start that was asked for.
    FORCED = 0
    TOKEN = 1  # a token drawn from the vocabulary
    DECISION = (
        2  # inside a span: end it (the id is the end token) or continue it (the id is the filler)
    )


class Step(IntEnum):
    """What the next position may hold, given the state."""

    TOKEN = 0  # any token but the filler, the end token and the media placeholders
    TOKEN_NO_START = 1  # the same, and no start token either: the span budget is spent
    START = 2  # the start token, forced
    LATENT = 3  # a latent, forced: the span is below its minimum
    DECIDE = 4  # a latent or the end token, as the policy decides
    END = 5  # the end token, forced: the span is at its maximum


class SupportsTokenIds(Protocol):
    """The part of a tokenizer that the protocol needs."""

    unk_token_id: int | None

    def convert_tokens_to_ids(self, tokens: str) -> int | None: ...


@dataclass(frozen=True)
class LatentTokens:
    """Token ids of a protocol in one vocabulary."""

    start: int
    end: int
    filler: int
    banned: tuple[int, ...] = ()  # placeholders of images and videos: never sampled


@dataclass(frozen=True)
class SpanState:
    """Where in a completion we are: nothing but what the ids so far imply."""

    position: int = 0
    open: bool = False
    length: int = 0  # latents in the open span
    spans: int = 0  # spans opened so far


@dataclass(frozen=True)
class Trace:
    """What `LatentProtocol.trace` reads off the ids of one completion of C tokens."""

    slots: np.ndarray  # int8 [C], values of `Slot`
    may_start: np.ndarray  # bool [C]; at a TOKEN slot: was the start token among the choices
    span_lengths: tuple[int, ...]  # latents in each span, the last one perhaps cut short


@dataclass(frozen=True)
class LatentProtocol:
    """Tokens, budgets and noise of latent spans. Travels in the policy's ``config.json``.

    `min_length` = `max_length` gives spans of fixed length; otherwise the policy decides
    end-or-continue at each step in between. `noise_scale` is c in σ = c·‖μ‖/√H: the expected norm
    of the noise relative to the mean's norm. For `density="vmf"` the direction of a latent is von
    Mises-Fisher with κ = H/c² and its norm is the mean's.
    """

    start_token: str = "<|latent_start|>"
    end_token: str = "<|latent_end|>"
    filler_token: str = "<|latent|>"
    min_length: int = 1
    max_length: int = 8
    max_spans: int = 4
    noise_scale: float = 0.0
    density: Density = "gaussian"

    def __post_init__(self) -> None:
        if not 1 <= self.min_length <= self.max_length:
            raise ProtocolError(
                f"need 1 <= min_length <= max_length, got {self.min_length} and {self.max_length}"
            )
        if self.max_spans < 1:
            raise ProtocolError(f"max_spans is {self.max_spans}; a latent policy needs at least 1")
        if not 0.0 <= self.noise_scale < float("inf"):
            raise ProtocolError(f"noise_scale is {self.noise_scale}; it must be finite and >= 0")
        if self.density not in get_args(Density):
            raise ProtocolError(f"density is {self.density!r}; choose one of {get_args(Density)}")
        if len({self.start_token, self.end_token, self.filler_token}) != 3:
            raise ProtocolError(
                "start_token, end_token and filler_token must be three different tokens"
            )

    @property
    def tokens(self) -> tuple[str, str, str]:
        return self.start_token, self.end_token, self.filler_token

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> LatentProtocol:
        known = {f.name for f in fields(cls)}
        if unknown := set(values) - known:
            raise ProtocolError(f"unknown protocol keys {sorted(unknown)}; known: {sorted(known)}")
        return cls(**values)

    def resolve(self, tokenizer: SupportsTokenIds, banned: Sequence[int] = ()) -> LatentTokens:
        """Token ids in `tokenizer`; `banned` are further ids that must never be sampled (media
        placeholders).
        """
        ids = []
        for token in self.tokens:
            found = tokenizer.convert_tokens_to_ids(token)
            if found is None or found == tokenizer.unk_token_id:
                raise ProtocolError(
                    f"the tokenizer has no token {token!r}; add the protocol's tokens with "
                    "`rl.policy.make_policy`"
                )
            ids.append(int(found))
        return LatentTokens(*ids, banned=tuple(sorted(set(banned))))

    def next_step(self, state: SpanState, imagine: Imagine = "free") -> Step:
        """What the position after `state` may hold."""
        if state.open:
            if state.length < self.min_length:
                return Step.LATENT
            return Step.DECIDE if state.length < self.max_length else Step.END
        if imagine == "always" and state.position == 0:
            return Step.START
        return (
            Step.TOKEN
            if imagine != "never" and state.spans < self.max_spans
            else Step.TOKEN_NO_START
        )

    def advance(
        self, state: SpanState, token: int, ids: LatentTokens, imagine: Imagine = "free"
    ) -> SpanState:
        """The state after `token`; `ProtocolError` if `next_step` did not allow it."""
        step = self.next_step(state, imagine)
        allowed = {
            Step.START: token == ids.start,
            Step.LATENT: token == ids.filler,
            Step.DECIDE: token in (ids.filler, ids.end),
            Step.END: token == ids.end,
        }
        text = token not in (ids.end, ids.filler) and token not in ids.banned
        if not allowed.get(step, text and (step is Step.TOKEN or token != ids.start)):
            raise ProtocolError(
                f"token {token} at completion position {state.position}, where {step.name} is due"
            )
        here = state.position + 1
        if token == ids.start:
            return SpanState(here, True, 0, state.spans + 1)
        if token == ids.filler:
            return SpanState(here, True, state.length + 1, state.spans)
        return SpanState(here, False, 0, state.spans)

    def trace(
        self, completion: Sequence[int] | np.ndarray, ids: LatentTokens, imagine: Imagine = "free"
    ) -> Trace:
        """Read off the ids of one completion what was free, decided and forced."""
        state = SpanState()
        slots = np.zeros(len(completion), dtype=np.int8)
        may_start = np.zeros(len(completion), dtype=bool)
        spans: list[int] = []
        for position, token in enumerate(int(t) for t in completion):
            step = self.next_step(state, imagine)
            slots[position] = SLOT_OF_STEP[step]
            may_start[position] = step is Step.TOKEN
            state = self.advance(state, token, ids, imagine)
            if token == ids.start:
                spans.append(0)
            elif token == ids.filler:
                spans[-1] = state.length
        return Trace(slots, may_start, tuple(spans))


SLOT_OF_STEP: dict[Step, Slot] = {
    Step.TOKEN: Slot.TOKEN,
    Step.TOKEN_NO_START: Slot.TOKEN,
    Step.START: Slot.FORCED,
    Step.LATENT: Slot.FORCED,
    Step.DECIDE: Slot.DECISION,
    Step.END: Slot.FORCED,
}

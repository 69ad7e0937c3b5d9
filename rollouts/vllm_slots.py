"""The latent protocol of all running requests at once, as tensors on the device.

vLLM gives each running request a slot. This module keeps, for each slot, where its completion
stands (`rl.policy.protocol.SpanState`), how it is sampled, and what was sampled: latents, their
densities, the log-probs of tokens and decisions. One step of a batch is `choose` (before vLLM's
sampler, which is then only told the answer) and `advance` (after it). Both are made of tensor
operations whose shapes depend on the batch alone and which never wait for the device, so that the
host may run ahead of it. It knows nothing of vLLM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, get_args

import torch

from rl.errors import ProtocolError
from rl.policy.density import log_density, sample_latents
from rl.policy.noise import Stream, uniform
from rl.policy.protocol import Imagine, LatentProtocol, LatentTokens, SpanState, Step
from rl.policy.sampling import draw_next

_MODES: tuple[Imagine, ...] = get_args(Imagine)
_ALWAYS, _NEVER = _MODES.index("always"), _MODES.index("never")

# Columns of `LatentSlots._ints`.
(_OWN, _MODE, _SEED, _TOP_K, _POSITION, _OPEN, _LENGTH, _SPANS, _COUNT) = range(9)


@dataclass(frozen=True)
class LatentRequest:
    """How one request is sampled.

    With `key`, it is one of Foresight's: its tokens are drawn here, and what was drawn is kept for
    whoever knows the key. Without one, vLLM draws the text in its own way and only spans are ours.
    `done` says how many of the last prompt tokens belong to the completion already; `latents` are
    those of their fillers. `limit` is the most tokens the completion can have.
    """

    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    imagine: Imagine = "free"
    key: str | None = None
    done: int = 0
    limit: int = 0
    latents: torch.Tensor | None = None  # [L, H]


@dataclass(frozen=True)
class Kept:
    """What a slot remembers of its completion's first C tokens and L latents. Longer than those:
    the host does not know yet how far the device has come.
    """

    latents: torch.Tensor  # [>= L, H], as fed
    latent_logprobs: torch.Tensor  # float64 [>= L]
    logprobs: torch.Tensor  # float32 [>= C]
    truncated: torch.Tensor  # int32 [>= C], how many tokens top-p and top-k left (0: all)


@dataclass(frozen=True)
class Choice:
    """What the rows of a batch of N must sample. Where `given`, that is `ids`."""

    slots: torch.Tensor  # int64 [N]
    ids: torch.Tensor  # int64 [N]
    given: torch.Tensor  # bool [N]
    logprobs: torch.Tensor  # float32 [N]
    kept: torch.Tensor  # int32 [N]


class LatentSlots:
    """State of `size` request slots for latents of width `width`, in the dtype the model is fed.

    `most_tokens` bounds a completion. `head` maps final hidden states to latent means.
    """

    def __init__(
        self,
        size: int,
        width: int,
        most_tokens: int,
        protocol: LatentProtocol,
        tokens: LatentTokens,
        head: Callable[[torch.Tensor], torch.Tensor],
        *,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.protocol, self.tokens, self.head = protocol, tokens, head
        self.device = device
        most_latents = protocol.max_spans * protocol.max_length
        self._spare = size  # a row of the tables for what nobody keeps
        self._ints = torch.zeros(size, 9, dtype=torch.int64, device=device)
        self._floats = torch.zeros(size, 2, dtype=torch.float32, device=device)
        self.latents = torch.zeros(size + 1, most_latents, width, dtype=dtype, device=device)
        self._densities = torch.zeros(size + 1, most_latents, dtype=torch.float64, device=device)
        self._logprobs = torch.zeros(size + 1, most_tokens, dtype=torch.float32, device=device)
        self._kept = torch.zeros(size + 1, most_tokens, dtype=torch.int32, device=device)
        self._staged: dict[int, tuple[list[int], list[float]]] = {}
        self._truncated: set[int] = set()  # slots of ours with top-p or top-k
        self._keyless: set[int] = set()  # slots whose text vLLM draws

    def open(
        self,
        slot: int,
        request: LatentRequest,
        completion: Sequence[int],
        kept: Kept | None = None,
    ) -> None:
        """Give `slot` to a request whose completion so far is `completion`; `flush` makes it so.

        `kept` brings back what the request had sampled before it was preempted.
        """
        state = SpanState()
        for token in completion:
            state = self.protocol.advance(state, token, self.tokens, request.imagine)
        count = sum(token == self.tokens.filler for token in completion)
        self._staged[slot] = (
            [
                int(request.key is not None),
                _MODES.index(request.imagine),
                request.seed,
                request.top_k,
                state.position,
                int(state.open),
                state.length,
                state.spans,
                count,
            ],
            [request.temperature, request.top_p],
        )
        self._truncated.discard(slot)
        self._keyless.discard(slot)
        if request.key is None:
            self._keyless.add(slot)
        elif request.top_p < 1.0 or request.top_k > 0:
            self._truncated.add(slot)
        latents = kept.latents if kept is not None else request.latents
        if count:
            if latents is None or len(latents) < count:
                raise RuntimeError(f"a completion with {count} latents came without them")
            self.latents[slot, :count] = self.to_device(latents[:count].to(self.latents.dtype))
        if kept is not None:
            self._densities[slot, :count] = self.to_device(kept.latent_logprobs[:count])
            length = min(len(completion), len(kept.logprobs))
            self._logprobs[slot, :length] = self.to_device(kept.logprobs[:length])
            self._kept[slot, :length] = self.to_device(kept.truncated[:length])

    def flush(self) -> None:
        """Write what `open` staged."""
        if not self._staged:
            return
        slots = self.to_device(torch.tensor(list(self._staged)))
        ints, floats = zip(*self._staged.values(), strict=True)
        self._ints[slots] = self.to_device(torch.tensor(ints))
        self._floats[slots] = self.to_device(torch.tensor(floats))
        self._staged.clear()

    def to_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """A copy on the device, for which nothing waits."""
        if self.device.type != "cuda":
            return tensor.to(self.device)
        return tensor.pin_memory().to(self.device, non_blocking=True)

    def keep(self, slot: int, limit: int) -> Kept:
        """Copy what a slot remembers to the host; `limit` bounds its completion.

        On a GPU the copy may still be under way: wait for the device before reading it.
        """

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if self.device.type != "cuda":
                return tensor.clone()
            host = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True)
            return host.copy_(tensor, non_blocking=True)

        return Kept(
            copy(self.latents[slot]),
            copy(self._densities[slot]),
            copy(self._logprobs[slot, :limit]),
            copy(self._kept[slot, :limit]),
        )

    def last_latents(self, slots: torch.Tensor) -> torch.Tensor:
        """The newest latent of each of `slots` [N]: [N, H]."""
        newest = (self._ints[slots, _COUNT] - 1).clamp_min(0)
        return self.latents[slots, newest]

    def is_open(self, slots: torch.Tensor) -> torch.Tensor:
        """Whether the completions of `slots` [N] are inside a span: bool [N]."""
        return self._ints[slots, _OPEN] > 0

    def _steps(self, ints: torch.Tensor) -> torch.Tensor:
        """`LatentProtocol.next_step` for rows [N, 9]: int64 [N], values of `Step`."""
        protocol, length = self.protocol, ints[:, _LENGTH]
        inside = torch.where(length < protocol.max_length, int(Step.DECIDE), int(Step.END))
        inside = torch.where(length < protocol.min_length, int(Step.LATENT), inside)
        may_start = (ints[:, _MODE] != _NEVER) & (ints[:, _SPANS] < protocol.max_spans)
        outside = torch.where(may_start, int(Step.TOKEN), int(Step.TOKEN_NO_START))
        first = (ints[:, _MODE] == _ALWAYS) & (ints[:, _POSITION] == 0)
        outside = torch.where(first, int(Step.START), outside)
        return torch.where(ints[:, _OPEN] > 0, inside, outside)

    def choose(
        self, logits: torch.Tensor, slots: torch.Tensor, slots_on_host: Sequence[int]
    ) -> Choice:
        """What stands next in each row of raw logits [N, V], of requests in `slots` [N].

        Where any of them has no key, `logits` are edited in place for vLLM's sampler: a row whose
        token is given keeps only that one, others lose what the protocol does not allow. Else all
        tokens are given, and what that sampler makes of the rows does not matter.
        """
        ints, floats, tokens = self._ints[slots], self._floats[slots], self.tokens
        steps = self._steps(ints)
        is_text, decides = steps <= Step.TOKEN_NO_START, steps == Step.DECIDE
        stream = torch.where(decides, int(Stream.DECISION), int(Stream.TOKEN))
        drawn = draw_next(
            logits,
            steps == Step.TOKEN,
            floats[:, 0],
            floats[:, 1],
            ints[:, _TOP_K],
            uniform(ints[:, _SEED], stream, ints[:, _POSITION]),
            tokens,
            any_truncated=not self._truncated.isdisjoint(slots_on_host),
        )
        ids = torch.where(steps == Step.LATENT, tokens.filler, tokens.end)
        ids = torch.where(steps == Step.START, tokens.start, ids)
        ids = torch.where(decides, drawn.decisions, torch.where(is_text, drawn.ids, ids))
        logprobs = torch.where(decides, drawn.decision_logprobs, 0.0)
        given = ~is_text | (ints[:, _OWN] > 0)
        if not self._keyless.isdisjoint(slots_on_host):
            self._edit(logits, steps, ids, given)
        return Choice(
            slots,
            ids,
            given,
            torch.where(is_text, drawn.logprobs, logprobs),
            torch.where(is_text, drawn.kept, 0),
        )

    def rehearse(self, logits: torch.Tensor) -> None:
        """Use the memory that `choose` uses at most, for as many rows [N, V]."""
        zeros = torch.zeros(len(logits), device=logits.device)
        draw_next(
            logits,
            zeros > 0,
            zeros + 1,
            zeros + 0.5,
            zeros.int(),
            zeros.double(),
            self.tokens,
            any_truncated=True,
        )

    def _edit(
        self, logits: torch.Tensor, steps: torch.Tensor, ids: torch.Tensor, given: torch.Tensor
    ) -> None:
        tokens = self.tokens
        for token in (tokens.filler, tokens.end, *tokens.banned):
            logits[:, token] = -torch.inf
        logits[:, tokens.start].masked_fill_(steps == Step.TOKEN_NO_START, -torch.inf)
        logits.masked_fill_(given[:, None], -torch.inf)
        rows = torch.arange(len(ids), device=ids.device)
        logits[rows, ids] = torch.where(given, 0.0, logits[rows, ids].float()).to(logits.dtype)

    def advance(
        self, choice: Choice, sampled: torch.Tensor, live: torch.Tensor, hidden: torch.Tensor
    ) -> None:
        """Take note of what was `sampled` [N] where `live` [N] (elsewhere nothing was), and make
        the latents of new fillers from the final hidden states [N, H].
        """
        slots, tokens = choice.slots, self.tokens
        ints, temperature = self._ints[slots], self._floats[slots, 0]
        place = ints[:, _POSITION].clamp_max(self._logprobs.shape[1] - 1)
        record = torch.where(live & (ints[:, _OWN] > 0), slots, self._spare)
        self._logprobs[record, place] = choice.logprobs
        self._kept[record, place] = choice.kept

        filled = live & (sampled == tokens.filler)
        row = torch.where(filled, slots, self._spare)
        ordinal = ints[:, _COUNT].clamp_max(self.latents.shape[1] - 1)
        scale, density = self.protocol.noise_scale, self.protocol.density
        latents = mean = self.head(hidden)
        if scale > 0.0:
            noisy = temperature > 0
            drawn = sample_latents(mean, scale, density, ints[:, _SEED], ordinal)
            latents = torch.where(noisy[:, None], drawn, mean)
            logprobs = log_density(latents, mean, scale, density)
            self._densities[row, ordinal] = torch.where(noisy, logprobs, 0.0).double()
        self.latents[row, ordinal] = latents.to(self.latents.dtype)

        opened, closed = sampled == tokens.start, sampled == tokens.end
        moved = ints.clone()
        moved[:, _POSITION] += 1
        moved[:, _OPEN] = torch.where(opened, 1, torch.where(closed, 0, ints[:, _OPEN]))
        moved[:, _LENGTH] = torch.where(opened | closed, 0, ints[:, _LENGTH] + filled)
        moved[:, _SPANS] += opened
        moved[:, _COUNT] += filled
        self._ints[slots] = torch.where(live[:, None], moved, ints)


def pack(tensor: torch.Tensor) -> tuple[str, list[int], bytes]:
    """A tensor as dtype, shape and raw bytes: what crosses vLLM's process boundary unchanged."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    raw = flat.view(torch.uint8).numpy().tobytes() if flat.numel() else b""
    return str(tensor.dtype).removeprefix("torch."), list(tensor.shape), raw


def unpack(packed: Sequence[Any]) -> torch.Tensor:
    """The tensor that `pack` packed."""
    dtype, shape, raw = packed
    kind = getattr(torch, dtype)
    if not raw:
        return torch.zeros(shape, dtype=kind)
    return torch.frombuffer(bytearray(raw), dtype=torch.uint8).view(kind).reshape(shape)


def check_extra(extra: Mapping[str, Any] | None, has_grammar: bool = False) -> None:
    """Raise `ProtocolError` for `SamplingParams.extra_args` that `read_request` cannot read.

    A grammar says which tokens may come, and no grammar knows latents: with one there are no spans.
    """
    extra = extra or {}
    own = extra.get("foresight")
    known = {field.name for field in fields(LatentRequest)}
    if own is not None and not (isinstance(own, Mapping) and own.keys() <= known):
        raise ProtocolError("`foresight` is for Foresight's own engine; leave it out")
    imagine = (extra if own is None else own).get("imagine", "never" if has_grammar else "free")
    if imagine not in _MODES:
        raise ProtocolError(f"imagine is {imagine!r}; choose one of {', '.join(_MODES)}")
    if has_grammar and imagine != "never":
        raise ProtocolError(
            f"imagine is {imagine!r}, but structured output leaves no room for latents; leave one "
            "of the two out"
        )


def read_request(
    extra: Mapping[str, Any] | None, has_grammar: bool = False, **plain: Any
) -> LatentRequest:
    """The request that `SamplingParams.extra_args` describe: under ``foresight`` if it is one of
    Foresight's, else with the `plain` settings of vLLM's own, of which ``imagine`` may be set.
    """
    extra = extra or {}
    own = extra.get("foresight")
    if own is None:
        imagine = "never" if has_grammar else extra.get("imagine", "free")
        return LatentRequest(imagine=imagine, **plain)
    latents = own.get("latents")
    return LatentRequest(
        **{
            **own,
            "limit": plain["limit"],
            "latents": None if latents is None else unpack(latents),
        }
    )

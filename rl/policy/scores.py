"""Log-probs of what was decided at given positions, from hidden states.

Index algebra: the hidden state before position p scores both the token at p and the latent at p: it
gives the vocabulary at p through the LM head and the mean of the latent at p through the latent
head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from rl.policy.linear_scores import LinearScores, as_multiplied
from rl.policy.protocol import LatentTokens, Slot

CHUNK_LOGITS = 2**26  # logits that exist at the same time: 256 MiB of them


@dataclass(frozen=True)
class ScoreSlots:
    """What to score in a batch of B rows of T positions: N decisions and L latents.

    `rows` says which hidden state decides, as an index into the B·T hidden states laid end to end:
    that of the position before, or for the first position of a completion that of the prompt's last
    token, wherever that stands.
    """

    rows: torch.Tensor  # int64 [N]
    ids: torch.Tensor  # int64 [N], the tokens that were chosen
    kinds: torch.Tensor  # int8 [N], TOKEN or DECISION (values of `Slot`)
    may_start: torch.Tensor  # bool [N], whether the start token was among the choices
    temperature: torch.Tensor  # float32 [N]
    # int32 [N]; at a TOKEN slot, how many tokens truncated sampling kept (0: all). 0 elsewhere.
    kept: torch.Tensor
    latent_rows: torch.Tensor  # int64 [L], which hidden state gives each latent's mean
    most_kept: int  # the largest of `kept`: a number, so that no pass waits for it
    # Every slot an ordinary choice among the whole vocabulary, nothing banned or cut off: what the
    # published baseline scores (`rl.published`).
    plain: bool = False

    def to(self, device: torch.device | str) -> ScoreSlots:
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {k: v for k, v in values.items() if isinstance(v, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Scores:
    """What `score_slots` gives, in the order of the slots."""

    logprobs: torch.Tensor  # float32 [N]
    entropies: torch.Tensor  # float32 [N]
    means: torch.Tensor  # [L, H]
    # Share of tokens that take a second pass (`rl.policy.depth`), a scalar; None without gates.
    depth: torch.Tensor | None = None


def full_logits(
    lm_head: Callable[[torch.Tensor], torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """float32 logits [N, V] of hidden states [N, H], whatever the dtype of the model.

    In bf16 a logit of 20 is only known to 0.06, so sampler and replay would disagree by more than
    the rest of the model makes them. A head that is not a plain linear layer (an adapter, say)
    keeps its own precision.
    """
    if type(lm_head) is not torch.nn.Linear:
        return lm_head(rows).float()
    return _FloatHead(lm_head)(rows)


class _FloatHead:
    """A linear head that gives float32, its weight converted once."""

    def __init__(self, head: Any) -> None:
        self._weight = as_multiplied(head.weight).float()
        self._bias = None if head.bias is None else head.bias.float()

    def __call__(self, rows: torch.Tensor) -> torch.Tensor:
        rows = as_multiplied(rows).float()
        with torch.autocast(rows.device.type, enabled=False):
            return torch.nn.functional.linear(rows, self._weight, self._bias)


def text_logits(
    logits: torch.Tensor, may_start: torch.Tensor, tokens: LatentTokens
) -> torch.Tensor:
    """Logits [N, V] with everything at -inf that cannot be sampled at a TOKEN slot."""
    # A mask built in place: an index list would have to be copied to a GPU, which waits for it.
    places = torch.arange(logits.shape[-1], device=logits.device)
    never = torch.zeros_like(places, dtype=torch.bool)
    for token in (tokens.filler, tokens.end, *tokens.banned):
        never |= places == token
    logits = logits.masked_fill(never, -torch.inf)
    logits[:, tokens.start] = logits[:, tokens.start].masked_fill(~may_start, -torch.inf)
    return logits


def end_logprobs(logits: torch.Tensor, tokens: LatentTokens) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs of ending and of continuing a span: [N] each, from logits [N, V] over the whole
    vocabulary.
    """
    end = logits[:, tokens.end]
    rest = logits.clone()
    rest[:, tokens.end] = -torch.inf
    total, others = torch.logsumexp(logits, -1), torch.logsumexp(rest, -1)
    return end - total, others - total


def truncate(
    logp: torch.Tensor, top_p: torch.Tensor, top_k: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Top-k and top-p truncation at sampling: log-probs [N, V] -> the same, renormalised and -inf
    outside, and how many tokens were kept (int32 [N]).

    `logp` is normalised, after bans and temperature; `top_p` is float32 [N], `top_k` int [N]. As in
    vLLM and transformers: first the `top_k` likeliest, then of those, renormalised, the fewest
    whose mass reaches `top_p`; the token that reaches it stays, and so does the likeliest always.
    Of equally likely tokens the lower id comes first. Rows with `top_p` 1 and `top_k` 0 come back
    as they are, with 0 kept. Waits for no device, and no shape depends on values.
    """
    ranked, order = logp.sort(dim=-1, descending=True, stable=True)
    place = torch.arange(logp.shape[-1], device=logp.device)
    allowed = (ranked > -torch.inf).sum(-1)
    most = torch.where(top_k > 0, top_k, allowed).minimum(allowed)
    mass = ranked.double().exp().masked_fill(place >= most[:, None], 0.0).cumsum(-1)
    # A token stays while those before it are short of top_p: one more than are short themselves.
    short = (mass < top_p[:, None] * mass[:, -1:]).sum(-1) + 1
    on = (top_p < 1.0) | (top_k > 0)
    kept = torch.where(top_p < 1.0, short, most).minimum(most).clamp_min(1)
    inside = torch.zeros_like(logp, dtype=torch.bool).scatter(1, order, place < kept[:, None])
    cut = logp.masked_fill(~inside, -torch.inf)
    cut = cut - torch.logsumexp(cut, -1, keepdim=True)
    return torch.where(on[:, None], cut, logp), torch.where(on, kept, 0).int()


def truncated_scores(
    logp: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor, most: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replay under truncation: log-prob of `ids` [N] and entropy, each [N], of log-probs [N, V]
    cut down to the `kept` [N] likeliest tokens (all above 0, at most `most`) and renormalised.

    `ids` are among those always: one that is less likely takes the last one's place. At the weights
    that sampled, the count therefore names the sampler's own set, up to tokens at the boundary that
    rounding cannot tell apart, and gives its log-probs. Under later weights the set follows the
    policy. A token that has left it since would have probability 0 there, and no gradient to come
    back by: hence the exchange, and the one bias of this scheme. DeepSeek-V3.2 keeps the sampler's
    mask and applies it to every later policy: the set never moves, but storing and moving it takes
    the ids of all tokens kept, where a count is one number.
    """
    most = min(most, logp.shape[-1])
    values, tokens = logp.topk(most, dim=-1)
    place = torch.arange(most, device=logp.device)
    beyond = place >= kept[:, None]
    inside = ((tokens == ids[:, None]) & ~beyond).any(-1, keepdim=True)
    own = logp.gather(1, ids[:, None])
    values = torch.where((place == kept[:, None] - 1) & ~inside, own, values)
    values = values.masked_fill(beyond, -torch.inf)
    total = torch.logsumexp(values, -1, keepdim=True)
    return (own - total)[:, 0], _entropy(values - total)


def _entropy(logp: torch.Tensor) -> torch.Tensor:
    """Entropy [N] of normalised log-probs [N, V], which may be -inf."""
    return -(logp.exp() * logp.clamp_min(torch.finfo(logp.dtype).min)).sum(-1)


def score_slots(
    hidden: torch.Tensor,
    slots: ScoreSlots,
    *,
    tokens: LatentTokens,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int,
) -> Scores:
    """Score slots from hidden states [B, T, H]. Logits exist for `chunk` positions at a time, and
    in backward are computed again.
    """
    flat = hidden.flatten(0, 1)
    rows = flat[slots.rows]
    if type(lm_head) is torch.nn.Linear and slots.most_kept == 0 and not slots.plain:
        choices = slots.ids, slots.kinds, slots.may_start, slots.temperature
        scored: tuple[torch.Tensor, torch.Tensor] = LinearScores.apply(  # type: ignore[assignment]
            rows, lm_head.weight, lm_head.bias, *choices, tokens, chunk
        )
    else:
        scored = _score_in_chunks(rows, slots, tokens, lm_head, chunk)
    logprobs, entropies = scored
    return Scores(logprobs, entropies, head(flat[slots.latent_rows]))


def _score_in_chunks(
    rows: torch.Tensor,
    slots: ScoreSlots,
    tokens: LatentTokens,
    lm_head: Callable[[torch.Tensor], torch.Tensor],
    chunk: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs and entropies [N] through any head, truncated or not, plain or not."""
    to_logits = _FloatHead(lm_head) if type(lm_head) is torch.nn.Linear else lm_head

    def score_chunk(rows: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        ids, kept = slots.ids[part], slots.kept[part]
        logits = to_logits(rows).float() / slots.temperature[part, None]
        if slots.plain:
            whole = torch.log_softmax(logits, -1)
            return whole.gather(1, ids[:, None])[:, 0], _entropy(whole).detach()
        is_text = slots.kinds[part] == Slot.TOKEN
        text = torch.log_softmax(text_logits(logits, slots.may_start[part], tokens), -1)
        end, more = end_logprobs(logits, tokens)
        decision = torch.where(ids == tokens.end, end, more)
        chosen, text_entropy = text.gather(1, ids[:, None])[:, 0], _entropy(text)
        if slots.most_kept and len(cut := kept.nonzero()[:, 0]):
            fewer, entropy = truncated_scores(text[cut], ids[cut], kept[cut], slots.most_kept)
            chosen = chosen.index_copy(0, cut, fewer)
            text_entropy = text_entropy.index_copy(0, cut, entropy)
        logprob = torch.where(is_text, chosen, decision)
        decision_entropy = _entropy(torch.stack([end, more], -1))
        # Entropies are watched, not trained on; keeping them out of the graph halves what a chunk
        # remembers.
        return logprob, torch.where(is_text, text_entropy, decision_entropy).detach()

    parts = [slice(i, min(i + chunk, len(rows))) for i in range(0, max(len(rows), 1), chunk)]
    scored = [
        checkpoint(score_chunk, rows[part], part, use_reentrant=False)
        if torch.is_grad_enabled()
        else score_chunk(rows[part], part)
        for part in parts
    ]
    logprobs, entropies = (torch.cat(values) for values in zip(*scored, strict=True))
    return logprobs, entropies

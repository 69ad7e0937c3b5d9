"""Log-probs of what was decided at given positions, from hidden states.

Index algebra: the hidden state at position p-1 scores both the token at p and the latent at p.
`h_{p-1}` gives the vocabulary at p through the LM head and the mean of the latent at p through the
latent head.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields

import torch
from torch.utils.checkpoint import checkpoint

from rl.policy.protocol import LatentTokens, Slot

CHUNK = 2048  # positions whose logits exist at the same time


@dataclass(frozen=True)
class ScoreSlots:
    """Which positions to score. All [B, T], aligned with `input_ids`; a value at p is about what
    stands at p.
    """

    ids: torch.Tensor  # int64, the tokens
    slots: torch.Tensor  # int8, values of `Slot`; FORCED positions are not scored
    may_start: torch.Tensor  # bool, whether the start token was among the choices
    temperature: torch.Tensor  # float32 [B]
    # int32; at a TOKEN slot, how many tokens truncated sampling kept (0: all). 0 elsewhere.
    kept: torch.Tensor

    def to(self, device: torch.device | str) -> ScoreSlots:
        return ScoreSlots(*(getattr(self, f.name).to(device) for f in fields(self)))


@dataclass(frozen=True)
class Scores:
    """What `score_slots` gives: zeros wherever nothing was decided."""

    logprobs: torch.Tensor  # float32 [B, T]
    entropies: torch.Tensor  # float32 [B, T]
    means: torch.Tensor  # [L, H], of the latents in row-major order


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
    bias = None if lm_head.bias is None else lm_head.bias.float()
    with torch.autocast(rows.device.type, enabled=False):
        return torch.nn.functional.linear(rows.float(), lm_head.weight.float(), bias)


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
    logp: torch.Tensor, ids: torch.Tensor, kept: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Replay under truncation: log-prob of `ids` [N] and entropy, each [N], of log-probs [N, V]
    cut down to the `kept` [N] likeliest tokens (all above 0) and renormalised.

    `ids` are among those always: one that is less likely takes the last one's place. At the weights
    that sampled, the count therefore names the sampler's own set, up to tokens at the boundary that
    rounding cannot tell apart, and gives its log-probs. Under later weights the set follows the
    policy. A token that has left it since would have probability 0 there, and no gradient to come
    back by: hence the exchange, and the one bias of this scheme. DeepSeek-V3.2 keeps the sampler's
    mask and applies it to every later policy: the set never moves, but storing and moving it takes
    the ids of all tokens kept, where a count is one number.
    """
    most = min(int(kept.max()), logp.shape[-1])
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
) -> Scores:
    """Score the slots of a batch from hidden states [B, T, H]. Logits exist for `CHUNK` positions
    at a time.
    """
    before = hidden[:, :-1]
    decided = slots.slots[:, 1:] != Slot.FORCED
    rows, ids, kinds = before[decided], slots.ids[:, 1:][decided], slots.slots[:, 1:][decided]
    may_start = slots.may_start[:, 1:][decided]
    temperature = slots.temperature[:, None].expand(decided.shape)[decided]
    kept = slots.kept[:, 1:][decided]
    truncated = bool(kept.any())

    def score_chunk(rows: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        logits = full_logits(lm_head, rows) / temperature[part, None]
        is_text = kinds[part] == Slot.TOKEN
        text = torch.log_softmax(text_logits(logits, may_start[part], tokens), -1)
        end, more = end_logprobs(logits, tokens)
        decision = torch.where(ids[part] == tokens.end, end, more)
        chosen, text_entropy = text.gather(1, ids[part, None])[:, 0], _entropy(text)
        if truncated and len(cut := kept[part].nonzero()[:, 0]):
            fewer, entropy = truncated_scores(text[cut], ids[part][cut], kept[part][cut])
            chosen = chosen.index_copy(0, cut, fewer)
            text_entropy = text_entropy.index_copy(0, cut, entropy)
        logprob = torch.where(is_text, chosen, decision)
        decision_entropy = _entropy(torch.stack([end, more], -1))
        # Entropies are watched, not trained on; keeping them out of the graph halves what a chunk
        # remembers.
        return logprob, torch.where(is_text, text_entropy, decision_entropy).detach()

    parts = [slice(i, min(i + CHUNK, len(rows))) for i in range(0, max(len(rows), 1), CHUNK)]
    scored = [
        checkpoint(score_chunk, rows[part], part, use_reentrant=False)
        if torch.is_grad_enabled()
        else score_chunk(rows[part], part)
        for part in parts
    ]
    blank = torch.zeros(slots.ids.shape, dtype=torch.float32, device=hidden.device)
    at = torch.zeros_like(slots.slots, dtype=torch.bool)
    at[:, 1:] = decided
    fillers = slots.ids[:, 1:] == tokens.filler
    return Scores(
        logprobs=blank.masked_scatter(at, torch.cat([s[0] for s in scored])),
        entropies=blank.masked_scatter(at, torch.cat([s[1] for s in scored])),
        means=head(before[fillers]),
    )

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
    logits = logits.clone()
    logits[:, [tokens.filler, tokens.end, *tokens.banned]] = -torch.inf
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

    def score_chunk(rows: torch.Tensor, part: slice) -> tuple[torch.Tensor, torch.Tensor]:
        logits = full_logits(lm_head, rows) / temperature[part, None]
        is_text = kinds[part] == Slot.TOKEN
        text = torch.log_softmax(text_logits(logits, may_start[part], tokens), -1)
        end, more = end_logprobs(logits, tokens)
        decision = torch.where(ids[part] == tokens.end, end, more)
        logprob = torch.where(is_text, text.gather(1, ids[part, None])[:, 0], decision)
        text_entropy = -(text.exp() * text.clamp_min(torch.finfo(text.dtype).min)).sum(-1)
        decision_entropy = -(
            end.exp() * end + more.exp() * more.clamp_min(torch.finfo(more.dtype).min)
        )
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

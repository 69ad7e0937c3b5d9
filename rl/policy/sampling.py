"""Drawing free tokens and end-or-continue decisions from logits: what every engine shares.

All of it runs on the device without waiting for it, and no shape depends on values. The uniforms
come from `rl.policy.noise`, so that equal logits give equal choices in every engine.
"""

from __future__ import annotations

import torch

from rl.policy.protocol import LatentTokens
from rl.policy.scores import end_logprobs, text_logits, truncate


def draw_text(
    logits: torch.Tensor,
    may_start: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    u: torch.Tensor,
    tokens: LatentTokens,
    *,
    any_truncated: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """A token for each row of raw float32 logits [N, V]: ids (int64), their log-probs (float32) and
    how many tokens truncation kept (int32, 0: all), each [N].

    `may_start` (bool [N]): is the start token among the choices. `temperature`, `top_p` (float32)
    and `top_k` (int) are [N], `u` are uniforms (float64 [N]). Rows at temperature 0 take the
    likeliest token and report its log-prob at temperature 1, untruncated: the greedy distribution
    itself is a point. `any_truncated` says whether any row is truncated at all; without one, the
    sort is saved.
    """
    logp = torch.log_softmax(text_logits(_heated(logits, temperature), may_start, tokens), -1)
    greedy = temperature <= 0
    kept = torch.zeros_like(u, dtype=torch.int32)
    if any_truncated:
        logp, kept = truncate(logp, top_p.masked_fill(greedy, 1.0), top_k.masked_fill(greedy, 0))
    ids = torch.where(greedy, logp.argmax(-1), draw(logp, u))
    return ids, logp.gather(1, ids[:, None])[:, 0], kept


def decide(
    logits: torch.Tensor, temperature: torch.Tensor, u: torch.Tensor, tokens: LatentTokens
) -> tuple[torch.Tensor, torch.Tensor]:
    """End or continue for each row of raw float32 logits [N, V]: ids (the end token or the filler,
    int64) and the log-probs of the decisions (float32), each [N].

    Never truncated. Rows at temperature 0 decide for the likelier, as scored at temperature 1.
    """
    end, more = end_logprobs(_heated(logits, temperature), tokens)
    ends = torch.where(temperature > 0, u < end.exp(), end >= more)
    return torch.where(ends, tokens.end, tokens.filler), torch.where(ends, end, more)


def draw(logp: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Inverse-CDF draw of one token a row, in order of ids: log-probs [N, V] and uniforms [N] ->
    ids (int64 [N]). Tokens at -inf are never drawn.
    """
    cdf = logp.double().exp().cumsum(-1)
    # Scaling by the last entry keeps rounding from pushing u past the end, onto a banned token.
    drawn = torch.searchsorted(cdf, (u * cdf[:, -1])[:, None], right=True)[:, 0]
    last = (logp > -torch.inf).long().cumsum(-1).argmax(-1)
    return torch.minimum(drawn, last)


def _heated(logits: torch.Tensor, temperature: torch.Tensor) -> torch.Tensor:
    return logits / torch.where(temperature > 0, temperature, 1.0)[:, None]

"""Drawing free tokens and end-or-continue decisions from logits: what every engine shares.

All of it runs on the device without waiting for it, and no shape depends on values. The uniforms
come from `rl.policy.noise`, so that equal logits give equal choices in every engine. A vocabulary
is wide, so the work is one exp of a scratch copy and sums over blocks of it; only the sums, and
then the one block drawn, are cumulated.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rl.policy.protocol import LatentTokens
from rl.policy.scores import truncate

BLOCK = 128  # tokens that are summed up before anything is cumulated


@dataclass(frozen=True)
class Draws:
    """For each of N rows, both what text would go on with and how a span would be decided."""

    ids: torch.Tensor  # int64 [N], the token of text
    logprobs: torch.Tensor  # float32 [N]
    kept: torch.Tensor  # int32 [N], how many tokens truncation kept (0: all)
    decisions: torch.Tensor  # int64 [N], the end token or the filler
    decision_logprobs: torch.Tensor  # float32 [N]


def draw_next(
    logits: torch.Tensor,
    may_start: torch.Tensor,
    temperature: torch.Tensor,
    top_p: torch.Tensor,
    top_k: torch.Tensor,
    u: torch.Tensor,
    tokens: LatentTokens,
    *,
    any_truncated: bool,
) -> Draws:
    """A token and a decision for each row of raw logits [N, V] of any float dtype; the arithmetic
    is float32. A row is at one or the other: both use the same uniform of `u` (float64 [N]).

    `may_start` (bool [N]): is the start token among the choices of text. `temperature`, `top_p`
    (float32) and `top_k` (int) are [N]. Rows at temperature 0 take the likeliest and report its
    log-prob at temperature 1, untruncated: the greedy distribution itself is a point. Decisions are
    never truncated. `any_truncated` says whether any row is truncated at all; without one, the sort
    is saved.
    """
    greedy = temperature <= 0
    size = logits.shape[1]
    width = -(-size // BLOCK) * BLOCK
    scratch = torch.empty(len(logits), width, dtype=torch.float32, device=logits.device)
    scratch[:, size:] = -torch.inf
    text = scratch[:, :size]
    torch.div(logits, torch.where(greedy, 1.0, temperature)[:, None], out=text)
    end = _take_out(text, tokens.end)
    hidden = [_take_out(text, token) for token in (tokens.filler, *tokens.banned)]
    start = _take_out(text, tokens.start)
    hidden.append(start.masked_fill(may_start, -torch.inf))
    text[:, tokens.start] = start.masked_fill(~may_start, -torch.inf)

    if any_truncated:
        whole = torch.logsumexp(text, -1)
        top_p, top_k = top_p.masked_fill(greedy, 1.0), top_k.masked_fill(greedy, 0)
        fewer, kept = truncate(text - whole[:, None], top_p, top_k)
        cut = kept > 0
        text.copy_(torch.where(cut[:, None], fewer, text))
        ids, logprobs, mass = _draw(scratch, greedy, u)
        mass = torch.where(cut, whole.double(), mass)
    else:
        kept = torch.zeros_like(u, dtype=torch.int32)
        ids, logprobs, mass = _draw(scratch, greedy, u)

    end = end.double()
    more = torch.logsumexp(torch.stack([mass, *(x.double() for x in hidden)], 1), -1)
    total = torch.logaddexp(end, more)
    ends = torch.where(greedy, end >= more, u < (end - total).exp())
    return Draws(
        ids,
        logprobs,
        kept,
        torch.where(ends, tokens.end, tokens.filler),
        (torch.where(ends, end, more) - total).float(),
    )


def _take_out(logits: torch.Tensor, token: int) -> torch.Tensor:
    """The logits [N] of `token`, which are -inf in `logits` [N, V] from now on."""
    found = logits[:, token].clone()
    logits[:, token] = -torch.inf
    return found


def _draw(
    logits: torch.Tensor, greedy: torch.Tensor, u: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """One token a row, the likeliest or in order of ids by `u`: ids (int64), log-probs (float32)
    and the log of the sum of exponentials (float64), each [N]. Overwrites `logits` [N, W], W in
    whole blocks. Tokens at -inf are never taken.
    """
    rows = torch.arange(len(logits), device=logits.device)
    blocks = logits.unflatten(1, (-1, BLOCK))
    top, place = blocks.amax(-1).max(-1)
    likeliest = place * BLOCK + blocks[rows, place].argmax(-1)
    weights = logits.sub_(top[:, None]).exp_()
    sums = blocks.sum(-1)  # of `weights`: the same memory
    block, rest = _pick(sums, u)
    column, _ = _pick(blocks[rows, block], rest)
    ids = torch.where(greedy, likeliest, block * BLOCK + column)
    total = sums.sum(-1, dtype=torch.float64).log()
    logprobs = weights[rows, ids].double().log() - total
    return ids, logprobs.float(), top.double() + total


def _pick(weights: torch.Tensor, u: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Inverse-CDF draw from weights [N, M] (some above 0): the index (int64 [N]), and how far into
    its weight `u` reaches, from 0 to 1 (float64 [N]). Weights of 0 are never drawn.
    """
    # A parallel sum may round up at a weight of 0, and `u` may round to the very end.
    cdf = weights.double().cumsum(-1).masked_fill(weights == 0, -torch.inf)
    goal = u[:, None] * cdf.amax(-1, keepdim=True)
    index = (cdf >= goal).int().argmax(-1, keepdim=True)  # the first
    missing = (cdf.gather(1, index) - goal) / weights.gather(1, index)
    return index[:, 0], (1.0 - missing[:, 0]).clamp(0.0, 1.0)

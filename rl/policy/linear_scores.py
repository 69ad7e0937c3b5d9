"""Log-probs of choices through a linear LM head, without keeping a single logit.

What a general head needs `torch.utils.checkpoint` and a dozen passes over the logits for, a linear
one has in closed form: the gradient of a log-prob by the logits is a softmax, scaled row by row,
and one number more at what was chosen. Logits exist for a few rows at a time, once in forward and
once in backward. (TRL's fused head and Liger's linear cross-entropy do the same for labels over the
whole vocabulary; here some tokens are banned, and inside spans the choice is to end or to go on.)
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from rl.policy.protocol import LatentTokens, Slot


class LinearScores(torch.autograd.Function):
    """float32 log-probs [N] and entropies [N] (not differentiated) of choices.

    Arguments: hidden states [N, H]; weight [V, H] and bias [V] or None of the head; `ids`, `kinds`,
    `may_start`, `temperature` [N] as in `ScoreSlots`; the tokens, and how many rows have logits at
    the same time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        ids: Tensor,
        kinds: Tensor,
        may_start: Tensor,
        temperature: Tensor,
        tokens: LatentTokens,
        chunk: int,
    ) -> tuple[Tensor, Tensor]:
        ctx.tokens, ctx.chunk, ctx.dtypes = tokens, chunk, (rows.dtype, weight.dtype)
        rows, weight = as_multiplied(rows), as_multiplied(weight)
        factor = _factor(weight)
        found: list[tuple[Tensor, ...]] = []
        with torch.autocast(rows.device.type, enabled=False):
            for part, at in _chunks(rows, chunk):
                logits, last = _logits(part, factor, bias, kinds[at], may_start[at], tokens)
                heat, is_text = temperature[at], kinds[at] == Slot.TOKEN
                logits.div_(heat[:, None])
                last = last / heat
                others = logits.logsumexp(-1)
                total = torch.where(is_text, others, torch.logaddexp(others, last))
                end, more = last - total, others - total
                chosen = logits.gather(1, ids[at, None])[:, 0] - others
                decision = torch.where(ids[at] == tokens.end, end, more)
                p = logits.sub_(others[:, None]).exp_()
                entropy = torch.special.entr(p).sum(-1)
                of_two = torch.special.entr(end.exp()) + torch.special.entr(more.exp())
                found.append(
                    (
                        torch.where(is_text, chosen, decision),
                        torch.where(is_text, entropy, of_two),
                        others,
                        end,
                    )
                )
        logprobs, entropies, others, end = (torch.cat(parts) for parts in zip(*found, strict=True))
        ctx.save_for_backward(rows, weight, bias, ids, kinds, may_start, temperature, others, end)
        ctx.mark_non_differentiable(entropies)
        return logprobs, entropies

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, _: Tensor) -> tuple[Any, ...]:
        rows, weight, bias, ids, kinds, may_start, temperature, others, end = ctx.saved_tensors
        wants_rows, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        tokens, factor = ctx.tokens, _factor(weight)
        grad_rows = []
        grad_weight = torch.zeros_like(weight, dtype=torch.float32) if wants_weight else None
        grad_bias = torch.zeros_like(bias, dtype=torch.float32) if wants_bias else None
        with torch.autocast(rows.device.type, enabled=False):
            for part, at in _chunks(rows, ctx.chunk):
                logits, _ = _logits(part, factor, bias, kinds[at], may_start[at], tokens)
                p = logits.div_(temperature[at, None]).sub_(others[at, None]).exp_()
                slope, p_end = grad[at] / temperature[at], end[at].exp()
                # By the logit of token j, with p_j the share of j among all that can be chosen but
                # the end of a span: a chosen token gives [j is it] - p_j. Ending gives
                # (1 - p_end) * ([j is end] - p_j), and going on p_end * (p_j - [j is end]).
                is_text, ends = kinds[at] == Slot.TOKEN, ids[at] == tokens.end
                share = torch.where(is_text, 1.0, torch.where(ends, -torch.expm1(end[at]), -p_end))
                share = share * slope
                p *= -share[:, None]
                chosen = torch.where(is_text, ids[at], tokens.end)
                p.scatter_add_(1, chosen[:, None], share[:, None])
                if grad_bias is not None:
                    grad_bias += p.sum(0)
                p = p.to(factor.dtype)
                if wants_rows:
                    grad_rows.append((p @ factor).to(ctx.dtypes[0]))
                if grad_weight is not None:
                    _add_product(grad_weight, p.T, part)
        return (
            torch.cat(grad_rows) if wants_rows else None,
            None if grad_weight is None else grad_weight.to(ctx.dtypes[1]),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            *[None] * 6,
        )


def as_multiplied(x: Tensor) -> Tensor:
    """Rows or weight of a head as they enter the product: under autocast in its dtype, in which
    workers hold their weights, else as they are. The product itself is always float32.
    """
    device = x.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return x.to(torch.get_autocast_dtype(device))
    return x


def _in_half_on_cuda(x: Tensor) -> bool:
    """Whether products of such tensors can be had in float32 without copies in float32."""
    return x.is_cuda and x.dtype in (torch.float16, torch.bfloat16)


def _factor(weight: Tensor) -> Tensor:
    """The weight as products take it."""
    return weight if _in_half_on_cuda(weight) else weight.float()


def _product(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32. Products of two half-precision numbers are exact there."""
    if _in_half_on_cuda(a) and a.dtype == b.dtype:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Add a @ b to `total`, in float32."""
    if _in_half_on_cuda(a) and a.dtype == b.dtype:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def _chunks(rows: Tensor, chunk: int) -> Iterator[tuple[Tensor, slice]]:
    for start in range(0, max(len(rows), 1), chunk):
        yield rows[start : start + chunk], slice(start, start + chunk)


def _logits(
    rows: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    kinds: Tensor,
    may_start: Tensor,
    tokens: LatentTokens,
) -> tuple[Tensor, Tensor]:
    """float32 logits [n, V], with -inf at the end token and, in TOKEN slots, at whatever else
    cannot be sampled there; and those of the end token [n].
    """
    logits = _product(rows, weight.T)
    if bias is not None:
        logits += bias.float()
    end = logits[:, tokens.end].clone()
    logits[:, tokens.end] = -torch.inf
    is_text = kinds == Slot.TOKEN
    for token, banned in (
        *((token, is_text) for token in (tokens.filler, *tokens.banned)),
        (tokens.start, is_text & ~may_start),
    ):
        logits[:, token] = logits[:, token].masked_fill(banned, -torch.inf)
    return logits, end

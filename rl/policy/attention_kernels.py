"""Softmax attention that says its log-sum-exps, so that parts of it can be put together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten
MATH_SCORES = 2**24  # that `MATH` has at the same time: 64 MiB in fp32


@dataclass(frozen=True)
class Kernel:
    """A softmax attention that says its log-sum-exps, and its derivative.

    forward: ((q [n,Hq,S,D], k [n,Hkv,L,D], v [n,Hkv,L,D]), causal, scale)
        -> (out [n,Hq,S,D], lse [n,Hq,S]), lse in fp32 at least; causal only with S = L.
    backward: ((grad_out, q, k, v, out, lse), causal, scale) -> the gradients of q, k and v; out
        and lse may be over more keys than these.
    """

    forward: Callable[[Sequence[Tensor], bool, float], tuple[Tensor, Tensor]]
    backward: Callable[[Sequence[Tensor], bool, float], tuple[Tensor, Tensor, Tensor]]
    pads: bool = False  # whether starting it often costs more than padding does


def kernel_for(query: Tensor) -> Kernel:
    """The kernel for tensors like this one."""
    if query.device.type in ("cpu", "meta"):
        return CPU_FLASH
    if (
        query.device.type == "cuda"
        and query.dtype in (torch.float16, torch.bfloat16)
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    ):
        return CUDA_FLASH
    return MATH


# Kernels. The first two are what SDPA itself calls; both take fewer heads of keys than of queries.


def _cpu_forward(rows: Sequence[Tensor], causal: bool, scale: float) -> Any:
    return aten._scaled_dot_product_flash_attention_for_cpu(*rows, 0.0, causal, scale=scale)


def _cpu_backward(rows: Sequence[Tensor], causal: bool, scale: float) -> Any:
    backward = aten._scaled_dot_product_flash_attention_for_cpu_backward
    return backward(*rows, 0.0, causal, scale=scale)


def _cuda_forward(rows: Sequence[Tensor], causal: bool, scale: float) -> Any:
    return aten._scaled_dot_product_flash_attention(*rows, 0.0, causal, scale=scale)[:2]


def _cuda_backward(rows: Sequence[Tensor], causal: bool, scale: float) -> Any:
    grad_out, q, k, v, out, lse = rows
    # What a dropout would need, and sequence bounds, which only ragged batches have.
    seed, offset = (torch.empty(n, dtype=torch.uint64, device=q.device) for n in ((2,), ()))
    backward = aten._scaled_dot_product_flash_attention_backward
    # The kernel takes no strides for lse.
    tensors = (grad_out, q, k, v, out, lse.contiguous(), None, None)
    sizes = (q.shape[2], k.shape[2])
    return backward(*tensors, *sizes, 0.0, causal, seed, offset, scale=scale)


def _math_chunks(
    q: Tensor, k: Tensor, causal: bool
) -> Iterator[tuple[slice, slice, Tensor | None]]:
    """(queries, the keys that they may see, what of these is hidden [s,l]), a few queries at a
    time: at most MATH_SCORES scores, or one query's.
    """
    length, keys = q.shape[2], k.shape[2]
    step = max(1, MATH_SCORES // (q.shape[0] * q.shape[1] * keys))
    for start in range(0, length, step):
        stop = min(start + step, length)
        if not causal:
            yield slice(start, stop), slice(0, keys), None
            continue
        visible = torch.ones(stop - start, stop, dtype=torch.bool, device=q.device)
        yield slice(start, stop), slice(0, stop), visible.tril(start).logical_not()


def _folded(x: Tensor, heads: int) -> Tensor:
    """[n,Hq,s,D] -> [n,heads,Hq/heads * s,D]: the queries of one key head, so that no key is
    repeated.
    """
    return x.unflatten(1, (heads, -1)).flatten(2, 3)


def _math_scores(q: Tensor, k: Tensor, hidden: Tensor | None, scale: float) -> Tensor:
    """Folded queries [n,Hkv,r * s,D] and keys [n,Hkv,l,D] -> scores [n,Hkv,r * s,l]."""
    scores = (q * scale) @ k.mT
    if hidden is not None:
        scores.unflatten(2, (-1, len(hidden))).masked_fill_(hidden, -torch.inf)
    return scores


def _math_forward(rows: Sequence[Tensor], causal: bool, scale: float) -> Any:
    q, k, v = rows
    out = torch.empty_like(q)
    lse = q.new_empty(q.shape[:3], dtype=accumulator(q.dtype))
    heads = k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(lse.dtype), v.to(lse.dtype)
        for queries, keys, hidden in _math_chunks(q, k, causal):
            chunk = _folded(q[:, :, queries].to(lse.dtype), heads)
            scores = _math_scores(chunk, k[:, :, keys], hidden, scale)
            total = scores.logsumexp(-1, keepdim=True)
            part = (scores - total).exp_() @ v[:, :, keys]
            out[:, :, queries] = part.view(out[:, :, queries].shape).to(out.dtype)
            lse[:, :, queries] = total.view(lse[:, :, queries].shape)
    return out, lse


def _math_backward(rows: Sequence[Tensor], causal: bool, scale: float) -> Any:
    grad_out, q, k, v, out, lse = rows
    grad_q = torch.empty_like(q)
    dtypes, heads = [x.dtype for x in (k, v)], k.shape[1]
    with torch.autocast(q.device.type, enabled=False):
        k, v = k.to(lse.dtype), v.to(lse.dtype)
        grad_k, grad_v = torch.zeros_like(k), torch.zeros_like(v)
        for queries, keys, hidden in _math_chunks(q, k, causal):
            chunk, grad_chunk, out_chunk = (
                _folded(x[:, :, queries].to(lse.dtype), heads) for x in (q, grad_out, out)
            )
            total = _folded(lse[:, :, queries, None], heads)
            scores = _math_scores(chunk, k[:, :, keys], hidden, scale)
            weights = scores.sub_(total).exp_()
            grad_v[:, :, keys] += weights.mT @ grad_chunk
            grad_scores = grad_chunk @ v[:, :, keys].mT
            grad_scores -= (grad_chunk * out_chunk).sum(-1, keepdim=True)
            grad_scores *= weights
            grad_scores *= scale
            part = grad_scores @ k[:, :, keys]
            grad_q[:, :, queries] = part.view(q[:, :, queries].shape).to(q.dtype)
            grad_k[:, :, keys] += grad_scores.mT @ chunk
    return grad_q, grad_k.to(dtypes[0]), grad_v.to(dtypes[1])


CPU_FLASH = Kernel(_cpu_forward, _cpu_backward)
CUDA_FLASH = Kernel(_cuda_forward, _cuda_backward, pads=True)
MATH = Kernel(_math_forward, _math_backward)


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype of log-sum-exps for queries of this one."""
    return torch.promote_types(dtype, torch.float32)

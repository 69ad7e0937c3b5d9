"""The Triton kernels with which vLLM samples, in numpy and torch (`rollouts.vllm_cpu_kernels`).

Shapes: B rows of logits, R request slots.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, from_numpy

Array = np.ndarray


def temperature(
    logits: Tensor,  # [B, vocabulary]
    stride: int,
    idx_mapping: Tensor,
    temperatures: Tensor,  # [R]
    vocab_size: int,
    **_: Any,
) -> None:
    """Divide the rows by their temperature, save where it is 0 or 1."""
    values = temperatures[idx_mapping].float()
    rows = ((values != 0) & (values != 1)).nonzero().view(-1)
    logits[rows] = (logits[rows].float() / values[rows, None]).to(logits.dtype)


def gumbel_sample(
    local_argmax: Tensor,  # [B, blocks]
    argmax_stride: int,
    local_max: Tensor,
    max_stride: int,
    logits_cache: Tensor | None,
    cache_stride_0: int,
    cache_stride_1: int,
    cache_column: Tensor | None,
    logits: Tensor,  # [B, vocabulary]
    logits_stride: int,
    idx_mapping: Tensor,
    seeds: Tensor,  # [R]
    pos: Tensor,  # [B]
    temperatures: Tensor,
    vocab_size: int,
    *,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    **_: Any,
) -> Any:
    """The likeliest token of each block of the vocabulary, under Gumbel noise where the temperature
    is not 0.
    """
    if logits_cache is not None or IS_DRAFTING or USE_FP64:
        return NotImplemented
    slots = idx_mapping.numpy()
    heat = np.where(slots >= 0, temperatures.numpy()[slots], 0).astype(np.float32)
    scores = np.full((len(logits), local_max.shape[1] * BLOCK_SIZE), -np.inf, np.float32)
    scores[:, :vocab_size] = logits[:, :vocab_size].float().numpy()
    (rows,) = np.nonzero(heat)
    if len(rows):
        chosen = scores[rows, :vocab_size]
        if APPLY_TEMPERATURE:
            chosen = chosen / heat[rows, None]
        noise = _gumbel(seeds.numpy()[slots[rows]], pos.numpy()[rows], vocab_size)
        scores[rows, :vocab_size] = chosen + noise
    blocks = scores.reshape(len(logits), -1, BLOCK_SIZE)
    local_max.numpy()[:] = blocks.max(-1)
    offsets = np.arange(blocks.shape[1]) * BLOCK_SIZE
    local_argmax.numpy()[:] = blocks.argmax(-1) + offsets
    return None


def topk_log_softmax(
    output: Tensor,  # [B, k]
    logits: Tensor,  # [B, vocabulary]
    stride: int,
    ids: Tensor,  # [B, k]
    ids_stride: int,
    topk: int,
    vocab_size: int,
    **_: Any,
) -> None:
    """Log-probabilities of the tokens `ids`."""
    scores = logits[:, :vocab_size].float()
    output.copy_(scores.gather(1, ids[:, :topk]) - scores.logsumexp(1, keepdim=True))


def ranks(
    output: Tensor, logits: Tensor, stride: int, ids: Tensor, vocab_size: int, **_: Any
) -> None:
    """How many tokens are at least as likely as the tokens `ids` [B], themselves included."""
    scores = logits[:, :vocab_size]
    output.copy_((scores >= scores.gather(1, ids.long()[:, None])).sum(1))


def _gumbel(seeds: Array, pos: Array, vocab_size: int) -> Array:
    """float32 [B, vocab_size], of vLLM's hash of the seed, the position and the token."""
    seeds, pos = seeds.astype(np.int64)[:, None], pos.astype(np.int64)[:, None]
    state = np.zeros((len(seeds), 1), np.uint32)
    low = np.int64(0xFFFFFFFF)
    for key in (seeds & low, seeds >> 32 & low, pos & low, np.arange(vocab_size)[None]):
        state = _mix(state, key.astype(np.uint32))
    state ^= np.uint32(16)
    state ^= state >> 16
    state *= np.uint32(0x85EBCA6B)
    state ^= state >> 13
    state *= np.uint32(0xC2B2AE35)
    state ^= state >> 16
    high, rest = (state >> 16).astype(np.float32), (state & 0xFFFF).astype(np.float32)
    uniform = high * np.float32(2**-16) + (rest + np.float32(0.5)) * np.float32(2**-32)
    return -np.log(-_log_one_minus(uniform))


def _mix(state: Array, key: Array) -> Array:
    key = _rotate(key * np.uint32(0xCC9E2D51), 15) * np.uint32(0x1B873593)
    return _rotate(state ^ key, 13) * np.uint32(5) + np.uint32(0xE6546B64)


def _rotate(value: Array, by: int) -> Array:
    return value << np.uint32(by) | value >> np.uint32(32 - by)


def _log_one_minus(value: Array) -> Array:
    """log(1 - value) as vLLM computes it: a series below a quarter."""
    series = np.full_like(value, 1 / 8)
    for i in range(7, 0, -1):
        series = np.float32(1 / i) + value * series
    direct = np.log(np.maximum(np.float32(1) - value, np.float32(5.960464477539063e-08)))
    return np.where(value < np.float32(0.25), -value * series, direct)


def apply_grammar_bitmask(
    logits: Tensor,  # [N, V]
    logits_stride: int,
    logits_indices: Tensor,  # [M]: of each mask, request * MASK_STRIDE + position
    cu_num_logits: Tensor,  # [B + 1]
    bitmask: Tensor,  # int32 [M, words]
    bitmask_stride: int,
    vocab: int,
    MASK_STRIDE: int,
    **_: Any,
) -> None:
    """Take away the tokens that a grammar forbids: those whose bit is 0.

    The only kernel here that the interpreter cannot run at all.
    """
    starts = cu_num_logits.numpy()
    for index, words in zip(logits_indices.numpy(), bitmask.numpy(), strict=True):
        request, position = divmod(int(index), MASK_STRIDE)
        row = starts[request] + position
        if row < starts[request + 1]:
            bits = np.unpackbits(words.view(np.uint8), bitorder="little")[:vocab]
            logits[row, : len(bits)].masked_fill_(from_numpy(bits == 0), -np.inf)

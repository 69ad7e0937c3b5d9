"""The Triton kernels of an ordinary step of vLLM's model runner, in numpy.

On CPU they would run in Triton's interpreter, which takes about a millisecond for each program of a
grid, and a step launches a dozen kernels with a program for each request. Every function here has
the parameters of the kernel it replaces, by position, and writes the same values into the same
tensors; block sizes and launch options are taken and ignored. What a function does not cover
(speculative decoding, context parallelism) it leaves to the kernel: it returns NotImplemented. The
tests hold each function against the interpreted kernel.

Used by `rollouts.vllm_cpu` only. Shapes: B requests in the batch, R request slots, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np
from torch import Tensor

from rollouts import vllm_cpu_sampling

Array = np.ndarray


class Kernel:
    """`function` in the place of the Triton kernel `original`, launched in the same way."""

    def __init__(self, original: Any, function: Callable[..., Any]) -> None:
        self.original, self.function = original, function

    def __getitem__(self, grid: Any) -> Callable[..., None]:
        return partial(self._launch, grid)

    def __getattr__(self, name: str) -> Any:  # arg_names and the like
        return getattr(self.original, name)

    def _launch(self, grid: Any, *args: Any, **kwargs: Any) -> None:
        if self.function(*args, **kwargs) is NotImplemented:
            self.original[grid](*args, **kwargs)


def install() -> None:
    """Replace the kernels. Imports the modules that hold them; a second call does nothing."""
    for name, function in KERNELS.items():
        module_name, attribute = name.rsplit(".", 1)
        module = import_module(f"vllm.v1.worker.gpu.{module_name}")
        original = getattr(module, attribute)
        if not isinstance(original, Kernel):
            setattr(module, attribute, Kernel(original, function))
    for name, function in METHODS.items():
        module_name, owner_name, attribute = name.rsplit(".", 2)
        owner = getattr(import_module(f"vllm.v1.worker.gpu.{module_name}"), owner_name)
        original = getattr(owner, attribute)
        if not hasattr(original, "original"):
            setattr(owner, attribute, _method(original, function))


def _method(original: Callable[..., Any], function: Callable[..., Any]) -> Callable[..., Any]:
    def method(*args: Any, **kwargs: Any) -> Any:
        result = function(*args, **kwargs)
        return original(*args, **kwargs) if result is NotImplemented else result

    method.original = original  # type: ignore[attr-defined]
    return method


# Inputs of the model


def prepare_prefill_inputs(
    input_ids: Tensor,  # [T]
    next_tokens: Tensor,  # [lookahead, R]
    next_stride: int,
    lookahead: int,
    idx_mapping: Tensor,  # [B]
    query_start_loc: Tensor,  # [B + 1]
    all_token_ids: Tensor,  # [R, length]
    all_stride: int,
    prefill_lens: Tensor,  # [R]
    num_computed: Tensor,  # [R]
    **_: Any,
) -> None:
    """Copy the tokens of requests that are still prefilling, and those that follow them."""
    slots = idx_mapping.numpy()
    done, length = num_computed.numpy()[slots], prefill_lens.numpy()[slots]
    (rows,) = np.nonzero(done < length)
    ids, following, source = input_ids.numpy(), next_tokens.numpy(), all_token_ids.numpy()
    start = query_start_loc.numpy()
    for row in rows:
        begin, end, tokens = start[row], start[row + 1], source[slots[row]]
        stop = done[row] + end - begin
        ids[begin:end] = tokens[done[row] : stop]
        ahead = tokens[stop : min(stop + lookahead, length[row])]
        following[:lookahead, slots[row]] = 0
        following[: len(ahead), slots[row]] = ahead


def prepare_pos_seq_lens(
    pos: Tensor,  # [T]
    seq_lens: Tensor,  # [R]
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    num_computed: Tensor,
    max_num_reqs: int,
    **_: Any,
) -> None:
    """Positions of the tokens, and each request's length with them; 0 for rows without one."""
    count = len(idx_mapping)
    start = query_start_loc.numpy()[: count + 1]
    done, lengths = num_computed.numpy()[idx_mapping.numpy()], np.diff(start)
    out = seq_lens.numpy()
    out[:count] = done + lengths
    out[count:max_num_reqs] = 0
    pos.numpy()[start[0] : start[-1]] = _ranges(start) + np.repeat(done, lengths)


def prepare_rope_positions(
    positions: Tensor,  # [dims, T]
    stride: int,
    prefill_positions: Tensor,  # [R * dims, length]
    prefill_stride0: int,
    prefill_stride1: int,
    prefill_delta: Tensor,  # [R]
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    prefill_lens: Tensor,
    num_computed: Tensor,
    NUM_DIMS: int,
    **_: Any,
) -> None:
    """Positions in each rotary dimension: a prompt's are given, those after it only shifted."""
    count, slots = len(idx_mapping), idx_mapping.numpy()
    start = query_start_loc.numpy()[: count + 1]
    done, lengths = num_computed.numpy()[slots], np.diff(start)
    out = positions.numpy()
    shifted = _ranges(start) + np.repeat(done + prefill_delta.numpy()[slots], lengths)
    out[:NUM_DIMS, start[0] : start[-1]] = shifted
    given = prefill_positions.numpy().reshape(-1, NUM_DIMS, prefill_stride1)
    for row in np.nonzero(done < prefill_lens.numpy()[slots])[0]:
        begin, end = start[row], start[row + 1]
        chunk = given[slots[row], :, done[row] : done[row] + end - begin]
        out[:NUM_DIMS, begin:end] = chunk


def combine_sampled_and_draft_tokens(
    input_ids: Tensor,
    idx_mapping: Tensor,
    last_sampled: Tensor,  # [R, 1]
    query_start_loc: Tensor,
    seq_lens: Tensor,  # [B]
    prefill_lens: Tensor,
    draft_tokens: Tensor,
    draft_stride: int,
    cu_num_logits: Tensor,  # [B + 1]
    logits_indices: Tensor,
    BLOCK_SIZE: int,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
) -> Any:
    """Where logits are needed; and the last sampled token becomes the input of a decoding row."""
    if BLOCK_SIZE != 1 or NUM_NEW_SAMPLED_TOKENS != 1:
        return NotImplemented
    count, slots = len(idx_mapping), idx_mapping.numpy()
    counts = np.diff(cu_num_logits.numpy()[: count + 1])
    if count and counts.max() > 1:
        return NotImplemented
    last = query_start_loc.numpy()[1 : count + 1] - 1
    logits_indices.numpy()[: counts.sum()] = last[counts == 1]
    decoding = seq_lens.numpy()[:count] > prefill_lens.numpy()[slots]
    # Without a row of logits the kernel writes behind the query; no such row is decoding.
    rows = decoding & (counts == 1)
    input_ids.numpy()[last[rows]] = last_sampled.numpy().reshape(-1)[slots[rows]]
    return None


# What sampling leaves behind


def get_num_sampled_and_rejected(
    num_sampled: Tensor,  # [B]
    num_rejected: Tensor,  # [B]
    seq_lens: Tensor,
    cu_num_logits: Tensor,
    idx_mapping: Tensor,
    prefill_lens: Tensor,
) -> None:
    """A row whose prompt goes on after this chunk has sampled nothing and rejected nothing."""
    count = len(idx_mapping)
    partial_prompt = seq_lens.numpy()[:count] < prefill_lens.numpy()[idx_mapping.numpy()]
    sampled = num_sampled.numpy()
    sampled[:count][partial_prompt] = 0
    rejected = np.diff(cu_num_logits.numpy()[: count + 1]) - sampled[:count]
    num_rejected.numpy()[:count] = np.where(partial_prompt, 0, rejected)


def post_update(
    idx_mapping: Tensor,
    num_computed: Tensor,
    last_sampled: Tensor,
    output_counts: Tensor | None,  # [R, vocabulary]
    output_counts_stride: int,
    sampled_tokens: Tensor,  # [B, at most so many a step]
    sampled_stride: int,
    num_sampled: Tensor,
    num_rejected: Tensor,
    query_start_loc: Tensor | None,
    all_token_ids: Tensor,
    all_stride: int,
    total_len: Tensor,  # [R]
    **_: Any,
) -> None:
    """Append the sampled tokens to their requests, and move the requests on."""
    count = len(idx_mapping)
    (rows,) = np.nonzero(idx_mapping.numpy() >= 0)
    slots, taken = idx_mapping.numpy()[rows], num_sampled.numpy()[rows]
    tokens, totals = sampled_tokens.numpy(), total_len.numpy()
    everything = all_token_ids.numpy()
    for i in range(taken.max(initial=0)):
        more = taken > i
        column = tokens[rows[more], i]
        everything[slots[more], totals[slots[more]] + i] = column
        last_sampled.numpy().reshape(-1)[slots[more]] = column
        if output_counts is not None:
            output_counts.numpy()[slots[more], column] += 1
    totals[slots] += taken.astype(totals.dtype)
    moved = -num_rejected.numpy()[rows]
    if query_start_loc is not None:
        moved = moved + np.diff(query_start_loc.numpy()[: count + 1])[rows]
    num_computed.numpy()[slots] += moved.astype(num_computed.numpy().dtype)


# Blocks of the key-value cache


def apply_write(
    output: Tensor,
    stride: int,
    indices: Tensor,
    starts: Tensor,
    contents: Tensor,
    cu_lens: Tensor,
    group_ids: Tensor | None,
    *,
    MULTI_GROUP: bool,
    **_: Any,
) -> Any:
    """Write each staged piece into its row from its start on."""
    if MULTI_GROUP or not output.is_contiguous():
        return NotImplemented
    flat, pieces = output.numpy().reshape(-1), contents.numpy()
    begin = 0
    for row, start, end in zip(indices.tolist(), starts.tolist(), cu_lens.tolist(), strict=True):
        at = row * stride + start
        flat[at : at + end - begin] = pieces[begin:end]
        begin = end
    return None


def apply_fused(writer: Any, tensors: Any, pointers: Tensor, strides: Tensor) -> None:
    """The staged writes of several tensors, one tensor after the other."""
    for tensor in tensors:
        tensor.apply_write()


def gather_block_tables(
    tables: Any,
    idx_mapping: Tensor,
    num_reqs_padded: int,
    out: tuple[Tensor, ...] | None = None,
    out_ptrs: Tensor | None = None,
) -> tuple[Tensor, ...]:
    """The block tables of the batch's requests, with zeros for the rows after them."""
    out = tuple(tables.input_block_tables) if out is None else out
    count, slots = len(idx_mapping), idx_mapping.numpy()
    for table, used, target in zip(
        tables.block_tables, tables.num_blocks.gpu.numpy(), out, strict=True
    ):
        lengths = used[slots]
        width = lengths.max(initial=0)
        rows = target.numpy()
        written = np.arange(width) < lengths[:, None]
        np.copyto(rows[:count, :width], table.gpu.numpy()[slots, :width], where=written)
        rows[count:num_reqs_padded] = 0
    return tuple(target[:num_reqs_padded] for target in out)


def compute_slot_mappings(
    tables: Any,
    idx_mapping: Tensor,
    query_start_loc: Tensor,
    positions: Tensor,
    num_tokens_padded: int,
    out: Tensor | None = None,
) -> Any:
    """Where in the cache each token's keys and values go, for each group of layers."""
    if tables.cp_size != 1:
        return NotImplemented
    target = tables.slot_mappings if out is None else out
    count = len(idx_mapping)
    start = query_start_loc.numpy()[: count + 1]
    end = start[-1]
    slots = np.repeat(idx_mapping.numpy(), np.diff(start))
    real = slots >= 0  # a dummy request owns no blocks
    pos = np.where(real, positions.numpy()[start[0] : end], 0)
    for group, mapping in enumerate(target.numpy()):
        if tables._slot_mapping_enabled[group]:
            size = tables.kernel_block_sizes[group]
            blocks = tables.block_tables[group].gpu.numpy()[slots, pos // size]
            mapping[start[0] : end] = np.where(
                real, blocks.astype(np.int64) * size + pos % size, PAD
            )
            mapping[end:] = PAD
        else:
            mapping[start[0] :] = PAD
    return target[:, :num_tokens_padded]


PAD = -1  # vLLM's PAD_SLOT_ID


def _ranges(start: Array) -> Array:
    """0, 1, ... within each of the stretches that begin at `start` [B + 1]."""
    return np.arange(start[0], start[-1]) - np.repeat(start[:-1], np.diff(start))


# Kernels by their place below vllm.v1.worker.gpu; and methods, where the kernel gets addresses.
KERNELS: dict[str, Callable[..., Any]] = {
    "input_batch._prepare_prefill_inputs_kernel": prepare_prefill_inputs,
    "input_batch._prepare_pos_seq_lens_kernel": prepare_pos_seq_lens,
    "input_batch._combine_sampled_and_draft_tokens_kernel": combine_sampled_and_draft_tokens,
    "input_batch._get_num_sampled_and_rejected_kernel": get_num_sampled_and_rejected,
    "input_batch._post_update_kernel": post_update,
    "buffer_utils._apply_write_kernel": apply_write,
    "mm.rope._prepare_rope_positions_kernel": prepare_rope_positions,
    "sample.gumbel._temperature_kernel": vllm_cpu_sampling.temperature,
    "sample.gumbel._gumbel_sample_kernel": vllm_cpu_sampling.gumbel_sample,
    "sample.logprob._topk_log_softmax_kernel": vllm_cpu_sampling.topk_log_softmax,
    "sample.logprob._ranks_kernel": vllm_cpu_sampling.ranks,
    "structured_outputs._apply_grammar_bitmask_kernel": vllm_cpu_sampling.apply_grammar_bitmask,
}
METHODS: dict[str, Callable[..., Any]] = {
    "buffer_utils.FusedStagedWriter.apply": apply_fused,
    "block_table.BlockTables.gather_block_tables": gather_block_tables,
    "block_table.BlockTables.compute_slot_mappings": compute_slot_mappings,
}

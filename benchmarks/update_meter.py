"""Meters of `benchmarks.update`: time, peak memory, and floating-point operations."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch

from benchmarks.shapes import Size
from benchmarks.update_cases import Case, clip_grid
from rl.dry_run import DryRun
from tests.tiny import MERGE, PATCH, TEMPORAL

# Dense bf16 peaks in TFLOP/s without sparsity, of NVIDIA's data sheets. The first name that is part
# of the device's counts.
PEAKS = {
    "B200": 2250.0,
    "H200": 989.0,
    "H100 PCIe": 756.0,
    "H100": 989.0,
    "A100": 312.0,
    "L40S": 362.0,
    "RTX 4090": 165.0,
}


def peak_tflops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The device's peak, if it is known."""
    if device.type != "cuda" or dtype != torch.bfloat16:
        return None
    name = torch.cuda.get_device_name(device)
    return next((peak for known, peak in PEAKS.items() if known in name), None)


ENOUGH = 30.0  # seconds, after which a case is not repeated again
# `cpu` is the time of this process on all its cores: steadier where others use them as well.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def seconds(work: Callable[[], Any], device: torch.device, clock: str) -> float:
    """How long `work` takes, the device's queue included, by one of `CLOCKS`."""
    _wait(device)
    start = CLOCKS[clock]()
    work()
    _wait(device)
    return CLOCKS[clock]() - start


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(work: Callable[[], Any], device: torch.device) -> int:
    """The most bytes alive during `work` beyond those alive before. On a CPU, tensors are counted
    one by one, which takes time.
    """
    if device.type == "cuda":
        _wait(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        work()
        _wait(device)
        return torch.cuda.max_memory_allocated(device) - before
    run = DryRun()
    before = run.hold(t for t in gc.get_objects() if issubclass(type(t), torch.Tensor))
    with run.watching():
        work()
    return run.peak - before


@dataclass(frozen=True)
class Found:
    """What was measured of one case; None where the device had too little memory."""

    seconds: dict[str, float | None]
    bytes: dict[str, int | None]
    loss_apart: float | None  # relative
    gradients_apart: float | None  # relative, in norm, of the parameter where it is largest


def compare(
    work: dict[str, Callable[[], float]],
    parameters: dict[str, torch.nn.Parameter],
    device: torch.device,
    repeats: int,
    clock: str,
) -> Found:
    """Measure two updates, each of which returns its loss and adds to the gradients of
    `parameters`: memory and gradients in a first pass of each, then medians of times, in turns.
    """
    memory: dict[str, int | None] = {}
    losses: dict[str, float] = {}
    gradients: dict[str, dict[str, torch.Tensor]] = {}
    for name, update in work.items():
        _zero(parameters)
        gc.collect()  # what is freed during the pass would count against it
        memory[name] = _unless_full(
            lambda u=update, n=name: peak_bytes(lambda: losses.update({n: u()}), device)
        )
        if memory[name] is not None:
            # On a GPU they would take the room of what is measured next.
            gradients[name] = {
                n: p.grad.to("cpu", copy=True) for n, p in parameters.items() if p.grad is not None
            }
    names = [name for name in work if memory[name] is not None]
    times: dict[str, list[float | None]] = {name: [] for name in names}
    gc.collect()
    start = time.monotonic()
    for repeat in range(repeats):
        if repeat and time.monotonic() - start > ENOUGH:
            break
        for name in names[:: 1 if repeat % 2 else -1]:
            _zero(parameters)
            times[name].append(_unless_full(lambda n=name: seconds(work[n], device, clock)))
    found = {name: _median(times.get(name, [])) for name in work}
    if len(gradients) < len(work):
        return Found(found, memory, None, None)
    (own, other), (ours, theirs) = losses.values(), gradients.values()
    apart = max(_apart(ours[n], theirs[n]) for n in parameters)
    return Found(found, memory, abs(own - other) / abs(other), apart)


def _zero(parameters: dict[str, torch.nn.Parameter]) -> None:
    """Gradients exist before an update, as they do in all but a step's first micro-batch."""
    for parameter in parameters.values():
        parameter.grad = None
    for parameter in parameters.values():
        parameter.grad = torch.zeros_like(parameter)


def _unless_full(work: Callable[[], Any]) -> Any:
    try:
        return work()
    except torch.OutOfMemoryError:
        torch.cuda.empty_cache()
        return None


def _median(values: list[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return median(known) if known and len(known) == len(values) else None


def _apart(own: torch.Tensor, other: torch.Tensor) -> float:
    """The norm of the difference over the norm of the other."""
    norm = other.float().norm()
    return float((own.float() - other.float()).norm() / norm) if norm else float(own.any())


def update_flops(size: Size, case: Case) -> float:
    """Model FLOPs of one update in which every prompt is computed once: three times those of the
    forward pass, as the backward pass has two products for each of its one.

    Counted are matrix products, two a multiplication and addition: of the linear layers of vision
    tower and language model, of the LM head at the tokens of completions, and of attention with the
    half of a square that a causal mask leaves. What is done again (checkpointing, padding) is not.
    """
    forward = 0.0
    for prompt, completions in case.groups:
        answers = sum(completions)
        pairs = prompt * (prompt + 1) / 2
        pairs += sum(c * prompt + c * (c + 1) / 2 for c in completions)
        forward += language_flops(size, prompt + answers, pairs)
        forward += 2 * size.hidden * size.vocabulary * answers
        forward += vision_flops(size, *clip_grid(prompt))
    return 3 * forward


def language_flops(size: Size, tokens: float, pairs: float) -> float:
    """Forward FLOPs of the language model without its head: `pairs` of tokens attend."""
    queries = size.heads * size.head_dim
    projections = size.hidden * (2 * queries + 2 * size.kv_heads * size.head_dim)
    feed_forward = 3 * size.hidden * size.inner
    return size.layers * (2 * tokens * (projections + feed_forward) + 4 * pairs * queries)


def vision_flops(size: Size, frames: int, side: int) -> float:
    """Forward FLOPs of the vision tower for a clip: frame pairs of `side` × `side` merged patches,
    which attend within themselves.
    """
    width, merged = size.vision_hidden, frames * side * side
    patches, square = merged * MERGE**2, (side * MERGE) ** 2
    embedding = 3 * TEMPORAL * PATCH**2 * width
    layer = 4 * width**2 + 2 * width * size.vision_inner
    wide = width * MERGE**2
    mergers = (1 + len(size.deepstack)) * wide * (wide + size.hidden)
    attention = 4 * patches * square * width
    return (
        2 * patches * embedding
        + size.vision_depth * (2 * patches * layer + attention)
        + (2 * merged * mergers)
    )

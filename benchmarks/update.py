"""How long an update takes, of `LADAPOTrainer` and of TRL's own `GRPOTrainer`: prints a table of
times, of peak memory, and of how far apart their losses and gradients are.

An update is what a training step does between sampling and the optimizer: log-probs, loss,
backward. Both trainers hold the same model, and get the same prompts, clips and completions in one
micro-batch: a group of G completions, C tokens each, to a prompt of P tokens of which most are
video. TRL computes the prompt G times. *Limit* is the number of tokens it computes over the number
there would be with every prompt once, G(P+C)/(P+GC) if nothing is padded; attention and the LM head
do not shrink by just that factor, so ratios may come out on either side. At the end stand
micro-batches in which next to nothing can be shared.

The weights are random, in the shapes of Qwen3-VL, and patches are 4 pixels, so that a clip is a few
pixels and many tokens. Completions are text: TRL could not be fed latents. Its log-probs would
leave the videos out: a subclass hands them to the model, once a completion, as TRL does with
images. On a CPU its fused LM head scores prompts as well, which it does not do on a GPU, and takes
scratch room for a vocabulary of 32768: here it does neither, unless --stock-head asks for it.
Activation memory is the peak over a whole update beyond weights, gradients and the batch, all of
which exist before.

Gradients are checkpointed unless told otherwise, as both trainers do by default.

python -m benchmarks.update
python -m benchmarks.update --checkpointing off --largest 8
python -m benchmarks.update --model 100m --headline
python -m benchmarks.update --model 2b 8b --device cuda
"""

from __future__ import annotations

import argparse
import gc
import logging
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import trl.trainer.utils
from datasets import Dataset
from transformers.utils.logging import disable_progress_bar
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.grpo_trainer import GRPOTrainer

from benchmarks.shapes import SIZES, Size, machine, write_policy
from benchmarks.update_cases import Batch, Case, make_batch
from benchmarks.update_meter import (
    CLOCKS,
    Found,
    compare,
    peak_tflops,
    update_flops,
)
from rl.la_dapo import LADAPOTrainer
from rl.la_dapo_config import LADAPOConfig
from rl.policy.loading import load_policy
from rl.policy.protocol import LatentProtocol
from rl.trajectory import Sample

RATIOS = (1, 2, 5, 10, 20)
SHARED = tuple(Case.of(size, ratio * 50, 50) for size in (4, 8, 16) for ratio in RATIOS)
HEADLINE = tuple(Case.of(size, 2000, 200) for size in (8, 16))
# Nothing to share (equal lengths, then unequal ones, which TRL pads), little to share, and a group
# as sampling leaves it.
OTHERS = (
    Case.of(1, 500, 100, groups=4),
    Case(tuple((p, (c,)) for p, c in ((200, 20), (350, 60), (500, 100), (800, 160)))),
    Case.of(8, 50, 500),
    Case(((1000, tuple(range(30, 190, 20))),)),
)
QUICK = (Case.of(4, 60, 6), Case(((40, (3, 5)), (30, (4, 2)))), Case.of(1, 30, 8, groups=2))
COLUMNS = (
    "model", "checkpointing", "G", "P", "C", "ours, s", "TRL, s", "time: TRL / ours", "limit",
    "ours, MiB", "TRL, MiB", "memory: TRL / ours", "loss apart", "gradients apart",
)  # fmt: skip
MFU_COLUMNS = ("ours, MFU", "TRL, MFU", "TRL, MFU with repeated prompts")


class VideoGRPOTrainer(GRPOTrainer):
    """TRL's trainer, with the clips handed to the model. All else is its own."""

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        clips = {name: inputs[name] for name in ("pixel_values_videos", "video_grid_thw")}
        return super()._compute_loss(partial(model, **clips), inputs)


@contextmanager
def frugal_head(vocabulary: int) -> Iterator[None]:
    """TRL's fused LM head scores completions alone, on a CPU as on a GPU, and takes no more scratch
    room than a small vocabulary needs.
    """
    chunk = min(trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE, vocabulary)
    # The module asks `_use_triton` only whether to score completions alone.
    with (
        patch("trl.trainer.utils._use_triton", lambda _: True),
        patch("trl.trainer.utils._CHUNKED_LOGPROB_CHUNK_SIZE", chunk),
    ):
        yield


@dataclass(frozen=True)
class Options:
    """How cases are measured."""

    model: str
    device: torch.device
    dtype: torch.dtype
    checkpointing: bool
    repeats: int
    clock: str
    peak: float | None  # FLOP/s of the device

    @property
    def size(self) -> Size:
        return SIZES[self.model]


def policy_of(options: Options) -> tuple[Any, Any]:
    """A random policy and its processor.

    Latent markers and media placeholders cannot be sampled, and our log-probs leave them out of the
    vocabulary. TRL's do not: a bias of the LM head, which both read, leaves them out of its too.
    """
    protocol = LatentProtocol(noise_scale=0.3)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        processor = write_policy(folder, options.size, protocol, options.device, options.dtype)
        policy = load_policy(folder, dtype=options.dtype).to(options.device).train()
    tokens, head = policy.latent_tokens, policy.get_output_embeddings()
    bias = torch.zeros(len(head.weight), device=options.device, dtype=options.dtype)
    bias[[tokens.filler, tokens.end, *tokens.banned]] = -1e4
    head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return policy, processor


def update_of(trainer: Any, inputs: dict[str, Any]) -> Callable[[], float]:
    """One update, as the `training_step` of transformers makes it; returns the loss."""
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.accelerator.prepare_model(trainer.model)

    def update() -> float:
        with trainer.compute_loss_context_manager():
            loss = trainer.compute_loss(model, inputs)
        trainer.accelerator.backward(loss)
        return float(loss.detach())

    return update


def updates(policy: Any, processor: Any, batch: Batch, options: Options, folder: str) -> Any:
    """The update of each trainer on a batch, by its name. Both hold `policy` itself."""
    # Each trainer, and `accelerate`, wraps the model's forward.
    policy.__dict__.pop("forward", None)
    policy.__dict__.pop("_original_forward", None)
    common: dict[str, Any] = {
        "output_dir": folder,
        "per_device_train_batch_size": 2 * len(batch.case.rows),
        "num_generations": max(2, batch.case.size),  # TRL's least; only sampling asks
        "generation_batch_size": 2 * max(2, batch.case.size) * len(batch.case.rows),
        "loss_type": "dapo",
        "epsilon_high": 0.28,
        "beta": 0.0,
        "gradient_checkpointing": options.checkpointing,
        "bf16": options.dtype == torch.bfloat16,
        "use_cpu": options.device.type == "cpu",
        "report_to": "none",
        "disable_tqdm": True,
    }
    ours = LADAPOTrainer(
        policy,
        rollouts=batch.rollouts,
        scorer=SimpleNamespace(names=["outcome"], weights=[1.0]),  # type: ignore[arg-type]
        samples=[Sample(f"sample{i}", "", "?", "!") for i in range(len(batch.case.groups))],
        args=LADAPOConfig(**common),
        processing_class=processor,
    )
    trl = VideoGRPOTrainer(
        policy,
        reward_funcs=[_no_reward],
        args=GRPOConfig(**common),
        train_dataset=Dataset.from_list([{"prompt": [{"role": "user", "content": "?"}]}]),
        processing_class=processor,
    )
    return {"ours": update_of(ours, batch.ours), "trl": update_of(trl, batch.trl)}


def _no_reward(**_: Any) -> list[float | None]:
    raise NotImplementedError


def measure(case: Case, policy: Any, processor: Any, options: Options) -> Found:
    """Both trainers on one case."""
    if options.checkpointing:
        policy.gradient_checkpointing_enable({"use_reentrant": False})
    else:
        policy.gradient_checkpointing_disable()
    batch = make_batch(case, policy, processor.tokenizer.pad_token_id, options.device)
    with tempfile.TemporaryDirectory() as folder:
        work = updates(policy, processor, batch, options, folder)
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    return compare(work, parameters, options.device, options.repeats, options.clock)


def cells(case: Case, found: Found, options: Options) -> list[str]:
    """One row of the table."""
    times, memory = found.seconds, found.bytes
    row = [options.model, "on" if options.checkpointing else "off", *case.names()]
    row += [_cell(times[n], ".3f") for n in ("ours", "trl")]
    row += [_cell(_over(times["trl"], times["ours"]), ".2f"), f"{case.limit:.2f}"]
    row += [_cell(_over(memory[n], 2**20), ".0f") for n in ("ours", "trl")]
    row += [_cell(_over(memory["trl"], memory["ours"]), ".2f")]
    row += [_cell(v, ".0e") for v in (found.loss_apart, found.gradients_apart)]
    if options.peak is not None:
        useful, repeated = (update_flops(options.size, c) for c in (case, case.repeated))
        pairs = ((useful, times["ours"]), (useful, times["trl"]), (repeated, times["trl"]))
        row += [_cell(_over(_over(flops, s), options.peak), ".1%") for flops, s in pairs]
    return row


def _over(value: float | None, by: float | None) -> float | None:
    return None if value is None or by is None else value / by


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else format(value, form)


def main() -> None:
    found = read_arguments()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    device = torch.device(found.device)
    if device.type == "cpu":
        torch.set_num_threads(found.threads)
    dtype = getattr(torch, found.dtype or ("bfloat16" if device.type == "cuda" else "float32"))
    cases = QUICK if found.quick else HEADLINE if found.headline else SHARED + HEADLINE + OTHERS
    cases = [case for case in cases if found.quick or case.size <= found.largest]
    peak = found.peak_tflops or peak_tflops(device, dtype)
    columns = COLUMNS if peak is None else COLUMNS + MFU_COLUMNS
    kind = str(dtype).removeprefix("torch.")
    print(f"{machine(device)}, {kind}, {found.clock} clock\n")
    print(f"| {' | '.join(columns)} |\n|{'---|' * len(columns)}")
    for model in found.model:
        options = Options(
            model=model,
            device=device,
            dtype=dtype,
            checkpointing=False,
            repeats=found.repeats,
            clock=found.clock,
            peak=peak and peak * 1e12,
        )
        head = nullcontext() if found.stock_head else frugal_head(options.size.vocabulary)
        with head:
            print_rows(options, [c == "on" for c in found.checkpointing], cases)
        gc.collect()  # trainers are full of cycles, and the next model needs the room


def print_rows(options: Options, checkpointing: Sequence[bool], cases: Sequence[Case]) -> None:
    policy, processor = policy_of(options)
    measure(QUICK[0], policy, processor, options)  # a GPU's libraries take room once
    for way in (replace(options, checkpointing=on) for on in checkpointing):
        for case in cases:
            row = cells(case, measure(case, policy, processor, way), way)
            print(f"| {' | '.join(row)} |", flush=True)


def read_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["2b" if on_gpu else "20m"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="float32 on a CPU and bfloat16 on a GPU, unless given",
    )
    parser.add_argument("--checkpointing", nargs="+", choices=("off", "on"), default=["on"])
    parser.add_argument("--repeats", type=int, default=5 if on_gpu else 3)
    parser.add_argument("--largest", type=int, default=16, help="leave out groups larger than this")
    parser.add_argument("--threads", type=int, default=2, help="on a CPU")
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="wall",
        help="cpu: seconds of this process, for a CPU that others use too, with --threads 1",
    )
    parser.add_argument("--peak-tflops", type=float, help="of the device, for MFU")
    parser.add_argument(
        "--stock-head", action="store_true", help="leave TRL's LM head as it is on a CPU"
    )
    cases = parser.add_mutually_exclusive_group()
    cases.add_argument("--headline", action="store_true", help="P = 2000, C = 200 alone")
    cases.add_argument("--quick", action="store_true", help="three tiny cases, to see it run")
    found = parser.parse_args()
    if found.quick:
        found.model, found.repeats = ["tiny"], 1
    return found


if __name__ == "__main__":
    main()

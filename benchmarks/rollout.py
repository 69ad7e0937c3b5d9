"""How fast latent trajectories are sampled: prints three tables of times and ratios.

1. Decoding inside vLLM: a step of a batch of latent trajectories against a step of plain decoding.
   Plain is the same weights under vLLM's own model class, so nothing of Foresight runs; as many
   tokens, after prompts as long. The engines take turns, and medians over all steps are compared.
   Half of what the latent engine samples are latents, and all log-probs are kept. Beside greedy
   decoding, the least vLLM can do, stands decoding at temperature 1 with log-probs, which is what
   reinforcement learning asks of it.
2. Both engines against one sequence at a time. `one_by_one` stands for the released approach: our
   own smallest version of the loop around transformers that published latent models sample with.
3. What it costs to bring home from vLLM's process what was sampled there.

Weights are random, in the shapes of Qwen3-VL: what is sampled is noise, and takes as long. On a
CPU, the parts of vLLM that are written for GPUs are slow (`rollouts.vllm_cpu`).

python -m benchmarks.rollout
python -m benchmarks.rollout --model 2b 8b --device cuda --tokens 256
"""

from __future__ import annotations

import argparse
import gc
import logging
import os
import tempfile
from pathlib import Path
from statistics import median

import torch

from benchmarks.sampling_rates import Rates, engine_rates
from benchmarks.shapes import SIZES, Setting, machine, write_policy
from benchmarks.vllm_steps import vllm_steps
from rl.policy.protocol import LatentProtocol
from rollouts import vllm_cpu


def print_steps(name: str, found: dict[tuple[str, int], float]) -> None:
    for batch in sorted({batch for _, batch in found}):
        greedy, sampled, latent = (found[k, batch] for k in ("greedy", "sampled", "latent"))
        print(
            f"| {name} | {batch} | {1e3 * greedy:.2f} | {1e3 * sampled:.2f} | {1e3 * latent:.2f} "
            f"| {latent / greedy:.3f} | {latent / sampled:.3f} | {1e6 * (latent - greedy):.0f} "
            f"| {1e6 * (latent - sampled):.0f} |"
        )


def print_rates(name: str, found: Rates) -> None:
    for batch in sorted(found.fetches):
        loop = median(found.rates["loop", 1])
        own, vllm = (median(found.rates[k, batch]) for k in ("transformers", "vllm"))
        print(
            f"| {name} | {batch} | {loop:.1f} | {own:.1f} | {vllm:.1f} | {own / loop:.1f} "
            f"| {vllm / loop:.1f} |"
        )


def print_fetches(name: str, found: Rates) -> None:
    for batch, fetches in sorted(found.fetches.items()):
        cost, share = (median(column) for column in zip(*fetches, strict=True))
        print(f"| {name} | {batch} | {cost:.2f} | {100 * share:.2f} % |")


def main() -> None:
    settings = read_arguments()
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # it logs to where the tables go
    vllm_cpu.install()
    logging.disable(logging.WARNING)
    stepped, sampled = {}, {}
    for setting in settings:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            protocol = LatentProtocol(max_length=setting.tokens // 2, max_spans=1, noise_scale=0.3)
            processor = write_policy(folder, setting.size, protocol, setting.device, setting.dtype)
            stepped[setting.model] = vllm_steps(folder, setting)
            gc.collect()
            sampled[setting.model] = engine_rates(folder, processor, setting)
            gc.collect()
    first = settings[0]
    print(f"{machine(first.device)}, {first.kind}, {first.tokens} tokens\n")
    print("Milliseconds of a step inside vLLM:\n")
    print(
        "| model | batch | plain, greedy | plain, sampled with log-probs | latent "
        "| latent / greedy | latent / sampled | µs more than greedy | µs more than sampled |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for model, steps_of in stepped.items():
        print_steps(model, steps_of)
    print("\nTokens per second:\n")
    print(
        "| model | requests | one by one | transformers | vLLM | transformers / one by one "
        "| vLLM / one by one |"
    )
    print("|---|---|---|---|---|---|---|")
    for model, rates in sampled.items():
        print_rates(model, rates)
    print("\nFetching what vLLM sampled:\n")
    print("| model | requests | ms a request | share of the time |")
    print("|---|---|---|---|")
    for model, rates in sampled.items():
        print_fetches(model, rates)


def read_arguments() -> list[Setting]:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", nargs="+", choices=SIZES, default=["tiny", "100m"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if on_gpu else "cpu")
    parser.add_argument(
        "--dtype",
        choices=("float32", "bfloat16"),
        help="float32 on a CPU and bfloat16 on a GPU, unless given",
    )
    parser.add_argument("--tokens", type=int, default=256 if on_gpu else 16)
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8, 32, 64])
    parser.add_argument("--repeats", type=int, default=5 if on_gpu else 2)
    found = parser.parse_args()
    if (found.device == "cpu") != vllm_cpu.needed():
        build = "CPUs" if vllm_cpu.needed() else "GPUs"
        parser.error(f"the vLLM that is installed is for {build}; choose --device accordingly")
    dtype = found.dtype or ("bfloat16" if found.device == "cuda" else "float32")
    return [
        Setting(
            model,
            torch.device(found.device),
            getattr(torch, dtype),
            found.tokens,
            tuple(found.batches),
            found.repeats,
        )
        for model in found.model
    ]


if __name__ == "__main__":
    main()

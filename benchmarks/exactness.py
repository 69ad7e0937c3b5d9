"""How far replay is from the sampler, of both engines: prints the tables of `docs/exactness.md`.

python -m benchmarks.exactness
"""

from __future__ import annotations

import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from rl.policy.loading import load_policy
from rl.policy.protocol import LatentProtocol
from tests.latent import thinking_policy
from tests.rl.test_scoring import gaps, sampled
from tests.rollouts.vllm_runs import Ask, engine, sample
from tests.rollouts.vllm_runs import gaps as text_gaps


def protocol(scale: float, **kwargs: Any) -> LatentProtocol:
    return LatentProtocol(min_length=1, max_length=4, max_spans=3, noise_scale=scale, **kwargs)


# What is measured; `boldness` is how widely the logits of span starts and ends vary.
CASES: dict[str, dict[str, Any]] = {
    "Qwen3-VL, fp32, Gaussian, c = 1": {"protocol": protocol(1.0)},
    "Qwen2.5-VL, fp32, Gaussian, c = 1": {"family": "qwen2_5_vl", "protocol": protocol(1.0)},
    "Qwen3.5, fp32, Gaussian, c = 1": {
        "family": "qwen3_5",
        "protocol": protocol(1.0),
        "boldness": 0.6,
    },
    "Qwen3-VL, fp32, von Mises-Fisher, c = 1": {"protocol": protocol(1.0, density="vmf")},
    "Qwen3-VL, fp32, Gaussian, c = 0.3": {"protocol": protocol(0.3)},
    "Qwen3-VL, fp32, Gaussian, c = 0.1": {"protocol": protocol(0.1)},
    "Qwen3-VL, bf16, Gaussian, c = 1": {
        "protocol": protocol(1.0),
        "dtype": torch.bfloat16,
        "boldness": 0.3,
    },
    "Qwen3-VL, bf16, Gaussian, c = 0.3": {
        "protocol": protocol(0.3),
        "dtype": torch.bfloat16,
        "boldness": 0.3,
    },
}

VLLM_CASES: dict[str, tuple[Any, torch.dtype]] = {
    "Qwen3-VL, fp32": ("qwen3_vl", torch.float32),
    "Qwen2.5-VL, fp32": ("qwen2_5_vl", torch.float32),
    "Qwen3-VL, bf16": ("qwen3_vl", torch.bfloat16),
    "Qwen2.5-VL, bf16": ("qwen2_5_vl", torch.bfloat16),
    "Qwen3.5, bf16": ("qwen3_5", torch.bfloat16),
}


def main() -> None:
    torch.set_num_threads(1)
    print("| policy | tokens | end or continue | latents, sum over H = 32 | latents, sum / √H |")
    print("|---|---|---|---|---|")
    for name, settings in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            policy, media, trajectories = sampled(Path(folder), head="identity", **settings)
            found = gaps(policy, media, trajectories)
        width = policy.config.get_text_config().hidden_size
        cells = (found["token"], found["decision"], found["latent"] * width**0.5, found["latent"])
        print(f"| {name} | {' | '.join(f'{cell:.1e}' for cell in cells)} |")
    if find_spec("vllm") is not None:
        print_vllm()


def print_vllm() -> None:
    """32 text prompts through vLLM, scored by the policy in the sampler's precision and in fp32."""
    asks = [
        Ask(tuple(7 + j * (i + 1) % 240 for j in range(40)), seed=i, most=32) for i in range(32)
    ]
    print(
        "\n| in vLLM, Gaussian, c = 1 | tokens and decisions | latents, sum / √H "
        "| tokens, scored in fp32 |"
    )
    print("|---|---|---|---|")
    for name, (family, dtype) in VLLM_CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            policy, processor = thinking_policy(
                Path(folder, "base"), family, protocol(1.0), "identity", boldness=0.3
            )
            where = Path(folder, "policy")
            policy.to(dtype).save_pretrained(where)
            processor.save_pretrained(where)
            told = sample(engine(where, dtype=str(dtype).removeprefix("torch.")), asks)
            same, exact = (
                text_gaps(load_policy(where, dtype=kind).eval(), asks, told)
                for kind in (dtype, torch.float32)
            )
        print(f"| {name} | {same[0]:.1e} | {same[1]:.1e} | {exact[0]:.1e} |")


if __name__ == "__main__":
    main()

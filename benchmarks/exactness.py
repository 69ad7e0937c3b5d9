"""How far replay is from the sampler: prints the table of `docs/exactness.md`.

python -m benchmarks.exactness
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import torch

from rl.policy.protocol import LatentProtocol
from tests.rl.test_scoring import gaps, sampled


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


if __name__ == "__main__":
    main()

"""What the shaping rewards cost: prints seconds on one core for a batch of 512 trajectories.

Groups of 16, each trajectory with 64 latents of width 4096 in bfloat16 (4 spans of 16) and a text
of 200 words. Beside the outcome-contrastive reward stands the same formula written out pair by
pair and step by step, on the same data; both must agree. The last line is the same batch through
the whole pipeline: put into Ray's object store, scored in another process, counted and split.

OMP_NUM_THREADS=1 python -m benchmarks.rewards
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from rewards.format import format_rewards
from rewards.length import length_rewards
from rewards.outcome_contrastive import outcome_contrastive_rewards
from rewards.registry import build_terms
from rewards.repetition import repetition_rewards
from rewards.scorer import RewardSet
from rewards.temporal_diversity import temporal_diversity_rewards
from rewards.temporal_order import temporal_order_rewards
from rl.trajectory import Sample, Sampling, Trajectory, TrajectoryGroup

GROUPS, SIZE = 32, 16
SPANS, STEPS, WIDTH = 4, 16, 4096
WORDS, VOCABULARY = 200, 5000
FILLER = 1
TEMPERATURE = 0.5

REWARDS: dict[str, Callable[..., Sequence[float | None]]] = {
    "format": format_rewards,
    "outcome_contrastive": outcome_contrastive_rewards,
    "temporal_diversity": temporal_diversity_rewards,
    "repetition": repetition_rewards,
    "length": length_rewards,
    "temporal_order": temporal_order_rewards,
}


def trajectory(rng: np.random.Generator, torch_rng: torch.Generator) -> Trajectory:
    """One completion: four times a span and a reason of 50 words, then an answer."""
    words = [f"w{i}" for i in rng.zipf(1.3, WORDS) % VOCABULARY]
    span = "<|latent_start|>" + "<|latent|>" * STEPS + "<|latent_end|>"
    share = WORDS // SPANS
    reasons = [" ".join(words[i * share : (i + 1) * share]) for i in range(SPANS)]
    text = "".join(f"{span}<reason>{reason}</reason>" for reason in reasons)
    count = SPANS * STEPS
    ids = np.concatenate([np.full(count, FILLER), rng.integers(2, VOCABULARY, WORDS)])
    return Trajectory(
        sample_id="sample",
        prompt_ids=np.zeros(1, dtype=np.int64),
        completion_ids=ids,
        decision=np.ones(len(ids), dtype=np.int8),
        logprobs=np.zeros(len(ids), dtype=np.float32),
        kept=np.zeros(len(ids), dtype=np.int32),
        latents=torch.randn(count, WIDTH, generator=torch_rng).to(torch.bfloat16),
        latent_logprobs=np.zeros(count),
        span_lengths=(STEPS,) * SPANS,
        filler=FILLER,
        media=(),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(max_new_tokens=300),
        seed=0,
        text=f"{text}<answer>B</answer>",
    )


def batch() -> dict[str, Any]:
    """The columns that the pipeline hands to a reward."""
    rng, torch_rng = np.random.default_rng(0), torch.Generator().manual_seed(0)
    trajectories = [trajectory(rng, torch_rng) for _ in range(GROUPS * SIZE)]
    outcomes = rng.integers(0, 2, GROUPS * SIZE).astype(float).tolist()
    control = rng.integers(0, 2, (GROUPS, SIZE // 2)).astype(float).tolist()
    return {
        "completions": [[{"role": "assistant", "content": t.text}] for t in trajectories],
        "completion_ids": [t.completion_ids.tolist() for t in trajectories],
        "trajectories": trajectories,
        "group_ids": [i // SIZE for i in range(GROUPS * SIZE)],
        "outcomes": outcomes,
        "shuffled_outcomes": [control[i // SIZE] for i in range(GROUPS * SIZE)],
    }


def pair_by_pair(latents: Sequence[np.ndarray], correct: Sequence[bool]) -> list[float]:
    """The bounded outcome-contrastive reward of one group, as its formula reads.

    Every trajectory has latents, and somebody to compare with on both sides.
    """

    def similarity(a: np.ndarray, b: np.ndarray) -> float:
        steps = zip(a, b, strict=False)
        cosines = [x @ y / (np.linalg.norm(x) * np.linalg.norm(y)) for x, y in steps]
        return float(np.mean([(1 + cosine) / 2 for cosine in cosines]))

    values = []
    for i, own in enumerate(latents):
        others = [
            (similarity(own, z), right)
            for j, (z, right) in enumerate(zip(latents, correct, strict=True))
            if j != i
        ]
        positive = max(value for value, right in others if right)
        negative = [math.exp(value / TEMPERATURE) for value, right in others if not right]
        against = TEMPERATURE * math.log(sum(negative) / len(negative))
        values.append(1 / (1 + math.exp((against - positive) / TEMPERATURE)))
    return values


def naive(columns: dict[str, Any]) -> list[float]:
    values: list[float] = []
    for start in range(0, GROUPS * SIZE, SIZE):
        members = slice(start, start + SIZE)
        latents = [t.latents.float().numpy() for t in columns["trajectories"][members]]
        values += pair_by_pair(latents, [o == 1.0 for o in columns["outcomes"][members]])
    return values


def best(function: Callable[[], Any], tries: int = 3) -> float:
    """Seconds of the fastest of `tries` calls, after one that warms up."""
    function()
    times = []
    for _ in range(tries):
        start = time.perf_counter()
        function()
        times.append(time.perf_counter() - start)
    return min(times)


def through_processes(trajectories: Sequence[Trajectory], control: list[list[float]]) -> float:
    """Seconds of `RewardSet.score` with all shaping rewards, in the process they share."""
    import ray

    sample = Sample("sample", "clip.mp4", "Where?", "B", options=("left", "right"))
    starts = range(0, len(trajectories), SIZE)
    groups = [TrajectoryGroup(sample, tuple(trajectories[i : i + SIZE])) for i in starts]
    ray.init(num_cpus=1, include_dashboard=False, logging_level=logging.WARNING)
    try:
        terms = build_terms([{"use": name} for name in ("accuracy", *REWARDS)])
        with RewardSet(terms, isolated=True) as rewards:
            outcomes = rewards.outcomes(groups)
            return best(lambda: rewards.score(groups, outcomes, control))
    finally:
        ray.shutdown()


def main() -> None:
    torch.set_num_threads(1)
    columns = batch()
    print("| reward | seconds |")
    print("|---|---|")
    total = 0.0
    seconds = {}
    for name, function in REWARDS.items():
        seconds[name] = best(lambda function=function: function(**columns))
        total += seconds[name]
        print(f"| {name} | {seconds[name]:.4f} |")
    print(f"| sum | {total:.4f} |")
    control = columns["shuffled_outcomes"][::SIZE]
    print(f"| in their process | {through_processes(columns['trajectories'], control):.4f} |")
    reference = best(lambda: naive(columns), tries=1)
    ours = outcome_contrastive_rewards(**columns)
    gap = max(abs(a - b) for a, b in zip(naive(columns), ours, strict=True) if b is not None)
    print(
        f"\noutcome_contrastive pair by pair: {reference:.2f} s, "
        f"{reference / seconds['outcome_contrastive']:.0f} times as long; values within {gap:.0e}"
    )


if __name__ == "__main__":
    main()

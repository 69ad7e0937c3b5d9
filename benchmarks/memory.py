"""Measured against estimated peak memory of a LA-DAPO update: prints the table of `docs/update.md`.

python -m benchmarks.memory [--sizes tests 100m]

Each case is measured in a process of its own, by the peak of its resident memory (Linux only).
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import SIZES, config_of
from rl.errors import VideoError
from rl.interfaces import GroupScores, ScoringLog, WeightUpdate
from rl.la_dapo import LADAPOTrainer
from rl.la_dapo_config import LADAPOConfig
from rl.memory import (
    ExampleMedia,
    MemorySetting,
    estimate_memory,
    example_trajectory,
    random_policy,
)
from rl.policy.vision import vision_tower
from rl.trajectory import RolloutRequest, Sample, TrajectoryGroup
from tests.tiny import tiny_model, tiny_processor

# glibc would keep freed memory in its arenas and count it as held: large blocks go back at once.
ENVIRONMENT = {
    "MALLOC_ARENA_MAX": "1",
    "MALLOC_MMAP_THRESHOLD_": str(4 << 10),
    "MALLOC_MMAP_MAX_": str(1 << 20),
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Case:
    """A setting that travels to another process. `size` is one of benchmarks/shapes.py, or "tests"
    for the model of tests/tiny.py.
    """

    size: str
    grid: tuple[int, int, int]
    completion: int
    group_size: int = 8
    groups: int = 1
    micro_batches: int = 1
    dtype: str = "float32"
    autocast: str | None = None
    checkpointing: bool = False
    lora: bool = False
    train_vision: bool = True
    reference: bool = False

    def setting(self) -> MemorySetting:
        peft_config = None
        if self.lora:
            from peft import LoraConfig

            peft_config = LoraConfig(r=16, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"])
        return MemorySetting(
            model=tiny_model().config if self.size == "tests" else config_of(SIZES[self.size]),
            grid=self.grid,
            text_tokens=48,
            group_size=self.group_size,
            completion_tokens=self.completion,
            groups=self.groups,
            micro_batches=self.micro_batches,
            dtype=getattr(torch, self.dtype),
            autocast=getattr(torch, self.autocast) if self.autocast else None,
            gradient_checkpointing=self.checkpointing,
            peft_config=peft_config,
            train_vision=self.train_vision,
            reference=self.reference,
        )

    def __str__(self) -> str:
        marks = [
            self.dtype + (f" under {self.autocast}" if self.autocast else ""),
            "checkpointing" if self.checkpointing else "",
            "LoRA" if self.lora else "",
            "" if self.train_vision else "frozen tower",
            "reference" if self.reference else "",
            f"{self.groups} groups" if self.groups > 1 else "",
            f"{self.micro_batches} micro-batches" if self.micro_batches > 1 else "",
        ]
        return ", ".join(m for m in marks if m)


# -- the measured run ------------------------------------------------------------------------------


class ExampleRollouts:
    """Answers every request with made-up trajectories."""

    def __init__(self, policy: Any, setting: MemorySetting) -> None:
        self._policy, self._setting = policy, setting
        self.media = ExampleMedia(setting, policy.config)
        self._version = 0

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        return [
            TrajectoryGroup(
                r.sample,
                tuple(
                    example_trajectory(self._policy, self._setting, sample_id=r.sample.id)
                    for _ in r.seeds
                ),
            )
            for r in requests
        ]

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        return {}

    def update_weights(self, update: WeightUpdate) -> int:
        return update.version

    def health(self) -> dict[str, Any]:
        return {}


class AlternatingScorer:
    """Calls every other trajectory right."""

    names: Sequence[str] = ("outcome",)
    weights: Sequence[float] = (1.0,)
    wants_shuffled = False

    def begin(self, state: Any) -> None: ...

    def outcomes(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
        return [[float(i % 2) for i in range(len(g))] for g in groups]

    def score(self, groups: Any, outcomes: Any, shuffled: Any = None) -> list[GroupScores]:
        return [GroupScores(list(o), {"outcome": list(o)}) for o in outcomes]

    def log(self) -> ScoringLog:
        return ScoringLog()


class MeasuredTrainer(LADAPOTrainer):
    """Notes the peak of resident memory from the start of a loss to after the optimizer's step;
    what rollouts and the transport of weights take in between is not the update's.
    """

    started = False
    peak = 0

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        if not self.started:
            reset_peak()
            self.started = True
        return super().compute_loss(*args, **kwargs)

    def note(self) -> None:
        self.peak, self.started = max(self.peak, peak_memory()), False


def reset_peak() -> None:
    """Let the peak of this process's resident memory start from what it is now."""
    Path("/proc/self/clear_refs").write_text("5")


def peak_memory() -> int:
    """The peak of this process's resident memory, in bytes."""
    status = Path("/proc/self/status").read_text()
    line = next(x for x in status.splitlines() if x.startswith("VmHWM:"))
    return int(line.split()[1]) << 10


def measure_here(case: Case) -> int:
    """By how much the peak of resident memory in an update exceeds what the process had before the
    policy was built, in bytes.

    The same goes first unmeasured: what libraries load on first use, and keep for the shapes that
    they have seen (some 40 MB in bfloat16 on a CPU), is no memory of an update.
    """
    train(case)
    gc.collect()
    reset_peak()
    before = peak_memory()
    return train(case) - before


def train(case: Case) -> int:
    """Two steps, as AdamW has no state before the first; returns the highest peak in an update."""
    from transformers import TrainerCallback

    class Note(TrainerCallback):
        def on_optimizer_step(self, *_: Any, **__: Any) -> None:
            trainer.note()

    setting = case.setting()
    policy = random_policy(setting)
    if not case.train_vision:
        vision_tower(policy).requires_grad_(False)
    with tempfile.TemporaryDirectory() as folder:
        trainer = MeasuredTrainer(
            policy,
            rollouts=ExampleRollouts(policy, setting),
            scorer=AlternatingScorer(),
            samples=[Sample(f"s{i}", "clip", "?", "A") for i in range(2 * case.groups)],
            args=LADAPOConfig(
                output_dir=folder,
                per_device_train_batch_size=case.groups * case.group_size,
                gradient_accumulation_steps=case.micro_batches,
                num_generations=case.group_size,
                max_completion_length=case.completion,
                max_steps=2,
                beta=0.01 if case.reference else 0.0,
                gradient_checkpointing=case.checkpointing,
                bf16=case.autocast == "bfloat16",
                use_cpu=True,
                save_strategy="no",
                report_to="none",
                disable_tqdm=True,
            ),
            processing_class=tiny_processor(),
            peft_config=setting.peft_config,
            callbacks=[Note()],
        )
        trainer.train()
    return trainer.peak


def measure(case: Case) -> int:
    """`measure_here` in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.memory", "--case", json.dumps(asdict(case))],
        env=os.environ | ENVIRONMENT,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise RuntimeError(f"the measured run failed:\n{done.stderr}")
    return int(done.stdout.split()[-1])


# -- the table -------------------------------------------------------------------------------------

TINY = Case("tests", (16, 16, 16), 200, groups=2)
SMALL = Case("100m", (16, 16, 16), 100)
HOW: list[dict[str, Any]] = [
    {},
    {"checkpointing": True},
    {"lora": True},
    {"lora": True, "checkpointing": True},
    {"dtype": "bfloat16"},
    {"dtype": "bfloat16", "checkpointing": True},
    {"autocast": "bfloat16", "checkpointing": True},
    {"checkpointing": True, "reference": True},
    {"checkpointing": True, "train_vision": False},
    {"checkpointing": True, "micro_batches": 2},
]
# A case of the larger model takes minutes.
FEWER = ({}, HOW[1], HOW[3], HOW[5], HOW[7])
CASES = [
    *(replace(TINY, **how) for how in HOW),
    *(replace(SMALL, **how) for how in FEWER),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", help="measure this one alone, in this process")
    parser.add_argument("--sizes", nargs="+", default=["tests", "100m"])
    options = parser.parse_args()
    if options.case:
        values = json.loads(options.case)
        print(measure_here(Case(**{**values, "grid": tuple(values["grid"])})))
        return
    print("| model | setting | measured MiB | estimated MiB | error | seconds |")
    print("|---|---|--:|--:|--:|--:|")
    for case in CASES:
        if case.size not in options.sizes:
            continue
        started = time.perf_counter()
        estimate = estimate_memory(case.setting()).total
        seconds = time.perf_counter() - started
        measured = measure(case)
        print(
            f"| {case.size} | {case} | {measured / 2**20:.0f} | {estimate / 2**20:.0f} | "
            f"{estimate / measured - 1:+.1%} | {seconds:.1f} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

from __future__ import annotations

import dataclasses
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig

from benchmarks.memory import CASES, Case, measure
from rl.dry_run import DryRun
from rl.errors import TrajectoryError
from rl.memory import (
    ExampleMedia,
    MemoryEstimate,
    MemorySetting,
    backward,
    estimate_memory,
    random_policy,
    trained_model,
)
from rl.policy.heads import HeadConfig
from tests.tiny import FAMILIES, tiny_model

on_linux = pytest.mark.skipif(
    not os.access("/proc/self/clear_refs", os.W_OK), reason="peaks are read from Linux's /proc"
)


@pytest.fixture(scope="module")
def setting() -> MemorySetting:
    """Two groups of three answers to a clip of 4 x 16 tokens."""
    config: Any = tiny_model().config
    return MemorySetting(config, (4, 8, 8), 12, group_size=3, completion_tokens=40, groups=2)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_tensors_without_memory_count_as_real_ones(setting, family, checkpointing):
    config: Any = tiny_model(family).config
    setting = dataclasses.replace(setting, model=config, gradient_checkpointing=checkpointing)
    estimate = estimate_memory(setting)
    policy = random_policy(setting)
    model = trained_model(policy, setting)
    media = ExampleMedia(setting, policy.config)
    run = DryRun()
    weights = run.hold([*model.parameters(), *model.buffers()])
    with run.watching():
        backward(model, policy, setting, media)
    assert weights == estimate.weights
    # Some integers that the fake run never sees as one op's result are the difference.
    assert estimate.gradients + estimate.activations == pytest.approx(run.peak - weights, rel=0.01)


def test_parts(setting):
    policy = random_policy(setting)
    parameters = sum(p.nbytes for p in policy.parameters())
    count = len(list(policy.parameters()))
    # Without checkpointing the peak is the end of the forward pass.
    setting = dataclasses.replace(setting, micro_batches=2, gradient_checkpointing=False)
    full = estimate_memory(setting)
    assert full.weights == parameters + sum(b.nbytes for b in policy.buffers())
    assert full.optimizer == 2 * parameters + 4 * count  # two moments, and a step each
    assert full.reference == 0
    # The peak of the second micro-batch has every gradient of the first.
    assert full.gradients == parameters
    held = estimate_memory(dataclasses.replace(setting, reference=True))
    assert held == dataclasses.replace(full, reference=full.weights)
    assert held.total == full.total + full.weights
    assert str(held).startswith(f"{held.total / 2**20:.0f} MiB at the peak (weights ")
    large = MemoryEstimate(3 * 2**29, 0, 2**30, 0, 2**28)
    assert str(large).startswith("2.8 GiB at the peak (weights 1.5, reference 0.0, optimizer 1.0")


def test_half_the_width_takes_half_the_weights(setting):
    full = estimate_memory(setting)
    half = estimate_memory(dataclasses.replace(setting, dtype=torch.bfloat16))
    mixed = estimate_memory(dataclasses.replace(setting, autocast=torch.bfloat16))
    assert half.weights == pytest.approx(full.weights / 2, rel=0.02)  # some buffers stay float32
    assert mixed.weights == full.weights and mixed.optimizer == full.optimizer
    assert half.activations < 0.8 * full.activations


def test_adapters_are_trained_alone_and_are_their_own_reference(setting):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
    full = estimate_memory(dataclasses.replace(setting, reference=True))
    adapted = estimate_memory(dataclasses.replace(setting, peft_config=lora, reference=True))
    # Two layers of hidden size 32; queries are 4 heads of 32, values 2. The tower is left alone.
    added = 2 * 4 * ((32 + 128) + (32 + 64)) * 4
    assert adapted.weights == full.weights + added
    assert adapted.optimizer == 2 * added + 4 * 8
    assert adapted.reference == 0 and lora.modules_to_save is None
    head = dataclasses.replace(setting, peft_config=lora, head=HeadConfig("linear"))
    trained_head = 4 * (32 * 32 + 32)  # whole, and the frozen one stays
    with_head = estimate_memory(head)
    assert with_head.weights == adapted.weights + 2 * trained_head
    assert with_head.optimizer == adapted.optimizer + 2 * trained_head + 4 * 2


def test_what_takes_more_and_what_less(setting):
    def activations(**changes: Any) -> int:
        return estimate_memory(dataclasses.replace(setting, **changes)).activations

    base = activations()
    everything = activations(gradient_checkpointing=False)
    assert everything > 1.5 * base
    assert activations(gradient_checkpointing=False, train_vision=False) < 0.9 * everything
    assert activations(grid=(8, 8, 8)) > base
    assert activations(completion_tokens=80) > base
    assert activations(groups=4) > 1.5 * base


def test_a_folder_needs_no_weights(tiny_checkpoint: Path, tmp_path: Path, setting):
    shutil.copy(tiny_checkpoint / "config.json", tmp_path)
    found = estimate_memory(dataclasses.replace(setting, model=tmp_path))
    assert found == estimate_memory(setting)
    policy = random_policy(dataclasses.replace(setting, head=HeadConfig("mlp", width=8)))
    policy.config.save_pretrained(tmp_path)  # a policy's own head counts
    with_head = estimate_memory(dataclasses.replace(setting, model=tmp_path))
    assert with_head.weights - found.weights == 4 * (2 * 32 + (32 * 8 + 8) + (8 * 32 + 32))
    config: Any = setting.model
    assert not hasattr(config, "foresight")  # a config that was given is left as it is


def test_latents_must_fit(setting):
    with pytest.raises(TrajectoryError, match="38"):
        estimate_memory(dataclasses.replace(setting, completion_tokens=39, latents=38))


def estimated(case: Case) -> MemoryEstimate:
    return estimate_memory(case.setting())


def agree(case: Case) -> None:
    measured, expected = measure(case), estimated(case).total
    assert expected == pytest.approx(measured, rel=0.2)


TINY = [c for c in CASES if c.size == "tests"]
SMALL = [c for c in CASES if c.size == "100m"]


@on_linux
@pytest.mark.parametrize("case", [TINY[0], TINY[3]], ids=str)
def test_a_tiny_run_takes_what_was_estimated(case):
    agree(case)


@on_linux
@pytest.mark.slow
@pytest.mark.parametrize("case", [*TINY[1:3], *TINY[4:], SMALL[2]], ids=str)
def test_a_run_takes_what_was_estimated(case):
    agree(case)

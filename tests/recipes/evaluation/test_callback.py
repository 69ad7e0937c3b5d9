"""Evaluation in training, in plain Python: in this process, and in an engine of its own."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from recipes.evaluation.benchmarks import find_benchmark
from recipes.evaluation.callback import EvaluationCallback
from rl.data.broken import BrokenClips
from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import DataError, RecipeError
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.sft.trainer import LatentSFTConfig, LatentSFTTrainer
from rl.trajectory import Sample
from rollouts.transformers_engine import TransformersEngine

FUTURE = replace(find_benchmark("futurebench"), max_new_tokens=4)


@pytest.fixture
def media(tiny_checkpoint: Path) -> MediaProcessor:
    return MediaProcessor(AutoProcessor.from_pretrained(tiny_checkpoint))


@pytest.fixture
def samples(clips: Path) -> list[Sample]:
    rows = read_manifest(clips / "manifest.jsonl")
    return [replace(s, extra={"question_type": f"hop{i + 1}"}) for i, s in enumerate(rows[:2])]


@pytest.fixture
def trainer(
    tiny_checkpoint: Path, media: MediaProcessor, clips: Path, tmp_path: Path
) -> LatentSFTTrainer:
    policy = make_policy(tiny_checkpoint, media.processor, LatentProtocol(max_length=2))
    config = LatentSFTConfig(
        output_dir=str(tmp_path),
        max_steps=3,
        per_device_train_batch_size=2,
        learning_rate=1e-2,
        use_cpu=True,
        bf16=False,
        save_strategy="no",
        report_to="none",
        logging_steps=1,
        disable_tqdm=True,
    )
    return LatentSFTTrainer(policy, config, read_manifest(clips / "manifest.jsonl"), media)


def logged(trainer: LatentSFTTrainer, name: str) -> dict[float, float]:
    return {log["step"]: log[name] for log in trainer.state.log_history if name in log}


def test_in_process(
    trainer: LatentSFTTrainer, media: MediaProcessor, samples: list[Sample], tmp_path: Path
) -> None:
    """First, every second step and last; both modes; what cannot be read is left out; the training
    goes on as it would have.
    """
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    broken = BrokenClips(rule="skip")
    bad = replace(samples[0], id="bad", video=str(tmp_path / "bad.mp4"), frames=())
    callback = EvaluationCallback(
        trainer, [*samples, bad], every=2, benchmark=FUTURE, modes=("free", "always"), media=media,
        broken=broken,
    )  # fmt: skip
    trainer.add_callback(callback)
    trainer.train()
    for mode in ("free", "always"):
        shares = logged(trainer, f"validation/{mode}/accuracy")
        assert [*shares] == [0, 2, 3]
        highs = logged(trainer, f"validation/{mode}/accuracy_high")
        assert all(highs[step] > shares[step] for step in shares if shares[step] < 1)
        assert set(logged(trainer, f"validation/{mode}/unparsed").values()) == {2}
    assert set(logged(trainer, "validation/always/share_imagining").values()) == {1.0}
    assert set(logged(trainer, "validation/skipped").values()) == {1} and "bad" in broken
    assert [*logged(trainer, "loss")] == [1, 2, 3]
    assert trainer.policy.training
    parts = callback.measure().breakdowns["question_type"]["free"]
    assert [*parts] == ["hop1", "hop2"]


def test_sampler_gets_the_weights(
    trainer: LatentSFTTrainer,
    media: MediaProcessor,
    samples: list[Sample],
    tiny_checkpoint: Path,
) -> None:
    other = make_policy(tiny_checkpoint, media.processor, LatentProtocol(max_length=2))
    engine = TransformersEngine(other, media, LocalMedia(media))
    seen: list[int] = []

    def outcomes(groups: Any) -> list[list[float]]:
        seen.append(groups[0].trajectories[0].policy_version)
        return [[1.0], [math.nan]]

    callback = EvaluationCallback(
        trainer, samples, every=5, max_new_tokens=4, sampler=engine, outcomes=outcomes, name="held"
    )
    trainer.add_callback(callback)
    trainer.train()
    assert seen == [0, 3]
    assert logged(trainer, "held/accuracy") == {0: 1.0, 3: 1.0}
    assert logged(trainer, "held/no_value") == {0: 1, 3: 1}
    own = trainer.policy.state_dict()
    assert all(torch.equal(value, own[name]) for name, value in other.state_dict().items())


def test_arguments_that_do_not_fit(
    trainer: LatentSFTTrainer, media: MediaProcessor, samples: list[Sample]
) -> None:
    with pytest.raises(RecipeError, match="give `media`"):
        EvaluationCallback(trainer, samples, every=1, max_new_tokens=4)
    with pytest.raises(RecipeError, match="give max_new_tokens, or a benchmark"):
        EvaluationCallback(trainer, samples, every=1, media=media)
    with pytest.raises(RecipeError, match="every is 0"):
        EvaluationCallback(trainer, samples, every=0, media=media, max_new_tokens=4)
    with pytest.raises(DataError, match="no column 'task'"):
        EvaluationCallback(
            trainer, samples, every=1, media=media, benchmark=find_benchmark("mvbench")
        )

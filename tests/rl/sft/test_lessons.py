"""Where lessons come from, and training on those whose latents have no targets."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoProcessor

from rl.checkpoints import read_state
from rl.data import MediaProcessor, read_manifest
from rl.errors import CheckpointError, DataError, ObjectiveError
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.scoring import decision_slots
from rl.sft.config import LatentSFTConfig
from rl.sft.lessons import CurriculumLessons, SpanLessons, StartLessons, longest_spans
from rl.sft.targets import Targets
from rl.sft.taught import UNTAUGHT
from rl.sft.trainer import LatentSFTTrainer
from rl.trajectory import Sample
from tests.rl.sft.writing import writer

PROTOCOL = LatentProtocol(min_length=1, max_length=4)
WRITER = writer(PROTOCOL)
S, E, Z = "<|latent_start|>", "<|latent_end|>", "<|latent|>"
# Two latents a step; the third stage begins at the fifth update.
CURRICULUM = {"steps_per_stage": 2, "max_stage": 2, "latents_per_step": 2}


@pytest.fixture
def samples(clips: Path) -> list[Sample]:
    """Two rows with two steps each and two with one and three."""
    thoughts = [["up", "on"], ["up"], ["so", "on"], ["a", "b", "c"]]
    return [
        replace(sample, extra={**sample.extra, "steps": steps})
        for sample, steps in zip(read_manifest(clips / "manifest.jsonl"), thoughts, strict=True)
    ]


def config(folder: Path, **args: Any) -> LatentSFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "sft"),
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "latents": "own",
    }
    return LatentSFTConfig(**{**defaults, **args})


@pytest.fixture
def build(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> Callable[..., LatentSFTTrainer]:
    def make(rows: list[Sample] | None = None, **args: Any) -> LatentSFTTrainer:
        torch.manual_seed(0)
        processor: Any = AutoProcessor.from_pretrained(tiny_checkpoint)
        policy = make_policy(tiny_checkpoint, processor, PROTOCOL, HeadConfig("linear"))
        media = MediaProcessor(processor)
        return LatentSFTTrainer(policy, config(tmp_path, **args), rows or samples, media)

    return make


def curve(trainer: LatentSFTTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def written(lessons: Any, index: int, epoch: int = 0, update: int = 0) -> str:
    return WRITER.tokenizer.decode(lessons.lesson(index, epoch, update).tokens)


def test_lessons_with_spans_are_drawn_in_each_epoch() -> None:
    row = Sample("r", "a.mp4", "?", "A", imagine=((1,), (2,)), reasoning=("up", "", "so"))
    lessons = SpanLessons([row] * 400, WRITER, [(2, 1)] * 399 + [()], [0.25] * 399 + [1.0], 7)
    with_spans = f"[up]{S}{Z}{Z}{E}{S}{Z}{E}[so]=A<|im_end|>"
    first = [written(lessons, i) for i in range(399)]
    assert {*first} == {with_spans, "[up][so]=A<|im_end|>"}
    assert 60 < first.count(with_spans) < 140
    assert first == [written(lessons, i, update=9) for i in range(399)]
    assert first != [written(lessons, i, epoch=1) for i in range(399)]
    assert written(lessons, 399) == "[up][so]=A<|im_end|>"  # a row without spans


def test_start_latents_stand_before_the_answer_alone() -> None:
    row = Sample("r", "a.mp4", "?", "A", imagine=((1,),), reasoning=("up", "so"))
    lesson = StartLessons([row], WRITER, 3).lesson(0, 5, 9)
    assert WRITER.tokenizer.decode(lesson.tokens) == f"{S}{Z * 3}{E}=A<|im_end|>"
    assert lesson.latent_slots.tolist() == [1, 2, 3]


def test_a_curriculum_s_lessons_follow_the_update(samples: list[Sample], tmp_path: Path) -> None:
    schedule = config(tmp_path, curriculum=CURRICULUM).schedule
    assert schedule is not None
    lessons = CurriculumLessons(samples, WRITER, schedule, seed=0)
    assert written(lessons, 3, update=1) == "[a\nb\nc]=D<|im_end|>"
    assert written(lessons, 3, update=2) == f"{S}{Z}{Z}{E}[b\nc]=D<|im_end|>"
    assert written(lessons, 3, update=99) == f"{S}{Z * 4}{E}[c]=D<|im_end|>"


def test_the_longest_spans(samples: list[Sample], tmp_path: Path) -> None:
    def found(**args: Any) -> list[tuple[int, ...]]:
        return longest_spans(samples, config(tmp_path, **args), PROTOCOL, temporal_patch_size=2)

    assert found() == [(1,), (1, 1), (1,), (2,)]
    assert found(start_latents=4) == [(4,)] * 4
    assert found(curriculum=CURRICULUM) == [(4,), (2,), (4,), (4,)]
    with pytest.raises(
        ObjectiveError, match="start_latents is 5, but the protocol allows spans of"
    ):
        found(start_latents=5)
    with pytest.raises(DataError, match=r"'clip0': .*max_length to 6"):
        found(curriculum={**CURRICULUM, "latents_per_step": 3})


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"start_latents": 2, "curriculum": CURRICULUM}, "both set"),
        ({"start_latents": 0}, "start_latents is 0"),
        ({"start_latents": 2, "latents": "teacher"}, "'teacher', but start_latents .*self_forcing"),
        ({"curriculum": CURRICULUM, "latents": "teacher"}, "'teacher', but curriculum teaches"),
        ({"curriculum": {"steps_per_stage": 0}}, "curriculum: steps_per_stage is 0"),
        ({"start_latents": 2, "imagine_share": 0.5}, "imagine_share is 0.5, .*start_latents"),
        ({"curriculum": CURRICULUM, "start_at_mean": True}, "start_at_mean is True, .*curriculum"),
        ({"start_latents": 2, "tokens_per_patch": "all"}, "tokens_per_patch is 'all'"),
        ({"start_latents": 2, "target_cache": "a"}, "target_cache is 'a'"),
    ],
)
def test_lessons_that_cannot_be_taught(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=message):
        config(tmp_path, **args)


def test_targets_have_no_place_in_lessons_without(
    build: Callable[..., LatentSFTTrainer], samples: list[Sample], tmp_path: Path
) -> None:
    trainer = build(start_latents=2)
    targets = Targets.of_features(torch.zeros(4, 32), [(1,)] * 4)
    with pytest.raises(ObjectiveError, match="targets are given"):
        LatentSFTTrainer(trainer.policy, trainer.args, samples, trainer.media, targets=targets)


def test_start_latents_are_taught_without_targets(build: Callable[..., LatentSFTTrainer]) -> None:
    trainer = build(start_latents=3, max_steps=25, per_device_train_batch_size=4)
    trainer.train()
    assert trainer.targets is None
    assert curve(trainer, "loss") == pytest.approx(curve(trainer, "loss_text"), rel=1e-5)
    assert curve(trainer, "loss")[-1] < 0.5 * curve(trainer, "loss")[0]
    assert {*curve(trainer, "imagined")} == {1.0}
    assert all(1 <= passes <= 3 for passes in curve(trainer, "own_passes"))
    assert curve(trainer, "latent_neighbours")
    assert not any(curve(trainer, k) for k in ("loss_latent", "latent_cosine", "stage"))


@pytest.mark.parametrize("reset", [False, True])
def test_a_curriculum_goes_on_where_it_stopped(
    reset: bool, build: Callable[..., LatentSFTTrainer]
) -> None:
    args: dict[str, Any] = {
        "curriculum": {**CURRICULUM, "reset_optimizer": reset, "mix": 0.25},
        "save_strategy": "steps",
        "save_steps": 1,
    }
    whole = build(**args)
    whole.train()
    assert curve(whole, "stage") == [0, 0, 1, 1, 2, 2]
    assert not curve(whole, "loss_latent")
    steps = {float(state["step"]) for state in whole.optimizer.state.values()}  # type: ignore[union-attr]
    assert steps == {2.0 if reset else 6.0}
    assert curve(whole, "learning_rate") == pytest.approx([3e-3 * (6 - i) / 6 for i in range(6)])
    folder = Path(str(whole.args.output_dir))
    for step, stage in ((4, 1), (5, 2)):  # the next update begins a stage, and goes on with one
        checkpoint = folder / f"checkpoint-{step}"
        state = read_state(checkpoint)["curriculum"]
        assert state["stage"] == stage and state["schedule"]["steps_per_stage"] == 2
        resumed = build(**args)
        resumed.train(resume_from_checkpoint=str(checkpoint))
        assert curve(resumed, "stage") == [0, 0, 1, 1, 2, 2]
        for name, value in whole.policy.state_dict().items():
            assert torch.equal(resumed.policy.state_dict()[name], value), name


def test_a_curriculum_goes_on_with_no_other(build: Callable[..., LatentSFTTrainer]) -> None:
    args: dict[str, Any] = {"save_strategy": "steps", "save_steps": 1, "max_steps": 1}
    first = build(curriculum=CURRICULUM, **args)
    first.train()
    checkpoint = Path(str(first.args.output_dir), "checkpoint-1")
    for other in ({"curriculum": {**CURRICULUM, "max_stage": 1}}, {"start_latents": 2}):
        with pytest.raises(
            CheckpointError, match=r"checkpoint-1 is of another curriculum: .*max_s"
        ):
            build(**args, **other).train(resume_from_checkpoint=str(checkpoint))


def test_the_micro_batches_of_an_update_are_at_one_stage(
    build: Callable[..., LatentSFTTrainer],
) -> None:
    args: dict[str, Any] = {"curriculum": {**CURRICULUM, "mix": 0.3}, "learning_rate": 0.0}
    whole = build(**args, per_device_train_batch_size=4)
    cut = build(**args, per_device_train_batch_size=1, gradient_accumulation_steps=4)
    whole.train()
    cut.train()
    assert curve(cut, "stage") == curve(whole, "stage") == [0, 0, 1, 1, 2, 2]
    for key in ("loss", "loss_text", "imagined", "grad_norm"):
        assert curve(cut, key) == pytest.approx(curve(whole, key), rel=1e-4), key


def test_rows_without_steps_are_refused_before_training(
    build: Callable[..., LatentSFTTrainer], samples: list[Sample]
) -> None:
    rows = [*samples[:3], replace(samples[3], extra={})]
    with pytest.raises(DataError, match="'clip3': the curriculum replaces a chain"):
        build(rows, curriculum=CURRICULUM)


def test_what_is_labelled_is_what_is_trained(build: Callable[..., LatentSFTTrainer]) -> None:
    for args in ({"start_latents": 3}, {"curriculum": CURRICULUM}):
        trainer = build(**args)
        for index in range(len(trainer.samples)):
            lesson = trainer._lesson(index)
            row = trainer.rows.teach(index, lesson, None)
            before = [np.arange(len(lesson.tokens))]
            slots, places = decision_slots([row], trainer.policy, before, len(lesson.tokens))
            taught = (lesson.labels != UNTAUGHT).nonzero()[0]
            assert places.tolist() == taught.tolist()
            assert slots.ids.tolist() == lesson.labels[taught].tolist()
            assert slots.latent_rows.tolist() == lesson.latent_slots.tolist()
            assert lesson.decided == len(taught)

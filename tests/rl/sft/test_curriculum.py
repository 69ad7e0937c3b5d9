"""The curriculum: which steps are latents at which stage, and when a stage is."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.checkpoints import STATE_FILE
from rl.errors import CheckpointError, DataError, ObjectiveError
from rl.policy.protocol import LatentProtocol, Slot
from rl.sft.curriculum import (
    CurriculumConfig,
    check_curriculum,
    check_resumed,
    curriculum_lesson,
    merged,
    steps_of,
)
from rl.sft.taught import UNTAUGHT, Lesson
from rl.trajectory import Sample
from tests.rl.sft.writing import writer

WRITER = writer(LatentProtocol(min_length=1, max_length=40))
S, E, Z = "<|latent_start|>", "<|latent_end|>", "<|latent|>"


def row(*steps: str) -> Sample:
    return Sample("clip7", "a.mp4", "What next?", "A", extra={"steps": list(steps)})


def text(lesson: Lesson) -> str:
    return WRITER.tokenizer.decode(lesson.tokens)


@pytest.mark.parametrize(
    ("stage", "pad", "latents", "rest"),
    [
        (0, False, 0, "[up\non\nso]=A"),
        (1, False, 2, "[on\nso]=A"),
        (2, False, 4, "[so]=A"),
        (3, False, 6, "=A"),
        (4, False, 6, "=A"),  # it has three steps
        (4, True, 8, "=A"),
    ],
)
def test_each_stage_by_hand(stage: int, pad: bool, latents: int, rest: str) -> None:
    config = CurriculumConfig(10, latents_per_step=2, pad_latents=pad)
    lesson = curriculum_lesson(row("up", "on", "so"), stage, config, WRITER)
    span = S + Z * latents + E if latents else ""
    assert text(lesson) == f"{span}{rest}<|im_end|>"
    assert lesson.latent_slots.tolist() == list(range(1, 1 + latents))


def test_what_is_taught_by_hand() -> None:
    hand = writer(LatentProtocol(min_length=2, max_length=3))
    config = CurriculumConfig(10, latents_per_step=3)
    lesson = curriculum_lesson(row("up"), 1, config, hand)
    start, end, filler = hand.ids.start, hand.ids.end, hand.ids.filler
    answer = hand.tokenizer("=A")["input_ids"]
    assert lesson.tokens.tolist() == [start, filler, filler, filler, end, *answer, hand.eos]
    # To open is taught, and to go on once the span may end; its first two latents and its end at
    # the maximum are no choices.
    taught = [start, UNTAUGHT, UNTAUGHT, filler, UNTAUGHT, *answer, hand.eos]
    assert lesson.labels.tolist() == taught
    assert (lesson.latents, lesson.decided) == (3, 5)
    assert {a.dtype for a in (lesson.tokens, lesson.labels, lesson.latent_slots)} == {
        np.dtype(np.int64)
    }


STEP = st.text("abc é", min_size=1, max_size=4).filter(str.strip)
CONFIGS = st.builds(
    CurriculumConfig,
    steps_per_stage=st.integers(1, 3),
    max_stage=st.integers(1, 6),
    latents_per_step=st.integers(1, 3),
    merge_steps=st.none() | st.integers(1, 4),
    pad_latents=st.booleans(),
)


@given(st.lists(STEP, min_size=1, max_size=7), CONFIGS)
def test_every_stage(steps: list[str], config: CurriculumConfig) -> None:
    sample = row(*steps)
    runs = merged(steps, config.merge_steps)
    lessons = [
        curriculum_lesson(sample, stage, config, WRITER) for stage in range(config.max_stage + 1)
    ]
    for stage, lesson in enumerate(lessons):
        left = "\n".join(runs[stage:])
        rest = (f"[{left}]" if left else "") + "=A<|im_end|>"
        after = lesson.tokens[lesson.latents + 2 :] if lesson.latents else lesson.tokens
        assert WRITER.tokenizer.decode(after) == rest
        trace = WRITER.protocol.trace(lesson.tokens, WRITER.ids)
        assert trace.span_lengths == ((lesson.latents,) if lesson.latents else ())
        forced = trace.slots == Slot.FORCED
        assert np.array_equal(lesson.labels == UNTAUGHT, forced)
        assert np.array_equal(lesson.labels[~forced], lesson.tokens[~forced])
        assert lesson.latent_slots.tolist() == list(range(1, 1 + lesson.latents))
        assert lesson.latents == config.latents(stage, len(runs))
    counts = [lesson.latents for lesson in lessons]
    assert counts[0] == 0 and counts[1] == config.latents_per_step
    assert all(a <= b for a, b in pairwise(counts))
    if config.pad_latents:
        assert counts[-1] == config.max_stage * config.latents_per_step
    assert check_curriculum(sample, config, WRITER.protocol) == counts[-1]


@given(st.lists(STEP, min_size=1, max_size=9), st.integers(1, 9))
def test_merged_steps(steps: list[str], most: int) -> None:
    runs = merged(steps, most)
    assert "\n".join(runs) == "\n".join(steps)
    sizes = [run.count("\n") + 1 for run in runs]
    assert len(runs) == min(most, len(steps)) and max(sizes) - min(sizes) <= 1
    assert sizes == sorted(sizes, reverse=True)


def test_merged_by_hand() -> None:
    assert merged("abcdefg", 3) == ("a\nb\nc", "d\ne", "f\ng")
    assert merged("ab", 3) == merged("ab", None) == ("a", "b")


def test_steps_are_a_column_or_the_lines_of_the_reasoning() -> None:
    written = replace(row(), reasoning=(" up \n\non", "", "so\n"))
    assert steps_of(replace(written, extra={})) == ("up", "on", "so")
    assert steps_of(replace(written, extra={"steps": None})) == ("up", "on", "so")
    assert steps_of(replace(written, extra={"steps": ["left"]})) == ("left",)


@pytest.mark.parametrize("reasoning", [(), ("",), (" \n",)])
def test_a_row_without_steps_is_named(reasoning: tuple[str, ...]) -> None:
    plain = replace(row(), extra={}, reasoning=reasoning)
    with pytest.raises(
        DataError, match=r"'clip7': .*has none; give it a column 'steps' .*or leave"
    ):
        curriculum_lesson(plain, 0, CurriculumConfig(10), WRITER)


@pytest.mark.parametrize("steps", [[], ["up", ""], ["up", 2], "up\non", {"1": "up"}])
def test_steps_that_are_no_texts_are_named(steps: Any) -> None:
    with pytest.raises(DataError, match=r"'clip7': column 'steps' is .*list of texts"):
        steps_of(replace(row(), extra={"steps": steps}))


def test_a_stage_is_so_many_updates() -> None:
    config = CurriculumConfig(3, max_stage=2)
    assert [config.stage_at(update) for update in range(11)] == [0, 0, 0, 1, 1, 1, *[2] * 5]
    assert [update for update in range(11) if config.begins_stage(update)] == [3, 6]


def test_mixed_stages_are_drawn_anew_each_epoch_and_the_same_again() -> None:
    config = CurriculumConfig(3, max_stage=2, mix=0.6)

    def stages(epoch: int, seed: int = 1) -> list[int]:
        return [config.row_stage(3, seed=seed, epoch=epoch, row=i) for i in range(3000)]

    found = stages(0)
    assert found == stages(0)
    assert stages(1) != found != stages(0, seed=2)
    shares = {stage: count / 3000 for stage, count in Counter(found).items()}
    assert shares == {k: pytest.approx(v, abs=0.03) for k, v in {0: 0.2, 1: 0.6, 2: 0.2}.items()}
    pure = replace(config, mix=0.0)
    assert {pure.row_stage(3, seed=1, epoch=0, row=i) for i in range(99)} == {1}


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"steps_per_stage": 0}, "steps_per_stage is 0"),
        ({"steps_per_stage": 2.5}, "steps_per_stage is 2.5"),
        ({"steps_per_stage": 2, "max_stage": -1}, "max_stage is -1.* at least 0"),
        ({"steps_per_stage": 2, "latents_per_step": True}, "latents_per_step is True"),
        ({"steps_per_stage": 2, "merge_steps": 0}, "merge_steps is 0"),
        ({"steps_per_stage": 2, "mix": 1.5}, "mix is 1.5"),
        ({"steps_per_stage": 2, "stages": 1}, r"unknown keys \['stages'\]; known: steps_per"),
        ({"max_stage": 2}, "steps_per_stage is missing"),
    ],
)
def test_settings_that_cannot_work(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ObjectiveError, match=f"curriculum: {words}"):
        CurriculumConfig.from_dict(settings)


def test_the_protocol_must_allow_every_stage() -> None:
    protocol = LatentProtocol(min_length=2, max_length=4)
    steps = row("up", "on", "so")
    two = CurriculumConfig(9, latents_per_step=2, max_stage=2)
    assert check_curriculum(steps, two, protocol) == 4
    with pytest.raises(DataError, match=r"'clip7': .*span of 1 .*stage 1.*set min_length to 1"):
        check_curriculum(steps, CurriculumConfig(9), protocol)
    with pytest.raises(DataError, match=r"'clip7': .*span of 6 .*stage 5.*set max_length to 6"):
        check_curriculum(steps, replace(two, max_stage=5), protocol)
    merging = replace(two, max_stage=5, merge_steps=2)
    assert check_curriculum(steps, merging, protocol) == 4
    with pytest.raises(DataError, match=r"span of 10 .*set max_length to 10"):
        check_curriculum(steps, replace(merging, pad_latents=True), protocol)


def test_a_checkpoint_of_another_schedule_is_refused(tmp_path: Path) -> None:
    config = CurriculumConfig(3, max_stage=2)

    def write(state: dict[str, Any]) -> None:
        (tmp_path / STATE_FILE).write_text(json.dumps({"step": 4, **state}))

    write(config.written(4))
    assert json.loads((tmp_path / STATE_FILE).read_text())["curriculum"]["stage"] == 1
    check_resumed(tmp_path, config)
    with pytest.raises(CheckpointError, match=r"mix was 0.0 and is 0.5\. Give the one"):
        check_resumed(tmp_path, replace(config, mix=0.5))
    with pytest.raises(CheckpointError, match="max_stage was 2 and is not set"):
        check_resumed(tmp_path, None)
    write({})
    check_resumed(tmp_path, None)
    with pytest.raises(CheckpointError, match="merge_steps was not set and is None"):
        check_resumed(tmp_path, config)

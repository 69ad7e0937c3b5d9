from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.errors import DataError
from rl.policy.protocol import LatentProtocol, LatentTokens, Slot
from rl.sft.taught import (
    UNTAUGHT,
    Lesson,
    check_lengths,
    completion_ids,
    span_lengths,
    taught_texts,
)
from rl.trajectory import Sample
from tests.rl.sft.writing import writer

TOKENS = LatentTokens(start=90, end=91, filler=92)
EOS = 99


def sample(*spans: tuple[int, ...]) -> Sample:
    return Sample("clip7", "a.mp4", "What next?", "A", imagine=spans)


def test_completion_with_two_spans() -> None:
    ids = completion_ids([[], [7], [5, 6]], (2, 1), TOKENS, EOS)
    assert ids.tolist() == [90, 92, 92, 91, 7, 90, 92, 91, 5, 6, 99]
    trace = LatentProtocol(min_length=1, max_length=2).trace(ids, TOKENS)
    T, D, F = Slot.TOKEN, Slot.DECISION, Slot.FORCED
    # The first latent of a span is below the minimum and forced; at the maximum the end is.
    assert trace.slots.tolist() == [T, F, D, F, T, T, F, D, T, T, T]


def test_a_lesson_leaves_out_what_the_protocol_forces() -> None:
    ids = completion_ids([[], [7], [5, 6]], (2, 1), TOKENS, EOS)
    lesson = Lesson.of(ids, TOKENS, LatentProtocol(min_length=1, max_length=2))
    no = UNTAUGHT
    assert lesson.labels.tolist() == [90, no, 92, no, 7, 90, no, 91, 5, 6, 99]
    assert lesson.latent_slots.tolist() == [1, 2, 6]
    assert (lesson.latents, lesson.decided) == (3, 8)


def test_a_writer_puts_spans_between_texts_or_in_front() -> None:
    hand = writer(LatentProtocol(max_length=3))
    row = replace(sample((4, 5), (6, 7)), reasoning=("up", "", "so"))

    def text(lesson: Lesson) -> str:
        return hand.tokenizer.decode(lesson.tokens[:-1]).replace("<|latent", "<")

    assert text(hand.lesson(row, (1, 2))) == "[up]<_start|><|><_end|><_start|><|><|><_end|>[so]=A"
    assert text(hand.opening(row, 2)) == "<_start|><|><|><_end|>[up][so]=A"
    assert text(hand.lesson(row)) == text(hand.opening(row, 0)) == "[up][so]=A"


def test_completion_without_spans_is_the_answer() -> None:
    assert completion_ids([[5, 6]], (), TOKENS, EOS).tolist() == [5, 6, 99]


@given(st.lists(st.integers(1, 5), max_size=4), st.lists(st.integers(0, 80), max_size=6))
def test_the_protocol_reads_back_what_was_laid_out(spans: list[int], answer: list[int]) -> None:
    ids = completion_ids([[] for _ in spans] + [answer], spans, TOKENS, EOS)
    trace = LatentProtocol(min_length=1, max_length=5, max_spans=4).trace(ids, TOKENS)
    assert trace.span_lengths == tuple(spans)
    assert int((ids == TOKENS.filler).sum()) == sum(spans)
    assert np.all(trace.slots[-len(answer) - 1 :] == Slot.TOKEN)


def test_reasoning_stands_around_spans() -> None:
    def write(row: Sample, spans: int) -> list[str]:
        texts = taught_texts(
            row,
            spans,
            answer_template="={answer}",
            reasoning_template="[{reasoning}]",
            tokenizer=lambda text, add_special_tokens: {"input_ids": list(text)},
        )
        return ["".join(map(str, text)) for text in texts]

    row = replace(sample((4, 5), (6, 7)), reasoning=("it falls", "", "it lands"))
    assert write(row, 2) == ["[it falls]", "", "[it lands]=A"]
    assert write(row, 0) == ["[it falls][it lands]=A"]
    assert write(sample((4, 5)), 1) == ["", "=A"]


def test_span_lengths_count_temporal_patches() -> None:
    protocol = LatentProtocol(min_length=1, max_length=8)
    row = sample((4, 5, 6, 7), (8, 9, 10))  # the odd frame is doubled by the processor
    assert span_lengths(row, protocol, temporal_patch_size=2, tokens_per_patch=1) == (2, 2)
    assert span_lengths(row, protocol, temporal_patch_size=2, tokens_per_patch=3) == (6, 6)


def test_with_all_tokens_a_span_takes_up_to_the_budget() -> None:
    protocol = LatentProtocol(min_length=3, max_length=8)

    def most(*frames: int) -> tuple[int, ...]:
        row = sample(tuple(frames))
        return span_lengths(row, protocol, temporal_patch_size=2, tokens_per_patch="all")

    assert most(4) == most(4, 5) == (8,) and most(4, 5, 6, 7, 8) == (6,)  # 3 patches, 2 each
    with pytest.raises(DataError, match=r"9 latents .* at least 1 latents a patch"):
        most(*range(18))
    check_lengths(sample((4, 5)), (3, 8), protocol)
    with pytest.raises(DataError, match=r"'clip7': the frames of span 2 .* have 2 merged tokens"):
        check_lengths(sample((4, 5)), (3, 2), protocol)


@pytest.mark.parametrize(("frames", "latents"), [((4, 5), 1), (tuple(range(4, 14)), 5)])
def test_a_span_outside_the_budget_names_the_sample(frames: tuple[int, ...], latents: int) -> None:
    protocol = LatentProtocol(min_length=2, max_length=4)
    with pytest.raises(
        DataError, match=rf"'clip7': span 1 .* {latents} latents .* 2 to 4: list other"
    ):
        span_lengths(sample(frames), protocol, temporal_patch_size=2, tokens_per_patch=1)


def test_too_many_spans_name_the_sample() -> None:
    protocol = LatentProtocol(max_spans=1)
    with pytest.raises(
        DataError, match="'clip7': column 'imagine' has 2 spans, the protocol allows 1"
    ):
        span_lengths(sample((4, 5), (6, 7)), protocol, temporal_patch_size=2, tokens_per_patch=1)

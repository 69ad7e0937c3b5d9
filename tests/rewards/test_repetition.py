"""The repetition score, sign by sign."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.repetition import repetition_rewards, repetition_score


def words(count, prefix="w"):
    return " ".join(f"{prefix}{i}" for i in range(count))


def test_four_grams_by_hand():
    # 8 words, 5 four-grams: abcd bcda cdab dabc abcd, 4 of them distinct.
    assert repetition_score("a b c d a b c d") == pytest.approx(1 / 5)
    assert repetition_score("a b c d") == 0.0  # fewer than five words


def test_loops_by_hand():
    # 25 words three times, then 25 new ones: 75 of 100 words loop. Of the 97 four-grams,
    # 25 + 3 + 22 = 50 are distinct (loop, border, new words), so that sign says less: 47/97.
    text = " ".join([words(25)] * 3 + [words(25, "x")])
    assert repetition_score(text) == pytest.approx(0.75)


def test_lines_by_hand():
    # Four lines of more than ten characters, two distinct; three words a line, so that four-grams
    # repeat less.
    first, second = "ball rolling eastward", "sun setting westwards"
    assert repetition_score("\n".join([first, second, second, first])) == pytest.approx(0.5)


def test_latents_and_tags_do_not_count():
    spans = "<|latent_start|>" + "<|latent|>" * 60 + "<|latent_end|>"
    text = f"{spans}<reason>{words(30)}</reason>" * 1 + f"{spans}<answer>B</answer>"
    assert repetition_score(text) == 0.0


def test_reward_is_the_penalty():
    text = "a b c d a b c d"
    plain, chat = repetition_rewards([text, [{"role": "assistant", "content": text}]])
    assert plain == chat == pytest.approx(-0.2)


@given(st.lists(st.sampled_from(["a", "b", "cc", "\n", "<reason>", "a longer line of text"])))
def test_range(parts):
    assert 0.0 <= repetition_score(" ".join(parts)) <= 1.0


@given(st.integers(2, 6))
def test_one_word_forever_is_all_repetition(tens):
    assert repetition_score("go " * (50 * tens)) == pytest.approx(1.0, abs=0.02)

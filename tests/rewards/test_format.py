"""The span grammars."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.format import format_reward
from rewards.text import LATENT_END, LATENT_START
from rl.errors import RecipeError
from rl.policy.protocol import LatentProtocol

L = "<|latent_start|><|latent|><|latent|><|latent_end|>"
R = "<reason>the ball rolls on</reason>"
A = "<answer>B</answer>"


def test_markers_are_those_of_the_default_protocol():
    assert LatentProtocol().tokens[:2] == (LATENT_START, LATENT_END)


@pytest.mark.parametrize(
    ("text", "span", "reason_first", "answer"),
    [
        (L + R + A, 1, 0, 1),
        (L + R + L + R + A, 1, 0, 1),
        (R + L + R + A, 1, 1, 1),
        (f"\n{R}\n {L} {R}\n{A}  ", 1, 1, 1),
        ("<|latent_start|><|latent_end|>" + R + A, 1, 0, 1),
        (A, 0, 0, 1),
        (R + A, 0, 0, 1),  # no span
        (L + A, 0, 0, 1),  # a span without a reason
        (R + R + L + R + A, 0, 0, 1),
        (L + R + "so" + A, 0, 0, 1),  # text between blocks
        (L + R, 0, 0, 0),  # no answer
        (L + R + A + A, 0, 0, 0),
        (L + R + A + R, 0, 0, 0),  # the answer is not last
        (L + R + A + ".", 0, 0, 0),
        (L + "<reason> </reason>" + A, 0, 0, 1),
        (L + R + "<answer> </answer>", 0, 0, 0),
        (L + "<reason><reason>x</reason></reason>" + A, 0, 0, 1),
        (L + R + "<answer><reason>B</reason></answer>", 0, 0, 0),
        (L + "<reason>" + L + "</reason>" + A, 0, 0, 1),  # a span inside a reason
        (L + R + "<answer>" + L + "</answer>", 0, 0, 0),
        ("<|latent_start|>" + L + R + A, 0, 0, 0),  # a marker left over
        (L + "<|latent_end|>" + R + A, 0, 0, 0),
        (L + R + "<answer>B", 0, 0, 0),  # cut short
        ("", 0, 0, 0),
        ("\x00" + R + A, 0, 0, 1),  # the symbol that stands for a span cannot be forged
    ],
)
def test_cases(text, span, reason_first, answer):
    assert format_reward(text) == span
    assert format_reward(text, grammar="reason_first") == reason_first
    # Either span grammar starts with one of the two, and no text with both.
    assert format_reward(text, grammar="latent_first") == span - reason_first
    assert format_reward(text, grammar="answer") == answer


def test_other_markers_and_unknown_grammar():
    assert format_reward("[S]..[E]" + R + A, start="[S]", end="[E]") == 1.0
    with pytest.raises(RecipeError, match="grammar is 'all'"):
        format_reward("", grammar="all")  # pyright: ignore


SPACE = st.sampled_from(["", " ", "\n", "\n\n "])
INSIDE = st.text(st.characters(exclude_characters="<\x00"), min_size=1).filter(str.strip)
SPAN = st.integers(0, 8).map(lambda n: LATENT_START + "<|latent|>" * n + LATENT_END)


@given(st.booleans(), st.integers(0, 4), st.data())
def test_every_sentence_of_the_grammar_is_accepted_and_nothing_near_it(first, pairs, data):
    kinds = ["R"] * first + ["L", "R"] * pairs + ["A"]
    blocks = {
        "L": lambda: data.draw(SPAN),
        "R": lambda: f"<reason>{data.draw(INSIDE)}</reason>",
        "A": lambda: f"<answer>{data.draw(INSIDE)}</answer>",
    }
    parts = [blocks[kind]() + data.draw(SPACE) for kind in kinds]
    text = "".join(parts)
    assert format_reward(text) == float(pairs > 0)
    assert format_reward(text, grammar="reason_first") == float(first and pairs > 0)
    assert format_reward(text, grammar="latent_first") == float(not first and pairs > 0)
    assert format_reward(text, grammar="answer") == 1.0
    assert format_reward("".join(parts[:-1])) == 0.0  # without the answer
    assert format_reward(text + "x") == 0.0


@given(st.lists(st.sampled_from([L, R, A, "<reason>", "</answer>", LATENT_START, "x", " "])))
def test_range_on_anything(parts):
    text = "".join(parts)
    assert format_reward(text) in (0.0, 1.0)
    assert format_reward(text, grammar="reason_first") <= format_reward(text)
    # What follows a span grammar also ends with its only answer.
    assert format_reward(text) <= format_reward(text, grammar="answer")

"""Which answers are right."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rewards.accuracy import accuracy, accuracy_rewards, extract_answer

COLOURS = ("red", "green", "dark blue")


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("<answer>A</answer> no, <answer> B </answer>", "B"),  # the last one counts
        ("<answer>A</answer> no, <answer>B", "A"),  # the last complete one
        ("<answer>A <answer>B</answer>", "B"),
        ("<answer>two\nlines</answer>", "two\nlines"),
        ("<answer></answer>", ""),
        ("A", None),
        ("</answer>A<answer>", None),
    ],
)
def test_extract_answer(text, answer):
    assert extract_answer(text) == answer


@pytest.mark.parametrize(
    ("given_answer", "value"),
    [
        *[(right, 1.0) for right in ["C", "c", "(C)", "C.", "c)", "C:", " C ", "(c) Dark  Blue"]],
        *[(right, 1.0) for right in ["dark blue", "Dark\nBlue.", "C. dark blue", "C. because"]],
        *[
            (wrong, 0.0)
            for wrong in ["A", "red", "D", "C. red", "C. A", "B or C", "blue", "C dark"]
        ],
        ("", 0.0),
        ("A. " * 5000, 0.0),
    ],
)
@pytest.mark.parametrize("reference", ["C", "(c)", "dark blue", "C. dark blue"])
def test_choices(given_answer, value, reference):
    assert accuracy(f"<answer>{given_answer}</answer>", reference, COLOURS) == value


def test_options_that_carry_their_letters_or_are_letters():
    labelled = ["A. red", "B) green", "(C) dark blue"]
    assert accuracy("<answer>B</answer>", "green", labelled) == 1.0
    assert accuracy("<answer>green</answer>", "B. green", labelled) == 1.0
    columns = ("A", "B", "C", "D")
    assert accuracy("<answer>b</answer>", "B", columns) == 1.0
    assert accuracy("<answer>A</answer>", "B", columns) == 0.0
    swapped = ("B", "A")  # the text of an option outranks the letter of its place
    assert accuracy("<answer>A</answer>", "A", swapped) == 1.0
    assert accuracy("<answer>B</answer>", "A", swapped) == 0.0


def test_open_answers():
    assert accuracy("<answer>The  Ball\nfalls.</answer>", "the ball falls", ()) == 1.0
    assert accuracy("<answer>the ball rises</answer>", "the ball falls", ()) == 0.0
    assert accuracy("the ball falls", "the ball falls", ()) == 0.0  # no tag


def test_rows_that_cannot_be_judged_have_no_value():
    assert accuracy("<answer>A</answer>", "purple", COLOURS) is None
    assert accuracy("<answer>A</answer>", "E", COLOURS) is None
    assert accuracy("<answer></answer>", " ", ()) is None


def test_batch_reads_the_columns():
    values = accuracy_rewards(
        ["<answer>A</answer>", [{"role": "assistant", "content": "<answer>7</answer>"}]],
        answer=["red", "7"],
        options=[COLOURS, ()],
    )
    assert values == [1.0, 1.0]


@given(st.integers(0, 2), st.integers(0, 2), st.sampled_from(["{}", "({})", "{}.", "{}) ", " {}:"]))
def test_every_way_to_write_a_letter(right, chosen, form):
    text = f"<answer>{form.format('ABC'[chosen])}</answer>"
    assert accuracy(text, COLOURS[right], COLOURS) == float(right == chosen)


@given(st.text(), st.text(), st.lists(st.text(), max_size=4))
def test_range_on_anything(given_answer, reference, options):
    assert accuracy(f"<answer>{given_answer}</answer>", reference, options) in (0.0, 1.0, None)

"""Letters out of answers, and grades of them."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from recipes.evaluation.grading import by_letter, by_rule, first_letter
from rl.trajectory import Sample


def sample(answer: str, options: tuple[str, ...] = ("left", "right", "up", "down")) -> Sample:
    return Sample("s", "v.mp4", "?", answer, options)


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("<answer>B</answer>", "B"),
        ("<answer> (C) </answer>", "C"),
        ("<answer>option D</answer>", "D"),
        ("<answer>the answer is B, not A</answer>", "B"),
        ("A or B? <answer>\nB. left\n</answer>", "B"),
        ("<answer>A</answer> no: <answer>C</answer>", "C"),
        ("<answer>E then D</answer>", "D"),  # of four options
        ("<answer>b</answer>", None),  # small letters are words'
        ("<answer>left</answer>", None),
        ("<answer></answer>", None),
        ("<answer>B", None),  # cut short
        ("B", None),
        ("", None),
    ],
)
def test_first_letter(text: str, letter: str | None) -> None:
    assert first_letter(text) == letter


@given(st.text())
def test_first_letter_of_any_text(inside: str) -> None:
    text = f"<answer>{inside}</answer>"
    letters = [c for c in inside.rpartition("<answer>")[2].partition("</answer>")[0] if c in "AB"]
    assert first_letter(text, 2) == (letters[0] if letters else None)


def test_grades_by_letter() -> None:
    four = sample("B")
    grades = by_letter(
        [four, four, four, sample("E", ("a", "b", "c", "d", "e")), sample("B", ()), sample("Z")],
        [f"<answer>{x}</answer>" for x in ("B. right", "A", "right", "E", "B", "A")],
    )
    assert [g.value for g in grades[:5]] == [1.0, 0.0, 0.0, 1.0, 1.0]
    assert [g.extracted for g in grades] == ["B", "A", None, "E", "B", "A"]
    assert math.isnan(grades[5].value) and "reference" in grades[5].reason


def test_grades_by_rule_take_the_text_too() -> None:
    grades = by_rule([sample("B"), sample("B")], ["<answer>right</answer>", "right"])
    assert [(g.value, g.extracted) for g in grades] == [(1.0, "right"), (0.0, None)]

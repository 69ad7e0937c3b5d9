"""Reading plain numbers, and comparing formulas off the main thread."""

import logging
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from rewards.maths import Number, is_maths, read_number, same_maths


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("3", Number(Fraction(3))),
        ("-1,234.5", Number(Fraction(-2469, 2))),
        ("3 1/2 miles", Number(Fraction(7, 2), ("mi",))),
        ("25 % of people", Number(Fraction(25), ("of", "people"), percent=True)),
        ("$5 per hour", Number(Fraction(5), ("$", "per", "h"))),
        ("2 thousand seconds", Number(Fraction(2000), ("s",))),
        ("5e-3", Number(Fraction(1, 200))),
        ("5e9999", None),  # a number with ten thousand digits is nobody's answer
        ("5x", None),
        ("5 - x", None),
        ("5/0", None),
        ("1,20", None),
        ("", None),
        ("0" * 201, None),
    ],
)
def test_read_number(text, number):
    assert read_number(text) == number


@pytest.mark.parametrize(
    ("text", "maths"),
    [
        ("$x$", True),
        ("$$x$$", True),
        (r"\(x\)", True),
        (r"\[x\]", True),
        (r"2\pi", True),
        ("x^2", True),
        (r"\text{three}", True),
        ("from $5 to $6", False),
        (r"the word \alpha", False),
        ("x", False),
        ("$" + "x" * 200 + "$", False),
    ],
)
def test_is_maths(text, maths):
    assert is_maths(text) is maths


def test_unreadable_formulas():
    assert same_maths(r"\frac{", "3") is None
    assert same_maths("3", r"\frac{") is False


def test_a_thread_other_than_the_main_one_compares_too(caplog):
    # math-verify's timeouts are signals, which threads cannot set; it warns when they are off.
    with caplog.at_level(logging.WARNING), ThreadPoolExecutor(1) as pool:
        assert pool.submit(same_maths, r"\frac{3}{7}", "6/14").result() is True
    assert caplog.records == []

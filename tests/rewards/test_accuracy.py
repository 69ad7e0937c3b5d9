"""Which answers are right."""

import time
from fractions import Fraction

import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from rewards.accuracy import accuracy, accuracy_rewards, extract_answer
from rewards.text import normal
from rl.errors import RecipeError

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


def judge(reference, given_answer, **options):
    return accuracy(f"<answer>{given_answer}</answer>", reference, **options)


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (
            "the ball falls",
            ["The  Ball\nfalls.", "a ball falls!", "ball falls"],
            ["the ball rises"],
        ),
        ("A red ball?", ["red ball", "an red ball;", "RED BALL…"], ["redball", "the the red ball"]),
        ("ﬁve cafés", ["five cafe\N{COMBINING ACUTE ACCENT}s", "Five cafés"], ["five cafes"]),
        ("the", ["The", "the."], ["a", ""]),
        ("...", ["..."], ["."]),
        # Texts with digits in them that are not numbers.
        ("2 red balls", ["2 Red  balls."], ["2", "3 red balls", "2 blue balls", "two red balls"]),
        ("room 12", ["Room 12"], ["12"]),
        ("12:30", ["12:30"], ["12", "30", "12.5"]),
        ("2024-05-01", ["2024-05-01"], ["2024", "2018"]),
        ("3D", ["3d"], ["3"]),
        ("3 or 4", ["3 or 4"], ["3", "4"]),
        ("1/0", ["1/0"], ["0", "1"]),
        ("1.200.000", ["1.200.000"], ["1.2"]),
        ("file C:\\Users", ["file c:\\users"], ["users"]),
    ],
)
def test_open_answers(reference, right, wrong):
    assert [a for a in right if judge(reference, a) != 1.0] == []
    assert [a for a in wrong if judge(reference, a) != 0.0] == []


@pytest.mark.parametrize(
    ("reference", "right", "wrong"),
    [
        (
            "3",
            ["3.0", "+3", "03", "3.", "3 km", "$3$", "\\(3\\)", "x = 3", "\\boxed{3}", "6/2"],
            ["4"],
        ),
        (
            "3",
            [],
            ["3 or 4", "4 or 3", "13", "3.1", "3 - x", "3 * x", "3D", "three", "-3", "33", ""],
        ),
        ("-0.5", ["−1/2", "-.5", "-50%", "$-\\frac{1}{2}$"], ["0.5", "-5"]),
        (
            "1,200",
            ["1200", "$1,200", "1 200", "1200.00", "1.2e3", "$1.2 \\times 10^3$"],
            ["1.2", "1"],
        ),
        (
            "$1,200",
            ["1,200 dollars", "1200", "$1200.00", "1200 USD"],
            ["€1,200", "$1,201", "1 dollar"],
        ),
        ("25%", ["25 %", "0.25", "25", "1/4", "25 percent", "$25\\%$", "25\\%"], ["2.5", "0.0025"]),
        ("0.25", ["25%", "\\frac{1}{4}", ".250"], ["25", "0.251"]),
        ("3½", ["3.5", "3 1/2", "7/2"], ["31/2", "15.5"]),
        ("1/3", ["0.333333", "2/6", "\\frac13"], ["0.33", "0.334"]),
        (r"\frac{1}{3}", ["1/3", "0.333333", "$\\frac{2}{6}$"], ["0.33", "3"]),
        ("3 km", ["3", "3km", "3 kilometres", "3 km away", "$3$"], ["3 m", "3 miles", "2 km"]),
        ("25 °C", ["25", "25°C", "25 degrees Celsius", "25 ℃"], ["25 °F", "26"]),
        ("2 m²", ["2 m2", "2m^2", "2"], ["2 m", "4"]),
        ("2 balls", ["2", "2 red balls", "2 ball"], ["2 cubes", "3 balls"]),
        ("5 million", ["5,000,000", "5e6"], ["5", "5 thousand"]),
        ("1e400", ["1E400", "10e399"], ["1", "1e401", "inf"]),
        ("1e-7", ["0.0000001"], ["2e-7", "0"]),
        ("10^2", ["100", "$10^{2}$"], ["102", "20"]),
        (r"$\sqrt{2}$", [r"\sqrt 2", r"2/\sqrt{2}", "1.414214"], ["1.41", "2", "sqrt"]),
        ("$x^2+1$", ["1+x^2", "$x^2 + 1$"], ["x^2", "y^2+1"]),
        (r"\boxed{7}", ["7"], ["8"]),
    ],
)
def test_numbers(reference, right, wrong):
    assert [a for a in right if judge(reference, a) != 1.0] == []
    assert [a for a in wrong if judge(reference, a) != 0.0] == []
    assert judge(reference, reference) == 1.0


def test_a_kind_that_was_asked_for():
    assert judge("3.0", "3") == 1.0
    assert judge("3.0", "3", kind="text") == 0.0
    assert judge("A", "red", options=COLOURS) == 1.0
    assert judge("A", "red", options=COLOURS, kind="text") == 0.0
    assert judge("2 red balls", "2", kind="number") == 1.0
    assert judge("three", "three", kind="number") is None  # no number
    assert judge("$5", "5", options=("$4", "$5", "$6"), kind="number") == 1.0
    assert judge("(b)", "B. red", kind="choice") == 1.0
    assert judge("(b)", "C. red", kind="choice") == judge("B", "red", kind="choice") == 0.0
    assert judge("red", "red", kind="choice") is None  # neither options nor a letter
    with pytest.raises(RecipeError, match="kind is 'maths'"):
        accuracy("", "3", kind="maths")  # pyright: ignore
    with pytest.raises(RecipeError, match="kind is 'maths'"):
        accuracy_rewards([], answer=[], options=[], kind="maths")  # pyright: ignore


def test_no_tag_is_wrong():
    assert accuracy("the ball falls", "the ball falls") == accuracy("3", "3") == 0.0


def test_rows_that_cannot_be_judged_have_no_value():
    assert accuracy("<answer>A</answer>", "purple", COLOURS) is None
    assert accuracy("<answer>A</answer>", "E", COLOURS) is None
    assert accuracy("<answer></answer>", " ", ()) is None
    assert accuracy("no answer", " ", ()) is None


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


@given(st.text(), st.text(), st.sampled_from(["choice", "number", "text"]))
@settings(deadline=None)  # the first formula imports math-verify
def test_range_of_every_kind(given_answer, reference, kind):
    assert judge(reference, given_answer, kind=kind) in (0.0, 1.0, None)


MATHS = st.text("0123456789+-*/^(){}=.,$\\% xπ½", max_size=12)


@given(MATHS, MATHS)
@settings(deadline=None)
def test_range_on_what_looks_like_maths(given_answer, reference):
    assert judge(reference, given_answer) in (0.0, 1.0, None)


@given(st.one_of(st.text(), MATHS))
@settings(deadline=None)
def test_the_reference_is_right(reference):
    assume("answer>" not in reference)
    assert judge(reference, reference) == (1.0 if normal(reference) else None)


@given(st.integers(-(10**9), 10**9), st.integers(0, 4), st.integers(1, 1000))
def test_every_way_to_write_a_number(units, places, apart):
    exact = Fraction(units, 10**places)
    written = [
        f"{units}/{10**places}",
        f"{'-' * (units < 0)}{abs(units) // 10**places:,}.{abs(units) % 10**places:0{places or 1}}",
        f"{units}e-{places}",
        f"{exact} km.",
    ]
    for reference in written:
        assert [judge(reference, given_answer) for given_answer in written] == [1.0] * 4
        assert judge(reference, f"{units + apart}e-{places}") == 0.0


EVIL = [
    "1" * 100_000,
    "3 " * 50_000,
    "3" + " " * 100_000 + "x",
    "1,000" * 20_000,
    "1/" * 50_000,
    "<answer>" * 12_500,
    "\N{COMBINING ACUTE ACCENT}\N{COMBINING CEDILLA}" * 50_000,
    "$" * 100_000,
    "\\(" * 50_000,
    "\\frac{" * 16_000,
    "(" * 100_000,
    "a. " * 33_000,
    ".!?" * 33_000,
    "the " * 25_000,
    "½" * 100_000,
    "²" * 100_000,
]


@pytest.mark.parametrize("evil", EVIL, ids=lambda text: ascii(text[:8]))
def test_long_texts_take_no_time(evil):
    judge("$x$", "x")  # math-verify is loaded
    start = time.process_time()
    for reference in ("3", "the ball", "$x^2$", evil):
        assert judge(reference, evil) in (0.0, 1.0)
    assert judge("A", evil, options=COLOURS) in (0.0, 1.0)
    assert time.process_time() - start < 2.0  # quadratic would take a minute


def test_a_tower_of_powers_is_wrong_and_is_tried_once():
    start = time.monotonic()
    assert [judge("3", "9^{9^{9^9}}") for _ in range(20)] == [0.0] * 20
    assert time.monotonic() - start < 15.0  # math-verify stops after three seconds

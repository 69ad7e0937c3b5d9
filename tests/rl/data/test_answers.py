from __future__ import annotations

from string import ascii_uppercase

import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from rl.data.answers import answer_letter, clean_options, same_options, split_question
from rl.data.media import question_text
from rl.errors import DataError
from rl.trajectory import Sample

# Options as people write them, and worse: letters, letters with points, digits, other alphabets.
WORDS = st.text(
    st.characters(blacklist_categories=("Cs", "Cc", "Zs", "Zl", "Zp")), min_size=1, max_size=8
)
OPTION = st.one_of(
    st.lists(WORDS, min_size=1, max_size=4).map(" ".join),
    st.sampled_from(["A", "B", "C", "A. up", "(B) up", "B.", "1", "2", "0", "left, then right."]),
)
OPTIONS = st.lists(OPTION, min_size=2, max_size=6, unique=True)
PLAIN = st.lists(
    st.text("abcdefghij", min_size=1, max_size=6).flatmap(
        lambda w: st.sampled_from([w, f"{w} and {w}", f"the {w}, then U.S. {w}"])
    ),
    min_size=2,
    max_size=6,
    unique=True,
)
FEW = settings(max_examples=30, deadline=None)
STYLES = ["{}. ", "({}) ", "{}) ", "{}: "]


def letter(answer: object, options: tuple[str, ...], form: str = "any") -> str:
    return answer_letter(answer, options, where="rows.json, row 3: column 'key'", form=form)  # pyright: ignore[reportArgumentType]


@FEW
@given(OPTIONS, st.data())
def test_every_form_of_an_answer_gives_its_letter(raw: list[str], data: st.DataObject) -> None:
    options = clean_options(raw)
    assume(len(set(options)) == len(options))
    place = data.draw(st.integers(0, len(options) - 1))
    right = ascii_uppercase[place]
    assert letter(place, options, "index") == letter(str(place), options, "index") == right
    assert letter(options[place], options, "text") == right
    for written in ("{}", "({})", "{}.", " {}) "):
        assert letter(written.format(right), options, "letter") == right
    for written in ("{}. {}", "({}) {}", "{}: {}", "{}) {}"):
        assert letter(written.format(right, options[place]), options, "letter") == right


@FEW
@given(OPTIONS, st.data())
def test_without_a_form_it_is_the_right_letter_or_refused(
    raw: list[str], data: st.DataObject
) -> None:
    options = clean_options(raw)
    assume(len(set(options)) == len(options))
    place = data.draw(st.integers(0, len(options) - 1))
    right = ascii_uppercase[place]
    for answer in (place, right, f"({right})", options[place], f"{right}. {options[place]}"):
        try:
            assert letter(answer, options) == right
        except DataError as error:
            assert "of another" in str(error)
            # Only where some other option's text, or letter, is the same.
            assert str(answer) in options or str(answer).strip("().: ")[0] in ascii_uppercase


@pytest.mark.parametrize(
    ("answer", "form", "message"),
    [
        ("C", "any", "answer 'C' is not among the options (A = 'B', B = 'left')"),
        ("B", "any", "is the letter of one option and the text of another"),
        ("B. right", "any", "is not among"),  # B is left
        ("left", "letter", "give a letter"),
        ("A", "text", "give the exact text of one option"),
        (2, "index", "give the number of an option, from 0"),
        (-1, "any", "is not among"),
        (True, "any", "is not among"),
        (None, "any", "is not among"),
    ],
)
def test_refused_answers_name_the_place(answer: object, form: str, message: str) -> None:
    with pytest.raises(DataError) as caught:
        letter(answer, ("B", "left"), form)
    assert str(caught.value).startswith("rows.json, row 3: column 'key': ")
    assert message in str(caught.value)


def test_repeated_options() -> None:
    assert letter("C", ("up", "up", "down")) == "C"
    assert letter(1, ("up", "up", "down"), "index") == "B"
    with pytest.raises(DataError, match="the text of several"):
        letter("up", ("up", "up", "down"))


def test_numbers_that_are_options_and_indices() -> None:
    assert letter(3, ("1", "2", "3")) == "C"  # no index
    with pytest.raises(DataError, match="of another"):
        letter(2, ("1", "2", "3"))
    assert letter(2, ("1", "2", "3"), "index") == "C"
    assert letter("2", ("1", "2", "3"), "text") == "B"


@pytest.mark.parametrize("style", STYLES)
@FEW
@given(options=PLAIN)
def test_letters_of_options_go(style: str, options: list[str]) -> None:
    lettered = [style.format(a) + o for a, o in zip(ascii_uppercase, options, strict=False)]
    assert clean_options(lettered) == tuple(options)
    assert clean_options(options) == tuple(options)
    assert clean_options([*lettered[:-1], options[-1]]) == (*lettered[:-1], options[-1])  # not all


@pytest.mark.parametrize("style", STYLES)
@FEW
@given(
    options=PLAIN,
    head=st.sampled_from(["Where does it go?", "Is A right?\nOr is it B, as J. Doe says?"]),
    heading=st.sampled_from(["", "Options:", "Choices"]),
    tail=st.sampled_from(["", "\nAnswer with the letter.", "\n\nThink.\nThen answer."]),
)
@example(options=["a", "b"], head="Where?", heading="Options:", tail="")
def test_options_in_lines_of_a_question(
    style: str, options: list[str], head: str, heading: str, tail: str
) -> None:
    lines = [style.format(a) + o for a, o in zip(ascii_uppercase, options, strict=False)]
    found = split_question("\n".join(filter(None, [head, heading, *lines])) + tail)
    assert found is not None
    assert found.options == tuple(options)
    assert found.question == "\n".join(filter(None, [head, tail.strip()]))
    asked = question_text(Sample("s", "v.mp4", found.question, "A", found.options))
    assert asked.count(options[0]) >= 1
    assert asked.splitlines()[-len(options) :] == [
        f"{a}. {o}" for a, o in zip(ascii_uppercase, options, strict=False)
    ]


@pytest.mark.parametrize("style", STYLES)
@pytest.mark.parametrize("between", [" ", ", ", "; "])
@FEW
@given(options=PLAIN)
def test_options_in_one_line(style: str, between: str, options: list[str]) -> None:
    listed = between.join(
        style.format(a) + o for a, o in zip(ascii_uppercase, options, strict=False)
    )
    found = split_question(f"Where does it go? {listed}\nAnswer.")
    assert found is not None and found.options == tuple(options)
    assert found.question == "Where does it go?\nAnswer."


@pytest.mark.parametrize(
    "question",
    [
        "What is next?",
        "Who is A. Smith?",  # no B
        "Is it (B) or (A)?",  # not from A on
        "A) one\n(B) another",  # two styles
        "A.\nB.",  # no texts
        "What did U.S.A. and B.B. do?",
        "",
    ],
)
def test_questions_without_options(question: str) -> None:
    assert split_question(question) is None


def test_letters_inside_options_of_lines_are_text() -> None:
    found = split_question("Who?\nA. Ann B. Lee\nB. Bob C. Ray\nC. Cy")
    assert found is not None and found.options == ("Ann B. Lee", "Bob C. Ray", "Cy")


def test_letters_that_are_not_the_options_own_stay() -> None:
    assert clean_options(["B. up", "A. down"]) == ("B. up", "A. down")
    assert clean_options(["A.M.", "P.M."]) == ("A.M.", "P.M.")


def test_same_options() -> None:
    assert same_options(["Up.", " to  it"], ["up", "To it"])
    assert not same_options(["up", "down"], ["down", "up"])

"""Do two short texts mean the same number or formula?

A plain number with its unit is read here and compared as an exact fraction; LaTeX and other
expressions go to math-verify. It does not get plain numbers, because it looks for *some* number in
any text: to it "3 or 4" is 4, "12:30" is 12, "1e400" is 1, and 1e-7 equals 2e-7.
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from typing import Any

from rewards.text import normal

LONGEST = 200  # characters; anything longer is no number
SECONDS = 3  # that math-verify gets for one step (reading one side, or comparing)

PLAIN = re.compile(
    r"(?P<sign>[+-]?) ?(?P<money>[$€£¥₹₩]?) ?"
    r"(?:(?:(?P<whole>\d+) )?(?P<over>\d+) ?/ ?(?P<under>\d+)"  # 3/4, 3 1/2
    r"|(?P<grouped>\d{1,3}(?:(?:,\d{3})+|(?: \d{3})+)(?:\.\d+)?)(?![\d,.])"  # 1,200 or 1 200
    r"|(?P<decimal>(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d{1,3})?))"
    r"(?P<rest>[^\d+*=<>^]*(?:m\^?[23])?[^\d+*=<>^]*)"
)
LATEX = re.compile(r"\$\$?[^$]+\$\$?|\\\(.+\\\)|\\\[.+\\\]", re.DOTALL)
COMMAND, WORD = re.compile(r"\\[A-Za-z]+|\^"), re.compile(r"(?<![\\A-Za-z{])[A-Za-z]{3,}")
SIGNS = str.maketrans({"\N{FRACTION SLASH}": "/", "\N{MINUS SIGN}": "-"})
POWERS = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
PERCENT = {"%", "percent", "pct"}
# Units that are written in several ways, the first name standing for all, without a plural "s".
# They, and no other words, may touch their number.
SPELLINGS = """
mm millimeter millimetre | cm centimeter centimetre | m meter metre | km kilometer kilometre
in inch inches | ft foot feet | mi mile | m^2 m2 sqm | m^3 m3 | ml milliliter millilitre
l liter litre | g gram | kg kilogram kilo | lb pound | ms millisecond | s sec second | min minute
h hr hour | m/s mps | km/h kmh kph | mph | hz hertz | fps | px pixel | ° deg degree | °c celsius
°f fahrenheit | $ dollar usd | € euro eur | £ gbp | ¥ yen jpy | ₹ rupee inr | ₩ won krw
"""
UNITS = {
    name: names.split()[0]
    for names in SPELLINGS.strip().replace("\n", "|").split("|")
    for name in names.split()
}


@dataclass(frozen=True)
class Number:
    """A plain number, and the words beside it: its unit, each in one spelling."""

    value: Fraction
    units: tuple[str, ...] = ()
    percent: bool = False  # written with a percent sign; `value` is what stands before it


def read_number(text: str) -> Number | None:
    """The number that `text` as a whole is ("1,200", "-0.5", "3 1/2", "25 %", "$5", "3 km").

    `text` is normal (see `rewards.text.normal`). Words without digits may follow the number. None
    for anything else, and for more than `LONGEST` characters.
    """
    if len(text) > LONGEST:
        return None
    text = _inside(text).translate(SIGNS).replace("\\%", "%").replace("\\$", "$")
    found = PLAIN.fullmatch(text)
    if found is None or (found["under"] and not int(found["under"])):
        return None
    rest = found["rest"]
    glued = rest[:1].strip() and rest[0] != "%"
    words = rest.replace("%", "% ").split()
    if (glued and _unit(words[0]) not in UNITS.values()) or {"-", "/"} & {*words}:
        return None  # "3d", "7b": a name; "3 - x": a formula
    if found["under"]:
        value = int(found["whole"] or 0) + Fraction(int(found["over"]), int(found["under"]))
    else:
        value = Fraction(re.sub("[ ,]", "", found["grouped"] or found["decimal"]))
    if words and words[0] in POWERS:
        value *= POWERS[words.pop(0)]
    percent = bool(words) and words[0] in PERCENT
    units = [found["money"]] * bool(found["money"]) + words[percent:]
    return Number(-value if found["sign"] == "-" else value, tuple(map(_unit, units)), percent)


def _unit(word: str) -> str:
    word = word.strip(".,;") or word
    return UNITS.get(word) or UNITS.get(word.removesuffix("s")) or word.removesuffix("s")


def _inside(text: str) -> str:
    """`text` without the LaTeX delimiters around it."""
    if LATEX.fullmatch(text) is None:
        return text
    return (text.strip("$") if text[0] == "$" else text[2:-2]).strip()


def is_maths(text: str) -> bool:
    """Whether a reference is a formula: in LaTeX delimiters, or with LaTeX in it and no words."""
    text = text.strip()
    bare = COMMAND.search(text) is not None and WORD.search(text) is None
    return len(text) <= LONGEST and (bare or LATEX.fullmatch(text) is not None)


def same_numbers(reference: Number, given: Number) -> bool:
    """Equal values, and a word in common if both have words beside them ("3 km", "3 km away").

    Equal to six decimals and to one part in 100,000, so that 0.333333 is 1/3 and 1e-7 not 2e-7. A
    percent sign on one side only stands for a factor of 100 or for nothing: 25 % is 1/4 and 25.
    """
    if reference.units and given.units and {*reference.units}.isdisjoint(given.units):
        return False
    if reference.percent == given.percent:
        return _close(reference.value, given.value)
    marked, bare = (reference, given) if reference.percent else (given, reference)
    return _close(marked.value, bare.value) or _close(marked.value / 100, bare.value)


def _close(a: Fraction, b: Fraction) -> bool:
    gap = abs(a - b)
    return gap <= Fraction(1, 2 * 10**6) and gap * 10**5 <= max(abs(a), abs(b))


@lru_cache(maxsize=4096)  # answers repeat within a group, and slow ones must not be slow each time
def same_maths(reference: str, given: str) -> bool | None:
    """Whether math-verify finds the two equal; None if it cannot read `reference`.

    Each side is a formula, with or without LaTeX delimiters, or a plain number. math-verify stops
    after `SECONDS` by a signal, which only the main thread gets; elsewhere whoever called must
    bound the time. What takes longer ("9^{9^{9^9}}") is not equal.
    """
    gold = _expression(reference)
    if gold is None:
        return None
    answer = _expression(given)
    if answer is None:
        return False
    verify = _math_verify().verify
    return bool(verify(gold, answer, timeout_seconds=_seconds()))


def _expression(text: str) -> Any:
    """A sympy object, or None for what math-verify cannot read."""
    number = read_number(normal(text))
    if number is not None:
        from sympy import Float, Rational

        value = number.value / 100 if number.percent else number.value
        exact = Rational(value.numerator, value.denominator)
        # A decimal is a Float, which math-verify compares to six decimals.
        return exact if value.denominator == 1 or "/" in normal(text) else Float(exact, 20)
    inside = _inside(text.strip())
    if not inside or "$" in inside or len(inside) > LONGEST:
        return None
    if inside == text.strip() and WORD.search(inside) and not COMMAND.search(inside):
        return None  # prose, which math-verify would take for a product of letters
    library = _math_verify()
    found = library.parse(
        f"${inside}$",
        [library.LatexExtractionConfig(boxed_match_priority=0)],
        fallback_mode="no_fallback",
        parsing_timeout=_seconds(),
    )
    return found[0] if found else None


def _seconds() -> int:
    return SECONDS if threading.current_thread() is threading.main_thread() else 0


def _math_verify() -> Any:
    import logging

    import math_verify  # takes a third of a second, so not before the first formula

    # It warns of a missing timeout, and of every answer that took too long.
    logging.getLogger("math_verify").setLevel(logging.ERROR)
    return math_verify

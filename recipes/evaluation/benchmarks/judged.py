"""Grades from a language model: TwiFF-Bench's judge, behind any OpenAI-compatible chat server.

The benchmark's judge gives the chain of thought and the answer 0 to 5 each, and reports their mean
(OpenGVLab/Future-L1). Its prompt is not public: ours is ``twiff_judge.jinja`` beside this file, so
figures compare with each other and not with published ones. It reads texts only (the release's
`JUDGE_TEXT_ONLY`).
"""

from __future__ import annotations

import asyncio
import inspect
import math
from collections.abc import Callable, Mapping, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from recipes.evaluation.grading import NO_REFERENCE, Grade
from rewards.accuracy import extract_answer
from rewards.judge import Judge
from rewards.judge_prompts import read_grades
from rewards.values import Invalid
from rl.errors import RecipeError
from rl.trajectory import Sample

TEMPLATE = Path(__file__).with_name("twiff_judge.jinja")
GRADES: tuple[str, ...] = ("reasoning", "answer")  # 0 to 5 each, in the order of tables
_AT_ONCE = 64  # prompts of one call: `patience_s` bounds a call, and progress shows between them
_FIXED = ("style", "threshold", "rule_first")  # a benchmark's judge has no choice in these


class JudgeGrader:
    """Grades completions by what a judge says of them.

    `options` are those of the reward `judge` (`rewards.judge.Judge`), of which `base_url` and
    `model` are needed; `template` may name another prompt than ours. A completion without an
    ``<answer>`` has an answer grade of 0, whatever the judge says of it. Where the judge cannot be
    reached or understood there is no value, and the reason; never 0. Replies are cached as the
    reward's are, so grading again asks only what was not answered. Raises `RecipeError`.
    """

    def __init__(
        self,
        options: Mapping[str, Any],
        advance: Callable[[int], None] = lambda _count: None,
    ) -> None:
        check_options(options)
        given = {"template": str(TEMPLATE), **options}
        self._judge = Judge(style="score", rule_first=False, **given)
        self._advance = advance

    def __call__(self, samples: Sequence[Sample], texts: Sequence[str]) -> list[Grade]:
        render = self._judge.prompt_maker()
        prompts = {
            place: render(
                question=sample.question,
                reference=sample.answer,
                options=sample.options,
                answer=extract_answer(text) or "",
                completion=text,
                columns=sample.extra,
            )
            for place, (sample, text) in enumerate(zip(samples, texts, strict=True))
            if sample.answer.strip()
        }
        replies: dict[str, str | Invalid] = {}
        asked = list(dict.fromkeys(prompts.values()))
        for start in range(0, len(asked), _AT_ONCE):
            part = asked[start : start + _AT_ONCE]
            replies |= asyncio.run(self._judge.replies(part))[0]
            self._advance(len(part))
        return [
            _grade(replies[prompts[place]] if place in prompts else Invalid(NO_REFERENCE), text)
            for place, text in enumerate(texts)
        ]


def check_options(options: Mapping[str, Any]) -> None:
    """Raises `RecipeError` for options of the judge that are unknown or needed and missing."""
    parameters = inspect.signature(Judge).parameters
    known = [name for name in parameters if name not in _FIXED]
    for name in options:
        if name not in known:
            close = get_close_matches(name, known, n=1)
            hint = f"did you mean {close[0]!r}? " if close else ""
            raise RecipeError(f"judge: unknown option {name!r}; {hint}known: {', '.join(known)}")
    needed = [n for n in known if parameters[n].default is inspect.Parameter.empty]
    if missing := [name for name in needed if name not in options]:
        raise RecipeError(
            f"judge: {' and '.join(missing)} missing; name an OpenAI-compatible chat server, up to "
            "/v1, and a model that it serves"
        )


def _grade(reply: str | Invalid, text: str) -> Grade:
    answer = extract_answer(text) or None
    if isinstance(reply, Invalid):
        return Grade(math.nan, answer, reply.reason)
    found = read_grades(reply)
    if found is None:  # objects with the same mean and other grades
        return Grade(math.nan, answer, "the judge contradicted itself")
    reasoning, said = found
    said = said if answer is not None else 0
    grades: dict[str, float] = dict(zip(GRADES, (float(reasoning), float(said)), strict=True))
    return Grade((reasoning + said) / 2, answer, "", grades)

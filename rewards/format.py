"""Does a completion follow the grammar of latent spans, reasons and one final answer?

Source: the reward of Future-L1's release (OpenGVLab/Future-L1): every latent
span is collapsed to one symbol, then the text must match `(L R)+ A` or `R (L R)+ A`. Two details
are ours and stricter than the release: no block may hold another block's tag, and a reason or an
answer may not be blank.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal, get_args

from rewards.text import LATENT_END, LATENT_START, Completion, completion_text, replace_spans
from rl.errors import RecipeError

Grammar = Literal["any", "reason_first", "latent_first", "answer"]

SPAN = "\x00"  # stands for a collapsed span; no tokenizer decodes to it
TAG = re.compile(r"</?(?:reason|answer)>")
BLOCK = re.compile(
    rf"(?P<L>{SPAN})"
    r"|<reason>(?P<R>(?:(?!</?(?:reason|answer)>)[^\x00])*)</reason>"
    r"|<answer>(?P<A>(?:(?!</?(?:reason|answer)>)[^\x00])*)</answer>"
)
SHAPE = {
    "any": re.compile(r"R?(?:LR)+A"),
    "reason_first": re.compile(r"R(?:LR)+A"),
    "latent_first": re.compile(r"(?:LR)+A"),
}


def format_reward(
    text: str,
    *,
    grammar: Grammar = "any",
    start: str = LATENT_START,
    end: str = LATENT_END,
) -> float:
    """1 if the whole of `text` follows `grammar`, else 0.

    With L a latent span, R = ``<reason>…</reason>``, A = ``<answer>…</answer>``, and space allowed
    between blocks:

    - "any": ``(L R)+ A`` or ``R (L R)+ A``, so at least one span;
    - "reason_first": ``R (L R)+ A`` only;
    - "latent_first": ``(L R)+ A`` only;
    - "answer": exactly one well-formed A, at the end; spans and any other text may precede it.

    `start` and `end` are the span markers. Range: {0, 1}.
    """
    if grammar not in get_args(Grammar):
        raise RecipeError(f"format: grammar is {grammar!r}; choose one of {get_args(Grammar)}")
    # A marker that is left over after this is ordinary text, and so breaks the grammar.
    text = replace_spans(text.replace(SPAN, "�"), SPAN, start, end).strip()
    if grammar == "answer":
        return float(_ends_with_its_only_answer(text) and start not in text and end not in text)
    shape = _block_shape(text)
    return float(shape is not None and SHAPE[grammar].fullmatch(shape) is not None)


def _block_shape(text: str) -> str | None:
    """The kinds of the blocks in order, as in "LRLRA"; None if anything else stands between."""
    kinds, position = [], 0
    for block in BLOCK.finditer(text):
        kind = block.lastgroup
        assert kind is not None  # every branch of BLOCK is a named group
        if text[position : block.start()].strip() or (kind != "L" and not block[kind].strip()):
            return None
        kinds.append(kind)
        position = block.end()
    return None if text[position:].strip() else "".join(kinds)


def _ends_with_its_only_answer(text: str) -> bool:
    tags = [m for m in TAG.finditer(text) if "answer" in m[0]]
    if [m[0] for m in tags] != ["<answer>", "</answer>"] or tags[1].end() != len(text):
        return False
    answer = text[tags[0].end() : tags[1].start()]
    return bool(answer.strip()) and SPAN not in answer and TAG.search(answer) is None


def format_rewards(
    completions: Sequence[Completion],
    *,
    grammar: Grammar = "any",
    start: str = LATENT_START,
    end: str = LATENT_END,
    **_: Any,
) -> list[float]:
    """`format_reward` of each completion, with TRL's signature."""
    format_reward("", grammar=grammar)  # a wrong option fails even on an empty batch
    return [
        format_reward(completion_text(c), grammar=grammar, start=start, end=end)
        for c in completions
    ]

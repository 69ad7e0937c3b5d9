"""What the text rewards share: the markers of a completion, and how to see past the latents."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping, Sequence

LATENT_START = "<|latent_start|>"  # the defaults of `rl.policy.protocol.LatentProtocol`
LATENT_END = "<|latent_end|>"

VULGAR = re.compile(r"(?<=\d)(?=[¼-¾⅐-⅞])")  # "3½" is 3 1/2; NFKC alone makes it 31/2
LONG_WORD = 1000  # characters: sorting accents takes the square of how many follow each other
RAISED = re.compile(r"[⁰¹²³⁴-⁹]+")  # and "10²" 102

Completion = str | Sequence[Mapping[str, str]]  # TRL's two forms: plain text, or a list of messages


def completion_text(completion: Completion) -> str:
    """The text of a TRL completion, plain or conversational (the last message of the list)."""
    return completion if isinstance(completion, str) else completion[-1]["content"]


def replace_spans(
    text: str, replacement: str, start: str = LATENT_START, end: str = LATENT_END
) -> str:
    """`text` with every complete latent span replaced; a marker that is left over stays."""
    inside = rf"(?:(?!{re.escape(start)}|{re.escape(end)}).)*"
    pattern = re.escape(start) + inside + re.escape(end)
    return re.sub(pattern, lambda _: replacement, text, flags=re.DOTALL)


def normal(text: str) -> str:
    """`text` for comparing: case, spacing and Unicode variants (NFKC) do not count, nor does
    punctuation (. ! ? , ; :) at its end, unless it is all there is.
    """
    words = RAISED.sub(r"^\g<0>", VULGAR.sub(" ", text)).split()
    words = [w if len(w) > LONG_WORD else unicodedata.normalize("NFKC", w) for w in words]
    text = " ".join(" ".join(words).casefold().split())  # NFKC makes spaces of some characters
    return text.rstrip(".!?,;: ") or text

"""What the text rewards share: the markers of a completion, and how to see past the latents."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

LATENT_START = "<|latent_start|>"  # the defaults of `rl.policy.protocol.LatentProtocol`
LATENT_END = "<|latent_end|>"

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

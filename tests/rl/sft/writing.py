"""A writer of lessons in the tiny tokenizer's vocabulary."""

from __future__ import annotations

from typing import Any

from rl.policy.protocol import LatentProtocol
from rl.sft.taught import Writer
from tests.tiny import tiny_tokenizer


def writer(protocol: LatentProtocol) -> Writer:
    tokenizer: Any = tiny_tokenizer(protocol.tokens)
    return Writer(
        protocol,
        protocol.resolve(tokenizer),
        tokenizer,
        tokenizer.eos_token_id,
        answer_template="={answer}",
        reasoning_template="[{reasoning}]",
    )

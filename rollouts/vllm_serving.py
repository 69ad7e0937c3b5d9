"""What `vllm serve` needs beside the model: checked requests, and spans shown as reasoning.

Both plug into places vLLM has for such things. `prepare_config` of `rollouts.vllm_internals` asks
for `CheckedRequests`; ``--reasoning-parser foresight`` asks for `SpanParser`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from vllm.entrypoints.generate.base.protocol import DeltaMessage
from vllm.reasoning import ReasoningParser
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.sample.logits_processor.interface import LogitsContext, LogitsProcessor

from rl.policy.settings import protocol_and_tokens
from rollouts.vllm_slots import check_extra


class CheckedRequests(LogitsProcessor):
    """Refuses a wrong ``imagine`` where a request comes in: the client gets error 400, and the
    engine never sees it. Leaves logits alone.
    """

    @classmethod
    def validate_params(cls, sampling_params: SamplingParams) -> None:
        check_extra(
            sampling_params.extra_args,
            has_grammar=sampling_params.structured_outputs is not None,
        )

    def add_request(self, req_idx: int, sampling_params: SamplingParams) -> bool:
        return False

    def apply(self, logits: torch.Tensor, ctx: LogitsContext) -> torch.Tensor:
        return logits


class SpanParser(ReasoningParser):
    """Gives each latent span as reasoning, "[imagined 4 latents]", and the text as content.

    One parser reads one answer. A span that the answer's end cuts off is not shown.
    """

    def __init__(self, tokenizer: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(tokenizer, *args, **kwargs)
        added = tokenizer.added_tokens_decoder.values()
        self._special = [token.content for token in added if token.special]
        self._pattern = re.compile("|".join(map(re.escape, self._special)))
        self._held = ""  # the end of the text so far, if a special token may begin there
        self._length = self._spans = 0

    @cached_property
    def _tokens(self) -> Any:
        assert self._model_config is not None, "vLLM made the parser without its model"
        return protocol_and_tokens(self._model_config.hf_config)

    def adjust_request(self, request: Any) -> Any:
        # An answer that is not streamed comes as text only: spans must be in it to be counted.
        request.skip_special_tokens = False
        if request.structured_outputs or getattr(request, "response_format", None):
            # The grammar holds from the first token on, and leaves no room for spans.
            request.include_reasoning = False
        return request

    def is_reasoning_end(self, input_ids: Sequence[int]) -> bool:
        return False  # a span may follow any text

    def extract_content_ids(self, input_ids: list[int]) -> list[int]:
        protocol_ids = {self._tokens[1].start, self._tokens[1].filler, self._tokens[1].end}
        return [token for token in input_ids if token not in protocol_ids]

    def count_reasoning_tokens(self, token_ids: Sequence[int]) -> int:
        """The latents: what ``usage`` calls reasoning tokens."""
        return sum(token == self._tokens[1].filler for token in token_ids)

    def extract_reasoning(self, model_output: str, request: Any) -> tuple[str | None, str | None]:
        start, end, filler = map(re.escape, self._tokens[0].tokens)
        spans = re.findall(f"{start}((?:{filler})*){end}", model_output)
        lengths = [len(re.findall(filler, span)) for span in spans]
        return "\n".join(map(_marker, lengths)) or None, self._pattern.sub("", model_output)

    def extract_reasoning_streaming(
        self,
        previous_text: str,
        current_text: str,
        delta_text: str,
        previous_token_ids: Sequence[int],
        current_token_ids: Sequence[int],
        delta_token_ids: Sequence[int],
    ) -> DeltaMessage | None:
        reasoning, content = "".join(self._markers(delta_token_ids)), self._text(delta_text)
        if not (reasoning or content):
            return None
        return DeltaMessage(reasoning=reasoning or None, content=content or None)

    def get_streaming_fallback_content(self, text: str, request: Any) -> str:
        """What is left to say at the end of an answer."""
        return self._held

    def _markers(self, ids: Sequence[int]) -> Iterator[str]:
        tokens = self._tokens[1]
        for token in ids:
            if token == tokens.start:
                self._length = 0
            elif token == tokens.filler:
                self._length += 1
            elif token == tokens.end:
                self._spans += 1
                yield ("\n" if self._spans > 1 else "") + _marker(self._length)

    def _text(self, delta: str) -> str:
        """New text without special tokens, which may come in pieces."""
        text = self._pattern.sub("", self._held + delta)
        begun = max(0, len(text) - max(map(len, self._special)))
        while not any(token.startswith(text[begun:]) for token in self._special):
            begun += 1
        self._held = text[begun:]
        return text[:begun]


def _marker(length: int) -> str:
    return f"[imagined {length} latent{'' if length == 1 else 's'}]"

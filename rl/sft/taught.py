"""What SFT teaches a row, laid out: the completion, where its latents are, and what of it is
learned.

A taught completion is scored as a `Trajectory` whose latents nobody sampled, by the replay that RL
uses, so the two stages cannot disagree about which positions are choices, what is banned there, or
which hidden state gives a latent's mean.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.errors import DataError, PolicyError
from rl.policy.model import LatentPolicy
from rl.policy.protocol import LatentProtocol, LatentTokens, Slot
from rl.sft.target_clips import TokensPerPatch
from rl.trajectory import MediaKey, Sample, Sampling, Trajectory

UNTAUGHT = -100  # the label of a position where there is nothing to learn


@dataclass(frozen=True)
class Lesson:
    """What one row is taught: a completion of C tokens, L of which are the fillers of latents."""

    tokens: np.ndarray  # int64 [C], the end of sequence included
    latent_slots: np.ndarray  # int64 [L]: where in `tokens` the fillers are
    labels: np.ndarray  # int64 [C]: `tokens`, but `UNTAUGHT` where the protocol leaves no choice

    @property
    def decided(self) -> int:
        """How many positions are learned."""
        return int((self.labels != UNTAUGHT).sum())

    @property
    def latents(self) -> int:
        return len(self.latent_slots)

    @classmethod
    def of(cls, tokens: np.ndarray, ids: LatentTokens, protocol: LatentProtocol) -> Lesson:
        """The lesson of a completion's `tokens` [C]; `ProtocolError` if they are none."""
        forced = protocol.trace(tokens, ids).slots == Slot.FORCED
        fillers = np.flatnonzero(tokens == ids.filler)
        return cls(tokens, fillers, np.where(forced, UNTAUGHT, tokens))


@dataclass(frozen=True)
class Writer:
    """Writes lessons in the vocabulary of one policy."""

    protocol: LatentProtocol
    ids: LatentTokens
    tokenizer: Any
    eos: int
    answer_template: str
    reasoning_template: str

    @classmethod
    def of(
        cls, policy: LatentPolicy, tokenizer: Any, *, answer_template: str, reasoning_template: str
    ) -> Writer:
        """For `policy`; `PolicyError` if nothing says how its sequences end."""
        return cls(
            policy.protocol,
            policy.latent_tokens,
            tokenizer,
            _end_of_sequence(policy, tokenizer),
            answer_template,
            reasoning_template,
        )

    def lesson(self, sample: Sample, lengths: Sequence[int] = ()) -> Lesson:
        """The lesson of a sample with spans of `lengths` between the texts of its reasoning. A
        sample that is taught without spans has its reasoning as one text.
        """
        return self._lay_out(self._texts(sample, len(lengths)), lengths)

    def opening(self, sample: Sample, length: int) -> Lesson:
        """The lesson of a sample with one span of `length` latents in front of its reasoning and
        answer; without latents there is no span.
        """
        text = self._texts(sample, 0)
        return self._lay_out([[], *text], [length]) if length else self._lay_out(text, [])

    def _texts(self, sample: Sample, spans: int) -> list[list[int]]:
        return taught_texts(
            sample,
            spans,
            answer_template=self.answer_template,
            reasoning_template=self.reasoning_template,
            tokenizer=self.tokenizer,
        )

    def _lay_out(self, texts: Sequence[Sequence[int]], lengths: Sequence[int]) -> Lesson:
        tokens = completion_ids(texts, lengths, self.ids, self.eos)
        return Lesson.of(tokens, self.ids, self.protocol)


def span_lengths(
    sample: Sample,
    protocol: LatentProtocol,
    *,
    temporal_patch_size: int,
    tokens_per_patch: TokensPerPatch,
) -> tuple[int, ...]:
    """How many latents each span of `sample.imagine` takes: its temporal patches times
    `tokens_per_patch`; with "all" the most it may take (`Targets.lengths` knows how many it does).

    Raises `DataError`, which names the sample, where the protocol does not allow them.
    """
    where = f"sample {sample.id!r}"
    if len(sample.imagine) > protocol.max_spans:
        raise DataError(
            f"{where}: column 'imagine' has {len(sample.imagine)} spans, the protocol allows "
            f"{protocol.max_spans}; list fewer spans or raise the protocol's max_spans"
        )
    lengths = []
    for number, frames in enumerate(sample.imagine, start=1):
        patches = -(-len(frames) // temporal_patch_size)
        tokens = tokens_per_patch
        if tokens == "all":
            tokens = max(1, protocol.max_length // patches)
        lengths.append(patches * tokens)
        if not protocol.min_length <= lengths[-1] <= protocol.max_length:
            least = "at least " if tokens_per_patch == "all" else ""
            raise DataError(
                f"{where}: span {number} of column 'imagine' has {len(frames)} frames, so "
                f"{lengths[-1]} latents ({temporal_patch_size} frames a patch, {least}{tokens} "
                f"latents a patch); the protocol allows {protocol.min_length} to "
                f"{protocol.max_length}: list other frames, or change the protocol's min_length "
                "and max_length or tokens_per_patch"
            )
    return tuple(lengths)


def check_lengths(sample: Sample, lengths: Sequence[int], protocol: LatentProtocol) -> None:
    """Raise a `DataError` where a span has fewer latents than the protocol's `min_length`, as its
    frames are too small to have more tokens.
    """
    for number, length in enumerate(lengths, start=1):
        if length < protocol.min_length:
            raise DataError(
                f"sample {sample.id!r}: the frames of span {number} of column 'imagine' have "
                f"{length} merged tokens, the protocol's min_length is {protocol.min_length}; "
                "lower it, or show larger frames"
            )


def completion_ids(
    texts: Sequence[Sequence[int]], lengths: Sequence[int], tokens: LatentTokens, eos: int
) -> np.ndarray:
    """The token ids of the N + 1 `texts` around N spans, each span a start token, fillers and an
    end token, and then the end of sequence: int64 [C].
    """
    ids = [*texts[0]]
    for length, text in zip(lengths, texts[1:], strict=True):
        ids += [tokens.start, *[tokens.filler] * length, tokens.end, *text]
    return np.array([*ids, eos], dtype=np.int64)


def taught_texts(
    sample: Sample, spans: int, *, answer_template: str, reasoning_template: str, tokenizer: Any
) -> list[list[int]]:
    """The tokens of the `spans` + 1 texts around a sample's spans, the last with its answer.

    Where a sample is taught without its spans (0 of them), the reasoning is one text after the
    other. Empty reasoning is not written at all.
    """
    pieces = list(sample.reasoning) or [""] * (spans + 1)
    written = [reasoning_template.replace("{reasoning}", p) if p.strip() else "" for p in pieces]
    if not spans:
        written = ["".join(written)]
    written[-1] += answer_template.replace("{answer}", sample.answer)
    return [tokenizer(text, add_special_tokens=False)["input_ids"] for text in written]


def taught_trajectory(
    sample: Sample,
    prompt_ids: np.ndarray,
    media: MediaKey,
    completion: np.ndarray,
    latents: torch.Tensor,
    policy: LatentPolicy,
) -> Trajectory:
    """The trajectory of a taught `completion` [C] with `latents` [L, H]. Log-probs are zeros: it
    was not sampled.
    """
    trace = policy.protocol.trace(completion, policy.latent_tokens)
    return Trajectory(
        sample_id=sample.id,
        prompt_ids=prompt_ids,
        completion_ids=completion,
        decision=trace.slots,
        logprobs=np.zeros(len(completion), dtype=np.float32),
        kept=np.zeros(len(completion), dtype=np.int32),
        latents=latents,
        latent_logprobs=np.zeros(len(latents)),
        span_lengths=trace.span_lengths,
        filler=policy.latent_tokens.filler,
        media=(media,),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text="",
    )


def _end_of_sequence(policy: LatentPolicy, tokenizer: Any) -> int:
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    eos = policy.generation_config.eos_token_id if policy.generation_config else None
    if eos is None:
        raise PolicyError(
            "neither the tokenizer nor the policy names an end-of-sequence token; set one of them"
        )
    return int(eos[0] if isinstance(eos, list) else eos)

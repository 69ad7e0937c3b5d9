"""What both engines do before and after sampling: check prompts and weight updates, make
trajectories and count them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rl.data.broken import of_sample
from rl.data.media import MediaProcessor
from rl.errors import DataError, RolloutError, TrajectoryError, VideoError
from rl.interfaces import Media, MediaSource, WeightUpdate
from rl.policy.protocol import LatentProtocol, LatentTokens
from rl.trajectory import MediaKey, RolloutRequest, Sample, Trajectory
from rl.weights import state_checksum


@dataclass(frozen=True)
class Sampled:
    """What an engine drew for one seed: C tokens, among them L latents."""

    ids: Sequence[int]  # [C]
    logprobs: Sequence[float] | np.ndarray  # [C], 0 where forced
    kept: Sequence[int] | np.ndarray  # [C], as in `Trajectory`
    latents: torch.Tensor  # [L, H], on the CPU, as fed
    latent_logprobs: Sequence[float] | np.ndarray  # [L]
    replayed: np.ndarray | None = None  # int32 [L, k], as in `Trajectory`


@dataclass(frozen=True)
class Assembler:
    """Turns what an engine drew into trajectories. `stops` are the ids that end a completion."""

    protocol: LatentProtocol
    tokens: LatentTokens
    processor: MediaProcessor
    stops: frozenset[int]

    def check_prompt(self, sample: Sample, prompt: np.ndarray) -> None:
        """Raises `DataError` for a prompt [P] with latent tokens."""
        tokens = self.tokens
        if np.isin(prompt, (tokens.start, tokens.end, tokens.filler)).any():
            raise DataError(
                f"sample {sample.id!r}: its prompt contains a latent token "
                f"({', '.join(self.protocol.tokens)}), which only answers may; remove it "
                "from the question"
            )

    def trajectory(
        self,
        request: RolloutRequest,
        seed: int,
        prompt: np.ndarray,
        shown: tuple[MediaKey, ...],
        drawn: Sampled,
        version: int,
    ) -> Trajectory:
        """The trajectory of one seed of `request`, whose `prompt` showed the clips `shown`.

        Raises `TrajectoryError` if what was drawn has a log-prob that is no number, and
        `ProtocolError` if it breaks the protocol.
        """
        if not (np.isfinite(drawn.logprobs).all() and np.isfinite(drawn.latent_logprobs).all()):
            raise TrajectoryError(
                f"sample {request.sample.id!r}, seed {seed}: sampled with log-probs that are no "
                "finite numbers; the policy's weights are broken, or its dtype is too narrow"
            )
        ids = np.array(drawn.ids, dtype=np.int64)
        trace = self.protocol.trace(ids, self.tokens, request.sampling.imagine)
        stopped = int(ids[-1]) in self.stops
        return Trajectory(
            sample_id=request.sample.id,
            prompt_ids=np.asarray(prompt, dtype=np.int64),
            completion_ids=ids,
            decision=trace.slots,
            logprobs=np.array(drawn.logprobs, dtype=np.float32),
            kept=np.array(drawn.kept, dtype=np.int32),
            latents=drawn.latents,
            latent_logprobs=np.array(drawn.latent_logprobs, dtype=np.float64),
            span_lengths=trace.span_lengths,
            filler=self.tokens.filler,
            media=shown,
            policy_version=version,
            finish_reason="stop" if stopped else "length",
            sampling=request.sampling,
            seed=seed,
            text=self.processor.tokenizer.decode(
                ids[:-1] if stopped else ids, skip_special_tokens=False
            ),
            replayed=drawn.replayed,
        )


class Meter:
    """What an engine has sampled since its start, and how fast."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter(trajectories=0, tokens=0, latents=0)
        self._busy = 0.0  # seconds

    def add(self, trajectories: Sequence[Trajectory], seconds: float) -> None:
        """Count trajectories that took so long together."""
        self._counts["trajectories"] += len(trajectories)
        self._counts["tokens"] += sum(len(t.completion_ids) for t in trajectories)
        self._counts["latents"] += sum(len(t.latents) for t in trajectories)
        self._busy += seconds

    def read(self) -> dict[str, float]:
        """Totals, and tokens and latents per second of busy time."""
        rates = {
            f"{name}_per_second": self._counts[name] / max(self._busy, 1e-9)
            for name in ("tokens", "latents")
        }
        return {**self._counts, **rates}


def stop_ids(generation_config: Any, tokenizer: Any) -> frozenset[int]:
    """The ids that end a completion: the policy's and its tokenizer's. Raises `RolloutError` if
    there is none.
    """
    eos = generation_config.eos_token_id
    found = {*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id} - {None}
    if not found:
        raise RolloutError("neither the policy nor its tokenizer names an end-of-sequence token")
    return frozenset(found)


def clip_of(processor: MediaProcessor, media: MediaSource, sample: Sample) -> Media:
    """The clip of a sample. Raises `VideoError` that names both."""
    try:
        return media.get(processor.key(sample))
    except VideoError as error:
        raise of_sample(sample, error) from error


def check_update(update: WeightUpdate, own: Mapping[str, Collection[int]]) -> None:
    """Refuse an update that is damaged or meant for another policy. `own` are the shapes of this
    one's parameters. Raises `RolloutError`.
    """
    found = state_checksum(update.state)
    if found != update.checksum:
        raise RolloutError(
            f"weights of version {update.version} arrived damaged: checksum {found}, expected "
            f"{update.checksum}"
        )
    if unknown := update.state.keys() - own.keys():
        raise RolloutError(
            f"weights of version {update.version} name parameters this policy lacks: "
            f"{sorted(unknown)[:5]}"
        )
    wrong = sorted(n for n, value in update.state.items() if tuple(value.shape) != tuple(own[n]))
    if wrong:
        raise RolloutError(
            f"weights of version {update.version} have other shapes than this policy's: {wrong[0]} "
            f"is {tuple(update.state[wrong[0]].shape)}, not {tuple(own[wrong[0]])}"
        )

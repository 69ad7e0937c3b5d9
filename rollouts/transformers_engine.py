"""The transformers engine: batched sampling of latent trajectories with a KV cache.

Prompts are prefilled once per group and their cache is shared out to the group's samples; finished
samples leave the batch at once. All randomness is a function of the trajectory's seed and the
position, so a trajectory does not depend on what it was batched with.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from rl.data.broken import broken_clips, broken_samples
from rl.data.media import MediaProcessor
from rl.errors import DataError, VideoError
from rl.interfaces import Media, MediaSource, WeightUpdate
from rl.policy.density import log_density, sample_latents
from rl.policy.noise import Stream, uniform
from rl.policy.protocol import SLOT_OF_STEP, Slot, SpanState, Step
from rl.policy.sampling import draw_next
from rl.policy.scores import full_logits
from rl.policy.unroll import Unroll
from rl.scoring import prompt_inputs
from rl.trajectory import RolloutRequest, Sample, Sampling, Trajectory, TrajectoryGroup
from rollouts.assemble import Assembler, Meter, Sampled, check_update, clip_of, stop_ids


@dataclass
class _Row:
    """One trajectory while it is being sampled."""

    request: int
    seed: int
    sampling: Sampling
    state: SpanState = SpanState()
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    kept: list[int] = field(default_factory=list)
    latents: list[torch.Tensor] = field(default_factory=list)
    latent_logprobs: list[float] = field(default_factory=list)
    replayed: list[list[int]] = field(default_factory=list)
    finish_reason: str | None = None


class TransformersEngine:
    """Samples from a `LatentPolicy` with transformers. Implements `rl.interfaces.Engine`.

    `max_batch_size` bounds the trajectories sampled side by side. Clips come from `media`, prompts
    are encoded by `processor`; both are what the trainer uses, so tokens and pixels agree.
    """

    def __init__(
        self,
        policy: Any,
        processor: MediaProcessor,
        media: MediaSource,
        *,
        max_batch_size: int = 64,
        device: torch.device | str = "cpu",
        version: int = 0,
    ) -> None:
        self.policy: Any = policy.to(device).eval()
        self.processor, self.media = processor, media
        self.max_batch_size, self.device, self.version = (
            max_batch_size,
            torch.device(device),
            version,
        )
        tokenizer = processor.tokenizer
        self._stops = stop_ids(policy.generation_config, tokenizer)
        pad = tokenizer.pad_token_id
        self._pad = pad if pad is not None else min(self._stops)
        self._meter = Meter()
        self._positions = int(policy.config.get_text_config().max_position_embeddings)

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        """Sample every request; groups come back in the order of the requests."""
        started = time.perf_counter()
        members: list[list[Trajectory]] = [[] for _ in requests]
        for batch in _batches(requests, self.max_batch_size):
            parts = [dataclasses.replace(requests[i], seeds=seeds) for i, seeds in batch]
            clips = [[clip_of(self.processor, self.media, r.sample)] for r in parts]
            sampled = self._generate_batch(parts, clips)
            for (i, _), trajectories in zip(batch, sampled, strict=True):
                members[i] += trajectories
        done = [t for group in members for t in group]
        self._meter.add(done, time.perf_counter() - started)
        return [
            TrajectoryGroup(request.sample, tuple(group))
            for request, group in zip(requests, members, strict=True)
        ]

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        """As `rl.interfaces.Rollouts.broken`."""
        return broken_samples(self.processor, samples, lambda keys: broken_clips(self.media, keys))

    def update_weights(self, update: WeightUpdate) -> int:
        """Load the parameters of `update` in place and take its version."""
        own = self.policy.state_dict()
        check_update(update, {name: value.shape for name, value in own.items()})
        for name, value in update.state.items():
            own[name].copy_(value)
        self.version = update.version
        return self.version

    def health(self) -> dict[str, Any]:
        """Version, totals since the start, and tokens and latents per second of busy time."""
        return {"engine": "transformers", "version": self.version, **self._meter.read()}

    @torch.no_grad()
    def _generate_batch(
        self, requests: Sequence[RolloutRequest], clips: Sequence[Sequence[Media]]
    ) -> list[list[Trajectory]]:
        prompts = [
            self.processor.encode(r.sample, c).input_ids
            for r, c in zip(requests, clips, strict=True)
        ]
        for request, prompt in zip(requests, prompts, strict=True):
            self._assembler.check_prompt(request.sample, prompt)
            if len(prompt) + request.sampling.max_new_tokens > self._positions:
                raise DataError(
                    f"sample {request.sample.id!r}: a prompt of {len(prompt)} tokens and "
                    f"{request.sampling.max_new_tokens} new ones are more than the "
                    f"{self._positions} that the model has positions for; show fewer frames "
                    "(data.frames) or ask for fewer tokens. Prompts are never cut"
                )
        rows = [_Row(i, seed, r.sampling) for i, r in enumerate(requests) for seed in r.seeds]
        unroll = Unroll(self.policy, prompt_inputs(self.policy, prompts, clips, self._pad))
        # Share each prompt's cache out to the samples of its group.
        unroll.select(torch.tensor([row.request for row in rows], device=self.device))

        alive = rows
        while True:
            ids, latents = self._decide(alive, unroll)
            left = [i for i, row in enumerate(alive) if row.finish_reason is None]
            if left and len(left) < len(alive):
                keep = torch.tensor(left, device=self.device)
                latents = latents[self._fed(ids).nonzero()[:, 0].unsqueeze(1).eq(keep).any(1)]
                unroll.select(keep)
                ids = ids[keep]
                alive = [alive[i] for i in left]
            if not left:
                break
            unroll.feed(ids, latents)
            self._note_replayed(alive, ids, unroll.replayed)
        return self._trajectories(requests, rows, prompts, clips)

    def _note_replayed(
        self, rows: list[_Row], ids: torch.Tensor, replayed: torch.Tensor | None
    ) -> None:
        if replayed is not None:
            for i in self._fed(ids).nonzero()[:, 0].tolist():
                rows[i].replayed.append(replayed[i].tolist())

    def _fed(self, ids: torch.Tensor) -> torch.Tensor:
        return ids == self.policy.latent_tokens.filler

    def _decide(self, rows: list[_Row], unroll: Unroll) -> tuple[torch.Tensor, torch.Tensor]:
        """Choose what stands next in each row, and record it. Returns ids [N] and the latents to
        feed [F, H].
        """
        protocol, tokens, hidden = self.policy.protocol, self.policy.latent_tokens, unroll.hidden
        steps = [protocol.next_step(row.state, row.sampling.imagine) for row in rows]
        seeds = torch.tensor([row.seed for row in rows], device=self.device)
        places = torch.tensor([row.state.position for row in rows], device=self.device)
        heat = torch.tensor([row.sampling.temperature for row in rows], device=self.device)
        top_p = torch.tensor([row.sampling.top_p for row in rows], device=self.device)
        top_k = torch.tensor([row.sampling.top_k for row in rows], device=self.device)
        ids = torch.tensor(
            [
                tokens.start if s is Step.START else tokens.end if s is Step.END else tokens.filler
                for s in steps
            ],
            device=self.device,
        )
        logprobs = torch.zeros(len(rows), device=self.device)
        kept = torch.zeros(len(rows), dtype=torch.int32, device=self.device)

        free = [i for i, s in enumerate(steps) if SLOT_OF_STEP[s] != Slot.FORCED]
        if free:
            logits = full_logits(self.policy.get_output_embeddings(), hidden[free])
            decides = torch.tensor([steps[i] is Step.DECIDE for i in free], device=self.device)
            stream = torch.where(decides, int(Stream.DECISION), int(Stream.TOKEN))
            drawn = draw_next(
                logits,
                torch.tensor([steps[i] is Step.TOKEN for i in free], device=self.device),
                heat[free],
                top_p[free],
                top_k[free],
                uniform(seeds[free], stream, places[free]),
                tokens,
                any_truncated=any(rows[i].sampling.truncated for i in free),
            )
            ids[free] = torch.where(decides, drawn.decisions, drawn.ids)
            logprobs[free] = torch.where(decides, drawn.decision_logprobs, drawn.logprobs)
            kept[free] = torch.where(decides, 0, drawn.kept)

        fed = self._fed(ids).nonzero()[:, 0]
        latents = hidden[:0]
        if len(fed):
            latents, densities = self._draw_latents(
                [rows[i] for i in fed.tolist()], unroll.means(fed), heat[fed]
            )
            for i, latent, density in zip(fed.tolist(), latents, densities, strict=True):
                rows[i].latents.append(latent)
                rows[i].latent_logprobs.append(density)
        for row, token, logprob, count in zip(
            rows, ids.tolist(), logprobs.tolist(), kept.tolist(), strict=True
        ):
            row.ids.append(token)
            row.logprobs.append(logprob)
            row.kept.append(count)
            row.state = protocol.advance(row.state, token, tokens, row.sampling.imagine)
            if token in self._stops:
                row.finish_reason = "stop"
            elif len(row.ids) >= row.sampling.max_new_tokens:
                row.finish_reason = "length"
        return ids, latents

    def _draw_latents(
        self, rows: list[_Row], mean: torch.Tensor, heat: torch.Tensor
    ) -> tuple[torch.Tensor, list[float]]:
        """Latents [F, H] of these means, in the dtype they are fed in, and their log-densities (0
        where greedy).
        """
        protocol = self.policy.protocol
        noisy = heat > 0
        if protocol.noise_scale == 0.0 or not bool(noisy.any()):
            return mean, [0.0] * len(rows)
        seeds = torch.tensor([row.seed for row in rows], device=self.device)
        ordinals = torch.tensor([len(row.latents) for row in rows], device=self.device)
        drawn = sample_latents(mean, protocol.noise_scale, protocol.density, seeds, ordinals)
        latents = torch.where(noisy[:, None], drawn, mean)
        density = log_density(latents, mean, protocol.noise_scale, protocol.density)
        return latents, torch.where(noisy, density, 0.0).tolist()

    def _trajectories(
        self,
        requests: Sequence[RolloutRequest],
        rows: Sequence[_Row],
        prompts: Sequence[np.ndarray],
        clips: Sequence[Sequence[Media]],
    ) -> list[list[Trajectory]]:
        members: list[list[Trajectory]] = [[] for _ in requests]
        width = self.policy.config.get_text_config().hidden_size
        nothing = torch.zeros(0, width, dtype=self.policy.dtype)
        for row in rows:
            request = requests[row.request]
            drawn = Sampled(
                row.ids,
                row.logprobs,
                row.kept,
                torch.stack(row.latents).cpu() if row.latents else nothing,
                row.latent_logprobs,
                self._replayed(row),
            )
            prompt, shown = prompts[row.request], tuple(c.key for c in clips[row.request])
            members[row.request].append(
                self._assembler.trajectory(request, row.seed, prompt, shown, drawn, self.version)
            )
        return members

    def _replayed(self, row: _Row) -> np.ndarray | None:
        config = self.policy.modules_config.visual_replay
        if config is None:
            return None
        found = np.full((len(row.latents), config.tokens), -1, dtype=np.int32)
        # The last latent of a completion that was cut off behind it was never fed.
        found[: len(row.replayed)] = np.array(row.replayed).reshape(-1, config.tokens)
        return found

    @property
    def _assembler(self) -> Assembler:
        policy = self.policy
        return Assembler(policy.protocol, policy.latent_tokens, self.processor, self._stops)


def _batches(
    requests: Sequence[RolloutRequest], size: int
) -> Iterator[list[tuple[int, tuple[int, ...]]]]:
    """Batches of at most `size` trajectories, as pairs of a request's place and some of its seeds.

    A group stays together where it fits, so that its prompt is computed once.
    """
    batch: list[tuple[int, tuple[int, ...]]] = []
    room = size
    for i, request in enumerate(requests):
        for start in range(0, len(request.seeds), size):
            seeds = request.seeds[start : start + size]
            if len(seeds) > room:
                yield batch
                batch, room = [], size
            batch.append((i, seeds))
            room -= len(seeds)
    if batch:
        yield batch

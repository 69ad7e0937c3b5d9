"""What `benchmarks.update` measures: prompts with synthetic clips, and text completions, as both
trainers take them.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch

from rl.interfaces import Media
from rl.policy.layout import PackLayout
from rl.scoring import media_types
from rl.trajectory import MediaKey, Sampling, Trajectory
from tests.tiny import MERGE, PATCH, TEMPORAL

TEXT = 256  # token ids below this are bytes
TIMESTAMP = 4  # tokens before each frame pair, where Qwen3-VL writes the time


@dataclass(frozen=True)
class Case:
    """One micro-batch: groups of a prompt of P tokens and completions of C_1 … C_G tokens."""

    groups: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, size: int, prompt: int, completion: int, groups: int = 1) -> Case:
        """Equal groups of `size` completions."""
        return cls(((prompt, (completion,) * size),) * groups)

    @property
    def rows(self) -> list[tuple[int, int]]:
        """(P, C) of every completion."""
        return [(p, c) for p, completions in self.groups for c in completions]

    @property
    def size(self) -> int:
        """G, of the largest group."""
        return max(len(completions) for _, completions in self.groups)

    @property
    def limit(self) -> float:
        """Tokens of a padded row a completion, over tokens with each prompt once: G(P+C)/(P+GC) if
        nothing is padded.
        """
        width = max(p for p, _ in self.rows) + max(c for _, c in self.rows)
        return len(self.rows) * width / PackLayout.of(self.groups).length

    @property
    def repeated(self) -> Case:
        """The same completions, each with a prompt to itself."""
        return Case(tuple((p, (c,)) for p, c in self.rows))

    def names(self) -> tuple[str, str, str]:
        """G, P and C as a table shows them."""
        count = f"{self.size}" if len(self.groups) == 1 else f"{self.size}, {len(self.groups)}×"
        return count, _span([p for p, _ in self.rows]), _span([c for _, c in self.rows])


def _span(lengths: list[int]) -> str:
    low, high = min(lengths), max(lengths)
    return f"{low}" if low == high else f"{low} to {high}"


def clip_grid(prompt: int) -> tuple[int, int]:
    """Frame pairs, and merged patches along a side of each, of the clip in a prompt of so many
    tokens: it leaves few for text.
    """
    side = 8 if prompt >= 200 else 2
    return max(1, (prompt - TIMESTAMP) // (side * side + 2 + TIMESTAMP)), side


@dataclass(frozen=True)
class Clips:
    """A `MediaSource` of random pixels."""

    clips: dict[MediaKey, Media]

    def get(self, key: MediaKey) -> Media:
        return self.clips[key]


@dataclass(frozen=True)
class Batch:
    """A case as both trainers take it: what `_generate_and_score_completions` would return."""

    case: Case
    media: Clips
    ours: dict[str, Any]
    trl: dict[str, Any]

    @property
    def rollouts(self) -> Any:
        """As much of `Rollouts` as an update needs."""
        return SimpleNamespace(media=self.media)


def make_batch(case: Case, policy: Any, pad_id: int, device: torch.device) -> Batch:
    """Random prompts, pixels, completions, advantages. No latents: TRL could not be fed them.

    The old log-probs are those of an even distribution over the vocabulary, so that ratios differ
    from 1 and some of them are clipped.
    """
    rng = np.random.default_rng(0)
    torch.manual_seed(0)
    vocabulary = policy.get_output_embeddings().weight.shape[0]
    clips: dict[MediaKey, Media] = {}
    trajectories = []
    for group, (prompt, completions) in enumerate(case.groups):
        key = MediaKey(f"clip{group}", (), "random")
        frames, side = clip_grid(prompt)
        grid = torch.tensor([[frames, MERGE * side, MERGE * side]])
        pixels = torch.randn(int(grid.prod()), 3 * TEMPORAL * PATCH**2)
        inputs = {"pixel_values_videos": pixels, "video_grid_thw": grid}
        clips[key] = Media(key, inputs, placeholder="")
        ids = _prompt(prompt, policy.config, rng)
        for count in completions:
            chosen = rng.integers(0, TEXT, count)
            trace = policy.protocol.trace(chosen, policy.latent_tokens, "free")
            trajectories.append(
                Trajectory(
                    sample_id=f"sample{group}",
                    prompt_ids=ids,
                    completion_ids=chosen,
                    decision=trace.slots,
                    logprobs=np.full(count, -np.log(vocabulary), np.float32),
                    kept=np.zeros(count, np.int32),
                    latents=torch.zeros(0, policy.config.get_text_config().hidden_size),
                    latent_logprobs=np.zeros(0),
                    span_lengths=(),
                    filler=policy.latent_tokens.filler,
                    media=(key,),
                    policy_version=0,
                    finish_reason="length",
                    sampling=Sampling(1.0, count),
                    seed=0,
                    text="",
                )
            )
    shared = _pad(trajectories, pad_id)
    shared["advantages"] = torch.randn(len(trajectories))
    shared["num_items_in_batch"] = torch.tensor(float(sum(c for _, c in case.rows)))
    ids = torch.cat([shared["prompt_ids"], shared["completion_ids"]], 1)
    # A clip a row, as TRL repeats images.
    rows = [clips[t.media[0]].inputs for t in trajectories]
    trl = {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
    trl["mm_token_type_ids"] = media_types(ids, policy.config)
    shared, trl = ({k: v.to(device) for k, v in part.items()} for part in (shared, trl))
    own = {
        "num_latents_in_batch": torch.tensor(0.0, device=device),
        "trajectories": trajectories,
    }
    return Batch(case, Clips(clips), {**shared, **own}, {**shared, **trl})


def _prompt(length: int, config: Any, rng: np.random.Generator) -> np.ndarray:
    """Random text around the markers and video tokens of a clip: int64 [P]."""
    frames, side = clip_grid(length)
    ids = rng.integers(0, TEXT, length)
    starts = np.arange(frames + 1) * (TIMESTAMP + side * side + 2)
    for start, stop in pairwise(starts):
        ids[start + TIMESTAMP] = config.vision_start_token_id
        ids[start + TIMESTAMP + 1 : stop - 1] = config.video_token_id
        ids[stop - 1] = config.vision_end_token_id
    return ids


def _pad(trajectories: list[Trajectory], pad_id: int) -> dict[str, torch.Tensor]:
    """Prompts padded on the left, completions on the right, as TRL has them."""
    count = len(trajectories)
    p = max(len(t.prompt_ids) for t in trajectories)
    c = max(len(t.completion_ids) for t in trajectories)
    found = {
        "prompt_ids": torch.full((count, p), pad_id),
        "prompt_mask": torch.zeros(count, p, dtype=torch.long),
        "completion_ids": torch.full((count, c), pad_id),
        "completion_mask": torch.zeros(count, c, dtype=torch.long),
        "old_per_token_logps": torch.zeros(count, c),
    }
    for row, t in enumerate(trajectories):
        start, end = p - len(t.prompt_ids), len(t.completion_ids)
        found["prompt_ids"][row, start:] = torch.from_numpy(t.prompt_ids)
        found["prompt_mask"][row, start:] = 1
        found["completion_ids"][row, :end] = torch.from_numpy(t.completion_ids)
        found["completion_mask"][row, :end] = 1
        found["old_per_token_logps"][row, :end] = torch.from_numpy(t.logprobs)
    found["sampling_per_token_logps"] = found["old_per_token_logps"]
    found["tool_mask"] = torch.ones_like(found["completion_mask"])
    return found

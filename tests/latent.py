"""Tiny latent policies that really think: their random weights open, continue and end spans
often.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.data.frames import FrameRule
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.modules import ModulesConfig, is_new
from rl.policy.protocol import LatentProtocol
from rl.scoring import media_types
from rl.trajectory import RolloutRequest, Sample, Sampling, Trajectory
from rollouts.transformers_engine import TransformersEngine
from tests.tiny import Family, moving_square, save_tiny_checkpoint, tiny_processor, write_clip

PROTOCOL = LatentProtocol(min_length=2, max_length=4, max_spans=2, noise_scale=0.3)


def thinking_policy(
    folder: Path,
    family: Family = "qwen3_vl",
    protocol: LatentProtocol = PROTOCOL,
    head: str = "mlp",
    dtype: torch.dtype = torch.float32,
    boldness: float = 0.8,
    modules: ModulesConfig | None = None,
) -> tuple[Any, Any]:
    """A policy and its processor. `boldness` is how widely the logits of start, end and
    end-of-sequence vary: the wider, the more spans, and the more rounding shows in log-probs.
    `modules` are on for good: none of their gates is at its start of 0.
    """
    save_tiny_checkpoint(folder, family)
    processor = tiny_processor(family)
    torch.manual_seed(1)
    policy = make_policy(
        folder,
        processor,
        protocol,
        HeadConfig(head, width=64),  # type: ignore[arg-type]
        modules,
        dtype=dtype,
    )
    torch.manual_seed(15)
    tokens = policy.latent_tokens
    with torch.no_grad():
        weight = policy.get_output_embeddings().weight
        for token, size in (
            (tokens.start, boldness),
            (tokens.end, boldness),
            (processor.tokenizer.eos_token_id, 0.6 * boldness),
        ):
            weight[token] = torch.randn(weight.shape[1]) * size
        for parameter in policy.latent_head.parameters():
            if parameter.ndim == 2:
                parameter.copy_(torch.randn_like(parameter) / parameter.shape[1] ** 0.5)
        for name, parameter in policy.named_parameters():
            if is_new(name, policy.modules_config):
                size = parameter.shape[-1] ** -0.5 if parameter.ndim == 2 else 0.3
                parameter.add_(torch.randn_like(parameter) * size)
    return policy.eval(), processor


def square_samples(folder: Path, count: int = 4) -> list[Sample]:
    """Samples with clips of different lengths and questions of different lengths."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(count):
        length, shown = [(4, 2), (8, 4), (6, 4), (12, 6)][i % 4]
        path = write_clip(folder / f"clip{i}.mp4", moving_square(length, seed=i))
        samples.append(
            Sample(
                f"square{i}",
                str(path),
                "Where next" + "?" * (i + 1),
                "AB"[i % 2],
                ("left", "right"),
                tuple(range(shown)),
            )
        )
    return samples


def engine_for(policy: Any, processor: Any, **kwargs: Any) -> TransformersEngine:
    media = MediaProcessor(processor, FrameRule(8))
    return TransformersEngine(policy, media, LocalMedia(media, 16), **kwargs)


def requests_for(
    samples: list[Sample], size: int = 3, sampling: Sampling = Sampling(1.0, 20)
) -> list[RolloutRequest]:
    return [
        RolloutRequest(s, tuple(1000 * i + g for g in range(size)), sampling)
        for i, s in enumerate(samples)
    ]


def plain_inputs(policy: Any, media: Any, trajectory: Trajectory, stop: int | None = None) -> Any:
    """What transformers' own forward takes for one trajectory alone, up to position `stop`: nothing
    is shared and positions are left to the model. `latents` are those of the whole trajectory.
    """
    ids = np.concatenate([trajectory.prompt_ids, trajectory.completion_ids])[:stop]
    input_ids = torch.from_numpy(ids)[None]
    clips = [media.get(key).inputs for key in trajectory.media]
    return {
        "input_ids": input_ids,
        "attention_mask": torch.ones_like(input_ids),
        "mm_token_type_ids": media_types(input_ids, policy.config),
        **{name: torch.cat([clip[name] for clip in clips]) for name in (clips[0] if clips else {})},
        "latents": trajectory.latents,
    }

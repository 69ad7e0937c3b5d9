"""`foresight evaluate`: a policy folder and a manifest become an `Evaluation`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import AutoProcessor

from recipes.engines import choose_engine, gpu_share, vllm_options
from recipes.evaluate import MODES, Evaluation
from recipes.sampling import evaluate_with_bar, start_pool
from recipes.schema import RolloutsSection
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.errors import PolicyError, RecipeError
from rl.export import find_policy, is_policy
from rl.policy.protocol import Imagine
from rollouts.worker import EngineSpec


def evaluate_policy(
    policy: str | Path,
    manifest: str | Path,
    *,
    modes: Sequence[str] = MODES,
    workers: int = 1,
    limit: int | None = None,
    by: str | None = None,
    max_new_tokens: int = 2048,
    default_frames: int = 16,
    video_root: str | Path | None = None,
    system_prompt: str | None = None,
    media_cache: int = 512,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    console: Console | None = None,
) -> Evaluation:
    """Evaluate a policy folder, or the policy of a run, on a manifest with `workers` Ray workers.

    The workers share out this machine's GPUs; the `media_cache` last used clips are kept in memory.
    `engine` is as `rollouts.engine` of a recipe.

    Raises `RecipeError` for an unknown mode, `PolicyError` or `CheckpointError` for a folder that
    holds no policy, and the errors of manifests and videos.
    """
    console = console or Console()
    chosen: list[Imagine] = [mode for mode in MODES if mode in modes]
    if unknown := sorted(set(modes) - set(MODES)):
        raise RecipeError(f"--modes: {unknown} are unknown; choose of {', '.join(MODES)}")
    folder, _ = find_policy(policy)
    if not is_policy(folder):
        raise PolicyError(
            f"{folder} is no policy folder; if it holds LoRA adapters, `foresight export` makes a "
            "policy of it"
        )
    samples = read_manifest(manifest, video_root=video_root, limit=limit)
    settings: dict[str, Any] = {"default_frames": default_frames, "system_prompt": system_prompt}
    media = MediaProcessor(AutoProcessor.from_pretrained(folder), **settings)
    gpus = torch.cuda.device_count()
    share = gpu_share(workers, gpus)
    choice = choose_engine(engine, folder, gpu=gpus > 0)
    console.print(str(choice))
    spec = EngineSpec(
        str(folder),
        engine=choice.engine,
        options=vllm_options(RolloutsSection(), share, trainer=False),
        dtype="bfloat16" if gpus else "float32",
        device="cuda" if gpus else "cpu",
        **settings,
    )
    with start_pool(
        spec, media, workers, console, gpus_per_worker=share, media_capacity=media_cache
    ) as pool:
        return evaluate_with_bar(pool, samples, chosen, max_new_tokens, console, by=by)

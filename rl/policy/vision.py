"""The vision tower, which sees every clip once however often it is shown."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rl.errors import PolicyError


def vision_tower(policy: Any) -> nn.Module:
    """The module that turns pixels into features; `PolicyError` if there is none."""
    tower = policy.get_encoder(modality="video")
    if tower is policy or tower is policy.base_model:
        raise PolicyError(
            f"{type(policy).__name__}: no vision tower was found, so it can neither be frozen nor "
            "see a clip once for several prompts; choose a model of the Qwen3-VL, Qwen3.5 or "
            "Qwen2.5-VL family"
        )
    return tower


@contextmanager
def show_clips_once(tower: nn.Module, clips: Sequence[int]) -> Iterator[None]:
    """While this lasts, a call of `tower` gets the pixels of distinct clips and the grid of every
    clip that is shown, and returns features for these; `clips[i]` is which of the distinct clips
    the i-th shown one is.
    """
    shown = list(clips)
    distinct = [shown.index(clip) for clip in range(len({*shown}))]  # where each is shown first
    sizes: list[int] = []

    def narrow(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        # Layouts of the language model reach the tower as well, with transformers' other keywords.
        kwargs = {k: v for k, v in kwargs.items() if k != "layout"}
        kwargs["grid_thw"] = grid = kwargs["grid_thw"][distinct]
        sizes[:] = grid.prod(-1).tolist()
        return args, kwargs

    def widen(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        if len(distinct) < len(shown):
            output.pooler_output = _repeat(output.pooler_output, sizes, shown)
            if getattr(output, "deepstack_features", None) is not None:
                output.deepstack_features = [
                    _repeat(features, sizes, shown) for features in output.deepstack_features
                ]
        return output

    hooks = [
        tower.register_forward_pre_hook(narrow, with_kwargs=True),
        tower.register_forward_hook(widen, with_kwargs=True),
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def _repeat(features: torch.Tensor, sizes: Sequence[int], shown: Sequence[int]) -> torch.Tensor:
    """Features [N, H] of distinct clips, of `sizes` patches before merging -> of all shown ones."""
    merged = sum(sizes) // len(features)
    parts = features.split([size // merged for size in sizes])
    return torch.cat([parts[clip] for clip in shown])

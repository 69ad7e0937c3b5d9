"""Prompts for vLLM from what is processed already: ids and tensors, nothing decoded or tokenised
again.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from vllm.inputs.engine import MultiModalInput, TokensInput, mm_input, tokens_input
from vllm.multimodal.inputs import (
    MultiModalFieldConfig,
    MultiModalKwargsItem,
    MultiModalKwargsItems,
    PlaceholderRange,
)

from rl.errors import DataError
from rl.interfaces import Media
from rl.trajectory import MediaKey

# The tensors of a clip or an image: its patches, and what stays on the CPU.
_FIELDS = {
    "video": ("pixel_values_videos", ("video_grid_thw", "second_per_grid_ts")),
    "image": ("pixel_values", ("image_grid_thw",)),
}


def engine_prompt(
    sample_id: str,
    ids: np.ndarray,
    media: Sequence[Media],
    *,
    tokenizer: Any,
    embedded: Sequence[int],
    merge_size: int,
    dtype: torch.dtype,
) -> MultiModalInput | TokensInput:
    """The input of a prompt of `ids` [P] and its clips and images, in the order of the prompt.

    `embedded` are the ids that stand for merged patches, `merge_size`² of which make one token.
    Patches travel in `dtype`. Raises `DataError` where ids and grids do not fit together.
    """
    prompt = [int(i) for i in ids]
    if not media:
        return tokens_input(prompt)
    items: dict[str, list[MultiModalKwargsItem]] = {}
    hashes: dict[str, list[str]] = {}
    places: dict[str, list[PlaceholderRange]] = {}
    pads = frozenset(embedded)
    found = _places(sample_id, prompt, media, tokenizer, pads)
    for one, place in zip(media, found, strict=True):
        kind = "video" if "video_grid_thw" in one.inputs else "image"
        patches = int(one.inputs[f"{kind}_grid_thw"].prod()) // merge_size**2
        if place.get_num_embeds() != patches:
            raise DataError(
                f"sample {sample_id!r}: {one.key.path} has {patches} merged patches, but "
                f"{place.get_num_embeds()} tokens of the prompt stand for it; make clips and "
                "prompts with the same processor"
            )
        items.setdefault(kind, []).append(_item(kind, one, dtype))
        hashes.setdefault(kind, []).append(media_hash(one.key))
        places.setdefault(kind, []).append(place)
    stray = sum(i in pads for i in prompt) - sum(p.get_num_embeds() for p in found)
    if stray:
        raise DataError(
            f"sample {sample_id!r}: {stray} media tokens of the prompt belong to no clip; remove "
            "media tokens from the question"
        )
    return mm_input(prompt, MultiModalKwargsItems(items), hashes, places)


def media_hash(key: MediaKey) -> str:
    """Names a clip to vLLM's caches: equal for equal keys, and so shared within a group."""
    return hashlib.blake2b(repr(key).encode(), digest_size=16).hexdigest()


def _places(
    sample_id: str, prompt: list[int], media: Sequence[Media], tokenizer: Any, pads: frozenset[int]
) -> list[PlaceholderRange]:
    """Where each clip's own text stands.

    That is all that replaced its one token in the chat template. For Qwen3-VL it begins with the
    first time stamp, after the outer start marker: vLLM looks in it for a start marker per frame.
    """
    found, cursor = [], 0
    for one in media:
        text = tokenizer(one.placeholder, add_special_tokens=False)["input_ids"]
        start = next(_matches(prompt, text, cursor), None)
        if start is None:
            raise DataError(
                f"sample {sample_id!r}: the prompt does not hold the text that stands for "
                f"{one.key.path}; make clips and prompts with the same processor"
            )
        cursor = start + len(text)
        mask = torch.tensor([i in pads for i in text])
        found.append(PlaceholderRange(start, len(text), None if bool(mask.all()) else mask))
    return found


def _matches(prompt: list[int], part: list[int], start: int) -> Iterator[int]:
    return (
        i
        for i in range(start, len(prompt) - len(part) + 1)
        if prompt[i] == part[0] and prompt[i : i + len(part)] == part
    )


def _item(kind: str, one: Media, dtype: torch.dtype) -> MultiModalKwargsItem:
    patches, others = _FIELDS[kind]
    sizes = one.inputs[f"{kind}_grid_thw"].prod(-1)
    fields = {patches: MultiModalFieldConfig.flat_from_sizes(kind, sizes)} | {
        name: MultiModalFieldConfig.batched(kind, keep_on_cpu=True) for name in others
    }
    tensors: Any = {
        name: value.to(dtype) if name == patches else value for name, value in one.inputs.items()
    }
    if "second_per_grid_ts" in tensors:
        # transformers counts whole seconds between frames, vLLM fractions: they must agree.
        tensors["second_per_grid_ts"] = tensors["second_per_grid_ts"].trunc()
    return MultiModalKwargsItems.from_hf_inputs(tensors, fields)[kind][0]

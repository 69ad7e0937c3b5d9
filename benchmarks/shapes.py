"""Random policies in the shapes of Qwen3-VL, for measurements. Nothing is downloaded."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from tests.tiny import MERGE, PATCH, TEMPORAL, tiny_processor, tiny_tokenizer


@dataclass(frozen=True)
class Size:
    """Widths of a Qwen3-VL. Those of 2b and 8b are in the config.json of Qwen/Qwen3-VL-2B-Instruct
    and Qwen/Qwen3-VL-8B-Instruct.
    """

    hidden: int
    inner: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    vocabulary: int
    tied: bool
    vision_depth: int
    vision_hidden: int
    vision_inner: int
    vision_heads: int
    deepstack: tuple[int, ...]

    def cache_bytes(self, tokens: int, dtype: torch.dtype) -> int:
        """Bytes of the KV cache of so many tokens."""
        return 2 * self.layers * self.kv_heads * self.head_dim * dtype.itemsize * tokens


SIZES = {
    "tiny": Size(128, 256, 2, 4, 2, 32, 4096, True, 2, 128, 256, 4, (0,)),
    "20m": Size(512, 1024, 8, 8, 4, 64, 4096, True, 2, 128, 512, 4, (0,)),
    "100m": Size(768, 2048, 12, 12, 4, 64, 32768, True, 4, 256, 1024, 4, (1, 2)),
    "2b": Size(2048, 6144, 28, 16, 8, 128, 151936, True, 24, 1024, 4096, 16, (5, 11, 17)),
    "8b": Size(4096, 12288, 36, 32, 8, 128, 151936, False, 27, 1152, 4304, 16, (8, 16, 24)),
}


@dataclass(frozen=True)
class Setting:
    """What one run of the script measures."""

    model: str
    device: torch.device
    dtype: torch.dtype
    tokens: int
    batches: tuple[int, ...]
    repeats: int

    @property
    def size(self) -> Size:
        return SIZES[self.model]

    @property
    def kind(self) -> Any:
        """`dtype` as vLLM writes it."""
        return str(self.dtype).removeprefix("torch.")

    def cache_bytes(self, prompt: int) -> int:
        """Room for the largest batch, and some to spare."""
        room = max(self.batches) * (prompt + self.tokens + 64)
        return max(2 * self.size.cache_bytes(room, self.dtype), 32 << 20)


def machine(device: torch.device) -> str:
    """The machine in words, as a table should name it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{os.cpu_count()} CPU cores, {torch.get_num_threads()} threads"


def config_of(size: Size, patch: int = PATCH) -> Any:
    """The config of a plain Qwen3-VL of that size, with the special tokens of the tests' tokenizer.

    Patches are those of the tests' processor unless given, so that a clip is a few pixels.
    """
    from transformers import Qwen3VLConfig

    tokenizer, third = tiny_tokenizer(), size.head_dim // 6
    token: Any = tokenizer.convert_tokens_to_ids
    return Qwen3VLConfig(
        text_config={
            "vocab_size": size.vocabulary,
            "hidden_size": size.hidden,
            "intermediate_size": size.inner,
            "num_hidden_layers": size.layers,
            "num_attention_heads": size.heads,
            "num_key_value_heads": size.kv_heads,
            "head_dim": size.head_dim,
            "max_position_embeddings": 32768,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 5e6,
                "mrope_section": [size.head_dim // 2 - 2 * third, third, third],
                "mrope_interleaved": True,
            },
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "bos_token_id": None,
        },
        vision_config={
            "depth": size.vision_depth,
            "hidden_size": size.vision_hidden,
            "intermediate_size": size.vision_inner,
            "num_heads": size.vision_heads,
            "out_hidden_size": size.hidden,
            "patch_size": patch,
            "spatial_merge_size": MERGE,
            "temporal_patch_size": TEMPORAL,
            "num_position_embeddings": 2304,
            "deepstack_visual_indexes": list(size.deepstack),
        },
        image_token_id=token("<|image_pad|>"),
        video_token_id=token("<|video_pad|>"),
        vision_start_token_id=token("<|vision_start|>"),
        vision_end_token_id=token("<|vision_end|>"),
        tie_word_embeddings=size.tied,
    )


def write_policy(
    folder: Path,
    size: Size,
    protocol: LatentProtocol,
    device: torch.device,
    dtype: torch.dtype,
) -> Any:
    """Save a random policy of that size and its processor to `folder`; returns the processor.

    The weights are made on `device`, where large ones take seconds instead of minutes.
    """
    # Not before `rl` is imported, which makes torchvision's CUDA build importable.
    from transformers import Qwen3VLForConditionalGeneration

    processor = tiny_processor()
    config = config_of(size)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as plain:
        with device:
            model: Any = Qwen3VLForConditionalGeneration(config)
        model.generation_config.eos_token_id = processor.tokenizer.eos_token_id
        model.to(dtype).save_pretrained(plain)
        del model
        if device.type == "cuda":
            torch.cuda.empty_cache()  # others need the room
        make_policy(plain, processor, protocol, dtype=dtype).save_pretrained(folder)
    processor.save_pretrained(folder)
    return processor

"""Tiny models, processors and clips, built from nothing: what the tests run the real code on.

Three families with the real transformers classes: ``qwen3_vl``, ``qwen2_5_vl`` and ``qwen3_5``.
Patches are 4 pixels and merged 2x2 over 2 frames, so a 16x16 frame pair is 4 video tokens. Frames
from 8x8 to 32x32 whose sides are multiples of 8 are not resized.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import av
import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen3_5Config,
    Qwen3_5ForConditionalGeneration,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)
from transformers.models.qwen2_vl.video_processing_qwen2_vl import Qwen2VLVideoProcessor

Family = Literal["qwen3_vl", "qwen2_5_vl", "qwen3_5"]
FAMILIES: tuple[Family, ...] = get_args(Family)

PATCH, MERGE, TEMPORAL = 4, 2, 2
SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
CHAT_TEMPLATE = (
    r"{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}"
    r"{%- if m.content is string -%}{{ m.content }}"
    r"{%- else -%}{%- for part in m.content -%}"
    r"{%- if part.type == 'video' -%}<|vision_start|><|video_pad|><|vision_end|>"
    r"{%- elif part.type == 'image' -%}<|vision_start|><|image_pad|><|vision_end|>"
    r"{%- else -%}{{ part.text }}{%- endif -%}{%- endfor -%}{%- endif -%}"
    r"{{ '<|im_end|>\n' }}{%- endfor -%}"
    r"{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


def tiny_tokenizer(extra_tokens: Sequence[str] = ()) -> PreTrainedTokenizerFast:
    """Byte-level BPE without merges: one token a byte, the Qwen markers, and `extra_tokens` as
    special tokens.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE(vocab={c: i for i, c in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(
        [AddedToken(t, special=True) for t in (*SPECIAL_TOKENS, *extra_tokens)]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<|endoftext|>",
        eos_token="<|im_end|>",
        model_max_length=4096,
        padding_side="left",
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_processor(family: Family = "qwen3_vl", extra_tokens: Sequence[str] = ()) -> Any:
    """The family's real processor around `tiny_tokenizer`."""
    patches: dict[str, Any] = {
        "patch_size": PATCH,
        "merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
    }
    # Qwen2.5-VL bounds the pixels of a frame, Qwen3-VL those of a clip.
    frames = 1 if family == "qwen2_5_vl" else 16
    video_class = Qwen2VLVideoProcessor if family == "qwen2_5_vl" else Qwen3VLVideoProcessor
    processor_class = Qwen2_5_VLProcessor if family == "qwen2_5_vl" else Qwen3VLProcessor
    return processor_class(
        image_processor=Qwen2VLImageProcessor(
            size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32}, **patches
        ),
        video_processor=video_class(
            size={"shortest_edge": 8 * 8, "longest_edge": 32 * 32 * frames},
            cap_pixels_per_frame=False,
            **patches,
        ),
        tokenizer=tiny_tokenizer(extra_tokens),
        chat_template=CHAT_TEMPLATE,
    )


def tiny_model(
    family: Family = "qwen3_vl",
    hidden: int = 32,
    layers: int = 2,
    vocab: int | None = None,
    seed: int = 0,
) -> PreTrainedModel:
    """A random model of `family`: fp32, in eval mode, with weights large enough that logits vary.

    `vocab` is the number of token ids, by default those of `tiny_tokenizer()`. `hidden` is a
    multiple of 32, and attention heads are 32 wide, the least that vLLM takes on CPU. The layers of
    qwen3_5 alternate between linear and full attention, so it needs at least two.
    """
    tokenizer = tiny_tokenizer()
    token = tokenizer.convert_tokens_to_ids
    rope: dict[str, Any] = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [8, 4, 4]}
    text: dict[str, Any] = {
        "vocab_size": vocab or len(tokenizer),
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 4096,
        "initializer_range": 0.1,
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": None,
    }
    vision: dict[str, Any] = {
        "depth": 2,
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden,
        "num_heads": 4,
        "out_hidden_size": hidden,
        "patch_size": PATCH,
        "spatial_merge_size": MERGE,
        "temporal_patch_size": TEMPORAL,
        "initializer_range": 0.1,
    }
    shared: dict[str, Any] = {
        "image_token_id": token("<|image_pad|>"),
        "video_token_id": token("<|video_pad|>"),
        "vision_start_token_id": token("<|vision_start|>"),
        "vision_end_token_id": token("<|vision_end|>"),
        "tie_word_embeddings": False,
    }
    torch.manual_seed(seed)
    if family == "qwen3_vl":
        text |= {"head_dim": 32, "rope_parameters": rope | {"mrope_interleaved": True}}
        vision |= {"num_position_embeddings": 64, "deepstack_visual_indexes": [0]}
        model = Qwen3VLForConditionalGeneration(
            Qwen3VLConfig(text_config=text, vision_config=vision, **shared)
        )
    elif family == "qwen3_5":
        if layers < 2:
            raise ValueError(
                "a tiny qwen3_5 needs 2 layers: one with linear and one with full attention"
            )
        kinds = [("linear_attention", "full_attention")[i % 2] for i in range(layers)]
        text |= {
            "head_dim": 32,
            "rope_parameters": rope | {"mrope_interleaved": True, "partial_rotary_factor": 1.0},
            "layer_types": kinds,
            "linear_key_head_dim": 128,
            "linear_value_head_dim": 128,
            "linear_num_key_heads": 2,
            "linear_num_value_heads": 4,
        }
        vision |= {"num_position_embeddings": 64}
        model = Qwen3_5ForConditionalGeneration(
            Qwen3_5Config(text_config=text, vision_config=vision, **shared)
        )
    else:
        heads = hidden // 32  # this family derives the width of a head from their number
        text |= {
            "num_attention_heads": heads,
            "num_key_value_heads": heads,
            "rope_parameters": rope,
        }
        vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1]}
        model = Qwen2_5_VLForConditionalGeneration(
            Qwen2_5_VLConfig(text_config=text, vision_config=vision, **shared)
        )
    assert model.generation_config is not None
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    return model.eval()


def save_tiny_checkpoint(
    directory: str | Path,
    family: Family = "qwen3_vl",
    extra_tokens: Sequence[str] = (),
    **model: Any,
) -> Path:
    """Write model and processor as `from_pretrained` expects them; `model` goes to `tiny_model`."""
    processor = tiny_processor(family, extra_tokens)
    model.setdefault("vocab", len(processor.tokenizer))
    tiny_model(family, **model).save_pretrained(directory)
    processor.save_pretrained(directory)
    return Path(directory)


def write_clip(path: str | Path, frames: np.ndarray, fps: int = 8) -> Path:
    """Write `frames` uint8 [T, H, W, 3] (H and W even) as an MP4 of nearly the same pixels; returns
    its path.
    """
    with av.open(str(path), mode="w") as container:
        stream = container.add_stream("mpeg4", rate=fps)
        stream.width, stream.height, stream.pix_fmt = frames.shape[2], frames.shape[1], "yuv420p"
        stream.codec_context.qmin = stream.codec_context.qmax = 1
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode())
    return Path(path)


def moving_square(length: int, size: int = 16, seed: int = 0) -> np.ndarray:
    """Frames uint8 [length, size, size, 3]: a bright square that wanders over a dark ground."""
    rng = np.random.default_rng(seed)
    ground, colour = rng.integers(0, 80, 3), rng.integers(150, 255, 3)
    row, column = rng.integers(0, size, 2)
    frames = np.empty((length, size, size, 3), np.uint8)
    for t in range(length):
        frames[t] = ground
        rows, columns = (
            (row + t + np.arange(size // 4)) % size,
            (column + 2 * t + np.arange(size // 4)) % size,
        )
        frames[t][np.ix_(rows, columns)] = colour
    return frames

"""A real Qwen3-VL of about 0.3 M parameters, made from nothing: weights, processor, tokenizer, chat
template.

The sizes and the unusually wide initialisation are those with which the quickstart world is learned
in minutes on a CPU; with transformers' default of 0.02 the tiny model hardly starts to learn.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import (
    GenerationConfig,
    PreTrainedTokenizerFast,
    Qwen2VLImageProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from recipes.quickstart import texts
from recipes.quickstart.tiles import TILES
from recipes.quickstart.worlds import World

PAD, START, END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
VISION_START, VISION_END = "<|vision_start|>", "<|vision_end|>"
IMAGE, VIDEO = "<|image_pad|>", "<|video_pad|>"
SPECIAL_TOKENS = (PAD, START, END, VISION_START, VISION_END, IMAGE, VIDEO)

PATCH: dict[str, Any] = {
    "patch_size": 4,
    "merge_size": 2,
    "temporal_patch_size": TILES.frames_per_state,
}  # one merged patch = one tile
MAX_TOKENS = 1024
SPARE_ROWS = (
    8  # at least so many embeddings without a token, for the latent tokens that a policy adds
)

# "user\n", "<0.2" (a time stamp), or a word with the space before it and all that clings to it.
PIECES = rf"(?:{'|'.join(texts.ROLES)})\n|<\d+\.\d| ?[^\s<>]+>?|\s+|[<>]"

CHAT_TEMPLATE = """\
{%- for message in messages -%}
    {{- '<|im_start|>' + message.role + '\\n' -}}
    {%- if message.content is string -%}
        {{- message.content -}}
    {%- else -%}
        {%- for part in message.content -%}
            {%- if part.type == 'video' -%}
                {{- '<|vision_start|><|video_pad|><|vision_end|>' -}}
            {%- elif part.type == 'image' -%}
                {{- '<|vision_start|><|image_pad|><|vision_end|>' -}}
            {%- elif part.type == 'text' -%}
                {{- part.text -}}
            {%- endif -%}
        {%- endfor -%}
    {%- endif -%}
    {{- '<|im_end|>\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\\n' -}}
{%- endif -%}
"""


def make_checkpoint(folder: str | Path, seed: int, world: World = TILES) -> None:
    """Save a freshly initialised tiny Qwen3-VL and its processor for `world` to `folder`."""
    processor = make_processor(world)
    make_model(processor.tokenizer, seed, world).save_pretrained(folder)
    processor.save_pretrained(folder)


def make_tokenizer(world: World = TILES) -> PreTrainedTokenizerFast:
    """Byte-level BPE, lossless for any text, with one token for each word of `world`."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PIECES), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    # No limit that matters: merging goes on until each word of the corpus is whole.
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        min_frequency=1,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(world.corpus(), trainer)
    core.add_special_tokens(
        [AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS]
    )
    # Answer tags are ordinary tokens: decoding without special tokens must keep them.
    core.add_tokens([AddedToken(tag, normalized=False) for tag in world.tags])
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        pad_token=PAD,
        eos_token=END,
        model_max_length=MAX_TOKENS,
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )


def make_processor(world: World = TILES) -> Qwen3VLProcessor:
    """A Qwen3-VL processor that takes `world`'s frames as they are, without resizing."""
    frame = world.frame_px**2
    scaling: dict[str, Any] = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
    image = Qwen2VLImageProcessor(
        size={"shortest_edge": frame, "longest_edge": frame}, **scaling, **PATCH
    )
    video = Qwen3VLVideoProcessor(
        # Limits on the pixels of a whole clip: from a single frame pair to all of the world's
        # frames.
        size={
            "shortest_edge": world.frames_per_state * frame,
            "longest_edge": world.states * world.frames_per_state * frame,
        },
        cap_pixels_per_frame=False,
        fps=world.fps,
        min_frames=world.frames_per_state,
        max_frames=world.states * world.frames_per_state,
        **scaling,
        **PATCH,
    )
    return Qwen3VLProcessor(
        image_processor=image,
        tokenizer=make_tokenizer(world),
        video_processor=video,
        chat_template=CHAT_TEMPLATE,
    )


def make_config(tokenizer: PreTrainedTokenizerFast, world: World = TILES) -> Qwen3VLConfig:
    """3 text layers of width 64 and one vision layer of width 48."""
    ids = {token: tokenizer.added_tokens_encoder[token] for token in SPECIAL_TOKENS}
    hidden, spread = 64, 0.08
    rows = -(-(len(tokenizer) + SPARE_ROWS) // 32) * 32
    return Qwen3VLConfig(
        text_config={
            "vocab_size": rows,
            "hidden_size": hidden,
            "intermediate_size": 3 * hidden,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "num_key_value_heads": 4,
            "head_dim": 32,
            "max_position_embeddings": MAX_TOKENS,
            "rope_parameters": {
                "rope_type": "default",
                "rope_theta": 1e4,
                "mrope_section": [8, 4, 4],  # time, height, width; must sum to head_dim / 2
                "mrope_interleaved": True,
            },
            "initializer_range": spread,
            "pad_token_id": tokenizer.pad_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "tie_word_embeddings": False,
        },
        vision_config={
            "depth": 1,
            "hidden_size": 48,
            "intermediate_size": 96,
            "num_heads": 4,
            "out_hidden_size": hidden,
            "patch_size": PATCH["patch_size"],
            "spatial_merge_size": PATCH["merge_size"],
            "temporal_patch_size": PATCH["temporal_patch_size"],
            "num_position_embeddings": (world.frame_px // PATCH["patch_size"]) ** 2,
            "deepstack_visual_indexes": [],
            "initializer_range": spread,
        },
        image_token_id=ids[IMAGE],
        video_token_id=ids[VIDEO],
        vision_start_token_id=ids[VISION_START],
        vision_end_token_id=ids[VISION_END],
        tie_word_embeddings=False,
    )


def make_model(
    tokenizer: PreTrainedTokenizerFast, seed: int, world: World = TILES
) -> Qwen3VLForConditionalGeneration:
    """The model with weights drawn from `seed`; the caller's random state is left alone."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = Qwen3VLForConditionalGeneration(make_config(tokenizer, world))
        with torch.no_grad():
            # Places and words must differ from the start: at 0.08 all embeddings look alike to the
            # first layer.
            model.model.visual.pos_embed.weight.normal_(0, 0.5)
            model.model.language_model.embed_tokens.weight.normal_(0, 0.5)
    model.generation_config = GenerationConfig(
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id
    )
    return model.eval()

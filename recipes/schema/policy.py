"""The policy and the data of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, ValidationInfo, field_validator

from recipes.schema.base import (
    Count,
    DataSource,
    NotNegative,
    RecipePath,
    Section,
    local_or_hub,
)
from rl.data.broken import BadVideos
from rl.data.frames import Placement
from rl.data.video import TIMEOUT_S
from rl.policy.heads import HeadKind
from rl.policy.protocol import Density


class HeadSection(Section):
    kind: HeadKind = Field(default="identity", description="What maps hidden states to latents.")
    width: Count | None = Field(
        default=None, description="Inner width, in units of the hidden state; null: the kind's own."
    )


class PolicySection(Section):
    """The model to train, and what of its latent protocol the run changes."""

    path: str = Field(
        description="A folder with a policy or a plain video model, or a model's name on the Hub."
    )
    min_length: Count | None = Field(
        default=None, description="Least latents in a span; null: the policy's."
    )
    max_length: Count | None = Field(
        default=None, description="Most latents in a span; null: the policy's."
    )
    max_spans: Count | None = Field(
        default=None, description="Most spans in a completion; null: the policy's."
    )
    noise_scale: NotNegative | None = Field(
        default=None,
        description="Noise of a latent relative to its mean's norm; null: the policy's.",
    )
    density: Density | None = Field(
        default=None, description="Distribution of a latent: gaussian or vmf; null: the policy's."
    )
    head: HeadSection | None = Field(
        default=None, description="Latent head of a plain model; a policy keeps the one it has."
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="What the trainer holds its weights in; on a GPU it computes in bfloat16.",
    )

    @field_validator("path")
    @classmethod
    def _beside_recipe_or_on_hub(cls, path: str, info: ValidationInfo) -> str:
        return local_or_hub(path, info)


class FramesSection(Section):
    """Which frames of a clip are shown (see `rl.data.frames.FrameRule`)."""

    count: Count = Field(default=16, description="So many frames, with `fps` at most so many.")
    fps: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description="Frames a second of the clip (Future-L1: 2); null: `count`, however long.",
    )
    at: Placement = Field(
        default="ends",
        description="Spread evenly with the first and the last frame among them (ends), or in the "
        "middles of equal parts (middle).",
    )


class ClipSection(Section):
    """Where the videos of rows are, and how they are shown."""

    video_root: RecipePath | None = Field(
        default=None,
        description="Folder that video paths start from; null: that of their manifest.",
    )
    frames: FramesSection = Field(
        default=FramesSection(), description="Which frames are shown of rows that list none."
    )
    system_prompt: str | None = Field(default=None, description="Opens every prompt; null: none.")
    bad_videos: BadVideos = Field(
        default="stop",
        description="When a video cannot be read: stop the run, skip its row, or replace it by "
        "another. Rows left out are listed in skipped.jsonl.",
    )
    decode_timeout_s: Annotated[float, Field(gt=0)] = Field(
        default=TIMEOUT_S, description="Seconds that a reader may take over one video."
    )
    media_cache_gb: Annotated[float, Field(gt=0)] = Field(
        default=16.0,
        description="Memory for processed clips; one of 16 frames at 448x448 takes about 0.05 GB.",
    )


class DataSection(ClipSection):
    """Data sets (see `rl.data.formats`) and how their videos are shown."""

    train: DataSource = Field(
        description="What to train on: a manifest or another file with rows, a folder of them, or "
        "a data set's name on the Hub; either may end in :split."
    )
    validation: DataSource | None = Field(
        default=None, description="Rows for greedy accuracy during training."
    )
    format: str = Field(
        default="auto", description="How their rows are written; auto: told by their columns."
    )
    columns: dict[str, str] | None = Field(
        default=None,
        description="For rows of no known format: our columns' names to theirs.",
    )
    validation_limit: Count | None = Field(
        default=None, description="Use its first so many rows; null: all."
    )
    limit: Count | None = Field(
        default=None, description="Train on the manifest's first so many rows; null: all."
    )

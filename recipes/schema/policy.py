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


class InjectionSection(Section):
    """Latents look at the video before they are fed (VideoLatent-style; `rl.policy.injection`)."""

    heads: Count = Field(default=8, description="Heads of attention over the video's tokens.")
    width: Count | None = Field(
        default=None, description="Of all heads together; null: that of the hidden state."
    )


class DepthSection(Section):
    """Hard tokens take a second pass through some layers (`rl.policy.depth`)."""

    layers: list[Annotated[int, Field(ge=0)]] | None = Field(
        default=None,
        description="Layers that may give one, from 0; null: all odd ones with attention (Vedas).",
    )
    budget: Annotated[float, Field(gt=0.0, lt=1.0)] = Field(
        default=0.25, description="Share of tokens that should take it."
    )
    router: Literal["token", "published"] = Field(
        default="token",
        description="token: each by its own state (ours). published: the best of a whole sequence, "
        "a baseline that trains on given sequences and cannot generate.",
    )
    tokens: Count = Field(
        default=32, description="Tokens of a sequence, for the published router (Vedas)."
    )


class VisualReplaySection(Section):
    """Video tokens that matter are shown again before each latent (`rl.policy.visual_replay`)."""

    tokens: Count = Field(default=32, description="How many before a latent (Vedas).")
    window: Annotated[list[Count], Field(min_length=3, max_length=3)] = Field(
        default=[1, 4, 4],
        description="Merged tokens in time, height and width of the region that they are pulled "
        "to (Vedas: 4x4 of a picture).",
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
    injection: InjectionSection | None = Field(
        default=None, description="Latent injection; null: what the policy has."
    )
    depth: DepthSection | None = Field(
        default=None, description="Routing depth scaling; null: what the policy has."
    )
    visual_replay: VisualReplaySection | None = Field(
        default=None, description="Visual replay; null: what the policy has."
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

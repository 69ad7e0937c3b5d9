"""The policy and the data of a recipe."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, ValidationInfo, field_validator

from recipes.schema.base import Count, NotNegative, RecipePath, Section, local_or_hub
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


class DataSection(Section):
    """Manifests (see `rl.data.manifest`) and how their videos are shown."""

    train: RecipePath = Field(description="Manifest to train on.")
    validation: RecipePath | None = Field(
        default=None, description="Manifest for greedy accuracy during training."
    )
    validation_limit: Count | None = Field(
        default=None, description="Use its first so many rows; null: all."
    )
    video_root: RecipePath | None = Field(
        default=None,
        description="Folder that video paths start from; null: that of their manifest.",
    )
    default_frames: Count = Field(
        default=16, description="Frames shown of rows that list none (Future-L1: at most 16)."
    )
    limit: Count | None = Field(
        default=None, description="Train on the manifest's first so many rows; null: all."
    )
    system_prompt: str | None = Field(default=None, description="Opens every prompt; null: none.")
    media_cache: Count = Field(
        default=512,
        description="Processed clips kept in memory; one of 16 frames at 448x448 takes about "
        "50 MB.",
    )

"""The recipes: one class a stage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.schema.base import Count, DataSource, RecipePath, Section
from recipes.schema.policy import DataSection, PolicySection
from recipes.schema.rewards import RewardSection, ScoringSection
from recipes.schema.rollouts import ANY_WORKERS, RolloutsSection
from recipes.schema.training import LADAPOSection, SFTSection
from rewards.registry import SERVING_OPTIONS
from rl.policy.protocol import Imagine


class EvaluationSection(Section):
    """Greedy accuracy of the trained policy, at the end of the run."""

    manifest: DataSource = Field(
        description="What to evaluate on: a file with rows, a folder, or a name on the Hub."
    )
    format: str = Field(
        default="auto", description="How its rows are written; auto: told by their columns."
    )
    columns: dict[str, str] | None = Field(
        default=None, description="For rows of no known format: our columns' names to theirs."
    )
    video_root: RecipePath | None = Field(
        default=None, description="Folder its video paths start from; null: data.video_root."
    )
    modes: Annotated[list[Imagine], Field(min_length=1)] = Field(
        default=["free", "always", "never"], description="Imagining left free, forced, forbidden."
    )
    limit: Count | None = Field(default=None, description="Its first so many rows; null: all.")
    by: str | None = Field(
        default=None, description="Manifest column to break the figures down by."
    )


class RecipeBase(Section):
    """What the recipes of all stages say."""

    # What may change between a run and its resumption without changing what comes out.
    HARMLESS: ClassVar[frozenset[str]] = frozenset({"name", "output"})

    stage: str
    name: str = Field(default="run", description="What the run is called in messages.")
    seed: int = Field(default=0, description="Of everything random in the run.")
    output: RecipePath = Field(description="Run folder: all that the run writes.")
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where to compute; auto: on GPUs where there are any."
    )
    policy: PolicySection


class _Training(RecipeBase):
    HARMLESS: ClassVar[frozenset[str]] = RecipeBase.HARMLESS | {
        "evaluation",
        "train.save_every",
        "train.log_every",
        "train.keep_checkpoints",
        "data.media_cache_gb",
        "data.decode_timeout_s",
    }

    data: DataSection
    evaluation: EvaluationSection | None = Field(default=None, description="Null: none.")


class LADAPORecipe(_Training):
    """Reinforcement learning with LA-DAPO."""

    HARMLESS: ClassVar[frozenset[str]] = _Training.HARMLESS | {
        *ANY_WORKERS,
        "rewards.*.timeout_s",
        "rewards.*.memory_mb",
        "rewards.*.gpus",
        *(f"rewards.*.options.{name}" for name in SERVING_OPTIONS),
        "scoring.max_invalid",
        "train.record_every",
        "train.record_latents_every",
    }

    stage: Literal["la_dapo"] = Field(description="Selects this stage.")
    rollouts: RolloutsSection = Field(
        default=RolloutsSection(), description="The workers that sample."
    )
    rewards: Annotated[list[RewardSection], Field(min_length=1)] = Field(
        default=[
            RewardSection(use=name)
            for name in ("accuracy", "format", "outcome_contrastive", "temporal_diversity")
        ],
        description="What is rewarded; by default accuracy, format, outcome_contrastive and "
        "temporal_diversity, with LA-DAPO's weights.",
    )
    scoring: ScoringSection = Field(
        default=ScoringSection(), description="What becomes of the rewards."
    )
    train: LADAPOSection = Field(default=LADAPOSection(), description="LA-DAPO's settings.")


class SFTRecipe(_Training):
    """Supervised fine-tuning with latent alignment."""

    HARMLESS: ClassVar[frozenset[str]] = _Training.HARMLESS | {"train.target_cache"}

    stage: Literal["sft"] = Field(description="Selects this stage.")
    train: SFTSection = Field(default=SFTSection(), description="SFT's settings.")

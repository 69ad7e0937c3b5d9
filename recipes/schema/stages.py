"""The recipes: one class a stage."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field

from recipes.schema.base import Count, RecipePath, Section
from recipes.schema.policy import DataSection, PolicySection
from recipes.schema.rewards import RewardSection, ScoringSection
from recipes.schema.rollouts import RolloutsSection
from recipes.schema.training import LADAPOSection, SFTSection
from rewards.registry import SERVING_OPTIONS
from rl.policy.protocol import Imagine


class EvaluationSection(Section):
    """Greedy accuracy of the trained policy, at the end of the run."""

    manifest: RecipePath = Field(description="Manifest to evaluate on.")
    modes: Annotated[list[Imagine], Field(min_length=1)] = Field(
        default=["free", "always", "never"], description="Imagining left free, forced, forbidden."
    )
    limit: Count | None = Field(default=None, description="Its first so many rows; null: all.")
    by: str | None = Field(
        default=None, description="Manifest column to break the figures down by."
    )


class RecipeBase(Section):
    """What the recipes of all stages say."""

    stage: str
    name: str = Field(default="run", description="What the run is called in messages.")
    seed: int = Field(default=0, description="Of everything random in the run.")
    output: RecipePath = Field(description="Run folder: all that the run writes.")
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where to compute; auto: on GPUs where there are any."
    )
    policy: PolicySection


class _Training(RecipeBase):
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"name", "output", "evaluation", "train.save_every", "train.log_every"}
        | {"train.keep_checkpoints", "data.media_cache"}
    )

    data: DataSection
    evaluation: EvaluationSection | None = Field(default=None, description="Null: none.")


class LADAPORecipe(_Training):
    """Reinforcement learning with LA-DAPO."""

    # What may change between a run and its resumption without changing what is learned.
    HARMLESS: ClassVar[frozenset[str]] = _Training.HARMLESS | {
        "rollouts.engine",
        "rollouts.vllm",
        "rollouts.workers",
        "rollouts.max_batch_size",
        "rollouts.ray",
        "rollouts.cpus_per_worker",
        "rollouts.gpus_per_worker",
        "rollouts.timeout_s",
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

    stage: Literal["sft"] = Field(description="Selects this stage.")
    train: SFTSection = Field(default=SFTSection(), description="SFT's settings.")

"""The settings of the training stages."""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from recipes.schema.base import (
    Count,
    NotNegative,
    Positive,
    RecipePath,
    Schedule,
    Section,
    Share,
)
from rl.objective import Objective, Reduction
from rl.policy.protocol import Imagine


class LoraSection(Section):
    """Low-rank adapters in the place of full training."""

    r: Count = Field(default=16, description="Rank.")
    alpha: Positive = Field(default=32.0, description="Scale: adapters count alpha/r times.")
    target_modules: list[str] | str = Field(
        default=["q_proj", "k_proj", "v_proj", "o_proj"],
        description="Layers to adapt, by the ends of their names, or 'all-linear'.",
    )


class TrainSection(Section):
    """What all stages have in common. A step is one update of the weights."""

    # Which argument of the trainer's config each key becomes, where the names differ.
    RENAMED: ClassVar[dict[str, str]] = {
        "warmup": "warmup_steps",
        "schedule": "lr_scheduler_type",
        "save_every": "save_steps",
        "keep_checkpoints": "save_total_limit",
        "log_every": "logging_steps",
    }
    # Keys that are no argument of the trainer's config.
    APART: ClassVar[frozenset[str]] = frozenset({"micro_batch", "validate_every", "lora", "extra"})

    max_steps: Count
    learning_rate: Positive
    warmup: NotNegative
    schedule: Schedule
    weight_decay: NotNegative
    max_grad_norm: Positive = Field(
        default=1.0, description="Gradients are scaled down to this norm."
    )
    micro_batch: Count = Field(
        default=8, description="At most so many rows in one forward pass; the rest accumulates."
    )
    gradient_checkpointing: bool = Field(
        default=True, description="Trade a second forward pass for memory."
    )
    lora: LoraSection | None = Field(default=None, description="Train adapters; null: all weights.")
    save_every: Count = Field(default=20, description="Steps between checkpoints.")
    keep_checkpoints: Annotated[int, Field(ge=2)] | None = Field(
        default=2,
        description="Older ones are deleted; at least 2, as that happens before the newest is "
        "whole; null: none.",
    )
    log_every: Count = Field(default=1, description="Steps between lines of metrics.jsonl.")
    validate_every: Count | None = Field(
        default=None,
        description="Steps between validations, which also run first and last; null: none.",
    )
    extra: dict[str, Any] = Field(
        default={}, description="Further arguments of the trainer's config, passed on as they are."
    )

    @property
    def rows_per_step(self) -> int:
        """Rows (trajectories, in RL) that one update sees."""
        raise NotImplementedError

    @property
    def rows_per_pass(self) -> int:
        """Rows in a forward pass: the largest number up to `micro_batch` that divides a step's
        rows.
        """
        top = min(self.micro_batch, self.rows_per_step)
        return next(n for n in range(top, 0, -1) if self.rows_per_step % n == 0)

    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the trainer's config, without `extra`."""
        values = {k: v for k, v in self.model_dump().items() if k not in self.APART}
        named = {self.RENAMED.get(key, key): value for key, value in values.items()}
        return named | {
            "per_device_train_batch_size": self.rows_per_pass,
            "gradient_accumulation_steps": self.rows_per_step // self.rows_per_pass,
        }


class LADAPOSection(TrainSection):
    """LA-DAPO (`rl.la_dapo`). One step samples, filters and learns once."""

    RENAMED: ClassVar[dict[str, str]] = TrainSection.RENAMED | {"group_size": "num_generations"}
    APART: ClassVar[frozenset[str]] = TrainSection.APART | {
        "prompts_per_step",
        "record_every",
        "record_latents_every",
    }

    objective: Objective = Field(
        default="exact",
        description="exact: ours. published: a baseline, what the released code of Future-L1 "
        "computes, for comparison; needs policy.noise_scale and both latent weights at 0.",
    )
    published_kappa: Positive = Field(
        default=0.01, description="κ of the published objective (Future-L1)."
    )
    max_steps: Count = Field(
        default=312, description="Updates (Future-L1: 20K samples, 64 a step)."
    )
    learning_rate: Positive = Field(default=1e-6, description="AdamW's (Future-L1).")
    warmup: NotNegative = Field(
        default=0, description="Steps, or a share of them below 1 (Future-L1: 0)."
    )
    schedule: Schedule = Field(default="constant_with_warmup", description="Of the learning rate.")
    weight_decay: NotNegative = Field(default=0.01, description="AdamW's weight decay (Future-L1).")
    prompts_per_step: Count = Field(default=64, description="Groups a step (Future-L1).")
    group_size: Annotated[int, Field(ge=2)] = Field(
        default=8, description="G, trajectories of one prompt (Future-L1)."
    )
    max_completion_length: Count = Field(
        default=2048, description="Most tokens and latents in a completion (Future-L1)."
    )
    temperature: Positive = Field(
        default=0.9, description="Of sampling and of log-probs (Future-L1)."
    )
    top_p: Annotated[float, Field(gt=0.0, le=1.0)] = Field(
        default=1.0,
        description="Free tokens come from the fewest whose probability reaches this (Future-L1: "
        "0.99); 1: from all. Log-probs follow.",
    )
    top_k: Annotated[int, Field(ge=0)] = Field(
        default=0,
        description="Free tokens come from the so many likeliest, before top_p; 0: from all.",
    )
    imagine: Imagine = Field(
        default="free",
        description="In sampling and validation, latent spans are free, always there or never.",
    )
    epsilon: Share = Field(
        default=0.2, description="Lower clip of the token ratio (DAPO, Future-L1)."
    )
    epsilon_high: Positive = Field(default=0.28, description="Upper clip of it (DAPO, Future-L1).")
    beta: NotNegative = Field(
        default=0.0,
        description="KL of tokens to the starting policy (Future-L1: 0.01; takes a second copy).",
    )
    latent_alpha: NotNegative = Field(
        default=0.5,
        description="α, weight of the latent term (Future-L1's DePO mode); needs noise.",
    )
    latent_epsilon: Share = Field(
        default=0.1, description="Lower clip of the latent ratio (Future-L1)."
    )
    latent_epsilon_high: Positive | None = Field(
        default=None, description="Upper clip of it; null: the same as the lower."
    )
    latent_reduction: Reduction = Field(
        default="sqrt_dim",
        description="How log-densities over the hidden width enter the ratio (ours).",
    )
    latent_beta: NotNegative = Field(
        default=0.0, description="KL of latents to the starting policy (takes a second copy)."
    )
    depth_weight: NotNegative = Field(
        default=1.0,
        description="With policy.depth, weight of (share - budget)², share that of second passes "
        "in a forward pass (ours).",
    )
    filter_low: Share = Field(
        default=0.1, description="Train on groups with accuracy above this (Future-L1)."
    )
    filter_high: Share = Field(
        default=0.9, description="Train on groups with accuracy below this (Future-L1)."
    )
    freeze_vision: bool = Field(
        default=False, description="Leave the vision tower as it is (Future-L1: no)."
    )
    max_refills: Annotated[int, Field(ge=0)] = Field(
        default=20, description="Times a step samples new prompts for dropped groups (Future-L1)."
    )
    filter_groups: bool = Field(
        default=True,
        description="Drop groups by filter_low and filter_high; false: all are trained on.",
    )
    max_tokens_per_microbatch: Count | None = Field(
        default=None,
        description="Most tokens in one forward pass, a group's prompt counted once; takes the "
        "place of micro_batch. null: passes of micro_batch rows.",
    )
    max_mismatch: Positive | None = Field(
        default=None,
        description="Stop when replay differs from the sampler by more (log-prob); null: go on.",
    )
    record_every: Count | None = Field(
        default=1,
        description="Steps between records of all trajectories with their rewards; null: none.",
    )
    record_latents_every: Count | None = Field(
        default=20,
        description="Steps between records that hold latents too; null: none.",
    )

    @property
    def rows_per_step(self) -> int:
        return self.prompts_per_step * self.group_size

    @property
    def rows_per_pass(self) -> int:
        """As elsewhere, but whole groups where `micro_batch` takes one: a group's rows share their
        prompt. All rows of a step where a budget of tokens cuts them into passes.
        """
        if self.max_tokens_per_microbatch is not None:
            return self.rows_per_step
        groups = min(self.micro_batch // self.group_size, self.prompts_per_step)
        whole = (n for n in range(groups, 0, -1) if self.prompts_per_step % n == 0)
        return next((n * self.group_size for n in whole), super().rows_per_pass)


class ImagineShare(Section):
    """A share for each value of a manifest column."""

    column: str = Field(description="Name of the column.")
    shares: dict[str, Share] = Field(description="Probability of latent spans, by the value.")


class CurriculumSection(Section):
    """Chains of thought that become latents stage by stage (`rl.sft.curriculum`)."""

    steps_per_stage: Count = Field(
        description="Updates in each stage (epochs elsewhere: Coconut 3, visual-enhanced depth "
        "scaling 4)."
    )
    max_stage: Annotated[int, Field(ge=0)] = Field(
        default=5,
        description="The last stage, in which so many steps are latents (visual-enhanced depth "
        "scaling; Coconut: 3). Stage 0, the first, is all text; 0: there is no other.",
    )
    latents_per_step: Count = Field(
        default=1,
        description="Latents for each step (visual-enhanced depth scaling; Coconut: 2).",
    )
    merge_steps: Count | None = Field(
        default=None,
        description="Join a row's steps into at most so many (visual-enhanced depth scaling: 3); "
        "null: as they are.",
    )
    mix: Share = Field(
        default=0.0,
        description="Probability that a row is taught at a stage drawn from all (Coconut's "
        "uniform_prob).",
    )
    reset_optimizer: bool = Field(
        default=False,
        description="Clear the optimizer's state at each new stage (Coconut); the learning rate's "
        "schedule goes on.",
    )
    pad_latents: bool = Field(
        default=False,
        description="Rows of fewer steps than the stage have as many latents as others (Coconut's "
        "pad_latent_to_max); false: as many as they have steps.",
    )


class SFTSection(TrainSection):
    """SFT with latent alignment (`rl.sft.trainer`)."""

    APART: ClassVar[frozenset[str]] = TrainSection.APART | {"batch_size", "max_completion_length"}

    max_steps: Count = Field(
        default=390, description="Updates (Future-L1: 50K samples, 128 a step)."
    )
    learning_rate: Positive = Field(default=1e-5, description="AdamW's (Future-L1).")
    warmup: NotNegative = Field(
        default=0.1, description="Steps, or a share of them below 1 (Future-L1)."
    )
    schedule: Schedule = Field(default="cosine", description="Of the learning rate (Future-L1).")
    weight_decay: NotNegative = Field(default=0.1, description="AdamW's weight decay (Future-L1).")
    batch_size: Count = Field(default=128, description="Rows a step (Future-L1).")
    latent_weight: NotNegative = Field(
        default=1.0,
        description="λ of the latent loss, divided by the targets' variance (Future-L1: 0.2, not).",
    )
    latent_loss: Literal["mse", "cosine"] = Field(
        default="mse", description="Its kind (Future-L1)."
    )
    latents: Literal["teacher", "own", "self_forcing"] = Field(
        default="teacher",
        description="Fed at the latents: their targets, or in a second stage what the policy makes "
        "there itself (Mirage; ours is a reconstruction); self_forcing: the same with a gradient "
        "through them.",
    )
    start_latents: Count | None = Field(
        default=None,
        description="Teach every row so many latents and then its answer, without targets "
        "(VideoLatent's first code: 12); null: what its imagine says. latent_weight counts for "
        "nothing then.",
    )
    curriculum: CurriculumSection | None = Field(
        default=None,
        description="Teach each row's chain of thought (column steps, or the lines of reasoning) "
        "as latents in front of the answer, one more step in each stage, without targets; null: "
        "what its imagine says. latent_weight counts for nothing then.",
    )
    tokens_per_patch: Count | Literal["all"] = Field(
        default=1,
        description="Latents for each frame pair of a span, each a mean of its tokens; all: every "
        "token, the frames shrunk to policy.max_length for a span (Future-L1: 32).",
    )
    target_cache: RecipePath | None = Field(
        default=None,
        description="File that keeps the targets for later runs on the same rows; null: none.",
    )
    imagine_share: Share | ImagineShare = Field(
        default=1.0,
        description="Probability that a row is taught with its latent spans; by a column of the "
        "manifest: {column: NAME, shares: {VALUE: PROBABILITY}}.",
    )
    bptt_steps: Count | None = Field(
        default=None,
        description="With self_forcing, gradients go back through the last so many latents of a "
        "row; null: through all.",
    )
    align_weight: NotNegative = Field(
        default=0.1,
        description="With self_forcing, λ_a of the pull of each latent to its segment of the video "
        "(VideoLatent; ours is a reconstruction).",
    )
    align_to: Literal["segments", "question"] = Field(
        default="segments",
        description="Means of the video's segments, or of what the question attends to in them.",
    )
    diversity_weight: NotNegative = Field(
        default=0.1,
        description="With self_forcing, λ_d of the mean cos² between the latents of a row "
        "(VideoLatent; ours is a reconstruction).",
    )
    replay_weight: NotNegative = Field(
        default=0.5,
        description="With policy.visual_replay, ρ of the pull of replayed tokens to their region "
        "(Vedas: 0.2 to 1).",
    )
    depth_weight: NotNegative = Field(
        default=1.0,
        description="With policy.depth, weight of (share - budget)², share that of second passes "
        "in a forward pass (ours).",
    )
    answer_template: str = Field(
        default="<answer>{answer}</answer>", description="The text taught after the spans."
    )
    reasoning_template: str = Field(
        default="<reason>{reasoning}</reason>",
        description="The text of a piece of reasoning around the spans.",
    )
    freeze_vision: bool = Field(
        default=True, description="Leave the vision tower as it is (Future-L1)."
    )
    start_at_mean: bool = Field(
        default=False,
        description="Set the bias of a linear head to the mean target before training.",
    )
    max_completion_length: Count = Field(
        default=2048,
        description="Most tokens and latents of an answer in validation and evaluation.",
    )

    @property
    def rows_per_step(self) -> int:
        return self.batch_size

    def arguments(self) -> dict[str, Any]:
        cache = self.target_cache
        return super().arguments() | {"target_cache": None if cache is None else str(cache)}

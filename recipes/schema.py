"""What a recipe may say: one typed model, and the one place of every default a recipe has.

A recipe is a YAML file that says a whole run. Relative paths in it are relative to the recipe file.
The defaults are Future-L1's published ones where there are any (arXiv 2606.05769,
OpenGVLab/Future-L1; marked "Future-L1" below); all of them reach the trainer explicitly, so that
what a trainer does by itself never matters to a recipe. `recipes.loading.load_recipe` reads one
from a file.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from rewards.registry import PATH_OPTIONS, SERVING_OPTIONS
from rl.objective import Reduction
from rl.policy.heads import HeadKind
from rl.policy.protocol import Density, Imagine

Count = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Schedule = Literal["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_min_lr"]
Positive = Annotated[float, Field(gt=0.0)]
NotNegative = Annotated[float, Field(ge=0.0)]


def _beside_recipe(path: Path, info: ValidationInfo) -> Path:
    folder = (info.context or {}).get("folder", Path.cwd())
    return Path(folder, path.expanduser()).resolve()


def _local_or_hub(path: str, info: ValidationInfo) -> str:
    local = _beside_recipe(Path(path), info)
    on_hub = path.count("/") == 1 and not path.startswith((".", "/", "~")) and "\\" not in path
    return path if on_hub and not local.exists() else str(local)


RecipePath = Annotated[Path, AfterValidator(_beside_recipe)]


class Section(BaseModel):
    """A part of a recipe: unknown keys are errors, values never change."""

    model_config = ConfigDict(extra="forbid", frozen=True)


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
        return _local_or_hub(path, info)


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


class RaySection(Section):
    address: str | None = Field(
        default=None,
        description="Ray to join, such as auto or head:6379; null: one is started on this machine.",
    )


class VLLMSection(Section):
    """How vLLM runs in a worker."""

    max_model_len: Count | None = Field(
        default=None,
        description="Most tokens of prompt and completion; null: what policy and memory allow.",
    )
    gpu_memory_utilization: Annotated[float, Field(gt=0.0, le=1.0)] | None = Field(
        default=None,
        description="Share of a GPU's memory for a worker; null: 0.4 of the part of it that the "
        "worker has, beside the trainer.",
    )
    kv_cache_gb: Positive | None = Field(
        default=None,
        description="KV cache of a worker; null: what is left of its share (CPU: 0.25).",
    )
    tensor_parallel_size: Count = Field(
        default=1, description="GPUs that one worker spreads the policy over."
    )
    max_num_batched_tokens: Count | None = Field(
        default=None, description="Tokens in one step of a worker; null: vLLM's choice."
    )
    enforce_eager: bool = Field(
        default=False, description="Without CUDA graphs and compilation; always so on a CPU."
    )
    media_cache_gb: NotNegative = Field(
        default=4.0, description="Processed clips that vLLM keeps, so that a group sends one."
    )
    enable_sleep: bool = Field(
        default=False,
        description="Leave the GPU's memory to the trainer between rollouts; not on a CPU.",
    )
    weight_transfer: Literal["files", "nccl"] = Field(
        default="files",
        description="How weights reach vLLM; nccl: from the trainer's GPU to others, no files.",
    )


class RolloutsSection(Section):
    """The workers that sample."""

    engine: Literal["auto", "transformers", "vllm"] = Field(
        default="auto",
        description="What samples; auto: vllm where it is installed and there is a GPU, else "
        "transformers.",
    )
    workers: Count = Field(
        default=1, description="Ray actors, each with its own copy of the policy."
    )
    max_batch_size: Count = Field(
        default=64,
        description="Trajectories a worker samples side by side; more suit vLLM on a GPU.",
    )
    dtype: Literal["auto", "float32", "bfloat16"] = Field(
        default="auto",
        description="Weights of the workers; auto: bfloat16 on a GPU, float32 on a CPU.",
    )
    ray: RaySection = Field(default=RaySection(), description="Where the workers run.")
    cpus_per_worker: Positive = Field(default=1.0, description="CPU cores reserved for a worker.")
    gpus_per_worker: NotNegative | None = Field(
        default=None,
        description="GPUs, or a share of one; null: those this command sees, shared out evenly.",
    )
    timeout_s: Positive = Field(
        default=600.0, description="Seconds until a call to a worker counts as failed."
    )
    vllm: VLLMSection = Field(
        default=VLLMSection(), description="Settings of vLLM, where it is what samples."
    )


class RewardSection(Section):
    """One reward; `foresight rewards list` shows which there are."""

    use: str = Field(
        description="A name such as accuracy, file.py:function, or package.module:function."
    )
    name: str | None = Field(
        default=None, description="What it is called in logs; null: as it is called where it is."
    )
    weight: float | None = Field(
        default=None, description="Weight in the sum; null: the reward's own, 0.1 for a user's."
    )
    options: dict[str, Any] = Field(default={}, description="Options of the reward.")
    outcome: bool | None = Field(
        default=None,
        description="Whether it decides right and wrong; null: accuracy does, if no other is said "
        "to.",
    )
    range: tuple[float, float] | None = Field(
        default=None, description="Values outside are invalid; null: the reward's own, if any."
    )
    timeout_s: Positive | None = Field(
        default=None,
        description="Deadline of a call over all trajectories of a step; null: the reward's own, "
        "60 for a user's.",
    )
    memory_mb: Count | None = Field(
        default=None,
        description="What its process may take beyond its imports; null: 8192 for a user's, "
        "else no limit.",
    )
    gpus: NotNegative = Field(default=0.0, description="GPUs of its process, or a share of one.")

    @field_validator("use")
    @classmethod
    def _file_beside_recipe(cls, use: str, info: ValidationInfo) -> str:
        where, _, attribute = use.rpartition(":")
        return f"{_beside_recipe(Path(where), info)}:{attribute}" if where.endswith(".py") else use

    @field_validator("options")
    @classmethod
    def _paths_beside_recipe(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        names = PATH_OPTIONS.get(info.data.get("use", ""), ())
        paths = {k: v for k, v in options.items() if k in names and v not in (None, "auto")}
        return options | {k: _local_or_hub(str(v), info) for k, v in paths.items()}


class ScoringSection(Section):
    """How the rewards of a trajectory become what is learned from."""

    gate_shaping: bool = Field(
        default=True,
        description="Shaping teaches nothing in groups that are all right or all wrong.",
    )
    max_invalid: Share = Field(
        default=0.5,
        description="Stop when more of a reward's values, over the last 4 steps, are invalid; 1: "
        "never.",
    )


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
    filter_low: Share = Field(
        default=0.1, description="Train on groups with accuracy above this (Future-L1)."
    )
    filter_high: Share = Field(
        default=0.9, description="Train on groups with accuracy below this (Future-L1)."
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
    tokens_per_patch: Count = Field(default=1, description="Latents for each frame pair of a span.")
    imagine_share: Share | ImagineShare = Field(
        default=1.0,
        description="Probability that a row is taught with its latent spans; by a column of the "
        "manifest: {column: NAME, shares: {VALUE: PROBABILITY}}.",
    )
    answer_template: str = Field(
        default="<answer>{answer}</answer>", description="The text taught after the spans."
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


class _Recipe(Section):
    HARMLESS: ClassVar[frozenset[str]] = frozenset(
        {"name", "output", "evaluation", "train.save_every", "train.log_every"}
        | {"train.keep_checkpoints", "data.media_cache"}
    )

    stage: str
    name: str = Field(default="run", description="What the run is called in messages.")
    seed: int = Field(default=0, description="Of everything random in the run.")
    output: RecipePath = Field(description="Run folder: checkpoints, metrics, the trained policy.")
    device: Literal["auto", "cpu"] = Field(
        default="auto", description="Where to compute; auto: on GPUs where there are any."
    )
    policy: PolicySection
    data: DataSection
    evaluation: EvaluationSection | None = Field(default=None, description="Null: none.")


class LADAPORecipe(_Recipe):
    """Reinforcement learning with LA-DAPO."""

    # What may change between a run and its resumption without changing what is learned.
    HARMLESS: ClassVar[frozenset[str]] = _Recipe.HARMLESS | {
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


class SFTRecipe(_Recipe):
    """Supervised fine-tuning with latent alignment."""

    stage: Literal["sft"] = Field(description="Selects this stage.")
    train: SFTSection = Field(default=SFTSection(), description="SFT's settings.")

"""The workers that sample."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from recipes.schema.base import Count, NotNegative, Positive, Section

# What may change while a run is interrupted: who samples, not what is sampled.
ANY_WORKERS = frozenset(
    {
        "rollouts.engine",
        "rollouts.vllm",
        "rollouts.workers",
        "rollouts.max_batch_size",
        "rollouts.ray",
        "rollouts.cpus_per_worker",
        "rollouts.gpus_per_worker",
        "rollouts.timeout_s",
    }
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

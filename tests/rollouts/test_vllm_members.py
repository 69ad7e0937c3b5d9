"""What `rollouts.vllm_internals` uses of vLLM beyond public names. Red here after an upgrade of
vLLM means: read what has changed before anything else.
"""

import inspect
from dataclasses import fields
from importlib import import_module
from typing import Any

import pytest
from transformers import AutoConfig, Qwen3_5Config

from rl.policy.loading import load_policy, make_policy
from rollouts.vllm_weights import parameter_shapes
from tests.tiny import save_tiny_checkpoint, tiny_processor

pytest.importorskip("vllm")

GPU = "vllm.v1.worker.gpu"
STATE = f"{GPU}.model_states.default:DefaultModelState"

PARAMETERS = {
    f"{STATE}.__init__": "self vllm_config model encoder_cache device",
    f"{STATE}.add_request": "self req_index new_req_data",
    f"{STATE}.remove_request": "self req_id",
    f"{STATE}.apply_staged_writes": "self",
    f"{STATE}.prepare_inputs_embeds": "self scheduled_encoder_inputs input_batch req_states",
    f"{STATE}.custom_sampler": "self sampler",
    f"{GPU}.sample.sampler:Sampler.__call__": "self logits input_batch",
    "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys": (
        "request start_token_idx end_token_idx start_mm_idx"
    ),
    "vllm.model_executor.models.config:VerifyAndUpdateConfig.verify_and_update_config": (
        "vllm_config"
    ),
    "vllm.model_executor.models.qwen3_vl:Qwen3VLForConditionalGeneration.compute_logits": (
        "self hidden_states"
    ),
    f"{GPU}.sample.logits_processor.interface:LogitsProcessor.validate_params": "sampling_params",
    "vllm.reasoning:ReasoningParserManager.register_lazy_module": "name module_path class_name",
}

FIELDS = {
    f"{GPU}.input_batch:InputBatch": (
        "req_ids num_reqs idx_mapping idx_mapping_np query_start_loc query_start_loc_np input_ids "
        "is_prefilling_np num_computed_tokens_np num_scheduled_tokens"
    ),
    f"{GPU}.sample.output:SamplerOutput": "sampled_token_ids num_sampled",
    "vllm.v1.core.sched.output:NewRequestData": (
        "req_id prompt_token_ids prefill_token_ids sampling_params"
    ),
}


def found(path: str) -> Any:
    module, _, names = path.partition(":")
    thing: Any = import_module(module)
    for name in names.split("."):
        thing = getattr(thing, name)
    return thing


@pytest.mark.parametrize("path", PARAMETERS)
def test_functions(path):
    assert list(inspect.signature(found(path)).parameters) == PARAMETERS[path].split()


@pytest.mark.parametrize("path", FIELDS)
def test_records(path):
    there = {field.name for field in fields(found(path))}
    assert set(FIELDS[path].split()) <= there


def test_the_hybrid_state_is_a_default_one():
    assert issubclass(found(f"{GPU}.model_states.mamba_hybrid:MambaHybridModelState"), found(STATE))


def test_the_model_names_its_state():
    source = inspect.getsource(found(f"{GPU}.model_states:resolve_model_state_cls"))
    assert "model.get_model_state_cls()" in source


def test_logits_are_computed_right_before_sampling():
    source = inspect.getsource(found(f"{GPU}.model_runner:GPUModelRunner.sample"))
    at = [
        source.index(part)
        for part in (
            "hidden_states[input_batch.logits_indices]",
            "self.model.compute_logits(sample_hidden_states)",
            "self.sampler(logits, input_batch)",
        )
    ]
    assert at == sorted(at)


def test_finished_and_preempted_requests_leave_alike():
    source = inspect.getsource(found(f"{GPU}.model_runner:GPUModelRunner.finish_requests"))
    assert "preempted_req_ids" in source and "_remove_request(req_id)" in source


def test_the_hash_is_looked_up_where_it_is_replaced():
    module = found("vllm.v1.core.kv_cache_utils:get_request_block_hasher")
    assert "generate_block_hash_extra_keys" in inspect.getsource(module)
    assert "all_token_ids" in inspect.getsource(found("vllm.v1.request:Request"))


def test_a_scheduler_may_be_made_by_a_function():
    source = inspect.getsource(found("vllm.config.scheduler:SchedulerConfig.get_scheduler_cls"))
    assert "resolve_obj_by_qualname(self.scheduler_cls)" in source


def test_policies_load_beside_vllm(tmp_path):
    save_tiny_checkpoint(tmp_path / "base", "qwen3_5")
    theirs = found("vllm.transformers_utils.config:get_config")(tmp_path / "base", False)
    assert type(AutoConfig.from_pretrained(tmp_path / "base")) is type(theirs) is not Qwen3_5Config
    processor = tiny_processor("qwen3_5")
    policy = make_policy(tmp_path / "base", processor)
    policy.save_pretrained(tmp_path / "policy")
    assert parameter_shapes(tmp_path / "policy")[0].keys() == policy.state_dict().keys()
    assert type(load_policy(tmp_path / "policy").config) is Qwen3_5Config

"""What vLLM loads in each of its processes (entry point ``vllm.general_plugins``).

It tells vLLM which classes run latent policies and changes nothing for other models. All that
depends on vLLM's inner life is in `rollouts.vllm_internals`, imported when a latent policy is.
"""

from __future__ import annotations

MODELS = (
    "LatentQwen3VLForConditionalGeneration",
    "LatentQwen2_5_VLForConditionalGeneration",
    "LatentQwen3_5ForConditionalGeneration",
    "LatentQwen3ForCausalLM",
)


def register() -> None:
    """Make vLLM know the latent models. Further calls do nothing."""
    from vllm import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP, VerifyAndUpdateConfig
    from vllm.reasoning import ReasoningParserManager

    class LatentConfig(VerifyAndUpdateConfig):
        @staticmethod
        def verify_and_update_config(vllm_config) -> None:
            from rollouts.vllm_internals import prepare_config

            prepare_config(vllm_config)

    known = ModelRegistry.get_supported_archs()
    for name in MODELS:
        if name not in known:
            ModelRegistry.register_model(name, f"rollouts.vllm_internals:{name}")
        MODELS_CONFIG_MAP[name] = LatentConfig
    ReasoningParserManager.register_lazy_module("foresight", "rollouts.vllm_serving", "SpanParser")

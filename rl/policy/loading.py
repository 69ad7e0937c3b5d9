"""Making a latent policy of a video model, and reading one back."""

from __future__ import annotations

import inspect
from dataclasses import replace
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)
from transformers.utils import logging

from rl.errors import PolicyError
from rl.policy.heads import HeadConfig
from rl.policy.model import LatentPolicy
from rl.policy.modules import ModulesConfig, is_new
from rl.policy.protocol import LatentProtocol
from rl.policy.settings import CONFIG_KEY, new_settings, placeholder_ids, policy_settings


@lru_cache
def policy_class(base: type[PreTrainedModel]) -> type[Any]:
    """The latent variant of a model class, e.g. `LatentQwen3VLForConditionalGeneration`."""
    if "pixel_values_videos" not in inspect.signature(base.forward).parameters:
        raise PolicyError(
            f"{base.__name__} takes no video: its forward has no `pixel_values_videos`. Choose a "
            "model with video input, for example Qwen3-VL, Qwen2.5-VL or Qwen3.5"
        )
    name = f"Latent{base.__name__}"
    # transformers renames parameters between files and modules by class name, for its own classes
    # only.
    config: Any = base.config_class
    renaming = get_checkpoint_conversion_mapping(
        base.__name__
    ) or get_checkpoint_conversion_mapping(config.model_type)
    if renaming is not None:
        register_checkpoint_conversion_mapping(name, renaming, overwrite=True)

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        return LatentPolicy.forward(self, *args, **kwargs)

    # `generate` reads off the signature which inputs a model takes.
    forward.__signature__ = inspect.signature(base.forward)  # type: ignore[attr-defined]
    return type(name, (LatentPolicy, base), {"__module__": __name__, "forward": forward})


def make_policy(
    path: str | Path,
    processor: ProcessorMixin | PreTrainedTokenizerBase,
    protocol: LatentProtocol | None = None,
    head: HeadConfig | None = None,
    modules: ModulesConfig | None = None,
    **kwargs: Any,
) -> Any:
    """Load a video model and make it a latent policy.

    The protocol's tokens are added to `processor`'s tokenizer if it lacks them (save the processor
    beside the policy), the embeddings grow only if they have no spare rows, and the tokens' rows
    start at the mean of the old ones. `kwargs` go to `from_pretrained`. Raises `PolicyError` for a
    model without video input.
    """
    protocol, head = protocol or LatentProtocol(), head or HeadConfig()
    tokenizer: Any = getattr(processor, "tokenizer", processor)
    config = read_config(path)
    cls = policy_class(model_class(config, path))
    new = [
        t
        for t in protocol.tokens
        if tokenizer.convert_tokens_to_ids(t) in (None, tokenizer.unk_token_id)
    ]
    tokenizer.add_tokens(new, special_tokens=True)
    tokens = protocol.resolve(tokenizer, placeholder_ids(config))
    modules = modules or ModulesConfig()
    setattr(config, CONFIG_KEY, new_settings(protocol, tokens, head, modules))
    policy = _load(cls, path, config=config, new_head=True, new=modules, **kwargs)
    if len(tokenizer) > policy.get_input_embeddings().weight.shape[0]:
        policy.resize_token_embeddings(len(tokenizer), pad_to_multiple_of=8, mean_resizing=False)
    if new:
        _start_at_mean(policy, [tokenizer.convert_tokens_to_ids(t) for t in new])
    return policy


def load_policy(path: str | Path, modules: ModulesConfig | None = None, **kwargs: Any) -> Any:
    """Load a saved policy; `kwargs` go to `from_pretrained` (`dtype` defaults to float32). It gets
    those of `modules` that it has not yet. Raises `PolicyError`.
    """
    config = read_config(path)
    settings, modules = policy_settings(config), modules or ModulesConfig()
    own = ModulesConfig.from_dict(settings.get("modules", {}))
    settings["modules"] = own.added(modules).to_dict()
    new = replace(modules, **dict.fromkeys(own.names))
    return _load(policy_class(model_class(config, path)), path, config=config, new=new, **kwargs)


def read_config(path: str | Path) -> PretrainedConfig:
    """The config of the video model in `path`; `PolicyError` if it is none.

    It is of the class the model takes: vLLM, once it has run in a process, has put classes of its
    own into `AutoConfig`, and Qwen3.5's lacks what the model reads.
    """
    config = AutoConfig.from_pretrained(path)
    own: Any = model_class(config, path).config_class
    return config if type(config) is own else own.from_pretrained(path)


def _load(
    cls: type[Any],
    path: str | Path,
    *,
    new: ModulesConfig,
    new_head: bool = False,
    **kwargs: Any,
) -> Any:
    """`from_pretrained` that insists on every weight but those of `new` modules, and with
    `new_head` the latent head's.
    """
    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # what its report says is judged below
    try:
        policy, info = cls.from_pretrained(
            path,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported below, with the others
            **{"dtype": torch.float32, **kwargs},
        )
    finally:
        logging.set_verbosity(verbosity)
    missing = {
        key
        for key in info["missing_keys"]
        if not (is_new(key, new) or (new_head and key.startswith("latent_head.")))
    }
    wrong = sorted(missing | set(info["unexpected_keys"]) | {m[0] for m in info["mismatched_keys"]})
    if wrong:
        raise PolicyError(
            f"the weights in {path} are not those of its config.json: {len(wrong)} parameters are "
            f"missing, unexpected or of another shape, such as {wrong[:3]}"
        )
    for name, module in policy.named_modules():
        # transformers passes by a module whose parameters are all its parts', and has a text model
        # make its own.
        new_parts = any(key.startswith(f"{name}.") for key in info["missing_keys"])
        if new_parts and (reset := getattr(module, "reset", None)):
            reset()
    return policy


def model_class(config: PretrainedConfig, path: str | Path) -> type[PreTrainedModel]:
    """The transformers class of the vision-language model in `path`; `PolicyError` if it is
    none.
    """
    try:
        mapping: Any = AutoModelForImageTextToText._model_mapping
        return mapping[type(config)]
    except KeyError:
        raise PolicyError(
            f"{path} holds a {config.model_type!r} model, which is no vision-language model. "
            "Choose a model with video input, for example Qwen3-VL, Qwen2.5-VL or Qwen3.5"
        ) from None


@torch.no_grad()
def _start_at_mean(policy: Any, ids: list[int]) -> None:
    for embedding in (policy.get_input_embeddings(), policy.get_output_embeddings()):
        weight = embedding.weight
        weight[ids] = weight[: min(ids)].mean(0, keepdim=True).to(weight.dtype)

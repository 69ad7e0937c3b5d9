"""Weight updates: which parameters, which version, and a checksum that proves they arrived."""

from __future__ import annotations

import hashlib
from typing import Any

import torch

from rl.interfaces import WeightUpdate

# What PEFT puts round the names of a merged model's parameters.
_PEFT_PREFIX = "base_model.model."


def state_checksum(state: dict[str, torch.Tensor]) -> str:
    """Digest of names, shapes, dtypes and bytes, in the order of the names."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(state):
        value = state[name].detach().contiguous().cpu()
        digest.update(f"{name}:{value.dtype}:{tuple(value.shape)}".encode())
        digest.update(value.view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def weight_update(policy: Any, version: int, *, trainable_only: bool = False) -> WeightUpdate:
    """The parameters of a policy, on the CPU, LoRA adapters merged in.

    With `trainable_only` parameters that training never touches (a frozen tower) are left out.
    """
    if hasattr(policy, "merge_adapter"):
        # Unmerging subtracts what merging added, which rounding does not undo: put the base back.
        base = {n: _copy(p) for n, p in policy.named_parameters() if ".base_layer." in n}
        policy.merge_adapter()
        try:
            state = _merged_state(policy)
        finally:
            policy.unmerge_adapter()
            with torch.no_grad():
                for name, value in base.items():
                    policy.get_parameter(name).copy_(value)
    else:
        skip = {n for n, p in policy.named_parameters() if trainable_only and not p.requires_grad}
        state = {n: _copy(v) for n, v in policy.state_dict().items() if n not in skip}
    return WeightUpdate(version, state, state_checksum(state))


def _merged_state(policy: Any) -> dict[str, torch.Tensor]:
    state = {}
    for name, value in policy.state_dict().items():
        if "lora_" in name or ".original_module." in name or ".ref." in name:
            continue
        name = name.removeprefix(_PEFT_PREFIX).replace(".base_layer.", ".")
        state[name.replace(".modules_to_save.default.", ".")] = _copy(value)
    return state


def _copy(value: torch.Tensor) -> torch.Tensor:
    return value.detach().to("cpu", copy=True)

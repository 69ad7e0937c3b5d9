"""Which latent modules a policy has beside its head. All of them are off unless asked for, and a
policy without them is its backbone, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

from rl.errors import PolicyError
from rl.policy.depth import DepthConfig
from rl.policy.injection import InjectionConfig
from rl.policy.visual_replay import VisualReplayConfig

_KINDS = {
    "injection": InjectionConfig,
    "depth": DepthConfig,
    "visual_replay": VisualReplayConfig,
}
# What the parameters of each are called, wherever in the policy they are.
WEIGHTS = {
    "injection": "latent_injection",
    "depth": "depth_gate",
    "visual_replay": "visual_replay",
}


@dataclass(frozen=True)
class ModulesConfig:
    """Latent injection, routing depth scaling and visual replay; None is off."""

    injection: InjectionConfig | None = None
    depth: DepthConfig | None = None
    visual_replay: VisualReplayConfig | None = None

    @property
    def names(self) -> tuple[str, ...]:
        """Those that are on."""
        return tuple(name for name in _KINDS if getattr(self, name) is not None)

    @property
    def wants_video(self) -> bool:
        """Whether latents need the features of their prompt's video."""
        return self.injection is not None or self.visual_replay is not None

    @property
    def shares_prompts(self) -> bool:
        """Whether completions of one prompt may lie behind a single copy of it: not with the
        published router, for which a prompt and its completion are one sequence.
        """
        return self.depth is None or self.depth.router == "token"

    def to_dict(self) -> dict[str, Any]:
        return {name: getattr(self, name).to_dict() for name in self.names}

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> ModulesConfig:
        if unknown := sorted(set(values) - set(_KINDS)):
            raise PolicyError(
                f"unknown latent modules {unknown}; this Foresight has {list(_KINDS)}"
            )
        return cls(**{name: _KINDS[name](**settings) for name, settings in values.items()})

    def added(self, wanted: ModulesConfig) -> ModulesConfig:
        """These and the `wanted` ones. Raises `PolicyError` where one is there already, otherwise
        set: its weights were trained so.
        """
        for name in wanted.names:
            own = getattr(self, name)
            if own not in (None, getattr(wanted, name)):
                raise PolicyError(
                    f"policy.{name}: the policy has one already, with {own.to_dict()}, and keeps "
                    "it; leave the key out, or start from a policy without it"
                )
        return replace(self, **{name: getattr(wanted, name) for name in wanted.names})


def is_new(parameter: str, modules: ModulesConfig) -> bool:
    """Whether a parameter of this name belongs to one of these modules."""
    parts = parameter.split(".")
    return any(WEIGHTS[name] in parts for name in modules.names)

"""The ``foresight`` entry of a policy's ``config.json``: its protocol, tokens, head and modules."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

from rl.errors import PolicyError
from rl.policy.heads import HeadConfig
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol, LatentTokens

CONFIG_KEY = "foresight"
_CONFIG_VERSION = 1


def policy_settings(config: PretrainedConfig) -> dict[str, Any]:
    """The ``foresight`` entry of a model config."""
    settings = getattr(config, CONFIG_KEY, None)
    if not isinstance(settings, dict) or not {"protocol", "tokens", "head"} <= settings.keys():
        raise PolicyError(
            f"{config.name_or_path or type(config).__name__} is no latent policy: its config.json "
            f"has no {CONFIG_KEY!r} entry. Make one with `rl.policy.make_policy`"
        )
    if settings.get("version") != _CONFIG_VERSION:
        raise PolicyError(
            f"the policy was saved in format {settings.get('version')}; this Foresight reads "
            f"{_CONFIG_VERSION}"
        )
    return settings


def new_settings(
    protocol: LatentProtocol,
    tokens: LatentTokens,
    head: HeadConfig,
    modules: ModulesConfig | None = None,
) -> dict[str, Any]:
    """The ``foresight`` entry of a new policy's config."""
    return {
        "version": _CONFIG_VERSION,
        "protocol": protocol.to_dict(),
        "tokens": {
            "start": tokens.start,
            "end": tokens.end,
            "filler": tokens.filler,
            "banned": list(tokens.banned),
        },
        "head": head.to_dict(),
        "modules": (modules or ModulesConfig()).to_dict(),
    }


def placeholder_ids(config: PretrainedConfig) -> list[int]:
    """The tokens that stand for images and videos in a prompt."""
    ids = [getattr(config, f"{kind}_token_id", None) for kind in ("image", "video")]
    return [token for token in ids if token is not None]


def protocol_and_tokens(config: PretrainedConfig) -> tuple[LatentProtocol, LatentTokens]:
    """The protocol of a policy's config, and the ids of its tokens."""
    settings = policy_settings(config)
    tokens = {name: _tuples(ids) for name, ids in settings["tokens"].items()}
    return LatentProtocol.from_dict(settings["protocol"]), LatentTokens(**tokens)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value

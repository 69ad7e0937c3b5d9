"""The rewards of a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import Field, ValidationInfo, field_validator

from recipes.schema.base import (
    Count,
    NotNegative,
    Positive,
    Section,
    Share,
    beside_recipe,
    local_or_hub,
)
from rewards.registry import PATH_OPTIONS


class RewardSection(Section):
    """One reward; `foresight rewards list` shows which there are."""

    use: str = Field(
        description="A name such as accuracy, file.py:function, or package.module:function."
    )
    name: str | None = Field(
        default=None, description="What it is called in logs; null: as it is called where it is."
    )
    weight: float | None = Field(
        default=None, description="Weight in the sum; null: the reward's own, 0.1 for a user's."
    )
    options: dict[str, Any] = Field(default={}, description="Options of the reward.")
    outcome: bool | None = Field(
        default=None,
        description="Whether it decides right and wrong; null: accuracy does, if no other is said "
        "to.",
    )
    range: tuple[float, float] | None = Field(
        default=None, description="Values outside are invalid; null: the reward's own, if any."
    )
    timeout_s: Positive | None = Field(
        default=None,
        description="Deadline of a call over all trajectories of a step; null: the reward's own, "
        "60 for a user's.",
    )
    memory_mb: Count | None = Field(
        default=None,
        description="What its process may take beyond its imports; null: 8192 for a user's, "
        "else no limit.",
    )
    gpus: NotNegative = Field(default=0.0, description="GPUs of its process, or a share of one.")

    @field_validator("use")
    @classmethod
    def _file_beside_recipe(cls, use: str, info: ValidationInfo) -> str:
        where, _, attribute = use.rpartition(":")
        return f"{beside_recipe(Path(where), info)}:{attribute}" if where.endswith(".py") else use

    @field_validator("options")
    @classmethod
    def _paths_beside_recipe(cls, options: dict[str, Any], info: ValidationInfo) -> dict[str, Any]:
        names = PATH_OPTIONS.get(info.data.get("use", ""), ())
        paths = {k: v for k, v in options.items() if k in names and v not in (None, "auto")}
        return options | {k: local_or_hub(str(v), info) for k, v in paths.items()}


class ScoringSection(Section):
    """How the rewards of a trajectory become what is learned from."""

    gate_shaping: bool = Field(
        default=True,
        description="Shaping teaches nothing in groups that are all right or all wrong.",
    )
    max_invalid: Share = Field(
        default=0.5,
        description="Stop when more of a reward's values, over the last 4 steps, are invalid; 1: "
        "never.",
    )

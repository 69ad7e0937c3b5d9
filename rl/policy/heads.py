"""Latent heads: what maps a final hidden state to the mean of the next latent."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import torch
from torch import nn

from rl.errors import PolicyError

HeadKind = Literal["identity", "linear", "mlp", "swiglu"]


@dataclass(frozen=True)
class HeadConfig:
    """`kind` of head and the width of its inner layer (`mlp`, `swiglu`; None: 4·H for `mlp`, 2048
    for `swiglu`).

    "identity" feeds the hidden state itself back, as Coconut (arXiv 2412.06769) and Future-L1 by
    default do; "mlp" is LVR's head (arXiv 2509.24251), "swiglu" Future-L1's optional one
    (OpenGVLab/Future-L1, projection_head.py).
    """

    kind: HeadKind = "identity"
    width: int | None = None

    def __post_init__(self) -> None:
        if self.kind not in get_args(HeadKind):
            raise PolicyError(
                f"unknown latent head {self.kind!r}; choose one of {get_args(HeadKind)}"
            )

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def build(self, hidden_size: int) -> nn.Module:
        """A module [..., H] -> [..., H]."""
        match self.kind:
            case "identity":
                return nn.Identity()
            case "linear":
                return nn.Linear(hidden_size, hidden_size)
            case "mlp":
                width = self.width or 4 * hidden_size
                return nn.Sequential(
                    nn.LayerNorm(hidden_size),
                    nn.Linear(hidden_size, width),
                    nn.GELU(),
                    nn.Linear(width, hidden_size),
                )
            case "swiglu":
                return SwiGLUHead(hidden_size, self.width or 2048)


class SwiGLUHead(nn.Module):
    """LayerNorm, a gated SiLU layer, and a projection back."""

    def __init__(self, hidden_size: int, width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(hidden_size)
        self.gate_and_up = nn.Linear(hidden_size, 2 * width)
        self.down = nn.Linear(width, hidden_size)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate, up = self.gate_and_up(self.norm(hidden)).chunk(2, dim=-1)
        return self.down(nn.functional.silu(gate) * up)

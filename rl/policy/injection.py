"""Latent injection: every latent looks at the video once more before it is fed.

The mean of a latent becomes μ = g(h) + γ ⊙ A(h, V): g is the latent head, A attends from the hidden
state h over the features V of the prompt's video tokens as they enter the language model, and the
gate γ begins at zero, so that a new module changes nothing. Only the abstract of VideoLatent (arXiv
2606.22870) is public, which names a "latent injection module tailored for video"; this one is our
reconstruction.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn import functional as F
from transformers import initialization as init

from rl.errors import PolicyError


@dataclass(frozen=True)
class InjectionConfig:
    """`heads` of attention over the video, `width` of all of them together (None: that of the
    hidden state). Raises `PolicyError`.
    """

    heads: int = 8
    width: int | None = None

    def __post_init__(self) -> None:
        if self.heads < 1:
            raise PolicyError(f"policy.injection has {self.heads} heads; it needs at least 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def check(self, hidden_size: int) -> int:
        """The width in a model of `hidden_size`. Raises `PolicyError` if the heads do not fit."""
        width = self.width or hidden_size
        if width % self.heads:
            raise PolicyError(
                f"policy.injection has {self.heads} heads, which do not divide its width {width} "
                "(by default that of the hidden state); change one of them"
            )
        return width

    def build(self, hidden_size: int) -> VideoInjection:
        return VideoInjection(hidden_size, self.check(hidden_size), self.heads)


class Memory(NamedTuple):
    """Keys and values of N videos, [N, heads, V, width / heads] each."""

    keys: torch.Tensor
    values: torch.Tensor


class VideoInjection(nn.Module):
    """What is added to the mean of a latent: gated attention over the features of a video."""

    def __init__(self, hidden_size: int, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm_hidden = nn.LayerNorm(hidden_size)
        self.norm_video = nn.LayerNorm(hidden_size)
        self.query = nn.Linear(hidden_size, width, bias=False)
        self.key = nn.Linear(hidden_size, width, bias=False)
        self.value = nn.Linear(hidden_size, width, bias=False)
        self.output = nn.Linear(width, hidden_size, bias=False)
        self.gate = nn.Parameter(torch.zeros(hidden_size))

    def reset(self) -> None:
        """What `_init_weights` of transformers does not know of."""
        init.zeros_(self.gate)

    def remember(self, video: torch.Tensor) -> Memory:
        """Of video features [N, V, H], computed once for all latents of a video."""
        video = self.norm_video(video)
        return Memory(self._heads(self.key(video)), self._heads(self.value(video)))

    def forward(self, hidden: torch.Tensor, memory: Memory, visible: torch.Tensor) -> torch.Tensor:
        """[N, Q, H]: for hidden states [N, Q, H] what attention over their videos adds; `visible`
        (bool [N, Q or 1, V]) says which video tokens they see. One that sees none gets zeros.
        """
        query = self._heads(self.query(self.norm_hidden(hidden)))
        # A row without any key would be NaN: let it see all, and drop what it saw.
        some = visible.any(-1, keepdim=True)
        found = F.scaled_dot_product_attention(
            query, memory.keys, memory.values, attn_mask=(visible | ~some)[:, None]
        )
        added = self.gate * self.output(found.transpose(1, 2).flatten(2))
        return added * some

    def _heads(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)

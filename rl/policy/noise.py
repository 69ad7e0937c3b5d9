"""Counter-based random numbers: a pure function of (seed, stream, counter), with no state to carry.

Two engines, any batch, any device and any interruption give one trajectory the same noise, because
nothing but the trajectory's seed and the position enters. The mixer is splitmix64 (Steele, Lea and
Flood, 2014); normals come from Box and Muller's transform.
"""

from __future__ import annotations

import math
from enum import IntEnum

import torch

_MASK = (1 << 64) - 1


def _signed(value: int) -> int:
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


class Stream(IntEnum):
    """Independent streams of one seed."""

    TOKEN = 1  # counter: position in the completion
    DECISION = 2  # counter: position in the completion
    LATENT = 3  # counter: ordinal of the latent in the completion
    RADIAL = 4  # the same, for the angle between a von Mises-Fisher draw and its mean


def _shift_right(x: torch.Tensor, bits: int) -> torch.Tensor:
    # int64 shifts keep the sign; a hash needs the logical shift.
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: torch.Tensor) -> torch.Tensor:
    x = (x ^ _shift_right(x, 30)) * _MIX_1
    x = (x ^ _shift_right(x, 27)) * _MIX_2
    return x ^ _shift_right(x, 31)


def _bits(
    seed: torch.Tensor, stream: Stream | torch.Tensor, counter: torch.Tensor, width: int
) -> torch.Tensor:
    """int64 [N, width] of hashed bits for int64 `seed` [N] and `counter` [N]."""
    start = stream * _MIX_1 if isinstance(stream, torch.Tensor) else _signed(stream * _MIX_1)
    row = _mix(_mix(_mix(seed * _GAMMA + 1) + start) + counter * _GAMMA)
    return _mix(row[:, None] + torch.arange(width, device=seed.device) * _GAMMA)


def uniform(
    seed: torch.Tensor, stream: Stream | torch.Tensor, counter: torch.Tensor
) -> torch.Tensor:
    """float64 [N], uniform on the open interval (0, 1). Rows may differ in `stream` (int64 [N])."""
    bits = _shift_right(_bits(seed, stream, counter, 1)[:, 0], 12)
    return (bits.double() + 0.5) / (1 << 52)


def normal(seed: torch.Tensor, stream: Stream, counter: torch.Tensor, dim: int) -> torch.Tensor:
    """float32 [N, dim], independent standard normals."""
    bits = _bits(seed, stream, counter, (dim + 1) // 2)
    u1 = (_shift_right(bits, 40).float() + 0.5) / (1 << 24)
    u2 = (bits & ((1 << 24) - 1)).float() / (1 << 24)
    radius, angle = torch.sqrt(-2.0 * torch.log(u1)), (2.0 * math.pi) * u2
    return torch.cat([radius * angle.cos(), radius * angle.sin()], dim=1)[:, :dim]

"""The distribution of a latent given its mean: Gaussian or von Mises-Fisher.

Both have one knob, the noise scale c: the expected norm of the noise relative to the norm of the
mean.

- Gaussian: ``z = μ + σ ε`` with ``σ = c·‖μ‖/√H``. σ belongs to the policy that gives μ, so the
  log-density under another policy uses that policy's own σ, and the ratio of two policies is one of
  two normalised densities.
- von Mises-Fisher: the direction ``ẑ = z/‖z‖`` is vMF around ``μ̂`` with ``κ = H/c²`` (for small c
  this is the Gaussian's spread), the norm of z is ``‖μ‖`` and no random choice, so it carries no
  density.

Everything is computed in float64: a log-density sums H squares of small differences. Gaussian and
vMF terms for latents appear in Monet and HyLaR (arXiv 2604.20328), whose released code neither
samples the noise nor normalises the density; the relative scale and the normalised densities here
are ours.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch

from rl.errors import ProtocolError
from rl.policy.noise import Stream, normal, uniform
from rl.policy.protocol import Density

_TINY = 1e-30  # keeps a mean of exact zeros from dividing by zero


def noise_sigma(mean: torch.Tensor, scale: float) -> torch.Tensor:
    """Standard deviation per dimension, σ = c·‖μ‖/√H: [L] for means [L, H]."""
    return (scale / math.sqrt(mean.shape[-1])) * mean.norm(dim=-1).clamp_min(_TINY)


def sample_latents(
    mean: torch.Tensor, scale: float, density: Density, seed: torch.Tensor, ordinal: torch.Tensor
) -> torch.Tensor:
    """Draw one latent for each mean.

    `mean` [N, H]; `seed` and `ordinal` int64 [N]: the trajectory's seed and which of its latents
    this is. Returns [N, H] in the dtype of `mean`, which is what the model is fed and what the
    density is evaluated at.
    """
    if scale == 0.0:
        return mean
    mu = mean.double()
    eps = normal(seed, Stream.LATENT, ordinal, mean.shape[-1]).double()
    if density == "gaussian":
        return (mu + noise_sigma(mu, scale)[:, None] * eps).to(mean.dtype)
    unit = torch.nn.functional.normalize(mu, dim=-1)
    cosine = vmf_table(mean.shape[-1], scale).quantile(uniform(seed, Stream.RADIAL, ordinal))[
        :, None
    ]
    tangent = torch.nn.functional.normalize(eps - (eps * unit).sum(-1, keepdim=True) * unit, dim=-1)
    direction = cosine * unit + (1.0 - cosine**2).clamp_min(0.0).sqrt() * tangent
    return (mu.norm(dim=-1, keepdim=True) * direction).to(mean.dtype)


def log_density(
    latent: torch.Tensor, mean: torch.Tensor, scale: float, density: Density
) -> torch.Tensor:
    """log π(z | μ), summed over H: float64 [L] for latents and means [L, H]. Differentiable in
    `mean`.
    """
    if scale <= 0.0:
        raise ProtocolError(
            "a latent without noise has no density; set the protocol's noise_scale above 0"
        )
    z, mu, dim = latent.double(), mean.double(), mean.shape[-1]
    if density == "gaussian":
        sigma = noise_sigma(mu, scale)
        squares = ((z - mu) / sigma[:, None]).square().sum(-1)
        return -0.5 * squares - dim * (sigma.log() + 0.5 * math.log(2.0 * math.pi))
    table = vmf_table(dim, scale)
    return table.log_normalizer + table.kappa * torch.nn.functional.cosine_similarity(
        mu, z, dim=-1, eps=_TINY
    )


def latent_kl(
    mean: torch.Tensor, ref_mean: torch.Tensor, scale: float, density: Density
) -> torch.Tensor:
    """KL(π ‖ π_ref) of each latent in closed form, summed over H: float64 [L] for means [L, H].

    Gaussian: H·log(σ_r/σ) + (H·σ² + ‖μ-μ_r‖²)/(2σ_r²) - H/2, which is ‖μ-μ_r‖²/(2σ²) when the norms
    agree. von Mises-Fisher: κ·A_H(κ)·(1 - cos(μ, μ_r)), A_H the mean resultant length.
    """
    mu, ref, dim = mean.double(), ref_mean.double(), mean.shape[-1]
    if density == "gaussian":
        sigma, ref_sigma = noise_sigma(mu, scale), noise_sigma(ref, scale)
        distance = (mu - ref).square().sum(-1)
        return (
            dim * (ref_sigma / sigma).log()
            + (dim * sigma**2 + distance) / (2 * ref_sigma**2)
            - dim / 2
        )
    table = vmf_table(dim, scale)
    cosine = torch.nn.functional.cosine_similarity(mu, ref, dim=-1, eps=_TINY)
    return table.kappa * table.resultant * (1.0 - cosine)


@dataclass(frozen=True)
class VMFTable:
    """What a von Mises-Fisher distribution with fixed H and κ needs, by one-dimensional
    quadrature.
    """

    kappa: float
    log_normalizer: (
        float  # log of the constant that makes e^{κ⟨μ̂,ẑ⟩} a density on the unit sphere of R^H
    )
    resultant: float  # A_H(κ) = E⟨μ̂, ẑ⟩
    cdf: torch.Tensor  # float64 [K], of the angle between a draw and the mean
    angle: torch.Tensor  # float64 [K], radians
    _there: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    def quantile(self, u: torch.Tensor) -> torch.Tensor:
        """Cosine between a draw and the mean, for uniform `u` [N]."""
        if u.device not in self._there:  # once: a copy in each step would wait for the device
            self._there[u.device] = self.cdf.to(u.device), self.angle.to(u.device)
        cdf, angle = self._there[u.device]
        right = torch.searchsorted(cdf, u).clamp(1, len(cdf) - 1)
        low, high = cdf[right - 1], cdf[right]
        share = ((u - low) / (high - low).clamp_min(_TINY)).clamp(0.0, 1.0)
        return torch.cos(angle[right - 1] + share * (angle[right] - angle[right - 1]))


@lru_cache(maxsize=16)
def vmf_table(dim: int, scale: float, points: int = 16385) -> VMFTable:
    """The table for width `dim` (at least 3) and noise scale `scale`.

    The angle θ to the mean has density ∝ e^{κ cos θ} sin^{H-2} θ: one smooth peak, integrated
    around its mode. This avoids Bessel functions of order H/2, which overflow at the widths of real
    models.
    """
    if dim < 3:
        raise ProtocolError(
            f"a von Mises-Fisher latent needs a hidden size of at least 3, got {dim}"
        )
    kappa, power = dim / scale**2, dim - 2
    # The mode solves κ sin²θ = power·cos θ.
    cosine = (-power + math.sqrt(power**2 + 4 * kappa**2)) / (2 * kappa)
    mode = math.acos(min(1.0, max(-1.0, cosine)))
    width = 1.0 / math.sqrt(kappa * math.cos(mode) + power / math.sin(mode) ** 2)
    angle = np.linspace(
        max(mode - 14 * width, 1e-9), min(mode + 14 * width, math.pi - 1e-9), points
    )
    log_f = kappa * np.cos(angle) + power * np.log(np.sin(angle))
    peak = log_f.max()
    f = np.exp(log_f - peak)
    cells = 0.5 * (f[1:] + f[:-1]) * np.diff(angle)
    mass = cells.sum()
    log_area = math.log(2.0) + 0.5 * (dim - 1) * math.log(math.pi) - math.lgamma(0.5 * (dim - 1))
    cos_f = f * np.cos(angle)
    resultant = (0.5 * (cos_f[1:] + cos_f[:-1]) * np.diff(angle)).sum() / mass
    return VMFTable(
        kappa=kappa,
        log_normalizer=float(-(peak + math.log(mass) + log_area)),
        resultant=float(resultant),
        cdf=torch.from_numpy(np.concatenate([[0.0], np.cumsum(cells) / mass])),
        angle=torch.from_numpy(angle),
    )

"""Gaussian and von Mises-Fisher latents: formulas by hand, by quadrature and by sampling."""

import math

import pytest
import torch

from rl.errors import ProtocolError
from rl.policy.density import latent_kl, log_density, noise_sigma, sample_latents, vmf_table

DENSITIES = ("gaussian", "vmf")


def draws(mean: torch.Tensor, scale: float, density, count: int) -> torch.Tensor:
    return sample_latents(
        mean.expand(count, -1), scale, density, torch.arange(count), torch.zeros(count).long()
    )


def test_gaussian_by_hand():
    # H = 4, ‖μ‖ = 2, c = 0.5 → σ = 0.5·2/2 = 0.5; z-μ = (0.5, 0, 0, -0.5) → Σ((z-μ)/σ)² = 2.
    mean = torch.tensor([[2.0, 0.0, 0.0, 0.0]])
    latent = torch.tensor([[2.5, 0.0, 0.0, -0.5]])
    assert noise_sigma(mean, 0.5).item() == pytest.approx(0.5)
    expected = -0.5 * 2 - 4 * (math.log(0.5) + 0.5 * math.log(2 * math.pi))
    assert log_density(latent, mean, 0.5, "gaussian").item() == pytest.approx(expected, abs=1e-12)


def test_gaussian_agrees_with_torch():
    mean, latent = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    sigma = noise_sigma(mean, 0.3)
    normal = torch.distributions.Normal(mean, sigma[:, None])
    torch.testing.assert_close(
        log_density(latent, mean, 0.3, "gaussian"), normal.log_prob(latent).sum(-1)
    )
    reference = mean + 0.1 * torch.randn_like(mean)
    other = torch.distributions.Normal(reference, noise_sigma(reference, 0.3)[:, None])
    torch.testing.assert_close(
        latent_kl(mean, reference, 0.3, "gaussian"),
        torch.distributions.kl_divergence(normal, other).sum(-1),
    )


def test_gaussian_kl_by_hand_for_equal_norms():
    # ‖μ‖ = ‖μ_r‖ = 2, H = 4, c = 1 → σ = 1; ‖μ-μ_r‖² = 8 → KL = 8/2 = 4.
    mean, reference = torch.tensor([[2.0, 0, 0, 0]]), torch.tensor([[0, 2.0, 0, 0]])
    assert latent_kl(mean, reference, 1.0, "gaussian").item() == pytest.approx(4.0)


def test_vmf_in_three_dimensions_by_hand():
    # On the sphere in R³ the normaliser is κ/(4π sinh κ) and A_3(κ) = coth κ - 1/κ; c = 1 → κ = 3.
    mean = torch.tensor([[0.0, 0.0, 2.0]])
    latent = torch.tensor([[0.0, 1.5, 0.0]])  # at a right angle: ⟨μ̂, ẑ⟩ = 0
    constant = math.log(3 / (4 * math.pi * math.sinh(3)))
    assert log_density(latent, mean, 1.0, "vmf").item() == pytest.approx(constant, abs=1e-7)
    assert log_density(mean, mean, 1.0, "vmf").item() == pytest.approx(constant + 3, abs=1e-7)
    resultant = 1 / math.tanh(3) - 1 / 3
    assert vmf_table(3, 1.0).resultant == pytest.approx(resultant, abs=1e-7)
    assert latent_kl(mean, latent, 1.0, "vmf").item() == pytest.approx(3 * resultant, abs=1e-6)


def test_vmf_normaliser_of_an_even_dimension():
    # In R⁴: C = κ / ((2π)² I₁(κ)); I₁(4) = 9.759465153704449 (c = 1 → κ = 4).
    expected = math.log(4 / ((2 * math.pi) ** 2 * 9.759465153704449))
    assert vmf_table(4, 1.0).log_normalizer == pytest.approx(expected, abs=1e-7)


@pytest.mark.parametrize("dim", [64, 4096])
def test_vmf_concentrates_as_the_noise_scale_says(dim):
    # For small c the noise has norm c relative to the mean: E cos ≈ 1 - c²/2.
    assert vmf_table(dim, 0.1).resultant == pytest.approx(1 - 0.1**2 / 2, abs=2e-4)


@pytest.mark.parametrize("density", DENSITIES)
@pytest.mark.parametrize("scale", [0.1, 0.5])
def test_samples_have_the_promised_spread(density, scale):
    mean = 3.0 * torch.nn.functional.normalize(torch.arange(1.0, 33.0)[None], dim=-1)
    z = draws(mean, scale, density, 4000)
    cosine = torch.nn.functional.cosine_similarity(z, mean)
    expected = 1 / math.sqrt(1 + scale**2)
    assert cosine.mean().item() == pytest.approx(expected, abs=0.01)
    if density == "gaussian":
        assert (z - mean).norm(dim=-1).mean().item() == pytest.approx(3 * scale, rel=0.02)
    else:
        torch.testing.assert_close(z.norm(dim=-1), torch.full((4000,), 3.0), rtol=1e-5, atol=0)
        assert cosine.mean().item() == pytest.approx(vmf_table(32, scale).resultant, abs=2e-3)


@pytest.mark.parametrize("density", DENSITIES)
def test_the_log_density_is_that_of_the_samples(density):
    # E_π[log π - log π_r] is the closed-form KL, if and only if samples and densities agree.
    torch.manual_seed(0)
    mean, reference = torch.randn(1, 16), torch.randn(1, 16)
    reference = mean + 0.15 * reference
    z = draws(mean, 0.4, density, 20000)
    gap = log_density(z, mean.expand_as(z), 0.4, density) - log_density(
        z, reference.expand_as(z), 0.4, density
    )
    # The vMF reference has another norm; only directions count there.
    expected = latent_kl(mean, reference, 0.4, density).item()
    assert gap.mean().item() == pytest.approx(expected, abs=4 * gap.std().item() / 20000**0.5)


@pytest.mark.parametrize("density", DENSITIES)
def test_gradients(density):
    torch.manual_seed(0)
    mean = torch.randn(2, 5, dtype=torch.double, requires_grad=True)
    latent, reference = torch.randn(2, 5).double(), torch.randn(2, 5).double()
    assert torch.autograd.gradcheck(lambda m: log_density(latent, m, 0.7, density), mean)
    assert torch.autograd.gradcheck(lambda m: latent_kl(m, reference, 0.7, density), mean)


@pytest.mark.parametrize("density", DENSITIES)
def test_the_score_has_mean_zero(density):
    # E_π[∇ log π] = 0 holds for a normalised density only; a detached or missing constant breaks
    # it.
    mean = torch.nn.functional.normalize(torch.arange(1.0, 13.0)[None].double(), dim=-1) * 2
    z = draws(mean, 0.5, density, 40000)
    mean = mean.expand_as(z).clone().requires_grad_()
    (score,) = torch.autograd.grad(log_density(z, mean, 0.5, density).sum(), mean)
    assert (score.mean(0).abs() < 5 * score.std(0) / 40000**0.5).all()


def test_no_noise_has_no_density_and_samples_the_mean():
    mean = torch.randn(3, 8)
    assert sample_latents(mean, 0.0, "gaussian", torch.arange(3), torch.arange(3)) is mean
    with pytest.raises(ProtocolError, match="noise_scale"):
        log_density(mean, mean, 0.0, "gaussian")
    with pytest.raises(ProtocolError, match="at least 3"):
        vmf_table(2, 0.5)

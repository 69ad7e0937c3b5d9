from __future__ import annotations

import pytest
import torch

from rl.sft.alignment import (
    LatentLoss,
    latent_alignment_loss,
    neighbour_cosines,
    pool_frames,
    target_variance,
)


def test_mse_is_divided_by_the_variance() -> None:
    means = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    targets = torch.tensor([[0.0, 2.0], [0.0, 4.0]])
    # squared errors 1, 0, 0, 16: mean 4.25; divided by 0.5
    loss = latent_alignment_loss(means, targets, variance=0.5)
    assert loss.item() == pytest.approx(8.5)


def test_cosine_ignores_length() -> None:
    means = torch.tensor([[3.0, 0.0], [0.0, 2.0]])
    targets = torch.tensor([[5.0, 0.0], [1.0, 0.0]])
    loss = latent_alignment_loss(means, targets, variance=9.0, kind="cosine")  # 0 and 1
    assert loss.item() == pytest.approx(0.5)


@pytest.mark.parametrize("kind", ["mse", "cosine"])
def test_without_latents_the_loss_is_zero_and_has_a_gradient(kind: LatentLoss) -> None:
    weight = torch.ones(2, requires_grad=True)
    loss = latent_alignment_loss(
        torch.zeros(0, 2) * weight, torch.zeros(0, 2), variance=1.0, kind=kind
    )
    loss.backward()
    assert loss.item() == 0.0
    assert torch.equal(weight.grad, torch.zeros(2))  # type: ignore[arg-type]


def test_half_precision_is_summed_in_float32() -> None:
    means, targets = torch.full((4, 8), 300.0).half(), torch.zeros(4, 8).half()
    assert (
        latent_alignment_loss(means, targets, variance=1.0).item() == 90000.0
    )  # above float16's range


def test_variance_is_the_mean_of_the_dimensions() -> None:
    targets = torch.tensor([[0.0, 1.0], [2.0, 1.0], [4.0, 4.0]])
    # dimension 1: mean 2, squares 4 + 0 + 4 over 3; dimension 2: mean 2, squares 1 + 1 + 4 over 3
    assert target_variance(targets) == pytest.approx((8 / 3 + 6 / 3) / 2)


def test_the_constant_prediction_costs_one() -> None:
    targets = torch.randn(500, 16, generator=torch.Generator().manual_seed(0)) * 0.2 + 3.0
    means = targets.mean(0).expand_as(targets)
    assert latent_alignment_loss(
        means, targets, variance=target_variance(targets)
    ).item() == pytest.approx(1.0, abs=1e-4)


def test_one_token_per_patch_is_the_mean() -> None:
    features = torch.arange(24.0).view(2, 4, 3)
    assert torch.equal(pool_frames(features), features.mean(1))


def test_more_tokens_per_patch_are_means_of_runs() -> None:
    features = torch.tensor([[[0.0], [2.0], [4.0], [8.0]], [[1.0], [1.0], [3.0], [5.0]]])
    assert pool_frames(features, 2)[:, 0].tolist() == [1.0, 6.0, 1.0, 4.0]


def test_neighbours_are_those_of_the_same_span() -> None:
    means = torch.tensor([[1.0, 0.0], [3.0, 4.0], [0.0, 2.0], [5.0, 0.0], [0.0, 1.0]])
    rows = torch.tensor([10, 11, 14, 15, 40])  # two spans of two and one of one
    # (1, 0) and (3, 4): 3 / 5; (0, 2) and (5, 0): 0
    assert neighbour_cosines(means, rows).tolist() == pytest.approx([0.6, 0.0])
    assert neighbour_cosines(means[:1], rows[:1]).shape == (0,)

"""The objective, each formula worked out by hand."""

import math

import pytest
import torch

from rl.errors import ObjectiveError
from rl.objective import fill_missing, judge_group, latent_surrogate, reduce_width

NAN = math.nan


def test_reductions_over_the_width():
    value = torch.tensor([6.0])
    assert [reduce_width(value, 9, r).item() for r in ("sum", "sqrt_dim", "mean")] == [
        6.0,
        2.0,
        pytest.approx(2 / 3),
    ]
    with pytest.raises(ObjectiveError, match="'max'"):
        reduce_width(value, 9, "max")  # type: ignore[arg-type]


def test_latent_surrogate_by_hand():
    # Width 4 and sqrt_dim: Δ = (0.6, -0.6, 0.6, -0.6)/2 → ratios e^±0.3 = 1.349859, 0.740818.
    # Clip 0.8 … 1.2, advantages 1, 1, -1, -1:
    #   min(1.349859, 1.2) = 1.2; min(0.740818, 0.8) = 0.740818;
    #   min(-1.349859, -1.2) = -1.349859; min(-0.740818, -0.8) = -0.8.
    new = torch.tensor([0.6, -0.6, 0.6, -0.6], requires_grad=True)
    term = latent_surrogate(
        new,
        torch.zeros(4),
        torch.tensor([1.0, 1.0, -1.0, -1.0]),
        dim=4,
        reduction="sqrt_dim",
        clip_low=0.2,
        clip_high=0.2,
        normalizer=4.0,
    )
    assert term.loss.item() == pytest.approx(-(1.2 + 0.740818 - 1.349859 - 0.8) / 4, abs=1e-6)
    assert term.clipped_L.tolist() == [True, False, False, True]
    term.loss.backward()
    # Clipped latents have no gradient; the others -A·r/(2·4).
    assert new.grad is not None
    assert new.grad.tolist() == pytest.approx([0, -0.740818 / 8, 1.349859 / 8, 0], abs=1e-6)


@pytest.mark.parametrize(
    ("outcome", "low", "high", "reason"),
    [
        ([1, 0, 0, 0], 0.0, 1.0, "kept"),
        ([0, 0, 0, 0], 0.0, 1.0, "all_wrong"),
        ([1, 1, 1, 1], 0.0, 1.0, "all_right"),
        ([1, 0, 0, 0], 0.3, 0.9, "too_hard"),
        ([1, 1, 1, 0], 0.1, 0.7, "too_easy"),
        ([1, 0, NAN, NAN], 0.0, 1.0, "kept"),
        ([1, NAN, NAN, NAN], 0.0, 1.0, "invalid"),
    ],
)
def test_groups_are_judged_by_valid_outcomes(outcome, low, high, reason):
    verdict = judge_group(outcome, low, high)
    assert (verdict.keep, verdict.reason) == (reason == "kept", reason)


def test_missing_values_move_nobody():
    filled = fill_missing(torch.tensor([1.0, NAN, 4.0]))
    assert filled.tolist() == [1.0, 2.5, 4.0]
    assert fill_missing(torch.tensor([NAN, NAN])).isnan().all()

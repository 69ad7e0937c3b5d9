"""Likeness of neighbouring latents, by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch

from rl.latent_stats import neighbour_cosine
from rl.trajectory import Sampling, Trajectory

FILLER = 9


def thought(*spans: list[list[float]]) -> Trajectory:
    """A completion of these spans of latents [T_j, 2], with start and end tokens between."""
    ids = [t for span in spans for t in (7, *[FILLER] * len(span), 8)] or [1]
    rows = [latent for span in spans for latent in span]
    return Trajectory(
        sample_id="s",
        prompt_ids=np.array([1]),
        completion_ids=np.array(ids),
        decision=np.zeros(len(ids), np.int8),
        logprobs=np.zeros(len(ids), np.float32),
        kept=np.zeros(len(ids), np.int32),
        latents=torch.tensor(rows).reshape(-1, 2),
        latent_logprobs=np.zeros(len(rows)),
        span_lengths=tuple(map(len, spans)),
        filler=FILLER,
        media=(),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text="",
    )


def test_by_hand():
    # Inside: cos 45° and cos 45°, then (another span) -1. No pair across spans.
    turning = thought([[2.0, 0.0], [1.0, 1.0], [0.0, 3.0]], [[0.0, 1.0], [0.0, -3.0]])
    # Means (1, 4/3) and (0, -1): cosine -4/5. A span of one has no pair inside.
    found = neighbour_cosine([turning])
    assert found.latents == pytest.approx((2 * math.sqrt(0.5) - 1) / 3)
    assert found.spans == pytest.approx(-0.8)
    # Pairs count, not trajectories: 3 and 1 inside, 1 and 1 between.
    short = thought([[1.0, 0.0], [4.0, 0.0]], [], [[0.0, 0.0]])
    both = neighbour_cosine([turning, short])
    assert both.latents == pytest.approx((2 * math.sqrt(0.5) - 1 + 1) / 4)
    assert both.spans == pytest.approx((-0.8 + 0.0) / 2)


def test_nothing_to_compare():
    for trajectories in ([], [thought()], [thought([[1.0, 0.0]])]):
        found = neighbour_cosine(trajectories)
        assert found.latents is None and found.spans is None


def test_bf16_latents_are_compared_in_float32():
    exact = thought([[1.0, 2.0], [2.0, 1.0]])
    coarse = dataclasses.replace(exact, latents=exact.latents.bfloat16())
    assert neighbour_cosine([coarse]).latents == pytest.approx(0.8, abs=1e-6)

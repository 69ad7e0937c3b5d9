"""SFT's second stage: latents that the policy makes itself take the place of the targets.

Source: the second stage of Mirage (arXiv 2506.17218), which trains the text on latents of the
model's own. What is here is our reconstruction: the latents are generated without gradient, and one
pass with gradient then scores text and means behind them.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rl.policy.scores import Scores
from rl.scoring import ReplayBatch

TOLERANCE = 1e-6  # of the largest entry: a change of less ends the iteration


@torch.no_grad()
def own_latents(
    model: Callable[..., Scores],
    batch: ReplayBatch,
    *,
    settled: Callable[[bool], bool] = bool,
) -> tuple[ReplayBatch, int]:
    """`batch` with each latent it feeds replaced by its own mean under `model`, given those before
    it, and how many forward passes that took. `batch.latents` stay what they are.

    All latents give way to what a pass over the row says about them, again and again (Jacobi
    iteration): after n passes the first n of each completion are those that generation one at a
    time gives, so as many passes as the longest completion has latents are exact. Often the others
    stand still before that, and it stops when none changes by more than `TOLERANCE`. `settled`
    makes of one rank's wish to stop that of all. The latents in `batch` are where it starts from:
    they matter for the number of passes only.
    """
    order = batch.inputs["slots"].latent_rows.argsort()  # means come trajectory by trajectory
    fed, passes, change = batch.inputs["latents"], 0, math.inf
    while not settled(passes >= max(batch.latent_counts) or change <= TOLERANCE):
        means = model(**{**batch.inputs, "latents": fed}).means[order]
        change = float((means - fed).abs().max() / means.abs().max()) if len(fed) else 0.0
        fed, passes = means, passes + 1
    return dataclasses.replace(batch, inputs={**batch.inputs, "latents": fed}), passes


@contextmanager
def in_eval_mode(model: nn.Module) -> Iterator[None]:
    """While this lasts, `model` drops nothing out and checkpoints nothing."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


@contextmanager
def seen_once(tower: nn.Module) -> Iterator[None]:
    """While this lasts, `tower` computes at its first call only, and later ones get the same: all
    of them show it the same clips.
    """
    forward, patched = tower.forward, "forward" in vars(tower)
    seen: list[Any] = []

    def once(*args: Any, **kwargs: Any) -> Any:
        if not seen:
            seen.append(forward(*args, **kwargs))
        return copy.copy(seen[0])  # the model splits the features, in place of the whole

    tower.forward = once
    try:
        yield
    finally:
        if patched:
            tower.forward = forward
        else:
            del tower.forward

"""Latents of the policy's own: all at once, the same as one after the other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rl.policy.vision import vision_tower
from rl.scoring import collate
from rl.sft.own_latents import own_latents, seen_once
from rl.trajectory import Sampling
from tests.latent import PROTOCOL, engine_for, requests_for, square_samples, thinking_policy
from tests.tiny import FAMILIES, Family

# Without noise a sampled latent is its mean as well, also where text and decisions are drawn.
NOISELESS = replace(PROTOCOL, noise_scale=0.0)


@pytest.mark.parametrize("family", FAMILIES)
def test_they_are_those_that_the_engine_makes(family: Family, tmp_path: Path) -> None:
    policy, processor = thinking_policy(tmp_path / "policy", family, NOISELESS)
    engine = engine_for(policy, processor)
    samples = square_samples(tmp_path / "clips")
    greedy = requests_for(samples, 1, Sampling(0.0, 20, "always"))
    drawn = requests_for(samples, 2, Sampling(2.0, 20, "always"))
    sampled = [t for group in engine.generate([*greedy, *drawn]) for t in group]
    assert max(len(t.span_lengths) for t in sampled) > 1  # a span behind another and behind text
    longest = max(len(t.latents) for t in sampled)
    blank = [replace(t, latents=torch.zeros_like(t.latents)) for t in sampled]
    batch = collate(blank, policy, engine.media)
    tower: Any = vision_tower(policy)
    calls = []
    tower.blocks[0].register_forward_hook(lambda *_: calls.append(1))
    with seen_once(tower):
        found, passes = own_latents(policy, batch)
    wanted = collate(sampled, policy, engine.media)
    torch.testing.assert_close(
        found.inputs["latents"], wanted.inputs["latents"], rtol=1e-5, atol=1e-5
    )
    assert 2 < passes <= longest
    assert len(calls) == 1
    assert torch.equal(found.latents, batch.latents)  # what they are compared with
    assert own_latents(policy, found)[1] == 1  # who starts where they end stops at once


def test_ranks_stop_together(tmp_path: Path) -> None:
    policy, processor = thinking_policy(tmp_path / "policy", protocol=NOISELESS)
    engine = engine_for(policy, processor)
    requests = requests_for(square_samples(tmp_path / "clips", 1), 1, Sampling(0.0, 8, "always"))
    batch = collate([*engine.generate(requests)[0]], policy, engine.media)
    asked = []

    def another_rank(settled: bool) -> bool:
        asked.append(settled)
        return len(asked) == 9

    found, passes = own_latents(policy, batch, settled=another_rank)
    assert passes == 8 and asked[-1]
    torch.testing.assert_close(found.inputs["latents"], batch.inputs["latents"])

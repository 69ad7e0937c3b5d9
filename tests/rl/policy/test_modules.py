"""Latent modules in a policy: off, on, saved, with adapters, and in every combination replayed."""

import itertools

import pytest
import torch
from peft import LoraConfig, get_peft_model

from rl.errors import PolicyError
from rl.policy.adapters import with_whole_modules
from rl.policy.depth import DeepLayer, DepthConfig
from rl.policy.injection import InjectionConfig
from rl.policy.model import load_policy, make_policy
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol
from rl.policy.visual_replay import VisualReplayConfig
from rl.scoring import collate, replay, replay_gaps
from rl.trajectory import Sampling
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_processor

PARTS = {
    "injection": InjectionConfig(heads=2),
    "depth": DepthConfig(),
    "visual_replay": VisualReplayConfig(tokens=3, window=(1, 2, 2)),
}
COMBINATIONS = [
    (family, names)
    for family in FAMILIES
    for count in range(1, 4)
    for names in itertools.combinations(PARTS, count)
    if not (family == "qwen3_5" and "visual_replay" in names)
]


def modules(names):
    return ModulesConfig(**{name: PARTS[name] for name in names})


def sampled(policy, processor, folder, sampling=Sampling(1.0, 20), size=3):  # noqa: B008
    engine = engine_for(policy, processor)
    requests = requests_for(square_samples(folder), size, sampling)
    return engine, [t for group in engine.generate(requests) for t in group]


@pytest.mark.parametrize(("family", "names"), COMBINATIONS)
def test_replay_gives_back_the_samplers_log_probs(family, names, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", family, modules=modules(names))
    engine, trajectories = sampled(policy, processor, tmp_path / "clips")
    assert sum(len(t.latents) for t in trajectories) > 10
    with torch.no_grad():
        found = replay(policy, collate(trajectories, policy, engine.media), policy)
    gaps = replay_gaps(found, trajectories)
    assert gaps.largest < 1e-5
    if "depth" in names:
        assert 0.0 < found.depth.item() < 1.0
    if "visual_replay" in names:
        shown = [t.replayed for t in trajectories if len(t.latents)]
        assert all((r[0] >= 0).sum() >= 1 for r in shown)
        for r in shown:  # no token twice in a completion
            places = r[r >= 0].tolist()
            assert len(set(places)) == len(places)

"""Weights by vLLM's own weight transfer, and sleep between rollouts, in a pool of engines."""

import dataclasses

import numpy as np
import pytest
import torch

from rl.data.media import MediaProcessor
from rl.errors import SyncError
from rl.interfaces import WeightUpdate
from rl.trajectory import Sampling
from rl.weights import state_checksum, weight_update
from rollouts.pool import RolloutPool
from rollouts.vllm_transfer import BACKENDS
from rollouts.worker import EngineSpec
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.rollouts import store_transfer
from tests.rollouts.vllm_engines import OPTIONS


def test_two_engines_take_weights_from_one_sender(tmp_path, monkeypatch):
    """NCCL itself needs GPUs; ranks, steps, versions and caches are the same for any backend."""
    store_transfer.install(tmp_path / "site", monkeypatch)
    monkeypatch.setitem(BACKENDS, store_transfer.NAME, store_transfer.TrainerInfo)
    policy, processor = thinking_policy(tmp_path / "p")
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    options = dataclasses.replace(OPTIONS, weight_transfer=store_transfer.NAME, enable_sleep=True)
    spec = EngineSpec(str(tmp_path / "policy"), engine="vllm", options=options)
    requests = requests_for(square_samples(tmp_path / "clips"), 2, Sampling(1.0, 12, "always"))
    other, _ = thinking_policy(tmp_path / "q", boldness=0.4)
    with RolloutPool(spec, MediaProcessor(processor), 2, cpus_per_worker=0, timeout=90) as pool:

        def check(version):
            expected = [t for g in engine_for(policy, processor).generate(requests) for t in g]
            found = [t for g in pool.generate(requests) for t in g]
            for a, b in zip(found, expected, strict=True):
                assert a.policy_version == version
                assert a.completion_ids.tolist() == b.completion_ids.tolist()
                np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)

        check(0)
        part = {"lm_head.weight": policy.lm_head.weight.detach().clone()}
        with pytest.raises(SyncError, match=r"must be whole; \d+ are missing"):
            pool.update_weights(WeightUpdate(1, part, state_checksum(part)))
        policy.load_state_dict(other.state_dict())
        assert pool.update_weights(weight_update(policy, 2)) == 2
        check(2)
        with torch.no_grad():
            policy.lm_head.weight.mul_(1.5)
        part = {"lm_head.weight": policy.lm_head.weight.detach().clone()}
        assert pool.update_weights(WeightUpdate(3, part, state_checksum(part))) == 3
        check(3)
        bad = {"lm_head.weight": torch.zeros(3, 5)}
        with pytest.raises(SyncError, match=r"lm_head\.weight is \(3, 5\)"):
            pool.update_weights(WeightUpdate(4, bad, state_checksum(bad)))
        # A transfer out of turn, which vLLM refuses.
        monkeypatch.setattr(
            store_transfer.Sender, "send_weights", lambda sender: sender.client.update_weights({})
        )
        with pytest.raises(SyncError, match=r"version 4 did not arrive.*update weights"):
            pool.update_weights(WeightUpdate(4, part, state_checksum(part)))

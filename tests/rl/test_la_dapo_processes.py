"""LA-DAPO in two processes: their passes under a token budget keep in step, and FSDP2."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.multiprocessing as mp
from torch.distributed.fsdp import fully_shard

from rl.errors import ObjectiveError
from rl.passes import plan_passes
from rl.scoring import collate
from rl.trajectory import Sample, Trajectory
from tests.latent import square_samples, thinking_policy
from tests.rl.test_la_dapo import SIZE, first_update, passes_of, trainer_for

BUDGET = 150


def one_process(rank: int, folder: Path, samples: list[Sample]) -> None:
    """The same update whole and in passes; writes down its gradients and passes."""
    # Before there are ranks: of these only the first saves models.
    world = *thinking_policy(folder / f"policy{rank}", boldness=1.2), samples
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "OMP_NUM_THREADS": "1"}
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder / 'rendezvous'}", rank=rank, world_size=2
    )
    found: dict[str, Any] = {}
    for name, changes in {"whole": {}, "cut": {"max_tokens_per_microbatch": BUDGET}}.items():
        trainer = trainer_for(
            world, folder / f"{name}{rank}", max_steps=1, filter_groups=False, **changes
        )
        passes = passes_of(trainer)
        gradients, line = first_update(trainer)
        found[name] = {
            "gradients": gradients,
            "loss": line["latents/loss"],
            "passes": len(passes),
            "needed": len(plan_passes(passes[0]["trajectories"], BUDGET)),
        }
    with pytest.raises(ObjectiveError, match="no whole groups of 4"):
        trainer_for(world, folder / f"uneven{rank}", per_device_train_batch_size=SIZE // 2)
    found["sharded"] = sharded(trainer.policy, passes[0]["trajectories"], trainer.rollouts.media)
    torch.save(found, folder / f"found{rank}.pt")
    torch.distributed.destroy_process_group()


def sharded(policy: Any, rows: list[Trajectory], media: Any) -> dict[str, float]:
    """How far log-probs and gradients under FSDP2, laid out as accelerate does it, are from those
    without. Each process has rows of its own, and sharded gradients are means over processes.
    """
    batch = collate(rows, policy, media)
    policy.zero_grad()
    alone = policy(**batch.inputs)
    (alone.logprobs.sum() + alone.means.sum()).backward()
    expected = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    for gradient in expected.values():
        torch.distributed.all_reduce(gradient)
        gradient /= 2
    policy.zero_grad()
    text = policy.base_model.language_model
    for part in (text.embed_tokens, *text.layers, [text.norm, policy.lm_head], policy):
        fully_shard(part)
    found = policy(**batch.inputs)
    (found.logprobs.sum() + found.means.sum()).backward()
    gap = float((found.logprobs - alone.logprobs).detach().abs().max())
    pairs = {
        n: (p.grad.full_tensor(), expected[n])
        for n, p in policy.named_parameters()
        if n in expected
    }
    largest = max(float(g.abs().max()) for g in expected.values())
    slope = max(float((ours - theirs).abs().max()) for ours, theirs in pairs.values())
    return {"logprobs": gap, "gradients": slope / largest, "parameters": len(pairs)}


def test_two_processes_make_as_many_passes_and_the_same_update(tmp_path: Path) -> None:
    samples = square_samples(tmp_path / "clips", 8)
    mp.start_processes(  # type: ignore[attr-defined]
        one_process, (tmp_path, samples), nprocs=2, start_method="spawn"
    )
    first, second = (torch.load(tmp_path / f"found{rank}.pt") for rank in range(2))
    assert first["cut"]["needed"] != second["cut"]["needed"]
    for one in (first, second):
        assert one["sharded"]["parameters"] == len(first["whole"]["gradients"])
        assert one["sharded"]["logprobs"] < 1e-5 and one["sharded"]["gradients"] < 1e-5
    most = max(first["cut"]["needed"], second["cut"]["needed"])
    assert first["cut"]["passes"] == second["cut"]["passes"] == most > 1
    for one in (first, second):
        assert one["cut"]["loss"] == pytest.approx(first["whole"]["loss"], abs=1e-5)
        expected = first["whole"]["gradients"]
        largest = max(float(g.abs().max()) for g in expected.values())
        for name, gradient in one["cut"]["gradients"].items():
            torch.testing.assert_close(
                gradient, expected[name], rtol=1e-4, atol=1e-5 * largest, msg=name
            )

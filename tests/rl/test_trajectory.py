"""Trajectories check themselves."""

import dataclasses
import pickle

import numpy as np
import pytest
import torch

from rl.errors import TrajectoryError
from rl.policy.protocol import Slot
from rl.trajectory import MediaKey, Sample, Sampling, Trajectory, TrajectoryGroup

CUT = Sampling(top_k=4)


@pytest.fixture
def trajectory() -> Trajectory:
    return Trajectory(
        sample_id="a",
        prompt_ids=np.array([1, 2]),
        completion_ids=np.array([7, 9, 9, 8, 3]),
        decision=np.array([Slot.TOKEN, 0, Slot.DECISION, 0, Slot.TOKEN], dtype=np.int8),
        logprobs=np.array([-1, 0, -0.5, 0, -2], dtype=np.float32),
        kept=np.zeros(5, dtype=np.int32),
        latents=torch.ones(2, 4, dtype=torch.bfloat16),
        latent_logprobs=np.array([-3.0, -4.0]),
        span_lengths=(2,),
        filler=9,
        media=(MediaKey("clip.mp4", (0, 1), "abc"),),
        policy_version=3,
        finish_reason="stop",
        sampling=Sampling(),
        seed=5,
        text="",
    )


def test_whole_and_picklable(trajectory):
    again = pickle.loads(pickle.dumps(trajectory))
    assert again.imagined and again.latents.dtype == torch.bfloat16
    assert [s.shape for s in again.spans()] == [(2, 4)]
    assert again.media == trajectory.media


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_latents_survive_pickling_to_the_bit(trajectory, dtype):
    latents = torch.randn(1000, 8, generator=torch.Generator().manual_seed(0)).to(dtype)[::500, 2:6]
    whole = dataclasses.replace(trajectory, latents=latents)
    stored = pickle.dumps(whole)
    again = pickle.loads(stored).latents
    assert torch.equal(again, latents) and again.dtype == dtype
    assert len(stored) < 4000  # not the tensor that it is a view of
    again += 1  # what came out of an object store may be written to
    nothing = {"completion_ids": np.array([7, 8, 3, 3, 3]), "span_lengths": ()}
    empty = dataclasses.replace(
        trajectory, **nothing, latents=latents[:0], latent_logprobs=np.array([])
    )
    assert pickle.loads(pickle.dumps(empty)).latents.shape == (0, 4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"latents": torch.ones(1, 4)}, "1 latents, 2 filler tokens"),
        ({"span_lengths": (1,)}, "sum to 1"),
        ({"latent_logprobs": np.zeros(3)}, "3 latent log-probs"),
        ({"latents": torch.ones(8)}, r"\[L, H\]"),
        ({"decision": np.zeros(4, dtype=np.int8)}, "4 decisions"),
        ({"kept": np.zeros(4, dtype=np.int32)}, "4 kept counts"),
        ({"kept": np.array([3, 0, 0, 0, 1])}, "kept counts do not fit .* top_p 1.0"),
        ({"kept": np.array([-1, 0, 0, 0, 0])}, "kept counts do not fit"),
        ({"sampling": Sampling(top_p=0.9)}, "kept counts do not fit .* top_p 0.9"),
        ({"sampling": CUT, "kept": np.array([3, 0, 1, 0, 1])}, "at free tokens"),
        ({"sampling": CUT, "kept": np.array([5, 0, 0, 0, 1])}, "at most top_k"),
        ({"logprobs": np.ones(5, dtype=np.float32)}, "forced"),
        ({"prompt_ids": np.array([], dtype=np.int64)}, "empty"),
    ],
)
def test_contradictions_name_the_sample(trajectory, change, message):
    with pytest.raises(TrajectoryError, match=f"sample 'a'.*{message}"):
        dataclasses.replace(trajectory, **change)


def test_truncated_sampling(trajectory):
    dataclasses.replace(trajectory, sampling=CUT, kept=np.array([3, 0, 0, 0, 4], dtype=np.int32))
    assert CUT.truncated and Sampling(top_p=0.5).truncated and not Sampling().truncated
    assert not Sampling(0.0, top_p=0.5, top_k=3).truncated  # greedy


@pytest.mark.parametrize(
    "values", [{"top_p": 0.0}, {"top_p": 1.5}, {"top_p": np.nan}, {"top_k": -1}]
)
def test_nonsense_truncation_is_refused(values):
    (name,) = values
    with pytest.raises(TrajectoryError, match=f"{name} is .*must be"):
        Sampling(**values)


def test_a_group_is_of_one_sample(trajectory):
    sample = Sample("a", "clip.mp4", "?", "A")
    group = TrajectoryGroup(sample, (trajectory, trajectory))
    assert len(group) == 2 and list(group)[1] is trajectory
    with pytest.raises(TrajectoryError, match="'b' holds a trajectory of 'a'"):
        TrajectoryGroup(dataclasses.replace(sample, id="b"), (trajectory,))

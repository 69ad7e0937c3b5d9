"""A reward is a function: call it with columns and look at what it gives."""

import asyncio

import numpy as np
import pytest
import torch
from foresight_example_rewards import SpanCount, brevity, mentions

from rl.policy.protocol import Slot
from rl.trajectory import Sampling, Trajectory


def test_brevity():
    spoken = [{"role": "assistant", "content": "<|latent_start|><|latent|><|latent_end|> left"}]
    # 4 words where 3 are allowed: 3 / 4
    assert brevity(["one two three four", "one", "", spoken], words=3) == [0.75, 1.0, 1.0, 1.0]
    assert brevity(["word " * 120], id=["a"]) == [0.5]
    with pytest.raises(ValueError, match="words is 0"):
        brevity([], words=0)


def test_mentions():
    logged = {}
    values = asyncio.run(
        mentions(
            completions=["The Ball meets a ramp.", "the ballad", "anything", "anything"],
            objects=[["ball", "ramp"], ["ball"], None, []],
            log_metric=logged.__setitem__,
        )
    )
    assert values == [1.0, 0.0, None, None]
    assert logged == {"mentions/rows_with_objects": 0.5}
    assert asyncio.run(mentions(completions=[], objects=[])) == []


def trajectory(spans, ends):
    """Spans given by their latents; `ends` says how each ended, None for a completion cut off."""
    start, filler, end = 7, 9, 8
    ids, decision = [], []
    for latents, slot in zip(spans, ends, strict=True):
        ids += [start, *[filler] * len(latents)]
        decision += [Slot.TOKEN, *[Slot.DECISION] * len(latents)]
        if slot is not None:
            ids.append(end)
            decision.append(slot)
    flat = [z for latents in spans for z in latents]
    return Trajectory(
        sample_id="a",
        prompt_ids=np.array([1]),
        completion_ids=np.array(ids or [2]),
        decision=np.array(decision or [Slot.TOKEN], dtype=np.int8),
        logprobs=np.zeros(max(len(ids), 1), dtype=np.float32),
        kept=np.zeros(max(len(ids), 1), dtype=np.int32),
        latents=torch.tensor(flat, dtype=torch.bfloat16).reshape(-1, 2),
        latent_logprobs=np.zeros(len(flat)),
        span_lengths=tuple(map(len, spans)),
        filler=filler,
        media=(),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text="",
    )


EAST, NORTH = [2.0, 0.0], [0.0, 2.0]


def test_span_count():
    reward = SpanCount(wanted=2)
    own, forced = Slot.DECISION, Slot.FORCED
    rows = [
        trajectory([[EAST, NORTH], [NORTH]], [own, own]),  # 2 of 2
        trajectory([[EAST, NORTH], [NORTH]], [own, forced]),  # 1: 1 - 1/2
        trajectory([[EAST]] * 4, [own] * 4),  # 4: 1 - 2/4
        trajectory([[EAST], [NORTH]], [own, None]),  # 1, the other was cut off
        trajectory([[EAST], []], [own, None]),  # 1, and a span that was only opened
        trajectory([], []),
    ]
    assert reward(trajectories=rows, id=["a"] * 6) == [1.0, 0.5, 0.5, 0.5, 0.5, 0.0]


def test_span_count_looks_at_the_latents():
    # East to north is a distance of √8 with a norm of 2: √2 of it. A span of one does not move.
    row = trajectory([[EAST, NORTH], [NORTH]], [Slot.DECISION] * 2)
    assert SpanCount(wanted=2, least_change=1.4)(trajectories=[row]) == [0.5]
    assert SpanCount(wanted=2, least_change=1.5)(trajectories=[row]) == [0.0]


@pytest.mark.parametrize("options", [{"wanted": 0}, {"least_change": -1.0}])
def test_wrong_options_are_refused(options):
    with pytest.raises(ValueError, match="at least 1 and 0"):
        SpanCount(**options)

"""Passes under a token budget, by hand and for any lengths."""

from __future__ import annotations

from collections import Counter

import numpy as np
import torch
from hypothesis import given
from hypothesis import strategies as st

from rl.passes import deal_groups, plan_passes, take_rows
from rl.policy.protocol import Slot
from rl.trajectory import Sampling, Trajectory


def answer(group: int, prompt: int, completion: int) -> Trajectory:
    """A completion of so many tokens, to the prompt of a group."""
    return Trajectory(
        sample_id=str(group),
        prompt_ids=np.full(prompt, group),
        completion_ids=np.zeros(completion, np.int64),
        decision=np.full(completion, Slot.TOKEN, np.int8),
        logprobs=np.zeros(completion, np.float32),
        kept=np.zeros(completion, np.int32),
        latents=torch.zeros(0, 4),
        latent_logprobs=np.zeros(0),
        span_lengths=(),
        filler=9,
        media=(),
        policy_version=0,
        finish_reason="stop",
        sampling=Sampling(),
        seed=0,
        text="",
    )


def cost(rows: list[Trajectory]) -> int:
    prompts = {t.sample_id: len(t.prompt_ids) for t in rows}
    return sum(prompts.values()) + sum(len(t.completion_ids) for t in rows)


def test_by_hand():
    # Group 1 takes 10 + 3 + 3 = 16 tokens, group 2 20 + 5 = 25, group 3 4 + 2 + 2 + 2 = 10.
    rows = [answer(1, 10, 3), answer(2, 20, 5), answer(3, 4, 2), answer(1, 10, 3)]
    rows += [answer(3, 4, 2), answer(3, 4, 2)]
    assert plan_passes(rows, 100) == [[0, 1, 2, 3, 4, 5]]
    # 25 alone; 16 and 10 together.
    assert plan_passes(rows, 26) == [[0, 2, 3, 4, 5], [1]]
    # 10 goes to the fuller of 25 and 16 that has room.
    assert plan_passes(rows, 35) == [[0, 3], [1, 2, 4, 5]]
    # Room for 10 + 3 but not for 3 more; 25 is above the budget and goes alone all the same.
    assert plan_passes(rows, 13) == [[0], [1], [2, 4, 5], [3]]


def test_more_passes_than_needed():
    rows = [answer(group, 4, 2) for group in (1, 1, 2, 2, 2)]
    assert plan_passes(rows, 100, at_least=2) == [[0, 1], [2, 3, 4]]  # between the groups
    assert plan_passes(rows, 100, at_least=3) == [[0, 1], [2, 4], [3]]
    assert plan_passes(rows, 100, at_least=9) == [[0], [1], [2], [3], [4]]


GROUPS = st.lists(
    st.tuples(st.integers(1, 40), st.lists(st.integers(1, 20), min_size=1, max_size=6)),
    min_size=1,
    max_size=6,
)


@given(groups=GROUPS, budget=st.integers(1, 150), at_least=st.integers(1, 8))
def test_any_lengths(groups, budget, at_least):
    rows = [answer(g, prompt, c) for g, (prompt, cs) in enumerate(groups) for c in cs]
    plan = plan_passes(rows, budget, at_least=at_least)
    assert sorted(row for a_pass in plan for row in a_pass) == list(range(len(rows)))
    assert len(plan) >= min(at_least, len(rows))
    for a_pass in plan:
        assert len(a_pass) == 1 or cost([rows[row] for row in a_pass]) <= budget
    # A group that fits is in one pass, unless more passes were asked for than needed.
    if len(plan) > at_least or at_least == 1:
        passes = Counter(
            rows[row].sample_id
            for a_pass in plan
            for row in {rows[r].sample_id: r for r in a_pass}.values()
        )
        for g, (prompt, completions) in enumerate(groups):
            if prompt + sum(completions) <= budget:
                assert passes[str(g)] == 1


def test_dealing_keeps_groups_and_rows_whole():
    rows = [answer(g, 3, 1 + member) for g in range(6) for member in range(4)]
    batch = {
        "trajectories": rows,
        "lengths": torch.tensor([[len(t.completion_ids)] for t in rows]),
        "count": torch.tensor(24.0),
        "empty": None,
        "other": [1, 2],
    }
    torch.manual_seed(0)
    hands = deal_groups(batch, 4, 3)
    orders = [[t.sample_id for t in hand["trajectories"]] for hand in hands]
    assert all(order == [order[0]] * 4 + [order[4]] * 4 for order in orders)
    assert sorted({i for order in orders for i in order}) == [str(g) for g in range(6)]
    assert [i for order in orders for i in order[::4]] != [str(g) for g in range(6)]
    for hand in hands:
        lengths = [len(t.completion_ids) for t in hand["trajectories"]]
        assert hand["lengths"][:, 0].tolist() == lengths
        assert (hand["count"], hand["empty"], hand["other"]) == (24.0, None, [1, 2])
    some = take_rows(batch, [5, 0])
    assert some["lengths"].tolist() == [[2], [1]] and some["trajectories"] == [rows[5], rows[0]]

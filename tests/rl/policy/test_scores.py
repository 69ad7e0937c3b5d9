"""Scoring slots from hidden states, by hand on a vocabulary of six."""

import math

import pytest
import torch

from rl.policy.protocol import LatentTokens, Slot
from rl.policy.scores import Scores, ScoreSlots, full_logits, score_slots, truncated_scores

TOKENS = LatentTokens(start=1, end=2, filler=3, banned=(4,))
# Hidden states are the logits themselves: the LM head is the identity.
LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).log1p()  # e^logit = 1, 2, 3, 4, 5, 6


def score(ids, kinds, may_start, temperature=1.0, kept=None, chunk=100, linear=False):
    """Scores of a row of ids, one a position: zeros where nothing was decided."""
    hidden = LOGITS.expand(1, len(ids), 6)
    at = [place for place, kind in enumerate(kinds) if kind != Slot.FORCED]
    kept = kept or [0] * len(ids)
    slots = ScoreSlots(
        rows=torch.tensor([place - 1 for place in at]),
        ids=torch.tensor([ids[place] for place in at]),
        kinds=torch.tensor([kinds[place] for place in at], dtype=torch.int8),
        may_start=torch.tensor([may_start[place] for place in at]),
        temperature=torch.full((len(at),), temperature),
        kept=torch.tensor([kept[place] for place in at], dtype=torch.int32),
        latent_rows=torch.tensor([p - 1 for p, i in enumerate(ids) if i == TOKENS.filler]).long(),
        most_kept=max(kept),
    )
    lm_head = torch.nn.Linear(6, 6, bias=False) if linear else lambda h: h
    if linear:
        torch.nn.init.eye_(lm_head.weight)
    found = score_slots(
        hidden, slots, tokens=TOKENS, lm_head=lm_head, head=lambda h: 10 * h, chunk=chunk
    )
    logprobs, entropies = (
        torch.zeros(1, len(ids)).index_copy(1, torch.tensor(at), value[None])
        for value in (found.logprobs, found.entropies)
    )
    return Scores(logprobs, entropies, found.means)


@pytest.mark.parametrize("linear", [False, True], ids=["any head", "linear head"])
def test_by_hand(linear):
    #            prompt  start        latent       go on          end            last text
    ids = [0, 1, 3, 3, 2, 5]
    kinds = [0, Slot.TOKEN, Slot.FORCED, Slot.DECISION, Slot.DECISION, Slot.TOKEN]
    result = score(ids, kinds, [False, True, False, False, False, False], linear=linear)
    # Text may be 0, start or 5 (weights 1, 2, 6); once no span may open, 0 or 5 (1, 6). Decisions
    # weigh the end token (3) against everything else (18).
    expected = [0, math.log(2 / 9), 0, math.log(18 / 21), math.log(3 / 21), math.log(6 / 7)]
    torch.testing.assert_close(result.logprobs, torch.tensor([expected]))
    entropy = -sum(p * math.log(p) for p in (1 / 9, 2 / 9, 6 / 9))
    decision = -sum(p * math.log(p) for p in (3 / 21, 18 / 21))
    assert result.entropies[0].tolist() == pytest.approx(
        [0, entropy, 0, decision, decision, -sum(p * math.log(p) for p in (1 / 7, 6 / 7))], abs=1e-6
    )
    torch.testing.assert_close(result.means, 10 * LOGITS.expand(2, 6))


def test_truncated_by_hand():
    # The first two of 5, start, 0 (weights 6, 2, 1); a decision; the same, all three kept; whole.
    ids = [0, 1, 3, 5, 5]
    kinds = [0, Slot.TOKEN, Slot.DECISION, Slot.TOKEN, Slot.TOKEN]
    result = score(ids, kinds, [True] * 5, kept=[0, 2, 0, 3, 0])
    expected = [0, math.log(2 / 8), math.log(18 / 21), math.log(6 / 9), math.log(6 / 9)]
    torch.testing.assert_close(result.logprobs, torch.tensor([expected]))
    entropy = -sum(p * math.log(p) for p in (6 / 8, 2 / 8))
    assert result.entropies[0, 1].item() == pytest.approx(entropy, abs=1e-6)
    # Counts leave other positions as they are, to the bit.
    whole = score(ids, kinds, [True] * 5)
    for at in (2, 4):
        assert result.logprobs[0, at] == whole.logprobs[0, at]
        assert result.entropies[0, at] == whole.entropies[0, at]


def test_what_was_sampled_is_among_the_kept():
    # 0 (weight 1) is third; the two kept are then 5 (6) and 0, not 5 and start.
    result = score([0, 0], [0, Slot.TOKEN], [True, True], kept=[0, 2])
    assert result.logprobs[0, 1].item() == pytest.approx(math.log(1 / 7), abs=1e-6)
    # A single one kept leaves nothing to decide.
    result = score([0, 0], [0, Slot.TOKEN], [True, True], kept=[0, 1])
    assert result.logprobs[0, 1] == 0 == result.entropies[0, 1]


def test_gradient_of_truncated_replay_by_finite_differences():
    torch.manual_seed(0)
    logits = torch.randn(40, 12, dtype=torch.float64, requires_grad=True)
    ids = torch.randint(12, (40,))  # among the kept at times, and at times not
    kept = torch.randint(1, 12, (40,))

    def value(logits):
        return truncated_scores(logits.log_softmax(-1), ids, kept, int(kept.max()))[0]

    assert torch.autograd.gradcheck(value, logits)
    # By hand: the gradient of log softmax over the kept, and none outside.
    (slope,) = torch.autograd.grad(value(logits).sum(), logits)
    for row in range(40):
        ranked = logits[row].argsort(descending=True).tolist()
        inside = ranked[: kept[row]]
        if int(ids[row]) not in inside:
            inside[-1] = int(ids[row])
        expected = torch.zeros(12, dtype=torch.float64)
        expected[inside] = -logits[row].detach()[inside].softmax(-1)
        expected[ids[row]] += 1
        torch.testing.assert_close(slope[row], expected)


def test_temperature_divides_the_logits():
    # T = 0.5 squares the weights: start 4 against 1 + 4 + 36.
    result = score([0, 1], [0, Slot.TOKEN], [False, True], temperature=0.5)
    assert result.logprobs[0, 1].item() == pytest.approx(math.log(4 / 41), abs=1e-6)


def test_each_slot_is_scored_by_its_own_hidden_state():
    # Three hidden states that each make another token certain; slots name them in any order.
    hidden = 50 * torch.eye(6)[[5, 0, 1]].reshape(1, 3, 6)
    slots = ScoreSlots(
        rows=torch.tensor([2, 0, 0]),
        ids=torch.tensor([1, 5, 0]),
        kinds=torch.full((3,), Slot.TOKEN, dtype=torch.int8),
        may_start=torch.ones(3, dtype=torch.bool),
        temperature=torch.ones(3),
        kept=torch.zeros(3, dtype=torch.int32),
        latent_rows=torch.tensor([1]),
        most_kept=0,
    )
    found = score_slots(
        hidden, slots, tokens=TOKENS, lm_head=lambda h: h, head=lambda h: h, chunk=100
    )
    assert found.logprobs.tolist() == pytest.approx([0, 0, -50])
    assert torch.equal(found.means, hidden[:, 1])


def test_chunks_change_nothing():
    ids = [0, 5, 1, 5, 0, 0, 5, 5, 1, 5]
    kept = [0, 0, 2, 1, 0, 0, 0, 3, 0, 2]
    args = ids, [0] + [Slot.TOKEN] * 9, [True] * 10, 1.0, kept
    torch.testing.assert_close(score(*args, chunk=2).logprobs, score(*args).logprobs)


def test_nothing_to_score_keeps_the_graph():
    hidden = torch.randn(1, 3, 6, requires_grad=True)
    none = torch.zeros(0, dtype=torch.long)
    slots = ScoreSlots(
        none, none, none.to(torch.int8), none.bool(), none.float(), none.int(), none, most_kept=0
    )
    result = score_slots(
        hidden, slots, tokens=TOKENS, lm_head=lambda h: h, head=lambda h: h, chunk=100
    )
    assert result.logprobs.shape == (0,) and result.means.shape == (0, 6)
    (result.logprobs.sum() + result.means.sum()).backward()
    assert hidden.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_head_is_scored_as_any_other(dtype, bias):
    torch.manual_seed(0)
    count, width, vocabulary = 61, 16, 40
    head = torch.nn.Linear(width, vocabulary, bias=bias).to(dtype)
    hidden = (3 * torch.randn(2, 50, width)).to(dtype).requires_grad_()
    kinds = torch.randint(Slot.TOKEN, Slot.DECISION + 1, (count,), dtype=torch.int8)
    fillers_and_ends = torch.where(torch.rand(count) < 0.5, TOKENS.end, TOKENS.filler)
    slots = ScoreSlots(
        rows=torch.randint(100, (count,)),
        ids=torch.where(
            kinds == Slot.TOKEN, torch.randint(5, vocabulary, (count,)), fillers_and_ends
        ),
        kinds=kinds,
        may_start=torch.rand(count) < 0.5,
        temperature=torch.rand(count) + 0.5,
        kept=torch.zeros(count, dtype=torch.int32),
        latent_rows=torch.zeros(0, dtype=torch.long),
        most_kept=0,
    )

    def other(rows):
        """The same head, of a type that nothing is known of."""
        return full_logits(head, rows)

    results = []
    for lm_head in (head, other):
        found = score_slots(
            hidden, slots, tokens=TOKENS, lm_head=lm_head, head=lambda h: h, chunk=17
        )
        weights = torch.linspace(-1, 1, count)
        gradients = torch.autograd.grad(
            (found.logprobs * weights).sum(), [hidden, *head.parameters()]
        )
        results.append((found.logprobs, found.entropies, *gradients))
    precision = 1e-5 if dtype == torch.float32 else 2e-2
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=precision, atol=precision)


def test_going_on_stays_exact_where_the_end_is_nearly_certain():
    """log(1 - p) would have lost it."""
    head = torch.nn.Linear(6, 6, bias=False)
    torch.nn.init.eye_(head.weight)
    hidden = torch.zeros(1, 1, 6)
    hidden[..., TOKENS.end] = 30.0
    hidden.requires_grad_()
    one = torch.tensor([0])
    slots = ScoreSlots(
        one,
        torch.tensor([TOKENS.filler]),
        torch.tensor([Slot.DECISION], dtype=torch.int8),
        torch.tensor([False]),
        torch.ones(1),
        torch.tensor([0], dtype=torch.int32),
        one[:0],
        most_kept=0,
    )
    found = score_slots(hidden, slots, tokens=TOKENS, lm_head=head, head=lambda h: h, chunk=9)
    assert found.logprobs.item() == pytest.approx(math.log(5) - 30, abs=1e-5)
    found.logprobs.sum().backward()
    # 1/5 for each of the five others, times p_end; -p_end for the end.
    expected = [0.2, 0.2, -1.0, 0.2, 0.2, 0.2]
    assert hidden.grad is not None
    assert hidden.grad.flatten().tolist() == pytest.approx(expected, abs=1e-5)


def test_bf16_models_get_fp32_logits():
    head = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    rows = 20 * torch.randn(4, 64).bfloat16()
    logits = full_logits(head, rows)
    torch.testing.assert_close(logits, rows.float() @ head.weight.float().T)
    assert logits.dtype == torch.float32

"""Scoring slots from hidden states, by hand on a vocabulary of six."""

import math

import pytest
import torch

from rl.policy import scores
from rl.policy.protocol import LatentTokens, Slot
from rl.policy.scores import ScoreSlots, full_logits, score_slots, truncated_scores

TOKENS = LatentTokens(start=1, end=2, filler=3, banned=(4,))
# Hidden states are the logits themselves: the LM head is the identity.
LOGITS = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, 5.0]).log1p()  # e^logit = 1, 2, 3, 4, 5, 6


def score(ids, kinds, may_start, temperature=1.0, kept=None):
    hidden = LOGITS.expand(1, len(ids), 6)
    slots = ScoreSlots(
        torch.tensor([ids]),
        torch.tensor([kinds], dtype=torch.int8),
        torch.tensor([may_start]),
        torch.tensor([temperature]),
        torch.tensor([kept or [0] * len(ids)], dtype=torch.int32),
    )
    return score_slots(hidden, slots, tokens=TOKENS, lm_head=lambda h: h, head=lambda h: 10 * h)


def test_by_hand():
    #            prompt  start        latent       go on          end            last text
    ids = [0, 1, 3, 3, 2, 5]
    kinds = [0, Slot.TOKEN, Slot.FORCED, Slot.DECISION, Slot.DECISION, Slot.TOKEN]
    result = score(ids, kinds, [False, True, False, False, False, False])
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
        return truncated_scores(logits.log_softmax(-1), ids, kept)[0]

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


def test_chunks_change_nothing(monkeypatch):
    ids = [0, 5, 1, 5, 0, 0, 5, 5, 1, 5]
    kept = [0, 0, 2, 1, 0, 0, 0, 3, 0, 2]
    args = ids, [0] + [Slot.TOKEN] * 9, [True] * 10, 1.0, kept
    whole = score(*args)
    monkeypatch.setattr(scores, "CHUNK", 2)
    torch.testing.assert_close(score(*args).logprobs, whole.logprobs)


def test_nothing_to_score_keeps_the_graph():
    hidden = torch.randn(1, 3, 6, requires_grad=True)
    slots = ScoreSlots(
        torch.zeros(1, 3, dtype=torch.long),
        torch.zeros(1, 3, dtype=torch.int8),
        torch.zeros(1, 3, dtype=torch.bool),
        torch.ones(1),
        torch.zeros(1, 3, dtype=torch.int32),
    )
    result = score_slots(hidden, slots, tokens=TOKENS, lm_head=lambda h: h, head=lambda h: h)
    assert result.logprobs.abs().sum() == 0 and result.means.shape == (0, 6)
    (result.logprobs.sum() + result.means.sum()).backward()


def test_bf16_models_get_fp32_logits():
    head = torch.nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)
    rows = 20 * torch.randn(4, 64).bfloat16()
    logits = full_logits(head, rows)
    torch.testing.assert_close(logits, rows.float() @ head.weight.float().T)
    assert logits.dtype == torch.float32

"""Drawing tokens and decisions: truncation by hand and by its properties, and no waiting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from rl.policy.protocol import LatentTokens
from rl.policy.sampling import decide, draw_text
from rl.policy.scores import truncate, truncated_scores

TOKENS = LatentTokens(start=1, end=2, filler=3, banned=(4,))
INF = math.inf


def logp_of(*weights: float) -> torch.Tensor:
    """Log-probs [1, V] of unnormalised weights."""
    found = torch.tensor([weights], dtype=torch.float32)
    return (found / found.sum()).log()


@pytest.mark.parametrize(
    ("weights", "top_p", "top_k", "expected"),
    [
        ((2, 4, 1, 3), 1.0, 2, (0, 4 / 7, 0, 3 / 7)),
        ((2, 4, 1, 3), 0.65, 0, (0, 4 / 7, 0, 3 / 7)),  # 0.4 falls short, 0.7 crosses and stays
        ((2, 4, 1, 3), 0.75, 0, (2 / 9, 4 / 9, 0, 3 / 9)),
        ((2, 4, 1, 3), 0.05, 0, (0, 1, 0, 0)),  # the likeliest stays, whatever p
        ((2, 4, 1, 3), 0.55, 2, (0, 1, 0, 0)),  # of the first two, 4/7 is enough: top-k came first
        ((2, 4, 1, 3), 0.6, 2, (0, 4 / 7, 0, 3 / 7)),
        ((2, 4, 1, 3), 1.0, 9, (0.2, 0.4, 0.1, 0.3)),  # more than there are: all
        ((2, 0, 1, 1), 1.0, 4, (0.5, 0, 0.25, 0.25)),  # nor does a ban come back
        ((2, 0, 1, 1), 0.999, 0, (0.5, 0, 0.25, 0.25)),
        ((1, 2, 2, 2), 1.0, 2, (0, 0.5, 0.5, 0)),  # of equals, the lower id
        ((1, 1, 1, 1), 0.4, 0, (0.5, 0.5, 0, 0)),
    ],
)
def test_truncation_by_hand(weights, top_p, top_k, expected):
    logp, kept = truncate(logp_of(*weights), torch.tensor([top_p]), torch.tensor([top_k]))
    torch.testing.assert_close(logp.exp(), torch.tensor([expected], dtype=torch.float32))
    assert kept.dtype == torch.int32 and kept.item() == sum(p > 0 for p in expected)


def test_rows_without_limits_are_untouched():
    logp = torch.randn(3, 50).log_softmax(-1)
    found, kept = truncate(logp, torch.tensor([1.0, 0.5, 1.0]), torch.tensor([0, 0, 7]))
    assert torch.equal(found[0], logp[0]) and kept[0] == 0
    assert 1 <= kept[1] < 50 and kept[2] == 7


LOGITS = st.lists(
    st.one_of(st.floats(-20, 20, width=32), st.just(-INF)), min_size=2, max_size=40, unique=True
)


@given(LOGITS, st.floats(1 / 64, 1.0, width=32), st.integers(0, 45), st.randoms())
def test_truncation_keeps_the_likeliest(logits, top_p, top_k, random):
    logp = torch.tensor([logits]).log_softmax(-1)
    limits = torch.tensor([top_p]), torch.tensor([top_k])
    found, kept = truncate(logp, *limits)
    assert found.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
    inside = found[0] > -INF
    if kept.item():
        assert int(inside.sum()) == kept.item() <= (top_k or len(logits))
        order = logp[0].argsort(descending=True, stable=True)
        assert inside[order].tolist() == [i < kept.item() for i in range(len(logits))]
        # Nothing but the scale changes inside.
        ratio = (found - logp)[0][inside]
        assert (ratio - ratio[0]).abs().max() <= 1e-5 and ratio[0] >= -1e-6
    else:
        assert torch.equal(found, logp) and top_p == 1.0 and top_k == 0
    if len(set(logp[0].tolist())) == len(logits):  # rounding made no ties
        turn = random.sample(range(len(logits)), len(logits))
        turned, count = truncate(logp[:, turn], *limits)
        # A token may fall on the boundary by the rounding of sums in another order.
        if count == kept:
            torch.testing.assert_close(turned, found[:, turn], atol=1e-5, rtol=1e-5)
        else:
            mass = logp.double().exp().sort(descending=True).values.cumsum(-1)
            if top_k:
                mass = mass[:, :top_k] / mass[:, :top_k][:, -1]
            assert (mass - top_p).abs().min() < 1e-6


@given(LOGITS, st.floats(1 / 64, 1.0, width=32), st.integers(0, 45))
def test_replay_of_truncation_is_truncation(logits, top_p, top_k):
    logp = torch.tensor([logits]).log_softmax(-1)
    found, kept = truncate(logp, torch.tensor([top_p]), torch.tensor([top_k]))
    if kept.item():
        ids = (found[0] > -INF).nonzero()[:, 0]
        count = len(ids)
        replayed, entropy = truncated_scores(logp.expand(count, -1), ids, kept.expand(count))
        torch.testing.assert_close(replayed, found[0, ids], atol=1e-6, rtol=1e-6)
        expected = -(found[0, ids].exp() * found[0, ids]).sum()
        assert entropy[0].item() == pytest.approx(expected.item(), abs=1e-5)


def arguments(rows: int, size: int):
    generator = torch.Generator().manual_seed(0)
    return (
        3 * torch.randn(rows, size, generator=generator),
        torch.arange(rows) % 2 == 0,
        torch.tensor([0.0, 0.7, 1.0, 1.3]).repeat(rows // 4),
        torch.tensor([0.5, 1.0, 0.9, 1.0, 0.6]).repeat(rows)[:rows],
        torch.tensor([0, 0, 5]).repeat(rows)[:rows],
        torch.rand(rows, generator=generator, dtype=torch.float64),
    )


def test_rows_do_not_see_each_other():
    given = arguments(24, 30)
    ids, logprobs, kept = draw_text(*given, tokens=TOKENS, any_truncated=True)
    assert not {2, 3, 4} & set(ids.tolist()) and 1 not in ids[1::2]
    for row in range(24):
        one = [value[row : row + 1] for value in given]
        cut = bool(one[2] > 0 and (one[3] < 1 or one[4] > 0))
        alone = draw_text(*one, tokens=TOKENS, any_truncated=cut)
        assert ids[row] == alone[0] and kept[row] == alone[2] and bool(kept[row]) == cut
        torch.testing.assert_close(logprobs[row : row + 1], alone[1], atol=1e-6, rtol=0)


def test_greedy_rows_are_whole_at_temperature_one():
    # Weights 1, 2, 6 of 0, start, 5; the likeliest, in spite of top-k 1.
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]).log1p()
    one, u = torch.ones(1), torch.zeros(1, dtype=torch.float64)
    ids, logprobs, kept = draw_text(
        logits, torch.tensor([True]), 0 * one, one, torch.tensor([1]), u, TOKENS,
        any_truncated=True,
    )  # fmt: skip
    assert (ids.item(), kept.item()) == (5, 0)
    assert logprobs.item() == pytest.approx(math.log(6 / 9), abs=1e-6)
    # Ending weighs 3 of 21: greedy goes on although u = 0 would end.
    ids, logprobs = decide(logits, 0 * one, u, TOKENS)
    assert ids.item() == TOKENS.filler
    assert logprobs.item() == pytest.approx(math.log(18 / 21), abs=1e-6)
    # At temperature 0.5 weights are squared: 9 of 91.
    for at, end in ((9 / 91 - 1e-4, True), (9 / 91 + 1e-4, False)):
        ids, logprobs = decide(logits, 0.5 * one, torch.full_like(u, at), TOKENS)
        assert (ids.item() == TOKENS.end) is end
        expected = math.log(9 / 91 if end else 82 / 91)
        assert logprobs.item() == pytest.approx(expected, abs=1e-6)


def test_nothing_waits_for_the_device():
    # Fake tensors have no values: reading one, or a shape that depends on one, is an error.
    with FakeTensorMode() as mode, torch.inference_mode():
        fake = [mode.from_tensor(value) for value in arguments(8, 30)]
        ids, logprobs, kept = draw_text(*fake, tokens=TOKENS, any_truncated=True)
        decided, _ = decide(fake[0], fake[2], fake[5], TOKENS)
    assert [x.dtype for x in (ids, decided, logprobs, kept)] == [
        torch.int64, torch.int64, torch.float32, torch.int32,
    ]  # fmt: skip
    assert {x.shape for x in (ids, logprobs, kept, decided)} == {(8,)}

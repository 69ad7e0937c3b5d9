"""Drawing tokens and decisions: truncation by hand and by its properties, and no waiting."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch._subclasses import FakeTensorMode

from rl.policy.protocol import LatentTokens
from rl.policy.sampling import BLOCK, _pick, draw_next
from rl.policy.scores import end_logprobs, text_logits, truncate, truncated_scores

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
        replayed, entropy = truncated_scores(
            logp.expand(count, -1), ids, kept.expand(count), int(kept.max())
        )
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
    drawn = draw_next(*given, tokens=TOKENS, any_truncated=True)
    assert not {2, 3, 4} & set(drawn.ids.tolist()) and 1 not in drawn.ids[1::2]
    for row in range(24):
        one = [value[row : row + 1] for value in given]
        cut = bool(one[2] > 0 and (one[3] < 1 or one[4] > 0))
        alone = draw_next(*one, tokens=TOKENS, any_truncated=cut)
        assert drawn.ids[row] == alone.ids and drawn.decisions[row] == alone.decisions
        assert drawn.kept[row] == alone.kept and bool(drawn.kept[row]) == cut
        for name in ("logprobs", "decision_logprobs"):
            ours = getattr(drawn, name)[row : row + 1]
            torch.testing.assert_close(ours, getattr(alone, name), atol=1e-6, rtol=0)


def untruncated(logits, may_start, temperature, u, tokens=TOKENS):
    one, zero = torch.ones(len(u)), torch.zeros(len(u), dtype=torch.int64)
    return draw_next(logits, may_start, temperature, one, zero, u, tokens, any_truncated=False)


def test_greedy_rows_are_whole_at_temperature_one():
    # Weights 1, 2, 6 of 0, start, 5; the likeliest, in spite of top-k 1.
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]).log1p()
    one, u = torch.ones(1), torch.zeros(1, dtype=torch.float64)
    may = torch.tensor([True])
    drawn = draw_next(logits, may, 0 * one, one, torch.tensor([1]), u, TOKENS, any_truncated=True)
    assert (drawn.ids.item(), drawn.kept.item()) == (5, 0)
    assert drawn.logprobs.item() == pytest.approx(math.log(6 / 9), abs=1e-6)
    # Ending weighs 3 of 21: greedy goes on although u = 0 would end.
    assert drawn.decisions.item() == TOKENS.filler
    assert drawn.decision_logprobs.item() == pytest.approx(math.log(18 / 21), abs=1e-6)


@pytest.mark.parametrize("may_start", [True, False])
@pytest.mark.parametrize("top_k", [0, 1])
def test_decisions_by_hand(may_start, top_k):
    # Weights 1 to 6 are squared at temperature 0.5: ending has 9 of 91, whatever text may hold.
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]]).log1p()
    one, k, may = torch.ones(1), torch.tensor([top_k]), torch.tensor([may_start])
    for at, end in ((9 / 91 - 1e-4, True), (9 / 91 + 1e-4, False)):
        u = torch.tensor([at], dtype=torch.float64)
        drawn = draw_next(logits, may, 0.5 * one, one, k, u, TOKENS, any_truncated=top_k > 0)
        assert (drawn.decisions.item() == TOKENS.end) is end and drawn.kept.item() == top_k
        expected = math.log(9 / 91 if end else 82 / 91)
        assert drawn.decision_logprobs.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("size", [BLOCK - 1, 2 * BLOCK, 5 * BLOCK + 7])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_draws_follow_the_distribution_of_the_replay(size, dtype):
    rows, banned = 64, (0, size // 2, size - 1)
    tokens = LatentTokens(start=size - 2, end=7, filler=BLOCK - 2, banned=banned)
    g = torch.Generator().manual_seed(size)
    logits = (3 * torch.randn(rows, size, generator=g)).to(dtype)
    logits[:, BLOCK // 2 : BLOCK] = -INF  # nor may what the model itself rules out be drawn
    before = logits.clone()
    may = torch.arange(rows) % 2 == 0
    temperature = torch.tensor([0.0, 0.5, 1.0, 1.7]).repeat(rows // 4)
    u = (torch.arange(rows) + 0.5).double() / rows
    drawn = untruncated(logits, may, temperature, u, tokens)
    assert torch.equal(logits, before)
    heated = logits.float() / torch.where(temperature > 0, temperature, 1.0)[:, None]
    logp = text_logits(heated, may, tokens).log_softmax(-1)
    chosen = logp.gather(1, drawn.ids[:, None])[:, 0]
    torch.testing.assert_close(drawn.logprobs, chosen, atol=2e-6, rtol=0)
    # The token drawn is the one whose step of the distribution function covers u.
    above = logp.double().exp().cumsum(-1).gather(1, drawn.ids[:, None])[:, 0]
    noisy = temperature > 0
    assert ((u <= above + 1e-6) & (u >= above - chosen.double().exp() - 1e-6))[noisy].all()
    assert torch.equal(drawn.ids[~noisy], logp.argmax(-1)[~noisy])
    end, more = end_logprobs(heated, tokens)
    expected = torch.where(drawn.decisions == tokens.end, end, more)
    torch.testing.assert_close(drawn.decision_logprobs, expected, atol=2e-6, rtol=0)
    torch.testing.assert_close(torch.where(noisy, u < end.exp(), end > more), expected == end)


@pytest.mark.parametrize("only", [0, BLOCK - 1, BLOCK, 3 * BLOCK + 4])
@pytest.mark.parametrize("u", [0.0, 0.5, 1.0 - 2.0**-53, 1.0])
def test_all_mass_in_one_token(only, u):
    size = 3 * BLOCK + 5
    tokens = LatentTokens(start=10, end=20, filler=30, banned=(40,))
    logits = torch.full((2, size), -INF)
    logits[:, only] = 3.0
    logits[:, [10, 20, 30, 40]] = 50.0
    heat, us = torch.tensor([0.0, 1.0]), torch.full((2,), u, dtype=torch.float64)
    drawn = untruncated(logits, torch.zeros(2, dtype=torch.bool), heat, us, tokens)
    assert drawn.ids.tolist() == [only, only] and drawn.logprobs.abs().max() == 0


@pytest.mark.parametrize(
    ("u", "index", "rest"),
    [
        (0.0, 1, 0.0),
        (0.1, 1, 0.4),
        (0.25, 1, 1.0),
        (0.4, 3, 0.2),
        (1.0 - 2.0**-53, 3, 1.0),
        (1.0, 3, 1.0),  # the end of the last weight, not the zeros after it
    ],
)
def test_picks_by_hand(u, index, rest):
    weights = torch.tensor([[0.0, 1.0, 0.0, 3.0, 0.0]])
    found, left = _pick(weights, torch.tensor([u], dtype=torch.float64))
    assert found.item() == index and left.item() == pytest.approx(rest, abs=1e-12)


@pytest.mark.parametrize("any_truncated", [False, True])
def test_nothing_waits_for_the_device(any_truncated):
    # Fake tensors have no values: reading one, or a shape that depends on one, is an error.
    with FakeTensorMode() as mode, torch.inference_mode():
        fake = [mode.from_tensor(value) for value in arguments(8, 30)]
        drawn = draw_next(*fake, tokens=TOKENS, any_truncated=any_truncated)
    found = drawn.ids, drawn.decisions, drawn.logprobs, drawn.decision_logprobs, drawn.kept
    assert [x.dtype for x in found] == [
        torch.int64, torch.int64, torch.float32, torch.float32, torch.int32,
    ]  # fmt: skip
    assert {x.shape for x in found} == {(8,)}

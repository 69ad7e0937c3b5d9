"""The span state machine, driven by hypothesis against what it says itself."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.errors import ProtocolError
from rl.policy.protocol import (
    SLOT_OF_STEP,
    Imagine,
    LatentProtocol,
    LatentTokens,
    Slot,
    SpanState,
    Step,
)

IDS = LatentTokens(start=1, end=2, filler=3, banned=(4,))
TEXT = (0, 5, 6)


@st.composite
def protocols(draw: st.DrawFn) -> LatentProtocol:
    low = draw(st.integers(1, 4))
    return LatentProtocol(
        min_length=low,
        max_length=draw(st.integers(low, low + 3)),
        max_spans=draw(st.integers(1, 3)),
    )


@st.composite
def walks(draw: st.DrawFn) -> tuple[LatentProtocol, Imagine, list[int], list[Step]]:
    """A completion drawn by following `next_step`, and the steps that were followed."""
    protocol = draw(protocols())
    imagine = draw(st.sampled_from(("free", "always", "never")))
    state, ids, steps = SpanState(), [], []
    for _ in range(draw(st.integers(1, 30))):
        step = protocol.next_step(state, imagine)
        choices = {
            Step.TOKEN: (*TEXT, IDS.start),
            Step.TOKEN_NO_START: TEXT,
            Step.START: (IDS.start,),
            Step.LATENT: (IDS.filler,),
            Step.DECIDE: (IDS.filler, IDS.end),
            Step.END: (IDS.end,),
        }
        token = draw(st.sampled_from(choices[step]))
        state = protocol.advance(state, token, IDS, imagine)
        ids.append(token)
        steps.append(step)
    return protocol, imagine, ids, steps


@given(walks())
def test_trace_reads_back_what_the_sampler_did(walk):
    protocol, imagine, ids, steps = walk
    trace = protocol.trace(ids, IDS, imagine)
    assert trace.slots.tolist() == [SLOT_OF_STEP[s] for s in steps]
    assert trace.may_start.tolist() == [s is Step.TOKEN for s in steps]
    assert sum(trace.span_lengths) == ids.count(IDS.filler)
    assert len(trace.span_lengths) == ids.count(IDS.start) <= protocol.max_spans
    whole = (
        trace.span_lengths if ids[-1] not in (IDS.start, IDS.filler) else trace.span_lengths[:-1]
    )
    assert all(protocol.min_length <= n <= protocol.max_length for n in whole)


@given(walks(), st.data())
def test_a_token_that_is_not_due_is_refused(walk, data):
    protocol, imagine, ids, steps = walk
    place = data.draw(st.integers(0, len(ids) - 1))
    allowed = {
        Step.TOKEN: {*TEXT, IDS.start},
        Step.TOKEN_NO_START: set(TEXT),
        Step.START: {IDS.start},
        Step.LATENT: {IDS.filler},
        Step.DECIDE: {IDS.filler, IDS.end},
        Step.END: {IDS.end},
    }[steps[place]]
    wrong = data.draw(st.sampled_from(sorted({0, 1, 2, 3, 4, 5, 6} - allowed)))
    with pytest.raises(ProtocolError, match=f"position {place}"):
        protocol.trace([*ids[:place], wrong], IDS, imagine)


def test_hand_made_completion():
    # Two to three latents a span, at most two spans; t is text.
    protocol = LatentProtocol(min_length=2, max_length=3, max_spans=2)
    #      t  S  z  z  E  S  z  z  z  E  t
    ids = [5, 1, 3, 3, 2, 1, 3, 3, 3, 2, 5]
    trace = protocol.trace(ids, IDS)
    F, T, D = Slot.FORCED, Slot.TOKEN, Slot.DECISION
    # The first two latents of a span are below the minimum; the third is a decision to go on; an
    # end after two latents is a decision, an end after three is forced.
    assert trace.slots.tolist() == [T, T, F, F, D, T, F, F, D, F, T]
    # The last position is text, but no third span may start there.
    assert np.flatnonzero(trace.may_start).tolist() == [0, 1, 5]
    assert trace.span_lengths == (2, 3)


def test_fixed_length_has_no_decisions():
    protocol = LatentProtocol(min_length=3, max_length=3)
    trace = protocol.trace([1, 3, 3, 3, 2, 0], IDS)
    assert trace.slots.tolist() == [Slot.TOKEN, 0, 0, 0, 0, Slot.TOKEN]


def test_imagining_always_forces_one_start_and_never_bans_all():
    protocol = LatentProtocol(min_length=1, max_length=1, max_spans=2)
    assert protocol.trace([1, 3, 2, 1], IDS, "always").slots.tolist() == [0, 0, 0, Slot.TOKEN]
    with pytest.raises(ProtocolError, match="START is due"):
        protocol.trace([5], IDS, "always")
    with pytest.raises(ProtocolError, match="TOKEN_NO_START is due"):
        protocol.trace([1], IDS, "never")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"min_length": 0}, "min_length"),
        ({"min_length": 5, "max_length": 4}, "5 and 4"),
        ({"max_spans": 0}, "max_spans"),
        ({"noise_scale": -0.1}, "noise_scale"),
        ({"noise_scale": float("nan")}, "noise_scale"),
        ({"density": "cauchy"}, "cauchy"),
        ({"start_token": "<|latent|>"}, "three different"),
    ],
)
def test_contradictions_are_refused(values, message):
    with pytest.raises(ProtocolError, match=message):
        LatentProtocol(**values)


def test_dictionary_round_trip_and_unknown_keys():
    protocol = LatentProtocol(min_length=2, noise_scale=0.25, density="vmf")
    assert LatentProtocol.from_dict(protocol.to_dict()) == protocol
    with pytest.raises(ProtocolError, match="noise"):
        LatentProtocol.from_dict({"noise": 1})

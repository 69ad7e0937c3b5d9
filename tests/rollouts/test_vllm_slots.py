"""The state machine on the device against the protocol's own, one completion at a time."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rl.policy.density import log_density
from rl.policy.protocol import LatentProtocol, LatentTokens, Slot
from rl.policy.scores import end_logprobs, text_logits
from rollouts.vllm_slots import LatentRequest, LatentSlots, pack, read_request, unpack

WIDTH, VOCABULARY = 6, 12
TOKENS = LatentTokens(start=8, end=9, filler=10, banned=(11,))


def slots_for(protocol, size=6):
    return LatentSlots(
        size,
        WIDTH,
        64,
        protocol,
        TOKENS,
        lambda hidden: 2.0 * hidden,
        dtype=torch.float32,
        device=torch.device("cpu"),
    )


def model(seed, position):
    """Hidden state and logits as a function of the request and the place: no state."""
    g = torch.Generator().manual_seed(1000 * seed + position)
    return torch.randn(WIDTH, generator=g), 2.0 * torch.randn(VOCABULARY, generator=g)


def run(slots, places, requests, steps, begun=None):
    """Sample `steps` tokens of `requests` in slots `places`; vLLM's part is an argmax."""
    done = begun or [[] for _ in requests]
    for place, request, ids in zip(places, requests, done, strict=True):
        if begun is None:
            slots.open(place, request, ids)
    slots.flush()
    for _ in range(steps):
        rows = [model(r.seed, len(ids)) for r, ids in zip(requests, done, strict=True)]
        logits = torch.stack([row[1] for row in rows])
        choice = slots.choose(logits, torch.tensor(places), places)
        sampled = torch.where(choice.given, choice.ids, logits.argmax(-1))
        hidden = torch.stack([row[0] for row in rows])
        slots.advance(choice, sampled, torch.ones(len(rows), dtype=torch.bool), hidden)
        for ids, token in zip(done, sampled.tolist(), strict=True):
            ids.append(token)
    return done


protocols = st.builds(
    lambda low, more, spans, noise, density: LatentProtocol(
        min_length=low, max_length=low + more, max_spans=spans, noise_scale=noise, density=density
    ),
    st.integers(1, 3),
    st.integers(0, 3),
    st.integers(1, 3),
    st.sampled_from([0.0, 0.4]),
    st.sampled_from(["gaussian", "vmf"]),
)
requests = st.builds(
    LatentRequest,
    seed=st.integers(0, 10**6),
    temperature=st.sampled_from([0.0, 0.7, 1.0]),
    top_p=st.sampled_from([1.0, 0.6]),
    top_k=st.sampled_from([0, 3]),
    imagine=st.sampled_from(["free", "always", "never"]),
    key=st.sampled_from(["mine", None]),
)


@settings(deadline=None, max_examples=60)
@given(protocols, st.lists(requests, min_size=1, max_size=4))
def test_completions_follow_the_protocol(protocol, asked):
    slots = slots_for(protocol)
    places = [5, 0, 3, 2][: len(asked)]
    for place, request, ids in zip(places, asked, run(slots, places, asked, 14), strict=True):
        trace = protocol.trace(ids, TOKENS, request.imagine)  # raises where it is not followed
        kept = slots.keep(place, 14)
        at, logprobs = 0, kept.logprobs.tolist()
        for position, (token, slot) in enumerate(zip(ids, trace.slots, strict=True)):
            hidden, logits = model(request.seed, position)
            if token == TOKENS.filler:
                mean = 2.0 * hidden
                if request.temperature == 0 or protocol.noise_scale == 0:
                    assert torch.equal(kept.latents[at], mean) and kept.latent_logprobs[at] == 0
                else:
                    expected = log_density(
                        kept.latents[at : at + 1],
                        mean[None],
                        protocol.noise_scale,
                        protocol.density,
                    )
                    assert kept.latent_logprobs[at].item() == pytest.approx(expected.item())
                at += 1
            if slot == Slot.FORCED or request.key is None:
                assert logprobs[position] == 0 == kept.truncated[position]
                continue
            heated = (logits / (request.temperature or 1.0))[None]
            if slot == Slot.DECISION:
                end, more = end_logprobs(heated, TOKENS)
                assert logprobs[position] == pytest.approx(
                    (end if token == TOKENS.end else more).item(), abs=1e-5
                )
            elif request.temperature == 0 or (request.top_p == 1.0 and request.top_k == 0):
                may = torch.tensor([bool(trace.may_start[position])])
                logp = text_logits(heated, may, TOKENS).log_softmax(-1)[0]
                assert logprobs[position] == pytest.approx(logp[token].item(), abs=1e-5)
            else:
                assert 0 < kept.truncated[position] <= (request.top_k or VOCABULARY)


@settings(deadline=None, max_examples=30)
@given(protocols, requests, st.integers(0, 12))
def test_a_request_that_was_taken_away_goes_on_as_it_was(protocol, request, cut):
    request = replace(request, key="mine")
    whole_slots, slots = slots_for(protocol), slots_for(protocol)
    (whole,) = run(whole_slots, [1], [request], 14)
    (begun,) = run(slots, [1], [request], cut)
    kept = slots.keep(1, 20)
    run(slots, [1], [LatentRequest(seed=7, key="other", imagine="always")], 5)  # another's turn
    slots.open(4, request, begun, kept)
    (found,) = run(slots, [4], [request], 14 - cut, [begun])
    assert found == whole
    count = found.count(TOKENS.filler)
    for name, length in (
        ("latents", count),
        ("latent_logprobs", count),
        ("logprobs", 14),
        ("truncated", 14),
    ):
        ours, theirs = getattr(slots.keep(4, 14), name), getattr(whole_slots.keep(1, 14), name)
        assert torch.equal(ours[:length], theirs[:length])


@pytest.mark.parametrize("keys", [("a", "b"), ("a", None), (None, None)])
def test_vllm_sees_edited_rows_only_beside_requests_without_a_key(keys):
    slots = slots_for(LatentProtocol())
    for place, key in enumerate(keys):
        slots.open(place, LatentRequest(seed=1, key="before" if key is None else None), [])
        slots.open(place, LatentRequest(seed=place, key=key, imagine="never"), [])
    slots.flush()
    raw = torch.stack([model(place, 0)[1] for place in range(2)])
    logits = raw.clone()
    choice = slots.choose(logits, torch.tensor([0, 1]), [0, 1])
    assert choice.given.tolist() == [key is not None for key in keys]
    for row, key in enumerate(keys):
        if None not in keys:
            expected = raw[row]
        elif key is None:
            expected = text_logits(raw[row : row + 1], torch.tensor([False]), TOKENS)[0]
        else:
            expected = torch.full_like(raw[row], -torch.inf)
            expected[choice.ids[row]] = 0.0
        assert torch.equal(logits[row], expected)


@pytest.mark.parametrize("latents", [None, torch.ones(1, WIDTH)])
def test_a_completion_without_its_latents_is_refused(latents):
    """A slot still has those of the request before."""
    begun = [TOKENS.start, TOKENS.filler, TOKENS.filler]
    request = LatentRequest(seed=1, key="mine", latents=latents)
    with pytest.raises(RuntimeError, match="2 latents came without them"):
        slots_for(LatentProtocol(max_length=4)).open(2, request, begun)


@pytest.mark.parametrize("imagine", ["always", "never"])  # a latent is due, or text
def test_rows_that_sampled_nothing_stay_as_they_are(imagine):
    slots = slots_for(LatentProtocol(min_length=2, max_length=3))
    run(slots, [2], [LatentRequest(seed=1, key="k", imagine=imagine)], 2)
    before = slots.keep(2, 8), slots.is_open(torch.tensor([2]))
    hidden, logits = model(1, 2)
    choice = slots.choose(logits[None].clone(), torch.tensor([2]), [2])
    slots.advance(choice, choice.ids, torch.tensor([False]), hidden[None])
    after = slots.keep(2, 8), slots.is_open(torch.tensor([2]))
    assert torch.equal(before[0].latents, after[0].latents) and torch.equal(before[1], after[1])
    assert torch.equal(before[0].logprobs, after[0].logprobs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.int32])
@pytest.mark.parametrize("shape", [(3, 4), (0, 4), (5,)])
def test_packed_tensors_come_back(dtype, shape):
    tensor = torch.arange(torch.Size(shape).numel()).reshape(shape).to(dtype)
    found = unpack(pack(tensor))
    assert found.dtype == dtype and torch.equal(found, tensor)


def test_requests_are_read_from_extra_arguments():
    plain = {"seed": 5, "temperature": 0.5, "limit": 9}
    assert read_request(None, **plain) == LatentRequest(5, 0.5, limit=9)
    assert read_request({"imagine": "never"}, **plain).imagine == "never"
    own = {"key": "k", "seed": 1, "temperature": 1.0, "done": 2, "latents": pack(torch.ones(2, 3))}
    found = read_request({"foresight": own}, **plain)
    assert (found.seed, found.key, found.done, found.limit) == (1, "k", 2, 9)
    assert found.latents is not None and found.latents.shape == (2, 3)

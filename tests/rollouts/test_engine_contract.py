"""What every engine promises, checked on each of `ENGINES`."""

import dataclasses
from collections import Counter

import numpy as np
import pytest
import torch

from rl.errors import DataError, RolloutError, VideoError
from rl.policy.protocol import LatentProtocol, Slot
from rl.policy.scores import text_logits
from rl.scoring import collate, replay
from rl.trajectory import RolloutRequest, Sampling
from rl.weights import state_checksum, weight_update
from tests.latent import (
    engine_for,
    plain_inputs,
    requests_for,
    square_samples,
    thinking_policy,
)
from tests.tiny import FAMILIES

ENGINES = ("transformers", "vllm")


@pytest.fixture(params=ENGINES)
def engine_name(request):
    return request.param


@pytest.fixture
def build(engine_name, request):
    """Makes an engine of a policy and a processor."""
    return engine_for if engine_name == "transformers" else request.getfixturevalue("vllm_engines")


@pytest.fixture
def rounding(engine_name):
    """How far an engine may be from itself: vLLM's batches depend on when requests come."""
    return {"transformers": 0.0, "vllm": 1e-5}[engine_name]


@pytest.fixture
def samples(tmp_path):
    return square_samples(tmp_path / "clips")


def flat(groups):
    return [t for group in groups for t in group]


def assert_same(ours, theirs, atol=1e-5):
    assert ours.completion_ids.tolist() == theirs.completion_ids.tolist()
    torch.testing.assert_close(ours.latents, theirs.latents, atol=atol, rtol=0)
    np.testing.assert_allclose(ours.logprobs, theirs.logprobs, atol=atol)


def test_groups_come_back_whole_and_in_order(build, samples, tmp_path):
    engine = build(*thinking_policy(tmp_path / "p"), max_batch_size=5)
    looked_up, key = [], engine.processor.key
    engine.processor.key = lambda sample: (looked_up.append(sample.id), key(sample))[1]
    groups = engine.generate(requests_for(samples, 3))
    assert looked_up == [s.id for s in samples]  # a look at the file for each group, before it
    assert [g.sample.id for g in groups] == [s.id for s in samples]
    assert [[t.seed for t in g] for g in groups] == [
        [1000 * i + k for k in range(3)] for i in range(4)
    ]
    for t in flat(groups):
        assert (
            t.policy_version == 0
            and t.media[0].frames == {s.id: s.frames for s in samples}[t.sample_id]
        )
        assert t.finish_reason == ("stop" if t.completion_ids[-1] == 258 else "length")
        assert len(t.completion_ids) <= 20


def on_cpu(family, build):
    """Skips what vLLM cannot run on CPU."""
    if family == "qwen3_5" and build is not engine_for and not torch.cuda.is_available():
        pytest.skip("vLLM's CPU kernels for linear attention take bfloat16 alone")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trajectory_does_not_depend_on_its_batch(build, family, samples, tmp_path):
    # Clips of 2, 4 and 6 frames and questions of different lengths: left padding and removal of
    # finished samples must not show.
    on_cpu(family, build)
    policy, processor = thinking_policy(tmp_path / "p", family)
    requests = [
        dataclasses.replace(r, sampling=Sampling(1.0, 8 + 4 * i))
        for i, r in enumerate(requests_for(samples, 4))
    ]
    together = flat(build(policy, processor).generate(requests))
    small = build(policy, processor, max_batch_size=1)
    alone = [
        small.generate([dataclasses.replace(r, seeds=(seed,))])[0].trajectories[0]
        for r in requests
        for seed in r.seeds
    ]
    assert len({len(t.completion_ids) for t in together}) > 3
    for ours, theirs in zip(together, alone, strict=True):
        assert_same(ours, theirs, atol=5e-5)


def test_a_large_group_is_cut(build, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    request = RolloutRequest(samples[0], tuple(range(11)), Sampling(1.0, 6))
    whole = build(policy, processor).generate([request])[0].trajectories
    cut = build(policy, processor, max_batch_size=4).generate([request])[0].trajectories
    assert [t.seed for t in cut] == list(range(11))
    for ours, theirs in zip(cut, whole, strict=True):
        assert_same(ours, theirs)


def test_seeds_decide(build, rounding, samples, tmp_path):
    engine = build(*thinking_policy(tmp_path / "p"))
    first, again = (flat(engine.generate(requests_for(samples, 3))) for _ in range(2))
    for ours, theirs in zip(first, again, strict=True):
        assert_same(ours, theirs, atol=rounding)
    assert len({t.completion_ids.tobytes() for t in first}) == len(first)


def test_greedy_text_is_that_of_transformers(build, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = build(policy, processor)
    greedy = Sampling(0.0, 12, "never")
    tokens = policy.latent_tokens
    for t in flat(engine.generate(requests_for(samples, 1, greedy))):
        prompt = plain_inputs(policy, engine.media, t, len(t.prompt_ids))
        del prompt["latents"]
        expected = policy.generate(
            **prompt,
            do_sample=False,
            max_new_tokens=12,
            suppress_tokens=[tokens.start, tokens.end, tokens.filler, *tokens.banned],
        )
        assert t.completion_ids.tolist() == expected[0, len(t.prompt_ids) :].tolist()
        assert (t.latent_logprobs == 0).all()


def test_greedy_latents_are_their_means(build, rounding, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = build(policy, processor)
    greedy = flat(engine.generate(requests_for(samples, 2, Sampling(0.0, 20, "always"))))
    assert all(t.imagined for t in greedy)
    for a, b in zip(greedy[::2], greedy[1::2], strict=True):  # other seeds, same trajectory
        assert_same(a, b, atol=rounding)
    with torch.no_grad():
        batch = collate(greedy, policy, engine.media)
        means = policy(**batch.inputs).means
        torch.testing.assert_close(means, batch.latents, atol=1e-5, rtol=0)


def test_modes_of_imagining(build, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = build(policy, processor)
    start = policy.latent_tokens.start
    never = flat(engine.generate(requests_for(samples, 4, Sampling(1.0, 12, "never"))))
    assert not any(t.imagined or start in t.completion_ids for t in never)
    always = flat(engine.generate(requests_for(samples, 4, Sampling(1.0, 12, "always"))))
    assert all(t.completion_ids[0] == start and t.decision[0] == Slot.FORCED for t in always)


def test_placeholders_are_never_sampled(build, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    with torch.no_grad():  # make them what the policy wants most
        weight = policy.get_output_embeddings().weight
        weight[[*policy.latent_tokens.banned, policy.latent_tokens.filler]] = 3 * weight.max()
    found = Counter(
        int(i)
        for t in flat(build(policy, processor).generate(requests_for(samples, 8)))
        for i in t.completion_ids[t.decision == Slot.TOKEN]
    )
    assert not found.keys() & {*policy.latent_tokens.banned, policy.latent_tokens.filler}


# Mass left over, tokens left over, and what decides between the two at once.
TRUNCATIONS = {"whole": (1.0, 0), "top-p": (0.8, 0), "top-k": (1.0, 12), "both": (0.9, 20)}


# On one engine: both draw with the same functions, and their equality is tested elsewhere.
@pytest.mark.parametrize(("top_p", "top_k"), TRUNCATIONS.values(), ids=list(TRUNCATIONS))
def test_frequencies_are_the_probabilities(top_p, top_k, samples, tmp_path):
    policy, processor = thinking_policy(
        tmp_path / "p", protocol=LatentProtocol(min_length=1, max_length=2, noise_scale=0.3)
    )
    engine = engine_for(policy, processor, max_batch_size=2000)
    sampling = Sampling(0.9, 1, top_p=top_p, top_k=top_k)
    request = RolloutRequest(samples[0], tuple(range(2000)), sampling)
    drawn = flat(engine.generate([request]))
    with torch.no_grad():
        t = drawn[0]
        inputs = plain_inputs(policy, engine.media, t)
        hidden = policy.hidden_states(**inputs).last_hidden_state[:, -2]
        logits = policy.get_output_embeddings()(hidden) / 0.9
        p = text_logits(logits, torch.tensor([True]), policy.latent_tokens).softmax(-1)[0]
    if sampling.truncated:
        ranked = p.argsort(descending=True)[: top_k or None]
        before = p[ranked].cumsum(0) - p[ranked]
        inside = ranked[before < top_p * p[ranked].sum()]
        p = torch.zeros_like(p).index_copy(0, inside, p[inside] / p[inside].sum())
        assert {int(t.kept[0]) for t in drawn} == {len(inside)}
    counts = np.bincount([int(t.completion_ids[0]) for t in drawn], minlength=len(p))
    z = (counts - 2000 * p.numpy()) / np.sqrt(2000 * p.numpy() * (1 - p.numpy()) + 1e-9)
    assert np.abs(z[p.numpy() > 1e-3]).max() < 5
    assert counts[p.numpy() == 0].sum() == 0


@pytest.mark.parametrize(("top_p", "top_k"), [(0.9, 20), (0.9, 0), (1.0, 20)])
def test_truncated_sampling_replays_exactly(build, top_p, top_k, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", head="identity")
    engine = build(policy, processor)
    cut = Sampling(0.9, 28, "always", top_p=top_p, top_k=top_k)
    # Whole, truncated and greedy ones in one batch.
    requests = [
        dataclasses.replace(r, sampling=s)
        for r, s in zip(
            requests_for(samples, 8), (cut, cut, Sampling(0.9, 12), Sampling(0.0, 12)), strict=True
        )
    ]
    trajectories = flat(engine.generate(requests))
    assert {k for t in trajectories for k in t.decision} == {*Slot}
    counts = {int(k) for t in trajectories for k in t.kept[t.kept > 0]}
    assert max(counts) <= (top_k or 10**9) and (top_p == 1.0 or len(counts) > 2)
    with torch.no_grad():
        batch = collate(trajectories, policy, engine.media)
        found = replay(policy, batch, policy).logprobs.numpy()
    for row, t in enumerate(trajectories):
        np.testing.assert_allclose(found[row, : len(t.logprobs)], t.logprobs, atol=1e-5)
    # Were truncation forgotten in replay, it would show.
    batch.inputs["slots"].kept.zero_()
    with torch.no_grad():
        whole = replay(policy, batch, policy).logprobs.numpy()
    difference = max(
        np.abs(whole[row, : len(t.logprobs)] - t.logprobs).max()
        for row, t in enumerate(trajectories)
    )
    assert difference > 1e-2


# vLLM computes in another process; its prefix cache is asked in test_vllm_engine.py.
def test_prompts_are_computed_once_a_group(samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    seen = []
    policy.base_model.visual.register_forward_hook(
        lambda module, args, kwargs, out: seen.append(len(kwargs["grid_thw"])), with_kwargs=True
    )
    engine_for(policy, processor).generate(requests_for(samples, 6))
    assert seen == [4]


def test_weights_arrive_with_their_version(build, rounding, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = build(policy, processor)
    before = flat(engine.generate(requests_for(samples, 2)))
    other, _ = thinking_policy(tmp_path / "q", boldness=0.4)
    update = weight_update(other, 7)
    assert engine.update_weights(update) == 7
    after = flat(engine.generate(requests_for(samples, 2)))
    version = engine.health()["version"]
    expected = flat(build(other, processor).generate(requests_for(samples, 2)))
    assert {t.policy_version for t in after} == {7} == {version}
    for ours, theirs in zip(after, expected, strict=True):
        assert_same(ours, theirs, atol=rounding)
    assert any(
        a.completion_ids.tolist() != b.completion_ids.tolist()
        for a, b in zip(before, after, strict=True)
    )


def test_damaged_or_foreign_weights_are_refused(build, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = build(policy, processor)
    update = weight_update(policy, 3)
    damaged = {**update.state, "lm_head.weight": update.state["lm_head.weight"] + 1e-3}
    with pytest.raises(RolloutError, match="version 3 arrived damaged"):
        engine.update_weights(dataclasses.replace(update, state=damaged))
    foreign = {"lm_tail.weight": torch.zeros(1)}
    with pytest.raises(RolloutError, match="lm_tail"):
        engine.update_weights(
            dataclasses.replace(update, state=foreign, checksum=state_checksum(foreign))
        )
    assert engine.health()["version"] == 0


def test_an_unreadable_clip_names_sample_and_file(build, samples, tmp_path):
    engine = build(*thinking_policy(tmp_path / "p"))
    (tmp_path / "notes.mp4").write_text("not a video")
    broken = dataclasses.replace(samples[0], id="row-9", video=str(tmp_path / "notes.mp4"))
    with pytest.raises(VideoError, match=r"'row-9'.*notes\.mp4"):
        engine.generate(requests_for([broken]))


def test_latent_tokens_in_a_question_are_refused(build, samples, tmp_path):
    engine = build(*thinking_policy(tmp_path / "p"))
    odd = dataclasses.replace(samples[0], id="row-4", question="what is <|latent|>?")
    with pytest.raises(DataError, match=r"'row-4'.*remove it"):
        engine.generate(requests_for([odd]))


def test_health_counts(build, samples, tmp_path):
    engine = build(*thinking_policy(tmp_path / "p"))
    before = engine.health()
    done = flat(engine.generate(requests_for(samples, 3, Sampling(1.0, 20, "always"))))
    health = engine.health()
    for name, count in (
        ("trajectories", 12),
        ("tokens", sum(len(t.completion_ids) for t in done)),
        ("latents", sum(len(t.latents) for t in done)),
    ):
        assert health[name] - before[name] == count > 0
    assert health["tokens_per_second"] > 0

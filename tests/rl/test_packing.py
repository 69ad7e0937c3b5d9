"""A row of groups gives what its trajectories give one by one: log-probs, means and gradients."""

from __future__ import annotations

import copy
import re
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model

from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.protocol import Slot, SpanState, Step
from rl.policy.vision import vision_tower
from rl.scoring import collate, replay
from rl.trajectory import MediaKey, Sample, Sampling, Trajectory
from tests.latent import plain_inputs, square_samples, thinking_policy
from tests.tiny import FAMILIES


class World:
    """A policy of one family, clips, and prompts that show some of them."""

    def __init__(self, folder: Any, family: Any) -> None:
        self.policy, processor = thinking_policy(folder / "policy", family)
        self.processor = MediaProcessor(processor)
        self.media = LocalMedia(self.processor, 16)
        self.samples = square_samples(folder / "clips")

    def prompt(self, shown: list[int], words: int) -> tuple[np.ndarray, tuple[MediaKey, ...]]:
        """Ids [P] and clips of a prompt that shows these clips and asks so many words."""
        clips = [self.media.get(self.processor.key(self.samples[i])) for i in shown]
        sample = Sample("question", self.samples[0].video, "why" + " o" * words, "A")
        ids = self.processor.encode(sample, clips).input_ids
        return ids, tuple(clip.key for clip in clips)

    def trajectory(
        self, prompt: tuple[np.ndarray, tuple[MediaKey, ...]], length: int, seed: int
    ) -> Trajectory:
        """A completion of `length` tokens that the protocol allows, otherwise random."""
        rng = np.random.default_rng(seed)
        protocol, tokens = self.policy.protocol, self.policy.latent_tokens
        imagine = ("free", "always")[seed % 2]
        state, ids = SpanState(), []
        for _ in range(length):
            match protocol.next_step(state, imagine):
                case Step.START:
                    token = tokens.start
                case Step.LATENT:
                    token = tokens.filler
                case Step.END:
                    token = tokens.end
                case Step.DECIDE:
                    token = (tokens.filler, tokens.end)[rng.integers(2)]
                case Step.TOKEN if rng.random() < 0.3:
                    token = tokens.start
                case _:
                    token = int(rng.integers(256))
            ids.append(token)
            state = protocol.advance(state, token, tokens, imagine)
        trace = protocol.trace(ids, tokens, imagine)
        count, width = sum(trace.span_lengths), self.policy.config.get_text_config().hidden_size
        return Trajectory(
            sample_id="question",
            prompt_ids=prompt[0],
            completion_ids=np.array(ids),
            decision=trace.slots,
            logprobs=np.zeros(length, np.float32),
            kept=np.zeros(length, np.int32),
            latents=torch.from_numpy(rng.standard_normal((count, width)).astype(np.float32)),
            latent_logprobs=np.zeros(count),
            span_lengths=trace.span_lengths,
            filler=tokens.filler,
            media=prompt[1],
            policy_version=0,
            finish_reason="length",
            sampling=Sampling((1.0, 0.7)[seed % 2], length, imagine),
            seed=seed,
            text="",
        )


@pytest.fixture(scope="module")
def worlds(tmp_path_factory):
    made: dict[str, World] = {}

    def get(family: str) -> World:
        if family not in made:
            made[family] = World(tmp_path_factory.mktemp(family), family)
        return made[family]

    return get


def alone(policy: Any, media: Any, t: Trajectory) -> tuple[torch.Tensor, torch.Tensor]:
    """One trajectory through the plain model: log-probs [C], position by position, and means."""
    hidden = policy.hidden_states(**plain_inputs(policy, media, t)).last_hidden_state[0]
    logits = policy.get_output_embeddings()(hidden) / t.sampling.temperature
    tokens, p = policy.latent_tokens, len(t.prompt_ids)
    trace = policy.protocol.trace(t.completion_ids, tokens, t.sampling.imagine)
    never = [tokens.filler, tokens.end, *tokens.banned]
    values = []
    for place, (token, kind) in enumerate(zip(t.completion_ids, trace.slots, strict=True)):
        row = logits[p + place - 1]
        if kind == Slot.FORCED:
            values.append(row.sum() * 0)
        elif kind == Slot.DECISION:
            end = row.log_softmax(-1)[tokens.end]
            values.append(end if token == tokens.end else torch.log1p(-end.exp()))
        else:
            out = never + [tokens.start] * (not trace.may_start[place])
            allowed = torch.ones_like(row, dtype=torch.bool).index_fill(0, torch.tensor(out), False)
            values.append(row[token] - row[allowed].logsumexp(-1))
    at = p - 1 + (t.completion_ids == t.filler).nonzero()[0]
    return torch.stack(values), policy.latent_head(hidden[at])


def weights(shape: Any, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def gradients(policy: Any) -> dict[str, torch.Tensor]:
    found = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    return found


def assert_packed_equals_alone(policy: Any, inner: Any, media: Any, rows: list[Trajectory]) -> None:
    """`inner` is the policy inside `policy`'s wrapper."""
    found = replay(policy, collate(rows, inner, media), inner)
    loss = sum(
        (found.logprobs[i, : len(t.completion_ids)] * weights(len(t.completion_ids), i)).sum()
        for i, t in enumerate(rows)
    )
    (loss + (found.means * weights(found.means.shape, 0)).sum()).backward()
    packed = gradients(policy)
    parts = [alone(inner, media, t) for t in rows]
    means = torch.cat([m for _, m in parts])
    for i, (logprobs, _) in enumerate(parts):
        ours = found.logprobs[i, : len(logprobs)]
        torch.testing.assert_close(ours, logprobs, rtol=1e-5, atol=1e-5)
        assert not found.logprobs[i, len(logprobs) :].any()
    torch.testing.assert_close(found.means, means, rtol=1e-5, atol=1e-5)
    loss = sum((p * weights(len(p), i)).sum() for i, (p, _) in enumerate(parts))
    (loss + (means * weights(means.shape, 0)).sum()).backward()
    expected = gradients(policy)
    assert packed.keys() == expected.keys()
    largest = max(float(g.norm()) for g in expected.values())
    # A gated delta net computes in chunks, which begin elsewhere: it rounds otherwise.
    relative = 3e-5 if any("linear_attn" in name for name in expected) else 1e-5
    for name, gradient in expected.items():
        error, size = float((packed[name] - gradient).norm()), float(gradient.norm())
        assert error <= relative * size + (1e-6 * largest if CANCELLING.search(name) else 0.0), name


# Gradients that are sums of much larger terms, which all but cancel: of the biases of keys, which
# change no softmax, and of what decides how fast a gated delta net forgets.
CANCELLING = re.compile(
    r"k_proj\.(lora.*|bias)$|linear_attn\.(dt_bias|A_log|in_proj_[ab]|conv1d|norm)"
)

GROUP = st.tuples(
    st.lists(st.integers(0, 3), min_size=0, max_size=3),  # clips, one perhaps twice
    st.integers(0, 12),  # words of the question
    st.lists(st.integers(1, 14), min_size=1, max_size=4),  # lengths of the completions
)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "checkpointing"])
@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_packed_is_unpacked(worlds, family, checkpointing, lora):
    world = worlds(family)
    inner = policy = copy.deepcopy(world.policy).train(checkpointing)
    if lora:
        adapters = LoraConfig(
            r=4,
            target_modules="all-linear",
            init_lora_weights=False,
            modules_to_save=["latent_head"],
        )
        policy = get_peft_model(inner, adapters)
    if checkpointing:
        inner.gradient_checkpointing_enable()

    @settings(max_examples=6, deadline=None, derandomize=True)
    @given(groups=st.lists(GROUP, min_size=1, max_size=3), mixed=st.randoms(use_true_random=False))
    def check(groups, mixed):
        rows = [
            world.trajectory(world.prompt(shown, words), length, 7 * g + member)
            for g, (shown, words, lengths) in enumerate(groups)
            for member, length in enumerate(lengths)
        ]
        mixed.shuffle(rows)  # members of a group need not be neighbours
        assert_packed_equals_alone(policy, inner, world.media, rows)

    check()


@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_shared_is_there_once(worlds, family):
    world = worlds(family)
    first, second = world.prompt([0, 1], 3), world.prompt([1], 0)
    rows = [world.trajectory(p, 5, seed) for seed, p in enumerate((first, second, first, first))]
    batch = collate(rows, world.policy, world.media)
    assert batch.tokens == len(first[0]) + len(second[0]) + 4 * 5
    assert [g.completions for g in batch.inputs["layout"].groups] == [(5,), (5, 5, 5)]
    assert batch.inputs["clips"] == (0, 1, 0)
    patches = [world.media.get(key).inputs["pixel_values_videos"].shape[0] for key in first[1]]
    assert batch.inputs["pixel_values_videos"].shape[0] == sum(patches)
    calls = []
    hook = vision_tower(world.policy).register_forward_pre_hook(
        lambda tower, args, kwargs: calls.append((args[0].shape[0], len(kwargs["grid_thw"]))),
        with_kwargs=True,
    )
    with torch.no_grad():
        world.policy(**batch.inputs)
    hook.remove()
    assert calls[0][0] == sum(patches) and len(calls) == 1


def test_equal_lengths_stand_side_by_side(worlds):
    world = worlds("qwen3_vl")
    prompts = [world.prompt([0], words) for words in (0, 2, 1)]
    lengths = [(0, 4), (1, 7), (0, 2), (2, 3), (1, 7), (0, 4)]
    rows = [world.trajectory(prompts[p], c, seed) for seed, (p, c) in enumerate(lengths)]
    layout = collate(rows, world.policy, world.media).inputs["layout"]
    assert [g.completions for g in layout.groups] == [(3,), (2, 4, 4), (7, 7)]
    alone = [world.trajectory(prompts[p], c, 0) for p, c in ((0, 9), (1, 3), (2, 8), (0, 9))]
    alone[3] = world.trajectory(world.prompt([1], 0), 9, 0)  # another clip
    layout = collate(alone, world.policy, world.media).inputs["layout"]
    lengths = [g.stop - g.start for g in layout.groups]
    assert lengths == sorted(lengths)


def test_bf16_under_autocast(worlds):
    """As far from fp32 as each trajectory alone is."""
    world = worlds("qwen3_vl")
    prompt = world.prompt([0, 1], 3)
    rows = [world.trajectory(prompt, 12, seed) for seed in range(4)]
    with torch.no_grad():
        exact = [alone(world.policy, world.media, t)[0] for t in rows]
        with torch.autocast("cpu", dtype=torch.bfloat16):
            packed = replay(
                world.policy, collate(rows, world.policy, world.media), world.policy
            ).logprobs
            single = [alone(world.policy, world.media, t)[0] for t in rows]
    ours = max(float((packed[i, : len(e)] - e).abs().max()) for i, e in enumerate(exact))
    theirs = max(float((s - e).abs().max()) for s, e in zip(single, exact, strict=True))
    assert 0 < ours < 2 * theirs < 0.5

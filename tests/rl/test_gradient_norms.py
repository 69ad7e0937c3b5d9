"""Norms of gradients at tokens are those of `torch.autograd.grad`, however it is trained."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rl.errors import PolicyError
from rl.gradient_norms import KINDS, GradientNorms, TokenNorms
from rl.policy.protocol import LatentProtocol
from rl.policy.vision import vision_tower
from rl.scoring import collate, replay
from rl.sft.self_forcing import self_forced
from rl.trajectory import Sampling, Trajectory
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.rl.policy.test_modules import modules
from tests.rl.test_packing import World, weights
from tests.tiny import FAMILIES, Family


@pytest.fixture(scope="module", params=FAMILIES)
def world(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def qwen3_vl(tmp_path_factory: pytest.TempPathFactory) -> World:
    return World(tmp_path_factory.mktemp("qwen3_vl"), "qwen3_vl")


def rows_of(world: World) -> list[Trajectory]:
    """Two answers to one prompt, and one each to another and to one without a video."""
    first, second = world.prompt([0], 2), world.prompt([1], 5)
    return [
        world.trajectory(first, 12, 1),
        world.trajectory(first, 9, 2),
        world.trajectory(second, 14, 3),
        world.trajectory(world.prompt([], 3), 6, 5),
    ]


def loss_of(world: World, model: Any, rows: list[Trajectory]) -> torch.Tensor:
    """Some loss on what the rows decide and on their latents; those of parts of the rows add up."""
    found = replay(model, collate(rows, world.policy, world.media), world.policy)
    text = sum(
        (found.logprobs[i] * weights(40, t.seed)[: found.logprobs.shape[1]]).sum()
        for i, t in enumerate(rows)
    )
    return text + found.means.square().sum()


@contextmanager
def entering_states(policy: Any) -> Iterator[list[torch.Tensor]]:
    """What enters the layers of the decoder while this lasts."""
    entered: list[torch.Tensor] = []
    hooks = [
        layer.register_forward_pre_hook(lambda _, args: entered.append(args[0]))
        for layer in policy.get_decoder().layers
    ]
    yield entered
    for hook in hooks:
        hook.remove()


def naive(world: World, rows: list[Trajectory]) -> TokenNorms:
    """One sequence at a time, token by token; the rows share no prompt."""
    norms: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    lengths: dict[str, list[list[float]]] = {kind: [] for kind in KINDS}
    for t in rows:
        with entering_states(world.policy) as entered:
            loss = loss_of(world, world.policy, [t])
        gradients = torch.autograd.grad(loss, entered)
        ids = np.concatenate([t.prompt_ids, t.completion_ids])
        for place, token in enumerate(ids):
            if token == world.policy.config.video_token_id:
                kind = "visual"
            elif token == t.filler:
                kind = "latent"
            else:
                kind = "question" if place < len(t.prompt_ids) else "answer"
            norms[kind].append([float(g[0, place].norm()) for g in gradients])
            lengths[kind].append([float(x[0, place].detach().norm()) for x in entered])
    return TokenNorms(
        {kind: len(found) for kind, found in norms.items()},
        *(
            {kind: np.mean(found, axis=0).tolist() if found else None for kind, found in of.items()}
            for of in (norms, lengths)
        ),
    )


def measured(world: World, model: Any, *updates: list[Trajectory]) -> TokenNorms:
    """One update of these micro-batches."""
    with GradientNorms(world.policy) as norms:
        for rows in updates:
            loss_of(world, model, rows).backward()
        found = norms.take()
    model.zero_grad()
    return found


def assert_same(found: TokenNorms, expected: TokenNorms) -> None:
    assert found.tokens == expected.tokens
    for kind in KINDS:
        for ours, theirs in (
            (found.layers[kind], expected.layers[kind]),
            (found.lengths[kind], expected.lengths[kind]),
        ):
            assert (ours is None) == (theirs is None)
            if ours is not None:
                assert ours == pytest.approx(theirs, rel=1e-4, abs=1e-8), kind
                assert min(ours) > 0, kind


def test_norms_are_those_of_a_naive_loop(world: World) -> None:
    rows = rows_of(world)[1:]
    found = measured(world, world.policy, rows)
    assert_same(found, naive(world, rows))
    assert all(found.tokens.values())
    assert found.embeddings == {kind: found.layers[kind][0] for kind in KINDS}  # type: ignore[index]


def test_the_micro_batches_of_an_update_add_up(world: World) -> None:
    rows = rows_of(world)[1:]
    expected = measured(world, world.policy, rows)
    assert_same(measured(world, world.policy, rows[:1], rows[1:]), expected)


def test_answers_that_share_a_prompt_pull_on_its_tokens_together(qwen3_vl: World) -> None:
    rows = rows_of(qwen3_vl)
    shared = measured(qwen3_vl, qwen3_vl.policy, rows[:2])
    apart = measured(qwen3_vl, qwen3_vl.policy, rows[:1], rows[1:2])
    for kind, copies in (("visual", 2), ("question", 2), ("answer", 1), ("latent", 1)):
        assert apart.tokens[kind] == copies * shared.tokens[kind]
    for kind in ("answer", "latent"):
        assert shared.layers[kind] == pytest.approx(apart.layers[kind], rel=1e-4)


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_changes_nothing(world: World, reentrant: bool) -> None:
    rows = rows_of(world)
    expected = measured(world, world.policy, rows)
    policy = world.policy
    policy.train().gradient_checkpointing_enable({"use_reentrant": reentrant})
    try:
        found = measured(world, policy, rows)
    finally:
        policy.eval().gradient_checkpointing_disable()
    assert_same(found, expected)


def test_frozen_parts_change_nothing(qwen3_vl: World) -> None:
    rows = rows_of(qwen3_vl)
    expected = measured(qwen3_vl, qwen3_vl.policy, rows)
    frozen = copy.copy(qwen3_vl)
    frozen.policy = copy.deepcopy(qwen3_vl.policy)
    vision_tower(frozen.policy).requires_grad_(False)
    assert_same(measured(frozen, frozen.policy, rows), expected)
    frozen.policy.requires_grad_(False).latent_head.requires_grad_(True)
    assert_same(measured(frozen, frozen.policy, rows), expected)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters(qwen3_vl: World, checkpointing: bool) -> None:
    """Norms are those of the model that the adapters make, and their gradients are not changed."""
    rows, adapted = rows_of(qwen3_vl), copy.copy(qwen3_vl)
    adapted.policy = copy.deepcopy(qwen3_vl.policy)
    torch.manual_seed(0)
    model = get_peft_model(
        adapted.policy, LoraConfig(target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    )
    loss_of(adapted, model, rows).backward()
    before = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    if checkpointing:
        model.train().gradient_checkpointing_enable({"use_reentrant": False})
        adapted.policy.enable_input_require_grads()
    with GradientNorms(adapted.policy) as norms:
        loss_of(adapted, model, rows).backward()
        found = norms.take()
    after = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert before.keys() == after.keys() and any("lora" in name for name in after)
    for name, gradient in before.items():
        torch.testing.assert_close(after[name], gradient)
    merged = copy.copy(adapted)
    merged.policy = copy.deepcopy(model).eval().merge_and_unload().requires_grad_(True)
    assert_same(found, measured(merged, merged.policy, rows))


@pytest.mark.parametrize(
    ("family", "names"),
    [("qwen3_vl", ()), ("qwen3_5", ()), ("qwen3_vl", ("injection", "depth", "visual_replay"))],
)
def test_latents_of_its_own_are_made_one_after_the_other(
    family: Family, names: tuple[str, ...], tmp_path: Path
) -> None:
    protocol = LatentProtocol(min_length=4, max_length=4, max_spans=1)
    policy, processor = thinking_policy(tmp_path / "p", family, protocol, modules=modules(names))
    engine = engine_for(policy, processor)
    asked = requests_for(square_samples(tmp_path / "c"), 1, Sampling(0.0, 9, imagine="always"))
    rows = [t for group in engine.generate(asked) for t in group]
    latents = len(rows) * 4

    def loss() -> torch.Tensor:
        found = self_forced(policy, rows, engine.media, steps=3)
        return found.scores.logprobs.sum() + found.align + found.diversity

    with entering_states(policy) as entered:
        value = loss()
    firsts = [x for x in entered[:: len(policy.get_decoder().layers)] if x.requires_grad]
    gradients = torch.autograd.grad(value, firsts)
    with GradientNorms(policy) as norms:
        loss().backward()
        found = norms.take()
    total = sum(float(gradient.norm(dim=-1).sum()) for gradient in gradients)
    ours = sum(count * (found.embeddings[kind] or 0.0) for kind, count in found.tokens.items())
    assert ours == pytest.approx(total, rel=1e-4)
    shown = sum(int((t.prompt_ids == policy.config.video_token_id).sum()) for t in rows)
    again = sum(int((t.replayed >= 0).sum()) for t in rows if t.replayed is not None)
    assert (again > 0) == ("visual_replay" in names)
    assert found.tokens == {
        "visual": shown + again,
        "question": sum(len(t.prompt_ids) for t in rows) - shown,
        "answer": sum(len(t.completion_ids) for t in rows) - latents,
        "latent": latents,
    }


def test_training_is_bit_for_bit_what_it_was(qwen3_vl: World) -> None:
    rows, policy = rows_of(qwen3_vl), qwen3_vl.policy
    loss_of(qwen3_vl, policy, rows).backward()
    before = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    with GradientNorms(policy):
        loss_of(qwen3_vl, policy, rows).backward()
    after = {n: p.grad for n, p in policy.named_parameters() if p.grad is not None}
    policy.zero_grad()
    assert before.keys() == after.keys()
    assert all(torch.equal(gradient, before[name]) for name, gradient in after.items())
    assert not any(m._forward_pre_hooks for m in policy.modules())  # all came off again


def test_passes_without_gradient_or_backward_do_not_count(qwen3_vl: World) -> None:
    rows, policy = rows_of(qwen3_vl), qwen3_vl.policy
    expected = measured(qwen3_vl, policy, rows[2:])
    with GradientNorms(policy) as norms:
        with torch.no_grad():
            loss_of(qwen3_vl, policy, rows)
        loss_of(qwen3_vl, policy, rows)
        loss_of(qwen3_vl, policy, rows[2:]).backward()
        found = norms.take()
        policy.zero_grad()
        with pytest.raises(PolicyError, match="no gradient came to the decoder"):
            norms.take()
    assert_same(found, expected)


def test_a_kind_without_tokens_has_no_norm(qwen3_vl: World) -> None:
    rows = [t for t in rows_of(qwen3_vl) if not t.media]
    found = measured(qwen3_vl, qwen3_vl.policy, rows)
    assert found.tokens["visual"] == 0 and found.layers["visual"] is None
    assert found.embeddings["visual"] is None and found.embeddings["question"] is not None


def test_a_row_without_layout_is_refused(qwen3_vl: World) -> None:
    ids = torch.arange(8)[None]
    with GradientNorms(qwen3_vl.policy) as norms:
        with pytest.raises(PolicyError, match="layout says what is prompt"):
            qwen3_vl.policy(input_ids=ids)
        with torch.no_grad():
            qwen3_vl.policy(input_ids=ids)
        with pytest.raises(PolicyError, match="no gradient"):
            norms.take()

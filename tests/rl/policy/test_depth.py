"""Routing depth scaling: against loops over tokens, what a token's depth hangs on, and at zero."""

import copy
import math
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from rl.errors import PolicyError
from rl.policy.depth import (
    DeepLayer,
    DepthConfig,
    DepthGate,
    budget_loss,
    counted_depth,
    install,
    second_pass_share,
)
from rl.policy.loading import make_policy, model_class
from rl.policy.modules import ModulesConfig
from rl.policy.unroll import Unroll
from rl.scoring import collate, prompt_inputs
from tests.latent import (
    PROTOCOL,
    engine_for,
    plain_inputs,
    requests_for,
    square_samples,
    thinking_policy,
)
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_processor

TOKENS = 12  # that the published router chooses


def gates(policy):
    return [m for m in policy.modules() if isinstance(m, DepthGate)]


def deep_policy(folder, family, router="token", layers=3):
    """A policy of which all layers that attend are deep, with gates at every level."""
    processor = tiny_processor(family)
    save_tiny_checkpoint(folder, family, layers=layers)
    kinds = ["linear_attention", "full_attention"] * 2 if family == "qwen3_5" else ["full"] * 4
    chosen = tuple(i for i in range(layers) if kinds[i] != "linear_attention")
    depth = DepthConfig(layers=chosen, router=router, tokens=TOKENS)  # type: ignore[arg-type]
    modules = ModulesConfig(depth=depth)
    policy = make_policy(folder, processor, PROTOCOL, modules=modules).eval()
    assert [isinstance(layer, DeepLayer) for layer in policy.get_decoder().layers] == [
        i in chosen for i in range(layers)
    ]
    torch.manual_seed(3)
    with torch.no_grad():
        for gate in gates(policy):
            gate.router.weight.copy_(torch.randn_like(gate.router.weight) / 32**0.5)
            gate.router.bias.fill_(0.2)
    return policy, processor


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Policies with deep layers, their media, and trajectories of four prompts in groups of 2."""
    made = {}

    def make(family: Any = "qwen3_vl", router: Any = "token") -> Any:
        folder = tmp_path_factory.mktemp(family)
        if family not in made:
            plain, processor = thinking_policy(folder / "plain", family)
            engine = engine_for(plain, processor)
            groups = engine.generate(requests_for(square_samples(folder / "clips"), 2))
            made[family] = plain, processor, engine.media, [t for g in groups for t in g]
        if (family, router) not in made:
            made[family, router] = deep_policy(folder / router, family, router)[0]
        return made[family, router], *made[family][2:]

    return make


@contextmanager
def recorded(policy):
    """What each deep layer was given, its rotations, and what it gave: [T, ...] of single rows."""
    found, hooks = [], []

    def note(layer, args, kwargs, out):
        cos, sin = kwargs["position_embeddings"]
        found.append((layer, args[0][0], cos[0], sin[0], out[0]))

    for layer in policy.get_decoder().layers:
        if isinstance(layer, DeepLayer):
            hooks.append(layer.register_forward_hook(note, with_kwargs=True))
    try:
        yield found
    finally:
        for hook in hooks:
            hook.remove()


def split(attention, name, x, turn=None):
    """Heads [N, D] of a token [H], normed and rotated as this model does."""
    rows = getattr(attention, f"{name}_proj")(x).view(-1, attention.head_dim)
    if turn is None:
        return rows
    if norm := getattr(attention, f"{name}_norm", None):
        rows = norm(rows)
    cos, sin = turn
    left, right = rows.chunk(2, -1)
    return rows * cos + torch.cat([-right, left], -1) * sin


def one_token(layer, x, turn, keys, values):
    """A layer for one token [H] that sees these keys and values, lists of [Hkv, D]."""
    attention = layer.self_attn
    queries = split(attention, "q", layer.input_layernorm(x), turn)
    shared = len(queries) // len(keys[0])
    heads = []
    for number, query in enumerate(queries):
        own = torch.stack([k[number // shared] for k in keys])
        masses = (own @ query / math.sqrt(attention.head_dim)).softmax(0)
        heads.append(masses @ torch.stack([v[number // shared] for v in values]))
    x = x + attention.o_proj(torch.cat(heads))
    return x + layer.mlp(layer.post_attention_layernorm(x))


def key_and_value(layer, x, turn):
    normed = layer.input_layernorm(x)
    return split(layer.self_attn, "k", normed, turn), split(layer.self_attn, "v", normed)


def level_of(layer, x):
    router = layer.depth_gate.router
    return router.weight[0] @ (x / (x.square().mean() + 1e-6).sqrt()) + router.bias[0]


def naive(layer, rows, cos, sin):
    """Token by token, and the gates."""
    keys, values, out, opened = [], [], [], []
    for x, *turn in zip(rows, cos, sin, strict=True):
        key, value = key_and_value(layer, x, turn)
        keys.append(key)
        values.append(value)
        once = one_token(layer, x, turn, keys, values)
        gate = level_of(layer, once).clamp(0, 1)
        again = one_token(layer, once, turn, keys, values)
        out.append(once + gate * (again - once))
        opened.append(float(gate))
    return torch.stack(out), opened


def naive_published(layer, rows, cos, sin):
    def block(rows, cos, sin):
        keys, values, out = [], [], []
        for x, *turn in zip(rows, cos, sin, strict=True):
            key, value = key_and_value(layer, x, turn)
            keys.append(key)
            values.append(value)
            out.append(one_token(layer, x, turn, keys, values))
        return torch.stack(out)

    out = block(rows, cos, sin)
    shares = torch.stack([level_of(layer, x) for x in out]).softmax(0)
    best = sorted(sorted(range(len(out)), key=lambda i: -float(shares[i]))[:TOKENS])
    again = block(out[best], cos[best], sin[best])
    for place, state in zip(best, again, strict=True):
        out[place] = out[place] + shares[place] * state
    return out


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_layers_against_a_loop_over_tokens(family, world):
    policy, media, trajectories = world(family)
    opened = []
    for trajectory in trajectories[::4]:
        with recorded(policy) as found:
            policy.hidden_states(**plain_inputs(policy, media, trajectory), use_cache=False)
        assert len(found) == 3
        for layer, rows, cos, sin, out in found:
            expected, levels = naive(layer, rows, cos, sin)
            torch.testing.assert_close(out, expected, atol=1e-5, rtol=1e-5)
            opened += levels
    assert 0.0 in opened and 1.0 in opened and len({0.0 < x < 1.0 for x in opened}) == 2


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
def test_the_published_router_against_a_loop(family, world):
    policy, media, trajectories = world(family, "published")
    batch = collate(trajectories[:4], policy, media)
    layout = batch.inputs["layout"]
    assert len(layout.groups) == 4  # two of each prompt, which they do not share
    with recorded(policy) as found:
        policy(**batch.inputs)
    assert len(found) == 3
    for layer, rows, cos, sin, out in found:
        for group in layout.groups:
            own = slice(group.start, group.stop)
            expected = naive_published(layer, rows[own], cos[own], sin[own])
            torch.testing.assert_close(out[own], expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("router", ["token", "published"])
def test_what_comes_later_moves_the_published_router_only(router, family, world):
    """Which is why it refuses to generate: a token would have another depth than in training."""
    policy, media, trajectories = world(family, router)
    inputs = plain_inputs(policy, media, trajectories[0])
    inputs.pop("latents")
    inputs["input_ids"] = inputs["input_ids"].clamp_max(policy.latent_tokens.filler - 1)
    other = inputs["input_ids"].clone()
    other[:, -3:] = torch.tensor([7, 8, 9])
    states = [
        policy.hidden_states(**{**inputs, "input_ids": ids}, use_cache=False).last_hidden_state
        for ids in (inputs["input_ids"], other)
    ]
    before, after = (s[:, :-3] for s in states)
    assert (states[0] - states[1])[:, -3:].abs().max() > 1e-2
    if router == "token":
        assert torch.equal(before, after)
    else:
        assert (before - after).abs().max() > 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_closed_gates_are_the_backbone_bit_for_bit(family, tmp_path, world):
    _, media, trajectories = world(family)
    policy, _ = deep_policy(tmp_path / "p", family)
    with torch.no_grad():
        for gate in gates(policy):
            gate.router.bias.fill_(-10.0)
    folder = tmp_path / "p"
    plain = model_class(AutoConfig.from_pretrained(folder), folder).from_pretrained(folder).eval()
    stop = len(trajectories[0].prompt_ids)  # what follows has ids that a plain model lacks
    inputs = plain_inputs(policy, media, trajectories[0], stop)
    inputs.pop("latents")
    expected = plain.base_model(**inputs).last_hidden_state
    assert torch.equal(policy.hidden_states(**inputs).last_hidden_state, expected)
    with torch.no_grad():  # where a second pass that counts for nothing is left out
        assert torch.equal(policy.hidden_states(**inputs).last_hidden_state, expected)


@pytest.mark.parametrize("router", ["token", "published"])
@pytest.mark.parametrize("family", FAMILIES)
def test_checkpointed_layers_count_and_learn_the_same(family, router, world):
    policy, media, trajectories = world(family, router)
    policy = copy.deepcopy(policy)
    batch = collate(trajectories[:4], policy, media).inputs
    found = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.train()
            policy.gradient_checkpointing_enable({"use_reentrant": False})
        scores = policy(**batch)
        loss = scores.logprobs.sum() + scores.means.square().sum()
        assert (scores.depth is None) == (router == "published")  # which has no budget
        if scores.depth is not None:
            loss = loss + 10 * budget_loss(scores.depth, 0.1)
        policy.zero_grad()
        loss.backward()
        grads = {n: p.grad.clone() for n, p in policy.named_parameters() if p.grad is not None}
        share = torch.zeros(()) if scores.depth is None else scores.depth.detach()
        found.append((loss.detach(), share, grads))
    torch.testing.assert_close(found[1], found[0])
    routers = {name: g for name, g in found[0][2].items() if "depth_gate" in name}
    assert len(routers) == 2 * len(gates(policy))
    # A softmax over the sequence does not care about the bias.
    learns = [g for name, g in routers.items() if router == "token" or "bias" not in name]
    assert all(g.abs().max() > 0 for g in learns)


def test_budget_by_hand():
    levels = [torch.tensor([[0.0, 0.1]]), torch.tensor([[-0.1, 1.0, -1.0, 5.0]])]
    share = second_pass_share(
        [(levels[0], None), (levels[1], torch.tensor([[True, True, True, False]]))]
    )
    up = 1 / (1 + math.exp(-1))  # σ(0.1 / 0.1), and 1 - up is σ(-0.1 / 0.1)
    assert share.item() == pytest.approx((0.5 + up + (1 - up) + 1 + 0) / 5, abs=1e-4)  # type: ignore[union-attr]
    assert budget_loss(torch.tensor(0.5), 0.2).item() == pytest.approx(0.09)
    assert second_pass_share([]) is None
    level = torch.tensor([2.0, -0.05], requires_grad=True)
    budget_loss(second_pass_share([(level, None)]), 0.9).backward()  # type: ignore[arg-type]
    assert level.grad[1] < 0  # too few: the levels rise  # type: ignore[index]


def test_levels_are_counted_where_someone_counts(world):
    policy, media, trajectories = world()
    batch = collate(trajectories[:2], policy, media)
    with counted_depth() as levels:
        scores = policy(**batch.inputs)
        torch.testing.assert_close(second_pass_share(levels), scores.depth)
        policy.hidden_states(
            **{k: v for k, v in batch.inputs.items() if k not in ("slots", "video")},
            use_cache=False,
        )
    assert [level.numel() for level, _ in levels] == [batch.tokens] * 6
    torch.testing.assert_close(second_pass_share(levels), scores.depth)


def test_the_published_router_refuses_what_it_cannot_do(world, tmp_path):
    policy, media, trajectories = world(router="published")
    engine = engine_for(policy, tiny_processor())
    with pytest.raises(PolicyError, match="cannot generate"):
        engine.generate(requests_for(square_samples(tmp_path, 1)))
    shared = collate(trajectories[:2], world()[0], media)
    with pytest.raises(PolicyError, match="several completions share a prompt"):
        policy(**shared.inputs)


def test_a_copy_runs_on_its_own_weights(world):
    policy, media, trajectories = world()
    inputs = collate(trajectories[:2], policy, media).inputs
    other = copy.deepcopy(policy)
    with torch.no_grad():
        before = policy(**inputs).logprobs
        for gate in gates(other):
            gate.router.bias.fill_(-10.0)
        assert torch.equal(policy(**inputs).logprobs, before)
        assert (other(**inputs).logprobs - before).abs().max() > 1e-3


def test_a_new_gate_hardly_opens(tmp_path):
    folder = save_tiny_checkpoint(tmp_path, hidden=128)
    modules = ModulesConfig(depth=DepthConfig())
    (gate,) = gates(make_policy(folder, tiny_processor(), modules=modules))
    levels = gate(torch.randn(1000, 128, generator=torch.Generator().manual_seed(0)))
    # Levels as wide as 0.1, on either side of nothing.
    assert levels.std().item() == pytest.approx(0.1, rel=0.3)
    assert abs(levels.mean().item()) < 0.02


def test_installing_twice_is_installing_once(world):
    policy, *_ = world()
    before = [type(layer) for layer in policy.get_decoder().layers]
    own = [id(gate) for gate in gates(policy)]
    install(policy, policy.modules_config.depth)
    assert [type(layer) for layer in policy.get_decoder().layers] == before
    assert [id(gate) for gate in gates(policy)] == own


def test_which_layers_are_chosen():
    mixed = ["linear_attention", "full_attention"] * 3
    assert DepthConfig().chosen(["full_attention"] * 5) == (1, 3)
    assert DepthConfig().chosen(mixed) == (1, 3, 5)
    assert DepthConfig(layers=(5, 1, 5)).chosen(mixed) == (1, 5)
    with pytest.raises(PolicyError, match="layer 2 is recurrent"):
        DepthConfig(layers=(2,)).chosen(mixed)
    for wrong in (-1, 6):
        with pytest.raises(PolicyError, match=f"layer {wrong} is none of the model's 6"):
            DepthConfig(layers=(1, wrong)).chosen(mixed)
    with pytest.raises(PolicyError, match=r"no odd layer with attention; name layers of \[0, 2\]"):
        DepthConfig().chosen(["full_attention", "linear_attention"] * 2)
    with pytest.raises(PolicyError, match="no odd layer"):
        DepthConfig(layers=()).chosen(mixed)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"budget": 0.0}, "budget is 0.0"),
        ({"budget": 1.0}, "budget is 1.0"),
        ({"router": "top"}, "router is 'top'"),
        ({"tokens": 0}, "at least 1"),
    ],
)
def test_config_errors(settings, said):
    with pytest.raises(PolicyError, match=said):
        DepthConfig(**settings)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("padded", [False, True])
def test_tokens_with_open_gates_are_picked(family, padded, world, monkeypatch):
    policy, media, trajectories = world(family)
    rows = sorted(trajectories, key=lambda t: len(t.prompt_ids))[:: 1 if padded else 99]
    clips = [[media.get(key) for key in t.media] for t in rows]
    inputs = prompt_inputs(policy, [t.prompt_ids for t in rows], clips, pad=0)
    picked = []
    original = DeepLayer._again_where_open

    def noted(self, hidden, gate, *args, **kwargs):
        picked.append((gate > 0).float().mean().item())
        return original(self, hidden, gate, *args, **kwargs)

    monkeypatch.setattr(DeepLayer, "_again_where_open", noted)
    found = Unroll(policy, inputs, tail=8).tail
    assert picked and all(0.0 < share < 1.0 for share in picked)
    monkeypatch.setattr("rl.policy.depth._WORTH_PICKING", 10**6)
    torch.testing.assert_close(found, Unroll(policy, inputs, tail=8).tail, atol=2e-5, rtol=1e-5)

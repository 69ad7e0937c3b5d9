"""Latent modules in a policy: off, on, saved, with adapters, and in every combination replayed."""

import dataclasses
import itertools
import json
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from rl.checkpoints import STATE_FILE
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import PolicyError
from rl.export import export_policy
from rl.policy.adapters import with_whole_modules
from rl.policy.depth import DepthConfig
from rl.policy.injection import InjectionConfig
from rl.policy.loading import load_policy, make_policy, model_class
from rl.policy.modules import ModulesConfig, is_new
from rl.policy.protocol import LatentProtocol
from rl.policy.visual_replay import VisualReplayConfig
from rl.scoring import collate, prompt_inputs, replay, replay_gaps
from rl.trajectory import Sampling
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.rl.test_la_dapo import logs, trained, trainer_for
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_processor

PARTS = {
    "injection": InjectionConfig(heads=2),
    "depth": DepthConfig(),
    "visual_replay": VisualReplayConfig(tokens=3, window=(1, 2, 2)),
}
COMBINATIONS = [
    (family, names)
    for family in FAMILIES
    for count in range(1, 4)
    for names in itertools.combinations(PARTS, count)
    if not (family == "qwen3_5" and "visual_replay" in names)
]


LORA = LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
SPAN = LatentProtocol(min_length=4, max_length=4, max_spans=1, noise_scale=0.3)


def modules(names):
    return ModulesConfig(**{name: PARTS[name] for name in names})


def sampled(policy, processor, folder, sampling=Sampling(1.0, 20), size=3) -> Any:
    engine = engine_for(policy, processor)
    requests = requests_for(square_samples(folder), size, sampling)
    return engine, [t for group in engine.generate(requests) for t in group]


@pytest.mark.parametrize(("family", "names"), COMBINATIONS)
def test_replay_gives_back_the_samplers_log_probs(family, names, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", family, modules=modules(names))
    engine, trajectories = sampled(policy, processor, tmp_path / "clips")
    assert sum(len(t.latents) for t in trajectories) > 10
    found: Any = replay(policy, collate(trajectories, policy, engine.media), policy)
    assert replay_gaps(found, trajectories).largest < 1e-5
    if "depth" in names:
        assert 0.0 < found.depth.item() < 1.0
    if "visual_replay" in names:
        shown = [t.replayed for t in trajectories if len(t.latents)]
        assert all((r[0] >= 0).sum() >= 1 for r in shown)
        for r in shown:  # no token twice in a completion
            places = r[r >= 0].tolist()
            assert len(set(places)) == len(places)


# -- off, and new ----------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_without_modules_a_policy_is_its_backbone_bit_for_bit(family, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "base", family, vocab=320)
    policy = make_policy(folder, tiny_processor(family)).eval()
    plain = model_class(AutoConfig.from_pretrained(folder), folder).from_pretrained(folder).eval()
    assert policy.modules_config == ModulesConfig() and not policy.modules_config.names
    media, (sample,) = MediaProcessor(tiny_processor(family)), square_samples(tmp_path / "clips", 1)
    clip = LocalMedia(media, 1).get(media.key(sample))
    inputs = prompt_inputs(plain, [media.encode(sample, [clip]).input_ids], [[clip]], pad=0)
    known = policy.latent_tokens.start  # the rows of tokens that are new have new weights
    with torch.no_grad():
        found, expected = policy(**inputs).logits, plain(**inputs).logits
    assert torch.equal(found[..., :known], expected[..., :known])


@pytest.mark.parametrize("family", FAMILIES)
def test_new_modules_change_nothing_where_there_are_no_latents(family, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "base", family, vocab=320)  # which need not grow
    processor = tiny_processor(family)
    plain = make_policy(folder, processor).eval()
    names = ["injection"] if family == "qwen3_5" else ["injection", "visual_replay"]
    policy = make_policy(folder, tiny_processor(family), modules=modules(names)).eval()
    never = Sampling(1.0, 8, imagine="never")
    engine, trajectories = sampled(plain, processor, tmp_path / "clips", never)
    scores = [p(**collate(trajectories, p, engine.media).inputs) for p in (plain, policy)]
    assert torch.equal(scores[0].logprobs, scores[1].logprobs)
    again = sampled(policy, processor, tmp_path / "clips", never)[1]
    assert [t.text for t in again] == [t.text for t in trajectories]


# -- saved and loaded ------------------------------------------------------------------------------


def same_weights(ours, theirs, but=()):
    ours, theirs = ours.state_dict(), theirs.state_dict()
    assert ours.keys() - theirs.keys() == set()
    return all(torch.equal(ours[k], theirs[k]) for k in ours if k not in but)


@pytest.mark.parametrize("family", FAMILIES)
def test_modules_are_saved_with_the_policy(family, tmp_path):
    names = [n for n in PARTS if not (family == "qwen3_5" and n == "visual_replay")]
    policy, _ = thinking_policy(tmp_path / "p", family, modules=modules(names))
    policy.save_pretrained(tmp_path / "saved")
    settings = json.loads((tmp_path / "saved" / "config.json").read_text())["foresight"]
    assert settings["modules"] == json.loads(json.dumps({n: PARTS[n].to_dict() for n in names}))
    again = load_policy(tmp_path / "saved")
    assert again.modules_config == policy.modules_config == modules(names)
    assert policy.state_dict().keys() == again.state_dict().keys()
    assert same_weights(policy, again)


def test_modules_are_added_to_an_old_policy(tmp_path):
    old, _ = thinking_policy(tmp_path / "p", modules=modules(["injection"]))
    old.save_pretrained(tmp_path / "saved")
    policy = load_policy(tmp_path / "saved", modules=modules(["depth", "visual_replay"])).eval()
    assert policy.modules_config == modules(PARTS)
    assert same_weights(old, policy)
    new = {n for n in policy.state_dict() if n not in old.state_dict()}
    assert new and all(is_new(n, modules(["depth", "visual_replay"])) for n in new)
    # Asking for what is there already is no contradiction.
    assert same_weights(old, load_policy(tmp_path / "saved", modules=modules(["injection"])))
    other = ModulesConfig(injection=InjectionConfig(heads=4))
    with pytest.raises(PolicyError, match=r"policy\.injection: the policy has one already.*keeps"):
        load_policy(tmp_path / "saved", modules=other)
    shown = torch.randn(3, 32)
    assert torch.equal(policy.visual_replay(shown), shown)  # new, so nothing yet


def test_only_weights_of_modules_that_are_new_may_be_missing(tmp_path):
    policy, _ = thinking_policy(tmp_path / "p", modules=modules(["injection"]))
    policy.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "model.safetensors"
    left = {k: v for k, v in load_file(file).items() if k != "latent_injection.gate"}
    save_file(left, file, metadata={"format": "pt"})
    for wanted in (None, modules(["injection"]), modules(["depth"])):
        with pytest.raises(PolicyError, match=r"1 parameters are missing.*latent_injection\.gate"):
            load_policy(tmp_path / "saved", modules=wanted)


def test_policies_from_before_modules_load(tmp_path):
    policy, _ = thinking_policy(tmp_path / "p")
    policy.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    settings = json.loads(file.read_text())
    del settings["foresight"]["modules"]
    file.write_text(json.dumps(settings))
    assert load_policy(tmp_path / "saved").modules_config == ModulesConfig()
    policy = load_policy(tmp_path / "saved", modules=modules(["injection"]))
    assert policy.modules_config == modules(["injection"])


def test_modules_that_nobody_knows_are_refused():
    with pytest.raises(PolicyError, match=r"unknown latent modules \['memory'\]"):
        ModulesConfig.from_dict({"memory": {}})


@pytest.mark.parametrize("how", ["new", "added"])
def test_recurrent_layers_cannot_replay_video(how, tmp_path):
    folder, processor = (
        save_tiny_checkpoint(tmp_path / "base", "qwen3_5"),
        tiny_processor("qwen3_5"),
    )
    with pytest.raises(PolicyError, match=r"recurrent layers.*choose Qwen3-VL or Qwen2\.5-VL"):
        if how == "new":
            make_policy(folder, processor, modules=modules(["visual_replay"]))
        make_policy(folder, processor).save_pretrained(tmp_path / "old")
        load_policy(tmp_path / "old", modules=modules(["visual_replay"]))


# -- with adapters ---------------------------------------------------------------------------------


def test_adapters_train_modules_whole_and_export_them(tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", modules=modules(PARTS))
    policy.save_pretrained(tmp_path / "base")
    processor.save_pretrained(tmp_path / "base")
    base = load_policy(tmp_path / "base").eval()
    config = with_whole_modules(LORA, base)
    assert set(config.modules_to_save) == {  # type: ignore[attr-defined]
        "depth_gate",
        "latent_head",
        "latent_injection",
        "visual_replay",
    }
    engine, trajectories = sampled(policy, processor, tmp_path / "clips")
    batch = collate(trajectories, base, engine.media)
    with torch.no_grad():
        before = base(**batch.inputs)
    adapted = get_peft_model(base, config)
    scores = adapted(**batch.inputs)
    torch.testing.assert_close(scores.logprobs, before.logprobs)
    (-scores.logprobs.sum() + scores.means.square().sum() + scores.depth).backward()
    trained = {n: p for n, p in adapted.named_parameters() if p.requires_grad}
    for name in ("latent_head", "latent_injection", "visual_replay", "depth_gate"):
        grads = [p.grad for n, p in trained.items() if f".{name}." in n]
        assert grads and all(g is not None and g.abs().max() > 0 for g in grads)
    torch.optim.SGD(trained.values(), lr=1e-3).step()
    checkpoint = tmp_path / "checkpoints" / "checkpoint-1"
    adapted.save_pretrained(checkpoint)
    processor.save_pretrained(checkpoint)
    (checkpoint / STATE_FILE).write_text('{"step": 1}')
    exported = load_policy(
        export_policy(checkpoint, tmp_path / "out", base=tmp_path / "base")
    ).eval()
    with torch.no_grad():
        ours, theirs = adapted.eval()(**batch.inputs), exported(**batch.inputs)
    assert (ours.logprobs - before.logprobs).abs().max() > 1e-3
    torch.testing.assert_close(theirs.logprobs, ours.logprobs, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(theirs.means, ours.means, atol=1e-4, rtol=1e-4)
    assert exported.modules_config == modules(PARTS)


# -- that the exactness above can fail -------------------------------------------------------------


def no_video(policy, inputs):
    del inputs["video"]


def nothing_shown_again(policy, inputs):
    none = torch.zeros(0, dtype=torch.long)
    inputs["video"] = dataclasses.replace(inputs["video"], replayed=none, sources=none)


def others_shown_again(policy, inputs):
    inputs["video"] = dataclasses.replace(inputs["video"], sources=inputs["video"].sources.roll(1))


def new_positions(policy, inputs):
    inputs["position_ids"] = inputs["position_ids"].clone()
    inputs["position_ids"][..., inputs["video"].replayed] += 1


def other_videos(policy, inputs):
    groups = inputs["video"].latent_groups
    inputs["video"] = dataclasses.replace(inputs["video"], latent_groups=groups.max() - groups)


def closed_gates(policy, inputs):
    for name, parameter in policy.named_parameters():
        if name.endswith("depth_gate.router.bias"):
            parameter.fill_(-10.0)


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "harm"),
    [
        ("visual_replay", no_video),
        ("visual_replay", nothing_shown_again),
        ("visual_replay", others_shown_again),
        ("visual_replay", new_positions),
        ("injection", other_videos),
        ("depth", closed_gates),
    ],
)
def test_a_replay_that_is_wrong_does_not_agree(name, harm, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", modules=modules([name]))
    engine, trajectories = sampled(policy, processor, tmp_path / "clips")
    batch = collate(trajectories, policy, engine.media)
    harm(policy, batch.inputs)
    assert replay_gaps(replay(policy, batch, policy), trajectories).largest > 1e-3


# -- the engine, and the trainer -------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trajectory_does_not_hang_on_its_batch(family, tmp_path):
    names = [n for n in PARTS if not (family == "qwen3_5" and n == "visual_replay")]
    policy, processor = thinking_policy(tmp_path / "p", family, modules=modules(names))
    requests = requests_for(square_samples(tmp_path / "clips"), 2)
    together, alone = (
        [
            t
            for g in engine_for(policy, processor, max_batch_size=size).generate(requests)
            for t in g
        ]
        for size in (64, 1)
    )
    for ours, theirs in zip(together, alone, strict=True):
        assert ours.completion_ids.tolist() == theirs.completion_ids.tolist()
        torch.testing.assert_close(ours.latents, theirs.latents, atol=2e-5, rtol=1e-4)
        if "visual_replay" in names:
            assert ours.replayed.tolist() == theirs.replayed.tolist()  # type: ignore[union-attr]


@pytest.mark.parametrize("length", [2, 3, 4])
def test_completions_cut_off_inside_a_span(length, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", protocol=SPAN, modules=modules(PARTS))
    cut = Sampling(1.0, length, imagine="always")
    engine, trajectories = sampled(policy, processor, tmp_path / "clips", cut)
    for t in trajectories:
        assert t.finish_reason == "length" and t.completion_ids[-1] == t.filler
        assert len(t.latents) == len(t.replayed) == length - 1
        assert (t.replayed[-1] == -1).all()  # a latent that was never fed
        assert (t.replayed[:-1, 0] >= 0).all()
    with torch.no_grad():
        found: Any = replay(policy, collate(trajectories, policy, engine.media), policy)
    assert replay_gaps(found, trajectories).largest < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_every_module_is_in_the_graph_without_latents(family, tmp_path):
    """As the head is: or DDP would wait for gradients that do not come."""
    names = [n for n in PARTS if not (family == "qwen3_5" and n == "visual_replay")]
    policy, processor = thinking_policy(tmp_path / "p", family, modules=modules(names))
    never = Sampling(1.0, 4, imagine="never")
    engine, trajectories = sampled(policy, processor, tmp_path / "clips", never, size=1)
    scores = policy(**collate(trajectories, policy, engine.media).inputs)
    (scores.logprobs.sum() + 0.0 * scores.means.sum()).backward()
    assert not [n for n, p in policy.named_parameters() if p.grad is None]


@pytest.mark.parametrize(
    ("names", "adapters"), [(("injection", "depth"), None), (tuple(PARTS), None), (PARTS, LORA)]
)
def test_la_dapo_trains_modules(names, adapters, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", boldness=1.2, modules=modules(names))
    world = policy, processor, square_samples(tmp_path / "clips", 8)
    trainer = trainer_for(world, tmp_path / "run", peft_config=adapters)
    before = trained(trainer)
    trainer.train()
    assert len(logs(trainer)) == 2
    for update in logs(trainer):
        assert update["replay/max_gap"] < 1e-5 and update["replay/max_latent_gap"] < 2e-5
        assert update["latents/per_completion"] > 0 and 0.0 < update["depth/share"] < 1.0
    after = trained(trainer)
    own = {name: [n for n in after if is_new(n, modules([name]))] for name in names}
    assert all(own.values())
    assert not [n for part in own.values() for n in part if torch.equal(after[n], before[n])]

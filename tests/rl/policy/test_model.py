"""Policies made from video models: all families, saving and loading, what is refused."""

import json
import shutil

import pytest
import torch
from transformers import AutoConfig, Qwen3Config, Qwen3ForCausalLM

from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import PolicyError, TrajectoryError
from rl.policy.heads import HeadConfig
from rl.policy.loading import load_policy, make_policy, model_class
from rl.policy.model import LatentPolicy
from rl.policy.protocol import LatentProtocol
from rl.scoring import collate
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.tiny import FAMILIES, save_tiny_checkpoint, tiny_processor


@pytest.fixture(scope="module", params=FAMILIES)
def family(request):
    return request.param


def prompt_of(processor, sample):
    media = MediaProcessor(processor)
    clip = LocalMedia(media, 4).get(media.key(sample))
    encoded = media.encode(sample, [clip])
    ids = torch.from_numpy(encoded.input_ids)[None]
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": torch.from_numpy(encoded.mm_token_type_ids)[None],
        **clip.inputs,
    }


def test_a_new_policy_is_its_backbone(family, tmp_path):
    folder = save_tiny_checkpoint(tmp_path / "base", family)
    processor = tiny_processor(family)
    base = model_class(AutoConfig.from_pretrained(folder), folder).from_pretrained(folder).eval()
    policy = make_policy(folder, processor).eval()
    inputs = prompt_of(processor, square_samples(tmp_path / "clips", 1)[0])
    with torch.no_grad():
        expected, found = base(**inputs).logits, policy(**inputs).logits
    # The vocabulary may have grown; what was there answers as before.
    torch.testing.assert_close(found[..., : expected.shape[-1]], expected)


def test_latents_replace_the_embeddings_of_fillers(family, tmp_path):
    policy, processor = thinking_policy(tmp_path / "policy", family)
    inputs = prompt_of(processor, square_samples(tmp_path / "clips", 1)[0])
    filler = policy.latent_tokens.filler
    inputs["input_ids"] = torch.cat([inputs["input_ids"], torch.full((1, 2), filler)], dim=1)
    inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
    inputs["mm_token_type_ids"] = torch.nn.functional.pad(inputs["mm_token_type_ids"], (0, 2))
    embedded = policy.get_input_embeddings().weight[filler].detach().expand(2, -1)
    with torch.no_grad():
        plain = policy(**inputs).logits
        same = policy(**inputs, latents=embedded).logits
        other = policy(**inputs, latents=embedded + 1).logits
    torch.testing.assert_close(same, plain)
    assert (other - plain)[:, -1].abs().max() > 1e-3
    assert torch.equal(other[:, :-2], plain[:, :-2])
    with pytest.raises(TrajectoryError, match="3 latents for 2 filler tokens"):
        policy(**inputs, latents=torch.zeros(3, embedded.shape[1]))
    # The hook is gone after an error too.
    with torch.no_grad():
        torch.testing.assert_close(policy(**inputs).logits, plain)


def test_gradients_reach_latents_through_checkpointed_layers(tmp_path):
    policy, processor = thinking_policy(tmp_path / "policy")
    engine = engine_for(policy, processor)
    group = engine.generate(requests_for(square_samples(tmp_path / "clips", 1), 4))[0]
    batch = collate(group.trajectories, policy, engine.media).inputs
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            policy.train()
            policy.gradient_checkpointing_enable()
        latents = batch["latents"].clone().requires_grad_()
        scored = policy(**{**batch, "latents": latents})
        policy.zero_grad()
        (scored.logprobs.sum() + scored.means.square().sum()).backward()
        gradients.append((latents.grad, policy.latent_head[1].weight.grad.clone()))
    assert all(g.abs().max() > 0 for g in gradients[0])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(checkpointed, plain)


@pytest.mark.parametrize("head", ["identity", "mlp", "swiglu"])
def test_a_plain_folder_is_enough(family, head, tmp_path):
    policy, processor = thinking_policy(tmp_path / "base", family, head=head)
    policy.save_pretrained(tmp_path / "saved")
    processor.save_pretrained(tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "config.json").read_text())["foresight"]
    assert stored["head"]["kind"] == head and stored["protocol"] == policy.protocol.to_dict()
    again = load_policy(tmp_path / "saved").eval()
    assert isinstance(again, LatentPolicy)
    assert (again.protocol, again.latent_tokens) == (policy.protocol, policy.latent_tokens)
    ours, theirs = policy.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[k], theirs[k]) for k in ours)


def test_spare_embedding_rows_are_used_before_new_ones(tmp_path):
    folder = save_tiny_checkpoint(tmp_path, "qwen3_vl", vocab=320)
    processor = tiny_processor("qwen3_vl")
    policy = make_policy(folder, processor, head=HeadConfig("mlp"))
    assert policy.get_input_embeddings().weight.shape[0] == 320
    token = policy.latent_tokens.start
    weight = policy.get_input_embeddings().weight
    torch.testing.assert_close(weight[token], weight[:token].mean(0))


def test_protocol_changes_travel_and_tokens_do_not_change(tmp_path):
    policy, _ = thinking_policy(tmp_path / "base")
    policy.set_protocol(LatentProtocol(min_length=1, max_length=9, noise_scale=0.7))
    policy.save_pretrained(tmp_path / "saved")
    assert load_policy(tmp_path / "saved").protocol.max_length == 9
    with pytest.raises(PolicyError, match="tokens"):
        policy.set_protocol(LatentProtocol(start_token="<go>"))


def test_what_cannot_be_a_policy(tmp_path):
    text = Qwen3ForCausalLM(
        Qwen3Config(
            vocab_size=300, hidden_size=32, intermediate_size=32, num_hidden_layers=1, head_dim=16
        )
    )
    text.save_pretrained(tmp_path / "text")
    with pytest.raises(PolicyError, match=r"video input, for example Qwen3-VL"):
        make_policy(tmp_path / "text", tiny_processor())
    folder = save_tiny_checkpoint(tmp_path / "plain")
    with pytest.raises(PolicyError, match=r"make_policy"):
        load_policy(folder)
    policy, _ = thinking_policy(tmp_path / "base")
    policy.save_pretrained(tmp_path / "saved")
    (tmp_path / "damaged").mkdir()
    shutil.copy(tmp_path / "saved" / "config.json", tmp_path / "damaged")
    shutil.copy(folder / "model.safetensors", tmp_path / "damaged")
    with pytest.raises(PolicyError, match="not those of its config"):
        load_policy(tmp_path / "damaged")
    assert AutoConfig.from_pretrained(tmp_path / "saved").foresight["version"] == 1

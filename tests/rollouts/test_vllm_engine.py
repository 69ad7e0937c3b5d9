"""The vLLM engine against the transformers engine and replay, and what it alone can do."""

import dataclasses
import json
import pickle
from typing import Any
from unittest.mock import AsyncMock

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import DataError, RolloutError
from rl.interfaces import Media, WeightUpdate
from rl.scoring import collate, replay, replay_gaps
from rl.trajectory import MediaKey, RolloutRequest, Sample, Sampling, Trajectory
from rl.weights import state_checksum, weight_update
from rollouts.pool import RolloutPool
from rollouts.vllm_engine import VLLMEngine
from rollouts.worker import EngineSpec
from tests.latent import engine_for, requests_for, square_samples, thinking_policy
from tests.rollouts.vllm_engines import OPTIONS, Engines

# Qwen3.5's linear attention has CPU kernels for bfloat16 alone.
CPU_FAMILIES = ("qwen3_vl", "qwen2_5_vl")

SAMPLINGS = {
    "sampled": Sampling(1.0, 20),
    "imagining": Sampling(0.8, 24, "always"),
    "truncated": Sampling(0.9, 24, "always", top_p=0.9, top_k=20),
    "greedy": Sampling(0.0, 20, "always"),
}


@pytest.fixture
def samples(tmp_path):
    return square_samples(tmp_path / "clips")


@pytest.fixture
def engine(vllm_engines: Engines, tmp_path):
    return vllm_engines(*thinking_policy(tmp_path / "own"))


def flat(groups):
    return [t for group in groups for t in group]


@pytest.mark.parametrize("family", CPU_FAMILIES)
def test_both_engines_sample_the_same(vllm_engines, family, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", family)
    ours, theirs = vllm_engines(policy, processor), engine_for(policy, processor)
    requests = [
        dataclasses.replace(r, sampling=sampling)
        for sampling in SAMPLINGS.values()
        for r in requests_for(samples, 3)
    ]
    latents = 0
    found, expected = flat(ours.generate(requests)), flat(theirs.generate(requests))
    assert len(found) == len(expected) == 48
    for a, b in zip(found, expected, strict=True):
        assert (a.sample_id, a.seed, a.finish_reason) == (b.sample_id, b.seed, b.finish_reason)
        assert a.prompt_ids.tolist() == b.prompt_ids.tolist()
        assert a.completion_ids.tolist() == b.completion_ids.tolist()
        assert a.decision.tolist() == b.decision.tolist() and a.kept.tolist() == b.kept.tolist()
        assert (a.span_lengths, a.media, a.text) == (b.span_lengths, b.media, b.text)
        torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=0)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        np.testing.assert_allclose(a.latent_logprobs, b.latent_logprobs, atol=1e-4)
        latents += len(a.latents)
    assert latents > 60


@pytest.mark.parametrize("family", CPU_FAMILIES)
def test_the_trainer_replays_what_it_sampled(vllm_engines, family, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", family)
    engine = vllm_engines(policy, processor)
    for name in ("sampled", "imagining", "truncated"):
        trajectories = flat(engine.generate(requests_for(samples, 3, SAMPLINGS[name])))
        with torch.no_grad():
            batch = collate(trajectories, policy, engine.media)
            gaps = replay_gaps(replay(policy, batch, policy), trajectories)
        assert gaps.largest < 1e-5, name


def test_the_prompt_of_a_group_is_computed_once(engine, samples):
    request = RolloutRequest(samples[3], (1, 2, 3, 4), Sampling(1.0, 4))
    before = engine.health()
    (group,) = engine.generate([request])
    after = engine.health()
    prompt = len(group.trajectories[0].prompt_ids)
    assert prompt > 64  # two blocks of 32 that can be shared, and a rest that cannot
    looked_up, cached = (
        after[name] - before[name] for name in ("prompt_tokens_looked_up", "prompt_tokens_cached")
    )
    assert looked_up == 4 * prompt and cached == 3 * ((prompt - 1) // 32 * 32)
    assert 0.0 <= after["kv_cache_used"] <= 1.0 and after["preemptions"] == before["preemptions"]


def test_a_request_that_dies_takes_no_other_with_it(engine, samples, monkeypatch):
    requests = requests_for(samples, 3, Sampling(1.0, 12, "always"))
    expected = engine.generate(requests)
    add, doomed = engine._llm.add_request, []

    async def refuse(key, inputs, params, **kwargs):
        own = params.extra_args["foresight"]
        if own["seed"] == 1001:
            doomed.append(key)
            inputs = inputs | {"prompt_token_ids": []}  # which vLLM itself refuses
        return await add(key, inputs, params, **kwargs)

    monkeypatch.setattr(engine._llm, "add_request", refuse)
    found = engine.sample(requests)
    assert len(doomed) == 2  # tried once more
    for i, (group, whole) in enumerate(zip(found, expected, strict=True)):
        for member, t in zip(group, whole, strict=True):
            if (i, t.seed) == (1, 1001):
                assert isinstance(member, RolloutError)
                assert "'square1', seed 1001" in str(pickle.loads(pickle.dumps(member)))
            else:
                assert isinstance(member, Trajectory)
                assert member.completion_ids.tolist() == t.completion_ids.tolist()
    with pytest.raises(RolloutError, match=r"'square1', seed 1001.*2 tries"):
        engine.generate(requests)
    monkeypatch.undo()
    assert nothing_left(engine)
    assert len(flat(engine.generate(requests))) == 12


def nothing_left(engine):
    (memory,) = engine._call(engine._llm.collective_rpc("foresight_memory"))
    return memory == {"live": 0, "left": 0}


def test_a_broken_sample_takes_no_other_with_it(engine, samples, tmp_path):
    (tmp_path / "notes.mp4").write_text("not a video")
    broken = dataclasses.replace(samples[1], id="row-9", video=str(tmp_path / "notes.mp4"))
    first, second, third = engine.sample(requests_for([samples[0], broken, samples[2]], 2))
    assert all(isinstance(t, Trajectory) for t in (*first, *third))
    assert all("'row-9'" in str(error) for error in second)


def test_a_prompt_without_room_is_refused(engine, samples):
    with pytest.raises(RolloutError, match=r"'square0'.*400 new ones.*256.*max_model_len"):
        engine.generate(requests_for(samples[:1], 1, Sampling(1.0, 400)))


def test_half_a_layer_can_be_updated(vllm_engines, samples, tmp_path):
    """vLLM fuses query, key and value: the two that are not named must stay what they are."""
    policy, processor = thinking_policy(tmp_path / "p")
    engine = vllm_engines(policy, processor)
    other, _ = thinking_policy(tmp_path / "q", boldness=0.4)
    requests = requests_for(samples, 2, Sampling(1.0, 16, "always"))
    for version, base in ((1, policy), (3, other)):
        engine.update_weights(weight_update(base, version))
        torch.manual_seed(version)
        state = {
            name: value + 0.05 * torch.randn_like(value)
            for name, value in base.state_dict().items()
            if "layers.0.self_attn.q_proj" in name or name.startswith("latent_head.")
        }
        engine.update_weights(WeightUpdate(version + 1, state, state_checksum(state)))
        base.load_state_dict(state, strict=False)
        expected = flat(engine_for(base, processor).generate(requests))
        for a, b in zip(flat(engine.generate(requests)), expected, strict=True):
            assert a.policy_version == version + 1
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_broken_weights_give_errors_and_no_trajectories(vllm_engines, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = vllm_engines(policy, processor)
    with torch.no_grad():
        policy.base_model.language_model.norm.weight.fill_(torch.nan)
    engine.update_weights(weight_update(policy, 1))
    with pytest.raises(RolloutError, match=r"'square0', seed 0.*no finite numbers"):
        engine.generate(requests_for(samples[:1], 2))
    assert nothing_left(engine)


def test_weights_of_other_shapes_are_refused(engine):
    state = {"lm_head.weight": torch.zeros(3, 5)}
    with pytest.raises(RolloutError, match=r"lm_head\.weight is \(3, 5\)"):
        engine.update_weights(WeightUpdate(2, state, state_checksum(state)))
    assert engine.version == 0


def test_a_weight_update_forgets_computed_prompts_and_clips(vllm_engines, samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    engine = vllm_engines(policy, processor)
    requests = requests_for(samples, 2, Sampling(0.0, 12, "always"))
    engine.generate(requests)
    with torch.no_grad():  # the tower alone: its output for these clips is in vLLM's cache
        for parameter in policy.base_model.visual.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    engine.update_weights(weight_update(policy, 1))
    expected = flat(engine_for(policy, processor).generate(requests))
    for a, b in zip(flat(engine.generate(requests)), expected, strict=True):
        assert a.completion_ids.tolist() == b.completion_ids.tolist()
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


def test_adapters_are_swapped_and_tied_weights_updated(samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    policy.config.tie_word_embeddings = policy.config.text_config.tie_word_embeddings = True
    policy.tie_weights()
    assert policy.lm_head.weight is policy.get_input_embeddings().weight
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    adapted: Any = get_peft_model(
        policy, LoraConfig(r=4, target_modules=r".*language_model.*\.(q|v|o)_proj")
    )
    requests = requests_for(samples, 2, Sampling(1.0, 16, "always"))
    seen = set()

    def check(version):
        expected = flat(engine_for(policy, processor).generate(requests))
        for a, b in zip(flat(engine.generate(requests)), expected, strict=True):
            assert a.policy_version == version
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)
        seen.add(tuple(expected[0].completion_ids.tolist()))

    media = MediaProcessor(processor)
    options = dataclasses.replace(OPTIONS, enable_lora=True)
    folder, clips = tmp_path / "policy", LocalMedia(media, 16)
    with VLLMEngine(folder, media, clips, version=3, options=options) as engine:
        check(3)  # a fresh adapter changes nothing
        # Half a layer; the other half comes from the folder that the engine was started on.
        (query,) = (n for n in policy.state_dict() if "layers.0" in n and "q_proj.base" in n)
        with torch.no_grad():
            policy.get_parameter(query).add_(0.1)
        state = {query.replace(".base_layer", ""): policy.get_parameter(query).detach().clone()}
        engine.update_weights(WeightUpdate(3, state, state_checksum(state)))
        check(3)
        for version in (4, 5):
            torch.manual_seed(version)
            for name, parameter in adapted.named_parameters():
                if "lora_B" in name:
                    torch.nn.init.normal_(parameter, std=0.3)
            adapted.save_pretrained(tmp_path / str(version))
            assert engine.update_adapter(tmp_path / str(version), version) == version
            check(version)
        with pytest.raises(RolloutError, match=r"nowhere holds no LoRA adapter of PEFT's"):
            engine.update_adapter(tmp_path / "nowhere", 6)
        config = json.loads((tmp_path / "5/adapter_config.json").read_text())
        (tmp_path / "5/adapter_config.json").write_text(json.dumps(config | {"r": 64}))
        with pytest.raises(RolloutError, match=r"has rank 64; build .* max_lora_rank=64"):
            engine.update_adapter(tmp_path / "5", 6)
        check(5)  # nothing was lost
        with torch.no_grad():
            for parameter in policy.parameters():
                parameter.add_(0.01 * torch.randn_like(parameter))
        engine.update_weights(weight_update(adapted, 6))  # merged: the adapter is taken off
        check(6)
    assert len(seen) == 5
    with pytest.raises(RolloutError, match="it was closed"):
        engine.generate(requests)


def test_sleep_and_death_lose_nothing_and_hold_up_nobody(samples, tmp_path, monkeypatch):
    policy, processor = thinking_policy(tmp_path / "p")
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    media, requests = MediaProcessor(processor), requests_for(samples, 2, Sampling(1.0, 12))
    options = dataclasses.replace(OPTIONS, enable_sleep=True)
    expected = [
        t.completion_ids.tolist() for t in flat(engine_for(policy, processor).generate(requests))
    ]

    def found():
        return [t.completion_ids.tolist() for t in flat(engine.generate(requests))]

    with VLLMEngine(tmp_path / "policy", media, LocalMedia(media, 16), options=options) as engine:
        assert engine._call(engine._llm.is_sleeping())
        assert found() == expected
        assert engine._call(engine._llm.is_sleeping())
        with monkeypatch.context() as patch:
            patch.setattr(engine._llm, "sleep", AsyncMock(side_effect=RuntimeError("no room")))
            assert found() == expected
        with pytest.raises(RolloutError, match=r"did not fall asleep: no room.*enable_sleep"):
            engine.generate(requests)
        engine._trouble = None  # vLLM itself knows of no trouble
        for process in engine._llm.engine_core.resources.engine_manager.processes:
            process.kill()
        with pytest.raises(RolloutError, match=r"did not take weights.*process died"):
            engine.update_weights(weight_update(policy, 1))


def test_a_worker_of_the_pool_samples_with_vllm(samples, tmp_path):
    policy, processor = thinking_policy(tmp_path / "p")
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    spec = EngineSpec(str(tmp_path / "policy"), engine="vllm", options=OPTIONS)
    requests = requests_for(samples, 2, Sampling(1.0, 12, "always"))
    with RolloutPool(spec, MediaProcessor(processor), 1, cpus_per_worker=0) as pool:
        expected = engine_for(policy, processor).generate(requests)
        for a, b in zip(flat(pool.generate(requests)), flat(expected), strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            torch.testing.assert_close(a.latents, b.latents, atol=1e-4, rtol=0)
        assert pool.update_weights(weight_update(policy, 4)) == 4
        (health,) = pool.health()["workers"].values()
    assert (health["engine"], health["version"], health["trajectories"]) == ("vllm", 4, 8)


def test_several_clips_and_images_in_a_prompt(vllm_engines, samples, tmp_path):
    """What `Sample` does not know yet: the prompt's function does."""
    from rollouts.vllm_prompts import engine_prompt

    policy, wrapped = thinking_policy(tmp_path / "own")
    engine = vllm_engines(policy, wrapped)
    processor: MediaProcessor = engine.processor
    clips = [processor.process(processor.key(s)) for s in samples[1:3]]
    pixels = wrapped.image_processor(
        [torch.randint(0, 255, (3, 16, 24), dtype=torch.uint8)], return_tensors="pt"
    )
    image = Media(MediaKey("square.png", (), "images"), dict(pixels), "<|image_pad|>" * 6)
    assert pixels["image_grid_thw"].tolist() == [[1, 4, 6]]
    start, end = "<|vision_start|>", "<|vision_end|>"
    text = "one " + "".join(
        f"{start}{m.placeholder}{end} and " for m in (clips[0], image, clips[1])
    )
    ids = np.array(processor.tokenizer(text, add_special_tokens=False)["input_ids"])
    settings = {
        "tokenizer": processor.tokenizer,
        "embedded": policy.latent_tokens.banned,
        "merge_size": 2,
        "dtype": torch.float32,
    }
    found: Any = engine_prompt("s", ids, (clips[0], image, clips[1]), **settings)
    assert found["prompt_token_ids"] == ids.tolist()
    video, picture = found["mm_placeholders"]["video"], found["mm_placeholders"]["image"]
    assert [p.get_num_embeds() for p in (*video, *picture)] == [8, 8, 6]
    token = {
        kind: processor.tokenizer.convert_tokens_to_ids(f"<|{kind}_pad|>")
        for kind in ("video", "image")
    }
    for place in video:
        inside = ids[place.offset : place.offset + place.length]
        assert (inside == token["video"]).tolist() == place.is_embed.tolist()
        # A start marker for each pair of frames, but not the one around the clip.
        assert (inside == processor.tokenizer.convert_tokens_to_ids(start)).sum() == 2
    assert picture[0].is_embed is None
    assert (ids[picture[0].offset :][:6] == token["image"]).all()
    assert len(set(found["mm_hashes"]["video"])) == 2

    types = wrapped.create_mm_token_type_ids([ids.tolist()])
    inputs = {name: torch.cat([c.inputs[name] for c in clips]) for name in clips[0].inputs}
    tokens = policy.latent_tokens
    expected = policy.generate(
        input_ids=torch.tensor(ids)[None],
        attention_mask=torch.ones(1, len(ids), dtype=torch.int64),
        mm_token_type_ids=torch.tensor(types),
        **inputs,
        **pixels,
        do_sample=False,
        max_new_tokens=12,
        suppress_tokens=[tokens.start, tokens.end, tokens.filler, *tokens.banned],
    )[0, len(ids) :]
    assert greedy_text(engine, found) == expected.tolist()

    longer = processor.process(processor.key(samples[3]))
    with pytest.raises(DataError, match=r"'s'.*does not hold the text"):
        engine_prompt("s", ids, (clips[0], image, longer), **settings)
    with pytest.raises(DataError, match=r"'s': 14 media tokens.*no clip"):
        engine_prompt("s", ids, clips[:1], **settings)


def greedy_text(engine, prompt):
    """The ids that vLLM samples greedily without imagining."""
    from rollouts.vllm_batch import request_params

    request = RolloutRequest(Sample("s", "", "", ""), (1,), Sampling(0.0, 12, "never"))
    params = request_params(request, 1, "several", frozenset({258}))

    async def run():
        async for output in engine._llm.generate(prompt, params, "several"):
            ids = output.outputs[0].token_ids
        await engine._llm.collective_rpc("foresight_take", args=(["several"],))
        return list(ids)

    return engine._call(run())


def test_an_engine_that_cannot_start_says_so(tmp_path):
    policy, processor = thinking_policy(tmp_path / "p", head="identity")
    policy.save_pretrained(tmp_path / "policy")  # without its processor, which vLLM needs
    media = MediaProcessor(processor)
    with pytest.raises(RolloutError, match="vLLM did not start on"):
        VLLMEngine(tmp_path / "policy", media, LocalMedia(media, 4))

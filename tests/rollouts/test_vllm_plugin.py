"""Latents inside vLLM: the same trajectories whatever the scheduler does to them."""

import json
import random
import resource
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import Qwen3Config

from rl.errors import PolicyError
from rl.policy.injection import InjectionConfig
from rl.policy.loading import load_policy
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol
from tests.latent import thinking_policy
from tests.rollouts.vllm_runs import Ask, cut, engine, gaps, how, same, sample, take

vllm_cpu = pytest.importorskip("rollouts.vllm_cpu")
vllm_cpu.install()
pytest.importorskip("vllm")

# Blocks of 32 tokens take 32 KiB each in these models: 12 of them hold 3 of the requests below.
CROWDED = {"kv_cache_memory_bytes": 12 * (32 << 10), "max_model_len": 128}
CHUNKED = {"max_num_batched_tokens": 24, "enable_chunked_prefill": True}


def asks(count=8, length=44, most=60, same_prompt=False):
    """Prompts around a block boundary, all with other seeds."""
    return [
        Ask(
            tuple(7 + (j * (1 if same_prompt else i + 1)) % 240 for j in range(length)),
            seed=1000 + i,
            imagine=("free", "always")[i % 2],
            most=most,
            **[{}, {"temperature": 0.8, "top_p": 0.9}, {"top_k": 5}, {}][i % 4],
        )
        for i in range(count)
    ]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("vllm")
    protocol = LatentProtocol(min_length=2, max_length=4, max_spans=6, noise_scale=0.3)
    policy, processor = thinking_policy(folder / "base", protocol=protocol, boldness=0.9)
    with torch.no_grad():  # answers long enough to be preempted
        policy.get_output_embeddings().weight[258] = 0.0
    policy.save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    return folder / "policy", policy


@pytest.fixture(scope="module")
def roomy(world):
    return engine(world[0])


@pytest.fixture(scope="module")
def expected(world, roomy):
    """What vLLM samples when nothing is in its way, which the policy agrees with."""
    told = sample(roomy, asks())
    assert max(gaps(world[1], asks(), told)) < 1e-5
    assert sum(len(t.latents) for t in told) > 40
    return told


def check(policy, requests, told, expected):
    assert max(gaps(policy, requests, told)) < 1e-5
    assert all(same(a, b) for a, b in zip(told, expected, strict=True))


def crowd(llm, requests):
    """Sample where there is no room for all: some are preempted and computed anew."""
    scheduler = llm.llm_engine.engine_core.engine_core.scheduler
    preempt, preempted = scheduler._preempt_request, []
    scheduler._preempt_request = lambda *args, **kw: (preempted.append(1), preempt(*args, **kw))[1]
    try:
        llm.reset_prefix_cache()
        told = sample(llm, requests)
    finally:
        del scheduler._preempt_request
    assert len(preempted) > 2
    assert llm.collective_rpc("foresight_memory")[0]["left"] == 0
    return told


def test_alone_as_in_a_batch(world, roomy, expected):
    alone = [sample(roomy, [ask])[0] for ask in asks()[:3]]
    assert all(same(a, b) for a, b in zip(alone, expected, strict=False))


@pytest.mark.parametrize("options", [{}, CHUNKED, {"enable_prefix_caching": False}], ids=str)
def test_preempted_requests_keep_their_latents(world, expected, options):
    llm = engine(world[0], **CROWDED, **options)
    check(world[1], asks(), crowd(llm, asks()), expected)


def test_equal_prompts_share_the_prompt_and_nothing_else(world, roomy):
    requests = asks(same_prompt=True)
    told = sample(roomy, requests)
    assert [t.cached for t in told][1:] == [32] * 7
    assert max(gaps(world[1], requests, told)) < 1e-5
    llm = engine(world[0], **CROWDED)
    check(world[1], requests, crowd(llm, requests), told)


@pytest.mark.parametrize("length", [1, 2, 3, 5, 20, 33, 50])
def test_going_on_from_any_cut(world, roomy, expected, length):
    filler = world[1].latent_tokens.filler
    requests = [cut(a, t, length, filler) for a, t in zip(asks(), expected, strict=True)]
    pairs = [(r, t) for r, t in zip(requests, expected, strict=True) if len(t.ids) > length]
    told = sample(roomy, [r for r, _ in pairs])
    for (_, whole), part in zip(pairs, told, strict=True):
        assert part.ids.tolist() == whole.ids.tolist()
        torch.testing.assert_close(part.latents, whole.latents, atol=2e-5, rtol=0)
        torch.testing.assert_close(
            part.logprobs[length:], whole.logprobs[length:], atol=2e-5, rtol=0
        )


def test_going_on_is_preempted_too(world, expected):
    filler = world[1].latent_tokens.filler
    requests = [cut(a, t, 6, filler) for a, t in zip(asks(), expected, strict=True)]
    llm = engine(world[0], **CROWDED, **CHUNKED)
    told = crowd(llm, requests)
    assert [t.ids.tolist() for t in told] == [t.ids.tolist() for t in expected]


def test_branches_of_one_beginning_share_its_blocks(world, roomy, expected):
    filler, ask, whole = world[1].latent_tokens.filler, asks()[1], expected[1]
    branches = [replace(cut(ask, whole, 30, filler), seed=50 + i) for i in range(4)]
    roomy.reset_prefix_cache()
    told = sample(roomy, branches)
    assert [t.cached for t in told] == [0, 64, 64, 64]  # of 44 + 30 tokens
    assert max(gaps(world[1], branches, told)) < 1e-5
    latents = branches[0].latents
    assert latents is not None
    other = replace(branches[0], latents=latents * 1.5)
    assert sample(roomy, [other])[0].cached == 32  # equal ids, other latents


def test_scheduling_ahead_of_the_device(world, expected, monkeypatch):
    from vllm.platforms.cpu import CpuPlatform

    stock = CpuPlatform.check_and_update_config.__func__

    def ahead(cls, config):  # vLLM turns this off on CPU; the runner can do it all the same
        stock(cls, config)
        config.scheduler_config.async_scheduling = True

    monkeypatch.setattr(CpuPlatform, "check_and_update_config", classmethod(ahead))
    llm = engine(world[0], **CROWDED, seed=1)  # an engine of its own
    assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
    check(world[1], asks(), crowd(llm, asks()), expected)


@pytest.mark.slow
def test_compiled(world, expected):
    llm = engine(world[0], enforce_eager=False)
    check(world[1], asks(), sample(llm, asks()), expected)


def test_a_text_model(world, expected, tmp_path):
    """The language model of the policy by itself."""
    config = json.loads((world[0] / "config.json").read_text())
    text = {k: v for k, v in config["text_config"].items() if k not in ("model_type", "dtype")}
    text["rope_parameters"] = {"rope_type": "default", "rope_theta": 1e4}
    alone = Qwen3Config(**text, architectures=["LatentQwen3ForCausalLM"])
    alone.foresight = config["foresight"]
    alone.save_pretrained(tmp_path)
    weights = {
        name.replace("model.language_model.", "model."): value
        for name, value in load_file(world[0] / "model.safetensors").items()
        if "visual" not in name
    }
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((world[0] / name).read_bytes())
    llm = engine(tmp_path, limit_mm_per_prompt={})
    assert all(same(a, b) for a, b in zip(sample(llm, asks()), expected, strict=True))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl", "qwen3_5"])
def test_bf16_is_as_far_off_as_bf16_itself(family, tmp_path):
    protocol = LatentProtocol(min_length=2, max_length=4, max_spans=6, noise_scale=0.3)
    policy, processor = thinking_policy(tmp_path / "base", family, protocol)
    policy.to(torch.bfloat16).save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    told = sample(engine(tmp_path / "policy", dtype="bfloat16"), asks())
    assert sum(len(t.latents) for t in told) > 10
    ours = load_policy(tmp_path / "policy", dtype=torch.bfloat16).eval()
    exact = load_policy(tmp_path / "policy", dtype=torch.float32).eval()
    between = max(gaps(ours, asks(), told))
    rounding = max(gaps(exact, asks(), told))
    assert between < 0.3 and between < 3 * rounding


def test_many_requests_some_aborted(world):
    """Comings and goings at random: each is whole or gone, and nothing piles up."""
    llm = engine(world[0], **CROWDED)
    llm.reset_prefix_cache()
    core, rng = llm.llm_engine, random.Random(0)
    pool = [
        replace(
            ask, seed=5000 + i, most=rng.randint(4, 40), prompt=ask.prompt[: rng.randint(3, 44)]
        )
        for i, ask in enumerate(asks(100) * 5)
    ]
    waiting, running, finished, aborted = list(enumerate(pool)), {}, [], []
    memory = {}
    while waiting or running:
        while waiting and len(running) < 16:
            i, ask = waiting.pop()
            core.add_request(f"soak-{i}", {"prompt_token_ids": list(ask.prompt)}, how(ask, f"k{i}"))
            running[f"soak-{i}"] = i
        for output in core.step():
            if output.finished and output.request_id in running:
                i = running.pop(output.request_id)
                finished.append((i, *take(llm, [f"k{i}"], [pool[i]], [output])))
                if len(finished) in (150, 400):
                    memory[len(finished)] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        if rng.random() < 0.05 and running:
            name = rng.choice(list(running))
            core.abort_request([name])
            aborted.append(running.pop(name))
    core.step()
    llm.collective_rpc("foresight_take", args=([f"k{i}" for i in aborted],))
    assert llm.collective_rpc("foresight_memory")[0]["left"] == 0
    assert len(finished) + len(aborted) == len(pool) and len(aborted) > 20
    assert max(gaps(world[1], [pool[i] for i, _ in finished], [t for _, t in finished])) < 3e-5
    assert memory[400] - memory[150] < 64_000  # KiB; 250 requests' latents alone are a tenth


@pytest.mark.slow
def test_tensor_parallel(world, expected, monkeypatch):
    monkeypatch.setenv("VLLM_CPU_OMP_THREADS_BIND", "0|1")
    llm = engine(world[0], tensor_parallel_size=2, distributed_executor_backend="mp")
    check(world[1], asks(), sample(llm, asks()), expected)


def test_mutation_latents_forgotten_at_preemption(world, expected, monkeypatch):
    from rollouts.vllm_internals import LatentModelState

    monkeypatch.setattr(LatentModelState, "_feed_prefill", lambda *args: None)
    llm = engine(world[0], **CROWDED)
    assert max(gaps(world[1], asks(), crowd(llm, asks()))) > 1e-2


def test_mutation_blocks_with_latents_shared(world, roomy, monkeypatch):
    from rollouts import vllm_internals

    # 61 tokens, the start and two fillers fill two blocks: equal ids, other latents.
    beginning = Ask(tuple(range(61)), 1, imagine="always", done=(263, 265, 265, 265))
    latents = torch.randn(2, 3, 32, generator=torch.Generator().manual_seed(0))
    pair = [replace(beginning, latents=z) for z in latents]

    def gap():
        return max(gaps(world[1], pair, [sample(roomy, [ask])[0] for ask in pair]))

    assert gap() < 1e-5
    roomy.reset_prefix_cache()
    monkeypatch.setattr(vllm_internals, "_fillers", set())
    assert gap() > 1e-2
    roomy.reset_prefix_cache()


def test_a_policy_with_modules_is_refused_by_name(tmp_path):
    from rollouts.vllm_internals import prepare_config

    policy, _ = thinking_policy(tmp_path / "p", modules=ModulesConfig(injection=InjectionConfig(2)))
    model = SimpleNamespace(hf_config=policy.config, architecture="LatentQwen3VL")
    with pytest.raises(
        PolicyError, match=r"LatentQwen3VL: vLLM cannot run a policy with injection"
    ):
        prepare_config(SimpleNamespace(model_config=model))

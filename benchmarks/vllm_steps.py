"""Engine steps of vLLM, timed one by one: latent trajectories beside plain decoding."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch

from benchmarks.shapes import Setting

PROMPT = 48  # tokens of a prompt


def start(folder: Path, setting: Setting, **options: Any) -> Any:
    """A `vllm.LLM` on the policy, with room for the largest batch."""
    from vllm import LLM

    on_cpu = setting.device.type == "cpu"
    if on_cpu:
        options["block_size"] = 32
    return LLM(
        str(folder),
        dtype=setting.kind,
        max_model_len=PROMPT + setting.tokens + 32,
        max_num_seqs=max(setting.batches),
        enforce_eager=on_cpu,
        kv_cache_memory_bytes=setting.cache_bytes(PROMPT),
        gpu_memory_utilization=0.4,  # there are two of them
        limit_mm_per_prompt={"image": 0, "video": 1},
        skip_mm_profiling=True,
        **options,
    )


def steps(llm: Any, batch: int, params: Sequence[Any], tag: str) -> list[float]:
    """Seconds of each engine step that only decodes, for a batch of fresh prompts."""
    engine, prompts = llm.llm_engine, torch.randint(0, 200, (batch, PROMPT)).tolist()
    for i, (prompt, one) in enumerate(zip(prompts, params, strict=True)):
        engine.add_request(f"{tag}-{i}", {"prompt_token_ids": prompt}, one)
    times: list[float] = []
    begun: set[str] = set()
    while engine.has_unfinished_requests():
        decoding = len(begun) == batch
        started = time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - started
        begun |= {output.request_id for output in outputs}
        if decoding and len(outputs) == batch:
            times.append(seconds)
    return times


def vllm_steps(folder: Path, setting: Setting) -> dict[tuple[str, int], float]:
    """Median seconds of a step, by how is decoded ("greedy", "sampled", "latent") and batch."""
    from vllm import SamplingParams
    from vllm.sampling_params import RequestOutputKind

    shared: dict[str, Any] = {
        "max_tokens": setting.tokens,
        "ignore_eos": True,
        "detokenize": False,
        "output_kind": RequestOutputKind.DELTA,
    }
    plain = start(
        folder, setting, hf_overrides={"architectures": ["Qwen3VLForConditionalGeneration"]}
    )
    latent = start(folder, setting, worker_extension_cls="rollouts.vllm_worker.ForesightWorker")
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for turn in range(-1, setting.repeats):  # the first one warms up
        for batch in setting.batches if turn >= 0 else setting.batches[-1:]:
            keys = [f"{turn}-{batch}-{i}" for i in range(batch)]
            own = [{"key": k, "seed": i, "imagine": "always"} for i, k in enumerate(keys)]
            kinds = {
                "greedy": (plain, [SamplingParams(temperature=0.0, **shared)] * batch),
                "sampled": (
                    plain,
                    [
                        SamplingParams(temperature=1.0, seed=i, logprobs=0, **shared)
                        for i in range(batch)
                    ],
                ),
                "latent": (
                    latent,
                    [
                        SamplingParams(temperature=0.0, extra_args={"foresight": o}, **shared)
                        for o in own
                    ],
                ),
            }
            for kind, (llm, params) in kinds.items():
                times = steps(llm, batch, params, f"{kind}-{turn}-{batch}")
                if turn >= 0:
                    found[kind, batch] += times
            latent.collective_rpc("foresight_take", args=(keys,))
    for llm in (plain, latent):
        llm.llm_engine.engine_core.shutdown()
    return {key: median(times) for key, times in found.items()}

"""Tokens per second of both engines, beside one sequence at a time, and what fetching costs."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from benchmarks.shapes import Setting
from rl.data.media import LocalMedia, MediaProcessor
from rl.interfaces import Engine
from rl.policy.loading import load_policy
from rl.scoring import media_types
from rl.trajectory import RolloutRequest, Sample, Sampling
from rollouts.transformers_engine import TransformersEngine
from rollouts.vllm_engine import VLLMEngine
from rollouts.vllm_options import VLLMOptions
from tests.tiny import moving_square, write_clip

GROUP = 8  # trajectories of a prompt
FRAMES = 8  # frames of its clip, of 32x32 pixels


@torch.no_grad()
def one_by_one(policy: Any, prompts: Sequence[dict[str, torch.Tensor]], tokens: int) -> int:
    """Sample a completion of each prompt, one after the other; returns how many tokens that was.

    This is what released code does: a KV cache, a forward a token, the last hidden state as the
    next embedding within a span, which has a fixed length. It stands here without what makes such
    code slower: clips are processed already, no vocabulary is looked at within a span, and neither
    densities nor log-probs are computed.
    """
    marks, length = policy.latent_tokens, policy.protocol.max_length
    embed, head = policy.get_input_embeddings(), policy.get_output_embeddings()
    for inputs in prompts:
        positions, place = policy.position_ids(inputs)
        out = policy.base_model(**inputs, position_ids=positions, use_cache=True)
        mask = inputs["attention_mask"]
        for step in range(tokens):
            hidden = out.last_hidden_state[:, -1]
            if 1 <= step <= length:
                fed = hidden
            elif step in (0, length + 1):
                fed = embed(torch.tensor([marks.start if step == 0 else marks.end]).to(mask))
            else:
                fed = embed(torch.multinomial(head(hidden).float().softmax(-1), 1)[:, 0])
            if step == tokens - 1:
                break
            mask = torch.cat([mask, mask.new_ones(1, 1)], dim=1)
            out = policy.base_model(
                inputs_embeds=fed[:, None],
                attention_mask=mask,
                position_ids=place.expand(3, -1)[..., None] + step,
                past_key_values=out.past_key_values,
                use_cache=True,
            )
    return tokens * len(prompts)


def prompt_inputs(
    policy: Any, media: MediaProcessor, clips: LocalMedia, sample: Sample
) -> dict[str, torch.Tensor]:
    """A prompt and its clip as the model's forward takes them."""
    clip = clips.get(media.key(sample))
    ids = torch.as_tensor(media.encode(sample, [clip]).input_ids)[None]
    inputs = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "mm_token_type_ids": media_types(ids, policy.config),
        **clip.inputs,
    }
    inputs["pixel_values_videos"] = inputs["pixel_values_videos"].to(policy.dtype)
    return {name: tensor.to(policy.device) for name, tensor in inputs.items()}


@contextmanager
def timed_fetches(engine: VLLMEngine) -> Iterator[list[float]]:
    """Collects the seconds of each call in which an engine asks its workers for what they hold."""
    seconds: list[float] = []
    llm: Any = engine._llm
    stock = llm.collective_rpc

    async def timed(*args: Any, **kwargs: Any) -> Any:
        started = time.perf_counter()
        try:
            return await stock(*args, **kwargs)
        finally:
            seconds.append(time.perf_counter() - started)

    llm.collective_rpc = timed
    try:
        yield seconds
    finally:
        del llm.collective_rpc


def samples_in(folder: Path, count: int) -> list[Sample]:
    """Questions about clips of one length."""
    return [
        Sample(
            id=f"clip{i}",
            video=str(write_clip(folder / f"clip{i}.mp4", moving_square(FRAMES, size=32, seed=i))),
            question="Where does it go next?",
            answer="A",
            options=("left", "right"),
            frames=tuple(range(FRAMES)),
        )
        for i in range(count)
    ]


@dataclass
class Rates:
    """Tokens per second, by what sampled ("loop", "transformers", "vllm") and number of requests,
    and what fetching took. One list entry a turn. The loop takes as long for each sequence, so its
    rate stands under one request.
    """

    rates: dict[tuple[str, int], list[float]] = field(default_factory=lambda: defaultdict(list))
    # Milliseconds a request and share of the time, by the number of requests.
    fetches: dict[int, list[tuple[float, float]]] = field(default_factory=lambda: defaultdict(list))

    def clock(self, name: str, batch: int, work: Callable[[], int]) -> float:
        """Seconds that `work` takes to sample as many tokens as it returns."""
        started = time.perf_counter()
        tokens = work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        self.rates[name, batch].append(tokens / seconds)
        return seconds


def engine_rates(folder: Path, processor: Any, setting: Setting) -> Rates:
    """Sample the same requests with both engines, and some of them one by one."""
    media = MediaProcessor(processor)
    clips = LocalMedia(media, 64)
    most = max(setting.batches)
    samples = samples_in(folder, -(-most // GROUP))
    policy = load_policy(folder, dtype=setting.dtype).to(setting.device).eval()
    single = prompt_inputs(policy, media, clips, samples[0])
    prompt = single["input_ids"].shape[1]
    own = TransformersEngine(policy, media, clips, device=setting.device, max_batch_size=most)
    options = VLLMOptions(
        max_model_len=prompt + setting.tokens + 64,
        kv_cache_bytes=setting.cache_bytes(prompt),
        gpu_memory_utilization=0.4,  # the policy is there as well
        block_size=32 if setting.device.type == "cpu" else None,
    )
    with VLLMEngine(
        folder, media, clips, dtype=setting.kind, max_batch_size=most, options=options
    ) as vllm:
        _turn(Rates(), setting, -1, single, samples, own, vllm)  # warms up
        found = Rates()
        for turn in range(setting.repeats):
            _turn(found, setting, turn, single, samples, own, vllm)
    return found


def _turn(
    found: Rates,
    setting: Setting,
    turn: int,
    single: dict[str, torch.Tensor],
    samples: Sequence[Sample],
    own: TransformersEngine,
    vllm: VLLMEngine,
) -> None:
    """Each way of sampling once for each number of requests; for the fewest if `turn` is -1."""
    sampling = Sampling(max_new_tokens=setting.tokens, imagine="always")
    found.clock("loop", 1, lambda: one_by_one(own.policy, [single] * 2, setting.tokens))
    for batch in setting.batches if turn >= 0 else setting.batches[:1]:
        seeds = range(1000 * turn, 1000 * turn + batch)
        requests = [
            RolloutRequest(samples[i // GROUP], tuple(seeds[i : i + GROUP]), sampling)
            for i in range(0, batch, GROUP)
        ]
        found.clock("transformers", batch, lambda r=requests: _count(own, r))
        with timed_fetches(vllm) as fetches:
            seconds = found.clock("vllm", batch, lambda r=requests: _count(vllm, r))
        found.fetches[batch].append((1e3 * sum(fetches) / batch, sum(fetches) / seconds))


def _count(engine: Engine, requests: Sequence[RolloutRequest]) -> int:
    groups = engine.generate(requests)
    return sum(len(t.completion_ids) for group in groups for t in group.trajectories)

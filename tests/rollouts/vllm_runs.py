"""Text prompts through vLLM in this process, and what the policy itself says of the results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rl.policy.density import log_density
from rl.policy.protocol import Imagine, Slot
from rl.policy.scores import ScoreSlots
from rollouts.vllm_slots import pack, unpack

END_OF_SEQUENCE = 258


@dataclass(frozen=True)
class Ask:
    """One request: `done` with its `latents` are the part of the completion that exists already."""

    prompt: tuple[int, ...]
    seed: int
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    imagine: Imagine = "free"
    most: int = 24
    done: tuple[int, ...] = ()
    latents: torch.Tensor | None = None


@dataclass(frozen=True)
class Told:
    """A sampled completion of C tokens with L latents."""

    ids: np.ndarray  # [C]
    latents: torch.Tensor  # [L, H]
    latent_logprobs: torch.Tensor  # [L]
    logprobs: torch.Tensor  # [C]
    kept: torch.Tensor  # [C]
    cached: int  # prompt tokens that came from the prefix cache


# Kept to the end: to shut one down would tear down process groups that the others share.
_engines: dict[str, Any] = {}


def engine(policy: Path, **options: Any) -> Any:
    """A `vllm.LLM` on the policy of a folder, with room to spare unless `options` say otherwise."""
    from vllm import LLM

    key = repr((policy, sorted(options.items())))
    if key in _engines:
        return _engines[key]

    settings: dict[str, Any] = {
        "dtype": "float32",
        "max_model_len": 256,
        "enforce_eager": True,
        "kv_cache_memory_bytes": 32 << 20,
        "gpu_memory_utilization": 0.2,
        "max_num_seqs": 8,
        "block_size": 32,
        "limit_mm_per_prompt": {"image": 0, "video": 0},
        "worker_extension_cls": "rollouts.vllm_internals.LatentWorker",
        "disable_log_stats": False,
    }
    llm = LLM(str(policy), **settings | options)
    _engines[key] = llm
    return llm


def sample(llm: Any, asks: Sequence[Ask]) -> list[Told]:
    """The asks' completions, those of one call side by side."""
    keys = [f"{id(asks)}-{i}" for i in range(len(asks))]
    prompts = [{"prompt_token_ids": [*ask.prompt, *ask.done]} for ask in asks]
    settings = [how(ask, key) for ask, key in zip(asks, keys, strict=True)]
    outputs = llm.generate(prompts, settings, use_tqdm=False)
    return take(llm, keys, asks, outputs)


def how(ask: Ask, key: str) -> Any:
    """The `SamplingParams` of an ask."""
    from vllm import SamplingParams

    own: dict[str, Any] = {
        "key": key,
        "seed": ask.seed,
        "temperature": ask.temperature,
        "top_p": ask.top_p,
        "top_k": ask.top_k,
        "imagine": ask.imagine,
    }
    if ask.done:
        own |= {"done": len(ask.done)}
        own |= {"latents": pack(ask.latents)} if ask.latents is not None else {}
    return SamplingParams(
        temperature=0.0,
        max_tokens=ask.most - len(ask.done),
        stop_token_ids=[END_OF_SEQUENCE],
        detokenize=False,
        extra_args={"foresight": own},
    )


def take(llm: Any, keys: Sequence[str], asks: Sequence[Ask], outputs: Sequence[Any]) -> list[Told]:
    """What finished requests sampled, fetched by their keys."""
    found = llm.collective_rpc("foresight_take", args=(list(keys),))[0]
    filler = llm.llm_engine.model_config.hf_config.foresight["tokens"]["filler"]
    told = []
    for key, ask, output in zip(keys, asks, outputs, strict=True):
        ids = np.array([*ask.done, *output.outputs[0].token_ids])
        latents, densities, logprobs, kept = (unpack(part) for part in found[key])
        count = int((ids == filler).sum())
        told.append(
            Told(
                ids,
                latents[:count],
                densities[:count],
                logprobs[: len(ids)],
                kept[: len(ids)],
                output.num_cached_tokens,
            )
        )
    return told


@torch.no_grad()
def gaps(policy: Any, asks: Sequence[Ask], told: Sequence[Told]) -> tuple[float, float]:
    """Largest differences between vLLM's log-probs and the policy's own: of tokens and decisions,
    and of latents (per sqrt(H)). Positions that are already `done` have no log-probs.
    """
    tokens, latents = 0.0, 0.0
    for ask, t in zip(asks, told, strict=True):
        p, done = len(ask.prompt), len(ask.done)
        ids = torch.tensor([[*ask.prompt, *t.ids.tolist()]])
        trace = policy.protocol.trace(t.ids, policy.latent_tokens, ask.imagine)
        before = p - 1 + np.arange(len(t.ids))
        at = (trace.slots != Slot.FORCED).nonzero()[0]
        slots = ScoreSlots(
            rows=torch.from_numpy(before[at]),
            ids=torch.from_numpy(t.ids[at]),
            kinds=torch.from_numpy(trace.slots[at]),
            may_start=torch.from_numpy(trace.may_start[at]),
            temperature=torch.full((len(at),), ask.temperature or 1.0),
            kept=t.kept[at].int(),
            latent_rows=torch.from_numpy(before[t.ids == policy.latent_tokens.filler]),
            most_kept=int(t.kept.max()),
        )
        scores = policy(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            mm_token_type_ids=torch.zeros_like(ids),
            latents=t.latents.to(policy.dtype),
            slots=slots,
        )
        new = at >= done
        gap = (scores.logprobs[new] - t.logprobs[at][new]).abs()
        tokens = max(tokens, float(gap.max()))
        old = int((t.ids[:done] == policy.latent_tokens.filler).sum())
        if len(t.latents) > old and ask.temperature > 0:
            scale, density = policy.protocol.noise_scale, policy.protocol.density
            own = log_density(t.latents.float(), scores.means.float(), scale, density)
            gap = (own - t.latent_logprobs)[old:].abs().max() / t.latents.shape[1] ** 0.5
            latents = max(latents, float(gap))
    return tokens, latents


def same(one: Told, other: Told, atol: float = 2e-5) -> bool:
    """Whether two runs sampled the same."""
    return (
        one.ids.tolist() == other.ids.tolist()
        and torch.allclose(one.latents, other.latents, atol=atol, rtol=0)
        and torch.allclose(one.logprobs, other.logprobs, atol=atol, rtol=0)
        and one.kept.tolist() == other.kept.tolist()
    )


def cut(ask: Ask, told: Told, length: int, filler: int) -> Ask:
    """The ask that goes on from the first `length` tokens of a completion."""
    done = told.ids[:length]
    latents = told.latents[: int((done == filler).sum())]
    return replace(ask, done=tuple(done.tolist()), latents=latents if len(latents) else None)

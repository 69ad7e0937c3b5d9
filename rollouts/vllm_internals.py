"""Latent policies inside vLLM: the one module that touches vLLM's inner parts.

vLLM's model runner (V2) lets a model bring its own state. Ours keeps the latents of all running
requests on the device (`rollouts.vllm_slots`), writes them over the embeddings of filler tokens
before each forward, and stands around vLLM's sampler to decide what the protocol decides. vLLM
itself is not patched but for one function: the hash by which it shares computed prefixes between
requests covers token ids, and equal fillers may hold different latents.

What of vLLM is used, beyond public names, is listed in tests/rollouts/test_vllm_members.py.
Written for vLLM 0.31.
"""

from __future__ import annotations

import functools
import hashlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn
from vllm.model_executor.models.config import MODELS_CONFIG_MAP
from vllm.model_executor.models.qwen2_5_vl import Qwen2_5_VLForConditionalGeneration
from vllm.model_executor.models.qwen3 import Qwen3ForCausalLM
from vllm.model_executor.models.qwen3_5 import Qwen3_5ForConditionalGeneration
from vllm.model_executor.models.qwen3_vl import Qwen3VLForConditionalGeneration
from vllm.v1.core import kv_cache_utils
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu.model_states.mamba_hybrid import MambaHybridModelState

from rl.errors import PolicyError
from rl.policy.heads import HeadConfig
from rl.policy.settings import policy_settings, protocol_and_tokens
from rollouts.vllm_slots import Kept, LatentRequest, LatentSlots, pack, read_request

# Preempted requests that nobody holds a key of (served ones) are remembered up to this many times
# the requests that run side by side.
_REMEMBERED = 4
_SCHEDULER = f"{__name__}.latent_scheduler"


class _Latent:
    """What makes a model of vLLM a latent policy. Put before the model's own class."""

    latent_hidden: torch.Tensor | None = None

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # type: ignore[call-arg]
        config = vllm_config.model_config
        head = HeadConfig(**policy_settings(config.hf_config)["head"])
        self.latent_head = head.build(config.get_hidden_size())

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        # The runner calls this right before its sampler, outside of CUDA graphs: the sampler's
        # rows, and the only place where their hidden states can be had.
        self.latent_hidden = hidden_states
        return super().compute_logits(hidden_states)  # type: ignore[misc]

    @staticmethod
    def get_model_state_cls() -> type[Any]:
        return LatentModelState


class LatentQwen3VLForConditionalGeneration(_Latent, Qwen3VLForConditionalGeneration):
    pass


class LatentQwen2_5_VLForConditionalGeneration(_Latent, Qwen2_5_VLForConditionalGeneration):
    pass


class LatentQwen3_5ForConditionalGeneration(_Latent, Qwen3_5ForConditionalGeneration):
    @staticmethod
    def get_model_state_cls() -> type[Any]:
        return LatentHybridModelState


class LatentQwen3ForCausalLM(_Latent, Qwen3ForCausalLM):
    """Text only: the smallest model that latents can be tried on."""


def prepare_config(vllm_config: Any) -> None:
    """Refuse what latents cannot run with, and set what they need. Raises `PolicyError`."""
    model, name = vllm_config.model_config, vllm_config.model_config.architecture
    modules = policy_settings(model.hf_config).get("modules", {})
    if modules:
        raise PolicyError(
            f"{name}: vLLM cannot run a policy with {', '.join(modules)} yet; transformers can "
            "(rollouts.engine: transformers, `foresight evaluate`)"
        )
    refused = {
        "vLLM's V1 model runner (unset VLLM_USE_V2_MODEL_RUNNER=0)": (
            not vllm_config.use_v2_model_runner
        ),
        "speculative decoding (leave speculative_config out)": (
            vllm_config.speculative_config is not None
        ),
        "pipeline parallelism (use tensor_parallel_size)": (
            vllm_config.parallel_config.pipeline_parallel_size > 1
        ),
        "KV transfer between engines (leave kv_transfer_config out)": (
            vllm_config.kv_transfer_config is not None
        ),
        "sampling sharded over GPUs (leave enable_batch_sharded_sampling out)": bool(
            vllm_config.parallel_config.enable_batch_sharded_sampling
        ),
        "a scheduler of your own (leave scheduler_cls out)": (
            vllm_config.scheduler_config.scheduler_cls not in (None, _SCHEDULER)
        ),
    }
    if found := [what for what, on in refused.items() if on]:
        raise PolicyError(f"{name}: latents cannot run with {' or '.join(found)}")
    stock = MODELS_CONFIG_MAP.get(name.removeprefix("Latent"))
    if stock is not None:
        stock.verify_and_update_config(vllm_config)
    if not model.supports_multimodal_inputs:
        model.enable_prompt_embeds = True  # the model takes no embeddings as input otherwise
    if getattr(model.hf_config, "head_dtype", None) is None:
        # As in the transformers engine and the trainer: in bf16 a logit of 20 is known to 0.06.
        model.hf_config.head_dtype = "float32"
    vllm_config.scheduler_config.scheduler_cls = _SCHEDULER
    checks = "rollouts.vllm_serving:CheckedRequests"
    model.logits_processors = [*(model.logits_processors or ()), checks]


def latent_scheduler(*, vllm_config: Any, **kwargs: Any) -> Scheduler:
    """vLLM's own scheduler, in a process whose prefix cache knows the filler."""
    _, tokens = protocol_and_tokens(vllm_config.model_config.hf_config)
    keep_latents_private(tokens.filler)
    cls = AsyncScheduler if vllm_config.scheduler_config.async_scheduling else Scheduler
    return cls(vllm_config=vllm_config, **kwargs)


_fillers: set[int] = set()


def keep_latents_private(filler: int) -> None:
    """Never share a KV block that holds latents with a request that has others.

    A block's hash then covers the request, or, for latents that came with the prompt, these: the
    prompt before them stays shared, and so does a prompt with the same latents.
    """
    _fillers.add(filler)
    if hasattr(kv_cache_utils.generate_block_hash_extra_keys, "__wrapped__"):
        return
    stock = kv_cache_utils.generate_block_hash_extra_keys

    @functools.wraps(stock)
    def with_latents(request: Any, start: int, end: int, start_mm: int) -> tuple[Any, int]:
        keys, next_mm = stock(request, start, end, start_mm)
        if not _fillers.isdisjoint(request.all_token_ids[start:end]):
            keys = (*(keys or ()), ("foresight", _whose_latents(request, end)))
        return keys, next_mm

    kv_cache_utils.generate_block_hash_extra_keys = with_latents


def _whose_latents(request: Any, end: int) -> str:
    extra = request.sampling_params and request.sampling_params.extra_args
    latents = ((extra or {}).get("foresight") or {}).get("latents")
    if latents is None or end > request.num_prompt_tokens:
        return request.request_id
    return hashlib.sha256(latents[2]).hexdigest()


class _LatentState:
    """The model state of a latent policy. Put before one of vLLM's."""

    model: Any
    model_config: Any
    max_num_reqs: int
    max_model_len: int
    inputs_embeds_size: int
    dtype: torch.dtype
    device: torch.device

    def __init__(self, vllm_config: Any, model: nn.Module, cache: Any, device: Any) -> None:
        super().__init__(vllm_config, model, cache, device)  # type: ignore[call-arg]
        protocol, tokens = protocol_and_tokens(self.model_config.hf_config)
        self.slots = LatentSlots(
            self.max_num_reqs,
            self.inputs_embeds_size,
            self.max_model_len,
            protocol,
            tokens,
            self.model.latent_head,
            dtype=self.dtype,
            device=self.device,
        )
        self._live: dict[str, tuple[int, LatentRequest]] = {}
        self._fillers: dict[str, np.ndarray] = {}  # where the prefill tokens have latents
        self._left: OrderedDict[str, tuple[LatentRequest, Kept]] = OrderedDict()
        self._taken: set[str] = set()  # of those in `_live`

    def add_request(self, req_index: int, new_req_data: Any) -> None:
        super().add_request(req_index, new_req_data)  # type: ignore[misc]
        name, ids = new_req_data.req_id, new_req_data.prefill_token_ids
        request = _request(new_req_data)
        start = len(new_req_data.prompt_token_ids) - request.done
        completion = ids[start:]
        kept = self._left.pop(name, (None, None))[1]
        self.slots.open(req_index, request, completion, kept)
        self._live[name] = req_index, request
        self._taken.discard(name)
        places = start + np.flatnonzero(np.equal(completion, self.slots.tokens.filler))
        self._fillers.pop(name, None)
        if len(places):
            self._fillers[name] = places

    def apply_staged_writes(self) -> None:
        super().apply_staged_writes()  # type: ignore[misc]
        self.slots.flush()

    def remove_request(self, req_id: str) -> None:
        """A request has finished, was aborted or was preempted: vLLM does not say which."""
        live = self._live.pop(req_id, None)
        self._fillers.pop(req_id, None)
        if live is not None:
            slot, request = live
            if req_id in self._taken:
                self._taken.remove(req_id)
            else:
                self._left[req_id] = request, self._keep(slot, request)
                self._forget_old()
        super().remove_request(req_id)  # type: ignore[misc]

    def _keep(self, slot: int, request: LatentRequest) -> Kept:
        # Nobody asks for the log-probs of a request without a key, and none are recorded.
        return self.slots.keep(slot, 0 if request.key is None else request.limit)

    def _forget_old(self) -> None:
        nobodys = [name for name, (request, _) in self._left.items() if request.key is None]
        for name in nobodys[: max(0, len(nobodys) - _REMEMBERED * self.max_num_reqs)]:
            del self._left[name]

    def prepare_inputs_embeds(self, scheduled: Any, batch: Any, req_states: Any) -> torch.Tensor:
        embeds = super().prepare_inputs_embeds(scheduled, batch, req_states)  # type: ignore[misc]
        self._feed(embeds, batch)
        return embeds

    def _feed(self, embeds: torch.Tensor, batch: Any) -> None:
        """Put latents in place of the fillers' embeddings, in the buffer that CUDA graphs read."""
        count = batch.num_reqs
        slots = batch.idx_mapping[:count].long()
        last = batch.query_start_loc[1 : count + 1].long() - 1
        fed = (batch.input_ids[last] == self.slots.tokens.filler) & self.slots.is_open(slots)
        prefilling = batch.is_prefilling_np[:count]
        if prefilling.any():
            decoding = self.slots.to_device(torch.from_numpy(~prefilling))
            fed = fed & decoding
            self._feed_prefill(embeds, batch, prefilling)
        embeds[last] = torch.where(fed[:, None], self.slots.last_latents(slots), embeds[last])

    def _feed_prefill(self, embeds: torch.Tensor, batch: Any, prefilling: np.ndarray) -> None:
        rows, slots, ordinals = [], [], []
        for i in np.flatnonzero(prefilling):
            places = self._fillers.get(batch.req_ids[i])
            if places is None:
                continue
            low = int(batch.num_computed_tokens_np[i])
            here = (places >= low) & (places < low + int(batch.num_scheduled_tokens[i]))
            rows.append(int(batch.query_start_loc_np[i]) - low + places[here])
            ordinals.append(np.flatnonzero(here))
            slots.append(np.full(int(here.sum()), batch.idx_mapping_np[i]))
        if rows:
            row, slot, ordinal = (
                self.slots.to_device(torch.from_numpy(np.concatenate(x).astype(np.int64)))
                for x in (rows, slots, ordinals)
            )
            embeds[row] = self.slots.latents[slot, ordinal]

    def custom_sampler(self, sampler: Any) -> tuple[Any, None]:
        return _LatentSampler(sampler, self), None

    def take(self, keys: Sequence[str]) -> dict[str, Kept]:
        """What the requests with these keys sampled. Each can be taken once."""
        wanted, found = set(keys), {}
        for name in [n for n, (request, _) in self._left.items() if request.key in wanted]:
            request, kept = self._left.pop(name)
            found[request.key] = kept
        for name, (slot, request) in self._live.items():
            if request.key in wanted and name not in self._taken:
                found[request.key] = self._keep(slot, request)
                self._taken.add(name)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return found


class LatentModelState(_LatentState, DefaultModelState):
    pass


class LatentHybridModelState(_LatentState, MambaHybridModelState):
    """For models with linear attention beside full attention."""


class _LatentSampler:
    """Stands around vLLM's sampler, which is told what the protocol gives."""

    def __init__(self, sampler: Any, state: _LatentState) -> None:
        self._sampler, self._state = sampler, state

    def __getattr__(self, name: str) -> Any:
        return getattr(self._sampler, name)

    def __call__(self, logits: torch.Tensor, input_batch: Any) -> Any:
        model, state = self._state.model, self._state
        hidden, model.latent_hidden = model.latent_hidden, None
        if not any(name in state._live for name in input_batch.req_ids):
            # With dummy requests vLLM measures how much memory is needed.
            state.slots.rehearse(logits)
            return self._sampler(logits, input_batch)
        if hidden is None:
            raise RuntimeError("vLLM sampled without asking the latent policy for its logits")
        count = input_batch.num_reqs
        choice = state.slots.choose(
            logits, input_batch.idx_mapping[:count].long(), input_batch.idx_mapping_np[:count]
        )
        output = self._sampler(logits, input_batch)
        # What clients may ask of vLLM's sampler (allowed tokens, bad words, a minimum length) can
        # take away the one token that is left: the protocol comes first.
        sampled = output.sampled_token_ids[:count, 0]
        sampled.copy_(torch.where(choice.given, choice.ids, sampled))
        # A prefill that is not through yet samples nothing.
        live = output.num_sampled[:count] > 0
        state.slots.advance(choice, sampled, live, hidden[:count])
        return output


def _request(new: Any) -> LatentRequest:
    params = new.sampling_params
    limit = (params.max_tokens or 0) if params is not None else 0
    extra = params.extra_args if params is not None else None
    done = ((extra or {}).get("foresight") or {}).get("done", 0)
    seed = params.seed if params is not None else None
    if seed is None:  # the same on every worker of the engine
        digest = hashlib.blake2b(new.req_id.encode(), digest_size=7).digest()
        seed = int.from_bytes(digest, "big")
    temperature = params.temperature if params is not None else 0.0
    has_grammar = params is not None and params.structured_outputs is not None
    return read_request(extra, has_grammar, seed=seed, temperature=temperature, limit=limit + done)


class LatentWorker:
    """Methods that the engine gives its workers (vLLM's ``worker_extension_cls``)."""

    model_runner: Any
    rank: int

    def foresight_take(self, keys: list[str]) -> dict[str, list[Any]]:
        """`_LatentState.take`, packed to cross processes; the other ranks hold the same."""
        found = self.model_runner.model_state.take(keys)
        if self.rank != 0:
            return {}
        return {
            key: [pack(t) for t in (k.latents, k.latent_logprobs, k.logprobs, k.truncated)]
            for key, k in found.items()
        }

    def foresight_memory(self) -> dict[str, int]:
        """How many requests are live and how many are remembered after they left."""
        state = self.model_runner.model_state
        return {"live": len(state._live), "left": len(state._left)}

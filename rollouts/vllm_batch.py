"""One call's requests on their way through vLLM: prompts in, what was sampled out."""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from vllm import SamplingParams
from vllm.sampling_params import RequestOutputKind

from rl.errors import ForesightError, RolloutError
from rl.interfaces import MediaSource
from rl.trajectory import MediaKey, RolloutRequest, Trajectory
from rollouts.assemble import Assembler, Sampled, clip_of
from rollouts.vllm_prompts import engine_prompt
from rollouts.vllm_slots import unpack

if TYPE_CHECKING:
    from vllm.v1.engine.async_llm import AsyncLLM

_FETCH = 16  # so many finished requests are fetched from the workers in one call
_TRIES = 2  # times a request is sampled before its failure is reported


@dataclass(frozen=True)
class _Job:
    """One trajectory that is asked for: seed number `member` of request number `request`."""

    request: int
    member: int
    key: str
    tries: int = 1


@dataclass(frozen=True)
class _Prompt:
    ids: np.ndarray  # int64 [P]
    shown: tuple[MediaKey, ...]  # its clips
    inputs: Any  # what vLLM takes


class Batch:
    """All trajectories of one call of `VLLMEngine.sample`; `run` samples them in vLLM's event loop.

    At most `room` requests are in vLLM at a time. Clips come from `media`; trajectories get
    `version`, and are sampled under `adapter` (vLLM's `LoRARequest`) if there is one. `retries`
    counts requests that were sampled once more.
    """

    def __init__(
        self,
        llm: AsyncLLM,
        requests: Sequence[RolloutRequest],
        assembler: Assembler,
        media: MediaSource,
        *,
        version: int,
        room: int,
        adapter: Any = None,
    ) -> None:
        self._llm: Any = llm
        self._requests, self._assembler, self._media = requests, assembler, media
        self._version, self._room, self._adapter = version, room, adapter
        self.retries = 0
        self._found: list[list[Any]] = [[None] * len(r.seeds) for r in requests]
        self._prompts: list[_Prompt | None] = [None] * len(requests)
        self._open = [len(r.seeds) for r in requests]
        self._running: dict[asyncio.Task[Any], _Job] = {}
        self._finished: list[tuple[_Job, Any]] = []
        self._untaken: set[str] = set()
        self._sending = asyncio.Lock()

    async def run(self) -> list[list[Trajectory | ForesightError]]:
        tag = uuid.uuid4().hex[:12]
        try:
            for i, request in enumerate(self._requests):
                try:
                    # In another thread: a clip may have to be decoded first.
                    self._prompts[i] = await asyncio.to_thread(self._prompt, request)
                except ForesightError as error:
                    self._found[i] = [error] * len(request.seeds)
                    continue
                for k in range(len(request.seeds)):
                    while len(self._running) >= self._room:
                        await self._settle()
                    self._begin(_Job(i, k, f"{tag}-{i}-{k}"))
            while self._running or self._finished:
                await self._settle()
        finally:
            for task in self._running:
                task.cancel()
            await asyncio.gather(*self._running, return_exceptions=True)
            if self._untaken and not self._llm.errored:
                await self._take(list(self._untaken))
        return self._found

    def _prompt(self, request: RolloutRequest) -> _Prompt:
        sample, processor = request.sample, self._assembler.processor
        clip = clip_of(processor, self._media, sample)
        ids = processor.encode(sample, [clip]).input_ids
        self._assembler.check_prompt(sample, ids)
        room = self._llm.model_config.max_model_len
        if len(ids) + request.sampling.max_new_tokens > room:
            raise RolloutError(
                f"sample {sample.id!r}: its prompt of {len(ids)} tokens and "
                f"{request.sampling.max_new_tokens} new ones are more than the {room} that vLLM "
                "has room for; raise rollouts.vllm.max_model_len, show fewer frames or ask for "
                "fewer tokens"
            )
        inputs = engine_prompt(
            sample.id,
            ids,
            [clip],
            tokenizer=processor.tokenizer,
            embedded=self._assembler.tokens.banned,
            merge_size=processor.merge_size,
            dtype=self._llm.model_config.dtype,
        )
        return _Prompt(ids, (clip.key,), inputs)

    def _begin(self, job: _Job) -> None:
        self._untaken.add(job.key)
        self._running[asyncio.create_task(self._sample(job))] = job

    async def _sample(self, job: _Job) -> Any:
        """vLLM's output for one request. Cancelling it aborts the request."""
        request, prompt = self._requests[job.request], self._prompts[job.request]
        assert prompt is not None
        params = request_params(request, request.seeds[job.member], job.key, self._assembler.stops)
        llm, queue = self._llm, None
        try:
            # What vLLM's cache of clips has is not sent again; it counts on the order of sending.
            async with self._sending:
                inputs = dict(prompt.inputs)
                if inputs["type"] == "multimodal":
                    inputs["mm_kwargs"] = {k: list(v) for k, v in inputs["mm_kwargs"].items()}
                    llm.input_processor.inject_into_mm_cache(
                        inputs["mm_hashes"], inputs["mm_kwargs"]
                    )
                try:
                    queue = await llm.add_request(
                        job.key, inputs, params, lora_request=self._adapter
                    )
                except BaseException:
                    if not llm.errored:  # the two ends of the cache may no longer agree
                        await llm.reset_mm_cache()
                    raise
            output = await queue.get()
            while not output.finished:
                output = await queue.get()
            return output
        except asyncio.CancelledError:
            if queue is not None:
                await llm.abort(queue.request_id, internal=True)
            raise

    async def _settle(self) -> None:
        """Wait for a request to finish; fetch what was sampled where enough have."""
        if self._running:
            done, _ = await asyncio.wait(self._running, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                job = self._running.pop(task)
                if (error := task.exception()) is not None:
                    self._fail(job, str(error) or type(error).__name__)
                else:
                    self._finished.append((job, task.result()))
        if self._finished and (len(self._finished) >= _FETCH or not self._running):
            finished, self._finished = self._finished, []
            taken = await self._take([job.key for job, _ in finished])
            for job, output in finished:
                self._close(job, output, taken.get(job.key))

    async def _take(self, keys: list[str]) -> dict[str, list[Any]]:
        parts = await self._llm.collective_rpc("foresight_take", args=(keys,))
        self._untaken.difference_update(keys)
        return {key: packed for part in parts for key, packed in part.items()}

    def _close(self, job: _Job, output: Any, packed: list[Any] | None) -> None:
        reason = output.outputs[0].finish_reason
        if reason not in ("stop", "length"):
            self._fail(job, f"it ended with {reason!r}")
            return
        if packed is None:
            self._fail(job, "what it sampled is not on the device any more")
            return
        request, prompt = self._requests[job.request], self._prompts[job.request]
        assert prompt is not None
        if list(output.prompt_token_ids) != prompt.ids.tolist():
            self._fail(job, "vLLM has changed its prompt", again=False)
            return
        drawn = _unpacked(list(output.outputs[0].token_ids), packed, self._assembler.tokens.filler)
        try:
            trajectory = self._assembler.trajectory(
                request, request.seeds[job.member], prompt.ids, prompt.shown, drawn, self._version
            )
        except ForesightError as error:
            self._fail(job, str(error), again=False)
            return
        self._settled(job, trajectory)

    def _fail(self, job: _Job, why: str, again: bool = True) -> None:
        if self._llm.errored:
            raise RolloutError(f"vLLM's process died ({why}); look for the cause in its log")
        if again and job.tries < _TRIES:
            self.retries += 1
            key = f"{job.key}-again"
            self._begin(_Job(job.request, job.member, key, job.tries + 1))
            return
        request = self._requests[job.request]
        self._settled(
            job,
            RolloutError(
                f"sample {request.sample.id!r}, seed {request.seeds[job.member]}: vLLM gave no "
                f"trajectory in {job.tries} tries: {why}"
            ),
        )

    def _settled(self, job: _Job, result: Trajectory | RolloutError) -> None:
        self._found[job.request][job.member] = result
        self._open[job.request] -= 1
        if not self._open[job.request]:
            self._prompts[job.request] = None  # its clip is needed no more


def request_params(
    request: RolloutRequest, seed: int, key: str, stops: frozenset[int]
) -> SamplingParams:
    """How vLLM samples one seed of `request`, whose state on the device is taken by `key`."""
    sampling = request.sampling
    return SamplingParams(
        temperature=0.0,  # vLLM is told each token
        max_tokens=sampling.max_new_tokens,
        stop_token_ids=sorted(stops),
        ignore_eos=True,  # its own idea of the end; ours are the ids above
        detokenize=False,
        output_kind=RequestOutputKind.FINAL_ONLY,
        extra_args={
            "foresight": {
                "key": key,
                "seed": seed,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k,
                "imagine": sampling.imagine,
            }
        },
    )


def _unpacked(ids: list[int], packed: Sequence[Any], filler: int) -> Sampled:
    """What a request left on the device, cut to what its ids say it sampled."""
    latents, densities, logprobs, kept = (unpack(p) for p in packed)
    count = ids.count(filler)
    return Sampled(
        ids,
        logprobs[: len(ids)].numpy(),
        kept[: len(ids)].numpy(),
        latents[:count].clone(),
        densities[:count].numpy(),
    )

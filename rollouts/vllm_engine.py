"""The vLLM engine: latent trajectories from `AsyncLLM`, by continuous batching.

What thinks in latents inside of vLLM is `rollouts.vllm_internals`. This side turns requests into
prompts of processed tensors and brings home what was sampled, by a key that each request carries.
vLLM's event loop runs in a thread of its own, so that the engine has the same plain methods as the
transformers engine.
"""

from __future__ import annotations

import asyncio
import json
import os
import threading
import time
from collections.abc import Callable, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, Literal, TypeVar

from transformers import GenerationConfig

from rl.data.broken import broken_clips, broken_samples
from rl.data.media import MediaProcessor
from rl.errors import ForesightError, PolicyError, RolloutError, VideoError
from rl.interfaces import MediaSource, WeightUpdate
from rl.policy.loading import read_config
from rl.policy.settings import policy_settings, protocol_and_tokens
from rl.trajectory import RolloutRequest, Sample, Trajectory, TrajectoryGroup
from rollouts import vllm_cpu
from rollouts.assemble import Assembler, Meter, check_update, stop_ids
from rollouts.vllm_options import VLLMOptions
from rollouts.vllm_weights import WeightFiles, parameter_shapes

T = TypeVar("T")

_DIED = "vLLM's process died; look for the cause in its log"
_LOOK = 1.0  # seconds between two looks at whether vLLM lives
_CPU_CACHE = 1 << 28  # bytes of KV cache on a CPU, where vLLM would take most of the memory


class VLLMEngine:
    """Samples from the policy in a folder with vLLM. Implements `rl.interfaces.Engine`.

    `max_batch_size` bounds the trajectories sampled side by side. Clips come from `media`, prompts
    are encoded by `processor`; both are what the trainer uses, so tokens and pixels agree. `close`
    ends vLLM's processes. Raises `RolloutError` if vLLM does not start.
    """

    def __init__(
        self,
        folder: str | Path,
        processor: MediaProcessor,
        media: MediaSource,
        *,
        dtype: Literal["float32", "bfloat16"] = "float32",
        max_batch_size: int = 64,
        version: int = 0,
        options: VLLMOptions | None = None,
    ) -> None:
        config = read_config(folder)
        if modules := policy_settings(config).get("modules"):
            raise PolicyError(
                f"{folder}: vLLM cannot run a policy with {', '.join(modules)} yet; sample with "
                "the transformers engine (rollouts.engine: transformers)"
            )
        vllm_cpu.install()
        self.processor, self.media = processor, media
        self.options = options or VLLMOptions()
        self.version = version
        protocol, tokens = protocol_and_tokens(config)
        stops = stop_ids(GenerationConfig.from_pretrained(folder), processor.tokenizer)
        self._assembler = Assembler(protocol, tokens, processor, stops)
        self._shapes, tied = parameter_shapes(folder)
        self._files = WeightFiles(self._shapes, tied)
        self._room = 2 * max_batch_size  # requests that vLLM knows of: running and next
        self._meter, self._retries = Meter(), 0
        self._adapter: Any = None
        self._trouble: str | None = None
        self._asleep = False
        self._one_at_a_time = threading.Lock()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True, name="vllm")
        self._thread.start()
        self._llm: Any = None
        try:
            self._call(self._start(str(folder), dtype, max_batch_size))
            if self.options.enable_sleep:
                self.sleep()
        except BaseException as error:
            self.close()
            if isinstance(error, Exception) and not isinstance(error, ForesightError):
                raise RolloutError(
                    f"vLLM did not start on {folder}: {error}; its own messages are above"
                ) from error
            raise

    async def _start(self, folder: str, dtype: Any, max_batch_size: int) -> None:
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")  # this process has threads
        from vllm.config import WeightTransferConfig
        from vllm.engine.arg_utils import AsyncEngineArgs
        from vllm.v1.engine.async_llm import AsyncLLM

        from rollouts.vllm_metrics import EngineMetrics

        options, on_cpu = self.options, vllm_cpu.needed()
        arguments: dict[str, Any] = {
            "model": folder,
            "dtype": dtype,
            "max_num_seqs": max_batch_size,
            "max_model_len": options.max_model_len or -1,
            "gpu_memory_utilization": options.gpu_memory_utilization,
            "kv_cache_memory_bytes": options.kv_cache_bytes or (_CPU_CACHE if on_cpu else None),
            "block_size": options.block_size,
            "max_num_batched_tokens": options.max_num_batched_tokens,
            "tensor_parallel_size": options.tensor_parallel_size,
            "enforce_eager": options.enforce_eager or on_cpu,
            "enable_prefix_caching": options.enable_prefix_caching,
            "enable_lora": options.enable_lora,
            "max_lora_rank": options.max_lora_rank,
            "enable_sleep_mode": options.enable_sleep and not on_cpu,
            "mm_processor_cache_gb": options.media_cache_gb,
            "mm_device_do_normalize": False,  # the clips of `media` are normalised
            "weight_transfer_config": None
            if options.weight_transfer == "files"
            else WeightTransferConfig(backend=options.weight_transfer),
            "worker_extension_cls": "rollouts.vllm_worker.ForesightWorker",
            "disable_log_stats": True,  # of vLLM's own log; `EngineMetrics` counts all the same
            "seed": 0,
        }
        args = AsyncEngineArgs(**{k: v for k, v in arguments.items() if v is not None})
        self._metrics = EngineMetrics()
        self._llm = AsyncLLM.from_engine_args(args, stat_loggers=[self._metrics.logger])
        await self._llm.collective_rpc("foresight_follow", args=(os.getpid(),))

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        """Sample every request; groups come back in the order of the requests.

        What fails is sampled once more. If it fails again, its error is raised after all others
        have finished; `sample` keeps those.
        """
        members = self.sample(requests)
        errors = [m for group in members for m in group if isinstance(m, ForesightError)]
        if errors:
            raise errors[0]
        return [
            TrajectoryGroup(request.sample, tuple(m for m in group if isinstance(m, Trajectory)))
            for request, group in zip(requests, members, strict=True)
        ]

    def sample(self, requests: Sequence[RolloutRequest]) -> list[list[Trajectory | ForesightError]]:
        """For each request and each of its seeds the trajectory, or why there is none.

        An error that names its sample takes no other trajectory with it. Raises `RolloutError` if
        vLLM has died.
        """
        from rollouts.vllm_batch import Batch

        with self._use():
            started = time.perf_counter()
            batch = Batch(
                self._llm,
                requests,
                self._assembler,
                self.media,
                version=self.version,
                room=self._room,
                adapter=self._adapter,
            )
            try:
                found = self._call(batch.run())
            except RolloutError as error:
                self._trouble = str(error) if self._llm.errored else None
                raise
            finally:
                self._retries += batch.retries
            done = [t for group in found for t in group if isinstance(t, Trajectory)]
            self._meter.add(done, time.perf_counter() - started)
            if self.options.enable_sleep:
                self._sleep()  # what was sampled is returned whether it falls asleep or not
        return found

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        """As `rl.interfaces.Rollouts.broken`."""
        return broken_samples(self.processor, samples, lambda keys: broken_clips(self.media, keys))

    def update_weights(self, update: WeightUpdate) -> int:
        """Load the parameters of `update` and take its version; the others stay. Waits for
        `generate` to finish. An adapter set by `update_adapter` is taken off.
        """
        check_update(update, self._shapes)
        if self.options.weight_transfer != "files":
            raise RolloutError(
                f"this engine takes weights by {self.options.weight_transfer}; build it with "
                'weight_transfer="files"'
            )
        with self._use():
            files, rest = self._files.add(update)
            self._change(
                f"weights of version {update.version}",
                lambda: self._llm.collective_rpc("foresight_load", args=(files, rest)),
            )
            self._adapter, self.version = None, update.version
        return self.version

    def update_adapter(self, folder: str | Path, version: int) -> int:
        """Put the LoRA adapter in `folder` (as PEFT saves it) in the place of the last one."""
        if not self.options.enable_lora:
            raise RolloutError("this engine takes no adapters; build it with enable_lora=True")
        try:
            rank = json.loads(Path(folder, "adapter_config.json").read_text())["r"]
        except (OSError, ValueError, KeyError) as error:
            raise RolloutError(f"{folder} holds no LoRA adapter of PEFT's: {error}") from error
        if rank > self.options.max_lora_rank:
            raise RolloutError(
                f"the adapter in {folder} has rank {rank}; build the engine with "
                f"max_lora_rank={rank}"
            )
        from vllm.lora.request import LoRARequest

        with self._use():
            named = {"lora_name": "foresight", "lora_int_id": 1, "lora_path": str(folder)}
            self._change(
                f"the adapter of version {version}",
                lambda: self._llm.add_lora(LoRARequest(**named, load_inplace=True)),
            )
            self._adapter, self.version = LoRARequest(**named), version
        return self.version

    def transfer(self, step: str, arguments: Mapping[str, Any], version: int) -> None:
        """One step of vLLM's weight transfer, named as vLLM names it. After the last one,
        ``finish_weight_update``, the engine is at `version`.
        """
        with self._use():
            work = partial(self._llm.collective_rpc, step, kwargs=dict(arguments))
            if step == "init_weight_transfer_engine":
                self._call(work())
            else:
                self._change(f"weights of version {version} ({step})", work)
            if step == "finish_weight_update":
                self._adapter, self.version = None, version

    def sleep(self) -> None:
        """Give the GPU's memory to others: weights move to the CPU, the KV cache is dropped.

        What needs the engine wakes it; `sample` lets it sleep again.
        """
        if not self.options.enable_sleep:
            raise RolloutError("this engine cannot sleep; build it with enable_sleep=True")
        with self._use():
            self._sleep()
            self._check_sound()

    def health(self) -> dict[str, Any]:
        """Version, totals since the start, tokens and latents per second of busy time, and what
        vLLM counts: preemptions, tokens looked up and found in the prefix cache, the share of the
        KV cache in use.
        """
        return {
            "engine": "vllm",
            "version": self.version,
            "retries": self._retries,
            **self._meter.read(),
            **self._metrics.read(),
        }

    def close(self) -> None:
        """End vLLM and its processes. The engine cannot be used afterwards."""
        if self._loop.is_closed():
            return
        self._trouble = self._trouble or "it was closed"
        self._call(_end_tasks())  # first, or they would report the end of vLLM as its death
        if self._llm is not None:
            self._llm.shutdown()
            self._llm = None
        self._files.drop_whole()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def __enter__(self) -> VLLMEngine:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @contextmanager
    def _use(self) -> Iterator[None]:
        """The engine for one caller at a time, sound and awake."""
        with self._one_at_a_time:
            self._check_sound()
            if self._asleep:
                with self._fatal("it did not wake up"):
                    self._call(self._llm.wake_up())
                    self._asleep = False
                self._check_sound()
            yield

    def _check_sound(self) -> None:
        if self._trouble is not None:
            raise RolloutError(f"the vLLM engine cannot be used any more: {self._trouble}")

    @contextmanager
    def _fatal(self, what: str) -> Iterator[None]:
        """An error in here is the end of the engine; the next `_check_sound` says so."""
        try:
            yield
        except Exception as error:
            self._trouble = (
                f"{what}: {error}. Leave the GPU more memory (rollouts.vllm.gpu_memory_utilization)"
                " or set rollouts.vllm.enable_sleep: false"
            )

    def _sleep(self) -> None:
        with self._fatal("it did not fall asleep"):
            self._call(self._llm.sleep(level=1))
            self._asleep = True

    def _change(self, what: str, load: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        """Load something new and forget all that was computed with the old."""

        async def change() -> None:
            await load()
            await self._llm.reset_encoder_cache()
            if not await self._llm.reset_prefix_cache():
                raise RolloutError("the prefix cache is still in use")

        try:
            self._call(change())
        except BaseException as error:
            self._trouble = f"loading {what} failed half way: {error}"
            raise RolloutError(
                f"vLLM did not take {what} and now holds a mixture of versions: {error}; start the "
                "engine anew"
            ) from error

    def _call(self, work: Coroutine[Any, Any, T]) -> T:
        """Do `work` in the thread of vLLM's event loop."""
        future = asyncio.run_coroutine_threadsafe(work, self._loop)
        died = 0
        try:
            while True:
                try:
                    return future.result(timeout=_LOOK)
                except TimeoutError:
                    if future.done():
                        return future.result()
                # vLLM does not answer calls that were on their way when its process died.
                died += self._llm is not None and self._llm.errored
                if died > 1:
                    raise RolloutError(_DIED)
        except BaseException as error:
            future.cancel()
            known = not isinstance(error, Exception) or isinstance(error, ForesightError)
            if known or self._llm is None or not self._llm.errored:
                raise
            raise RolloutError(_DIED) from error


async def _end_tasks() -> None:
    """Cancel what else runs in this event loop."""
    tasks = asyncio.all_tasks() - {asyncio.current_task()}
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)

"""A fleet of rollout workers on Ray, and the store of processed clips they share with the
trainer.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise, zip_longest
from typing import TYPE_CHECKING, Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayActorError

from rl.data.broken import broken_samples, of_sample
from rl.data.media import MediaProcessor
from rl.data.store import ByteCache
from rl.errors import RolloutError, SyncError, VideoError
from rl.interfaces import Media, WeightUpdate
from rl.trajectory import MediaKey, RolloutRequest, Sample, TrajectoryGroup
from rollouts import vllm_cpu
from rollouts.worker import EngineSpec, RolloutWorker, fetch

if TYPE_CHECKING:
    from rollouts.vllm_transfer import WeightTransfer

_CLOSING = 15.0  # seconds until a worker that does not end is killed


class RayMedia:
    """Processed clips in Ray's object store, by key. Implements `rl.interfaces.MediaSource`.

    Workers decode and process; this process only holds references. The last used clips are kept,
    up to `gigabytes` together. `timeout` bounds the wait for the next clip, in seconds.
    """

    def __init__(self, workers: Sequence[Any], gigabytes: float, timeout: float) -> None:
        self._workers, self._timeout = workers, timeout
        self._clips: ByteCache[ray.ObjectRef] = ByteCache(gigabytes)
        self._next = 0

    def load(self, keys: Iterable[MediaKey]) -> tuple[dict[MediaKey, Any], dict[MediaKey, Any]]:
        """References to the clips of `keys`, and the errors (`VideoError`) of those that cannot be
        shown. What is missing the workers process, evenly; clips of `keys` stay until the next
        call. Raises `RolloutError` for a worker that fails.
        """
        wanted = dict.fromkeys(keys)
        self._clips.hold(wanted)
        found = {key: self._clips.get(key) for key in wanted}
        queues: dict[int, list[MediaKey]] = {}
        for key in (key for key, ref in found.items() if ref is None):
            queues.setdefault(self._next % len(self._workers), []).append(key)
            self._next += 1
        waiting = []
        for number, queue in queues.items():
            # One task a clip: a broken one must not take others with it.
            for key, ahead in zip_longest(queue, queue[1:]):
                waiting.append((number, key, *self._workers[number].process.remote(key, ahead)))
        broken = {}
        for number, key, ref, receipt in waiting:
            size = _result(number, receipt, "process a clip", self._timeout)
            if isinstance(size, VideoError):
                broken[key] = size
            else:
                self._clips.put(key, ref, size)
                found[key] = ref
        return {key: ref for key, ref in found.items() if key not in broken}, broken

    def get(self, key: MediaKey) -> Media:
        """One clip. Raises `VideoError`."""
        ref = self._clips.get(key)
        if ref is None:
            refs, broken = self.load([key])
            if key in broken:
                raise broken[key]
            ref = refs[key]
        return fetch(ref)

    @property
    def bytes(self) -> int:
        return self._clips.bytes

    def __len__(self) -> int:
        return len(self._clips)


class RolloutPool:
    """Samples on `workers` Ray actors that each hold one engine. Implements
    `rl.interfaces.Rollouts`.

    Without `address` a Ray of this machine is started (and stopped by `close`); with one, the
    cluster there is joined. `processor` names clips by key; the actors build their own from the
    policy's folder. `timeout` bounds one call to one worker, in seconds; a worker that exceeds it
    or dies is named in a `RolloutError`, and a weight update that does not arrive everywhere in a
    `SyncError`.
    """

    def __init__(
        self,
        spec: EngineSpec,
        processor: MediaProcessor,
        workers: int,
        *,
        address: str | None = None,
        timeout: float = 600.0,
        media_gb: float = 4.0,
        cpus_per_worker: float = 1.0,
        gpus_per_worker: float = 0.0,
    ) -> None:
        if workers < 1:
            raise RolloutError(f"a pool needs at least 1 worker, got {workers}")
        self._owns_ray = not ray.is_initialized()
        if self._owns_ray:
            _start_ray(address, max(os.cpu_count() or 1, round(workers * cpus_per_worker)))
        self._workers: list[Any] = []
        self._spec = spec
        try:
            _check_resources(workers, cpus_per_worker, gpus_per_worker)
            actor = ray.remote(RolloutWorker).options(
                num_cpus=cpus_per_worker, num_gpus=gpus_per_worker
            )
            self._timeout = timeout
            for _ in range(workers):
                self._workers.append(actor.remote(spec))
                if spec.engine == "vllm" and 0 < gpus_per_worker < 1:
                    # vLLM measures the memory of the whole GPU, and may not see another one start.
                    self._gather([self._workers[-1].health.remote()], "start")
            self._processor = processor
            self.media = RayMedia(self._workers, media_gb, timeout)
            self._gather([w.health.remote() for w in self._workers], "start")
            self._transfer = _transfer(spec, self._workers, timeout)
        except BaseException:
            self.close()
            raise

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        """Sample every request; groups come back in the order of the requests.

        Raises `VideoError`, which names sample and file, before anything is sampled if one of the
        clips cannot be shown.
        """
        self._give_memory()
        keys = []
        for request in requests:
            try:
                keys.append(self._processor.key(request.sample))
            except VideoError as error:
                raise of_sample(request.sample, error) from error
        refs, broken = self.media.load(keys)
        for request, key in zip(requests, keys, strict=True):
            if key in broken:
                raise of_sample(request.sample, broken[key])
        calls = []
        for worker, part in zip(self._workers, _split(requests, len(self._workers)), strict=True):
            mine = {key: refs[key] for key in keys[part]}
            calls.append(worker.generate.remote(requests[part], mine))
        return [group for groups in self._gather(calls, "sample") for group in groups]

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        """As `rl.interfaces.Rollouts.broken`."""
        return broken_samples(self._processor, samples, lambda keys: self.media.load(keys)[1])

    def update_weights(self, update: WeightUpdate) -> int:
        """Bring every worker to `update.version`; returns it. Raises `SyncError` that names who did
        not follow.
        """
        self._give_memory()
        if self._transfer is not None:
            self._transfer.send(update)
            return update.version
        holder = [ray.put(update)]
        calls = [w.update_weights.remote(holder) for w in self._workers]
        done, _ = ray.wait(calls, num_returns=len(calls), timeout=self._timeout)
        if late := [i for i, call in enumerate(calls) if call not in done]:
            raise SyncError(
                f"workers {late} did not take weights of version {update.version} within "
                f"{self._timeout:.0f} s; look for them in Ray's logs, or raise rollouts.timeout_s"
            )
        versions = self._gather(calls, "update the weights")
        if wrong := [i for i, version in enumerate(versions) if version != update.version]:
            raise SyncError(
                f"workers {wrong} report other versions than {update.version}: {versions}"
            )
        return update.version

    def health(self) -> dict[str, Any]:
        """What each worker says of itself, by its number."""
        reports = self._gather([w.health.remote() for w in self._workers], "report")
        return {
            "workers": dict(enumerate(reports)),
            "clips": len(self.media),
            "clip_bytes": self.media.bytes,
        }

    def close(self) -> None:
        """Stop the workers, and Ray if this pool started it."""
        # vLLM has processes of its own, which the workers end if they are given the time.
        if self._spec.engine == "vllm" and self._workers:
            calls = [worker.close.remote() for worker in self._workers]
            ray.wait(calls, num_returns=len(calls), timeout=_CLOSING)
        for worker in self._workers:
            ray.kill(worker)
        self._workers.clear()
        if self._owns_ray:
            ray.shutdown()

    def __enter__(self) -> RolloutPool:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _give_memory(self) -> None:
        """Leave what this process keeps of a GPU for later use to engines that wake up on it."""
        if self._spec.engine == "vllm" and self._spec.options.enable_sleep:
            torch.cuda.empty_cache()

    def _gather(self, calls: Sequence[Any], deed: str) -> list[Any]:
        return [_result(i, call, deed, self._timeout) for i, call in enumerate(calls)]


def _result(number: int, call: Any, deed: str, timeout: float) -> Any:
    """What a call to worker `number` returned. Raises `RolloutError` if it is late or died."""
    try:
        return fetch(call, timeout=timeout)
    except GetTimeoutError:
        raise RolloutError(
            f"worker {number} did not {deed} within {timeout:.0f} s; look for it in Ray's logs, or "
            "raise rollouts.timeout_s"
        ) from None
    except RayActorError as error:
        raise RolloutError(f"worker {number} died when it should {deed}: {error}") from error


def _transfer(spec: EngineSpec, workers: Sequence[Any], timeout: float) -> WeightTransfer | None:
    """How weights reach vLLM's engines if not by files."""
    backend, processes = spec.options.weight_transfer, spec.options.tensor_parallel_size
    if spec.engine != "vllm" or backend == "files":
        return None
    vllm_cpu.install()
    from rollouts.vllm_transfer import WeightTransfer

    return WeightTransfer(backend, workers, processes, spec.policy, timeout)


def _split(requests: Sequence[RolloutRequest], parts: int) -> list[slice]:
    """Contiguous slices with about the same number of trajectories each."""
    total = sum(len(r.seeds) for r in requests)
    cuts, seen = [0], 0
    for i, request in enumerate(requests):
        seen += len(request.seeds)
        while len(cuts) < parts and seen * parts >= total * len(cuts):
            cuts.append(i + 1)
    cuts += [len(requests)] * (parts + 1 - len(cuts))
    return [slice(a, b) for a, b in pairwise(cuts)]


def _start_ray(address: str | None, cpus: int) -> None:
    if address is not None:
        ray.init(address=address, logging_level=logging.WARNING)
        return
    ray.init(num_cpus=cpus, include_dashboard=False, logging_level=logging.WARNING)


def _check_resources(workers: int, cpus: float, gpus: float) -> None:
    """Refuse at once what Ray would wait for in silence."""
    there = ray.cluster_resources()
    for name, key, each in (("CPUs", "CPU", cpus), ("GPUs", "GPU", gpus)):
        if workers * each > there.get(key, 0.0):
            raise RolloutError(
                f"{workers} workers with {each:g} {name} each need {workers * each:g} {name}, Ray "
                f"has {there.get(key, 0.0):g}; lower rollouts.workers or what each worker takes"
            )

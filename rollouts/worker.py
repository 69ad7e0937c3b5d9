"""A rollout worker: the Ray actor that holds one engine, and what it needs to build it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import ray
from ray.exceptions import RayTaskError

from rl.data.decoding import decoder
from rl.data.frames import FrameRule
from rl.data.store import media_bytes
from rl.data.video import TIMEOUT_S
from rl.errors import VideoError
from rl.interfaces import Engine, Media, WeightUpdate
from rl.trajectory import MediaKey, RolloutRequest, TrajectoryGroup
from rollouts.vllm_options import VLLMOptions

if TYPE_CHECKING:
    from rl.data.media import MediaProcessor

EngineName = Literal["transformers", "vllm"]


@dataclass(frozen=True)
class EngineSpec:
    """How to build an engine. `policy` is a folder that every worker can read.

    `threads` are torch's threads in one worker: a tiny model decodes fastest with one. `options`
    are for vLLM alone.
    """

    policy: str
    engine: EngineName = "transformers"
    dtype: Literal["float32", "bfloat16"] = "float32"
    device: str = "cpu"
    max_batch_size: int = 64
    frames: FrameRule = FrameRule()
    system_prompt: str | None = None
    decode_timeout_s: float = TIMEOUT_S
    threads: int = 1
    options: VLLMOptions = field(default_factory=VLLMOptions)


class RefMedia:
    """A `MediaSource` over object references: clips stay in Ray's store until they are needed."""

    def __init__(self) -> None:
        self._refs: dict[MediaKey, ray.ObjectRef] = {}

    def offer(self, refs: Mapping[MediaKey, ray.ObjectRef]) -> None:
        """Make exactly these clips available."""
        self._refs = dict(refs)

    def get(self, key: MediaKey) -> Media:
        if key not in self._refs:  # the engine made another key than the pool did
            raise VideoError(
                f"{key.path}: the file changed while it was in use; leave the files of a run "
                "alone, or start again"
            )
        return fetch(self._refs[key])


class RolloutWorker:
    """Runs in a Ray actor. One call at a time, in the order of submission."""

    def __init__(self, spec: EngineSpec) -> None:
        import torch
        from transformers import AutoProcessor
        from transformers.utils.logging import disable_progress_bar

        from rl.data.media import MediaProcessor

        torch.set_num_threads(spec.threads)
        torch.set_flush_denormal(True)  # tiny probabilities otherwise cost a third of the time
        disable_progress_bar()  # one bar a worker is noise
        processor = AutoProcessor.from_pretrained(spec.policy)
        self._processor = MediaProcessor(
            processor,
            spec.frames,
            system_prompt=spec.system_prompt,
            decode_timeout_s=spec.decode_timeout_s,
        )
        self._media = RefMedia()
        self._decoded = 0
        self._engine: Any = build_engine(spec, self._processor, self._media)

    @ray.method(num_returns=2)
    def process(
        self, key: MediaKey, ahead: MediaKey | None = None
    ) -> tuple[Media | None, int | VideoError]:
        """Decode and process one clip, and meanwhile decode `ahead`, which will be next. Returns
        the clip and its bytes, or none and why.
        """
        self._decoded += 1
        try:
            media = self._processor.process(key, ahead)
        except VideoError as error:
            return None, error
        return media, media_bytes(media)

    def generate(
        self, requests: Sequence[RolloutRequest], refs: Mapping[MediaKey, ray.ObjectRef]
    ) -> list[TrajectoryGroup]:
        self._media.offer(refs)
        return self._engine.generate(requests)

    def update_weights(self, holder: Sequence[ray.ObjectRef]) -> int:
        """`holder` wraps the reference of a `WeightUpdate`, so that Ray does not resolve it
        early.
        """
        update: WeightUpdate = fetch(holder[0])
        return self._engine.update_weights(update)

    def transfer(self, step: str, arguments: Mapping[str, Any], version: int) -> None:
        """One step of vLLM's own weight transfer (`rollouts.vllm_transfer`)."""
        self._engine.transfer(step, arguments, version)

    def health(self) -> dict[str, Any]:
        """What this worker has done so far, its engine's counts included."""
        return {
            "pid": os.getpid(),
            "clips_decoded": self._decoded,
            "clips_by_second_reader": decoder().clips_by_second_reader,
            **self._engine.health(),
        }

    def close(self) -> None:
        """End what the engine started beside this process."""
        if hasattr(self._engine, "close"):
            self._engine.close()


def build_engine(spec: EngineSpec, processor: MediaProcessor, media: RefMedia) -> Engine:
    """The engine of `spec`. Raises `RolloutError` if it cannot start."""
    if spec.engine == "vllm":
        from rollouts.vllm_engine import VLLMEngine

        return VLLMEngine(
            spec.policy,
            processor,
            media,
            dtype=spec.dtype,
            max_batch_size=spec.max_batch_size,
            options=spec.options,
        )
    import torch

    from rl.policy.loading import load_policy
    from rollouts.transformers_engine import TransformersEngine

    return TransformersEngine(
        load_policy(spec.policy, dtype=getattr(torch, spec.dtype)),
        processor,
        media,
        max_batch_size=spec.max_batch_size,
        device=spec.device,
    )


def fetch(ref: Any, timeout: float | None = None) -> Any:
    """`ray.get`, with the error a task raised coming back as itself, not wrapped in Ray's."""
    try:
        return ray.get(ref, timeout=timeout)
    except RayTaskError as error:
        cause: BaseException = error
        while isinstance(cause, RayTaskError) and cause.cause is not None:
            cause = cause.cause
        raise cause from None

"""vLLM engines for tests: one a kind of policy, kept for the session, since starting one takes
longer than all the tests that use it.
"""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rl.data.media import LocalMedia, MediaProcessor
from rl.weights import weight_update
from rollouts.vllm_engine import VLLMEngine
from rollouts.vllm_options import VLLMOptions

OPTIONS = VLLMOptions(max_model_len=256, kv_cache_bytes=32 << 20, block_size=32)


class Engines:
    """Gives each test an engine with the weights of its policy."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._engines: dict[str, VLLMEngine] = {}

    def __call__(self, policy: Any, processor: Any, **_: Any) -> VLLMEngine:
        """The engine of policies like `policy`, at version 0; other arguments are left alone."""
        kind = f"{type(policy).__name__} {policy.config.foresight}"
        if kind in self._engines:
            self._engines[kind].update_weights(weight_update(policy, 0))
            return self._engines[kind]
        folder = self._folder / str(len(self._engines))
        policy.save_pretrained(folder)
        processor.save_pretrained(folder)
        media = MediaProcessor(processor)
        engine = VLLMEngine(folder, media, LocalMedia(media, 16), options=OPTIONS)
        self._engines[kind] = engine
        return engine

    def close(self) -> None:
        """End all of them side by side: vLLM grants each some seconds."""
        with ThreadPoolExecutor() as threads:
            list(threads.map(VLLMEngine.close, self._engines.values()))

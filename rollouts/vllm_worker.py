"""What Foresight adds to the workers of a vLLM engine (``worker_extension_cls``)."""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from safetensors import safe_open
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader import get_model_loader
from vllm.platforms import current_platform

from rollouts.vllm_internals import LatentWorker


class ForesightWorker(LatentWorker):
    """Takes latents out of a worker and puts weights into it."""

    reload_weights: Any

    def foresight_follow(self, pid: int) -> None:
        """End this process when process `pid` ends, in whatever way: vLLM's own processes outlive
        one that is killed, and with them the memory of the GPU.
        """
        end = select.poll()
        end.register(os.pidfd_open(pid))

        def follow() -> None:
            end.poll()
            os.kill(os.getpid(), signal.SIGKILL)

        threading.Thread(target=follow, daemon=True, name="foresight-follow").start()

    def foresight_load(self, files: Sequence[tuple[str, Sequence[str]]], rest: bool) -> None:
        """Load all weights anew through vLLM's own reload, which packs them as its kernels want.

        `files` are safetensors and the names to take of each. With `rest` the other weights come
        from the folder the engine was started on: vLLM processes a layer as a whole, so an update
        of half of its weights needs the other half.
        """
        self.reload_weights(weights_iterator=self._weights(files, rest))
        if current_platform.is_cpu():
            # An output layer tied to the embeddings is not loaded, and keeps the packed old ones.
            for module in self.model_runner.get_model().modules():
                if isinstance(module, ParallelLMHead):
                    module.quant_method.process_weights_after_loading(module)

    def _weights(
        self, files: Sequence[tuple[str, Sequence[str]]], rest: bool
    ) -> Iterator[tuple[str, torch.Tensor]]:
        given: set[str] = set()
        for path, names in files:
            given |= {self._own_name(name) for name in names}
            with safe_open(path, framework="pt") as file:
                for name in names:
                    yield name, file.get_tensor(name)
        if rest:
            runner = self.model_runner
            loader: Any = get_model_loader(runner.vllm_config.load_config)
            for name, value in loader.get_all_weights(runner.model_config, runner.get_model()):
                if self._own_name(name) not in given:
                    yield name, value

    def _own_name(self, name: str) -> str:
        # A checkpoint may call a parameter otherwise than the policy's state dict does.
        mapper = getattr(self.model_runner.get_model(), "hf_to_vllm_mapper", None)
        found = mapper.apply_list([name]) if mapper is not None else [name]
        return found[0] if found else name  # vLLM loads nothing of what a mapper drops

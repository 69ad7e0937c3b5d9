"""Weight updates from the trainer's GPU to those of vLLM, by vLLM's own weight transfer.

The trainer is rank 0 of one NCCL group, and every process of every engine is another rank. Calls
through Ray only say what comes; the weights themselves take NCCL's way. Source: vLLM 0.31,
`vllm.distributed.weight_transfer`.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from vllm.distributed.weight_transfer import WeightTransferTrainerFactory
from vllm.distributed.weight_transfer.base import ParamMeta, TrainerInitInfo, WeightSource
from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo
from vllm.utils.network_utils import get_open_port

from rl.errors import RolloutError, SyncError
from rl.interfaces import WeightUpdate
from rollouts.assemble import check_update
from rollouts.vllm_weights import parameter_shapes

# What the trainer tells vLLM's transfer of itself, by the name of the backend.
BACKENDS: dict[str, Callable[..., TrainerInitInfo]] = {"nccl": NCCLTrainerInitInfo}


class WeightTransfer:
    """Brings weight updates to the engines of Ray actors (`rollouts.worker.RolloutWorker`).

    Each engine has `processes` of its own, one a GPU. `folder` holds the policy. A call that takes
    longer than `timeout` seconds is given up with a `SyncError`; the group is of no use then.
    """

    def __init__(
        self, backend: str, engines: Sequence[Any], processes: int, folder: str, timeout: float
    ) -> None:
        self._shapes, tied = parameter_shapes(folder)
        self._backend, self._timeout = backend, timeout
        self._device = torch.cuda.current_device() if torch.cuda.is_available() else None
        self._source = _Source(self._shapes.keys() - tied)
        self._engines = _Engines(engines, processes, timeout)
        self._sender: Any = None

    def send(self, update: WeightUpdate) -> None:
        """Bring all engines to `update`. Parameters it lacks stay as they were sent before."""
        try:
            check_update(update, self._shapes)
        except RolloutError as error:
            raise SyncError(str(error)) from error
        self._source.take(update)
        self._engines.version = update.version
        errors: list[BaseException] = []
        # A broadcast to a process that has died does not return: it may not hold up this one.
        thread = threading.Thread(target=self._send, args=(errors,), daemon=True, name="transfer")
        thread.start()
        thread.join(self._timeout)
        if thread.is_alive() or errors:
            reason = errors[0] if errors else f"it took longer than {self._timeout:.0f} s"
            raise SyncError(
                f"the weights of version {update.version} did not arrive at all workers: {reason}; "
                "run again, with rollouts.vllm.weight_transfer: files if it stays so"
            ) from (errors[0] if errors else None)

    def _send(self, errors: list[BaseException]) -> None:
        try:
            if self._device is not None:
                torch.cuda.set_device(self._device)  # a thread starts on the first GPU
            if self._sender is None:
                self._sender = WeightTransferTrainerFactory.trainer_init(
                    BACKENDS[self._backend](
                        rank=0,
                        master_address=ray.util.get_node_ip_address(),
                        master_port=get_open_port(),
                        world_size=1 + self._engines.processes,
                    ),
                    client=self._engines,
                    source=self._source,
                )
            self._sender.send_weights()
        except BaseException as error:  # whatever it is, the caller is told
            errors.append(error)


class _Source(WeightSource):
    """The newest value of every parameter, put on the trainer's device one by one."""

    def __init__(self, names: set[str]) -> None:
        self._names, self._state = sorted(names), dict[str, torch.Tensor]()

    def take(self, update: WeightUpdate) -> None:
        self._state |= update.state
        if missing := [name for name in self._names if name not in self._state]:
            raise SyncError(
                f"the first weights that are sent must be whole; {len(missing)} are missing, such "
                f"as {missing[0]}"
            )

    def metadata(self) -> list[ParamMeta]:
        values = [(name, self._state[name]) for name in self._names]
        return [ParamMeta(name, value.dtype, tuple(value.shape)) for name, value in values]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        device = "cuda" if torch.cuda.is_available() else "cpu"  # the sender's
        for name in self._names:
            yield name, self._state[name].to(device)


class _Engines:
    """What vLLM's sender calls: each call goes to all engines, and waits for them."""

    def __init__(self, engines: Sequence[Any], processes: int, timeout: float) -> None:
        self._engines, self._each, self._timeout = engines, processes, timeout
        self.version = 0

    @property
    def processes(self) -> int:
        return len(self._engines) * self._each

    def init_weight_transfer_engine(self, init_info: dict[str, Any]) -> None:
        # Every engine counts its own processes from the offset.
        offset = init_info["rank_offset"]
        self._call(
            "init_weight_transfer_engine",
            [
                {"init_info": init_info | {"rank_offset": offset + i * self._each}}
                for i in range(len(self._engines))
            ],
        )

    def start_weight_update(self) -> None:
        self._call("start_weight_update")

    def update_weights(self, update_info: Any) -> None:
        self._call("update_weights", [{"update_info": update_info}] * len(self._engines))

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        del weight_version  # vLLM's name for it; the engines keep a number
        self._call("finish_weight_update")

    def _call(self, step: str, arguments: Sequence[Mapping[str, Any]] | None = None) -> None:
        given = arguments or [{}] * len(self._engines)
        calls = [
            engine.transfer.remote(step, kwargs, self.version)
            for engine, kwargs in zip(self._engines, given, strict=True)
        ]
        try:
            ray.get(calls, timeout=self._timeout)
        except RayError as error:
            raise SyncError(f"{step.replace('_', ' ')}: {error}") from error

"""Reward processes seen from the trainer: started, called with a deadline, killed, replaced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from rewards.batch import Batch
from rewards.functions import Signature
from rewards.host import Reply, RewardHost
from rl.errors import RecipeError

START_TIMEOUT = 300.0  # seconds: a reward may load a model when it is made


@dataclass(frozen=True)
class Seat:
    """A reward in a process: what to import, and with which options."""

    name: str
    target: Any  # "package.module:name", "/folder/file.py:name", or the function itself
    options: Mapping[str, Any] = field(default_factory=dict)
    range: tuple[float, float] | None = None


class Caller(Protocol):
    """Where rewards run."""

    def start(self) -> dict[str, Signature]:
        """What each of its rewards takes. Raises `RecipeError` naming one that cannot be
        imported.
        """
        ...

    def call(self, name: str, batch: Batch, state: Mapping[str, Any], timeout: float) -> Reply: ...

    def close(self) -> None: ...


class InlineCaller:
    """Runs rewards in this process: no deadline, nothing to kill. For functions one trusts."""

    def __init__(self, seats: Sequence[Seat]) -> None:
        self._seats, self._host = seats, RewardHost()

    def start(self) -> dict[str, Signature]:
        return {
            s.name: _signature(s, self._host.add(s.name, s.target, s.options, s.range))
            for s in self._seats
        }

    def call(self, name: str, batch: Batch, state: Mapping[str, Any], timeout: float) -> Reply:
        return self._host.call(name, batch.columns, None, state)

    def close(self) -> None:
        """Nothing to stop."""


class ProcessCaller:
    """Runs rewards in one Ray actor on this machine, which it replaces when it was lost.

    Ray must have been started. `memory_mb` bounds what the process may take beyond what its imports
    took; None does not. `gpus` is its share of GPUs; without one it sees none.
    """

    def __init__(
        self, seats: Sequence[Seat], *, memory_mb: int | None = None, gpus: float = 0.0
    ) -> None:
        self._seats, self._memory_mb, self._gpus = seats, memory_mb, gpus
        self._signatures: dict[str, Signature] = {}
        self._actor: Any = None
        self._starting: list[Any] = []
        self._closed = False

    def launch(self) -> None:
        """Set the process going without waiting for it, so that several start side by side."""
        import ray
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        # Files of rewards are on this machine; a share of a GPU may be on another one only.
        here = NodeAffinitySchedulingStrategy(
            ray.get_runtime_context().get_node_id(), soft=self._gpus > 0
        )
        actor: Any = (
            ray.remote(RewardHost)
            .options(num_cpus=0, num_gpus=self._gpus, scheduling_strategy=here)
            .remote()
        )
        self._actor = actor
        if not self._gpus:
            actor.hide_gpus.remote()
        self._starting = [
            actor.add.remote(s.name, s.target, s.options, s.range) for s in self._seats
        ]
        if self._memory_mb is not None:
            self._starting.append(actor.limit_memory.remote(self._memory_mb))

    def start(self) -> dict[str, Signature]:
        import ray
        from ray.exceptions import GetTimeoutError, RayError

        if self._actor is None:
            self.launch()
        names = ", ".join(repr(s.name) for s in self._seats)
        try:
            replies = ray.get(self._starting, timeout=START_TIMEOUT)
            self._signatures = {
                s.name: _signature(s, r) for s, r in zip(self._seats, replies, strict=False)
            }
        except BaseException as error:
            self._drop()
            if isinstance(error, GetTimeoutError):
                gpu = f", or no GPU free for its share of {self._gpus:g}" if self._gpus else ""
                raise RecipeError(
                    f"the process of reward {names} was not ready within {START_TIMEOUT:.0f} s; is "
                    f"something slow or endless done when it is imported or made{gpu}?"
                ) from None
            if isinstance(error, RayError):
                raise RecipeError(
                    f"the process of reward {names} died when it was imported or made: "
                    f"{_last_line(error)}"
                ) from None
            raise
        return self._signatures

    def call(self, name: str, batch: Batch, state: Mapping[str, Any], timeout: float) -> Reply:
        """The reply, or one that says that the process hung or died; it is gone then."""
        import ray
        from ray.exceptions import GetTimeoutError, OutOfMemoryError, RayError

        if self._closed:
            return Reply(failure="died", message="was stopped")
        try:
            if self._actor is None:
                self.start()
        except RecipeError as error:
            first, _, rest = str(error).partition("\n")
            return Reply(failure="start", message=f"did not start again: {first}", trace=rest)
        signature = self._signatures[name]
        light, heavy = _refs(batch, signature.wants("trajectories"))
        if "trainer_state" not in signature.columns:  # it grows with every step
            state = {key: value for key, value in state.items() if key != "log_history"}
        actor: Any = self._actor
        try:
            reply: Any = ray.get(actor.call.remote(name, light, heavy, state), timeout=timeout)
        except GetTimeoutError:
            self._drop()
            message = f"did not answer within {timeout:g} s; its process was killed"
            return Reply(failure="hung", message=message)
        except OutOfMemoryError as error:
            self._drop()
            message = f"Ray killed its process, as memory ran out: {_last_line(error)}"
            return Reply(failure="memory", message=message)
        except RayError as error:
            self._drop()
            return Reply(failure="died", message=f"its process died: {_last_line(error)}")
        if reply.failure == "memory":
            self._drop()
        return reply

    def close(self) -> None:
        self._closed = True  # a thread that still waits for an answer must not start it anew
        self._drop()

    def _drop(self) -> None:
        """Kill the process; the next call makes a new one."""
        import ray

        actor, self._actor, self._starting = self._actor, None, []
        if actor is not None and ray.is_initialized():
            ray.kill(actor)


def _signature(seat: Seat, reply: Signature | Reply) -> Signature:
    if isinstance(reply, Signature):
        return reply
    where = seat.target if isinstance(seat.target, str) else "a function"
    raise RecipeError(
        f"reward {seat.name!r} ({where}) cannot be imported or made: it {reply.message}\n"
        f"{reply.trace}"
    )


def _refs(batch: Batch, heavy: bool) -> tuple[Any, Any]:
    """The batch in Ray's object store, put there once for all processes: its columns, and apart
    from them, because latents are large, its trajectories (None unless `heavy`).
    """
    import ray

    stored = batch.stored
    if "columns" not in stored:
        stored["columns"] = ray.put(
            {name: values for name, values in batch.columns.items() if name != "trajectories"}
        )
    if not heavy or "trajectories" not in batch.columns:
        return stored["columns"], None
    if "trajectories" not in stored:
        stored["trajectories"] = ray.put(batch.columns["trajectories"])
    return stored["columns"], stored["trajectories"]


def _last_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__

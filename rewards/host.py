"""The inside of a reward process: it imports reward functions and calls them.

The one broad `except` around rewards is here. Only plain values leave: what a function returned is
turned into floats here, and errors into text, so that nothing of a user's is unpickled elsewhere.
"""

from __future__ import annotations

import asyncio
import inspect
import math
import os
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any, Literal

from rewards.batch import COLUMNS
from rewards.functions import Signature, load, read_signature
from rewards.values import Invalid

# What can go wrong with a call as a whole; "invalid" is said of single values.
Failure = Literal["raised", "memory", "count", "hung", "died", "start"]
MESSAGE, TRACE = 1000, 20_000  # characters kept of a message and of the end of a traceback
# What a function may throw by itself; an interruption of this process is none of its.
THROWN = (Exception, SystemExit, asyncio.CancelledError)
MEBIBYTE = 1 << 20
SLACK = 1e-6  # by which rounding may leave a range


@dataclass(frozen=True)
class Reply:
    """What one call gave: N values (NaN with a reason is invalid, NaN without one "no value"), and
    what the function logged. `failure` is set, and `values` empty, if the call as a whole failed;
    else `message` says what went wrong beside the values.
    """

    values: list[float] = field(default_factory=list)
    reasons: list[str] = field(default_factory=list)  # "" where nothing is wrong
    metrics: list[tuple[str, float]] = field(default_factory=list)
    extras: dict[str, list[Any]] = field(default_factory=dict)
    failure: Failure | None = None
    message: str = ""
    trace: str = ""


class RewardHost:
    """Holds reward functions by name. Runs as a Ray actor, or inline where nothing must be
    isolated.
    """

    def __init__(self) -> None:
        self._functions: dict[str, tuple[Any, Signature, dict[str, Any]]] = {}
        self._loop: asyncio.Runner | None = None

    def add(
        self,
        name: str,
        target: str | Callable[..., Any],
        options: Mapping[str, Any],
        span: tuple[float, float] | None = None,
    ) -> Signature | Reply:
        """Import a reward and say what it takes, or say why that failed. `span` is its range, if
        the recipe gives one.
        """
        try:
            function = load(target) if isinstance(target, str) else target
            signature = read_signature(function)
            signature = replace(signature, range=span or signature.range)
            if inspect.isclass(function):
                made = function(**options)
                self._functions[name] = made, signature, {}
            else:
                self._functions[name] = function, signature, dict(options)
        except THROWN as error:
            return _failed("raised", error)
        return signature

    def limit_memory(self, mebibytes: int) -> None:
        """From here on the process may take so much more; then its allocations fail.

        Linux counts what can be written and is shared with nobody, touched or not. Elsewhere
        nothing is limited.
        """
        try:
            import resource

            with open("/proc/self/status") as status:
                held = next(int(line.split()[1]) for line in status if line.startswith("VmData:"))
        except (ImportError, FileNotFoundError):
            return
        most = (held << 10) + mebibytes * MEBIBYTE
        _, hard = resource.getrlimit(resource.RLIMIT_DATA)  # a batch system may have set one
        if hard != resource.RLIM_INFINITY:
            most = min(most, hard)
        resource.setrlimit(resource.RLIMIT_DATA, (most, hard))

    def hide_gpus(self) -> None:
        """Ray shows all GPUs to a process that has booked none."""
        os.environ["CUDA_VISIBLE_DEVICES"] = ""

    def call(
        self,
        name: str,
        columns: Mapping[str, Any],
        trajectories: Sequence[Any] | None,
        state: Mapping[str, Any],
    ) -> Reply:
        """Call a reward over N trajectories, whose columns and records come apart. Never raises."""
        function, signature, options = self._functions[name]
        records = {} if trajectories is None else {"trajectories": trajectories}
        metrics: list[tuple[str, float]] = []
        extras: dict[str, list[Any]] = {}
        handed = {
            "trainer_state": SimpleNamespace(**state),
            "log_metric": lambda key, value: metrics.append((str(key), float(value))),
            "log_extra": lambda key, values: extras.__setitem__(str(key), _plain(values)),
        }
        expected = len(columns["completions"])
        # A column that no row of this batch has may be one that other rows of the manifest have.
        absent = {name: [None] * expected for name in signature.required if name not in COLUMNS}
        offered = {**absent, **columns, **records, **handed}
        given = {key: value for key, value in offered.items() if signature.wants(key)}
        try:
            result = function(**{**given, **options})
            if inspect.isawaitable(result):
                result = self._run(result)
            pairs = [_number(value, signature.range) for value in result]
        except THROWN as error:
            return _failed("memory" if isinstance(error, MemoryError) else "raised", error)
        if len(pairs) != expected:
            return Reply(
                failure="count",
                message=f"returned {len(pairs)} values for {expected} completions; it must return "
                "one a completion, None where it has none",
            )
        uneven = [key for key, column in extras.items() if len(column) != expected]
        for key in uneven:
            del extras[key]
        note = f"log_extra was not given one value a completion for {uneven}" if uneven else ""
        return Reply([v for v, _ in pairs], [r for _, r in pairs], metrics, extras, message=note)

    def _run(self, awaitable: Any) -> Any:
        """On one event loop for the life of the process, as clients kept between calls need."""
        if self._loop is None:
            self._loop = asyncio.Runner()

        async def answer() -> Any:
            return await awaitable

        return self._loop.run(answer())


def _failed(failure: Failure, error: BaseException) -> Reply:
    try:
        text = str(error).strip() or "no message"
        trace = "".join(traceback.format_exception(error))
    except THROWN:  # an error that cannot even say what it is
        text, trace = "no readable message", ""
    message = f"raised {type(error).__name__}: {text}"
    return Reply(failure=failure, message=_short(message, MESSAGE), trace=trace[-TRACE:])


def _number(value: Any, span: tuple[float, float] | None) -> tuple[float, str]:
    """A value as a float, and what is wrong with it ("" if nothing)."""
    if value is None:
        return math.nan, ""
    if isinstance(value, Invalid):
        return math.nan, _short(f"{value.reason or 'invalid, with no reason given'}", MESSAGE)
    # Strings convert too, but a reward that returns one has a bug worth showing.
    if isinstance(value, str) or not hasattr(value, "__float__"):
        return math.nan, f"returned {_shown(value)} of type {type(value).__name__}, not a number"
    try:
        number = float(value)
    except Exception as error:  # a type of the user's, or an array with several numbers
        return math.nan, f"returned {_shown(value)}, which is no number: {error}"
    if not math.isfinite(number):
        return math.nan, f"returned {number}; for no value return None"
    if span is not None and not span[0] - SLACK <= number <= span[1] + SLACK:
        return math.nan, f"returned {number:g}, outside of its range {span[0]:g} to {span[1]:g}"
    return number, ""


def _plain(values: Sequence[Any]) -> list[Any]:
    kept = (str, int, float, bool, type(None))
    return [value if type(value) in kept else _shown(value) for value in values]


def _shown(value: Any) -> str:
    return _short(repr(value), 80)


def _short(text: str, most: int) -> str:
    return text if len(text) <= most else text[: most - 3] + "..."

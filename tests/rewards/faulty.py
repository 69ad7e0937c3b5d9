"""Rewards that go wrong in every way, each only for the sample "bad". Imported by reward processes
only: `tests/rewards/test_faults.py` names them by path.
"""

import asyncio
import os
import time

import numpy as np

from rewards.values import Invalid

HOARD = []


def _is_bad(id):
    return "bad" in id


def sleeps(completions, id, **_):
    while _is_bad(id):
        time.sleep(0.1)
    return [1.0] * len(completions)


def raises(completions, id, **_):
    if _is_bad(id):
        raise ValueError("cannot read this")
    return [1.0] * len(completions)


def returns_too_few(completions, id, **_):
    return [1.0 for i in id if i != "bad"]


def gives_nan(completions, id, **_):
    return [float("nan") if i == "bad" else 1.0 for i in id]


def gives_text(completions, id, **_):
    return ["1.0" if i == "bad" else 1.0 for i in id]


def kills_itself(completions, id, **_):
    if _is_bad(id):
        os.kill(os.getpid(), 9)
    return [1.0] * len(completions)


def hoards(completions, id, **_):
    while _is_bad(id):
        HOARD.append(np.ones(1 << 22))  # 32 MiB
    return [1.0] * len(completions)


def leaks(completions, **_):
    """Slowly: each call by itself is harmless, and a new process can go on."""
    HOARD.append(np.ones(12 << 20))  # 96 MiB
    return [float(len(HOARD))] * len(completions)


class NotPlain:
    """A number of a type that only this file knows."""

    def __float__(self):
        return 0.5


def gives_own_type(completions, log_extra, **_):
    log_extra("odd", [NotPlain()] * len(completions))
    return [NotPlain()] * len(completions)


class OwnError(Exception):
    def __init__(self, a, b):  # cannot be unpickled
        super().__init__(f"{a} and {b}")


def raises_own_error(completions, **_):
    raise OwnError("this", "that")


def where(completions, log_metric, **_):
    log_metric("pid", os.getpid())
    return [0.0] * len(completions)


async def cancels(completions, **_):
    raise asyncio.CancelledError


def interrupts(completions, **_):
    raise KeyboardInterrupt


class Unspeakable(Exception):
    def __str__(self):
        raise RuntimeError("no words")


def is_unspeakable(completions, **_):
    raise Unspeakable


def gives_an_error_as_reason(completions, **_):
    return [Invalid(OwnError("this", "that"))] * len(completions)  # type: ignore[arg-type]


def talks_too_much(completions, **_):
    raise ValueError("blah" * 1_000_000)


def sees(completions, log_extra, **_):
    log_extra("gpus", [os.environ.get("CUDA_VISIBLE_DEVICES")] * len(completions))
    return [0.0] * len(completions)

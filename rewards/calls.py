"""Calling rewards so that what cannot be scored costs as little as possible."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rewards.batch import Batch
from rewards.host import Reply
from rewards.ledger import Fault
from rewards.process import Caller, InlineCaller, ProcessCaller
from rewards.terms import RewardTerm

LOSSES = 3  # processes that one call may cost before the rest of its groups is given up


def make_callers(terms: Sequence[RewardTerm], isolated: bool) -> dict[str, Caller]:
    """By reward; those of one process have the same."""
    if not isolated:
        inline = InlineCaller([term.seat for term in terms])
        return {term.name: inline for term in terms}
    callers: dict[str, Caller] = {}
    for members in _by_process(terms):
        # Rewards of one process may ask for different amounts: the most counts.
        memory = [term.memory_mb for term in members]
        caller = ProcessCaller(
            [term.seat for term in members],
            memory_mb=None if None in memory else max(m for m in memory if m is not None),
            gpus=max(term.gpus for term in members),
        )
        callers |= {term.name: caller for term in members}
    return callers


def _by_process(terms: Sequence[RewardTerm]) -> Iterator[list[RewardTerm]]:
    shared = dict.fromkeys(term.process for term in terms if term.process is not None)
    for process in shared:
        yield [term for term in terms if term.process == process]
    for term in terms:
        if term.process is None:
            yield [term]


def call_in_parts(
    caller: Caller, term: RewardTerm, batch: Batch, state: Mapping[str, Any]
) -> tuple[Reply, list[Fault]]:
    """Call a reward over a batch and, if that fails as a whole, over its groups one by one.

    Gives up what is left once `LOSSES` processes, or as many times the deadline, have gone into
    calls that failed.
    """
    losses, wasted = 0, 0.0

    def call(part: Batch) -> Reply:
        nonlocal losses, wasted
        started = time.monotonic()
        reply = caller.call(term.name, part, state, term.timeout_s)
        if reply.failure is not None:
            losses += reply.failure in ("hung", "died", "memory", "start")
            # No more than the deadline: the time a new process takes to start is not the reward's.
            wasted += min(time.monotonic() - started, term.timeout_s)
        return reply

    whole = call(batch)
    if whole.failure is None:
        return whole, []
    parts = batch.parts()
    alone = len(parts) == 1
    faults = [_fault(term, whole, batch, len(batch) if alone else 0)]
    if alone:
        return _nothing(len(batch), whole.message), faults
    replies: list[Reply] = []
    for part in parts:
        if losses >= LOSSES or wasted > LOSSES * term.timeout_s:
            given_up = f"given up after it failed again and again: {faults[-1].message}"
            faults.append(Fault(term.name, "given up", given_up, _ids(part), len(part)))
            replies.append(_nothing(len(part), given_up))
            continue
        reply = call(part)
        if reply.failure is not None:
            faults.append(_fault(term, reply, part, len(part)))
            reply = _nothing(len(part), reply.message)
        replies.append(reply)
    logged = dict.fromkeys(key for reply in replies for key in reply.extras)
    return Reply(
        [value for reply in replies for value in reply.values],
        [reason for reply in replies for reason in reply.reasons],
        [metric for reply in replies for metric in reply.metrics],
        {
            key: [v for r in replies for v in r.extras.get(key, [None] * len(r.values))]
            for key in logged
        },
        message=next((reply.message for reply in replies if reply.message), ""),
    ), faults


def _nothing(count: int, reason: str) -> Reply:
    return Reply([math.nan] * count, [reason] * count)


def _fault(term: RewardTerm, reply: Reply, batch: Batch, lost: int) -> Fault:
    assert reply.failure is not None
    kind, message = reply.failure, reply.message
    return Fault(term.name, kind, message, _ids(batch), lost, trace=reply.trace)


def _ids(batch: Batch) -> tuple[str, ...]:
    return tuple(dict.fromkeys(batch.columns["id"]))

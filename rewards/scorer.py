"""The rewards of a run as one object: the outcome first, then the shaping.

`RewardSet` implements `rl.interfaces.Scorer`. A reward is a function with TRL's signature,

    f(prompts, completions, completion_ids, **columns) -> list[float | None | Invalid]

sync or async, called once over a whole batch of groups laid end to end; docs/rewards.md lists the
columns. What it gives for a trajectory is a number, None ("no value") or invalid; the last two
leave the group's mean, deviation and count alone. A call that fails as a whole is tried again group
by group, so that one completion a function cannot stand costs its own group only.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rewards.batch import Batch, group_batch
from rewards.calls import call_in_parts, make_callers
from rewards.functions import Signature
from rewards.host import Reply
from rewards.ledger import Fault, Ledger, plain_state
from rewards.process import Caller, ProcessCaller
from rewards.terms import RewardTerm, check_terms, overweight
from rl.errors import RewardError

if TYPE_CHECKING:
    from pathlib import Path

    from rl.interfaces import GroupScores, ScoringLog
    from rl.trajectory import TrajectoryGroup

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Scored:
    """What one reward gave for a batch: N values, NaN with a reason where they are invalid."""

    values: list[float]
    reasons: list[str]


class RewardSet:
    """Scores groups with one outcome reward and any number of shaping rewards.

    `gate_shaping`: shaping must not teach in groups that are all right or all wrong. `max_invalid`:
    the share of invalid values of a reward, over the last steps, beyond which `RewardError` stops
    the run with a report. `faults`: a file to write every fault to. `isolated`: every reward runs
    in a Ray process with a deadline (Ray must have been started); else all run in this process,
    which is for functions one trusts. Processes start with the first use; `close` or ``with`` ends
    them.
    """

    def __init__(
        self,
        terms: Sequence[RewardTerm],
        *,
        gate_shaping: bool = True,
        max_invalid: float = 0.5,
        faults: Path | None = None,
        isolated: bool = False,
    ) -> None:
        check_terms(terms)
        self.outcome = next(term for term in terms if not term.shaping)
        self.shaping = tuple(term for term in terms if term.shaping)
        self.terms = (self.outcome, *self.shaping)
        self.names: Sequence[str] = tuple(term.name for term in self.terms)
        self.weights: Sequence[float] = tuple(term.weight for term in self.terms)
        self._gate, self._isolated = gate_shaping, isolated
        self._ledger = Ledger(max_invalid=max_invalid, file=faults)
        self._callers: dict[str, Caller] = {}
        self._signatures: dict[str, Signature] = {}
        self._state: dict[str, Any] = {}
        self._metrics: list[tuple[str, float]] = []
        self._seconds: dict[str, float] = {}
        # By the id() of a trajectory: why its outcome is invalid, and what was logged of it.
        self._judged: dict[int, tuple[str, dict[str, Any]]] = {}
        self._extras: dict[str, list[Any]] = {}
        self._warned: set[str] = set()

    # -- processes ---------------------------------------------------------------------------------

    def start(self) -> None:
        """Import every reward, where it will run. Raises `RecipeError` naming one that fails."""
        if self._callers:
            return
        self._callers = make_callers(self.terms, self._isolated)
        distinct = list({id(caller): caller for caller in self._callers.values()}.values())
        try:
            for caller in distinct:
                if isinstance(caller, ProcessCaller):
                    caller.launch()
            for caller in distinct:
                self._signatures |= caller.start()
        except BaseException:
            self.close()
            raise
        for warning in overweight(self.terms, self.ranges):
            logger.warning(warning)

    def close(self) -> None:
        """End the processes."""
        for caller in self._callers.values():
            caller.close()
        self._callers = {}

    def __enter__(self) -> RewardSet:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    # -- rl.interfaces.Scorer ----------------------------------------------------------------------

    @property
    def ranges(self) -> dict[str, tuple[float, float]]:
        """The ranges of the rewards that have one; of those of users, once they are imported."""
        known = {term.name: term.range for term in self.terms}
        known |= {name: signature.range for name, signature in self._signatures.items()}
        return {name: span for name, span in known.items() if span is not None}

    @property
    def wants_shuffled(self) -> bool:
        """Whether a reward compares with a control whose frames are shuffled."""
        self.start()
        return any("shuffled_outcomes" in s.columns for s in self._signatures.values())

    def begin(self, state: Any) -> None:
        """Where training is: handed to rewards, and a round of its own in the counts of faults."""
        self._state = plain_state(state)
        self._ledger.begin(self._state.get("global_step"))
        self._judged.clear()
        self._metrics.clear()  # what validation may have left
        self._seconds.clear()

    def outcomes(self, groups: Sequence[TrajectoryGroup]) -> list[list[float]]:
        """1 for right, 0 for wrong, NaN for invalid: one list a group, one value a trajectory."""
        batch = group_batch(groups)
        (scored,) = self.run([self.outcome], batch).values()
        for place, t in enumerate(t for g in groups for t in g):
            logged = {column: values[place] for column, values in self._extras.items()}
            self._judged[id(t)] = scored.reasons[place], logged
        self._ledger.check([self.outcome.name])
        return batch.split(scored.values)

    def score(
        self,
        groups: Sequence[TrajectoryGroup],
        outcomes: Sequence[Sequence[float]],
        shuffled: Sequence[Sequence[float]] | None = None,
    ) -> list[GroupScores]:
        """Every component of every trajectory, given what `outcomes` returned for the same groups.

        `shuffled[g]` are the outcomes of the control of group g, if there is one. A trajectory
        whose outcome is invalid gets NaN in every component: TRL leaves a row without any value out
        of its group's mean, standard deviation and count.
        """
        from rl.interfaces import GroupScores  # here, because it loads torch

        if [len(g) for g in groups] != [len(o) for o in outcomes]:
            raise RewardError(
                f"outcomes for groups of {[len(o) for o in outcomes]} trajectories, but the groups "
                f"have {[len(g) for g in groups]}"
            )
        batch = group_batch(groups).with_column("outcomes", outcomes)
        if shuffled is not None:
            controls = [[list(s)] * len(g) for g, s in zip(groups, shuffled, strict=True)]
            batch = batch.with_column("shuffled_outcomes", controls)
        flat = batch.columns["outcomes"]
        scored = self.run(self.shaping, batch)
        self._ledger.check(scored)
        judged = [self._judged.get(id(t), ("", {})) for g in groups for t in g]
        for column in dict.fromkeys(key for _, logged in judged for key in logged):
            self._extras.setdefault(column, [logged.get(column) for _, logged in judged])
        components = {self.outcome.name: batch.split(flat)}
        invalid = {self.outcome.name: batch.split([reason for reason, _ in judged])}
        for name, one in scored.items():
            valid = [
                math.nan if math.isnan(o) else v for v, o in zip(one.values, flat, strict=True)
            ]
            components[name] = batch.split(valid)
            invalid[name] = batch.split(one.reasons)
        gated = [self._gate and not _has_contrast(row) for row in outcomes]
        if groups:
            self._metrics.append(("groups/gated", sum(gated) / len(gated)))
        self._watch_spread(components, gated)
        return [
            GroupScores(
                list(row),
                {name: rows[i] for name, rows in components.items()},
                gated[i],
                {name: rows[i] for name, rows in invalid.items() if any(rows[i])},
            )
            for i, row in enumerate(outcomes)
        ]

    def log(self) -> ScoringLog:
        """Metrics and columns of the completions table, since the last time."""
        from rl.interfaces import ScoringLog

        for name in self.names:
            if not math.isnan(share := self._ledger.share(name)):
                self._metrics.append((f"rewards/{name}/invalid", share))
        self._metrics += [(f"rewards/{name}/seconds", s) for name, s in self._seconds.items()]
        log = ScoringLog(self._metrics, self._extras)
        self._metrics, self._extras, self._seconds = [], {}, {}
        return log

    # -- one batch ---------------------------------------------------------------------------------

    def run(self, terms: Sequence[RewardTerm], batch: Batch) -> dict[str, Scored]:
        """What each of `terms` gives for a batch, without a view to the others. Processes work side
        by side, the rewards of one process one after the other.
        """
        self.start()
        self._extras = {}
        if not len(batch):
            return {term.name: Scored([], []) for term in terms}
        by_process: dict[int, list[RewardTerm]] = {}
        for term in terms:
            by_process.setdefault(id(self._callers[term.name]), []).append(term)
        if not by_process:
            return {}
        pool = ThreadPoolExecutor(len(by_process))
        try:
            jobs = [pool.submit(self._in_turn, mine, batch) for mine in by_process.values()]
            found = {name: reply for job in jobs for name, reply in job.result().items()}
        finally:
            pool.shutdown(wait=False)  # who interrupts a run must not wait for a deadline
        return {term.name: self._note(term, batch, *found[term.name]) for term in terms}

    def _in_turn(
        self, terms: Sequence[RewardTerm], batch: Batch
    ) -> dict[str, tuple[Reply, list[Fault], float]]:
        results = {}
        for term in terms:
            started = time.monotonic()
            reply, faults = call_in_parts(self._callers[term.name], term, batch, self._state)
            results[term.name] = reply, faults, time.monotonic() - started
        return results

    def _note(
        self, term: RewardTerm, batch: Batch, reply: Reply, faults: list[Fault], seconds: float
    ) -> Scored:
        """Count what a call gave and write down what was wrong with it."""
        values, reasons = list(reply.values), list(reply.reasons)
        if not term.shaping:
            _only_outcomes(values, reasons)
        ids = batch.columns["id"]
        single = {r: None for r in reasons if r and not any(r == f.message for f in faults)}
        for reason in single:
            lost = [id for id, r in zip(ids, reasons, strict=True) if r == reason]
            samples = tuple(dict.fromkeys(lost))
            faults = [*faults, Fault(term.name, "invalid", reason, samples, len(lost))]
        if reply.failure is None and reply.message:
            faults = [*faults, Fault(term.name, "logged", reply.message, (), 0)]
        for fault in faults:
            self._ledger.fault(fault)
        self._ledger.count(term.name, sum(map(bool, reasons)), len(reasons))
        self._seconds[term.name] = self._seconds.get(term.name, 0.0) + seconds
        self._metrics += reply.metrics
        self._extras |= reply.extras
        return Scored(values, reasons)

    def _watch_spread(
        self, components: Mapping[str, list[list[float]]], gated: Sequence[bool]
    ) -> None:
        """Say once when a shaping reward that has no range decides more within a group than right
        and wrong do.
        """
        for term in self.shaping:
            if term.name in self._warned or term.name in self.ranges:
                continue
            for row, shut in zip(components[term.name], gated, strict=True):
                valid = [value for value in row if not math.isnan(value)]
                spread = abs(term.weight) * (max(valid) - min(valid)) if valid else 0.0
                if not shut and spread > abs(self.outcome.weight):
                    self._warned.add(term.name)
                    logger.warning(
                        "reward %r outweighs the outcome: within one group it differs by %.3g "
                        "(weighted), right and wrong by %.3g. Lower its weight",
                        term.name,
                        spread,
                        abs(self.outcome.weight),
                    )
                    break


def _only_outcomes(values: list[float], reasons: list[str]) -> None:
    """In place: an outcome is 1 or 0, and a row that has none is invalid."""
    for i, value in enumerate(values):
        if math.isnan(value):
            reasons[i] = reasons[i] or "gave no value, so nobody knows whether it is right"
        elif value not in (0.0, 1.0):
            values[i] = math.nan
            reasons[i] = f"decides the outcome but returned {value:g}; an outcome is 1, 0 or None"


def _has_contrast(outcome: Sequence[float]) -> bool:
    return len({value for value in outcome if not math.isnan(value)}) > 1

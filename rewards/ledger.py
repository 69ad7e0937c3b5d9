"""What went wrong with rewards: written down, counted, and too much of it stops the run."""

from __future__ import annotations

import json
import logging
import math
import time
from collections import Counter, defaultdict, deque
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rl.errors import RewardError

WINDOW = 4  # rounds (steps of training) over which the share of invalid values is taken
SHOWN = 5  # causes and samples in a report
CAUSES = 1000  # told apart of one reward

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Fault:
    """One thing that went wrong. `lost` values are invalid because of it; 0 if a second try gave
    them.
    """

    reward: str
    kind: str  # a `rewards.host.Failure`, or "invalid" for single values
    message: str
    samples: tuple[str, ...]
    lost: int
    step: int | None = None
    trace: str = ""


class Ledger:
    """Counts faults and invalid values a reward.

    Every fault goes to `file` (JSON, one a line) as it happens, and the first of each kind of each
    reward to the log. `check` raises when over the last `WINDOW` rounds more than `max_invalid` of
    a reward's values were invalid; rounds before the first count as good.
    """

    def __init__(self, *, max_invalid: float, file: Path | None) -> None:
        self._max_invalid, self._file = max_invalid, file
        self._rounds: deque[dict[str, tuple[int, int]]] = deque([{}], maxlen=WINDOW)
        self._causes: dict[str, Counter[tuple[str, str]]] = defaultdict(Counter)
        self._samples: dict[str, dict[str, None]] = defaultdict(dict)
        self._trace: dict[str, str] = {}
        self._step: int | None = None

    def begin(self, step: int | None) -> None:
        """Open a round."""
        self._step = step
        self._rounds.append({})

    def fault(self, fault: Fault) -> None:
        """Write a fault down."""
        causes = self._causes[fault.reward]
        if not any(kind == fault.kind for kind, _ in causes):
            logger.warning(
                "reward %r: %s (%s, sample %s). It is not counted as 0; further ones like it are "
                "only counted",
                fault.reward,
                fault.message,
                f"{fault.lost} values invalid" if fault.lost else "no value lost so far",
                ", ".join(map(repr, fault.samples[:SHOWN])),
            )
        known = (fault.kind, fault.message) in causes or len(causes) < CAUSES
        causes[fault.kind, fault.message if known else "others"] += 1
        if fault.lost:
            self._samples[fault.reward] |= dict.fromkeys(fault.samples)
        if fault.trace:
            self._trace[fault.reward] = fault.trace
        if self._file is not None:
            line = {"time": round(time.time(), 3)} | asdict(fault) | {"step": self._step}
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(line) + "\n")

    def count(self, reward: str, invalid: int, total: int) -> None:
        """Note that of `total` more values of a reward `invalid` are invalid."""
        before = self._rounds[-1].get(reward, (0, 0))
        self._rounds[-1][reward] = before[0] + invalid, before[1] + total

    def share(self, reward: str) -> float:
        """Share of invalid values in the open round; NaN if it has none."""
        invalid, total = self._rounds[-1].get(reward, (0, 0))
        return invalid / total if total else math.nan

    def check(self, rewards: Iterable[str]) -> None:
        """Raise `RewardError`, with a report, if one of `rewards` has too many invalid values."""
        for reward in rewards:
            counts = [window[reward] for window in self._rounds if window.get(reward, (0, 0))[1]]
            invalid, total = sum(i for i, _ in counts), sum(t for _, t in counts)
            # Rounds that were not yet there count as good ones: no single round stops a run, which
            # would be a different one whenever it is resumed.
            if total and invalid / total * len(counts) / WINDOW > self._max_invalid:
                raise RewardError(self._report(reward, invalid, total))

    def _report(self, reward: str, invalid: int, total: int) -> str:
        causes = self._causes[reward]
        lines = [
            f"reward {reward!r} has no valid value for {invalid} of the last {total} trajectories, "
            f"and scoring.max_invalid is {self._max_invalid:.0%} over {WINDOW} steps: what is left "
            "is too little to train on. What went wrong, since the run was started:"
        ]
        lines += [
            f"  {count} times {kind}: {message}"
            for (kind, message), count in causes.most_common(SHOWN)
        ]
        if (left := len(causes) - SHOWN) > 0:
            lines.append(f"  and {left} more causes")
        if samples := list(self._samples[reward]):
            shown = ", ".join(map(repr, samples[:SHOWN]))
            lines.append(f"  samples: {shown}{' ...' if len(samples) > SHOWN else ''}")
        if reward in self._trace:
            lines.append("  last traceback:")
            lines += [f"    {line}" for line in self._trace[reward].rstrip().splitlines()]
        if self._file is not None:
            lines.append(f"Every fault is in {self._file}.")
        lines.append(
            "Correct the reward (`foresight rewards try` shows what it gives on stored "
            "trajectories) and start the run again: it goes on from its last checkpoint"
        )
        return "\n".join(lines)


def plain_state(state: Any) -> dict[str, Any]:
    """transformers' `TrainerState` as plain values, for other processes."""
    hidden = ("_", "stateful_callbacks")
    return {k: v for k, v in vars(state).items() if not k.startswith(hidden)}

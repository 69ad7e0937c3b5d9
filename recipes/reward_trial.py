"""What `foresight rewards try` found: rows, a summary, and how both are shown."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rewards.text import LATENT_END, LATENT_START

ROWS = 40  # shown of the table
FAULTS = 5  # shown, with their tracebacks
SAMPLES = 5  # named of a fault
REASON = 30  # characters in the table; in full they stand below it
SPAN = re.compile(
    rf"{re.escape(LATENT_START)}((?:(?!{re.escape(LATENT_END)}).)*){re.escape(LATENT_END)}",
    re.DOTALL,
)


@dataclass(frozen=True)
class TriedRow:
    """One trajectory. NaN in `outcome` is unknown; in `value` it is invalid if there is a `reason`,
    else none.
    """

    group: int
    id: str
    outcome: float
    text: str
    value: float
    reason: str = ""
    extras: dict[str, Any] = field(default_factory=dict)  # what the reward logged of it


@dataclass(frozen=True)
class Trial:
    """What one reward gave for stored completions.

    `faults` are as `rewards.ledger` writes them down. `outcome_weight` is None for a reward that
    decides the outcome itself.
    """

    reward: str
    use: str
    options: dict[str, Any]
    files: tuple[str, ...]
    step: int | None
    rows: tuple[TriedRow, ...]
    seconds: float
    weight: float
    outcome_weight: float | None
    metrics: tuple[tuple[str, float], ...] = ()
    faults: tuple[dict[str, Any], ...] = ()
    by_rule: bool = False  # whether the outcomes come from `accuracy`, as the file has none

    @property
    def failed(self) -> bool:
        """Whether no row has a value, and not because the reward does not apply."""
        return all(row.reason for row in self.rows)

    def summary(self) -> dict[str, Any]:
        """Counts and means; None where there is nothing to take a mean of."""
        values = _values(self.rows)
        sides = {
            name: _values(row for row in self.rows if row.outcome == outcome)
            for name, outcome in (("right", 1.0), ("wrong", 0.0))
        }
        invalid = sum(bool(row.reason) for row in self.rows)
        spread, sample = self._spread()
        weighted = None if spread is None else abs(self.weight) * spread
        return {
            "rows": len(self.rows),
            "groups": len({row.group for row in self.rows}),
            "values": len(values),
            "none": len(self.rows) - len(values) - invalid,
            "invalid": invalid,
            "mean": _mean(values),
            "min": min(values, default=None),
            "max": max(values, default=None),
            **{f"mean_{name}": _mean(found) for name, found in sides.items()},
            **{f"values_{name}": len(found) for name, found in sides.items()},
            "spread": spread,
            "spread_sample": sample,
            "spread_weighted": weighted,
            "weight": self.weight,
            "outcome_weight": self.outcome_weight,
            "outweighs": self.outcome_weight is not None
            and (weighted or 0.0) > abs(self.outcome_weight),
            "seconds": round(self.seconds, 3),
        }

    def to_dict(self) -> dict[str, Any]:
        """All rows and the summary, as JSON has them."""
        rows = [{**vars(row), "outcome": _null(row.outcome), "value": _null(row.value)}
                for row in self.rows]  # fmt: skip
        return {
            "reward": self.reward,
            "use": self.use,
            "options": self.options,
            "files": list(self.files),
            "step": self.step,
            "outcomes_by_rule": self.by_rule,
            "summary": self.summary(),
            "metrics": [[name, _null(value)] for name, value in self.metrics],
            "faults": list(self.faults),
            "rows": rows,
        }

    def print(self, console: Console) -> None:
        """The table of the first rows, the summary, and what went wrong."""
        console.print(self._table(console.width))
        if (left := len(self.rows) - ROWS) > 0:
            console.print(f"... and {left} more (--json writes all of them)\n", highlight=False)
        for line in self._lines():
            console.print(line)
        self._print_faults(console)

    # -- parts ---------------------------------------------------------------------------------

    def _spread(self) -> tuple[float | None, str | None]:
        """The largest difference within a group, and its sample."""
        groups: dict[int, list[TriedRow]] = {}
        for row in self.rows:
            groups.setdefault(row.group, []).append(row)
        found = [
            (max(values) - min(values), members[0].id)
            for members in groups.values()
            if (values := _values(members))
        ]
        return max(found, key=lambda item: item[0], default=(None, None))

    def _table(self, width: int) -> Table:
        shown = self.rows[:ROWS]
        names = min(max(len(row.id) for row in shown), width // 5)
        last = max(8, len(self.reward), *(min(len(row.reason), REASON) for row in shown))
        last = min(last, width * 2 // 5)
        table = Table(box=box.SIMPLE_HEAD, pad_edge=False, collapse_padding=True)
        table.add_column("sample", width=max(names, 6), no_wrap=True)
        table.add_column("", width=1)
        table.add_column("completion", no_wrap=True)
        table.add_column(self.reward, width=last, no_wrap=True, justify="right")
        room = max(width - max(names, 6) - last - 9, 10)
        before = None
        for row in shown:
            name = Text(_clean(row.id) if row.group != before else "", style="cyan")
            before = row.group
            table.add_row(name, _mark(row.outcome), Text(_middle(row.text, room)), _value(row))
        return table

    def _lines(self) -> list[Text]:
        found = self.summary()
        where = self.files[0] if len(self.files) == 1 else f"{len(self.files)} files"
        step = "" if self.step is None else f", step {self.step}"
        lines = [
            Text(f"{where}{step}: {_count(found['rows'], 'completion')} in "
                 f"{_count(found['groups'], 'group')}, {self.seconds:.2f} s"),
            Text(f"{_count(found['values'], 'value')}, {found['none']} none, "
                 f"{found['invalid']} invalid", style="red" if found["invalid"] else ""),
        ]  # fmt: skip
        if found["values"]:
            low, high = _number(found["min"]), _number(found["max"])
            means = [f"mean {_number(found['mean'])} (from {low} to {high})"]
            means += [
                f"of {name} answers {_number(found[f'mean_{name}'])}"
                for name in ("right", "wrong")
                if found[f"mean_{name}"] is not None
            ]
            lines.append(Text(", ".join(means)))
            lines.append(self._weighed(found))
        if self.by_rule:
            lines.append(Text("the file says of no row whether it is right; `accuracy` was asked"))
        lines += [Text(f"logged {_clean(name)}: {_number(value)}") for name, value in self.metrics]
        return lines

    def _weighed(self, found: dict[str, Any]) -> Text:
        line = Text(
            f"largest difference within a group {_number(found['spread'])} "
            f"(sample {_clean(found['spread_sample'])!r})"
        )
        if self.outcome_weight is None:
            return line
        line.append(
            f"; times the weight {self.weight:g} it is {found['spread_weighted']:.3g}, "
            f"and right or wrong counts {self.outcome_weight:g}"
        )
        if found["outweighs"]:
            line.append(": it outweighs the outcome, so give it less weight", style="yellow")
        return line

    def _print_faults(self, console: Console) -> None:
        """Each message once, with the samples it cost and its last traceback."""
        messages = list(dict.fromkeys(fault["message"] for fault in self.faults))
        for message in messages[:FAULTS]:
            faults = [fault for fault in self.faults if fault["message"] == message]
            lost = sum(fault["lost"] for fault in faults)
            samples = dict.fromkeys(s for f in faults if f["lost"] for s in f["samples"])
            cost = "a second try, group by group, gave all values"
            if lost:
                named = ", ".join(repr(_clean(sample)) for sample in list(samples)[:SAMPLES])
                more = " ..." if len(samples) > SAMPLES else ""
                cost = f"{_count(lost, 'value')} invalid, of sample {named}{more}"
            console.print()
            console.print(Text.assemble((_clean(message), "red"), f" ({cost})"), soft_wrap=True)
            if trace := faults[-1]["trace"]:
                console.print(Text(_clean(trace.rstrip()), style="dim"), soft_wrap=True)
        if (left := len(messages) - FAULTS) > 0:
            console.print(f"\n... and {left} more faults (--json writes all of them)")


def _values(rows: Iterable[TriedRow]) -> list[float]:
    return [row.value for row in rows if not math.isnan(row.value)]


def _mean(values: Sequence[float]) -> float | None:
    return math.fsum(values) / len(values) if values else None


def _null(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _number(value: float) -> str:
    return f"{value + 0.0:.4g}"  # without the sign of a zero


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" + ("" if number == 1 else "s")


def _mark(outcome: float) -> Text:
    if math.isnan(outcome):
        return Text("?", style="dim")
    return Text("✓", style="green") if outcome else Text("✗", style="red")


def _value(row: TriedRow) -> Text:
    if row.reason:
        return Text(_clean(" ".join(row.reason.split())), style="red", overflow="ellipsis")
    return Text("none", style="dim") if math.isnan(row.value) else Text(_number(row.value))


def _clean(text: str) -> str:
    """Without lone surrogates, which cannot be printed."""
    return text.encode(errors="replace").decode()


def _middle(text: str, room: int) -> str:
    """On one line of `room` characters, latents counted, the middle left out: an answer stands at
    the end.
    """
    text = SPAN.sub(lambda found: f"[{_count(found[1].count('<|'), 'latent')}]", _clean(text))
    text = " ".join(text.split())
    if len(text) <= room:
        return text
    head = (room - 3) // 2
    return f"{text[:head]}...{text[head + 3 - room :]}"

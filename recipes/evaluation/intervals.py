"""95 % intervals of what an evaluation measures: a share of right answers, and a mean of grades."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

Z = 1.959963984540054  # 97.5 % of a standard normal distribution lie below
DRAWS = 10_000  # resamples of a bootstrap
_CELLS = 10_000_000  # numbers of a block of resamples: 80 MB


@dataclass(frozen=True)
class Figure:
    """A measured value with its 95 % interval, over `count` answers; NaN where there is none.
    `share`: whether it is one, from 0 to 1.
    """

    value: float
    low: float
    high: float
    count: int
    share: bool = False

    def to_dict(self) -> dict[str, float | int | None]:
        """Plain values for JSON: null for NaN."""
        numbers = {"value": self.value, "low": self.low, "high": self.high}
        plain = {k: None if math.isnan(v) else float(v) for k, v in numbers.items()}
        return {**plain, "count": self.count}


def share(right: int, count: int) -> Figure:
    """right/count with Wilson's score interval; NaN for a `count` of 0.

    Unlike p ± 1.96·√(p(1-p)/n) it stays within [0, 1] and has a width where all or none are right.
    Source: E. B. Wilson, "Probable inference", J. Am. Stat. Assoc. 22 (1927).
    """
    if count == 0:
        return Figure(math.nan, math.nan, math.nan, 0, True)
    p, z2 = right / count, Z * Z
    middle = p + z2 / (2 * count)
    half = Z * math.sqrt(p * (1 - p) / count + z2 / (4 * count * count))
    scale = 1 + z2 / count
    # At the ends the formula gives 0 or 1 but for rounding.
    low = 0.0 if right == 0 else (middle - half) / scale
    high = 1.0 if right == count else (middle + half) / scale
    return Figure(p, low, high, count, True)


def mean(values: Sequence[float], seed: int = 0) -> Figure:
    """The mean with its percentile bootstrap interval, the same for the same `seed`.

    Values are resampled by how often each occurs in a resample, which is multinomial: the same
    distribution as drawing them one by one, and fast for grades, of which there are few. Of a
    single value there is no interval. Where all values are equal its width is 0, which says only
    that none of them differed.
    """
    if not len(values):
        return Figure(math.nan, math.nan, math.nan, 0)
    found, counts = np.unique(np.asarray(values, dtype=np.float64), return_counts=True)
    total = int(counts.sum())
    value = float(found @ counts / total)
    if total == 1:
        return Figure(value, math.nan, math.nan, 1)
    rng = np.random.default_rng(seed)
    block = max(1, _CELLS // len(found))
    means = [
        rng.multinomial(total, counts / total, size=min(block, DRAWS - start)) @ found / total
        for start in range(0, DRAWS, block)
    ]
    low, high = np.percentile(np.concatenate(means), [2.5, 97.5])
    return Figure(value, float(low), float(high), total)

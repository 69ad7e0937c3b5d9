"""The picture of a selection by visual gain."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure

INK, FAINT, BLUE = "#333333", "#bbbbbb", "#0072b2"


def draw_selection(rows: Sequence[tuple[float, float, bool]], n: int, path: str | Path) -> None:
    """Draw, as a PNG at `path`, how many rows have which gain, and their success with hints against
    that without. Each row is p_text, p_hint and whether it is kept; `n` answers a probe make the
    steps of both axes.
    """
    p_text, p_hint = (np.array([row[i] for row in rows], dtype=float) for i in range(2))
    kept = np.array([row[2] for row in rows], dtype=bool)
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    _gains(left, p_hint - p_text, kept, n)
    _rates(right, p_text, p_hint, n)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(colors=INK)
    figure.savefig(path, dpi=120, format="png")


def _gains(axes: Axes, gain: np.ndarray, kept: np.ndarray, n: int) -> None:
    edges = (np.arange(-n, n + 2) - 0.5) / n
    parts = {"kept": (gain[kept], BLUE), "not kept": (gain[~kept], FAINT)}
    axes.hist(
        [values for values, _ in parts.values()],
        bins=edges.tolist(),
        stacked=True,
        color=[colour for _, colour in parts.values()],
        label=[f"{name} ({len(values)})" for name, (values, _) in parts.items()],
        rwidth=0.9,
    )
    axes.axvline(0, color=INK, linewidth=0.8, linestyle=":")
    axes.set_title("Visual gain", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("gain: success with hints minus success without")
    axes.set_ylabel("rows")
    axes.legend(frameon=False)


def _rates(axes: Axes, p_text: np.ndarray, p_hint: np.ndarray, n: int) -> None:
    edges = (np.arange(n + 2) - 0.5) / n
    counts, _, _ = np.histogram2d(p_text, p_hint, bins=(edges, edges))
    if counts.any():
        shown = np.ma.masked_equal(counts.T, 0)
        mesh = axes.pcolormesh(
            edges, edges, shown, cmap="Blues", norm=LogNorm(0.5, max(counts.max(), 2)), linewidth=0
        )
        axes.figure.colorbar(mesh, ax=axes, label="rows")
    axes.plot([0, 1], [0, 1], color=INK, linewidth=0.8, linestyle=":")
    axes.set_aspect("equal")
    axes.set_title("Success in the two probes", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("p_text: without hints")
    axes.set_ylabel("p_hint: with hints")

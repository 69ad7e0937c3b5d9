"""The picture of a measurement of gradients."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

INK, FAINT = "#333333", "#999999"
# Told apart by colour-blind readers too.
COLOURS = {"visual": "#0072b2", "question": "#e69f00", "answer": "#d55e00", "latent": "#009e73"}
NAMES = {
    "visual": "visual tokens",
    "question": "question text",
    "answer": "answer text",
    "latent": "latents",
}
Lines = Sequence[dict[str, Any]]  # of gradients.jsonl, in order


def quarters(lines: Lines) -> tuple[Lines, Lines]:
    """The first and the last quarter of the updates, at least one each."""
    size = max(1, len(lines) // 4)
    return lines[:size], lines[-size:]


def mean_norm(lines: Lines, kind: str) -> float | None:
    """The mean over updates of the norm at the input embeddings; None if none had such tokens."""
    norms = [norm for line in lines if (norm := line["norms"][kind]) is not None]
    return float(np.mean(norms)) if norms else None


def mean_length(lines: Lines, kind: str) -> float:
    """The mean over updates of the length of the input embeddings themselves, where there are such
    tokens.
    """
    return float(np.mean([row[0] for line in lines if (row := line["lengths"][kind]) is not None]))


def draw_gradients(lines: Lines, path: str | Path) -> None:
    """Draw, as a PNG at `path`, norms at the input embeddings over updates, and norms over the
    depth of the decoder in the first and in the last quarter of the updates.
    """
    figure = Figure(figsize=(12, 4.6), layout="constrained")
    left, right = figure.subplots(1, 2)
    _updates(left, lines)
    _depth(right, lines)
    for axes in (left, right):
        _log(axes)
        axes.set_ylabel("mean L2 norm of the gradient at a token")
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color(FAINT)
        axes.tick_params(colors=INK, labelsize=9)
        axes.grid(axis="y", color="#eeeeee")
    figure.savefig(path, dpi=120, format="png")


def _updates(axes: Axes, lines: Lines) -> None:
    # Few points are measurements, not a curve: show each of them.
    marker = "o" if len(lines) <= 20 else None
    for kind, name in NAMES.items():
        points = [(line["step"], line["norms"][kind]) for line in lines]
        points = [point for point in points if point[1] is not None]
        if points:
            steps, norms = zip(*points, strict=True)
            colour = COLOURS[kind]
            axes.plot(steps, norms, color=colour, label=name, linewidth=1.4, marker=marker, ms=4)
    axes.set_title("At the input embeddings", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("update")
    axes.legend(frameon=False, fontsize=9)


def _depth(axes: Axes, lines: Lines) -> None:
    first, last = quarters(lines)
    for part, style, which in ((first, ":", "first"), (last, "-", "last")):
        axes.plot([], [], style, color=INK, label=f"{which} quarter of the updates")
        for kind in NAMES:
            rows = [row for line in part if (row := line["layers"][kind]) is not None]
            if rows:
                norms = np.mean(rows, axis=0)
                places = np.arange(len(norms))
                axes.plot(
                    places, norms, style, color=COLOURS[kind], linewidth=1.6, marker="o", ms=3
                )
    axes.set_title("Where tokens enter a decoder layer", loc="left", fontsize=11, color=INK)
    axes.set_xlabel("layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend(frameon=False, fontsize=9)


def _log(axes: Axes) -> None:
    """A logarithmic axis, which would have nothing to show where all norms are zero."""
    drawn = [np.asarray(line.get_ydata(), dtype=float) for line in axes.get_lines()]
    if any((norms > 0).any() for norms in drawn):
        axes.set_yscale("log", nonpositive="mask")

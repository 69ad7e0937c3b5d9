"""The quickstart's two pictures: how training went, and what the latents of one clip looked
like.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, FAINT = "#333333", "#999999"
BLUE, ORANGE, GREEN = "#0072b2", "#d55e00", "#009e73"  # told apart by colour-blind readers too

# Panels of `learning_curves`: stage, title, y axis, and the history keys drawn in it with their
# legend.
PANELS: tuple[tuple[str, str, str, dict[str, str]], ...] = (
    ("sft", "SFT: loss", "loss", {"loss_text": "text", "loss_latent": "latent alignment"}),
    ("sft", "SFT: validation", "accuracy", {"validation_accuracy": "right answers"}),
    (
        "rl",
        "RL: reward",
        "mean",
        {"reward": "reward", "outcome": "right answers", "validation_accuracy": "validation"},
    ),
    ("rl", "RL: answers that imagine", "share", {"imagined": "with a latent span"}),
    ("rl", "RL: entropy", "nats per token", {"entropy": "entropy"}),
    (
        "rl",
        "RL: groups with right and wrong answers",
        "share",
        {"groups_trained": "trained on"},
    ),
)
SHARES = {"accuracy", "share"}  # y axes that run from 0 to 1
CHANCE = 0.25


def learning_curves(history: Iterable[Mapping[str, Any]], path: str | Path) -> None:
    """Draw six panels of training history as a PNG at `path`.

    Each row of `history` has `stage` ("sft" or "rl"), `step`, and any of the keys named in
    `PANELS`; rows without a key are skipped for its curve, so that validation may be rarer than
    training. Other stages are not drawn.
    """
    rows = list(history)
    figure = Figure(figsize=(12, 6.4), layout="constrained")
    for axes, (stage, title, label, curves) in zip(figure.subplots(2, 3).flat, PANELS, strict=True):
        _panel(axes, [row for row in rows if row["stage"] == stage], curves)
        axes.set_title(title, loc="left", fontsize=11, color=INK)
        axes.set_xlabel("step")
        axes.set_ylabel(label)
        if label == "loss":
            axes.set_yscale("log")
        if label in SHARES:
            axes.set_ylim(0, 1.02)
        if label == "accuracy":
            axes.axhline(CHANCE, color=FAINT, linewidth=1, linestyle=":")
            axes.annotate(
                "chance",
                (1, CHANCE),
                (-2, 3),
                ("axes fraction", "data"),
                "offset points",
                ha="right",
            )
    figure.savefig(path, dpi=120)


def _panel(axes: Axes, rows: Sequence[Mapping[str, Any]], curves: Mapping[str, str]) -> None:
    drawn = 0
    for (key, label), colour in zip(curves.items(), (BLUE, ORANGE, GREEN), strict=False):
        points = [(row["step"], row[key]) for row in rows if row.get(key) is not None]
        if not points:
            continue
        # Few points are measurements, not a curve: show each of them.
        marker = "o" if len(points) <= 20 else None
        axes.plot(
            *zip(*points, strict=True),
            color=colour,
            label=label,
            linewidth=1.6,
            marker=marker,
            markersize=4,
        )
        drawn += 1
    if not drawn:
        axes.text(0.5, 0.5, "nothing recorded", transform=axes.transAxes, ha="center", color=FAINT)
    elif (last := max(row["step"] for row in rows)) > 0:
        axes.set_xlim(0, last * 1.02)  # the same for all panels of a stage
    if drawn > 1:
        axes.legend(frameon=False, fontsize=9)
    axes.spines[["top", "right"]].set_visible(False)
    axes.spines[["left", "bottom"]].set_color(FAINT)
    axes.tick_params(colors=INK, labelsize=9)
    axes.grid(axis="y", color="#eeeeee")


def imagination(
    path: str | Path,
    observed: np.ndarray,
    future: np.ndarray,
    nearest: Sequence[np.ndarray],
    title: str,
) -> None:
    """Draw one clip and what was imagined of it as a PNG at `path`.

    `observed` and `future` are frames, one a state: uint8 [T, H, W, 3]. `nearest` holds for each
    latent the frame whose feature it is nearest to; the first latent stands for the last observed
    state, the anchor. Columns are states, so an imagined frame stands under the true one; a green
    rim says that they agree, an orange one not.
    """
    truth = [*observed, *future]
    anchor = len(observed) - 1
    columns = max(len(truth), anchor + len(nearest))
    figure = Figure(figsize=(1.35 * columns + 1.2, 5.7), layout="constrained")
    grid = figure.subplots(3, columns, squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for state, frame in enumerate(truth):
        row = 0 if state < len(observed) else 1
        _frame(grid[row, state], frame, f"state {state + 1}", FAINT)
    for number, frame in enumerate(nearest):
        state = anchor + number
        agrees = state < len(truth) and _alike(frame, truth[state])
        label = "latent 0\n(anchor)" if number == 0 else f"latent {number}"
        _frame(grid[2, state], frame, label, GREEN if agrees else ORANGE, rim=3)
    for row, name in enumerate(("shown", "true\nfuture", "imagined")):
        first = grid[row, 0]
        first.text(
            -0.12,
            0.5,
            name,
            transform=first.transAxes,
            ha="right",
            va="center",
            fontsize=12,
            color=INK,
        )
    figure.supxlabel(
        "Each latent is drawn as the frame whose feature it is nearest to. Green rim: the true "
        "state; orange: another.",
        fontsize=10,
        color=INK,
    )
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, color=INK)
    figure.savefig(path, dpi=120)


def _frame(axes: Axes, frame: np.ndarray, label: str, colour: str, rim: float = 1) -> None:
    axes.set_axis_on()
    axes.imshow(frame, interpolation="nearest")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set(color=colour, linewidth=rim)
    axes.set_xlabel(label, fontsize=9, color=INK)


def _alike(one: np.ndarray, other: np.ndarray) -> bool:
    """Whether two frames show the same, up to the rounding of a video codec."""
    return (
        one.shape == other.shape and float(np.abs(one.astype(int) - other.astype(int)).mean()) < 3.0
    )

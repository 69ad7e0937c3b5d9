"""What happens beside training: metrics on disk, a progress bar."""

from __future__ import annotations

import math
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.run_folder import RunFolder

# What a line on the screen shows of a log, where it is there: name in the log, name and format
# here.
_SHOWN = {
    "loss": ("loss", "{:.4f}"),
    "loss_text": ("text", "{:.4f}"),
    "loss_latent": ("latents", "{:.4f}"),
    "reward": ("reward", "{:.3f}"),
    "rewards/accuracy/mean": ("accuracy", "{:.1%}"),
    "latents/share_imagining": ("imagining", "{:.1%}"),
    "groups/trained": ("groups trained", "{:.0%}"),
    "replay/max_gap": ("replay gap", "{:.1e}"),
    "validation/accuracy": ("validation accuracy", "{:.1%}"),
    "validation/share_imagining": ("imagining", "{:.1%}"),
}


def progress_bar(console: Console, *, transient: bool = False) -> Progress:
    """The bar that everything slow shows."""
    return Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=transient,
    )


class MetricsFile(TrainerCallback):
    """Appends every log to the run's metrics."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs") or {}
        values = {k: v for k, v in logs.items() if isinstance(v, int | float) and math.isfinite(v)}
        if state.is_world_process_zero and values:
            self._run.log(state.global_step, values)


class TrainingProgress(TrainerCallback):
    """A bar over the steps, and a line a log above it. `steps` says after how many training will
    be stopped, where that is before its end.
    """

    def __init__(self, console: Console, name: str, steps: int | None = None) -> None:
        self._console, self._name, self._steps = console, name, steps
        self._bar = progress_bar(console)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.start()
        self._task = self._bar.add_task(
            self._name, total=self._steps or state.max_steps, completed=state.global_step
        )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._bar.update(self._task, completed=state.global_step)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        logs = kwargs.get("logs") or {}
        shown = [
            f"{name} {form.format(logs[k])}" for k, (name, form) in _SHOWN.items() if k in logs
        ]
        if shown:
            self._console.print(
                f"step {state.global_step}/{self._steps or state.max_steps}  " + "  ".join(shown),
                highlight=False,
                soft_wrap=True,
            )

    def stop(self) -> None:
        """Take the bar off the screen; also after an error."""
        self._bar.stop()

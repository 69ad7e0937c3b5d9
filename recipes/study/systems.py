"""The systems that the study knows, and what their tables look like."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, Protocol

from rich.console import Console

from recipes.study.chain import LABELS, Chain
from recipes.study.lessons import DEPTH_SCALING, VIDEO_LATENT, Lessons, Taught
from recipes.study.seed import Scale
from recipes.study.table import COST, HOPS, Columns, Figures
from recipes.study.variants import VARIANTS

Name = Literal["future_l1", "video_latent", "depth_scaling"]


class SeedOfSystem(Protocol):
    """One seed of a system's study."""

    def figures(self, variants: Sequence[str]) -> dict[str, Figures]:
        """Run or resume what is missing; the figures by the rows of the table."""
        ...


@dataclass(frozen=True)
class System:
    """A table: which `variants` may be asked for, the `labels` of all its rows, its `columns`."""

    name: Name
    title: str
    variants: tuple[str, ...]
    labels: Mapping[str, str]
    columns: Columns
    rows: Mapping[str, Taught] | None = None  # of a system whose rows are single SFT runs
    hops: int = 1  # of all questions there; the system's recipe has latents for their moves

    def seed(
        self, folder: Path, seed: int, scale: Scale, console: Console, world: str
    ) -> SeedOfSystem:
        """One seed in `folder`, which the systems share."""
        if self.rows is None:
            return Chain(folder, seed, scale, console, world)
        return Lessons(folder, seed, scale, console, world, self.name, self.rows, self.hops)

    def tables(self, root: Path) -> Path:
        """Where the tables of a world go whose folder is `root`."""
        return root if self.rows is None else root / self.name


def _of_lessons(name: Name, title: str, rows: Mapping[str, Taught]) -> System:
    labels = {key: row.label for key, row in rows.items()}
    return System(name, title, tuple(rows), labels, COST, rows)


SYSTEMS: dict[str, System] = {
    "future_l1": System("future_l1", "Held-out accuracy in %", tuple(VARIANTS), LABELS, HOPS),
    "video_latent": _of_lessons("video_latent", "VideoLatent-style, held out", VIDEO_LATENT),
    "depth_scaling": _of_lessons("depth_scaling", "Depth scaling, held out", DEPTH_SCALING),
}

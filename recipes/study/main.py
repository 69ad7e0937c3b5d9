"""`foresight study`: the three systems and their ablations on a world of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.quickstart.main import settle_torch
from recipes.study.seed import Scale
from recipes.study.systems import SYSTEMS
from recipes.study.table import MOST_SEEDS, Figures, study_table
from recipes.study.world import SETTINGS
from rl.errors import RecipeError
from rl.writing import write_json, write_text


def run_study(
    output: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] | None = None,
    console: Console | None = None,
    scale: Scale | None = None,
    world: str = "tiles",
    system: str = "future_l1",
) -> dict[str, Any]:
    """Run or resume the study of a system, or of some of its `variants`, in ``output/world``.

    Writes ``results.json`` and ``table.md`` after each seed, there for Future-L1 and in a folder of
    its own for another system, and returns what the former says. What runs is below ``seed<N>``,
    whose clips and perception the systems share. Raises `RecipeError` for an unknown system,
    variant or world.
    """
    console, root = console or Console(), Path(output, world).resolve()
    if system not in SYSTEMS:
        raise RecipeError(f"--system: {system!r} is unknown; choose of {', '.join(SYSTEMS)}")
    chosen = SYSTEMS[system]
    wanted = chosen.variants if variants is None else variants
    if unknown := [name for name in wanted if name not in chosen.variants]:
        raise RecipeError(
            f"--variants: {unknown[0]!r} is unknown; choose of {', '.join(chosen.variants)}"
        )
    if world not in SETTINGS:
        raise RecipeError(f"--world: {world!r} is unknown; choose of {', '.join(SETTINGS)}")
    if len(set(seeds)) < len(seeds) or not 1 <= len(seeds) <= MOST_SEEDS:
        raise RecipeError(
            f"--seeds: {list(seeds)}; give 1 to {MOST_SEEDS} different ones, for the intervals"
        )
    settle_torch()
    found: dict[str, list[Figures]] = {}
    results: dict[str, Any] = {}
    folder = chosen.tables(root)
    for done, seed in enumerate(seeds, start=1):
        console.rule(f"[bold]seed {seed}", align="left")
        one = chosen.seed(root / f"seed{seed}", seed, scale or Scale(), console, world)
        for name, values in one.figures(wanted).items():
            found.setdefault(name, []).append(values)
        results = {"seeds": list(seeds[:done]), "figures": found}
        write_json(folder / "results.json", results)
        title = f"{chosen.title}, {world}, seeds {', '.join(map(str, seeds[:done]))}"
        table = study_table(found, chosen.labels, chosen.columns, title)
        write_text(folder / "table.md", table.markdown() + "\n")
        console.print(table.rich())
    console.print(
        f"The table is in {folder / 'table.md'}, the figures in {folder / 'results.json'}."
    )
    return results

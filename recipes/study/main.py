"""`foresight study`: Future-L1's four recipes and their ablations on a world of their own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from recipes.quickstart.main import settle_torch
from recipes.study.chain import ZERO_SHOT, Chain, Scale
from recipes.study.table import MOST_SEEDS, Figures, figures, study_table
from recipes.study.variants import VARIANTS
from recipes.study.world import SETTINGS
from rl.errors import RecipeError
from rl.writing import write_json, write_text


def run_study(
    output: str | Path,
    seeds: Sequence[int] = (0, 1, 2),
    variants: Sequence[str] = tuple(VARIANTS),
    console: Console | None = None,
    scale: Scale | None = None,
    world: str = "tiles",
) -> dict[str, Any]:
    """Run or resume the study in ``output/world``; writes ``results.json`` and ``table.md`` there
    after each seed, and returns what the former says. Raises `RecipeError` for an unknown variant
    or world.
    """
    console, root = console or Console(), Path(output, world).resolve()
    if unknown := [name for name in variants if name not in VARIANTS]:
        raise RecipeError(f"--variants: {unknown[0]!r} is unknown; choose of {', '.join(VARIANTS)}")
    if world not in SETTINGS:
        raise RecipeError(f"--world: {world!r} is unknown; choose of {', '.join(SETTINGS)}")
    if len(set(seeds)) < len(seeds) or not 1 <= len(seeds) <= MOST_SEEDS:
        raise RecipeError(
            f"--seeds: {list(seeds)}; give 1 to {MOST_SEEDS} different ones, for the intervals"
        )
    settle_torch()
    found: dict[str, list[Figures]] = {}
    results: dict[str, Any] = {}
    for done, seed in enumerate(seeds, start=1):
        chain = Chain(root / f"seed{seed}", seed, scale or Scale(), console, world)
        for name, values in _run_seed(chain, variants, console).items():
            found.setdefault(name, []).append(values)
        results = {"seeds": list(seeds[:done]), "figures": found}
        write_json(root / "results.json", results)
        title = f"Held-out accuracy in %, {world}, seeds {', '.join(map(str, seeds[:done]))}"
        table = study_table(found, _labels(), title)
        write_text(root / "table.md", table.markdown() + "\n")
        console.print(table.rich())
    console.print(f"The table is in {root / 'table.md'}, the figures in {root / 'results.json'}.")
    return results


def _run_seed(chain: Chain, variants: Sequence[str], console: Console) -> dict[str, Figures]:
    """The figures of one seed by the rows of the table."""
    evaluations: dict[str, Any] = {}
    console.rule(f"[bold]seed {chain.seed}", align="left")
    chain.prepare()
    evaluations[ZERO_SHOT] = chain.evaluate(ZERO_SHOT)
    chain.select()
    for variant in variants:
        chain.train(variant)
        if (sft := VARIANTS[variant].sft) not in evaluations:
            evaluations[sft] = chain.evaluate(sft)
        evaluations[variant] = chain.evaluate(variant)
    return {name: figures(evaluations[name]) for name in _labels() if name in evaluations}


def _labels() -> dict[str, str]:
    """The table's rows in their order."""
    labels = {ZERO_SHOT: "zero-shot", "sft": "SFT"}
    for name, variant in VARIANTS.items():
        if variant.sft != "sft":
            labels[variant.sft] = f"{variant.label}: SFT"
            labels[name] = f"{variant.label}: RL"
        else:
            labels[name] = variant.label
    return labels

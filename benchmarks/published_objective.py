"""The released objective of Future-L1 against ours, from the same SFT policy: prints a table.

    python -m benchmarks.published_objective recipes/study/la_dapo.yaml \\
        --set policy.path=$PWD/runs/study/seed0/sft/policy \\
        --set data.train=$PWD/runs/study/seed0/select/kept.jsonl \\
        --set evaluation.manifest=$PWD/runs/study/seed0/world/held_out.jsonl

The recipe is an LA-DAPO recipe of a small model; paths given by ``--set`` start from its folder,
and it needs an `evaluation`. Each row is trained on every seed, for the recipe's steps. Between
ours and the published objective stands ours without what the release lacks, noise and a term for
latents, so that what is left is what the release computes wrongly. The neighbours' cosine is of
sampled latents of the same span (`rl.latent_stats`), at the first step and over the last quarter
of steps; the gap is the mean distance of the trainer's scores from the sampler's log-probs.
"""

from __future__ import annotations

import argparse
import io
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev

import torch
from rich.console import Console

from recipes.loading import load_recipe
from recipes.run import run_recipe

_STILL = ["policy.noise_scale=0", "train.latent_alpha=0", "train.latent_beta=0"]
VARIANTS: dict[str, list[str]] = {
    "ours": [],
    "ours, latents without noise and term": _STILL,
    "published (baseline)": [*_STILL, "train.objective=published", "train.max_mismatch=null"],
}
COLUMNS = {
    "accuracy": "held-out accuracy, %",
    "before": "neighbours' cosine, first step",
    "after": "last quarter",
    "gap": "gap to the sampler",
}


def measure(recipe: Path, changes: Sequence[str], seed: int) -> dict[str, float]:
    """One run's figures, by the names of `COLUMNS`; those it does not log are left out."""
    with tempfile.TemporaryDirectory() as folder:
        settings = [*changes, f"seed={seed}", f"output={folder}/run", "train.log_every=1"]
        result = run_recipe(load_recipe(recipe, settings), Console(file=io.StringIO()))
        lines = [json.loads(line) for line in (result.output / "metrics.jsonl").open()]
    if result.evaluation is None:
        raise SystemExit(f"{recipe} has no `evaluation`; add one, or --set evaluation.manifest=…")
    mode = next(iter(result.evaluation["modes"].values()))
    found = {"accuracy": 100.0 * mode["accuracy"]}
    cosines = [c for line in lines if (c := line.get("latents/neighbour_cosine")) is not None]
    if cosines:
        found |= {"before": cosines[0], "after": fmean(cosines[-max(1, len(cosines) // 4) :])}
    gaps = [line["published/gap"] for line in lines if "published/gap" in line]
    return found | ({"gap": fmean(gaps)} if gaps else {})


def _cell(values: Sequence[float], digits: int) -> str:
    if not values:
        return "-"
    spread = f" (sd {stdev(values):.{digits}f})" if len(values) > 1 else ""
    return f"{fmean(values):.{digits}f}{spread}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("recipe", type=Path)
    parser.add_argument("--set", dest="changes", action="append", default=[], metavar="KEY=VALUE")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    torch.set_flush_denormal(True)
    print(f"| {len(args.seeds)} seeds | {' | '.join(COLUMNS.values())} |")
    print("|---" * (len(COLUMNS) + 1) + "|")
    for name, changes in VARIANTS.items():
        runs = [measure(args.recipe, [*args.changes, *changes], seed) for seed in args.seeds]
        cells = [
            _cell([run[column] for run in runs if column in run], 1 if column == "accuracy" else 2)
            for column in COLUMNS
        ]
        print(f"| {name} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()

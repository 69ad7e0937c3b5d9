"""What the parts of LA-DAPO do in the quickstart world: prints the table of `docs/quickstart.md`.

    python -m benchmarks.quickstart_ablation runs/quickstart

Starts from the SFT policy of a finished quickstart and trains it once a variant, judged on the
validation clips (the held-out clips stay unseen). About a minute a variant on two cores.
"""

from __future__ import annotations

import argparse
import io
import tempfile
from pathlib import Path

import torch
from rich.console import Console

from recipes.loading import load_recipe
from recipes.run import run_recipe

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "la_dapo.yaml"
VARIANTS: dict[str, list[str]] = {
    "as in the quickstart (α 0.5, β_z 0.1)": [],
    "no latent KL (β_z 0)": ["train.latent_beta=0"],
    "no latent term, no latent KL (α 0, β_z 0)": ["train.latent_alpha=0", "train.latent_beta=0"],
    "latent KL alone (α 0)": ["train.latent_alpha=0"],
    "half the learning rate": ["train.learning_rate=5.0e-5"],
    "half the learning rate, no latent KL": [
        "train.learning_rate=5.0e-5",
        "train.latent_beta=0",
    ],
    "accuracy reward alone": ["rewards=[{use: accuracy, weight: 1.0}]"],
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("quickstart", type=Path, help="folder of a finished quickstart")
    root = parser.parse_args().quickstart.resolve()
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    torch.set_flush_denormal(True)
    paths = [
        f"policy.path={root / 'sft_mix' / 'policy'}",
        f"data.train={root / 'world' / 'rl.jsonl'}",
        f"data.validation={root / 'world' / 'validation.jsonl'}",
        f"evaluation.manifest={root / 'world' / 'validation.jsonl'}",
        "train.validate_every=null",
    ]
    print("| variant | accuracy, % | imagining forced, % | answers that imagine |")
    print("|---|---|---|---|")
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder:
            recipe = load_recipe(RECIPE, [*paths, f"output={folder}/run", *changes])
            modes = (run_recipe(recipe, Console(file=io.StringIO())).evaluation or {})["modes"]
        free, always = modes["free"], modes["always"]
        print(
            f"| {name} | {100 * free['accuracy']:.1f} | {100 * always['accuracy']:.1f} | "
            f"{free['imagining']:.0%} |",
            flush=True,
        )


if __name__ == "__main__":
    main()

"""Future-L1 on one seed: a model that can answer, the four recipes and their variants.

Each stage reads what the one before wrote, and is finished or resumed when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recipes.quickstart.world import write_jsonl
from recipes.stages import run_stage
from recipes.study.seed import Changes, Seed
from recipes.study.table import Figures, by_hops
from recipes.study.variants import SFT, VARIANTS
from recipes.study.world import Style, row_of
from rl.data.manifest import read_manifest

ZERO_SHOT = "zero_shot"
Part = tuple[str, range, Style]  # clips of a split, and how their rows are written


class Chain(Seed):
    """The stages of one seed in `folder`, made as they are asked for."""

    def figures(self, variants: Sequence[str]) -> dict[str, Figures]:
        """The figures of this seed by the rows of the table, in the order of `LABELS`."""
        self.prepare(self.scale.candidates)
        evaluations = {ZERO_SHOT: self.evaluate(ZERO_SHOT)}
        self.select()
        for variant in variants:
            self.train(variant)
            if (sft := VARIANTS[variant].sft) not in evaluations:
                evaluations[sft] = self.evaluate(sft)
            evaluations[variant] = self.evaluate(variant)
        return {name: by_hops(evaluations[name]) for name in LABELS if name in evaluations}

    def prepare(self, clips: int) -> None:
        """The world, a tiny model that sees, and that model when it has learned to answer."""
        super().prepare(clips)
        scale = self.scale
        base = range(min(scale.base, scale.candidates))
        self._rows("candidates", ("train", range(scale.candidates), "latents"))
        self._rows("base", ("train", base[::2], "seen"), ("train", base[1::2], "direct"))
        self._rows("held_out", ("held_out", range(scale.held_out), "latents"))
        self._run("base", "base", {"policy.path": self.perceived})

    def select(self) -> None:
        """Visual gain. The kept rows are written once more with their states in words."""
        self._run("select", "select", {})
        kept = read_manifest(self.folder / "select" / "kept.jsonl")
        rows = []
        for sample in kept:
            split, _, number = sample.id.rpartition("-")
            row = row_of(self.setting, self.seed, split, int(number) - 1, "text")
            rows.append(row | {"video": sample.video})
        write_jsonl(self.folder / "select" / "kept_text.jsonl", rows)

    def train(self, variant: str) -> None:
        """SFT, where this variant's has not run yet, and LA-DAPO."""
        chosen = VARIANTS[variant]
        data = {"data.train": self._kept(chosen.sft)}
        self._run("sft", chosen.sft, data)
        start = {"policy.path": self.folder / chosen.sft / "policy"}
        self._run("la_dapo", variant, {**start, **data, **chosen.rl})

    def evaluate(self, name: str) -> dict[str, Any]:
        """The held-out figures of what stage or variant `name` trained, as `Evaluation.to_dict`."""
        run = "base" if name == ZERO_SHOT else name
        changes: Changes = {"policy.path": self.folder / run / "policy"}
        sft = VARIANTS[name].sft if name in VARIANTS else name
        if name == ZERO_SHOT or SFT[sft] == "text":
            changes["benchmarks.0.modes"] = ["never"]
        self._run("evaluate", f"held_out/{name}", changes)
        results = self.folder / "held_out" / name / "results.json"
        return json.loads(results.read_text())["benchmarks"]["held_out"]

    def _kept(self, sft: str) -> Path:
        name = "kept" if SFT[sft] == "latents" else "kept_text"
        return self.folder / "select" / f"{name}.jsonl"

    def _run(self, recipe: str, name: str, changes: Changes) -> None:
        """Run ``<recipe>.yaml`` in the folder `name`."""
        paths = {
            "base": {"data.train": self.world / "base.jsonl"},
            "select": {
                "data.candidates": self.world / "candidates.jsonl",
                "policy.path": self.folder / "base" / "policy",
            },
            "sft": {"policy.path": self.folder / "base" / "policy"},
            "evaluate": {"benchmarks.0.data": self.world / "held_out.jsonl"},
        }
        run_stage(self.recipe(recipe, name, paths.get(recipe, {}) | changes), self.console)

    def _rows(self, name: str, *parts: Part) -> None:
        """Write the manifest `name` of the world."""
        self.manifest(
            name,
            [
                row_of(self.setting, self.seed, split, index, style)
                for split, indices, style in parts
                for index in indices
            ],
        )


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


LABELS = _labels()

"""One seed of the study: a world, a model that can answer, the four recipes and their variants.

Each stage reads what the one before wrote, and is finished or resumed when it is started again.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from transformers import AutoProcessor, set_seed

from recipes.callbacks import progress_bar
from recipes.loading import load_any_recipe
from recipes.quickstart.checkpoint import make_checkpoint
from recipes.quickstart.perception import Perception, pretrain
from recipes.quickstart.world import write_jsonl
from recipes.stages import run_stage
from recipes.study.variants import SFT, VARIANTS, Changes
from recipes.study.world import LATENTS, SETTINGS, Style, row_of
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.export import whole_folder
from rl.policy.heads import HeadConfig
from rl.policy.model import make_policy
from rl.policy.protocol import LatentProtocol

ZERO_SHOT = "zero_shot"
Part = tuple[str, range, Style]  # clips of a split, and how their rows are written
# Twice what is taught, as Future-L1 allows at inference.
PROTOCOL = LatentProtocol(min_length=1, max_length=2 * LATENTS, max_spans=2)


@dataclass(frozen=True)
class Scale:
    """How much of everything. `changes` are those of the recipes, by stage."""

    candidates: int = 3072
    base: int = 3072
    held_out: int = 1024
    perception: Perception | None = None  # by default what the world needs
    changes: dict[str, Changes] = field(default_factory=dict)


class Chain:
    """The stages of one seed in `folder`, made as they are asked for."""

    def __init__(
        self, folder: Path, seed: int, scale: Scale, console: Console, world: str = "tiles"
    ) -> None:
        self.folder, self.seed, self.scale, self.console = folder, seed, scale, console
        self.setting, self.world = SETTINGS[world], folder / "world"

    def prepare(self) -> None:
        """The world, a tiny model that sees, and that model when it has learned to answer."""
        self._write_world()
        self._perceive()
        self._run("base", "base", {"policy.path": self.folder / "perception"})

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
        values: Changes = {"seed": self.seed, "output": self.folder / name, "name": name}
        values |= paths.get(recipe, {}) | changes | self.scale.changes.get(recipe, {})
        file = Path(__file__).with_name(f"{recipe}.yaml")
        settings = [f"{key}={json.dumps(v, default=str)}" for key, v in values.items()]
        run_stage(load_any_recipe(file, settings), self.console)

    def _write_world(self) -> None:
        scale, seed = self.scale, self.seed
        with progress_bar(self.console, transient=True) as bar:
            for split, count in (("train", scale.candidates), ("held_out", scale.held_out)):
                task = bar.add_task(f"{split} clips", total=count)
                self.setting.write(
                    self.world,
                    split,
                    count,
                    seed,
                    lambda done, _, task=task: bar.update(task, completed=done),
                )
        candidates = range(scale.candidates)
        base = range(min(scale.base, scale.candidates))
        self._rows("candidates", ("train", candidates, "latents"))
        self._rows("base", ("train", base[::2], "seen"), ("train", base[1::2], "direct"))
        self._rows("held_out", ("held_out", range(scale.held_out), "latents"))

    def _rows(self, name: str, *parts: Part) -> None:
        """Write the manifest `name` of the world."""
        rows = [
            row_of(self.setting, self.seed, split, index, style)
            for split, indices, style in parts
            for index in indices
        ]
        write_jsonl(self.world / f"{name}.jsonl", rows)

    def _perceive(self) -> None:
        plain = self.folder / "plain"
        if not plain.is_dir():
            with whole_folder(plain) as draft:
                make_checkpoint(draft, self.seed, self.setting.world)
        processor = AutoProcessor.from_pretrained(plain)
        set_seed(self.seed)  # the latent head is drawn
        policy = make_policy(plain, processor, PROTOCOL, HeadConfig("linear"))
        samples = read_manifest(self.world / "train.jsonl")
        media = MediaProcessor(processor)
        config = replace(self.scale.perception or self.setting.perception, seed=self.seed)
        pretrain(policy, media, samples, self.folder / "perception", config, self.setting.world)

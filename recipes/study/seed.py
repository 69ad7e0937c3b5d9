"""One seed of the study, as all systems share it: a world, a tiny checkpoint, its perception.

Each part is finished or resumed when it is started again.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
from recipes.schema import RecipeBase
from recipes.study.world import LATENTS, SETTINGS, Row
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.export import whole_folder
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol

Changes = dict[str, Any]  # of a recipe: dotted key to value

# Future-L1's, twice what is taught, as it allows at inference. Other systems' recipes change it.
PROTOCOL = LatentProtocol(min_length=1, max_length=2 * LATENTS, max_spans=2)


@dataclass(frozen=True)
class Scale:
    """How much of everything. `changes` are those of the recipes, by the name of their file."""

    candidates: int = 3072
    base: int = 3072  # also what perception is learned from
    lessons: int = 8192  # clips of the systems whose rows are single SFT runs
    held_out: int = 1024
    perception: Perception | None = None  # by default what the world needs
    changes: dict[str, Changes] = field(default_factory=dict)


class Seed:
    """The world of one seed in `folder`, and what runs in it."""

    def __init__(
        self, folder: Path, seed: int, scale: Scale, console: Console, world: str = "tiles"
    ) -> None:
        self.folder, self.seed, self.scale, self.console = folder, seed, scale, console
        self.setting, self.world = SETTINGS[world], folder / "world"

    @property
    def perceived(self) -> Path:
        """The tiny model that sees."""
        return self.folder / "perception"

    def prepare(self, clips: int) -> None:
        """So many clips to train on, those held out, and a tiny model that sees."""
        self._write_clips(clips)
        self._perceive()

    def manifest(self, name: str, rows: Iterable[Row]) -> Path:
        """Write `rows` beside the clips."""
        return write_jsonl(self.world / f"{name}.jsonl", rows)

    def recipe(self, file: str, name: str, changes: Changes) -> RecipeBase:
        """``<file>.yaml`` beside this module, to run in the folder `name`."""
        values: Changes = {"seed": self.seed, "output": self.folder / name, "name": name}
        values |= changes | self.scale.changes.get(file, {})
        settings = [f"{key}={json.dumps(v, default=str)}" for key, v in values.items()]
        return load_any_recipe(Path(__file__).with_name(f"{file}.yaml"), settings)

    def _write_clips(self, clips: int) -> None:
        scale, seed = self.scale, self.seed
        with progress_bar(self.console, transient=True) as bar:
            for split, count in (("train", clips), ("held_out", scale.held_out)):
                task = bar.add_task(f"{split} clips", total=count)
                self.setting.write(
                    self.world,
                    split,
                    count,
                    seed,
                    lambda done, _, task=task: bar.update(task, completed=done),
                )

    def _perceive(self) -> None:
        plain = self.folder / "plain"
        if not plain.is_dir():
            with whole_folder(plain) as draft:
                make_checkpoint(draft, self.seed, self.setting.world)
        processor = AutoProcessor.from_pretrained(plain)
        set_seed(self.seed)  # the latent head is drawn
        policy = make_policy(plain, processor, PROTOCOL, HeadConfig("linear"))
        samples = read_manifest(self.world / "train.jsonl", limit=self.scale.base)
        media = MediaProcessor(processor)
        config = replace(self.scale.perception or self.setting.perception, seed=self.seed)
        pretrain(policy, media, samples, self.perceived, config, self.setting.world)

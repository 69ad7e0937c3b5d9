"""VideoLatent and visual-enhanced depth scaling on one seed: a row of the table is an SFT run.

All of a table's rows see the same clips in as many updates, and differ in the keys named here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rich.console import Console

from recipes.run import run_recipe
from recipes.schema import SFTRecipe
from recipes.study.seed import Changes, Scale, Seed
from recipes.study.table import Figures, by_cost
from recipes.study.world import row_of


@dataclass(frozen=True)
class Taught:
    """A row of a table, and what it changes in its system's recipe."""

    label: str
    changes: Changes = field(default_factory=dict)


# Answers without a latent, whatever the recipe says about them.
_NO_SPANS: Changes = {"evaluation.modes": ["never"], "train.bptt_steps": None}
_DIRECT: Changes = {
    **_NO_SPANS,
    "train.start_latents": None,
    "train.curriculum": None,
    "train.latents": "teacher",
}
# A curriculum with no stage but the first, in which every step is text.
_CHAIN: Changes = {
    **_NO_SPANS,
    "train.start_latents": None,
    "train.curriculum": {"steps_per_stage": 1, "max_stage": 0},
    "policy.min_length": 1,
}

_NO_INJECTION: Changes = {"policy.injection": None}

VIDEO_LATENT = {
    "direct": Taught("direct answer", _DIRECT | _NO_INJECTION),
    "chain": Taught("explicit chain of thought", _CHAIN | _NO_INJECTION),
    "self_forcing": Taught("self-forcing"),
    "no_injection": Taught("without injection", _NO_INJECTION),
    "no_align": Taught("without alignment", {"train.align_weight": 0.0}),
    "no_diversity": Taught("without diversity", {"train.diversity_weight": 0.0}),
    "question": Taught("aligned to what the question attends to", {"train.align_to": "question"}),
    "truncated": Taught("truncated, m = 2", {"train.bptt_steps": 2}),
    "pause": Taught("pause: no gradient through latents", {"train.latents": "own"}),
}

# The clips that are shown have 32 tokens: replayed 8 at a time, three latents leave a quarter out.
_REPLAY: Changes = {"policy.visual_replay": {"tokens": 8, "window": [1, 2, 2]}}
_DEPTH: Changes = {"policy.depth": {}}

DEPTH_SCALING = {
    "direct": Taught("direct answer", _DIRECT),
    "chain": Taught("explicit chain of thought", _CHAIN),
    "curriculum": Taught("curriculum"),
    "replay": Taught("+ visual replay", _REPLAY),
    "depth": Taught("+ depth scaling", _DEPTH),
    "both": Taught("+ both", _REPLAY | _DEPTH),
}


class Lessons(Seed):
    """The rows of one system on one seed: ``<system>.yaml`` with the changes of `rows`, asked about
    what is `hops` further on.
    """

    def __init__(
        self,
        folder: Path,
        seed: int,
        scale: Scale,
        console: Console,
        world: str,
        system: str,
        rows: Mapping[str, Taught],
        hops: int,
    ) -> None:
        super().__init__(folder, seed, scale, console, world)
        self.system, self.rows, self.hops = system, rows, hops

    def figures(self, variants: Sequence[str]) -> dict[str, Figures]:
        """The figures of this seed by the rows of the table, in its order."""
        self.prepare(self.scale.lessons)
        data: Changes = {
            "data.train": self._asked("train", self.scale.lessons),
            "evaluation.manifest": self._asked("held_out", self.scale.held_out),
        }
        chosen = [name for name in self.rows if name in variants]
        return {name: self._teach(name, data) for name in chosen}

    def _asked(self, split: str, count: int) -> Path:
        """The manifest of the questions about a split's clips."""
        asked = (self.setting, self.seed, split)
        rows = (row_of(*asked, i, "steps", self.hops) for i in range(count))
        return self.manifest(f"{split}_hop{self.hops}", rows)

    def _teach(self, name: str, data: Changes) -> Figures:
        """The figures of a row, which is trained if it is not yet."""
        changes = {"policy.path": self.perceived, **data, **self.rows[name].changes}
        recipe = self.recipe(self.system, f"{self.system}/{name}", changes)
        assert isinstance(recipe, SFTRecipe)
        result = run_recipe(recipe, self.console)
        assert result.evaluation is not None
        return by_cost(result.evaluation, _seconds(result.output / "metrics.jsonl"))


def _seconds(metrics: Path) -> float:
    """How long a run trained, over all its calls that came to an end."""
    rows = map(json.loads, metrics.read_text().splitlines())
    return sum(row.get("train_runtime", 0.0) for row in rows)

"""What latents are for: the same answers with nothing, words, empty steps or latents before them.

    python -m benchmarks.latents_for runs/latents_for --world balls --seeds 0 1 2

Makes a world, and for each seed a tiny Qwen3-VL that learns to see it. From there, each variant is
taught with the same recipe (steps, batch, rate, clips), and differs only in what stands before the
answer:

- direct: nothing;
- text: one word a state, the cell of the ball; with two balls, both cells of every second state;
- pause: one and the same word at each step;
- latents: one latent a state, pulled to the pooled feature of that state;
- unaligned: the same without the pull. In training the true features are fed all the same, so
  its greedy latents are of another kind than those that it learned from;
- text_all: both balls' cells in every state, which takes seven steps more; only with two balls.

Text, pause and latents take the same number of decoding steps: one for each state from the last one
shown on, and two more, the start and the end of the span or the first and the last word. All seeds
share the clips. Prints a table with the held-out clips, or, with ``--split validation``, those to
decide on, and a second one that says how far greedy latents stay with the true states. What is
finished in the folder is not trained again.
"""

from __future__ import annotations

import argparse
import io
import itertools
import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from transformers import AutoProcessor

from recipes.loading import load_recipe
from recipes.quickstart import balls, texts
from recipes.quickstart.balls import BALLS, PERCEPTION_STEPS, write_balls
from recipes.quickstart.checkpoint import make_checkpoint
from recipes.quickstart.main import settle_torch
from recipes.quickstart.perception import Perception, pretrain
from recipes.quickstart.tiles import TILES
from recipes.quickstart.visions import look_up
from recipes.quickstart.world import render, write_world
from recipes.quickstart.worlds import World
from recipes.run import run_recipe
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.export import whole_folder
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.writing import write_json, write_text

RECIPE = Path(__file__).parents[1] / "recipes" / "quickstart" / "sft_imagine.yaml"
SPLITS = {"train": 2048, "validation": 512, "held_out": 512}
LOOKED_UP = 64  # clips whose latents are looked up

LATENT = ("latents", "unaligned")  # the variants with spans

Row = dict[str, Any]


@dataclass(frozen=True)
class Compared:
    """One world with what is written of its states, and how long is learned."""

    world: World
    write: Callable[[Path, str, int, int], object]
    chain: Callable[[Row], list[str]]  # a word for each imagined state
    chain_all: Callable[[Row], list[str]] | None
    perception: Perception
    steps: int  # of each variant
    places: Callable[[Row], np.ndarray]  # the cell of each ball in each state: int64 [T, balls]
    draw: Callable[[Row, np.ndarray], np.ndarray]  # (row, places) -> frames, one a state
    balls: tuple[str, ...]  # names


def tile_chain(row: Row) -> list[str]:
    return [texts.cell(*place) for place in row["path"][TILES.observed - 1 :]]


def ball_chain(row: Row) -> list[str]:
    """Both balls, as often as seven words allow: after every second move."""
    words, cells = texts.cells(), row["cells"][BALLS.observed - 1 :]
    return [words[c] for c in (cells[0][0], *cells[2], *cells[4], *cells[6])]


def ball_chain_all(row: Row) -> list[str]:
    words = texts.cells()
    return [words[c] for state in row["cells"][BALLS.observed - 1 :] for c in state]


def tile_frames(row: Row, places: np.ndarray) -> np.ndarray:
    return render(np.array(row["board"]), np.stack(np.divmod(places[:, 0], texts.SIZE), -1))


def ball_frames(row: Row, places: np.ndarray) -> np.ndarray:
    paths = np.stack(np.divmod(places, texts.SIZE), -1)
    return balls.render(balls.Clip(np.array(row["board"]), paths))


SETTINGS = {
    "tiles": Compared(
        TILES,
        write_world,
        tile_chain,
        None,
        Perception(),
        260,
        lambda row: np.array(row["path"]) @ [[texts.SIZE], [1]],
        tile_frames,
        ("ball",),
    ),
    "balls": Compared(
        BALLS,
        write_balls,
        ball_chain,
        ball_chain_all,
        Perception(steps=PERCEPTION_STEPS),
        480,
        lambda row: np.array(row["cells"]),
        ball_frames,
        balls.NAMES,
    ),
}


def taught(row: Row, variant: str, setting: Compared) -> Row:
    """The manifest row that teaches `variant`."""
    if variant in LATENT:
        return row
    row = row | {"imagine": []}
    if variant == "direct":
        return row
    if variant == "pause":
        words = [texts.NEXT] * (len(setting.chain(row)) + 2)
    else:
        chain = setting.chain_all if variant == "text_all" else setting.chain
        assert chain is not None
        words = [texts.WHERE, *chain(row), texts.READ]
    return row | {"reasoning": ["".join(f" {word}" for word in words)]}


def variants(setting: Compared) -> list[str]:
    every = ["direct", "text", "pause", "latents", "unaligned"]
    return [*every, "text_all"] if setting.chain_all else every


@dataclass(frozen=True)
class Comparison:
    """The runs of one world in a folder."""

    root: Path
    setting: Compared
    split: str
    steps: int
    console: Console

    def prepare(self) -> None:
        """Write the clips and a manifest a variant."""
        for split, count in SPLITS.items():
            self.setting.write(self.root / "world", split, count, 0)
        rows = (self.root / "world" / "train.jsonl").read_text().splitlines()
        for variant in variants(self.setting):
            lines = [json.dumps(taught(json.loads(row), variant, self.setting)) for row in rows]
            write_text(self.manifest(f"train-{variant}"), "\n".join(lines) + "\n")

    def manifest(self, name: str) -> Path:
        return self.root / "world" / f"{name}.jsonl"

    def perceive(self, seed: int) -> list[Row]:
        """Pretrain the checkpoint of `seed`."""
        world, folder = self.setting.world, self.root / str(seed)
        plain = folder / "plain"
        if not plain.is_dir():
            with whole_folder(plain) as draft:
                make_checkpoint(draft, seed, world)
        processor = AutoProcessor.from_pretrained(plain)
        latents = world.states - world.observed + 1
        protocol = LatentProtocol(min_length=latents, max_length=latents, max_spans=1)
        torch.manual_seed(seed)  # the latent head is drawn
        policy = make_policy(plain, processor, protocol, HeadConfig("linear"))
        samples, media = read_manifest(self.manifest("train")), MediaProcessor(processor)
        config = replace(self.setting.perception, seed=seed)
        return pretrain(policy, media, samples, self.perceived(seed), config, world)

    def perceived(self, seed: int) -> Path:
        return self.root / str(seed) / "perception"

    def run(self, variant: str, seed: int) -> Row:
        """Teach one variant; its greedy score and the CPU seconds of this process."""
        folder = self.root / str(seed) / f"{variant}-{self.steps}"
        figures = folder / f"{self.split}.json"
        if figures.is_file():
            return json.loads(figures.read_text())
        changes = {
            "seed": seed,
            "output": folder,
            "policy.path": self.perceived(seed),
            "data.train": self.manifest(f"train-{variant}"),
            "data.validation": None,
            "evaluation": {"manifest": str(self.manifest(self.split)), "modes": ["free"]},
            "train.validate_every": None,
            "train.max_steps": self.steps,
            "train.save_every": self.steps,
            "train.max_completion_length": 32,
            "train.reasoning_template": "{reasoning}",
            "train.latent_weight": 0.0 if variant == "unaligned" else 2.0,
            "train.start_at_mean": variant in LATENT,  # without spans there is no mean
        }
        recipe: Any = load_recipe(
            RECIPE, [f"{key}={json.dumps(v, default=str)}" for key, v in changes.items()]
        )
        started = time.process_time()
        score = (run_recipe(recipe, self.console).evaluation or {})["modes"]["free"]
        row = {**score, "cpu_s": time.process_time() - started}
        write_json(figures, row)
        return row

    def followed(self, seed: int) -> np.ndarray:
        """Of greedy latents the share that is nearest to a state with a ball where it truly is:
        [steps, balls], in `LOOKED_UP` clips.

        Looked up are all states of the clip's board in which no two balls share a cell.
        """
        samples = read_manifest(self.manifest(self.split), limit=LOOKED_UP)
        places = [self.setting.places(sample.extra) for sample in samples]
        number = places[0].shape[1]
        cells = np.array(list(itertools.permutations(range(texts.SIZE**2), number)))
        galleries = [self.setting.draw(sample.extra, cells) for sample in samples]
        policy = self.root / str(seed) / f"latents-{self.steps}" / "policy"
        first = self.setting.world.observed - 1
        return np.mean(
            [
                cells[nearest] == true[first:]
                for (_, nearest), true in zip(
                    look_up(policy, samples, galleries), places, strict=True
                )
            ],
            axis=0,
        )


def drift(followed: dict[int, np.ndarray], names: Sequence[str]) -> str:
    """A row a seed and ball: how many latents have it where it truly is, step by step."""
    steps = len(next(iter(followed.values())))
    lines = [
        f"| latents true, % | {' | '.join(f'state {k}' for k in range(steps))} |",
        "|---" * (steps + 1) + "|",
    ]
    for seed, shares in followed.items():
        for name, share in zip(names, shares.T, strict=True):
            lines.append(f"| seed {seed}, {name} | {' | '.join(f'{100 * s:.0f}' for s in share)} |")
    return "\n".join(lines)


def table(scores: dict[str, dict[int, Row]]) -> str:
    """A row a variant: accuracy of each seed, their mean, decoding steps and CPU seconds."""
    seeds = sorted(next(iter(scores.values())))
    lines = [
        f"| variant | {' | '.join(f'seed {s}, %' for s in seeds)} | mean, % | steps | CPU s |",
        "|---" * (len(seeds) + 4) + "|",
    ]
    for variant, runs in scores.items():
        accuracies = [100 * runs[seed]["accuracy"] for seed in seeds]
        last = runs[seeds[-1]]
        cells = [*(f"{a:.1f}" for a in accuracies), f"{statistics.mean(accuracies):.1f}"]
        cells += [f"{last['tokens'] + last['latents']:.0f}", f"{last['cpu_s']:.0f}"]
        lines.append(f"| {variant} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--world", choices=SETTINGS, default="balls")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--variants", nargs="+", help="default: all")
    parser.add_argument("--steps", type=int, help="of each variant; default: 260 or 480")
    parser.add_argument("--split", choices=["validation", "held_out"], default="held_out")
    options = parser.parse_args(arguments)
    setting = SETTINGS[options.world]
    known = variants(setting)
    if unknown := set(options.variants or ()) - set(known):
        parser.error(f"--variants: {min(unknown)!r} is unknown here; choose of {', '.join(known)}")
    settle_torch()
    torch.set_num_threads(1)
    console = Console(file=io.StringIO())
    root = options.folder.resolve() / options.world
    steps = options.steps or setting.steps
    comparison = Comparison(root, setting, options.split, steps, console)
    comparison.prepare()
    scores: dict[str, dict[int, Row]] = {v: {} for v in options.variants or known}
    for seed in options.seeds:
        seen = comparison.perceive(seed)[-1]
        print(f"seed {seed}, perception: {seen}", flush=True)
        for variant, runs in scores.items():
            runs[seed] = comparison.run(variant, seed)
            print(f"seed {seed}, {variant}: {runs[seed]}", flush=True)
    print(table(scores))
    if "latents" in scores:
        followed = {seed: comparison.followed(seed) for seed in options.seeds}
        print(drift(followed, setting.balls))


if __name__ == "__main__":
    main()

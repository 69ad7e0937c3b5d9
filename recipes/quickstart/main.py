"""The quickstart: a tiny video model learns to imagine, from video files to an exported policy.

Everything is the product on small data: MP4 files decoded by decord, the real Qwen3-VL classes and
processor, SFT and LA-DAPO recipes run by `run_recipe`, Ray workers. Only the world, the tiny
checkpoint and its pretraining are made here. Each part is finished or resumed when the quickstart
is started again in the same folder.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table
from transformers import AutoProcessor

from recipes.callbacks import progress_bar
from recipes.loading import load_recipe
from recipes.quickstart.checkpoint import make_checkpoint
from recipes.quickstart.perception import Perception, pretrain
from recipes.quickstart.pictures import imagination, learning_curves
from recipes.quickstart.visions import see
from recipes.quickstart.world import FUTURE, write_world
from recipes.run import RunResult, run_recipe
from rl.data.manifest import read_manifest
from rl.data.media import MediaProcessor
from rl.errors import RecipeError
from rl.export import whole_folder
from rl.policy.heads import HeadConfig
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.writing import write_json

SPLITS = {"train": 2048, "rl": 1024, "validation": 256, "held_out": 1024}
LATENTS = 1 + FUTURE  # the last observed state, then each future one
PROTOCOL = LatentProtocol(min_length=LATENTS, max_length=LATENTS, max_spans=1)
LOOKED_UP = 128  # held-out clips whose latents are looked up
MODES = {"free": "left free", "always": "forced", "never": "forbidden"}
# The recipes beside this file, in their order.
STAGES = {
    "sft_imagine": "SFT: it learns to imagine the future",
    "sft_mix": "SFT: it learns to answer with and without imagining",
    "la_dapo": "LA-DAPO: it learns when to imagine, from right and wrong alone",
}


@dataclass(frozen=True)
class Folders:
    """Where the quickstart keeps what."""

    root: Path

    @property
    def world(self) -> Path:
        return self.root / "world"

    @property
    def perception(self) -> Path:
        return self.root / "perception"

    def stage(self, name: str) -> Path:
        return self.root / name


def run_quickstart(
    output: str | Path, seed: int = 0, console: Console | None = None
) -> dict[str, Any]:
    """Run or resume the whole chain in `output`; returns what `summary.json` there says.

    Raises `RecipeError` when the folder holds a quickstart of another seed.
    """
    console = console or Console()
    folders, started = Folders(Path(output).resolve()), time.perf_counter()
    _claim(folders.root, seed)
    settle_torch()

    with _part(console, 1, "a world of videos"):
        _write_videos(folders, seed, console)
    with _part(console, 2, "a tiny Qwen3-VL learns to see"):
        _perceive(folders, seed)
    results: dict[str, RunResult] = {}
    for number, (stage, title) in enumerate(STAGES.items(), start=3):
        with _part(console, number, title):
            results[stage] = run_recipe(_recipe(folders, stage, seed), console)

    before, after = (results[s].evaluation for s in ("sft_mix", "la_dapo"))
    assert before is not None and after is not None
    policy = results["la_dapo"].policy
    curves, vision = folders.root / "curves.png", folders.root / "imagination.png"
    with _part(console, 6, "pictures"):
        learning_curves(_history(folders), curves)
        clips = read_manifest(folders.world / "held_out.jsonl", limit=LOOKED_UP)
        with console.status("looking latents up"):
            seen = {s: see(results[s].policy, clips) for s in ("sft_mix", "la_dapo")}
        first = seen["la_dapo"][0]
        imagination(vision, first.observed, first.future, first.nearest, first.title)
    true = {s: float(np.mean([v.agreement for v in visions])) for s, visions in seen.items()}

    summary = {
        "seed": seed,
        "seconds": round(time.perf_counter() - started, 1),
        "held_out": {"after_sft": before, "after_rl": after},
        "latents_true": {"after_sft": true["sft_mix"], "after_rl": true["la_dapo"]},
        "policy": str(policy),
        "pictures": [str(curves), str(vision)],
    }
    write_json(folders.root / "summary.json", summary)
    console.print()
    console.print(results_table(before, after))
    console.print(
        f"Of the latents of {LOOKED_UP} held-out clips, {true['sft_mix']:.1%} are nearest to the "
        f"true state after SFT, {true['la_dapo']:.1%} after RL (imagining forced)."
    )
    console.print(f"{summary['seconds']:.0f} s. Learning curves: {curves}")
    console.print(f"What it imagined of one clip: {vision}")
    console.print(f"The trained policy is in {policy}. To load it:")
    console.print(
        f'    from rl import load_policy; policy = load_policy("{policy}")', soft_wrap=True
    )
    return summary


def settle_torch() -> None:
    """Settings of torch that suit so small a model: few threads, and no time lost to numbers that
    are next to nothing.
    """
    torch.set_num_threads(min(torch.get_num_threads(), 2))
    for name in ("float32", "float64"):
        np.finfo(name)  # asks for the smallest number there is, and would warn afterwards
    torch.set_flush_denormal(True)


def results_table(before: dict[str, Any], after: dict[str, Any]) -> Table:
    """Accuracy on the held-out clips after SFT and after RL, mode by mode."""
    answers = before["modes"]["free"]["answers"]
    table = Table(
        title=f"{answers} held-out clips, greedy answers",
        title_justify="left",
        box=SIMPLE,
        pad_edge=False,
    )
    table.add_column("imagining", no_wrap=True)
    for heading in ("after SFT, %", "after RL, %", "gain", "imagined", "spans/answer"):
        table.add_column(heading, justify="right", no_wrap=True)
    for mode, name in MODES.items():
        old, new = before["modes"][mode], after["modes"][mode]
        table.add_row(
            name,
            *(f"{100 * m['accuracy']:.1f} ± {100 * m['standard_error']:.1f}" for m in (old, new)),
            f"{100 * (new['accuracy'] - old['accuracy']):+.1f}",
            f"{old['imagining']:.0%} → {new['imagining']:.0%}",
            f"{old['spans']:.2f} → {new['spans']:.2f}",
        )
    return table


def _claim(root: Path, seed: int) -> None:
    """Remember the seed of a folder; refuse to mix two."""
    path = root / "quickstart.json"
    if path.is_file() and (there := json.loads(path.read_text())["seed"]) != seed:
        raise RecipeError(
            f"{root} holds a quickstart with seed {there}, this one has seed {seed}; choose "
            "another --output, or delete the folder"
        )
    write_json(path, {"seed": seed})


@contextmanager
def _part(console: Console, number: int, title: str) -> Iterator[None]:
    console.rule(f"[bold]{number}. {title}", align="left", style="dim")
    started = time.perf_counter()
    yield
    console.print(f"[dim]{time.perf_counter() - started:.0f} s[/dim]")


def _write_videos(folders: Folders, seed: int, console: Console) -> None:
    with progress_bar(console) as bar:
        for split, count in SPLITS.items():
            task = bar.add_task(f"{split} clips", total=count)
            write_world(
                folders.world,
                split,
                count,
                seed,
                lambda done, _, task=task: bar.update(task, completed=done),
            )


def _perceive(folders: Folders, seed: int) -> None:
    plain = folders.root / "plain"
    if not plain.is_dir():
        with whole_folder(plain) as draft:
            make_checkpoint(draft, seed)
    processor = AutoProcessor.from_pretrained(plain)
    policy = make_policy(plain, processor, PROTOCOL, HeadConfig("linear"))
    samples = read_manifest(folders.world / "train.jsonl")
    pretrain(policy, MediaProcessor(processor), samples, folders.perception, Perception(seed=seed))


def _recipe(folders: Folders, stage: str, seed: int) -> Any:
    """The stage's recipe, with the paths of this quickstart."""
    path = Path(__file__).with_name(f"{stage}.yaml")
    first, *_ = stages = list(STAGES)
    if stage == first:
        start = folders.perception
    else:
        start = folders.stage(stages[stages.index(stage) - 1]) / "policy"
    changes = {"seed": seed, "output": folders.stage(stage), "policy.path": start}
    changes["data.train"] = folders.world / ("rl.jsonl" if stage == "la_dapo" else "train.jsonl")
    changes["data.validation"] = folders.world / "validation.jsonl"
    if stage != first:
        changes["evaluation.manifest"] = folders.world / "held_out.jsonl"
    return load_recipe(path, [f"{key}={json.dumps(v, default=str)}" for key, v in changes.items()])


def _history(folders: Folders) -> Iterator[dict[str, Any]]:
    """Rows for `learning_curves` from the runs' metrics; the two SFT stages are drawn as one."""
    names = {
        "validation/accuracy": "validation_accuracy",
        "rewards/accuracy/mean": "outcome",
        "latents/share_imagining": "imagined",
        "groups/trained": "groups_trained",
    }
    offset = 0
    for stage in STAGES:
        kind = "rl" if stage == "la_dapo" else "sft"
        rows = [json.loads(line) for line in (folders.stage(stage) / "metrics.jsonl").open()]
        for row in rows:
            for old, new in names.items():
                row[new] = row.get(old)
            step = row["step"] + (offset if kind == "sft" else 0)
            yield {**row, "stage": kind, "step": step}
        offset += max(row["step"] for row in rows)

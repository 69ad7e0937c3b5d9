"""Whole runs on the tiny checkpoint: SFT and LA-DAPO, finished, killed and resumed."""

from __future__ import annotations

import io
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from recipes.evaluation.command import evaluate_policy
from recipes.loading import load_recipe
from recipes.run import RunResult, _last_checkpoint, run_recipe
from recipes.run_folder import RunFolder
from rl.checkpoints import STATE_FILE
from rl.errors import CheckpointError
from rl.policy.loading import load_policy
from tests.recipes.worlds import write_recipe

FORESIGHT = [sys.executable, "-c", "from recipes.cli import app; app()"]


def run(path: Path) -> tuple[RunResult, str]:
    console = Console(width=200, record=True, file=io.StringIO())
    return run_recipe(load_recipe(path), console), console.export_text()


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def sft(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, clips: Path) -> Path:
    """The recipe of an SFT run of 3 steps, finished."""
    folder = tmp_path_factory.mktemp("sft")
    manifest = clips / "manifest.jsonl"
    changes = {
        "stage": "sft",
        "policy": {"path": str(tiny_checkpoint), "max_length": 2, "head": {"kind": "linear"}},
        "data.validation": str(manifest),
        "train": {
            "max_steps": 3,
            "batch_size": 4,
            "micro_batch": 2,
            "learning_rate": 1e-2,
            "max_completion_length": 6,
            "save_every": 2,
            "validate_every": 2,
        },
        "evaluation": {"manifest": str(manifest), "modes": ["free", "always"], "by": "level"},
    }
    path = write_recipe(folder, tiny_checkpoint, manifest, changes)
    run(path)
    return path


def test_sft_run_leaves_everything(sft: Path) -> None:
    folder = sft.parent / "run"
    assert {p.name for p in folder.iterdir()} == {
        "recipe.yaml",
        "rows.json",
        "start",
        "checkpoints",
        "metrics.jsonl",
        "policy",
        "result.json",
    }
    lines = metrics(folder)
    assert [m["step"] for m in lines if "validation/accuracy" in m] == [0, 2, 3]
    assert [m["step"] for m in lines if "loss" in m] == [1, 2, 3]
    start, trained = load_policy(folder / "start"), load_policy(folder / "policy")
    assert not torch.equal(start.latent_head.weight, trained.latent_head.weight)
    result = json.loads((folder / "result.json").read_text())
    assert result["evaluation"]["modes"]["always"]["imagining"] == 1.0
    assert set(result["evaluation"]["breakdowns"]["level"]["free"]) == {"0", "1", "2", "3"}


def test_finished_run_returns_at_once(sft: Path) -> None:
    result, said = run(sft)
    assert "run is finished" in said
    assert (result.steps, result.resumed_from) == (3, None)
    assert result.evaluation is not None


def test_finished_run_is_evaluated_again_when_the_recipe_asks_for_other_figures(sft: Path) -> None:
    before = load_recipe(sft)
    policy = sft.parent / "run" / "policy" / "model.safetensors"
    written = policy.stat().st_mtime_ns

    def figures(*overrides: str) -> tuple[dict[str, Any] | None, str]:
        console = Console(width=200, record=True, file=io.StringIO())
        result = run_recipe(load_recipe(sft, overrides), console)
        return result.evaluation, console.export_text()

    old, said = figures()
    assert old is not None and "evaluating again" not in said
    none, said = figures("evaluation=null")
    assert none is None and "evaluating again" not in said
    changed = ("evaluation.modes=[never]", "evaluation.limit=2", "evaluation.by=null")
    new, said = figures(*changed)
    assert "run is finished" in said and "evaluation has changed since: evaluating again" in said
    assert new is not None and list(new["modes"]) == ["never"]
    assert new["modes"]["never"]["answers"] == 2
    stored = json.loads((sft.parent / "run" / "result.json").read_text())
    assert stored["evaluation"] == new and stored["evaluation_section"]["limit"] == 2
    same, said = figures(*changed)
    assert same == new and "evaluating again" not in said
    again, _ = figures()
    assert again == old and load_recipe(sft) == before
    assert policy.stat().st_mtime_ns == written  # nothing was trained or exported


def test_only_the_last_step_is_exported(sft: Path, tmp_path: Path) -> None:
    run_folder, recipe = RunFolder(tmp_path), load_recipe(sft)
    with pytest.raises(CheckpointError, match="of step 3, the last one: there is none"):
        _last_checkpoint(recipe, run_folder)
    for step in (2, 3):
        checkpoint = run_folder.checkpoints / f"checkpoint-{step}"
        checkpoint.mkdir(parents=True)
        (checkpoint / STATE_FILE).write_text(json.dumps({"step": step}))
        if step == 2:
            with pytest.raises(CheckpointError, match="the newest is of step 2"):
                _last_checkpoint(recipe, run_folder)
    assert _last_checkpoint(recipe, run_folder).name == "checkpoint-3"


def test_run_killed_after_training_only_finishes(sft: Path) -> None:
    folder = sft.parent / "run"
    before = metrics(folder)
    (folder / "result.json").unlink()
    result, said = run(sft)
    assert "resuming from step 3 of 3" in said
    assert result.resumed_from == 3 and metrics(folder) == before


@pytest.mark.slow
def test_la_dapo_killed_and_resumed(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> None:
    steps, manifest = 12, clips / "manifest.jsonl"
    changes = {
        "train.max_steps": steps,
        "train.keep_checkpoints": 20,
        "train.validate_every": 4,
        "train.filter_low": 0.0,
        "data.validation": str(manifest),
        "evaluation": {"manifest": str(manifest), "modes": ["free"]},
    }
    path = write_recipe(tmp_path, tiny_checkpoint, manifest, changes)
    folder = RunFolder(tmp_path / "run")

    killed = subprocess.Popen([*FORESIGHT, "run", str(path)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while not (folder.checkpoints / "checkpoint-2" / STATE_FILE).is_file():
        assert killed.poll() is None and time.monotonic() < deadline
        time.sleep(0.02)
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert folder.result() is None
    # A checkpoint that the kill interrupted.
    (folder.checkpoints / f"checkpoint-{steps}").mkdir()

    again = subprocess.run(
        [*FORESIGHT, "run", str(path)], capture_output=True, text=True, timeout=240
    )
    assert again.returncode == 0, again.stderr
    assert f"ignoring checkpoint-{steps}: it was not written to its end" in again.stdout
    resumed = int(again.stdout.split("resuming from step ")[1].split()[0])
    assert 2 <= resumed < steps
    assert f'load_policy("{folder.policy}")' in again.stdout.replace("\n", "")

    lines = metrics(folder.root)
    assert [m["step"] for m in lines if "reward" in m and "train_runtime" not in m] == list(
        range(1, steps + 1)
    )
    assert [m["step"] for m in lines if "validation/accuracy" in m] == [0, 4, 8, 12]
    assert max(m["replay/max_gap"] for m in lines if "replay/max_gap" in m) <= 1e-5
    assert load_policy(folder.policy).protocol.noise_scale == 0.1
    result, said = run(path)
    assert "is finished" in said and result.evaluation is not None

    evaluation = evaluate_policy(folder.root, manifest, modes=["never"], max_new_tokens=6)
    assert evaluation.scores["never"].answers == 4 and list(evaluation.scores) == ["never"]

"""What a run folder remembers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from recipes.loading import Recipe, load_recipe
from recipes.run_folder import RunFolder
from rl.checkpoints import STATE_FILE
from rl.errors import RecipeError
from tests.recipes.worlds import write_recipe


def recipe(folder: Path, changes: dict[str, Any] | None = None) -> Recipe:
    return load_recipe(write_recipe(folder, folder / "model", folder / "rows.jsonl", changes))


def checkpoint(run: RunFolder, step: int, whole: bool = True) -> Path:
    folder = run.checkpoints / f"checkpoint-{step}"
    folder.mkdir(parents=True)
    if whole:
        (folder / STATE_FILE).write_text(json.dumps({"step": step}))
    return folder


def test_claim_stores_the_whole_recipe(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.claim(recipe(tmp_path))
    assert load_recipe(run.recipe) == recipe(tmp_path)
    run.claim(recipe(tmp_path))  # the same again


def test_claim_refuses_another_recipe(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.claim(recipe(tmp_path))
    changed = recipe(tmp_path, {"train.learning_rate": 1.0, "train.lora": {"r": 2}, "seed": 5})
    with pytest.raises(
        RecipeError, match=r"seed, train\.learning_rate, train\.lora; to start anew"
    ):
        run.claim(changed)
    assert load_recipe(run.recipe) == recipe(tmp_path, {"seed": 0})


def test_claim_allows_what_changes_no_result(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    run.claim(recipe(tmp_path))
    run.claim(
        recipe(
            tmp_path,
            {
                "rollouts.workers": 3,
                "rollouts.ray": {"address": "x"},
                "train.save_every": 9,
                "data.media_cache_gb": 8,
            }
            | {"name": "new", "evaluation": {"manifest": "e.jsonl"}},
        )
    )
    assert load_recipe(run.recipe).name == "new"


def test_claim_refuses_checkpoints_of_unknown_origin(tmp_path: Path) -> None:
    run = RunFolder(tmp_path / "run")
    checkpoint(run, 1)
    with pytest.raises(RecipeError, match=r"no recipe\.yaml that says what they are of"):
        run.claim(recipe(tmp_path))


def test_resumption_takes_the_last_whole_checkpoint(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.resumption().checkpoint is None
    checkpoint(run, 4)
    ten = checkpoint(run, 10)
    checkpoint(run, 14, whole=False)
    found = run.resumption()
    assert (found.checkpoint, found.step, found.incomplete) == (ten, 10, ("checkpoint-14",))


def test_metrics_after_the_checkpoint_are_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    checkpoint(run, 2)
    for step in range(5):
        run.log(step, {"loss": step / 10})
    with run.metrics.open("a") as file:
        file.write('{"step": 5, "lo')  # killed while writing
    run.resumption()
    assert [json.loads(line)["step"] for line in run.metrics.read_text().splitlines()] == [0, 1, 2]


def test_metrics_of_a_run_without_checkpoint_are_dropped(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    run.log(0, {"validation/accuracy": 0.5})
    run.resumption()
    assert run.metrics.read_text() == ""


def test_a_resumed_run_says_that_its_rows_have_changed(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.claim_rows(["a", "b"], resumes=True) is None  # of a run that stored none
    assert run.claim_rows(["a", "b"], resumes=True) is None
    assert run.claim_rows(["a", "b", "c"], resumes=False) is None  # a fresh start
    assert "2 now, 3 then" in (run.claim_rows(["a", "c"], resumes=True) or "")
    assert "2 now, 2 then" in (run.claim_rows(["c", "a"], resumes=True) or "")
    assert run.claim_rows(["c", "a"], resumes=True) is None


def test_result_is_written_whole(tmp_path: Path) -> None:
    run = RunFolder(tmp_path)
    assert run.result() is None
    run.finish({"steps": 3})
    assert run.result() == {"steps": 3}

"""What a recipe is checked for that its file cannot show."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from recipes.check import check_processes, check_recipe, reward_terms
from recipes.loading import load_recipe
from recipes.schema import LADAPORecipe
from rl.errors import ObjectiveError, RecipeError
from tests.recipes.worlds import write_recipe


@pytest.fixture
def recipe(tmp_path: Path) -> Path:
    return write_recipe(tmp_path, tmp_path / "model", tmp_path / "rows.jsonl")


def test_one_process_only(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "1")
    check_processes(load_recipe(recipe))
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(RecipeError, match=r"trains in one process.* one of 4 .*torchrun"):
        check_processes(load_recipe(recipe))


def test_one_gpu_only(recipe: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for count in (0, 1):
        monkeypatch.setattr(torch.cuda, "device_count", lambda count=count: count)
        check_processes(load_recipe(recipe))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(RecipeError, match=r"would see 2; set CUDA_VISIBLE_DEVICES .*device: cpu"):
        check_processes(load_recipe(recipe))
    check_processes(load_recipe(recipe, ["device=cpu"]))


def test_the_tower_of_latent_alignment_is_the_run_s(recipe: Path) -> None:
    changes = ["rewards=[{use: accuracy}, {use: latent_alignment}]", "data.decode_timeout_s=7"]
    loaded = load_recipe(recipe, changes)
    assert isinstance(loaded, LADAPORecipe)
    options = reward_terms(loaded)[1].options
    assert options == {"policy": loaded.policy.path, "decode_timeout_s": 7.0}


def test_rows_without_their_video_are_listed_by_set(
    tmp_path: Path, tiny_checkpoint: Path, clips: Path
) -> None:
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    gone = [{**row, "video": "gone.mp4"} for row in rows]
    whole, half = tmp_path / "whole.jsonl", tmp_path / "half.jsonl"
    whole.write_text("\n".join(map(json.dumps, rows)))
    half.write_text("\n".join(map(json.dumps, [gone[0], *rows[1:]])))
    changes = {
        "data.video_root": str(clips),
        "data.bad_videos": "skip",
        "data.validation": str(half),
        "train.validate_every": 1,
        "evaluation": {"manifest": str(half), "limit": 2},
    }
    plan = check_recipe(load_recipe(write_recipe(tmp_path, tiny_checkpoint, whole, changes)))
    listed = {name: [(row.id, row.file) for row in found] for name, found in plan.skipped.items()}
    missing = [(rows[0]["id"], str(clips / "gone.mp4"))]
    # The row that training shows may have the id of one that validation lacks.
    assert listed == {"train": [], "validation": missing, "evaluation": missing}


def test_the_published_objective_takes_no_noise(
    tmp_path: Path, tiny_checkpoint: Path, clips: Path
) -> None:
    # The tiny recipe has noise, and a latent term as every recipe has that does not say otherwise.
    path = write_recipe(tmp_path, tiny_checkpoint, clips / "manifest.jsonl")
    changes = ["train.objective=published"]
    with pytest.raises(ObjectiveError, match=r"noise_scale is 0\.1.*Set policy\.noise_scale to 0"):
        check_recipe(load_recipe(path, changes))
    changes.append("policy.noise_scale=0")
    with pytest.raises(ObjectiveError, match=r"train\.latent_alpha is 0\.5"):
        check_recipe(load_recipe(path, changes))
    changes += ["train.latent_alpha=0", "train.max_mismatch=0.1"]
    with pytest.raises(ObjectiveError, match=r"objective is published and max_mismatch is 0\.1"):
        check_recipe(load_recipe(path, changes))
    check_recipe(load_recipe(path, [*changes[:-1], "train.top_p=0.99", "train.imagine=never"]))

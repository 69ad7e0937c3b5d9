"""What a recipe is checked for that its file cannot show."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from recipes.check import check_processes
from recipes.loading import load_recipe
from rl.errors import RecipeError
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

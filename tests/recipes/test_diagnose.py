"""`foresight diagnose gradients`: a recipe is measured, and nothing of its training is kept."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.image import imread
from rich.console import Console
from typer.testing import CliRunner

from recipes.cli import app
from recipes.diagnose.gradients import diagnose_gradients, gradients_table
from recipes.diagnose.picture import draw_gradients, quarters
from recipes.loading import load_recipe
from recipes.run import run_recipe
from recipes.schema import SFTRecipe
from rl.gradient_norms import KINDS
from tests.recipes.worlds import write_recipe

TRAIN: dict[str, Any] = {
    "max_steps": 3,
    "batch_size": 4,
    "micro_batch": 2,
    "learning_rate": 1e-2,
    "max_completion_length": 6,
    "save_every": 1,
}


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> Path:
    changes = {
        "stage": "sft",
        "policy": {"path": str(tiny_checkpoint), "max_length": 2, "head": {"kind": "linear"}},
        "train": TRAIN,
    }
    return write_recipe(tmp_path, tiny_checkpoint, clips / "manifest.jsonl", changes)


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(
        app, ["diagnose", "gradients", *map(str, arguments)], env={"COLUMNS": "200"}
    )
    return result.exit_code, result.output


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "gradients.jsonl").read_text().splitlines()]


def measure(recipe: Path, output: Path, *overrides: str, **options: Any) -> list[dict[str, Any]]:
    loaded = load_recipe(recipe, overrides)
    assert isinstance(loaded, SFTRecipe)
    diagnose_gradients(loaded, Console(quiet=True), output=output, **options)
    return read(output)


def test_it_leaves_numbers_and_a_picture_and_nothing_else(recipe: Path, tmp_path: Path) -> None:
    code, said = invoke(recipe)
    assert code == 0, said
    folder = tmp_path / "run" / "gradients"
    assert {p.name for p in (tmp_path / "run").rglob("*")} == {
        "gradients",
        "gradients.jsonl",
        "gradients.png",
    }
    lines = read(folder)
    assert [line["step"] for line in lines] == [1, 2, 3]
    for line in lines:
        assert line["tokens"].keys() == line["norms"].keys() == line["layers"].keys() == {*KINDS}
        assert line["tokens"]["latent"] == 6  # as many frame pairs as the manifest imagines
        for kind in KINDS:
            assert len(line["layers"][kind]) == 2 and min(line["layers"][kind]) > 0
            assert line["norms"][kind] == line["layers"][kind][0]
            assert len(line["lengths"][kind]) == 2 and min(line["lengths"][kind]) > 0
    assert "3 updates" in said and "latents" in said and "x 1.00" in said
    assert str(folder / "gradients.png") in said
    assert imread(folder / "gradients.png").std() > 0.05


def test_a_run_of_the_recipe_is_not_disturbed(recipe: Path, tmp_path: Path) -> None:
    invoke(recipe)
    run_recipe(load_recipe(recipe), Console(quiet=True))
    code, said = invoke(recipe)  # nor does a finished run disturb the measurement
    assert code == 0, said
    assert (tmp_path / "run" / "policy").is_dir() and "is finished" not in said


def test_stopping_early_measures_the_first_updates_of_the_same_training(
    recipe: Path, tmp_path: Path
) -> None:
    whole = measure(recipe, tmp_path / "whole")
    assert measure(recipe, tmp_path / "part", steps=2) == whole[:2]


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.micro_batch=4"],
        ["train.gradient_checkpointing=true"],
        ["train.gradient_checkpointing=false"],
    ],
)
def test_how_an_update_is_computed_does_not_show(
    recipe: Path, tmp_path: Path, overrides: list[str]
) -> None:
    expected = measure(recipe, tmp_path / "plain")
    found = measure(recipe, tmp_path / "other", *overrides)
    assert [line["tokens"] for line in found] == [line["tokens"] for line in expected]
    for ours, theirs in zip(found, expected, strict=True):
        for kind in KINDS:
            assert ours["layers"][kind] == pytest.approx(theirs["layers"][kind], rel=2e-3)


@pytest.mark.parametrize(
    "overrides",
    [
        ["train.lora={r: 2, alpha: 4}"],
        ["train.latents=own"],
        [
            "train.latents=self_forcing",
            "train.start_latents=2",
            "policy.min_length=2",
            "train.gradient_checkpointing=false",
        ],
        ["train.imagine_share=0"],
    ],
)
def test_other_trainings(recipe: Path, tmp_path: Path, overrides: list[str]) -> None:
    lines = measure(recipe, tmp_path / "out", *overrides)
    assert len(lines) == 3
    imagines = "train.imagine_share=0" not in overrides
    assert all((line["norms"]["latent"] is not None) == imagines for line in lines)
    assert (tmp_path / "out" / "gradients.png").is_file()


def test_only_recipes_that_teach_are_measured(
    tmp_path: Path, tiny_checkpoint: Path, clips: Path
) -> None:
    path = write_recipe(tmp_path, tiny_checkpoint, clips / "manifest.jsonl")
    code, said = invoke(path)
    assert code == 2
    assert said.startswith("error: ") and "its stage is la_dapo" in said and "stage sft" in said
    assert not (tmp_path / "run").exists()


def test_more_updates_than_the_recipe_has(recipe: Path, tmp_path: Path) -> None:
    code, said = invoke(recipe, "--steps", 4)
    assert code == 2
    assert "--steps is 4, but train.max_steps is 3" in said and "--set train.max_steps=4" in said
    code, said = invoke(recipe, "--steps", 4, "--set", "train.max_steps=4", "--output", tmp_path)
    assert code == 0 and len(read(tmp_path)) == 4


def test_quarters_are_at_least_one_update() -> None:
    lines = [{"step": step} for step in range(1, 10)]
    assert quarters(lines[:1]) == (lines[:1], lines[:1])
    assert quarters(lines[:3]) == (lines[:1], lines[2:3])
    assert quarters(lines) == (lines[:2], lines[7:])


def test_kinds_that_are_missing_are_left_out(tmp_path: Path) -> None:
    lines = [
        {
            "step": step,
            "tokens": {"visual": 0, "question": 3, "answer": 2, "latent": 2 * (step % 2)},
            "norms": {"visual": None, "question": 0.0, "answer": 0.1, "latent": latent and 0.2},
            "layers": {
                "visual": None,
                "question": [0.0, 0.0],
                "answer": [0.1, 0.3],
                "latent": latent and [0.2, 0.1],
            },
            "lengths": {
                "visual": None,
                "question": [1.0, 2.0],
                "answer": [3.0, 1.0],
                "latent": latent and [2.0, 2.0],
            },
        }
        for step, latent in ((1, True), (2, None), (3, True))
    ]
    draw_gradients(lines, tmp_path / "some.png")
    assert imread(tmp_path / "some.png").std() > 0.05
    console = Console(width=120)
    with console.capture() as capture:
        console.print(gradients_table(lines))
    rows = {row[:14].strip(): row.split()[-4:] for row in capture.get().splitlines()}
    assert rows["visual tokens"] == ["-", "-", "-", "-"]
    assert rows["answer text"] == ["1.00e-01", "1.00e-01", "-", "3.00"]  # no ratio to zero

"""What a recipe is checked for that its file cannot show."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from recipes.check import check_processes, check_recipe, reward_terms
from recipes.loading import load_recipe
from recipes.schema import LADAPORecipe, SFTSection
from recipes.schema.training import CurriculumSection
from rl.errors import DataError, ObjectiveError, RecipeError
from rl.sft.curriculum import CurriculumConfig
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


@pytest.fixture
def thoughtful(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> Callable[..., Path]:
    """An SFT recipe on rows with two steps, the last of them with as many as asked for."""

    def write(steps: list[str] | None, **changes: object) -> Path:
        lines = (clips / "manifest.jsonl").read_text().splitlines()
        rows = [{**json.loads(line), "steps": ["up", "on"]} for line in lines]
        rows[-1]["steps"] = steps
        manifest = tmp_path / "rows.jsonl"
        manifest.write_text("\n".join(map(json.dumps, rows)))
        train = {"batch_size": 2, "latents": "own", **changes}
        common = {"stage": "sft", "data.video_root": str(clips), "policy.noise_scale": None}
        return write_recipe(tmp_path, tiny_checkpoint, manifest, {**common, "train": train})

    return write


CURRICULUM: dict[str, object] = {"steps_per_stage": 3, "max_stage": 3}


@pytest.mark.parametrize(
    ("steps", "changes", "words"),
    [
        (["a", "b", "c"], {"curriculum": CURRICULUM}, r"'clip3': .*span of 3 .*max_length to 3"),
        (None, {"curriculum": CURRICULUM}, r"'clip3': .*the row has none; give it a column"),
        ([""], {"curriculum": CURRICULUM}, r"'clip3': column 'steps'"),
        (
            ["a"],
            {"start_latents": 3},
            "start_latents is 3, but the protocol allows spans of 1 to 2",
        ),
        (["a"], {"start_latents": 2, "curriculum": CURRICULUM}, "both set"),
        (["a"], {"start_latents": 2, "latents": "teacher"}, "no targets to feed"),
        (["a"], {"start_latents": 2, "start_at_mean": True}, "start_at_mean is True"),
        (["a"], {"curriculum": CURRICULUM, "imagine_share": 0.5}, "imagine_share is 0.5"),
    ],
)
def test_lessons_that_cannot_be_taught(
    steps: list[str] | None,
    changes: dict[str, object],
    words: str,
    thoughtful: Callable[..., Path],
) -> None:
    with pytest.raises((DataError, ObjectiveError), match=words):
        check_recipe(load_recipe(thoughtful(steps, **changes)))


def test_lessons_that_can_be_taught(thoughtful: Callable[..., Path]) -> None:
    from recipes.configs import trainer_config

    recipe = load_recipe(thoughtful(["a"], curriculum=CURRICULUM))
    check_recipe(recipe)
    assert trainer_config(recipe).schedule == CurriculumConfig(3, max_stage=3)
    check_recipe(load_recipe(thoughtful(None, start_latents=2)))


def test_keys_of_a_curriculum_are_checked(thoughtful: Callable[..., Path]) -> None:
    with pytest.raises(
        RecipeError, match=r"train.curriculum.max_stages: .*did you mean 'max_stage'"
    ):
        load_recipe(thoughtful(["a"], curriculum={"steps_per_stage": 3, "max_stages": 3}))
    with pytest.raises(RecipeError, match=r"train.curriculum.steps_per_stage: missing; Updates in"):
        load_recipe(thoughtful(["a"], curriculum={"max_stage": 3}))


def test_the_defaults_of_a_curriculum_are_the_trainer_s() -> None:
    section = SFTSection(curriculum=CurriculumSection(steps_per_stage=3))
    assert section.arguments()["curriculum"] == CurriculumConfig(3).to_dict()

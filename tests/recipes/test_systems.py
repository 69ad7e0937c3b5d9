"""The recipes of VideoLatent and of depth scaling: they can be read without the real models, and
train and evaluate tiny ones of all three families, `policy.path` being the only change beside size.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

import recipes
from recipes.check import check_recipe
from recipes.configs import trainer_config
from recipes.evaluation.plan import check_evaluation
from recipes.evaluation.run import run_evaluation
from recipes.loading import Recipe, load_any_recipe
from recipes.run import run_recipe
from recipes.schema import EvaluateRecipe, LADAPORecipe, SFTRecipe
from recipes.stages import check_stage
from rl.errors import PolicyError, RecipeError
from rl.policy.loading import load_policy
from tests.tiny import FAMILIES, Family, save_tiny_checkpoint

FOLDER = Path(recipes.__file__).parent
QUIET = Console(quiet=True)
# Sizes, and nothing else.
SMALL = {
    "data.video_root": None,
    "train.lora.r": 2,
    "train.batch_size": 2,
    "train.micro_batch": 2,
    "train.warmup": 0,
}


def load(name: str, **changes: Any) -> Any:
    """``recipes/<name>.yaml`` with changed keys, whose dots are written as two underscores."""
    changes = {key.replace("__", "."): value for key, value in changes.items()}
    return load_any_recipe(
        FOLDER / f"{name}.yaml",
        [f"{key}={json.dumps(value, default=str)}" for key, value in changes.items()],
    )


def _rows(manifest: Path) -> dict[str, Any]:
    """Rows of one's own in the place of a recipe's benchmarks."""
    return {"name": "rows", "data": str(manifest), "modes": ["always"], "max_new_tokens": 15}


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: Any) -> tuple[Family, Path]:
    folder = tmp_path_factory.mktemp(request.param)
    return request.param, save_tiny_checkpoint(folder, request.param)


@pytest.fixture(scope="module")
def chains(clips: Path) -> Path:
    """The clips with a chain of thought in each row."""
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()]
    for row in rows:
        row["steps"] = ["up", "left", "up", "left"]
        del row["imagine"]
    path = clips / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.mark.parametrize("system", ["video_latent", "depth_scaling"])
def test_the_stages_fit_together(system: str) -> None:
    stages = {path.stem: load(f"{system}/{path.stem}") for path in (FOLDER / system).glob("*.yaml")}
    sft, evaluate = stages["sft"], stages["evaluate"]
    assert isinstance(sft, SFTRecipe) and isinstance(evaluate, EvaluateRecipe)
    trained = [sft]
    if "la_dapo" in stages:
        trained.append(stages["la_dapo"])
        assert Path(stages["la_dapo"].policy.path) == sft.output / "policy"
    assert Path(evaluate.policy.path) == trained[-1].output / "policy"
    for recipe in trained:
        assert recipe.data.system_prompt == evaluate.data.system_prompt
        assert recipe.data.frames == sft.data.frames
        assert trainer_config(recipe).max_steps == recipe.train.max_steps


def test_video_latent_says_what_is_known() -> None:
    sft = load("video_latent/sft")
    policy, train = sft.policy, sft.train
    assert policy.min_length == policy.max_length == train.start_latents == 12
    assert policy.max_spans == 1 and policy.injection is not None
    assert (train.latents, train.bptt_steps) == ("self_forcing", 4)
    assert train.align_weight == train.diversity_weight == 0.1
    rl = load("video_latent/la_dapo")
    assert isinstance(rl, LADAPORecipe)
    assert rl.train.imagine == "always" and rl.policy.noise_scale == 0.1


def test_depth_scaling_is_as_released() -> None:
    sft = load("depth_scaling/sft")
    policy, train = sft.policy, sft.train
    assert (policy.visual_replay.tokens, policy.visual_replay.window) == (32, [1, 4, 4])
    assert policy.depth.layers is None and policy.depth.router == "token"
    assert (train.lora.r, train.lora.alpha, len(train.lora.target_modules)) == (64, 16, 7)
    # 30K rows in updates of 256: four epochs a stage, sixteen in all, the last of stages 0 to 3.
    assert train.rows_per_step == 256
    assert train.curriculum.steps_per_stage == round(4 * 30_000 / 256)
    assert train.max_steps == 16 * 30_000 // 256
    schedule = trainer_config(sft).schedule
    assert schedule.stage_at(train.max_steps - 1) == train.curriculum.merge_steps == 3
    assert policy.max_length == schedule.latents(3, 3)
    assert train.align_weight == train.diversity_weight == 0.0


def test_video_latent_trains_every_family(
    checkpoint: tuple[Family, Path], clips: Path, tmp_path: Path
) -> None:
    family, path = checkpoint
    manifest = clips / "manifest.jsonl"
    small = SMALL | {"data.train": manifest, "output": tmp_path / "sft", "train.max_steps": 1}
    small["evaluation"] = {"manifest": str(manifest), "modes": ["always"]}
    small["train.max_completion_length"] = 15
    sft = load("video_latent/sft", policy__path=path, **small)
    assert "fine: rows 4 for training" in check_stage(sft)[-1]
    result = run_recipe(sft, QUIET)
    assert result.evaluation is not None
    score = result.evaluation["modes"]["always"]
    assert (score["answers"], score["latents"], score["spans"]) == (4, 12.0, 1.0)
    (logged, *_) = map(json.loads, (result.output / "metrics.jsonl").read_text().splitlines())
    assert logged["imagined"] == 1.0 and logged["loss_align"] > 0.0
    policy = load_policy(result.policy)
    assert policy.config.model_type == family
    assert policy.latent_injection is not None
    assert policy.protocol.min_length == policy.protocol.max_length == 12

    changes = {"policy.path": result.policy, "data.train": manifest, "data.video_root": None}
    changes["train.prompts_per_step"] = 2
    plan = check_recipe(load("video_latent/la_dapo", **changes))
    assert str(plan.engine) == "transformers samples: vLLM cannot run policy.injection yet"
    with pytest.raises(RecipeError, match=r"vllm, but vLLM cannot run policy.injection yet; write"):
        check_recipe(load("video_latent/la_dapo", **changes, rollouts__engine="vllm"))

    changes = {"policy.path": result.policy, "output": tmp_path / "evaluate"}
    evaluate = load("video_latent/evaluate", benchmarks=[_rows(manifest)], **changes)
    assert str(check_evaluation(evaluate).engine) == str(plan.engine)


@pytest.mark.slow
def test_video_latent_is_evaluated_by_a_worker(
    tiny_checkpoint: Path, clips: Path, tmp_path: Path
) -> None:
    manifest = clips / "manifest.jsonl"
    small = SMALL | {"data.train": manifest, "output": tmp_path / "sft", "train.max_steps": 1}
    policy = run_recipe(
        load("video_latent/sft", policy__path=tiny_checkpoint, **small), QUIET
    ).policy
    changes = {"policy.path": policy, "output": tmp_path / "evaluate", "rollouts.workers": 1}
    recipe = load("video_latent/evaluate", benchmarks=[_rows(manifest)], **changes)
    score = run_evaluation(recipe, QUIET).evaluations["rows"].scores["always"]
    assert (score.answers, score.latents, score.spans) == (4, 12.0, 1.0)


def test_depth_scaling_trains_what_it_can(
    checkpoint: tuple[Family, Path], chains: Path, tmp_path: Path
) -> None:
    family, path = checkpoint
    changes = SMALL | {
        "policy.path": path,
        "data.train": chains,
        "output": tmp_path / "sft",
        "train.max_steps": 2,
        "train.curriculum.steps_per_stage": 1,
    }
    if family == "qwen3_5":
        with pytest.raises(PolicyError, match=r"visual_replay: a qwen3_5 model has recurrent lay"):
            check_recipe(load("depth_scaling/sft", **changes))
        changes["policy.visual_replay"] = None
    recipe = load("depth_scaling/sft", **changes)
    assert isinstance(recipe, Recipe)
    result = run_recipe(recipe, QUIET)
    logged = [json.loads(s) for s in (result.output / "metrics.jsonl").read_text().splitlines()][:2]
    assert [row["imagined"] for row in logged] == [0.0, 1.0]
    assert all(0.0 < row["depth"] < 1.0 for row in logged)  # also where all is text
    assert ("loss_replay" in logged[1]) == (family != "qwen3_5")
    names = load_policy(result.policy).modules_config.names
    assert names == (("depth",) if family == "qwen3_5" else ("depth", "visual_replay"))

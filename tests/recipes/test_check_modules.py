"""Latent modules in recipes: what goes together, what is refused and why, and a whole run."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from recipes.check import check_recipe
from recipes.evaluation.plan import check_evaluation
from recipes.loading import load_any_recipe, load_recipe
from recipes.run import run_recipe
from rl.errors import ObjectiveError, PolicyError, RecipeError
from rl.export import export_policy
from rl.policy.depth import DepthConfig
from rl.policy.injection import InjectionConfig
from rl.policy.loading import load_policy
from rl.policy.visual_replay import VisualReplayConfig
from rollouts.vllm_engine import VLLMEngine
from tests.latent import thinking_policy
from tests.recipes.worlds import write_recipe
from tests.rl.policy.test_modules import modules
from tests.tiny import save_tiny_checkpoint

ALL = {
    "policy.injection": {"heads": 2},
    "policy.depth": {"layers": [1]},
    "policy.visual_replay": {"tokens": 2, "window": [1, 2, 2]},
}
SELF_FORCED = {
    "stage": "sft",
    "policy.noise_scale": None,
    "train": {
        "latents": "self_forcing",
        "start_latents": 2,
        "max_steps": 2,
        "batch_size": 2,
        "learning_rate": 1e-2,
        "max_completion_length": 6,
        "gradient_checkpointing": False,
    },
}

# What the published router can be trained with.
PUBLISHED = {
    "policy.depth": {"router": "published", "tokens": 4},
    "policy.max_length": 2,
    "train.latents": "teacher",
    "train.start_latents": None,
}


@pytest.fixture
def check(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> Any:
    def plan_of(changes: dict[str, Any], model: Path = tiny_checkpoint) -> Any:
        path = write_recipe(tmp_path, model, clips / "manifest.jsonl", changes)
        return check_recipe(load_recipe(path))

    return plan_of


def test_modules_reach_the_plan(check: Any) -> None:
    plan = check(ALL)
    assert plan.modules.injection == InjectionConfig(heads=2)
    assert plan.modules.depth == DepthConfig(layers=(1,))
    assert plan.modules.visual_replay == VisualReplayConfig(2, (1, 2, 2))
    assert plan.engine is not None and plan.engine.engine == "transformers"
    assert not plan.as_it_is
    assert check({}).modules.names == ()


def test_vllm_is_refused_by_name(check: Any, tmp_path: Path) -> None:
    for name in ALL:
        with pytest.raises(RecipeError, match=rf"vLLM cannot run {name} yet; write transformers"):
            check({name: ALL[name], "rollouts.engine": "vllm"})
    plan = check({"policy.injection": {"heads": 2}, "rollouts.engine": "auto"})
    assert "vLLM cannot run policy.injection yet" in str(plan.engine)
    policy, processor = thinking_policy(tmp_path / "tiny", modules=modules(["depth"]))
    policy.save_pretrained(tmp_path / "policy")
    with pytest.raises(PolicyError, match=r"with depth yet; sample with the transformers engine"):
        VLLMEngine(tmp_path / "policy", processor, None)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        ({"policy.injection": {"heads": 3}}, PolicyError, "3 heads, which do not divide its width"),
        ({"policy.depth": {"layers": [7]}}, PolicyError, "layer 7 is none of the model's 2"),
        (
            {"policy.depth": {"router": "published"}},
            RecipeError,
            "cannot generate; but stage la_dapo samples. Write policy.depth.router: token$",
        ),
        (
            {
                "policy.injection": {"heads": 2},
                "policy.noise_scale": 0.0,
                "train.objective": "published",
            },
            RecipeError,
            r"knows none of the policy's modules \(injection\); write exact",
        ),
    ],
)
def test_what_does_not_work_in_la_dapo(
    check: Any, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        check(changes)


@pytest.mark.parametrize(
    ("changes", "error", "reason"),
    [
        (
            {"policy.visual_replay": {}, "train.latents": "own"},
            RecipeError,
            "train.latents is own, but with policy.visual_replay.* write self_forcing",
        ),
        ({"train.gradient_checkpointing": True}, ObjectiveError, "checkpointed layers can keep no"),
        ({"train.start_latents": None}, ObjectiveError, "teaches latents that have no targets"),
        (
            {"policy.depth": {"router": "published"}},
            RecipeError,
            "train.latents self_forcing: the policy's own latents would be made with a look at the",
        ),
        (
            {"policy.depth": {"router": "published"}, "train.latents": "own"},
            RecipeError,
            "train.latents own: the policy's own latents would be made with a look at the",
        ),
        (
            {**PUBLISHED, "evaluation": {"manifest": "rows.jsonl"}},
            RecipeError,
            "cannot generate; but evaluation asks for answers.*, or leave that out",
        ),
        (
            {**PUBLISHED, "train.validate_every": 1},
            RecipeError,
            "cannot generate; but train.validate_every asks for answers",
        ),
    ],
)
def test_what_does_not_work_in_sft(
    check: Any, changes: dict[str, Any], error: type[Exception], reason: str
) -> None:
    with pytest.raises(error, match=reason):
        check({**SELF_FORCED, **changes})


def test_recurrent_layers(check: Any, tmp_path: Path) -> None:
    folder = save_tiny_checkpoint(tmp_path / "recurrent", "qwen3_5")
    with pytest.raises(PolicyError, match=r"qwen3_5 model has recurrent layers.*Qwen2\.5-VL"):
        check({**SELF_FORCED, "policy.visual_replay": {}}, folder)
    with pytest.raises(PolicyError, match=r"layer 0 is recurrent.*choose of \[1\]"):
        check({"policy.depth": {"layers": [0]}}, folder)
    assert check({"policy.depth": {}}, folder).modules.names == ("depth",)


def test_a_policy_keeps_the_modules_it_has(check: Any, tmp_path: Path) -> None:
    policy, processor = thinking_policy(tmp_path / "tiny", modules=modules(["injection"]))
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    plan = check({"policy.depth": {}}, tmp_path / "policy")
    assert plan.modules.names == ("injection", "depth") and not plan.as_it_is
    with pytest.raises(PolicyError, match=r"policy\.injection: the policy has one already"):
        check({"policy.injection": {"heads": 4}}, tmp_path / "policy")


def test_evaluation_takes_the_modules_that_there_are(tmp_path: Path, clips: Path) -> None:
    policy, processor = thinking_policy(tmp_path / "tiny", modules=modules(["injection"]))
    policy.save_pretrained(tmp_path / "policy")
    processor.save_pretrained(tmp_path / "policy")
    path = tmp_path / "evaluate.yaml"
    values: dict[str, Any] = {
        "stage": "evaluate",
        "output": "run",
        "policy": {"path": "policy", "injection": {"heads": 2}},
        "benchmarks": [{"data": str(clips / "manifest.jsonl")}],
    }
    path.write_text(json.dumps(values))
    recipe: Any = load_any_recipe(path)
    assert check_evaluation(recipe).engine.engine == "transformers"
    for name in ("depth", "visual_replay"):
        path.write_text(json.dumps({**values, "policy": {"path": "policy", name: {}}}))
        recipe = load_any_recipe(path)
        with pytest.raises(RecipeError, match=rf"policy\.{name}: .* would be measured untrained"):
            check_evaluation(recipe)


def test_keys_that_change_nothing_are_told(check: Any) -> None:
    warnings = check(
        {
            **SELF_FORCED,
            "train.latents": "own",
            "train.align_weight": 0.3,
            "train.replay_weight": 0.3,
            "train.depth_weight": 0.3,
            "train.latent_weight": 0.3,
        }
    ).warnings
    keys = ("align_weight", "replay_weight", "depth_weight", "latent_weight")
    assert [w.split(" changes nothing")[0] for w in warnings] == [f"train.{key}" for key in keys]
    written = {"align_to": "question", "replay_weight": 0.1, "depth_weight": 0.1}
    told = {f"train.{key}": value for key, value in written.items()}
    assert check({**SELF_FORCED, **ALL, **told}).warnings == []


def finished(folder: Path, model: Path, manifest: Path, changes: dict[str, Any]) -> Path:
    folder.mkdir()
    recipe = load_recipe(write_recipe(folder, model, manifest, changes))
    run_recipe(recipe, Console(file=io.StringIO()))
    return folder / "run" / "policy"


def test_self_forcing_then_la_dapo_with_every_module(
    tmp_path: Path, tiny_checkpoint: Path, clips: Path
) -> None:
    manifest = clips / "manifest.jsonl"
    policy = finished(tmp_path / "sft", tiny_checkpoint, manifest, {**ALL, **SELF_FORCED})
    lines = [json.loads(x) for x in (tmp_path / "sft/run/metrics.jsonl").read_text().splitlines()]
    logged = next(line for line in lines if "loss_text" in line)
    assert {"loss_align", "loss_diversity", "loss_replay", "depth"} <= logged.keys()
    assert "loss_latent" not in logged
    changes = {"train.imagine": "always", "train.max_mismatch": 1e-4, "train.filter_groups": False}
    changes |= {"train.learning_rate": 1e-2, "train.record_latents_every": 1}
    trained = finished(tmp_path / "rl", policy, manifest, changes)
    lines = [json.loads(x) for x in (tmp_path / "rl/run/metrics.jsonl").read_text().splitlines()]
    gaps = [line["replay/max_gap"] for line in lines if "replay/max_gap" in line]
    assert len(gaps) == 2 and max(gaps) < 1e-4
    assert all(0 < line["depth/share"] < 1 for line in lines if "depth/share" in line)
    before, after = (load_policy(folder) for folder in (policy, trained))
    assert after.modules_config == before.modules_config
    for part in ("latent_injection.gate", "visual_replay.outer.weight"):
        assert before.get_parameter(part).abs().max() > 0  # SFT moved it from its start
        assert not torch.equal(before.get_parameter(part), after.get_parameter(part))
    export_policy(tmp_path / "rl/run", tmp_path / "out")


def test_the_published_router_trains(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> None:
    policy = finished(
        tmp_path / "run", tiny_checkpoint, clips / "manifest.jsonl", {**SELF_FORCED, **PUBLISHED}
    )
    assert load_policy(policy).modules_config.depth.router == "published"

"""The recipes for the real model say what was published, and can be read without it."""

from __future__ import annotations

from pathlib import Path

import pytest

import recipes
from recipes.loading import load_any_recipe, load_recipe
from recipes.schema import LADAPORecipe, SFTRecipe

FOLDER = Path(recipes.__file__).parent / "future_l1"


@pytest.fixture(scope="module")
def sft() -> SFTRecipe:
    recipe = load_any_recipe(FOLDER / "sft.yaml")
    assert isinstance(recipe, SFTRecipe)
    return recipe


@pytest.fixture(scope="module")
def la_dapo() -> LADAPORecipe:
    recipe = load_any_recipe(FOLDER / "la_dapo.yaml")
    assert isinstance(recipe, LADAPORecipe)
    return recipe


def test_sft_is_as_published(sft: SFTRecipe) -> None:
    train = sft.train
    assert (train.max_steps, train.rows_per_step) == (50_000 // 128, 128)
    assert (train.warmup, train.weight_decay, train.schedule) == (0.1, 0.1, "cosine")
    # Adapters are ours, and their rate is ten times the published one of whole weights.
    assert train.freeze_vision and train.lora is not None and train.learning_rate == 1e-4
    assert sft.policy.max_length == 32


def test_la_dapo_is_as_published(la_dapo: LADAPORecipe) -> None:
    train = la_dapo.train
    assert (train.group_size, train.prompts_per_step, train.max_steps) == (8, 64, 20_000 // 64)
    assert (train.temperature, train.top_p) == (0.9, 0.99)
    assert train.lora is not None and train.learning_rate == 1e-5
    assert (train.epsilon, train.epsilon_high, train.beta) == (0.2, 0.28, 1e-2)
    assert (train.filter_low, train.filter_high, train.weight_decay) == (0.1, 0.9, 1e-2)
    assert train.max_completion_length == 2048 and not train.freeze_vision
    assert la_dapo.rollouts.vllm.max_model_len == 8192 + 2048
    assert la_dapo.rewards[0].use == "judge" and la_dapo.rewards[0].outcome
    weights = {reward.use: reward.weight for reward in la_dapo.rewards}
    assert weights["outcome_contrastive"] == 0.2 and weights["temporal_diversity"] == 0.1
    (contrast,) = (r for r in la_dapo.rewards if r.use == "outcome_contrastive")
    assert contrast.options["temperature"] == 0.5
    assert train.objective == "exact" and la_dapo.policy.noise_scale == 0.1


def test_the_stages_fit_together(sft: SFTRecipe, la_dapo: LADAPORecipe) -> None:
    assert Path(la_dapo.policy.path) == sft.output / "policy"
    assert la_dapo.data.system_prompt == sft.data.system_prompt
    assert la_dapo.data.frames == sft.data.frames
    assert (sft.data.frames.count, sft.data.frames.fps) == (16, 2)
    for word in ("<reason>", "latent span", "<answer>"):
        assert word in (sft.data.system_prompt or "")


def test_the_trainer_takes_both_objectives(tmp_path: Path) -> None:
    from recipes.configs import trainer_config

    common = [f"output={tmp_path}", "device=cpu"]
    changes = ["policy.noise_scale=0", "train.latent_alpha=0", "train.latent_beta=0"]
    changes.append("train.objective=published")
    ours = trainer_config(load_recipe(FOLDER / "la_dapo.yaml", common))
    published = trainer_config(load_recipe(FOLDER / "la_dapo.yaml", common + changes))
    assert (ours.objective, ours.delta, ours.latent_alpha) == ("exact", 3.0, 0.5)
    assert (published.objective, published.published_kappa) == ("published", 0.01)

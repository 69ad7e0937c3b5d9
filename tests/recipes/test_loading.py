"""Reading recipes: defaults, overrides, paths, and every kind of mistake."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from recipes.loading import dump_recipe, load_recipe
from recipes.schema import LADAPORecipe, LADAPOSection, SFTRecipe, SFTSection
from rl.errors import RecipeError

MINIMAL = {
    "stage": "la_dapo",
    "output": "out",
    "policy": {"path": "model"},
    "data": {"train": "rows.jsonl"},
}


def write(folder: Path, values: object) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(values if isinstance(values, str) else yaml.safe_dump(values))
    return path


def failure(folder: Path, values: object, overrides: list[str] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(write(folder, values), overrides or [])
    return str(caught.value)


def test_minimal_recipe_has_future_l1_defaults(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL))
    assert isinstance(recipe, LADAPORecipe)
    train = recipe.train
    assert (train.prompts_per_step, train.group_size, train.temperature) == (64, 8, 0.9)
    assert (train.epsilon, train.epsilon_high, train.learning_rate) == (0.2, 0.28, 1e-6)
    assert (train.filter_low, train.filter_high, train.max_refills) == (0.1, 0.9, 20)
    assert [r.use for r in recipe.rewards] == [
        "accuracy",
        "format",
        "outcome_contrastive",
        "temporal_diversity",
    ]


def test_relative_paths_start_from_the_recipe(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    recipe = load_recipe(write(tmp_path, MINIMAL), ["data.validation=../other.jsonl"])
    assert recipe.output == tmp_path / "out"
    assert recipe.policy.path == str(tmp_path / "model")
    assert recipe.data.validation == str(tmp_path.parent / "other.jsonl")


def test_hub_names_stay_names(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["policy.path=Qwen/Qwen3-VL-2B-Instruct"])
    assert recipe.policy.path == "Qwen/Qwen3-VL-2B-Instruct"


def test_overrides_are_yaml_and_make_sections(tmp_path: Path) -> None:
    values = MINIMAL | {"rewards": [{"use": "accuracy"}, {"use": "format"}]}
    recipe = load_recipe(
        write(tmp_path, values),
        [
            "train.max_steps=7",
            "train.learning_rate=1e-4",
            "train.lora={r: 4}",
            "rewards.1.weight=0.5",
        ],
    )
    assert isinstance(recipe, LADAPORecipe)
    assert (recipe.train.max_steps, recipe.train.learning_rate) == (7, 1e-4)
    assert recipe.train.lora is not None and recipe.train.lora.r == 4
    assert recipe.rewards[1].weight == 0.5


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.max_steps", "write key=value"),
        ("train.max_steps=[", "not valid YAML"),
        ("stage.x=1", "stage has no key 'x'"),
    ],
)
def test_wrong_overrides(tmp_path: Path, override: str, words: str) -> None:
    assert words in failure(tmp_path, MINIMAL, [override])


def test_every_problem_at_once(tmp_path: Path) -> None:
    values = MINIMAL | {
        "train": {"max_stepz": 5, "group_size": 1, "learning_rate": "fast"},
        "temperature": 1.0,
        "data": {},
    }
    message = failure(tmp_path, values)
    assert "recipe.yaml: 5 problems" in message
    assert "train.max_stepz: unknown key; did you mean 'max_steps'?" in message
    assert "train.group_size: must be greater than or equal to 2, got 1" in message
    assert "train.learning_rate: must be a valid number, got 'fast'" in message
    assert "temperature: unknown key; did you mean 'train.temperature'?" in message
    assert "data.train: missing; What to train on: a manifest" in message


def test_many_problems_fit_a_screen(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL | {f"wrong{i}": i for i in range(40)})
    assert "and 28 more" in message and len(message.splitlines()) <= 24


def test_key_far_from_any_other_lists_the_known_ones(tmp_path: Path) -> None:
    assert "known here: stage, name, seed" in failure(tmp_path, MINIMAL | {"zzzz": 1})


def test_values_of_several_types_are_named_by_their_key(tmp_path: Path) -> None:
    values = MINIMAL | {"stage": "sft", "train": {"imagine_share": {"column": "level"}}}
    message = failure(tmp_path, values)
    assert "train.imagine_share" in message and "ImagineShare" not in message
    values["train"] = {"imagine_share": {"column": "level", "shares": {"0": 2.0}}}
    assert "train.imagine_share" in failure(tmp_path, values)
    values["train"] = {"imagine_share": {"column": "level", "shares": {"0": 1.0}}}
    recipe = load_recipe(write(tmp_path, values))
    assert isinstance(recipe, SFTRecipe)
    assert recipe.train.arguments()["imagine_share"] == {"column": "level", "shares": {"0": 1.0}}


def test_an_unknown_engine_lists_the_known_ones(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL, ["rollouts.engine=sglang"])
    assert "rollouts.engine" in message and "'auto', 'transformers' or 'vllm'" in message


def test_settings_of_vllm_are_checked(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["rollouts.vllm.max_model_len=4096"])
    assert isinstance(recipe, LADAPORecipe)
    assert (recipe.rollouts.engine, recipe.rollouts.vllm.max_model_len) == ("auto", 4096)
    message = failure(tmp_path, MINIMAL, ["rollouts.vllm.max_model_length=4096"])
    assert "rollouts.vllm.max_model_length" in message and "max_model_len" in message


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("stage: [", "not valid YAML"),
        ("just text", "a mapping of keys"),
        ("stage: sft\nstage: sft\n", "line 2, column 1: key 'stage' appears twice"),
        ("output: x", "stage is missing; write one of sft, la_dapo"),
        ("stage: rl", "stage is 'rl'; write one of"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, words: str) -> None:
    assert words in failure(tmp_path, text)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="cannot be read"):
        load_recipe(tmp_path / "none.yaml")


@pytest.mark.parametrize(
    ("extra", "words"),
    [
        ({"adam_beta3": 0.9}, "train.extra.adam_beta3: unknown argument; did you mean 'adam_beta"),
        ({"num_generations": 4}, "the recipe has a key for this; write train.group_size"),
        ({"beta": 0.1}, "the recipe has a key for this; write train.beta"),
        ({"output_dir": "x"}, "Foresight sets this itself; write output"),
        ({"adam_beta1": "high"}, "train.extra.adam_beta1: must be"),
        ({"save_strategy": "no"}, "Foresight sets this itself; write train.save_every"),
        ({"use_cpu": True}, "Foresight sets this itself; it follows from the machine"),
        ({"bf16": True}, "Foresight sets this itself; it follows from the machine"),
        ({"reward_weights": [1.0]}, "write rewards with their weights"),
        ({"save_only_model": True}, "not supported; a run could not be resumed"),
        ({"load_best_model_at_end": True}, "the policy of the last step is what a run exports"),
        ({"sync_ref_model": True}, "the reference stays the policy that the run starts from"),
        ({"generation_kwargs": {}}, "sampled and scored without it"),
        ({"repetition_penalty": 1.1}, "sampled and scored without it"),
        ({"min_p": 0.1}, "sampled and scored without it; of sampling, write train.temperature, "),
        ({"top_p": 0.9}, "the recipe has a key for this; write train.top_p"),
        ({"entropy_coef": 0.1}, "no entropy term"),
        ({"use_adaptive_entropy": True}, "no entropy term"),
    ],
)
def test_extra_arguments_are_checked(tmp_path: Path, extra: dict[str, object], words: str) -> None:
    assert words in failure(tmp_path, MINIMAL | {"train": {"extra": extra}})


def test_extra_arguments_that_only_the_other_stage_has_are_unknown(tmp_path: Path) -> None:
    sft = MINIMAL | {"stage": "sft", "train": {"extra": {"entropy_coef": 0.1}}}
    assert "train.extra.entropy_coef: unknown argument" in failure(tmp_path, sft)
    sft["train"] = {"extra": {"media_cache_gb": 8}}
    assert "Foresight sets this itself; write data.media_cache_gb" in failure(tmp_path, sft)


def test_refused_arguments_are_those_of_a_config() -> None:
    from recipes.loading import _NOT_OURS, _SET_BY_RUN
    from rl.la_dapo_config import LADAPOConfig
    from rl.sft.trainer import LatentSFTConfig

    known = LADAPOConfig.__dataclass_fields__.keys() | LatentSFTConfig.__dataclass_fields__.keys()
    assert {*_NOT_OURS, *_SET_BY_RUN} <= known


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("train.top_p=0", "train.top_p: must be greater than 0"),
        ("train.top_p=1.1", "train.top_p: must be less than or equal to 1"),
        ("train.top_k=-1", "train.top_k: must be greater than or equal to 0"),
        ("train.top_k=2.5", "train.top_k: must be a valid integer"),
    ],
)
def test_nonsense_truncation(tmp_path: Path, override: str, words: str) -> None:
    assert words in failure(tmp_path, MINIMAL, [override])


def test_truncation_reaches_the_trainer(tmp_path: Path) -> None:
    from recipes.configs import trainer_config

    path = write(tmp_path, MINIMAL)
    config = trainer_config(load_recipe(path))
    assert (config.top_p, config.top_k) == (1.0, 0)
    config = trainer_config(load_recipe(path, ["train.top_p=0.99", "train.top_k=50"]))
    assert (config.top_p, config.top_k) == (0.99, 50)


def test_media_cache_gb_reaches_the_sft_config(tmp_path: Path) -> None:
    from recipes.configs import trainer_config

    path = write(tmp_path, MINIMAL | {"stage": "sft"})
    assert trainer_config(load_recipe(path)).media_cache_gb == 16
    assert trainer_config(load_recipe(path, ["data.media_cache_gb=7"])).media_cache_gb == 7


def test_one_checkpoint_is_too_few(tmp_path: Path) -> None:
    message = failure(tmp_path, MINIMAL, ["train.keep_checkpoints=1"])
    assert "train.keep_checkpoints: must be greater than or equal to 2, got 1" in message
    path = write(tmp_path, MINIMAL)
    assert load_recipe(path).train.keep_checkpoints == 2
    assert load_recipe(path, ["train.keep_checkpoints=null"]).train.keep_checkpoints is None


def test_dump_reads_back_the_same(tmp_path: Path) -> None:
    recipe = load_recipe(write(tmp_path, MINIMAL), ["train.extra={adam_beta1: 0.8}"])
    again = tmp_path / "again.yaml"
    again.write_text(dump_recipe(recipe))
    assert load_recipe(again) == recipe


def test_arguments_are_those_of_the_configs() -> None:
    from rl.la_dapo_config import LADAPOConfig
    from rl.sft.trainer import LatentSFTConfig

    assert LADAPOSection().arguments().keys() <= LADAPOConfig.__dataclass_fields__.keys()
    assert SFTSection().arguments().keys() <= LatentSFTConfig.__dataclass_fields__.keys()


@pytest.mark.parametrize(
    ("rows", "micro_batch", "expected"), [(512, 8, 8), (12, 8, 6), (7, 4, 1), (4, 8, 4)]
)
def test_a_step_divides_into_passes(rows: int, micro_batch: int, expected: int) -> None:
    train = SFTSection(batch_size=rows, micro_batch=micro_batch)
    assert train.rows_per_pass == expected
    arguments = train.arguments()
    accumulated = arguments["gradient_accumulation_steps"]
    assert accumulated * arguments["per_device_train_batch_size"] == rows


@pytest.mark.parametrize(
    ("prompts", "size", "micro_batch", "budget", "expected"),
    [
        (64, 8, 8, None, 8),
        (6, 8, 36, None, 24),  # 3 groups; 4 would divide no step of 6
        (6, 8, 7, None, 6),  # less than a group: any number of rows that divides the step
        (6, 8, 8, 5000, 48),  # the budget cuts the whole step
    ],
)
def test_passes_of_groups(
    prompts: int, size: int, micro_batch: int, budget: int | None, expected: int
) -> None:
    train = LADAPOSection(
        prompts_per_step=prompts,
        group_size=size,
        micro_batch=micro_batch,
        max_tokens_per_microbatch=budget,
    )
    assert train.rows_per_pass == expected
    assert train.arguments()["max_tokens_per_microbatch"] == budget


def test_every_key_is_described() -> None:
    for model in (LADAPORecipe, SFTRecipe, LADAPOSection, SFTSection):
        undescribed = [n for n, f in model.model_fields.items() if not f.description]
        assert set(undescribed) <= {"policy", "data"}  # sections, described by their docstrings

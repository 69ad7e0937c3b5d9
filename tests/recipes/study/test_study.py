"""The four recipes on a handful of clips: every stage reads what the one before wrote."""

from __future__ import annotations

import inspect
import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from rich.console import Console

from recipes import cli
from recipes.configs import trainer_config
from recipes.loading import load_recipe
from recipes.quickstart.perception import Perception
from recipes.schema import SFTRecipe
from recipes.study import world
from recipes.study.lessons import DEPTH_SCALING, VIDEO_LATENT
from recipes.study.main import run_study
from recipes.study.seed import Scale, Seed
from recipes.study.systems import SYSTEMS
from recipes.study.table import COST, HOPS, by_cost, cell, interval, study_table
from recipes.study.variants import VARIANTS
from rl.errors import RecipeError

FOLDER = Path(world.__file__).parent
_STEPS = {"train.max_steps": 1, "train.batch_size": 2, "train.micro_batch": 2, "train.warmup": 0}
TINY = Scale(
    candidates=8,
    lessons=8,
    base=4,
    held_out=4,
    perception=Perception(steps=1, batch_size=2, warmup=1, tiles=1, reads=1),
    changes={
        "base": _STEPS,
        # So small a model has no gain: all that were probed are kept.
        "select": {"sampling.n": 1, "keep": {"min_gain": -1.0, "drop_easy": None}},
        "sft": _STEPS,
        "la_dapo": {
            "train.max_steps": 1,
            "train.prompts_per_step": 2,
            "train.group_size": 2,
            "train.filter_groups": False,
            "rollouts.workers": 1,
        },
        "evaluate": {"rollouts.workers": 1},
        "video_latent": _STEPS,
        "depth_scaling": _STEPS,
    },
)


@pytest.fixture(autouse=True)
def torch_as_before() -> Iterator[None]:
    """The study sets torch up for its small model, which hypothesis refuses to work with."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    torch.set_flush_denormal(False)


@pytest.mark.parametrize("name", ["tiles", pytest.param("balls", marks=pytest.mark.slow)])
def test_the_chain(name: str, tmp_path: Path) -> None:
    results = run_study(tmp_path, [0], ["la_dapo"], Console(quiet=True), TINY, name)
    assert list(results["figures"]) == ["zero_shot", "sft", "la_dapo"]
    table = (tmp_path / name / "table.md").read_text()
    assert "| LA-DAPO |" in table and "1-Hop" in table
    seed = tmp_path / name / "seed0"
    kept = [json.loads(line) for line in (seed / "select" / "kept.jsonl").open()]
    assert len(kept) == 8 and all(row["imagine"] for row in kept)
    for stage, policy in (("sft", "base"), ("la_dapo", "sft")):
        recipe = (seed / stage / "recipe.yaml").read_text()
        assert str(seed / "select" / "kept.jsonl") in recipe
        assert str(seed / policy / "policy") in recipe
    evaluated = json.loads((seed / "held_out" / "la_dapo" / "results.json").read_text())
    assert evaluated["policy"] == str(seed / "la_dapo" / "policy")
    assert evaluated["benchmarks"]["held_out"]["modes"]["free"]["answers"] == 4


@pytest.mark.slow
def test_started_again_it_computes_nothing_and_says_the_same(tmp_path: Path) -> None:
    variants = ["text_only", "published"]
    results = run_study(tmp_path, [0], variants, Console(quiet=True), TINY)
    assert list(results["figures"]) == ["zero_shot", "sft", "sft_text", *variants]
    seed = tmp_path / "tiles" / "seed0"
    before = {p: p.stat().st_mtime_ns for p in seed.rglob("*.safetensors")}
    assert run_study(tmp_path, [0], variants, Console(quiet=True), TINY) == results
    assert {p: p.stat().st_mtime_ns for p in seed.rglob("*.safetensors")} == before


@pytest.mark.parametrize(
    ("system", "rows"),
    [("video_latent", ["self_forcing", "pause"]), ("depth_scaling", ["chain", "both", "direct"])],
)
def test_rows_of_single_runs(system: str, rows: list[str], tmp_path: Path) -> None:
    """And a system that comes later finds the clips and the perception of the one before."""
    results = run_study(tmp_path, [0], rows, Console(quiet=True), TINY, system=system)
    assert list(results["figures"]) == [name for name in SYSTEMS[system].variants if name in rows]
    for (figures,) in results["figures"].values():
        assert figures["steps"] == figures["tokens"] + figures["latents"] > 0
        assert figures["seconds"] > 0
    folder = tmp_path / "tiles" / system
    assert json.loads((folder / "results.json").read_text()) == results
    assert "AR steps" in (folder / "table.md").read_text()

    seed = tmp_path / "tiles" / "seed0"
    kept = [*seed.rglob("*.safetensors"), seed / "perception" / "perception.pt"]
    before = {path: path.stat().st_mtime_ns for path in kept}
    assert run_study(tmp_path, [0], rows, Console(quiet=True), TINY, system=system) == results
    assert {path: path.stat().st_mtime_ns for path in kept} == before


def test_unknown_names(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'x' is unknown; choose of future_l1, video_latent, dep"):
        run_study(tmp_path, [0], None, Console(quiet=True), TINY, system="x")
    with pytest.raises(RecipeError, match="'la_dapo' is unknown; choose of direct, chain, self_"):
        run_study(tmp_path, [0], ["la_dapo"], Console(quiet=True), TINY, system="video_latent")
    with pytest.raises(RecipeError, match="'no_such' is unknown; choose of la_dapo"):
        run_study(tmp_path, [0], ["no_such"], Console(quiet=True), TINY)
    with pytest.raises(RecipeError, match="--world: 'sea' is unknown; choose of tiles, balls"):
        run_study(tmp_path, [0], ["la_dapo"], Console(quiet=True), TINY, world="sea")


@pytest.mark.parametrize("name", world.SETTINGS)
def test_rows(name: str) -> None:
    def row(index: int, style: world.Style) -> world.Row:
        return world.row_of(world.SETTINGS[name], 0, "train", index, style)

    assert {row(i, "direct")["question_type"] for i in range(40)} == {"hop1", "hop2"}
    assert {row(i, "direct")["template"] for i in range(40)} == {0, 1}
    for i in range(40):
        taught, text = row(i, "latents"), row(i, "text")
        hops = int(taught["question_type"][-1])
        # The state that a span begins with, and the three moves of a hop, two frames each.
        assert taught["imagine"] == [list(range(2, 10)), list(range(8, 16))][:hops]
        assert taught["frames"] == [0, 1, 2, 3] and len(taught["reasoning"]) == hops + 1
        if name == "tiles":
            places = [taught["path"][1 + 3 * hops]]
            assert taught["answer"] == "ABCD"[places[0][1]]
        else:
            places = [divmod(cell, 4) for cell in taught["cells"][1 + 3 * hops]]
            (_, white), (_, black) = places
            assert taught["answer"] == "ABCD"[2 * (white > 1) + (black > 1)]
        cells = " ".join(f"r{row + 1}c{column + 1}" for row, column in places)
        assert taught["reasoning"][-1] == cells
        assert text["answer"] == taught["answer"] and "imagine" not in text
        assert text["reasoning"].endswith(cells)
        words = text["reasoning"].split()
        states = 3 * hops if words[0] == "next" else hops
        assert len(words) == states * len(places) + (words[0] == "next")
        assert row(i, "seen")["frames"] == list(range(4 + 6 * hops))
        assert row(i, "direct").get("reasoning") is None
        steps = world.row_of(world.SETTINGS[name], 0, "train", i, "steps", 2)
        assert steps["frames"] == [0, 1, 2, 3] and steps["question_type"] == "hop2"
        assert len(steps["steps"]) == 6 and "reasoning" not in steps and "imagine" not in steps
        assert steps["steps"][3 * hops - 1] == cells
        assert row(i, "steps")["steps"] == steps["steps"][: 3 * hops]


def test_interval_over_seeds() -> None:
    # Mean 0.8, standard deviation 0.1, three seeds: 4.303 · 0.1 / √3.
    mean, half = interval([0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.8) and half == pytest.approx(0.24843, abs=1e-5)
    assert interval([0.5]) == (0.5, None)
    accuracy, cosine = HOPS["all"], HOPS["neighbours"]
    assert cell(accuracy, [0.7, 0.8, 0.9]) == "80.0 ± 24.8" and cell(accuracy, [None]) == "-"
    assert cell(cosine, [0.25]) == "0.25"
    table = study_table({"a": [{"hop1": 0.5}]}, {"a": "A"}, HOPS, "t")
    assert table.markdown().splitlines()[-1] == "| A | 50.0 | - | - | - | - |"
    mode = {"accuracy": 0.5, "tokens": 4.0, "latents": 6.0, "neighbours": None}
    table = study_table({"a": [by_cost({"modes": {"free": mode}}, 61.4)]}, {"a": "A"}, COST, "t")
    assert table.markdown().splitlines()[-1] == "| A | 50.0 | 4.0 | 6.0 | 10.0 | - | 61 |"


def test_variants_change_what_they_say() -> None:
    assert VARIANTS["la_dapo"].rl == {}
    left = [reward["use"] for reward in VARIANTS["no_contrast"].rl["rewards"]]
    assert left == ["accuracy", "format", "temporal_diversity"]
    assert VARIANTS["published"].rl["train.objective"] == "published"


@pytest.mark.parametrize("name", VARIANTS)
def test_every_variant_is_a_recipe_that_its_trainer_takes(name: str, tmp_path: Path) -> None:
    settings = [f"{key}={json.dumps(value)}" for key, value in VARIANTS[name].rl.items()]
    recipe = load_recipe(FOLDER / "la_dapo.yaml", [f"output={tmp_path}", *settings])
    assert trainer_config(recipe).max_steps == 40


@pytest.mark.parametrize(
    ("system", "name"),
    [*(("video_latent", n) for n in VIDEO_LATENT), *(("depth_scaling", n) for n in DEPTH_SCALING)],
)
def test_every_row_is_a_recipe_that_its_trainer_takes(
    system: str, name: str, tmp_path: Path
) -> None:
    seed = Seed(tmp_path, 0, Scale(), Console(quiet=True))
    rows = SYSTEMS[system].rows
    assert rows is not None
    recipe = seed.recipe(system, name, rows[name].changes)
    assert isinstance(recipe, SFTRecipe) and recipe.evaluation is not None
    config, base = trainer_config(recipe), load_recipe(FOLDER / f"{system}.yaml").train
    assert (config.max_steps, recipe.train.rows_per_step) == (base.max_steps, base.rows_per_step)
    imagines = name not in ("direct", "chain")
    assert (recipe.evaluation.modes == ["never"]) == (not imagines)
    assert (config.schedule is not None) == (
        name == "chain" or (imagines and system == "depth_scaling")
    )
    if name == "chain":
        assert config.schedule.stage_at(config.max_steps) == 0


def test_what_the_rows_change() -> None:
    assert VIDEO_LATENT["self_forcing"].changes == DEPTH_SCALING["curriculum"].changes == {}
    both = DEPTH_SCALING["both"].changes
    assert both == DEPTH_SCALING["replay"].changes | DEPTH_SCALING["depth"].changes


def test_the_command_s_help_names_all_rows() -> None:
    said = " ".join(inspect.getsource(cli.study).replace('"', "").split())
    for system in SYSTEMS.values():
        assert f"{system.name}: {', '.join(system.variants)}." in said

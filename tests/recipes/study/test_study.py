"""The four recipes on a handful of clips: every stage reads what the one before wrote."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from rich.console import Console

from recipes.configs import trainer_config
from recipes.loading import load_recipe
from recipes.quickstart.perception import Perception
from recipes.study import world
from recipes.study.chain import Chain, Scale
from recipes.study.main import run_study
from recipes.study.table import cell, interval, study_table
from recipes.study.variants import VARIANTS
from recipes.study.world import row_of
from rl.errors import RecipeError

FOLDER = Path(world.__file__).parent
_STEPS = {"train.max_steps": 1, "train.batch_size": 2, "train.micro_batch": 2, "train.warmup": 0}
TINY = Scale(
    candidates=8,
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
    },
)


def test_the_chain(tmp_path: Path) -> None:
    chain = Chain(tmp_path, 0, TINY, Console(quiet=True))
    chain.prepare()
    chain.select()
    chain.train("la_dapo")
    found = chain.evaluate("la_dapo")
    assert found["modes"]["free"]["answers"] == 4
    kept = [json.loads(line) for line in (tmp_path / "select" / "kept.jsonl").open()]
    assert len(kept) == 8 and all(row["imagine"] for row in kept)
    for name, policy in (("sft", "base"), ("la_dapo", "sft")):
        recipe = (tmp_path / name / "recipe.yaml").read_text()
        assert str(tmp_path / "select" / "kept.jsonl") in recipe
        assert str(tmp_path / policy / "policy") in recipe
    results = json.loads((tmp_path / "held_out" / "la_dapo" / "results.json").read_text())
    assert results["policy"] == str(tmp_path / "la_dapo" / "policy")


@pytest.mark.slow
def test_the_study(tmp_path: Path) -> None:
    variants = ["la_dapo", "published"]
    results = run_study(tmp_path, [0], variants, Console(quiet=True), TINY)
    assert list(results["figures"]) == ["zero_shot", "sft", *variants]
    seed = tmp_path / "seed0"
    table = (tmp_path / "table.md").read_text()
    assert "| published objective |" in table and "1-Hop" in table
    # Started again it computes nothing, and says the same.
    before = {p: p.stat().st_mtime_ns for p in seed.rglob("*.safetensors")}
    assert run_study(tmp_path, [0], variants, Console(quiet=True), TINY) == results
    assert {p: p.stat().st_mtime_ns for p in seed.rglob("*.safetensors")} == before


def test_unknown_variant(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="'no_such' is unknown; choose of la_dapo"):
        run_study(tmp_path, [0], ["no_such"], Console(quiet=True), TINY)


def test_rows() -> None:
    rows = [row_of(0, "train", i, "latents") for i in range(40)]
    assert {row["question_type"] for row in rows} == {"hop1", "hop2"}
    for i, row in enumerate(rows):
        hops = int(row["question_type"][-1])
        assert len(row["imagine"]) == hops and len(row["reasoning"]) == hops + 1
        # The state that a span begins with, and the three moves of a hop, two frames each.
        assert row["imagine"] == [list(range(2, 10)), list(range(8, 16))][:hops]
        end = row["path"][1 + 3 * hops]
        assert row["reasoning"][-1] == f"r{end[0] + 1}c{end[1] + 1}"
        assert row["answer"] == "ABCD"[end[1]] and row["frames"] == [0, 1, 2, 3]
        text = row_of(0, "train", i, "text")
        assert text["answer"] == row["answer"] and "imagine" not in text
        assert text["reasoning"].split()[-1] == row["reasoning"][-1]
        words = text["reasoning"].split()
        assert len(words) == (1 + 3 * hops if words[0] == "next" else hops)
        assert row_of(0, "train", i, "seen")["frames"] == list(range(4 + 6 * hops))


def test_interval_over_seeds() -> None:
    # Mean 0.8, standard deviation 0.1, three seeds: 4.303 · 0.1 / √3.
    mean, half = interval([0.7, 0.8, 0.9])
    assert mean == pytest.approx(0.8) and half == pytest.approx(0.24843, abs=1e-5)
    assert interval([0.5]) == (0.5, None)
    assert cell("all", [0.7, 0.8, 0.9]) == "80.0 ± 24.8" and cell("all", [None]) == "-"
    assert cell("neighbours", [0.25]) == "0.25"
    table = study_table({"a": [{"hop1": 0.5}]}, {"a": "A"}, "t")
    assert table.markdown().splitlines()[-1] == "| A | 50.0 | - | - | - | - |"


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

"""Rewards of users in whole runs: found by path, isolated, and unable to take a run down."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from recipes.check import check_recipe
from recipes.loading import load_recipe
from rl.errors import RecipeError, RewardError
from rl.records import read_record
from tests.recipes.test_run import metrics, run
from tests.recipes.worlds import write_recipe

MINE = '''
import os, time

def coin(completion_ids, **_):
    """Right or wrong by the parity of the ids."""
    return [float(sum(ids) % 2) for ids in completion_ids]

def steady(completions, trajectories, trainer_state, log_metric, **_):
    log_metric("steady/step", trainer_state.global_step)
    return [len(t.span_lengths) / 10 for t in trajectories]

def at_step_1(fault):
    def reward(completions, trainer_state, **_):
        return fault(completions) if trainer_state.global_step == 1 else [0.25] * len(completions)
    return reward

sleeps = at_step_1(lambda _: time.sleep(1000))
dies = at_step_1(lambda _: os.kill(os.getpid(), 9))
raises = at_step_1(lambda _: [][1])
lies = at_step_1(lambda completions: [float("nan"), "0"] * (len(completions) // 2))
FAULTY = ("sleeps", "dies", "raises", "lies")
async def always_down(completions, **_):
    raise ConnectionError("no route to host")
'''


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> Callable[..., Path]:
    def write(rewards: list[dict[str, Any]], **changes: Any) -> Path:
        (tmp_path / "mine.py").write_text(MINE)
        coin = {"use": "mine.py:coin", "outcome": True, "weight": 1.0}
        values = {"rewards": [coin, *rewards], "train.filter_groups": False, **changes}
        return write_recipe(tmp_path, tiny_checkpoint, clips / "manifest.jsonl", values)

    return write


def test_a_run_with_failing_rewards_takes_as_many_steps(recipe: Callable[..., Path]) -> None:
    """Every way of failing at once, in the second of three steps."""
    names = ("sleeps", "dies", "raises", "lies")
    faulty = [{"use": f"mine.py:{name}", "timeout_s": 3.0, "weight": 0.05} for name in names]
    path = recipe(
        [*faulty, {"use": "mine.py:steady"}, {"use": "format", "options": {"grammar": "answer"}}],
        **{"train.max_steps": 3, "train.record_latents_every": 2, "scoring": {"max_invalid": 0.5}},
    )
    result, _ = run(path)
    folder = path.parent / "run"
    lines = [m for m in metrics(folder) if "loss" in m]
    assert result.steps == 3 and [m["step"] for m in lines] == [1, 2, 3]
    assert [m["steady/step"] for m in lines] == [0, 1, 2]
    for name in names:
        assert [m[f"rewards/{name}/invalid"] for m in lines] == [0, 1, 0]
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert {(f["reward"], f["kind"]) for f in faults if f["lost"]} == {
        ("sleeps", "hung"), ("dies", "died"), ("raises", "raised"), ("lies", "invalid"),
    }  # fmt: skip
    assert {f["step"] for f in faults} == {1}

    # What was sampled lies beside it, with every reward of every trajectory; nothing became 0.
    records = sorted((folder / "trajectories").glob("*.jsonl"))
    assert [r.name for r in records] == [
        "step-000000.jsonl",
        "step-000001.jsonl",
        "step-000002.jsonl",
    ]
    for step, file in enumerate(records):
        rows = [row for g in read_record(file) for row in g.rows]
        assert len(rows) == 4 and all(row["rewards"]["steady"] >= 0 for row in rows)
        for name in names:
            values = [row["rewards"][name] for row in rows]
            assert all(map(math.isnan, values)) if step == 1 else values == [0.25] * 4
            assert all((name in row.get("invalid", {})) == (step == 1) for row in rows)
        has_arrays = [g.trajectories is not None for g in read_record(file)]
        assert has_arrays == [step % 2 == 0] * 2


def test_too_many_invalid_values_stop_a_run_and_it_goes_on_later(
    recipe: Callable[..., Path],
) -> None:
    down = [{"use": "mine.py:always_down", "weight": 0.1, "timeout_s": 20.0}]
    path = recipe(down, scoring={"max_invalid": 0.2})  # one bad step of four is more
    with pytest.raises(RewardError, match="'always_down' has no valid value for 4 of the last 4"):
        run(path)
    # Told to go on without it, and with another deadline, the run is the same run.
    path = recipe([{**down[0], "timeout_s": 30.0}], scoring={"max_invalid": 1.0})
    result, _ = run(path)
    assert result.steps == 2


@pytest.mark.parametrize(
    ("reward", "complaint"),
    [
        ({"use": "nowhere.py:f"}, "there is no file"),
        ({"use": "mine.py:gone"}, "has no 'gone'"),
        ({"use": "no_such_package:f"}, "No module named 'no_such_package'"),
        ({"use": "mine.py:steady", "options": {"depth": 3}}, "unknown option 'depth'"),
        ({"use": "needs.py:Thing"}, r"its options \['size'\] have no default"),
        ({"use": "needs.py:f"}, r"asks for \['solution'\], which is neither a column of the data"),
        ({"use": "needs.py:g", "options": {"sizee": 1}}, "unknown option 'sizee'; did you mean"),
        ({"use": "broken.py:f"}, "SyntaxError"),
    ],
)
def test_check_finds_rewards_that_cannot_work(
    recipe: Callable[..., Path], reward: dict[str, Any], complaint: str
) -> None:
    path = recipe([reward])
    (path.parent / "needs.py").write_text(
        "def f(completions, solution): ...\ndef g(completions, size=3): ...\n"
        "class Thing:\n def __init__(self, size): ...\n def __call__(self, completions): ...\n"
    )
    (path.parent / "broken.py").write_text("def f(:")
    with pytest.raises(RecipeError, match=complaint) as caught:
        check_recipe(load_recipe(path))
    assert reward["use"].split(":")[1] in str(caught.value)


def test_check_notes_shaping_that_outweighs_the_outcome(recipe: Callable[..., Path]) -> None:
    path = recipe([{"use": "format", "weight": 1.5}])
    (note,) = check_recipe(load_recipe(path)).warnings
    assert "'format' can outweigh the outcome: weight times range is 1.5" in note


def test_only_the_named_file_is_imported(recipe: Callable[..., Path], tmp_path: Path) -> None:
    """Neither a file of that name elsewhere nor what lies beside it."""
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    for trap in (elsewhere / "mine.py", tmp_path / "json.py", tmp_path / "sitecustomize.py"):
        trap.write_text("raise SystemExit('imported by mistake')")
    path = recipe([{"use": "mine.py:steady"}])
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(elsewhere)
        plan = check_recipe(load_recipe(path))
    assert [term.name for term in plan.rewards] == ["coin", "steady"]
    with pytest.raises(RecipeError, match="imported by mistake"):
        check_recipe(load_recipe(path, ["rewards.1.use=elsewhere/mine.py:f"]))

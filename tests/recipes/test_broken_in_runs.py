"""A clip that cannot be read does not take a run of reinforcement learning down."""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from recipes.loading import load_recipe
from recipes.run import run_recipe
from rl.errors import VideoError
from tests.recipes.worlds import write_recipe

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def manifest(tmp_path_factory: pytest.TempPathFactory, clips: Path) -> Path:
    """Three rows, the second of which has a file of noise."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [json.loads(line) for line in (clips / "manifest.jsonl").read_text().splitlines()][:3]
    for row in rows:
        row["video"] = str(clips / row["video"])
    (folder / "noise.mp4").write_bytes(b"\0" * 999)
    rows[1]["video"] = str(folder / "noise.mp4")
    (folder / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return folder / "rows.jsonl"


@pytest.mark.parametrize("rule", ["skip", "replace"])
def test_a_run_goes_on(tmp_path: Path, tiny_checkpoint: Path, manifest: Path, rule: str) -> None:
    rows = [json.loads(line) for line in manifest.read_text().splitlines()]
    gone = tmp_path / "gone.jsonl"  # has the id of a row that is trained on
    gone.write_text("\n".join(map(json.dumps, [{**rows[0], "video": "gone.mp4"}, rows[2]])))
    changes = {
        "data.bad_videos": rule,
        "train.prompts_per_step": 3,
        "train.filter_groups": False,
        "evaluation": {"manifest": str(gone), "modes": ["free"]},
    }
    path = write_recipe(tmp_path, tiny_checkpoint, manifest, changes)
    run_recipe(load_recipe(path), Console(file=io.StringIO()))
    logged = [
        json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().split("\n")[:-1]
    ]
    trained = [row["groups/trained"] for row in logged if "groups/trained" in row]
    assert trained == pytest.approx([2 / 3 if rule == "skip" else 1.0] * 2)
    assert all(row["groups/video"] >= 1 for row in logged if "groups/trained" in row)
    row, lost = map(json.loads, (tmp_path / "run/skipped.jsonl").read_text().splitlines())
    assert row["file"].endswith("noise.mp4") and row["id"] in row["reason"]
    assert (lost["id"], lost["file"]) == (rows[0]["id"], str(tmp_path / "gone.mp4"))
    evaluation = json.loads((tmp_path / "run/result.json").read_text())["evaluation"]
    assert evaluation["skipped"] == {rows[0]["id"]: lost["reason"]}


def test_a_run_stops(tmp_path: Path, tiny_checkpoint: Path, manifest: Path) -> None:
    path = write_recipe(tmp_path, tiny_checkpoint, manifest, {"train.prompts_per_step": 3})
    with pytest.raises(VideoError, match=r"sample '.*noise\.mp4: not a video"):
        run_recipe(load_recipe(path), Console(file=io.StringIO()))

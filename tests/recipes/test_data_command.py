"""Data sets of others in recipes, and `foresight data`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel
from typer.testing import CliRunner

from recipes.cli import app
from recipes.schema.base import DataSource
from tests.recipes.worlds import write_recipe


class _Holder(BaseModel):
    source: DataSource


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "300"})
    return result.exit_code, result.output


def future_bench(clip: str, hop: int) -> dict[str, Any]:
    options = {"A": "left", "B": "right [red]"}
    question = "Where next?" if hop == 1 else "Where next?\nA) left\nB) right [red]"
    return {
        "id": str(hop),
        "video_path": f"/theirs/video_dataset/{clip}",
        "qa": {"Question": question, "Options": options, "Answer": "B"},
        "question_type": f"hop{hop}",
    }


@pytest.fixture
def bench(tmp_path: Path) -> Path:
    file = tmp_path / "bench.json"
    file.write_text(json.dumps([future_bench(f"clip{i}.mp4", i + 1) for i in range(4)]))
    return file


def test_check_says_what_was_recognised(bench: Path, tiny_checkpoint: Path, clips: Path) -> None:
    changes = {"data.video_root": str(clips), "data.validation": str(clips / "manifest.jsonl")}
    recipe = write_recipe(bench.parent, tiny_checkpoint, bench, changes)
    code, output = invoke("check", recipe)
    assert code == 0, output
    assert "data.train is futurebench: FutureBench, because rows have video_path," in output
    assert "data.validation" not in output  # our own rows need no explaining
    assert "rows 4 for training, 4 for validation" in output
    code, output = invoke("check", recipe, "--set", "data.format=futurbench")
    assert code == 2 and "did you mean 'futurebench'?" in output


def test_check_with_videos_that_are_missing(
    bench: Path, tiny_checkpoint: Path, clips: Path
) -> None:
    rows = json.loads(bench.read_text())
    bench.write_text(json.dumps([*rows, future_bench("gone.mp4", 9)]))
    recipe = write_recipe(bench.parent, tiny_checkpoint, bench, {"data.video_root": str(clips)})
    code, output = invoke("check", recipe)
    assert code == 2 and "row 5: column 'video_path' names" in output
    code, output = invoke("check", recipe, "--set", "data.bad_videos=skip")
    assert code == 0 and "note: 1 rows have no video and will be skipped" in output


def test_data_shows_rows_as_they_are_asked(bench: Path, clips: Path) -> None:
    code, output = invoke("data", bench, "--video-root", clips)
    assert code == 0, output
    assert "futurebench: FutureBench, because" in output
    assert "4 rows; 4 with options; answers B 4" in output
    assert output.count("Where next?\nA. left\nB. right [red]\nanswer B\n") == 3
    code, output = invoke("data", bench, "--video-root", bench.parent)
    assert code == 2 and "none of its 4 rows has its video" in output


def test_data_with_a_mapping(tmp_path: Path) -> None:
    (tmp_path / "a.mp4").write_bytes(b"0")
    rows = [{"clip": c, "q": {"text": "Next?"}, "label": "up"} for c in ("a.mp4", "b.mp4")]
    file = tmp_path / "theirs.json"
    file.write_text(json.dumps(rows))
    code, output = invoke("data", file)
    assert code == 2 and "{video: clip, question: their name for the question, ans" in output
    names = ("video=clip", "question=q.text", "answer=label")
    code, output = invoke("data", file, *(f"--columns={name}" for name in names))
    assert code == 0, output
    assert "1 rows; 1 without their video" in output and "missing: theirs:2: " in output
    code, output = invoke("data", file, "--columns", "video")
    assert code == 2 and "write ours=theirs" in output


@pytest.mark.parametrize(
    ("source", "there", "read"),
    [
        ("rows.jsonl", False, "{}/rows.jsonl"),
        ("data/rows.jsonl", False, "{}/data/rows.jsonl"),
        ("../shards:test", False, "{}/../shards:test"),
        ("owner/name", False, "owner/name"),
        ("owner/name:test", False, "owner/name:test"),
        ("owner/name/config:test", False, "owner/name/config:test"),
        ("owner/name:test", True, "{}/owner/name:test"),
        ("owner/name", True, "{}/owner/name"),
        ("owner/typo", True, "{}/owner/typo"),  # the folder is there: no name on the Hub
    ],
)
def test_sources_are_beside_the_recipe_or_on_the_hub(
    tmp_path: Path, source: str, there: bool, read: str
) -> None:
    if there:
        (tmp_path / "owner/name").mkdir(parents=True)
    holder = _Holder.model_validate({"source": source}, context={"folder": tmp_path})
    wanted = read.format(tmp_path)
    if "{}" in read:
        wanted = wanted.replace(f"{tmp_path}/../", f"{tmp_path.parent}/")
    assert holder.source == wanted

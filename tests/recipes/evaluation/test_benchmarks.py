"""Benchmarks end to end: rows in their shape, a plain tiny model on the pool, files and tables."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from rich.console import Console
from typer.testing import CliRunner

from recipes.cli import app
from recipes.evaluation.benchmarks import BENCHMARKS, find_benchmark
from recipes.evaluation.benchmarks.asking import asking
from recipes.evaluation.benchmarks.judged import JudgeGrader
from recipes.evaluation.predictions import read_predictions
from recipes.evaluation.run import EvaluationRun, run_evaluation
from recipes.loading import load_any_recipe
from recipes.schema import EvaluateRecipe
from rl.data.formats import FORMATS
from rl.errors import RecipeError
from rl.trajectory import Sample
from tests.rewards.judge_server import JudgeServer, Reply, serving

HOPS = ("hop1", "hop5", "hop2", "hop1")
OPTIONS = {"A": "left", "B": "right", "C": "up", "D": "down"}


def grade(prompt: str, number: int) -> Reply:
    """5 and 2; down for every question about clip1."""
    return Reply(status=400) if "clip1" in prompt else Reply('{"reasoning": 5, "answer": 2}')


@pytest.fixture(scope="module")
def judge() -> Iterator[JudgeServer]:
    with serving(grade) as server:
        yield server


@pytest.fixture(scope="module")
def recipe(
    tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path, clips: Path, judge: JudgeServer
) -> Path:
    """FutureBench with a broken clip, TwiFF-Bench and rows of one's own, on a plain model."""
    folder = tmp_path_factory.mktemp("evaluate")
    names = [f"clip{i}" for i in range(4)]
    (folder / "broken.mp4").write_bytes((clips / "clip1.mp4").read_bytes()[:900])
    videos = [str(clips / f"{name}.mp4") for name in names]
    videos[2] = str(folder / "broken.mp4")
    rows: list[dict[str, Any]] = [
        {
            "id": name,
            "video_path": video,
            "qa": {"Question": "What is next?", "Options": OPTIONS, "Answer": "B"},
            "question_type": hop,
        }
        for name, video, hop in zip(names, videos, HOPS, strict=True)
    ]
    (folder / "futurebench.json").write_text(json.dumps(rows))
    twiff = [
        {
            "video": str(clips / f"{name}.mp4"),
            "question": f"What follows in {name}?",
            "answer": "It goes left.",
            "question_images_index": [1, 2],
            "reasoning_images_index": [6],
        }
        for name in names[:2]
    ]
    pq.write_table(pa.Table.from_pylist(twiff), folder / "twiff.parquet")
    values = {
        "stage": "evaluate",
        "output": "out",
        "policy": {"path": str(tiny_checkpoint)},
        "data": {"bad_videos": "skip", "frames": {"count": 2}},
        "benchmarks": [
            {"use": "futurebench", "data": "futurebench.json", "max_new_tokens": 4},
            {
                "use": "twiff_bench",
                "data": "twiff.parquet",
                "max_new_tokens": 4,
                "modes": ["never", "always"],
                "judge": {"base_url": judge.base_url, "model": "j", "cache": "j.db", "retries": 0},
            },
            {"data": str(clips / "manifest.jsonl"), "limit": 3, "by": ["level"], "name": "mine",
             "max_new_tokens": 4},
        ],
    }  # fmt: skip
    path = folder / "evaluate.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def run(path: Path, *overrides: str) -> tuple[EvaluationRun, str]:
    console = Console(width=120, record=True, file=io.StringIO())
    loaded = load_any_recipe(path, overrides)
    assert isinstance(loaded, EvaluateRecipe)
    return run_evaluation(loaded, console), console.export_text()


@pytest.fixture(scope="module")
def done(recipe: Path) -> tuple[EvaluationRun, str]:
    return run(recipe)


def test_presets_are_published_ones() -> None:
    """As published; and each is read by a reader that exists."""
    future, twiff = find_benchmark("futurebench"), find_benchmark("twiff_bench")
    assert (future.frames.count, future.max_new_tokens, future.scoring) == (32, 2048, "letter")
    assert (twiff.frames.count, twiff.max_new_tokens, twiff.scoring) == (8, 4096, "judge")
    assert {b.format for b in BENCHMARKS.values()} <= {*FORMATS}
    with pytest.raises(RecipeError, match="did you mean 'futurebench'"):
        find_benchmark("future_bench")


def test_predictions_are_whole(done: tuple[EvaluationRun, str]) -> None:
    folder = done[0].output
    rows = read_predictions(folder / "predictions" / "futurebench.parquet")
    assert [row["id"] for row in rows] == ["clip0", "clip1", "clip3"]
    assert [row["by_question_type"] for row in rows] == ["hop1", "hop5", "hop1"]
    assert {(row["benchmark"], row["mode"], row["answer"]) for row in rows} == {
        ("futurebench", "never", "B")  # a plain model
    }
    assert [row["frames"] for row in rows] == [[*range(4)], [*range(8)], [*range(12)]]  # all, of 32
    assert all(row["options"] == [*OPTIONS.values()] for row in rows)
    assert all(row["question"] == "What is next?" and row["seconds"] > 0 for row in rows)
    assert all(row["extracted"] is None and row["value"] == 0.0 for row in rows)
    judged = read_predictions(folder / "predictions" / "twiff_bench.parquet")
    assert [(r["mode"], r["value"], r["grade_reasoning"], r["grade_answer"]) for r in judged] == [
        ("never", 2.5, 5.0, 0.0),  # without an <answer>, that is worth nothing
        ("never", None, None, None),
        ("always", 2.5, 5.0, 0.0),
        ("always", None, None, None),
    ]
    assert "answered 400" in judged[1]["reason"] and judged[0]["reason"] is None
    assert [r["spans"] > 0 for r in judged] == [False, False, True, True]
    assert not list(folder.rglob("*.part"))


def test_figures_and_tables(done: tuple[EvaluationRun, str], judge: JudgeServer) -> None:
    result, said = done
    folder, scores = result.output, result.evaluations["futurebench"].scores["never"]
    assert (scores.answers, scores.right, scores.unparsed) == (3, 0, 3)
    figures = json.loads((folder / "results.json").read_text())["benchmarks"]
    future = figures["futurebench"]
    assert future["modes"]["never"]["figures"]["accuracy"]["high"] == pytest.approx(
        0.5615, abs=1e-4
    )
    assert set(future["breakdowns"]["question_type"]["never"]) == {"hop1", "hop5"}
    assert list(future["skipped"]) == ["clip2"] and "broken.mp4" in future["skipped"]["clip2"]
    twiff = figures["twiff_bench"]["modes"]["never"]
    assert twiff["judged"] == 1 and twiff["figures"]["mean"] == {
        "value": 2.5, "low": None, "high": None, "count": 1,
    }  # fmt: skip
    assert "right" not in twiff and list(twiff["reasons"].values()) == [1]
    assert set(figures["mine"]["breakdowns"]["level"]["never"]) == {"0", "1", "2"}
    table = (folder / "table.md").read_text()
    assert "| imagining | 1-Hop | Interp | AVG |" in table
    assert "| forbidden | 0.0 [0.0-65.8] | 0.0 [0.0-79.3] | 0.0 [0.0-56.1] |" in table
    assert "| forbidden | 5.00 | 0.00 | 2.50 |" in table and "skipped clip2" in table
    assert "1-Hop" in said and "skipped clip2" in said
    assert "futurebench: 4 rows" in said
    # Prompts are asked side by side, so either may have come first.
    first = [prompt for prompt in judge.prompts if "in clip0?" in prompt]
    assert first and all("REFERENCE\nIt goes left" in prompt for prompt in first)


def test_killed_evaluation_goes_on(
    recipe: Path, done: tuple[EvaluationRun, str], judge: JudgeServer
) -> None:
    """With all answers there no worker starts, and the judge is asked only what it did not answer;
    other settings are refused by name.
    """
    folder, asked = done[0].output, len(judge.prompts)
    before = {p.name: read_predictions(p) for p in (folder / "predictions").iterdir()}
    (folder / "predictions" / "twiff_bench.parquet").unlink()
    with pytest.raises(RecipeError, match=r"answers/futurebench holds .*: data was '4 rows, "):
        run(recipe, "benchmarks.0.limit=2")
    mine = yaml.safe_load(recipe.read_text())
    mine["benchmarks"] = mine["benchmarks"][1:]
    again = recipe.with_name("again.yaml")
    again.write_text(yaml.safe_dump(mine))
    result, said = run(again)
    assert "transformers samples" not in said and "transformers samples" in done[1]
    assert {re.search(r"clip\d", p)[0] for p in judge.prompts[asked:]} == {"clip1"}  # type: ignore[index]
    for name in ("twiff_bench.parquet", "mine.parquet"):
        assert read_predictions(folder / "predictions" / name) == before[name]
    assert set(result.evaluations) == {"twiff_bench", "mine"}
    with pytest.raises(RecipeError, match="max_new_tokens was 4 and is 5"):
        run(again, "benchmarks.1.max_new_tokens=5")


def test_prompt_has_options_and_instruction_once(tiny_checkpoint: Path, clips: Path) -> None:
    from transformers import AutoProcessor

    from rl.data.media import MediaProcessor, question_text

    media = MediaProcessor(AutoProcessor.from_pretrained(tiny_checkpoint))
    sample = Sample("s", str(clips / "clip3.mp4"), "Next?", "A", ("left", "right"), pool=6)
    shown = asking(find_benchmark("mvbench"), media).show(sample)
    text = question_text(shown)
    assert text.startswith("Next?\nA. left\nB. right\nGive the letter") and text.count("left") == 1
    assert (shown.frames, shown.pool) == (tuple(range(12)), 0)
    with pytest.raises(RecipeError, match="TwiFF-Bench is graded by a judge: give `judge`"):
        asking(find_benchmark("twiff_bench"), media)
    with pytest.raises(RecipeError, match="MVBench is graded without a judge"):
        asking(find_benchmark("mvbench"), media, {"base_url": "http://x", "model": "j"})


def test_judge_options() -> None:
    with pytest.raises(RecipeError, match="judge: base_url missing"):
        JudgeGrader({"model": "j"})
    with pytest.raises(RecipeError, match="unknown option 'base_ulr'; did you mean 'base_url'"):
        JudgeGrader({"model": "j", "base_ulr": "http://x"})
    with pytest.raises(RecipeError, match="unknown option 'threshold'"):
        JudgeGrader({"model": "j", "base_url": "http://x", "threshold": 0.5})


def test_judge_grades(tmp_path: Path) -> None:
    """Both grades with an answer; no value where it contradicts itself or there is no reference."""
    replies = {"one": '{"reasoning": 4, "answer": 3}', "two": "I cannot say.", "three": "never"}

    def say(prompt: str, number: int) -> Reply:
        return Reply(next(text for word, text in replies.items() if f"about {word}" in prompt))

    samples = [Sample(n, "v", f"about {n}", "" if n == "three" else "ref") for n in replies]
    with serving(say) as server:
        options = {"base_url": server.base_url, "model": "j", "cache": str(tmp_path / "c.db")}
        one, two, three = JudgeGrader(options)(samples, ["<answer>x</answer>"] * 3)
    assert (one.value, one.grades) == (3.5, {"reasoning": 4.0, "answer": 3.0})
    assert two.value != two.value and "gave no verdict" in two.reason and two.extracted == "x"
    assert three.value != three.value and "reference" in three.reason
    assert len(server.prompts) == 3 and "about three" not in "".join(server.prompts)


def test_command_line(recipe: Path, done: tuple[EvaluationRun, str], tmp_path: Path) -> None:
    def invoke(*arguments: object) -> tuple[int, str]:
        result = CliRunner().invoke(app, ["evaluate", *map(str, arguments)])
        return result.exit_code, " ".join(result.output.split())

    figures = tmp_path / "figures.json"
    code, said = invoke(recipe.with_name("again.yaml"), "--json", figures)
    assert code == 0 and "In " in said and "predictions/, results.json and table.md" in said
    assert set(json.loads(figures.read_text())) == {"twiff_bench", "mine"}
    code, said = invoke(recipe, "--limit", 3)
    assert code == 2 and "--limit" in said and "with --set" in said
    code, said = invoke(tmp_path)
    assert code == 2 and "give the rows" in said
    code, said = invoke(tmp_path, "--data", "x.json", "--benchmark", "mvbanch")
    assert code == 2 and "did you mean 'mvbench'" in said

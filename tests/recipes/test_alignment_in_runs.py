"""Latents against future frames: in a run, and afterwards on what it recorded."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoProcessor
from typer.testing import CliRunner

from recipes.cli import app
from rewards.latent_alignment import latent_alignment
from rl.data.media import MediaProcessor
from rl.policy.loading import load_policy
from rl.records import RecordedGroup, read_record
from rl.sft.targets import compute_targets
from tests.latent import thinking_policy
from tests.recipes.test_run import metrics, run
from tests.recipes.worlds import write_recipe


@pytest.fixture(scope="module")
def thinker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A saved policy that imagines often, as the tiny checkpoint hardly does."""
    folder = tmp_path_factory.mktemp("thinker")
    policy, processor = thinking_policy(tmp_path_factory.mktemp("plain"))
    policy.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def recipe(folder: Path, policy: Path, manifest: Path) -> Path:
    changes = {
        "rewards": [{"use": "accuracy"}, {"use": "latent_alignment"}],
        "train.max_steps": 1,
        "train.group_size": 4,
        "train.max_completion_length": 16,
        "train.filter_groups": False,
        "train.record_latents_every": 1,
    }
    return write_recipe(folder, policy, manifest, changes)


def recorded(folder: Path) -> list[RecordedGroup]:
    return read_record(folder / "run" / "trajectories" / "step-000000.jsonl")


def test_latents_are_compared_with_what_then_happened(
    tmp_path: Path, thinker: Path, clips: Path
) -> None:
    """The numbers of a run are those of the formula and the starting policy's tower, and
    `foresight rewards try` finds them again.
    """
    path = recipe(tmp_path, thinker, clips / "manifest.jsonl")
    assert run(path)[0].steps == 1
    groups = recorded(tmp_path)
    assert len(groups) == 2 and all(group.sample.imagine for group in groups)

    policy = load_policy(thinker, dtype="auto").eval()
    media = MediaProcessor(AutoProcessor.from_pretrained(thinker))
    expected: list[float | None] = []
    for group in groups:
        spans = [replace(group.sample, imagine=(frames,)) for frames in group.sample.imagine]
        found = compute_targets(policy, media, spans)
        targets = [found.of(i).numpy() for i in range(len(spans))]
        for trajectory in group.trajectories or ():
            latents = [span.float().numpy() for span in trajectory.spans()]
            expected.append(latent_alignment(latents, targets))
    values = [row["rewards"]["latent_alignment"] for group in groups for row in group.rows]
    assert len(values) == len(expected) == 8
    numbers = [value for value in expected if value is not None]
    assert len(set(numbers)) > 2 and all(0.0 < value < 1.0 for value in numbers)
    given = [None if math.isnan(value) else value for value in values]
    assert given == pytest.approx(expected, abs=1e-5)
    assert not any(row.get("invalid") for group in groups for row in group.rows)
    assert not (tmp_path / "run" / "faults.jsonl").exists()
    (line,) = (m for m in metrics(tmp_path / "run") if "loss" in m)
    assert line["rewards/latent_alignment/invalid"] == 0.0
    assert line["rewards/latent_alignment/mean"] == pytest.approx(sum(numbers) / len(numbers))

    # No option says where the tower is: the run's recipe does.
    trial = attempt(tmp_path / "run", tmp_path / "trial.json")
    assert trial["options"] == {"policy": str(thinker)}
    assert [row["value"] for row in trial["rows"]] == pytest.approx(expected, abs=1e-5)
    assert trial["faults"] == []


def test_a_policy_that_imagines_nothing_has_no_value_and_no_fault(
    tmp_path: Path, tiny_checkpoint: Path, clips: Path
) -> None:
    path = recipe(tmp_path, tiny_checkpoint, clips / "manifest.jsonl")
    assert run(path)[0].steps == 1
    rows = [row for group in recorded(tmp_path) for row in group.rows]
    assert len(rows) == 8 and not any(row["span_lengths"] for row in rows)
    assert all(math.isnan(row["rewards"]["latent_alignment"]) for row in rows)
    assert not any(row.get("invalid") for row in rows)
    assert not (tmp_path / "run" / "faults.jsonl").exists()


def attempt(on: Path, file: Path) -> dict[str, Any]:
    """What `foresight rewards try latent_alignment` writes as JSON."""
    arguments = ["rewards", "try", "latent_alignment", "--on", str(on), "--json", str(file)]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    return json.loads(file.read_text())

"""The whole quickstart for real: killed twice, resumed, better at the end. About four minutes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from recipes.quickstart.main import run_quickstart
from recipes.quickstart.perception import STATE_FILE as PERCEPTION
from rl.checkpoints import STATE_FILE
from rl.errors import RecipeError
from rl.policy.loading import load_policy

pytestmark = pytest.mark.slow  # the study's tests go through the same stages on a few clips

COMMAND = [sys.executable, "-c", "from recipes.cli import app; app()", "quickstart", "--output"]


def killed_when(output: Path, reached: Callable[[], bool]) -> None:
    """Start the quickstart and end it as a power cut would once `reached`."""
    process = subprocess.Popen([*COMMAND, str(output)], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 600
    while not reached():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A quickstart's folder, killed in perception and in RL, and what was said at last."""
    output = tmp_path_factory.mktemp("quickstart")
    killed_when(output, (output / "perception" / PERCEPTION).is_file)
    checkpoints = output / "la_dapo" / "checkpoints"
    killed_when(output, (checkpoints / "checkpoint-20" / STATE_FILE).is_file)
    last = subprocess.run([*COMMAND, str(output)], capture_output=True, text=True, timeout=600)
    assert last.returncode == 0, last.stderr
    return output, last.stdout


def test_it_learns_when_to_imagine(finished):
    summary = json.loads((finished[0] / "summary.json").read_text())
    before, after = (
        summary["held_out"]["after_sft"]["modes"],
        summary["held_out"]["after_rl"]["modes"],
    )
    assert before["free"]["answers"] == after["free"]["judged"] == 1024
    assert after["free"]["accuracy"] - before["free"]["accuracy"] >= 0.15
    assert after["free"]["imagining"] > before["free"]["imagining"] + 0.2
    assert after["never"]["accuracy"] < 0.5 < after["always"]["accuracy"]
    assert summary["latents_true"]["after_rl"] > 0.5  # chance is 1/16


def test_killed_runs_go_on_and_say_so(finished):
    output, said = finished
    assert "learning to imagine is finished" in said and "answering both ways is finished" in said
    assert "resuming from step 20 of 60" in said
    steps = [json.loads(line) for line in (output / "la_dapo" / "metrics.jsonl").open()]
    trained = [row["step"] for row in steps if "reward" in row and "train_runtime" not in row]
    assert trained == list(range(2, 61, 2))


def test_what_it_leaves(finished):
    output, said = finished
    for picture in ("curves.png", "imagination.png"):
        assert (output / picture).stat().st_size > 10_000
    policy = output / "la_dapo" / "policy"
    assert f'load_policy("{policy}")' in said.replace("\n", "")
    assert load_policy(policy).protocol.max_length == 7


def test_another_seed_needs_another_folder(finished):
    with pytest.raises(RecipeError, match="seed 0, this one has seed 5"):
        run_quickstart(finished[0], seed=5)

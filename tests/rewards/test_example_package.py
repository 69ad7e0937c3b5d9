"""The worked example of `docs/`, installed with pip and found by entry point."""

import asyncio
import inspect
import os
import subprocess
import sys
from importlib.metadata import distributions
from pathlib import Path

import pytest

from rewards.functions import ENTRY_POINTS, read_signature
from tests.rewards.conftest import EXAMPLE


@pytest.fixture
def rewards(example_package, monkeypatch):
    """What its entry points load, by name."""
    monkeypatch.syspath_prepend(str(example_package))
    (package,) = distributions(path=[str(example_package)])
    assert package.name == "foresight-example-rewards"
    yield {
        point.name: point.load() for point in package.entry_points if point.group == ENTRY_POINTS
    }
    for name in [name for name in sys.modules if name.startswith("foresight_example_rewards")]:
        del sys.modules[name]


def test_its_rewards_are_found_and_loaded_from_there(rewards, example_package):
    assert sorted(rewards) == ["brevity", "mentions", "span_count"]
    for reward in rewards.values():
        assert Path(inspect.getfile(reward)).is_relative_to(example_package)


def test_what_they_say_of_themselves(rewards):
    signatures = {name: read_signature(reward) for name, reward in rewards.items()}
    assert {s.range for s in signatures.values()} == {(0.0, 1.0)}
    assert {name: [*s.options] for name, s in signatures.items()} == {
        "brevity": ["words"],
        "mentions": [],
        "span_count": ["wanted", "least_change"],
    }
    assert "objects" in signatures["mentions"].required
    wants = {name for name, signature in signatures.items() if signature.wants("trajectories")}
    assert wants == {"span_count"}
    assert all(signature.summary for signature in signatures.values())


def test_they_score_columns_as_foresight_hands_them(rewards):
    def said(text):
        return [{"role": "assistant", "content": text}]

    columns = {
        "completions": [said("the ball falls"), said("it rolls")],
        "objects": [["ball"], None],
        "trajectories": [],
        "id": ["a", "b"],
    }
    assert rewards["brevity"](**columns, words=2) == [pytest.approx(2 / 3), 1.0]
    assert asyncio.run(rewards["mentions"](**columns)) == [1.0, None]
    assert rewards["span_count"](wanted=1)(**columns) == []


def test_its_own_tests_pass(example_package):
    paths = [str(example_package), str(EXAMPLE.parents[1])]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"],
        cwd=example_package.parent / "source",
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "6 passed" in done.stdout

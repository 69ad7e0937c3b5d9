"""A judge that goes wrong in the middle of a run, in every way that a server can."""

from __future__ import annotations

import json
import math
import re
import socket
import sqlite3
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import pytest
import uvicorn
from fastapi import FastAPI

from rewards.scorer import RewardSet
from rl.records import read_record
from tests.recipes.test_run import metrics, run
from tests.recipes.worlds import write_recipe
from tests.rewards.judge_server import NO, YES, JudgeServer, Reply, free_port

# The tiny policy writes no <answer>, and without one nobody is asked.
MINE = '''
from rewards.judge import Judge

def coin(completion_ids, **_):
    """Right or wrong by the parity of the ids."""
    return [float(sum(ids) % 2) for ids in completion_ids]

class Lenient(Judge):
    """Judges whole completions. Each is told apart, so that no two ask the same."""

    async def __call__(self, *, completions, trainer_state, **columns):
        step = trainer_state.global_step
        whole = [f"<answer>text {step}.{i}</answer>" for i in range(len(completions))]
        return await super().__call__(completions=whole, **columns)
'''
FINE, GARBAGE, BUSY, DOWN, SLOW = "fine", "garbage", "busy", "down", "slow"
STEPS = (FINE, GARBAGE, BUSY, DOWN, SLOW, FINE)
SAID = {
    GARBAGE: "the judge gave no verdict: 'Well, who can tell?'",
    BUSY: "answered 429",
    DOWN: "cannot be reached",
    SLOW: "let a request run into its time limit (2 s, timeout_s)",
}


class Moody:
    """A judge on one port that is up and down, and answers, as `STEPS` says of the step."""

    def __init__(self) -> None:
        self.server = JudgeServer(self._reply)
        self.port = free_port()
        self.mood = FINE
        self._server: uvicorn.Server | None = None
        self._thread: threading.Thread | None = None

    def turn(self, step: int) -> None:
        """Be as `step` wants it, before anything of that step is asked."""
        self.mood = STEPS[step]
        self.stop() if self.mood == DOWN else self.start()

    def start(self) -> None:
        if self._server is not None:
            return
        app = FastAPI()
        app.add_route("/v1/chat/completions", self.server.chat, methods=["POST"])
        config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=0)
        self._server = server = uvicorn.Server(config)
        listener = socket.create_server(("127.0.0.1", self.port))
        self._thread = threading.Thread(target=server.run, args=([listener],), daemon=True)
        self._thread.start()
        while not server.started:
            time.sleep(0.005)

    def stop(self) -> None:
        if self._server is not None and self._thread is not None:
            self._server.should_exit = True
            self._thread.join(timeout=10)
            assert not self._thread.is_alive()
        self._server = None

    def _reply(self, prompt: str, number: int) -> Reply:
        found = re.search(r"text \d+\.(\d+)", prompt)
        assert found is not None
        if self.mood == GARBAGE:
            return Reply("Well, who can tell?")
        if self.mood == BUSY:
            return Reply(status=429, headers={"Retry-After": "0.05"})
        # Real zeros too: what is invalid must not look like one.
        verdict = NO if int(found[1]) % 2 else YES
        return Reply(verdict, delay=60.0 if self.mood == SLOW else 0.0)


@contextmanager
def moody(patch: pytest.MonkeyPatch) -> Iterator[Moody]:
    """The judge, which turns with the steps of whatever run comes."""
    judge, begin = Moody(), RewardSet.begin

    def turning(rewards: RewardSet, state: Any) -> None:
        judge.turn(state.global_step)
        begin(rewards, state)

    patch.setattr(RewardSet, "begin", turning)
    try:
        yield judge
    finally:
        judge.stop()


def test_a_judge_that_goes_wrong_costs_its_own_values_only(
    tmp_path: Path, tiny_checkpoint: Path, clips: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.py").write_text(MINE)
    cache = tmp_path / "judge.sqlite"
    with moody(monkeypatch) as judge:
        options = {
            "base_url": f"http://127.0.0.1:{judge.port}/v1",
            "model": "moody",
            "rule_first": False,
            "retries": 1,
            "timeout_s": 2.0,
            "patience_s": 40.0,
            "cache": str(cache),
        }
        rewards = [
            {"use": "mine.py:coin", "outcome": True, "weight": 1.0},
            {"use": "mine.py:Lenient", "name": "judge", "weight": 0.1, "options": options},
        ]
        changes = {
            "rewards": rewards,
            "train.filter_groups": False,
            "train.max_steps": len(STEPS),
            "train.save_every": len(STEPS),
            "scoring": {"max_invalid": 1.0, "gate_shaping": False},
        }
        path = write_recipe(tmp_path, tiny_checkpoint, clips / "manifest.jsonl", changes)
        result, _ = run(path)
    folder = tmp_path / "run"

    # Every update was made.
    lines = [m for m in metrics(folder) if "loss" in m]
    assert result.steps == 6 and [m["step"] for m in lines] == [1, 2, 3, 4, 5, 6]
    assert [m["rewards/judge/invalid"] for m in lines] == [0, 1, 1, 1, 1, 0]
    assert [m["rewards/coin/invalid"] for m in lines] == [0] * 6
    assert all(math.isfinite(m["loss"]) for m in lines)

    # What could not be judged is no 0, and says why; the rest of a trajectory's reward stands.
    for step, mood in enumerate(STEPS):
        file = folder / "trajectories" / f"step-{step:06d}.jsonl"
        rows = [row for group in read_record(file) for row in group.rows]
        assert len(rows) == 4
        values = [row["rewards"]["judge"] for row in rows]
        reasons = [row.get("invalid", {}).get("judge", "") for row in rows]
        if mood == FINE:
            assert values == [1.0, 0.0, 1.0, 0.0] and not any(reasons)
        else:
            assert all(map(math.isnan, values)) and all(SAID[mood] in r for r in reasons)
        for row, value in zip(rows, values, strict=True):
            given = 0.0 if math.isnan(value) else 0.1 * value
            assert row["rewards"]["coin"] in (0.0, 1.0)
            assert row["total"] == pytest.approx(row["rewards"]["coin"] + given)

    # The causes are on file, each with its step and the samples it cost.
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    assert {fault["step"] for fault in faults} == {1, 2, 3, 4}
    for step, mood in enumerate(STEPS):
        mine = [fault for fault in faults if fault["step"] == step]
        assert sum(fault["lost"] for fault in mine) == (0 if mood == FINE else 4)
        for fault in mine:
            assert (fault["reward"], fault["kind"]) == ("judge", "invalid")
            assert SAID[mood] in fault["message"] and fault["samples"]

    # Nothing was asked more often than agreed, and only what was answered is kept.
    asked = [re.findall(r"text (\d)\.", prompt)[0] for prompt in judge.server.prompts]
    assert {step: asked.count(step) for step in asked} == {
        "0": 4,
        "1": 8,  # once more each, as no reply could be read
        "2": 8,  # once more each, as the server was busy
        "4": 8,  # once more each, as the first try ran out of time
        "5": 4,
    }
    with closing(sqlite3.connect(cache)) as kept:
        stored = [reply for (reply,) in kept.execute("SELECT reply FROM replies")]
    assert sorted(stored) == sorted([YES, NO] * 4)

"""Rewards that hang, die, leak or lie, in real Ray processes."""

import json
import os
import signal
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import ray

from rewards.registry import build_terms
from rewards.scorer import RewardSet
from rewards.terms import RewardTerm
from rl.errors import RecipeError
from tests.rewards.test_scorer import EAST, RIGHT, WRONG, group

FAULTY = Path(__file__).with_name("faulty.py")


@pytest.fixture(scope="module", autouse=True)
def local_ray():
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    ray.shutdown()


def groups(*names):
    return [group(name, (RIGHT, [EAST]), (WRONG, [EAST])) for name in names]


def isolated(*specs, tmp_path=None, **settings):
    faults = tmp_path / "faults.jsonl" if tmp_path else None
    terms = build_terms([{"use": "accuracy"}, *specs], FAULTY.parent)
    return RewardSet(terms, isolated=True, faults=faults, **settings)


def spec(name, **keys):
    return {"use": f"faulty.py:{name}", "timeout_s": 2.0, "weight": 0.1, **keys}


def score(rewards, *names):
    batch = groups(*names)
    return rewards.score(batch, rewards.outcomes(batch))


FAULTS = {
    "sleeps": ({}, "did not answer within 2 s; its process was killed"),
    "raises": ({}, "raised ValueError: cannot read this"),
    "returns_too_few": ({}, "returned 0 values for 2 completions"),
    "gives_nan": ({}, "returned nan"),
    "gives_text": ({}, "returned '1.0' of type str"),
    "kills_itself": ({"timeout_s": 30.0}, "its process died"),
    "hoards": ({"timeout_s": 30.0, "memory_mb": 512}, "raised MemoryError"),
}


@pytest.fixture(scope="module")
def gone_wrong(local_ray, tmp_path_factory):
    """A batch with all the faulty rewards at once, and one that they can score after it."""
    folder = tmp_path_factory.mktemp("faults")
    specs = [spec(name, **keys) for name, (keys, _) in FAULTS.items()]
    with isolated(*specs, tmp_path=folder) as rewards:
        scores = score(rewards, "good", "bad", "fine")
        metrics = dict(rewards.log().metrics)
        (again,) = score(rewards, "good")
    faults = [json.loads(line) for line in (folder / "faults.jsonl").read_text().splitlines()]
    return scores, again, metrics, faults


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_costs_its_own_group_only(name, gone_wrong):
    """And nothing is 0 by accident: the values are 1 or missing."""
    (first, bad, last), again, metrics, faults = gone_wrong
    reason = FAULTS[name][1]
    assert first.components[name] == last.components[name] == [1.0, 1.0]
    assert np.isnan(bad.components[name]).all() and bad.components["accuracy"] == [1.0, 0.0]
    assert all(reason in text for text in bad.invalid[name])
    assert first.invalid == last.invalid == {}
    assert metrics[f"rewards/{name}/invalid"] == pytest.approx(1 / 3)
    written = [fault for fault in faults if fault["reward"] == name]
    assert any(reason in fault["message"] and fault["lost"] == 2 for fault in written)
    assert all("bad" in fault["samples"] for fault in written)
    # The next call finds a process that works.
    assert again.components[name] == [1.0, 1.0]


def test_whatever_is_thrown_stays_a_fault(tmp_path):
    reasons = {
        "cancels": "raised CancelledError",
        "interrupts": "its process died",
        "is_unspeakable": "raised Unspeakable: no readable message",
        "gives_an_error_as_reason": "this and that",
        "talks_too_much": "raised ValueError: blahblah",
    }
    specs = [spec(name, timeout_s=20.0) for name in reasons]
    with isolated(*specs, spec("sees"), max_invalid=1.0, tmp_path=tmp_path) as rewards:
        (scores,) = score(rewards, "good")
        extras = rewards.log().extras
    for name, reason in reasons.items():
        assert np.isnan(scores.components[name]).all()
        assert all(reason in text and len(text) <= 1000 for text in scores.invalid[name])
    assert (tmp_path / "faults.jsonl").stat().st_size < 100_000
    assert extras["gpus"] == ["", ""]  # a process that booked no GPU sees none


def test_a_reward_that_cannot_come_back_does_not_take_the_run_down(tmp_path):
    (tmp_path / "mine.py").write_text(
        "import os, pathlib\n"
        "flag = pathlib.Path(__file__).with_name('flag')\n"
        "assert not flag.exists(), 'the server is gone'\n"
        "def f(completions, **_):\n    flag.touch()\n    os._exit(1)\n"
    )
    terms = build_terms([{"use": "accuracy"}, {"use": "mine.py:f", "weight": 0.1}], tmp_path)
    with RewardSet(terms, isolated=True, max_invalid=1.0) as rewards:
        one, two = score(rewards, "one", "two")
        (again,) = score(rewards, "three")
    assert np.isnan(one.components["f"] + two.components["f"] + again.components["f"]).all()
    assert "did not start again" in again.invalid["f"][0]
    assert "the server is gone" in again.invalid["f"][0]


def test_an_interrupted_run_waits_for_no_deadline():
    before = {thread.name for thread in threading.enumerate()}
    rewards = isolated(spec("sleeps", timeout_s=300.0))
    rewards.start()
    started = time.monotonic()
    timer = threading.Timer(2.0, os.kill, (os.getpid(), signal.SIGINT))
    # A shell that starts tests in the background has them ignore the signal.
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            score(rewards, "bad")
    finally:
        signal.signal(signal.SIGINT, handler)
    rewards.close()
    while {t.name for t in threading.enumerate()} - before - {timer.name}:
        assert time.monotonic() - started < 30  # no thread goes on with it
        time.sleep(0.1)


def test_a_slow_leak_loses_nothing(tmp_path):
    with isolated(spec("leaks", memory_mb=256, timeout_s=30.0), tmp_path=tmp_path) as rewards:
        seen = [score(rewards, "good", "fine")[0].components["leaks"] for _ in range(6)]
    # Two calls fit, the third does not; its groups are scored one by one in a new process.
    assert seen == [[1.0, 1.0], [2.0, 2.0], [1.0, 1.0], *seen[3:]]
    assert not np.isnan(seen).any()
    assert "MemoryError" in (tmp_path / "faults.jsonl").read_text()


def test_what_always_hangs_is_given_up(tmp_path):
    """Its deadline is not waited out for every group of a batch."""
    with isolated(spec("sleeps"), max_invalid=1.0, tmp_path=tmp_path) as rewards:
        names = ["bad"] * 12
        batch = [group(f"{name}", (RIGHT, [EAST])) for name in names]
        outcomes = rewards.outcomes(batch)
        started = time.monotonic()
        scores = rewards.score(batch, outcomes)
        assert time.monotonic() - started < 60  # a dozen deadlines and new processes take longer
        assert np.isnan([s.components["sleeps"] for s in scores]).all()
        assert "given up after it failed again and again" in scores[-1].invalid["sleeps"][0]


def test_nothing_of_a_users_comes_here(tmp_path):
    """User code neither runs nor is unpickled in this process."""
    specs = [spec("gives_own_type"), spec("raises_own_error"), spec("where", range=[0, 1])]
    with isolated(*specs, max_invalid=1.0) as rewards:
        (scores,) = score(rewards, "good")
        log = rewards.log()
    assert scores.components["gives_own_type"] == [0.5, 0.5]
    assert all(type(value) is str and "NotPlain" in value for value in log.extras["odd"])
    assert scores.invalid["raises_own_error"] == ["raised OwnError: this and that"] * 2
    assert dict(log.metrics)["pid"] != os.getpid()
    assert not [name for name in sys.modules if name.endswith("faulty")]


@pytest.mark.parametrize(
    ("code", "complaint"),
    [
        ("import no_such_module\ndef f(**_): ...", "ModuleNotFoundError: No module named 'no_such"),
        ("def f(:", "SyntaxError"),
        ("def g(**_): ...", "has no 'f'; it has g"),
        ("f = 3", "holds no function or class 'f'"),
        ("class f: ...", "has no __call__"),
        ("import sys; sys.exit(5)", "SystemExit: 5"),
        ("import os; os._exit(5)", "died when it was imported"),
        (
            "class f:\n  def __init__(self, size): ...\n  def __call__(self): ...",
            "argument: 'size'",
        ),
    ],
)
def test_a_reward_that_cannot_be_imported_stops_at_once(tmp_path, code, complaint):
    (tmp_path / "mine.py").write_text(code)
    terms = build_terms([{"use": "accuracy"}, {"use": "mine.py:f", "name": "helpful"}], tmp_path)
    with pytest.raises(RecipeError, match="reward 'helpful'") as caught:
        RewardSet(terms, isolated=True).start()
    assert complaint in str(caught.value)


def test_trl_s_own_rewards_work_unchanged():
    from trl.rewards.other_rewards import get_soft_overlong_punishment

    terms = build_terms(
        [
            {"use": "accuracy"},
            {"use": "trl.rewards:think_format_reward"},
            {"use": "trl.rewards:accuracy_reward", "name": "maths"},
        ]
    )
    terms.append(RewardTerm("overlong", get_soft_overlong_punishment(2, 1), 0.1))
    texts = [(f"<think>hm</think>$\\boxed{{{value}}}$", [EAST]) for value in (4, 5)]
    batch = [group("one", *texts, solution="$4$")]
    with RewardSet(terms, isolated=True) as rewards:
        (scores,) = rewards.score(batch, rewards.outcomes(batch))
        log = rewards.log()
    assert scores.components["think_format_reward"] == [1.0, 1.0]
    assert scores.components["maths"] == [1.0, 0.0]
    assert scores.components["overlong"] == [-1.0, -1.0]  # three tokens
    assert log.extras["solution"] == ["$4$"] * 2 and "maths" not in scores.invalid


def test_functions_travel_too():
    """A function that was written in a notebook runs in a process as well."""
    terms = [*build_terms([{"use": "accuracy"}])]
    terms.append(RewardTerm("mine", lambda completions, **_: [os.getpid()] * len(completions), 0.0))
    with RewardSet(terms, isolated=True) as rewards:
        (scores,) = score(rewards, "good")
    assert scores.components["mine"][0] != os.getpid()

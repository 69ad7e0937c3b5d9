"""`foresight rewards` on records, on a person's files, and on rewards that go wrong."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import ray
from typer.testing import CliRunner

from recipes.cli import app
from rl.interfaces import GroupScores
from rl.records import write_record
from rl.trajectory import TrajectoryGroup
from tests.rewards.conftest import example_package  # noqa: F401 - a fixture
from tests.rewards.test_scorer import EAST, NORTH, RIGHT, WRONG, group, two_groups

FAULTY = Path(__file__).parents[1] / "rewards" / "faulty.py"
RUN = [sys.executable, "-c", "from recipes.cli import app; app()", "rewards"]
LINES: list[dict[str, Any]] = [
    {"question": "What falls?", "completion": "<answer>ball</answer>", "answer": "ball", "n": 1},
    {"question": "What falls?", "completion": "<answer>cup</answer>", "answer": "ball", "n": 3},
    {"question": "Who?", "completion": "Nobody [red]", "answer": "Ann"},
]


@pytest.fixture(scope="module", autouse=True)
def local_ray() -> Iterator[None]:
    """One for all tests: the command starts its own only where there is none."""
    ray.init(num_cpus=2, include_dashboard=False)
    yield
    assert ray.is_initialized()  # no command has stopped it
    ray.shutdown()


def record(folder: Path, step: int, groups: list[TrajectoryGroup], *, arrays: bool) -> None:
    outcomes = [[float("A</answer>" in t.text) for t in group] for group in groups]
    write_record(
        folder,
        step,
        groups,
        [GroupScores(row, {"accuracy": row}) for row in outcomes],
        trained=[True] * len(groups),
        advantages=[0.0] * sum(map(len, groups)),
        weights={"accuracy": 0.9},
        arrays=arrays,
    )


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that recorded step 2 with its arrays, and steps 3 and 4 without."""
    folder = tmp_path_factory.mktemp("run")
    record(folder / "trajectories", 2, two_groups(), arrays=True)
    named = [
        group(name, (RIGHT, [EAST]), (WRONG, [NORTH]), depth=i)
        for i, name in enumerate(("good", "bad", "fine"))
    ]
    record(folder / "trajectories", 3, named[:1], arrays=False)
    record(folder / "trajectories", 4, named, arrays=False)
    return folder


@pytest.fixture
def plain(tmp_path: Path) -> Path:
    """A file that a person wrote, which does not say what is right."""
    return lines(tmp_path / "plain.jsonl", LINES)


def lines(file: Path, rows: list[dict[str, Any]]) -> Path:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def mine(tmp_path: Path, body: str, columns: str = "completions, **_") -> str:
    """A reward of a user's with this body; how to name it."""
    file = tmp_path / "mine.py"
    file.write_text(f"def helpful({columns}):\n    {body}\n")
    return f"{file}:helpful"


def invoke(*arguments: object, columns: int = 120) -> tuple[int, str]:
    result = CliRunner(env={"COLUMNS": str(columns)}).invoke(app, ["rewards", *map(str, arguments)])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result.exit_code, result.output


def attempt(use: str, on: Path, *arguments: object, code: int = 0) -> tuple[str, dict[str, Any]]:
    """What `foresight rewards try` prints, and what it writes as JSON."""
    file = on.parent / "tried" / "trial.json"
    found, output = invoke("try", use, "--on", on, "--json", file, *arguments)
    assert found == code, output
    return output, json.loads(file.read_text())


def values(trial: dict[str, Any]) -> list[float | None]:
    return [row["value"] for row in trial["rows"]]


# -- list ------------------------------------------------------------------------------------------


def test_list_shows_what_comes_with_foresight() -> None:
    code, output = invoke("list")
    assert code == 0 and "file.py:function" in output
    rows = {line.split()[0]: line.split() for line in output.splitlines() if line.strip()}
    assert rows["accuracy"][1:6] == ["outcome", "0.9", "0", "to", "1"]
    assert rows["temporal_order"][1:6] == ["shaping", "0.3", "0", "to", "1"]
    assert rows["repetition"][1:6] == ["shaping", "0.1", "-1", "to", "0"]
    assert "(temperature=0.5, scale=bounded)" in output
    assert "(needed: policy; tokens_per_patch=1, capacity=1024," in output
    assert "(needed: base_url, model; api_key_env=OPENAI_API_KEY," in output
    assert "Does the policy use the order of the frames?" in output


def test_list_fits_a_narrow_terminal() -> None:
    code, output = invoke("list", columns=80)
    assert code == 0 and max(map(len, output.splitlines())) <= 80
    assert "outcome_contrastive" in output and "…" not in output


def test_list_shows_packages_and_which_cannot_be_imported(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    example_package: Path,  # noqa: F811
) -> None:
    about = tmp_path / "odd_rewards-0.1.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: odd-rewards\nVersion: 0.1\n")
    points = "[foresight.rewards]\nbroken = no_such_module:f\nlength = odd_rewards:length\n"
    (about / "entry_points.txt").write_text(points)
    (tmp_path / "odd_rewards.py").write_text('def length(**_):\n    """Own length."""\n')
    monkeypatch.syspath_prepend(str(example_package))
    monkeypatch.syspath_prepend(str(tmp_path))
    code, output = invoke("list", columns=180)
    assert code == 0
    (row,) = (line for line in output.splitlines() if line.startswith(" brevity"))
    assert "1 up to `words` words, beyond that `words` divided by their number." in row
    assert row.split()[1:6] == ["shaping", "0.1", "0", "to", "1"]
    assert "foresight-example-rewards" in output and "(wanted=2, least_change=0.0)" in output
    (row,) = (line for line in output.splitlines() if line.startswith(" broken"))
    assert "cannot be imported: ModuleNotFoundError: No module named 'no_such_module'" in row
    assert "no_such_module:f cannot" not in row
    assert "hidden by the built-in one; use odd_rewards:length" in output
    assert not {"foresight_example_rewards", "odd_rewards"} & sys.modules.keys()


# -- try -------------------------------------------------------------------------------------------


def test_a_reward_on_the_newest_step_that_recorded_latents(run: Path) -> None:
    output, trial = attempt("temporal_diversity", run)
    # Only the first of "two" has two spans that are the same.
    assert values(trial) == [0.0, 0.0, 0.0, -1.0, 0.0]
    assert trial["step"] == 2 and trial["files"] == [str(run / "trajectories/step-000002.jsonl")]
    assert [row["outcome"] for row in trial["rows"]] == [1.0, 1.0, 0.0, 0.0, 1.0]
    assert [row["group"] for row in trial["rows"]] == [0, 0, 0, 1, 1]
    summary = trial["summary"]
    # Wrong are the last of "one" (0) and the first of "two" (-1).
    assert (summary["mean"], summary["mean_right"], summary["mean_wrong"]) == (-0.2, 0.0, -0.5)
    assert (summary["spread"], summary["spread_sample"]) == (1.0, "two")
    assert summary["spread_weighted"] == pytest.approx(0.1) and not summary["outweighs"]
    rows = [line.split() for line in output.splitlines()]
    assert ["two", "✗", "[1", "latent]<answer>B</answer>", "-1"] in rows
    assert ["✓", "<answer>A</answer>", "0"] in rows
    assert "5 values, 0 none, 0 invalid" in output
    assert "mean -0.2 (from -1 to 0), of right answers 0, of wrong answers -0.5" in output


def test_a_reward_gets_the_outcomes_of_the_record(run: Path) -> None:
    _, trial = attempt("outcome_contrastive", run, "--option", "temperature=1.0")
    assert values(trial)[3:] == [None, None]  # nobody to compare with
    assert trial["options"] == {"temperature": 1.0} and trial["summary"]["none"] == 2


def test_a_reward_that_reads_texts_takes_the_newest_step(run: Path) -> None:
    _, trial = attempt("format", run)
    assert trial["step"] == 4 and len(trial["rows"]) == 6
    _, trial = attempt("format", run / "trajectories", "--step", 3)
    assert trial["step"] == 3 and len(trial["rows"]) == 2
    _, trial = attempt("format", run, "--limit", 2)
    assert [row["id"] for row in trial["rows"]] == ["good", "good", "bad", "bad"]
    _, trial = attempt("format", run / "trajectories" / "step-000003.jsonl")
    assert trial["step"] == 3


def test_a_file_of_a_persons(plain: Path, tmp_path: Path) -> None:
    body = (
        "log_metric('helpful/seen', len(n)); log_extra('twice', [2 * (i or 0) for i in n])\n"
        "    return [None if i is None else i + 10 * o for i, o in zip(n, outcomes)]"
    )
    use = mine(tmp_path, body, "completions, n, outcomes, log_metric, log_extra, **_")
    output, trial = attempt(use, plain)
    # Right and wrong by rule, and `n` row by row: 1 + 10, 3 + 0, none.
    assert values(trial) == [11.0, 3.0, None]
    assert [row["outcome"] for row in trial["rows"]] == [1.0, 0.0, 0.0]
    assert [row["extras"] for row in trial["rows"]] == [{"twice": 2}, {"twice": 6}, {"twice": 0}]
    assert trial["outcomes_by_rule"] and trial["metrics"] == [["helpful/seen", 3.0]]
    summary = trial["summary"]
    assert (summary["values"], summary["none"], summary["invalid"]) == (2, 1, 0)
    assert (summary["mean"], summary["min"], summary["max"]) == (7.0, 3.0, 11.0)
    assert "`accuracy` was asked" in output and "logged helpful/seen: 3" in output
    assert "Nobody [red]" in output  # a completion is no markup


def test_outcomes_that_the_file_gives_are_not_asked_for(tmp_path: Path) -> None:
    rows = [{**LINES[0], "outcome": False}, {**LINES[1], "outcome": None}]
    file = lines(tmp_path / "judged.jsonl", rows)
    use = mine(tmp_path, "return [-1 if o != o else o for o in outcomes]", "outcomes, **_")
    output, trial = attempt(use, file)
    assert values(trial) == [0.0, -1.0] and not trial["outcomes_by_rule"]
    assert [row["outcome"] for row in trial["rows"]] == [0.0, None]
    assert "`accuracy` was asked" not in output
    assert any(line.split()[0] == "?" for line in output.splitlines() if line.strip())


def test_the_reward_that_decides_the_outcome(plain: Path) -> None:
    output, trial = attempt("accuracy", plain)
    assert values(trial) == [1.0, 0.0, 0.0]
    assert trial["summary"]["outcome_weight"] is None and "right or wrong counts" not in output


def test_a_reward_that_outweighs_the_outcome_is_told_of(run: Path, tmp_path: Path) -> None:
    output, trial = attempt(mine(tmp_path, "return list(range(0, 60, 10))"), run)
    # 10 in each group, times 0.1, against 0.9.
    assert trial["summary"]["spread_weighted"] == pytest.approx(1.0)
    assert trial["summary"]["outweighs"] and "outweighs the outcome" in " ".join(output.split())


def test_a_reward_sees_the_step(run: Path, tmp_path: Path) -> None:
    body = "return [trainer_state.global_step + trainer_state.max_steps] * len(id)"
    _, trial = attempt(mine(tmp_path, body, "id, trainer_state, **_"), run)
    assert values(trial) == [4.0] * 6


def test_long_tables_are_cut(tmp_path: Path) -> None:
    rows = [
        {"id": f"sample-{i}", "question": "Q", "completion": "word " * 99 + "end"}
        for i in range(45)
    ]
    file = lines(tmp_path / "many.jsonl", rows)
    code, output = invoke("try", "repetition", "--on", file, columns=80)
    assert code == 0 and "... and 5 more" in output
    assert "sample-39" in output and "sample-40" not in output.split("... and 5 more")[0]
    assert max(map(len, output.splitlines())) <= 80
    (row,) = (line for line in output.splitlines() if line.startswith(" sample-0 "))
    assert "word word" in row and "..." in row and "word end" in row  # an answer is at the end


# -- rewards that go wrong -------------------------------------------------------------------------


def test_a_fault_costs_its_group_and_is_explained(run: Path) -> None:
    output, trial = attempt(f"{FAULTY}:raises", run)
    assert values(trial) == [1.0, 1.0, None, None, 1.0, 1.0]
    reasons = [row["reason"] for row in trial["rows"]]
    assert reasons[2:4] == ["raised ValueError: cannot read this"] * 2 and not any(reasons[:2])
    assert "4 values, 0 none, 2 invalid" in output
    assert "raised ValueError: cannot read this (2 values invalid, of sample 'bad')" in output
    assert "Traceback (most recent call last)" in output and "faulty.py" in output
    assert trial["faults"][-1]["kind"] == "raised"
    assert not [name for name in sys.modules if name.endswith("faulty")]  # nothing came here


def test_a_reward_that_hangs_is_stopped(run: Path) -> None:
    output, trial = attempt(f"{FAULTY}:sleeps", run, "--limit", 2, "--timeout", 2)
    assert values(trial) == [1.0, 1.0, None, None]
    assert "did not answer within 2 s; its process was killed" in output


def test_without_any_value_the_command_fails(run: Path, tmp_path: Path) -> None:
    output, trial = attempt(f"{FAULTY}:raises_own_error", run, code=1)
    assert values(trial) == [None] * 6 and trial["summary"]["mean"] is None
    assert "0 values, 0 none, 6 invalid" in output and "OwnError: this and that" in output
    # To have no opinion is no fault.
    output, _ = attempt(mine(tmp_path, "return [None] * len(completions)"), run)
    assert "0 values, 6 none, 0 invalid" in output


@pytest.mark.parametrize(
    ("use", "arguments", "complaint"),
    [
        ("judge", (), "reward 'judge' needs --option base_url=… and --option model=…\n"),
        ("judge", ("--option", "model=m"), "reward 'judge' needs --option base_url=…\n"),
        ("judge", ("--option", "bass_url=b"), "did you mean 'base_url'?"),
        ("latent_alignment", (), "reward 'latent_alignment' needs --option policy=…\n"),
        (f"{FAULTY}:nothing", (), "cannot be imported: AttributeError: "),
        ("acuracy", (), "unknown reward 'acuracy'; did you mean 'accuracy'?"),
        ("nowhere.py:f", (), "there is no file"),
        (f"{FAULTY}:nothing", (), "has no 'nothing'"),
        ("format", ("--option", "gramar=any"), "did you mean 'grammar'?"),
        ("format", ("--option", "grammar"), "write key=value"),
        ("format", ("--option", "grammar={"), "not valid YAML"),
        ("format", ("--step", 9), "has records of the steps 2, 3, 4"),
        ("temporal_diversity", ("--step", 4), "choose a --step that has: 2"),
        ("temporal_order", (), "it can only be run in training"),
    ],
)
def test_mistakes_are_refused(
    run: Path, use: str, arguments: tuple[object, ...], complaint: str
) -> None:
    code, output = invoke("try", use, "--on", run, *arguments)
    assert code == 2 and output.startswith("error: ") and complaint in output
    assert "rewards[0]" not in output


def test_files_that_lack_something_are_refused(run: Path, plain: Path, tmp_path: Path) -> None:
    def refused(use: str, on: Path, *arguments: object) -> str:
        code, output = invoke("try", use, "--on", on, *arguments)
        assert code == 2 and output.startswith("error: ")
        return output

    assert "nothing is there" in refused("format", tmp_path / "gone")
    assert "train.record_every" in refused("format", tmp_path)
    assert "--step chooses among" in refused("format", plain, "--step", 2)
    assert "not valid JSON" in refused("format", FAULTY)
    assert "asks for trajectories" in refused("temporal_diversity", plain)
    folder = run / "trajectories"
    record(tmp_path / "bare" / "trajectories", 1, two_groups(), arrays=False)
    asked = refused("length", tmp_path / "bare")
    assert "asks for completion_ids" in asked
    assert "set train.record_latents_every" in asked
    assert "write completion_ids into each line" in refused("length", plain)
    assert "write " not in refused("temporal_diversity", plain)
    assert "(train.record_latents_every" in refused(
        "temporal_diversity", folder / "step-000004.jsonl"
    )
    body = "return [0.0] * len(completions)"
    use = mine(tmp_path, body, "completions, objects, **_")
    assert "asks for ['objects']" in refused(use, run)


def test_options_of_a_persons_reward_are_checked(plain: Path, tmp_path: Path) -> None:
    file = tmp_path / "own.py"
    file.write_text(
        "def f(completions, *, bonus=1.0, **_): return [bonus] * len(completions)\n"
        "class Sized:\n"
        "    def __init__(self, size, *, bonus=1.0): self.size = size\n"
        "    def __call__(self, completions, **_): return [self.size] * len(completions)\n"
    )

    def refused(name: str, *arguments: object) -> str:
        code, output = invoke("try", f"{file}:{name}", "--on", plain, *arguments)
        assert code == 2
        return output.removeprefix("error: ").rstrip()

    close = "unknown option 'bonsu'; did you mean 'bonus'? known: ['bonus']"
    assert refused("f", "--option", "bonsu=3") == f"reward 'f': {close}"
    assert refused("Sized") == "reward 'Sized' needs --option size=…"
    assert refused("Sized", "--option", "bonus=2") == "reward 'Sized' needs --option size=…"
    assert "did you mean 'size'?" in refused("Sized", "--option", "sise=3")
    assert values(attempt(f"{file}:Sized", plain, "--option", "size=3")[1]) == [3.0] * 3


@pytest.mark.parametrize(
    ("source", "cause"),
    [
        ("raise ValueError('first line\\n  second line\\nthird line')", "ValueError: first line"),
        ("def f(:", "SyntaxError: invalid syntax"),
        ("try:\n    1 / 0\nexcept ValueError: pass", "ZeroDivisionError: division by zero"),
        ("try: {}['a']\nexcept KeyError as e: raise OSError('gone') from e", "OSError: gone"),
        ("raise SystemExit('not today')", "not today"),
        ("import os; os._exit(3)", "the process ended with 3"),
    ],
)
def test_why_a_file_cannot_be_imported_comes_first(
    plain: Path, tmp_path: Path, source: str, cause: str
) -> None:
    file = tmp_path / "bad.py"
    file.write_text(source)
    code, output = invoke("try", f"{file}:f", "--on", plain)
    first, *rest = output.splitlines()
    assert code == 2
    assert first == f"error: reward 'f': {file.resolve()}:f cannot be imported: {cause}"
    traced = cause.partition(":")[0].endswith("Error")
    assert rest[:1] == (["Traceback (most recent call last):"] if traced else [])
    assert any("bad.py" in line for line in rest) == traced


def test_a_column_that_an_option_hides_is_told_of(plain: Path, tmp_path: Path) -> None:
    body = "return [float(n)] * len(completions)"
    output, trial = attempt(mine(tmp_path, body, "completions, *, n=5, **_"), plain)
    assert values(trial) == [5.0] * 3
    assert "note: reward 'helpful': the column 'n' does not reach it" in output


def test_lengths_of_a_persons_file_that_has_token_ids(tmp_path: Path) -> None:
    """Its lines know no budget, so an option says it."""
    # The buffer is 8, a fifth of 40: 0 up to 32 tokens, (32 - 36) / 8 at 36, -1 from 40 on.
    rows = [
        {"question": "Q", "completion": "some text", "completion_ids": [7] * count}
        for count in (1, 32, 36, 40, 90)
    ]
    file = lines(tmp_path / "ids.jsonl", rows)
    _, trial = attempt("length", file, "--option", "max_length=40")
    assert values(trial) == [0.0, 0.0, -0.5, -1.0, -1.0]
    output, trial = attempt("length", file, code=1)
    assert trial["summary"]["invalid"] == 5 and "needs the option max_length" in output


def test_what_is_only_liked_may_be_missing(run: Path, plain: Path, tmp_path: Path) -> None:
    """A reward that can do without trajectories gets them where there are any."""
    body = "return [float(trajectories is not None)] * len(completions)"
    use = mine(tmp_path, body, "completions, trajectories=None, **_")
    assert values(attempt(use, plain)[1]) == [0.0] * 3
    assert values(attempt(use, run)[1]) == [1.0] * 5


# -- as people start it ----------------------------------------------------------------------------


def test_a_reward_of_a_package_in_a_process_of_the_commands(
    tmp_path: Path,
    example_package: Path,  # noqa: F811
) -> None:
    """The line is that of the package's README, and Ray is started and stopped."""
    line = {"question": "What falls?", "completion": "The ball falls.", "objects": ["ball"]}
    file = lines(tmp_path / "plain.jsonl", [line])
    paths = [str(example_package), str(Path(__file__).parents[2])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    environment.pop("RAY_ADDRESS", None)
    done = subprocess.run(
        [*RUN, "try", "brevity", "--on", str(file), "--option", "words=2"],
        capture_output=True,
        text=True,
        timeout=200,
        env=environment,
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "mean 0.6667 (from 0.6667 to 0.6667)" in done.stdout  # 2 words of 3
    assert "Traceback" not in done.stderr


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom recipes.cli import app\n"
        "assert CliRunner().invoke(app, ['rewards', 'try', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"

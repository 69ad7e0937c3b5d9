"""Records: everything comes back, and files of people are read or refused by name."""

import dataclasses
import json
import math
import pickle
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from rl.errors import DataError, TrajectoryError
from rl.interfaces import GroupScores
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import Slot
from rl.policy.visual_replay import VisualReplayConfig
from rl.record_rows import COLUMNS, MARK, read_row
from rl.records import find_records, read_record, totals, write_record
from rl.trajectory import MediaKey, Sample, Sampling, Trajectory, TrajectoryGroup
from tests.latent import engine_for, requests_for, square_samples, thinking_policy

FILLER, WIDTH = 9, 3
WEIGHTS = {"accuracy": 0.9, "repetition": 0.5}
SAMPLING = dataclasses.asdict(Sampling())


def trajectory(sample: str, *spans: int, dtype: torch.dtype = torch.bfloat16, seed: int = 0):
    """One with spans of the given lengths and arrays of noise."""
    rng = np.random.default_rng(seed)
    ids, decision = [1], [Slot.TOKEN]
    for length in spans:
        ids += [7, *[FILLER] * length, 8]
        decision += [Slot.TOKEN, *[Slot.DECISION] * length, Slot.FORCED]
    decided = np.array(decision, dtype=np.int8)
    return Trajectory(
        sample_id=sample,
        prompt_ids=rng.integers(0, 9, size=4 + seed % 3),
        completion_ids=np.array(ids),
        decision=decided,
        logprobs=(rng.normal(size=len(ids)) * (decided != Slot.FORCED)).astype(np.float32),
        kept=(rng.integers(1, 20, size=len(ids)) * (decided == Slot.TOKEN)).astype(np.int32),
        latents=torch.from_numpy(rng.normal(size=(sum(spans), WIDTH))).to(dtype),
        latent_logprobs=rng.normal(size=sum(spans)),
        span_lengths=spans,
        filler=FILLER,
        media=(MediaKey(f"{sample}.mp4", (0, 4, 8), "abc"), MediaKey("b.mp4", (), "abc")),
        policy_version=3,
        finish_reason="length" if seed % 2 else "stop",
        sampling=Sampling(0.7, 64, "always", 0.9, 20),
        seed=2**55 + seed,
        text="ein Ball 球\u2028<|latent_start|>\n\ud800",  # a separator and a lone surrogate too
    )


def assert_equal(a: Trajectory, b: Trajectory) -> None:
    for field in dataclasses.fields(Trajectory):
        mine, other = getattr(a, field.name), getattr(b, field.name)
        if isinstance(mine, torch.Tensor):
            assert mine.dtype == other.dtype and torch.equal(mine, other)
        elif isinstance(mine, np.ndarray):
            assert mine.dtype == other.dtype and np.array_equal(mine, other)
        else:
            assert mine == other, field.name


@pytest.fixture
def groups() -> list[TrajectoryGroup]:
    one = Sample(
        "one",
        "one.mp4",
        "Where?",
        "A",
        ("left", "right"),
        (0, 4),
        ((8, 9), (10,)),
        {"level": 3, "words": ["ball", {"n": None}], "hard": True, "weight": 0.1},
    )
    two = Sample("two", "two.mp4", "What?", "a fall")
    return [
        TrajectoryGroup(one, (trajectory("one", 2, 3), trajectory("one", seed=1))),
        TrajectoryGroup(two, (trajectory("two", 1, seed=2), trajectory("two", 4, 1, seed=4))),
    ]


def scores() -> list[GroupScores]:
    nan = math.nan
    return [
        GroupScores([1.0, 0.0], {"accuracy": [1.0, 0.0], "repetition": [-0.25, nan]}),
        GroupScores(
            [nan, 0.0],
            {"accuracy": [nan, 0.0], "repetition": [nan, -0.5]},
            gated=True,
            invalid={"accuracy": ["the judge was down", ""]},
        ),
    ]


def write(folder: Path, groups: list[TrajectoryGroup], **changes: Any) -> Path:
    arguments: dict[str, Any] = {
        "trained": [True, False],
        "advantages": [0.5, -0.5, math.nan, 0.0],
        "weights": WEIGHTS,
        "arrays": True,
    }
    return write_record(folder, 20, groups, scores(), **{**arguments, **changes})


def test_everything_comes_back(tmp_path, groups):
    path = write(tmp_path / "records", groups)
    assert path.name == "step-000020.jsonl"
    assert sorted(p.name for p in path.parent.iterdir()) == [path.name, "step-000020.safetensors"]
    read = read_record(path)
    assert [g.sample for g in read] == [g.sample for g in groups]
    for again, group in zip(read, groups, strict=True):
        assert again.trajectories is not None
        for mine, other in zip(again.trajectories, group, strict=True):
            assert_equal(mine, other)
        assert again.completions == [t.text for t in group]
    first, other = read[0].rows
    assert (first["step"], first["group"], first["trained"], first["gated"]) == (20, 0, True, False)
    assert first["rewards"] == {"accuracy": 1.0, "repetition": -0.25}
    assert math.isnan(other["rewards"]["repetition"]) and other["advantage"] == -0.5
    assert first["weights"] == WEIGHTS and "invalid" not in first
    assert (first["tokens"], first["latents"], first["span_lengths"]) == (10, 5, [2, 3])
    broken, gated = read[1].rows
    assert all(math.isnan(broken[key]) for key in ("outcome", "total", "advantage"))
    assert broken["invalid"] == {"accuracy": "the judge was down"} and "invalid" not in gated
    assert read[1].outcome[1] == 0.0 and gated["gated"] and not gated["trained"]
    # 0.9 · 1 + 0.5 · (−0.25); the missing repetition stands at the mean of the others, −0.25
    assert [row["total"] for row in read[0].rows] == pytest.approx([0.775, -0.125])
    assert gated["total"] == -0.25  # its shaping, 0.5 · (−0.5), is that of the whole group


def test_the_lines_are_strict_json_for_people(tmp_path, groups):
    lines = write(tmp_path, groups).read_bytes().split(b"\n")
    assert len(lines) == 5 and lines[4] == b""

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is no JSON")

    row = json.loads(lines[2], parse_constant=refuse)
    assert row["outcome"] is None and row["rewards"] == {"accuracy": None, "repetition": None}
    assert "球" in lines[0].decode()


@pytest.mark.parametrize("modules", [None, ModulesConfig(visual_replay=VisualReplayConfig(2))])
def test_real_trajectories(modules, tmp_path):
    policy, processor = thinking_policy(tmp_path / "policy", dtype=torch.bfloat16, modules=modules)
    samples = square_samples(tmp_path / "clips", 2)
    free = requests_for(samples[:1])
    never = requests_for(samples[1:], sampling=Sampling(0.7, 6, "never", top_p=0.9))
    groups = engine_for(policy, processor).generate([*free, *never])
    assert {t.imagined for g in groups for t in g} == {True, False}
    wrong = [0.0] * 3
    path = write_record(
        tmp_path / "records", 0, groups, [GroupScores(wrong, {"accuracy": wrong})] * 2,
        trained=[False, False], advantages=[0.0] * 6, weights={"accuracy": 1.0}, arrays=True,
    )  # fmt: skip
    for again, group in zip(read_record(path), groups, strict=True):
        assert again.sample == group.sample and again.trajectories is not None
        for mine, other in zip(again.trajectories, group, strict=True):
            assert_equal(mine, other)


@given(
    st.lists(st.lists(st.integers(1, 3), max_size=3), min_size=1, max_size=5),
    st.sampled_from([torch.bfloat16, torch.float16, torch.float32]),
)
def test_any_spans_come_back(tmp_path_factory, spans, dtype):
    rows = [trajectory("a", *lengths, dtype=dtype, seed=i) for i, lengths in enumerate(spans)]
    group = TrajectoryGroup(Sample("a", "a.mp4", "?", "A"), tuple(rows))
    values = [1.0] * len(rows)
    path = write_record(
        tmp_path_factory.mktemp("record"), 1, [group], [GroupScores(values, {"accuracy": values})],
        trained=[True], advantages=values, weights={"accuracy": 1.0}, arrays=True,
    )  # fmt: skip
    (again,) = read_record(path)
    assert again.trajectories is not None
    for mine, other in zip(again.trajectories, rows, strict=True):
        assert_equal(mine, other)


def test_what_was_shown_again_comes_back(tmp_path, groups):
    rng = np.random.default_rng(0)
    shown = [
        TrajectoryGroup(
            g.sample,
            tuple(
                dataclasses.replace(
                    t, replayed=rng.integers(-1, 50, (len(t.latents), 4), dtype=np.int32)
                )
                for t in g
            ),
        )
        for g in groups
    ]
    assert any(len(t.latents) == 0 for g in shown for t in g)
    path = write(tmp_path, shown)
    for again, group in zip(read_record(path), shown, strict=True):
        assert again.trajectories is not None
        for mine, other in zip(again.trajectories, group, strict=True):
            assert_equal(mine, other)
            assert mine.replayed is not None
            assert_equal(pickle.loads(pickle.dumps(other)), other)
    assert "replayed" in load_file(path.with_suffix(".safetensors"))
    other = write(tmp_path / "without", groups)
    assert "replayed" not in load_file(other.with_suffix(".safetensors"))


def test_records_from_before_truncation_are_read(tmp_path, groups):
    plain = [
        TrajectoryGroup(
            g.sample,
            tuple(
                dataclasses.replace(t, kept=0 * t.kept, sampling=Sampling(0.7, 64, "always"))
                for t in g
            ),
        )
        for g in groups
    ]
    path = write(tmp_path, plain)
    rows = [json.loads(line) for line in path.read_bytes().split(b"\n") if line]
    for row in rows:
        assert row[MARK] == 2 and row["sampling"].pop("top_p") == 1.0
        assert row["sampling"].pop("top_k") == 0
        row[MARK] = 1
    path.write_text("\n".join(json.dumps(row) for row in rows))
    file = path.with_suffix(".safetensors")
    tensors = load_file(file)
    assert not tensors.pop("kept").any()
    save_file(tensors, file)
    for again, group in zip(read_record(path), plain, strict=True):
        assert again.trajectories is not None
        for mine, other in zip(again.trajectories, group, strict=True):
            assert_equal(mine, other)
    # Truncated trajectories without their counts are not taken for whole ones.
    path = write(tmp_path, groups)
    tensors = load_file(file)
    del tensors["kept"]
    save_file(tensors, file)
    with pytest.raises(DataError, match=r"line 1: row 0 .*kept counts do not fit"):
        read_record(path)


def test_one_trajectory_does_not_hold_on_to_the_others(tmp_path, groups):
    read = read_record(write(tmp_path, groups))
    assert read[0].trajectories is not None
    first = read[0].trajectories[0]
    assert first.latents.untyped_storage().nbytes() == 5 * WIDTH * 2  # bf16
    assert len(pickle.dumps(first)) < 3000


def test_lines_may_be_cut_out_and_reordered(tmp_path, groups):
    path = write(tmp_path, groups)
    lines = path.read_text().split("\n")
    part = tmp_path / "part.jsonl"
    part.write_text(f"{lines[3]}\n\n{lines[0]}\n")
    two, one = read_record(part)
    assert two.trajectories is not None and one.trajectories is not None
    assert_equal(two.trajectories[0], groups[1].trajectories[1])
    assert_equal(one.trajectories[0], groups[0].trajectories[0])


def test_without_arrays(tmp_path, groups):
    read = read_record(write(tmp_path, groups), arrays=False)
    assert [g.trajectories for g in read] == [None, None]
    # A step that is recorded again, now without arrays, leaves no old ones behind.
    path = write(tmp_path, groups, arrays=False)
    assert list(tmp_path.iterdir()) == [path]
    read = read_record(path)
    assert [g.trajectories for g in read] == [None, None]
    assert [g.sample for g in read] == [g.sample for g in groups]


def test_a_record_that_could_not_be_finished_names_no_arrays(tmp_path, groups):
    path = write(tmp_path, groups)
    draft = path.with_name(path.name + ".part")
    draft.mkdir()  # now the lines cannot be written
    with pytest.raises(IsADirectoryError):
        write(tmp_path, groups)
    assert not path.exists() and find_records(tmp_path) == []


def test_records_are_found_by_step(tmp_path, groups):
    write(tmp_path, groups, rank=1)
    write(tmp_path, groups, rollout=1, rank=2)
    write(tmp_path, groups)
    (tmp_path / "step-1000000.jsonl").touch()
    (tmp_path / "step-last.jsonl").touch()
    names = [
        "step-000020.jsonl",
        "step-000020-rank1.jsonl",
        "step-000020-1-rank2.jsonl",
        "step-1000000.jsonl",
    ]
    assert [path.name for path in find_records(tmp_path)] == names
    assert find_records(tmp_path / "nowhere") == []
    # Each process has arrays of its own, and groups stay apart when files are joined.
    (first, *_) = read_record(tmp_path / names[1])
    assert first.rows[0]["arrays"]["file"] == "step-000020-rank1.safetensors"
    joined = tmp_path / "joined.jsonl"
    starts = [(tmp_path / name).read_text().split("\n")[0] for name in names[:3]]
    joined.write_text("\n".join(starts))
    assert len(read_record(joined)) == 3


def test_totals_are_what_the_trainer_sums():
    score = GroupScores(
        [1.0, 0.0, 1.0, math.nan],
        {"accuracy": [1.0, 0.0, 1.0, math.nan], "own": [0.5, math.nan, 0.25, math.nan],
         "silent": [math.nan] * 4},
    )  # fmt: skip
    weights = {"accuracy": 1.0, "own": 2.0, "silent": 3.0}
    both = totals([score, dataclasses.replace(score, gated=True)], weights)
    # own at row 1 stands at (0.5 + 0.25) / 2 = 0.375; gated, it does at every row
    assert both[:3] == [2.0, 0.75, 1.5] and both[4:7] == [1.75, 0.75, 1.75]
    assert math.isnan(both[3]) and math.isnan(both[7])


def test_columns_of_numpy_become_plain(tmp_path, groups):
    extra = {
        "a": np.float32(0.5), "b": np.arange(2), "c": np.bool_(True), "d": (1, 2), "e": math.nan,
        "f": torch.tensor([1.5], dtype=torch.bfloat16), "g": {"h": np.str_("x")},
    }  # fmt: skip
    sample = dataclasses.replace(groups[0].sample, extra=extra)
    groups[0] = TrajectoryGroup(sample, groups[0].trajectories)
    read = read_record(write(tmp_path, groups))
    plain = {"a": 0.5, "b": [0, 1], "c": True, "d": [1, 2], "e": None, "f": [1.5], "g": {"h": "x"}}
    assert read[0].sample.extra == plain


@pytest.mark.parametrize(
    "value", [date(2026, 1, 1), {1: 2}, b"x", 1j, np.longdouble(1), [{1}], np.array([1j])]
)
def test_columns_that_json_cannot_hold_are_named(tmp_path, groups, value):
    sample = dataclasses.replace(groups[0].sample, extra={"seen": value})
    groups[0] = TrajectoryGroup(sample, groups[0].trajectories)
    with pytest.raises(DataError, match=r"step 20, sample 'one', 'extra', 'seen'.* as JSON"):
        write(tmp_path, groups)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"trained": [True]}, "2 scores, 1 flags"),
        ({"advantages": [0.0]}, "1 advantages"),
        ({"weights": {"accuracy": 1.0}}, "must be the same"),
    ],
)
def test_arguments_that_do_not_fit(tmp_path, groups, changes, message):
    with pytest.raises(TrajectoryError, match=message):
        write(tmp_path, groups, **changes)


def test_scores_and_latents_that_do_not_fit(tmp_path, groups):
    short = TrajectoryGroup(groups[0].sample, groups[0].trajectories[:1])
    with pytest.raises(TrajectoryError, match=r"'one' have \[2\] values for 1"):
        write(tmp_path, [short, groups[1]], advantages=[0.0] * 3)
    other = trajectory("one", 1, dtype=torch.float32)
    mixed = TrajectoryGroup(groups[0].sample, (other, other))
    with pytest.raises(TrajectoryError, match=r"float32.*one policy"):
        write(tmp_path, [mixed, groups[1]])


# -- damage ----------------------------------------------------------------------------------------


def test_arrays_that_are_not_these(tmp_path, groups):
    path = write(tmp_path, groups)
    file = path.with_suffix(".safetensors")
    good = load_file(file)

    def refused(message: str) -> None:
        with pytest.raises(DataError, match=message):
            read_record(path)

    save_file({**good, "completion_offsets": torch.tensor([0, 9, 10, 13, 20])}, file)
    refused("line 1: row 0 of step-000020.safetensors is not this line's .*9 tokens.* says 10")
    save_file({**good, "latent_offsets": torch.tensor([0, 4, 5, 6, 11])}, file)
    refused("line 1: .*4 latents, 5 filler tokens")
    save_file({**good, "prompt_offsets": good["prompt_offsets"][:3]}, file)
    refused("line 3: row 2 .*the file has 2 rows")
    save_file({**good, "logprobs": torch.tensor(0.0)}, file)
    refused("line 1: row 0")
    save_file({"latents": good["latents"]}, file)
    refused("has no completion_ids, completion_offsets, decision")
    file.write_bytes(b"\xff" * 100)
    refused("step-000020.safetensors: damaged")
    file.unlink()
    refused("step-000020.safetensors: the arrays of this record are missing")
    assert len(read_record(path, arrays=False)) == 2


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (MARK, 3),
        (MARK, 0),
        ("step", "20"),
        ("group", None),
        ("rollout", "0"),
        ("question", 3),
        ("id", None),
        ("text", None),
        ("outcome", 0.5),
        ("extra", []),
        ("rewards", {"accuracy": "1"}),
        ("weights", {"accuracy": True}),
        ("total", "x"),
        ("trained", 1),
        ("span_lengths", [1.5]),
        ("finish_reason", "done"),
        ("sampling", {"temperature": 1.0}),
        ("sampling", {"temperature": 1.0, "max_new_tokens": 4, "imagine": "free"}),
        ("sampling", SAMPLING | {"imagine": ["free"]}),
        ("sampling", SAMPLING | {"top_p": 0.0}),
        ("sampling", SAMPLING | {"top_p": True}),
        ("sampling", SAMPLING | {"top_k": -1}),
        ("sampling", SAMPLING | {"top_k": 2.0}),
        ("media", [{"path": "a.mp4", "frames": "0", "processor": "abc"}]),
        ("media", {}),
        ("arrays", {"file": "../step-000020.safetensors", "row": 0}),
        ("arrays", {"file": "step-000020.safetensors", "row": -1}),
        ("invalid", {"accuracy": 1}),
    ],
)
def test_a_damaged_line_is_named(tmp_path, groups, key, value):
    path = write(tmp_path, groups)
    lines = path.read_text().split("\n")
    row = json.loads(lines[1])
    row[key] = value
    lines[1] = json.dumps(row)
    path.write_text("\n".join(lines))
    with pytest.raises(DataError, match=rf"step-000020.jsonl, line 2: .*{key}"):
        read_record(path)
    if key not in (MARK, "arrays", "invalid"):
        del row[key]
        lines[1] = json.dumps(row)
        path.write_text("\n".join(lines))
        with pytest.raises(DataError, match=rf"line 2: key '{key}' is missing"):
            read_record(path)


def test_a_group_has_one_question(tmp_path, groups):
    path = write(tmp_path, groups)
    path.write_text(path.read_text().replace('"Where?"', '"Whence?"', 1))
    with pytest.raises(DataError, match="line 2: column 'question' differs from line 1"):
        read_record(path)


# -- plain files -----------------------------------------------------------------------------------


def plain(folder: Path, *rows: Any) -> Path:
    path = folder / "mine.jsonl"
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8-sig")
    return path


def test_a_file_of_completions(tmp_path):
    path = plain(
        tmp_path,
        {"id": 7, "question": "Where?", "completion": "left", "answer": "A", "outcome": True,
         "options": ["left", "right"], "level": 2, "mood": "calm", "frames": None},
        {"id": 7, "prompt": "Where?", "text": "right", "answer": "A", "outcome": 0.0,
         "options": ["left", "right"], "level": 2, "mood": "wild", "imagine": []},
        "",
        {"question": "Where?", "completion": "here", "text": "an extra column"},
        {"prompt": [{"role": "system", "content": "Be brief"},
                    {"role": "user", "content": "Where?"}],
         "completion": [{"role": "assistant", "content": [{"type": "text", "text": "the"},
                                                          {"type": "text", "text": "re"}]}]},
        {"question": "Where?", "completion": "no", "video": "other.mp4", "outcome": None},
    )  # fmt: skip
    seven, where, other = read_record(path)
    assert seven.sample == Sample(
        "7", "", "Where?", "A", ("left", "right"), (), (), {"level": 2}
    )  # moods differ
    assert [row["extra"]["mood"] for row in seven.rows] == ["calm", "wild"]
    assert seven.completions == ["left", "right"] and seven.outcome == [1.0, 0.0]
    assert seven.trajectories is None
    # No ids: the lines after each other with the same question about the same video.
    assert where.sample == Sample("mine:4", "", "Where?", "")
    assert where.completions == ["here", "there"]
    assert [row["extra"] for row in where.rows] == [{"text": "an extra column"}, {}]
    assert other.sample.video == "other.mp4" and other.rows[0]["id"] == "mine:6"
    assert math.isnan(other.outcome[0]) and all(math.isnan(value) for value in where.outcome)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{'question': 1}", "not valid JSON.*one JSON object a line"),
        ("[" * 100_000, "not valid JSON"),
        ('{"n": ' + "1" * 5000 + "}", "not valid JSON"),
        ("[1]", r"not \[1\]"),
        (
            {"question": "?", "completions": ["a"]},
            "'completion' is missing.*or 'text'.*completions",
        ),
        ({"completion": "a"}, "column 'question' is missing; add it, or 'prompt'"),
        ({"completion": "a", "question": None}, "column 'question' is missing"),
        ({"completion": 5, "question": "?"}, "column 'completion' is 5; write a text"),
        ({"completion": [], "question": "?"}, r"column 'completion' is \[\]"),
        ({"completion": [{"role": "user"}], "question": "?"}, "column 'completion'"),
        ({"completion": "a", "prompt": ["x"]}, "column 'prompt'"),
        ({"text": "a", "question": "?", "outcome": 2}, "column 'outcome' is 2; write 1 .or true."),
        ({"text": "a", "question": "?", "outcome": "right"}, "column 'outcome' is \"right\""),
        ({"text": "a", "question": "?", "answer": 7}, "column 'answer' is 7; write a text"),
        ({"text": "a", "question": "?", "options": "AB"}, "column 'options'.*a list of texts"),
        ({"text": "a", "question": "?", "frames": [True]}, "column 'frames'"),
        ({"text": "a", "question": "?", "imagine": [4]}, "column 'imagine'"),
        ({"text": "a", "question": "?", "id": True}, "column 'id'.*a text or an integer"),
        ({"text": "a", "question": "?", "video": 0}, "column 'video'"),
    ],
)
def test_a_bad_line_is_named(tmp_path, line, message):
    path = plain(tmp_path, {"question": "?", "completion": "a"}, line)
    with pytest.raises(DataError, match=rf"mine.jsonl, line 2: .*{message}"):
        read_record(path)


def test_ids_that_stand_for_two_questions(tmp_path):
    path = plain(
        tmp_path,
        {"id": "a", "question": "x", "text": ""},
        {"id": "a", "question": "y", "text": ""},
    )
    with pytest.raises(DataError, match=r"line 2: column 'question' differs from line 1.*id 'a'"):
        read_record(path)


def test_files_that_are_none(tmp_path):
    with pytest.raises(DataError, match=r"mine.jsonl: the file has no rows"):
        read_record(plain(tmp_path, "", " "))
    with pytest.raises(DataError, match=r"cannot be read.*check the path"):
        read_record(tmp_path / "nowhere.jsonl")
    with pytest.raises(DataError, match="cannot be read"):
        read_record(tmp_path)
    (tmp_path / "mine.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="UTF-8"):
        read_record(tmp_path / "mine.jsonl")


scalars = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=5,
)
COLUMN = st.sampled_from([*COLUMNS, "prompt", "text", "completion", "outcome", "level"])


@given(
    st.lists(
        st.dictionaries(COLUMN, values, max_size=8)
        | st.fixed_dictionaries(
            {"question": st.sampled_from(["a", "b"]), "completion": st.text()},
            optional={"id": st.integers(0, 1), "outcome": st.sampled_from([0, 1, None]),
                      "level": values},
        )
        | values,
        max_size=6,
    )
)  # fmt: skip
def test_any_json_is_read_or_refused(tmp_path_factory, rows):
    path = plain(tmp_path_factory.mktemp("plain"), *map(json.dumps, rows))
    try:
        groups = read_record(path)
    except DataError as error:
        assert "mine.jsonl" in str(error)
    else:
        assert sum(len(group.rows) for group in groups) == len(rows)
        assert all(o in (0.0, 1.0) or math.isnan(o) for g in groups for o in g.outcome)


@given(st.data())
def test_any_change_of_a_record_is_read_or_refused(tmp_path_factory, data):
    folder = tmp_path_factory.getbasetemp() / "changed"
    path = folder / "step-000001.jsonl"
    if not path.exists():
        sample = Sample("a", "a.mp4", "?", "A")
        group = TrajectoryGroup(sample, (trajectory("a", 2, seed=1), trajectory("a", seed=2)))
        score = GroupScores([1.0, 0.0], {"accuracy": [1.0, 0.0]})
        write_record(
            folder, 1, [group], [score],
            trained=[True], advantages=[1.0, -1.0], weights={"accuracy": 1.0}, arrays=True,
        )  # fmt: skip
    lines = path.read_text().split("\n")
    row = json.loads(lines[0])
    row[data.draw(st.sampled_from(sorted(row)))] = data.draw(values)
    changed = path.with_name("changed.jsonl")
    changed.write_text(json.dumps(row) + "\n" + lines[1])
    try:
        groups = read_record(changed)
    except DataError as error:
        assert "changed.jsonl" in str(error)
    else:
        assert sum(len(group.rows) for group in groups) == 2


@given(st.text() | st.binary().map(repr))
def test_any_line_is_read_or_refused(line):
    try:
        read_row(line, "here")
    except DataError as error:
        assert str(error).startswith("here: ")

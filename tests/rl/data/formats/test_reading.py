"""Where rows come from, what they are taken for, and what happens to those that are wrong."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset, DatasetDict

from rl.data.formats import FORMATS, read_samples
from rl.data.rows import Row, look_up
from rl.errors import DataError, MissingVideoError
from tests.rl.data.formats.folder import write

OURS: dict[str, Any] = {"video": "a.mp4", "question": "What next?", "answer": "up"}
THEIRS: dict[str, Any] = {
    "clip": "a.mp4",
    "text": {"query": "<video>Next?", "choices": ["(A) up", "(B) down"]},
    "label": 1,
    "from": 0.5,
    "to": 2,
    "note": "kept",
}
COLUMNS = {"video": "clip", "question": "text.query", "options": "text.choices", "answer": "label"}


def refused(source: str | Path, kind: type[Exception] = DataError, **arguments: Any) -> str:
    with pytest.raises(kind) as caught:
        read_samples(source, **arguments)
    return str(caught.value)


@pytest.fixture
def clip(tmp_path: Path) -> Path:
    (tmp_path / "a.mp4").write_bytes(b"0")
    return tmp_path


@pytest.mark.parametrize("name", ["m.jsonl", "m.json", "m.parquet", "m.txt"])
def test_files(clip: Path, name: str) -> None:
    file = write(clip, name, [OURS, OURS | {"id": "b", "level": 3}])
    if name == "m.txt":  # any other file is JSON lines
        file.write_text("".join(json.dumps(row) + "\n" for row in json.loads(file.read_text())))
    found = read_samples(file)
    assert found.format == "manifest"
    assert found.recognised == (
        "manifest: Foresight's own rows, because rows have video or images, question and answer"
    )
    assert [s.id for s in found.samples] == ["m:1", "b"]
    assert found.samples[1].extra["level"] == 3 and found.skipped == []


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"data": [OURS], "version": 2}),
        json.dumps({"data": [OURS]}, indent=1),
        "\n" + json.dumps([OURS], indent=1),
        "\ufeff" + json.dumps(OURS) + "\n" + json.dumps(OURS),  # lines, whatever it is called
    ],
)
def test_shapes_of_json(clip: Path, text: str) -> None:
    file = clip / "m.json"
    file.write_text(text)
    assert {s.question for s in read_samples(file).samples} == {"What next?"}


def test_folders_of_shards_and_their_splits(clip: Path) -> None:
    for split, shard, answer in [("test", 0, "t0"), ("train", 1, "b"), ("train", 0, "a")]:
        name = f"data/{split}-0000{shard}-of-00002.parquet"
        write(clip, name, [OURS | {"answer": answer}])
    assert "has the splits test, train; write" in refused(clip / "data")
    train = read_samples(f"{clip / 'data'}:train", video_root=clip)
    ids = ["data:train:1", "data:train:2"]  # those of two splits differ
    assert [(s.id, s.answer) for s in train.samples] == list(zip(ids, "ab", strict=True))
    assert "split 'dev'; there are test, train" in refused(f"{clip / 'data'}:dev")
    (clip / "none").mkdir()
    assert "the folder holds no data" in refused(clip / "none")


def test_data_sets_of_datasets(clip: Path) -> None:
    data = Dataset.from_list([OURS, OURS | {"answer": "down"}])
    data.save_to_disk(clip / "one")
    DatasetDict({"train": data, "test": data.select([1])}).save_to_disk(clip / "two")
    (sample, _) = read_samples(clip / "one", video_root=clip).samples
    assert (sample.id, sample.answer) == ("one:1", "up")
    (sample,) = read_samples(f"{clip / 'two'}:test", video_root=clip).samples
    assert (sample.id, sample.answer) == ("two:test:1", "down")
    assert "has the splits train, test; write" in refused(clip / "two")
    assert "no split 'tset'; did you mean 'test'?" in refused(f"{clip / 'two'}:tset")
    # With a card that describes configurations, as on the Hub.
    built = clip / "built"
    write(built, "mc.jsonl", [OURS])
    write(built, "oe.jsonl", [OURS | {"answer": "open"}])
    files = "".join(
        f"- config_name: {c}\n  data_files:\n  - split: test\n    path: {c}.jsonl\n"
        for c in ("mc", "oe")
    )
    (built / "README.md").write_text(f"---\nconfigs:\n{files}---\n")
    (sample,) = read_samples(f"{built}/oe:test", video_root=clip).samples
    assert sample.answer == "open" and sample.id.endswith("built_oe:test:1")
    assert "`datasets` cannot load it" in refused(f"{built}/ox:test", video_root=clip)
    assert "`datasets` cannot load it" in refused("nobody/nothing:test")


def test_a_mapping(clip: Path) -> None:
    file = write(clip, "t.jsonl", [THEIRS, THEIRS | {"label": "up", "from": None, "to": None}])
    window = COLUMNS | {"start": "from", "end": "to"}
    endless = write(clip, "e.jsonl", [THEIRS | {"to": float("inf")}])
    assert "'to' are [0.5, inf]; write the seconds" in refused(endless, columns=window)
    found = read_samples(file, columns=window)
    first, second = found.samples
    assert found.recognised.startswith("columns: video is clip, question is text.query, ")
    assert (first.question, first.options, first.answer) == ("Next?", ("up", "down"), "B")
    assert (first.window, first.extra) == ((0.5, 2.0), {"note": "kept"})
    assert (second.answer, second.window) == ("A", None)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (COLUMNS | {"anser": "label"}, "columns.anser is no column of ours; did you mean 'answer'"),
        (COLUMNS | {"answer": "lable"}, "not have; did you mean 'label'?"),
        (COLUMNS | {"question": "text.qery"}, "did you mean 'text.query'?"),
        ({"question": "text.query"}, "lacks answer and video; add what the rows call them"),
        (COLUMNS | {"start": "from"}, "lacks end"),
    ],
)
def test_wrong_mappings(clip: Path, columns: dict[str, str], message: str) -> None:
    file = write(clip, "t.jsonl", [THEIRS])
    assert message in refused(file, columns=columns)
    assert "leave one of the two out" in refused(file, columns=columns, format="llava")


def test_rows_that_nothing_or_too_much_fits(clip: Path) -> None:
    message = refused(write(clip, "t.jsonl", [THEIRS]))
    assert "like none of the data sets that are known" in message
    assert "columns: {video: clip, question: text.query, answer: label}" in message
    assert "The rows have: clip, text, text.query, text.choices, label, from, to, note" in message
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    message = refused(write(clip, "m.jsonl", [OURS | {"conversations": talk}]))
    assert "look like several data sets (manifest, llava); write one as `format`" in message
    assert "did you mean 'futurebench'?" in refused(clip / "t.jsonl", format="futurbench")
    # One of ours with a mistake is not taken for something else.
    file = write(clip, "bad.jsonl", [OURS, {**OURS, "answer": None}])
    assert "line 2: column 'answer' is missing; add it" in refused(file)


def test_every_format_is_more_special_or_apart() -> None:
    """Rows with exactly what one format needs are recognised as that one."""
    from rl.data.formats.recognise import choose_format

    for name, known in FORMATS.items():
        row: dict[str, Any] = {}
        for need in known.needs:
            top, _, nested = need.split("|")[0].partition(".")
            row[top] = {**row.get(top, {}), nested: "x"} if nested else "x"
        assert choose_format("auto", None, [row], "rows")[0] is known, name


def test_missing_videos(clip: Path) -> None:
    rows = [OURS | {"id": "x"}, OURS | {"id": "y", "video": "b.mp4"}, OURS | {"video": None}]
    file = write(clip, "m.jsonl", [*rows, OURS])
    assert "line 2: column 'video' names 'b.mp4'" in refused(file, MissingVideoError)
    found = read_samples(file, missing="skip")
    assert [s.id for s in found.samples] == ["x", "m:4"]
    named, unnamed = found.skipped
    assert (named.id, named.file) == ("y", str(clip / "b.mp4")) and "no file" in named.reason
    assert (unnamed.id, unnamed.file) == ("m:3", "") and "has no video" in unnamed.reason
    long = write(clip, "l.jsonl", [OURS | {"video": "x" * 300}])  # a name that no file can have
    assert "there is no file" in refused(long, MissingVideoError)
    assert len(read_samples(file, missing="skip", limit=2).samples) == 2  # of those kept
    message = refused(file, MissingVideoError, missing="skip", video_root=clip / "elsewhere")
    assert "none of its 4 rows has its video" in message
    wrong = write(clip, "w.jsonl", [OURS, OURS | {"video": "b.mp4", "options": ["one"]}])
    assert "give 2 to 26" in refused(wrong, missing="skip")  # what else is wrong still stops


def test_one_look_at_a_file_a_row(clip: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = write(clip, "m.jsonl", [OURS] * 5)
    looks: list[str] = []
    isfile = os.path.isfile
    monkeypatch.setattr(os.path, "isfile", lambda path: (looks.append(str(path)), isfile(path))[1])
    assert len(read_samples(file).samples) == 5
    assert looks.count(str(clip / "a.mp4")) == 5


def test_ids_that_repeat(clip: Path) -> None:
    talk = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    rows = [{"id": i, "video": "a.mp4", "conversations": talk} for i in ("v", "v#2", "v", "v")]
    file = write(clip, "l.jsonl", rows)
    assert [s.id for s in read_samples(file).samples] == ["v", "v#2", "v#3", "v#4"]
    assert "already used in line 1" in refused(write(clip, "m.jsonl", [OURS | {"id": 1}] * 2))


def test_extra_columns_have_no_name_of_ours_and_are_json() -> None:
    row = Row("row 1", {"a": 1, "b": b"0", "c": [{"d": None}], "question": "q", "e": {1: 2}}, "s")
    row.get("a")
    assert row.extra() == {"c": [{"d": None}], "row_question": "q"}
    assert look_up({"a.b": 1, "a": {"b": 2}}, "a.b") == (1, "a.b")  # a name may have a point
    assert look_up({"a": {"b": 2}}, "a.b") == (2, "a") and look_up({"a": 3}, "a.b") == (None, "a")


def test_broken_files(clip: Path) -> None:
    (clip / "m.json").write_text('[{"a": 1},')
    (clip / "one.json").write_text('{\n"a": 1}')
    (clip / "m.parquet").write_bytes(b"PAR1")
    assert "m.json: not valid JSON" in refused(clip / "m.json")
    assert "holds one JSON object, not a list" in refused(clip / "one.json")
    assert "not a Parquet file" in refused(clip / "m.parquet")
    assert "check the path" in refused(clip / "gone.json")
    assert "m.jsonl: the manifest has no rows" in refused(write(clip, "m.jsonl", []))

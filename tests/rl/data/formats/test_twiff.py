"""Future-L1, TwiFF and TwiFF-Bench: rows in the shapes of their repositories."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from rl.data.formats import read_samples
from rl.errors import DataError, MissingVideoError
from tests.rl.data.formats.folder import read, write

FUTURE_L1: dict[str, Any] = {
    "video": "clips/a.mp4",
    "image": [1, 3],
    "reasoning_image": [5, 8],
    "conversations": [
        {"from": "system", "value": "Imagine."},
        {"from": "human", "value": "frame_1\n<image>\nframe_2\n<image>\nWhat happens to frame_2?"},
        {
            "from": "gpt",
            "value": "THOUGHT 1: It rolls. <image> THOUGHT 2: It falls.\n<image>\nTHOUGHT 3: Done.",
        },
    ],
    "answer": "It breaks.",
    "cot": "It rolls, it falls.",
    "gain": 0.5,
}


def test_future_l1(tmp_path: Path) -> None:
    columns = {"from": ["human", "gpt"], "value": ["<image>\nWhat next?", "THOUGHT 1: It stops."]}
    other = FUTURE_L1 | {"conversations": columns, "reasoning_image": []}  # as `datasets` has it
    file = write(tmp_path, "top.json", [FUTURE_L1, other], ("clips/a.mp4",))
    first, second = read(file, "future_l1")
    assert first.video == str(tmp_path / "clips/a.mp4") and first.id == "top:1"
    assert first.question == "What happens to frame_2?"
    assert first.answer == "It breaks." and first.options == ()
    assert (first.pool, first.frames, first.imagine) == (8, (0, 2), ((4,), (7,)))
    assert first.reasoning == ("It rolls.", "It falls.", "Done.")
    assert first.extra == {"cot": "It rolls, it falls.", "gain": 0.5}
    assert (second.question, second.reasoning) == ("What next?", ("It stops.",))
    assert second.imagine == ()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reasoning_image": [5]}, "have 2 pictures, and the row lists 1 frames"),
        ({"reasoning_image": [5, 9]}, "'reasoning_image' is a list ([5, 9]); write a list of num"),
        ({"image": [0]}, "numbers from 1 to 8"),
        ({"image": [3, 1]}, "'image' holds [3, 1]; frames must ascend"),
        ({"conversations": FUTURE_L1["conversations"][1:2]}, "must alternate"),
        ({"conversations": FUTURE_L1["conversations"][1:] * 2}, "has 2 questions; give each a row"),
        ({"conversations": [{"from": "human", "value": 3}]}, "turns with texts"),
        ({"answer": None}, "column 'answer' is missing"),
        ({"video": 3}, "write the path of a file"),
    ],
)
def test_future_l1_refuses(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    file = write(tmp_path, "top.json", [FUTURE_L1, FUTURE_L1 | change], ("clips/a.mp4",))
    with pytest.raises(DataError) as caught:
        read_samples(file, format="future_l1")
    assert str(caught.value).startswith(f"{file}, row 2: ") and message in str(caught.value)


def test_future_l1_chat(tmp_path: Path) -> None:
    row = {
        "messages": [
            {"role": "system", "content": "Imagine."},
            {"role": "user", "content": [{"type": "text", "text": "<video>What next?"}]},
            {"role": "assistant", "content": "<reason>It rolls.</reason>\n<answer>Left.</answer>"},
        ],
        "videos": ["a.mp4"],
        "images": [],
    }
    bare = row | {"messages": [*row["messages"][:2], {"role": "assistant", "content": "Left."}]}
    first, second = read(write(tmp_path, "chat.json", [row, bare], ("a.mp4",)), "future_l1_chat")
    assert (first.question, first.answer, first.reasoning) == (
        "What next?",
        "Left.",
        ("It rolls.",),
    )
    assert first.extra == {"system": "Imagine."} and first.pool == 0
    assert (second.answer, second.reasoning) == ("Left.", ())
    both = write(tmp_path, "both.json", [row | {"videos": ["a.mp4", "a.mp4"]}])
    with pytest.raises(DataError, match="2 videos and 0 images"):
        read_samples(both)


def test_twiff(tmp_path: Path) -> None:
    row = {
        "video": "a.mp4",
        "frames": [1],
        "recon_frames": [4, 7],
        "conversations": [
            {"from": "system", "value": "Think."},
            {"from": "human", "value": "<image>\nWhat next?"},
            {
                "from": "gpt",
                "value": "THOUGHT 1: Up.<rimage>THOUGHT 2: Over.<rimage>So: <ans>It is left.</ans>",
            },
        ],
    }
    (sample,) = read(write(tmp_path, "twiff.jsonl", [row], ("a.mp4",)), "twiff")
    assert (sample.question, sample.answer) == ("What next?", "It is left.")
    assert (sample.pool, sample.frames, sample.imagine) == (8, (0,), ((3,), (6,)))
    assert sample.reasoning == ("Up.", "Over.", "So:")
    unsorted = write(tmp_path, "unsorted.jsonl", [row | {"frames": [3, 1]}])
    with pytest.raises(DataError, match=r"column 'frames' holds \[3, 1\]; frames must ascend"):
        read_samples(unsorted)  # the row's own numbers
    row["conversations"][2]["value"] = "<rimage><rimage>left"
    with pytest.raises(DataError, match=r"line 1: .* has no <ans>"):
        read_samples(write(tmp_path, "bad.jsonl", [row]))


def test_twiff_bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets.config

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    content = BytesIO()
    Image.new("RGB", (4, 4), "red").save(content, "PNG")
    picture = {"bytes": content.getvalue(), "path": "q.png"}
    row = {
        "video": "a.mp4",
        "question": "frame_1\n<image>\nWhat next?",
        "answer": "THOUGHT 1: It rolls.<rimage>Then<ans>It stops.</ans>",
        "question_images": [picture, picture],
        "reasoning_images": [picture],
        "question_images_index": [1, 2],
        "reasoning_images_index": [6],
        "meta_data": {"classification": "ball"},
    }
    rows = [row, row | {"answer": "It stops."}, row | {"video": "gone.mp4"}]
    file = write(tmp_path, "test-00000-of-00001.parquet", rows, ("a.mp4",))
    first, plain, shown = read(file, "twiff_bench")
    said = "1 rows are shown by pictures alone, because their video files are missing"
    assert read_samples(file).recognised.endswith(said)
    whole = write(tmp_path, "whole.parquet", rows[:2])
    assert "shown by pictures" not in read_samples(whole).recognised
    assert (first.question, first.answer) == ("What next?", "It stops.")
    assert (first.pool, first.frames, first.imagine) == (8, (0, 1), ((5,),))
    assert first.reasoning == ("It rolls.", "Then")
    assert first.extra == {"meta_data": {"classification": "ball"}} and first.images == ()
    assert (plain.answer, plain.reasoning, plain.imagine) == ("It stops.", (), ((5,),))
    # Without the file, the pictures of the row are the clip.
    assert (shown.pool, shown.frames, shown.imagine, shown.reasoning) == (0, (), (), ())
    assert len(shown.images) == 2 and shown.video == shown.images[0]
    assert Path(shown.video).read_bytes() == picture["bytes"]
    with pytest.raises(MissingVideoError, match=r"row 1: column 'video' names 'gone.mp4'"):
        read_samples(
            write(tmp_path, "no.parquet", [{**rows[2], "question_images": None}]),
            format="twiff_bench",
        )

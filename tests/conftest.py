"""Fixtures that every test may use. `tests/__init__.py` sets the environment."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.tiny import moving_square, save_tiny_checkpoint, write_clip

torch.set_num_threads(
    1
)  # single-token steps of a tiny model are several times slower on two threads


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a tiny Qwen3-VL with its processor. Read only."""
    return save_tiny_checkpoint(tmp_path_factory.mktemp("tiny_qwen3_vl"))


@pytest.fixture(scope="session")
def clips(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with ``manifest.jsonl`` and four 16x16 clips of 4, 8, 6 and 12 frames at 8 fps. Read
    only.

    Rows show the first 2, 4, 4 and 6 frames and imagine the next frame pairs (one span of one pair,
    two spans, ...).
    """
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for i, (length, shown, imagine) in enumerate(
        [(4, 2, [[2, 3]]), (8, 4, [[4, 5], [6, 7]]), (6, 4, [[4, 5]]), (12, 6, [[6, 7, 8, 9]])]
    ):
        write_clip(folder / f"clip{i}.mp4", moving_square(length, seed=i))
        rows.append(
            {
                "id": f"clip{i}",
                "video": f"clip{i}.mp4",
                "question": "Where does the square go next?",
                "options": ["left", "right", "up", "down"],
                "answer": "ABCD"[i],
                "frames": list(range(shown)),
                "imagine": imagine,
                "level": i,
            }
        )
    (folder / "manifest.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder

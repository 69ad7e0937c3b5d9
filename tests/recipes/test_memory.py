"""What a recipe's updates take: the setting that is estimated is the one that would run."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

from recipes.check import check_recipe
from recipes.cli import app
from recipes.loading import load_recipe
from recipes.memory import RecipeMemory, recipe_memory
from rl.errors import VideoError
from tests.recipes.worlds import write_recipe


@pytest.fixture
def estimated(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> Callable[..., RecipeMemory]:
    """The estimate of a recipe with changes, on one row that shows 2 frames of 16 x 16 pixels."""
    row: dict[str, Any] = {"question": "Where?", "options": ["left", "right"], "answer": "A"}
    row |= {"video": str(clips / "clip0.mp4"), "frames": [0, 1], "imagine": [[2, 3]]}
    manifest = tmp_path / "rows.jsonl"
    rows = [{**row, "id": str(i)} for i in range(8)]
    (tmp_path / "noise.mp4").write_bytes(b"\0" * 999)

    def estimate(first: str = row["video"], **changes: Any) -> RecipeMemory:
        written = [{**rows[0], "video": first}, *rows[1:]]
        manifest.write_text("\n".join(json.dumps(r) for r in written))
        path = write_recipe(tmp_path, tiny_checkpoint, manifest, changes)
        recipe = load_recipe(path)
        return recipe_memory(recipe, check_recipe(recipe))

    return estimate


def test_la_dapo(estimated: Callable[..., RecipeMemory]) -> None:
    found = estimated()
    setting = found.setting
    assert setting.grid == (1, 4, 4)  # a frame pair of 4 x 4 patches, 4 tokens once merged
    assert setting.text_tokens == found.prompt - 4
    assert (setting.groups, setting.group_size, setting.micro_batches) == (2, 2, 1)
    assert (setting.completion_tokens, setting.latents) == (6, 4)  # spans of 2 and their markers
    assert setting.dtype == torch.float32 and setting.autocast == torch.bfloat16
    assert not setting.reference and setting.train_vision and setting.peft_config is None
    assert found.estimate.weights > 0 and found.estimate.optimizer > 0
    text = str(found)
    assert "MiB at the peak" in text and "bfloat16" in text and f"({found.prompt} tokens)" in text
    assert "2 x 2 completions of 6 tokens" in text and "row '0'" in text


def test_what_the_recipe_says_counts(estimated: Callable[..., RecipeMemory]) -> None:
    on_cpu = estimated(**{"device": "cpu", "train.beta": 0.1, "train.lora": {"r": 4}}).setting
    assert on_cpu.autocast is None and on_cpu.reference
    assert on_cpu.peft_config is not None and not on_cpu.gradient_checkpointing
    three = estimated(**{"train.prompts_per_step": 6, "train.micro_batch": 5}).setting
    assert (three.groups, three.group_size, three.micro_batches) == (2, 2, 3)
    halves = estimated(**{"train.group_size": 4, "train.micro_batch": 2}).setting
    assert (halves.groups, halves.group_size, halves.micro_batches) == (1, 2, 4)


def test_a_first_clip_that_cannot_be_read(
    tmp_path: Path, estimated: Callable[..., RecipeMemory]
) -> None:
    noise = str(tmp_path / "noise.mp4")
    assert estimated(noise, **{"data.bad_videos": "skip"}).sample == "1"
    with pytest.raises(VideoError, match="noise"):
        estimated(noise)


def test_a_budget_of_tokens(estimated: Callable[..., RecipeMemory]) -> None:
    changes = {"train.prompts_per_step": 4, "train.group_size": 4}
    prompt = estimated().prompt
    group = prompt + 4 * 6

    def shape(budget: int) -> tuple[int, int, int]:
        s = estimated(**changes, **{"train.max_tokens_per_microbatch": budget}).setting
        return s.groups, s.group_size, s.micro_batches

    assert shape(10 * group) == (4, 4, 1)
    assert shape(3 * group) == (3, 4, 2)
    assert shape(group) == (1, 4, 4)
    assert shape(group - 1) == (1, 3, 6)  # three of a group's four completions
    assert shape(1) == (1, 1, 16)


def test_sft(estimated: Callable[..., RecipeMemory]) -> None:
    train = {"max_steps": 1, "batch_size": 8, "micro_batch": 4, "answer_template": "{answer}"}
    setting = estimated(stage="sft", train=train).setting
    assert (setting.groups, setting.group_size, setting.micro_batches) == (4, 1, 2)
    # A latent between its markers, one letter, and the end of sequence.
    assert (setting.latents, setting.completion_tokens) == (1, 1 + 2 + 1 + 1)
    assert not setting.train_vision and not setting.reference


def test_the_command_says_it_when_asked(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> None:
    row = {"video": str(clips / "clip0.mp4"), "question": "?", "answer": "A", "frames": [0, 1]}
    manifest = tmp_path / "rows.jsonl"
    manifest.write_text("\n".join(json.dumps(row) for _ in range(4)))
    recipe = str(write_recipe(tmp_path, tiny_checkpoint, manifest))
    plain, asked = (
        CliRunner().invoke(app, ["check", recipe, *more]) for more in ([], ["--memory"])
    )
    assert plain.exit_code == asked.exit_code == 0, asked.output
    assert asked.output.startswith(plain.output)
    assert "an update takes about" in asked.output and "at the peak" not in plain.output

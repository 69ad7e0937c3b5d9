"""The command line on bad input: one screen that names the place and the remedy, and exit code
2.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import Qwen3Config, Qwen3ForCausalLM
from typer.testing import CliRunner

from recipes.cli import app
from tests.recipes.worlds import write_recipe
from tests.tiny import tiny_tokenizer

ROW: dict[str, Any] = {
    "video": "clip0.mp4",
    "question": "Where?",
    "options": ["left", "right"],
    "answer": "A",
    "frames": [0, 1],
}


def invoke(*arguments: object) -> tuple[int, str]:
    result = CliRunner().invoke(app, [str(a) for a in arguments])
    return result.exit_code, result.output


@pytest.fixture(params=["check", "run"])
def refused(request: pytest.FixtureRequest) -> Callable[..., str]:
    """Run a command that must exit with 2; returns its one screen."""

    def refuse(recipe: Path) -> str:
        code, output = invoke(request.param, recipe)
        assert code == 2, output
        assert output.startswith("error: ") and len(output.splitlines()) <= 24
        assert "Traceback" not in output
        assert not (recipe.parent / "run").exists()  # nothing was started
        return output

    return refuse


@pytest.fixture
def recipe(tmp_path: Path, tiny_checkpoint: Path, clips: Path) -> Callable[..., Path]:
    """`write_recipe` with the tiny checkpoint and clips; `rows` replaces the manifest."""

    def write(
        changes: dict[str, Any] | None = None, rows: list[dict[str, Any]] | None = None
    ) -> Path:
        manifest = clips / "manifest.jsonl"
        changes = dict(changes or {})
        if rows is not None:
            manifest = tmp_path / "rows.jsonl"
            manifest.write_text("".join(json.dumps(row) + "\n" for row in rows))
            changes.setdefault("data.video_root", str(clips))
        return write_recipe(tmp_path, tiny_checkpoint, manifest, changes)

    return write


def test_check_accepts(recipe: Callable[..., Path]) -> None:
    code, output = invoke("check", recipe())
    assert code == 0 and "fine: rows 4 for training" in output


def test_typo(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    output = refused(recipe({"train.group_sise": 4}))
    assert "recipe.yaml" in output
    assert "train.group_sise: unknown key; did you mean 'group_size'?" in output


def test_wrong_type(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    assert "train.max_steps: must be a valid integer, got 'many'" in refused(
        recipe({"train.max_steps": "many"})
    )


def test_unknown_reward(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    output = refused(recipe({"rewards": [{"use": "acuracy"}]}))
    assert "rewards[0]" in output and "did you mean 'accuracy'?" in output


def test_missing_manifest(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    output = refused(recipe({"data.train": "nowhere.jsonl"}))
    assert "nowhere.jsonl" in output and "check the path in the recipe" in output


def test_row_without_video(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    row = {k: v for k, v in ROW.items() if k != "video"}
    output = refused(recipe(rows=[ROW, row]))
    assert "rows.jsonl, line 2: the row has no video; put the path" in output


def test_video_that_is_not_there(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    output = refused(recipe(rows=[ROW | {"video": "gone.mp4"}, ROW]))
    assert "line 1" in output and "gone.mp4" in output and "correct the path" in output


def test_file_that_is_no_video(
    recipe: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    (tmp_path / "notes.mp4").write_text("not a video")
    output = refused(recipe(rows=[ROW | {"video": str(tmp_path / "notes.mp4")}, ROW]))
    assert "notes.mp4: not a video that can be decoded" in output and "re-encode it" in output


def test_answer_outside_the_choices(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    output = refused(recipe(rows=[ROW | {"answer": "E"}]))
    assert "line 1: answer 'E' is not among the options" in output and "give a letter" in output


def test_too_few_rows_for_a_step(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    output = refused(recipe({"train.prompts_per_step": 64}))
    assert "train.prompts_per_step is 64" in output and "lower it to 4" in output


def test_model_without_video(
    recipe: Callable[..., Path], refused: Callable[..., str], tmp_path: Path
) -> None:
    config = Qwen3Config(
        vocab_size=300,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=2,
        head_dim=8,
    )
    Qwen3ForCausalLM(config).save_pretrained(tmp_path / "text")
    tiny_tokenizer().save_pretrained(tmp_path / "text")
    output = refused(recipe({"policy.path": "text"}))
    assert "text" in output and "Choose a model with video input" in output


def test_no_model(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    output = refused(recipe({"policy.path": "./nothing"}))
    assert "policy.path" in output and "nothing is no folder; give the folder" in output


def test_noise_zero_with_latent_weight(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    output = refused(recipe({"policy.noise_scale": 0.0}))
    assert "noise_scale is 0" in output and "Set policy.noise_scale above 0" in output


def test_what_vllm_would_refuse_later(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    pytest.importorskip("vllm")
    settings = {"rollouts.engine": "vllm", "rollouts.vllm.weight_transfer": "nccl"}
    assert "weight_transfer is nccl, which needs other GPUs" in refused(recipe(settings))


def test_a_single_token_to_choose_from(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert "top_k is 1; it must be at least 2" in refused(recipe({"train.top_k": 1}))


def test_impossible_budget(recipe: Callable[..., Path], refused: Callable[..., str]) -> None:
    assert "1 <= min_length <= max_length" in refused(recipe({"policy.min_length": 9}))


def test_filter_that_keeps_nothing(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    assert "filter_low < filter_high" in refused(recipe({"train.filter_low": 0.95}))


def test_trainer_refuses_an_argument(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    output = refused(recipe({"train.extra": {"auto_find_batch_size": True}}))
    assert "auto_find_batch_size is not supported" in output and "`train.extra`" in output


def test_sft_spans_beyond_the_budget(
    recipe: Callable[..., Path], refused: Callable[..., str]
) -> None:
    changes = {"stage": "sft", "policy.max_length": 1, "train": {"batch_size": 4}}
    output = refused(recipe(changes))
    assert "sample 'clip3'" in output and "max_length" in output


def test_debug_shows_the_traceback(recipe: Callable[..., Path]) -> None:
    path = recipe({"train.group_sise": 4})
    result = CliRunner().invoke(app, ["check", str(path), "--debug"])
    assert type(result.exception).__name__ == "RecipeError"


def test_set_reaches_the_recipe(recipe: Callable[..., Path]) -> None:
    code, output = invoke("check", recipe(), "--set", "train.max_steps=-1")
    assert code == 2 and "train.max_steps" in output


def test_version_and_help() -> None:
    assert invoke("--version")[1].startswith("foresight ")
    code, output = invoke("--help")
    assert code == 0 and all(
        c in output for c in ("run", "check", "evaluate", "export", "quickstart")
    )


def test_help_loads_nothing_heavy() -> None:
    script = (
        "import sys\nfrom typer.testing import CliRunner\nfrom recipes.cli import app\n"
        "assert CliRunner().invoke(app, ['run', '--help']).exit_code == 0\n"
        "print(sorted({'torch', 'transformers', 'trl', 'ray'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_evaluate_refuses_what_is_no_policy(tmp_path: Path, clips: Path) -> None:
    code, output = invoke("evaluate", tmp_path, "--data", clips / "manifest.jsonl")
    assert code == 2 and "neither a policy" in output


def test_export_refuses_a_plain_model(tmp_path: Path, tiny_checkpoint: Path) -> None:
    code, output = invoke("export", tiny_checkpoint, tmp_path / "out")
    assert code == 2 and "holds a plain model" in output and not (tmp_path / "out").exists()

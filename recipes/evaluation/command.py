"""`foresight evaluate POLICY --data FILE`: the options of the command line become a recipe."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Literal

from rich.console import Console

from recipes.evaluation.benchmarks import find_benchmark
from recipes.evaluation.evaluate import MODES
from recipes.evaluation.run import run_evaluation
from recipes.evaluation.scores import Evaluation
from recipes.loading import parse_recipe
from recipes.schema.evaluation import EvaluateRecipe
from rl.errors import PolicyError, RecipeError
from rl.export import find_policy


def evaluate_policy(
    policy: str | Path,
    data: str | Path,
    *,
    benchmark: str | None = None,
    modes: Sequence[str] | None = None,
    workers: int = 1,
    limit: int | None = None,
    by: str | None = None,
    max_new_tokens: int | None = None,
    frames: int | None = None,
    fps: float | None = None,
    video_root: str | Path | None = None,
    system_prompt: str | None = None,
    engine: Literal["auto", "transformers", "vllm"] = "auto",
    bad_videos: Literal["stop", "skip"] = "stop",
    judge: Mapping[str, Any] | None = None,
    output: str | Path | None = None,
    console: Console | None = None,
) -> Evaluation:
    """Evaluate a policy, or the policy of a run, or a plain video model (a folder, or a name on the
    Hub), with `workers` Ray workers, and show the tables.

    `data` are rows of one's own, or of a `benchmark`, which then says how they are asked and
    graded; `frames`, `fps`, `max_new_tokens` and `by` change that. `modes` of None are all three,
    of a benchmark free, and never for a plain model. With an `output` folder answers and
    predictions are kept there, and a killed evaluation goes on from them. `judge` are options of a
    benchmark's judge, such as base_url and model.

    Raises `RecipeError` for an unknown mode or benchmark, `PolicyError` or `CheckpointError` for a
    folder that holds no policy, and the errors of data and videos.
    """
    if benchmark is not None:
        find_benchmark(benchmark)  # before anything is read
    if unknown := sorted(set(modes or ()) - set(MODES)):
        raise RecipeError(f"--modes: {unknown} are unknown; choose of {', '.join(MODES)}")
    section: dict[str, Any] = {
        "use": benchmark,
        "data": str(data),
        "video_root": video_root and str(video_root),
        "limit": limit,
        "modes": modes and [mode for mode in MODES if mode in modes],
        "max_new_tokens": max_new_tokens,
        "by": None if by is None else [by],
        "judge": None if judge is None else dict(judge),
    }
    if frames is not None or fps is not None:
        shown = find_benchmark(benchmark).frames.count if benchmark else 16
        section["frames"] = {"count": frames or shown, "fps": fps}
    with TemporaryDirectory() as temporary:
        values = {
            "stage": "evaluate",
            "output": temporary if output is None else str(output),
            "policy": {"path": _policy(policy)},
            "data": {"system_prompt": system_prompt, "bad_videos": bad_videos},
            "benchmarks": [section],
            "rollouts": {"workers": workers, "engine": engine},
        }
        recipe = parse_recipe(values, source="foresight evaluate", folder=Path.cwd())
        assert isinstance(recipe, EvaluateRecipe)
        found = run_evaluation(recipe, console, keep=output is not None)
    return next(iter(found.evaluations.values()))


def _policy(policy: str | Path) -> str:
    """The folder with the weights, or a name on the Hub."""
    if not Path(policy).exists() and str(policy).count("/") == 1:
        return str(policy)
    folder, _ = find_policy(policy)
    if (folder / "adapter_config.json").is_file():
        raise PolicyError(
            f"{folder} holds LoRA adapters and no policy; `foresight export` makes one of it"
        )
    return str(folder)

"""The same row and settings show the same frames in SFT, RL and evaluation, whatever the length and
the rate of the clip.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from recipes.check import media_processor
from recipes.evaluation.evaluate import evaluate
from recipes.loading import load_any_recipe
from rl.collecting import GroupCollector
from rl.data import FrameRule, LocalMedia, select_frames
from rl.data.video import probe
from rl.sft.trainer import LatentSFTConfig, LatentSFTTrainer
from rl.trajectory import MediaKey, Sample, Sampling
from rollouts.transformers_engine import TransformersEngine
from tests.latent import thinking_policy
from tests.tiny import tiny_processor, write_clip

RULES = st.builds(
    FrameRule,
    count=st.integers(1, 12),
    fps=st.none() | st.floats(0.3, 12),
    at=st.sampled_from(["ends", "middle"]),
)


class Watched:
    """An engine, and what the trajectories that it sampled were shown."""

    def __init__(self, engine: TransformersEngine) -> None:
        self.engine, self.media = engine, engine.media
        self.shown: list[MediaKey] = []

    def generate(self, requests: Any) -> Any:
        groups = self.engine.generate(requests)
        self.shown += [group.trajectories[0].media[0] for group in groups]
        return groups

    def broken(self, samples: Any) -> Any:
        return self.engine.broken(samples)


class Right:
    def outcomes(self, groups: Any) -> list[list[float]]:
        return [[1.0] * len(group) for group in groups]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Any, Any]:
    policy, processor = thinking_policy(tmp_path_factory.mktemp("policy"))
    return tmp_path_factory.mktemp("clips"), policy, processor


def clip(folder: Path, frames: int, rate: int) -> str:
    path = folder / f"{frames}_{rate}.mp4"
    if not path.is_file():
        write_clip(path, np.zeros((frames, 8, 8, 3), np.uint8), fps=rate)
    return str(path)


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    rule=RULES,
    clips=st.lists(st.tuples(st.integers(1, 40), st.integers(1, 60)), min_size=2, max_size=4),
    window=st.none() | st.tuples(st.floats(0, 0.7), st.floats(0.05, 1)),
    pool=st.sampled_from([0, 4]),
)
def test_frames_are_those_of_every_stage(
    world: tuple[Path, Any, Any],
    rule: FrameRule,
    clips: list[tuple[int, int]],
    window: tuple[float, float] | None,
    pool: int,
) -> None:
    folder, policy, processor = world
    samples = []
    for i, (frames, rate) in enumerate(clips):
        sample = Sample(f"s{i}", clip(folder, frames, rate), "?", "A", ("up", "down"))
        if window is not None:
            seconds = frames / rate
            part = (window[0] * seconds, (window[0] + window[1]) * seconds)
            sample = replace(sample, window=part)
        if pool:
            sample = replace(sample, pool=pool, frames=(0, pool - 1))
        samples.append(sample)
    expected = [select_frames(s, probe(s.video), rule) for s in samples]

    def engine() -> Watched:
        media = media_of(processor, rule)
        return Watched(TransformersEngine(policy, media, LocalMedia(media)))

    rl = engine()
    collector = GroupCollector(
        rl,  # type: ignore[arg-type]
        Right(),  # type: ignore[arg-type]
        samples,
        seed=0,
        low=0.0,
        high=1.0,
        max_refills=0,
    )
    collector.collect(samples, 1, Sampling(1.0, 2), "0", filtering=False)
    assert [key.frames for key in rl.shown] == expected

    evaluation = engine()
    evaluate(evaluation, samples, ["free"], 2)
    assert evaluation.shown == rl.shown

    config = LatentSFTConfig(
        str(folder / "run"), max_steps=1, use_cpu=True, report_to="none", disable_tqdm=True
    )
    trainer = LatentSFTTrainer(policy, config, samples, media_of(processor, rule))
    assert [trainer.rows._prompt(i)[1] for i in range(len(samples))] == rl.shown


def media_of(processor: Any, rule: FrameRule) -> Any:
    from rl.data import MediaProcessor

    return MediaProcessor(processor, rule)


def test_recipes_of_all_stages_give_the_same_rule(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").touch()
    frames = "{count: 8, fps: 2.0, at: middle}"
    base = "output: out\npolicy: {path: policy}\n"
    recipes = {
        "sft": f"data: {{train: rows.jsonl, frames: {frames}}}\n",
        "la_dapo": f"data: {{train: rows.jsonl, frames: {frames}}}\n",
    }
    for stage, text in recipes.items():
        path = tmp_path / f"{stage}.yaml"
        path.write_text(f"stage: {stage}\n{base}{text}")
        recipe: Any = load_any_recipe(path)
        media = media_processor(recipe.data, tiny_processor())
        assert media.frames == FrameRule(8, 2.0, "middle")

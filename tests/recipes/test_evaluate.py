"""The figures of an evaluation, from given answers and from a real engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoProcessor

from recipes.evaluate import MODES, evaluate
from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import DataError
from rl.policy.model import make_policy
from rl.policy.protocol import Slot
from rl.trajectory import RolloutRequest, Sample, Trajectory, TrajectoryGroup
from rollouts.transformers_engine import TransformersEngine

FILLER = 7


def sample(name: str, answer: str = "A", **extra: object) -> Sample:
    return Sample(name, "v.mp4", "?", answer, ("left", "right"), extra=dict(extra))


class Scripted:
    """A sampler that says what it is told: the answer and the latents of each sample."""

    def __init__(self, script: Mapping[str, tuple[str, int]]) -> None:
        self.script = script
        self.requests: list[RolloutRequest] = []

    def generate(self, requests: Sequence[RolloutRequest]) -> list[TrajectoryGroup]:
        self.requests += requests
        return [TrajectoryGroup(r.sample, (self._answer(r),)) for r in requests]

    def _answer(self, request: RolloutRequest) -> Trajectory:
        text, latents = self.script[request.sample.id]
        ids = np.array(([5] * latents and [1, *[FILLER] * latents, 2, 3]) or [3])
        return Trajectory(
            sample_id=request.sample.id,
            prompt_ids=np.array([1]),
            completion_ids=ids,
            decision=np.full(len(ids), Slot.FORCED, dtype=np.int8),
            logprobs=np.zeros(len(ids), dtype=np.float32),
            kept=np.zeros(len(ids), dtype=np.int32),
            latents=torch.zeros(latents, 4),
            latent_logprobs=np.zeros(latents),
            span_lengths=(latents,) if latents else (),
            filler=FILLER,
            media=(),
            policy_version=0,
            finish_reason="stop" if text else "length",
            sampling=request.sampling,
            seed=0,
            text=text,
        )


def test_counts_by_hand() -> None:
    """Four answers: right with 2 latents, right without, wrong with 4, and one cut short; one
    cannot be judged.
    """
    script = {
        "a": ("<answer>A</answer>", 2),
        "b": ("<answer>left</answer>", 0),
        "c": ("<answer>B</answer>", 4),
        "d": ("", 0),
        "e": ("<answer>A</answer>", 0),
    }
    samples = [*map(sample, "abcd"), sample("e", answer="Z")]
    pool = Scripted(script)
    score = evaluate(pool, samples, ("free",), 16).scores["free"]
    assert (score.answers, score.judged, score.right) == (5, 4, 2)
    assert score.accuracy == 0.5
    assert score.standard_error == pytest.approx(0.25)  # sqrt(0.5 * 0.5 / 4)
    assert score.imagining == pytest.approx(2 / 5)
    assert score.spans == pytest.approx(2 / 5)
    assert score.latents == pytest.approx(6 / 5)
    assert score.tokens == pytest.approx((3 + 1 + 3 + 1 + 1) / 5)
    assert score.cut_short == pytest.approx(1 / 5)
    assert {r.sampling.temperature for r in pool.requests} == {0.0}
    assert {len(r.seeds) for r in pool.requests} == {1}


def test_breakdown_by_a_column() -> None:
    samples = [sample("a", level=10), sample("b", level=9), sample("c", level=10)]
    script = {n: (f"<answer>{a}</answer>", 0) for n, a in zip("abc", "AAB", strict=True)}
    evaluation = evaluate(Scripted(script), samples, ("free", "never"), 16, by="level")
    assert list(evaluation.parts["free"]) == ["9", "10"]  # numbers in their order
    assert evaluation.parts["free"]["9"].accuracy == 1.0
    assert evaluation.parts["never"]["10"].accuracy == 0.5
    with pytest.raises(DataError, match="have no column 'colour'"):
        evaluate(Scripted(script), samples, ("free",), 16, by="colour")


def test_nothing_judged_is_no_number() -> None:
    evaluation = evaluate(Scripted({"a": ("x", 0)}), [sample("a", answer="Z")], ("free",), 16)
    assert math.isnan(evaluation.scores["free"].accuracy)
    plain = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert plain["modes"]["free"]["accuracy"] is None


def test_table_fits_a_terminal() -> None:
    samples = [sample(n, level=i) for i, n in enumerate("abc")]
    script = dict.fromkeys("abc", ("<answer>A</answer>", 12))
    evaluation = evaluate(Scripted(script), samples, MODES, 16, by="level")
    console = Console(width=80)
    with console.capture() as captured:
        console.print(evaluation.table())
    text = captured.get()
    assert "100.0 ± 0.0 %" in text and "forbidden" in text and "…" not in text


def test_real_engine_keeps_to_the_modes(tiny_checkpoint: Path, clips: Path) -> None:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    policy = make_policy(tiny_checkpoint, processor)
    media = MediaProcessor(processor)
    engine = TransformersEngine(policy, media, LocalMedia(media, 8))
    samples = read_manifest(clips / "manifest.jsonl")
    seen: list[int] = []
    evaluation = evaluate(engine, samples, MODES, 8, advance=seen.append)
    assert sum(seen) == 12
    assert evaluation.scores["always"].imagining == 1.0
    assert evaluation.scores["never"].imagining == evaluation.scores["never"].latents == 0.0

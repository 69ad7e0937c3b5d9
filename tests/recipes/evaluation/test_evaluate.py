"""The figures of an evaluation, from given answers and from a real engine."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from transformers import AutoProcessor

from recipes.evaluation.benchmarks import find_benchmark
from recipes.evaluation.evaluate import MODES, answer, evaluate
from recipes.evaluation.grading import NO_REFERENCE, by_letter
from recipes.evaluation.predictions import AnswerStore
from recipes.evaluation.scores import summarise
from recipes.evaluation.tables import grids, show, skipped_lines
from rl.data.broken import BrokenClips
from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import DataError, RecipeError, VideoError
from rl.policy.loading import make_policy
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

    def broken(self, samples: Sequence[Sample]) -> dict[str, VideoError]:
        """Clips called "bad" cannot be read."""
        return {s.id: VideoError(f"sample {s.id!r}: no frames") for s in samples if s.id == "bad"}

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
    figure = score.figures["accuracy"]
    assert (figure.low, figure.high) == pytest.approx((0.1500, 0.8500), abs=1e-4)  # Wilson, 2 of 4
    assert score.unparsed == 1 and score.reasons == {NO_REFERENCE: 1}
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
    parts = evaluation.breakdowns["level"]
    assert list(parts["free"]) == ["9", "10"]  # numbers in their order
    assert parts["free"]["9"].accuracy == 1.0
    assert parts["never"]["10"].accuracy == 0.5
    with pytest.raises(DataError, match="'a' and 2 others have no column 'colour'"):
        evaluate(Scripted(script), samples, ("free",), 16, by="colour")


def test_nothing_judged_is_no_number() -> None:
    evaluation = evaluate(Scripted({"a": ("x", 0)}), [sample("a", answer="Z")], ("free",), 16)
    assert math.isnan(evaluation.scores["free"].accuracy)
    plain = json.loads(json.dumps(evaluation.to_dict(), allow_nan=False))
    assert plain["modes"]["free"]["accuracy"] is None


def test_clips_that_cannot_be_read_are_left_out_and_named() -> None:
    """Nobody's figures count them; where the rule is stop they are errors."""
    samples = [sample("a"), sample("bad"), sample("b")]
    script = dict.fromkeys("ab", ("<answer>A</answer>", 0))
    broken = BrokenClips(rule="skip")
    pool = Scripted(script)
    evaluation = evaluate(pool, samples, ("free", "never"), 16, broken=broken)
    assert [s.answers for s in evaluation.scores.values()] == [2, 2]
    assert evaluation.scores["free"].accuracy == 1.0
    assert evaluation.skipped == {"bad": "sample 'bad': no frames"}
    assert [r.sample.id for r in pool.requests] == ["a", "b", "a", "b"]
    with pytest.raises(KeyError, match="bad"):  # it is asked
        evaluate(Scripted(script), samples, ("free",), 16, broken=BrokenClips(rule="stop"))

    def show(sample: Sample) -> Sample:
        raise VideoError(f"{sample.video}: no such frame")

    with pytest.raises(VideoError, match=r"sample 'a': v\.mp4: no such frame"):
        answer(Scripted(script), samples, ("free",), 16, show=show)


def test_answers_that_are_stored_are_not_asked_again(tmp_path: Path) -> None:
    script = {n: (f"<answer>{a}</answer>", 2) for n, a in zip("abc", "AAB", strict=True)}
    samples = [*map(sample, "abc")]
    settings = {"policy": "1234", "frames": {"count": 8, "fps": None}}
    first = Scripted(script)
    store = AnswerStore(tmp_path / "x", settings)
    answer(first, samples[:2], ("free",), 16, store=store)  # killed behind its first chunk
    second, seen = Scripted(script), []
    rows = answer(
        second,
        samples,
        ("free", "never"),
        16,
        store=AnswerStore(tmp_path / "x", settings),
        advance=seen.append,
    )
    assert [(r.sample.id, r.sampling.imagine) for r in second.requests] == [
        ("c", "free"),
        *((name, "never") for name in "abc"),
    ]
    assert sum(seen) == 6
    assert len(AnswerStore(tmp_path / "x", settings).read()) == 6  # no chunk took another's place
    whole = answer(Scripted(script), samples, ("free", "never"), 16)
    same = [
        [(s.id, replace(a, seconds=0.0), g) for s, a, g in mode]
        for found in (rows, whole)
        for mode in found.values()
    ]
    assert same[:2] == same[2:]
    assert not list(tmp_path.rglob("*.part"))
    changed = {"policy": "5678", "frames": {"count": 32, "fps": None}}
    with pytest.raises(RecipeError, match=r"frames was .*8.* and is .*32.*; policy was '1234' and"):
        AnswerStore(tmp_path / "x", changed)


def test_paper_table() -> None:
    """By hops in the paper's order and words, and the average over all questions: 1/2, 1/1, 0/1."""
    benchmark = find_benchmark("futurebench")
    hops = zip("abcd", ("hop5", "hop1", "hop1", "hop2"), strict=True)
    samples = [sample(n, question_type=hop) for n, hop in hops]
    script = {n: (f"<answer>{a}</answer>", 12) for n, a in zip("abcd", "BABA", strict=True)}
    rows = answer(Scripted(script), samples, ("free",), 16, grader=by_letter)
    evaluation = summarise(rows, benchmark.breakdowns, skipped={"e": "gone"})
    main, behind = grids(evaluation, benchmark)
    assert main.header == ("imagining", "1-Hop", "2-Hop", "Interp", "AVG")
    assert main.rows == (
        ("free", "50.0 [9.5-90.5]", "100.0 [20.7-100.0]", "0.0 [0.0-79.3]", "50.0 [15.0-85.0]"),
    )
    assert "skipped samples: 1" in behind.title
    text = main.markdown().splitlines()
    assert text[2] == "| imagining | 1-Hop | 2-Hop | Interp | AVG |"
    assert text[3] == "| --- | ---: | ---: | ---: | ---: |"
    assert text[4].count("|") == 6
    assert skipped_lines(evaluation) == ["skipped e: gone"]


def test_order_of_a_breakdown() -> None:
    durations = find_benchmark("video_mme").breakdowns[0]
    found = ["long", "x", "10", "short", "9", "medium", "long"]
    assert durations.order(found) == ["short", "medium", "long", "9", "10", "x"]


def test_many_parts_are_rows_and_fit_a_terminal() -> None:
    samples = [sample(f"{i}", level=i) for i in range(7)]
    script = {s.id: ("<answer>A</answer>", 12) for s in samples}
    evaluation = evaluate(Scripted(script), samples, MODES, 16, by="level")
    console = Console(width=80)
    with console.capture() as captured:
        show(evaluation, console)
    text = captured.get()
    assert "100.0 [20.7-100.0]" in text and "forbidden" in text and "…" not in text
    main = grids(evaluation)[0]
    assert main.header == ("level", "answers", "free", "forced", "forbidden")
    assert [row[0] for row in main.rows] == [*"0123456", "all"]


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

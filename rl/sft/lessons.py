"""Where lessons come from: what each row is taught, and when.

- `SpanLessons`: rows say in `imagine` which frames their spans depict. The only ones whose latents
  have targets.
- `StartLessons`: every row is taught so many latents and then its answer, as VideoLatent does
  (arXiv 2606.22870, of which only the abstract is public: the number of latents and their place,
  at the beginning of the response, are those of its authors' first code; the rest is ours). Plain
  rows of video, question and answer are enough.
- `CurriculumLessons`: latents take the place of a chain of thought, stage after stage
  (`rl.sft.curriculum`).

Without targets the vectors at the latents are placeholders, which the policy's own take the place
of before anything is scored.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Protocol

import numpy as np

from rl.errors import ObjectiveError
from rl.policy.protocol import LatentProtocol
from rl.sft.config import LatentSFTConfig, imagine_probability
from rl.sft.curriculum import CurriculumConfig, check_curriculum, curriculum_lesson
from rl.sft.taught import Lesson, Writer, span_lengths
from rl.trajectory import Sample

KEPT = 1 << 14  # lessons kept in memory; a row's is asked for more than once in an update

Spans = tuple[int, ...]  # latents in each span of a row


class Lessons(Protocol):
    """What a trainer teaches its rows."""

    def lesson(self, index: int, epoch: int, update: int) -> Lesson:
        """What row `index` is taught: a function of its arguments, so that a resumed run teaches
        the same. Epochs and updates are counted from 0.
        """
        ...


class SpanLessons:
    """Row i has spans of `spans[i]` latents with probability `shares[i]`, drawn in each epoch."""

    def __init__(
        self,
        samples: Sequence[Sample],
        writer: Writer,
        spans: Sequence[Spans],
        shares: Sequence[float],
        seed: int,
    ) -> None:
        self._samples, self._writer, self._spans = samples, writer, spans
        self._shares, self._seed = shares, seed
        self._written = lru_cache(KEPT)(self._write)

    def lesson(self, index: int, epoch: int, update: int) -> Lesson:
        draw = np.random.default_rng((self._seed, epoch, index)).random()
        return self._written(index, bool(draw < self._shares[index]))

    def _write(self, index: int, imagines: bool) -> Lesson:
        return self._writer.lesson(self._samples[index], self._spans[index] if imagines else ())


class StartLessons:
    """Each row is taught a span of `count` latents and its answer, and no reasoning."""

    def __init__(self, samples: Sequence[Sample], writer: Writer, count: int) -> None:
        self._samples, self._writer, self._count = samples, writer, count
        self._written = lru_cache(KEPT)(self._write)

    def lesson(self, index: int, epoch: int, update: int) -> Lesson:
        return self._written(index)

    def _write(self, index: int) -> Lesson:
        plain = replace(self._samples[index], imagine=(), reasoning=())
        return self._writer.opening(plain, self._count)


class CurriculumLessons:
    """Each row is taught at the stage that `config` says."""

    def __init__(
        self, samples: Sequence[Sample], writer: Writer, config: CurriculumConfig, seed: int
    ) -> None:
        self._samples, self._writer = samples, writer
        self._config, self._seed = config, seed
        self._written = lru_cache(KEPT)(self._write)

    def lesson(self, index: int, epoch: int, update: int) -> Lesson:
        stage = self._config.row_stage(update, seed=self._seed, epoch=epoch, row=index)
        return self._written(index, stage)

    def _write(self, index: int, stage: int) -> Lesson:
        return curriculum_lesson(self._samples[index], stage, self._config, self._writer)


def lessons_of(
    samples: Sequence[Sample], args: LatentSFTConfig, writer: Writer, spans: Sequence[Spans]
) -> Lessons:
    """The lessons that `args` asks for. `spans` are those of `longest_spans`, or of the rows'
    targets once these are known.
    """
    if args.start_latents is not None:
        return StartLessons(samples, writer, args.start_latents)
    if (schedule := args.schedule) is not None:
        return CurriculumLessons(samples, writer, schedule, args.seed)
    shares = [imagine_probability(sample, args.imagine_share) for sample in samples]
    return SpanLessons(samples, writer, spans, shares, args.seed)


def longest_spans(
    samples: Sequence[Sample],
    args: LatentSFTConfig,
    protocol: LatentProtocol,
    *,
    temporal_patch_size: int,
) -> list[Spans]:
    """The spans that each row may be taught, as long as they can become. Tokenises nothing.

    Raises `DataError`, which names the row, where a row has not what its lessons need or the
    protocol does not allow one of them; `ObjectiveError` where it allows none at all.
    """
    count, schedule = args.start_latents, args.schedule
    if count is not None:
        if not protocol.min_length <= count <= protocol.max_length:
            raise ObjectiveError(
                f"start_latents is {count}, but the protocol allows spans of "
                f"{protocol.min_length} to {protocol.max_length} latents; set its min_length and "
                f"max_length to {count}, or teach another number"
            )
        return [(count,)] * len(samples)
    if schedule is not None:
        return [(check_curriculum(sample, schedule, protocol),) for sample in samples]
    return [
        span_lengths(
            sample,
            protocol,
            temporal_patch_size=temporal_patch_size,
            tokens_per_patch=args.tokens_per_patch,
        )
        for sample in samples
    ]

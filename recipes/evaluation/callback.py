"""Evaluation while a policy is being trained, for any transformers or TRL trainer.

    trainer = LatentSFTTrainer(policy, config, samples, media)      # or a trainer of one's own
    callback = EvaluationCallback(trainer, held_out, every=50, media=media, max_new_tokens=512)
    trainer.add_callback(callback)

`foresight run` validates with the same class.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from recipes.evaluation.benchmarks.asking import Asking, asking
from recipes.evaluation.benchmarks.base import Benchmark
from recipes.evaluation.evaluate import Outcomes, Sampler, answer, skipped_of
from recipes.evaluation.grading import by_rule
from recipes.evaluation.scores import Evaluation, check_columns, summarise
from rl.data.broken import BrokenClips
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import RecipeError
from rl.policy.protocol import Imagine
from rl.trajectory import Sample
from rl.weights import weight_update
from rollouts.transformers_engine import TransformersEngine


class EvaluationCallback(TrainerCallback):
    """Evaluates before the first step, every `every` steps and after the last, and logs what comes
    out: ``validation/accuracy`` with ``accuracy_low`` and ``accuracy_high`` (95 %), or a judge's
    grades in the same way, and ``share_imagining``, ``spans``, ``latents``, ``tokens``,
    ``unparsed``, ``no_value`` and ``skipped`` (counts).

    The trainer's model is a `rl.policy.model.LatentPolicy`, with LoRA adapters or without. It
    answers in this process (transformers), with clips and prompts made by `media`; or in `sampler`,
    such as a `RolloutPool`, which first gets the current weights. Its mode (train or eval) is put
    back, and no random number is drawn.
    """

    def __init__(
        self,
        trainer: Trainer,
        samples: Sequence[Sample],
        *,
        every: int,
        benchmark: Benchmark | None = None,
        modes: Sequence[Imagine] = ("free",),
        max_new_tokens: int | None = None,
        media: MediaProcessor | None = None,
        sampler: Sampler | None = None,
        judge: Mapping[str, Any] | None = None,
        outcomes: Outcomes | None = None,
        broken: BrokenClips | None = None,
        max_batch_size: int = 32,
        media_gb: float = 4.0,
        name: str = "validation",
    ) -> None:
        """Check the arguments; nothing is answered yet.

        Args:
            trainer: the trainer to log with, to which this callback is added.
            samples: what to answer.
            every: steps between evaluations.
            benchmark: its frames, prompts, length and scoring; by default samples are asked as in
                training and scored by `rewards.accuracy`.
            modes: with several, each logs under its own name, as in ``validation/never/accuracy``.
            max_new_tokens: the longest answer; by default the benchmark's, else needed.
            media: needed without `sampler`, and for a benchmark.
            sampler: what answers, in the place of this process.
            judge: options of a benchmark's judge.
            outcomes: decides what is right, in the place of the accuracy rule.
            broken: takes the samples whose clips cannot be read, which are then left out; without
                it they stop the training.
            max_batch_size: answers side by side, in this process.
            media_gb: of processed clips kept between evaluations, in this process.
            name: what the logged names begin with.

        Raises `RecipeError` for arguments that do not fit each other, `DataError` if samples lack a
        column that the benchmark breaks figures down by.
        """
        if every < 1 or not modes or not samples:
            raise RecipeError(
                f"EvaluationCallback: every is {every}, with {len(modes)} modes and {len(samples)} "
                "samples; each must be at least 1"
            )
        if media is None and (sampler is None or benchmark is not None):
            raise RecipeError(
                "EvaluationCallback: give `media`, which shows clips and asks questions; only a "
                "sampler without a benchmark does without it"
            )
        if max_new_tokens is None and benchmark is None:
            raise RecipeError(
                "EvaluationCallback: give max_new_tokens, or a benchmark, which has it"
            )
        self._trainer: Any = trainer
        self._samples, self._every, self._modes = list(samples), every, tuple(modes)
        self._length = max_new_tokens or (benchmark.max_new_tokens if benchmark else 0)
        self._media, self._sampler, self._outcomes = media, sampler, outcomes
        self._broken, self._name = broken, name
        self._max_batch_size, self._media_gb = max_batch_size, media_gb
        self._asking = Asking(lambda sample: sample, by_rule)
        self._breakdowns = benchmark.breakdowns if benchmark else ()
        if benchmark is not None and media is not None:
            check_columns(self._samples, [b.column for b in benchmark.breakdowns])
            self._asking = asking(benchmark, media, judge)
        self._engine: TransformersEngine | None = None

    def measure(self) -> Evaluation:
        """Evaluate the policy as it is now."""
        model = self._trainer.accelerator.unwrap_model(self._trainer.model)
        training = model.training
        try:
            rows = answer(
                self._sampler_of(model),
                self._samples,
                self._modes,
                self._length,
                show=self._asking.show,
                grader=self._asking.grader,
                outcomes=self._outcomes,
                broken=self._broken,
            )
        finally:
            model.train(training)
        skipped = skipped_of(self._broken)
        return summarise(rows, self._breakdowns, grades=self._asking.grades, skipped=skipped)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step == 0:
            self._log(control)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self._every == 0 or state.global_step == state.max_steps:
            self._log(control)

    def _log(self, control: TrainerControl) -> None:
        evaluation = self.measure()
        due = control.should_log  # logging clears it, and the training metrics are still to come
        # The base class's log: GRPOTrainer's own would hand out the training metrics before their
        # time.
        Trainer.log(self._trainer, self._values(evaluation))
        control.should_log = due

    def _values(self, evaluation: Evaluation) -> dict[str, float]:
        values: dict[str, float] = {}
        for mode, score in evaluation.scores.items():
            place = self._name if len(self._modes) == 1 else f"{self._name}/{mode}"
            for name, figure in score.figures.items():
                values[f"{place}/{name}"] = figure.value
                values[f"{place}/{name}_low"] = figure.low
                values[f"{place}/{name}_high"] = figure.high
            values[f"{place}/share_imagining"] = score.imagining
            for name in ("spans", "latents", "tokens", "unparsed"):
                values[f"{place}/{name}"] = getattr(score, name)
            values[f"{place}/no_value"] = score.answers - score.judged
        values[f"{self._name}/skipped"] = len(evaluation.skipped)
        return values

    def _sampler_of(self, model: Any) -> Sampler:
        """What answers, with the current weights."""
        if self._sampler is None:
            if self._engine is None:
                assert self._media is not None
                policy = model.get_base_model() if hasattr(model, "get_base_model") else model
                clips = LocalMedia(self._media, self._media_gb)
                self._engine = TransformersEngine(
                    policy,
                    self._media,
                    clips,
                    max_batch_size=self._max_batch_size,
                    device=policy.device,
                )
            model.eval()
            return self._engine
        if getattr(self._trainer, "rollouts", None) is self._sampler:
            self._trainer.sync_weights()  # which knows what the workers have already
        else:
            pool: Any = self._sampler
            pool.update_weights(weight_update(model, self._trainer.state.global_step))
        return self._sampler

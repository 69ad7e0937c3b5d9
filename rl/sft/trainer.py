"""SFT with latent alignment: cross-entropy on what a policy decides, and a pull of its latents to
future frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import Trainer, TrainerCallback, default_data_collator

from rl.checkpoints import CompleteCheckpoints
from rl.data.broken import BrokenClips
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import ObjectiveError
from rl.interfaces import MediaSource
from rl.policy.depth import budget_loss
from rl.policy.model import LatentPolicy
from rl.policy.scores import Scores
from rl.policy.vision import vision_tower
from rl.scoring import ReplayBatch, collate
from rl.sft.alignment import latent_alignment_loss, neighbour_cosines
from rl.sft.config import LatentSFTConfig
from rl.sft.curriculum import ResetOptimizer, check_resumed
from rl.sft.lessons import lessons_of, longest_spans
from rl.sft.own_latents import in_eval_mode, own_latents, seen_once
from rl.sft.rows import TaughtRows
from rl.sft.self_forcing import self_forced
from rl.sft.target_cache import cached_targets
from rl.sft.targets import Targets, compute_targets, start_head_at
from rl.sft.taught import Lesson, Writer, check_lengths
from rl.trajectory import Sample


class LatentSFTTrainer(Trainer):
    """Teaches a `LatentPolicy` the latent spans and answers of manifest rows.

    What a row is taught, and when, is a lesson (`rl.sft.lessons`). Where the lessons' latents have
    targets, the features of the frames in `Sample.imagine`, these are computed once before
    training, with the tower as it then is, or read from `args.target_cache`; `targets` from an
    earlier stage with the same tower and samples spare that. They are what the means of latents are
    aimed at, and with ``latents="teacher"`` also what is fed at them. With "own" that is what the
    policy makes there by itself (`rl.sft.own_latents`). Clips of the prompts come from `source`, by
    default a cache of `args.media_cache_gb`. An update's loss is the mean over all decided
    positions of its rows plus, where there are targets, λ times the mean over all their latents,
    however the rows are cut into micro-batches. With "self_forcing" gradients flow through the
    policy's own latents, and the terms of `rl.sft.self_forcing` take the place of that; and the
    gates of depth scaling, where there are some, have a budget.

    A curriculum's stage is that of the update, so all of its micro-batches are at one. Checkpoints
    hold the schedule and its stage; one of another schedule is not resumed from
    (`CheckpointError`).

    Logs beside `loss`, as means over the updates since the last log: `loss_text` (cross-entropy),
    `loss_latent`, `loss_align`, `loss_diversity` and `loss_replay` (before their weights; updates
    without latents do not count), `imagined` (share of rows with spans), `stage` and `depth` (share
    of tokens that take a second pass); as means over latents `latent_cosine` (of means and targets)
    and `latent_neighbours` (of means that follow one another in a span); and `own_passes`, the
    passes that own latents take a micro-batch. `broken` says what becomes of rows whose clips
    cannot be read, which `bad_videos` counts: they stop the run, are skipped (an update is then of
    fewer rows, but at least one a micro-batch), or others take their places. Each checkpoint is a
    policy that `load_policy` reads. `tell` gets what is to be said. Raises `DataError` for rows
    whose lessons cannot be written or have spans that the protocol does not allow.

    It extends `transformers.Trainer`: TRL's `SFTTrainer` would tokenise, mask, truncate and pack
    texts itself, and score labels over the whole vocabulary, where our rows are laid out
    trajectories whose decisions and latents the replay of RL scores.
    """

    args: LatentSFTConfig

    # All of them on every rank, in this order: a sum over ranks waits for each of them.
    _LOGGED = (
        "loss_text",
        "loss_latent",
        "loss_align",
        "loss_diversity",
        "loss_replay",
        "imagined",
        "stage",
        "latent_cosine",
        "latent_neighbours",
        "own_passes",
        "depth",
    )

    def __init__(
        self,
        model: Any,
        args: LatentSFTConfig,
        train_dataset: Sequence[Sample],
        media: MediaProcessor,
        *,
        source: MediaSource | None = None,
        targets: Targets | None = None,
        callbacks: Sequence[TrainerCallback] = (),
        broken: BrokenClips | None = None,
        tell: Callable[[str], object] = print,
        **kwargs: Any,
    ) -> None:
        self.samples = list(train_dataset)
        self.media = media
        self.source = LocalMedia(media, args.media_cache_gb) if source is None else source
        if targets is not None and not args.has_targets:
            raise ObjectiveError("targets are given for lessons whose latents have none")
        self.targets = targets
        self._tell = tell
        # Looked up once: telling a PEFT model costs milliseconds.
        self.policy: LatentPolicy = model.get_base_model() if is_peft_model(model) else model
        self._schedule = args.schedule
        self._writer = Writer.of(
            self.policy,
            media.tokenizer,
            answer_template=args.answer_template,
            reasoning_template=args.reasoning_template,
        )
        spans = longest_spans(
            self.samples,
            args,
            self.policy.protocol,
            temporal_patch_size=media.temporal_patch_size,
        )
        self.lessons = lessons_of(self.samples, args, self._writer, spans)
        broken = BrokenClips() if broken is None else broken
        self.rows = TaughtRows(self.samples, self.policy, media, self.source, broken)
        # Since the last log: sums of what is logged, and over how many each is a mean.
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._counts: dict[str, torch.Tensor | float] = defaultdict(float)
        if args.freeze_vision:
            vision_tower(self.policy).requires_grad_(False)
        rows: Any = [{"index": i} for i in range(len(self.samples))]
        super().__init__(
            model=model,
            args=args,
            train_dataset=rows,
            data_collator=default_data_collator,
            processing_class=media.processor,
            callbacks=[CompleteCheckpoints(self._resume_state), *callbacks],
            **kwargs,
        )
        if args.latents == "self_forcing" and self.accelerator.num_processes > 1:
            raise ObjectiveError(
                "latents is 'self_forcing', which trains in one process in this version: its "
                "passes do not go through what several processes wrap a policy in"
            )
        # `compute_loss` divides by the totals of the update; transformers must not divide again by
        # the accumulation steps.
        self.model_accepts_loss_kwargs = True
        if self._schedule is not None and self._schedule.reset_optimizer:
            self.add_callback(ResetOptimizer(self._schedule))

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Find the targets if need be, then train as `transformers.Trainer` does."""
        if self.args.has_targets:
            if self.targets is None:
                self.targets = self._find_targets()
            lengths = self.targets.lengths
            for sample, spans in zip(self.samples, lengths, strict=True):
                check_lengths(sample, spans, self.policy.protocol)
            self.lessons = lessons_of(self.samples, self.args, self._writer, lengths)
            if self.args.start_at_mean and len(self.targets.features):
                start_head_at(self.policy.latent_head, self.targets.mean)
        return super().train(*args, **kwargs)

    def _find_targets(self) -> Targets:
        args = self.args
        with Progress(disable=bool(args.disable_tqdm)) as bar:
            task = bar.add_task("features of future frames", total=None)
            asked: dict[str, Any] = {
                "tokens_per_patch": args.tokens_per_patch,
                "progress": lambda done, total: bar.update(task, completed=done, total=total),
                "on_broken": self.rows.lose,
            }
            given = self.policy, self.media, self.samples
            if args.target_cache is None:
                return compute_targets(*given, **asked)
            return cached_targets(Path(args.target_cache), *given, **asked, tell=self._tell)

    # -- from indices to tensors -------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> Any:
        rows = [self.rows.teach(i, self._lesson(i), self.targets) for i in inputs["index"].tolist()]
        if self.args.latents == "self_forcing":  # which lays them out step by step
            return rows
        return collate(rows, self.policy, self.source).to(self.args.device)

    def _lesson(self, index: int) -> Lesson:
        """What a sample is taught in this update."""
        return self.lessons.lesson(index, int(self.state.epoch or 0), self.state.global_step)

    def _readable(self, batch: dict[str, Any], place: int) -> dict[str, Any]:
        """A micro-batch, the `place`-th of this update, with rows that can be shown."""
        seed = self.args.seed, self.state.global_step, place, self.args.process_index
        return {**batch, "index": torch.tensor(self.rows.readable(batch["index"].tolist(), seed))}

    # -- the loss ----------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one update and, over the rows of all of them on all ranks, how many
        positions were decided, how many latents there are and how many rows: int64 [3], on the
        CPU.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._readable(batch, place) for place, batch in enumerate(batches)]
        lessons = [self._lesson(i) for batch in batches for i in batch["index"].tolist()]
        totals = torch.tensor(
            [
                sum(lesson.decided for lesson in lessons),
                sum(lesson.latents for lesson in lessons),
                sum(lesson.latents > 0 for lesson in lessons),
                len(lessons),
            ]
        )
        totals = self._over_ranks(totals, "sum")
        _, latents, imagining, count = totals.tolist()
        self._sums["imagined"] += imagining / count
        for name in ("loss_text", "imagined", *(self._terms() if latents else ())):
            self._counts[name] += 1
        if self._schedule is not None:
            self._sums["stage"] += self._schedule.stage_at(self.state.global_step)
            self._counts["stage"] += 1
        return batches, totals[[0, 1, 3]]

    def _terms(self) -> list[str]:
        """The terms of the loss about latents."""
        if self.args.latents != "self_forcing":
            return ["loss_latent"] if self.args.has_targets else []
        replays = self.policy.modules_config.visual_replay is not None
        return ["loss_align", "loss_diversity", *["loss_replay"] * replays]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share in the mean of -log π over what was decided in the update, plus
        its share in the terms about the update's latents, and its rows' in that about depth.

        `num_items_in_batch` holds the totals from `get_batch_samples`. The losses of an update's
        micro-batches add up to its loss.
        """
        assert isinstance(num_items_in_batch, torch.Tensor)
        decided, latents, rows = num_items_in_batch.tolist()
        ranks = self.accelerator.num_processes  # whose gradients are averaged, not added
        terms: dict[str, tuple[float, torch.Tensor]] = {}  # weight and value
        if self.args.latents == "self_forcing":
            count = len(inputs)
            with self.accelerator.autocast():
                found = self_forced(
                    self.policy,
                    inputs,
                    self.source,
                    steps=self.args.bptt_steps,
                    align_to=self.args.align_to,
                )
            scores = found.scores
            terms["align"] = self.args.align_weight, found.align
            terms["diversity"] = self.args.diversity_weight, found.diversity
            if self.policy.modules_config.visual_replay is not None:
                terms["replay"] = self.args.replay_weight, found.replay
            self._note("latent_neighbours", found.neighbours)
        else:
            batch: ReplayBatch = inputs
            count = len(batch.latent_counts)
            scores = self._score(model, batch)
            if self.targets is not None:
                kind, variance = self.args.latent_loss, self.targets.variance
                term = latent_alignment_loss(
                    scores.means, batch.latents, variance=variance, kind=kind
                )
                terms["latent"] = self.args.latent_weight, term
            self._watch(batch, scores)
        text = -scores.logprobs.sum() * (ranks / decided)
        self._sums["loss_text"] += text.detach()
        loss = text + scores.means.sum() * 0.0  # every parameter gets a gradient on every rank
        for name, (weight, term) in terms.items():
            share = term * (ranks * len(scores.means) / max(latents, 1))
            self._sums[f"loss_{name}"] += share.detach()
            loss = loss + weight * share
        if scores.depth is not None and (config := self.policy.modules_config.depth) is not None:
            budget = budget_loss(scores.depth, config.budget)
            loss = loss + self.args.depth_weight * budget * (ranks * count / rows)
            self._sums["depth"] += scores.depth.detach() * count
            self._counts["depth"] += count
        return (loss, scores) if return_outputs else loss

    def _score(self, model: nn.Module, batch: ReplayBatch) -> Scores:
        """The scores of a batch, with the latents fed that `args.latents` says."""
        if self.args.latents == "teacher":
            return model(**batch.inputs)
        tower = vision_tower(self.policy)
        with seen_once(tower) if _frozen(tower) else nullcontext():
            with in_eval_mode(model), seen_once(tower):
                batch, passes = own_latents(model, batch, settled=self._all_settled)
            self._sums["own_passes"] += passes
            self._counts["own_passes"] += bool(passes)  # none where there are no latents
            return model(**batch.inputs)

    def _all_settled(self, settled: bool) -> bool:
        return int(self._over_ranks(torch.tensor(int(not settled)), "sum")) == 0

    @torch.no_grad()
    def _watch(self, batch: ReplayBatch, scores: Scores) -> None:
        """Sum up what is logged about latents and trained on nowhere."""
        if not sum(batch.latent_counts):
            return
        means = scores.means.float()
        watched = {"latent_neighbours": neighbour_cosines(means, batch.inputs["slots"].latent_rows)}
        if self.targets is not None:
            watched["latent_cosine"] = cosine_similarity(means, batch.latents.float(), dim=-1)
        for name, values in watched.items():
            self._note(name, values)

    def _note(self, name: str, values: torch.Tensor) -> None:
        self._sums[name] += values.detach().sum()
        self._counts[name] += values.numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name in self._LOGGED:
                total, count = self._over_ranks(
                    torch.tensor([self._sums[name], self._counts[name]], dtype=torch.float64), "sum"
                ).tolist()
                if count:
                    logs[name] = total / count
            if self.rows.broken.rule != "stop":
                logs["bad_videos"] = len(self.rows.broken)
            self._sums.clear()
            self._counts.clear()
        super().log(logs, start_time)

    def _over_ranks(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """The "sum" or "mean" of `values` over all ranks, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values.cpu()
        reduced: Any = self.accelerator.reduce(values.to(self.args.device), how)
        return reduced.cpu()

    def _resume_state(self) -> dict[str, Any]:
        return {} if self._schedule is None else self._schedule.written(self.state.global_step)

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        if checkpoint is not None:
            check_resumed(checkpoint, self._schedule)
        super()._load_optimizer_and_scheduler(checkpoint)

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would guess it from inputs that are not tensors yet


def _frozen(tower: nn.Module) -> bool:
    return not any(weight.requires_grad for weight in tower.parameters())

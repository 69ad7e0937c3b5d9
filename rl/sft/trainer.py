"""SFT with latent alignment: cross-entropy on what a policy decides, and a pull of its latents to
future frames.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from rich.progress import Progress
from torch import nn
from torch.nn.functional import cosine_similarity
from transformers import Trainer, TrainerCallback, default_data_collator

from rl.checkpoints import CompleteCheckpoints
from rl.data.broken import BrokenClips, of_sample
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import PolicyError, VideoError
from rl.interfaces import MediaSource
from rl.policy.model import LatentPolicy
from rl.policy.protocol import Slot
from rl.policy.scores import Scores
from rl.policy.vision import vision_tower
from rl.scoring import ReplayBatch, collate
from rl.sft.alignment import latent_alignment_loss, neighbour_cosines
from rl.sft.config import LatentSFTConfig, imagine_probability
from rl.sft.own_latents import in_eval_mode, own_latents, seen_once
from rl.sft.target_cache import cached_targets
from rl.sft.targets import Targets, compute_targets
from rl.sft.taught import (
    check_lengths,
    completion_ids,
    span_lengths,
    taught_texts,
    taught_trajectory,
)
from rl.trajectory import MediaKey, Sample, Trajectory


class LatentSFTTrainer(Trainer):
    """Teaches a `LatentPolicy` the latent spans and answers of manifest rows.

    The features of the frames in `Sample.imagine` are computed once before training, with the tower
    as it then is, or read from `args.target_cache`; `targets` from an earlier stage with the same
    tower and samples spare that. They are what the means of latents are aimed at, and with
    ``latents="teacher"`` also what is fed at them. With "own" that is what the policy makes there
    by itself (`rl.sft.own_latents`). Clips of the prompts come from `source`, by default a cache of
    `args.media_cache_gb`. An update's loss is the mean over all decided positions of its rows
    plus λ times the mean over all their latents, however the rows are cut into micro-batches.

    Logs beside `loss`, as means over the updates since the last log: `loss_text` (cross-entropy),
    `loss_latent` (before its weight; updates without latents do not count) and `imagined` (share of
    rows with spans); as means over latents `latent_cosine` (of means and targets) and
    `latent_neighbours` (of means that follow one another in a span); and `own_passes`, the passes
    that own latents take a micro-batch. `broken` says what becomes of rows whose clips cannot be
    read, which `bad_videos` counts: they stop the run, are skipped (an update is then of fewer
    rows, but at least one a micro-batch), or others take their places. Each checkpoint is a policy
    that `load_policy` reads. `tell` gets what is to be said. Raises `DataError` for rows whose
    spans the protocol does not allow.

    It extends `transformers.Trainer`: TRL's `SFTTrainer` would tokenise, mask, truncate and pack
    texts itself, and score labels over the whole vocabulary, where our rows are laid out
    trajectories whose decisions and latents the replay of RL scores.
    """

    args: LatentSFTConfig

    # All of them on every rank, in this order: a sum over ranks waits for each of them.
    _LOGGED = (
        "loss_text",
        "loss_latent",
        "imagined",
        "latent_cosine",
        "latent_neighbours",
        "own_passes",
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
        self.targets = targets
        self._broken = BrokenClips() if broken is None else broken
        self._tell = tell
        # Looked up once: telling a PEFT model costs milliseconds.
        self.policy: LatentPolicy = model.get_base_model() if is_peft_model(model) else model
        self._lengths = [
            span_lengths(
                s,
                self.policy.protocol,
                temporal_patch_size=media.temporal_patch_size,
                tokens_per_patch=args.tokens_per_patch,
            )
            for s in self.samples
        ]
        self._shares = [imagine_probability(s, args.imagine_share) for s in self.samples]
        self._eos = _end_of_sequence(self.policy, media.tokenizer)
        self._prompts: dict[int, tuple[np.ndarray, MediaKey]] = {}
        self._completions: dict[tuple[int, bool], tuple[np.ndarray, int]] = {}
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
            callbacks=[CompleteCheckpoints(), *callbacks],
            **kwargs,
        )
        # `compute_loss` divides by the totals of the update; transformers must not divide again by
        # the accumulation steps.
        self.model_accepts_loss_kwargs = True

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Find the targets if need be, then train as `transformers.Trainer` does."""
        if self.targets is None:
            self.targets = self._find_targets()
        self._lengths = list(self.targets.lengths)
        for sample, lengths in zip(self.samples, self._lengths, strict=True):
            check_lengths(sample, lengths, self.policy.protocol)
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
                "on_broken": self._lose,
            }
            given = self.policy, self.media, self.samples
            if args.target_cache is None:
                return compute_targets(*given, **asked)
            return cached_targets(Path(args.target_cache), *given, **asked, tell=self._tell)

    # -- from indices to tensors -------------------------------------------------------------------

    def _prepare_inputs(self, inputs: dict[str, Any]) -> Any:
        rows = [self._teach(i) for i in inputs["index"].tolist()]
        return collate(rows, self.policy, self.source).to(self.args.device)

    def _teach(self, index: int) -> Trajectory:
        """The taught trajectory of one sample: a function of the seed, the epoch and the sample."""
        assert self.targets is not None
        imagines = self._imagines(index)
        prompt, key = self._prompt(index)
        return taught_trajectory(
            self.samples[index],
            prompt,
            key,
            self._completion(index, imagines)[0],
            self.targets.of(index) if imagines else self.targets.features[:0],
            self.policy,
        )

    def _imagines(self, index: int) -> bool:
        """Whether a sample is taught with its spans in this epoch; False if it has none."""
        epoch = int(self.state.epoch or 0)
        draw = np.random.default_rng((self.args.seed, epoch, index)).random()
        return bool(self._lengths[index]) and bool(draw < self._shares[index])

    def _completion(self, index: int, imagines: bool) -> tuple[np.ndarray, int]:
        """The ids of a sample's completion, int64 [C], and how many of them were decided."""
        if (index, imagines) not in self._completions:
            tokens = self.policy.latent_tokens
            lengths = self._lengths[index] if imagines else ()
            texts = taught_texts(
                self.samples[index],
                len(lengths),
                answer_template=self.args.answer_template,
                reasoning_template=self.args.reasoning_template,
                tokenizer=self.media.tokenizer,
            )
            ids = completion_ids(texts, lengths, tokens, self._eos)
            slots = self.policy.protocol.trace(ids, tokens).slots
            self._completions[index, imagines] = ids, int((slots != Slot.FORCED).sum())
        return self._completions[index, imagines]

    def _readable(self, batch: dict[str, Any], place: int) -> dict[str, Any]:
        """A micro-batch, the `place`-th of this update, without the rows that cannot be shown, or
        with others for them. Which others is a function of the seed, the update and the place.
        """
        if self._broken.rule == "stop":
            return batch
        rows: list[int] = batch["index"].tolist()
        shown = [i for i in rows if self._shows(i)]
        missing = len(rows) - len(shown) if self._broken.rule == "replace" else int(not shown)
        seed = self.args.seed, self.state.global_step, place, self.args.process_index
        others = iter(np.random.default_rng(seed).permutation(len(self.samples)).tolist())
        for _ in range(missing):
            other = next((i for i in others if i not in shown and self._shows(i)), None)
            if other is None and not shown:
                last = self._broken.rows[-1]["reason"]
                raise VideoError(
                    f"no clip of {len(self.samples)} rows can be shown; check data.video_root and "
                    f"the files. The last: {last}"
                )
            shown += [] if other is None else [other]
        return {**batch, "index": torch.tensor(shown)}

    def _shows(self, index: int) -> bool:
        """Whether all clips of a sample can be read."""
        sample = self.samples[index]
        if sample.id not in self._broken:
            try:
                self._prompt(index)
            except VideoError as error:
                self._broken.add(sample, error)
        return sample.id not in self._broken

    def _lose(self, sample: Sample, error: VideoError) -> None:
        """Remember that a sample has no targets; raise its error where that stops the run."""
        named = of_sample(sample, error)
        if self._broken.rule == "stop":
            raise named from error
        self._broken.add(sample, named)

    def _prompt(self, index: int) -> tuple[np.ndarray, MediaKey]:
        if index not in self._prompts:
            sample = self.samples[index]
            try:
                clip = self.source.get(self.media.key(sample))
            except VideoError as error:
                raise of_sample(sample, error) from error
            self._prompts[index] = self.media.encode(sample, [clip]).input_ids, clip.key
        return self._prompts[index]

    # -- the loss ----------------------------------------------------------------------------------

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor]:
        """The micro-batches of one update and, over the rows of all of them on all ranks, how many
        positions were decided and how many latents there are: int64 [2], on the CPU.
        """
        batches, _ = super().get_batch_samples(epoch_iterator, num_batches, device)
        batches = [self._readable(batch, place) for place, batch in enumerate(batches)]
        rows = [(i, self._imagines(i)) for batch in batches for i in batch["index"].tolist()]
        totals = torch.tensor(
            [
                sum(self._completion(*row)[1] for row in rows),
                sum(sum(self._lengths[i]) for i, imagines in rows if imagines),
                sum(imagines for _, imagines in rows),
                len(rows),
            ]
        )
        totals = self._over_ranks(totals, "sum")
        _, latents, imagining, count = totals.tolist()
        self._sums["imagined"] += imagining / count
        for name in ["loss_text", "imagined"] + ["loss_latent"] * (latents > 0):
            self._counts[name] += 1
        return batches, totals[:2]

    def compute_loss(
        self,
        model: nn.Module,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share in the mean of -log π over what was decided in the update, plus
        λ times its share in the mean alignment of the update's latents.

        `num_items_in_batch` holds the totals from `get_batch_samples`. The losses of an update's
        micro-batches add up to its loss.
        """
        batch: ReplayBatch = inputs
        assert self.targets is not None and isinstance(num_items_in_batch, torch.Tensor)
        decided, latents = num_items_in_batch.tolist()
        ranks = self.accelerator.num_processes  # whose gradients are averaged, not added
        scores = self._score(model, batch)
        text = -scores.logprobs.sum() * (ranks / decided)
        latent = latent_alignment_loss(
            scores.means,
            batch.latents,
            variance=self.targets.variance,
            kind=self.args.latent_loss,
        ) * (ranks * sum(batch.latent_counts) / max(latents, 1))
        self._sums["loss_text"] += text.detach()
        self._sums["loss_latent"] += latent.detach()
        self._watch(batch, scores)
        loss = text + self.args.latent_weight * latent
        return (loss, scores) if return_outputs else loss

    def _score(self, model: nn.Module, batch: ReplayBatch) -> Scores:
        """The scores of a batch, with the latents fed that `args.latents` says."""
        if self.args.latents == "teacher":
            return model(**batch.inputs)
        tower = vision_tower(self.policy)
        frozen = not any(weight.requires_grad for weight in tower.parameters())
        with seen_once(tower) if frozen else nullcontext():
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
        means, slots = scores.means.float(), batch.inputs["slots"]
        for name, values in (
            ("latent_cosine", cosine_similarity(means, batch.latents.float(), dim=-1)),
            ("latent_neighbours", neighbour_cosines(means, slots.latent_rows)),
        ):
            self._sums[name] += values.sum()
            self._counts[name] += values.numel()

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name in self._LOGGED:
                total, count = self._over_ranks(
                    torch.tensor([self._sums[name], self._counts[name]], dtype=torch.float64), "sum"
                ).tolist()
                if count:
                    logs[name] = total / count
            if self._broken.rule != "stop":
                logs["bad_videos"] = len(self._broken)
            self._sums.clear()
            self._counts.clear()
        super().log(logs, start_time)

    def _over_ranks(self, values: torch.Tensor, how: str) -> torch.Tensor:
        """The "sum" or "mean" of `values` over all ranks, on the CPU."""
        if self.accelerator.num_processes == 1:
            return values.cpu()
        reduced: Any = self.accelerator.reduce(values.to(self.args.device), how)
        return reduced.cpu()

    def floating_point_ops(self, inputs: Any) -> int:
        return 0  # transformers would guess it from inputs that are not tensors yet


@torch.no_grad()
def start_head_at(head: nn.Module, mean: torch.Tensor) -> None:
    """Make the head predict `mean` [H] whatever it sees; `PolicyError` if its last layer is no
    linear one with bias.
    """
    linears = [m for m in head.modules() if isinstance(m, nn.Linear)]
    if not linears or linears[-1].bias is None:
        raise PolicyError(
            "start_at_mean needs a latent head that ends in a linear layer with a bias; choose "
            "another head or unset it"
        )
    linears[-1].weight.zero_()
    linears[-1].bias.copy_(mean)


def _end_of_sequence(policy: LatentPolicy, tokenizer: Any) -> int:
    if tokenizer.eos_token_id is not None:
        return int(tokenizer.eos_token_id)
    eos = policy.generation_config.eos_token_id if policy.generation_config else None
    if eos is None:
        raise PolicyError(
            "neither the tokenizer nor the policy names an end-of-sequence token; set one of them"
        )
    return int(eos[0] if isinstance(eos, list) else eos)

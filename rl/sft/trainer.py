"""SFT with latent alignment: cross-entropy on what a policy decides, and a pull of its latents to
future frames.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, get_args

import numpy as np
import torch
from accelerate.utils import is_peft_model
from rich.progress import Progress
from torch import nn
from transformers import Trainer, TrainerCallback, TrainingArguments, default_data_collator

from rl.checkpoints import CompleteCheckpoints
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import DataError, ObjectiveError, PolicyError
from rl.interfaces import MediaSource
from rl.policy.model import LatentPolicy
from rl.policy.protocol import Slot
from rl.policy.vision import vision_tower
from rl.scoring import ReplayBatch, collate
from rl.sft.alignment import LatentLoss, latent_alignment_loss
from rl.sft.targets import Targets, compute_targets
from rl.sft.taught import completion_ids, span_lengths, taught_texts, taught_trajectory
from rl.trajectory import MediaKey, Sample, Trajectory


@dataclass
class LatentSFTConfig(TrainingArguments):
    """`TrainingArguments` plus the latent term and which rows get a latent trace.

    `imagine_share` is one probability for all rows, or one for each value of a manifest column,
    written as ``{"column": "template", "shares": {"0": 0.75, "1": 0.30}}``. It is drawn anew in
    each epoch.
    """

    latent_weight: float = field(
        default=1.0, metadata={"help": "λ, weight of the latent term beside the cross-entropy."}
    )
    latent_loss: LatentLoss = field(
        default="mse", metadata={"help": "mse (divided by the targets' variance) or cosine."}
    )
    tokens_per_patch: int = field(
        default=1, metadata={"help": "Latents for each temporal patch of a span."}
    )
    imagine_share: Any = field(
        default=1.0, metadata={"help": "Probability that a row is taught with its latent spans."}
    )
    answer_template: str = field(
        default="<answer>{answer}</answer>", metadata={"help": "The text of a final answer."}
    )
    reasoning_template: str = field(
        default="<reason>{reasoning}</reason>",
        metadata={"help": "The text of a piece of reasoning around latent spans."},
    )
    freeze_vision: bool = field(
        default=True, metadata={"help": "Whether the vision tower is left as it is."}
    )
    start_at_mean: bool = field(
        default=False,
        metadata={
            "help": "Let the latent head begin by predicting the mean target. For new heads."
        },
    )
    media_cache: int = field(
        default=4096, metadata={"help": "Processed clips kept in memory, for prompts."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave it: rows are samples, not columns of tensors."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_weight < 0:
            raise ObjectiveError(f"latent_weight is {self.latent_weight}; it must be at least 0")
        if self.latent_loss not in get_args(LatentLoss):
            raise ObjectiveError(
                f"latent_loss is {self.latent_loss!r}; choose one of {get_args(LatentLoss)}"
            )
        if self.tokens_per_patch < 1:
            raise ObjectiveError(
                f"tokens_per_patch is {self.tokens_per_patch}; it must be at least 1"
            )
        shares = self.imagine_share
        if isinstance(shares, dict):
            if shares.keys() != {"column", "shares"}:
                raise ObjectiveError(
                    f"imagine_share has the keys {sorted(shares)}; give 'column' and 'shares', or "
                    "one number"
                )
            shares = shares["shares"].values()
        for share in shares if not isinstance(shares, int | float) else [shares]:
            if not 0.0 <= share <= 1.0:
                raise ObjectiveError(f"imagine_share holds {share}; shares are between 0 and 1")


def imagine_probability(sample: Sample, share: float | dict[str, Any]) -> float:
    """The probability with which `sample` is taught with its spans (see `LatentSFTConfig`)."""
    if not isinstance(share, dict):
        return float(share)
    column = share["column"]
    value = str(sample.extra.get(column))
    if value not in share["shares"]:
        raise DataError(
            f"sample {sample.id!r}: column {column!r} is {value}, and imagine_share has no share "
            f"for it (it has: {', '.join(share['shares'])}); add one or correct the row"
        )
    return float(share["shares"][value])


class LatentSFTTrainer(Trainer):
    """Teaches a `LatentPolicy` the latent spans and answers of manifest rows.

    Latents are teacher-forced: the pooled features of the frames in `Sample.imagine`, computed once
    before training with the tower as it then is, are both fed and aimed at. `targets` from an
    earlier stage with the same tower and samples spare that. Clips of the prompts come from
    `source`, by default a cache of `args.media_cache` clips. An update's loss is the mean over all
    decided positions of its rows plus λ times the mean over all their latents, however the rows
    are cut into micro-batches. Logs `loss_text` (cross-entropy), `loss_latent` (before its weight)
    and `imagined` (share of rows with spans) beside `loss`, as means over the updates since the
    last log; updates without latents do not count in `loss_latent`. Each checkpoint is a
    policy that `load_policy` reads. Raises `DataError` for rows whose spans the protocol does not
    allow.
    """

    args: LatentSFTConfig

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
        **kwargs: Any,
    ) -> None:
        self.samples = list(train_dataset)
        self.media = media
        self.source = LocalMedia(media, args.media_cache) if source is None else source
        self.targets = targets
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
        self._sums: dict[str, torch.Tensor | float] = defaultdict(float)
        self._updates: Counter[str] = Counter()  # since the last log, for each entry of `_sums`
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
        """Compute the targets if need be, then train as `transformers.Trainer` does."""
        if self.targets is None:
            with Progress(disable=bool(self.args.disable_tqdm)) as bar:
                task = bar.add_task("features of future frames", total=None)
                self.targets = compute_targets(
                    self.policy,
                    self.media,
                    self.samples,
                    tokens_per_patch=self.args.tokens_per_patch,
                    progress=lambda done, total: bar.update(task, completed=done, total=total),
                )
        if self.args.start_at_mean:
            start_head_at(self.policy.latent_head, self.targets.mean)
        return super().train(*args, **kwargs)

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

    def _prompt(self, index: int) -> tuple[np.ndarray, MediaKey]:
        if index not in self._prompts:
            sample = self.samples[index]
            clip = self.source.get(self.media.key(sample))
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
        self._updates.update(["loss_text", "imagined"] + ["loss_latent"] * (latents > 0))
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
        scores = model(**batch.inputs)
        text = -scores.logprobs.sum() * (ranks / decided)
        latent = latent_alignment_loss(
            scores.means,
            batch.latents,
            variance=self.targets.variance,
            kind=self.args.latent_loss,
        ) * (ranks * sum(batch.latent_counts) / max(latents, 1))
        self._sums["loss_text"] += text.detach()
        self._sums["loss_latent"] += latent.detach()
        loss = text + self.args.latent_weight * latent
        return (loss, scores) if return_outputs else loss

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            for name, updates in self._updates.items():
                total = self._over_ranks(torch.as_tensor(self._sums[name]), "mean")
                logs[name] = float(total) / updates
            self._sums.clear()
            self._updates.clear()
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

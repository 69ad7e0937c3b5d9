"""The settings of SFT with latent alignment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from rl.errors import DataError, ObjectiveError
from rl.sft.alignment import LatentLoss
from rl.sft.target_clips import TokensPerPatch
from rl.trajectory import Sample

FedLatents = Literal["teacher", "own"]


@dataclass
class LatentSFTConfig(TrainingArguments):
    """`TrainingArguments` plus the latent term and which rows get a latent trace.

    `imagine_share` is one probability for all rows, or one for each value of a manifest column,
    written as ``{"column": "template", "shares": {"0": 0.75, "1": 0.30}}``. It is drawn anew in
    each epoch. Raises `ObjectiveError` for what cannot work.
    """

    latent_weight: float = field(
        default=1.0, metadata={"help": "λ, weight of the latent term beside the cross-entropy."}
    )
    latent_loss: LatentLoss = field(
        default="mse", metadata={"help": "mse (divided by the targets' variance) or cosine."}
    )
    tokens_per_patch: TokensPerPatch = field(
        default=1,
        metadata={
            "help": "Latents for each temporal patch of a span; all: as many as its frames have "
            "merged tokens, shrunk to the protocol's max_length for the span."
        },
    )
    latents: FedLatents = field(
        default="teacher",
        metadata={"help": "Fed at the latents: the targets, or the policy's own means."},
    )
    target_cache: str | None = field(
        default=None, metadata={"help": "File that keeps the targets between runs."}
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
    media_cache_gb: float = field(
        default=4.0, metadata={"help": "Memory for processed clips, for prompts."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Leave it: rows are samples, not columns of tensors."}
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.latent_weight < 0:
            raise ObjectiveError(f"latent_weight is {self.latent_weight}; it must be at least 0")
        for name, kinds in (("latent_loss", LatentLoss), ("latents", FedLatents)):
            if (value := getattr(self, name)) not in get_args(kinds):
                raise ObjectiveError(f"{name} is {value!r}; choose one of {get_args(kinds)}")
        tokens = self.tokens_per_patch
        if tokens != "all" and not (isinstance(tokens, int) and tokens >= 1):
            raise ObjectiveError(
                f"tokens_per_patch is {tokens!r}; it must be at least 1, or 'all' for every token"
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

"""The settings of SFT with latent alignment."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from transformers import TrainingArguments

from rl.errors import DataError, ObjectiveError
from rl.sft.alignment import LatentLoss
from rl.sft.curriculum import CurriculumConfig
from rl.sft.self_forcing import AlignTo
from rl.sft.target_clips import TokensPerPatch
from rl.trajectory import Sample

FedLatents = Literal["teacher", "own", "self_forcing"]


@dataclass
class LatentSFTConfig(TrainingArguments):
    """`TrainingArguments` plus the latent term and what rows are taught.

    `imagine_share` is one probability for all rows, or one for each value of a manifest column,
    written as ``{"column": "template", "shares": {"0": 0.75, "1": 0.30}}``. It is drawn anew in
    each epoch. `start_latents` and `curriculum` (the fields of a `CurriculumConfig`) teach other
    lessons, whose latents have no targets: there is no latent term then, whatever its weight.
    Raises `ObjectiveError` for what cannot work.
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
        metadata={
            "help": "Fed at the latents: the targets, the policy's own means (own), or these with "
            "a gradient through them (self_forcing)."
        },
    )
    target_cache: str | None = field(
        default=None, metadata={"help": "File that keeps the targets between runs."}
    )
    imagine_share: Any = field(
        default=1.0, metadata={"help": "Probability that a row is taught with its latent spans."}
    )
    start_latents: int | None = field(
        default=None,
        metadata={"help": "Teach every row so many latents and then its answer, without targets."},
    )
    curriculum: Any = field(
        default=None,
        metadata={"help": "Teach chains of thought stage by stage as latents, without targets."},
    )
    bptt_steps: int | None = field(
        default=None,
        metadata={
            "help": "Self-forcing: gradients go back through the last so many latents; None: all."
        },
    )
    align_weight: float = field(
        default=0.1, metadata={"help": "λ_a, pull of self-forced latents to the video's segments."}
    )
    align_to: AlignTo = field(
        default="segments",
        metadata={"help": "Means of the segments, or weighted by the question's attention."},
    )
    diversity_weight: float = field(
        default=0.1, metadata={"help": "λ_d, on cos² between the latents of a row."}
    )
    replay_weight: float = field(
        default=0.5, metadata={"help": "ρ, pull of replayed video tokens to their region."}
    )
    depth_weight: float = field(
        default=1.0, metadata={"help": "Weight of the depth gates' budget, where there are some."}
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
        for name in ("latent", "align", "diversity", "replay", "depth"):
            if (weight := getattr(self, f"{name}_weight")) < 0:
                raise ObjectiveError(f"{name}_weight is {weight}; it must be at least 0")
        kinds_of = {"latent_loss": LatentLoss, "latents": FedLatents, "align_to": AlignTo}
        for name, kinds in kinds_of.items():
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
        if isinstance(self.curriculum, CurriculumConfig):
            self.curriculum = self.curriculum.to_dict()  # what transformers can write down
        self._check_lessons()
        self._check_self_forcing()

    @property
    def schedule(self) -> CurriculumConfig | None:
        """The curriculum, if there is one."""
        return None if self.curriculum is None else CurriculumConfig.from_dict(self.curriculum)

    @property
    def has_targets(self) -> bool:
        """Whether the latents that are taught have targets."""
        return self.start_latents is None and self.curriculum is None

    def _check_lessons(self) -> None:
        """Refuse lessons without targets beside what only those with targets have."""
        if self.has_targets:
            return
        name = "curriculum" if self.start_latents is None else "start_latents"
        if self.start_latents is not None and self.curriculum is not None:
            raise ObjectiveError(
                "start_latents and curriculum are both set, and a row is taught in one way; leave "
                "one of them out"
            )
        if self.start_latents is not None and self.start_latents < 1:
            raise ObjectiveError(f"start_latents is {self.start_latents}; it must be at least 1")
        assert self.curriculum is None or self.schedule  # which checks itself
        if self.latents == "teacher":
            raise ObjectiveError(
                f"latents is 'teacher', but {name} teaches latents that have no targets to feed; "
                "set latents to own or self_forcing"
            )
        defaults = {"imagine_share": 1.0, "tokens_per_patch": 1, "start_at_mean": False}
        for key, default in {**defaults, "target_cache": None}.items():
            if getattr(self, key) != default:
                raise ObjectiveError(
                    f"{key} is {getattr(self, key)!r}, but it is about spans that depict frames, "
                    f"and {name} teaches none; leave it out"
                )

    def _check_self_forcing(self) -> None:
        if self.bptt_steps is not None and self.bptt_steps < 1:
            raise ObjectiveError(f"bptt_steps is {self.bptt_steps}; it must be at least 1, or None")
        if self.latents != "self_forcing":
            if self.bptt_steps is not None:
                raise ObjectiveError(
                    "bptt_steps is about latents that gradients go through; set latents to "
                    "self_forcing, or leave it out"
                )
            return
        if self.has_targets:
            raise ObjectiveError(
                "latents is 'self_forcing', which teaches latents that have no targets; set "
                "start_latents or curriculum, or latents to own"
            )
        if self.gradient_checkpointing:
            raise ObjectiveError(
                "latents is 'self_forcing', which keeps keys and values that gradients flow "
                "through, and checkpointed layers can keep none; set gradient_checkpointing to "
                "false, and bound the memory with bptt_steps"
            )


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

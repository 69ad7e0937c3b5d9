"""Settings of the LA-DAPO trainer."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, get_args

import torch
from trl.trainer.grpo_config import GRPOConfig

from rl.errors import ObjectiveError
from rl.objective import Objective, Reduction, reduce_width
from rl.policy.protocol import Imagine

# Arguments of TRL that LA-DAPO takes no notice of, and the values that say so.
IGNORED: dict[str, Any] = {
    "entropy_coef": 0.0,
    "use_adaptive_entropy": False,
    "repetition_penalty": 1.0,
    "generation_kwargs": None,
    "sync_ref_model": False,
    "reward_weights": None,
}


@dataclass
class LADAPOConfig(GRPOConfig):
    """TRL's `GRPOConfig` plus the latent term, the group filter and the replay check.

    Of TRL's own arguments `epsilon_high` defaults to DAPO's 0.28 here; `temperature`, `top_p` and
    `top_k` are the sampler's as well.
    """

    objective: Objective = field(
        default="exact",
        metadata={
            "help": "exact: ours. published: a baseline, what Future-L1's released code computes "
            "(rl.published), defects included; only for a policy without noise."
        },
    )
    published_kappa: float = field(
        default=0.01, metadata={"help": "κ of κ·⟨μ, z⟩, with objective published alone."}
    )
    imagine: Imagine = field(
        default="free",
        metadata={"help": "Sampling: spans left to the policy, always one, or never any."},
    )
    freeze_vision: bool = field(
        default=False, metadata={"help": "Whether the vision tower is left as it is."}
    )
    epsilon_high: float | None = field(
        default=0.28, metadata={"help": "Upper clip of the token ratio (DAPO's clip-higher)."}
    )
    latent_alpha: float = field(
        default=0.5, metadata={"help": "α, weight of the latent term. Needs a policy with noise."}
    )
    latent_epsilon: float = field(default=0.1, metadata={"help": "Lower clip of the latent ratio."})
    latent_epsilon_high: float | None = field(
        default=None,
        metadata={"help": "Upper clip of the latent ratio; None: the same as the lower."},
    )
    latent_reduction: Reduction = field(
        default="sqrt_dim",
        metadata={
            "help": "How log-densities over the width enter the ratio: sum, sqrt_dim or mean."
        },
    )
    latent_beta: float = field(
        default=0.0, metadata={"help": "β_z, weight of the latents' KL to the reference policy."}
    )
    depth_weight: float = field(
        default=1.0, metadata={"help": "Weight of the depth gates' budget, where there are some."}
    )
    filter_low: float = field(
        default=0.0,
        metadata={"help": "Train on groups whose accuracy is above this (DAPO 0, Future-L1 0.1)."},
    )
    filter_high: float = field(
        default=1.0,
        metadata={"help": "Train on groups whose accuracy is below this (DAPO 1, Future-L1 0.9)."},
    )
    max_refills: int = field(
        default=0,
        metadata={
            "help": "How many more times to sample new prompts in the place of dropped groups."
        },
    )
    filter_groups: bool = field(
        default=True,
        metadata={
            "help": "Train only on groups that filter_low and filter_high keep; without it on all. "
            "Whether shaping teaches where all are right or all wrong is for the scorer to say."
        },
    )
    max_tokens_per_microbatch: int | None = field(
        default=None,
        metadata={
            "help": "Cut the rows of a training step into forward passes of at most so many tokens "
            "(a group's prompt counts once); None: one pass for per_device_train_batch_size rows."
        },
    )
    max_mismatch: float | None = field(
        default=None,
        metadata={
            "help": "Stop when a replayed log-prob (a latent's divided by √H) differs by more."
        },
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0.0 <= self.filter_low < self.filter_high <= 1.0:
            raise ObjectiveError(
                f"need 0 <= filter_low < filter_high <= 1, got {self.filter_low} and "
                f"{self.filter_high}"
            )
        self._check_budget()
        self._check_published()
        if self.imagine not in get_args(Imagine):
            raise ObjectiveError(f"imagine is {self.imagine!r}; choose one of {get_args(Imagine)}")
        if self.depth_weight < 0:
            raise ObjectiveError(f"depth_weight is {self.depth_weight}; it must be at least 0")
        if self.max_refills < 0:
            raise ObjectiveError(f"max_refills is {self.max_refills}; it must be >= 0")
        if self.temperature <= 0:
            raise ObjectiveError(
                "temperature must be above 0: a greedy policy has no log-probs to learn from"
            )
        if not 0.0 < self.top_p <= 1.0:
            raise ObjectiveError(
                f"top_p is {self.top_p}; it must be above 0 and at most 1, which keeps all tokens"
            )
        if self.top_k < 0 or self.top_k == 1:
            raise ObjectiveError(
                f"top_k is {self.top_k}; it must be at least 2, or 0, which keeps all tokens: a "
                "choice among one token has nothing to learn from"
            )
        if self.min_p not in (0.0, None):
            raise ObjectiveError(
                f"min_p={self.min_p} is not supported: replay knows no such truncation, and ratios "
                "would be biased. Leave it out, or set top_p or top_k"
            )
        for name, inert in IGNORED.items():
            if getattr(self, name) != inert:
                raise ObjectiveError(
                    f"{name}={getattr(self, name)} would change nothing or do harm here: TRL's own "
                    f"generation, rewards and entropy terms are not used. Leave it at {inert}"
                )
        for name in ("use_vllm", "use_transformers_continuous_batching"):
            if getattr(self, name, False):
                raise ObjectiveError(
                    f"{name} is TRL's own generation; rollouts come from the pool instead"
                )
        reduce_width(torch.zeros(1), 1, self.latent_reduction)

    def _check_published(self) -> None:
        if self.objective not in get_args(Objective):
            raise ObjectiveError(
                f"objective is {self.objective!r}; choose one of {get_args(Objective)}"
            )
        if self.objective == "exact":
            return
        for name, inert, why in (
            ("latent_alpha", 0.0, "in the release latents count among the tokens"),
            ("latent_beta", 0.0, "in the release beta is the weight of latents' KL too"),
            (
                "max_mismatch",
                None,
                "the release's scores are not the sampler's (see published/gap)",
            ),
            ("off_policy_mask_threshold", None, "the release's scores are not the sampler's"),
        ):
            if getattr(self, name) != inert:
                raise ObjectiveError(
                    f"objective is published and {name} is {getattr(self, name)}, but {why}; set "
                    f"{name} to {inert}"
                )
        if self.published_kappa <= 0.0:
            raise ObjectiveError(f"published_kappa is {self.published_kappa}; it must be above 0")
        steps: Any = self.steps_per_generation
        if self.gradient_accumulation_steps % (steps * self.num_iterations):
            raise ObjectiveError(
                "objective is published, whose old log-probs are those of the update itself: it "
                f"takes one update a rollout, but steps_per_generation={steps} and num_iterations="
                f"{self.num_iterations} make several of gradient_accumulation_steps="
                f"{self.gradient_accumulation_steps}; leave the first two out"
            )

    def _check_budget(self) -> None:
        if self.max_tokens_per_microbatch is None:
            return
        if self.max_tokens_per_microbatch < 1:
            raise ObjectiveError(
                f"max_tokens_per_microbatch is {self.max_tokens_per_microbatch}; it must be at "
                "least 1, or None"
            )
        if self.top_entropy_quantile < 1.0:
            raise ObjectiveError(
                f"top_entropy_quantile={self.top_entropy_quantile} compares all tokens of a "
                "micro-batch, which max_tokens_per_microbatch computes in passes; leave one of "
                "them out"
            )
        if self.optim in ("lomo", "adalomo"):
            raise ObjectiveError(
                f"optim={self.optim} updates weights in every backward pass, of which "
                "max_tokens_per_microbatch makes several; leave one of them out"
            )

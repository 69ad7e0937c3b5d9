"""LA-DAPO: DAPO for policies that think in latents, on TRL's GRPOTrainer.

With `rl.la_dapo_loss` the one place that touches TRL's private members (`TRL_MEMBERS`, pinned by a
test). What TRL keeps: the sampler, reward statistics and advantages, the clipped token term and its
KL, metrics, callbacks, checkpoints, PEFT. What is ours: the rollouts come from a pool and carry
their latents, the group filter looks at outcomes and refills, groups stay together, log-probs are
an exact replay with the stored latents fed back, and the latent term.

Source: LA-DAPO is the trainer of Future-L1 (arXiv 2606.05769); its released code scores text
without the latents it was conditioned on and compares each latent with the wrong hidden state, so
this is our reconstruction.
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Callable, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from peft import PeftConfig, PeftModel
from trl.models.utils import prepare_deepspeed, prepare_fsdp

from rl.checkpoints import CompleteCheckpoints, read_state
from rl.collecting import CollectedGroup, GroupCollector, ScoredRollout, rollout_metrics
from rl.data.broken import BrokenClips
from rl.errors import ObjectiveError, PolicyError, SyncError
from rl.interfaces import GroupScores, Rollouts, Scorer
from rl.la_dapo_config import LADAPOConfig
from rl.la_dapo_loss import ReplayLoss, gathered
from rl.passes import Passes, deal_groups
from rl.policy.adapters import with_whole_modules
from rl.policy.model import LatentPolicy
from rl.policy.protocol import Slot
from rl.policy.vision import vision_tower
from rl.reward_table import reward_table
from rl.trajectory import Sample, Sampling, Trajectory
from rl.weights import weight_update

# The private members of GRPOTrainer used here, with the arguments relied on. A test compares them
# with the installed TRL, so that an upgrade that moves one fails loudly.
TRL_MEMBERS: dict[str, tuple[str, ...]] = {
    "_generate_and_score_completions": ("self", "inputs"),
    "_calculate_rewards": ("self", "inputs", "prompts", "completions", "completion_ids_list"),
    "_get_per_token_logps_and_entropies": (
        "self", "model", "input_ids", "attention_mask", "logits_to_keep", "batch_size",
        "compute_entropy", "compute_aux_loss", "pixel_values", "image_grid_thw", "num_images",
        "pixel_attention_mask", "spatial_shapes", "num_tiles", "image_sizes", "token_type_ids",
        "mm_token_type_ids", "image_position_ids",
    ),
    "_prepare_inputs": ("self", "generation_batch"),
    "compute_loss": ("self", "model", "inputs", "return_outputs", "num_items_in_batch"),
    "_compute_loss": ("self", "model", "inputs"),
    "_load_optimizer_and_scheduler": ("self", "checkpoint"),
    "_log_metric": ("self", "name", "value"),
    "_log_completion_extra": ("self", "column", "values"),
}  # fmt: skip


class LADAPOTrainer(ReplayLoss):
    """Trains a `LatentPolicy` on trajectories sampled by `rollouts` and scored by `scorer`.

    `model` is the policy, `samples` the prompts, `processing_class` its processor (saved with each
    checkpoint). With `peft_config` the adapters are trained and the latent head is saved whole.
    `recorder` is given every rollout that is trained on, with its rewards. `broken` says what is
    done about clips that cannot be shown (default: the run stops), and lists them. Raises
    `ObjectiveError` when the latent term is asked for and the policy has no noise, and when the
    published baseline (`rl.published`) is and it has some.
    """

    num_generations: int
    num_generations_eval: int
    max_completion_length: int

    _tag_names = ("trl", "la-dapo", "foresight")
    _name = "LA-DAPO"

    def __init__(
        self,
        model: Any,
        *,
        rollouts: Rollouts,
        scorer: Scorer,
        samples: Sequence[Sample],
        args: LADAPOConfig,
        processing_class: Any,
        eval_samples: Sequence[Sample] | None = None,
        peft_config: PeftConfig | None = None,
        callbacks: Sequence[Any] = (),
        recorder: Callable[[ScoredRollout], object] | None = None,
        broken: BrokenClips | None = None,
        **kwargs: Any,
    ) -> None:
        _check(model, args)
        self._recorder = recorder
        self.rollouts, self.scorer = rollouts, scorer
        self.samples = {s.id: s for s in (*samples, *(eval_samples or ()))}
        self._handed: list[CollectedGroup] = []
        self._rewards: torch.Tensor | None = None
        self._synced_step: int | None = None
        # By mode: the step of the last rollout, and its number in that step.
        self._last_sampled: dict[str, tuple[int, int]] = {}
        if peft_config is not None:
            peft_config = with_whole_modules(peft_config, model)
        wants_reference = args.beta != 0.0 or args.latent_beta != 0.0
        reference = copy.deepcopy(model) if wants_reference and peft_config is None else None
        args.reward_weights = list(scorer.weights)
        # TRL would load the reference by the model's class name, without its latent head: it gets
        # none to load.
        beta, args.beta = args.beta, 0.0
        # TRL warns that `rollout_func` may change; `TRL_MEMBERS` and the pinned version are our
        # answer.
        warnings.filterwarnings("ignore", message=".*rollout_func.*", category=UserWarning)
        super().__init__(
            model=model,
            reward_funcs=[_scored_already for _ in scorer.names],
            args=args,
            train_dataset=_dataset(samples),
            eval_dataset=_dataset(eval_samples) if eval_samples else None,
            processing_class=processing_class,
            peft_config=peft_config,
            callbacks=[CompleteCheckpoints(self._resume_state), *callbacks],
            rollout_func=_hand_over,  # type: ignore[arg-type]
            **kwargs,
        )
        args.beta = self.beta = beta
        self._check_batches()
        self.reward_func_names = list(scorer.names)
        inner: Any = self.accelerator.unwrap_model(self.model)
        # The policy inside whatever wraps it. Looked up once: telling a PEFT model takes
        # milliseconds.
        self.policy: LatentPolicy = inner.get_base_model() if is_peft_model(inner) else inner
        if args.freeze_vision:
            vision_tower(self.policy).requires_grad_(False)
        self.passes = Passes(
            self.policy,
            rollouts.media,
            self.accelerator,
            budget=args.max_tokens_per_microbatch,
            rows=args.per_device_train_batch_size,
            kappa=args.published_kappa if self.published else None,
        )
        self.collector = GroupCollector(
            rollouts,
            scorer,
            samples,
            seed=args.seed,
            low=args.filter_low,
            high=args.filter_high,
            max_refills=args.max_refills,
            world=self.accelerator.num_processes,
            rank=self.accelerator.process_index,
            broken=broken,
        )
        self.ref_model = self._prepare_reference(reference)

    def _check_batches(self) -> None:
        rows = self.args.per_device_train_batch_size * int(self.args.steps_per_generation or 1)
        if rows % self.num_generations:
            raise ObjectiveError(
                f"a process samples {rows} rows at a time (per_device_train_batch_size x "
                f"steps_per_generation), which are no whole groups of {self.num_generations} "
                "(num_generations); change one of the three"
            )
        if self.is_deepspeed_enabled and self.args.max_tokens_per_microbatch is not None:
            raise ObjectiveError(
                "max_tokens_per_microbatch does not work with DeepSpeed, whose engine counts the "
                "backward passes itself; leave it out and choose per_device_train_batch_size"
            )

    # -- the reference policy and the workers' weights ---------------------------------------------

    def _prepare_reference(self, reference: Any) -> Any:
        if reference is None:
            return None
        reference.requires_grad_(False).eval()
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(reference, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(reference, self.accelerator)
        return self.accelerator.prepare_model(reference, evaluation_mode=True)

    def _score_reference(
        self, trajectories: Sequence[Trajectory], out: dict[str, Any]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        """The reference policy's log-probs [B, C], and its latent means, one tensor [L_i, H] a
        trajectory.
        """
        logps = torch.zeros(out["completion_ids"].shape, device=self.accelerator.device)
        means = [torch.empty(0)] * len(trajectories)
        with self._reference_policy() as model:
            for row, logprobs, of_latents in self.passes.score(model, trajectories):
                logps[row, : len(logprobs)] = logprobs
                means[row] = of_latents
        return logps, means

    @contextmanager
    def _reference_policy(self) -> Any:
        adapters: Any = nullcontext()
        if self.ref_model is None:
            peft: PeftModel = self.accelerator.unwrap_model(self.model)
            adapters = peft.disable_adapter()
        with adapters:
            yield self.ref_model if self.ref_model is not None else self.model

    def sync_weights(self) -> None:
        """Bring the workers to the current weights, if they are not there yet."""
        if self._synced_step == self.state.global_step:
            return
        model = self.accelerator.unwrap_model(self.model)
        if self.accelerator.is_main_process:
            # Frozen parameters are the same ever after the first update.
            update = weight_update(
                model, self.state.global_step, trainable_only=self._synced_step is not None
            )
            version = self.rollouts.update_weights(update)
            if version != update.version:
                raise SyncError(
                    f"the workers report version {version} after an update to version "
                    f"{update.version}; they would sample another policy than the one in training"
                )
        self.accelerator.wait_for_everyone()
        self._synced_step = self.state.global_step

    # -- rollouts: sample, score, filter, refill ------------------------------------------------

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        """As TRL's, which samples once for several steps and deals the rows out at random, but
        whole groups at a time: rows of one group share the computation of their prompt.
        """
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        steps = int(self.args.steps_per_generation or 1)
        if self._step % (steps * self.num_iterations) == 0 or self._buffered_inputs is None:
            batch = self._generate_and_score_completions(generation_batch)
            self._buffered_inputs = deal_groups(batch, self.num_generations, steps)
        return self._buffered_inputs[self._step % steps]

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        mode = "train" if self.model.training else "eval"
        size = self.num_generations if mode == "train" else self.num_generations_eval
        self.sync_weights()
        self.scorer.begin(self.state)
        step, number = self._last_sampled.get(mode, (-1, 0))
        number = number + 1 if step == self.state.global_step else 0
        self._last_sampled[mode] = (self.state.global_step, number)
        place = f"{mode}/{self.state.global_step}/{number}"
        sampling = Sampling(
            self.temperature,
            self.max_completion_length,
            imagine=self.args.imagine,
            top_p=self.args.top_p,
            top_k=self.args.top_k,
        )
        collected = self.collector.collect(
            [self.samples[row["sample_id"]] for row in inputs[::size]],
            size,
            sampling,
            place,
            filtering=mode == "train" and self.args.filter_groups,
        )
        groups = [c.group for c in collected.groups]
        scores = self._score(collected.groups, size, sampling, place)
        self._rewards = reward_table(self.scorer.names, scores)
        self._handed = collected.groups
        trajectories = [t for group in groups for t in group]
        rows = [_row(t.sample) for t in groups for _ in range(size)]
        # With β at 0 TRL makes at most one pass here, for the old log-probs, which the sampler has
        # already given.
        self._replaying, (beta, self.beta) = None, (self.beta, 0.0)
        try:
            out = super()._generate_and_score_completions(rows)
        finally:
            self.beta = beta
        if self.published:  # TRL then takes the update's own values, without a gradient
            out.pop("old_per_token_logps", None)
        else:
            out["old_per_token_logps"] = out["sampling_per_token_logps"]
        trained = (out["completion_mask"] * out["tool_mask"]).any(dim=1).tolist()
        latents = sum(len(t.latents) for t, on in zip(trajectories, trained, strict=True) if on)
        out["num_latents_in_batch"] = gathered(
            torch.tensor(float(latents), device=self.accelerator.device)
        ).sum()
        out["trajectories"] = trajectories
        if self.beta != 0.0 or self.args.latent_beta != 0.0:
            out["ref_per_token_logps"], out["reference_means"] = self._score_reference(
                trajectories, out
            )
        for name, value in rollout_metrics(collected, self.state.global_step).items():
            self._metrics[mode][name].append(value)
        if self._recorder is not None and mode == "train":
            advantages = out["advantages"].tolist()
            step = self.state.global_step
            self._recorder(ScoredRollout(step, number, collected.groups, scores, advantages))
        return out

    def _score(
        self, collected: Sequence[CollectedGroup], size: int, sampling: Sampling, place: str
    ) -> list[GroupScores]:
        groups = [c.group for c in collected]
        shuffled = None
        if self.scorer.wants_shuffled:
            shuffled = self.collector.shuffled(groups, max(1, size // 2), sampling, place)
        scores = self.scorer.score(groups, [c.outcome for c in collected], shuffled)
        log = self.scorer.log()
        for name, value in log.metrics:
            self._log_metric(name, value)
        for column, values in log.extras.items():
            self._log_completion_extra(column, values)
        return scores

    def _calculate_rewards(
        self, inputs: Any, prompts: Any, completions: Any, completion_ids_list: Any
    ) -> torch.Tensor:
        assert self._rewards is not None
        return gathered(self._rewards.to(self.accelerator.device))

    # -- resuming ----------------------------------------------------------------------------------

    def _resume_state(self) -> dict[str, Any]:
        return {"refill_cursor": self.collector.cursor}

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None:
            self.collector.cursor = int(read_state(checkpoint).get("refill_cursor", 0))


def _hand_over(prompts: Any, trainer: LADAPOTrainer) -> dict[str, Any]:
    """TRL's `rollout_func`: the groups that were already sampled. Dropped groups and trajectories
    with an invalid outcome are masked throughout, and but for the published baseline so is what was
    forced.
    """

    def counted(trajectory: Trajectory) -> Any:
        return (trajectory.decision != Slot.FORCED) | trainer.published

    pairs = [
        (t, c.trained and not math.isnan(outcome))
        for c in trainer._handed
        for t, outcome in zip(c.group, c.outcome, strict=True)
    ]
    trainer._handed = []
    return {
        "prompt_ids": [t.prompt_ids.tolist() for t, _ in pairs],
        "completion_ids": [t.completion_ids.tolist() for t, _ in pairs],
        "logprobs": [t.logprobs.tolist() for t, _ in pairs],
        "env_mask": [(counted(t) & keep).astype(int).tolist() for t, keep in pairs],
    }


def _check(model: Any, args: LADAPOConfig) -> None:
    if isinstance(model, PeftModel):
        raise PolicyError(
            "pass the policy itself and a `peft_config`; adapters are added by the trainer"
        )
    if not isinstance(model, LatentPolicy):
        raise PolicyError(
            f"{type(model).__name__} is no latent policy; make one with `rl.make_policy`"
        )
    modules = model.modules_config
    if args.objective == "published" and modules.names:
        raise ObjectiveError(
            f"objective is published, whose release knows none of the policy's modules "
            f"({', '.join(modules.names)}); leave objective at exact"
        )
    if not modules.shares_prompts:
        raise PolicyError(
            "the policy's depth router is the published one, which cannot generate, so there is "
            "nothing to learn from; train a policy with router: token"
        )
    noise = model.protocol.noise_scale
    if noise > 0.0 and args.objective == "published":
        raise ObjectiveError(
            f"objective is published, but the policy's noise_scale is {noise}: the release's "
            "latents have no noise. Set the protocol's noise_scale to 0, or leave objective at "
            "exact"
        )
    if noise == 0.0 and (args.latent_alpha != 0.0 or args.latent_beta != 0.0):
        raise ObjectiveError(
            f"latent_alpha={args.latent_alpha} and latent_beta={args.latent_beta} ask for a latent "
            "term, but the policy's noise_scale is 0: its latents are their own means, the "
            "gradient of their log-density is exactly zero and its KL is undefined. Set the "
            "protocol's noise_scale above 0 (0.1 is a start), or set latent_alpha and latent_beta "
            "to 0"
        )


def _scored_already(**_: Any) -> list[float | None]:
    """Stands where TRL wants a reward function. Never called: see `_calculate_rewards`."""
    raise NotImplementedError


def _dataset(samples: Sequence[Sample]) -> Dataset:
    return Dataset.from_list([_row(s) for s in samples])


def _row(sample: Sample) -> dict[str, Any]:
    return {"prompt": [{"role": "user", "content": sample.question}], "sample_id": sample.id}

"""The loss of LA-DAPO on TRL: log-probs from a replay, passes under a token budget, latents."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from accelerate.utils import gather
from torch.nn.functional import pad
from trl.trainer.grpo_trainer import GRPOTrainer

from rl.errors import ObjectiveError
from rl.la_dapo_config import LADAPOConfig
from rl.latent_term import MEANS, latent_term
from rl.passes import Passes, take_rows
from rl.policy.depth import budget_loss
from rl.policy.model import LatentPolicy
from rl.published import bounded_reference, sampler_gaps
from rl.scoring import Replay, replay_gaps
from rl.trajectory import Trajectory

OVER_LATENTS = {f"latents/{name}" for name in MEANS}
ADDED = {"latents/loss", "latents/trained"}


class ReplayLoss(GRPOTrainer):
    """A `GRPOTrainer` whose batches hold `trajectories`, and whose log-probs are their replay.

    Part of `LADAPOTrainer`, which makes such batches.
    """

    args: LADAPOConfig  # narrower than TRL's
    model: Any
    policy: LatentPolicy  # inside whatever wraps it
    passes: Passes
    _replaying: dict[str, Any] | None = None  # the inputs of the loss that is computed
    _replayed: Replay | None = None  # and what came of them

    @property
    def published(self) -> bool:
        """Whether the loss is that of the published baseline (`rl.published`), not ours."""
        return self.args.objective == "published"

    # -- replay: TRL asks for log-probs, we score the stored trajectories --------------------------

    def _get_per_token_logps_and_entropies(
        self,
        model: Any,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor,
        logits_to_keep: int,
        batch_size: int | None = None,
        compute_entropy: bool = False,
        compute_aux_loss: bool = False,
        **_: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        if compute_aux_loss:
            raise ObjectiveError(
                "router_aux_loss_coef is not supported: replay has no router logits"
            )
        if self._replaying is None:
            # The old policy's pass: the sampler's own log-probs are exact, and `out` takes them
            # anyway.
            return (
                input_ids.new_zeros((len(input_ids), logits_to_keep), dtype=torch.float32),
                None,
                None,
            )
        inputs = self._replaying
        # Rows of other passes are masked. They keep the sampler's log-probs, so that nothing about
        # them overflows.
        logps = inputs["sampling_per_token_logps"].clone()
        entropies = torch.zeros_like(logps)
        rows = inputs.get("rows") or list(range(len(logps)))
        trajectories = inputs["trajectories"]
        self._replayed = found = self.passes.replay(model, [trajectories[row] for row in rows])
        wider = (0, logits_to_keep - found.logprobs.size(1))
        logps[rows], entropies[rows] = pad(found.logprobs, wider), pad(found.entropies, wider)
        if self.published and self.beta != 0.0:  # TRL takes the reference from here in a moment
            reference = inputs["ref_per_token_logps"]
            inputs["ref_per_token_logps"] = bounded_reference(logps, reference)
        return logps, entropies if compute_entropy else None, None

    # -- the loss ----------------------------------------------------------------------------------

    def compute_loss(
        self,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> torch.Tensor:
        """The loss of one micro-batch of TRL's. Under a token budget it is computed in passes: the
        gradients of all but the last are added here already, and only the last one's graph is left
        to the caller.

        A pass has all rows, so that processes can put their metrics together, and all but its own
        are masked.
        """
        if self.args.max_tokens_per_microbatch is None:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        plan = self.passes.plan(inputs["trajectories"])
        parts = [{**inputs, **self._part(inputs, rows)} for rows in plan]
        metrics = self._metrics["train" if self.model.training else "eval"]
        logged = {name: len(values) for name, values in metrics.items()}
        found: list[dict[str, list[float]]] = []
        loss = torch.zeros((), device=self.accelerator.device)
        for part in parts:
            last = part is parts[-1]
            with nullcontext() if last else self._without_sync(model):
                share = super().compute_loss(model, part, return_outputs, num_items_in_batch)
                if not last and torch.is_grad_enabled():
                    self.accelerator.backward(share)
            loss = loss + (share if last else share.detach())
            found.append(_take_new(metrics, logged))
        tokens = torch.stack([(p["completion_mask"] * p["tool_mask"]).sum() for p in parts])
        weights = gathered(tokens[None].float()).sum(0).tolist()
        by_row = self.importance_sampling_level == "sequence"
        for name, value in merge_metrics(found, weights, by_row=by_row).items():
            metrics[name].append(value)
        return loss

    def _without_sync(self, model: Any) -> Any:
        """Where gradients wait to be summed over processes, unless they are sharded: then each
        process would have to keep whole ones in the meantime.
        """
        return nullcontext() if self.is_fsdp_enabled else self.accelerator.no_sync(model)

    def _part(self, inputs: dict[str, Any], rows: list[int]) -> dict[str, Any]:
        """What differs between a micro-batch and the pass of these of its rows."""
        mask = torch.zeros_like(inputs["completion_mask"])
        mask[rows] = inputs["completion_mask"][rows]
        part = {"rows": rows, "completion_mask": mask}
        if self.loss_type == "bnpo":  # the one loss that divides by the tokens it is given
            own, whole = mask * inputs["tool_mask"], inputs["completion_mask"] * inputs["tool_mask"]
            part["share"] = float(own.sum() / whole.sum().clamp(min=1))
        return part

    def _compute_loss(self, model: Any, inputs: dict[str, Any]) -> torch.Tensor:
        self._replaying = inputs = dict(inputs)
        try:
            loss = super()._compute_loss(model, inputs) * inputs.get("share", 1.0)
        finally:
            self._replaying = None
        assert self._replayed is not None
        replayed, self._replayed = self._replayed, None
        own = take_rows(inputs, inputs["rows"]) if "rows" in inputs else inputs
        self._check_mismatch(replayed, own)
        metrics = self._metrics["train" if self.model.training else "eval"]
        alone = sum(len(t.prompt_ids) + t.row_tokens for t in own["trajectories"])
        metrics["passes/tokens"].append(replayed.tokens)
        metrics["passes/shared"].append(1.0 - replayed.tokens / alone)
        return loss + self._latent_loss(replayed, own) + self._depth_loss(replayed, own, inputs)

    def _depth_loss(
        self, replayed: Replay, own: dict[str, Any], inputs: dict[str, Any]
    ) -> torch.Tensor | float:
        """The budget of the depth gates in this pass, which counts as many rows as it has."""
        config = self.policy.modules_config.depth
        if config is None or replayed.depth is None:
            return 0.0
        mode = "train" if self.model.training else "eval"
        self._metrics[mode]["depth/share"].append(replayed.depth.item())
        share = len(own["trajectories"]) / len(inputs["trajectories"])
        if mode == "train":
            share /= self.current_gradient_accumulation_steps
        return self.args.depth_weight * share * budget_loss(replayed.depth, config.budget)

    def _latent_loss(self, replayed: Replay, inputs: dict[str, Any]) -> torch.Tensor:
        """α·L_latent + β_z·KL_latent, normalised by the latents of the whole batch as TRL does it
        with tokens.
        """
        mode = "train" if self.model.training else "eval"
        normalizer = inputs["num_latents_in_batch"].clamp(min=1.0) / self.accelerator.num_processes
        accumulated = 1
        if mode == "train":
            steps: Any = self.args.steps_per_generation
            accumulated = self.current_gradient_accumulation_steps
            normalizer = normalizer * accumulated / steps
        term = latent_term(
            replayed,
            inputs["trajectories"],
            inputs["advantages"],
            # Rows without a trained token (dropped groups, masked truncations) train no latent.
            (inputs["completion_mask"] * inputs["tool_mask"]).any(dim=1),
            normalizer,
            self.args,
            self.policy.protocol,
            inputs.get("reference_means"),
        )
        loss, *sums, count = gathered(term.totals[None]).sum(0).tolist()
        metrics = self._metrics[mode]
        if inputs["num_latents_in_batch"] > 0:
            # Its mean over the micro-batches of an update is the update's.
            metrics["latents/loss"].append(loss * accumulated / self.accelerator.num_processes)
            metrics["latents/trained"].append(count)
        if count:
            for name, total in zip(MEANS, sums, strict=True):
                if name != "kl" or self.args.latent_beta != 0.0:
                    metrics[f"latents/{name}"].append(total / count)
        return term.loss

    @torch.no_grad()
    def _check_mismatch(self, replayed: Replay, inputs: dict[str, Any]) -> None:
        """Log how far replay is from the sampler, where no update has come between them yet."""
        trajectories: list[Trajectory] = inputs["trajectories"]
        if any(t.policy_version != self.state.global_step for t in trajectories):
            return
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self.published:  # whose scores are others; by how much is what there is to see
            mean, most = sampler_gaps(replayed, trajectories)
            metrics["published/gap"].append(mean)
            metrics["published/gap_max"].append(most)
            return
        gaps = replay_gaps(replayed, trajectories)
        metrics["replay/max_gap"].append(gaps.tokens)
        metrics["replay/max_latent_gap"].append(gaps.latents)
        # Written so that NaN is a mismatch too.
        if self.args.max_mismatch is not None and not gaps.largest <= self.args.max_mismatch:
            raise ObjectiveError(
                f"at step {self.state.global_step} the trainer's log-probs are {gaps.tokens:.2g} "
                f"(tokens) and {gaps.latents:.2g} (latents) away from the sampler's, and "
                f"max_mismatch is {self.args.max_mismatch}; the workers hold other weights or see "
                "other inputs, and ratios would be wrong"
            )


def _take_new(metrics: dict[str, list[float]], logged: dict[str, int]) -> dict[str, list[float]]:
    """Takes what was added to `metrics` since there were so many values of each."""
    new = {name: values[logged.get(name, 0) :] for name, values in metrics.items()}
    for name, values in metrics.items():
        del values[logged.get(name, 0) :]
    return {name: values for name, values in new.items() if values}


def merge_metrics(
    passes: Sequence[dict[str, list[float]]], tokens: Sequence[float], *, by_row: bool
) -> dict[str, float]:
    """The metrics of one micro-batch out of those of its passes, which trained so many `tokens`.

    Smallest and largest values stay that, numbers and shares of a loss are added, and all others
    are means: of latents over latents, of passes over passes, of the rest over tokens. `by_row`:
    clip ratios are of rows, and those of other passes count as not clipped.
    """
    merged: dict[str, float] = {}
    for name in dict.fromkeys(name for found in passes for name in found):
        pairs = [
            (value, found["latents/trained"][0] if name in OVER_LATENTS else weight)
            for found, weight in zip(passes, tokens, strict=True)
            for value in found.get(name, [])
            if not math.isnan(value)
        ]
        values = [value for value, _ in pairs]
        if not values:
            merged[name] = math.nan
        elif name.endswith("_min"):
            merged[name] = min(values)
        elif name.endswith("_max") or name.startswith("replay/"):
            merged[name] = max(values)
        elif name in ADDED or (by_row and name.startswith("clip_ratio/")):
            merged[name] = sum(values)
        else:
            total = 0.0 if name.startswith("passes/") else sum(weight for _, weight in pairs)
            merged[name] = (
                sum(value * weight for value, weight in pairs) / total
                if total
                else sum(values) / len(values)
            )
    return merged


def gathered(value: torch.Tensor) -> torch.Tensor:
    """The tensors of all processes, one after the other."""
    found: Any = gather(value)
    return found

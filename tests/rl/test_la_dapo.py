"""LA-DAPO on tiny policies: the real TRL trainer, the real engine, no Ray."""

import copy
import hashlib
import inspect
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import TrainerCallback
from trl.trainer.grpo_trainer import GRPOTrainer

from rewards.registry import build_terms
from rewards.scorer import RewardSet
from rewards.terms import RewardTerm
from rl.checkpoints import STATE_FILE, last_complete
from rl.errors import ObjectiveError, PolicyError, SyncError
from rl.la_dapo import TRL_MEMBERS, LADAPOTrainer, _dataset
from rl.la_dapo_config import LADAPOConfig
from rl.la_dapo_loss import merge_metrics
from rl.policy.protocol import LatentProtocol
from rl.policy.vision import vision_tower
from rl.weights import weight_update
from tests.latent import PROTOCOL, engine_for, square_samples, thinking_policy

SIZE = 4


def coin(completion_ids, **_):
    """Right or wrong by the parity of the ids: contrast in most groups, and no luck involved."""
    return [float(sum(ids) % 2) for ids in completion_ids]


def rewards(outcome=coin, gate_shaping=True, **shaping) -> RewardSet:
    terms = [RewardTerm("outcome", outcome, 1.0, shaping=False)]
    terms += [RewardTerm(name, f, 0.5) for name, f in shaping.items()]
    return RewardSet(terms, gate_shaping=gate_shaping)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("la_dapo")
    policy, processor = thinking_policy(folder / "base", boldness=1.2)
    return policy, processor, square_samples(folder / "clips", 8)


def trainer_for(
    world, output, scorer=None, peft_config=None, engine_policy=None, **changes
) -> LADAPOTrainer:
    """A trainer on a fresh copy of the policy; `changes` are to its config."""
    policy, processor, samples = world
    policy = copy.deepcopy(policy)
    settings = {
        "output_dir": str(output),
        "per_device_train_batch_size": 2 * SIZE,
        "num_generations": SIZE,
        "max_completion_length": 16,
        "max_steps": 2,
        "learning_rate": 1e-3,
        "lr_scheduler_type": "constant",
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "use_cpu": True,
        "bf16": False,
        "disable_tqdm": True,
        "gradient_checkpointing": False,
        "max_mismatch": 2e-5,
        **changes,
    }
    return LADAPOTrainer(
        policy,
        rollouts=engine_for(engine_policy or copy.deepcopy(policy), processor),
        scorer=scorer or rewards(),
        samples=samples,
        args=LADAPOConfig(**settings),
        processing_class=processor,
        peft_config=peft_config,
    )


@pytest.fixture
def build(world, tmp_path):
    """Makes trainers; keywords change their config."""

    def make(folder="run", **changes):
        return trainer_for(world, tmp_path / folder, **changes)

    return make


def watch(trainer, note) -> None:
    """Hands the inputs of each loss to `note`, once the trainer runs."""

    class Spy(LADAPOTrainer):
        def _compute_loss(self, model, inputs):
            note(inputs)
            return super()._compute_loss(model, inputs)

    trainer.__class__ = Spy


def passes_of(trainer) -> list[dict]:
    """Fills with the inputs of each loss."""
    seen = []
    watch(trainer, seen.append)
    return seen


def watched(trainer) -> dict:
    """Fills with the inputs of the loss: of the last one."""
    seen = {}
    watch(trainer, seen.update)
    return seen


def logs(trainer) -> list[dict]:
    return [row for row in trainer.state.log_history if "loss" in row]


def trained(trainer) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


@pytest.mark.parametrize("member", TRL_MEMBERS)
def test_trl_has_not_moved(member):
    found = tuple(inspect.signature(getattr(GRPOTrainer, member)).parameters)
    assert found == TRL_MEMBERS[member], f"TRL changed {member}: revisit rl/la_dapo.py"


def test_trl_still_prepares_inputs_as_ours_does():
    """`_prepare_inputs` does in another order what TRL's does: read TRL's anew when this fails."""
    body = inspect.getsource(GRPOTrainer._prepare_inputs).encode()
    assert hashlib.sha256(body).hexdigest()[:16] == "f824e7fb07147956"


def test_every_ratio_is_one_at_the_first_update(build):
    trainer = build()
    before = trained(trainer)
    trainer.train()
    first = logs(trainer)[0]
    assert first["replay/max_gap"] <= 1e-5
    assert first["replay/max_latent_gap"] <= 2e-5  # at a noise scale of 0.3
    assert first["latents/ratio"] == pytest.approx(1.0, abs=2e-5)
    assert first["clip_ratio/region_mean"] == 0.0 == first["latents/clip_ratio"]
    assert first["latents/per_completion"] > 0 and first["rollouts/staleness"] == 0
    assert first["rollouts/tokens_per_second"] > first["rollouts/latents_per_second"] > 0
    # A second rollout comes from the updated weights.
    assert logs(trainer)[1]["replay/max_gap"] <= 1e-5
    same = [n for n, p in trained(trainer).items() if torch.equal(p, before[n])]
    assert same == []


def test_every_ratio_is_one_under_truncated_sampling(build):
    trainer = build(temperature=0.9, top_p=0.9, top_k=20, beta=0.1)
    seen = watched(trainer)
    trainer.train()
    first, second = logs(trainer)
    assert first["replay/max_gap"] <= 1e-5 >= second["replay/max_gap"]
    assert first["clip_ratio/region_mean"] == 0.0
    assert first["kl"] == pytest.approx(0.0, abs=1e-6)  # the reference is scored the same way
    counts = np.concatenate([t.kept[t.kept > 0] for t in seen["trajectories"]])
    assert len(set(counts.tolist())) > 1 and counts.max() <= 20


def test_the_loss_by_hand(build):
    trainer = build(max_steps=1, latent_alpha=0.3)
    seen = watched(trainer)
    trainer.train()
    # At ratio 1 the token term is -Σ A_i·n_i / Σ n_i over decided positions, the latent term the
    # same over latents.
    mask = seen["completion_mask"] * seen["tool_mask"]
    advantage = seen["advantages"].double()
    decided = mask.sum(1).double()
    latents = torch.tensor([len(t.latents) for t in seen["trajectories"]]).double()
    assert latents.sum() == seen["num_latents_in_batch"] > 0
    expected = -(advantage * decided).sum() / decided.sum()
    expected = expected - 0.3 * (advantage * latents).sum() / latents.sum()
    assert logs(trainer)[0]["loss"] == pytest.approx(expected.item(), abs=1e-5)
    forced = [int((t.decision == 0).sum()) for t in seen["trajectories"]]
    lengths = [len(t.completion_ids) for t in seen["trajectories"]]
    assert decided.tolist() == [n - f for n, f in zip(lengths, forced, strict=True)]


class Gradients(TrainerCallback):
    """Keeps the gradients of each update."""

    def __init__(self):
        self.updates = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        named = kwargs["model"].named_parameters()
        self.updates.append({n: p.grad.clone() for n, p in named if p.grad is not None})


def first_update(trainer) -> tuple[dict[str, torch.Tensor], dict]:
    """The gradients of a trainer's first update, and its line in the log."""
    kept = Gradients()
    trainer.add_callback(kept)
    trainer.train()
    return kept.updates[0], logs(trainer)[0]


def assert_same_update(found, expected):
    gradients, line = found
    assert gradients.keys() == expected[0].keys()
    largest = max(float(g.abs().max()) for g in expected[0].values())
    for name, gradient in expected[0].items():
        torch.testing.assert_close(
            gradients[name], gradient, rtol=1e-4, atol=1e-5 * largest, msg=name
        )
    assert line["loss"] == pytest.approx(expected[1]["loss"], abs=1e-5)
    assert line["latents/loss"] == pytest.approx(expected[1]["latents/loss"], abs=1e-5)


CUTS = {
    "checkpointing": {"gradient_checkpointing": True},
    "two micro-batches": {"per_device_train_batch_size": SIZE, "gradient_accumulation_steps": 2},
    "groups across micro-batches": {
        "per_device_train_batch_size": 2,
        "gradient_accumulation_steps": 4,
    },
    "a budget of one group": {"max_tokens_per_microbatch": 140},
    "a budget of one row": {"max_tokens_per_microbatch": 1},
}


@pytest.mark.parametrize("changes", CUTS.values(), ids=list(CUTS))
def test_the_same_update_however_it_is_cut(build, changes):
    expected = first_update(build(max_steps=1, gradient_accumulation_steps=1))
    assert_same_update(first_update(build(max_steps=1, **changes)), expected)


@pytest.mark.parametrize("loss", ["grpo", "bnpo", "dr_grpo", "luspo", "sapo", "cispo", "vespo"])
def test_a_budget_leaves_every_loss_of_trl_as_it_is(build, loss):
    settings = {"max_steps": 1, "loss_type": loss, "beta": 0.1, "latent_beta": 0.1}
    expected = first_update(build(**settings))
    found = build(**settings, max_tokens_per_microbatch=140)
    passes = passes_of(found)
    assert_same_update(first_update(found), expected)
    assert len(passes) > 1


def test_a_budget_holds_and_says_what_it_shares(build):
    trainer = build(max_steps=1, max_tokens_per_microbatch=200, per_device_train_batch_size=16)
    passes = passes_of(trainer)
    (line,) = (first_update(trainer)[1],)
    computed, alone = [], []
    for inputs in passes:
        rows = [inputs["trajectories"][row] for row in inputs["rows"]]
        prompts = {t.sample_id: len(t.prompt_ids) for t in rows}
        completions = sum(len(t.completion_ids) for t in rows)
        computed.append(sum(prompts.values()) + completions)
        alone.append(sum(prompts[t.sample_id] for t in rows) + completions)
    assert sorted(row for inputs in passes for row in inputs["rows"]) == list(range(16))
    assert 1 < len(passes) < 16 and max(computed) <= 200
    shared = [1 - c / a for c, a in zip(computed, alone, strict=True)]
    assert line["passes/tokens"] == pytest.approx(sum(computed) / len(passes))
    assert line["passes/shared"] == pytest.approx(sum(shared) / len(passes)) and min(shared) > 0.4


def test_metrics_of_passes_by_hand():
    passes = [
        {"entropy": [1.0], "clip_ratio/low_min": [0.5], "latents/loss": [0.25],
         "latents/trained": [3.0], "latents/ratio": [1.0], "kl": [math.nan]},
        {"entropy": [2.0], "clip_ratio/low_min": [0.25], "latents/loss": [0.5],
         "latents/trained": [1.0], "latents/ratio": [2.0], "replay/max_gap": [0.1]},
        {"entropy": [4.0], "clip_ratio/low_min": [math.nan], "latents/loss": [0.0],
         "latents/trained": [0.0], "replay/max_gap": [0.2]},
    ]  # fmt: skip
    found = merge_metrics(passes, [10.0, 30.0, 0.0], by_row=False)
    assert math.isnan(found.pop("kl"))
    assert found == {
        "entropy": (10 + 60) / 40,
        "clip_ratio/low_min": 0.25,
        "latents/loss": 0.75,
        "latents/trained": 4.0,
        "latents/ratio": (3 * 1 + 1 * 2) / 4,
        "replay/max_gap": 0.2,
    }
    rows = [{"clip_ratio/low_mean": [0.25]}, {"clip_ratio/low_mean": [0.5]}]
    assert merge_metrics(rows, [1.0, 1.0], by_row=True) == {"clip_ratio/low_mean": 0.75}


METRICS = ("loss", "latents/loss", "latents/ratio", "latents/clip_ratio", "entropy", "kl")
METRICS += ("clip_ratio/low_mean", "clip_ratio/high_mean", "clip_ratio/high_max")


@pytest.mark.parametrize("level", ["token", "sequence"])
def test_a_budget_changes_no_metric(build, level):
    """Several micro-batches of different numbers of passes, and several updates."""
    settings = {
        "per_device_train_batch_size": 2 * SIZE,
        "gradient_accumulation_steps": 2,
        "num_iterations": 2,
        "filter_groups": False,
        "importance_sampling_level": level,
        "learning_rate": 1e-2,
        "optim": "sgd",  # which rounding moves no further than itself
        "beta": 0.1,
        "seed": 3,
    }
    whole = build(**settings)
    whole.train()
    cut = build(**settings, max_tokens_per_microbatch=150)
    passes = passes_of(cut)
    cut.train()
    assert len(passes) > 2 * 4
    for found, expected in zip(logs(cut), logs(whole), strict=True):
        for name in METRICS:
            assert found[name] == pytest.approx(expected[name], rel=1e-3, abs=1e-5), name


def test_adapters_and_evaluation_under_a_budget(build, world):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    settings = {"peft_config": config, "beta": 0.1, "latent_beta": 0.1, "max_steps": 1}
    expected = first_update(build(**settings))
    trainer = build(**settings, max_tokens_per_microbatch=140, per_device_eval_batch_size=2 * SIZE)
    assert_same_update(first_update(trainer), expected)
    passes = passes_of(trainer)
    metrics = trainer.evaluate(_dataset(world[2][:2]))
    assert len(passes) > 1 and math.isfinite(metrics["eval_loss"])
    assert all(p.grad is None or not p.grad.any() for p in trainer.model.parameters())


def test_groups_stay_together(build):
    """TRL deals the rows of several micro-batches out one by one."""
    orders = []
    for seed in range(3):
        trainer = build(
            max_steps=2,
            per_device_train_batch_size=SIZE,
            gradient_accumulation_steps=2,
            steps_per_generation=4,
            num_iterations=2,
            filter_groups=False,
            seed=seed,
        )
        handed = []
        trainer._recorder = handed.append
        dealt = passes_of(trainer)
        trainer.train()
        ids = [[t.sample_id for t in inputs["trajectories"]] for inputs in dealt]
        assert all(len(i) == SIZE and len({*i}) == 1 for i in ids)
        for inputs in dealt:  # each row with what belongs to it
            decided = [int((t.decision != 0).sum()) for t in inputs["trajectories"]]
            assert (inputs["completion_mask"] * inputs["tool_mask"]).sum(1).tolist() == decided
        (rollout,) = handed
        sampled = [c.group.sample.id for c in rollout.groups]
        assert len(dealt) == 4 and sorted(i[0] for i in ids) == sorted(sampled)
        orders.append([i[0] for i in ids] == sampled)
    assert not all(orders)  # and in an order of their own


def test_the_tower_sees_a_clip_once_a_pass(build):
    trainer = build(max_steps=1, beta=0.1, gradient_checkpointing=True)
    calls = []
    for model in (trainer.policy, trainer.ref_model):
        vision_tower(model).register_forward_hook(
            lambda tower, args, kwargs, output, model=model: calls.append(
                (model is trainer.policy, len(kwargs["grid_thw"]), args[0].shape[0])
            ),
            with_kwargs=True,
        )
    seen = watched(trainer)
    trainer.train()
    clips = {key for t in seen["trajectories"] for key in t.media}
    patches = sum(
        trainer.rollouts.media.get(key).inputs["pixel_values_videos"].shape[0] for key in clips
    )
    assert len(clips) == 2
    assert calls == [(False, 2, patches), (True, 2, patches)]  # reference, policy


def test_several_updates_a_rollout_use_the_samplers_log_probs(build):
    trainer = build(num_iterations=2, max_steps=2, learning_rate=1e-2)
    trainer.train()
    first, second = logs(trainer)
    assert first["latents/ratio"] == pytest.approx(1.0, abs=2e-5)
    assert abs(second["latents/ratio"] - 1.0) > 1e-3
    assert "replay/max_gap" not in second  # an update has come between


def test_kl_to_the_reference(build):
    trainer = build(beta=0.1, latent_beta=0.1, max_steps=4, learning_rate=1e-2)
    trainer.train()
    first, *later = logs(trainer)
    assert first["kl"] == pytest.approx(0, abs=1e-6) and later[-1]["kl"] > 1e-5
    divergences = [row["latents/kl"] for row in later if "latents/kl" in row]
    assert divergences and min(divergences) > 1e-5
    assert first.get("latents/kl", 0.0) == pytest.approx(0, abs=1e-6)
    assert trainer.ref_model.latent_head is not trainer.policy.latent_head


def test_lora(build):
    config = LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "v_proj"])
    trainer = build(peft_config=config, beta=0.1, latent_beta=0.1, learning_rate=1e-2)
    before = trained(trainer)
    assert any("latent_head" in n for n in before) and any("lora_" in n for n in before)
    trainer.train()
    first, second = logs(trainer)
    # The workers got base and adapters merged, and the reference is the base.
    assert first["replay/max_gap"] <= 1e-5 and second["replay/max_gap"] <= 1e-5
    assert first["kl"] == pytest.approx(0, abs=1e-6) and second["kl"] > 0
    assert all(
        not torch.equal(p, before[n]) for n, p in trained(trainer).items() if "latent_head" in n
    )


def test_groups_without_contrast_teach_nothing(build):
    trainer = build(scorer=rewards(lambda completions, **_: [0.0] * len(completions)))
    before = trained(trainer)
    trainer.train()
    first = logs(trainer)[0]
    assert (first["groups/all_wrong"], first["groups/kept"], first["groups/trained"]) == (2, 0, 0)
    assert first["grad_norm"] == 0.0
    assert all(torch.equal(p, before[n]) for n, p in trained(trainer).items())


def wrong_for_some(**columns):
    """Prompts with an odd number are all wrong."""
    odd = [int(i[-1]) % 2 for i in columns["id"]]
    return [0.0 if o else c for o, c in zip(odd, coin(**columns), strict=True)]


def test_dropped_groups_are_refilled_within_bounds(build):
    trainer = build(scorer=rewards(wrong_for_some), max_refills=20, max_steps=3)
    trainer.train()
    rows = logs(trainer)
    assert all(row["groups/trained"] == 1.0 for row in rows)
    assert sum(row["groups/all_wrong"] for row in rows) > 0
    assert max(row["groups/refills"] for row in rows) >= 1
    stuck = build(scorer=rewards(lambda completions, **_: [1.0] * len(completions)), max_refills=3)
    stuck.train()
    assert logs(stuck)[0]["groups/refills"] == 3
    assert logs(stuck)[0]["groups/all_right"] == 2 * 4


def test_shaping_teaches_without_contrast_only_when_asked(build):
    def remainder(completion_ids, **_):
        return [float(sum(ids) % 7) for ids in completion_ids]

    def wrong(completions, **_):
        return [0.0] * len(completions)

    def first(**settings):
        scorer = rewards(wrong, remainder=remainder, gate_shaping=settings.pop("gate", True))
        trainer = build(scorer=scorer, max_steps=1, **settings)
        trainer.train()
        return logs(trainer)[0]

    filtered, gated = first(), first(filter_groups=False)
    assert filtered["grad_norm"] == gated["grad_norm"] == 0.0
    assert (filtered["groups/trained"], gated["groups/trained"]) == (0.0, 1.0)
    assert gated["groups/gated"] == 1.0 and gated["rewards/remainder/mean"] > 0.0  # still logged
    asked = first(filter_groups=False, gate=False)
    assert asked["grad_norm"] > 0.0 and asked["groups/gated"] == 0.0
    assert asked["groups/trained"] == 1.0 == asked["groups/all_wrong"] / 2


def test_invalid_and_missing_values(build):
    """A NaN outcome leaves a trajectory out; a missing shaping value moves nobody."""

    def outcome(completions, **_):
        return [[None, 0.0, 1.0, 1.0][i % SIZE] for i in range(len(completions))]

    def shaping(completions, **_):
        return [[5.0, None, 1.0, 2.0][i % SIZE] for i in range(len(completions))]

    trainer = build(scorer=rewards(outcome, shaping=shaping), max_steps=1, shuffle_dataset=False)
    seen = watched(trainer)
    trainer.train()
    # Valid rewards: 0 + 0.5·1.5 (the mean of 1 and 2), 1 + 0.5·1, 1 + 0.5·2 = 0.75, 1.5, 2;
    # mean 1.416667, sample deviation 0.629153.
    std = math.sqrt(((0.75 - 17 / 12) ** 2 + (1.5 - 17 / 12) ** 2 + (2 - 17 / 12) ** 2) / 2) + 1e-4
    expected = [0.0, (0.75 - 17 / 12) / std, (1.5 - 17 / 12) / std, (2 - 17 / 12) / std]
    by_group: dict[str, list[float]] = {}
    for t, a in zip(seen["trajectories"], seen["advantages"].tolist(), strict=True):
        by_group.setdefault(t.sample_id, []).append(a)
    for found in by_group.values():  # TRL shuffles the batch
        assert sorted(found) == pytest.approx(sorted(expected), abs=1e-4)


def test_workers_with_other_weights_are_noticed(build, world):
    """A sync that does nothing but say it did: other tokens, or another latent head alone."""
    for change in ("lm_head.weight", "latent_head.3.weight"):
        other = copy.deepcopy(world[0])
        with torch.no_grad():
            other.get_parameter(change)[:50] += 0.5
        trainer = build(engine_policy=other)
        trainer.rollouts.update_weights = lambda update: update.version
        with pytest.raises(ObjectiveError, match="max_mismatch"):
            trainer.train()


def test_workers_that_do_not_follow_are_noticed(build):
    trainer = build()
    trainer.rollouts.update_weights = lambda update: 0
    with pytest.raises(SyncError, match="version 0 after an update to version 1"):
        trainer.train()


def test_a_lora_update_leaves_the_base_alone(world):
    policy = copy.deepcopy(world[0]).to(torch.bfloat16)
    adapters = LoraConfig(r=4, lora_alpha=64, target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(policy, adapters)
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    merged = weight_update(model, 1).state
    assert merged.keys() == world[0].state_dict().keys()
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged[name], world[0].state_dict()[name].bfloat16())
    assert all(torch.equal(p, before[n]) for n, p in model.named_parameters())


def test_what_trl_hands_over_is_still_there(build):
    trainer = build(max_steps=1)
    seen = watched(trainer)
    trainer.train()
    assert {"completion_mask", "tool_mask", "num_items_in_batch", "advantages"} <= seen.keys()
    assert torch.equal(seen["old_per_token_logps"], seen["sampling_per_token_logps"])
    assert len(seen["trajectories"]) == len(seen["completion_mask"]) == 2 * SIZE
    # Lists are shuffled with the tensors.
    for t, mask, decided in zip(
        seen["trajectories"], seen["completion_mask"], seen["tool_mask"], strict=True
    ):
        assert len(t.completion_ids) == int(mask.sum())
        assert int((mask * decided).sum()) == int((t.decision != 0).sum())
    for attribute in ("_metrics", "_tokenizer", "current_gradient_accumulation_steps"):
        assert hasattr(trainer, attribute)


def test_contradictions_are_refused(build, world, tmp_path):
    policy = world[0]
    policy.set_protocol(LatentProtocol(min_length=2, max_length=4))
    try:
        with pytest.raises(ObjectiveError, match="gradient of their log-density is exactly zero"):
            build()
        build(latent_alpha=0.0)  # tokens alone can be trained without noise
    finally:
        policy.set_protocol(PROTOCOL)
    for name, value in (("top_p", 0.0), ("top_k", -1), ("top_k", 1), ("min_p", 0.1)):
        with pytest.raises(ObjectiveError, match=name):
            build(**{name: value})
    with pytest.raises(ObjectiveError, match="entropy_coef"):
        build(entropy_coef=0.1)
    with pytest.raises(ObjectiveError, match="temperature"):
        build(temperature=0.0)
    with pytest.raises(ObjectiveError, match="filter_low"):
        build(filter_low=0.9, filter_high=0.1)
    for name, value in (
        ("max_tokens_per_microbatch", 0),
        ("top_entropy_quantile", 0.5),
        ("optim", "lomo"),
    ):
        with pytest.raises(ObjectiveError, match=f"^{name}"):
            build(**{"max_tokens_per_microbatch": 100, name: value})
    with pytest.raises(ObjectiveError, match="'max'"):
        build(latent_reduction="max")
    with pytest.raises(PolicyError, match="no latent policy"):
        LADAPOTrainer(
            torch.nn.Linear(1, 1),
            rollouts=None,  # type: ignore[arg-type]
            scorer=rewards(),
            samples=world[2],
            args=LADAPOConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False),
            processing_class=world[1],
        )


def test_resuming_equals_going_on(build, tmp_path):
    scorer = rewards(wrong_for_some)
    settings = {"max_refills": 2, "save_strategy": "steps", "save_steps": 2, "max_steps": 4}
    through = build(scorer=scorer, folder="through", **settings)
    through.train()
    first = build(scorer=scorer, folder="cut", **{**settings, "max_steps": 2})
    first.train()
    checkpoint = last_complete(tmp_path / "cut")
    assert checkpoint is not None and checkpoint.name == "checkpoint-2"
    assert json.loads((checkpoint / STATE_FILE).read_text())["refill_cursor"] > 0
    (Path(tmp_path) / "cut" / "checkpoint-3").mkdir()  # a save that was cut short
    assert last_complete(tmp_path / "cut") == checkpoint
    second = build(scorer=scorer, folder="cut", **settings)
    second.train(resume_from_checkpoint=str(checkpoint))
    expected, found = trained(through), trained(second)
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], msg=name)


def test_evaluation_samples_without_filtering(build, world):
    trainer = build(per_device_eval_batch_size=SIZE, max_steps=1)
    metrics = trainer.evaluate(_dataset(world[2][:2]))
    assert metrics["eval_groups/trained"] == 1.0
    assert 0.0 <= metrics["eval_rewards/outcome/mean"] <= 1.0


def test_a_control_with_shuffled_frames_is_sampled_when_a_reward_asks(build):
    """T-GRPO: half as many trajectories, the same frames in another order, after the filter."""
    terms = [RewardTerm("outcome", coin, 1.0, shaping=False)]
    terms += build_terms([{"use": "temporal_order", "name": "order"}])
    trainer = build(scorer=RewardSet(terms), max_steps=1)
    kept = []
    trainer._recorder = kept.append
    asked, generate = [], trainer.rollouts.generate
    trainer.rollouts.generate = lambda requests: asked.append(requests) or generate(requests)
    seen = watched(trainer)
    trainer.train()
    ordered, control = asked
    assert [len(r.seeds) for r in ordered] == [SIZE] * 2
    assert [len(r.seeds) for r in control] == [SIZE // 2] * 2
    for straight, mixed in zip(ordered, control, strict=True):
        assert straight.sample.id == mixed.sample.id
        assert sorted(mixed.sample.frames) == list(straight.sample.frames)
        assert mixed.sample.frames != straight.sample.frames
    assert len(seen["trajectories"]) == 2 * SIZE  # the control is not trained on
    assert {tuple(sorted(t.media[0].frames)) for t in seen["trajectories"]} == {
        t.media[0].frames for t in seen["trajectories"]
    }
    control_of = dict(zip((r.sample.id for r in control), generate(control), strict=True))
    for group, scores in zip(kept[0].groups, kept[0].scores, strict=True):
        shuffled = coin([t.completion_ids.tolist() for t in control_of[group.group.sample.id]])
        passes = sum(scores.outcome) / SIZE >= 0.8 * sum(shuffled) / len(shuffled)
        assert scores.components["order"] == [o * passes for o in scores.outcome]


def test_a_trajectory_with_an_invalid_outcome_is_not_trained_on(build):
    def outcome(completions, **_):
        return [[None, 0.0, 1.0, 1.0][i % SIZE] for i in range(len(completions))]

    trainer = build(scorer=rewards(outcome), max_steps=1)
    seen = watched(trainer)
    trainer.train()
    mask = (seen["completion_mask"] * seen["tool_mask"]).any(1)
    assert mask.sum() == 2 * (SIZE - 1) and (seen["advantages"][~mask] == 0).all()


def test_every_rollout_is_recorded_with_its_advantages(build):
    kept = []
    trainer = build(max_steps=2)
    trainer._recorder = kept.append
    trainer.train()
    assert [(r.step, r.number) for r in kept] == [(0, 0), (1, 0)]
    for rollout in kept:
        assert len(rollout.groups) == len(rollout.scores) == 2
        for i, scores in enumerate(rollout.scores):
            own = rollout.advantages[i * SIZE : (i + 1) * SIZE]
            right = [a for a, o in zip(own, scores.outcome, strict=True) if o == 1.0]
            wrong = [a for a, o in zip(own, scores.outcome, strict=True) if o == 0.0]
            assert not (right and wrong) or min(right) > 0 > max(wrong)


@pytest.mark.parametrize(("imagine", "share"), [("never", 0.0), ("always", 1.0)])
def test_sampling_imagines_as_told(build, imagine, share):
    trainer = build(max_steps=1, imagine=imagine)
    seen = watched(trainer)
    trainer.train()
    (line,) = logs(trainer)
    assert line["latents/share_imagining"] == share
    assert {t.sampling.imagine for t in seen["trajectories"]} == {imagine}
    assert ("latents/neighbour_cosine" in line) == bool(share)
    assert line["replay/max_gap"] <= 1e-5
    with pytest.raises(ObjectiveError, match="imagine is 'sometimes'"):
        build(imagine="sometimes")


@pytest.mark.parametrize("adapters", [None, LoraConfig(r=4, target_modules="all-linear")])
def test_the_tower_is_trained_unless_frozen(build, adapters):
    def in_tower(trainer):
        return [p for p in vision_tower(trainer.policy).parameters() if p.requires_grad]

    assert in_tower(build(peft_config=adapters))
    frozen = build(peft_config=adapters, freeze_vision=True, max_steps=1)
    assert not in_tower(frozen)
    before = copy.deepcopy(vision_tower(frozen.policy).state_dict())
    frozen.train()
    assert logs(frozen)[0]["grad_norm"] > 0
    for name, value in vision_tower(frozen.policy).state_dict().items():
        assert torch.equal(value, before[name]), name

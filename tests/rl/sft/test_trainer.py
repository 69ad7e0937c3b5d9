from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor

from rl.checkpoints import last_complete
from rl.data import MediaProcessor, read_manifest
from rl.data.broken import BadVideos, BrokenClips
from rl.errors import DataError, ObjectiveError, PolicyError, VideoError
from rl.policy.adapters import with_whole_modules
from rl.policy.heads import HeadConfig
from rl.policy.loading import load_policy, make_policy
from rl.policy.protocol import LatentProtocol
from rl.policy.vision import vision_tower
from rl.sft.config import LatentSFTConfig, imagine_probability
from rl.sft.targets import compute_targets
from rl.sft.trainer import LatentSFTTrainer
from rl.trajectory import Sample
from tests.tiny import FAMILIES, Family, save_tiny_checkpoint

PROTOCOL = LatentProtocol(min_length=1, max_length=2)


@pytest.fixture
def samples(clips: Path) -> list[Sample]:
    return read_manifest(clips / "manifest.jsonl")


@pytest.fixture
def build(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> Callable[..., LatentSFTTrainer]:
    def make(
        rows: list[Sample] | None = None,
        protocol: LatentProtocol = PROTOCOL,
        broken: BrokenClips | None = None,
        **args: Any,
    ) -> LatentSFTTrainer:
        torch.manual_seed(0)  # the head and the latent tokens' embeddings are drawn
        processor = AutoProcessor.from_pretrained(tiny_checkpoint)
        policy = make_policy(tiny_checkpoint, processor, protocol, HeadConfig("linear"))
        return LatentSFTTrainer(
            policy,
            config(tmp_path, **args),
            rows or samples,
            MediaProcessor(processor),
            broken=broken,
        )

    return make


def config(folder: Path, **args: Any) -> LatentSFTConfig:
    defaults: dict[str, Any] = {
        "output_dir": str(folder / "sft"),
        "max_steps": 4,
        "per_device_train_batch_size": 2,
        "learning_rate": 3e-3,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
        "seed": 3,
    }
    return LatentSFTConfig(**{**defaults, **args})


def state(trainer: LatentSFTTrainer) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in trainer.policy.state_dict().items()}


def curve(trainer: LatentSFTTrainer, key: str) -> list[float]:
    return [row[key] for row in trainer.state.log_history if key in row]


def test_it_learns_answers_and_latents(build: Callable[..., LatentSFTTrainer]) -> None:
    trainer = build(max_steps=60, per_device_train_batch_size=4, start_at_mean=True)
    tower = [p.clone() for p in vision_tower(trainer.policy).parameters()]
    before = state(trainer)
    trainer.train()
    text, latent = curve(trainer, "loss_text"), curve(trainer, "loss_latent")
    assert latent[0] == pytest.approx(1.0, abs=0.35)  # the constant prediction, on this batch
    assert text[-1] < 0.25 * text[0]
    assert latent[-1] < 0.5 * latent[0]
    assert all(
        torch.equal(a, b)
        for a, b in zip(tower, vision_tower(trainer.policy).parameters(), strict=True)
    )
    moved = {
        name
        for name, value in trainer.policy.state_dict().items()
        if not torch.equal(value, before[name])
    }
    assert {"latent_head.weight", "latent_head.bias", "lm_head.weight"} <= moved


def test_the_loss_is_text_plus_weighted_latent(build: Callable[..., LatentSFTTrainer]) -> None:
    trainer = build(max_steps=1, latent_weight=0.25)
    trainer.train()
    row = trainer.state.log_history[0]
    assert row["loss"] == pytest.approx(row["loss_text"] + 0.25 * row["loss_latent"], rel=1e-5)


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("frozen", [False, True], ids=["tower trained", "tower frozen"])
def test_what_is_trained(
    lora: bool, frozen: bool, tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    processor: Any = AutoProcessor.from_pretrained(tiny_checkpoint)
    policy = make_policy(tiny_checkpoint, processor, PROTOCOL, HeadConfig("linear"))
    model: Any = policy
    if lora:
        adapters = LoraConfig(r=2, target_modules=["q_proj", "v_proj", "qkv"])
        model = get_peft_model(policy, with_whole_modules(adapters, policy))
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    args = config(tmp_path, freeze_vision=frozen, max_steps=2, weight_decay=0.0)
    LatentSFTTrainer(model, args, samples, MediaProcessor(processor)).train()
    moved = {n for n, weight in model.named_parameters() if not torch.equal(weight, before[n])}
    tower = {name for name in moved if ".visual." in name}
    text = {name for name in moved if ".language_model." in name}
    assert bool(tower) == (not frozen) and text
    assert any("latent_head" in name for name in moved)
    assert all("lora_" in name for name in tower | text) == lora
    assert not any(".original_module." in name for name in moved)


@pytest.mark.parametrize(("frozen", "calls"), [(True, 1), (False, 2)])
def test_own_latents_show_a_frozen_tower_its_clips_once(
    frozen: bool, calls: int, build: Callable[..., LatentSFTTrainer]
) -> None:
    trainer = build(max_steps=1, latents="own", freeze_vision=frozen)
    trainer.targets = trainer._find_targets()
    count = []
    tower: Any = vision_tower(trainer.policy)
    tower.blocks[0].register_forward_hook(lambda *_: count.append(1))
    trainer.train()
    assert len(count) == calls
    assert trainer.state.log_history[0]["own_passes"] >= 1
    assert curve(trainer, "latent_neighbours")[0] <= 1.0


def test_without_latents_a_step_teaches_the_answer(build: Callable[..., LatentSFTTrainer]) -> None:
    trainer = build(imagine_share=0.0)
    head = state(trainer)["latent_head.weight"]
    trainer.train()
    assert curve(trainer, "imagined") == [0.0] * 4
    assert not curve(trainer, "loss_latent")
    assert torch.equal(state(trainer)["latent_head.weight"], head)
    assert min(curve(trainer, "loss_text")) < curve(trainer, "loss_text")[0]


def test_rows_without_imagined_frames_are_taught_as_text(
    build: Callable[..., LatentSFTTrainer], samples: list[Sample]
) -> None:
    trainer = build([replace(s, imagine=()) for s in samples], max_steps=1)
    trainer.train()
    assert trainer.targets is not None
    assert trainer.targets.features.shape == (0, 32)


@pytest.mark.parametrize("latents", ["teacher", "own"])
def test_gradient_checkpointing_changes_nothing(
    latents: str, build: Callable[..., LatentSFTTrainer]
) -> None:
    args: dict[str, Any] = {"max_steps": 2, "latents": latents, "freeze_vision": False}
    plain, checkpointed = build(**args), build(**args, gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    for name, value in plain.policy.state_dict().items():
        torch.testing.assert_close(
            checkpointed.policy.state_dict()[name], value, rtol=1e-4, atol=1e-5
        )


@pytest.mark.parametrize("imagining", [(3,), (0, 1), (0, 1, 2, 3)])
def test_the_cut_into_micro_batches_changes_nothing(
    imagining: tuple[int, ...], build: Callable[..., LatentSFTTrainer], samples: list[Sample]
) -> None:
    # Answers of unlike length, so that the mean of the micro-batches' means is another number.
    rows = [
        replace(s, answer=s.answer * (1 + 4 * i), imagine=s.imagine if i in imagining else ())
        for i, s in enumerate(samples)
    ]
    logs, heads = [], []
    for micro in (4, 2, 1):
        trainer = build(
            rows,
            max_steps=1,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=4 // micro,
            max_grad_norm=1e9,
            optim="sgd",
            learning_rate=1.0,
        )
        before = state(trainer)["latent_head.weight"]
        trainer.train()
        logs.append(trainer.state.log_history[0])
        heads.append(before - state(trainer)["latent_head.weight"])  # its gradient
    assert heads[0].norm() > 0.1
    for log, head in zip(logs[1:], heads[1:], strict=True):
        torch.testing.assert_close(head, heads[0], rtol=1e-3, atol=1e-5)
        assert float(head.norm()) == pytest.approx(float(heads[0].norm()), rel=1e-4)
        for key in ("loss", "grad_norm", "loss_text", "loss_latent"):
            assert log[key] == pytest.approx(logs[0][key], rel=1e-4), key
        assert log["imagined"] == logs[0]["imagined"] == len(imagining) / 4
    assert logs[0]["loss"] == pytest.approx(logs[0]["loss_text"] + logs[0]["loss_latent"], rel=1e-4)


def test_the_last_shorter_window_is_a_mean_too(
    build: Callable[..., LatentSFTTrainer], samples: list[Sample]
) -> None:
    # Three rows: an update of two and one of one, in the same order whatever the cut.
    cut = [
        build(
            samples[:3],
            max_steps=-1,
            num_train_epochs=1,
            learning_rate=0.0,
            per_device_train_batch_size=micro,
            gradient_accumulation_steps=2 // micro,
        )
        for micro in (2, 1)
    ]
    for trainer in cut:
        trainer.train()
    for key in ("loss", "grad_norm", "loss_text", "loss_latent"):
        assert len(curve(cut[0], key)) == 2
        assert curve(cut[1], key) == pytest.approx(curve(cut[0], key), rel=1e-4), key


def test_logs_are_means_over_updates(build: Callable[..., LatentSFTTrainer]) -> None:
    args: dict[str, Any] = {"max_steps": 4, "gradient_accumulation_steps": 2, "imagine_share": 0.3}
    each, all_four = build(**args), build(**args, logging_steps=4)
    each.train()
    all_four.train()
    for key in ("loss", "loss_text", "loss_latent", "imagined"):
        values = curve(each, key)
        assert curve(all_four, key) == [pytest.approx(sum(values) / len(values), rel=1e-4)], key
    assert len(set(curve(each, "imagined"))) > 1


def test_bfloat16_autocast(build: Callable[..., LatentSFTTrainer]) -> None:
    exact, rounded = build(max_steps=1), build(max_steps=1, bf16=True)
    exact.train()
    rounded.train()
    for key in ("loss_text", "loss_latent"):
        assert curve(rounded, key)[0] == pytest.approx(curve(exact, key)[0], rel=0.05)


@pytest.mark.parametrize("latents", ["teacher", "own"])
def test_a_resumed_run_ends_where_an_unbroken_one_does(
    latents: str, build: Callable[..., LatentSFTTrainer]
) -> None:
    args: dict[str, Any] = {
        "max_steps": 4,
        "imagine_share": 0.5,
        "latents": latents,
        "save_strategy": "steps",
        "save_steps": 2,
    }
    whole = build(**args)
    whole.train()
    folder = Path(str(whole.args.output_dir))
    assert last_complete(folder) == folder / "checkpoint-4"
    resumed = build(**args)
    resumed.train(resume_from_checkpoint=str(folder / "checkpoint-2"))
    for name, value in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], value), name


def test_a_checkpoint_is_a_policy_directory(
    build: Callable[..., LatentSFTTrainer], tmp_path: Path
) -> None:
    trainer = build(max_steps=1)
    trainer.train()
    trainer.save_model(str(tmp_path / "policy"))
    policy = load_policy(tmp_path / "policy")
    assert policy.protocol == PROTOCOL
    for name, value in trainer.policy.state_dict().items():
        assert torch.equal(policy.state_dict()[name], value), name
    tokens = AutoProcessor.from_pretrained(tmp_path / "policy").tokenizer
    assert tokens.convert_tokens_to_ids(PROTOCOL.filler_token) == policy.latent_tokens.filler


@pytest.mark.parametrize("family", FAMILIES)
def test_targets_are_the_towers_pooled_features(
    family: Family, samples: list[Sample], tmp_path: Path
) -> None:
    save_tiny_checkpoint(tmp_path, family)
    processor = AutoProcessor.from_pretrained(tmp_path)
    policy = make_policy(tmp_path, processor, PROTOCOL)
    media = MediaProcessor(processor)
    done = []
    targets = compute_targets(policy, media, samples, progress=lambda i, n: done.append((i, n)))
    assert done == [(i, 5) for i in range(1, 6)]
    assert targets.offsets == (0, 1, 3, 4, 6)  # one, two, one and two frame pairs
    clip = media.process(media.key(samples[3], samples[3].imagine[0])).inputs
    features = policy.get_video_features(
        clip["pixel_values_videos"], clip["video_grid_thw"]
    ).pooler_output[0]
    expected = features.view(2, 4, -1).mean(1)  # 2 frame pairs of 16x16 px: 4 merged tokens each
    torch.testing.assert_close(targets.of(3), expected, rtol=1e-4, atol=1e-5)
    assert targets.variance == pytest.approx(
        float(targets.features.var(0, correction=0).mean()), rel=1e-5
    )


def test_shares_by_column(samples: list[Sample]) -> None:
    share = {"column": "level", "shares": {"0": 0.75, "1": 0.30, "2": 0.0}}
    assert [imagine_probability(s, share) for s in samples[:3]] == [0.75, 0.30, 0.0]
    assert imagine_probability(samples[3], 0.5) == 0.5
    with pytest.raises(DataError, match="'clip3': column 'level' is 3"):
        imagine_probability(samples[3], share)


def test_a_span_that_the_protocol_forbids_is_refused_before_training(
    build: Callable[..., LatentSFTTrainer],
) -> None:
    with pytest.raises(DataError, match="'clip0': span 1"):
        build(protocol=LatentProtocol(min_length=2, max_length=4))


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"latent_weight": -1.0}, "latent_weight is -1.0"),
        ({"latent_loss": "mae"}, "latent_loss is 'mae'"),
        ({"tokens_per_patch": 0}, "tokens_per_patch is 0"),
        ({"tokens_per_patch": "each"}, "tokens_per_patch is 'each'"),
        ({"latents": "mine"}, "latents is 'mine'"),
        ({"imagine_share": 1.5}, "imagine_share holds 1.5"),
        ({"imagine_share": {"column": "level"}}, "give 'column' and 'shares'"),
        ({"imagine_share": {"column": "level", "shares": {"0": -0.1}}}, "imagine_share holds -0.1"),
    ],
)
def test_settings_that_cannot_work(args: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ObjectiveError, match=message):
        config(tmp_path, **args)


def test_an_identity_head_cannot_start_at_the_mean(
    tiny_checkpoint: Path, samples: list[Sample], tmp_path: Path
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    policy = make_policy(tiny_checkpoint, processor, PROTOCOL)
    trainer = LatentSFTTrainer(
        policy, config(tmp_path, start_at_mean=True), samples, MediaProcessor(processor)
    )
    with pytest.raises(PolicyError, match="start_at_mean needs a latent head"):
        trainer.train()


def test_the_state_file_comes_with_each_checkpoint(build: Callable[..., LatentSFTTrainer]) -> None:
    trainer = build(max_steps=2, save_strategy="steps", save_steps=2)
    trainer.train()
    folder = last_complete(Path(str(trainer.args.output_dir)))
    assert folder is not None
    assert json.loads((folder / "foresight_state.json").read_text())["step"] == 2


@pytest.fixture
def mixed(samples: list[Sample]) -> list[Sample]:
    """Four rows of which the second shows and the last imagines frames that are not there."""
    return [
        samples[0],
        replace(samples[1], frames=(0, 99)),
        samples[2],
        replace(samples[3], imagine=((98, 99),)),
    ]


@pytest.mark.parametrize("bad", [1, 3])
def test_a_bad_video_stops_the_run(
    bad: int, build: Callable[..., LatentSFTTrainer], mixed: list[Sample]
) -> None:
    with pytest.raises(VideoError, match=rf"^sample 'clip{bad}': .*frame 9\d was asked for"):
        build([mixed[0], mixed[bad]]).train()


def test_skipped_rows_count_nowhere(
    build: Callable[..., LatentSFTTrainer], mixed: list[Sample], tmp_path: Path
) -> None:
    args: dict[str, Any] = {"max_steps": 1, "target_cache": str(tmp_path / "targets")}
    four = {**args, "per_device_train_batch_size": 4}
    logs = []
    for rows, given in ((mixed, four), (mixed, four), (mixed[::2], {"max_steps": 1})):
        broken = BrokenClips(tmp_path / "skipped.jsonl", rule="skip")
        trainer = build(rows, broken=broken, **given)
        trainer.train()
        assert trainer.targets is not None
        logs.append(trainer.state.log_history[0])
        logs[-1]["loss_latent"] *= trainer.targets.variance  # of more targets where some are unused
    assert [log["bad_videos"] for log in logs] == [2, 2, 0]  # in the second run from the cache
    for key in ("loss_text", "loss_latent", "imagined"):
        assert logs[0][key] == logs[1][key] == pytest.approx(logs[2][key], rel=1e-5), key
    listed = [json.loads(line) for line in (tmp_path / "skipped.jsonl").read_text().splitlines()]
    assert sorted(row["id"] for row in listed) == ["clip1", "clip3"]


def test_other_rows_take_the_places_of_bad_ones(
    build: Callable[..., LatentSFTTrainer], samples: list[Sample], mixed: list[Sample]
) -> None:
    rows = [*mixed, *(replace(s, id=f"spare{s.id}") for s in samples)]
    bad = {1, 3}

    def cut(rule: BadVideos, *indices: int) -> list[int]:
        trainer = build(rows, broken=BrokenClips(rule=rule))
        trainer.targets = trainer._find_targets()
        return trainer._readable({"index": torch.tensor(indices)}, 0)["index"].tolist()

    assert cut("skip", 0, 1, 2, 3) == [0, 2]
    assert len(cut("skip", 1, 3)) == 1 and not bad & {*cut("skip", 1, 3)}
    found = cut("replace", 0, 1, 2, 3)
    assert found[:2] == [0, 2] and len({*found}) == 4 and not bad & {*found}
    assert cut("replace", 0, 1, 2, 3) == found  # also in a resumed run
    rows = mixed[1::2]
    with pytest.raises(VideoError, match="no clip of 2 rows can be shown"):
        bad = {0, 1}
        cut("replace", 0)

"""Exported folders stand on their own and give back the same policy."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoProcessor

from rl.checkpoints import STATE_FILE
from rl.data.manifest import read_manifest
from rl.data.media import LocalMedia, MediaProcessor
from rl.errors import CheckpointError, PolicyError
from rl.export import export_policy, save_policy, verify, whole_folder
from rl.policy.heads import HeadConfig
from rl.policy.loading import load_policy, make_policy
from rl.policy.protocol import LatentProtocol
from rl.trajectory import RolloutRequest, Sampling
from rollouts.transformers_engine import TransformersEngine


@pytest.fixture(scope="module")
def policy_folder(tmp_path_factory: pytest.TempPathFactory, tiny_checkpoint: Path) -> Path:
    folder = tmp_path_factory.mktemp("policy")
    processor = AutoProcessor.from_pretrained(tiny_checkpoint)
    torch.manual_seed(0)
    policy = make_policy(
        tiny_checkpoint, processor, LatentProtocol(noise_scale=0.2), HeadConfig("mlp", 16)
    )
    save_policy(policy, processor, folder)
    return folder


def text_logits(policy: Any, folder: Path) -> torch.Tensor:
    ids = AutoProcessor.from_pretrained(folder).tokenizer("where?", return_tensors="pt")[
        "input_ids"
    ]
    with torch.no_grad():
        return policy(input_ids=ids, mm_token_type_ids=torch.zeros_like(ids)).logits


def test_policy_folder(policy_folder: Path, tmp_path: Path) -> None:
    target = export_policy(policy_folder, tmp_path / "out")
    names = {p.name for p in target.iterdir()}
    assert {"model.safetensors", "config.json", "generation_config.json"} <= names
    assert {"tokenizer.json", "tokenizer_config.json", "processor_config.json"} <= names
    assert "chat_template.jinja" in names
    settings = json.loads((target / "config.json").read_text())["foresight"]
    assert settings["protocol"]["noise_scale"] == 0.2 and settings["head"]["kind"] == "mlp"
    old, new = load_policy(policy_folder), load_policy(target)
    assert all(torch.equal(v, new.state_dict()[k]) for k, v in old.state_dict().items())


def test_fresh_process_gives_the_same_logits(policy_folder: Path, tmp_path: Path) -> None:
    target = export_policy(policy_folder, tmp_path / "out")
    script = (
        "import sys, torch\nfrom rl import load_policy\nfrom transformers import "
        "AutoProcessor\ntorch.set_num_threads(1)\npolicy = load_policy(sys.argv[1])\nids = "
        "AutoProcessor.from_pretrained(sys.argv[1]).tokenizer('where?', "
        "return_tensors='pt')['input_ids']\nwith torch.no_grad():\n    out = policy(input_ids=ids, "
        "mm_token_type_ids=torch.zeros_like(ids)).logits\ntorch.save(out, sys.argv[2])"
    )
    there = tmp_path / "logits.pt"
    subprocess.run([sys.executable, "-c", script, str(target), str(there)], check=True)
    here = text_logits(load_policy(policy_folder), policy_folder)
    assert (torch.load(there) - here).abs().max() <= 1e-6


ANSWER = """
import pickle, sys
from pathlib import Path
import torch
from rl import Sampling, load_policy, read_manifest
from transformers import AutoProcessor
from rl.data.media import LocalMedia, MediaProcessor
from rl.trajectory import RolloutRequest
from rollouts.transformers_engine import TransformersEngine
torch.set_num_threads(1)
folder, manifest, out = sys.argv[1:]
media = MediaProcessor(AutoProcessor.from_pretrained(folder))
engine = TransformersEngine(load_policy(folder), media, LocalMedia(media, 8))
greedy = Sampling(temperature=0.0, max_new_tokens=24, imagine="always")
groups = engine.generate([RolloutRequest(s, (0,), greedy) for s in read_manifest(manifest)])
Path(out).write_bytes(pickle.dumps([g.trajectories[0] for g in groups]))
"""


def test_fresh_process_gives_the_same_answers(
    policy_folder: Path, tmp_path: Path, clips: Path
) -> None:
    target = export_policy(policy_folder, tmp_path / "out")
    manifest, there = clips / "manifest.jsonl", tmp_path / "answers"
    command = [sys.executable, "-c", ANSWER, str(target), str(manifest), str(there)]
    subprocess.run(command, check=True)
    media = MediaProcessor(AutoProcessor.from_pretrained(policy_folder))
    engine = TransformersEngine(load_policy(policy_folder), media, LocalMedia(media, 8))
    greedy = Sampling(temperature=0.0, max_new_tokens=24, imagine="always")
    groups = engine.generate([RolloutRequest(s, (0,), greedy) for s in read_manifest(manifest)])
    for group, theirs in zip(groups, pickle.loads(there.read_bytes()), strict=True):
        ours = group.trajectories[0]
        assert ours.text == theirs.text and ours.imagined
        torch.testing.assert_close(ours.latents, theirs.latents, atol=1e-6, rtol=0)


def test_lora_checkpoint_is_merged_with_its_head(policy_folder: Path, tmp_path: Path) -> None:
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], modules_to_save=["latent_head"])
    adapted: Any = get_peft_model(load_policy(policy_folder), config)
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if parameter.requires_grad:
                parameter.copy_(torch.randn_like(parameter) * 0.1)
                assert "lora_" in name or "latent_head" in name
    checkpoint = tmp_path / "checkpoints" / "checkpoint-3"
    adapted.save_pretrained(checkpoint)
    AutoProcessor.from_pretrained(policy_folder).save_pretrained(checkpoint)
    (checkpoint / STATE_FILE).write_text('{"step": 3}')
    target = export_policy(tmp_path, tmp_path / "out")  # found as a run's last checkpoint
    exported, base = load_policy(target), load_policy(policy_folder)
    gap = text_logits(exported, target) - text_logits(adapted, target)
    assert gap.abs().max() < 1e-4  # merging rounds
    assert (text_logits(exported, target) - text_logits(base, target)).abs().max() > 1e-2
    trained = adapted.get_base_model().latent_head.modules_to_save["default"].state_dict()
    assert all(torch.equal(v, trained[k]) for k, v in exported.latent_head.state_dict().items())


def test_lora_base_that_moved(policy_folder: Path, tmp_path: Path) -> None:
    adapted: Any = get_peft_model(
        load_policy(policy_folder), LoraConfig(r=2, target_modules=["q_proj"])
    )
    adapted.save_pretrained(tmp_path / "adapters")
    AutoProcessor.from_pretrained(policy_folder).save_pretrained(tmp_path / "adapters")
    config = tmp_path / "adapters" / "adapter_config.json"
    values = json.loads(config.read_text()) | {"base_model_name_or_path": str(tmp_path / "gone")}
    config.write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match=r"gone.*--base"):
        export_policy(tmp_path / "adapters", tmp_path / "out")
    assert export_policy(tmp_path / "adapters", tmp_path / "out", base=policy_folder).is_dir()


def test_bfloat16(policy_folder: Path, tmp_path: Path) -> None:
    target = export_policy(policy_folder, tmp_path / "out", dtype=torch.bfloat16)
    assert load_policy(target, dtype="auto").dtype == torch.bfloat16
    assert json.loads((target / "config.json").read_text())["dtype"] == "bfloat16"


def test_taken_target_is_left_alone(policy_folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "out"
    target.mkdir()
    (target / "mine.txt").write_text("keep")
    with pytest.raises(CheckpointError, match="is not empty"):
        export_policy(policy_folder, target)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in target.iterdir()] == ["mine.txt"]
    export_policy(policy_folder, target, overwrite=True)
    assert not (target / "mine.txt").exists() and (target / "config.json").is_file()
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_nothing_half_written_is_left(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="halfway"), whole_folder(tmp_path / "out") as draft:
        (draft / "file").write_text("x")
        raise RuntimeError("halfway")
    assert list(tmp_path.iterdir()) == []


def test_verify_sees_other_weights(policy_folder: Path) -> None:
    policy = load_policy(policy_folder)
    verify(policy, policy_folder)
    with torch.no_grad():
        policy.latent_head[1].weight[0, 0] += 1e-3
    with pytest.raises(CheckpointError, match=r"1 parameters changed.*latent_head\.1\.weight"):
        verify(policy, policy_folder)


def test_verify_sees_other_behaviour(policy_folder: Path) -> None:
    """Equal parameters that compute something else: here through an epsilon of the config."""
    policy = load_policy(policy_folder)
    policy.base_model.language_model.norm.variance_epsilon = 1e-2
    with pytest.raises(CheckpointError, match="outputs differ by"):
        verify(policy, policy_folder)


def test_sources_that_cannot_be_used(
    policy_folder: Path, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    target = tmp_path / "out"
    with pytest.raises(CheckpointError, match="no such folder"):
        export_policy(tmp_path / "none", target)
    (tmp_path / "empty").mkdir()
    with pytest.raises(CheckpointError, match="neither a policy"):
        export_policy(tmp_path / "empty", target)
    with pytest.raises(PolicyError, match="holds a plain model"):
        export_policy(tiny_checkpoint, target)
    broken = tmp_path / "checkpoint-4"
    save_policy(load_policy(policy_folder), AutoProcessor.from_pretrained(policy_folder), broken)
    with pytest.raises(CheckpointError, match="not written to its end"):
        export_policy(broken, target)
    assert not target.exists()


def folder_with(path: Path, text: str) -> Path:
    path.mkdir()
    (path / "file").write_text(text)
    return path


def gone_process() -> int:
    process = subprocess.Popen([sys.executable, "-c", ""])
    process.wait()
    return process.pid


def test_leftovers_of_killed_processes_are_cleared_away(tmp_path: Path) -> None:
    gone = gone_process()
    for name in (f".out.part-{gone}", f".out.old-{gone}", f".out.part-{os.getpid()}"):
        folder_with(tmp_path / name, "left over")
    kept = {f".out.part-{os.getppid()}", f".other.part-{gone}", f".out.part-{gone}x", ".out"}
    for name in kept:
        folder_with(tmp_path / name, "not ours to delete")
    folder_with(tmp_path / "out", "old")
    with whole_folder(tmp_path / "out", overwrite=True) as draft:
        (draft / "file").write_text("new")
    assert {p.name for p in tmp_path.iterdir()} == kept | {"out"}
    assert (tmp_path / "out" / "file").read_text() == "new"


def test_folder_moved_away_by_a_killed_process_is_put_back(tmp_path: Path) -> None:
    gone = gone_process()
    folder_with(tmp_path / f".out.old-{gone}", "old")
    folder_with(tmp_path / f".out.part-{gone}", "half")
    with pytest.raises(CheckpointError, match="is not empty"), whole_folder(tmp_path / "out"):
        pass
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert (tmp_path / "out" / "file").read_text() == "old"

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from recipes.quickstart import texts
from recipes.quickstart.checkpoint import make_checkpoint
from recipes.quickstart.perception import Perception, pretrain
from recipes.quickstart.tiles import TILES, ask
from recipes.quickstart.world import MOVES, OBSERVED, STATES, write_world
from recipes.quickstart.worlds import Words
from rl.data import MediaProcessor, read_manifest
from rl.errors import CheckpointError
from rl.policy.heads import HeadConfig
from rl.policy.loading import load_policy, make_policy
from rl.policy.protocol import LatentProtocol
from rl.trajectory import Sample

TINY = Perception(steps=4, batch_size=4, checkpoint_every=2, log_every=1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("perception")
    make_checkpoint(folder / "checkpoint", seed=0)
    write_world(folder, "train", 12, seed=0)
    return folder


@pytest.fixture
def samples(folder: Path) -> list[Sample]:
    return read_manifest(folder / "train.jsonl")


def start(folder: Path) -> tuple[Any, MediaProcessor]:
    torch.manual_seed(0)  # the head and the latent tokens' embeddings are drawn
    processor = AutoProcessor.from_pretrained(folder / "checkpoint")
    protocol = LatentProtocol(min_length=7, max_length=7, max_spans=1)
    policy = make_policy(folder / "checkpoint", processor, protocol, HeadConfig("linear"))
    return policy, MediaProcessor(processor)


def test_questions_and_answers_are_true(folder: Path, samples: list[Sample]) -> None:
    policy, media = start(folder)
    words = Words.of(media.tokenizer, policy.latent_tokens.filler, TILES)
    boards = torch.tensor([s.extra["board"] for s in samples])
    paths = torch.tensor([s.extra["path"] for s in samples])
    cells = paths[..., 0] * texts.SIZE + paths[..., 1]
    generator = torch.Generator().manual_seed(0)
    facts = {"boards": boards.flatten(1), "paths": cells}
    questions = ask(facts, words, Perception(), generator)
    assert questions.tasks == ("where", *["tile"] * 3, *["read", "next"] * 2)
    assert int(questions.states.max()) < STATES - 1
    for row, sample in enumerate(samples):
        said = (
            media.tokenizer.decode(questions.ids[row]).replace("<|latent|>", " <|latent|>").split()
        )
        board, path = sample.extra["board"], sample.extra["path"]
        assert said[:2] == ["where", texts.cell(*path[OBSERVED - 1])]
        for tile in range(3):
            task, cell, colour = said[2 + 3 * tile : 5 + 3 * tile]
            here = board[int(cell[1]) - 1][int(cell[3]) - 1]
            assert (task, colour) == ("tile", texts.COLOURS[here])
        for read, state in enumerate(questions.states[row].tolist()):
            six = said[11 + 6 * read : 17 + 6 * read]
            r, c = path[state]
            moved = [(p + m) % texts.SIZE for p, m in zip((r, c), MOVES[board[r][c]], strict=True)]
            latent = policy.protocol.filler_token
            assert six == ["read", latent, texts.cell(r, c), "next", latent, texts.cell(*moved)]
        asked = [said[i] for i in questions.asked.tolist()]
        assert media.tokenizer.decode(questions.ids[row][questions.asked]).split() == asked


def test_the_loss_falls_and_the_tower_learns(
    folder: Path, samples: list[Sample], tmp_path: Path
) -> None:
    policy, media = start(folder)
    before = policy.model.visual.pos_embed.weight.clone()
    history = pretrain(policy, media, samples, tmp_path, replace(TINY, steps=30, warmup=5))
    assert set(history[0]) == {"step", "loss", *TILES.tasks}
    assert history[-1]["loss"] < 0.6 * history[0]["loss"]
    assert not torch.equal(policy.model.visual.pos_embed.weight, before)
    loaded = load_policy(tmp_path)
    for name, value in policy.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name


def test_a_killed_run_ends_where_an_unbroken_one_does(
    folder: Path,
    samples: list[Sample],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole, media = start(folder)
    expected = pretrain(whole, media, samples, tmp_path / "whole", TINY)

    killed, media = start(folder)
    rate = Perception.rate

    def rate_until_killed(config: Perception, step: int) -> float:
        if step == 3:
            raise KeyboardInterrupt
        return rate(config, step)

    monkeypatch.setattr(Perception, "rate", rate_until_killed)
    with pytest.raises(KeyboardInterrupt):
        pretrain(killed, media, samples, tmp_path / "killed", TINY)
    monkeypatch.undo()
    assert not (tmp_path / "killed" / "config.json").exists()

    resumed, media = start(folder)
    capsys.readouterr()
    assert pretrain(resumed, media, samples, tmp_path / "killed", TINY) == expected
    assert "resuming at step 2" in capsys.readouterr().out
    for name, value in whole.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], value), name


def test_a_finished_run_is_only_loaded(
    folder: Path, samples: list[Sample], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    policy, media = start(folder)
    history = pretrain(policy, media, samples, tmp_path, TINY)
    again, media = start(folder)
    capsys.readouterr()
    assert pretrain(again, media, samples, tmp_path, TINY) == history
    assert "finished before" in capsys.readouterr().out
    for name, value in policy.state_dict().items():
        assert torch.equal(again.state_dict()[name], value), name


def test_other_settings_are_refused(folder: Path, samples: list[Sample], tmp_path: Path) -> None:
    policy, media = start(folder)
    pretrain(policy, media, samples, tmp_path, TINY)
    with pytest.raises(CheckpointError, match="other settings"):
        pretrain(policy, media, samples, tmp_path, replace(TINY, seed=1))

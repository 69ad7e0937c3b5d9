"""Targets on disk: who may read them, and what happens to files that are of others or broken."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoProcessor

from rl.data import MediaProcessor, read_manifest
from rl.errors import DataError, VideoError
from rl.policy.loading import make_policy
from rl.policy.protocol import LatentProtocol
from rl.policy.vision import vision_tower
from rl.sft.target_cache import cached_targets
from rl.sft.targets import Targets
from tests.tiny import moving_square, write_clip


class World:
    """A policy whose tower counts its calls, rows, and a cache file."""

    def __init__(self, checkpoint: Path, clips: Path, folder: Path) -> None:
        processor: Any = AutoProcessor.from_pretrained(checkpoint)
        self.policy = make_policy(checkpoint, processor, LatentProtocol(max_length=4))
        self.media = MediaProcessor(processor)
        self.rows = read_manifest(clips / "manifest.jsonl")
        self.path = folder / "deep" / "targets.safetensors"
        self.calls, self.told = 0, []
        vision_tower(self.policy).register_forward_hook(self._count)

    def _count(self, *_: Any) -> None:
        self.calls += 1

    def run(self, **asked: Any) -> Targets:
        self.calls, self.told = 0, []
        return cached_targets(
            self.path, self.policy, self.media, self.rows, **asked, tell=self.told.append
        )


@pytest.fixture
def world(tiny_checkpoint: Path, clips: Path, tmp_path: Path) -> World:
    return World(tiny_checkpoint, clips, tmp_path)


def same(a: Targets, b: Targets) -> bool:
    return torch.equal(a.features, b.features) and (a.lengths, a.variance) == (
        b.lengths,
        b.variance,
    )


@pytest.mark.parametrize("tokens", [1, "all"])
def test_a_second_run_does_not_use_the_tower(tokens: Any, world: World) -> None:
    first = world.run(tokens_per_patch=tokens)
    assert world.calls == 1 and len(first.features)
    again = world.run(tokens_per_patch=tokens)
    assert world.calls == 0 and world.told == [] and same(first, again)
    assert [p.name for p in world.path.parent.iterdir()] == ["targets.safetensors"]


def test_targets_of_another_origin_are_replaced(world: World, tmp_path: Path) -> None:
    world.run()

    def recomputed(*changed: str, **asked: Any) -> None:
        found = world.run(**asked)
        message = f"it is of other targets ({' and '.join(changed)} changed); computing"
        assert world.calls == 1 and message in world.told[0]
        assert same(world.run(**asked), found) and world.calls == 0

    recomputed("settings", tokens_per_patch=2)
    with torch.no_grad():
        next(vision_tower(world.policy).parameters()).mul_(1.5)
    recomputed("tower", tokens_per_patch=2)
    world.rows[0] = replace(world.rows[0], imagine=((1, 2),))
    recomputed("rows", "settings")
    copy = write_clip(tmp_path / "own.mp4", moving_square(4, seed=1))
    world.rows[0] = replace(world.rows[0], video=str(copy))
    recomputed("rows")
    write_clip(copy, moving_square(4, seed=2, size=24))  # another film under the same name
    recomputed("rows")
    with torch.no_grad():  # what is no part of the tower does not matter
        world.policy.get_output_embeddings().weight.mul_(2.0)
    world.run()
    assert world.calls == 0


def test_damaged_files_are_replaced(world: World) -> None:
    whole = world.run()
    content = world.path.read_bytes()
    flipped = bytearray(content)
    flipped[-5] ^= 1
    for broken, why in (
        (content[:-10], "damaged"),
        (b"", "damaged"),
        (bytes(flipped), "its checksum is wrong"),
    ):
        world.path.write_bytes(broken)
        assert same(world.run(), whole) and world.calls == 1
        assert why in world.told[0] and str(world.path) in world.told[0]
        assert same(world.run(), whole) and world.calls == 0


def test_a_video_that_took_too_long_is_not_remembered(world: World) -> None:
    hasty = MediaProcessor(world.media.processor, decode_timeout_s=1e-6)
    patient, world.media, world.rows = world.media, hasty, world.rows[:1]
    lost: list[str] = []
    world.run(on_broken=lambda sample, _: lost.append(sample.id))
    assert lost == ["clip0"] and not world.path.exists()
    assert "not written, because 1 videos took too long, such as 'clip0'" in world.told[0]
    world.media = patient
    assert len(world.run().features) and world.path.exists()


def test_what_cannot_be_read_says_where_that_was_found(world: World, tmp_path: Path) -> None:
    broken = tmp_path / "broken.mp4"
    broken.write_bytes(b"no video")
    world.rows = [replace(world.rows[0], video=str(broken)), world.rows[1]]
    world.run(on_broken=lambda *_: None)
    with pytest.raises(
        VideoError, match=r"broken\.mp4: .*so .*targets\.safetensors says; delete it"
    ):
        world.run()


def test_a_folder_is_refused(world: World) -> None:
    world.path.mkdir(parents=True)
    with pytest.raises(DataError, match="is a folder; name a file"):
        world.run()

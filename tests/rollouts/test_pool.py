"""The pool on a real local Ray, with real workers."""

import dataclasses
import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rl.data.media import MediaProcessor
from rl.errors import RolloutError, SyncError, VideoError
from rl.weights import weight_update
from rollouts.pool import RolloutPool, _split
from rollouts.worker import EngineSpec
from tests.latent import engine_for, requests_for, square_samples, thinking_policy


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pool")
    policy, processor = thinking_policy(folder / "base")
    policy.save_pretrained(folder / "policy")
    processor.save_pretrained(folder / "policy")
    return folder, policy, processor, square_samples(folder / "clips")


@pytest.fixture(scope="module")
def pool(world):
    folder, _, processor, _ = world
    with RolloutPool(EngineSpec(str(folder / "policy")), MediaProcessor(processor), 2) as pool:
        yield pool


def test_a_fleet_samples_what_one_engine_samples(pool, world):
    _, policy, processor, samples = world
    requests = requests_for(samples, 3)
    expected = engine_for(policy, processor).generate(requests)
    found = pool.generate(requests)
    assert [g.sample.id for g in found] == [s.id for s in samples]
    for ours, theirs in zip(found, expected, strict=True):
        for a, b in zip(ours, theirs, strict=True):
            assert a.completion_ids.tolist() == b.completion_ids.tolist()
            np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)
    work = [w["trajectories"] for w in pool.health()["workers"].values()]
    assert work == [6, 6]


def test_the_trainer_reads_the_workers_clips(pool, world):
    _, _, processor, samples = world
    media = MediaProcessor(processor)
    key = media.key(samples[3])
    ours, theirs = media.process(key), pool.media.get(key)
    assert (ours.placeholder, ours.timestamps) == (theirs.placeholder, theirs.timestamps)
    for name, tensor in ours.inputs.items():
        assert (tensor == theirs.inputs[name]).all()


def test_weights_reach_every_worker(pool, world):
    _, policy, _, samples = world
    assert pool.update_weights(weight_update(policy, 5)) == 5
    assert {w["version"] for w in pool.health()["workers"].values()} == {5}
    assert {t.policy_version for g in pool.generate(requests_for(samples, 2)) for t in g} == {5}


def test_damage_on_the_way_is_reported(pool, world):
    update = dataclasses.replace(weight_update(world[1], 6), checksum="0")
    with pytest.raises(RolloutError, match="version 6 arrived damaged"):
        pool.update_weights(update)


def test_a_broken_clip_is_an_error_of_its_own_kind(pool, world):
    folder, _, _, samples = world
    (folder / "noise.mp4").write_bytes(b"\x00" * 64)
    broken = dataclasses.replace(samples[1], id="row-3", video=str(folder / "noise.mp4"))
    with pytest.raises(VideoError, match=r"'row-3'.*noise\.mp4"):
        pool.generate(requests_for([samples[0], broken]))
    assert len(pool.generate(requests_for(samples[:2]))) == 2  # and the pool goes on


def test_a_broken_clip_takes_no_others_with_it(world):
    folder, _, processor, samples = world
    path = folder / "late.mp4"
    path.write_bytes(b"\x00" * 64)
    broken = dataclasses.replace(samples[1], id="row-7", video=str(path))
    spec = EngineSpec(str(folder / "policy"))
    with RolloutPool(spec, MediaProcessor(processor), 1, cpus_per_worker=0) as pool:
        with pytest.raises(VideoError, match=r"'row-7'.*late\.mp4"):
            pool.generate(requests_for([samples[0], broken, samples[2]]))
        assert len(pool.generate(requests_for([samples[0], samples[2]]))) == 2
        path.write_bytes(Path(samples[1].video).read_bytes())  # mended
        assert len(pool.generate(requests_for([broken]))) == 1


def test_more_workers_than_requests(pool, world):
    assert len(pool.generate(requests_for(world[3][:1], 2))) == 1


def test_what_ray_does_not_have_is_refused_at_once(pool, world):
    folder, _, processor, _ = world
    spec = EngineSpec(str(folder / "policy"))
    with pytest.raises(RolloutError, match=r"8 workers with 1000 CPUs.*rollouts\.workers"):
        RolloutPool(spec, MediaProcessor(processor), 8, cpus_per_worker=1000)


def test_split_is_even_and_complete():
    class Request:
        def __init__(self, n: int) -> None:
            self.seeds = range(n)

    requests = [Request(n) for n in (4, 4, 4, 4, 8)]
    parts = _split(requests, 3)  # type: ignore[arg-type]
    assert [list(range(*p.indices(5))) for p in parts] == [[0, 1], [2, 3], [4]]
    alone: Any = requests[:1]
    assert [p.stop - p.start for p in _split(alone, 3)] == [1, 0, 0]


def test_a_late_worker_is_named(world):
    folder, policy, processor, _ = world
    spec = EngineSpec(str(folder / "policy"))
    with RolloutPool(spec, MediaProcessor(processor), 1, cpus_per_worker=0) as pool:
        pid = pool.health()["workers"][0]["pid"]
        pool._timeout = 1.0
        os.kill(pid, signal.SIGSTOP)
        try:
            with pytest.raises(SyncError, match=r"workers \[0\].*version 2.*timeout_s"):
                pool.update_weights(weight_update(policy, 2))
        finally:
            os.kill(pid, signal.SIGCONT)
        pool._timeout = 60.0
        os.kill(pid, signal.SIGKILL)
        time.sleep(0.5)
        with pytest.raises(RolloutError, match="worker 0 died"):
            pool.health()

"""What it costs to have clips decoded in a process of its own and processed: prints a table of
clips a second, and of what raw decord does at the same size.

Raw decord opens each file in this process and takes the same frames out of it, nothing else. Ours
is all that a rollout worker does with a new clip: the decoding process, which also describes it,
shared memory, the video processor. While one clip is processed the next is decoded, so a second
core must be free: on a busy machine the clips a second mean little. The CPU times say what they
would be on a free one: raw decord's divided by the larger of ours, those of the decoding process
and of this one. All take turns and the best of the rounds counts, as other work only ever slows
down. The clips are H.264 with noise, made here.

The second table counts the clips that were decoded for a step of groups of several sizes.

python -m benchmarks.video
python -m benchmarks.video --clips 4 --rounds 3 --sizes 224x224
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

import av
import decord
import numpy as np
import torch
from transformers import Qwen2VLImageProcessor, Qwen3VLProcessor, Qwen3VLVideoProcessor

from rl.data import decoding, video
from rl.data.frames import FrameRule
from rl.data.media import MediaProcessor
from rl.data.video import read_each
from rl.trajectory import MediaKey, Sample
from tests.tiny import CHAT_TEMPLATE, tiny_tokenizer

FPS, FRAMES = 24, 16


def write_clip(path: Path, height: int, width: int, seconds: int, seed: int) -> Path:
    """A picture that drifts under noise: what an encoder has to work for."""
    rng = np.random.default_rng(seed)
    picture = rng.integers(0, 255, (height // 8 + 40, width // 8 + 40, 3), dtype=np.uint8)
    picture = picture.repeat(8, axis=0).repeat(8, axis=1)
    with av.open(str(path), "w") as container:
        stream: Any = container.add_stream("libx264", rate=FPS, options={"preset": "veryfast"})
        stream.height, stream.width, stream.pix_fmt = height, width, "yuv420p"
        for i in range(seconds * FPS):
            frame = picture[i % 300 : i % 300 + height, 2 * i % 300 : 2 * i % 300 + width]
            noise = rng.integers(0, 24, (height, width, 1), dtype=np.uint8)
            pixels = np.ascontiguousarray(frame // 2 + noise)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def processor() -> MediaProcessor:
    """Qwen3-VL's processor as Future-L1 sets it: 4 to 64 tokens a frame."""
    pixels = {"shortest_edge": 4 * 32 * 32 * FRAMES, "longest_edge": 64 * 32 * 32 * FRAMES}
    made = Qwen3VLProcessor(
        image_processor=Qwen2VLImageProcessor(patch_size=16),
        video_processor=Qwen3VLVideoProcessor(
            size=pixels, patch_size=16, cap_pixels_per_frame=False
        ),
        tokenizer=tiny_tokenizer(),
        chat_template=CHAT_TEMPLATE,
    )
    return MediaProcessor(made, FrameRule(FRAMES))


def raw(keys: Sequence[MediaKey]) -> None:
    for key in keys:
        decord.VideoReader(key.path, num_threads=1).get_batch(list(key.frames)).asnumpy()


def forget() -> None:
    """Have clips described anew, as a worker has each clip that it meets for the first time."""
    video._infos._values.clear()


def decoded(keys: Sequence[MediaKey]) -> None:
    forget()
    for _ in read_each([key.path for key in keys], keys[0].frames):
        pass


def timed(jobs: Sequence[Callable[[], object]], clips: int, rounds: int) -> np.ndarray:
    """For each job the seconds a clip: on the wall, of this process's CPU time, and of the decoding
    one's; each the best of `rounds`.
    """
    best = np.full((len(jobs), 3), np.inf)
    for _ in range(rounds):
        for i, job in enumerate(jobs):
            before = clock()
            job()
            best[i] = np.minimum(best[i], (clock() - before) / clips)
    return best


def clock() -> np.ndarray:
    return np.array([time.perf_counter(), time.process_time(), decoder_seconds()])


def decoder_seconds() -> float:
    """CPU time of the decoding process."""
    process = decoding.decoder()._process
    assert process is not None
    user, system = Path(f"/proc/{process.pid}/stat").read_text().split()[13:15]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def measure(size: str, clips: int, seconds: int, rounds: int, folder: Path) -> np.ndarray:
    """As `timed`: of raw decord, decoded in the other process, and decoded and processed."""
    height, width = (int(side) for side in size.split("x"))
    media = processor()
    files = [
        write_clip(folder / f"{size}_{i}.mp4", height, width, seconds, i) for i in range(clips)
    ]
    keys = [media.key(Sample(file.name, str(file), "?", "A")) for file in files]

    def processed() -> None:
        forget()
        for key, ahead in zip_longest(keys, keys[1:]):
            media.process(key, ahead)

    return timed([lambda: raw(keys), lambda: decoded(keys), processed], clips, rounds)


def count_decoded(folder: Path) -> None:
    """How many clips a pool decodes for a step of 4 prompts."""
    from rollouts.pool import RolloutPool
    from rollouts.worker import EngineSpec
    from tests.latent import requests_for, square_samples, thinking_policy

    policy, made = thinking_policy(folder / "base")
    policy.save_pretrained(folder / "policy")
    made.save_pretrained(folder / "policy")
    samples = square_samples(folder / "clips")[:4]
    print(f"\n{'G':>4} {'clips decoded':>14} {'trajectories':>13}")
    for size in (1, 4, 8):
        with RolloutPool(EngineSpec(str(folder / "policy")), MediaProcessor(made), 1) as pool:
            groups = pool.generate(requests_for(samples, size))
            for group in groups:
                pool.media.get(group.trajectories[0].media[0])  # as the trainer does
            (worker,) = pool.health()["workers"].values()
        print(f"{size:>4} {worker['clips_decoded']:>14} {sum(map(len, groups)):>13}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--sizes", nargs="+", default=["240x320", "448x448", "720x1280"])
    parser.add_argument("--clips", type=int, default=8)
    parser.add_argument("--seconds", type=int, default=8, help="length of a clip")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1, help="torch's, for the processor")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    print(f"{os.cpu_count()} CPU cores, {arguments.threads} torch threads")
    print(f"{'':>10} {'clips a second':^37} {'CPU ms a clip':^30} {'of raw, if':>10}")
    print(
        f"{'pixels':>10} {'raw':>7} {'decoded':>8} {'processed':>10} {'of raw':>8} "
        f"{'raw':>10} {'decoding':>9} {'here':>8} {'free':>10}"
    )
    with tempfile.TemporaryDirectory() as folder:
        for size in arguments.sizes:
            found = measure(
                size, arguments.clips, arguments.seconds, arguments.rounds, Path(folder)
            )
            raw_wall, decoded_wall, wall = found[:, 0]
            cpu, (here, there) = found[0, 1], found[2, 1:]
            print(
                f"{size:>10} {1 / raw_wall:>7.2f} {1 / decoded_wall:>8.2f} {1 / wall:>10.2f} "
                f"{raw_wall / wall:>8.2f} {1e3 * cpu:>10.1f} {1e3 * there:>9.1f} "
                f"{1e3 * here:>8.1f} {cpu / max(here, there):>10.2f}",
                flush=True,
            )
        count_decoded(Path(folder))


if __name__ == "__main__":
    main()

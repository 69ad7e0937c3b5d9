"""What latent self-forcing takes in memory and time: by latents, and by steps back-propagated.

A policy of random weights, in the shape of a Qwen3-VL, makes the K latents of a row itself and is
trained on what follows them; gradients flow back through the last m (`rl.sft.self_forcing`).

*Kept* is what the forward pass leaves for the backward pass: the bytes of all tensors saved for
gradients, each storage once, weights excluded. *Peak* (--peak) is the most that all tensors take
during both passes beyond what was there before, weights and gradients among it. Neither is what an
allocator holds. Seconds are those of both passes, medians over repeats in turns.

Beside it stands the loop that a reader would write first: the whole row anew for each latent,
without a cache; its passes for constants take no gradients either. Both give the same log-probs,
which is checked. Prompts of one length need no mask; rows of two lengths do, and with a mask
attention repeats keys and values once a query head.

python -m benchmarks.self_forcing
python -m benchmarks.self_forcing --model 100m --latents 12 --frames 8 --naive 0
"""

from __future__ import annotations

import argparse
import gc
import logging
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import Any

import torch

from benchmarks.shapes import SIZES, Size, config_of, machine
from benchmarks.update_meter import CLOCKS, peak_bytes
from rl.interfaces import Media, MediaSource
from rl.memory import ExampleMedia, MemorySetting, example_trajectory, random_policy
from rl.scoring import collate
from rl.sft.self_forcing import diversity_loss, self_forced
from rl.trajectory import MediaKey, Trajectory

SIDE = 8  # patches along a side of a frame, merged two by two
TEXT = 60  # tokens of a prompt beside its video
ANSWER = 8  # tokens behind the latents and their end
ENOUGH = 10.0  # seconds, after which a case is not repeated again
MIB = 2**20


@dataclass(frozen=True)
class Case:
    """Rows of prompts with so many frame pairs, `count` latents, `steps` of them with gradients;
    by self-forcing, or by the naive loop.
    """

    frames: tuple[int, ...]
    count: int
    steps: int
    naive: bool = False


@dataclass
class Found:
    """What was measured of a case: bytes, and the seconds of each repeat."""

    prompt: int  # tokens of the longest
    kept: int
    peak: int | None
    seconds: list[float]


class Clips:
    """A `MediaSource` of black clips, one for each number of frame pairs, by the key's path."""

    def __init__(self, settings: dict[str, MemorySetting], config: Any) -> None:
        self._clips = {name: ExampleMedia(s, config) for name, s in settings.items()}

    def get(self, key: MediaKey) -> Media:
        return self._clips[key.path].get(key)


def setting_of(config: Any, frames: int, latents: int) -> MemorySetting:
    """One row with a prompt of so many frame pairs."""
    grid, length = (frames, SIDE, SIDE), latents + 2 + ANSWER
    return MemorySetting(config, grid, TEXT, 1, completion_tokens=length, latents=latents)


class Work:
    """One forward pass of a case, and then its backward pass."""

    def __init__(self, policy: Any, case: Case, config: Any) -> None:
        self.policy, self.case = policy, case
        settings = {str(n): setting_of(config, n, case.count) for n in case.frames}
        self.media: MediaSource = Clips(settings, policy.config)
        self.rows = [example_trajectory(policy, s, sample_id=name) for name, s in settings.items()]

    def forward(self) -> tuple[torch.Tensor, torch.Tensor]:
        """The loss, and the log-probs that it consists of."""
        case = self.case
        if case.naive:
            logprobs, latents = naive(self.policy, self.rows, self.media, case.steps)
            return diversity_loss(latents) - logprobs.sum(), logprobs
        found = self_forced(self.policy, self.rows, self.media, steps=case.steps)
        logprobs = found.scores.logprobs
        return found.align + found.diversity - logprobs.sum(), logprobs

    def both(self) -> None:
        loss, _ = self.forward()
        loss.backward()

    def measure(self, clock: Callable[[], float]) -> tuple[int, float, torch.Tensor]:
        """Bytes kept, the seconds of both passes, and the log-probs."""
        gc.collect()
        saved = Saved()
        start = clock()
        with saved.noting():
            loss, logprobs = self.forward()
        forward = clock() - start
        gc.collect()
        kept = saved.bytes_beside([*self.policy.parameters(), *self.policy.buffers()])
        start = clock()
        loss.backward()
        return kept, forward + clock() - start, logprobs.detach()


class Saved:
    """Notes the tensors that passes save for gradients, and forgets them with the graph."""

    class _Holder:
        def __init__(self, tensor: torch.Tensor) -> None:
            self.tensor = tensor

    def __init__(self) -> None:
        self._held: weakref.WeakSet[Saved._Holder] = weakref.WeakSet()

    def noting(self) -> Any:
        """A context manager."""

        def pack(tensor: torch.Tensor) -> Saved._Holder:
            holder = Saved._Holder(tensor.detach())  # an output would hold its own graph
            self._held.add(holder)
            return holder

        return torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor)

    def bytes_beside(self, others: Sequence[torch.Tensor]) -> int:
        """Of the storages that are still held, but for those of `others`."""
        known = {tensor.untyped_storage().data_ptr() for tensor in others}
        storages = [holder.tensor.untyped_storage() for holder in self._held]
        found = {storage.data_ptr(): storage.nbytes() for storage in storages}
        return sum(size for place, size in found.items() if place not in known)


def naive(
    policy: Any, rows: Sequence[Trajectory], media: MediaSource, steps: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probs, and latents [B, K, H] of which the last `steps` have gradients, every one from a
    pass over whole rows.
    """
    batch = collate(rows, policy, media)
    order = batch.inputs["slots"].latent_rows.argsort()
    count = len(rows[0].latents)
    fed = torch.zeros(len(rows), count, policy.config.get_text_config().hidden_size)
    for k in range(count):
        with torch.set_grad_enabled(k >= count - steps):
            means = policy(**{**batch.inputs, "latents": fed.flatten(0, 1)[order]}).means
            z = means.view_as(fed)[:, k : k + 1]
            fed = torch.cat([fed[:, :k], z, fed[:, k + 1 :]], 1)
    scores = policy(**{**batch.inputs, "latents": fed.flatten(0, 1)[order]})
    return scores.logprobs, scores.means.view_as(fed)


def compare(
    policy: Any, cases: Sequence[Case], config: Any, repeats: int, clock: str, peak: bool
) -> dict[Case, Found]:
    """Measure cases in turns. Raises `RuntimeError` where the naive loop comes to other log-probs
    than self-forcing.
    """
    works = {case: Work(policy, case, config) for case in cases}
    found: dict[Case, Found] = {}
    logprobs: dict[tuple[Any, ...], torch.Tensor] = {}
    for parameter in policy.parameters():  # gradients exist, as in all but a step's first batch
        parameter.grad = torch.zeros_like(parameter)
    works[cases[0]].both()  # warms up
    for turn in range(repeats):
        for case, work in list(works.items())[:: -1 if turn % 2 else 1]:
            if case in found and sum(found[case].seconds) >= ENOUGH:
                continue
            kept, seconds, own = work.measure(CLOCKS[clock])
            if case in found:
                found[case].seconds.append(seconds)
                continue
            other = logprobs.setdefault((case.frames, case.count), own)
            if not torch.allclose(own, other, atol=1e-3):
                raise RuntimeError(f"{case}: other log-probs than before")
            prompt = max(len(row.prompt_ids) for row in work.rows)
            most = peak_bytes(work.both, torch.device("cpu")) if peak else None
            found[case] = Found(prompt, kept, most, [seconds])
    return found


# -- tables ----------------------------------------------------------------------------------------


def print_cases(found: dict[Case, Found], steps: Sequence[int], names: Sequence[str]) -> None:
    """A line for each K: of each measure, the figures at every m and at m = K."""
    own = {(c.frames, c.count, c.steps): f for c, f in found.items() if not c.naive}
    for frames, count in dict.fromkeys((frames, count) for frames, count, _ in own):
        measured = [own.get((frames, count, m)) for m in (*steps, count)]
        cells = [str(own[frames, count, count].prompt), str(len(frames)), str(count)]
        cells += ["-" if f is None else _figures(f)[name] for name in names for f in measured]
        print(f"| {' | '.join(cells)} |")


def print_naive(found: dict[Case, Found], names: Sequence[str]) -> None:
    """The loop, and how many times what self-forcing takes it takes."""
    for case, f in found.items():
        if case.naive:
            own = found[replace(case, naive=False)]
            ratios = f.kept / own.kept, median(f.seconds) / median(own.seconds)
            cells = [str(f.prompt), str(case.count), str(case.steps)]
            cells += [_figures(f)[name] for name in names] + [f"**{x:.1f}**" for x in ratios]
            print(f"| {' | '.join(cells)} |")


def _figures(found: Found) -> dict[str, str]:
    return {
        "kept, MiB": f"{found.kept / MIB:.1f}",
        "peak, MiB": "-" if found.peak is None else f"{found.peak / MIB:.1f}",
        "s": f"{median(found.seconds):.2f}",
    }


def print_growth(found: dict[Case, Found], size: Size, steps: Sequence[int]) -> None:
    """By how much what is kept grows with a latent, and beside it the cache of the prompts."""
    few, many = min(steps), max(steps)
    for frames in dict.fromkeys(case.frames for case in found):
        own = {c: f for c, f in found.items() if c.frames == frames and not c.naive}
        kept = {(c.count, c.steps): f.kept for c, f in own.items()}
        counts = [k for k, m in kept if m == many and k > many]  # with constants before them
        low, high = min(counts), max(counts)
        through = (kept[high, many] - kept[high, few]) / (many - few)
        constant = (kept[high, many] - kept[low, many]) / (high - low)
        prompt = next(iter(own.values())).prompt
        cache = len(frames) * size.cache_bytes(prompt, torch.float32)
        cells = [f"{x / MIB:.2f}" for x in (through, constant, cache)]
        print(f"| {' | '.join([str(prompt), str(len(frames)), *cells])} |")


def _head(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def main() -> None:
    options = read_arguments()
    logging.disable(logging.WARNING)
    torch.set_num_threads(options.threads)
    size, config = SIZES[options.model], config_of(SIZES[options.model])
    longest = setting_of(config, 2, max(options.latents))  # which the protocol allows
    policy = random_policy(longest).eval()
    clips = [(frames,) for frames in options.frames]
    weights = sum(p.nbytes for p in policy.parameters()) / MIB
    print(
        f"{machine(torch.device('cpu'))}, float32, {options.clock} clock, {options.model}: "
        f"weights of {weights:.1f} MiB"
    )
    names = [n for n in ("kept, MiB", "peak, MiB", "s") if options.peak or n != "peak, MiB"]
    steps = [*map(str, options.steps), "K"]
    _head("prompt", "rows", "K", *(f"{n}: m = {m}" for n in names for m in steps))
    found: dict[Case, Found] = {}
    for frames in clips:
        cases = [
            Case(frames, k, m)
            for k in options.latents
            for m in dict.fromkeys((*(m for m in options.steps if m < k), k))
        ]
        cases += [replace(c, naive=True) for c in cases if c.count == options.naive]
        measured = compare(policy, cases, config, options.repeats, options.clock, options.peak)
        print_cases(measured, options.steps, names)
        found |= measured
    print("\nWhat a latent adds to what is kept, and what the prompts' keys and values take, MiB:")
    _head("prompt", "rows", "a latent with gradients", "a constant one", "cache of the prompts")
    print_growth(found, size, options.steps)
    print("\nThe loop that computes whole rows anew, and how many times what self-forcing takes:")
    _head("prompt", "K", "m", *names, "times kept", "times s")
    print_naive(found, names)


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="20m")
    parser.add_argument("--latents", type=int, nargs="+", default=[4, 8, 12, 16], help="K")
    parser.add_argument(
        "--steps", type=int, nargs="+", default=[1, 4], help="m, where it is below K; and m = K"
    )
    parser.add_argument(
        "--frames", type=int, nargs="+", default=[8, 32], help="frame pairs, 16 tokens each"
    )
    parser.add_argument("--naive", type=int, default=12, help="K at which the naive loop stands")
    parser.add_argument("--peak", action="store_true", help="also peaks, which takes time")
    parser.add_argument(
        "--repeats", type=int, default=2, help=f"of what takes less than {ENOUGH:.0f} seconds"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument(
        "--clock",
        choices=CLOCKS,
        default="cpu",
        help="cpu: seconds of this process, for a machine that others use too; with one thread",
    )
    found = parser.parse_args()
    if len(set(found.steps)) < 2 or sum(k > max(found.steps) for k in found.latents) < 2:
        parser.error("give two --steps, and two --latents above them: growth is told from both")
    return found


if __name__ == "__main__":
    main()

"""What an answer costs at inference: behind latents, behind a chain of thought, and directly.

One random model in the shape of a Qwen3-VL answers the same prompts in the transformers engine,
greedily: directly (A tokens), behind one span of K latents (start, K latents, end, A tokens), and
behind a chain of N tokens (N + A tokens). Weights are noise, and so is what is said, which takes as
long: end-of-sequence is ruled out, so every completion has exactly its length. Nothing is said
about accuracy.

Prefill is all that happens before the first token is chosen, for a clip that is decoded and
processed already; decode is the rest. A decode step is a forward pass behind the prompt's: one less
than there are tokens, as the last is never fed. Operations are those of matrix products (two a
multiplication and addition) in tower, language model, modules, and LM head where a token is free.
Seconds are medians over repeats in turns.

Modules are new ones, which cost what trained ones cost, except depth: its gates are shifted so that
about the share --depth-share of the tokens of a latent answer opens them. The chain is always one
of a policy without modules.

python -m benchmarks.inference_cost
python -m benchmarks.inference_cost --model 100m --chain 400 --frames 16 --repeats 1
"""

from __future__ import annotations

import argparse
import logging
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
from transformers.utils.logging import disable_progress_bar

from benchmarks.shapes import SIZES, Size, machine, write_policy
from benchmarks.update_meter import CLOCKS, language_flops, vision_flops
from rl.data.media import LocalMedia, MediaProcessor
from rl.policy.depth import DepthConfig, DepthGate
from rl.policy.injection import InjectionConfig
from rl.policy.loading import load_policy
from rl.policy.modules import ModulesConfig
from rl.policy.protocol import LatentProtocol, Slot
from rl.policy.unroll import Unroll
from rl.policy.visual_replay import VisualReplayConfig
from rl.trajectory import RolloutRequest, Sample, Sampling, Trajectory
from rollouts import transformers_engine
from rollouts.assemble import stop_ids
from rollouts.transformers_engine import TransformersEngine
from tests.tiny import moving_square, write_clip

SIDE = 4  # merged patches along a side of a frame, which is 32 pixels
ENOUGH = 10.0  # seconds, after which a case is not repeated again
CLAIM = 68.0  # times, of VideoLatent's abstract
REPLAY = VisualReplayConfig()
MODULES = {
    "latents": ModulesConfig(),
    "+ injection": ModulesConfig(injection=InjectionConfig()),
    "+ depth": ModulesConfig(depth=DepthConfig()),
    "+ visual replay": ModulesConfig(visual_replay=REPLAY),
    "+ all three": ModulesConfig(InjectionConfig(), DepthConfig(), REPLAY),
}


@dataclass(frozen=True)
class Case:
    """One way to answer: a policy of `MODULES`, and whether it thinks, for how many tokens."""

    name: str
    policy: str
    imagine: bool
    tokens: int  # of the whole completion


@dataclass
class Phase:
    """Prefill or decode of one completion."""

    seconds: float = 0.0
    passes: int = 0
    tokens: int = 0  # that the language model was given
    deep: int = 0  # that layers took in, passes of depth scaling included, summed over layers
    pairs: float = 0.0  # of tokens that attended, summed likewise
    flops: float = 0.0


@dataclass
class Cost:
    """What one completion took."""

    prompt: int
    generated: int
    prefill: Phase
    decode: Phase

    @property
    def seconds(self) -> float:
        return self.prefill.seconds + self.decode.seconds

    @property
    def flops(self) -> float:
        return self.prefill.flops + self.decode.flops


class Meter:
    """Notes what a policy does while it answers."""

    def __init__(self, policy: Any, size: Size, clock: Callable[[], float]) -> None:
        self.policy, self.size, self.clock = policy, size, clock
        self.behind = 0  # tokens in the cache
        self.prefill, self.decode = Phase(), Phase()
        self.phase = self.prefill

    @contextmanager
    def reading(self) -> Iterator[None]:
        """While this lasts, everything counts."""
        hooks = [
            layer.self_attn.register_forward_pre_hook(self._attend, with_kwargs=True)
            for layer in self.policy.get_decoder().layers
        ]
        start = self.clock()
        try:
            with patch.object(transformers_engine, "Unroll", _noting(self, start)):
                yield
            self.decode.seconds = self.clock() - start - self.prefill.seconds
        finally:
            for hook in hooks:
                hook.remove()

    def _attend(self, _module: Any, args: Any, kwargs: dict[str, Any]) -> None:
        count = (args[0] if args else kwargs["hidden_states"]).shape[1]
        self.phase.deep += count
        self.phase.pairs += count * self.behind + count * (count + 1) / 2

    def passed(self, tokens: int) -> None:
        """A pass over so many tokens is done."""
        self.phase.passes += 1
        self.phase.tokens += tokens
        self.behind += tokens
        if self.policy.visual_replay is not None:  # asks in every layer what the last token sees
            self.phase.flops += (
                2 * self.size.layers * self.size.heads * self.size.head_dim * self.behind
            )

    def cost(self, trajectory: Trajectory, frames: int) -> Cost:
        """With the operations of what was generated behind a clip of so many frame pairs."""
        size, video = self.size, frames * SIDE * SIDE
        layer = replace(size, layers=1)
        for phase in (self.prefill, self.decode):
            phase.flops += language_flops(layer, phase.deep, phase.pairs)
        self.prefill.flops += vision_flops(size, frames, SIDE)
        free = int((trajectory.decision != Slot.FORCED).sum())
        self.decode.flops += 2 * size.hidden * size.vocabulary * free
        latents, square = len(trajectory.latents), 2 * size.hidden**2
        if self.policy.latent_injection is not None:  # keys and values; query, output, attention
            self.prefill.flops += 2 * square * video
            self.decode.flops += latents * (2 * square + 4 * size.hidden * video)
        shown_again = self.decode.tokens - self.decode.passes  # by visual replay
        self.decode.flops += shown_again * 2 * square
        prompt, generated = len(trajectory.prompt_ids), len(trajectory.completion_ids)
        return Cost(prompt, generated, self.prefill, self.decode)


def _noting(meter: Meter, start: float) -> type[Unroll]:
    """An `Unroll` that tells the meter of its passes."""

    class Noting(Unroll):
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            meter.passed(args[1]["input_ids"].shape[1])
            meter.prefill.seconds = meter.clock() - start
            meter.phase = meter.decode

        def extend(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            before = self._mask.shape[1]
            hidden = super().extend(ids, *args, **kwargs)
            meter.passed(self._mask.shape[1] - before)
            return hidden

    return Noting


# -- what is measured ------------------------------------------------------------------------------


def policies(folder: Path, size: Size, latents: int) -> tuple[dict[str, Any], Any]:
    """The same random backbone with each choice of `MODULES`, and its processor."""
    protocol = LatentProtocol(min_length=latents, max_length=latents, max_spans=1)
    processor = write_policy(folder, size, protocol, torch.device("cpu"), torch.float32)
    found = {name: load_policy(folder, modules).eval() for name, modules in MODULES.items()}
    for policy in found.values():
        head = policy.get_output_embeddings()
        logits = torch.zeros(len(head.weight))
        logits[list(stop_ids(policy.generation_config, processor.tokenizer))] = -1e4
        head.bias = torch.nn.Parameter(logits, requires_grad=False)
    # Its own limit is for tiny clips, and would scale longer ones down.
    processor.video_processor.size["longest_edge"] = 1 << 30
    return found, processor


def sample_of(folder: Path, frames: int) -> Sample:
    """A question about a clip of so many frames."""
    clip = write_clip(folder / f"{frames}.mp4", moving_square(frames, size=32))
    question, options = "Where does it go next?", ("left", "right")
    return Sample(f"{frames} frames", str(clip), question, "A", options, tuple(range(frames)))


def cases_of(latents: int, answer: int, chains: list[int]) -> list[Case]:
    return [
        Case("direct", "latents", False, answer),
        *(Case(name, name, True, latents + 2 + answer) for name in MODULES),
        *(Case(f"chain of {n}", "latents", False, n + answer) for n in chains),
    ]


@dataclass(frozen=True)
class Bench:
    """An engine for each of `MODULES`, and how they are measured."""

    engines: dict[str, TransformersEngine]
    size: Size
    clock: Callable[[], float]
    repeats: int
    depth_share: float

    def answer(self, sample: Sample, case: Case) -> Cost:
        """Sample one completion. Raises `RuntimeError` if its length is not the case's."""
        engine = self.engines[case.policy]
        sampling = Sampling(0.0, case.tokens, imagine="always" if case.imagine else "never")
        meter = Meter(engine.policy, self.size, self.clock)
        with meter.reading():
            [group] = engine.generate([RolloutRequest(sample, (0,), sampling)])
        [trajectory] = group
        if len(trajectory.completion_ids) != case.tokens:
            raise RuntimeError(f"{case.name}: {len(trajectory.completion_ids)} tokens came")
        return meter.cost(trajectory, len(sample.frames) // 2)

    def costs(self, sample: Sample, cases: list[Case]) -> dict[str, Cost]:
        """Costs of all cases, with the medians of their seconds."""
        for case in cases:
            short = replace(case, tokens=min(case.tokens, 32))
            for gate in _gates(self.engines[case.policy].policy):
                self._open(gate, lambda c=short: self.answer(sample, c))
            self.answer(sample, short)  # warms up
        found: dict[str, list[Cost]] = {case.name: [] for case in cases}
        for turn in range(self.repeats):
            for case in cases[:: -1 if turn % 2 else 1]:
                if sum(run.seconds for run in found[case.name]) < ENOUGH:
                    found[case.name].append(self.answer(sample, case))
        # What comes before the first token is the same for all cases of a policy.
        prefill = defaultdict(list)
        for case in cases:
            prefill[case.policy] += [r.prefill.seconds for r in found[case.name]]
        for case in cases:
            first, *_ = runs = found[case.name]
            first.decode.seconds = median(r.decode.seconds for r in runs)
            first.prefill.seconds = median(prefill[case.policy])
        return {name: runs[0] for name, runs in found.items()}

    def _open(self, gate: DepthGate, work: Callable[[], Any]) -> None:
        """Shift a gate so that it opens for `depth_share` of the tokens in decode steps."""
        levels: list[torch.Tensor] = []
        hook = gate.register_forward_hook(lambda _gate, _args, out: levels.append(out.flatten()))
        work()
        hook.remove()
        decode = torch.cat(levels[1:])  # behind the prompt's
        gate.router.bias.data -= decode.quantile(1.0 - self.depth_share)


def _gates(policy: Any) -> list[DepthGate]:
    return [module for module in policy.modules() if isinstance(module, DepthGate)]


# -- tables ----------------------------------------------------------------------------------------


def print_costs(frames: int, costs: dict[str, Cost]) -> None:
    for name, c in costs.items():
        per_step = 1e3 * c.decode.seconds / c.decode.passes
        cells = [
            str(frames), str(c.prompt), name, str(c.generated), str(c.decode.passes),
            str(c.decode.tokens), f"{c.prefill.seconds:.2f}", f"{c.decode.seconds:.2f}",
            f"{per_step:.1f}", f"{c.prefill.flops / 1e9:.1f}", f"{c.decode.flops / 1e9:.1f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |", flush=True)


def print_ratios(frames: int, costs: dict[str, Cost]) -> None:
    """Explicit chains over latents and over nothing, and of what that consists."""
    for own_name in ("latents", "direct"):
        own = costs[own_name]
        for name, other in costs.items():
            if not name.startswith("chain"):
                continue
            steps = other.decode.passes / own.decode.passes
            decode = other.decode.seconds / own.decode.seconds
            step = other.decode.seconds / other.decode.passes
            cells = [
                str(frames), f"{name} / {own_name}", f"{steps:.1f}", f"{decode / steps:.2f}",
                f"{decode:.1f}", f"{step / (own.prefill.seconds / own.prompt):.0f}",
                f"{own.prefill.seconds / own.seconds:.0%}",
                f"**{other.seconds / own.seconds:.1f}**",
                f"{other.seconds / own.prefill.seconds:.1f}", f"{other.flops / own.flops:.1f}",
            ]  # fmt: skip
            print(f"| {' | '.join(cells)} |")


def print_modules(frames: int, costs: dict[str, Cost], chain: str) -> None:
    """Each module over latents alone, and a chain over each."""
    off, long = costs["latents"], costs[chain]
    for name in MODULES:
        on = costs[name]
        cells = [
            str(frames), name, f"{on.prefill.seconds / off.prefill.seconds:.2f}",
            f"{on.decode.seconds / off.decode.seconds:.2f}", f"{on.flops / off.flops:.2f}",
            f"{on.decode.deep / off.decode.deep:.2f}",
            f"{long.decode.seconds / on.decode.seconds:.1f}", f"{long.seconds / on.seconds:.1f}",
        ]  # fmt: skip
        print(f"| {' | '.join(cells)} |")


def _head(*columns: str) -> None:
    print(f"\n| {' | '.join(columns)} |\n|{'---|' * len(columns)}")


def main() -> None:
    options = read_arguments()
    logging.disable(logging.WARNING)
    disable_progress_bar()
    torch.set_num_threads(options.threads)
    size = SIZES[options.model]
    cases = cases_of(options.latents, options.answer, options.chain)
    print(f"{machine(torch.device('cpu'))}, float32, {options.clock} clock, {options.model}")
    _head(
        "frames", "prompt", "answer", "generated", "decode steps", "tokens in them", "prefill, s",
        "decode, s", "ms a step", "prefill, GFLOP", "decode, GFLOP",
    )  # fmt: skip
    found: dict[int, dict[str, Cost]] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        made, processor = policies(folder, size, options.latents)
        media = MediaProcessor(processor)
        clips = LocalMedia(media, 8)
        engines = {name: TransformersEngine(policy, media, clips) for name, policy in made.items()}
        clock, share = CLOCKS[options.clock], options.depth_share
        bench = Bench(engines, size, clock, options.repeats, share)
        for frames in options.frames:
            found[frames] = bench.costs(sample_of(folder, frames), cases)
            print_costs(frames, found[frames])
    print("\nHow many times what a chain takes is what an answer without one takes:")
    _head(
        "frames", "answers", "decode steps", "x time of a step", "= decode, s",
        "a step, in prompt tokens", "prefill's share of the shorter", "all, s",
        "all, s, were its decode free", "operations",
    )  # fmt: skip
    for frames, costs in found.items():
        print_ratios(frames, costs)
    middle = sorted(options.chain)[len(options.chain) // 2]
    print(f"\nWhat modules add, as ratios to latents without, and a chain of {middle} over each:")
    _head(
        "frames", "answer", "prefill, s", "decode, s", "operations", "tokens x layers in decode",
        "chain: decode, s", "chain: all, s",
    )  # fmt: skip
    for frames, costs in found.items():
        print_modules(frames, costs, f"chain of {middle}")
    steps = options.latents + 1 + options.answer
    print(
        f"\n{CLAIM:.0f} times as many decode steps as {steps} would take a chain of "
        f"{CLAIM * steps - options.answer + 1:.0f} tokens."
    )


def read_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SIZES, default="20m")
    parser.add_argument("--latents", type=int, default=12, help="K")
    parser.add_argument("--answer", type=int, default=8, help="A, tokens of the answer itself")
    parser.add_argument("--chain", type=int, nargs="+", default=[100, 400, 1000], help="N")
    parser.add_argument("--frames", type=int, nargs="+", default=[16, 64], help="even numbers")
    parser.add_argument("--depth-share", type=float, default=DepthConfig().budget)
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
    return parser.parse_args()


if __name__ == "__main__":
    main()

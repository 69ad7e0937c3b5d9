"""`benchmarks.inference_cost`: operations against those that torch counts, steps by hand, and a
smoke run.
"""

import logging
import sys
import time

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import enable_progress_bar

from benchmarks import inference_cost
from benchmarks.inference_cost import MODULES, Bench, cases_of, policies, sample_of
from benchmarks.shapes import SIZES
from rl.data.media import LocalMedia, MediaProcessor
from rollouts.transformers_engine import TransformersEngine

SIZE, FRAMES = SIZES["tiny"], 8


@pytest.fixture(scope="module")
def bench(tmp_path_factory):
    made, processor = policies(tmp_path_factory.mktemp("policy"), SIZE, 3)
    media = MediaProcessor(processor)
    clips = LocalMedia(media, 2)
    engines = {name: TransformersEngine(policy, media, clips) for name, policy in made.items()}
    return Bench(engines, SIZE, time.perf_counter, 1, 0.5)


@pytest.fixture(scope="module")
def sample(tmp_path_factory):
    return sample_of(tmp_path_factory.mktemp("clips"), FRAMES)


def by_name(chains):
    return {case.name: case for case in cases_of(3, 2, chains)}


def test_steps_by_hand(bench, sample):
    costs = bench.costs(sample, list(by_name([5]).values()))
    assert list(costs) == ["direct", *MODULES, "chain of 5"]
    assert {c.prefill.passes for c in costs.values()} == {1}
    for name, generated, fed in (
        ("direct", 2, 1),
        ("latents", 7, 6),  # start, 3 latents, end, 2 tokens; the last is not fed
        ("+ visual replay", 7, 6 + 4 * 16),  # all of its video, before two of the latents
        ("chain of 5", 7, 6),
    ):
        cost = costs[name]
        assert (cost.generated, cost.decode.passes, cost.decode.tokens) == (
            generated, generated - 1, fed
        )  # fmt: skip
        assert cost.prefill.tokens == cost.prompt
        assert cost.prefill.deep == SIZE.layers * cost.prompt
        assert cost.prefill.seconds > 0 and cost.decode.seconds > 0
    # One of two layers is gated: of the prompt and of 6 tokens some go through it twice.
    deep = costs["+ depth"]
    assert 2 * deep.prompt < deep.prefill.deep < 3 * deep.prompt
    assert 2 * 6 < deep.decode.deep < 3 * 6


@pytest.mark.parametrize("name", ["chain of 5", "latents", "+ injection", "+ visual replay"])
def test_operations_are_those_that_torch_counts(bench, sample, name):
    case = by_name([5])[name]
    bench.answer(sample, case)  # a clip is processed once
    # torch counts no product inside its fused attention on a CPU.
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH):
        cost = bench.answer(sample, case)
    # It counts a pass's attention to itself whole, of which causality needs half.
    again = (cost.decode.tokens - cost.decode.passes) // 32
    pairs = cost.prompt * (cost.prompt - 1) / 2 + again * 33 * 32 / 2
    unneeded = SIZE.layers * 4 * SIZE.heads * SIZE.head_dim * pairs
    assert counter.get_total_flops() == pytest.approx(cost.flops + unneeded, rel=1e-3)


def test_a_smoke_run(monkeypatch, capsys):
    arguments = "--model tiny --latents 2 --answer 2 --chain 4 6 --frames 4 8 --repeats 1"
    monkeypatch.setattr(sys, "argv", ["inference_cost", *arguments.split()])
    threads = torch.get_num_threads()
    try:
        inference_cost.main()
    finally:
        logging.disable(logging.NOTSET)
        enable_progress_bar()
        torch.set_num_threads(threads)
    out = capsys.readouterr().out
    lines = [line for line in out.splitlines() if line.startswith("|")]
    rows = [[cell.strip(" *") for cell in line.split("|")[1:-1]] for line in lines]
    costs, ratios, modules = 2 * (6 + 2), 2 * 2 * 2, 2 * 5
    assert [len(r) for r in rows] == [11] * (2 + costs) + [10] * (2 + ratios) + [8] * (2 + modules)
    ratio = {(r[0], r[1]): float(r[2]) for r in rows[4 + costs : 4 + costs + ratios]}
    assert ratio["4", "chain of 6 / latents"] == 1.4  # 7 steps over 5
    assert ratio["8", "chain of 4 / direct"] == 5.0  # 5 over 1
    assert out.endswith("68 times as many decode steps as 5 would take a chain of 339 tokens.\n")

"""`benchmarks.update`: the meters against hand counts and torch's own, and a smoke run."""

import logging
import math
import sys

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode
from transformers.utils.logging import enable_progress_bar

from benchmarks import update
from benchmarks.shapes import SIZES
from benchmarks.update_cases import Case, clip_grid, make_batch
from benchmarks.update_meter import language_flops, peak_bytes, update_flops, vision_flops

TINY = update.Options("tiny", torch.device("cpu"), torch.float32, False, 1, "wall", None)


def test_the_limit_by_hand():
    assert Case.of(8, 2000, 200).limit == 8 * 2200 / 3600
    assert Case.of(1, 500, 100, groups=4).limit == 1.0
    # Rows are padded to 10 + 4 tokens; 2·14 are computed, of 7 + 13 that there are.
    assert Case(((5, (2,)), (10, (4,)))).limit == 28 / 21
    assert Case(((5, (2, 4)),)).repeated == Case(((5, (2,)), (5, (4,))))


@pytest.mark.parametrize("length", [24, 100, 2000])
def test_prompts_hold_the_tokens_of_their_clip(length):
    policy, processor = update.policy_of(TINY)
    case = Case(((length, (3, 5)),))
    batch = make_batch(case, policy, processor.tokenizer.pad_token_id, TINY.device)
    trl = batch.trl
    frames, side = clip_grid(length)
    assert trl["video_grid_thw"].tolist() == [[frames, 2 * side, 2 * side]] * 2
    assert trl["pixel_values_videos"].shape == (2 * frames * 4 * side * side, 96)
    assert (trl["mm_token_type_ids"] == 2).sum(1).tolist() == [frames * side * side] * 2
    assert frames * side * side >= length / 3
    assert trl["completion_mask"].sum(1).tolist() == [3, 5] and trl["prompt_mask"].all()


def test_peak_bytes_by_hand():
    before = torch.zeros(1000)

    def work():
        before.add_(1)
        before.view(10, 100)
        first = before * 2
        second = first.view(10, 100) + 1  # 8000 bytes with the first
        del first, second
        third = torch.ones(500, dtype=torch.float64)
        third[0] = 2.0

    assert peak_bytes(work, torch.device("cpu")) == 8000


def test_flops_are_those_that_torch_counts():
    size, (frames, side) = SIZES["tiny"], clip_grid(300)
    policy, processor = update.policy_of(TINY)
    batch = make_batch(Case.of(1, 300, 20), policy, processor.tokenizer.pad_token_id, TINY.device)
    trl = batch.trl
    # torch counts no product inside its fused attention on a CPU.
    counter = FlopCounterMode(display=False)
    with counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
        policy(
            input_ids=torch.cat([trl["prompt_ids"], trl["completion_ids"]], 1),
            **{k: trl[k] for k in ("pixel_values_videos", "video_grid_thw", "mm_token_type_ids")},
        )
    # It counts attention whole, and logits were asked for everywhere.
    expected = language_flops(size, 320, 320 * 320) + 2 * size.hidden * size.vocabulary * 320
    expected += vision_flops(size, frames, side)
    assert counter.get_total_flops() == pytest.approx(expected, rel=1e-3)


def test_flops_of_a_group_by_hand():
    size = SIZES["tiny"]
    pairs = 300 * 301 / 2 + 20 * 300 + 20 * 21 / 2 + 10 * 300 + 10 * 11 / 2
    forward = language_flops(size, 330, pairs) + 2 * size.hidden * size.vocabulary * 30
    forward += vision_flops(size, *clip_grid(300))
    assert math.isclose(update_flops(size, Case(((300, (20, 10)),))), 3 * forward)


def test_a_smoke_run(monkeypatch, capsys):
    """Both trainers do the same work: losses and gradients agree, and all cells are filled."""
    arguments = "--quick --threads 1 --checkpointing off on --peak-tflops 0.1"
    monkeypatch.setattr(sys, "argv", ["update", *arguments.split()])
    threads = torch.get_num_threads()
    try:
        update.main()
    finally:
        logging.disable(logging.NOTSET)
        enable_progress_bar()
        torch.set_num_threads(threads)
    head, *lines = (line for line in capsys.readouterr().out.splitlines() if line.startswith("|"))
    names = [name.strip() for name in head.split("|")[1:-1]]
    rows = [
        dict(zip(names, map(str.strip, line.split("|")[1:-1]), strict=True)) for line in lines[1:]
    ]
    assert [row["checkpointing"] for row in rows] == ["off"] * 3 + ["on"] * 3
    for row in rows:
        assert float(row["loss apart"]) < 1e-5 and float(row["gradients apart"]) < 1e-4
        assert all(float(row[name]) > 0 for name in ("ours, s", "TRL, s", "ours, MiB", "TRL, MiB"))
        assert row["ours, MFU"].endswith("%")
    for off, on in zip(rows[:3], rows[3:], strict=True):
        assert float(on["TRL, MiB"]) <= float(off["TRL, MiB"])

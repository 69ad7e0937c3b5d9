"""`benchmarks.self_forcing`: what is kept against a hand count, and a smoke run."""

import logging
import sys

import pytest
import torch

from benchmarks import self_forcing
from benchmarks.self_forcing import Case, Saved, Work, setting_of
from benchmarks.shapes import SIZES, config_of
from rl.memory import random_policy


@pytest.fixture(autouse=True)
def _as_it_was():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    logging.disable(logging.NOTSET)


def test_what_is_kept_by_hand():
    weight = torch.randn(10, 10, requires_grad=True)
    x = torch.randn(5, 10, requires_grad=True)
    saved = Saved()
    with saved.noting():
        y = x @ weight  # keeps both
        z = y.exp() * y.view(5, 10)  # keeps exp's output, and y
        gone = (x * 2).exp().sum()
    own, exponentials = x.nbytes + y.nbytes, y.nbytes
    assert saved.bytes_beside([weight]) == own + exponentials + x.nbytes
    del gone
    assert saved.bytes_beside([weight]) == own + exponentials
    z.sum().backward()
    assert saved.bytes_beside([]) == 0


def test_a_latent_with_gradients_keeps_the_cache_once_more_and_a_constant_one_does_not():
    size, config = SIZES["tiny"], config_of(SIZES["tiny"])
    policy = random_policy(setting_of(config, 2, 6)).eval()

    def kept(frames: tuple[int, ...], count: int, steps: int) -> int:
        return Work(policy, Case(frames, count, steps), config).measure(lambda: 0.0)[0]

    cache = size.cache_bytes(8 * 17 + 52, torch.float32)
    assert cache < (kept((8,), 6, 3) - kept((8,), 6, 1)) / 2 < 1.15 * cache
    assert 0 < (kept((8,), 6, 1) - kept((8,), 3, 1)) / 3 < 0.25 * cache
    # A row of another length is not padded, so it costs what it costs alone.
    both = cache + size.cache_bytes(4 * 17 + 52, torch.float32)
    assert both < (kept((8, 4), 6, 3) - kept((8, 4), 6, 1)) / 2 < 1.15 * both


def test_a_smoke_run(monkeypatch, capsys):
    arguments = "--model tiny --latents 3 4 --steps 1 2 --frames 2 --naive 3 --peak --repeats 1"
    monkeypatch.setattr(sys, "argv", ["self_forcing", *arguments.split()])
    self_forcing.main()
    lines = [x for x in capsys.readouterr().out.splitlines() if x.startswith("|")]
    rows = [[cell.strip("* ") for cell in line.split("|")[1:-1]] for line in lines]
    # Three measures at three m for each K; growth; and the loop at three m.
    assert [len(row) for row in rows] == [12] * (2 + 2) + [5] * (2 + 1) + [8] * (2 + 3)
    for row in rows[-3:]:
        assert float(row[-2]) > 1.2  # times the memory


def test_growth_needs_something_to_tell_it_from(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["self_forcing", "--steps", "4", "--latents", "4", "8"])
    with pytest.raises(SystemExit):
        self_forcing.main()
    assert "two --latents above them" in capsys.readouterr().err

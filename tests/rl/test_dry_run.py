from __future__ import annotations

import pytest
import torch
from torch import nn

from rl.dry_run import DryRun


def fake(run: DryRun, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    with run.building():
        return torch.zeros(*shape, dtype=dtype)


def test_bytes_are_counted_while_tensors_live():
    run = DryRun()
    x, w = fake(run, 10, 4), fake(run, 4, 3)
    assert run.hold([x, w, w.t(), x[2:]]) == (40 + 12) * 4  # views hold nothing of their own
    with run.running():
        y = x @ w
        z = (y.view(-1) + 1.0).half()
        assert run.live == (40 + 12 + 30) * 4 + 30 * 2
        assert run.peak == (40 + 12 + 30 + 30) * 4 + 30 * 2  # the sum, before it was halved
        del y
        assert run.live == (40 + 12) * 4 + 30 * 2
        del z
    assert run.live == (40 + 12) * 4


def test_what_the_backward_pass_needs_is_held_until_then():
    run = DryRun()
    model = nn.Sequential(
        nn.Linear(8, 16, device="meta"), nn.GELU(), nn.Linear(16, 1, device="meta")
    )
    run.materialize(model)
    parameters = list(model.parameters())
    weights = run.hold(parameters)
    assert weights == (8 * 16 + 16 + 16 + 1) * 4
    run.watch_gradients(parameters)
    x = fake(run, 100, 8)
    with run.running():
        loss = model(x).sum()
        # The input of the GELU, its output, and the loss; nothing needs the last layer's output.
        assert run.live - weights == (1600 + 1600 + 1) * 4
        loss.backward()
        del loss
        assert run.live == 2 * weights
    assert run.gradients == weights
    model.zero_grad()
    assert run.gradients == 0 and run.live == weights
    # GELU's output was the last layer's alone; its gradient comes while the input is still there.
    assert run.gradients_at_peak < weights < run.peak


def test_no_memory_is_taken_and_masks_are_read():
    run = DryRun()
    ids = torch.arange(1 << 10).expand(1 << 6, -1)
    x = fake(run, 1 << 6, 1 << 10, 1 << 22)  # a TiB
    mask = ids % 4 == 1
    with run.running():
        rows = x[mask]
        assert rows.shape == (1 << 14, 1 << 22)
        assert rows.masked_select(mask.reshape(-1)[: 1 << 14, None]).shape == (1 << 34,)
        x[mask] = 0.0
        assert x.masked_scatter(mask[..., None], rows).shape == x.shape
        assert [int(i) for i in torch.arange(5, dtype=torch.int32)[1:] * 2] == [2, 4, 6, 8]
        assert torch.linspace(0, 3, 4).tolist() == [0, 1, 2, 3]  # positions, say
    assert run.peak >= (1 << 40) + (1 << 36)  # rows and the copy of x


def test_tied_weights_stay_tied():
    run = DryRun()
    first, second = nn.Linear(4, 4, bias=False, device="meta"), nn.Linear(4, 4, device="meta")
    second.weight = first.weight
    second.weight.requires_grad_(False)
    run.materialize(model := nn.ModuleList([first, second]))
    assert first.weight is second.weight and not first.weight.requires_grad
    assert second.bias.requires_grad
    assert run.hold(model.parameters()) == (16 + 4) * 4
    with pytest.raises(RuntimeError), run.running():
        _ = float(first.weight.sum())  # what is not computed cannot be read


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_attention_takes_within_itself_counts_for_a_moment(dtype):
    run = DryRun()
    with run.building():
        q = torch.zeros(1, 2, 64, 16, dtype=dtype, requires_grad=True)
    one = run.hold([q])
    with run.running():
        out = nn.functional.scaled_dot_product_attention(q, q, q, is_causal=True)
        upstream = torch.ones_like(out)
        before = run.live
        assert before == 3 * one + 2 * 64 * 4  # q, out, its gradient, and a sum for each row
        out.backward(upstream)
    scratch = one + (2 * 64 * 16 * 4 if dtype is torch.bfloat16 else 0)
    assert run.peak == before + 3 * one + scratch  # gradients of query, key and value

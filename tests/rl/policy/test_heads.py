"""Latent heads."""

import pytest
import torch

from rl.errors import PolicyError
from rl.policy.heads import HeadConfig, SwiGLUHead


@pytest.mark.parametrize("kind", ["identity", "linear", "mlp", "swiglu"])
def test_shapes_and_gradients(kind):
    head = HeadConfig(kind, width=12).build(8)
    hidden = torch.randn(3, 8, requires_grad=True)
    out = head(hidden)
    assert out.shape == hidden.shape
    out.sum().backward()
    assert all(p.grad is not None for p in head.parameters())
    assert head(hidden[:0]).shape == (0, 8)


def test_swiglu_by_hand():
    # Width 1: gate and up see the normed input, down scales the product silu(gate)·up.
    head = SwiGLUHead(2, 1)
    with torch.no_grad():
        head.gate_and_up.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
        head.gate_and_up.bias.zero_()
        head.down.weight.copy_(torch.tensor([[1.0], [2.0]]))
        head.down.bias.zero_()
    # LayerNorm of (3, 1) is (1, -1): silu(1)·(-1) = -0.731059.
    out = head(torch.tensor([3.0, 1.0]))
    torch.testing.assert_close(out, torch.tensor([-0.731059, -1.462117]), rtol=1e-4, atol=0)


def test_unknown_kind():
    with pytest.raises(PolicyError, match="'cube'"):
        HeadConfig("cube")  # type: ignore[arg-type]

"""Attention over packed rows, against one dense masked softmax and against every sequence alone."""

import copy
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForImageTextToText
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl.errors import PolicyError
from rl.policy import attention_kernels
from rl.policy import packed_attention as packed
from rl.policy.attention_kernels import CPU_FLASH, CUDA_FLASH, MATH, Kernel, kernel_for
from rl.policy.layout import PackLayout, followers
from rl.policy.packed_attention import attend, install, packed_attention
from tests.tiny import FAMILIES, Family, tiny_model

Inputs = tuple[Tensor, Tensor, Tensor]  # query, key and value
KERNELS = {"cpu": CPU_FLASH, "math": MATH, "padded": replace(CPU_FLASH, pads=True)}

lengths = st.lists(
    st.tuples(st.integers(1, 6), st.lists(st.integers(1, 5), min_size=1, max_size=4)),
    min_size=1,
    max_size=4,
)


def visible(layout: PackLayout) -> Tensor:
    """Who sees whom, bool [T,T], token by token."""
    group, answer = [], []  # of each token; answer -1 is the prompt
    for g, shape in enumerate(layout.groups):
        for a, length in enumerate((shape.prompt, *shape.completions), start=-1):
            group += [g] * length
            answer += [a] * length
    groups, answers, order = torch.tensor(group), torch.tensor(answer), torch.arange(len(group))
    same = groups[:, None] == groups
    itself_or_prompt = (answers == -1) | (answers[:, None] == answers)
    return same & itself_or_prompt & (order[:, None] >= order)


def dense(query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float) -> Tensor:
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    scores = (query @ key.mT * scale).masked_fill(~visible(layout), -math.inf)
    return scores.softmax(-1) @ value


def tensors(layout: PackLayout, heads=(4, 2), width=8, dtype=torch.float64, seed=0) -> Inputs:
    """Query, key and value as a model makes them: transposed, and all but dense."""
    torch.manual_seed(seed)
    shapes = [(1, layout.length, h, width) for h in (heads[0], heads[1], heads[1])]
    query, key, value = (torch.randn(s, dtype=dtype).transpose(1, 2) for s in shapes)
    return query.requires_grad_(), key.requires_grad_(), value.requires_grad_()


def leaves(inputs: Inputs, change: Callable[[Tensor], Tensor]) -> Inputs:
    query, key, value = (change(x.detach()).requires_grad_() for x in inputs)
    return query, key, value


def gradients(out: Tensor, inputs: Inputs) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    grad = torch.randn(out.shape).bfloat16()  # the same in every dtype
    return torch.autograd.grad(out, inputs, grad.to(out.dtype))


def assert_near(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Relative to the largest value."""
    torch.testing.assert_close(
        actual, expected, rtol=0, atol=tolerance * max(1e-3, expected.abs().max().item())
    )


def test_by_hand():
    # All scores are 0, so that every token averages the values it sees.
    layout = PackLayout.of([(2, (1, 2)), (1, (1,))])
    value = torch.tensor([1.0, 3.0, 8.0, 5.0, 7.0, 10.0, 20.0])[None, None, :, None]
    zeros = torch.zeros_like(value)
    out = packed_attention(zeros, zeros, value, layout, scale=1.0)
    expected = [1, (1 + 3) / 2, (1 + 3 + 8) / 3, (1 + 3 + 5) / 3, (1 + 3 + 5 + 7) / 4, 10, 15]
    torch.testing.assert_close(out.flatten(), torch.tensor(expected, dtype=torch.float32))


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
@settings(max_examples=60)
@given(lengths=lengths, heads=st.sampled_from([(1, 1), (4, 2), (3, 1)]), seed=st.integers(0, 9))
def test_a_dense_mask_says_the_same(kernel: Kernel, lengths, heads, seed):
    layout = PackLayout.of(lengths)
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        inputs = tensors(layout, heads, dtype=dtype, seed=seed)
        out = attend(*inputs, layout, 0.4, kernel)
        expected = dense(*inputs, layout, 0.4)
        assert out.dtype == dtype
        assert_near(out, expected, tolerance)
        for grad, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
            assert_near(grad, wanted, tolerance)


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_longer_than_a_kernels_blocks(kernel, monkeypatch):
    # Blocks on CPU are at most 256 queries and 512 keys; the math takes 7 queries at a time.
    layout = PackLayout.of([(600, (300, 300, 10)), (5, (290,))])
    real = attention_kernels._math_chunks
    if kernel is MATH:
        monkeypatch.setattr(attention_kernels, "MATH_SCORES", 4 * 600 * 7)
        queries = torch.empty(1, 4, 610, 8)
        assert len(list(real(queries, torch.empty(1, 2, 600, 8), False))) == math.ceil(610 / 7)
    inputs = tensors(layout)
    out, expected = attend(*inputs, layout, 0.4, kernel), dense(*inputs, layout, 0.4)
    assert_near(out, expected, 1e-12)
    for grad, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        assert_near(grad, wanted, 1e-12)


@pytest.mark.parametrize(("pads", "calls"), [(False, 2 + 8 + 2), (True, 2 + 1 + 2)])
def test_how_often_a_kernel_starts(pads, calls):
    """For each prompt and for completions on their prompts; else for each completion, or once."""
    started = []

    def forward(rows, causal, scale):
        started.append(rows[0].shape)
        return CPU_FLASH.forward(rows, causal, scale)

    layout = PackLayout.of([(9, (4, 7, 3, 5)), (6, (2, 1, 8, 6))])
    attend(*tensors(layout), layout, 0.4, replace(CPU_FLASH, forward=forward, pads=pads))
    assert len(started) == calls
    equal = PackLayout.of([(9, (4, 4, 4, 4)), (6, (4, 4))])  # nothing to pad
    started.clear()
    attend(*tensors(equal), equal, 0.4, replace(CPU_FLASH, forward=forward, pads=pads))
    assert len(started) == 2 + 2 + 2


@pytest.mark.parametrize("kernel", KERNELS.values(), ids=KERNELS)
def test_bf16(kernel):
    layout = PackLayout.of([(9, (4, 7, 7)), (3, (2,))])
    inputs = tensors(layout, dtype=torch.bfloat16)
    exact = leaves(inputs, Tensor.double)
    out, expected = attend(*inputs, layout, 0.4, kernel), dense(*exact, layout, 0.4)
    assert out.dtype == torch.bfloat16
    assert_near(out.double(), expected, 1e-2)
    for grad, wanted in zip(gradients(out, inputs), gradients(expected, exact), strict=True):
        assert grad.dtype == torch.bfloat16
        assert_near(grad.double(), wanted, 3e-2)


def test_any_strides():
    layout = PackLayout.of([(3, (2, 4)), (2, (2,))])
    inputs = tensors(layout)
    out = packed_attention(*inputs, layout, scale=0.4)
    grads = torch.autograd.grad(out.sum(), inputs)  # of stride 0
    others = leaves(inputs, lambda x: x.mT.contiguous().mT)
    other = packed_attention(*others, layout, scale=0.4)
    torch.testing.assert_close(other, out, rtol=0, atol=1e-14)
    for grad, wanted in zip(torch.autograd.grad(other.sum(), others), grads, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-14)
    wanted = torch.autograd.grad(dense(*inputs, layout, 0.4).sum(), inputs)
    for grad, expected in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("lengths", [[(3, (2,))], [(3, (2,)), (4, (1,))], [(3, (5,)), (7, (1,))]])
def test_groups_of_one_are_ordinary_rows(lengths):
    layout = PackLayout.of(lengths)
    inputs = tensors(layout, heads=(4, 2), dtype=torch.float32)
    out = packed_attention(*inputs, layout, scale=0.4)
    spans = [slice(g.start, g.stop) for g in layout.groups]
    rows = []
    for span in spans:
        query, key, value = (x[:, :, span] for x in inputs)
        rows.append(
            torch.nn.functional.scaled_dot_product_attention(
                query, key, value, is_causal=True, scale=0.4, enable_gqa=True
            )
        )
    assert torch.equal(out, torch.cat(rows, dim=2))
    for grad, wanted in zip(
        gradients(out, inputs), gradients(torch.cat(rows, dim=2), inputs), strict=True
    ):
        assert torch.equal(grad, wanted)


def saved_by(layout: PackLayout, device: str) -> tuple[Tensor, list[tuple[torch.Size, Any]]]:
    inputs = leaves(tensors(layout, dtype=torch.float32), lambda x: x.to(device))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out = packed_attention(*inputs, layout, scale=0.4)
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [x.shape for x in grads] == [x.shape for x in inputs]
    return out, [(x.shape, x.dtype) for x in kept]


@pytest.mark.parametrize("lengths", [[(3, (2, 4)), (2, (2,))], [(3, (2,)), (4, (1,))]])
def test_what_is_kept_and_the_meta_device(lengths):
    layout = PackLayout.of(lengths)
    total = layout.length
    out, kept = saved_by(layout, "cpu")
    row, keys = (1, 4, total, 8), (1, 2, total, 8)
    assert [tuple(shape) for shape, _ in kept] == [row, keys, keys, row, row[:3]]
    same, kept_on_meta = saved_by(layout, "meta")
    assert same.is_meta and same.shape == out.shape and same.stride() == out.stride()
    assert kept_on_meta == kept


class Widths(TorchDispatchMode):
    """Records how wide the heads are that reach the CUDA kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[int] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._scaled_dot_product_flash_attention.default:
            self.seen |= {x.shape[-1] for x in args[:3]}
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [8, 20])
def test_the_calls_of_the_cuda_kernel(dtype, width):
    # No GPU here: their signatures and shapes, as the meta device checks them.
    layout = PackLayout.of([(3, (2, 4)), (2, (2,))])
    inputs = leaves(tensors(layout, width=width, dtype=dtype), lambda x: x.to("meta"))
    with Widths() as widths:
        out = attend(*inputs, layout, 0.4, CUDA_FLASH)
    assert widths.seen == {8 if width == 8 else 24}  # the kernel wants multiples of 8
    assert out.shape == inputs[0].shape and out.dtype == dtype
    grads = torch.autograd.grad(out.sum(), inputs)
    assert [x.shape for x in grads] == [x.shape for x in inputs]


def test_widths_padded_for_the_cuda_kernel(monkeypatch):
    monkeypatch.setattr(packed, "CUDA_FLASH", MATH)
    layout = PackLayout.of([(3, (2, 4)), (2, (2,))])
    inputs = tensors(layout, width=5)
    out, expected = attend(*inputs, layout, 0.4, MATH), dense(*inputs, layout, 0.4)
    torch.testing.assert_close(out, expected, rtol=0, atol=1e-13)
    for grad, wanted in zip(gradients(out, inputs), gradients(expected, inputs), strict=True):
        torch.testing.assert_close(grad, wanted, rtol=0, atol=1e-13)


def test_choice_of_kernel():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        assert kernel_for(torch.empty(1, dtype=dtype)) is CPU_FLASH
        assert kernel_for(torch.empty(1, dtype=dtype, device="meta")) is CPU_FLASH


def test_autocast_is_that_of_sdpa():
    layout = PackLayout.of([(3, (2, 4)), (2, (2,))])
    query, key, value = tensors(layout, dtype=torch.float32)
    value = value.detach().to(torch.bfloat16).requires_grad_()  # a projection's output
    inputs = query, key, value
    for kernel in KERNELS.values():
        with (
            pytest.MonkeyPatch.context() as patch,
            torch.autocast("cpu", torch.bfloat16),
        ):
            patch.setattr(packed, "kernel_for", lambda _, kernel=kernel: kernel)
            out = packed_attention(*inputs, layout, scale=0.4)
            assert out.dtype == torch.bfloat16
            grads = gradients(out, inputs)
        assert [x.dtype for x in grads] == [x.dtype for x in inputs]
        query, key, value = (x.to(torch.bfloat16) for x in inputs)
        expected = attend(query, key, value, layout, 0.4, kernel)
        assert torch.equal(out, expected)
        for grad, wanted in zip(grads, gradients(expected, inputs), strict=True):
            assert torch.equal(grad, wanted)
    with torch.autocast("cpu", torch.bfloat16):
        doubles = tensors(layout)
        assert packed_attention(*doubles, layout, scale=0.4).dtype == torch.float64


def test_once_differentiable():
    layout = PackLayout.of([(2, (1, 1))])
    inputs = tensors(layout)
    out = packed_attention(*inputs, layout, scale=1.0)
    (grad,) = torch.autograd.grad((out**2).sum(), inputs[0], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_no_grad_keeps_nothing():
    layout = PackLayout.of([(2, (1, 2))])
    inputs = tensors(layout)
    with torch.no_grad():
        out = packed_attention(*inputs, layout, scale=0.4)
    assert not out.requires_grad
    torch.testing.assert_close(out, dense(*inputs, layout, 0.4).detach(), rtol=0, atol=1e-13)


def test_shapes_that_are_not_the_layouts():
    layout = PackLayout.of([(2, (1, 2))])
    query, key, value = tensors(layout)
    for wrong in (
        (query[:, :, 1:], key, value),
        (query, key[:, :, 1:], value[:, :, 1:]),
        (query, key, value[:, :1]),
        (query.expand(2, -1, -1, -1), key, value),
    ):
        with pytest.raises(PolicyError, match="5 tokens"):
            packed_attention(*wrong, layout, scale=1.0)


# In the real models.


def text_model(family: Family, attention: str = "sdpa") -> Any:
    """The family's tiny model with full attention in every layer."""
    model: Any = tiny_model(family)
    if family == "qwen3_5":
        config = copy.deepcopy(model.config)
        config.text_config.layer_types = ["full_attention"] * 2
        torch.manual_seed(0)
        model = type(model)(config).eval()
    model.set_attn_implementation(attention)
    return model


def text_config(model: Any) -> Any:
    return model.config.get_text_config()


LAYOUT = PackLayout.of([(7, (3, 5, 5)), (4, (2,)), (3, (6, 1))])


def sequences(layout: PackLayout) -> list[Tensor]:
    """The row's tokens of each prompt and completion, as indices."""
    found = []
    for group in layout.groups:
        start = group.answers
        for length in group.completions:
            row = (*range(group.start, group.answers), *range(start, start + length))
            found.append(torch.tensor(row))
            start += length
    return found


def row_positions(layout: PackLayout) -> Tensor:
    """[3,1,T]: every completion right behind its prompt."""
    positions = torch.zeros(layout.length, dtype=torch.long)
    for tokens in sequences(layout):
        positions[tokens] = torch.arange(len(tokens))
    return positions.expand(3, 1, -1)


def logits_of(model: Any, ids: Tensor, positions: Tensor, **kwargs: Any) -> Tensor:
    """[T,V] of the ids [T]."""
    return model(input_ids=ids[None], position_ids=positions, use_cache=False, **kwargs).logits[0]


def loss_and_gradients(model: Any, logits: list[Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
    """Of some function of every completion's logits."""
    torch.manual_seed(2)
    loss = torch.stack([(x * torch.randn(x.shape)).sum() for x in logits]).sum()
    model.zero_grad()
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("checkpointing", [None, False, True], ids=["plain", "new", "reentrant"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_packed_row(family, attention, checkpointing):
    model = text_model(family, attention)
    ids = torch.randint(0, 90, (LAYOUT.length,), generator=torch.Generator().manual_seed(0))
    answers = [c for g in LAYOUT.groups for c in g.completions]
    alone = [
        logits_of(model, ids[tokens], torch.arange(len(tokens)).expand(3, 1, -1))[-length:]
        for tokens, length in zip(sequences(LAYOUT), answers, strict=True)
    ]
    _, expected = loss_and_gradients(model, alone)

    install(text_config(model))
    if checkpointing is not None:
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": checkpointing})
        model.enable_input_require_grads()
    with followers() as layers:
        row = logits_of(model, ids, row_positions(LAYOUT), layout=LAYOUT)
    assert layers == {0, 1}
    together = [
        row[tokens[-length:]] for tokens, length in zip(sequences(LAYOUT), answers, strict=True)
    ]
    for ours, wanted in zip(together, alone, strict=True):
        assert_near(ours, wanted, 1e-5)
    _, grads = loss_and_gradients(model, together)
    assert grads.keys() == expected.keys()
    for name in expected:
        assert_near(grads[name], expected[name], 1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_no_mask_is_made_for_a_packed_row(family, monkeypatch):
    model = text_model(family)
    install(text_config(model))
    masks = []
    name = text_config(model)._attn_implementation
    real = ALL_ATTENTION_FUNCTIONS[name]

    def spy(module, query, key, value, attention_mask, **kwargs):
        masks.append(attention_mask)
        return real(module, query, key, value, attention_mask, **kwargs)

    monkeypatch.setitem(type(ALL_ATTENTION_FUNCTIONS)._global_mapping, name, spy)
    ids = torch.arange(LAYOUT.length)
    logits_of(model, ids, row_positions(LAYOUT), layout=LAYOUT)
    assert masks == [None, None]


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("family", FAMILIES)
def test_without_a_layout_nothing_changes(family, attention):
    base: Any = tiny_model(family)
    base.set_attn_implementation(attention)
    ours = copy.deepcopy(base)
    install(ours.config)
    install(text_config(ours))
    assert text_config(ours)._attn_implementation == f"packed_{attention}"
    assert ours.config.vision_config._attn_implementation == attention
    ours = copy.deepcopy(ours)
    torch.manual_seed(0)
    ids = torch.randint(0, 90, (2, 9))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    batch = {"input_ids": ids, "attention_mask": mask}
    for a, b in ((base(**batch), ours(**batch)), (base(ids), ours(ids, layout=None))):
        assert torch.equal(a.logits, b.logits)
    options: Any = {
        "max_new_tokens": 6,
        "do_sample": False,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    a, b = base.generate(**batch, **options), ours.generate(**batch, **options)
    assert torch.equal(a.sequences, b.sequences)
    assert all(torch.equal(x, y) for x, y in zip(a.logits, b.logits, strict=True))


def test_a_saved_model_has_no_trace(tmp_path):
    model = tiny_model()
    install(text_config(model))
    model.save_pretrained(tmp_path)
    assert packed.PREFIX not in (tmp_path / "config.json").read_text()
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert text_config(loaded)._attn_implementation == "sdpa"


def test_what_is_refused():
    model = text_model("qwen2_5_vl")
    config = text_config(model)
    config._attn_implementation = "flex_attention"
    with pytest.raises(PolicyError, match=r"'flex_attention'.*'sdpa'"):
        install(config)
    config._attn_implementation = "sdpa"
    install(config)
    ids, positions = torch.arange(LAYOUT.length), row_positions(LAYOUT)
    with pytest.raises(PolicyError, match="padding"):
        logits_of(model, ids, positions, layout=LAYOUT, attention_mask=(ids[None] > 0).long())
    model.train()
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    with pytest.raises(PolicyError, match=r"dropout.*0\.1"):
        logits_of(model, ids, positions, layout=LAYOUT)
    model.eval()
    logits_of(model, ids, positions, layout=LAYOUT)
    with pytest.raises(PolicyError, match="softcap"):
        logits_of(model, ids, positions, layout=LAYOUT, softcap=30.0)
    model.model.language_model.layers[1].self_attn.sliding_window = 4
    with pytest.raises(PolicyError, match="sliding_window"):
        logits_of(model, ids, positions, layout=LAYOUT)

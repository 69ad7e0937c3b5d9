"""Recurrent layers on packed rows, against every prompt and completion on its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import (
    AutoModelForImageTextToText,
    MambaConfig,
    MambaModel,
    OlmoHybridConfig,
    Qwen3_5MoeTextConfig,
    Qwen3_5TextConfig,
    Qwen3_5TextModel,
    Qwen3NextConfig,
    RwkvConfig,
    RwkvModel,
)
from transformers.models.olmo_hybrid.modeling_olmo_hybrid import OlmoHybridGatedDeltaNet
from transformers.models.qwen3_5 import modeling_qwen3_5
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5GatedDeltaNet
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeGatedDeltaNet
from transformers.models.qwen3_next.modeling_qwen3_next import Qwen3NextGatedDeltaNet

from rl.errors import PolicyError
from rl.policy.layout import PackLayout, followers
from rl.policy.packed_recurrence import _alike, install, obstacle
from tests.tiny import tiny_model

HIDDEN = 16
SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "num_hidden_layers": 2,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
}
TEXT: dict[str, Any] = SIZES | {
    "vocab_size": 32,
    "intermediate_size": 32,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "layer_types": ["linear_attention"] * 2,
    "initializer_range": 0.1,
}
LAYERS: dict[str, tuple[Any, Any]] = {
    "qwen3_5": (Qwen3_5GatedDeltaNet, Qwen3_5TextConfig),
    "qwen3_5_moe": (Qwen3_5MoeGatedDeltaNet, Qwen3_5MoeTextConfig),
    "qwen3_next": (Qwen3NextGatedDeltaNet, Qwen3NextConfig),
    "olmo_hybrid": (OlmoHybridGatedDeltaNet, OlmoHybridConfig),
}
# Two prompts of one length, one shorter than the convolution, groups of one; completions of one
# token, of more than a chunk of 64, and too unequal for one batch.
LAYOUT = PackLayout.of(
    [(7, (3, 1, 90)), (1, (2, 5)), (7, (1, 1)), (3, (4,)), (70, (200, 6)), (2, (5,))]
)
SHORT = PackLayout.of([(7, (3, 1, 9)), (1, (2, 5)), (7, (1, 1)), (3, (4,))])
layouts = st.lists(
    st.tuples(
        st.integers(1, 9) | st.integers(60, 70),
        st.lists(st.integers(1, 6) | st.integers(60, 140), min_size=1, max_size=4),
    ),
    min_size=1,
    max_size=4,
).map(PackLayout.of)


def gated_delta_net(family: str = "qwen3_5") -> Any:
    torch.manual_seed(0)
    layer, config = LAYERS[family]
    return remembering(layer(config(**SIZES), 0))


def remembering(model: Any) -> Any:
    """Slow decay, so that a state lasts through a prompt; as initialised, it is gone in a token."""
    for name, parameter in model.named_parameters():
        if name.endswith("dt_bias"):
            nn.init.uniform_(parameter, -6, -1)
    return model


def linear_text_model() -> Any:
    """A Qwen3.5 language model of linear attention only."""
    torch.manual_seed(0)
    return remembering(Qwen3_5TextModel(Qwen3_5TextConfig(**TEXT)))


def separately(run: Callable[[torch.Tensor], torch.Tensor], row: torch.Tensor, layout: PackLayout):
    """The outputs of a packed row [1, T, H], from `run` on each prompt with each completion."""
    pieces = []
    for group in layout.groups:
        prompt, start = row[:, group.start : group.answers], group.answers
        for i, length in enumerate(group.completions):
            output = run(torch.cat([prompt, row[:, start : start + length]], dim=1))
            pieces.append(output if i == 0 else output[:, group.prompt :])
            start += length
    return torch.cat(pieces, dim=1)


def row_of(layout: PackLayout, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    torch.manual_seed(layout.length)
    return torch.randn(1, layout.length, HIDDEN, dtype=dtype)


def results(
    run: Callable[[torch.Tensor], torch.Tensor], model: nn.Module, row: torch.Tensor
) -> dict[str, torch.Tensor]:
    """Outputs, and the gradients of the inputs and of every trained parameter under random weights
    on the outputs.
    """
    row = row.clone().requires_grad_()
    output = run(row)
    torch.manual_seed(1)
    trained = {"inputs": row} | {n: p for n, p in model.named_parameters() if p.requires_grad}
    for tensor in trained.values():
        tensor.grad = None
    (output * torch.randn_like(output)).sum().backward()
    gradients = {name: tensor.grad for name, tensor in trained.items() if tensor.grad is not None}
    assert gradients.keys() == trained.keys()
    return {"outputs": output.detach()} | gradients


def assert_same(
    found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], tolerance: float
) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert value.abs().max() > 0, name
        error = (found[name] - value).norm() / value.norm()
        # A number a head, each the sum over all tokens of terms that cancel: rounding shows.
        decay = name.endswith(("dt_bias", "A_log"))
        assert error <= tolerance * (5 if decay else 1), f"{name}: {error:.1e}"


@contextmanager
def double_precision() -> Iterator[None]:
    """transformers' own rule computes in single precision, whatever it is given."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(modeling_qwen3_5, "torch_chunk_gated_delta_rule", stepwise)
        yield


def stepwise(query, key, value, g, beta, initial_state=None, output_final_state=False, **_):
    """The gated delta rule token by token, in the dtype it is given."""
    query, key = (x / (x.square().sum(-1, keepdim=True) + 1e-6).sqrt() for x in (query, key))
    state = initial_state
    if state is None:
        state = query.new_zeros(*value.shape[:1], *value.shape[2:3], key.shape[-1], value.shape[-1])
    outputs = []
    for t in range(query.shape[1]):
        state = state * g[:, t, :, None, None].exp()
        read = torch.einsum("bhkv,bhk->bhv", state, key[:, t])
        change = (value[:, t] - read) * beta[:, t, :, None]
        state = state + torch.einsum("bhk,bhv->bhkv", key[:, t], change)
        outputs.append(torch.einsum("bhkv,bhk->bhv", state, query[:, t]) * key.shape[-1] ** -0.5)
    return torch.stack(outputs, 1), state if output_final_state else None


@pytest.mark.parametrize("family", LAYERS)
def test_equals_separate_sequences(family):
    layer = gated_delta_net(family)
    row = row_of(LAYOUT)
    expected = results(lambda x: separately(layer, x, LAYOUT), layer, row)
    assert install(layer) == 1
    assert_same(results(lambda x: layer(x, layout=LAYOUT), layer, row), expected, 1e-5)


@settings(max_examples=40, deadline=None)
@given(layouts)
def test_equals_separate_sequences_for_any_layout(layout):
    layer = gated_delta_net()
    install(layer)
    row = row_of(layout)
    expected = results(lambda x: separately(layer, x, layout), layer, row)
    assert_same(results(lambda x: layer(x, layout=layout), layer, row), expected, 1e-5)


@settings(max_examples=10, deadline=None)
@given(layouts)
def test_equals_separate_sequences_in_double_precision(layout):
    layer = gated_delta_net().double()
    install(layer)
    row = row_of(layout, torch.float64)
    with double_precision():
        expected = results(lambda x: separately(layer, x, layout), layer, row)
        found = results(lambda x: layer(x, layout=layout), layer, row)
    assert_same({"outputs": found["outputs"]}, {"outputs": expected["outputs"]}, 1e-12)
    # Gradients of the decay are rounded to single precision, by the layer, once a pass.
    assert_same(found, expected, 2e-7)


def test_single_tokens_do_not_take_the_kernels_for_decoding(monkeypatch):
    layer = gated_delta_net()
    install(layer)
    for name in ("torch_recurrent_gated_delta_rule", "causal_conv1d_update"):
        monkeypatch.setattr(modeling_qwen3_5, name, None)
    layout = PackLayout.of([(4, (1, 1)), (1, (1, 1, 1))])
    row = row_of(layout)
    expected = results(lambda x: separately(layer, x, layout), layer, row)
    assert_same(results(lambda x: layer(x, layout=layout), layer, row), expected, 1e-5)


def test_every_token_is_computed_once():
    layer = gated_delta_net()
    install(layer)
    seen = []
    layer.in_proj_z.register_forward_pre_hook(lambda _, args: seen.append(args[0].shape[:2]))
    # Groups of one together, prompts of one length, all completions: here without padding.
    layout = PackLayout.of([(100, (10, 10, 10)), (100, (10, 10)), (30, (9,)), (31, (8,))])
    with torch.no_grad():
        layer(row_of(layout), layout=layout)
    assert seen == [(2, 39), (2, 100), (5, 10)]


def test_batches_pad_little():
    # 290 is near 300; 70 is not, and 10 is as good as 70 to kernels that compute 64 at a time.
    assert _alike([0, 1, 2, 3], [300, 10, 290, 70]) == [[0, 2], [3, 1]]
    assert _alike([0, 1, 2], [800, 700, 699]) == [[0, 1], [2]]  # an eighth of 800 is 100


def test_groups_of_one_equal_the_old_forward_exactly():
    layout = PackLayout.of([(5, (6,)), (2, (1,))])
    layer, row = gated_delta_net(), row_of(layout)
    with torch.no_grad():
        alone = layer(row[:, :11])
        install(layer)
        torch.testing.assert_close(layer(row, layout=layout)[:, :11], alone, rtol=1e-6, atol=1e-7)
        single = PackLayout.of([(5, (6,))])
        assert torch.equal(layer(row[:, :11], layout=single), alone)


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_language_model_with_gradient_checkpointing(reentrant):
    model = linear_text_model().double()
    model.get_input_embeddings().requires_grad_(False)  # inputs are vectors here

    def run(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False, **kwargs).last_hidden_state

    row = row_of(SHORT, torch.float64)
    with double_precision():
        expected = results(lambda x: separately(run, x, SHORT), model, row)
        assert install(model) == 2
        model.train()
        calls = []
        for layer in model.layers:
            layer.linear_attn.register_forward_hook(lambda *_: calls.append(1))
        if reentrant is not None:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        found = results(lambda x: run(x, layout=SHORT), model, row)
    assert len(calls) == (2 if reentrant is None else 4)
    assert_same(found, expected, 1e-6)


def test_layout_reaches_every_layer_of_a_vision_language_model():
    model = tiny_model("qwen3_5", layers=4)
    layers: Any = model.model.language_model.layers
    recurrent = [layer.linear_attn for layer in layers if hasattr(layer, "linear_attn")]
    assert install(model) == len(recurrent) == 2
    layout = PackLayout.of([(3, (2, 4))])
    ids = torch.randint(0, 200, (1, layout.length))
    seen = []
    inputs = []
    for layer in recurrent:
        layer.register_forward_pre_hook(
            lambda _, args, kwargs: seen.append(kwargs["layout"]), with_kwargs=True
        )
    recurrent[0].register_forward_hook(
        lambda _, args, kwargs, output: inputs.append((kwargs["hidden_states"], output)),
        with_kwargs=True,
    )
    with torch.no_grad():
        with followers() as following:
            model(input_ids=ids, layout=layout, use_cache=False)
        assert {0, 2} <= following  # layers 1 and 3 are attention
        assert seen == [layout, layout]
        hidden, output = inputs[0]
        expected = separately(lambda x: recurrent[0](hidden_states=x, layout=None), hidden, layout)
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_without_layout_nothing_changes():
    plain: Any = tiny_model("qwen3_5", layers=4)
    model: Any = copy.deepcopy(plain)
    install(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    ids = torch.randint(0, 200, (2, 9))
    mask = torch.ones_like(ids)
    mask[0, :4] = 0
    batch: dict[str, Any] = {"input_ids": ids, "attention_mask": mask}
    for inputs in (batch, {"input_ids": ids}, batch | {"layout": None}):
        found, expected = model(**inputs).logits, plain(**{**inputs, "layout": None}).logits
        assert torch.equal(found, expected)
    options: dict[str, Any] = {
        "max_new_tokens": 6,
        "min_new_tokens": 6,
        "do_sample": False,
        "use_cache": True,
        "output_logits": True,
        "return_dict_in_generate": True,
    }
    found, expected = model.generate(**batch, **options), plain.generate(**batch, **options)
    assert torch.equal(found.sequences, expected.sequences)
    assert len(found.logits) == 6
    assert all(torch.equal(a, b) for a, b in zip(found.logits, expected.logits, strict=True))


def test_a_copy_runs_on_its_own_weights():
    layer = gated_delta_net()
    install(layer)
    row = row_of(LAYOUT)
    with torch.no_grad():
        before = layer(row, layout=LAYOUT)
        twin = copy.deepcopy(layer)
        for parameter in layer.parameters():
            parameter.mul_(1.5)
        assert torch.equal(twin(row, layout=LAYOUT), before)
        assert not torch.allclose(layer(row, layout=LAYOUT), before)
        expected = separately(layer, row, LAYOUT)
        torch.testing.assert_close(layer(row, layout=LAYOUT), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("first", ["install", "lora"])
def test_lora(first):
    model = linear_text_model()
    if first == "install":
        install(model)
    lora = LoraConfig(target_modules=["in_proj_qkv", "in_proj_z", "in_proj_a", "out_proj"], r=4)
    model = get_peft_model(model, lora).double()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:  # zeros otherwise, which hide the gradient of lora_A
            nn.init.normal_(parameter, std=0.1)
    assert install(model) == 2

    def run(x: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        return model(inputs_embeds=x, use_cache=False, **kwargs).last_hidden_state

    row = row_of(SHORT, torch.float64)
    with double_precision():
        expected = results(lambda x: separately(run, x, SHORT), model, row)
        found = results(lambda x: run(x, layout=SHORT), model, row)
    assert len(expected) == 2 + 2 * 2 * 4  # in two layers four modules with two matrices
    assert_same(found, expected, 1e-6)


def test_autocast():
    layer, row = gated_delta_net(), row_of(LAYOUT)
    install(layer)
    with torch.autocast("cpu", torch.bfloat16):
        expected = results(lambda x: separately(layer, x, LAYOUT), layer, row)
        found = results(lambda x: layer(x, layout=LAYOUT), layer, row)
    assert found["outputs"].dtype == torch.bfloat16
    assert_same(found, expected, 2e-2)


def test_save_and_load(tmp_path):
    model = tiny_model("qwen3_5")
    names = model.state_dict().keys()
    install(model)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path)
    assert loaded.state_dict().keys() == names
    ids = torch.randint(0, 200, (1, 5))
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=ids).logits, model(input_ids=ids).logits)


def test_installing_twice_is_installing_once():
    layer = gated_delta_net()
    assert install(layer) == install(layer) == 1
    assert [kind.__name__ for kind in type(layer).__mro__[:3]] == [
        "PackedQwen3_5GatedDeltaNet",
        "PackedRecurrence",
        "Qwen3_5GatedDeltaNet",
    ]


def test_what_a_packed_row_cannot_have():
    layer = gated_delta_net()
    install(layer)
    layout = PackLayout.of([(3, (2, 4))])
    row = row_of(layout)
    for wrong in (row[:, 1:], row.expand(2, -1, -1)):
        with pytest.raises(PolicyError, match="a packed row of 9 tokens"):
            layer(wrong, layout=layout)
    with pytest.raises(PolicyError, match="use_cache=False"):
        layer(row, cache_params=object(), layout=layout)
    with pytest.raises(PolicyError, match="no padding"):
        layer(row, attention_mask=torch.zeros(1, 9), layout=layout)


def test_models_without_recurrence_need_nothing():
    model = tiny_model("qwen3_vl")
    assert obstacle(model) is None
    assert install(model) == 0


def test_models_that_cannot_be_packed():
    mamba = MambaModel(MambaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, state_size=2))
    with pytest.raises(PolicyError, match="MambaMixer"):
        install(mamba)
    # By its class: neither config nor modules tell.
    rwkv = RwkvModel(
        RwkvConfig(vocab_size=8, hidden_size=8, attention_hidden_size=8, num_hidden_layers=2)
    )
    with pytest.raises(PolicyError, match="RwkvModel has layers that"):
        install(rwkv)
    # Recurrent layers by their config, of which no module can be prepared.
    model = linear_text_model()
    model.layers[1].linear_attn = nn.Identity()
    with pytest.raises(PolicyError, match="Qwen3_5TextModel has layers that"):
        install(model)
    # A kind of layer that is not known.
    model = linear_text_model()
    model.config.layer_types = ["linear_attention", "hybrid"]
    with pytest.raises(PolicyError, match=r"layers \(hybrid\) that"):
        install(model)
    # Kinds past the last layer mean nothing.
    model = linear_text_model()
    model.config.layer_types = ["linear_attention", "linear_attention", "linear_attention"]
    assert obstacle(model) is None
    # A forward on the instance would hide ours, and swallow the layout.
    model = linear_text_model()
    inner = model.layers[0].linear_attn
    inner.forward = inner.forward
    with pytest.raises(PolicyError, match="replaced on the instance"):
        install(model)

"""Recurrent layers on packed rows: every completion continues from the state its prompt left.

A gated delta net (the linear attention of Qwen3-Next and Qwen3.5) reads its row from left to right,
so on `[prompt | completion 1 | … | completion G]` each completion would go on from the one before.
`install` gives such layers a forward that knows the layout: prompts run once, from zero, and then
all completions side by side, each from the state at the end of its prompt, through which gradients
flow. Without a layout the forward is the old one.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig

from rl.errors import PolicyError
from rl.policy.layout import PackLayout, follow

if TYPE_CHECKING:
    # What every dynamically made class is: the mixin on a transformers layer.
    _Base = nn.Module
else:
    _Base = object

_CHUNK = 64  # tokens the kernels compute at a time; they round every sequence up to it


class PackedRecurrence(_Base):
    """Mixin that gives a gated delta net packed rows; `install` combines it with the layer's class.

    A subclass, and not a new `forward` on the instance: a copy of the model then runs on its own
    weights, and hooks, names and `isinstance` stay as they are.
    """

    layer_idx: int

    def forward(
        self,
        hidden_states: torch.Tensor,
        cache_params: Any = None,
        attention_mask: torch.Tensor | None = None,
        layout: PackLayout | None = None,
        **kwargs: Any,
    ) -> torch.Tensor:
        """[B, T, H] to [B, T, H]; with a `layout`, B is 1 and T its length.

        Of a packed row the layout says everything: further keywords, which tell kernels about other
        ways of packing, are not passed on.
        """
        forward = super().forward
        if layout is None:
            return forward(
                hidden_states=hidden_states,
                cache_params=cache_params,
                attention_mask=attention_mask,
                **kwargs,
            )
        if hidden_states.shape[:2] != (1, layout.length):
            raise PolicyError(
                f"a packed row of {layout.length} tokens came to {type(self).__name__} as "
                f"{tuple(hidden_states.shape)}"
            )
        if cache_params is not None:
            raise PolicyError("packed rows take no cache: pass use_cache=False")
        if attention_mask is not None:  # transformers drops masks that hide nothing
            raise PolicyError("packed rows have no padding, but the attention mask hides tokens")

        follow(self.layer_idx)

        def run(rows: torch.Tensor, states: States | None) -> torch.Tensor:
            return forward(hidden_states=rows, cache_params=states, attention_mask=None)

        return run_packed(run, hidden_states, layout)


class States:
    """The states of one layer for the sequences of one batch, as that layer sees a `Cache`.

    Made empty, it records where the sequences end; made from states, the sequences continue them.
    transformers' own cache copies in place, which cuts gradients; here nothing is overwritten.
    """

    def __init__(
        self, conv: torch.Tensor | None = None, recurrent: torch.Tensor | None = None
    ) -> None:
        self._continues = conv is not None
        self.conv_states = [conv]  # [B, channels, K]: the last K inputs of the convolution
        self.recurrent_states = [recurrent]  # [B, heads, key width, value width]

    @classmethod
    def stack(cls, rows: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> States:
        """States for a batch, from the pair of each sequence without the batch dimension."""
        conv, recurrent = zip(*rows, strict=True)
        return cls(torch.stack(conv), torch.stack(recurrent))

    def unbind(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """The recorded pair of each sequence, without the batch dimension."""
        conv, recurrent = self.conv_states[0], self.recurrent_states[0]
        if conv is None or recurrent is None:
            raise PolicyError(
                "a recurrent layer kept no state at the end of a prompt, so its completions cannot "
                "go on from there; this version of transformers cannot be used with this model"
            )
        return list(zip(conv.unbind(), recurrent.unbind(), strict=True))

    @property
    def layers(self) -> States:
        # Itself: a list of itself would be a cycle, and keep the graph until garbage is collected.
        return self

    def __getitem__(self, _layer: int) -> States:
        return self

    def has_previous_state(self, *_args: Any, **_kwargs: Any) -> bool:
        return self._continues

    def update_conv_state(
        self, inputs: torch.Tensor, _layer: int, *, conv_kernel_size: int
    ) -> torch.Tensor:
        """`inputs` [B, channels, T] behind what the convolution must see before them."""
        if self._continues:
            return torch.cat([self.conv_states[0], inputs], dim=-1)  # type: ignore[list-item]
        missing = conv_kernel_size - inputs.shape[-1]
        if missing > 0:  # before a sequence the convolution sees zeros
            inputs = F.pad(inputs, (missing, 0))
        self.conv_states[0] = inputs[..., -conv_kernel_size:]
        return inputs

    def update_recurrent_state(self, state: torch.Tensor, _layer: int) -> torch.Tensor:
        if not self._continues:
            self.recurrent_states[0] = state
        return state


def run_packed(
    run: Callable[[torch.Tensor, States | None], torch.Tensor],
    hidden: torch.Tensor,
    layout: PackLayout,
) -> torch.Tensor:
    """Run a recurrent layer over the packed row `hidden` [1, T, H]; returns its outputs [1, T, H].

    `run(rows [B, C, H], states)` is the layer on sequences of one length. Groups of one completion
    are a single sequence each.
    """
    sizes: list[int] = []
    alone: list[int] = []  # pieces that start from zero and that nothing continues
    prompts: dict[int, list[int]] = defaultdict(list)  # by length: padding would change their end
    prompt_of: dict[int, int] = {}  # the piece that a completion continues
    for group in layout.groups:
        first = len(sizes)
        if len(group.completions) > 1:
            prompts[group.prompt].append(first)
            sizes += [group.prompt, *group.completions]
            prompt_of |= dict.fromkeys(range(first + 1, len(sizes)), first)
        else:
            alone.append(first)
            sizes.append(group.stop - group.start)

    # One split and one cat: a slice for each piece would cost a whole row each in the backward.
    pieces = hidden[0].split(sizes)
    outputs: dict[int, torch.Tensor] = {}

    def batch(which: Sequence[int], states: States | None, at_least: int = 1) -> None:
        longest = max(at_least, max(sizes[i] for i in which))
        rows = torch.stack(
            [
                F.pad(pieces[i], (0, 0, 0, longest - sizes[i])) if sizes[i] < longest else pieces[i]
                for i in which
            ]
        )
        for i, row in zip(which, run(rows, states).unbind(), strict=True):
            outputs[i] = row[: sizes[i]]

    for which in _alike(alone, sizes):
        batch(which, None)
    ends: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
    for which in prompts.values():
        states = States()
        batch(which, states)
        ends |= zip(which, states.unbind(), strict=True)
    for which in _alike(prompt_of, sizes):
        # Single tokens would take the kernels for decoding, which overwrite states or have no
        # gradient.
        batch(which, States.stack(ends[prompt_of[i]] for i in which), at_least=2)
    return torch.cat([outputs[i] for i in range(len(sizes))]).unsqueeze(0)


def _alike(pieces: Iterable[int], sizes: Sequence[int]) -> list[list[int]]:
    """Batches of pieces of about one length: what padding adds to a piece is at most an eighth of
    the longest, or what a chunk would be rounded up by anyway.
    """
    batches: list[list[int]] = []
    for i in sorted(pieces, key=lambda i: -sizes[i]):
        longest = sizes[batches[-1][0]] if batches else 0
        if batches and longest - sizes[i] <= max(_CHUNK, longest // 8):
            batches[-1].append(i)
        else:
            batches.append([i])
    return batches


def install(model: nn.Module) -> int:
    """Give every recurrent layer of `model` packed rows; returns how many layers are ready.

    The layers keep their parameters, hooks and names. A second call changes nothing. Raises
    `PolicyError` where `obstacle` finds one.
    """
    if (reason := obstacle(model)) is not None:
        raise PolicyError(reason)
    layers = [module for module in model.modules() if _is_recurrent(type(module))]
    for layer in layers:
        if not isinstance(layer, PackedRecurrence):
            layer.__class__ = _packed_class(type(layer))
    return len(layers)


def is_recurrent(model: nn.Module) -> bool:
    """Whether `model` has recurrent layers."""
    return any(_is_recurrent(type(module)) for module in model.modules())


def obstacle(model: nn.Module) -> str | None:
    """Why the recurrent layers of `model` cannot run on packed rows, or None if they can or there
    are none. Such a model would silently carry one completion over into the next.
    """
    recurrent = [module for module in model.modules() if _is_recurrent(type(module))]
    if strange := sorted({type(m).__name__ for m in recurrent if not _is_known(type(m))}):
        return (
            f"{', '.join(strange)} cannot run on packed rows: of recurrent layers only gated delta "
            "nets can, with forward(hidden_states, cache_params, attention_mask, **kwargs)"
        )
    if any("forward" in vars(module) for module in recurrent):
        return (
            f"the forward of {type(recurrent[0]).__name__} was replaced on the instance (by "
            "accelerate's offloading or a hub kernel), so it cannot run on packed rows"
        )
    kinds = _layer_kinds(model)
    odd = set(kinds or ()) - {"full_attention", "sliding_attention", "linear_attention"}
    if kinds is None:  # the config does not say; then the class may
        missed = getattr(model, "_is_stateful", False) and not recurrent
    else:
        missed = kinds.count("linear_attention") > len(recurrent)
    if odd or missed:
        named = f" ({', '.join(sorted(odd))})" if odd else ""
        return f"{type(model).__name__} has layers{named} that cannot run on packed rows"
    return None


def _layer_kinds(model: nn.Module) -> list[str] | None:
    """What the config of a model says of its layers, ``linear_attention`` and so on."""
    config = getattr(model, "config", None)
    if not isinstance(config, PretrainedConfig):
        return None
    text = config.get_text_config()
    kinds = getattr(text, "layer_types", None)
    return None if kinds is None else list(kinds)[: text.num_hidden_layers]


@lru_cache
def _is_recurrent(kind: type[nn.Module]) -> bool:
    """Whether modules of a class keep recurrent states in what transformers calls so."""
    return "cache_params" in inspect.signature(kind.forward).parameters


@lru_cache
def _is_known(kind: type[nn.Module]) -> bool:
    parameters = inspect.signature(kind.forward).parameters
    return (
        kind.__name__.endswith("GatedDeltaNet")
        and list(parameters)[:4] == ["self", "hidden_states", "cache_params", "attention_mask"]
        and any(p.kind is p.VAR_KEYWORD for p in parameters.values())
    )


@lru_cache
def _packed_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The packed variant of a layer class, e.g. `PackedQwen3_5GatedDeltaNet`."""
    return type(f"Packed{kind.__name__}", (PackedRecurrence, kind), {"__module__": __name__})

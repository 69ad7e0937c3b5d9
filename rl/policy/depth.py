"""Routing depth scaling: chosen layers give hard tokens another pass.

Visual-enhanced depth scaling (arXiv 2604.10500; Simon98-AI/Vedas) lets a router choose the 32
tokens of a sequence that run through a block a second time. Which tokens these are depends on what
comes behind them, so a token's depth in training is not its depth in generation. The gate here, our
reconstruction, looks at a token's own state alone:

    x = Block(h),   m = clamp(w·x / rms(x) + b, 0, 1),   out = x + m · (Block(x) - x)

where the second pass attends to the keys and values of the first: every token sees what it saw
before, whatever others do, and a cache holds nothing more. m is continuous, so rounding cannot make
two engines disagree about a token: near the threshold its second pass hardly counts. A budget loss
on the share of tokens that take it keeps the gate from opening, or closing, for all of them.

`router: published` is the released one, for comparison: it needs whole sequences, so it trains and
never generates.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import asdict, dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import nn
from transformers import initialization as init

from rl.errors import PolicyError
from rl.policy.layout import PackLayout
from rl.policy.saliency import unwatched

if TYPE_CHECKING:
    # What every dynamically made class is: the mixin on a decoder layer of transformers.
    _Base = nn.Module
else:
    _Base = object

Router = Literal["token", "published"]

_WORTH_PICKING = 32  # tokens of a pass: below, a second pass of all costs no more
_SOFTNESS = 0.1  # of the step that counts a token as taking the second pass, in units of the gate


@dataclass(frozen=True)
class DepthConfig:
    """`layers` that may give a second pass (None: all odd ones with attention, as released);
    `budget`, the share of tokens that should take it; for the published router, how many `tokens`
    of a sequence take it. Raises `PolicyError`.
    """

    layers: tuple[int, ...] | None = None
    budget: float = 0.25
    router: Router = "token"
    tokens: int = 32

    def __post_init__(self) -> None:
        if self.layers is not None:
            object.__setattr__(self, "layers", tuple(sorted(set(self.layers))))
        if not 0.0 < self.budget < 1.0:
            raise PolicyError(f"depth: the budget is {self.budget}; it is a share between 0 and 1")
        if self.router not in get_args(Router):
            raise PolicyError(f"depth: router is {self.router!r}; choose one of {get_args(Router)}")
        if self.tokens < 1:
            raise PolicyError(f"depth: tokens is {self.tokens}; it must be at least 1")

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)

    def chosen(self, kinds: Sequence[str]) -> tuple[int, ...]:
        """The layers of a model whose layers are of these `kinds`. Raises `PolicyError`."""
        attending = [i for i, kind in enumerate(kinds) if kind != "linear_attention"]
        layers = [i for i in attending if i % 2] if self.layers is None else self.layers
        wrong = [i for i in layers if i not in attending]
        if wrong:
            what = "is recurrent, so a second pass would need a state of its own"
            if not 0 <= wrong[0] < len(kinds):
                what = f"is none of the model's {len(kinds)}"
            raise PolicyError(
                f"policy.depth.layers: layer {wrong[0]} {what}; choose of {attending}"
            )
        if not layers:
            raise PolicyError(
                "policy.depth: the model has no odd layer with attention; name layers of "
                f"{attending} in policy.depth.layers"
            )
        return tuple(layers)


class DepthGate(nn.Module):
    """How much of a second pass each token takes."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.router = nn.Linear(hidden_size, 1)

    def reset(self) -> None:
        """So small that a new gate hardly changes anything, half of the tokens on either side."""
        init.normal_(self.router.weight, std=0.1 / math.sqrt(self.router.in_features))
        init.zeros_(self.router.bias)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """x [B, T, 1] in float32, of hidden states [B, T, H]; the gate is clamp(x, 0, 1)."""
        hidden = hidden.float()
        hidden = hidden * torch.rsqrt(hidden.square().mean(-1, keepdim=True) + 1e-6)
        router = self.router
        with torch.autocast(hidden.device.type, enabled=False):
            return nn.functional.linear(hidden, router.weight.float(), router.bias.float())


class DeepLayer(_Base):
    """Mixin that gives a decoder layer a second pass; `install` combines it with the layer's class.

    A subclass, and not a new `forward` on the instance, as `rl.policy.packed_recurrence` does it.
    """

    depth_gate: Any
    depth_config: DepthConfig

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        once = _FirstPass(kwargs.pop("past_key_values", None))
        if self.depth_config.router == "published":
            if once.cache is not None:
                raise PolicyError(
                    "the published router of depth scaling chooses among all tokens of a sequence, "
                    "those to come included, so it cannot generate: write policy.depth.router: "
                    "token, or use it for training on given sequences only"
                )
            out = super().forward(hidden_states, *args, past_key_values=None, **kwargs)
            return self._published(out, *args, **kwargs)
        out = super().forward(hidden_states, *args, past_key_values=once, **kwargs)
        level = self.depth_gate(out)
        gate = level.clamp(0.0, 1.0)
        if torch.is_grad_enabled():
            _count(level[..., 0])
        elif not bool(gate.any()):
            return out
        elif out.shape[1] > _WORTH_PICKING and kwargs.get("layout") is None:
            return self._again_where_open(out, gate[..., 0], once, *args, **kwargs)
        with unwatched():  # whether this pass runs at all depends on the other tokens of a batch
            again = super().forward(out, *args, past_key_values=_SecondPass(once), **kwargs)
        return out + (gate * (again - out).float()).to(out.dtype)

    def _again_where_open(
        self, hidden: torch.Tensor, gate: torch.Tensor, once: _FirstPass, *args: Any, **kwargs: Any
    ) -> torch.Tensor:
        """The second pass of those tokens [B, T] alone whose gate is open, beside padding where a
        row has fewer of them. For passes without gradients, where nothing asks about the others.
        """
        open_ = gate > 0
        counts = open_.sum(1)
        # Those of each row first, in their order.
        at = (~open_).long().argsort(dim=1, stable=True)[:, : int(counts.max())]
        cos, sin = kwargs.pop("position_embeddings")
        rows = hidden.gather(1, at[..., None].expand(-1, -1, hidden.shape[-1]))
        assert once.seen is not None
        keys, length = once.seen[0].shape[2], hidden.shape[1]
        mask = kwargs.pop("attention_mask", None)
        if mask is None:
            lowest = torch.finfo(hidden.dtype).min
            behind = torch.arange(keys, device=at.device) > (at + keys - length)[..., None]
            mask = torch.zeros((), dtype=hidden.dtype, device=at.device)
            mask = mask.expand(behind.shape).masked_fill(behind, lowest)[:, None]
        else:
            mask = mask.expand(len(at), -1, -1, -1)
            mask = mask.gather(2, at[:, None, :, None].expand(-1, mask.shape[1], -1, keys))
        kwargs.pop("position_ids", None)
        with unwatched():
            again = super().forward(
                rows,
                *args,
                position_embeddings=(_picked(cos, at), _picked(sin, at)),
                attention_mask=mask,
                past_key_values=_SecondPass(once),
                **kwargs,
            )
        share = gate.gather(1, at)[..., None]  # 0 where it is padding
        added = (share * (again - rows).float()).to(hidden.dtype)
        return hidden.scatter_add(1, at[..., None].expand_as(added), added)

    def _published(self, hidden: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """h_i + π_i·Block(selected)_i, for the top tokens of each sequence by π, a softmax over it;
        the block sees only them.
        """
        layout: PackLayout | None = kwargs.pop("layout", None)
        for whole in ("attention_mask", "position_ids"):  # of the row, not of those chosen from it
            kwargs.pop(whole, None)
        cos, sin = kwargs.pop("position_embeddings")
        rows, length, _ = hidden.shape
        spans = [(row, 0, length) for row in range(rows)]
        if layout is not None:
            if any(len(group.completions) > 1 for group in layout.groups):
                raise PolicyError(
                    "the published router of depth scaling takes rows of single sequences, but "
                    "several completions share a prompt here; write policy.depth.router: token"
                )
            spans = [(0, group.start, group.stop) for group in layout.groups]
        levels = self.depth_gate(hidden)[..., 0]
        out = hidden.clone()
        for row, start, stop in spans:
            shares = levels[row, start:stop].softmax(0)
            best = shares.topk(min(self.depth_config.tokens, stop - start)).indices.sort().values
            at = best + start
            count = len(at)
            mask = torch.full((count, count), torch.finfo(hidden.dtype).min, device=hidden.device)
            again = super().forward(
                hidden[row : row + 1, at],
                *args,
                position_embeddings=(
                    cos.narrow(-3, row, 1).index_select(-2, at),
                    sin.narrow(-3, row, 1).index_select(-2, at),
                ),
                attention_mask=mask.triu(1).to(hidden.dtype)[None, None],
                past_key_values=None,
                **kwargs,
            )
            added = (shares[best, None] * again[0].float()).to(hidden.dtype)
            out = out.index_put((torch.full_like(at, row), at), hidden[row, at] + added)
        return out


def _picked(rotary: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """Rotary factors [..., B, T, D] of the tokens `at` [B, S]."""
    index = at[..., None].expand(*rotary.shape[:-3], -1, -1, rotary.shape[-1])
    return rotary.expand(*rotary.shape[:-3], len(at), -1, -1).gather(-2, index)


class _FirstPass:
    """Stands in for a layer's cache in its first pass, and remembers what that attends to."""

    def __init__(self, cache: Any) -> None:
        self.cache = cache
        self.seen: tuple[torch.Tensor, torch.Tensor] | None = None

    def update(
        self, key: torch.Tensor, value: torch.Tensor, layer: int, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if self.cache is not None:
            key, value = self.cache.update(key, value, layer, *args, **kwargs)
        self.seen = key, value
        return key, value


class _SecondPass:
    """A cache that takes nothing in, and gives what the first pass attended to."""

    def __init__(self, first: _FirstPass) -> None:
        assert first.seen is not None
        self._seen = first.seen

    def update(self, *_args: Any, **_kwargs: Any) -> tuple[torch.Tensor, torch.Tensor]:
        return self._seen


# What a gate said of all tokens of a pass, and which of them are no padding: [B, T] both.
Levels = tuple[torch.Tensor, torch.Tensor | None]

_counting: ContextVar[list[Levels] | None] = ContextVar("levels of the gates", default=None)
_real: ContextVar[torch.Tensor | None] = ContextVar("which tokens count", default=None)


def _count(levels: torch.Tensor) -> None:
    if (counted := _counting.get()) is not None:  # None in backward: checkpointed layers run again
        counted.append((levels, _real.get()))


@contextmanager
def counting_only(real: torch.Tensor) -> Iterator[None]:
    """While this lasts, tokens count where `real` (bool [B, T]) says so: the others are padding."""
    token = _real.set(real)
    try:
        yield
    finally:
        _real.reset(token)


@contextmanager
def counted_depth() -> Iterator[list[Levels]]:
    """Collects what the gates of all layers say in passes with gradients while this lasts, also for
    a count that was going on.
    """
    levels: list[Levels] = []
    outer, token = _counting.get(), _counting.set(levels)
    try:
        yield levels
    finally:
        _counting.reset(token)
        if outer is not None:
            outer += levels


def second_pass_share(counted: Sequence[Levels]) -> torch.Tensor | None:
    """The share of tokens that take the second pass, over all layers, softened so that it has a
    gradient: a float32 scalar. None where nothing was counted.
    """
    if not counted:
        return None
    weights = [
        (torch.ones_like(level) if real is None else real.to(level.dtype)).flatten()
        for level, real in counted
    ]
    weight = torch.cat(weights)
    soft = torch.sigmoid(torch.cat([level.flatten() for level, _ in counted]) / _SOFTNESS)
    return (soft * weight).sum() / weight.sum()


def budget_loss(share: torch.Tensor, budget: float) -> torch.Tensor:
    """(share - budget)², of the share of tokens that take the second pass. It is a loss of a pass:
    the fewer rows are computed together, the more each of them has to keep to the budget.
    """
    return (share - budget).square()


def install(model: Any, config: DepthConfig) -> None:
    """Give the chosen layers of a vision-language model's text model their gates, as the module
    ``depth_gate`` of each. A second call changes nothing. Raises `PolicyError`.
    """
    text = model.config.get_text_config()
    layers = model.get_decoder().layers
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * len(layers)
    for index in config.chosen(list(kinds)[: len(layers)]):
        layer = layers[index]
        if not isinstance(layer, DeepLayer):
            layer.__class__ = _deep_class(type(layer))
            layer.depth_config = config
            layer.depth_gate = DepthGate(text.hidden_size)


@lru_cache
def _deep_class(kind: type[nn.Module]) -> type[nn.Module]:
    """The deep variant of a layer class, by the same name: FSDP and device maps know layers by
    it.
    """
    return type(kind.__name__, (DeepLayer, kind), {"__module__": __name__})

"""Attention over a row of `PackLayout`: a prompt sees itself causally, a completion its group's
prompt and, causally, itself; nothing crosses groups.

One dense mask would say the same and compute every masked pair. Here a group is split in parts that
need none, so that each runs at the speed of an ordinary kernel:

1. the prompt with itself, causal;
2. all completions with the prompt, everything visible: one call, of which keys and values are there
   once;
3. every completion with itself, causal.

A completion's two parts, each a softmax over its own keys, are merged by their log-sum-exps. For
the gradient, each part's backward kernel is given the *merged* output and log-sum-exp. That is
exact: a kernel recomputes its probabilities as exp(scores - lse), which with the merged lse are the
true ones, and all else that it needs of the softmax is the row sum of grad_out * out. (PyTorch's
ring attention splits keys over devices in the same way: torch.distributed.tensor.experimental.)

A group of one shares nothing and is one causal sequence.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from rl.errors import PolicyError
from rl.policy.attention_kernels import CUDA_FLASH, Kernel, accumulator, kernel_for
from rl.policy.layout import PackedGroup, PackLayout, follow
from rl.policy.saliency import watching


def packed_attention(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, *, scale: float
) -> Tensor:
    """Attention under `layout`: query [1,Hq,T,D], key and value [1,Hkv,T,D] -> [1,Hq,T,D].

    `Hq` is a multiple of `Hkv`. `scale` multiplies the scores. Autocast is respected as SDPA
    respects it. Differentiable once. Kept for backward: the arguments, the output and one number a
    token and head.

    Raises PolicyError for tensors of another shape than the layout's.
    """
    expected = (1, query.shape[1], layout.length, query.shape[3])
    if query.shape != expected or key.shape[2] != layout.length or key.shape != value.shape:
        raise PolicyError(
            f"a packed row of {layout.length} tokens needs query, key and value of that length and "
            f"batch size 1, not {[list(x.shape) for x in (query, key, value)]}; pass it without a "
            "cache, one row at a time"
        )
    # "meta" has no autocast, and asking for it raises.
    device = query.device.type
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        query, key, value = (
            x if x.dtype == torch.float64 else x.to(dtype) for x in (query, key, value)
        )
    return attend(query, key, value, layout, scale, kernel_for(query))


def attend(
    query: Tensor, key: Tensor, value: Tensor, layout: PackLayout, scale: float, kernel: Kernel
) -> Tensor:
    """`packed_attention` with this kernel."""
    width = query.shape[-1]
    if kernel is CUDA_FLASH and width % 8:
        query, key, value = (functional.pad(x, (0, -width % 8)) for x in (query, key, value))
    # A kernel walks along D with stride 1, on CPU without asking.
    query, key, value = (_walkable(x) for x in (query, key, value))
    out: Tensor = _PackedAttention.apply(query, key, value, layout, scale, kernel)  # type: ignore[assignment]
    return out[..., :width] if width % 8 else out


class _PackedAttention(torch.autograd.Function):
    """See the module's docstring."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: PackLayout,
        scale: float,
        kernel: Kernel,
    ) -> Tensor:
        if run := _only_run(layout):  # nothing to put together: the kernel's output, not a copy
            part, part_lse = kernel.forward(run.of(query, key, value), True, scale)
            out, lse = run.row(part), run.row(part_lse)
        else:
            out = torch.empty_like(query)
            lse = query.new_empty(query.shape[:3], dtype=accumulator(query.dtype))
            for run in _causal_runs(layout, kernel, query.device):
                part, part_lse = kernel.forward(run.of(query, key, value), True, scale)
                run.put(out, part)
                run.put(lse, part_lse)
            for answers, prompt in _shared(layout):
                rows = query[:, :, answers], key[:, :, prompt], value[:, :, prompt]
                part, part_lse = kernel.forward(rows, False, scale)
                own, own_lse = out[:, :, answers], lse[:, :, answers]
                weight = torch.sigmoid(part_lse - own_lse)[..., None]
                own.copy_(torch.lerp(own.to(lse.dtype), part.to(lse.dtype), weight))
                own_lse.copy_(torch.logaddexp(own_lse, part_lse))
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.layout, ctx.scale, ctx.kernel = layout, scale, kernel
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_out: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, out, lse = ctx.saved_tensors
        scale, kernel = ctx.scale, ctx.kernel
        rows = (_walkable(grad_out), query, key, value, out, lse)
        if run := _only_run(ctx.layout):
            parts = kernel.backward(run.of(*rows), True, scale)
            return *(run.row(part) for part in parts), None, None, None
        grads = [torch.empty_like(x) for x in (query, key, value)]
        for run in _causal_runs(ctx.layout, kernel, query.device):
            cut = run.of(*rows)
            parts = kernel.backward([run.only(cut[0]), *cut[1:]], True, scale)
            for grad, part in zip(grads, parts, strict=True):
                run.put(grad, part)
        for answers, prompt in _shared(ctx.layout):
            tokens = (answers, answers, prompt, prompt, answers, answers)
            cut = [x[:, :, at] for x, at in zip(rows, tokens, strict=True)]
            parts = kernel.backward(cut, False, scale)
            for grad, part, at in zip(grads, parts, tokens[1:4], strict=True):
                grad[:, :, at].add_(part)
        return *grads, None, None, None


@dataclass(frozen=True)
class _Run:
    """`count` sequences of `length` tokens, one behind the other: a batch without a copy."""

    start: int
    count: int
    length: int

    @property
    def stop(self) -> int:
        return self.start + self.count * self.length

    def of(self, *rows: Tensor) -> list[Tensor]:
        """Its part of each row: [1,H,T,...] -> a view [count,H,length,...]."""
        sizes = (self.count, self.length)
        return [x[0, :, self.start : self.stop].unflatten(1, sizes).transpose(0, 1) for x in rows]

    def row(self, part: Tensor) -> Tensor:
        """The inverse of `of` where this run is the whole row: a view, if `part` is laid out as the
        row was.
        """
        return part.transpose(0, 1).flatten(1, 2)[None]

    def put(self, row: Tensor, part: Tensor) -> None:
        """Write `part` [count,H,length,...] where it lies in `row` [1,H,T,...]."""
        self.of(row)[0].copy_(part)

    def only(self, part: Tensor) -> Tensor:
        """`part` without what is padding."""
        return part


@dataclass(frozen=True)
class _Padded:
    """N sequences of up to L tokens, anywhere in the row, as one batch: a few copies in the place
    of a kernel's start for each. Padding is on the right, where no other token sees it.
    """

    places: Tensor  # int64 [N,L], of each token in the row, and behind a sequence of its last one
    real: Tensor  # bool [N,L], what is no padding
    at: Tensor  # int64 [K], of the real tokens among the N * L
    row: Tensor  # int64 [K], of the same in the row

    @classmethod
    def of_sequences(cls, sequences: Sequence[tuple[int, int]], device: torch.device) -> _Padded:
        """Of (start, length) pairs."""
        longest = max(length for _, length in sequences)
        starts, lengths = (torch.tensor(values)[:, None] for values in zip(*sequences, strict=True))
        steps = torch.arange(longest)
        places, real = starts + steps.minimum(lengths - 1), steps < lengths
        at = real.flatten().nonzero()[:, 0]
        found = places, real, at, places.flatten()[at]
        return cls(*(x.to(device) for x in found))

    def of(self, *rows: Tensor) -> list[Tensor]:
        """Its part of each row: [1,H,T,...] -> a copy [N,H,L,...]."""
        return [x[0][:, self.places].transpose(0, 1) for x in rows]

    def put(self, row: Tensor, part: Tensor) -> None:
        """Write the real tokens of `part` [N,H,L,...] where they lie in `row` [1,H,T,...]."""
        row[0].index_copy_(1, self.row, part.transpose(0, 1).flatten(1, 2)[:, self.at])

    def only(self, part: Tensor) -> Tensor:
        """`part` [N,H,L,...] with zeros where it is padding."""
        return part * self.real[:, None, :, None]


def _causal_runs(
    layout: PackLayout, kernel: Kernel, device: torch.device
) -> Sequence[_Run | _Padded]:
    """What is causal within itself: prompts and completions, or both as one in groups of one.
    Neighbours of equal length are one run; where the kernel had rather pad, all completions are.
    """
    return _padded_runs(layout, device) if kernel.pads else _equal_runs(_sequences(layout))


@lru_cache(maxsize=16)
def _padded_runs(layout: PackLayout, device: torch.device) -> list[_Run | _Padded]:
    """Once for all layers of a pass: indices are copied to the device."""
    completions = [
        (start, length)
        for group in layout.groups
        if _shares(group)
        for start, length in _sequences(PackLayout((group,)))[1:]
    ]
    few = _equal_runs(completions)
    if len(few) <= 2:
        return _equal_runs(_sequences(layout))
    others = [sequence for sequence in _sequences(layout) if sequence not in set(completions)]
    return [*_equal_runs(others), _Padded.of_sequences(completions, device)]


def _sequences(layout: PackLayout) -> list[tuple[int, int]]:
    """(start, length) of everything that is causal within itself."""
    found = []
    for group in layout.groups:
        lengths = [group.stop - group.start]
        if _shares(group):
            lengths = [group.prompt, *group.completions]
        starts = accumulate(lengths[:-1], initial=group.start)
        found += zip(starts, lengths, strict=True)
    return found


def _equal_runs(sequences: Sequence[tuple[int, int]]) -> list[_Run | _Padded]:
    """Neighbours of equal length together."""
    runs: list[_Run | _Padded] = []
    for start, length in sequences:
        last = runs[-1] if runs else None
        if isinstance(last, _Run) and (last.stop, last.length) == (start, length):
            runs[-1] = replace(last, count=last.count + 1)
        else:
            runs.append(_Run(start, 1, length))
    return runs


def _only_run(layout: PackLayout) -> _Run | None:
    """The run that is the whole row, if nothing is shared in it."""
    runs = _equal_runs(_sequences(layout))
    alone = len(runs) == 1 and not any(map(_shares, layout.groups))
    return runs[0] if alone and isinstance(runs[0], _Run) else None


def _shared(layout: PackLayout) -> Iterator[tuple[slice, slice]]:
    """(completions, prompt) of every group whose completions share one."""
    for group in layout.groups:
        if _shares(group):
            yield slice(group.answers, group.stop), slice(group.start, group.answers)


def _shares(group: PackedGroup) -> bool:
    return len(group.completions) > 1


def _walkable(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


# The transformers side.

PREFIX = "packed_"


def install(config: Any) -> None:
    """Let the text model of this transformers config take a keyword `layout`: a `PackLayout` for a
    packed row (batch 1, no cache, no mask, positions as if each completion stood behind its prompt
    alone), or None, with which it is the model that it was. Installing twice is installing once.

    It is the name of the attention in the config that changes ("sdpa" -> "packed_sdpa"), in this
    process; transformers does not save it. The vision tower's config is left alone.

    Raises PolicyError where the model's attention is neither "sdpa" nor "eager".
    """
    config = config.get_text_config()
    base = str(config._attn_implementation).removeprefix(PREFIX)
    if base not in ("sdpa", "eager"):
        raise PolicyError(
            f"packed rows need attention 'sdpa' or 'eager', not {config._attn_implementation!r}: "
            "load the model with attn_implementation='sdpa'"
        )
    name = PREFIX + base
    ALL_ATTENTION_FUNCTIONS.register(name, partial(_attention_forward, base))
    ALL_MASK_ATTENTION_FUNCTIONS.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    config._attn_implementation = name


def _attention_forward(
    base: str,
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    layout: PackLayout | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """An attention function of transformers: `base`, or with a layout `packed_attention`, whose
    output is [1,T,Hq,D].
    """
    if layout is None:
        if (saliency := watching()) is not None:
            saliency.add(query, key, attention_mask, kwargs["scaling"])
        forward = ALL_ATTENTION_FUNCTIONS.get(base) or _eager(module)
        return forward(module, query, key, value, attention_mask, **kwargs)
    # An eager model makes its causal mask whether or not anything is padded.
    if attention_mask is not None and base != "eager":
        raise PolicyError("a packed row has no padding: pass it without an attention_mask")
    if dropout := kwargs.get("dropout"):
        raise PolicyError(
            f"packed rows have no attention dropout, and this model's is {dropout}: set "
            "attention_dropout to 0 in its text config"
        )
    for name in ("sliding_window", "softcap", "s_aux", "position_bias"):
        if kwargs.get(name) is not None:
            raise PolicyError(
                f"packed rows cannot be computed with this model's {name}: score its rows unpacked"
            )
    follow(module.layer_idx)
    scale = kwargs.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out = packed_attention(query, key, value, layout, scale=scale)
    return out.transpose(1, 2).contiguous(), None


def _eager(module: torch.nn.Module) -> Callable[..., tuple[Tensor, Tensor | None]]:
    """The eager attention of the file that the model is written in."""
    # FSDP2 gives a module a class of its own, derived from the model's.
    for cls in type(module).__mro__:
        forward = getattr(sys.modules.get(cls.__module__), "eager_attention_forward", None)
        if forward is not None:
            return forward
    raise PolicyError(
        f"{type(module).__name__} has no eager attention of its own: load the model with "
        "attn_implementation='sdpa'"
    )

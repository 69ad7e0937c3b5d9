"""Run torch code on tensors without memory, and count the bytes they would take.

Weights and activations are torch's fake tensors: every op gives shapes and dtypes, and allocates
and computes nothing. Token ids, masks, grids and positions stay real, because models read them
(`tolist`, `item`, boolean indices). What is known at the start is real, what a weight has touched
is fake. Fake tensors claim to be on the CPU, so the kernels that are counted are the CPU's: fused
attention among them, never a [T, T] matrix that no device would make.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

_aten = torch.ops.aten
_INDEXING = (
    _aten.index.Tensor,
    _aten.index_put.default,
    _aten.index_put_.default,
    _aten._unsafe_index_put.default,
)
_SMALL = 1 << 16  # elements up to which a constant is made for real


class DryRun:
    """The bytes of all tensors that code under `running` holds, now and at their most.

    Views count once. What an op allocates within itself shows only where it is known to be large
    (`_scratch`). `live` and `peak` start with what `hold` was given.
    """

    def __init__(self) -> None:
        # Real tensors may meet fake ones: they are taken for fake ones of the same shape.
        self._fake = FakeTensorMode(allow_non_fake_inputs=True)
        self._seen: dict[int, weakref.ref[Any]] = {}
        self.live = 0
        self.peak = 0
        self.gradients = 0  # of `live`, the gradients of watched parameters
        self.gradients_at_peak = 0
        self._marked: set[int] = set()  # the storages of those gradients

    def materialize(self, model: nn.Module) -> None:
        """Put fake tensors in the place of a model's parameters and buffers, which were built on
        the meta device.
        """
        made: dict[int, torch.Tensor] = {}  # tied parameters stay tied
        for module in model.modules():
            for tensors in (module._parameters, module._buffers):
                for name, old in tensors.items():
                    if old is None:
                        continue
                    if id(old) not in made:
                        with self._fake:
                            new = torch.empty_like(old, device="cpu")
                        if isinstance(old, nn.Parameter):
                            new = nn.Parameter(new, requires_grad=old.requires_grad)
                        made[id(old)] = new
                    tensors[name] = made[id(old)]  # type: ignore[assignment]

    @contextmanager
    def building(self) -> Iterator[None]:
        """Where every new tensor is fake, and none is counted."""
        with self._fake:
            yield

    @contextmanager
    def running(self) -> Iterator[None]:
        """Where code runs that is counted."""
        with self._fake, _Counting(self, _without_memory):
            yield

    @contextmanager
    def watching(self) -> Iterator[None]:
        """Where code runs on real tensors, and is counted just the same."""
        with _Counting(self, _as_it_is):
            yield

    def hold(self, tensors: Iterable[torch.Tensor]) -> int:
        """Count tensors that exist already; returns their bytes."""
        before = self.live
        for tensor in tensors:
            self._count(tensor)
        return self.live - before

    def note(self, func: Any, args: tuple[Any, ...], out: Any) -> None:
        """Count what an op returned, and for a moment what it took within itself."""
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor)
        self._rise(_scratch(func, args))

    def watch_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Tell the gradients of these parameters from other tensors, as long as they live."""
        for parameter in parameters:
            parameter.register_post_accumulate_grad_hook(self._mark_gradient)

    def _mark_gradient(self, parameter: torch.Tensor) -> None:
        assert parameter.grad is not None
        storage = parameter.grad.untyped_storage()
        if storage._cdata in self._seen and storage._cdata not in self._marked:
            self._marked.add(storage._cdata)
            self.gradients += storage.nbytes()

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._seen:
            return

        def drop(_: Any) -> None:
            del self._seen[key]
            self.live -= size
            if key in self._marked:
                self._marked.remove(key)
                self.gradients -= size

        self._seen[key] = weakref.ref(storage, drop)
        self.live += size
        self._rise(0)

    def _rise(self, scratch: int) -> None:
        if self.live + scratch > self.peak:
            self.peak, self.gradients_at_peak = self.live + scratch, self.gradients


class _Counting(TorchDispatchMode):
    """Counts what ops return that `execute` carries out."""

    def __init__(self, run: DryRun, execute: Callable[..., Any]) -> None:
        super().__init__()
        self._run, self._execute = run, execute

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = self._execute(func, args, kwargs or {})
        self._run.note(func, args, out)
        return out


def _as_it_is(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return func(*args, **kwargs)


def _without_memory(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op on real tensors for real, and all others in the fake mode below."""
    if func is torch.ops.prim.device.default:  # asked for all the time
        return torch.device("cpu")
    given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, torch.Tensor)]
    if any(isinstance(t, FakeTensor) for t in given):
        return _fake(func, args, kwargs)
    if given or _is_small_constant(func, args, kwargs):
        with unset_fake_temporarily():
            return func(*args, **kwargs)
    return func(*args, **kwargs)


def _scratch(func: Any, args: tuple[Any, ...]) -> int:
    """Bytes that an op allocates and frees within itself. Measured: fused attention's backward
    copies the gradient of its output, and sums up the queries' in float32.
    """
    if func is not _aten._scaled_dot_product_flash_attention_for_cpu_backward.default:
        return 0
    query = args[1]
    return query.nbytes + (4 * query.numel() if query.itemsize < 4 else 0)


def _fake(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """An op with fake tensors. Where a real mask decides the shape, it is read first: a fake one
    tells nothing.
    """
    if func in _INDEXING:
        value, indices, *rest = args
        return func(value, _numbers(indices), *rest, **kwargs)
    if func is _aten.masked_select.default and not isinstance(args[1], FakeTensor):
        value, mask = args
        with unset_fake_temporarily():
            chosen = int(mask.count_nonzero())
        shape = torch.broadcast_shapes(value.shape, mask.shape)
        return value.new_empty(chosen * (shape.numel() // max(1, mask.numel())))
    return func(*args, **kwargs)


def _numbers(indices: Iterable[torch.Tensor | None]) -> list[torch.Tensor | None]:
    """Indices with real masks made into the numbers of their true elements."""
    found: list[torch.Tensor | None] = []
    for index in indices:
        if index is None or isinstance(index, FakeTensor) or index.dtype is not torch.bool:
            found.append(index)
            continue
        with unset_fake_temporarily():
            found.extend(index.nonzero().unbind(1))
    return found


def _is_small_constant(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether an op without tensors makes one that may be read: of integers, or a small one."""
    if all(argument.name != "device" for argument in func._schema.arguments):
        return False
    with unset_fake_temporarily():
        out = func(*args, **{**kwargs, "device": torch.device("meta")})
    return not out.is_floating_point() or out.numel() <= _SMALL

# SPDX-License-Identifier: BSD-3-Clause
"""Defines an op: its schema, what of its arguments the native modules get, its outputs, and torch.vmap.

An op is a schema, `allocate`, which creates the outputs (and so is the fake implementation, too), and `passes`: the
inputs, in layouts that kernels take, and the options that a native function gets. It is called with these two, the
outputs and the execution.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from types import MethodType, ModuleType
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from switchgear import backends, cuda, reference
from switchgear.checks import convert
from switchgear.ops.native import Kernels, cuda_kernels_of, host
from switchgear.reference.formats import format_of

_lib: Any = torch.library.Library("switchgear", "DEF")  # type: ignore[no-untyped-call]

T = TypeVar("T", Tensor, Tensor | None)


# ---- arguments, converted for the kernels ----------------------------------------------------------------------------


def dense(tensor: T) -> T:
    return None if tensor is None else tensor.contiguous()


def rows(tensor: T) -> T:
    """The kernels accept any row stride, but each row must be contiguous."""
    return tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous()


def alike(tensors: Sequence[Tensor]) -> Sequence[Tensor]:
    """The kernels take one pair of strides for all separate matrices. If strides differ, makes contiguous copies."""
    if len(tensors) == 1 or tensors[0].dim() != 2:  # one weight
        return tensors
    if all(matrix.stride() == tensors[0].stride() for matrix in tensors):
        return tensors
    return [matrix.clone(memory_format=torch.contiguous_format) for matrix in tensors]


def matrix(name: str, tensor: Tensor, dims: int = 2) -> Tensor:
    """Returns `tensor` if it has `dims` dimensions, so that output shapes can be read from it."""
    if tensor.dim() != dims:
        raise ValueError(f"{name}: expected {dims} dimensions, got shape {list(tensor.shape)}")
    return tensor


def usable(tensors: Sequence[Tensor] | None) -> Sequence[Tensor]:
    """The tensors of an adapter. The kernels take matrices whose rows or columns are contiguous."""
    if not tensors:
        return ()
    for tensor in tensors:  # a generator would take 2 µs more
        if 1 not in tensor.stride()[-2:]:
            return [tensor if 1 in tensor.stride()[-2:] else tensor.contiguous() for tensor in tensors]
    return tensors


# ---- definition ------------------------------------------------------------------------------------------------------

Passes = Callable[..., tuple[tuple[Any, ...], tuple[Any, ...]]]


def _run(name: str, allocate: Callable[..., Any], passes: Passes) -> Callable[..., Any]:
    def run(kernels: Kernels, *args: Any) -> Any:
        outputs = allocate(*args)
        given = outputs if isinstance(outputs, tuple) else (outputs,)
        getattr(kernels.module, name)(*passes(*args), given, kernels.execution())
        return outputs

    return run


def register(
    schema: str,
    allocate: Callable[..., Any],
    passes: Passes | None = None,
    *,
    run: Callable[..., Any] | None = None,
    collect: Callable[[tuple[Any, ...]], tuple[Any, ...]] | None = None,
    specified_in: ModuleType = reference,
    flops: Callable[..., int] | None = None,
) -> Any:
    """Defines the op and returns its overload, which is faster to call than the packet.

    passes: (*arguments) -> inputs and options of the native function.
    run: (kernels, *arguments) -> the outputs; calls the native function itself. By default it does what `passes` says.
    collect: (arguments of the schema) -> those of allocate, run and the specification. By default they are the same.
    flops: (shapes of the tensors, other arguments, out_shape=) -> floating-point operations, for torch's counter.
    specified_in: the module of the specification. Ops outside `reference` run it if a native module lacks them.
    """
    name = schema.partition("(")[0]
    specification = getattr(specified_in, name)
    is_everywhere = specified_in is reference
    if run is None:
        assert passes is not None
        run = _run(name, allocate, passes)

    def collected(args: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(args) < len(defaults):
            args = (*args, *defaults[len(args) :])
        return args if collect is None else collect(args)

    def native(kernels: Kernels, *args: Any) -> Any:
        return run(kernels, *collected(args))

    on_host = MethodType(native, host)  # faster than passing `host` with the arguments

    def on_cpu(*args: Any) -> Any:
        if backends.runs_natively(args[0].dtype) and (is_everywhere or hasattr(host.module, name)):
            return on_host(*args)
        return in_torch(*args)

    def on_cuda(*args: Any) -> Any:
        device = args[0].device
        if device.type != "cuda":  # dispatched here because of another argument
            _check_devices(op, args)
        if not backends.runs_natively(args[0].dtype):
            return in_torch(*args)
        reason = cuda.reason_against(device.index)
        if reason is not None:
            backends.announce_reference(device, reason)
            return in_torch(*args)
        kernels = cuda_kernels_of(device.index)
        if not (is_everywhere or hasattr(kernels.module, name)):
            return in_torch(*args)
        for index in forms:
            if (format := format_of(args[index] or ())) not in kernels.formats:
                backends.announce_format(device, f"{format} weights")
                return in_torch(*args)
        with cuda.current(device.index):
            return native(kernels, *args)

    def elsewhere(*args: Any) -> Any:
        for argument, tensor in _tensors_of(op, args):  # sparse and similar tensors are dispatched to here, too
            convert(argument, tensor, Tensor)
        backends.announce_reference(args[0].device)
        return in_torch(*args)

    def without_data(*args: Any) -> Any:  # meta tensors come here too, whatever the device of the others
        _check_devices(op, args)
        return allocate(*collected(args))

    def in_torch(*args: Any) -> Any:
        with backends.without_autocast(args[0].device.type):  # autocast would round every product in here
            return specification(*collected(args))

    _lib.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    op = getattr(torch.ops.switchgear, name).default
    defaults = [argument.default_value for argument in op._schema.arguments]
    forms = [index for index, argument in enumerate(op._schema.arguments) if argument.name.endswith("form")]

    _lib.impl(name, on_cpu, "CPU")
    _lib.impl(name, on_cuda, "CUDA")
    _lib.impl(name, elsewhere, "CompositeExplicitAutograd")
    torch.library.register_fake(f"switchgear::{name}", without_data, lib=_lib)
    if flops is not None:
        register_flop_formula(getattr(torch.ops.switchgear, name))(flops)
    loop = _loop_over_batch(op)

    def over_batch(info: Any, in_dims: Sequence[Any], *args: Any) -> Any:
        return loop(info.batch_size, in_dims, *args)

    torch.library.register_vmap(f"switchgear::{name}", over_batch, lib=_lib)
    _lib.impl(name, _batched_by_autograd(loop), "Batched")
    return op


def _loop_over_batch(op: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for torch.vmap of a batch of some size: one call per element, results stacked."""

    def element(arg: Any, dim: Any, index: int) -> Any:
        if isinstance(dim, (list, tuple)):
            return [element(item, item_dim, index) for item, item_dim in zip(arg, dim, strict=True)]
        if dim is None:
            return arg
        return arg.select(dim, index) if arg.shape[dim] else arg.new_zeros(arg.shape[:dim] + arg.shape[dim + 1 :])

    def loop(size: int, in_dims: Sequence[Any], *args: Any) -> Any:
        pairs = list(zip(args, in_dims, strict=True))
        indices = range(max(size, 1))  # of no element, one call gives the shapes
        results = [op(*(element(arg, dim, index) for arg, dim in pairs)) for index in indices]
        if results[0] is None:  # it changed its arguments
            return None, None
        if isinstance(results[0], Tensor):
            return torch.stack(results)[:size], 0
        stacked = (torch.stack(outputs)[:size] for outputs in zip(*results, strict=True))
        return tuple(stacked), (0,) * len(results[0])

    return loop


def _batched_by_autograd(loop: Callable[..., Any]) -> Callable[..., Any]:
    """The rule for torch.autograd.grad(is_grads_batched=True), which has a vmap of its own without explicit batches."""

    def batched(*args: Any) -> Any:
        level = torch._C._vmapmode_increment_nesting() - 1
        torch._C._vmapmode_decrement_nesting()
        sizes = set()

        def unbatched(arg: Any) -> tuple[Any, Any]:
            if isinstance(arg, (list, tuple)):
                pairs = [unbatched(item) for item in arg]
                return [item for item, _ in pairs], [dim for _, dim in pairs]
            if not isinstance(arg, Tensor) or not torch._C._functorch.is_legacy_batchedtensor(arg):
                return arg, None
            whole = torch._remove_batch_dim(arg, level, 0, 0)  # the size is that of tensors without a batch
            sizes.add(len(whole))
            return whole, 0

        values, dims = zip(*map(unbatched, args), strict=True)
        outputs, _ = loop(sizes.pop(), dims, *values)
        if isinstance(outputs, tuple):
            return tuple(torch._add_batch_dim(output, 0, level) for output in outputs)
        return None if outputs is None else torch._add_batch_dim(outputs, 0, level)

    return batched


def _tensors_of(op: Any, args: Sequence[Any]) -> Iterator[tuple[str, Tensor]]:
    for argument, value in zip(op._schema.arguments, args, strict=False):
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, Tensor):
                yield argument.name, tensor


def _check_devices(op: Any, args: Sequence[Any]) -> None:
    device = args[0].device
    for name, tensor in _tensors_of(op, args):
        if tensor.device != device:
            raise ValueError(f"{name}: expected a tensor on {device}, got one on {tensor.device}")

# SPDX-License-Identifier: BSD-3-Clause
"""For any memory layout of a tensor, results and gradients have the bits of contiguous tensors, or the layout is
refused."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from native_calls import sizes_of
from problems import DTYPES, equal_bits, on_kernels
from test_malformed import FUNCTIONS, TENSORS, good_arguments
from test_malformed_native import every_second
from torch import Tensor

from errors import raises


def apart(*dims: int) -> Callable[[Tensor], Tensor]:
    """Gaps between the elements along some dimensions."""

    def layout(tensor: Tensor) -> Tensor:
        for dim in dims:
            tensor = every_second(tensor, dim % tensor.dim())
        return tensor

    return layout


def offset(tensor: Tensor) -> Tensor:
    """Starts one element into its storage, so rows have no alignment."""
    return torch.cat((tensor.new_zeros(1), tensor.flatten()))[1:].view(tensor.shape)


def padded(tensor: Tensor) -> Tensor:
    """The left part of a wider matrix."""
    return torch.cat((tensor, tensor[..., :3]), -1)[..., : tensor.shape[-1]]


def backwards(tensor: Tensor) -> Tensor:
    """Dimensions in reverse order in memory."""
    order = list(range(tensor.dim()))[::-1]
    return tensor.permute(order).contiguous().permute(order)


def expanded(dim: int) -> Callable[[Tensor], Tensor]:
    """One slice repeated along a dimension, with stride 0. Unlike the others this changes the values."""
    return lambda tensor: tensor.narrow(dim % tensor.dim(), 0, 1).expand(tensor.shape)


LAYOUTS: dict[str, Callable[[Tensor], Tensor]] = {
    "transposed": lambda t: t.mT.contiguous().mT if t.dim() > 1 else t,
    "backwards": backwards,
    "first dimension apart": apart(0),
    "last dimension apart": apart(-1),
    "all dimensions apart": apart(0, -1),
    "transposed and apart": lambda t: apart(0, -1)(backwards(t)),
    "middle apart": lambda t: apart(1)(t) if t.dim() > 2 else t,
    "offset": offset,
    "padded": padded,
    "padded, offset": lambda t: padded(offset(t)),
    "first expanded": expanded(0),
    "last expanded": expanded(-1),
    "one for all": lambda t: t.flatten()[:1].view([1] * t.dim()).expand(t.shape),
}
MERGING = ("first expanded", "last expanded", "one for all")
NOT_FREE = {"expert_offsets", "token_indices", "slot_indices"}  # other values would not be a plan
SIZES = (sizes_of(), sizes_of(T=60, K=2, E=3, H=70, I=40))  # few rows, and more than one row tile


def run(function: str, args: dict[str, Any], grad: Callable[[Tensor], Tensor]) -> list[Tensor]:
    """Results and gradients; `grad` sets the layout of the incoming gradient."""
    names = [name for name, a in args.items() if is_float(a)]
    leaves = {name: args[name].detach().requires_grad_() for name in names}
    result = FUNCTIONS[function](**args | leaves)
    outputs = list(result[:2]) if isinstance(result, tuple) else [result]
    starts = [t for t in outputs if t.requires_grad]
    if not starts:
        return outputs
    grads = [grad(torch.linspace(-1, 1, t.numel()).to(t.dtype).view(t.shape)) for t in starts]
    wanted = [leaf for name, leaf in leaves.items() if name != "selection_bias"]
    return [*outputs, *torch.autograd.grad(starts, wanted, grads)]


def is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def cast(name: str, value: Any, dtype: torch.dtype) -> Any:
    return value.to(dtype) if is_float(value) and name not in ("topk_weights", "selection_bias") else value


def refused(name: str, tensor: Tensor, function: str, args: dict[str, Any]) -> bool:
    """Whether the tensor is a weight without a contiguous dimension, which the kernels refuse by name."""
    if name not in ("weight", "gate_up_proj", "down_proj") or 1 in tensor.stride()[-2:]:
        return False
    with raises(ValueError, name):
        run(function, args | {name: tensor}, lambda t: t)
    return True


def compare_layouts(
    function: str, args: dict[str, Any], equal: Callable[[list[Tensor], list[Tensor]], bool], strict: bool
) -> None:
    """13 layouts of each tensor and of the incoming gradient, against contiguous ones."""
    for layout, change in LAYOUTS.items():

        def dense(tensor: Tensor, change: Callable[[Tensor], Tensor] = change) -> Tensor:
            return change(tensor).contiguous()

        if function != "plan":
            assert equal(run(function, args, change), run(function, args, dense)), f"the gradient, {layout}"
        for name in TENSORS[function]:
            if name in NOT_FREE and layout in MERGING:
                continue
            tensor = change(args[name])
            if strict and refused(name, tensor, function, args):
                continue
            wanted = run(function, args | {name: tensor.contiguous()}, lambda t: t)
            assert equal(run(function, args | {name: tensor}, lambda t: t), wanted), f"{name}, {layout}"


@on_kernels
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("function", TENSORS)
def test_layouts_on_the_kernels(backend: str, function: str, dtype: torch.dtype) -> None:
    for sizes in SIZES:
        args = {name: cast(name, a, dtype) for name, a in good_arguments(function, sizes).items()}
        compare_layouts(function, args, equal_bits, strict=True)


@pytest.mark.parametrize("function", TENSORS)
def test_layouts_on_the_reference(function: str) -> None:
    """In float64, up to rounding: sums of at most 140 terms of order 10. A misplaced element is detected."""

    def close(a: list[Tensor], b: list[Tensor]) -> bool:
        return all(torch.allclose(x.double(), y.double(), rtol=0, atol=1e-11) for x, y in zip(a, b, strict=True))

    for sizes in SIZES:
        args = {name: a.double() if is_float(a) else a for name, a in good_arguments(function, sizes).items()}
        compare_layouts(function, args, close, strict=False)

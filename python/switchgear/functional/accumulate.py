# SPDX-License-Identifier: BSD-3-Clause
"""moe_accumulate: a whole layer of which a call has some experts."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from switchgear import ops
from switchgear.autograd import needs_autograd
from switchgear.backends import in_autocast
from switchgear.functional.arguments import as_limit, as_number
from switchgear.functional.layer import _Layer, _parts_of, _rows_of, _taken
from switchgear.functional.products import AnyWeight
from switchgear.ops import GluOptions
from switchgear.reference import weight_dtype
from switchgear.weights.weight import AdaptedWeight, SelectedWeight


def moe_accumulate(
    sums: Tensor,
    x: Tensor,
    gate_up_proj: AnyWeight,
    down_proj: AnyWeight,
    topk_ids: Tensor,
    topk_weights: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    interleaved: bool = False,
    gate_up_bias: Tensor | None = None,
    down_bias: Tensor | None = None,
    alpha: float = 1.702,
    limit: float | None = None,
) -> Tensor:
    """Adds the output of `moe` to `sums` in place, without rounding it to the dtype of x. Returns `sums`.

    For experts that are not all in memory at once: start from zeros, and call it for disjoint ranges of experts in
    ascending order, each with a topk_ids that is -1 for all other experts. `sums.to(x.dtype)` then has the bits of one
    call of `moe` with all experts, on the CPU's kernels: sums are added in the same order. (On the reference they are
    equal up to rounding.) The data of an expert that a call does not use is not read: its slot may hold another's.

    Args:
        sums: float32 (float64 if x is), the shape of x, rows contiguous. It must not overlap another argument.
        The others: as those of `moe`; torch.autocast casts them, but not `sums`. No SelectedWeight, no dropout.

    There is no gradient. CUDA devices have no kernels for it: ValueError, or for weights that only the reference takes
    there, the reference with its warning.

    Raises:
        ValueError: a wrong shape, an id out of range, a gradient is needed. TypeError: a wrong dtype.
    """
    if isinstance(gate_up_proj, SelectedWeight) or isinstance(down_proj, SelectedWeight):
        raise ValueError("gate_up_proj, down_proj: expected no weights with experts that train alone")
    options = GluOptions(activation, gated, interleaved, as_number("alpha", alpha), as_limit(limit))
    columns = gate_up_proj.shape[2]
    if sums.shape != x.shape or x.shape[-1] != columns:
        raise ValueError(f"sums, x: expected shape [..., {columns}], got {list(sums.shape)} and {list(x.shape)}")
    biases: tuple[Tensor | None, Tensor | None] = (gate_up_bias, down_bias)
    first: Any = gate_up_proj
    second: Any = down_proj
    x, topk_ids, topk_weights = _rows_of(x, topk_ids, topk_weights)
    adapters: tuple[tuple[Tensor, ...], ...] = ((), ())
    if isinstance(first, AdaptedWeight) or isinstance(second, AdaptedWeight) or in_autocast(x.device.type):
        x, first, second, biases, adapters, dropout = _Layer.of(x, (first, second), biases)
        if dropout:
            raise ValueError(f"dropout: expected none in moe_accumulate, got {dropout}")
    if sums.dtype is not weight_dtype(x.dtype):
        raise TypeError(f"sums: expected {weight_dtype(x.dtype)} beside x in {x.dtype}, got {sums.dtype}")
    trained = [weight for weight in (first, second) if isinstance(weight, Tensor)]
    trained += [tensor for adapter in adapters for tensor in adapter[:2]]
    if needs_autograd(sums, x, *biases, topk_weights, *trained):
        raise ValueError("moe_accumulate: expected no tensor that needs a gradient, or torch.no_grad()")
    one, other = (None if bias is None else bias.to(x.dtype) for bias in biases)
    layer = (*_parts_of(_taken(first, x.dtype)), *_parts_of(_taken(second, x.dtype)))
    if sums.dim() != 2 and not sums.is_contiguous():
        raise ValueError(f"sums: expected a contiguous tensor or two dimensions, got strides {list(sums.stride())}")
    rows = sums if sums.dim() == 2 else sums.view(x.shape)
    ops.moe_accumulate(x, *layer, one, other, topk_ids, topk_weights, *options, rows, *adapters)
    return sums

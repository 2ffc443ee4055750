# SPDX-License-Identifier: BSD-3-Clause
"""moe_accumulate: a whole layer of which a call has some experts."""

from __future__ import annotations

from torch import Tensor

from switchgear.functional.arguments import as_limit, as_number
from switchgear.functional.layer import accumulate, check_stacked, rows_of
from switchgear.functional.products import AnyWeight
from switchgear.ops import GluOptions
from switchgear.weights.weight import SelectedWeight


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
    check_stacked(gate_up_proj, down_proj)
    options = GluOptions(activation, gated, interleaved, as_number("alpha", alpha), as_limit(limit))
    columns = gate_up_proj.shape[2]
    if sums.shape != x.shape or x.shape[-1] != columns:
        raise ValueError(f"sums, x: expected shape [..., {columns}], got {list(sums.shape)} and {list(x.shape)}")
    if sums.dim() != 2 and not sums.is_contiguous():
        raise ValueError(f"sums: expected a contiguous tensor or two dimensions, got strides {list(sums.stride())}")
    x, topk_ids, topk_weights = rows_of(x, topk_ids, topk_weights)
    weights, biases = (gate_up_proj, down_proj), (gate_up_bias, down_bias)
    accumulate(sums if sums.dim() == 2 else sums.view(x.shape), x, weights, biases, topk_ids, topk_weights, options)
    return sums

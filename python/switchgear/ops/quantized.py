# SPDX-License-Identifier: BSD-3-Clause
"""The ops of quantised weights. A weight [E,N,C] is four tensors: values, scales, row_scales, and zeros or None; see
reference_quantized.py."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from switchgear import reference_quantized
from switchgear.ops.native import Kernels, host
from switchgear.ops.registration import _dense, _matrix, _register, _rows


def _allocate_quantized_grouped_gemm(
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    rows: int,
    columns: int,
    parts: int,
    bits: int,
    group_size: int,
    transposed: bool,
) -> Tensor:
    slots = _matrix("x", x).shape[0] if token_indices is None else token_indices.shape[0]
    return x.new_empty(slots, columns if transposed else rows)


def _quantized_grouped_gemm(
    kernels: Kernels,
    x: Tensor,
    values: Tensor,
    scales: Tensor,
    row_scales: Tensor,
    zeros: Tensor | None,
    bias: Tensor | None,
    expert_offsets: Tensor,
    token_indices: Tensor | None,
    rows: int,
    columns: int,
    parts: int,
    bits: int,
    group_size: int,
    transposed: bool,
) -> Tensor:
    slots = _matrix("x", x).shape[0] if token_indices is None else token_indices.shape[0]
    out = x.new_empty(slots, columns if transposed else rows)
    kernels.module.quantized_grouped_gemm(
        _rows(x), values, scales, row_scales, zeros, _rows(bias), expert_offsets.contiguous(), _dense(token_indices),
        out, rows, columns, parts, bits, group_size, transposed, kernels.execution(),
    )  # fmt: skip
    return out


quantized_grouped_gemm: Callable[..., Tensor] = _register(
    "quantized_grouped_gemm(Tensor x, Tensor values, Tensor scales, Tensor row_scales, Tensor? zeros, Tensor? bias, "
    "Tensor expert_offsets, Tensor? token_indices, int rows, int columns, int parts, int bits, int group_size, "
    "bool transposed) -> Tensor",
    _quantized_grouped_gemm,
    _allocate_quantized_grouped_gemm,
    reference_quantized,
)


def _allocate_quantized_moe_forward(
    x: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    gate_up_row_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_values: Tensor,
    down_scales: Tensor,
    down_row_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(_matrix("x", x), memory_format=torch.contiguous_format)
    width = 2 * intermediate_size if gated else intermediate_size
    return y, x.new_empty(_matrix("topk_ids", topk_ids).numel() if save_h else 0, width)


def _quantized_moe_forward(
    kernels: Kernels,
    x: Tensor,
    gate_up_values: Tensor,
    gate_up_scales: Tensor,
    gate_up_row_scales: Tensor,
    gate_up_zeros: Tensor | None,
    down_values: Tensor,
    down_scales: Tensor,
    down_row_scales: Tensor,
    down_zeros: Tensor | None,
    gate_up_bias: Tensor | None,
    down_bias: Tensor | None,
    topk_ids: Tensor,
    topk_weights: Tensor,
    intermediate_size: int,
    bits: int,
    group_size: int,
    activation: str,
    gated: bool,
    interleaved: bool,
    alpha: float,
    limit: float,
    save_h: bool,
) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(_matrix("x", x), memory_format=torch.contiguous_format)
    width = 2 * intermediate_size if gated else intermediate_size
    h = x.new_empty(_matrix("topk_ids", topk_ids).numel(), width) if save_h else None
    kernels.module.quantized_moe_forward(
        _rows(x), gate_up_values, gate_up_scales, gate_up_row_scales, gate_up_zeros,
        down_values, down_scales, down_row_scales, down_zeros,
        _rows(gate_up_bias), _rows(down_bias), topk_ids.contiguous(), topk_weights.contiguous(), y, h,
        intermediate_size, bits, group_size, activation, gated, interleaved, alpha, limit, kernels.execution(),
    )  # fmt: skip
    return y, x.new_empty(0, width) if h is None else h


quantized_moe_forward: Callable[..., tuple[Tensor, Tensor]] = _register(
    "quantized_moe_forward(Tensor x, Tensor gate_up_values, Tensor gate_up_scales, Tensor gate_up_row_scales, "
    "Tensor? gate_up_zeros, Tensor down_values, Tensor down_scales, Tensor down_row_scales, Tensor? down_zeros, "
    "Tensor? gate_up_bias, Tensor? down_bias, Tensor topk_ids, Tensor topk_weights, int intermediate_size, int bits, "
    "int group_size, str activation, bool gated, bool interleaved, float alpha, float limit, bool save_h) "
    "-> (Tensor y, Tensor h)",
    _quantized_moe_forward,
    _allocate_quantized_moe_forward,
    reference_quantized,
)


def quantized_moe_forward_on_host(x: Tensor, *args: Any) -> Tensor:
    """y of quantized_moe_forward without save_h, for tensors that need no dispatch."""
    *weights, gate_up_bias, down_bias, topk_ids, topk_weights = args[:12]
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    host.module.quantized_moe_forward(
        _rows(x), *weights, _rows(gate_up_bias), _rows(down_bias), topk_ids.contiguous(), topk_weights.contiguous(),
        y, None, *args[12:], host.execution(),
    )  # fmt: skip
    return y

# SPDX-License-Identifier: BSD-3-Clause
"""What a quantised module of experts holds, and how it runs: imported by modules, so it knows none of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from switchgear import ops, reference
from switchgear.backends import in_autocast
from switchgear.functional import _apply, _limit, _needs_autograd, _number, _once, _rows_of
from switchgear.reference_quantized import Quantized

BITS = {"int8": 8, "int4": 4}
DEFAULT_GROUP_SIZE = {"int8": 0, "int4": 32}


@dataclass(frozen=True)
class Format:
    """How a weight is stored: see docs/compression.md.

    dtype: "int8" or "int4". group_size: columns that share a scale, a power of two from 16 on, or 0 for a whole row;
    None for the default, 0 for int8 and 32 for int4. symmetric: levels around zero; otherwise each group has a zero.
    """

    dtype: str
    group_size: int | None = None
    symmetric: bool = True

    def __post_init__(self) -> None:
        reference.check_choice("dtype", self.dtype, tuple(BITS))
        size = DEFAULT_GROUP_SIZE[self.dtype] if self.group_size is None else self.group_size
        if size and (size < 16 or size & (size - 1)):
            raise ValueError(f"group_size: expected 0 (the whole row) or a power of two from 16 on, got {size}")
        object.__setattr__(self, "group_size", size)

    @property
    def bits(self) -> int:
        return BITS[self.dtype]

    @property
    def columns_per_scale(self) -> int:
        """group_size, which is never None once a format is made."""
        return self.group_size or 0

    def __str__(self) -> str:
        group = f"groups of {self.group_size}" if self.group_size else "rows"
        return f"{self.dtype}, {group}, {'symmetric' if self.symmetric else 'with zeros'}"


class QuantizedMatrix(NamedTuple):
    """A weight [E,N,C] and what the ops have to know of it."""

    weight: Quantized
    rows: int
    columns: int
    parts: int
    format: Format

    def sizes(self) -> tuple[int, ...]:
        return self.rows, self.columns, self.parts, self.format.bits, self.format.columns_per_scale


@dataclass(frozen=True)
class QuantizedExperts:
    """What became of a module's projections: parameters `names` went, buffers `<name>_values`, … came."""

    format: Format
    names: tuple[str, str]
    transposed: bool  # the parameters were [E,in,out]
    parts: int  # of the first projection: 2 where all gates precede all ups
    shapes: tuple[tuple[int, int, int], tuple[int, int, int]]  # [E,N,H] and [E,H,I]
    dtype: torch.dtype  # of the parameters
    trained: bool  # whether they asked for gradients

    def matrices(self, module: nn.Module) -> tuple[QuantizedMatrix, QuantizedMatrix]:
        """The two projections of `module`."""
        return self._matrix(module, 0, self.parts), self._matrix(module, 1, 1)

    def moe(self, module: nn.Module, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, **options: Any) -> Tensor:
        """switchgear.moe with the projections of `module`."""
        return quantized_moe(x, *self.matrices(module), topk_ids, topk_weights, **options)

    def _matrix(self, module: nn.Module, index: int, parts: int) -> QuantizedMatrix:
        name = self.names[index]
        row_scales: Tensor = getattr(module, f"{name}_row_scales")
        if row_scales.dtype is not torch.float32:  # module.to(dtype) casts every floating buffer
            raise TypeError(
                f"{name}_row_scales: expected torch.float32, got {row_scales.dtype}; a quantised module cannot change "
                "its dtype (dequantize it first)"
            )
        zeros = None if self.format.symmetric else getattr(module, f"{name}_zeros")
        weight = Quantized(getattr(module, f"{name}_values"), getattr(module, f"{name}_scales"), row_scales, zeros)
        return QuantizedMatrix(weight, *self.shapes[index][1:], parts, self.format)


def quantized_of(module: nn.Module) -> QuantizedExperts | None:
    """What `quantize` made of a module's projections, None where they are plain."""
    return vars(module).get("_switchgear_quantized")


def format_of(module: nn.Module) -> Format | None:
    """The format of a module of experts; None where its weights are plain."""
    quantized = quantized_of(module)
    return None if quantized is None else quantized.format


# ---- grouped_gemm ----------------------------------------------------------------------------------------------------


def _transposed(grad: Tensor, matrix: QuantizedMatrix, expert_offsets: Tensor) -> Tensor:
    return ops.quantized_grouped_gemm(grad, *matrix.weight, None, expert_offsets, None, *matrix.sizes(), True)


def _sum_slots(rows: Tensor, bias: Tensor, expert_offsets: Tensor) -> Tensor:
    """The gradient of a bias [E,N]: the sum of each expert's rows."""
    ones = rows.new_ones(rows.shape[0], 1)
    return ops.grouped_gemm_wgrad(rows, ones, expert_offsets, None, False).squeeze(-1).to(bias.dtype)


class _QuantizedGroupedGemm(torch.autograd.Function):
    """Straight through the rounding of x: its gradient is that of the product with the dequantised weight."""

    generate_vmap_rule = True

    @staticmethod
    def forward(
        x: Tensor, bias: Tensor | None, expert_offsets: Tensor, token_indices: Tensor | None, *rest: Any
    ) -> Any:
        *weight, sizes = rest
        return ops.quantized_grouped_gemm(x, *weight, bias, expert_offsets, token_indices, *sizes, False)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.sizes = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, grad_out: Tensor) -> Any:
        need_x, need_bias, *_ = ctx.needs_input_grad
        sizes = ctx.sizes

        def grads(grad_out: Tensor, x: Tensor, bias: Tensor | None, *rest: Any) -> Any:
            expert_offsets, token_indices, *weight = rest
            grad_x = grad_bias = None
            if need_x:
                grad_x = ops.quantized_grouped_gemm(grad_out, *weight, None, expert_offsets, None, *sizes, True)
                if token_indices is not None:  # a row of x may own several slots; those at the tail add zeros to row 0
                    total = torch.zeros(x.shape, dtype=reference.weight_dtype(x.dtype), device=x.device)
                    if x.shape[0]:
                        total = total.index_add(0, token_indices.clamp(min=0), grad_x.to(total.dtype))
                    grad_x = total.to(x.dtype)
            if need_bias and bias is not None:
                grad_bias = _sum_slots(grad_out, bias, expert_offsets)
            return grad_x, grad_bias

        return *_once(grads, grad_out, *ctx.saved_tensors), *[None] * 7


def quantized_grouped_gemm(
    x: Tensor,
    matrix: QuantizedMatrix,
    expert_offsets: Tensor,
    *,
    bias: Tensor | None = None,
    token_indices: Tensor | None = None,
) -> Tensor:
    """switchgear.grouped_gemm with a quantised weight; differentiable in x and bias."""
    args = (x, bias, expert_offsets, token_indices, *matrix.weight, matrix.sizes())
    if _needs_autograd(x, bias):
        out: Tensor = _apply(_QuantizedGroupedGemm, *args)
        return out
    return ops.quantized_grouped_gemm(x, *matrix.weight, bias, expert_offsets, token_indices, *matrix.sizes(), False)


# ---- the whole layer -------------------------------------------------------------------------------------------------


class _QuantizedMoe(torch.autograd.Function):
    """As _Moe, with the weights frozen; straight through the rounding of x and a. Backward is made of the stages, so
    that it never needs more of a weight in float than 64 columns."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*args: Any) -> Any:
        *tensors, intermediate_size, matrices, options = args
        format = matrices[0][-1]
        return ops.quantized_moe_forward(
            *tensors, intermediate_size, format.bits, format.columns_per_scale, *options, True
        )

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, _, ctx.matrices, ctx.options = inputs
        ctx.set_materialize_grads(False)
        ctx.mark_non_differentiable(output[1])
        ctx.save_for_backward(*tensors, output[1])

    @staticmethod
    def backward(ctx: Any, grad_y: Tensor | None, _: None) -> Any:
        if grad_y is None:
            return (None,) * 16
        need_x, *_, need_gate_up_bias, need_down_bias, _, need_weights = ctx.needs_input_grad[:13]
        sizes, options = ctx.matrices, ctx.options

        def grads(grad_y: Tensor, x: Tensor, *saved: Any) -> Any:
            *weights, gate_up_bias, down_bias, topk_ids, topk_weights, h = saved
            gate_up = QuantizedMatrix(Quantized(*weights[:4]), *sizes[0])
            down = QuantizedMatrix(Quantized(*weights[4:]), *sizes[1])
            plan = ops.plan(topk_ids, weights[0].shape[0])
            expert_offsets, _, slot_indices = plan
            rows = ops.permute(grad_y, *plan, None)
            grad_a = _transposed(rows, down, expert_offsets)  # for a weight of 1
            slot_weights = reference._to_slots(topk_weights, slot_indices)[:, None]
            grad_x = grad_gate_up_bias = grad_down_bias = grad_weights = None
            if need_weights:
                a = ops.glu(h, *options)
                grad_slots = (grad_a.to(slot_weights.dtype) * a).sum(-1)
                if down_bias is not None:
                    experts = torch.bucketize(torch.arange(len(rows), device=x.device), expert_offsets[1:], right=True)
                    bias = down_bias[experts.clamp(max=down_bias.shape[0] - 1)]
                    grad_slots = grad_slots + (rows.to(slot_weights.dtype) * bias).sum(-1)
                grad_weights = reference._gather_rows(grad_slots, slot_indices)
            if need_down_bias:
                grad_down_bias = _sum_slots((rows * slot_weights).to(x.dtype), down_bias, expert_offsets)
            if need_x or need_gate_up_bias:
                grad_h = ops.glu_backward((grad_a * slot_weights).to(x.dtype), h, *options)
                if need_x:
                    grad_x = ops.combine(_transposed(grad_h, gate_up, expert_offsets), *plan, None)
                if need_gate_up_bias:
                    grad_gate_up_bias = _sum_slots(grad_h, gate_up_bias, expert_offsets)
            return grad_x, grad_gate_up_bias, grad_down_bias, grad_weights

        grad_x, grad_gate_up_bias, grad_down_bias, grad_weights = _once(grads, grad_y, *ctx.saved_tensors)
        return grad_x, *[None] * 8, grad_gate_up_bias, grad_down_bias, None, grad_weights, *[None] * 3


def quantized_moe(
    x: Tensor,
    gate_up_proj: QuantizedMatrix,
    down_proj: QuantizedMatrix,
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
    """switchgear.moe with quantised weights. x may have any dtype of moe; differentiable in x, the biases and
    topk_weights. Inside torch.autocast x is cast to its dtype, as in moe."""
    device_type = x.device.type
    if in_autocast(device_type) and x.dtype is not torch.float64:
        x = x.to(torch.get_autocast_dtype(device_type))
    shape = x.shape
    x, topk_ids, topk_weights = _rows_of(x, topk_ids, topk_weights)
    biases = [None if bias is None else bias.to(x.dtype) for bias in (gate_up_bias, down_bias)]
    gate_up, down = gate_up_proj.weight, down_proj.weight
    others = (*gate_up, *down, *biases, topk_ids, topk_weights)
    options = (activation, gated, interleaved, _number("alpha", alpha), _limit(limit))
    format, intermediate_size = gate_up_proj.format, down_proj.columns
    sizes = (intermediate_size, format.bits, format.columns_per_scale)
    if _needs_autograd(x, *biases, topk_weights):  # weights have no gradient
        matrices = (tuple(gate_up_proj[1:]), tuple(down_proj[1:]))
        y: Tensor = _apply(_QuantizedMoe, x, *others, intermediate_size, matrices, options)[0]
    elif ops.needs_no_dispatch(x, gate_up.values, down.values, *biases, topk_ids, topk_weights):
        y = ops.quantized_moe_forward_on_host(x, *others, *sizes, *options)
    else:
        y = ops.quantized_moe_forward(x, *others, *sizes, *options, False)[0]
    return y if len(shape) == 2 else y.reshape(shape)

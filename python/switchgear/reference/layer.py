# SPDX-License-Identifier: BSD-3-Clause
"""The whole layer of experts in plain torch: moe_forward, moe_accumulate and moe_backward; the arguments that it has at
every level, and low-rank adapters of its projections (LoRA, arXiv:2106.09685). The specification.

A projection with an adapter multiplies by W + s_e · B_e[:, :r_e] · A_e[:r_e] for expert e. An adapter is passed to the
ops as tensors, none if there is no adapter:

    a [E,r,C], b [E,N,r]   in the dtype of x
    scales [E] float32     s_e; float64 is allowed with float64
    ranks [E] int32        r_e in [0, r]; optional, r if absent

Dropout with probability p multiplies the rows that A reads by a mask and s_e by 1 / (1 - p). The mask is a function of
(seed, projection, slot, column), so forward and backward and every backend compute the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any, NamedTuple

import torch
from torch import Tensor

from switchgear.checks import Finite, NotNegative, checked
from switchgear.reference.activations import Activation, find_intermediate_size, glu_backward_of, glu_of
from switchgear.reference.checks import (
    Experts,
    Fields,
    Floats,
    Rows,
    Sums,
    TopkIds,
    TopkWeights,
    check,
    check_experts,
    check_range,
    wide,
)
from switchgear.reference.formats import check_weight, decode, format_of
from switchgear.reference.products import gemm, multiply, sum_rows, wgrad_of
from switchgear.reference.stages import combine, gather_rows, plan, rows_of, segments, to_slots

__all__ = ["GluOptions", "Layer", "keeps", "moe_accumulate", "moe_backward", "moe_forward"]

# ---- arguments -------------------------------------------------------------------------------------------------------


class GluOptions(NamedTuple):
    """The options of the activation between the projections; `switchgear.glu` documents them."""

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702  # only for swiglu_oai
    limit: float = 0.0  # 0: none

    def keywords(self) -> dict[str, Any]:
        """The keyword arguments for `switchgear.glu` and `switchgear.moe`."""
        activation, gated, interleaved, alpha, limit = self  # torch.compile does not trace _asdict
        return {
            "activation": activation,
            "gated": gated,
            "interleaved": interleaved,
            "alpha": alpha,
            "limit": limit or None,
        }


class Layer(NamedTuple):
    """A layer of experts and the choices of tokens, without x. csrc/bindings.cpp reads the fields by their order, and
    the schemas of the ops list them by their names."""

    gate_up_proj: Sequence[Tensor]  # the tensors of a weight (formats.py)
    gate_up_form: Sequence[int]  # empty: plain, one tensor [E,N,C]
    down_proj: Sequence[Tensor]
    down_form: Sequence[int]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None
    topk_ids: TopkIds
    topk_weights: TopkWeights
    activation: Activation
    gated: bool
    interleaved: bool
    alpha: Finite
    limit: NotNegative
    gate_up_adapter: Sequence[Tensor] | None = None  # a, b, scales and possibly ranks (AppliedAdapter)
    down_adapter: Sequence[Tensor] | None = None
    dropout_seed: Tensor | None = None
    dropout: Sequence[float] = ()  # of both adapters; empty: none

    @property
    def options(self) -> GluOptions:
        return GluOptions(*self[8:13])


CheckedLayer = Annotated[Layer, Fields]
NUM_REQUIRED = len(Layer._fields) - len(Layer._field_defaults)


# ---- adapters --------------------------------------------------------------------------------------------------------

_MASK = 0xFFFFFFFF


class AppliedAdapter(NamedTuple):
    """An adapter for the rows of one call, in the wide dtype. Ranks are applied: later rows of a are zero."""

    given: Sequence[Tensor]
    a: Tensor  # [E,r,C]
    b: Tensor  # [E,N,r]
    scales: Tensor  # [E], with the factor of dropout
    kept: Tensor | None  # [S,C] bool: the mask of dropout; None without

    def masked(self, rows: Tensor) -> Tensor:
        return rows if self.kept is None else torch.where(self.kept, rows, 0)

    def scaled(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        scaled = rows.clone()
        for expert, slots in segments(expert_offsets):
            scaled[slots] *= self.scales[expert].to(rows.dtype)
        return scaled

    def low(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """u [S,r] = s · (rows ⊙ mask) · Aᵀ."""
        return self.scaled(gemm(self.masked(rows), self.a, None, expert_offsets), expert_offsets)

    def term(self, rows: Tensor, expert_offsets: Tensor) -> Tensor:
        """What the adapter adds to rows · Wᵀ, [S,N]."""
        return gemm(self.low(rows, expert_offsets), self.b, None, expert_offsets)

    def low_gradient(self, grad: Tensor, expert_offsets: Tensor) -> Tensor:
        """The gradient of (rows ⊙ mask) · Aᵀ, [S,r], from that of the product."""
        return self.scaled(gemm(grad, self.b.mT, None, expert_offsets), expert_offsets)

    def input_gradient(self, grad_low: Tensor, expert_offsets: Tensor) -> Tensor:
        """What the adapter adds to the gradient of rows."""
        return self.masked(gemm(grad_low, self.a.mT, None, expert_offsets))

    def gradients(self, rows: Tensor, grad_low: Tensor, grad: Tensor, expert_offsets: Tensor) -> tuple[Tensor, Tensor]:
        """Those of a and b, from rows [S,C], which A reads, and the gradients of (rows ⊙ mask) · Aᵀ and the product."""
        a, b = (torch.empty_like(tensor) for tensor in self.given[:2])
        grad_a = wgrad_of(grad_low, self.masked(rows), expert_offsets, a)
        return grad_a, wgrad_of(grad, self.low(rows, expert_offsets), expert_offsets, b)


def adapter_of(
    name: str,
    tensors: Sequence[Tensor] | None,
    sizes: tuple[int, int, int],
    dtype: torch.dtype,
    dropout: tuple[Tensor | None, Sequence[float]],
    projection: int,
    num_slots: int,
) -> AppliedAdapter | None:
    """Checks an adapter of a weight [E,N,C] and prepares it for num_slots slots; None if `tensors` is empty. dropout:
    the seed, and the probabilities of both projections."""
    if not tensors:
        return None
    if len(tensors) not in (3, 4):
        raise ValueError(f"{name}: expected a, b, scales and possibly ranks, got {len(tensors)} tensors")
    a, b, scales, *ranks = tensors
    num_experts, width, columns = sizes
    check(f"{name}_a", a, (num_experts, None, columns), dtype)
    rank = a.shape[1]
    check(f"{name}_b", b, (num_experts, width, rank), dtype)
    is_exact = scales.dtype is torch.float64 and dtype is torch.float64
    check(f"{name}_scales", scales, (num_experts,), torch.float64 if is_exact else torch.float32)
    if not bool(scales.isfinite().all()):
        raise ValueError(f"{name}_scales: expected finite numbers, got {scales.tolist()}")
    a, b = wide(a), wide(b)
    if ranks:
        check(f"{name}_ranks", ranks[0], (num_experts,), torch.int32)
        check_range(f"{name}_ranks", ranks[0], 0, rank + 1)
        used = torch.arange(rank, device=a.device) < ranks[0][:, None]
        a, b = torch.where(used[:, :, None], a, 0), torch.where(used[:, None, :], b, 0)
    seed, probabilities = dropout
    if probabilities and (len(probabilities) != 2 or not all(0 <= p < 1 for p in probabilities)):
        raise ValueError(f"dropout: expected two probabilities in [0, 1), got {list(probabilities)}")
    if not any(probabilities):
        return AppliedAdapter(tensors, a, b, scales, None)
    if seed is None:
        raise ValueError("dropout_seed: expected a tensor with dropout, got None")
    check("dropout_seed", seed, (1,), torch.int64)
    if (p := probabilities[projection]) == 0:
        return AppliedAdapter(tensors, a, b, scales, None)
    kept = keeps(seed, projection, num_slots, columns, p)
    return AppliedAdapter(tensors, a, b, scales.double() / (1 - p), kept)


def keeps(seed: Tensor, projection: int, num_slots: int, columns: int, p: float) -> Tensor:
    """The mask of dropout, [S,C] bool: each element is false with probability p, independently.

    Element (slot, column) is a hash of (seed, projection, slot, column), in arithmetic modulo 2^32:
    mix(row + column · 0x9E3779B9) >= p · 2^32, with row = mix(mix(mix(seed) + (seed >> 32)) + 2 · slot + projection).
    """
    start = _mix(_mix(seed & _MASK) + (seed >> 32 & _MASK))
    row = _mix(start + 2 * torch.arange(num_slots, device=seed.device) + projection)
    column = torch.arange(columns, device=seed.device) * 0x9E3779B9
    return _mix(row[:, None] + column) >= int(p * 2.0**32)


def shift_seed(seed: Tensor, num_slots: int) -> Tensor:
    """The seed whose masks of slots from 0 on are those of `seed` from `num_slots` on: mix is a bijection, so there is
    an upper half for any start of the rows."""
    low = _mix(seed & _MASK)
    high = (_unmix(_mix(low + (seed >> 32 & _MASK)) + 2 * num_slots & _MASK) - low) & _MASK
    high = torch.where(high >> 31 == 1, high - (1 << 32), high)  # the sign of int64
    return (high << 32) + (seed & _MASK)


def _mix(number: Tensor) -> Tensor:
    """A bijection of 32 bits whose every output bit depends on every input bit; int64 holds the numbers."""
    number = (number + 0x6A09E667) & _MASK  # 0 does not stay 0
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> 16)


def _unmix(number: Tensor) -> Tensor:
    """The inverse of _mix."""
    number = number ^ (number >> 16)
    for shift, factor in ((13, 0xC2B2AE35), (16, 0x85EBCA6B)):
        number = (number * pow(factor, -1, 1 << 32)) & _MASK
        number = number ^ (number >> shift) ^ (number >> 2 * shift)
    return (number - 0x6A09E667) & _MASK


# ---- the layer -------------------------------------------------------------------------------------------------------


def empty_gradient(weight: Tensor, experts: Tensor | None) -> Tensor:
    """The gradient of a weight [E,…], or of its `experts`, uninitialised, in the memory order of the weight."""
    return torch.empty_like(weight if experts is None else weight[: experts.shape[0]])


def _check_layer(x: Tensor, layer: Layer) -> tuple[tuple[int, int], AppliedAdapter | None, AppliedAdapter | None]:
    """Checks what annotations do not say: the sizes of weights, biases and adapters. Returns E, N and adapters."""
    sizes = check_weight("gate_up_proj", layer.gate_up_proj, layer.gate_up_form, (None, None, None), x.dtype)
    num_experts, width, hidden_size = sizes
    check("x", x, (None, hidden_size))
    size = find_intermediate_size("gate_up_proj", width, layer.activation, layer.gated)
    down_sizes = (num_experts, hidden_size, size)
    check_weight("down_proj", layer.down_proj, layer.down_form, down_sizes, x.dtype)
    check("gate_up_bias", layer.gate_up_bias, (num_experts, width), x.dtype)
    check("down_bias", layer.down_bias, (num_experts, hidden_size), x.dtype)
    drops, num_slots = (layer.dropout_seed, layer.dropout), layer.topk_ids.numel()
    return (
        (num_experts, width),
        adapter_of("gate_up_adapter", layer.gate_up_adapter, sizes, x.dtype, drops, 0, num_slots),
        adapter_of("down_adapter", layer.down_adapter, down_sizes, x.dtype, drops, 1, num_slots),
    )


def _multiply_rows(x: Tensor, layer: Layer) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor, Tensor]]:
    """The layer up to the sum over a token's experts: h [S,N] and permuted_y [S,H], wide, and the plan."""
    (num_experts, _), first, second = _check_layer(x, layer)
    slots = plan(layer.topk_ids, num_experts)
    expert_offsets, token_indices, _ = slots
    rows = rows_of(x, token_indices)
    h = multiply(rows, x.dtype, layer.gate_up_proj, layer.gate_up_form, layer.gate_up_bias, expert_offsets)
    if first is not None:
        h += first.term(rows, expert_offsets)
    a = glu_of(h, *layer.options)
    permuted_y = multiply(a, x.dtype, layer.down_proj, layer.down_form, layer.down_bias, expert_offsets)
    if second is not None:
        permuted_y += second.term(a, expert_offsets)
    return h, permuted_y, slots


@checked
def moe_forward(x: Rows, layer: CheckedLayer, save_h: bool) -> tuple[Tensor, Tensor]:
    """y[t] = Σ_k topk_weights[t,k] · (glu(x[t]·W_guᵀ + b_gu) · W_dᵀ + b_d), and h [S,N] = x·W_guᵀ + b_gu in slot order.

    h is [0,N] unless save_h. Each projection has a form (formats.py) and may have an adapter, which acts
    as a part of W. Integer weights are multiplied by activations rounded to int8: x, and a = glu(h) after rounding to
    the dtype of x. Adapters are multiplied by x and a themselves.
    """
    h, permuted_y, slots = _multiply_rows(x, layer)
    y = combine(permuted_y, *slots, layer.topk_weights)
    return y.to(x.dtype), h.to(x.dtype) if save_h else x.new_empty(0, h.shape[1])


@checked
def moe_accumulate(x: Rows, layer: CheckedLayer, sums: Annotated[Tensor, Sums("T", "H")]) -> None:
    """Adds what moe_forward rounds to y to sums [T,H], float32 (float64 for float64), one expert after the other.

    A token's experts are added in ascending order, equal ones in the order of its choices, each to the rounded sum of
    those before. So calls whose topk_ids are -1 except in disjoint ranges of experts, ascending from call to call, add
    as one call with all of them does.
    """
    _, permuted_y, planned = _multiply_rows(x, layer)
    order = layer.topk_ids.argsort(dim=-1, stable=True)
    slot_indices, weights = planned[2].gather(1, order), layer.topk_weights.gather(1, order)
    for slots, weight in zip(slot_indices.unbind(1), weights.unbind(1), strict=True):
        term = weight[:, None] * gather_rows(permuted_y, slots)
        sums += term.masked_fill(slots[:, None] < 0, 0)


@checked
def moe_backward(
    grad_y: Rows,
    x: Rows,
    h: Annotated[Tensor, Floats("S", "N")],
    layer: CheckedLayer,
    needs: Sequence[bool],
    experts: Experts | None = None,
) -> tuple[Tensor, ...]:
    """Gradients of moe_forward from x and h; `a` is recomputed. Outputs that `needs` does not request (it may be
    shorter) are empty. With dy the rows of grad_y in slot order and w their weights:

        da' = dy · W_d                    dh = glu'(h, w · da')
        x             Σ_k dh · W_gu       gate_up_proj  dhᵀ · x          gate_up_bias  Σ dh
        topk_weights  <da', a> + <dy,b_d> down_proj     (w · dy)ᵀ · a    down_bias     Σ w · dy

    experts: [n], ascending; the gradients of projections and biases are then those of these experts, [n,…].

    Then those of a and b of both adapters. With m the mask of dropout, u = s · (x ⊙ m) · A_guᵀ and
    v = s · (w · a ⊙ m) · A_dᵀ:

        dv = s · dy · B_d                 da' has m ⊙ (dv · A_d), too
        du = s · dh · B_gu                the gradient of x has m ⊙ (du · A_gu), too
        A_gu  duᵀ · (x ⊙ m)    B_gu  dhᵀ · u    A_d  dvᵀ · (w · a ⊙ m)    B_d  dyᵀ · v

    Stored projections are decoded to the dtype of x, and have no gradient.
    """
    options = layer.options
    gate_up_form, down_form, down_bias = layer.gate_up_form, layer.down_form, layer.down_bias
    topk_ids, topk_weights, gate_up_bias = layer.topk_ids, layer.topk_weights, layer.gate_up_bias
    (num_experts, width), first, second = _check_layer(x, layer)
    check("h", h, (topk_ids.numel(), width), x.dtype)
    check_experts(experts, num_experts)
    needs = (*needs, *[False] * (10 - len(needs)))
    need_x, need_gate_up, need_down, need_gate_up_bias, need_down_bias, need_weights, *need_adapters = needs
    for name, form, need in (("gate_up_proj", gate_up_form, need_gate_up), ("down_proj", down_form, need_down)):
        if form and need:
            raise ValueError(f"{name}: expected plain weights for their gradients, got {format_of(form)}")
    gate_up = decode(layer.gate_up_proj, gate_up_form, x.dtype)
    down = decode(layer.down_proj, down_form, x.dtype)
    expert_offsets, token_indices, slot_indices = plan(topk_ids, num_experts)
    absent = x.new_empty(0)
    grad_x = grad_gate_up = grad_down = grad_gate_up_bias = grad_down_bias = absent
    grad_weights = topk_weights.new_empty(0)
    grads_adapters = [absent] * 4
    rows_h = wide(h)
    grad_rows = rows_of(grad_y, token_indices)  # dy
    slot_weights = to_slots(topk_weights, slot_indices)[:, None]
    a = glu_of(rows_h, *options)
    if need_down:
        grad_down = wgrad_of(grad_rows * slot_weights, a, expert_offsets, empty_gradient(down, experts), experts)
    if need_down_bias and down_bias is not None:
        grad_down_bias = sum_rows(grad_rows * slot_weights, expert_offsets, down_bias, experts)
    grad_a = gemm(grad_rows, down.mT, None, expert_offsets)  # da'
    if second is not None:
        grad_v = second.low_gradient(grad_rows, expert_offsets)
        grad_a += second.input_gradient(grad_v, expert_offsets)
        if any(need_adapters[2:]):
            grads_adapters[2:] = second.gradients(a * slot_weights, grad_v, grad_rows, expert_offsets)
    if need_weights:
        grad_slot = (grad_a * a).sum(-1)
        if down_bias is not None:
            for expert, slots in segments(expert_offsets):
                grad_slot[slots] += grad_rows[slots] @ wide(down_bias[expert])
        grad_weights = gather_rows(grad_slot, slot_indices)
    if need_x or need_gate_up or need_gate_up_bias or any(need_adapters[:2]):
        grad_h = glu_backward_of(grad_a * slot_weights, rows_h, *options)
        rows_x = rows_of(x, token_indices)
        grad_u = None
        if first is not None:
            grad_u = first.low_gradient(grad_h, expert_offsets)
            if any(need_adapters[:2]):
                grads_adapters[:2] = first.gradients(rows_x, grad_u, grad_h, expert_offsets)
        if need_x:
            grad_slots = gemm(grad_h, gate_up.mT, None, expert_offsets)
            if first is not None and grad_u is not None:
                grad_slots += first.input_gradient(grad_u, expert_offsets)
            grad_x = combine(grad_slots, expert_offsets, token_indices, slot_indices, None).to(x.dtype)
        if need_gate_up:
            grad_gate_up = wgrad_of(grad_h, rows_x, expert_offsets, empty_gradient(gate_up, experts), experts)
        if need_gate_up_bias and gate_up_bias is not None:
            grad_gate_up_bias = sum_rows(grad_h, expert_offsets, gate_up_bias, experts)
    grads_adapters = [grad if need else absent for grad, need in zip(grads_adapters, need_adapters, strict=True)]
    return grad_x, grad_gate_up, grad_down, grad_gate_up_bias, grad_down_bias, grad_weights, *grads_adapters

# SPDX-License-Identifier: BSD-3-Clause
"""Low-rank adapters of a projection (LoRA, arXiv:2106.09685) in plain torch. The specification.

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
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.reference.checks import check, check_range, wide
from switchgear.reference.products import gemm, wgrad_of
from switchgear.reference.stages import segments

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


def _mix(number: Tensor) -> Tensor:
    """A bijection of 32 bits whose every output bit depends on every input bit; int64 holds the numbers."""
    number = (number + 0x6A09E667) & _MASK  # 0 does not stay 0
    for shift, factor in ((16, 0x85EBCA6B), (13, 0xC2B2AE35)):
        number = ((number ^ (number >> shift)) * factor) & _MASK
    return number ^ (number >> 16)

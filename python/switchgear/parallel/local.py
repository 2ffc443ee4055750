# SPDX-License-Identifier: BSD-3-Clause
"""What a rank's experts compute for the rows of one chunk, stage by stage, and for all chunks at the end.

    forward    h = x·W_guᵀ   a = glu(h)   y = a·W_dᵀ        returned per row: Σ over its pairs w·y; with `each`, every y
    backward   g = dy·W_d    dw = ⟨g, a⟩   dh = glu'(h, w·g)  dx = dh·W_gu        returned like y, with weights 1
    at the end dW_gu = Σ dhᵀ·x   dW_d = Σ dyᵀ·(w·a)          over all chunks in the order (expert, source, token)

Weight gradients are computed while the last rows of dx are transferred, which hides the transfer. They are sums in the
order of the tokens of all ranks, for any number of chunks: one process with all tokens computes the same bits.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from switchgear import ops, reference
from switchgear.functional.gradients import is_transposed
from switchgear.ops import GluOptions
from switchgear.parallel.layout import Receiving, expert_of
from switchgear.weights.exact import panel_layout


class Weights(NamedTuple):
    """The weights of a rank's experts; N is 2I for gated experts."""

    gate_up_proj: Tensor  # [E,N,H]
    down_proj: Tensor  # [E,H,I]
    gate_up_bias: Tensor | None
    down_bias: Tensor | None


class Chunk(NamedTuple):
    """The part of a Receiving that belongs to one chunk."""

    rows: slice
    offsets: Tensor
    slot_rows: Tensor
    slot_pairs: Tensor
    row_table: Tensor
    row_pairs: Tensor
    returned_slots: Tensor
    all_slots: Tensor


def chunk_of(plan: Receiving, c: int) -> Chunk:
    rows = slice(plan.row_starts[c], plan.row_starts[c + 1])
    slots = slice(plan.slot_starts[c], plan.slot_starts[c + 1])
    return Chunk(
        rows, plan.expert_offsets[c], plan.slot_rows[slots], plan.slot_pairs[slots], plan.row_table[rows],
        plan.row_pairs[rows], plan.returned_slots[slots], plan.all_slots[slots],
    )  # fmt: skip


def sum_rows(rows: Tensor, table: Tensor, weights: Tensor | None) -> Tensor:
    """[R,H]: Σ_j weights[r,j] · rows[table[r,j]] over entries other than -1, j ascending, rounded once.

    Unlike in `combine`, the table may have more entries than there are rows: most tokens have few experts on a rank.
    """
    wide = reference.weight_dtype(rows.dtype)
    total = rows[table[:, 0].long()].to(wide)  # every row has at least one pair
    if weights is not None:
        total *= weights[:, :1]
    for j in range(1, table.shape[1]):
        here = (table[:, j] >= 0).nonzero().squeeze(1)
        terms = rows[table[here, j].long()].to(wide)
        if weights is not None:
            terms *= weights[here, j, None]
        total.index_add_(0, here, terms)  # rows are distinct, so the order does not matter
    return total.to(rows.dtype)


def nothing() -> None:
    pass


def forward(
    x: Tensor, chunk: Chunk, pair_weights: Tensor, weights: Weights, options: GluOptions, each: bool,
    between: Callable[[], None] = nothing,
) -> Any:  # fmt: skip
    """x [R,H] -> the rows to return, and h [P,N]. each: one unweighted row per pair. between: called between
    products."""
    if not len(x):
        return x, x.new_empty(0, weights.gate_up_proj.shape[1])
    h = ops.grouped_gemm(x, [weights.gate_up_proj], (), weights.gate_up_bias, chunk.offsets, chunk.slot_rows)
    between()
    y = ops.grouped_gemm(ops.glu(h, *options), [weights.down_proj], (), weights.down_bias, chunk.offsets, None)
    return _returned(y, chunk, None if each else pair_weights[chunk.row_pairs], each), h


class Backward:
    """The backward pass of all chunks. grad_y: the rows of all chunks, which arrive chunk by chunk."""

    def __init__(
        self, x: Tensor, hs: Sequence[Tensor], grad_y: Tensor, receiving: Receiving, pair_weights: Tensor,
        weights: Weights, options: GluOptions, each: bool, between: Callable[[], None] = nothing,
    ) -> None:  # fmt: skip
        self._between = between
        self._x, self._hs, self._grad_y, self._receiving, self._each = x, hs, grad_y, receiving, each
        self._pair_weights, self._weights, self._options = pair_weights, weights, options
        num_pairs = len(receiving.slot_pairs)
        self._grad_h = grad_y.new_empty(num_pairs, weights.gate_up_proj.shape[1])
        self._weighted_a = grad_y.new_empty(num_pairs, weights.down_proj.shape[2])

    def chunk(self, c: int, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of grad_x to return; pairs, and the gradients of their topk_weights. Keeps dh [P,N] and w·a [P,I]
        for `gradients`."""
        grad_y, h, weights = self._grad_y[chunk.rows], self._hs[c], self._weights
        if not len(grad_y):
            return grad_y, chunk.slot_pairs, self._pair_weights[:0]
        a = ops.glu(h, *self._options)
        g = ops.grouped_gemm(grad_y, [weights.down_proj.mT], (), None, chunk.offsets, chunk.slot_rows, False, True)
        self._between()
        grad_weights = dot_panels(g, a) if self._each else dot_rows(g, a)
        if weights.down_bias is not None:
            expert = torch.repeat_interleave(chunk.offsets.diff())
            grad_weights += dot_rows(grad_y[chunk.slot_rows.long()], weights.down_bias[expert])
        w = self._pair_weights[chunk.slot_pairs][:, None]
        grad_h = ops.glu_backward((g * w).to(g.dtype), h, *self._options)
        grad_x = ops.grouped_gemm(grad_h, [weights.gate_up_proj.mT], (), None, chunk.offsets, None, False, True)
        self._grad_h[chunk.all_slots], self._weighted_a[chunk.all_slots] = grad_h, (a * w).to(a.dtype)
        return _returned(grad_x, chunk, None, self._each), chunk.slot_pairs, grad_weights

    def gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Those needed of the Weights."""
        weights, plan = self._weights, self._receiving
        if not weights.gate_up_proj.shape[0]:  # a rank without experts
            return [torch.empty_like(w) if w is not None and need else None
                    for w, need in zip(weights, needs, strict=True)]  # fmt: skip
        # grad_h and weighted_a are in the order (expert, source, token); x and grad_y are the buffers of all rows.
        grad_h, grad_y, offsets, rows = self._grad_h, self._grad_y, plan.all_offsets, plan.all_rows
        grads: list[Tensor | None] = [None] * 4
        if needs[0]:
            grads[0] = ops.grouped_gemm_wgrad(grad_h, self._x, offsets, rows, is_transposed(weights.gate_up_proj))
        if needs[1]:  # transposed: gathers rows of grad_y, not of a
            is_plain = not is_transposed(weights.down_proj)
            grads[1] = ops.grouped_gemm_wgrad(self._weighted_a, grad_y, offsets, rows, is_plain).mT
        if needs[2]:
            ones = grad_h.new_ones(len(grad_h), 1)
            grads[2] = ops.grouped_gemm_wgrad(grad_h, ones, offsets, None, False).squeeze(-1)
        if needs[3]:
            w = torch.empty_like(self._pair_weights)
            w[plan.all_slots] = self._pair_weights[plan.slot_pairs]
            grads[3] = ops.grouped_gemm_wgrad(w[:, None].to(grad_y.dtype), grad_y, offsets, rows, False).squeeze(1)
        return grads


def _returned(rows: Tensor, chunk: Chunk, weights: Tensor | None, each: bool) -> Tensor:
    if each:
        return rows[chunk.returned_slots[:, 0].long()]
    return sum_rows(rows, chunk.row_table, weights)


def dot_rows(a: Tensor, b: Tensor) -> Tensor:
    """[P] ⟨a[p], b[p]⟩ in float32 (float64 for float64): combine_weight_backward with one slot per token."""
    count = len(a)
    index = torch.arange(count, dtype=torch.int32, device=a.device)
    offsets = torch.tensor([0, count], dtype=torch.int32, device=a.device)
    return ops.combine_weight_backward(a, b, offsets, index, index[:, None]).squeeze(1)


def dot_panels(a: Tensor, b: Tensor) -> Tensor:
    """The same, as one process sums on the CPU: over each panel of columns, then over the panels in their order."""
    width = panel_layout(torch.float32).rows
    panels = [F.pad(rows, (0, -rows.shape[1] % width)).view(-1, width) for rows in (a, b)]
    first, *others = dot_rows(*panels).view(len(a), -1).unbind(1)
    return sum(others, first)


# ---- experts that a module runs: stored ones, and those with adapters ------------------------------------------------


Module = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, local ids, weights) -> y


class Run(NamedTuple):
    """The run of a chunk: the module's input and output, and the pairs that its weights belong to."""

    x: Tensor
    weights: Tensor
    y: Tensor


def run_module(
    module: Module, rows: Tensor, chunk: Chunk, pairs: Tensor, pair_weights: Tensor, each: bool, record: bool
) -> Run:
    """Runs the experts on a chunk. each: one token per pair, with weight 1. record: with gradients."""
    experts = expert_of(pairs[:, 0]).int()
    if each:
        slots = chunk.returned_slots[:, 0].long()
        ids = experts[chunk.slot_pairs[slots]][:, None]
        rows, weights = rows[chunk.slot_rows[slots].long()], torch.ones_like(ids, dtype=pair_weights.dtype)
    else:
        ids = torch.where(chunk.row_table >= 0, experts[chunk.row_pairs], -1).int()
        weights = pair_weights[chunk.row_pairs]
    if not record:
        return Run(rows, weights, module(rows, ids, weights))
    # Not detach(): rows are a part of a buffer whose other parts are still written, which autograd would notice.
    rows, weights = rows.data.requires_grad_(), weights.detach().requires_grad_(not each)
    with torch.enable_grad():
        return Run(rows, weights, module(rows, ids, weights))


class ModuleBackward:
    """The same calls as Backward, through the graph of each chunk that forward recorded. Gradients of parameters are
    summed over chunks, so their last bits depend on the number of chunks."""

    def __init__(
        self, runs: Sequence[Run | None], grad_y: Tensor, pair_weights: Tensor, parameters: Sequence[Tensor], each: bool
    ) -> None:
        self._runs, self._grad_y, self._each = runs, grad_y, each
        self._pair_weights, self._parameters = pair_weights, parameters
        self._grads: list[Tensor | None] = [None] * len(parameters)

    def chunk(self, c: int, chunk: Chunk) -> tuple[Tensor, Tensor, Tensor]:
        """The rows of grad_x to return; pairs, and the gradients of their topk_weights."""
        grad_y, run = self._grad_y[chunk.rows], self._runs[c]
        if run is None:
            return grad_y, chunk.slot_pairs, self._pair_weights[:0]
        if not self._each:
            grad_x, grad_weights = self._through(run, grad_y, [run.x, run.weights])
            present = chunk.row_table >= 0
            return grad_x, chunk.row_pairs[present], grad_weights[present]
        slots = chunk.returned_slots[:, 0].long()
        rows = grad_y[chunk.slot_rows[slots].long()]
        of_slots = chunk.slot_pairs[slots]
        weighted = rows * self._pair_weights[of_slots][:, None]
        (grad_x,) = self._through(run, weighted.to(rows.dtype), [run.x])
        return grad_x, of_slots, dot_rows(rows, run.y.detach())

    def _through(self, run: Run, grad_y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
        found = torch.autograd.grad(
            run.y, [*inputs, *self._parameters], grad_y, allow_unused=True, materialize_grads=True
        )
        for number, grad in enumerate(found[len(inputs) :]):
            before = self._grads[number]
            self._grads[number] = grad if before is None else before + grad
        return list(found[: len(inputs)])

    def gradients(self, needs: Sequence[bool]) -> list[Tensor | None]:
        """Of the parameters; zeros if no row has arrived."""
        pairs = zip(self._grads, self._parameters, needs, strict=True)
        return [(torch.zeros_like(p) if grad is None else grad) if need else None for grad, p, need in pairs]

# SPDX-License-Identifier: BSD-3-Clause
"""Experts that a module runs (stored ones, and those with adapters), chunk by chunk, with gradients.

Forward records the graph of each chunk, and backward goes through it. Gradients of parameters are summed over chunks,
so their last bits depend on the number of chunks.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from switchgear.parallel.layout import expert_of
from switchgear.parallel.local import Chunk, dot_rows

Module = Callable[[Tensor, Tensor, Tensor], Tensor]  # (x, local ids, weights) -> y


class Run(NamedTuple):
    """The run of a chunk: the module's input and output, and the pairs that its weights belong to."""

    x: Tensor
    weights: Tensor
    y: Tensor


def run(
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


class Backward:
    """The same calls as local.Backward."""

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

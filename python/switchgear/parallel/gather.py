# SPDX-License-Identifier: BSD-3-Clause
"""Values of all experts from those of each rank, with gradients: for scores of the experts' weights, and for files."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from switchgear.autograd import apply
from switchgear.parallel import exchange
from switchgear.parallel.rows import Transfers
from switchgear.utils.functions import not_compiled

if TYPE_CHECKING:
    from switchgear.parallel.exchange import Layer
    from switchgear.parallel.placement import Placement


@not_compiled
def gather_experts(layer: Layer, placement: Placement, values: Tensor) -> Tensor:
    """[E, …] of all experts from values [E', …] of this rank's; collective. The gradient of a value is the sum over
    the ranks with different tokens, in order, or their mean if that is what gradients of weights are."""
    flat = values.flatten(1)  # not reshape: there may be none
    whole: Tensor = apply(_Gather, flat, layer, placement)
    return whole.view(placement.num_experts, *values.shape[1:])


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: Tensor, layer: Layer, placement: Placement) -> Tensor:
        ctx.layer, ctx.placement = layer, placement
        parallel = layer.parallel
        held = [len(experts) for experts in placement.experts_of_rank]
        with parallel.peers.exchange():
            transfers = _agreed(layer, values, False)
            gathered = values.new_empty(sum(held), values.shape[1])
            copies = values.repeat(parallel.size, 1)
            transfers.wait(transfers.start("gather", gathered, copies, held, [len(values)] * parallel.size))
        starts = [sum(held[:rank]) for rank in range(parallel.size)]
        first = [starts[ranks[0]] + placement.experts_of_rank[ranks[0]].index(e)
                 for e, ranks in enumerate(placement.owners)]  # fmt: skip
        return gathered[torch.tensor(first, dtype=torch.int64, device=values.device)]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Any:
        layer, placement = ctx.layer, ctx.placement
        parallel = layer.parallel
        held = [len(experts) for experts in placement.experts_of_rank]
        mine = held[parallel.rank]
        order = torch.tensor([e for experts in placement.experts_of_rank for e in experts], dtype=torch.int64)
        with parallel.peers.exchange():
            transfers = _agreed(layer, grad, True)
            parts = grad.new_empty(parallel.size * mine, grad.shape[1])
            transfers.wait(transfers.start("gather", parts, grad[order.to(grad.device)], [mine] * parallel.size, held))
        each = parts.view(parallel.size, mine, grad.shape[1])
        total = torch.zeros_like(each[0])
        for ranks in sorted(parallel.twins):  # ranks with the same tokens have the same gradients
            total += each[ranks[0]]
        if parallel.average_gradients:
            total /= len(parallel.twins)
        return total, None, None


def _agreed(layer: Layer, values: Tensor, backward: bool) -> Transfers:
    terms = exchange.terms_of(layer, values.dtype, values.shape[1], 0, -4, backward)
    phase = "backward agree" if backward else "agree"
    transfers = Transfers(layer.parallel, values.device)
    exchange.exchange_headers(transfers, terms, 0, phase)
    layer.parallel.peers.enter("backward dispatch" if backward else "dispatch")
    return transfers

# SPDX-License-Identifier: BSD-3-Clause
"""The baseline of `switchgear bench parallel`: a layer of distributed experts by plain all_to_all_single."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

import switchgear
from switchgear.parallel import ExpertParallel, ParallelExperts
from switchgear.parallel.rows import Event


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, parallel: ExpertParallel, rows_out: list[int], rows_in: list[int]) -> Tensor:
        ctx.parallel, ctx.rows_out, ctx.rows_in = parallel, rows_out, rows_in
        return _transfer(parallel, rows, rows_out, rows_in)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        return _transfer(ctx.parallel, grad.contiguous(), ctx.rows_in, ctx.rows_out), None, None, None


def _transfer(parallel: ExpertParallel, rows: Tensor, rows_out: list[int], rows_in: list[int]) -> Tensor:
    received = rows.new_empty(sum(rows_in), *rows.shape[1:])
    begin = time.monotonic()
    work = parallel.transport_for(rows.device).all_to_all(received, rows, rows_in, rows_out)
    parallel.peers.wait(work)
    end = time.monotonic()
    row = rows.shape[1:].numel() * rows.element_size()
    parallel.record.bytes["rows"] += (sum(rows_out) - rows_out[parallel.rank]) * row
    node_of = parallel.nodes.node_of
    far = [rows for rank, rows in enumerate(rows_out) if node_of[rank] != node_of[parallel.rank]]
    parallel.record.between_nodes["rows"] += sum(far) * row
    parallel.record.waited += end - begin
    if parallel.record.events is not None:
        parallel.record.events.append(Event("link", "rows", begin, end))
    return received


def plain(experts: ParallelExperts, x: Tensor, topk_ids: Tensor, topk_weights: Tensor) -> Tensor:
    """A row for each choice, in the order of experts, there and back by all_to_all_single; weighted at the end."""
    parallel, placement = experts.parallel, experts.placement
    order = topk_ids.flatten().argsort(stable=True)
    per_expert = torch.bincount(topk_ids.flatten(), minlength=placement.num_experts)
    local = [len(held) for held in placement.experts_of_rank]
    mine = local[parallel.rank]
    counts = _transfer(parallel, per_expert[:, None], local, [mine] * parallel.size).view(parallel.size, mine)
    rows_out = [int(part.sum()) for part in torch.split(per_expert, local)]
    rows_in = counts.sum(1).tolist()
    sent = x[torch.div(order, topk_ids.shape[1], rounding_mode="floor")]
    rows: Tensor = _AllToAll.apply(sent, parallel, rows_out, rows_in)  # type: ignore[no-untyped-call]
    ids = torch.arange(mine).repeat(parallel.size).repeat_interleave(counts.flatten())[:, None]
    first: Tensor = getattr(experts, experts._first)
    y = switchgear.moe(rows, first, experts.down_proj, ids, torch.ones(len(ids), 1))
    back: Tensor = _AllToAll.apply(y, parallel, rows_in, rows_out)  # type: ignore[no-untyped-call]
    each = torch.empty_like(back).index_copy(0, order, back).view(*topk_ids.shape, -1)
    return (each * topk_weights[..., None].to(each.dtype)).sum(1)

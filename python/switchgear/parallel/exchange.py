# SPDX-License-Identifier: BSD-3-Clause
"""exchange: sends tokens to their experts' ranks, runs the experts, and returns results, in overlapping chunks.

    agree      one all-to-all of headers (header.py): checks that all ranks agree, and exchanges sizes
    dispatch   one all-to-all of pairs and one of rows per chunk, all started at once
    experts    run a chunk once its rows arrive, while later chunks arrive and earlier results leave
    combine    one all-to-all of results per chunk; then each token's rows are summed, ranks ascending

Backward is the same, with grad_y in and grad_x out, and weight gradients at the end (local.py).

Bytes that a rank sends in forward: 8·LENGTH per other rank, 8 per pair (expert and weight), and H·size per row, twice;
in backward: the headers, H·size per row, twice, and 4 per pair. There is no padding. `invariant` returns a row per pair
instead of one per token, so that each token's sum runs over its experts in order, as in one process.

Rows go straight to the ranks of their experts (rows.py), or once per node (two_level.py); the rest is the same.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from switchgear import ops
from switchgear.ops import GluOptions
from switchgear.parallel import header, layout, local
from switchgear.parallel.cost import choose_chunks
from switchgear.parallel.rows import WIRES, Direct, Transfers
from switchgear.parallel.transport import Done, Work
from switchgear.parallel.two_level import Relaying, TwoLevel

if TYPE_CHECKING:
    from switchgear.parallel.group import ExpertParallel
    from switchgear.parallel.placement import Placement


class Layer:
    """What the ranks of a layer share, and this rank's part of it.

    Attributes:
        mine: the experts of this rank. copies: all ranks, by local number, of those that other ranks hold, too.
        rank_of, local_of: [E]: see Placement.routes. routes_on: both on devices that have used them (static.py).
    """

    def __init__(
        self, parallel: ExpertParallel, placement: Placement, options: GluOptions, number: int | None = None,
        extra: object = None,
    ) -> None:  # fmt: skip
        """number: of an earlier layer that this one replaces. extra: anything else that must agree."""
        self.parallel, self.placement, self.options, self.extra = parallel, placement, options, extra
        self.number = parallel.next_layer() if number is None else number
        self.mine = placement.experts_of_rank[parallel.rank]
        owners = [placement.owners[expert] for expert in self.mine]
        self.copies = {number: ranks for number, ranks in enumerate(owners) if len(ranks) > 1}
        near = parallel.nodes.same(parallel.rank) if parallel.levels == 2 else ()
        self.rank_of, self.local_of = placement.routes(parallel.rank, near)
        self.placement_digest = placement.digest()
        self.routes_on: dict[torch.device, tuple[Tensor, Tensor]] = {}


class Saved(NamedTuple):
    """What backward needs from forward: the layout of rows, and their contents (separately, for autograd to save)."""

    sending: layout.Sending
    receiving: layout.Receiving
    all_tokens: int
    num_tokens: int  # of this rank's part
    top_k: int
    tensors: tuple[Tensor, ...]  # x [R,H] all arrived rows, weights [P] of the pairs, and h of each chunk
    runs: tuple[local.Run | None, ...] = ()  # of each chunk, if a module has run the experts
    relaying: Relaying | None = None  # with two levels


def terms_of(
    layer: Layer, dtype: torch.dtype, hidden_size: int, top_k: int, gradients: int, backward: bool
) -> header.Terms:
    parallel = layer.parallel
    if dtype not in header.DTYPES:
        raise TypeError(f"hidden_states: expected one of {', '.join(map(str, header.DTYPES))}, got {dtype}")
    return header.Terms(
        header.MAGIC, parallel.peers.step, layer.number, int(backward), header.DTYPES.index(dtype), hidden_size,
        layer.placement.num_experts, top_k, header.digest((tuple(layer.options), layer.extra)), layer.placement_digest,
        parallel.sharing_digest, gradients,
        int(parallel.invariant), parallel.num_chunks or 0, parallel.levels, list(WIRES).index(parallel.wire),
        parallel.capacity or 0,
    )  # fmt: skip


def exchange_headers(
    transfers: Transfers, terms: header.Terms, num_tokens: int, phase: str, choice: layout.Choice | None = None
) -> list[header.Sizes]:
    """Sizes from each source; raises the common error if ranks disagree."""
    parallel = transfers.parallel
    parallel.peers.enter(phase)
    nothing = [0] * parallel.size
    pairs, rows = (nothing, [nothing] * layout.PIECES) if choice is None else (choice.pairs, choice.rows)
    relayed = choice.sent_rows if choice is not None and parallel.levels == 2 else None
    sent = header.encode(terms, num_tokens, pairs, rows, relayed)
    ones = [1] * parallel.size
    received = Transfers(parallel, torch.device("cpu")).exchange("header", sent, ones, ones)
    all_terms, sizes = header.decode(received)
    failure = header.disagreement(all_terms) or header.unequal_tokens(all_terms, sizes, parallel.twins)
    if failure is not None:
        parallel.peers.fail(failure)
    failure = header.impossible_sizes(all_terms, sizes)
    if failure is not None:
        parallel.peers.report(failure)
        parallel.peers.check()
    return sizes


def forward(
    layer: Layer, x: Tensor, topk_ids: Tensor, topk_weights: Tensor, gradients: int,
    weights: local.Weights | None, module: local.Module | None,
) -> tuple[Tensor, Saved | None]:  # fmt: skip
    """y [T,H] of x [T,H], topk_ids [T,K] int32 and topk_weights [T,K] float32.

    gradients: a bit for each that backward will compute, whose needs are then saved; -1 without backward.
    weights: of the local experts. None: `module(x, ids, weights)` runs the experts, with a graph for backward.
    """
    parallel = layer.parallel
    peers, record = parallel.peers, parallel.record
    transfers = Transfers(parallel, x.device)
    all_tokens, top_k = topk_ids.shape
    each, saves = parallel.invariant, gradients >= 0
    _check_ids(topk_ids, layer.placement.num_experts)
    part = _part(parallel, all_tokens)  # ranks that hold the same tokens share the work
    x, topk_ids, topk_weights = x[part], topk_ids[part], topk_weights[part]
    num_tokens = len(topk_ids)
    relays_out, relays_in = _relays(parallel)
    choice = layout.choose(topk_ids, layer.rank_of, layer.local_of, parallel.size, relays_out)
    terms = terms_of(layer, x.dtype, x.shape[1], top_k, gradients, False)
    sizes = exchange_headers(transfers, terms, all_tokens, "agree", choice)
    row_bytes = WIRES[parallel.wire].out.row_bytes(x.shape[1], x.element_size())
    num_chunks = parallel.num_chunks or choose_chunks(
        max(size.num_tokens for size in sizes), top_k, parallel.num_stops, row_bytes, parallel.link
    )

    peers.enter("dispatch")
    sending = layout.plan_sending(choice, topk_ids, num_chunks)
    arriving = layout.merge_pieces(list(zip(*(size.rows for size in sizes), strict=True)), num_chunks)
    pairs_in = [size.pairs for size in sizes]
    own_weights = topk_weights.detach().flatten()[sending.pair_choices]
    # Weights of float64 tensors are float64: two int32 columns each.
    columns = own_weights.contiguous().view(torch.int32).view(len(own_weights), own_weights.element_size() // 4)
    pairs_out = torch.cat((sending.pair_codes[:, None], columns), 1)
    pairs = pairs_out.new_empty(sum(pairs_in), pairs_out.shape[1])
    pairs_work = transfers.start("pairs", pairs, pairs_out, pairs_in, sending.pairs)
    rows: Direct
    if relays_in is None:
        rows = Direct(transfers, sending, x.detach(), each, arriving, None)
    else:
        passing = layout.merge_pieces(list(zip(*(size.relayed for size in sizes), strict=True)), num_chunks)
        received = layout.merge_sources(arriving, relays_in)
        rows = TwoLevel(transfers, sending, x.detach(), each, received, None, passing, choice)
    rows.send(x.detach())
    transfers.wait(pairs_work)
    receiving = layout.plan_receiving(arriving, pairs_in, pairs[:, 0].contiguous(), len(layer.mine), relays_in)
    rows.returning = receiving.pairs_of_chunk if each else receiving.rows
    # A copy of at most one row too, whose columns count as contiguous but do not begin where a float64 may.
    columns_in = pairs[:, 1:].clone(memory_format=torch.contiguous_format)
    pair_weights = columns_in.view(topk_weights.dtype).view(-1)

    hs = []
    runs: list[local.Run | None] = []
    for c in range(num_chunks):
        rows.receive(c)
        if c == 0:
            peers.enter("experts")
        chunk = local.chunk_of(receiving, c)
        arrived = rows.buffer[chunk.rows]
        with record.event("experts", f"experts {c}"):
            if weights is not None:
                returned, h = local.forward(arrived, chunk, pair_weights, weights, layer.options, each, rows.look)
                if saves:
                    hs.append(h)
            elif not len(arrived):
                returned = arrived
                runs.append(None)
            else:
                assert module is not None
                run = local.run_module(module, arrived, chunk, pairs, pair_weights, each, saves)
                returned = run.y.detach()
                runs.append(run if saves else None)
        rows.give_back(returned)
    peers.enter("combine")
    results = rows.finish()
    with record.event("experts", "sum"):
        y = _sum_results(results, sending, topk_weights.detach(), each)
    y = _join_parts(transfers, y, all_tokens)
    if not saves:
        return y, None
    relaying = rows.relaying if isinstance(rows, TwoLevel) else None
    tensors = (rows.buffer, pair_weights, *hs)
    return y, Saved(sending, receiving, all_tokens, num_tokens, top_k, tensors, tuple(runs), relaying)


def backward(
    layer: Layer, grad_y: Tensor, saved: Saved, weights: local.Weights | Sequence[Tensor], gradients: int,
    needs: Sequence[bool],
) -> tuple[Tensor | None, ...]:  # fmt: skip
    """Gradients of x, topk_weights and `weights`; `needs` is in this order. weights: the four Weights, or the
    parameters of a module that has run the experts."""
    parallel = layer.parallel
    peers, record = parallel.peers, parallel.record
    transfers = Transfers(parallel, grad_y.device)
    each = parallel.invariant
    sending, receiving = saved.sending, saved.receiving
    x, pair_weights, *hs = saved.tensors
    num_chunks = len(sending.rows)
    terms = terms_of(layer, grad_y.dtype, grad_y.shape[1], saved.top_k, gradients, True)
    exchange_headers(transfers, terms, saved.all_tokens, "backward agree")

    peers.enter("backward dispatch")
    returning = receiving.pairs_of_chunk if each else receiving.rows
    rows: Direct
    if saved.relaying is None:
        rows = Direct(transfers, sending, grad_y, each, receiving.rows, returning)
    else:
        passing = saved.relaying.rows
        rows = TwoLevel(transfers, sending, grad_y, each, receiving.rows, returning, passing, saved.relaying)
    rows.send(grad_y[_part(parallel, saved.all_tokens)])
    experts: local.Backward | local.ModuleBackward
    if isinstance(weights, local.Weights):
        experts = local.Backward(x, hs, rows.buffer, receiving, pair_weights, weights, layer.options, each, rows.look)
    else:
        experts = local.ModuleBackward(saved.runs, rows.buffer, pair_weights, weights, each)
    grad_pairs = pair_weights.new_empty(len(receiving.slot_pairs))
    weights_work: Work = Done()
    for c in range(num_chunks):
        rows.receive(c)
        if c == 0:
            peers.enter("backward experts")
        chunk = local.chunk_of(receiving, c)
        with record.event("experts", f"backward {c}"):
            returned, pairs, grad_slots = experts.chunk(c, chunk)
            grad_pairs[pairs] = grad_slots.to(grad_pairs.dtype)
        if needs[0]:
            rows.give_back(returned)
    grad_choices = grad_pairs.new_empty(sum(sending.pairs))
    if needs[1]:
        weights_work = transfers.start(
            "weights", grad_choices[:, None], grad_pairs[:, None], sending.pairs, receiving.pairs
        )
    rows.flush()
    with record.event("experts", "weight gradients"):
        grads = experts.gradients(needs[2:])
    grads = _sum_copies(transfers, layer, grads)
    if parallel.average_gradients and parallel.size > 1:
        for grad in grads:
            if grad is not None:
                grad /= len(parallel.twins)
    peers.enter("backward combine")
    results = rows.finish()
    transfers.wait(weights_work)
    grad_x = grad_weights = None
    with record.event("experts", "sum"):
        if needs[0]:
            grad_x = _sum_results(results, sending, None, each)
        if needs[1]:
            flat = grad_choices.new_zeros(saved.num_tokens * saved.top_k)
            flat[sending.pair_choices] = grad_choices
            grad_weights = flat.view(saved.num_tokens, saved.top_k)
    grad_x, grad_weights = (
        None if grad is None else _join_parts(transfers, grad, saved.all_tokens) for grad in (grad_x, grad_weights)
    )
    return grad_x, grad_weights, *grads


# ---- parts -----------------------------------------------------------------------------------------------------------


def _relays(parallel: ExpertParallel) -> tuple[list[int] | None, list[int] | None]:
    """Through which ranks this rank's rows reach each rank, and those of each rank reach this one; None: directly."""
    if parallel.levels == 1:
        return None, None
    nodes, rank = parallel.nodes, parallel.rank
    others = range(parallel.size)
    return [nodes.relay(rank, other) for other in others], [nodes.relay(other, rank) for other in others]


def _part(parallel: ExpertParallel, num_tokens: int, rank: int | None = None) -> slice:
    """The tokens that this rank (or another that holds the same ones) sends: an equal share, in order."""
    ranks = parallel.own_twins
    number = ranks.index(parallel.rank if rank is None else rank)
    return slice(num_tokens * number // len(ranks), num_tokens * (number + 1) // len(ranks))


def _join_parts(transfers: Transfers, part: Tensor, num_tokens: int) -> Tensor:
    """Gathers the rows of all tokens from the ranks that hold the same tokens."""
    parallel = transfers.parallel
    if len(parallel.twins) == parallel.size:
        return part
    lengths = [0] * parallel.size
    for rank in parallel.own_twins:
        own = _part(parallel, num_tokens, rank)
        lengths[rank] = own.stop - own.start
    to_each = [len(part) if rank in parallel.own_twins else 0 for rank in range(parallel.size)]
    return transfers.exchange("join", part.repeat(len(parallel.own_twins), 1), lengths, to_each)


def _check_ids(topk_ids: Tensor, num_experts: int) -> None:
    if topk_ids.numel():
        low, high = torch.stack(topk_ids.aminmax()).tolist()
        if low < -1 or high >= num_experts:
            raise ValueError(f"topk_ids: expected -1 to {num_experts - 1}, got {low if low < -1 else high}")


def _sum_results(results: Tensor, sending: layout.Sending, weights: Tensor | None, each: bool) -> Tensor:
    """Sums each token's returned rows: ranks ascending, or (each) experts ascending, with their weights."""
    table = sending.pair_table if each else sending.row_table
    if weights is not None:
        weights = weights.gather(1, sending.choice_order).contiguous() if each else None
    # combine reads only the table; the rest of the plan just has to be valid.
    offsets = torch.zeros(2, dtype=torch.int32, device=table.device)
    indices = torch.full((table.numel(),), -1, dtype=torch.int32, device=table.device)
    return ops.combine(results, offsets, indices, table.contiguous(), weights)


def _sum_copies(transfers: Transfers, layer: Layer, grads: list[Tensor | None]) -> list[Tensor | None]:
    """Sums the gradients of replicated experts over their copies, ranks ascending, so that all have the same bits."""
    if not layer.placement.replicated:
        return grads
    rank, size = layer.parallel.rank, layer.parallel.size
    held = list(enumerate(layer.copies.values()))
    to_rank = [[place for place, ranks in held if r in ranks and r != rank] for r in range(size)]
    counts = [len(places) for places in to_rank]
    order = torch.tensor([place for places in to_rank for place in places], dtype=torch.int64)
    numbers = torch.tensor(list(layer.copies), dtype=torch.int64)
    for grad in grads:
        if grad is None:
            continue
        mine = grad[numbers].flatten(1).contiguous()
        others = transfers.exchange("copies", mine[order], counts, counts)
        for place, (number, ranks) in enumerate(layer.copies.items()):
            parts = [mine[place] if r == rank else others[sum(counts[:r]) + to_rank[r].index(place)] for r in ranks]
            total = parts[0].clone()
            for part in parts[1:]:
                total += part
            grad[number] = total.view_as(grad[number])
    return grads

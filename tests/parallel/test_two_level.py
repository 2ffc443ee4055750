# SPDX-License-Identifier: BSD-3-Clause
"""Rows that go once per node: the results of one process, one row per token and node, and failures as with one level.

Nodes are sets of processes of this machine. Without shared memory ("gloo") nothing else tells them from machines.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from parallel_pool import Pool, subgroup
from test_exchange import LAYERS, SHARDS, Case, compare, experts_forward, inputs, make, zero_tokens

import switchgear
from errors import raises
from switchgear.parallel import ExpertParallel, Placement, group, layout
from switchgear.parallel.header import LENGTH
from switchgear.parallel.nodes import Nodes, find_nodes, open_channel
from switchgear.parallel.transport import GroupTransport
from switchgear.parallel.two_level import TwoLevel, plan_relaying

TWO = 2  # ranks per node
UNEQUAL = ((0, 2, 3), (1,))
each_way = pytest.mark.parametrize("invariant", [False, True], ids=["sum", "invariant"])


# ---- equality --------------------------------------------------------------------------------------------------------


@each_way
@pytest.mark.parametrize("nodes", [TWO, UNEQUAL, 3], ids=["2x2", "unequal", "3+1"])
@pytest.mark.parametrize(("num_chunks", "transport"), [(1, "gloo"), (4, "shared_memory"), (None, "auto"), (8, "gloo")])
def test_two_levels(pool: Pool, nodes: Any, invariant: bool, num_chunks: int | None, transport: str) -> None:
    pool.run(compare, Case(nodes=nodes, invariant=invariant, num_chunks=num_chunks, transport=transport))


def test_four_nodes_of_one_rank_have_one_level(pool: Pool) -> None:
    pool.run(compare, Case(nodes=1, invariant=True))


@each_way
@pytest.mark.parametrize("ranks", SHARDS.values(), ids=SHARDS.keys())
def test_shards(pool: Pool, ranks: tuple[tuple[int, ...], ...], invariant: bool) -> None:
    pool.run(compare, Case(ranks=ranks, invariant=invariant, num_chunks=2, nodes=TWO))
    pool.run(compare, Case(ranks=ranks, invariant=invariant, num_chunks=2, nodes=UNEQUAL))


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_options(pool: Pool, layer: dict[str, Any]) -> None:
    for invariant, nodes in ((False, TWO), (True, UNEQUAL)):
        pool.run(compare, Case(layer=tuple(layer.items()), num_chunks=2, holes=True, nodes=nodes, invariant=invariant))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(pool: Pool, dtype: torch.dtype) -> None:
    pool.run(compare, Case(dtype=dtype, num_chunks=2, nodes=TWO))


def test_ranks_without_tokens(pool: Pool) -> None:
    assert pool.run(zero_tokens, TWO, timeout=180) == [30] * 4


# ---- bytes -----------------------------------------------------------------------------------------------------------


def sent_bytes(rank: int, case: Case) -> tuple[Counter[str], Counter[str], Counter[str], Counter[str], list[list[int]]]:
    """Bytes in forward and in both, all and those between nodes; and topk_ids."""
    with ExpertParallel(timeout=20, nodes=case.nodes, invariant=case.invariant) as parallel:
        moe = make(case, parallel)
        all_x, all_grad = inputs(case)
        begin = sum(case.tokens[:rank])
        mine = slice(begin, begin + case.tokens[rank])
        x = all_x.clone().requires_grad_()
        y = experts_forward(moe, x, case, mine)
        record = parallel.record
        forward = Counter(record.bytes), Counter(record.between_nodes)
        y.backward(all_grad[mine])
        return *forward, Counter(record.bytes), Counter(record.between_nodes), moe.gate(all_x).topk_ids.tolist()


@each_way
@pytest.mark.parametrize("nodes", [TWO, UNEQUAL], ids=["2x2", "unequal"])
def test_a_row_per_token_and_node(pool: Pool, nodes: Any, invariant: bool) -> None:
    """Counted from the routing, token by token."""
    case = Case(nodes=nodes, invariant=invariant, top_k=4)
    where = find_nodes(nodes, [""] * 4)
    node_of, row = where.node_of, case.hidden_size * 4
    width = max(map(len, where.members))
    owner = [held[0] for held in Placement.contiguous(6, 4).owners]
    source = [r for r, count in enumerate(case.tokens) for _ in range(count)]
    answers = pool.run(sent_bytes, case)
    ids = answers[0][-1]
    for rank, (forward, far, both, far_both, _) in enumerate(answers):
        here = node_of[rank]
        visits = [(s, n) for s, chosen in zip(source, ids, strict=True) for n in {node_of[owner[e]] for e in chosen}]
        pairs = [(s, owner[e]) for s, chosen in zip(source, ids, strict=True) for e in chosen]
        out = len([n for s, n in visits if s == rank and n != here])
        # what this rank relays, and returns to sources on other nodes
        relayed = [s for s, n in visits if n == here != node_of[s] and where.relay(s, where.members[n][0]) == rank]
        unsummed = [
            s for s, r in pairs if node_of[r] == here != node_of[s] and where.relay(s, r) == rank
        ]  # fmt: skip
        back = unsummed if invariant else relayed
        others = len([r for r in range(4) if node_of[r] != here])
        floor = {
            "header": 8 * LENGTH * others,
            "pairs": 8 * len([r for s, r in pairs if s == rank and node_of[r] != here]),
            "routes": 2 * width * out,
            "dispatch": row * out,
            "combine": row * len(back),
        }
        assert {kind: count for kind, count in floor.items() if count} == far
        backward = far_both - far
        assert backward["dispatch"] == floor["dispatch"]
        assert backward["combine"] == floor["combine"]
        assert backward["routes"] == 0
        assert both["dispatch within"] == 2 * forward["dispatch within"]


def copies_on_each_node(rank: int) -> None:
    """Ranks 0 and 1 have all experts, and so do 2 and 3."""
    placement = Placement(6, ((0, 2, 5), (1, 3, 4), (0, 1, 2), (3, 4, 5)))
    with ExpertParallel(timeout=20, nodes=TWO, placement=placement) as parallel:
        make(Case(), parallel)(torch.randn(9, 24))
        assert parallel.record.bytes["dispatch within"] > 0
        assert parallel.record.between_nodes.keys() == {"header"}


def test_copies_on_the_node_are_used(pool: Pool) -> None:
    pool.run(copies_on_each_node)


def test_one_level_sends_more(pool: Pool) -> None:
    one = sum(answer[1]["dispatch"] for answer in pool.run(sent_bytes, Case(nodes=UNEQUAL, top_k=4)))
    two = sum(answer[1]["dispatch"] for answer in pool.run(sent_bytes_of_one_level, Case(nodes=UNEQUAL, top_k=4)))
    assert one < 0.7 * two


def sent_bytes_of_one_level(rank: int, case: Case) -> tuple[Any, ...]:
    levels = Nodes.has_levels
    Nodes.has_levels = property(lambda self: False)  # type: ignore[assignment, misc]
    try:
        return sent_bytes(rank, case)
    finally:
        Nodes.has_levels = levels  # type: ignore[method-assign]


def looks(rank: int) -> list[int]:
    """How often a relay has looked after a forward without gradients, one with them, and a backward."""
    own, counts = TwoLevel.look, [0]

    def look(self: TwoLevel) -> None:
        counts[-1] += 1
        own(self)

    TwoLevel.look = look  # type: ignore[method-assign]
    try:
        with ExpertParallel(timeout=20, nodes=TWO, num_chunks=4) as parallel:
            moe, x = make(Case(), parallel), torch.randn(64, 24)
            with torch.no_grad():
                moe(x)
            counts.append(0)
            y = moe(x)
            counts.append(0)
            y.sum().backward()
    finally:
        TwoLevel.look = own  # type: ignore[method-assign]
    return counts


def test_relays_look_between_products(pool: Pool) -> None:
    """Once in each chunk."""
    assert pool.run(looks) == [[4, 4, 4]] * 4


# ---- in the order that NCCL requires ---------------------------------------------------------------------------------


def fixed_order(rank: int, case: Case) -> None:
    """The order of transfers on other devices, over backends as they are used there."""
    made, opened = TwoLevel.__init__, open_channel

    def patched(self: TwoLevel, *args: Any) -> None:
        made(self, *args)
        self._free_order = False

    def with_a_backend(*args: Any, **options: Any) -> Any:
        part: Any = opened(*args, **options)
        part.below = GroupTransport(part.below._group, is_own=True)
        return part

    TwoLevel.__init__, group.open_channel = patched, with_a_backend  # type: ignore[method-assign]
    try:
        compare(rank, case)
    finally:
        TwoLevel.__init__, group.open_channel = made, opened  # type: ignore[method-assign]


def test_fixed_order(pool: Pool) -> None:
    for num_chunks in (1, 4):
        case = Case(nodes=TWO, num_chunks=num_chunks, invariant=num_chunks == 4, transport="gloo")
        pool.run(fixed_order, case)


# ---- layouts, with all ranks in one process --------------------------------------------------------------------------


@given(
    node_of=st.lists(st.integers(0, 2), min_size=1, max_size=6),
    top_k=st.integers(1, 4),
    num_chunks=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_relays_deliver_each_row(node_of: list[int], top_k: int, num_chunks: int, seed: int) -> None:
    """What relays pass on is what each rank expects from the headers; and what they return, in both ways, is what the
    sources expect."""
    torch.manual_seed(seed)
    size, num_experts = len(node_of), 7
    nodes = find_nodes([[r for r in range(size) if node_of[r] == n] for n in sorted(set(node_of))], [""] * size)
    placement = Placement.contiguous(num_experts, size)
    counts = torch.randint(0, 12, (size,)).tolist()
    ids = [torch.randint(-1, num_experts, (count, top_k), dtype=torch.int32) for count in counts]
    tokens = list(torch.arange(sum(counts)).split(counts))
    choices, sendings = [], []
    for rank in range(size):
        via = [nodes.relay(rank, other) for other in range(size)]
        choice = layout.choose(ids[rank], *placement.routes(rank), size, via)
        choices.append(choice)
        sendings.append(layout.plan_sending(choice, ids[rank], num_chunks))

    relays = []
    for relay in range(size):
        members = nodes.same(relay)
        rows = [[s.rows[c][relay] for s in sendings] for c in range(num_chunks)]
        routes = [
            (choices[s].ranks[t][:, None] == torch.tensor(members)).sum(0)
            for s in range(size)
            for t in choices[s].sent[:, relay].nonzero().flatten().tolist()
        ]
        routes_tensor = torch.stack(routes) if routes else torch.zeros(0, len(members), dtype=torch.int64)
        relays.append(plan_relaying(rows, routes_tensor, members))
        names = []  # the relay's buffer
        for c in range(num_chunks):
            for s, sending in enumerate(sendings):
                before = sum(map(sum, sending.rows[:c])) + sum(sending.rows[c][:relay])
                names.append(tokens[s][sending.row_tokens[before : before + sending.rows[c][relay]]])
        relays[-1] = (relays[-1], torch.cat(names), rows)

    for rank in range(size):
        via_in = [nodes.relay(s, rank) for s in range(size)]
        arriving = layout.merge_pieces(
            [[choices[s].rows[piece][rank] for s in range(size)] for piece in range(layout.PIECES)], num_chunks
        )
        codes = torch.cat([sendings[s].pair_codes.split(sendings[s].pairs)[rank] for s in range(size)])
        pairs = [sendings[s].pairs[rank] for s in range(size)]
        got = layout.plan_receiving(arriving, pairs, codes, len(placement.experts_of_rank[rank]), via_in)
        delivered = []
        for c in range(num_chunks):
            for relay in range(size):
                plan, buffer, _ = relays[relay]
                assert plan.sent[c][rank] == got.rows[c][relay]
                assert plan.pairs_in[c][rank] == got.pairs_of_chunk[c][relay]
                begin = sum(map(sum, plan.sent[:c])) + sum(plan.sent[c][:rank])
                which = plan.sent_rows[begin : begin + plan.sent[c][rank]] + plan.starts[c]
                delivered.append(buffer[which])
        rows_here = torch.cat(delivered)
        want = [(e, int(tokens[s][t])) for e in placement.experts_of_rank[rank] for s in range(size)
                for t in range(counts[s]) for k in range(top_k) if ids[s][t, k] == e]  # fmt: skip
        expert = torch.repeat_interleave(got.all_offsets.diff()).tolist()
        first = placement.experts_of_rank[rank][0] if placement.experts_of_rank[rank] else 0
        assert [(first + e, int(rows_here[r])) for e, r in zip(expert, got.all_rows.tolist(), strict=True)] == want

    for source, sending in enumerate(sendings):
        for c in range(num_chunks):
            for relay in range(size):
                assert relays[relay][0].pairs_out[c][source] == sending.pairs_of_chunk[c][relay]


def test_routes_that_do_not_fit_are_refused() -> None:
    for routes in ([[0, 0]], [[-1, 2]], [[1, 0, 3]]):
        with raises(ValueError, "routes"):
            plan_relaying([[1, 0]], torch.tensor(routes, dtype=torch.int16), (0, 1))


# ---- nodes -----------------------------------------------------------------------------------------------------------


def test_nodes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert find_nodes("auto", ["a", "a", "b", "b"]).node_of == (0, 0, 1, 1)
    assert not find_nodes("auto", ["a"] * 4).has_levels
    assert not find_nodes("auto", ["a", "b", "c", "d"]).has_levels
    assert not find_nodes(None, ["a", "a", "b", "b"]).has_levels
    assert find_nodes(2, ["a"] * 5).members == ((0, 1), (2, 3), (4,))
    assert find_nodes([[1, 2], [0, 3]], ["a"] * 4).members == ((0, 3), (1, 2))
    assert [find_nodes(2, ["a"] * 4).relay(1, r) for r in range(4)] == [1, 1, 3, 3]
    nodes = find_nodes([[0, 2, 3], [1]], ["a"] * 4)
    assert [nodes.relay(3, r) for r in range(4)] == [3, 1, 3, 3]
    assert [nodes.relay(1, r) for r in range(4)] == [0, 1, 0, 0]
    assert nodes.rail(2) == (0, 1, 2, 3)
    assert find_nodes(2, ["a"] * 6).rail(3) == (1, 3, 5)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert find_nodes("auto", ["a", "b", "c", "d"]).node_of == (0, 0, 1, 1)  # containers
    for wrong in (0, "two", [[0, 1], [1, 2]], 1.5):
        with raises(ValueError, "nodes"):
            find_nodes(wrong, [""] * 4)  # type: ignore[arg-type]


def unequal_nodes(rank: int) -> str:
    with (
        ExpertParallel(subgroup(4), timeout=20, nodes=2 if rank == 2 else 1) as parallel,
        pytest.raises(switchgear.parallel.ExpertParallelError) as error,
    ):
        make(Case(), parallel)(torch.randn(5, 24))
    return str(error.value)


def test_nodes_must_agree(pool: Pool) -> None:
    answers = pool.run(unequal_nodes)
    assert len(set(answers)) == 1
    assert "rank 2 disagrees" in answers[0]

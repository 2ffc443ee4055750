# SPDX-License-Identifier: BSD-3-Clause
"""A layer on several processes computes what one process computes with the tokens of all."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from parallel_pool import Pool, subgroup
from peer_memory_on_cpu import MULTIPROCESSORS, HostDevice, make_parallel
from torch import Tensor
from torch.distributed import HashStore

import native_modules
import switchgear
from errors import raises
from switchgear import cuda, ops
from switchgear.parallel import ExpertParallel, ExpertParallelError, Placement
from switchgear.parallel.header import LENGTH
from switchgear.parallel.peer_memory import PeerMemoryTransport
from switchgear.parallel.transport import GroupTransport
from switchgear.testing import U32, C


@dataclass(frozen=True)
class Case:
    """A layer, and the number of tokens of each rank."""

    tokens: tuple[int, ...] = (13, 40, 1, 22)
    num_experts: int = 6
    top_k: int = 3
    ranks: tuple[tuple[int, ...], ...] | None = None  # experts of each rank
    num_chunks: int | None = None
    invariant: bool = False
    holes: bool = False
    layer: tuple[tuple[str, Any], ...] = ()
    dtype: torch.dtype = torch.float32
    hidden_size: int = 24
    intermediate_size: int = 20
    transport: str = "auto"
    nodes: Any = None  # see ExpertParallel

    @property
    def size(self) -> int:
        return len(self.tokens)


def make(case: Case, parallel: ExpertParallel | None) -> switchgear.MoE:
    torch.manual_seed(1)
    return switchgear.MoE(
        case.hidden_size,
        case.intermediate_size,
        case.num_experts,
        case.top_k,
        parallel=parallel,
        dtype=case.dtype,
        **dict(case.layer),
    )


def inputs(case: Case) -> tuple[Tensor, Tensor]:
    """x and grad_y of all ranks' tokens, small enough for float32 sums to cancel."""
    torch.manual_seed(2)
    x = torch.randn(2, sum(case.tokens), case.hidden_size, dtype=torch.float64)
    return x[0].to(case.dtype), x[1].to(case.dtype)


def experts_forward(moe: switchgear.MoE, all_x: Tensor, case: Case, mine: slice) -> Tensor:
    """Routes the tokens of all ranks, because the bits of torch's matmul depend on the number of rows."""
    routing = moe.gate(all_x)
    ids = routing.topk_ids[mine]
    if case.holes:  # a third of the choices, determined by the token only
        ids = ids.masked_fill((all_x[mine, : case.top_k] * 1000).long() % 3 == 0, -1)
    return moe.experts(all_x[mine], ids, routing.topk_weights[mine])


def compare(rank: int, case: Case) -> dict[str, int]:
    """Runs on each rank; returns the bytes sent, by kind."""
    if rank >= case.size:
        return {}
    group = subgroup(case.size)
    placement = None if case.ranks is None else Placement(case.num_experts, case.ranks)
    options = {"num_chunks": case.num_chunks, "invariant": case.invariant, "placement": placement}
    options["nodes"] = case.nodes
    by_group = case.transport == "group"  # the transport for other devices
    transport = "auto" if by_group else case.transport
    with make_parallel(group, transport, timeout=20, average_gradients=False, **options) as parallel:
        if by_group and case.size > 1:
            parallel._transports["cpu"] = GroupTransport(group)
        moe, whole = make(case, parallel), make(case, None)
        placement = parallel.placement(case.num_experts)
        all_x, all_grad = inputs(case)
        begin = sum(case.tokens[:rank])
        mine = slice(begin, begin + case.tokens[rank])
        x, want_x = all_x.clone().requires_grad_(), all_x.clone().requires_grad_()
        want = experts_forward(whole, want_x, case, slice(None))
        with torch.no_grad():
            y = experts_forward(moe, x, case, mine)
        check(y, want[mine], case, "y without gradients")
        parallel.record.clear()
        y = experts_forward(moe, x, case, mine)
        sent_forward = Counter(parallel.record.bytes)
        check(y, want[mine], case, "y")
        y.backward(all_grad[mine])
        want.backward(all_grad)
        check(x.grad[mine], want_x.grad[mine], case, "grad x")
        experts = list(placement.experts_of_rank[rank])
        for (name, parameter), wanted in zip(moe.experts.named_parameters(), whole.experts.parameters(), strict=True):
            assert parameter.grad is not None, name
            check(parameter.grad, wanted.grad[experts], case, f"grad {name}", sums=len(all_x))
        gate = moe.gate.weight.grad
        assert gate is not None
        dist.all_reduce(gate, group=group)
        check(gate, whole.gate.weight.grad, case, "grad gate", exact=False, sums=len(all_x))
        if parallel.levels == 1:
            check_bytes(rank, case, placement, whole.gate(all_x).topk_ids, sent_forward, parallel.record.bytes)
    return dict(sent_forward)


def check(got: Tensor, want: Tensor, case: Case, name: str, exact: bool | None = None, sums: int = 1) -> None:
    """Bit-equal if the order of sums is the same; otherwise within what reordering top_k (or all tokens') terms of
    magnitude 1 can change. Results are of order 1; bfloat16 also rounds each returned row."""
    exact = case.invariant and case.dtype is torch.float32 and case.ranks is None if exact is None else exact
    if exact:
        assert torch.equal(got, want), f"{name}: {(got - want).abs().max()}"
        return
    unit = U32 if case.dtype is torch.float32 else torch.finfo(case.dtype).eps
    size = want.abs().max().item() + 1 if want.numel() else 1.0
    bound = C * unit * size * (case.top_k + case.hidden_size + sums)
    distance = (got - want).abs().max().item() if want.numel() else 0.0
    assert distance <= bound, f"{name}: {distance} > {bound}"


def check_bytes(
    rank: int, case: Case, placement: Placement, topk_ids: Tensor, forward: Counter[str], both: Counter[str]
) -> None:
    """A rank sends the minimum plus the headers; the count uses only the routing, token by token."""
    if case.holes or (case.ranks is not None and placement.replicated):
        return  # choices differ from the router's, or a source has replicas
    owner = [placement.owners[e][0] for e in range(case.num_experts)]
    size = torch.finfo(case.dtype).bits // 8
    source = [r for r, count in enumerate(case.tokens) for _ in range(count)]
    rows = [(s, r) for s, ids in zip(source, topk_ids.tolist(), strict=True) for r in {owner[e] for e in ids}]
    pairs = [(s, owner[e]) for s, ids in zip(source, topk_ids.tolist(), strict=True) for e in ids]
    away = [s for s, r in rows if s == rank != r]
    hosted = [s for s, r in (pairs if case.invariant else rows) if s != rank == r]
    floor = {
        "header": 8 * LENGTH * (case.size - 1),
        "pairs": 8 * len([s for s, r in pairs if s == rank != r]),
        "dispatch": len(away) * case.hidden_size * size,
        "combine": len(hosted) * case.hidden_size * size,
    }
    assert {kind: forward[kind] for kind in floor} == floor
    assert set(forward) == set(floor)
    backward = both - forward
    assert backward["dispatch"] == floor["dispatch"]
    assert backward["combine"] == floor["combine"]
    assert backward["header"] == floor["header"]
    assert backward["weights"] == 4 * len([s for s, r in pairs if s != rank == r])


@pytest.mark.parametrize("capacity", [None, 20])
@pytest.mark.parametrize("num_tokens", [0, 1, 2, 20])
def test_float64_in_one_process(num_tokens: int, capacity: int | None) -> None:
    """Of any number of choices, also with a capacity: sums are in float64."""
    case = Case((num_tokens,), top_k=1 if num_tokens < 3 else 3, dtype=torch.float64)
    with ExpertParallel(capacity=capacity) as parallel:
        moe, whole = make(case, parallel), make(case, None)
        x, grad = inputs(case)
        results = []
        for layer in (moe, whole):
            leaf = x.clone().requires_grad_()
            y = layer(leaf)
            y.backward(grad)
            results.append((y.detach(), leaf.grad, *(parameter.grad for parameter in layer.parameters())))
    for got, want in zip(*results, strict=True):
        assert got.dtype is torch.float64
        check(got, want, case, "float64", sums=num_tokens)


SIZES = [Case((50,)), Case((20, 31)), Case(intermediate_size=150)]  # 150: several panels of any instruction set


@pytest.mark.parametrize("case", SIZES, ids=lambda case: f"ep{case.size}")
@pytest.mark.parametrize("invariant", [False, True], ids=["sum", "invariant"])
@pytest.mark.parametrize(
    ("num_chunks", "transport"),
    [
        (1, "gloo"),
        (4, "gloo"),
        (4, "shared_memory"),
        (None, "auto"),
        (2, "group"),
        (1, "peer_memory"),
        (8, "peer_memory"),
    ],
)
def test_sizes_and_chunks(pool: Pool, case: Case, invariant: bool, num_chunks: int | None, transport: str) -> None:
    pool.run(compare, replace(case, invariant=invariant, num_chunks=num_chunks, transport=transport))


SHARDS = {
    "uneven": ((0, 1, 2), (3,), (4,), (5,)),
    "scattered": ((1, 5), (0,), (2, 3), (4,)),
    "rank-without-experts": ((0, 1, 2), (), (3, 4, 5), ()),
    "all-on-one": ((), (), (0, 1, 2, 3, 4, 5), ()),
    "replicated": ((0, 1, 3), (1, 2), (1, 3, 4), (0, 5)),
}


@pytest.mark.parametrize("ranks", SHARDS.values(), ids=SHARDS.keys())
@pytest.mark.parametrize("invariant", [False, True], ids=["sum", "invariant"])
def test_shards(pool: Pool, ranks: tuple[tuple[int, ...], ...], invariant: bool) -> None:
    pool.run(compare, Case(ranks=ranks, invariant=invariant, num_chunks=2))


def test_fewer_experts_than_ranks(pool: Pool) -> None:
    pool.run(compare, Case(num_experts=3, top_k=2, invariant=True))
    pool.run(compare, Case(num_experts=1, top_k=1))


LAYERS = {
    "gpt-oss": {"bias": True, "interleaved": True, "transposed": True, "activation": "swiglu_oai", "limit": 7.0},
    "plain": {"gated": False, "activation": "relu2", "bias": True},
    "transposed": {"transposed": True},
}


@pytest.mark.parametrize("layer", LAYERS.values(), ids=LAYERS.keys())
def test_options(pool: Pool, layer: dict[str, Any]) -> None:
    pool.run(compare, Case(layer=tuple(layer.items()), num_chunks=2, holes=True))
    pool.run(compare, Case(layer=tuple(layer.items()), num_chunks=2, invariant=True))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision(pool: Pool, dtype: torch.dtype) -> None:
    pool.run(compare, Case(dtype=dtype, num_chunks=2))


def zero_tokens(rank: int, nodes: int | None = None) -> int:
    """All 15 non-empty sets of ranks without tokens, with and without overlap."""
    count = 0
    for num_absent in (1, 2, 3, 4):
        for absent in combinations(range(4), num_absent):
            tokens = tuple(0 if r in absent else 5 + 3 * r for r in range(4))
            for num_chunks in (1, 4):
                compare(rank, Case(tokens, num_chunks=num_chunks, invariant=True, nodes=nodes))
                count += 1
    return count


def test_ranks_without_tokens(pool: Pool) -> None:
    assert pool.run(zero_tokens, timeout=120) == [30] * 4


def shared_tokens(rank: int, num_tokens: int) -> tuple[int, int]:
    """Ranks 0 and 1 hold the same tokens, and so do 2 and 3. Returns rows sent without and with that knowledge."""
    sent = []
    torch.manual_seed(2)
    x, grad = torch.randn(2, 2 * num_tokens, 24)
    half = rank // 2
    mine = slice(half * num_tokens, (half + 1) * num_tokens)
    twins = [2 * half, 2 * half + 1]
    for tp_group in (None, twins):
        with ExpertParallel(timeout=20, tp_group=tp_group, invariant=True) as parallel:
            case = Case((1,) * 4)
            moe, whole = make(case, parallel), make(case, None)
            own, want_x = x.clone().requires_grad_(), x.clone().requires_grad_()
            y, want = experts_forward(moe, own, case, mine), experts_forward(whole, want_x, case, slice(None))
            assert torch.equal(y, want[mine])
            y.backward(grad[mine])
            want.backward(grad)
            assert torch.equal(own.grad[mine], want_x.grad[mine])
            experts = list(parallel.placement(case.num_experts).experts_of_rank[rank])
            for parameter, wanted in zip(moe.experts.parameters(), whole.experts.parameters(), strict=True):
                mean = wanted.grad[experts] / 2  # over two sets of tokens, however many ranks hold them
                if tp_group is None:  # every token counts twice: the same values, in sums with twice as many terms
                    torch.testing.assert_close(parameter.grad, mean, rtol=1e-5, atol=1e-6)
                else:
                    assert torch.equal(parameter.grad, mean)
            sent.append(parallel.record.bytes["dispatch"])
    return sent[0], sent[1]


def test_row39_tensor_parallel_ranks_send_each_token_once(pool: Pool) -> None:
    before, after = (sum(column) for column in zip(*pool.run(shared_tokens, 31), strict=True))
    assert after < 0.6 * before  # half of the tokens, plus those with a rank that needed no communication
    pool.run(shared_tokens, 1)


def unequal_tokens(rank: int) -> str:
    with ExpertParallel(timeout=20, tp_group=[rank // 2 * 2, rank // 2 * 2 + 1]) as parallel:
        moe = make(Case(), parallel)
        with pytest.raises(ExpertParallelError) as error:
            moe(torch.randn(6 if rank == 3 else 5, 24))
    return str(error.value)


def test_shared_tokens_must_be_as_many(pool: Pool) -> None:
    answers = pool.run(unequal_tokens)
    assert len(set(answers)) == 1
    assert "rank 3 disagrees" in answers[0]
    assert "num_tokens: " in answers[0]


# ---- peer memory -----------------------------------------------------------------------------------------------------


ODD = (
    Case((0, 5, 0, 9), hidden_size=23),
    Case((0, 0)),
    Case(dtype=torch.bfloat16, hidden_size=23),  # rows of 46 bytes
    Case(ranks=SHARDS["replicated"]),
)


def test_peer_memory_with_rows_of_any_size(pool: Pool) -> None:
    for case in ODD:
        pool.run(compare, replace(case, num_chunks=2, transport="peer_memory"))


def reserved_by_transfers(rank: int, num_chunks: int) -> tuple[set[int], set[int], int]:
    """The multiprocessors reserved at the products of chunks, at the weight gradients, and afterwards."""
    products, weight_gradients = set(), set()

    def watched(name: str, seen: set[int]) -> Any:
        function = getattr(ops, name)

        def call(*args: Any) -> Any:
            seen.add(cuda.num_reserved())
            return function(*args)

        return mock.patch.object(ops, name, call)

    with (
        make_parallel(None, "peer_memory", timeout=20, num_chunks=num_chunks) as parallel,
        watched("grouped_gemm", products),
        watched("grouped_gemm_wgrad", weight_gradients),
    ):
        x, ids = torch.randn(40, 24, requires_grad=True), torch.arange(120).view(40, 3) % 6
        make(Case(), parallel).experts(x, ids, torch.rand(40, 3)).sum().backward()
        return products, weight_gradients, cuda.num_reserved()


def test_experts_leave_multiprocessors_to_transfers_beside_them(pool: Pool) -> None:
    assert pool.run(reserved_by_transfers, 1) == [({0}, {MULTIPROCESSORS}, 0)] * 4
    assert pool.run(reserved_by_transfers, 4) == [({MULTIPROCESSORS}, {MULTIPROCESSORS}, 0)] * 4


def test_peer_memory_refuses_rows_that_are_not_contiguous() -> None:
    transport = PeerMemoryTransport(0, 1, HashStore(), HostDevice())
    rows, turned = torch.ones(3, 4), torch.ones(4, 3).t()
    with raises(ValueError, "output"):
        transport.all_to_all(turned, rows, [3], [3])
    with raises(ValueError, "input"):
        transport.all_to_all(rows, turned, [3], [3])
    transport.close()


@pytest.mark.skipif(native_modules.SIMT_PATH is None, reason="SWITCHGEAR_SIMT names no module with the CUDA kernels")
@pytest.mark.parametrize("case", [*SIZES[1:], *ODD], ids=lambda case: f"{case.tokens}-{case.hidden_size}")
def test_exchange_kernel_on_simt(pool: Pool, case: Case) -> None:
    """Several processes each run the kernel of their rank on the CPU."""
    for invariant in (False, True):
        pool.run(compare, replace(case, num_chunks=2, invariant=invariant, transport="peer_memory_simt"), timeout=300)

# SPDX-License-Identifier: BSD-3-Clause
"""Ranks with different arguments detect this before any row is sent, and raise the same error."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from parallel_pool import Pool

import switchgear
from switchgear.parallel import ExpertParallel, ExpertParallelError, Failure, Placement, header

DEFECTS = {
    "dtype": "dtype: ",
    "hidden_size": "hidden_size: ",
    "intermediate_size": "options: expected",
    "num_experts": "num_experts: ",
    "top_k": "top_k: ",
    "activation": "options: expected",
    "bias": "options: expected",
    "placement": "placement: expected",
    "no_grad": "gradients: ",
    "frozen": "gradients: ",
    "invariant": "invariant: ",
    "num_chunks": "num_chunks: ",
    "layer": "layer: ",
    "backward": "backward: ",
}


def defective(rank: int, culprit: int, defect: str, transport: str) -> tuple[Failure, str, dict[str, int]]:
    odd = rank == culprit
    placement = Placement(8, ((0,), (1,), (2,), (3, 4, 5, 6, 7))) if odd and defect == "placement" else None
    with ExpertParallel(
        timeout=20,
        transport=transport,
        invariant=odd and defect == "invariant",
        num_chunks=2 if odd and defect == "num_chunks" else None,
        placement=placement,
    ) as parallel:
        shape: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 12, "num_experts": 8, "top_k": 2}
        other = {"hidden_size": 24, "intermediate_size": 20, "num_experts": 9, "top_k": 3}
        if odd and defect in other:
            shape[defect] = other[defect]
        options: dict[str, Any] = {"bias": odd and defect == "bias"}
        if odd and defect == "dtype":
            options["dtype"] = torch.bfloat16
        if odd and defect == "activation":
            options["activation"] = "gelu"
        first = switchgear.MoE(**shape, **options, parallel=parallel)
        second = switchgear.MoE(**shape, **options, parallel=parallel)
        x = torch.randn(6, shape["hidden_size"], dtype=options.get("dtype"))
        y = None
        if defect == "backward":
            y = first(x)
            parallel.record.clear()
        if odd and defect == "frozen":
            first.experts.down_proj.requires_grad_(False)
        layer = second if odd and defect == "layer" else first
        with pytest.raises(ExpertParallelError) as error, torch.set_grad_enabled(not (odd and defect == "no_grad")):
            y.sum().backward() if odd and y is not None else layer(x)
        return error.value.failure, str(error.value), dict(parallel.record.bytes)


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.parametrize("defect", DEFECTS)
def test_all_ranks_raise_the_same(pool: Pool, defect: str, transport: str) -> None:
    """56 mismatches: 14 kinds, on each rank."""
    for culprit in range(4):
        answers = pool.run(defective, culprit, defect, transport)
        failure, message, _ = answers[0]
        assert failure.rank == culprit
        assert failure.kind == "disagrees"
        assert failure.phase == ("backward agree" if defect == "backward" else "agree")
        assert failure.reason.startswith(DEFECTS[defect])
        assert all(answer[:2] == (failure, message) for answer in answers)
        assert all(set(answer[2]) == {"header"} for answer in answers), "rows were sent"


def terms(**changes: int) -> header.Terms:
    return header.Terms(*range(len(header.Terms._fields)))._replace(**changes)


@pytest.mark.parametrize("name", header.Terms._fields)
def test_every_term_is_compared(name: str) -> None:
    for odd in range(3):
        lines = [terms(**({name: 77} if rank == odd else {})) for rank in range(3)]
        failure = header.disagreement(lines)
        assert failure is not None
        assert failure.rank == odd
        assert failure.reason.startswith(f"{name}: expected")


def test_two_halves_blame_the_one_without_the_lowest_rank() -> None:
    failure = header.disagreement([terms(), terms(top_k=3), terms(top_k=3), terms()])
    assert failure is not None
    assert failure.rank == 1
    assert header.disagreement([terms()] * 4) is None


def test_headers_survive_the_wire() -> None:
    sent = header.encode(terms(), 5, [1, 2], [[r, 10 * r] for r in range(8)])
    received, sizes = header.decode(sent)
    assert received == [terms()] * 2
    assert sizes[1] == header.Sizes(5, 2, [10 * r for r in range(8)])


@pytest.mark.parametrize(
    ("tokens", "pairs", "rows", "ok"),
    [(5, 10, 5, True), (0, 0, 0, True), (5, 5, 5, True), (5, 0, 0, True), (5, 6, 6, False), (5, 11, 5, False),
     (5, 4, 5, False), (5, 2**60, 2**60, False), (5, 5, -1, False), (-1, 0, 0, False), (5, -1, 0, False)],
)  # fmt: skip
def test_sizes_that_no_rank_can_have(tokens: int, pairs: int, rows: int, ok: bool) -> None:
    good, two = header.Sizes(5, 5, [5] + [0] * 7), terms(top_k=2)
    failure = header.impossible_sizes([two, two], [good, header.Sizes(tokens, pairs, [0] * 7 + [rows])])
    assert (failure is None) is ok
    assert failure is None or (failure.rank, failure.kind) == (1, "disagrees")


def announces_too_much(rank: int) -> tuple[Failure, dict[str, int]]:
    encode = header.encode
    if rank == 1:
        header.encode = lambda terms, tokens, pairs, rows, relayed: encode(
            terms, tokens, [2**50] * 4, [[2**50] * 4, *rows[1:]], relayed
        )
    try:
        with ExpertParallel(timeout=20) as parallel, pytest.raises(ExpertParallelError) as error:
            switchgear.MoE(16, 12, 8, 2, parallel=parallel)(torch.randn(6, 16))
        return error.value.failure, dict(parallel.record.bytes)
    finally:
        header.encode = encode


def test_no_memory_is_allocated_for_them(pool: Pool) -> None:
    answers = pool.run(announces_too_much)
    assert len({failure for failure, _ in answers}) == 1
    failure = answers[0][0]
    assert (failure.rank, failure.kind, failure.phase) == (1, "disagrees", "agree")
    assert failure.reason.startswith("sizes: "[:-2])
    assert set(answers[2][1]) == {"header"}

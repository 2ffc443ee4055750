# SPDX-License-Identifier: BSD-3-Clause
"""Tests of one level again with two: wrappers, tensor parallelism, other kinds of experts, faults."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import test_elastic
import test_exchange
import test_faults
import test_layers
import test_wrappers
from parallel_pool import Pool
from peer_memory_on_cpu import make_parallel

from switchgear.parallel import ExpertParallel

CROSSED = ((0, 2), (1, 3))


def with_nodes(rank: int, module: Any, function: Callable[..., Any], nodes: Any, *args: Any) -> Any:
    """Runs a function of another test with these nodes."""
    own = module.ExpertParallel
    module.ExpertParallel = partial(ExpertParallel, nodes=nodes)
    try:
        return function(rank, *args)
    finally:
        module.ExpertParallel = own


def wrappers(rank: int, wrapper: str) -> int:
    count: int = with_nodes(rank, test_wrappers, test_wrappers.all_subsets, 2, wrapper)
    return count


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp"])
def test_gradients_with_and_without_tokens(pool: Pool, wrapper: str) -> None:
    """All 16 sets of ranks without tokens, and two layers."""
    assert pool.run(wrappers, wrapper, timeout=180) == [16] * 4


def checkpointed(rank: int) -> None:
    with_nodes(rank, test_wrappers, test_wrappers.checkpointed, 2)


def test_checkpointing(pool: Pool) -> None:
    pool.run(checkpointed)


def shared(rank: int, nodes: Any) -> Any:
    return with_nodes(rank, test_exchange, test_exchange.shared_tokens, nodes, 31)


@pytest.mark.parametrize("nodes", [2, CROSSED], ids=["within nodes", "across nodes"])
def test_tensor_parallel_ranks(pool: Pool, nodes: Any) -> None:
    pool.run(shared, nodes)


def by_a_module(rank: int, nodes: Any, *args: Any) -> None:
    with_nodes(rank, test_layers, test_layers.run_by_a_module, nodes, *args)


@pytest.mark.parametrize("how", ["int8", "adapters", "int4 and adapters"])
@pytest.mark.parametrize("invariant", [True, False])
def test_experts_that_a_module_runs(pool: Pool, how: str, invariant: bool) -> None:
    pool.run(by_a_module, 2, how, {}, invariant, None)
    pool.run(by_a_module, CROSSED, how, {}, invariant, test_layers.COPIES)


def widths(rank: int) -> Any:
    return with_nodes(rank, test_layers, test_layers.widths, CROSSED, {}, test_layers.PLACED)


def test_experts_of_several_widths(pool: Pool) -> None:
    pool.run(widths)


# ---- failures --------------------------------------------------------------------------------------------------------


def fault(rank: int, *args: Any) -> Any:
    test_faults.make_parallel = partial(make_parallel, nodes=2)  # type: ignore[assignment]
    try:
        return test_faults.trial(rank, *args)
    finally:
        test_faults.make_parallel = make_parallel


@pytest.mark.parametrize("transport", ["gloo", "shared_memory"])
@pytest.mark.parametrize(("culprit", "fault_kind", "phase", "num_chunks"), test_faults.SOME)
@pytest.mark.some(5)
def test_a_rank_is_lost(
    monkeypatch: pytest.MonkeyPatch, culprit: int, fault_kind: str, phase: str, num_chunks: int, transport: str
) -> None:
    """The same error on every rank, in time, and the others go on, on nodes of unequal size."""
    monkeypatch.setattr(test_faults, "trial", fault)
    test_faults.run_trial(culprit, fault_kind, phase, num_chunks, transport)


def goes_on(rank: int, culprit: int) -> Any:
    options = {"placement": test_elastic.TWICE, "num_replicas": test_elastic.EXPERTS}
    return with_nodes(rank, test_elastic, test_elastic.loses, 2, culprit, options)


def test_training_goes_on_without_a_rank() -> None:
    """The others keep their nodes: one of two ranks, and one of one. All copies of an expert are equal."""
    pool = Pool(4)
    try:
        pool.start(goes_on, 1)
        seen = pool.results([0, 2, 3])
    finally:
        pool.close()
    test_elastic.complete([digest for digest, *_ in seen])
    assert [change.ranks for _, (change,), *_ in seen] == [3, 3, 3]

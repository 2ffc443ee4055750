# SPDX-License-Identifier: BSD-3-Clause
"""The tests of this folder detect the mistakes of parallel_mistakes.py, which are planted in all processes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import test_elastic
import test_membership
import test_static
import test_two_level
import test_wire
import torch
from parallel_mistakes import MISTAKES, Mistake, planted
from parallel_pool import Pool

from switchgear import parallel


class Mistaken:
    """A Pool whose ranks run functions with a mistake."""

    def __init__(self, pool: Pool, mistake: Mistake) -> None:
        self._pool, self._mistake = pool, mistake

    def start(self, function: Callable[..., Any], *args: Any) -> None:
        self._pool.start(with_mistake, self._mistake, function, *args)

    def results(self, ranks: Sequence[int] | None = None, timeout: float = 60.0) -> list[Any]:
        return self._pool.results(ranks, timeout)

    def run(self, function: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        self.start(function, *args)
        return self.results(timeout=timeout)


def with_mistake(rank: int, mistake: Mistake, function: Callable[..., Any], *args: Any) -> Any:
    with planted(mistake):
        return function(rank, *args)


# ---- what detects them -----------------------------------------------------------------------------------------------


def relays_deliver(_: Any) -> None:
    check = test_two_level.test_relays_deliver_each_row.hypothesis.inner_test  # type: ignore[attr-defined]
    check(node_of=[0, 1, 0, 1, 1], top_k=3, num_chunks=4, seed=1)


def nodes(_: Any) -> None:
    with pytest.MonkeyPatch.context() as patch:
        test_two_level.test_nodes(patch)


def two_levels(pool: Any) -> None:
    for invariant in (False, True):
        test_two_level.test_two_levels(pool, test_two_level.UNEQUAL, invariant, 4, "shared_memory")
    test_two_level.test_options(pool, {"transposed": True})


def copies_on_the_node(pool: Any) -> None:
    test_two_level.test_copies_on_the_node_are_used(pool)


def relays_look(pool: Any) -> None:
    test_two_level.test_relays_look_between_products(pool)


def rows_in_8_bits(_: Any) -> None:
    test_wire.test_odd_rows()
    check = test_wire.test_the_error_is_as_stated.hypothesis.inner_test  # type: ignore[attr-defined]
    check([[1e-6, 1.1e-6, 0.9e-6], [448.0, 9.0, 1.0]], torch.float32)


def buckets(_: Any) -> None:
    test_static.test_buckets()


def fixed_sizes(pool: Any) -> None:
    test_static.test_sizes(pool, 4, True)


def a_change_by_all_or_none(_: Any) -> None:
    for first in ([1, 2], []):
        test_membership.test_a_change_is_applied_by_all_or_none(first)
    test_membership.test_a_member_whose_change_fails_has_no_state()


def members_without_state(_: Any) -> None:
    test_membership.test_members_without_state_propose_nothing()


def clipping(pool: Any) -> None:
    test_elastic.test_the_norm_counts_every_expert_once(pool)


def moving(pool: Any) -> None:
    test_elastic.test_moving_experts_changes_no_bit(pool)


def joining(pool: Any) -> None:
    test_elastic.test_a_process_joins(pool)


def commits(pool: Any) -> None:
    test_elastic.test_no_step_is_half_applied(pool, "rank 0")


AT_ONCE = (relays_deliver, nodes, rows_in_8_bits, buckets, a_change_by_all_or_none)
SLOW = (
    two_levels,
    copies_on_the_node,
    relays_look,
    fixed_sizes,
    members_without_state,
    clipping,
    moving,
    joining,
    commits,
)


def mistakes(detectors: Sequence[Callable[[Any], None]]) -> pytest.MarkDecorator:
    found = [pytest.param(detect, m, id=m.name) for detect in detectors for m in MISTAKES[detect.__name__]]
    return pytest.mark.parametrize(("detect", "mistake"), found)


def test_the_sources_have_their_texts() -> None:
    assert {detect.__name__ for detect in (*AT_ONCE, *SLOW)} == MISTAKES.keys()
    for mistake in chain(*MISTAKES.values()):
        source = (Path(parallel.__file__).parent / mistake.file).read_text()
        assert source.count(mistake.before) == 1, (mistake.file, mistake.name)


@mistakes(AT_ONCE)
def test_a_mistake_is_detected(detect: Callable[[Any], None], mistake: Mistake) -> None:
    with planted(mistake), pytest.raises((AssertionError, IndexError, RuntimeError, ValueError)):
        detect(None)


@pytest.fixture
def own_pool() -> Iterator[Pool]:
    """Ranks that a mistake, or a test, may leave in any state."""
    pool = Pool(4)
    yield pool
    pool.close()


@pytest.mark.slow  # seconds each
@mistakes(SLOW)
def test_a_mistake_is_detected_slowly(own_pool: Pool, detect: Callable[[Any], None], mistake: Mistake) -> None:
    with planted(mistake), pytest.raises(AssertionError) as error:
        detect(Mistaken(own_pool, mistake))
    assert "did not finish" not in str(error.value)


@pytest.mark.slow
@pytest.mark.parametrize("detect", SLOW, ids=lambda detect: detect.__name__)
def test_nothing_is_detected_without_a_mistake(own_pool: Pool, detect: Callable[[Any], None]) -> None:
    detect(own_pool)

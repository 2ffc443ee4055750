# SPDX-License-Identifier: BSD-3-Clause
"""plan on arbitrary ids. If every id is -1 or an expert, the plan is the stable sort by expert; otherwise it raises
ValueError and writes nothing. (tests/cpp/test_plan.cpp does this under sanitizers.)"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from problems import counts
from torch import Tensor

from switchgear import _C, ops, reference

POISON = -0x5A5A5A5B
INT_MIN, INT_MAX = -(2**31), 2**31 - 1


class Batch(NamedTuple):
    """Plans with concatenated ids: plan p has shape[p] = (T,K), E experts, and is bad if any of its ids is."""

    ids: np.ndarray  # [Σ T·K] int32
    of_id: np.ndarray  # [Σ T·K] the plan of each id
    tokens: np.ndarray  # [P]
    choices: np.ndarray  # [P]
    experts: np.ndarray  # [P]
    bad: np.ndarray  # [P]


def draw(rng: np.random.Generator, plans: int) -> Batch:
    """Sizes from zero; ids uniform, few, none, or one expert. A third of the plans get ids out of range: next to the
    range, at the limits of int32, and leftover float32 bits."""
    tokens, choices = rng.integers(0, 14, plans), rng.integers(1, 7, plans)
    experts = np.where(rng.random(plans) < 0.05, rng.integers(1, 3000, plans), rng.integers(1, 40, plans))
    of_id = np.repeat(np.arange(plans), tokens * choices)
    size = len(of_id)
    limit = np.minimum(experts, np.where(rng.random(plans) < 0.2, 2, experts))[of_id]
    ids = np.floor(rng.random(size) * (limit + 1)).astype(np.int64) - 1
    lonely = rng.random(plans) < 0.1
    ids = np.where(lonely[of_id], (rng.integers(-1, 3000, plans) % (experts + 1) - 1)[of_id], ids)
    last = experts[of_id]
    wild = rng.random(size) < (0.1 * (rng.random(plans) < 0.4))[of_id]
    stale = rng.standard_normal(size).astype(np.float32).view(np.int32)
    values = np.stack((last, last + 1, np.full(size, -2), np.full(size, INT_MIN), np.full(size, INT_MAX), stale))
    ids = np.where(wild, values[rng.integers(0, len(values), size), np.arange(size)], ids)
    bad = np.zeros(plans, bool)
    np.logical_or.at(bad, of_id, (ids < -1) | (ids >= last))
    return Batch(ids.astype(np.int32), of_id, tokens, choices, experts, bad)


def run(batch: Batch) -> tuple[np.ndarray, Tensor, Tensor, Tensor]:
    """Which plans raised, and the poisoned buffers that _C.plan wrote to."""
    sizes = (batch.tokens * batch.choices).tolist()
    expert_offsets = torch.full((int((batch.experts + 1).sum()),), POISON, dtype=torch.int32)
    token_indices, slot_indices = torch.full((2, len(batch.ids)), POISON, dtype=torch.int32)
    parts = zip(
        torch.from_numpy(batch.ids).split(sizes),
        expert_offsets.split((batch.experts + 1).tolist()),
        token_indices.split(sizes),
        slot_indices.split(sizes),
        batch.tokens.tolist(),
        batch.choices.tolist(),
        strict=True,
    )
    raised = np.zeros(len(sizes), bool)
    for p, (ids, offsets, tokens, slots, num_tokens, top_k) in enumerate(parts):
        shape = (num_tokens, top_k)
        try:
            _C.plan((ids.view(shape),), (), (offsets, tokens, slots.view(shape)), 1)
        except ValueError as error:
            assert str(error).startswith("topk_ids: expected values in [-1, ")  # noqa: PT017
            raised[p] = True
    return raised, expert_offsets, token_indices, slot_indices


def check(batch: Batch, raised: np.ndarray, *outputs: Tensor) -> None:
    """Checks all plans at once: one stable sort of the ids by (plan, expert), empty ones last."""
    assert np.array_equal(raised, batch.bad)
    offsets, tokens, slots = (t.numpy() for t in outputs)
    bad_id, bad_offset = batch.bad[batch.of_id], np.repeat(batch.bad, batch.experts + 1)
    assert (tokens[bad_id] == POISON).all(), "a refused plan was written"
    assert (slots[bad_id] == POISON).all(), "a refused plan was written"
    assert (offsets[bad_offset] == POISON).all(), "a refused plan was written"

    first = np.cumsum(batch.tokens * batch.choices) - batch.tokens * batch.choices  # of each plan
    position = np.arange(len(batch.ids)) - first[batch.of_id]  # t·K + k
    token = position // batch.choices[batch.of_id]
    empty = batch.ids < 0
    order = np.lexsort((np.where(empty, INT_MAX, batch.ids), batch.of_id))  # lexsort is stable
    good = ~bad_id
    wanted_tokens = np.where(empty[order], -1, token[order])
    assert np.array_equal(tokens[good], wanted_tokens[good[order]])
    wanted_slots = np.empty_like(position)
    wanted_slots[order] = position  # the sort keeps plans together, so positions are slots
    assert np.array_equal(slots[good], np.where(empty, -1, wanted_slots)[good])

    per_expert = np.zeros(int((batch.experts + 1).sum()), np.int64)
    first_offset = np.cumsum(batch.experts + 1) - (batch.experts + 1)
    valid = ~empty & good
    np.add.at(per_expert, first_offset[batch.of_id[valid]] + batch.ids[valid] + 1, 1)
    total = np.cumsum(per_expert)
    before = np.repeat(total[first_offset], batch.experts + 1)
    assert np.array_equal(offsets[~bad_offset], (total - before)[~bad_offset])

    # The invariants directly: a slot's token points to the slot, and each slot is used once.
    at = first[batch.of_id[valid]] + slots[valid]
    assert np.array_equal(tokens[at], token[valid])
    assert len(np.unique(at)) == valid.sum()


@counts(ci=20_000, full=1_000_000)
def test_ids_from_anywhere(count: int) -> None:
    for seed in range(count // 1000):
        batch = draw(np.random.default_rng([9, seed]), 1000)
        check(batch, *run(batch))


def test_reference_agrees(backend: str) -> None:
    batch = draw(np.random.default_rng(9), 300)
    ends = np.cumsum(batch.tokens * batch.choices)
    for p, end in enumerate(ends.tolist()):
        shape = (int(batch.tokens[p]), int(batch.choices[p]))
        ids = torch.from_numpy(batch.ids[end - shape[0] * shape[1] : end]).view(shape)
        try:
            plan = ops.plan(ids, int(batch.experts[p]))
        except ValueError as error:
            assert batch.bad[p] and str(error).startswith("topk_ids: expected")  # noqa: PT017, PT018
            continue
        assert not batch.bad[p]
        wanted = reference.plan(ids, int(batch.experts[p]))
        assert all(torch.equal(a, b) for a, b in zip(plan, wanted, strict=True))


def test_chunks_of_threads_make_no_difference() -> None:
    """Plans long enough for one chunk per thread, with more and with fewer experts than tokens."""
    for experts in (3, 200, 9000):
        ids = torch.randint(-1, experts, (12_000, 4), dtype=torch.int32)
        wanted = reference.plan(ids, experts)
        for threads in (1, 2, 3, 5, 8):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(ops.plan(ids, experts), wanted, strict=True))

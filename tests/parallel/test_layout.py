# SPDX-License-Identifier: BSD-3-Clause
"""The index computations of an exchange, with all ranks in one process."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from errors import raises
from switchgear.parallel import Placement, layout


def cut(values: Tensor, counts: list[int]) -> list[Tensor]:
    return list(values.split(counts))


@given(
    num_ranks=st.integers(1, 5),
    num_experts=st.integers(1, 7),
    top_k=st.integers(1, 4),
    num_chunks=st.sampled_from([1, 2, 4, 8]),
    seed=st.integers(0, 1000),
)
def test_every_pair_arrives_once(num_ranks: int, num_experts: int, top_k: int, num_chunks: int, seed: int) -> None:
    """Each rank's slots are the pairs of all ranks for its experts, in order; and every row is a token with a pair."""
    torch.manual_seed(seed)
    placement = Placement.contiguous(num_experts, num_ranks)
    counts = torch.randint(0, 12, (num_ranks,)).tolist()
    ids = [torch.randint(-1, num_experts, (count, top_k), dtype=torch.int32) for count in counts]
    tokens = list(torch.arange(sum(counts)).split(counts))  # a unique number for each token
    sent = []
    for rank in range(num_ranks):
        choice = layout.choose(ids[rank], *placement.routes(rank), num_ranks)
        sent.append(layout.plan_sending(choice, ids[rank], num_chunks))
    for rank, experts in enumerate(placement.experts_of_rank):
        arriving = [[sending.rows[c][rank] for sending in sent] for c in range(num_chunks)]
        # rows as delivered by the all-to-all of each chunk
        names = [torch.empty(0, dtype=torch.int64)]
        for c in range(num_chunks):
            for source, sending in enumerate(sent):
                before = sum(map(sum, sending.rows[:c])) + sum(sending.rows[c][:rank])
                chosen = sending.row_tokens[before : before + sending.rows[c][rank]]
                names.append(tokens[source][chosen])
        buffer = torch.cat(names)
        codes = torch.cat([cut(sending.pair_codes, sending.pairs)[rank] for sending in sent])
        pairs = [sending.pairs[rank] for sending in sent]
        got = layout.plan_receiving(arriving, pairs, codes, len(experts))
        want = [(e, int(tokens[source][t])) for e in experts for source in range(num_ranks)
                for t in range(counts[source]) for k in range(top_k) if ids[source][t, k] == e]  # fmt: skip
        expert = torch.repeat_interleave(got.all_offsets.diff())
        assert [(experts[e], int(buffer[row])) for e, row in zip(expert, got.all_rows.long(), strict=True)] == want
        assert len(buffer) == len({name for _, name in want})
        for c in range(num_chunks):
            first, last = got.slot_starts[c], got.slot_starts[c + 1]
            inner = torch.repeat_interleave(got.expert_offsets[c].diff())
            rows = got.slot_rows[first:last].long() + got.row_starts[c]
            assert torch.equal(expert[got.all_slots[first:last]], inner)
            assert torch.equal(got.all_rows.long()[got.all_slots[first:last]], rows)
            assert torch.equal(codes[got.slot_pairs[first:last]] % (1 << 30), inner.int())
            table = got.row_table[got.row_starts[c] : got.row_starts[c + 1]]
            for row, slots in enumerate(table.tolist()):
                used = [slot for slot in slots if slot >= 0]
                assert used
                assert all(int(got.slot_rows[first + slot]) == row for slot in used)
                assert [int(inner[slot]) for slot in used] == sorted(int(inner[slot]) for slot in used)
        assert sorted((got.row_table >= 0).sum(1).tolist(), reverse=True)[:1] in ([], [got.row_table.shape[1]])
        assert int((got.row_table >= 0).sum()) == len(want)


def test_results_return_to_their_choices() -> None:
    torch.manual_seed(0)
    ids = torch.tensor([[3, 0, -1], [2, 3, 1], [-1, -1, -1], [0, 0, 3]], dtype=torch.int32)
    placement = Placement(4, ((0, 3), (1, 2)))
    sending = layout.plan_sending(layout.choose(ids, *placement.routes(0), 2), ids, 2)
    # chunks of tokens 0, 1 and 2, 3; rank 0 has experts 0 and 3
    assert sending.rows == [[2, 1], [1, 0]]
    assert sending.row_tokens.tolist() == [0, 1, 1, 3]
    assert sending.row_table.tolist() == [[0, -1], [1, 2], [-1, -1], [3, -1]]
    assert sending.pairs == [6, 2]
    assert sending.pairs_of_chunk == [[3, 2], [3, 0]]
    assert sending.pair_choices.tolist() == [1, 0, 4, 9, 10, 11, 5, 3]  # token · K + k, in the order of experts
    assert sending.pair_table.tolist() == [[-1, 0, 1], [3, 4, 2], [-1, -1, -1], [5, 6, 7]]


@pytest.mark.parametrize("codes", [[0], [1 << 30, (1 << 30) + 1], [(1 << 30) + 5]])
def test_codes_that_do_not_fit_are_refused(codes: list[int]) -> None:
    with raises(ValueError, "codes"):
        layout.plan_receiving([[1]], [len(codes)], torch.tensor(codes, dtype=torch.int32), 2)

# SPDX-License-Identifier: BSD-3-Clause
"""Dropless dispatch beside the static capacity of GShard: the same output, and cost by T·K instead of E·C."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flops import count_flops
from switchgear import MoE
from switchgear.parallel import Placement
from switchgear.parallel.cost import count, draw_routing
from switchgear.routing import Capacity

H, I, E, K = 16, 8, 8, 2  # noqa: E741


def static(moe: MoE, x: Tensor, capacity: int) -> tuple[Tensor, int, int]:
    """GShard: one-hot dispatch into [E,C,H], all E·C rows multiplied, one-hot combine. Output, rows, flops."""
    routing = moe.gate(x)
    dispatch = torch.zeros(len(x), E, capacity, dtype=x.dtype)
    combine = torch.zeros_like(dispatch)
    filled = [0] * E
    for choice in range(K):
        for token in range(len(x)):
            e = int(routing.topk_ids[token, choice])
            if filled[e] < capacity:
                dispatch[token, e, filled[e]] = 1
                combine[token, e, filled[e]] = routing.topk_weights[token, choice]
                filled[e] += 1
    buffers = torch.einsum("tec,th->ech", dispatch, x)
    gate, up = torch.einsum("ech,enh->ecn", buffers, moe.experts.gate_up_proj).chunk(2, -1)
    outputs = torch.einsum("eci,ehi->ech", torch.nn.functional.silu(gate) * up, moe.experts.down_proj)
    return torch.einsum("tec,ech->th", combine, outputs), E * capacity, 2 * E * capacity * 3 * H * I


def layer() -> MoE:
    torch.manual_seed(0)
    return MoE(H, I, E, K, dtype=torch.float64)


def test_row38_dropless_is_static_capacity_of_all_tokens() -> None:
    moe = layer()
    x = torch.randn(24, H, dtype=torch.float64)
    wanted, _, _ = static(moe, x, 24)
    torch.testing.assert_close(moe(x), wanted)
    # So is our own capacity of T tokens, ⌈factor·K·T/E⌉ = T; a small one drops.
    moe.gate.capacity = Capacity(E / K)
    torch.testing.assert_close(moe(x), wanted)
    moe.gate.capacity = Capacity(0.5)
    assert not torch.allclose(moe(x), wanted)


@pytest.mark.parametrize("num_tokens", [8, 64])
def test_row38_flops_grow_with_the_choices(num_tokens: int) -> None:
    moe = layer()
    x = torch.randn(num_tokens, H, dtype=torch.float64)
    routing = moe.gate(x)
    found = count_flops(lambda: moe.experts(x, routing.topk_ids, routing.topk_weights))
    assert found == 2 * num_tokens * K * 3 * H * I
    _, rows, padded = static(moe, x, num_tokens)
    assert padded == found * E // K
    assert rows == E * num_tokens


def test_row38_bytes_grow_with_the_choices() -> None:
    """The exchange sends each choice at most once; static capacity sends E·C rows whatever the routing."""
    placement = Placement.contiguous(E, 4)
    sent = {}
    for num_tokens, top_k in ((64, 1), (128, 1), (256, 1), (128, 2), (128, 4)):
        ids = [draw_routing(num_tokens, E, top_k, seed=rank) for rank in range(4)]
        traffic = count(ids, placement)
        assert int(traffic.pairs.sum()) == 4 * num_tokens * top_k
        assert bool((traffic.rows <= traffic.pairs).all())
        sent[num_tokens, top_k] = int(traffic.pairs.sum())
        assert 4 * E * num_tokens >= E // top_k * sent[num_tokens, top_k]  # static, C = T
    assert sent[128, 1] == 2 * sent[64, 1] == sent[256, 1] // 2 == sent[128, 2] // 2 == sent[128, 4] // 4

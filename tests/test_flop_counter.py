# SPDX-License-Identifier: BSD-3-Clause
"""FlopCounterMode counts switchgear's ops: 2 operations per multiply-add of each choice."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import switchgear
from switchgear import adapters, finetune

T, K, E, H, I = 10, 2, 8, 64, 64  # noqa: E741 (whole panels of every instruction set)
GATE, FIRST, SECOND = 2 * T * E * H, 2 * T * K * 2 * I * H, 2 * T * K * H * I


def counted(call: Callable[[], Any]) -> int:
    with FlopCounterMode(display=False) as counter:
        call()
    return int(counter.get_total_flops())


def layer() -> switchgear.MoE:
    return switchgear.MoE(H, I, E, K)


@pytest.mark.parametrize("backend", ["native", "reference"])
def test_a_layer_forward_and_backward(backend: str) -> None:
    moe, x = layer(), torch.randn(T, H)
    with switchgear.use_backend(backend):
        assert counted(lambda: moe(x)) == GATE + FIRST + SECOND
        assert counted(lambda: moe(x).sum().backward()) == 2 * GATE + 3 * (FIRST + SECOND) - FIRST
        moe.zero_grad()
        x.requires_grad_()
        assert counted(lambda: moe(x).sum().backward()) == 3 * (GATE + FIRST + SECOND)


def test_frozen_experts_take_no_products_for_their_gradients() -> None:
    moe, x = layer(), torch.randn(T, H, requires_grad=True)
    moe.experts.requires_grad_(False)
    assert counted(lambda: moe(x).sum().backward()) == 3 * GATE + 2 * (FIRST + SECOND)


def test_some_experts_train() -> None:
    moe, x = layer(), torch.randn(T, H, requires_grad=True)
    finetune.freeze_except(moe, {"": [1, 4]})
    of_weights = (FIRST + SECOND) * 2 // E  # as if all experts had as many tokens
    assert counted(lambda: moe(x).sum().backward()) == 2 * (GATE + FIRST + SECOND) + of_weights


@pytest.mark.parametrize("weights", ["plain", "panels", "int8", "int4", "groups"])
def test_stored_weights(weights: str) -> None:
    moe = layer().eval().requires_grad_(False)
    switchgear.store(moe, weights)
    assert counted(lambda: moe(torch.randn(T, H))) == GATE + FIRST + SECOND


def test_adapters() -> None:
    moe = layer()
    adapters.add_lora(moe, rank=4)
    moe.gate.requires_grad_(False)
    added = 2 * T * K * 4 * ((H + 2 * I) + (I + H))
    x = torch.randn(T, H, requires_grad=True)
    assert counted(lambda: moe(x)) == GATE + FIRST + SECOND + added
    assert counted(lambda: moe(x).sum().backward()) == 2 * GATE + 2 * (FIRST + SECOND) + 3 * added


def test_grouped_gemm() -> None:
    x, weight = torch.randn(12, H, requires_grad=True), torch.randn(3, 40, H, requires_grad=True)
    expert_offsets = torch.tensor([0, 5, 5, 12], dtype=torch.int32)
    product = 2 * 12 * 40 * H
    assert counted(lambda: switchgear.grouped_gemm(x, weight, expert_offsets)) == product
    assert counted(lambda: switchgear.grouped_gemm(x, weight, expert_offsets).sum().backward()) == 3 * product

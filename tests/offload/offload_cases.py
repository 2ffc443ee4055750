# SPDX-License-Identifier: BSD-3-Clause
"""Models, steps and checks that tests of the cache share."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from switchgear import MoE
from switchgear.offload import Offloaded


def make_model(num_layers: int = 2, dtype: torch.dtype = torch.bfloat16, size: int = 32, **options: Any) -> nn.Module:
    torch.manual_seed(0)
    sizes = {"num_experts": 6, "top_k": 2, **options}
    layers = [MoE(size, size, **sizes) for _ in range(num_layers)]
    return nn.Sequential(*layers).to(dtype).eval()


def steps_of(dtype: torch.dtype = torch.bfloat16, count: int = 16, size: int = 32) -> list[Tensor]:
    """A prompt now and then, else one token."""
    torch.manual_seed(1)
    return [torch.randn(1, 5 if i % 6 == 0 else 1, size).to(dtype) for i in range(count)]


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype is b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@torch.no_grad()
def outputs_of(model: nn.Module, steps: list[Tensor]) -> list[Tensor]:
    return [model(x) for x in steps]


def check(cache: Offloaded) -> None:
    """Rows: each has one owner or is free, and residents are where residency.py says."""
    inner = cache._cache
    assert not inner.is_disturbed
    for pool in {id(layer.pool): layer.pool for layer in inner.layers}.values():
        own = [key for key in inner.rows if inner.layer_of(key).pool is pool]
        guessed = [row for key, (row, _) in inner.guesses.items() if inner.layer_of(key).pool is pool]
        rows = [inner.rows[key] for key in own] + guessed + pool.free + list(pool.draining)
        assert sorted(rows) == list(range(len(pool.arena)))
        assert set(own) == {key for layer in inner.layers if layer.pool is pool for key in layer.residency.last}
    for key, row in inner.rows.items():
        layer = inner.layer_of(key)
        assert int(layer.slots[key - layer.first]) == row

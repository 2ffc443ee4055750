# SPDX-License-Identifier: BSD-3-Clause
"""AMD's zentorch (ZenDNN). It packs bfloat16 weights in place at the first call, so it gets copies.

It caches packed weights by address, so a process must not give it other weights at the same address.
"""

from __future__ import annotations

import torch
from torch import Tensor

from switchgear.cli.common import optional

from ..case import Case, Inputs, Layer
from .quantised import int8_rows
from .registry import Skip, competitor


def _layer(case: Case, weights: list[Tensor], scales: list[Tensor] | list[None]) -> Layer:
    module, reason = optional("zentorch")  # registers the operators
    if module is None:
        raise Skip(f"zentorch does not import ({reason})")
    weights = [case.on_its_pages(weight.clone()) for weight in weights]

    def layer(inputs: Inputs) -> Tensor:
        y = torch.empty_like(inputs.x)
        torch.ops.zentorch.zentorch_fused_moe(
            y, inputs.x, *weights, None, None, inputs.topk_weights, inputs.topk_ids, False, "silu", *scales
        )  # fmt: skip
        return y

    return layer


@competitor("zentorch", modes=("forward",), default=False)
def zentorch(case: Case) -> Layer:
    """AMD's zentorch_fused_moe, packed weights."""
    return _layer(case, case.weights, [None, None])


@competitor("zentorch_int8", dtypes=("int8",), modes=("forward",), default=False)
def zentorch_int8(case: Case) -> Layer:
    """AMD's zentorch_fused_moe with int8 weights (a scale per row) and int8 activations (a scale per token)."""
    (gate_up, gate_up_scales), (down, down_scales) = map(int8_rows, case.weights)
    return _layer(case, [gate_up, down], [gate_up_scales, down_scales])

# SPDX-License-Identifier: BSD-3-Clause
"""One expert of a layer as a dense feed-forward network."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from switchgear.experts import Experts
from switchgear.layers.shared import SharedExperts
from switchgear.weights.checks import check_plain


@torch.no_grad()
def dense_expert(name: str, experts: nn.Module, expert: int) -> SharedExperts:
    """SharedExperts with a copy of the weights of `expert`. Raises ValueError, which names the layer, unless the
    experts are switchgear's, plain, and in this process."""
    if type(experts) is not Experts:
        raise ValueError(f"{name}: expected switchgear.Experts with plain weights, got {type(experts).__name__}")
    check_plain(name, experts)
    first: Tensor = getattr(experts, experts._first)[expert]
    second: Tensor = experts.down_proj[expert]
    if experts.transposed:
        first, second = first.mT, second.mT
    has_bias = experts.down_proj_bias is not None
    dense = SharedExperts(
        experts.hidden_size, experts.intermediate_size, activation=experts.activation, gated=experts.gated,
        bias=has_bias, alpha=experts.alpha, limit=experts.limit, device=first.device, dtype=first.dtype,
    )  # fmt: skip
    bias = getattr(experts, f"{experts._first}_bias")
    rows = {"weight": first} if not has_bias else {"weight": first, "bias": bias[expert]}
    for key, tensor in rows.items():
        if dense.gate_proj is None:
            getattr(dense.up_proj, key).copy_(tensor)
        else:
            gate, up = (tensor[0::2], tensor[1::2]) if experts.interleaved else tensor.chunk(2)
            getattr(dense.gate_proj, key).copy_(gate)
            getattr(dense.up_proj, key).copy_(up)
    dense.down_proj.weight.copy_(second)
    if experts.down_proj_bias is not None:
        dense.down_proj.bias.copy_(experts.down_proj_bias[expert])
    return dense.train(experts.training)

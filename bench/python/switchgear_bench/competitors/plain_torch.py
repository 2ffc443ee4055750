# SPDX-License-Identifier: BSD-3-Clause
"""Plain torch."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..case import Case, Inputs, Layer
from .registry import Skip, competitor


def _sorted_slots(inputs: Inputs, num_experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(token of each slot, its weight, tokens per expert), slots sorted by expert."""
    top_k = inputs.topk_ids.shape[1]
    order = inputs.topk_ids_int64.flatten().argsort(stable=True)
    weights = inputs.topk_weights_low.flatten()[order]
    return order // top_k, weights, torch.bincount(inputs.topk_ids_int64.flatten(), minlength=num_experts)


def check_grouped_mm() -> None:
    """Raises Skip if this torch has no grouped_mm."""
    if not hasattr(F, "grouped_mm"):
        raise Skip("needs torch.nn.functional.grouped_mm (torch 2.10)")


@competitor("torch_grouped_mm")
def torch_grouped_mm(case: Case) -> Layer:
    """torch.nn.functional.grouped_mm and index_add, nothing else."""
    check_grouped_mm()

    def layer(inputs: Inputs) -> Tensor:
        tokens, weights, counts = _sorted_slots(inputs, case.shape.num_experts)
        offsets = counts.cumsum(0).int()
        gate, up = F.grouped_mm(inputs.x[tokens], case.gate_up_proj.mT, offs=offsets).chunk(2, -1)
        rows = F.grouped_mm(F.silu(gate) * up, case.down_proj.mT, offs=offsets)
        return torch.zeros_like(inputs.x).index_add(0, tokens, rows * weights[:, None])

    return layer


@competitor("torch_loop", default=False)
def torch_loop(case: Case) -> Layer:
    """A loop over the experts by hand, on sorted tokens."""

    def layer(inputs: Inputs) -> Tensor:
        tokens, weights, counts = _sorted_slots(inputs, case.shape.num_experts)
        parts = torch.split(inputs.x[tokens], counts.tolist())
        rows = []
        # unbind instead of indexing: the gradient of weight[e] would be a zero tensor of the size of all experts
        for part, gate_up, down in zip(parts, case.gate_up_proj.unbind(), case.down_proj.unbind(), strict=True):
            if len(part):
                gate, up = F.linear(part, gate_up).chunk(2, -1)
                rows.append(F.linear(F.silu(gate) * up, down))
        return torch.zeros_like(inputs.x).index_add(0, tokens, torch.cat(rows) * weights[:, None])

    return layer

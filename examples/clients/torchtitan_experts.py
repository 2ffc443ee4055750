# SPDX-License-Identifier: BSD-3-Clause
"""torchtitan's GroupedExperts with the same parameters and keys, computed by switchgear's products."""

from __future__ import annotations

import small
import torch
from torch import Tensor
from torchtitan.models.common.moe import GroupedExperts

import switchgear


class SwitchgearExperts(GroupedExperts):
    """Rows come sorted by expert, as GroupedExperts takes them."""

    def forward(self, x_RD: Tensor, num_tokens_per_expert_E: Tensor) -> Tensor:
        offsets = torch.nn.functional.pad(num_tokens_per_expert_E.cumsum(0), (1, 0)).to(torch.int32)
        x = x_RD.bfloat16()
        gate = switchgear.grouped_gemm(x, self.w1_EFD.bfloat16(), offsets)
        up = switchgear.grouped_gemm(x, self.w3_EFD.bfloat16(), offsets)
        a = switchgear.glu(torch.cat((gate, up), 1))
        return switchgear.grouped_gemm(a, self.w2_EDF.bfloat16(), offsets).type_as(x_RD)


def train(name: str) -> float:
    """The norm of the gradient of w1 after a pass over 8,192 rows."""
    torch.manual_seed(0)
    config = GroupedExperts.Config(dim=1024, hidden_dim=512, num_experts=32)
    experts = (SwitchgearExperts if name == "switchgear" else GroupedExperts)(config)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.03)
    counts = torch.full((32,), 256)
    for _ in range(5):
        experts.zero_grad()
        experts(torch.randn(8192, 1024), counts).square().mean().backward()
    return experts.w1_EFD.grad.norm().item()


if __name__ == "__main__":
    small.compare("torchtitan's GroupedExperts", train, 1e-3)

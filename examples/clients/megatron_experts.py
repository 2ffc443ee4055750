# SPDX-License-Identifier: BSD-3-Clause
"""Megatron-Core's local experts (SequentialMLP) with the same parameters and keys, on switchgear's products."""

import small
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from torch.nn import functional as F

import switchgear


class SwitchgearMLP(SequentialMLP):  # rows come sorted by expert
    def forward(self, x, tokens_per_expert, permuted_probs):  # type: ignore[no-untyped-def]
        offsets = F.pad(tokens_per_expert.cumsum(0), (1, 0)).to(torch.int32)
        h = switchgear.grouped_gemm(x, torch.stack([e.linear_fc1.weight for e in self.local_experts]), offsets)
        a = switchgear.glu(h) * permuted_probs.unsqueeze(-1)
        return switchgear.grouped_gemm(a, torch.stack([e.linear_fc2.weight for e in self.local_experts]), offsets), None


CONFIG = TransformerConfig(
    num_layers=1, num_attention_heads=8, hidden_size=1024, num_moe_experts=32, moe_ffn_hidden_size=512,
    gated_linear_unit=True, activation_func=F.silu, add_bias_linear=False, bf16=True, use_cpu_initialization=True,
)  # fmt: skip


def train(name: str) -> float:
    """The norm of the gradient of an expert's first projection after a pass over 8,192 rows."""
    torch.manual_seed(0)
    spec = get_moe_module_spec(use_te=False, num_experts=32, moe_grouped_gemm=False).submodules.experts.submodules
    module = SwitchgearMLP if name == "switchgear" else SequentialMLP
    experts = module(32, CONFIG, spec, ProcessGroupCollection.use_mpu_process_groups()).bfloat16()
    for _ in range(5):
        experts.zero_grad()
        x, weights = torch.randn(8192, 1024).bfloat16(), torch.rand(8192).bfloat16()
        y = experts(x, torch.full((32,), 256), weights)[0]
        y.float().square().mean(1).sum().backward()
    return experts.local_experts[0].linear_fc1.weight.grad.float().norm().item()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    small.compare("Megatron-Core's local experts", train, 4e-3)  # bfloat16

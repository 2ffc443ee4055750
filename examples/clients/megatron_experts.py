# SPDX-License-Identifier: BSD-3-Clause
"""Megatron-Core's local experts (SequentialMLP) with the same parameters and keys, on switchgear's products."""

import small
import torch
from megatron.core import parallel_state
from megatron.core.models.gpt.moe_module_specs import get_moe_module_spec
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.moe.experts import SequentialMLP
from torch import Tensor

import switchgear


class SwitchgearMLP(SequentialMLP):
    """Rows come sorted by expert, as SequentialMLP takes them, and leave weighted."""

    def forward(self, x: Tensor, tokens_per_expert: Tensor, permuted_probs: Tensor) -> tuple[Tensor, None]:
        fc1 = torch.stack([expert.linear_fc1.weight for expert in self.local_experts])  # [E,2I,H]
        fc2 = torch.stack([expert.linear_fc2.weight for expert in self.local_experts])  # [E,H,I]
        offsets = torch.nn.functional.pad(tokens_per_expert.cumsum(0), (1, 0)).to(torch.int32)
        h = switchgear.grouped_gemm(x, fc1, offsets)
        a = switchgear.glu(h) * permuted_probs.unsqueeze(-1)
        return switchgear.grouped_gemm(a, fc2, offsets), None


CONFIG = TransformerConfig(
    num_layers=1, hidden_size=1024, num_attention_heads=8, num_moe_experts=32, moe_ffn_hidden_size=512,
    gated_linear_unit=True, activation_func=torch.nn.functional.silu, add_bias_linear=False,
    bf16=True, params_dtype=torch.bfloat16, use_cpu_initialization=True,
)  # fmt: skip


def train(name: str) -> float:
    """The norm of the gradient of an expert's first projection after a pass over 8,192 rows."""
    torch.manual_seed(0)
    spec = get_moe_module_spec(use_te=False, num_experts=32, moe_grouped_gemm=False).submodules.experts
    groups = ProcessGroupCollection.use_mpu_process_groups()
    experts = (SwitchgearMLP if name == "switchgear" else SequentialMLP)(32, CONFIG, spec.submodules, groups)
    counts = torch.full((32,), 256)
    for _ in range(5):
        experts.zero_grad()
        y, _ = experts(torch.randn(8192, 1024, dtype=torch.bfloat16), counts, torch.rand(8192, dtype=torch.bfloat16))
        y.float().square().mean(1).sum().backward()
    return experts.local_experts[0].linear_fc1.weight.grad.float().norm().item()


if __name__ == "__main__":
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()
    small.compare("Megatron-Core's local experts", train, 4e-3)  # bfloat16

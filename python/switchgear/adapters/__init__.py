# SPDX-License-Identifier: BSD-3-Clause
"""Small trainable weights added to frozen ones.

Adapters of experts:   add_lora(experts, rank)
Adapters as experts:   LoRAExperts around a Linear; add_lora_experts(model, …) and mixture(model, adapters), which
                       replace Linear layers of a model and return a Mixture; LowRankExperts, SharedRouter
Trained adapters:      read_lora -> Adapter of LowRank; train_gate
"""

from __future__ import annotations

from switchgear.adapters.lora import add_lora
from switchgear.adapters.lora_experts import LoRAExperts
from switchgear.adapters.lora_files import Adapter, LowRank, read_lora
from switchgear.adapters.low_rank import LowRankExperts
from switchgear.adapters.mixture import Mixture, SharedRouter, add_lora_experts, mixture
from switchgear.adapters.posthoc import train_gate

__all__ = [
    "Adapter",
    "LoRAExperts",
    "LowRank",
    "LowRankExperts",
    "Mixture",
    "SharedRouter",
    "add_lora",
    "add_lora_experts",
    "mixture",
    "read_lora",
    "train_gate",
]

# SPDX-License-Identifier: BSD-3-Clause
"""Small trainable weights added to frozen ones.

Adapters of experts:   add_lora(model, rank), lora_of, remove_lora; merge, unmerge; load_peft, save_peft: PEFT's files.
                       Models that PEFT has wrapped run on the kernels, too (wrappers.py). See docs/adapters.md
Adapters as experts:   LoRAExperts around a Linear; add_lora_experts(model, …) and mixture(model, adapters), which
                       replace Linear layers of a model and return a Mixture; LowRankExperts, SharedRouter
Trained adapters:      read_lora -> Adapter of LowRank; train_gate
"""

from __future__ import annotations

from switchgear.adapters.lora import ExpertAdapter, add_lora, lora_of, remove_lora
from switchgear.adapters.lora_experts import LoRAExperts, LowRankExperts
from switchgear.adapters.merge import merge, unmerge
from switchgear.adapters.mixture import Mixture, SharedRouter, add_lora_experts, mixture, train_gate
from switchgear.adapters.peft_files import load_peft, save_peft
from switchgear.adapters.peft_format import Adapter, LowRank, read_lora

__all__ = [
    "Adapter",
    "ExpertAdapter",
    "LoRAExperts",
    "LowRank",
    "LowRankExperts",
    "Mixture",
    "SharedRouter",
    "add_lora",
    "add_lora_experts",
    "load_peft",
    "lora_of",
    "merge",
    "mixture",
    "read_lora",
    "remove_lora",
    "save_peft",
    "train_gate",
    "unmerge",
]

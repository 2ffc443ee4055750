# SPDX-License-Identifier: BSD-3-Clause
"""What a model costs, from its config, and the scaling laws of MoE models, fitted to runs."""

from __future__ import annotations

from switchgear.analysis.cost import AttentionLayer, Cost, attention_layers, cost
from switchgear.analysis.laws import MoEScalingLaw, Optimum, PowerLaw, UpcyclingLaw, moe_parameters

__all__ = [
    "AttentionLayer",
    "Cost",
    "MoEScalingLaw",
    "Optimum",
    "PowerLaw",
    "UpcyclingLaw",
    "attention_layers",
    "cost",
    "moe_parameters",
]

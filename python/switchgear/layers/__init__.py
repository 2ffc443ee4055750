# SPDX-License-Identifier: BSD-3-Clause
"""Layers composed of the router, the experts and the grouped matrix products; one paper each."""

from switchgear.layers.autonomous import AutonomousMoE
from switchgear.layers.cartesian import CartesianMoE
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.initial import sigma_moe_values
from switchgear.layers.merged import MergedExperts
from switchgear.layers.monet import Monet, MonetExperts, MonetRouter, MonetRouting
from switchgear.layers.multi_head import MultiHeadMoE
from switchgear.layers.shared import GatedSharedExperts, SharedExperts
from switchgear.layers.soft import SoftMoE, per_conv_tokens
from switchgear.layers.stratified import StratifiedMoE
from switchgear.layers.virtual import VirtualExperts, with_virtual

__all__ = [
    "AutonomousMoE",
    "CartesianMoE",
    "GatedSharedExperts",
    "HeterogeneousExperts",
    "MergedExperts",
    "Monet",
    "MonetExperts",
    "MonetRouter",
    "MonetRouting",
    "MultiHeadMoE",
    "SharedExperts",
    "SoftMoE",
    "StratifiedMoE",
    "VirtualExperts",
    "per_conv_tokens",
    "sigma_moe_values",
    "with_virtual",
]

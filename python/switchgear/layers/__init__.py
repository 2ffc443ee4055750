# SPDX-License-Identifier: BSD-3-Clause
"""Layers composed of the router, the experts and the grouped matrix products; one paper each."""

from typing import TYPE_CHECKING

from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.shared import GatedSharedExperts, SharedExperts
from switchgear.layers.virtual import VirtualExperts, with_virtual
from switchgear.utils.moved import find_moved

if TYPE_CHECKING:
    from switchgear.papers.layers.autonomous import AutonomousMoE
    from switchgear.papers.layers.composed import CartesianMoE, MultiHeadMoE
    from switchgear.papers.layers.merged import MergedExperts
    from switchgear.papers.layers.monet import Monet, MonetExperts, MonetRouter, MonetRouting
    from switchgear.papers.layers.soft import SoftMoE, per_conv_tokens
    from switchgear.papers.layers.stratified import StratifiedMoE
    from switchgear.papers.parts.scores import sigma_moe_values

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

# Layers of single papers are in switchgear.papers.
MOVED = {
    "AutonomousMoE": "switchgear.papers.layers.autonomous",
    "CartesianMoE": "switchgear.papers.layers.composed",
    "MergedExperts": "switchgear.papers.layers.merged",
    "Monet": "switchgear.papers.layers.monet",
    "MonetExperts": "switchgear.papers.layers.monet",
    "MonetRouter": "switchgear.papers.layers.monet",
    "MonetRouting": "switchgear.papers.layers.monet",
    "MultiHeadMoE": "switchgear.papers.layers.composed",
    "SoftMoE": "switchgear.papers.layers.soft",
    "StratifiedMoE": "switchgear.papers.layers.stratified",
    "per_conv_tokens": "switchgear.papers.layers.soft",
    "sigma_moe_values": "switchgear.papers.parts.scores",
}
if not TYPE_CHECKING:
    __getattr__ = find_moved(__name__, MOVED)

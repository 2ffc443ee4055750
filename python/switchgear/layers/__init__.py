# SPDX-License-Identifier: BSD-3-Clause
"""Layers composed of the router, the experts and the grouped matrix products; one paper each."""

from typing import TYPE_CHECKING

from switchgear.layers.embedding import StoredEmbedding
from switchgear.layers.heterogeneous import HeterogeneousExperts
from switchgear.layers.linear import StoredLinear
from switchgear.layers.shared import GatedSharedExperts, SharedExperts
from switchgear.layers.virtual import VirtualExperts, with_virtual
from switchgear.utils.packages import find_moved

if TYPE_CHECKING:
    from switchgear.papers.layers.autonomous import *  # noqa: F403
    from switchgear.papers.layers.composed import *  # noqa: F403  # noqa: F403
    from switchgear.papers.layers.merged import *  # noqa: F403
    from switchgear.papers.layers.monet import *  # noqa: F403
    from switchgear.papers.layers.stitched import *  # noqa: F403
    from switchgear.papers.layers.stratified import *  # noqa: F403
    from switchgear.papers.parts.scores import *  # noqa: F403

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
    "SoftMoE": "switchgear.papers.layers.composed",
    "StitchLayer": "switchgear.papers.layers.stitched",
    "Stitched": "switchgear.papers.layers.stitched",
    "StratifiedMoE": "switchgear.papers.layers.stratified",
    "per_conv_tokens": "switchgear.papers.layers.composed",
    "sigma_moe_values": "switchgear.papers.parts.scores",
}
__all__ = [
    "GatedSharedExperts",
    "HeterogeneousExperts",
    "SharedExperts",
    "StoredEmbedding",
    "StoredLinear",
    "VirtualExperts",
    "with_virtual",
    *MOVED,
]
if not TYPE_CHECKING:
    __getattr__ = find_moved(__name__, MOVED)

# SPDX-License-Identifier: BSD-3-Clause
"""Compression of MoE models: calibrate, then prune, merge, sparsify or quantize experts. See docs/compression.md."""

from switchgear.compress.bits import BitAllocation, ExpertErrors, allocate_bits, packed_bytes
from switchgear.compress.calibration import Calibration, calibrate
from switchgear.compress.prune import Pruned, PrunedLayer, prune_experts

__all__ = [
    "BitAllocation",
    "Calibration",
    "ExpertErrors",
    "Pruned",
    "PrunedLayer",
    "allocate_bits",
    "calibrate",
    "packed_bytes",
    "prune_experts",
]

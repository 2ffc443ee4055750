# SPDX-License-Identifier: BSD-3-Clause
"""Compression of MoE models: calibrate, then prune, merge, sparsify or quantize experts. See docs/compression.md."""

from switchgear.compress.bits import BitAllocation, ExpertErrors, allocate_bits, packed_bytes
from switchgear.compress.calibration import Calibration, calibrate
from switchgear.compress.choose import PrunedLayer
from switchgear.compress.levels import expert_errors, gptq
from switchgear.compress.merge import Merged, MergedLayer, merge_experts
from switchgear.compress.progressive import ProgressivePruner
from switchgear.compress.prune import Pruned, Sparsified, SparsifiedLayer, prune_experts, prune_weights
from switchgear.compress.quantize import Quantized, QuantizedLayer, bits_of, quantize
from switchgear.compress.skip import Skipped, skip_experts

__all__ = [
    "BitAllocation",
    "Calibration",
    "ExpertErrors",
    "Merged",
    "MergedLayer",
    "ProgressivePruner",
    "Pruned",
    "PrunedLayer",
    "Quantized",
    "QuantizedLayer",
    "Skipped",
    "Sparsified",
    "SparsifiedLayer",
    "allocate_bits",
    "bits_of",
    "calibrate",
    "expert_errors",
    "gptq",
    "merge_experts",
    "packed_bytes",
    "prune_experts",
    "prune_weights",
    "quantize",
    "skip_experts",
]

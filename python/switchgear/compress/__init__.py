# SPDX-License-Identifier: BSD-3-Clause
"""Compression of MoE models: calibrate, then prune, merge, sparsify or quantize their experts. See docs/compression.md."""

from switchgear.compress.bits import BitAllocation, ExpertErrors, allocate_bits, packed_bytes
from switchgear.compress.calibration import Calibration, calibrate

__all__ = ["BitAllocation", "Calibration", "ExpertErrors", "allocate_bits", "calibrate", "packed_bytes"]

# SPDX-License-Identifier: BSD-3-Clause
"""Experts with fewer bits.

compact(model), weights in 4 bits fewer each, without loss, and its inverse expand; quantize(model, "int8" | "int4") and
its inverse dequantize; Format, and format_of(module); add_lora(experts, rank).
"""

from __future__ import annotations

from switchgear.compress.compact import compact, expand
from switchgear.compress.formats import Format, format_of
from switchgear.compress.lora import add_lora
from switchgear.compress.quantize import dequantize, quantize

__all__ = ["Format", "add_lora", "compact", "dequantize", "expand", "format_of", "quantize"]

# SPDX-License-Identifier: BSD-3-Clause
"""Small trained weights around frozen ones: add_lora(experts, rank)."""

from __future__ import annotations

from switchgear.adapters.lora import add_lora

__all__ = ["add_lora"]

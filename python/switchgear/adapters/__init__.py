# SPDX-License-Identifier: BSD-3-Clause
"""Small trainable weights added to frozen ones: add_lora(experts, rank)."""

from __future__ import annotations

from switchgear.adapters.lora import add_lora

__all__ = ["add_lora"]

# SPDX-License-Identifier: BSD-3-Clause
"""The sizes of a layer."""

from __future__ import annotations

from typing import NamedTuple


class Shape(NamedTuple):
    tokens: int
    hidden_size: int
    intermediate_size: int
    num_experts: int
    top_k: int

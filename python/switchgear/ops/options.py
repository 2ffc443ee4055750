# SPDX-License-Identifier: BSD-3-Clause
"""The options of the activation between an expert's projections, as one value."""

from __future__ import annotations

from typing import Any, NamedTuple


class GluOptions(NamedTuple):
    """As the ops take them, `*options`; see `switchgear.glu` for what they mean."""

    activation: str = "silu"
    gated: bool = True
    interleaved: bool = False
    alpha: float = 1.702  # swiglu_oai alone reads it
    limit: float = 0.0  # 0: none

    def keywords(self) -> dict[str, Any]:
        """As `switchgear.glu` and `switchgear.moe` take them."""
        activation, gated, interleaved, alpha, limit = self  # one by one, as torch.compile wants it
        return {
            "activation": activation, "gated": gated, "interleaved": interleaved, "alpha": alpha, "limit": limit or None,
        }  # fmt: skip
